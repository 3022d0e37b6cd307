const std = @import("std");
const layout = @import("../layout.zig");
const sync = @import("../sync.zig");
const iotlb = @import("iotlb.zig");
const Iotlb = iotlb.Iotlb;
const expect = std.testing.expect;
const expectEqual = std.testing.expectEqual;
const expectError = std.testing.expectError;

const read = layout.access_read;
const write = layout.access_write;
const top = std.math.maxInt(u64);

/// What `iova` translates to; null when it misses.
fn targetOf(self: *Iotlb, iova: u64) ?u64 {
    var hint: u32 = 0;
    const entry = self.find(&hint, iova) orelse return null;
    return entry.target + (iova - entry.start);
}

test "an entry translates its range and nothing beside it" {
    var self: Iotlb = .{};
    defer self.clear(layout.space_uva);
    try self.update(0x1000, 0x2000, 0x7000_0000, read);
    try expectEqual(null, targetOf(&self, 0xfff));
    try expectEqual(0x7000_0000, targetOf(&self, 0x1000));
    try expectEqual(0x7000_1fff, targetOf(&self, 0x2fff));
    try expectEqual(null, targetOf(&self, 0x3000));
}

test "empty and wrapping ranges are refused, the last byte below 2^64 is not" {
    var self: Iotlb = .{};
    defer self.clear(layout.space_uva);
    try expectError(error.Invalid, self.update(0, 0, 0, read));
    try expectError(error.Invalid, self.update(top, 2, 0, read));
    try expectError(error.Invalid, self.update(0, 2, top, read));
    try expectError(error.Invalid, self.update(1, top, 2, read));
    try expectError(error.Invalid, self.update(0, 1, 0, 0));
    try expectError(error.Invalid, self.update(0, 1, 0, 4));
    try expectError(error.Invalid, self.invalidate(5, 0));
    try expectError(error.Invalid, self.invalidate(2, top));
    try expectEqual(0, self.count);
    try self.update(top, 1, top, write);
    try self.update(top - 0xfff, 0xfff, 0x1000, write);
    try expectEqual(top, targetOf(&self, top));
    try expectEqual(0x1ffe, targetOf(&self, top - 1));
    try self.invalidate(0, top);
    try expectEqual(top, targetOf(&self, top));
    try self.invalidate(1, top);
    try expectEqual(0, self.count);
    try self.update(0, top, 0, read | write);
    try self.update(top, 1, top, read | write);
    try expectEqual(1, self.count);
    try self.invalidate(0x5000, 0x1000);
    try expectEqual(2, self.count);
    try expectEqual(top, targetOf(&self, top));
}

test "a target that ends at 2^64 is not joined with one that begins at 0" {
    var self: Iotlb = .{};
    defer self.clear(layout.space_uva);
    try self.update(0x1000, 0x1000, top - 0xfff, read);
    try self.update(0x2000, 0x1000, 0, read);
    try expectEqual(2, self.count);
}

test "an invalidation cuts entries at its ends and counts as a removal" {
    var self: Iotlb = .{};
    defer self.clear(layout.space_uva);
    try self.update(0x1000, 0x3000, 0x10_0000, read);
    const before = self.removals;
    try self.invalidate(0x8000, 0x1000);
    try expectEqual(before, self.removals);
    try self.invalidate(0x2000, 0x1000);
    try expectEqual(before + 1, self.removals);
    try expectEqual(0x10_0fff, targetOf(&self, 0x1fff));
    try expectEqual(null, targetOf(&self, 0x2000));
    try expectEqual(null, targetOf(&self, 0x2fff));
    try expectEqual(0x10_2000, targetOf(&self, 0x3000));
    try self.invalidate(0x1800, 0x2000);
    try expectEqual(0x10_07ff, targetOf(&self, 0x17ff));
    try expectEqual(null, targetOf(&self, 0x37ff));
    try expectEqual(0x10_2800, targetOf(&self, 0x3800));
}

test "an update replaces what it overlaps; the same again changes nothing" {
    var self: Iotlb = .{};
    defer self.clear(layout.space_uva);
    try self.update(0x1000, 0x3000, 0x10_0000, read);
    const before = self.removals;
    try self.update(0x2000, 0x1000, 0x10_1000, read);
    try expectEqual(before, self.removals);
    try self.update(0x2000, 0x1000, 0x20_0000, read);
    try expectEqual(before + 1, self.removals);
    try expectEqual(0x10_0fff, targetOf(&self, 0x1fff));
    try expectEqual(0x20_0000, targetOf(&self, 0x2000));
    try expectEqual(0x10_2000, targetOf(&self, 0x3000));
    // The same place with another permission is another translation.
    try self.update(0x2000, 0x1000, 0x20_0000, read | write);
    try expectEqual(before + 2, self.removals);
}

