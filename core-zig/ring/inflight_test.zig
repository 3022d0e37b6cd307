//! Crash recovery: the process may end after any store; whoever starts in its
//! place has to complete each request that the driver has not seen completed,
//! exactly once, oldest first. And the region is the front-end's to damage.

const std = @import("std");
const layout = @import("../layout.zig");
const linux = @import("../linux.zig");
const memory = @import("../memory/memory.zig");
const rings = @import("ring.zig");
const chain = @import("chain.zig");
const inflight = @import("inflight.zig");
const split_inflight = @import("split_inflight.zig");
const packed_inflight = @import("packed_inflight.zig");
const packed_ring = @import("packed.zig");
const fake_guest = @import("fake_guest.zig");
const fake_packed_guest = @import("fake_packed_guest.zig");
const Guest = fake_guest.Guest;
const PackedGuest = fake_packed_guest.PackedGuest;
const sys = linux.linux;
const expect = std.testing.expect;
const expectEqual = std.testing.expectEqual;
const b = Guest.buffers;
const allocator = std.testing.allocator;

/// All that survives a crash: the ring and the inflight region.
const Picture = struct {
    ring: [3][]u8,
    region: []u8,

    /// Where the ring is in guest memory; more than any of these tests uses.
    const areas = [3]struct { u64, usize }{ .{ Guest.descriptors, 512 }, .{ Guest.available, 64 }, .{ Guest.used, 256 } };

    fn take(guest: *Guest) !Picture {
        var self: Picture = .{ .ring = undefined, .region = try allocator.dupe(u8, guest.region) };
        for (&self.ring, areas) |*copy, area| copy.* = try allocator.dupe(u8, guest.at(area[0])[0..area[1]]);
        return self;
    }

    fn restore(self: *const Picture, guest: *Guest) void {
        for (self.ring, areas) |copy, area| @memcpy(guest.at(area[0])[0..area[1]], copy);
        @memcpy(guest.region, self.region);
    }

    fn free(self: Picture) void {
        for (self.ring) |copy| allocator.free(copy);
        allocator.free(self.region);
    }
};

var pictured: *Guest = undefined;
var pictures: std.ArrayList(Picture) = .empty;

fn photograph() void {
    pictures.append(allocator, Picture.take(pictured) catch unreachable) catch unreachable;
}

fn watch(guest: *Guest) void {
    pictured = guest;
    photograph();
    inflight.observer = photograph;
}

fn unwatch() void {
    inflight.observer = null;
}

fn forget() void {
    for (pictures.items) |picture| picture.free();
    pictures.deinit(allocator);
    pictures = .empty;
}

/// The split driver's part that `Guest` leaves to the test.
const SplitDriver = struct {
    guest: *Guest,
    /// How often each head was made available and completed.
    offered: [8]u32 = @splat(0),
    completed: [8]u32 = @splat(0),
    seen: u16,

    fn offer(self: *SplitDriver, head: u16) void {
        self.guest.describe(Guest.descriptors, head, b + 64 * @as(u64, head), 64, fake_guest.write, 0);
        self.offered[head] += 1;
        self.guest.offer(head);
    }

    fn take(self: *SplitDriver) !void {
        while (self.seen != self.guest.usedIndex()) : (self.seen +%= 1) {
            const element = self.guest.usedAt(self.seen);
            self.completed[element.id] += 1;
            // A head's completion published twice, or one never offered.
            try expect(self.completed[element.id] <= self.offered[element.id]);
        }
    }
};

/// Takes up to `max` requests; returns their heads.
fn popHeads(guest: *Guest, max: u32, heads: []u32) ![]u32 {
    var total: usize = 0;
    while (total < max) {
        const room: u32 = @intCast(max - total);
        const words = room * guest.stride() + 4 * guest.options.segments;
        const count = rings.pop(guest.ring, &guest.words, words, room);
        try expect(count >= 0);
        if (count == 0) break;
        for (0..@intCast(count)) |i| {
            heads[total + i] = @as(*align(4) layout.Request, @ptrCast(&guest.words[i * guest.stride()])).head;
        }
        total += @intCast(count);
    }
    return heads[0..total];
}

