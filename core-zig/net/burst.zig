//! Bursts of frames between a caller's buffer and the rings of a network
//! device (virtio 1.3, 5.1.6): one call pops, checks, copies, and gives the
//! chains back, so that nothing of it is in flight between two calls.
//!
//!   transmit chain:  header, frame       (all readable)
//!   receive chain:   header, frame       (all writable); with MRG_RXBUF a
//!                    frame goes on in the chains that follow
//!
//! Where descriptors cut header and frame is the driver's choice.

const std = @import("std");
const layout = @import("../layout.zig");
const linux = @import("../linux.zig");
const chain = @import("../ring/chain.zig");
const rings = @import("../ring/ring.zig");
const memory = @import("../memory/memory.zig");
const checksum = @import("checksum.zig");
const counting = @import("counts.zig");
const headers = @import("header.zig");
const prefetch = @import("../prefetch.zig");
const single = @import("../ring/single.zig");
const singles = @import("singles.zig");

const Frame = layout.Frame;
const Header = headers.Header;
const Counts = layout.NetCounts;
const Progress = layout.NetProgress;
const progress_words = @sizeOf(Progress) / 4;
const header_size = layout.net_header_size;
const burst = layout.net_burst_maximum;

/// Frames begin at multiples of this in the caller's buffer, so that it can
/// read their fields as words.
pub const frame_alignment = 16;

const chains_ahead = 4;

/// The requests that one pop has left in the scratch area.
const Chains = struct {
    words: [*]u32,
    word_count: u32,
    stride: u32,
    segments: [*]const layout.Segment,
    count: u32,

    fn init(ring: *const rings.Ring, scratch: [*]u32, scratch_words: u32) ?Chains {
        const taken = progress_words + Completions.words;
        if (scratch_words < taken) return null;
        return .{
            .words = scratch + taken,
            .word_count = scratch_words - taken,
            .stride = chain.recordStride(ring.header_bytes),
            .segments = undefined,
            .count = 0,
        };
    }

    /// Room for `max` chains of one buffer, which need no records; null where
    /// they are not for this ring, or do not fit.
    fn singlesOf(self: *const Chains, ring: *const rings.Ring, max: u32) ?[*]align(4) single.Single {
        if (!single.suits(ring) or max * single.words > self.word_count) return null;
        return @ptrCast(self.words);
    }

    /// Returns how many there are, or a negative errno.
    fn pop(self: *Chains, handle: u32, max: u32) i32 {
        const popped = rings.pop(handle, self.words, self.word_count, max);
        self.count = if (popped > 0) @intCast(popped) else 0;
        self.segments = @ptrCast(self.words + @as(usize, max) * self.stride);
        return popped;
    }

    inline fn at(self: *const Chains, index: u32) *const layout.Request {
        return @ptrCast(self.words + @as(usize, index) * self.stride);
    }

    /// The header's bytes of a record.
    inline fn headerOf(self: *const Chains, index: u32) *const [header_size]u8 {
        return @ptrCast(self.words + @as(usize, index) * self.stride + chain.request_words);
    }

    /// The first bytes of a chain's first buffer, some chains ahead, begin to
    /// come from the driver's processor.
    inline fn expect(self: *const Chains, table: *const memory.Table, index: u32, comptime prefetchLine: anytype) void {
        if (index + chains_ahead >= self.count) return;
        const record = self.at(index + chains_ahead);
        const segment = &self.segments[record.segment_first];
        if (record.readable_count + record.writable_count == 0) return;
        const pointer = table.pointerOf(segment.view, segment.offset, 1) orelse return;
        prefetchLine(pointer);
        prefetchLine(pointer + 64);
    }

    /// Those from `first` on stay in the ring.
    fn keep(self: *Chains, ring: *rings.Ring, first: u32) void {
        while (self.count > first) {
            self.count -= 1;
            ring.unpop(self.at(self.count).head);
        }
    }
};

