//! Rings whose addresses are IOVAs: the device side of both formats against an
//! IOTLB that lacks, loses and moves what they need.

const std = @import("std");
const layout = @import("../layout.zig");
const linux = @import("../linux.zig");
const sync = @import("../sync.zig");
const memory = @import("../memory/memory.zig");
const translation = @import("../memory/iova.zig");
const dirty_log = @import("../memory/dirty_log.zig");
const SharedLog = @import("../memory/dirty_log_test.zig").SharedLog;
const rings = @import("ring.zig");
const iova_areas = @import("iova_areas.zig");
const fake_guest = @import("fake_guest.zig");
const fake_packed_guest = @import("fake_packed_guest.zig");
const Guest = fake_guest.Guest;
const PackedGuest = fake_packed_guest.PackedGuest;
const link = fake_guest.link;
const low = fake_guest.low;
const high = fake_guest.high;
const next = fake_guest.next;
const write = fake_guest.write;
const indirect = fake_guest.indirect;
const offset = fake_guest.iova_offset;
const expect = std.testing.expect;
const expectEqual = std.testing.expectEqual;

const again = linux.fail(.AGAIN);
const r = layout.access_read;
const w = layout.access_write;
const absent = layout.miss_absent;
const forbidden = layout.miss_forbidden;
const unmapped = layout.miss_unmapped;
const top = std.math.maxInt(u64);

/// Buffers of these tests, in IOVAs.
const buffer = 0x1000_0000;

fn miss(iova: u64, access: u32, reason: u32) layout.IotlbMiss {
    return .{ .iova = iova, .access = access, .reason = reason };
}

fn start(options: fake_guest.Options) !*Guest {
    var all = options;
    all.is_translated = true;
    return Guest.start(all);
}

test "a ring that is not mapped is not touched, and says what it lacks" {
    const guest = try start(.{ .used_index = 7 });
    defer guest.stop();
    const lacks = [_]layout.IotlbMiss{
        miss(Guest.descriptors + offset, r, absent),
        miss(Guest.available + offset, r, absent),
        miss(Guest.used + offset, r | w, absent),
    };
    for (0..2) |_| {
        try expectEqual(again, guest.pop());
        try guest.expectMisses(&lacks);
    }
    try expectEqual(again, rings.arm(guest.ring));
    try expectEqual(again, rings.disarm(guest.ring));
    try expectEqual(again, guest.push(&.{}));
    try expectEqual(layout.broken_none, guest.state().broken);
    // Where the areas are read for the first time the used index counts.
    try guest.mapRing();
    try expectEqual(0, guest.pop());
    try expectEqual(7, guest.state().used_index);
}

test "areas must permit what the device does there" {
    const guest = try start(.{});
    defer guest.stop();
    try guest.map(Guest.descriptors + offset, Guest.descriptors, 0x1000, w);
    try guest.map(Guest.available + offset, Guest.available, 0x1000, r);
    try guest.map(Guest.used + offset, Guest.used, 0x1000, r);
    try expectEqual(again, guest.pop());
    try guest.expectMisses(&.{ miss(Guest.descriptors + offset, r, forbidden), miss(Guest.used + offset, r | w, forbidden) });
    // An entry that leads out of the memory is no use either.
    try guest.map(Guest.descriptors + offset, 0x100_0000_0000, 0x1000, r);
    try guest.map(Guest.used + offset, Guest.used, 0x1000, r | w);
    try expectEqual(again, guest.pop());
    try guest.expectMisses(&.{miss(Guest.descriptors + offset, r, unmapped)});
}

test "an area may be in several entries, and must be in one place" {
    // 512 descriptors: two pages, and one page of the used ring and a bit.
    const guest = try start(.{ .size = 512 });
    defer guest.stop();
    try guest.map(Guest.available + offset, Guest.available, 0x1000, r);
    try guest.map(Guest.available + offset + 0x1000, Guest.available + 0x1000, 0x1000, r | w);
    try guest.map(Guest.used + offset, Guest.used, 0x1000, r | w);
    try guest.map(Guest.descriptors + offset, Guest.descriptors, 0x1000, r);
    try expectEqual(again, guest.pop());
    try guest.expectMisses(&.{
        miss(Guest.descriptors + offset + 0x1000, r, absent),
        miss(Guest.used + offset + 0x1000, r | w, absent),
    });
    try guest.map(Guest.used + offset + 0x1000, Guest.used + 0x1000, 0x1000, r | w);
    try guest.map(Guest.descriptors + offset + 0x1000, Guest.descriptors + 0x1000, 0x1000, r | w);
    try expectEqual(0, guest.pop());
    // Elsewhere in memory: it cannot be used.
    try guest.map(Guest.descriptors + offset + 0x1000, Guest.descriptors + 0x5000, 0x1000, r | w);
    try guest.expectBroken(layout.broken_unmapped, Guest.descriptors + offset + 0x1000);
}