fn runSplit(base: u16, features: u64) !void {
    const guest = try Guest.start(.{ .inflight_size = 8, .base = base, .used_index = base, .features = features });
    defer guest.stop();
    defer forget();
    var driver: SplitDriver = .{ .guest = guest, .seen = base };
    for ([_]u16{ 3, 0, 7, 5, 1 }) |head| driver.offer(head);
    var heads: [8]u32 = undefined;
    {
        watch(guest);
        defer unwatch();
        try expectEqual(3, (try popHeads(guest, 3, &heads)).len);
        // Out of order, as a batch; then one that stands alone.
        try expect(guest.push(&.{ 7, 3 }) >= 0);
        try expectEqual(2, (try popHeads(guest, 8, &heads)).len);
        try expect(guest.push(&.{1}) >= 0);
        try expect(guest.push(&.{ 0, 5 }) >= 0);
    }
    try expect(pictures.items.len > 20);
    const start = driver;
    for (pictures.items) |picture| {
        // Whether the driver looks before or after the restart must not matter.
        for ([_]bool{ true, false }) |looks_first| {
            picture.restore(guest);
            driver = start;
            guest.offered = base +% 5;
            if (looks_first) try driver.take();
            // The device before may have told the front-end any base.
            guest.options.base = base +% 77;
            try expect(guest.restart() > 0);
            const published = guest.usedIndex() -% base;
            const open = try popHeads(guest, 8, &heads);
            try expectEqual(5, published + open.len);
            const order = [_]u32{ 3, 0, 7, 5, 1 };
            // What was not published comes in the order of its first taking.
            var last: usize = 0;
            for (open) |head| {
                const place = std.mem.indexOfScalar(u32, &order, head).?;
                try expect(place >= last);
                last = place;
            }
            try expectEqual(base +% 5, @as(u16, @truncate(guest.state().last_available)));
            if (open.len > 0) try expect(guest.push(open) >= 0);
            try driver.take();
            for (driver.offered, driver.completed) |offered, completed| try expectEqual(offered, completed);
            // And it goes on as if nothing had been.
            for ([_]u16{ 2, 3 }) |head| driver.offer(head);
            try expectEqual(2, (try popHeads(guest, 8, &heads)).len);
            try expect(guest.push(&.{ 3, 2 }) >= 0);
            try driver.take();
            for (driver.offered, driver.completed) |offered, completed| try expectEqual(offered, completed);
        }
    }
}

test "a split ring loses and doubles nothing, after whichever store it crashes" {
    try runSplit(0, 0);
    try runSplit(0xfffe, fake_guest.feature_event_idx);
    try runSplit(0xffff, fake_guest.feature_in_order);
}

test "a crash inside a recovery is recovered from" {
    const guest = try Guest.start(.{ .inflight_size = 8 });
    defer guest.stop();
    defer forget();
    var driver: SplitDriver = .{ .guest = guest, .seen = 0 };
    for ([_]u16{ 3, 0, 7 }) |head| driver.offer(head);
    var heads: [8]u32 = undefined;
    watch(guest);
    try expectEqual(3, (try popHeads(guest, 8, &heads)).len);
    try expect(guest.push(&.{ 7, 3 }) >= 0);
    unwatch();
    const crashes = pictures;
    pictures = .empty;
    defer {
        for (crashes.items) |picture| picture.free();
        var list = crashes;
        list.deinit(allocator);
    }
    for (crashes.items) |crash| {
        forget();
        crash.restore(guest);
        watch(guest);
        try expect(guest.restart() > 0);
        unwatch();
        for (pictures.items) |picture| {
            picture.restore(guest);
            try expect(guest.restart() > 0);
            try expectEqual(3, guest.usedIndex() + (try popHeads(guest, 8, &heads)).len);
        }
    }
}

const PackedDriver = struct {
    packed_guest: PackedGuest,
    offered: [8]u32 = @splat(0),
    completed: [8]u32 = @splat(0),

    fn offer(self: *PackedDriver, id: u16, parts: u32) void {
        const all = [3]fake_packed_guest.Part{ .{ b, 16, 0 }, .{ b + 64 * @as(u64, id), 64, fake_guest.write }, .{ b + 8192, 1, fake_guest.write } };
        self.packed_guest.offer(id, all[0..parts]);
        self.offered[id] += 1;
    }

    fn take(self: *PackedDriver) !void {
        while (self.packed_guest.take()) |used| {
            self.completed[used.id] += 1;
            try expect(self.completed[used.id] <= self.offered[used.id]);
        }
    }
};

const Chain = struct { id: u16, parts: u32 };

