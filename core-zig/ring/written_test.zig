//! The rings' part of the dirty log: which pages a completion marks.

const std = @import("std");
const layout = @import("../layout.zig");
const linux = @import("../linux.zig");
const sync = @import("../sync.zig");
const dirty_log = @import("../memory/dirty_log.zig");
const SharedLog = @import("../memory/dirty_log_test.zig").SharedLog;
const rings = @import("ring.zig");
const fake_guest = @import("fake_guest.zig");
const PackedGuest = @import("fake_packed_guest.zig").PackedGuest;
const Guest = fake_guest.Guest;
const next = fake_guest.next;
const write = fake_guest.write;
const indirect = fake_guest.indirect;
const expect = std.testing.expect;
const expectEqual = std.testing.expectEqual;

const page = dirty_log.page_size;
const queue = 3;
/// Page-aligned, and clear of the areas of the ring.
const b = Guest.buffers;
/// Where the used ring is said to be: beyond all regions.
const elsewhere: u64 = 0x100_0000;

/// Of 256 MiB of guest.
fn startLog() SharedLog {
    return .init(0x2000);
}

fn setLog(guest: *Guest, log: SharedLog) !void {
    var result: layout.PrepareResult = undefined;
    try expectEqual(0, dirty_log.setBase(guest.memory, log.fd, log.bytes.len, 0, &result));
}

fn setLogging(guest: *Guest, is_on: bool) void {
    std.debug.assert(dirty_log.setLogging(guest.memory, @intFromBool(is_on)) == 0);
}

fn setRing(guest: *Guest, address: ?u64) void {
    std.debug.assert(dirty_log.setRing(guest.memory, queue, @intFromBool(address != null), address orelse 0) == 0);
}

/// Exactly these pages, which are taken.
fn expectPages(log: SharedLog, gpas: []const u64) !void {
    for (gpas) |gpa| try expect(log.isSet(gpa));
    try expectEqual(gpas.len, log.take());
}

test "split: all writable bytes are marked, the trailer's page too, whatever was said to be written" {
    const guest = try Guest.start(.{ .header_bytes = 16, .trailer_bytes = 1, .flags = layout.flag_ring_logged });
    defer guest.stop();
    const log = startLog();
    defer log.deinit();
    try setLog(guest, log);
    // The last byte is the status, in a page of its own.
    _ = fake_guest.link(guest, 0, b + page - 16, &.{ .{ 16, 0 }, .{ 2 * page, write }, .{ 1, write } });
    guest.offer(0);
    try expectEqual(1, guest.pop());
    _ = guest.push(&.{0});
    try expectPages(log, &.{});
    setLogging(guest, true);
    guest.offer(0);
    try expectEqual(1, guest.pop());
    var nothing = [1]layout.Completion{.{ .head = 0, .written = 0 }};
    try expectEqual(1, rings.push(guest.ring, &nothing, 1));
    try expectPages(log, &.{ b + page, b + 2 * page, b + 3 * page });
    setLogging(guest, false);
    guest.offer(0);
    try expectEqual(1, guest.pop());
    _ = guest.push(&.{0});
    try expectPages(log, &.{});
}

test "split: a request popped before logging began is marked when it completes" {
    const guest = try Guest.start(.{ .flags = layout.flag_ring_logged });
    defer guest.stop();
    const log = startLog();
    defer log.deinit();
    _ = fake_guest.link(guest, 0, b, &.{.{ 1, write }});
    guest.offer(0);
    try expectEqual(1, guest.pop());
    try setLog(guest, log);
    setLogging(guest, true);
    // The driver changes the descriptor meanwhile.
    _ = fake_guest.link(guest, 0, b + 8 * page, &.{.{ 1, write }});
    _ = guest.push(&.{0});
    try expectPages(log, &.{b});
}

test "a ring that is not logged marks nothing" {
    const guest = try Guest.start(.{});
    defer guest.stop();
    const log = startLog();
    defer log.deinit();
    try setLog(guest, log);
    setLogging(guest, true);
    setRing(guest, elsewhere);
    _ = fake_guest.link(guest, 0, b, &.{.{ 1, write }});
    guest.offer(0);
    try expectEqual(1, guest.pop());
    _ = guest.push(&.{0});
    _ = rings.arm(guest.ring);
    try expectPages(log, &.{});
}

