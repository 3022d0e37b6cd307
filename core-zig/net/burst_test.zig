//! Bursts between a buffer and the rings of a fake driver.

const std = @import("std");
const layout = @import("../layout.zig");
const linux = @import("../linux.zig");
const rings = @import("../ring/ring.zig");
const fake_guest = @import("../ring/fake_guest.zig");
const packed_guest = @import("../ring/fake_packed_guest.zig");
const burst = @import("burst.zig");
const headers = @import("header.zig");
const Guest = fake_guest.Guest;
const PackedGuest = packed_guest.PackedGuest;
const Header = headers.Header;
const expect = std.testing.expect;
const expectEqual = std.testing.expectEqual;
const write = fake_guest.write;

const buffer_size = 16 + layout.net_frame_maximum;

/// The caller's side: a buffer with room for one longest frame.
pub const Caller = struct {
    scratch: [8192 + 16 + 512]u32 = undefined,
    frames: [64]layout.Frame = undefined,
    buffer: [buffer_size]u8 align(16) = undefined,
    counts: layout.NetCounts = std.mem.zeroes(layout.NetCounts),

    pub fn create() !*Caller {
        const self = try std.testing.allocator.create(Caller);
        self.* = .{};
        return self;
    }

    pub fn destroy(self: *Caller) void {
        std.testing.allocator.destroy(self);
    }

    fn progress(self: *Caller) layout.NetProgress {
        return @as(*layout.NetProgress, @ptrCast(&self.scratch)).*;
    }

    pub fn receive(self: *Caller, guest: *Guest, max: u32, flags: u32) !layout.NetProgress {
        try expectEqual(0, burst.receive(guest.ring, &self.scratch, self.scratch.len, &self.frames, max, &self.buffer, buffer_size, flags, &self.counts));
        return self.progress();
    }

    pub fn send(self: *Caller, guest: *Guest, count: u32, flags: u32) !layout.NetProgress {
        try expectEqual(0, burst.send(guest.ring, &self.scratch, self.scratch.len, &self.frames, 0, count, &self.buffer, buffer_size, flags, &self.counts));
        return self.progress();
    }

    pub fn frame(self: *Caller, index: u32) []u8 {
        return self.buffer[self.frames[index].offset..][0..self.frames[index].length];
    }

    fn header(self: *Caller, index: u32) Header {
        return .load(self.buffer[self.frames[index].offset - 12 ..][0..12]);
    }

    /// A frame to send: `length` bytes of `value`.
    pub fn put(self: *Caller, index: u32, offset: u32, length: u32, value: u8) void {
        self.frames[index] = .{ .offset = offset, .length = length };
        @memset(self.buffer[offset - 12 ..][0..12], 0);
        @memset(self.buffer[offset..][0..length], value);
    }
};

/// Offers a transmit chain: header and frame, cut where `parts` say.
pub fn offerFrame(guest: *Guest, first: u16, header: Header, bytes: []const u8, parts: []const u32) void {
    const place = Guest.buffers + @as(u64, first) * 2048;
    var encoded: [12]u8 = undefined;
    header.store(&encoded);
    guest.fill(place, &encoded);
    guest.fill(place + 12, bytes);
    var list: [16][2]u32 = undefined;
    for (parts, list[0..parts.len]) |part, *one| one.* = .{ part, 0 };
    _ = fake_guest.link(guest, first, place, list[0..parts.len]);
    guest.offer(first);
}

