//! Frames of one buffer, among others and at the edges of what is right.

const std = @import("std");
const layout = @import("../layout.zig");
const linux = @import("../linux.zig");
const fault = @import("../memory/fault.zig");
const dirty_log = @import("../memory/dirty_log.zig");
const SharedLog = @import("../memory/dirty_log_test.zig").SharedLog;
const rings = @import("../ring/ring.zig");
const fake_guest = @import("../ring/fake_guest.zig");
const packed_guest = @import("../ring/fake_packed_guest.zig");
const burst = @import("burst.zig");
const burst_test = @import("burst_test.zig");
const Guest = fake_guest.Guest;
const PackedGuest = packed_guest.PackedGuest;
const Caller = burst_test.Caller;
const expectEqual = std.testing.expectEqual;
const write = fake_guest.write;

/// The error that a call ends with.
fn receiveFails(caller: *Caller, guest: *Guest, errno: i32) !void {
    const result = burst.receive(guest.ring, &caller.scratch, caller.scratch.len, &caller.frames, 64, &caller.buffer, caller.buffer.len, 0, &caller.counts);
    try expectEqual(errno, result);
}

fn offerPlain(guest: *Guest, head: u16, length: u32, value: u8, parts: []const u32) void {
    var bytes: [300]u8 = undefined;
    @memset(bytes[0..length], value);
    burst_test.offerFrame(guest, head, .{}, bytes[0..length], parts);
}

test "single buffers, chains, and single buffers again come in one burst and in order" {
    const guest = try Guest.start(.{ .size = 64, .header_bytes = 12 });
    defer guest.stop();
    const caller = try Caller.create();
    defer caller.destroy();
    for (0..3) |round| {
        var head: u16 = 0;
        for (0..4) |_| {
            offerPlain(guest, head, 60, @intCast(head), &.{72});
            offerPlain(guest, head + 1, 100, @intCast(head + 1), &.{ 12, 60, 40 });
            head += 8;
        }
        const progress = try caller.receive(guest, 64, 0);
        try expectEqual(8, progress.frames);
        try expectEqual(8, progress.chains);
        for (0..8) |i| {
            const value: u8 = @intCast(i / 2 * 8 + i % 2);
            const frame = caller.frame(@intCast(i));
            try expectEqual(@as(usize, if (i % 2 == 0) 60 else 100), frame.len);
            for (frame) |byte| try expectEqual(value, byte);
            try expectEqual(value, guest.usedAt(@intCast(round * 8 + i)).id);
        }
        const state = guest.state();
        try expectEqual(state.popped, state.pushed);
        try expectEqual(0, state.in_flight);
        try expectEqual(@as(u32, @intCast(round * 8 + 8)), state.last_available);
    }
}

test "the frames before a rule that is broken are delivered, and then it is told" {
    const Breach = struct { reason: u32, value: u64, do: *const fn (*Guest) void };
    const place = Guest.buffers;
    const breaches = [_]Breach{
        .{ .reason = layout.broken_head, .value = 64, .do = struct {
            fn do(guest: *Guest) void {
                guest.offer(64);
            }
        }.do },
        .{ .reason = layout.broken_unmapped, .value = 0x1000, .do = struct {
            fn do(guest: *Guest) void {
                guest.describe(Guest.descriptors, 9, 0x1000, 76, 0, 0);
                guest.offer(9);
            }
        }.do },
        .{ .reason = layout.broken_empty, .value = 9, .do = struct {
            fn do(guest: *Guest) void {
                guest.describe(Guest.descriptors, 9, place, 0, 0, 0);
                guest.offer(9);
            }
        }.do },
        .{ .reason = layout.broken_indirect_refused, .value = 9, .do = struct {
            fn do(guest: *Guest) void {
                guest.describe(Guest.descriptors, 9, place, 16, fake_guest.indirect, 0);
                guest.offer(9);
            }
        }.do },
        .{ .reason = layout.broken_available_index, .value = 100, .do = struct {
            fn do(guest: *Guest) void {
                guest.put(u16, Guest.available + 2, 100);
            }
        }.do },
    };
    for (breaches) |breach| {
        const guest = try Guest.start(.{ .size = 64, .header_bytes = 12 });
        defer guest.stop();
        const caller = try Caller.create();
        defer caller.destroy();
        offerPlain(guest, 0, 64, 5, &.{76});
        // The index counts as soon as it is read: nothing comes before that.
        const comes_first = breach.reason != layout.broken_available_index;
        breach.do(guest);
        if (comes_first) {
            const progress = try caller.receive(guest, 64, 0);
            try expectEqual(1, progress.frames);
            try expectEqual(1, guest.usedIndex());
        }
        try receiveFails(caller, guest, linux.fail(.PROTO));
        try expectEqual(breach.reason, guest.state().broken);
        try expectEqual(breach.value, guest.state().broken_value);
        try receiveFails(caller, guest, linux.fail(.PROTO));
    }
}