/// `first` are completed before the pictures begin, to move the ring's lap.
fn runPacked(size: u32, warm: u32, chains: []const Chain, taken_first: u32, batches: []const []const u32, features: u64) !void {
    var driver: PackedDriver = .{ .packed_guest = try PackedGuest.start(.{ .size = size, .inflight_size = size + 1, .features = features }) };
    const guest = driver.packed_guest.guest;
    defer guest.stop();
    defer forget();
    var heads: [8]u32 = undefined;
    for (0..warm) |_| {
        driver.offer(1, 1);
        try expectEqual(1, (try popHeads(guest, 1, &heads)).len);
        try expect(guest.push(&.{1}) >= 0);
        try driver.take();
    }
    for (chains) |one| driver.offer(one.id, one.parts);
    const start = driver;
    {
        watch(guest);
        defer unwatch();
        try expectEqual(taken_first, (try popHeads(guest, taken_first, &heads)).len);
        for (batches, 0..) |batch, i| {
            try expect(guest.push(batch) >= 0);
            if (i == 0) _ = try popHeads(guest, 8, &heads);
        }
    }
    for (pictures.items, 0..) |picture, number| {
        for ([_]bool{ true, false }) |looks_first| {
            errdefer std.debug.print("size {d} warm {d} picture {d} of {d} first {}\n", .{ size, warm, number, pictures.items.len, looks_first });
            picture.restore(guest);
            driver = start;
            if (looks_first) try driver.take();
            // QEMU knows no base of a packed ring whose back-end crashed.
            guest.options.base = fake_packed_guest.first_base;
            try expect(guest.restart() > 0);
            // Not all in one batch: what an earlier one left in the ring must
            // not be seen when the driver gets there.
            const open = try popHeads(guest, 8, &heads);
            var last: usize = 0;
            for (open) |head| {
                const place = for (chains, 0..) |one, i| {
                    if (one.id == head) break i;
                } else unreachable;
                try expect(place >= last);
                last = place;
            }
            for (open) |head| {
                try expect(guest.push(&.{head}) >= 0);
                try driver.take();
            }
            try driver.take();
            for (driver.offered, driver.completed) |offered, completed| try expectEqual(offered, completed);
            try expectEqual(driver.packed_guest.available.bits(), @as(u16, @truncate(guest.state().last_available)));
            try expectEqual(driver.packed_guest.used.bits(), @as(u16, @truncate(guest.state().used_index)));
            for ([_]u16{ 2, 3 }) |id| driver.offer(id, 1);
            try expectEqual(2, (try popHeads(guest, 8, &heads)).len);
            try expect(guest.push(&.{ 3, 2 }) >= 0);
            try driver.take();
            for (driver.offered, driver.completed) |offered, completed| try expectEqual(offered, completed);
        }
    }
}

test "a packed ring loses and doubles nothing, after whichever store it crashes" {
    const chains = [_]Chain{ .{ .id = 4, .parts = 2 }, .{ .id = 1, .parts = 1 }, .{ .id = 6, .parts = 3 }, .{ .id = 0, .parts = 1 } };
    for ([_]u32{ 7, 8 }) |size| {
        // Wherever the end of the lap falls.
        for (0..2 * size) |warm| {
            try runPacked(size, @intCast(warm), &chains, 3, &.{ &.{ 6, 4 }, &.{1}, &.{0} }, 0);
            try runPacked(size, @intCast(warm), &chains, 4, &.{&.{ 0, 6, 1, 4 }}, fake_guest.feature_event_idx);
        }
    }
    for (0..9) |warm| try runPacked(8, @intCast(warm), &chains, 4, &.{ &.{ 6, 1 }, &.{ 0, 4 } }, fake_guest.feature_in_order);
}

test "a batch of a whole lap is told from none" {
    const chains = [_]Chain{ .{ .id = 0, .parts = 1 }, .{ .id = 1, .parts = 1 }, .{ .id = 2, .parts = 1 }, .{ .id = 3, .parts = 1 } };
    for (0..9) |warm| try runPacked(4, @intCast(warm), &chains, 4, &.{&.{ 2, 0, 3, 1 }}, 0);
}