test "neighbours that continue each other become one entry" {
    var self: Iotlb = .{};
    defer self.clear(layout.space_uva);
    try self.update(0x1000, 0x1000, 0x10_0000, read);
    try self.update(0x3000, 0x1000, 0x10_2000, read);
    try expectEqual(2, self.count);
    try self.update(0x2000, 0x1000, 0x10_1000, read);
    try expectEqual(1, self.count);
    try self.update(0x4000, 0x1000, 0x10_3000, write);
    try self.update(0x5000, 0x1000, 0x10_3000, write);
    try expectEqual(3, self.count);
}

test "a full cache evicts, and spares the areas of rings" {
    var self: Iotlb = .{};
    defer self.clear(layout.space_uva);
    const stride = 0x2000;
    var hint: u32 = 0;
    for (0..2 * iotlb.max_entries) |i| {
        const iova = i * stride;
        try self.update(iova, 0x1000, 0x7000_0000_0000 + iova, read);
        try expectEqual(0x7000_0000_0000 + iova, targetOf(&self, iova));
        if (i < 16) self.find(&hint, iova).?.is_ring.store(true, .monotonic);
    }
    try expectEqual(iotlb.max_entries, self.count);
    for (0..16) |i| try expectEqual(0x7000_0000_0000 + i * stride, targetOf(&self, i * stride));
    // An eviction is no removal: nothing was taken back.
    try expectEqual(0, self.removals);
    // A split without room forgets its rest and nothing else.
    try self.invalidate(0x800, 0x10);
    try expectEqual(iotlb.max_entries, self.count);
    try expectEqual(null, targetOf(&self, 0x800));
    try expectEqual(0x7000_0000_07ff, targetOf(&self, 0x7ff));
    try expectEqual(0x7000_0000_2000, targetOf(&self, stride));
}

test "random updates and invalidations against a table of pages" {
    const pages = 96;
    var model: [pages]?struct { target: u64, access: u32 } = @splat(null);
    var self: Iotlb = .{};
    defer self.clear(layout.space_uva);
    var prng: std.Random.DefaultPrng = .init(7);
    const random = prng.random();
    var hint: u32 = 0;
    for (0..20_000) |_| {
        const first = random.uintLessThan(u64, pages);
        const count = 1 + random.uintLessThan(u64, @min(9, pages - first));
        if (random.boolean()) {
            // Mostly what continues its neighbours, to have entries joined.
            const shift = random.uintLessThan(u64, 2) * 0x100_0000;
            const access = 1 + random.uintLessThan(u32, 3);
            try self.update(first, count, 0x1000 + shift + first, access);
            for (first..first + count) |page| model[page] = .{ .target = 0x1000 + shift + page, .access = access };
        } else {
            try self.invalidate(first, count);
            for (first..first + count) |page| model[page] = null;
        }
        const page = random.uintLessThan(u64, pages);
        const entry = self.find(&hint, page);
        if (model[page]) |expected| {
            try expectEqual(expected.target, entry.?.target + (page - entry.?.start));
            try expectEqual(expected.access, entry.?.access);
        } else try expectEqual(null, entry);
        for (self.entries[0..self.count], 0..) |*one, i| {
            try expect(one.start <= one.last);
            if (i > 0) try expect(self.entries[i - 1].last < one.start);
        }
    }
}

test "what a reader found holds until it lets go, and no longer" {
    const Shared = struct {
        iotlb: Iotlb = .{},
        /// What the page is said to be now; changed under the lock's writers.
        valid: std.atomic.Value(u64) = .init(0),
        wrong: std.atomic.Value(u32) = .init(0),
        done: std.atomic.Value(bool) = .init(false),

        fn readAlong(argument: ?*anyopaque) callconv(.c) ?*anyopaque {
            const self: *@This() = @ptrCast(@alignCast(argument.?));
            var hint: u32 = 0;
            while (!self.done.load(.acquire)) {
                self.iotlb.lock.lockShared();
                if (self.iotlb.find(&hint, 0x1000)) |entry| {
                    // Invalidated and acknowledged before this began?
                    if (entry.target < self.valid.load(.acquire)) _ = self.wrong.fetchAdd(1, .monotonic);
                }
                self.iotlb.lock.unlockShared();
            }
            return null;
        }
    };
    var shared: Shared = .{};
    defer shared.iotlb.clear(layout.space_uva);
    const threads = [_]sync.Thread{
        sync.Thread.spawn(Shared.readAlong, &shared).?,
        sync.Thread.spawn(Shared.readAlong, &shared).?,
    };
    for (1..3000) |round| {
        try shared.iotlb.update(0x1000, 0x1000, round, read);
        try shared.iotlb.invalidate(0x1000, 0x1000);
        shared.valid.store(round + 1, .release);
    }
    shared.done.store(true, .release);
    for (threads) |thread| thread.join();
    try expectEqual(0, shared.wrong.load(.monotonic));
}