test "a writable buffer is no frame, and a readable one takes none" {
    const guest = try Guest.start(.{ .size = 64, .header_bytes = 12 });
    defer guest.stop();
    const caller = try Caller.create();
    defer caller.destroy();
    burst_test.offerBuffers(guest, 0, &.{200});
    try expectEqual(0, (try caller.receive(guest, 64, 0)).frames);
    try expectEqual(1, caller.counts.errors);
    try expectEqual(0, guest.usedAt(0).length);

    offerPlain(guest, 8, 64, 0x77, &.{76});
    caller.put(0, 32, 60, 1);
    _ = try caller.send(guest, 1, 0);
    try expectEqual(1, caller.counts.dropped);
    try expectEqual(0, guest.usedAt(1).length);
    // Nothing was written where the driver allowed no writing.
    try expectEqual(0x77, guest.get(u8, Guest.buffers + 8 * 2048 + 12));
}

test "a buffer over the border of two regions is one frame all the same" {
    const guest = try Guest.start(.{ .size = 64, .header_bytes = 12 });
    defer guest.stop();
    const caller = try Caller.create();
    defer caller.destroy();
    var bytes: [112]u8 = @splat(0);
    for (bytes[12..], 0..) |*byte, i| byte.* = @intCast(i);
    const place = fake_guest.high - 50;
    guest.fill(place, &bytes);
    guest.describe(Guest.descriptors, 3, place, 112, 0, 0);
    guest.offer(3);
    try expectEqual(1, (try caller.receive(guest, 64, 0)).frames);
    try std.testing.expectEqualSlices(u8, bytes[12..], caller.frame(0));

    guest.describe(Guest.descriptors, 4, place, 112, write, 0);
    guest.offer(4);
    caller.put(0, 32, 100, 0x42);
    _ = try caller.send(guest, 1, 0);
    try expectEqual(112, guest.usedAt(1).length);
    try expectEqual(0x42, guest.get(u8, fake_guest.high + 61));
}

test "a buffer may end where memory does, and not a byte later" {
    for ([_]u16{ 0, write }) |flags| {
        for ([_]u32{ 0, 1 }) |beyond| {
            const guest = try Guest.start(.{ .size = 64, .header_bytes = 12 });
            defer guest.stop();
            const caller = try Caller.create();
            defer caller.destroy();
            caller.put(0, 32, 60, 1);
            const end = fake_guest.high + fake_guest.region_size;
            guest.describe(Guest.descriptors, 0, end - 72, 72 + beyond, flags, 0);
            guest.offer(0);
            if (beyond == 0) {
                const progress = if (flags == 0) try caller.receive(guest, 64, 0) else try caller.send(guest, 1, 0);
                try expectEqual(1, progress.frames);
                continue;
            }
            const result = if (flags == 0)
                burst.receive(guest.ring, &caller.scratch, caller.scratch.len, &caller.frames, 64, &caller.buffer, caller.buffer.len, 0, &caller.counts)
            else
                burst.send(guest.ring, &caller.scratch, caller.scratch.len, &caller.frames, 0, 1, &caller.buffer, caller.buffer.len, 0, &caller.counts);
            try expectEqual(linux.fail(.PROTO), result);
            try expectEqual(layout.broken_unmapped, guest.state().broken);
            try expectEqual(end, guest.state().broken_value);
        }
    }
}

test "IN_ORDER: one used element returns all the frames that a driver sent" {
    const guest = try Guest.start(.{ .size = 64, .header_bytes = 12, .features = fake_guest.feature_in_order });
    defer guest.stop();
    const caller = try Caller.create();
    defer caller.destroy();
    for (0..5) |i| offerPlain(guest, @intCast(i), 60, 1, &.{72});
    try expectEqual(5, (try caller.receive(guest, 64, 0)).frames);
    try expectEqual(5, guest.usedIndex());
    // At the place of the first, with the name of the last.
    try expectEqual(4, guest.usedAt(0).id);
    // Buffers that are not filled are each returned by their own.
    burst_test.offerBuffers(guest, 8, &.{ 200, 200 });
    caller.put(0, 32, 60, 1);
    caller.put(1, 128, 61, 1);
    try expectEqual(2, (try caller.send(guest, 2, 0)).frames);
    try expectEqual(7, guest.usedIndex());
    try expectEqual(72, guest.usedAt(5).length);
    try expectEqual(73, guest.usedAt(6).length);
}