test "indirect tables of any length are remembered, used again, and marked piece by piece" {
    for ([_]u32{ 1, 2, 3, 4, 5, 10, 11, 12, 19, 20, 100 }) |count| {
        const guest = try Guest.start(.{ .features = fake_guest.feature_indirect, .flags = layout.flag_ring_logged, .segments = 256 });
        defer guest.stop();
        const log = startLog();
        defer log.deinit();
        try setLog(guest, log);
        setLogging(guest, true);
        var expected: [2]std.AutoHashMapUnmanaged(u64, void) = .{ .empty, .empty };
        defer for (&expected) |*set| set.deinit(std.testing.allocator);
        for (0..2) |which| {
            const table = b + 0x1000 * which;
            for (0..count) |i| {
                // Every other page, so that none is adjacent.
                const address = fake_guest.low + 2 * page * (2 * i + which) % (2 * fake_guest.region_size);
                const following: u16 = if (i + 1 < count) next else 0;
                guest.describe(table, @intCast(i), address, 1, write | following, @intCast(i + 1));
                try expected[which].put(std.testing.allocator, address / page, {});
            }
            guest.describe(Guest.descriptors, @intCast(which), table, 16 * count, indirect, 0);
        }
        for (0..4) |_| {
            guest.offer(0);
            guest.offer(1);
            try expectEqual(2, guest.pop());
            for ([2]u32{ 1, 0 }) |head| {
                _ = guest.push(&.{head});
                var pages = expected[head].keyIterator();
                while (pages.next()) |found| try expect(log.isSet(found.* * page));
                try expectEqual(expected[head].count(), log.take());
            }
        }
    }
}

test "a guest that makes us remember too much has all of its memory marked" {
    const guest = try Guest.start(.{ .size = 1024, .features = fake_guest.feature_indirect, .flags = layout.flag_ring_logged, .batch_max = 1, .segments = 1024 });
    defer guest.stop();
    const log = startLog();
    defer log.deinit();
    try setLog(guest, log);
    setLogging(guest, true);
    for (0..1024) |i| {
        const following: u16 = if (i + 1 < 1024) next else 0;
        guest.describe(b, @intCast(i), b + 0x8000 + i, 1, write | following, @intCast(i + 1));
    }
    // 128 blocks each: the limit is reached by 256 of them.
    for (0..300) |head| {
        guest.describe(Guest.descriptors, @intCast(head), b, 16 * 1024, indirect, 0);
        guest.offer(@intCast(head));
        try expectEqual(1, guest.pop());
    }
    _ = guest.push(&.{0});
    try expectPages(log, &.{b + 0x8000});
    _ = guest.push(&.{299});
    try expectEqual(2 * fake_guest.region_size / page, log.take());
    for (1..299) |head| _ = guest.push(&.{@intCast(head)});
    try expect(log.take() > 1);
    // What was given back can be remembered again.
    guest.offer(7);
    try expectEqual(1, guest.pop());
    _ = guest.push(&.{7});
    try expectPages(log, &.{b + 0x8000});
}

test "split: what is written into the used ring is marked by its own flag, at log_guest_addr" {
    // Elements of 1024 entries take more than two pages.
    const guest = try Guest.start(.{ .size = 1024, .flags = layout.flag_ring_logged, .used_index = 1020, .base = 1020 });
    defer guest.stop();
    const log = startLog();
    defer log.deinit();
    try setLog(guest, log);
    _ = fake_guest.link(guest, 0, b, &.{.{ 1, write }});
    for (1..8) |head| _ = fake_guest.link(guest, @intCast(head), b, &.{.{ 1, write }});
    guest.offer(0);
    try expectEqual(1, guest.pop());
    _ = guest.push(&.{0});
    try expectPages(log, &.{});
    setRing(guest, elsewhere);
    guest.offer(0);
    try expectEqual(1, guest.pop());
    _ = guest.push(&.{0});
    // Element 1021 and used.idx, and not the buffer.
    try expectPages(log, &.{ elsewhere, elsewhere + (4 + 8 * 1021) / page * page });
    for (0..4) |head| guest.offer(@intCast(head));
    try expectEqual(4, guest.pop());
    _ = guest.push(&.{ 0, 1, 2, 3 });
    // 1022 and 1023, which lie over a border, then 0 and 1.
    try expectPages(log, &.{ elsewhere, elsewhere + page, elsewhere + 2 * page });
    _ = rings.disarm(guest.ring);
    try expectPages(log, &.{elsewhere});
    _ = rings.arm(guest.ring);
    try expectPages(log, &.{elsewhere});
    setRing(guest, null);
    guest.offer(0);
    try expectEqual(1, guest.pop());
    _ = guest.push(&.{0});
    _ = rings.arm(guest.ring);
    try expectPages(log, &.{});
}

test "split: avail_event is marked behind the elements" {
    const guest = try Guest.start(.{ .size = 1024, .features = fake_guest.feature_event_idx, .flags = layout.flag_ring_logged });
    defer guest.stop();
    const log = startLog();
    defer log.deinit();
    try setLog(guest, log);
    setRing(guest, elsewhere);
    _ = rings.arm(guest.ring);
    try expectPages(log, &.{elsewhere + 2 * page});
}