test "an area that wraps or is not aligned is refused" {
    const guest = try start(.{});
    defer guest.stop();
    var reason: u32 = undefined;
    var config = guest.ringConfig();
    config.descriptor_address = top - 15;
    try expectEqual(linux.fail(.INVAL), rings.create(guest.memory, &config, &reason));
    try expectEqual(layout.refuse_ring_descriptor_area, reason);
    config = guest.ringConfig();
    config.used_address += 2;
    try expectEqual(linux.fail(.INVAL), rings.create(guest.memory, &config, &reason));
    try expectEqual(layout.refuse_ring_used_area, reason);
    // An entry may lead to where the area is not aligned any more.
    try guest.mapRing();
    try guest.map(Guest.used + offset, Guest.used + 2, 0x1000, r | w);
    try guest.expectBroken(layout.broken_unmapped, Guest.used + offset);
}

test "a chain that misses stays, with all that it lacks, and those before it go" {
    const guest = try start(.{});
    defer guest.stop();
    try guest.mapRing();
    try guest.map(buffer, Guest.buffers, 0x1000, r | w);
    guest.describe(Guest.descriptors, 0, buffer, 16, 0, 0);
    // Two pages to read of which one is there, and one to write.
    guest.describe(Guest.descriptors, 1, buffer + 0xf00, 0x2000, next, 2);
    guest.describe(Guest.descriptors, 2, buffer + 0x8000, 1, write, 0);
    guest.offer(0);
    guest.offer(1);
    try expectEqual(1, guest.pop());
    try guest.expectSegment(0, Guest.buffers, 16, r);
    for (0..2) |_| {
        try expectEqual(again, guest.pop());
        try guest.expectMisses(&.{
            miss(buffer + 0x1000, r, absent),
            miss(buffer + 0x2000, r, absent),
            miss(buffer + 0x8000, w, absent),
        });
        try expectEqual(1, guest.state().last_available);
    }
    try guest.map(buffer + 0x1000, Guest.buffers + 0x3000, 0x1000, r);
    try guest.map(buffer + 0x2000, Guest.buffers + 0x2000, 0x1000, r);
    try guest.map(buffer + 0x8000, Guest.buffers + 0x5000, 0x1000, r);
    try expectEqual(again, guest.pop());
    try guest.expectMisses(&.{miss(buffer + 0x8000, w, forbidden)});
    try guest.map(buffer + 0x8000, Guest.buffers + 0x5000, 0x1000, w);
    try expectEqual(1, guest.pop());
    try guest.expectSegment(0, Guest.buffers + 0xf00, 0x100, r);
    try guest.expectSegment(1, Guest.buffers + 0x3000, 0x1000, r);
    try guest.expectSegment(2, Guest.buffers + 0x2000, 0xf00, r);
    try guest.expectSegment(3, Guest.buffers + 0x5000, 1, w);
    try expectEqual(1, guest.push(&.{ 0, 1 }));
    try expectEqual(2, guest.usedIndex());
}