/// What goes back to the driver at the end; in the scratch area, as a list of
/// its own on the stack would be cleared for each burst.
const Completions = struct {
    list: [*]layout.Completion,
    count: u32 = 0,

    const words = burst * @sizeOf(layout.Completion) / 4;

    fn init(scratch: [*]u32) Completions {
        return .{ .list = @ptrCast(scratch + progress_words) };
    }

    inline fn add(self: *Completions, head: u32, written: u32) void {
        self.list[self.count] = .{ .head = head, .written = written };
        self.count += 1;
    }

    /// Returns 0, or a negative errno.
    fn push(self: *Completions, handle: u32, progress: *Progress) i32 {
        if (self.count == 0) return 0;
        const result = rings.push(handle, self.list, self.count);
        progress.chains += self.count;
        self.count = 0;
        if (result < 0) return result;
        if (result == 1) progress.call = 1;
        return 0;
    }
};

/// Takes up to `max` frames out of a transmit queue, whose ring was made with
/// `header_bytes` of the guest's header. `flags` says what the driver may have
/// left undone. Progress is in the first words of `scratch`. Returns 0, -EPROTO
/// or -EFAULT for a ring that is broken, -EINVAL for parameters, -EAGAIN when
/// it waits for the IOTLB; `ring_misses` says what it lacks, also after a 0.
pub fn receive(handle: u32, scratch: [*]u32, scratch_words: u32, frames: [*]Frame, max: u32, buffer: [*]u8, buffer_size: u32, flags: u32, counts: *Counts) callconv(.c) i32 {
    const ring = rings.get(handle) orelse return linux.fail(.BADF);
    const chains = Chains.init(ring, scratch, scratch_words) orelse return linux.fail(.INVAL);
    const progress: *Progress = @ptrCast(scratch);
    progress.* = std.mem.zeroes(Progress);
    if (max == 0 or max > burst or buffer_size < frame_alignment + layout.net_frame_maximum) return linux.fail(.INVAL);
    if (ring.header_bytes > header_size) return linux.fail(.INVAL);
    // What is popped can be pushed, whatever becomes of the IOTLB.
    const entered = ring.enter();
    if (entered != 0) return entered;
    defer ring.leave();

    var receiver: Receiver = .{
        .handle = handle,
        .ring = ring,
        .table = ring.memory.enter(),
        .chains = chains,
        .frames = frames,
        .max = max,
        .buffer = buffer,
        .buffer_size = buffer_size,
        .flags = flags,
        .counts = counts,
        .progress = progress,
        .completions = .init(scratch),
    };
    defer ring.memory.leave();
    return receiver.run();
}

/// One call of `receive`; singles.zig does its part with the same.
pub const Receiver = struct {
    handle: u32,
    ring: *rings.Ring,
    table: *const memory.Table,
    chains: Chains,
    frames: [*]Frame,
    max: u32,
    buffer: [*]u8,
    buffer_size: u32,
    flags: u32,
    counts: *Counts,
    progress: *Progress,
    completions: Completions,
    /// Where the buffer is free.
    position: u32 = 0,

    fn run(self: *Receiver) i32 {
        if (self.ring.header_bytes == header_size) {
            if (self.chains.singlesOf(self.ring, self.max)) |list| {
                const result = singles.receive(self, list);
                if (result != singles.other_shape) return result;
            }
        }
        const popped = self.chains.pop(self.handle, self.max - self.progress.frames);
        // What came before it has been given back.
        if (popped <= 0) return if (self.progress.chains != 0) 0 else popped;
        // A region may have come since the call began, and the pop has seen it.
        self.table = self.ring.memory.current();
        var index: u32 = 0;
        while (index < self.chains.count) : (index += 1) {
            self.chains.expect(self.table, index, prefetch.forReading);
            const record = self.chains.at(index);
            const length = record.readable_bytes;
            const header = checkedHeader(&self.chains, index, self.ring.header_bytes, self.flags) orelse {
                self.counts.errors += 1;
                self.completions.add(record.head, 0);
                continue;
            };
            const frame = self.place(length) orelse {
                self.chains.keep(self.ring, index);
                break;
            };
            if (!gather(self.table, &self.chains, record, frame)) return linux.fail(.FAULT);
            header.store((frame - header_size)[0..header_size]);
            self.add(frame, length);
            self.completions.add(record.head, 0);
        }
        // What was copied since a fault may be zeros that nobody wrote.
        if (!self.ring.isUsable()) return self.ring.failure();
        return self.completions.push(self.handle, self.progress);
    }

    /// Where a frame goes, its header in front; null when there is no room, as
    /// for the first of a burst there always is.
    pub inline fn place(self: *const Receiver, length: u32) ?[*]u8 {
        const start = self.position + frame_alignment;
        return if (length > self.buffer_size - start) null else self.buffer + start;
    }

    /// The frame is there.
    pub inline fn add(self: *Receiver, frame: [*]const u8, length: u32) void {
        const start = self.position + frame_alignment;
        self.frames[self.progress.frames] = .{ .offset = start, .length = length };
        self.progress.frames += 1;
        // No overflow, as all of it is in the buffer; behind it nothing fits.
        self.position = @min(std.mem.alignForward(u32, start + length, frame_alignment), self.buffer_size - frame_alignment);
        counting.add(self.counts, frame, length);
    }
};