test "a frame arrives whole with its header, however both are cut" {
    const guest = try Guest.start(.{ .size = 64, .header_bytes = 12 });
    defer guest.stop();
    const caller = try Caller.create();
    defer caller.destroy();
    var bytes: [100]u8 = undefined;
    for (&bytes, 0..) |*byte, i| byte.* = @intCast(i);
    const header: Header = .{ .flags = 1, .csum_start = 34, .csum_offset = 16 };
    const cuts = [_][]const u32{ &.{112}, &.{ 12, 100 }, &.{ 1, 1, 1, 9, 100 }, &.{ 11, 2, 99 }, &.{ 5, 5, 5, 97 } };
    for (cuts, 0..) |parts, i| offerFrame(guest, @intCast(i * 8), header, &bytes, parts);
    const progress = try caller.receive(guest, 64, layout.net_offload_checksum);
    try expectEqual(cuts.len, progress.frames);
    try expectEqual(cuts.len, progress.chains);
    for (0..cuts.len) |i| {
        try std.testing.expectEqualSlices(u8, &bytes, caller.frame(@intCast(i)));
        try expectEqual(header, caller.header(@intCast(i)));
        try expectEqual(0, caller.frames[i].offset % 16);
    }
    try expectEqual(cuts.len, guest.usedIndex());
    try expectEqual(5, caller.counts.to_127);
    try expectEqual(500, caller.counts.bytes);
}

test "what is no frame goes back at once, is counted, and is not delivered" {
    const guest = try Guest.start(.{ .size = 64, .header_bytes = 12 });
    defer guest.stop();
    const caller = try Caller.create();
    defer caller.destroy();
    const bytes: [64]u8 = @splat(2);
    // Shorter than the header, just the header, less than an Ethernet header.
    offerFrame(guest, 0, .{}, &bytes, &.{4});
    offerFrame(guest, 4, .{}, &bytes, &.{12});
    offerFrame(guest, 8, .{}, &bytes, &.{ 12, 13 });
    // Not negotiated.
    offerFrame(guest, 12, .{ .flags = 1, .csum_start = 34, .csum_offset = 6 }, &bytes, &.{76});
    // Longer than frames are.
    _ = fake_guest.link(guest, 16, Guest.buffers, &.{ .{ 12 + layout.net_frame_maximum, 0 }, .{ 1, 0 } });
    guest.offer(16);
    // And a good one.
    offerFrame(guest, 20, .{}, &bytes, &.{76});
    const progress = try caller.receive(guest, 64, 0);
    try expectEqual(1, progress.frames);
    try expectEqual(6, progress.chains);
    try expectEqual(5, caller.counts.errors);
    try std.testing.expectEqualSlices(u8, &bytes, caller.frame(0));
}

test "what does not fit the buffer stays in the ring for the next burst" {
    const guest = try Guest.start(.{ .size = 64, .header_bytes = 12 });
    defer guest.stop();
    const caller = try Caller.create();
    defer caller.destroy();
    const place = Guest.buffers;
    guest.fill(place, &(@as([12]u8, @splat(0))));
    for (0..3) |i| {
        _ = fake_guest.link(guest, @intCast(i), place, &.{.{ 12 + 30_000, 0 }});
        guest.offer(@intCast(i));
    }
    try expectEqual(2, (try caller.receive(guest, 64, 0)).frames);
    try expectEqual(2, guest.state().last_available);
    try expectEqual(0, guest.state().in_flight);
    try expectEqual(1, (try caller.receive(guest, 64, 0)).frames);
    try expectEqual(3, guest.usedIndex());
}

/// Receive chains of one descriptor each.
pub fn offerBuffers(guest: *Guest, first: u16, sizes: []const u32) void {
    for (sizes, 0..) |size, i| {
        const index: u16 = first + @as(u16, @intCast(i));
        guest.describe(Guest.descriptors, index, Guest.buffers + @as(u64, index) * 2048, size, write, 0);
        guest.offer(index);
    }
}