test "a buffer over entries and regions comes in pieces; windows end with their entry" {
    const guest = try start(.{});
    defer guest.stop();
    try guest.mapRing();
    // One entry over both regions, which are apart in this process.
    try guest.map(buffer, high - 0x800, 0x1000, r | w);
    try guest.map(buffer + 0x1000, low + 0xe0000, 0x1000, w);
    guest.describe(Guest.descriptors, 0, buffer + 0x700, 0x900, next, 1);
    guest.describe(Guest.descriptors, 1, buffer + 0xf00, 0x200, write | next, 2);
    guest.describe(Guest.descriptors, 2, buffer, 1, write, 0);
    guest.offer(0);
    try expectEqual(1, guest.pop());
    try guest.expectSegment(0, high - 0x100, 0x100, r);
    try guest.expectSegment(1, high, 0x800, r);
    try guest.expectSegment(2, high + 0x700, 0x100, w);
    try guest.expectSegment(3, low + 0xe0000, 0x100, w);
    try guest.expectSegment(4, high - 0x800, 1, w);
    // The last page may be written only.
    guest.describe(Guest.descriptors, 3, buffer + 0xff0, 0x20, 0, 0);
    guest.offer(3);
    try expectEqual(again, guest.pop());
    try guest.expectMisses(&.{miss(buffer + 0x1000, r, forbidden)});
}

test "what runs over the top of 2^64 does not go on at 0" {
    const guest = try start(.{});
    defer guest.stop();
    try guest.mapRing();
    try guest.map(0, Guest.buffers, 0x1000, r | w);
    try guest.map(top - 0xfff, Guest.buffers + 0x1000, 0x1000, r | w);
    guest.describe(Guest.descriptors, 0, top - 15, 16, 0, 0);
    guest.offer(0);
    try expectEqual(1, guest.pop());
    try guest.expectSegment(0, Guest.buffers + 0x1ff0, 16, r);
    guest.describe(Guest.descriptors, 1, top - 15, 32, 0, 0);
    guest.offer(1);
    try guest.expectBroken(layout.broken_unmapped, top - 15);
}

test "over the top of 2^64 also when its last page is missing" {
    const guest = try start(.{});
    defer guest.stop();
    try guest.mapRing();
    guest.describe(Guest.descriptors, 1, top - 15, 32, 0, 0);
    guest.offer(1);
    try guest.expectBroken(layout.broken_unmapped, top - 15);
}

test "a broken rule behind a missing page still breaks the ring" {
    const guest = try start(.{});
    defer guest.stop();
    try guest.mapRing();
    guest.describe(Guest.descriptors, 0, buffer, 16, next | write, 1);
    guest.describe(Guest.descriptors, 1, buffer, 16, 0, 0);
    guest.offer(0);
    try guest.expectBroken(layout.broken_order, 1);
}

test "more misses than are told at once come in further turns" {
    const guest = try start(.{});
    defer guest.stop();
    try guest.mapRing();
    const count = iova_areas.max_misses + 5;
    guest.describe(Guest.descriptors, 0, buffer, count * 0x1000, write, 0);
    guest.offer(0);
    try expectEqual(again, guest.pop());
    var found: [64]layout.IotlbMiss = undefined;
    try expectEqual(iova_areas.max_misses, rings.misses(guest.ring, &found, found.len));
    for (0..iova_areas.max_misses) |i| try guest.map(buffer + i * 0x1000, low + 0xe0000, 0x1000, w);
    try expectEqual(again, guest.pop());
    try expectEqual(5, rings.misses(guest.ring, &found, found.len));
    for (iova_areas.max_misses..count) |i| try guest.map(buffer + i * 0x1000, low + 0xe0000, 0x1000, w);
    try expectEqual(1, guest.pop());
}

test "indirect tables are IOVAs, in pieces too" {
    const guest = try start(.{ .features = fake_guest.feature_indirect });
    defer guest.stop();
    try guest.mapRing();
    // The table's second descriptor lies on the border of two entries.
    const first = Guest.buffers + 0x1000 - 24;
    const second = Guest.buffers + 0x3000;
    var bytes: [32]u8 = undefined;
    for ([_]u64{ buffer + 0x5000, buffer + 0x5800 }, 0..) |address, i| {
        std.mem.writeInt(u64, bytes[16 * i ..][0..8], address, .little);
        std.mem.writeInt(u32, bytes[16 * i ..][8..12], 8, .little);
        std.mem.writeInt(u16, bytes[16 * i ..][12..14], if (i == 0) next else write, .little);
        std.mem.writeInt(u16, bytes[16 * i ..][14..16], 1, .little);
    }
    guest.fill(first, bytes[0..24]);
    guest.fill(second, bytes[24..]);
    guest.describe(Guest.descriptors, 0, buffer + 0x1000 - 24, 32, indirect, 0);
    guest.offer(0);
    try expectEqual(again, guest.pop());
    try guest.expectMisses(&.{miss(buffer + 0x1000 - 24, r, absent)});
    try guest.map(buffer, Guest.buffers, 0x1000, r);
    try expectEqual(again, guest.pop());
    try guest.expectMisses(&.{ miss(buffer + 0x5000, r, absent), miss(buffer + 0x1000, r, absent) });
    try guest.map(buffer + 0x1000, second, 0x1000, r);
    try guest.map(buffer + 0x5000, Guest.buffers + 0x5000, 0x1000, r | w);
    try expectEqual(1, guest.pop());
    try guest.expectSegment(0, Guest.buffers + 0x5000, 8, r);
    try guest.expectSegment(1, Guest.buffers + 0x5800, 8, w);
}

