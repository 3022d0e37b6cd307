//! Bursts of frames that are one buffer each, header and frame behind each
//! other: what drivers send and give unless a frame is long. In the caller's
//! buffer they lie in the same way, so a frame is one copy, and what is checked
//! is that copy. All else is burst.zig's.

const layout = @import("../layout.zig");
const prefetch = @import("../prefetch.zig");
const chain = @import("../ring/chain.zig");
const single = @import("../ring/single.zig");
const memory = @import("../memory/memory.zig");
const burst = @import("burst.zig");
const counting = @import("counts.zig");
const headers = @import("header.zig");

const Header = headers.Header;
const header_size = layout.net_header_size;
const Single = single.Single;

/// The first lines of a buffer come nearer; the rest of a long frame comes by
/// itself.
inline fn expect(one: *align(4) const Single, length: u32, comptime prefetchLine: anytype) void {
    const most = 4 * 64;
    const pointer = one.pointer();
    var at: u32 = 0;
    while (at < @min(length, most)) : (at += 64) prefetchLine(pointer + at);
    // A buffer need not begin where a line does.
    prefetchLine(pointer + @min(length, most) - 1);
}

/// Not an errno: what comes next in the ring is more than one buffer.
pub const other_shape = 1;

/// As `burst.receive`, for the frames up to the first of another shape; `list`
/// has room for all. Returns 0, a negative errno, or `other_shape`.
pub fn receive(receiver: *burst.Receiver, list: [*]align(4) Single) i32 {
    const ring = receiver.ring;
    if (!ring.isUsable()) return ring.failure();
    return switch (ring.format) {
        inline else => |*format| receiveFrom(receiver, format, list),
    };
}

inline fn receiveFrom(receiver: *burst.Receiver, format: anytype, list: [*]align(4) Single) i32 {
    const ring = receiver.ring;
    var cache = ring.cache;
    defer ring.cache = cache;
    var taker: single.Taker(0) = .{ .lookup = .{ .table = receiver.table, .cache = &cache }, .size = ring.size, .list = list };
    format.takeSingles(ring, &taker, receiver.max);
    const taken = taker.count;
    for (list[0..taken]) |*one| expect(one, one.length, prefetch.forReading);

    var done: u32 = 0;
    for (list[0..taken]) |*one| {
        if (!(receiveOne(receiver, one) orelse break)) receiver.counts.errors += 1;
        done += 1;
    }
    // What was copied since a fault may be zeros that nobody wrote.
    if (!ring.isUsable()) return ring.failure();
    receiver.progress.chains = done;
    if (ring.log) |log| log.begin(ring.memory);
    defer if (ring.log) |log| log.end(ring.memory);
    receiver.progress.call = @intCast(single.giveBack(ring, format, list[0..done], taken, true));
    return if (taker.has_other and done == taken) other_shape else 0;
}

/// Whether it was a good frame; null when there is no room for it.
inline fn receiveOne(receiver: *burst.Receiver, one: *align(4) const Single) ?bool {
    const length = one.length -| header_size;
    if (length < headers.frame_minimum or length > layout.net_frame_maximum) return false;
    const frame = receiver.place(length) orelse return null;
    memory.copyBytes(frame - header_size, one.pointer(), one.length);
    // The copy is what is checked, and where nobody can change it.
    const place = (frame - header_size)[0..header_size];
    const header: Header = .load(place);
    const checked = if (header.isPlain()) Header{} else header.checked(length, receiver.flags) orelse return false;
    checked.store(place);
    receiver.add(frame, length);
    return true;
}

/// As `burst.send`, for the frames up to the first that does not fit in the one
/// buffer that is next. Returns 0, or a negative errno.
pub fn send(sender: *burst.Sender, list: [*]align(4) Single) i32 {
    const ring = sender.ring;
    if (!ring.isUsable()) return ring.failure();
    if (ring.log) |log| log.begin(ring.memory);
    defer if (ring.log) |log| log.end(ring.memory);
    // Buffers are logged: burst.zig remembers what was written where.
    if (ring.log) |log| if (log.table != null) return 0;
    return switch (ring.format) {
        inline else => |*format| sendTo(sender, format, list),
    };
}

inline fn sendTo(sender: *burst.Sender, format: anytype, list: [*]align(4) Single) i32 {
    const ring = sender.ring;
    const frames = sender.frames[sender.progress.frames..];
    var cache = ring.cache;
    defer ring.cache = cache;
    var taker: single.Taker(chain.flag_write) = .{ .lookup = .{ .table = sender.table, .cache = &cache }, .size = ring.size, .list = list };
    format.takeSingles(ring, &taker, @intCast(@min(frames.len, layout.net_burst_maximum)));
    const taken = taker.count;
    for (list[0..taken], frames[0..taken]) |*one, frame| {
        expect(one, @min(one.length, header_size + frame.length), prefetch.forWriting);
    }

    var done: u32 = 0;
    var sent: u32 = 0;
    while (done < taken and sent < frames.len) : (sent += 1) {
        const frame = frames[sent];
        const one = &list[done];
        if (header_size + frame.length > one.length) break;
        const bytes = (sender.buffer + frame.offset)[0..frame.length];
        var header: Header = sender.prepared(bytes) orelse {
            sender.counts.dropped += 1;
            continue;
        };
        header.num_buffers = 1;
        var encoded: [header_size]u8 = undefined;
        header.store(&encoded);
        memory.copyBytes(one.pointer(), &encoded, header_size);
        memory.copyBytes(one.pointer() + header_size, bytes.ptr, frame.length);
        one.written = header_size + frame.length;
        counting.add(sender.counts, bytes.ptr, frame.length);
        done += 1;
    }
    if (!ring.isUsable()) return ring.failure();
    sender.progress.frames += sent;
    sender.progress.chains += done;
    if (single.giveBack(ring, format, list[0..done], taken, false) == 1) sender.progress.call = 1;
    return 0;
}