test "packed: completions out of order mark what their own descriptors were" {
    var driver = try PackedGuest.start(.{ .size = 4, .flags = layout.flag_ring_logged });
    defer driver.stop();
    const guest = driver.guest;
    const log = startLog();
    defer log.deinit();
    try setLog(guest, log);
    setLogging(guest, true);
    driver.offer(0, &.{ .{ b, 1, write }, .{ b + page, 1, write } });
    driver.offer(1, &.{ .{ b + 2 * page, 1, 0 }, .{ b + 3 * page, 1, write } });
    try expectEqual(2, guest.pop());
    // Its used descriptor takes the place of the first request's.
    _ = guest.push(&.{1});
    try expectPages(log, &.{b + 3 * page});
    _ = guest.push(&.{0});
    try expectPages(log, &.{ b, b + page });
}

test "packed: used descriptors are marked where they are, event suppression at log_guest_addr" {
    var driver = try PackedGuest.start(.{ .size = 1024, .flags = layout.flag_ring_logged, .base = 0x83ff_83ff });
    defer driver.stop();
    const guest = driver.guest;
    const log = startLog();
    defer log.deinit();
    try setLog(guest, log);
    for ([_]u16{ 0, 1 }) |id| driver.offer(id, &.{.{ b, 1, write }});
    try expectEqual(2, guest.pop());
    setRing(guest, elsewhere);
    _ = guest.push(&.{ 0, 1 });
    const last = PackedGuest.table + 1023 * 16;
    try expectPages(log, &.{ PackedGuest.table, last / page * page });
    _ = rings.disarm(guest.ring);
    try expectPages(log, &.{elsewhere});
    _ = rings.arm(guest.ring);
    try expectPages(log, &.{elsewhere});
}

/// The driver's processor: looks at the log as soon as a request is used.
const Watcher = struct {
    guest: *Guest,
    log: SharedLog,
    rounds: u16,
    seen: std.atomic.Value(u32) = .init(0),
    missed: u32 = 0,

    fn run(argument: ?*anyopaque) callconv(.c) ?*anyopaque {
        const self: *Watcher = @ptrCast(@alignCast(argument.?));
        const index: *u16 = @ptrCast(@alignCast(self.guest.at(Guest.used + 2).ptr));
        for (0..self.rounds) |round| {
            while (@atomicLoad(u16, index, .acquire) == round) std.atomic.spinLoopHint();
            self.missed += @intFromBool(!self.log.isSet(b));
            _ = self.log.take();
            self.seen.store(@intCast(round + 1), .release);
        }
        return null;
    }
};

test "a buffer is marked before its request is used" {
    const guest = try Guest.start(.{ .flags = layout.flag_ring_logged });
    defer guest.stop();
    // Small, so that it is taken fast.
    const log: SharedLog = .init(64);
    defer log.deinit();
    try setLog(guest, log);
    setLogging(guest, true);
    _ = fake_guest.link(guest, 0, b, &.{.{ 1, write }});
    var watcher: Watcher = .{ .guest = guest, .log = log, .rounds = 300 };
    const thread = sync.Thread.spawn(Watcher.run, &watcher).?;
    for (0..watcher.rounds) |round| {
        guest.offer(0);
        try expectEqual(1, guest.pop());
        _ = guest.push(&.{0});
        while (watcher.seen.load(.acquire) != round + 1) std.atomic.spinLoopHint();
    }
    thread.join();
    try expectEqual(0, watcher.missed);
}

test "with IN_ORDER a request is marked when its turn has come" {
    const guest = try Guest.start(.{ .features = fake_guest.feature_in_order, .flags = layout.flag_ring_logged });
    defer guest.stop();
    const log = startLog();
    defer log.deinit();
    try setLog(guest, log);
    for ([_]u16{ 0, 1 }) |head| {
        _ = fake_guest.link(guest, head, b + page * @as(u64, head), &.{.{ 1, write }});
        guest.offer(head);
    }
    try expectEqual(2, guest.pop());
    _ = guest.push(&.{1});
    setLogging(guest, true);
    _ = guest.push(&.{0});
    try expectPages(log, &.{ b, b + page });
}

test "a ring refuses flags and indices that do not exist" {
    const guest = try Guest.start(.{});
    defer guest.stop();
    var reason: u32 = 0;
    var config = guest.ringConfig();
    config.flags = layout.flag_ring_anew << 1;
    try expectEqual(linux.fail(.INVAL), rings.create(guest.memory, &config, &reason));
    try expectEqual(layout.refuse_ring_config, reason);
    config = guest.ringConfig();
    config.queue_index = dirty_log.queue_maximum;
    try expectEqual(linux.fail(.INVAL), rings.create(guest.memory, &config, &reason));
    try expectEqual(layout.refuse_ring_config, reason);
}