test "a ring whose page is invalidated is not touched; it goes on where it is mapped next" {
    for ([_]u64{ Guest.descriptors, Guest.available, Guest.used }) |area| {
        const guest = try start(.{});
        defer guest.stop();
        try guest.mapRing();
        try guest.map(buffer, Guest.buffers, 0x1000, r | w);
        _ = link(guest, 0, buffer, &.{.{ 8, 0 }});
        _ = link(guest, 1, buffer, &.{.{ 8, 0 }});
        guest.offer(0);
        guest.offer(1);
        try expectEqual(2, guest.pop());
        try expectEqual(1, guest.push(&.{0}));
        try guest.unmap(area + offset, 0x1000);
        // What it had is somebody else's now.
        const old = guest.at(area)[0..0x1000];
        var copy: [0x1000]u8 = undefined;
        @memcpy(&copy, old);
        @memset(old, 0xa5);
        guest.offered = 2;
        try expectEqual(again, guest.push(&.{1}));
        try expectEqual(again, guest.pop());
        try expectEqual(again, rings.arm(guest.ring));
        try expectEqual(again, rings.disarm(guest.ring));
        const access: u32 = if (area == Guest.used) r | w else r;
        try guest.expectMisses(&.{miss(area + offset, access, absent)});
        for (old) |byte| try expectEqual(0xa5, byte);
        // The guest has moved it.
        const moved: u64 = low + 0xd0000;
        guest.fill(moved, &copy);
        try guest.map(area + offset, moved, 0x1000, r | w);
        try expectEqual(0, guest.pop());
        _ = rings.push(guest.ring, &.{.{ .head = 1, .written = 101 }}, 1);
        try expectEqual(2, guest.get(u16, (if (area == Guest.used) moved else @as(u64, Guest.used)) + 2));
        try expectEqual(0, guest.state().in_flight);
        for (old) |byte| try expectEqual(0xa5, byte);
    }
}

test "a packed ring misses, waits and moves in the same way" {
    var self = try PackedGuest.start(.{ .is_translated = true });
    defer self.stop();
    const guest = self.guest;
    try expectEqual(again, guest.pop());
    try guest.expectMisses(&.{
        miss(Guest.descriptors + offset, r | w, absent),
        miss(Guest.available + offset, r, absent),
        miss(Guest.used + offset, w, absent),
    });
    try guest.mapRing();
    self.offer(3, &.{ .{ buffer, 16, 0 }, .{ buffer + 0x1000, 16, write } });
    self.offer(1, &.{.{ buffer, 4, 0 }});
    try expectEqual(again, guest.pop());
    try guest.expectMisses(&.{ miss(buffer, r, absent), miss(buffer + 0x1000, w, absent) });
    try expectEqual(fake_packed_guest.first_base, guest.state().last_available);
    try guest.map(buffer, Guest.buffers, 0x1000, r);
    try guest.map(buffer + 0x1000, Guest.buffers + 0x1000, 0x1000, w);
    try expectEqual(2, guest.pop());
    try expectEqual(1, guest.push(&.{1}));
    try expectEqual(1, self.take().?.id);
    try guest.unmap(Guest.descriptors + offset, 0x1000);
    try expectEqual(again, guest.push(&.{3}));
    try expectEqual(1, guest.state().in_flight);
    try guest.mapRing();
    try expectEqual(1, guest.push(&.{3}));
    try expectEqual(0, guest.state().in_flight);
    try expectEqual(3, self.take().?.id);
}