inline fn checkedHeader(chains: *const Chains, index: u32, header_bytes: u32, flags: u32) ?Header {
    const record = chains.at(index);
    if (record.header_length < header_bytes) return null;
    if (record.readable_bytes < headers.frame_minimum or record.readable_bytes > layout.net_frame_maximum) return null;
    const header: Header = .load(chains.headerOf(index));
    if (header.isPlain()) return .{};
    return header.checked(record.readable_bytes, flags);
}

/// Copies a request's readable bytes. False when memory has gone.
inline fn gather(table: *const memory.Table, chains: *const Chains, record: *const layout.Request, to: [*]u8) bool {
    var at = to;
    for (chains.segments[record.segment_first..][0..record.readable_count]) |segment| {
        const from = table.pointerOf(segment.view, segment.offset, segment.length) orelse return false;
        memory.copyBytes(at, from, segment.length);
        at += segment.length;
    }
    return true;
}

/// Writes bytes into the writable segments of chains, one behind the other.
const Scatter = struct {
    table: *const memory.Table,
    chains: *const Chains,
    /// The chain being filled, its segment, and bytes of that which are done.
    index: u32,
    segment: u32 = 0,
    done: u32 = 0,

    /// There must be room. False when memory has gone.
    inline fn write(self: *Scatter, bytes: []const u8) bool {
        var from = bytes;
        while (from.len != 0) {
            const record = self.chains.at(self.index);
            if (self.segment == record.writable_count) {
                self.index += 1;
                self.segment = 0;
                continue;
            }
            const segment = &self.chains.segments[record.segment_first + record.readable_count + self.segment];
            const length: u32 = @intCast(@min(from.len, segment.length - self.done));
            const to = self.table.pointerOf(segment.view, segment.offset + self.done, length) orelse return false;
            memory.copyBytes(to, from.ptr, length);
            from = from[length..];
            self.done += length;
            if (self.done == segment.length) {
                self.segment += 1;
                self.done = 0;
            }
        }
        return true;
    }
};

/// Puts frames `first` to `first + count` of a buffer into a receive queue.
/// `flags` says what the driver will complete itself; what it will not is done
/// here, in the buffer, or the frame is dropped. Stops where no chains are left
/// for a frame. Progress and results are as `receive`'s.
pub fn send(handle: u32, scratch: [*]u32, scratch_words: u32, frames: [*]const Frame, first: u32, count: u32, buffer: [*]u8, buffer_size: u32, flags: u32, counts: *Counts) callconv(.c) i32 {
    const ring = rings.get(handle) orelse return linux.fail(.BADF);
    const chains = Chains.init(ring, scratch, scratch_words) orelse return linux.fail(.INVAL);
    const progress: *Progress = @ptrCast(scratch);
    progress.* = std.mem.zeroes(Progress);
    const list = frames[first..][0..count];
    for (list) |frame| {
        if (frame.offset < header_size or frame.offset > buffer_size or
            frame.length > buffer_size - frame.offset or frame.length == 0) return linux.fail(.INVAL);
    }
    const entered = ring.enter();
    if (entered != 0) return entered;
    defer ring.leave();
    var sender: Sender = .{
        .handle = handle,
        .ring = ring,
        .table = ring.memory.enter(),
        .chains = chains,
        .frames = list,
        .buffer = buffer,
        .flags = flags,
        .counts = counts,
        .progress = progress,
        .completions = .init(scratch),
    };
    defer ring.memory.leave();
    return sender.run();
}