test "a packed chain is popped again from its copy, not from a ring that has been overwritten" {
    var driver = try PackedGuest.start(.{ .inflight_size = 8, .header_bytes = 4 });
    defer driver.stop();
    const guest = driver.guest;
    guest.fill(b, "once");
    driver.offer(5, &.{ .{ b, 4, 0 }, .{ b + 64, 32, fake_guest.write } });
    driver.offer(2, &.{.{ b + 256, 8, 0 }});
    try expectEqual(2, guest.pop());
    // Its used descriptor goes where the other's first one is.
    try expectEqual(1, guest.push(&.{2}));
    try expect(guest.restart() > 0);
    try expectEqual(1, guest.state().to_resubmit);
    try expectEqual(1, guest.pop());
    try expectEqual(5, guest.record(0).head);
    try std.testing.expectEqualStrings("once", guest.header(0));
    try guest.expectSegment(0, b + 64, 32, layout.access_write);
    try expectEqual(0, guest.state().to_resubmit);
}

test "requests of an earlier run come before new ones, also for who waits for a kick" {
    const guest = try Guest.start(.{ .inflight_size = 8 });
    defer guest.stop();
    _ = fake_guest.link(guest, 4, b, &.{.{ 16, 0 }});
    _ = fake_guest.link(guest, 2, b, &.{.{ 16, 0 }});
    guest.offer(4);
    try expectEqual(1, guest.pop());
    try expect(guest.restart() > 0);
    try expectEqual(1, rings.arm(guest.ring));
    guest.offer(2);
    try expectEqual(1, guest.pop());
    try expectEqual(4, guest.record(0).head);
    try expectEqual(1, guest.pop());
    try expectEqual(2, guest.record(0).head);
    try expectEqual(0, rings.arm(guest.ring));
}

test "a request that is put back is in flight no more, or comes again first" {
    for ([_]bool{ false, true }) |is_packed| {
        var driver: PackedGuest = undefined;
        const guest = if (is_packed) packed_start: {
            driver = try PackedGuest.start(.{ .inflight_size = 8 });
            break :packed_start driver.guest;
        } else try Guest.start(.{ .inflight_size = 8 });
        defer guest.stop();
        for ([_]u16{ 4, 2, 6 }) |head| {
            if (is_packed) {
                driver.offer(head, &.{ .{ b, 16, 0 }, .{ b, 16, fake_guest.write } });
            } else {
                _ = fake_guest.link(guest, head, b, &.{ .{ 8, 0 }, .{ 8, 0 } });
                guest.offer(head);
            }
        }
        try expectEqual(3, guest.pop());
        rings.get(guest.ring).?.unpop(6);
        rings.get(guest.ring).?.unpop(2);
        for (0..2) |_| {
            try expect(guest.restart() > 0);
            try expectEqual(1, guest.state().to_resubmit);
            try expectEqual(1, guest.pop());
            try expectEqual(4, guest.record(0).head);
            rings.get(guest.ring).?.unpop(4);
            try expectEqual(1, guest.state().to_resubmit);
            try expectEqual(1, guest.pop());
            try expectEqual(4, guest.record(0).head);
            try expectEqual(2, guest.pop());
            try expectEqual(2, guest.record(0).head);
            // Back again, newest first.
            rings.get(guest.ring).?.unpop(6);
            rings.get(guest.ring).?.unpop(2);
        }
        try expectEqual(2, guest.pop());
        try expect(guest.push(&.{ 6, 4, 2 }) >= 0);
        try expect(guest.restart() > 0);
        try expectEqual(0, guest.state().to_resubmit);
        try expectEqual(0, guest.pop());
    }
}

fn splitParts(guest: *Guest) struct { *split_inflight.Header, [*]split_inflight.Entry } {
    const bytes = guest.part();
    return .{ @ptrCast(bytes.ptr), @ptrCast(bytes.ptr + @sizeOf(split_inflight.Header)) };
}

fn packedParts(guest: *Guest) struct { *packed_inflight.Header, [*]packed_inflight.Entry } {
    const bytes = guest.part();
    return .{ @ptrCast(bytes.ptr), @ptrCast(bytes.ptr + @sizeOf(packed_inflight.Header)) };
}