test "an evicted ring goes on until something is taken back" {
    const guest = try start(.{});
    defer guest.stop();
    try guest.mapRing();
    try expectEqual(0, guest.pop());
    const object = memory.get(guest.memory).?;
    for (0..40_000) |i| try object.iotlb.update(0x10_0000_0000 + i * 0x2000, 0x1000, 0, r);
    try guest.unmap(0x10_0000_0000, 1 << 40);
    try expectEqual(0, guest.pop());
}

test "a ring keeps its memory for itself, after its handle has gone too" {
    const guest = try start(.{});
    const object = memory.get(guest.memory).?;
    fake_guest.closeMemory(guest.memory);
    const other = memory.create(0);
    try expect(memory.get(@intCast(other)).? != object);
    try expectEqual(again, guest.pop());
    guest.memory = @intCast(other);
    guest.stop();
    // Now it serves another device.
    const third: u32 = @intCast(memory.create(0));
    const fourth: u32 = @intCast(memory.create(0));
    try expect(memory.get(third).? == object or memory.get(fourth).? == object);
    _ = memory.destroy(third);
    _ = memory.destroy(fourth);
}

test "translations by IOVA: how far, in which view, and why not" {
    const guest = try start(.{});
    defer guest.stop();
    var out: layout.Translation = undefined;
    try guest.map(buffer, Guest.buffers, 0x1000, r);
    try guest.map(buffer + 0x1000, Guest.buffers + 0x1000, 0x1000, r | w);
    try guest.map(buffer + 0x2000, Guest.buffers, 0x1000, r | w);
    try expectEqual(0, translation.translate(guest.memory, buffer + 0x10, 0x10_0000, r, &out));
    try expectEqual(0x1ff0, out.contiguous);
    try expectEqual(0x1ff0, out.length);
    try expectEqual(guest.translate(Guest.buffers + 0x10).offset, out.offset);
    try expectEqual(guest.translate(Guest.buffers + 0x10).view, out.view);
    try expectEqual(0xf0010, out.region_offset);
    try expectEqual(linux.fail(.ACCES), translation.translate(guest.memory, buffer, 1, w, &out));
    try expectEqual(0, translation.translate(guest.memory, buffer + 0x1000, 1, r | w, &out));
    try expectEqual(again, translation.translate(guest.memory, buffer + 0x3000, 1, r, &out));
    try guest.map(buffer + 0x3000, 0x100_0000_0000, 0x1000, r);
    try expectEqual(linux.fail(.FAULT), translation.translate(guest.memory, buffer + 0x3000, 1, r, &out));
    try expectEqual(linux.fail(.INVAL), translation.translate(guest.memory, top, 2, r, &out));
    try expectEqual(linux.fail(.INVAL), translation.translate(guest.memory, buffer, 0, r, &out));
    // As gpas, where GPA_ADDRESSES is negotiated.
    try expectEqual(0, translation.clear(guest.memory, layout.space_gpa));
    try expectEqual(again, translation.translate(guest.memory, buffer, 1, r, &out));
    try expectEqual(0, translation.update(guest.memory, buffer, 0x1000, Guest.buffers, r));
    try expectEqual(0, translation.translate(guest.memory, buffer, 1, r, &out));
    try expectEqual(linux.fail(.INVAL), translation.clear(guest.memory, layout.space_iova));
    try expectEqual(linux.fail(.INVAL), translation.update(guest.memory, top, 2, 0, r));
    try expectEqual(linux.fail(.INVAL), translation.invalidate(guest.memory, 0, 0));
}