/// One call of `send`; singles.zig does its part with the same.
pub const Sender = struct {
    handle: u32,
    ring: *rings.Ring,
    table: *const memory.Table,
    chains: Chains,
    frames: []const Frame,
    buffer: [*]u8,
    flags: u32,
    counts: *Counts,
    progress: *Progress,
    completions: Completions,

    fn run(self: *Sender) i32 {
        // How many chains are popped at once: as many as frames, until one
        // frame needs more.
        var wanted: u32 = 1;
        const has_short_header = self.flags & layout.flag_net_short_header != 0;
        const list = if (has_short_header) null else self.chains.singlesOf(self.ring, burst);
        while (self.progress.frames < self.frames.len) {
            if (list) |room| {
                const start = self.progress.frames;
                const result = singles.send(self, room);
                if (result < 0) return result;
                if (self.progress.frames != start) continue;
            }
            const left: u32 = @intCast(self.frames.len - self.progress.frames);
            const max = @min(burst, @max(left, wanted));
            const popped = self.chains.pop(self.handle, max);
            if (popped < 0) return popped;
            if (popped == 0) return 0;
            // As in `receive`.
            self.table = self.ring.memory.current();
            const before = self.progress.frames;
            const used = self.fill() orelse return if (self.ring.isUsable()) linux.fail(.FAULT) else self.ring.failure();
            const is_short = used < self.chains.count;
            self.chains.keep(self.ring, used);
            const result = self.completions.push(self.handle, self.progress);
            if (result < 0) return result;
            if (!is_short or self.progress.frames == self.frames.len) continue;
            // The chains that were left did not suffice for the next frame.
            if (wanted == burst and self.progress.frames == before) {
                if (popped < burst) return 0;
                // Nor would ever so many of this kind.
                self.progress.frames += 1;
                self.counts.dropped += 1;
                wanted = 1;
            } else wanted = burst;
        }
        return 0;
    }

    /// Frames into the chains popped; returns how many of these are used up,
    /// or null when memory has gone.
    fn fill(self: *Sender) ?u32 {
        const is_mergeable = self.flags & layout.flag_net_mergeable != 0;
        const size: u32 = if (self.flags & layout.flag_net_short_header != 0) header_size - 2 else header_size;
        var index: u32 = 0;
        while (index < self.chains.count and self.progress.frames < self.frames.len) {
            self.chains.expect(self.table, index, prefetch.forWriting);
            const frame = self.frames[self.progress.frames];
            const bytes = (self.buffer + frame.offset)[0..frame.length];
            var header = self.prepared(bytes) orelse {
                self.progress.frames += 1;
                self.counts.dropped += 1;
                continue;
            };
            const needed = size + frame.length;
            var room: u64 = self.chains.at(index).writable_bytes;
            var end = index + 1;
            while (room < needed and is_mergeable and end < self.chains.count) : (end += 1) {
                room += self.chains.at(end).writable_bytes;
            }
            if (room < needed) {
                if (is_mergeable) return index;
                // The driver gave too small a buffer (5.1.6.3.1): it gets that
                // back empty.
                self.completions.add(self.chains.at(index).head, 0);
                self.counts.dropped += 1;
                self.progress.frames += 1;
                index += 1;
                continue;
            }
            header.num_buffers = @intCast(end - index);
            var encoded: [header_size]u8 = undefined;
            header.store(&encoded);
            var scatter: Scatter = .{ .table = self.table, .chains = &self.chains, .index = index };
            if (!scatter.write(encoded[0..size]) or !scatter.write(bytes)) return null;
            var left = needed;
            for (index..end) |i| {
                const record = self.chains.at(@intCast(i));
                const written = @min(left, record.writable_bytes);
                self.completions.add(record.head, written);
                left -= written;
            }
            counting.add(self.counts, bytes.ptr, frame.length);
            self.progress.frames += 1;
            index = end;
        }
        return if (self.ring.isUsable()) index else null;
    }

    /// The header for this driver; null when the frame cannot be made fit.
    pub inline fn prepared(self: *Sender, bytes: []u8) ?Header {
        const place = (bytes.ptr - header_size)[0..header_size];
        var header: Header = .load(place);
        if (header.isPlain()) return .{};
        const needed = header.offloads() orelse return null;
        header.flags &= headers.flag_needs_checksum | headers.flag_data_valid;
        if (needed & ~self.flags == 0) {
            if (self.flags & layout.net_offload_checksum == 0) header.flags = 0;
            return header;
        }
        if (header.gso_type != headers.gso_none or !checksum.complete(bytes, header)) return null;
        header = .{};
        // Whoever gets the same frame next need not do it again.
        header.store(place);
        return header;
    }
};