test "with mergeable buffers a frame takes as many chains as it needs" {
    const guest = try Guest.start(.{ .size = 64 });
    defer guest.stop();
    const caller = try Caller.create();
    defer caller.destroy();
    offerBuffers(guest, 0, &.{ 64, 64, 10, 5, 200, 100 });
    caller.put(0, 32, 52, 0x11);
    caller.put(1, 128, 60, 0x22);
    caller.put(2, 256, 250, 0x33);
    const progress = try caller.send(guest, 3, layout.flag_net_mergeable);
    try expectEqual(3, progress.frames);
    try expectEqual(6, progress.chains);
    const lengths = [_]u32{ 64, 64, 8, 5, 200, 57 };
    for (lengths, 0..) |length, i| {
        if (i == 2) continue;
        try expectEqual(@as(u32, @intCast(i)), guest.usedAt(@intCast(i)).id);
        if (i < 2) try expectEqual(length, guest.usedAt(@intCast(i)).length);
    }
    try expectEqual(1, guest.get(u16, Guest.buffers + 10));
    try expectEqual(2, guest.get(u16, Guest.buffers + 2048 + 10));
    try expectEqual(0x22, guest.get(u8, Guest.buffers + 2048 + 12));
}

test "a frame for which too few chains are there leaves them all in the ring" {
    const guest = try Guest.start(.{ .size = 64 });
    defer guest.stop();
    const caller = try Caller.create();
    defer caller.destroy();
    offerBuffers(guest, 0, &.{ 100, 100, 100 });
    caller.put(0, 32, 60, 1);
    caller.put(1, 128, 500, 2);
    const progress = try caller.send(guest, 2, layout.flag_net_mergeable);
    try expectEqual(1, progress.frames);
    try expectEqual(1, progress.chains);
    try expectEqual(1, guest.state().last_available);
    try expectEqual(0, guest.state().in_flight);
    // With the rest of the buffers it goes.
    offerBuffers(guest, 3, &.{ 100, 100, 100, 100 });
    caller.frames[0] = caller.frames[1];
    const rest = try caller.send(guest, 1, layout.flag_net_mergeable);
    try expectEqual(1, rest.frames);
    try expectEqual(6, rest.chains);
    try expectEqual(7, guest.usedIndex());
    try expectEqual(0, caller.counts.dropped);
}

test "a buffer that is too small goes back empty, and the frame is dropped" {
    const guest = try Guest.start(.{ .size = 64 });
    defer guest.stop();
    const caller = try Caller.create();
    defer caller.destroy();
    offerBuffers(guest, 0, &.{ 60, 200 });
    caller.put(0, 32, 60, 1);
    caller.put(1, 128, 60, 2);
    const progress = try caller.send(guest, 2, 0);
    try expectEqual(2, progress.frames);
    try expectEqual(1, caller.counts.dropped);
    try expectEqual(0, guest.usedAt(0).length);
    try expectEqual(72, guest.usedAt(1).length);
    // Without MRG_RXBUF it is one all the same.
    try expectEqual(1, guest.get(u16, Guest.buffers + 2048 + 10));
}

test "a partial checksum is completed for a driver that does not do that" {
    const guest = try Guest.start(.{ .size = 64 });
    defer guest.stop();
    const caller = try Caller.create();
    defer caller.destroy();
    offerBuffers(guest, 0, &.{ 200, 200, 200 });
    const header: Header = .{ .flags = 1, .csum_start = 34, .csum_offset = 6 };
    for (0..3) |i| {
        caller.put(@intCast(i), @intCast(32 + 128 * i), 60, 1);
        header.store(caller.buffer[20 + 128 * i ..][0..12]);
    }
    _ = try caller.send(guest, 1, layout.net_offload_checksum);
    try expectEqual(1, guest.get(u8, Guest.buffers));
    // A frame whose checksum lies outside cannot be completed.
    const outside: Header = .{ .flags = 1, .csum_start = 59, .csum_offset = 0 };
    outside.store(caller.buffer[20..][0..12]);
    _ = try caller.send(guest, 2, 0);
    try expectEqual(1, caller.counts.dropped);
    try expectEqual(0, guest.get(u8, Guest.buffers + 2048));
    try expect(guest.get(u16, Guest.buffers + 2048 + 12 + 40) != 0x0101);
}