test "the inflight region goes on where the last run ended, as soon as the ring is mapped" {
    for ([_]u64{ 0, fake_guest.feature_packed }) |format| {
        const guest = try start(.{ .inflight_size = 8, .features = format, .base = if (format == 0) 0 else fake_packed_guest.first_base });
        defer guest.stop();
        try guest.mapRing();
        try guest.map(buffer, Guest.buffers, 0x1000, r | w);
        if (format == 0) {
            for ([_]u16{ 5, 2 }) |head| {
                _ = link(guest, head, buffer, &.{.{ 8, 0 }});
                guest.offer(head);
            }
        } else {
            for ([_]u16{ 5, 2 }, 0..) |id, slot| guest.describe(Guest.descriptors, @intCast(slot), buffer, 8, id, 1 << 7);
        }
        try expectEqual(2, guest.pop());
        // The next process begins while the ring is not mapped.
        try guest.unmap(0, top);
        try expect(guest.restart() > 0);
        try expectEqual(again, guest.pop());
        try expectEqual(0, guest.state().to_resubmit);
        try guest.mapRing();
        try expectEqual(again, guest.pop());
        try expectEqual(2, guest.state().to_resubmit);
        try guest.expectMisses(&.{miss(buffer, r, absent)});
        try guest.map(buffer, Guest.buffers, 0x1000, r);
        try expectEqual(2, guest.pop());
        try expectEqual(5, guest.record(0).head);
        try expectEqual(2, guest.record(1).head);
        // Or while it is, which the start says if the region is damaged.
        @memset(guest.part()[8..16], 0xff);
        try expectEqual(linux.fail(.UCLEAN), guest.restart());
        try guest.unmap(0, top);
        try expect(guest.restart() > 0);
        try guest.mapRing();
        try expectEqual(linux.fail(.PROTO), guest.pop());
        try expectEqual(layout.broken_inflight, guest.state().broken);
    }
}

test "the dirty log is by guest addresses: of buffers, and of where the used ring really is" {
    const guest = try start(.{ .flags = layout.flag_ring_logged });
    defer guest.stop();
    const log: SharedLog = .init(0x2000);
    defer log.deinit();
    var result: layout.PrepareResult = undefined;
    try expectEqual(0, dirty_log.setBase(guest.memory, log.fd, log.bytes.len, 0, &result));
    try expectEqual(0, dirty_log.setLogging(guest.memory, 1));
    // What the front-end gives is an IOVA like the ring's.
    try expectEqual(0, dirty_log.setRing(guest.memory, 3, 1, Guest.used + offset));
    try guest.mapRing();
    const moved = low + 0xd0000;
    try guest.map(Guest.used + offset, moved, 0x1000, r | w);
    try guest.map(buffer, Guest.buffers, 0x1000, w);
    try guest.map(buffer + 0x1000, low + 0xc0000, 0x1000, w);
    _ = link(guest, 0, buffer + 0x800, &.{.{ 0x1000, write }});
    guest.offer(0);
    try expectEqual(1, guest.pop());
    _ = guest.push(&.{0});
    for ([_]u64{ Guest.buffers, low + 0xc0000, moved }) |gpa| try expect(log.isSet(gpa));
    try expectEqual(3, log.take());
    try expectEqual(0, rings.disarm(guest.ring));
    try expect(log.isSet(moved));
    try expectEqual(1, log.take());
}

test "after an invalidation has returned no pop finds what it took away" {
    const Popper = struct {
        guest: *Guest,
        valid: std.atomic.Value(u32) = .init(0),
        stale: std.atomic.Value(u32) = .init(0),
        done: std.atomic.Value(bool) = .init(false),

        fn run(argument: ?*anyopaque) callconv(.c) ?*anyopaque {
            const self: *@This() = @ptrCast(@alignCast(argument.?));
            while (!self.done.load(.acquire)) {
                const from = self.valid.load(.acquire);
                if (self.guest.pop() != 1) continue;
                const round = std.mem.readInt(u32, self.guest.header(0)[0..4], .little);
                if (round < from) _ = self.stale.fetchAdd(1, .monotonic);
                _ = self.guest.push(&.{self.guest.record(0).head});
                // The driver's part: the same chain again.
                self.guest.offer(0);
            }
            return null;
        }
    };
    const guest = try start(.{ .header_bytes = 4 });
    defer guest.stop();
    try guest.mapRing();
    guest.describe(Guest.descriptors, 0, buffer, 4, 0, 0);
    guest.offer(0);
    var popper: Popper = .{ .guest = guest };
    const thread = sync.Thread.spawn(Popper.run, &popper).?;
    for (1..3000) |round| {
        // Each round's page says its number; the old one still says its own.
        const gpa = Guest.buffers + (round % 8) * 0x1000;
        guest.put(u32, gpa, @intCast(round));
        try guest.map(buffer, gpa, 0x1000, r);
        try guest.unmap(buffer, 0x1000);
        popper.valid.store(@intCast(round + 1), .release);
    }
    popper.done.store(true, .release);
    thread.join();
    try expectEqual(0, popper.stale.load(.monotonic));
}