test "packed rings: frames of one buffer and of several, over many laps" {
    for ([_]u64{ 0, fake_guest.feature_in_order }) |features| {
        var guest = try PackedGuest.start(.{ .size = 10, .header_bytes = 12, .features = features });
        defer guest.stop();
        const caller = try Caller.create();
        defer caller.destroy();
        guest.guest.fill(Guest.buffers, &(@as([12]u8, @splat(0))));
        for (0..40) |_| {
            guest.offer(0, &.{.{ Guest.buffers, 80, 0 }});
            guest.offer(1, &.{.{ Guest.buffers, 90, 0 }});
            guest.offer(2, &.{ .{ Guest.buffers, 12, 0 }, .{ Guest.buffers + 12, 100, 0 } });
            guest.offer(3, &.{.{ Guest.buffers, 81, 0 }});
            const progress = try caller.receive(guest.guest, 64, 0);
            try expectEqual(4, progress.frames);
            for ([_]usize{ 68, 78, 100, 69 }, 0..) |length, i| try expectEqual(length, caller.frame(@intCast(i)).len);
            if (features == 0) {
                for (0..4) |id| try expectEqual(@as(u16, @intCast(id)), guest.take().?.id);
            } else {
                // A run of two frames of one buffer; the others came as chains.
                try expectEqual(1, guest.take().?.id);
                guest.used = guest.used.after(1, 10);
                try expectEqual(3, guest.take().?.id);
                guest.used = guest.used.after(2, 10);
            }
            try expectEqual(null, guest.take());
            try expectEqual(0, guest.guest.state().in_flight);
        }
    }
}

test "memory that goes away in the middle breaks the ring, and gives nothing back" {
    try expectEqual(0, fault.install());
    const guest = try Guest.start(.{ .size = 64, .header_bytes = 12 });
    defer guest.stop();
    const caller = try Caller.create();
    defer caller.destroy();
    offerPlain(guest, 0, 60, 1, &.{72});
    // The second region, where this buffer is, becomes a hole.
    guest.describe(Guest.descriptors, 1, fake_guest.high + 0x8000, 72, 0, 0);
    guest.offer(1);
    try expectEqual(0, linux.linux.ftruncate(guest.fds[1], 0x1000));
    try receiveFails(caller, guest, linux.fail(.FAULT));
    try expectEqual(0, guest.usedIndex());
    try expectEqual(layout.broken_memory, guest.state().broken);
}

/// A queue of `Guest`'s, which its front-end may ask to log.
fn logOf(guest: *Guest, log: SharedLog, used: u64) !void {
    var result: layout.PrepareResult = undefined;
    try expectEqual(0, dirty_log.setBase(guest.memory, log.fd, log.bytes.len, 0, &result));
    try expectEqual(0, dirty_log.setRing(guest.memory, 3, 1, used));
}

test "the dirty log has the buffers of a burst while they are logged, and the used ring always" {
    const guest = try Guest.start(.{ .size = 64, .flags = layout.flag_ring_logged });
    defer guest.stop();
    const caller = try Caller.create();
    defer caller.destroy();
    const log: SharedLog = .init(0x2000);
    defer log.deinit();
    try logOf(guest, log, Guest.used);
    for ([_]u32{ 0, 1, 0 }, 0..) |is_logging, round| {
        try expectEqual(0, dirty_log.setLogging(guest.memory, is_logging));
        // In pages of their own: 2 KiB for each, and the second's at an edge.
        const head: u16 = @intCast(16 * round);
        burst_test.offerBuffers(guest, head, &.{200});
        burst_test.offerBuffers(guest, head + 6, &.{200});
        caller.put(0, 32, 60, 1);
        caller.put(1, 128, 61, 1);
        try expectEqual(2, (try caller.send(guest, 2, 0)).frames);
        try expectEqual(is_logging != 0, log.isSet(Guest.buffers + @as(u64, head) * 2048));
        try expectEqual(is_logging != 0, log.isSet(Guest.buffers + @as(u64, head + 6) * 2048));
        try std.testing.expect(log.isSet(Guest.used));
        try expectEqual(1 + 2 * is_logging, log.take());
        // What the driver sends is not written: the used ring's page alone.
        offerPlain(guest, 60, 60, 1, &.{72});
        _ = try caller.receive(guest, 64, 0);
        try std.testing.expect(log.isSet(Guest.used));
        try expectEqual(1, log.take());
    }
}