test "memory that comes while a burst is under way can be used in it" {
    const fake_guest = @import("../ring/fake_guest.zig");
    const Guest = fake_guest.Guest;
    const guest = try Guest.start(.{ .header_bytes = header_size });
    defer guest.stop();
    const caller = try @import("burst_test.zig").Caller.create();
    defer caller.destroy();
    const ring = rings.get(guest.ring).?;
    const chains = Chains.init(ring, &caller.scratch, caller.scratch.len).?;
    const progress: *Progress = @ptrCast(&caller.scratch);
    progress.* = std.mem.zeroes(Progress);
    const list = [1]Frame{.{ .offset = 32, .length = 60 }};
    caller.put(0, 32, 60, 0x42);
    const start = ring.memory.enter();
    defer ring.memory.leave();
    var receiver: Receiver = .{
        .handle = guest.ring,
        .ring = ring,
        .table = start,
        .chains = chains,
        .frames = &caller.frames,
        .max = 64,
        .buffer = &caller.buffer,
        .buffer_size = caller.buffer.len,
        .flags = 0,
        .counts = &caller.counts,
        .progress = progress,
        .completions = .init(&caller.scratch),
    };
    var sender: Sender = .{
        .handle = guest.ring,
        .ring = ring,
        .table = start,
        .chains = chains,
        .frames = &list,
        .buffer = &caller.buffer,
        .flags = 0,
        .counts = &caller.counts,
        .progress = progress,
        .completions = .init(&caller.scratch),
    };

    // Another thread adds a region, and the driver uses it at once.
    const added = fake_guest.high + fake_guest.region_size;
    const fd = linux.result(linux.linux.memfd_create("added", 0));
    defer linux.closeQuietly(fd);
    try std.testing.expectEqual(0, linux.linux.ftruncate(fd, fake_guest.region_size));
    const request = [1]layout.RegionRequest{.{ .gpa = added, .uva = added + fake_guest.uva_offset, .size = fake_guest.region_size, .mmap_offset = 0, .address = 0, .fd = fd, .flags = 0 }};
    var result: layout.PrepareResult = undefined;
    var retired: [1]u32 = undefined;
    try std.testing.expectEqual(0, memory.prepare(guest.memory, layout.prepare_add, &request, 1, &result));
    try std.testing.expectEqual(0, memory.commit(guest.memory, &retired, retired.len));

    guest.describe(Guest.descriptors, 0, added, header_size + 60, fake_guest.write, 0);
    guest.offer(0);
    try std.testing.expectEqual(0, sender.run());
    try std.testing.expectEqual(1, progress.frames);
    try std.testing.expectEqual(header_size + 60, guest.usedAt(0).length);

    progress.* = std.mem.zeroes(Progress);
    guest.describe(Guest.descriptors, 1, added, header_size + 60, 0, 0);
    guest.offer(1);
    @memset(&caller.buffer, 0);
    try std.testing.expectEqual(0, receiver.run());
    try std.testing.expectEqual(1, progress.frames);
    try std.testing.expectEqualSlices(u8, &@as([60]u8, @splat(0x42)), caller.frame(0));
    try std.testing.expectEqual(0, guest.state().in_flight);
}

test {
    _ = headers;
    _ = checksum;
    _ = @import("burst_test.zig");
    _ = @import("singles_test.zig");
}