test "what the fields of a split ring's part are" {
    const guest = try Guest.start(.{ .inflight_size = 16, .used_index = 9, .base = 9 });
    defer guest.stop();
    const header, const entries = splitParts(guest);
    try expectEqual(split_inflight.Header{ .features = 0, .version = 1, .desc_num = 16, .last_batch_head = 0, .used_idx = 9 }, header.*);
    for ([_]u16{ 6, 2 }) |head| {
        _ = fake_guest.link(guest, head, b, &.{.{ 16, 0 }});
        guest.offer(head);
    }
    try expectEqual(2, guest.pop());
    try expectEqual(1, entries[6].inflight);
    try expectEqual(0, entries[6].counter);
    try expectEqual(1, entries[2].counter);
    try expectEqual(1, guest.push(&.{ 2, 6 }));
    try expectEqual(0, entries[6].inflight | entries[2].inflight);
    try expectEqual(6, header.last_batch_head);
    try expectEqual(2, entries[6].next);
    try expectEqual(11, header.used_idx);
    // The other queues' parts are their own.
    for (guest.region[0 .. guest.region.len / 4 * 3]) |byte| try expectEqual(0, byte);
}

test "a damaged split part is refused" {
    const Damage = struct { offset: u32, value: u16 };
    const damages = [_]Damage{
        .{ .offset = 8, .value = 2 }, // version
        .{ .offset = 10, .value = 7 }, // desc_num below the ring's size
        .{ .offset = 10, .value = 9 }, // and beyond the region
        .{ .offset = 10, .value = 0xffff },
        .{ .offset = 12, .value = 8 }, // last_batch_head
        .{ .offset = 12, .value = 0xffff },
        .{ .offset = 14, .value = 0xfff0 }, // used_idx: a batch longer than the ring
        .{ .offset = 16 + 3 * 16 + 6, .value = 8 }, // next of a batch's last
        .{ .offset = 16 + 3 * 16 + 6, .value = 3 }, // a cycle
        .{ .offset = 16 + 3 * 16 + 6, .value = 0xffff },
    };
    for (damages) |damage| {
        const guest = try Guest.start(.{ .inflight_size = 8 });
        defer guest.stop();
        for ([_]u16{ 1, 3, 5 }) |head| {
            _ = fake_guest.link(guest, head, b, &.{.{ 16, 0 }});
            guest.offer(head);
        }
        try expectEqual(3, guest.pop());
        try expectEqual(1, guest.push(&.{ 1, 3 }));
        // As after a crash before the batch was settled.
        std.mem.writeInt(u16, guest.part()[14..16], 0, .little);
        const sound = try Picture.take(guest);
        defer sound.free();
        std.mem.writeInt(u16, guest.part()[damage.offset..][0..2], damage.value, .little);
        try expectEqual(linux.fail(.UCLEAN), guest.restart());
        sound.restore(guest);
        try expect(guest.restart() > 0);
        try expectEqual(1, guest.state().to_resubmit);
    }
}

test "a ring has no part in a region of smaller queues, or of fewer" {
    const guest = try Guest.start(.{ .inflight_size = 8 });
    defer guest.stop();
    var config = guest.ringConfig();
    var reason: u32 = undefined;
    config.queue_index = 4;
    try expectEqual(linux.fail(.INVAL), rings.create(guest.memory, &config, &reason));
    try expectEqual(layout.refuse_ring_inflight, reason);
    config.queue_index = 0xffff_ffff;
    try expectEqual(linux.fail(.INVAL), rings.create(guest.memory, &config, &reason));
    config.queue_index = 0;
    config.size = 16;
    try expectEqual(linux.fail(.INVAL), rings.create(guest.memory, &config, &reason));
    config.size = 8;
    // The other format needs more than is mapped.
    config.features = fake_guest.feature_packed;
    config.base = fake_packed_guest.first_base;
    config.queue_index = 3;
    try expectEqual(linux.fail(.INVAL), rings.create(guest.memory, &config, &reason));
    config.inflight = 0x7fff_0003;
    try expectEqual(linux.fail(.BADF), rings.create(guest.memory, &config, &reason));
}