test "packed rings: the dirty log has the buffers of a burst, and the used descriptors' pages" {
    var guest = try PackedGuest.start(.{ .size = 600, .flags = layout.flag_ring_logged });
    defer guest.stop();
    const caller = try Caller.create();
    defer caller.destroy();
    const log: SharedLog = .init(0x2000);
    defer log.deinit();
    try logOf(guest.guest, log, PackedGuest.device_event);
    caller.put(0, 32, 60, 1);
    // A page has 256 descriptors: the second one is written from there on.
    for (0..300) |i| {
        const is_logging: u32 = @intFromBool(i >= 280);
        try expectEqual(0, dirty_log.setLogging(guest.guest.memory, is_logging));
        guest.offer(7, &.{.{ Guest.buffers, 200, write }});
        try expectEqual(1, (try caller.send(guest.guest, 1, 0)).frames);
        try expectEqual(7, guest.take().?.id);
        const place = PackedGuest.table + @as(u64, i) * 16;
        try std.testing.expect(log.isSet(place));
        try expectEqual(is_logging != 0, log.isSet(Guest.buffers));
        // The last one of a page ends where the next one is.
        try expectEqual(1 + is_logging, log.take());
    }
}

test "a driver is called once for a burst, when it wants that" {
    for ([_]bool{ false, true }) |is_sent| {
        const guest = try Guest.start(.{ .size = 64, .header_bytes = 12, .features = fake_guest.feature_event_idx });
        defer guest.stop();
        const caller = try Caller.create();
        defer caller.destroy();
        for (0..3) |i| caller.put(@intCast(i), @intCast(32 + 128 * i), 60, 1);
        var used: u16 = 0;
        // The first time in any case, then where the event is passed.
        for ([_]struct { u16, u32 }{ .{ 40, 1 }, .{ 40, 0 }, .{ 6, 1 }, .{ 8, 0 }, .{ 14, 1 } }) |case| {
            guest.setUsedEvent(case[0]);
            for (0..3) |i| {
                const head: u16 = (used + @as(u16, @intCast(i))) * 2;
                if (is_sent) burst_test.offerBuffers(guest, head, &.{200}) else offerPlain(guest, head, 60, 1, &.{72});
            }
            const progress = if (is_sent) try caller.send(guest, 3, 0) else try caller.receive(guest, 64, 0);
            if (is_sent) for (0..3) |i| caller.put(@intCast(i), @intCast(32 + 128 * i), 60, 1);
            try expectEqual(3, progress.frames);
            try expectEqual(case[1], progress.call);
            used += 3;
        }
    }
}

test "a call that the single buffers ask for is not lost by the chains behind them" {
    const guest = try Guest.start(.{ .size = 64, .header_bytes = 12, .features = fake_guest.feature_event_idx });
    defer guest.stop();
    const caller = try Caller.create();
    defer caller.destroy();
    offerPlain(guest, 0, 60, 1, &.{72});
    _ = try caller.receive(guest, 64, 0);
    // The event is passed by the second, and not by the third.
    guest.setUsedEvent(1);
    offerPlain(guest, 8, 60, 1, &.{72});
    offerPlain(guest, 16, 60, 1, &.{ 12, 60 });
    const progress = try caller.receive(guest, 64, 0);
    try expectEqual(2, progress.frames);
    try expectEqual(1, progress.call);
}

test "what is tracked in an inflight region goes there, also in buffers of one piece" {
    const guest = try Guest.start(.{ .size = 64, .header_bytes = 12, .inflight_size = 64 });
    defer guest.stop();
    const caller = try Caller.create();
    defer caller.destroy();
    for (0..5) |i| offerPlain(guest, @intCast(i), 60, 1, &.{72});
    try expectEqual(5, (try caller.receive(guest, 64, 0)).frames);
    // used_idx, and the head that was returned last (split_inflight.zig).
    try expectEqual(5, std.mem.readInt(u16, guest.part()[14..16], .little));
    try expectEqual(4, std.mem.readInt(u16, guest.part()[12..14], .little));
    try std.testing.expect(guest.restart() > 0);
    try expectEqual(0, guest.state().to_resubmit);
    try expectEqual(5, guest.state().last_available);
}