test "the header of a driver without VERSION_1 has no number of buffers" {
    const guest = try Guest.start(.{ .size = 64, .header_bytes = 10 });
    defer guest.stop();
    const caller = try Caller.create();
    defer caller.destroy();
    offerBuffers(guest, 0, &.{200});
    guest.fill(Guest.buffers, &(@as([100]u8, @splat(0xee))));
    caller.put(0, 32, 60, 0x42);
    try expectEqual(1, (try caller.send(guest, 1, layout.flag_net_short_header)).frames);
    try expectEqual(70, guest.usedAt(0).length);
    for (guest.at(Guest.buffers)[0..10]) |byte| try expectEqual(0, byte);
    for (guest.at(Guest.buffers)[10..70]) |byte| try expectEqual(0x42, byte);
    try expectEqual(0xee, guest.get(u8, Guest.buffers + 70));
    // What has just been written is a frame of the other direction.
    guest.describe(Guest.descriptors, 1, Guest.buffers, 70, 0, 0);
    guest.offer(1);
    try expectEqual(1, (try caller.receive(guest, 64, 0)).frames);
    try expectEqual(60, caller.frame(0).len);
    for (caller.frame(0)) |byte| try expectEqual(0x42, byte);
}

test "parameters outside the caller's buffer are refused" {
    const guest = try Guest.start(.{ .size = 64 });
    defer guest.stop();
    const caller = try Caller.create();
    defer caller.destroy();
    offerBuffers(guest, 0, &.{200});
    const wrong = [_]layout.Frame{
        .{ .offset = 11, .length = 60 },
        .{ .offset = buffer_size - 59, .length = 60 },
        .{ .offset = std.math.maxInt(u32), .length = 60 },
        .{ .offset = 12, .length = std.math.maxInt(u32) },
        .{ .offset = 12, .length = 0 },
    };
    for (wrong) |frame| {
        caller.frames[0] = frame;
        const result = burst.send(guest.ring, &caller.scratch, caller.scratch.len, &caller.frames, 0, 1, &caller.buffer, buffer_size, 0, &caller.counts);
        try expectEqual(linux.fail(.INVAL), result);
    }
    const small = burst.receive(guest.ring, &caller.scratch, caller.scratch.len, &caller.frames, 64, &caller.buffer, buffer_size - 1, 0, &caller.counts);
    try expectEqual(linux.fail(.INVAL), small);
    try expectEqual(0, guest.state().last_available);
}

test "packed rings: chains that stay are found again, over many laps" {
    var guest = try PackedGuest.start(.{ .size = 6 });
    defer guest.stop();
    const caller = try Caller.create();
    defer caller.destroy();
    caller.put(0, 32, 60, 1);
    caller.put(1, 128, 300, 2);
    var next: u16 = 0;
    for (0..50) |_| {
        // Enough for the first frame only; then for the second too.
        for ([_]u32{ 2, 2 }) |count| {
            for (0..count) |_| {
                guest.offer(next, &.{.{ Guest.buffers + @as(u64, next) * 256, 120, write }});
                next = (next + 1) % 6;
            }
            if (count == 2 and caller.frames[0].length == 60) {
                const progress = try caller.send(guest.guest, 2, layout.flag_net_mergeable);
                try expectEqual(1, progress.frames);
                try expectEqual(72, guest.take().?.length);
                try expectEqual(null, guest.take());
                caller.frames[0].length = 300;
            }
        }
        const rest = try caller.send(guest.guest, 1, layout.flag_net_mergeable);
        try expectEqual(1, rest.frames);
        for ([_]u32{ 120, 120, 72 }) |length| try expectEqual(length, guest.take().?.length);
        try expectEqual(null, guest.take());
        caller.frames[0].length = 60;
    }
    try expectEqual(0, guest.guest.state().in_flight);
}