test "any bytes in a region are survived, and never make a head twice" {
    var prng: std.Random.DefaultPrng = .init(5);
    const random = prng.random();
    var recovered: u32 = 0;
    for (0..4000) |round| {
        const is_packed = round % 2 == 1;
        const guest = if (is_packed) (try PackedGuest.start(.{ .inflight_size = 9 })).guest else try Guest.start(.{ .inflight_size = 9 });
        defer guest.stop();
        for (0..8) |i| {
            const head: u16 = @intCast(i);
            if (is_packed) {
                guest.describe(Guest.descriptors, head, b, 16, head, packed_ring.flag_available);
            } else {
                _ = fake_guest.link(guest, head, b, &.{.{ 16, 0 }});
                guest.offer(head);
            }
        }
        try expect(guest.pop() >= 0);
        try expect(guest.push(&.{ 2, 5, 1 }) >= 0);
        const part = guest.part();
        for (0..random.uintAtMost(u32, 4)) |_| {
            const at = random.uintLessThan(usize, 16 + 32 * 9) & ~@as(usize, 1);
            const value: u16 = switch (random.uintLessThan(u32, 3)) {
                0 => random.int(u16),
                1 => random.uintLessThan(u16, 12),
                else => random.uintLessThan(u16, 2),
            };
            std.mem.writeInt(u16, part[at % (part.len - 1) ..][0..2], value, .little);
        }
        if (guest.restart() < 0) continue;
        recovered += 1;
        var is_owned: [8]bool = @splat(false);
        var heads: [8]u32 = undefined;
        var total: usize = 0;
        while (total < 8) {
            const count = guest.pop();
            if (count <= 0) break;
            for (0..@intCast(count)) |i| {
                const head = guest.record(@intCast(i)).head;
                try expect(!is_owned[head]);
                is_owned[head] = true;
                heads[total] = head;
                total += 1;
            }
        }
        if (total > 0) _ = guest.push(heads[0..total]);
    }
    try expect(recovered > 200 and recovered < 3800);
}

test "a region that shrinks is the memory's fault, and no crash" {
    for ([_]bool{ false, true }) |before_start| {
        const guest = try Guest.start(.{ .inflight_size = 512 });
        defer guest.stop();
        try expectEqual(0, @import("../memory/fault.zig").install());
        _ = fake_guest.link(guest, 4, b, &.{.{ 16, 0 }});
        guest.offer(4);
        try expectEqual(0, sys.ftruncate(guest.region_fd, 0));
        if (before_start) {
            try expectEqual(linux.fail(.FAULT), guest.restart());
        } else {
            try expectEqual(linux.fail(.FAULT), guest.pop());
            try expectEqual(linux.fail(.FAULT), guest.restart());
        }
        try expectEqual(@as(i32, layout.memory_faulted), memory.state(guest.memory));
    }
}

test "a description that cannot be is refused" {
    const guest = try Guest.start(.{});
    defer guest.stop();
    const fd = linux.result(sys.memfd_create("inflight", 0));
    defer linux.closeQuietly(fd);
    try expectEqual(0, sys.ftruncate(fd, 8192));
    const top = std.math.maxInt(u64);
    const Case = struct { u64, u64, u32, u32, linux.E };
    const cases = [_]Case{
        .{ 4096, 0, 0, 8, .INVAL },
        .{ 4096, 0, 257, 8, .INVAL },
        .{ 4096, 0, 1, 0, .INVAL },
        .{ 4096, 0, 1, 32769, .INVAL },
        .{ 4096, 4, 1, 8, .INVAL },
        .{ 191, 0, 1, 8, .INVAL }, // one byte short
        .{ 383, 0, 2, 8, .INVAL },
        .{ 4096, top - 7, 1, 8, .INVAL }, // wraps
        .{ top, 8, 1, 8, .INVAL },
        .{ 8192, 8, 1, 8, .NODATA }, // behind the end of the file
        .{ 1 << 60, 0, 1, 8, .NODATA },
        .{ 0xffff_ffff_ffff, 0, 256, 32768, .NODATA },
    };
    for (cases) |case| {
        const size, const offset, const queue_count, const queue_size, const code = case;
        try expectEqual(linux.fail(code), inflight.open(guest.memory, fd, size, offset, queue_count, queue_size, 0));
    }
    const event = linux.result(sys.eventfd(0, 0));
    defer linux.closeQuietly(event);
    try expectEqual(linux.fail(.INVAL), inflight.open(guest.memory, event, 4096, 0, 1, 8, 0));
    try expectEqual(linux.fail(.BADF), inflight.open(guest.memory, -1, 4096, 0, 1, 8, 0));
    // A part of a page, in the middle of a file.
    const handle = inflight.open(guest.memory, fd, 192, 4096 + 64, 1, 8, 0);
    try expect(handle > 0);
    try expectEqual(0, inflight.close(@intCast(handle)));
    try expectEqual(linux.fail(.BADF), inflight.close(@intCast(handle)));
}
