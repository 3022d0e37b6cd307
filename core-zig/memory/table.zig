//! The table of regions: the only place where a guest address becomes a
//! pointer. A table never changes once it is published; `memory.zig` swaps
//! whole tables.

const std = @import("std");
const sync = @import("../sync.zig");
const layout = @import("../layout.zig");
const Mapping = @import("mapping.zig").Mapping;

pub const Region = struct {
    gpa: u64,
    uva: u64,
    size: u64,
    mapping: *Mapping,
};

/// A region in one address space. `last` is inclusive.
const Range = struct {
    start: u64,
    last: u64,
    pointer: [*]u8,
    view_first: u32,
};

/// A window of a region; `pointer` is null for a number that is not in use.
const View = struct {
    pointer: ?[*]u8 = null,
    length: u32 = 0,
    mapping: ?*Mapping = null,
    /// Of its first byte.
    gpa: u64 = 0,
};

/// A stretch of guest memory within one view.
pub const Piece = struct {
    pointer: [*]u8,
    view: u32,
    offset: u32,
    length: u32,
};

/// The region hit last, a hint that is checked on each use.
pub const Cache = struct { index: u32 = 0 };

pub const Table = struct {
    /// In the order of gpa, as `ranges[space_gpa]`.
    regions: []Region,
    ranges: [2][]Range,
    views: []View,
    /// The list of tables that wait for their last reader.
    next: ?*Table = null,

    pub const empty: Table = .{ .regions = &.{}, .ranges = .{ &.{}, &.{} }, .views = &.{} };

    /// `regions` do not overlap in either space and have their view numbers.
    pub fn build(regions: []const Region) error{OutOfMemory}!*Table {
        const self = try sync.allocator.create(Table);
        errdefer sync.allocator.destroy(self);
        const sorted = try sync.allocator.dupe(Region, regions);
        errdefer sync.allocator.free(sorted);
        std.sort.pdq(Region, sorted, {}, lessGpa);
        const by_gpa = try sync.allocator.alloc(Range, regions.len);
        errdefer sync.allocator.free(by_gpa);
        const by_uva = try sync.allocator.alloc(Range, regions.len);
        errdefer sync.allocator.free(by_uva);
        var view_end: u32 = 0;
        for (sorted, by_gpa, by_uva) |region, *gpa, *uva| {
            const mapping = region.mapping;
            gpa.* = .{ .start = region.gpa, .last = region.gpa + (region.size - 1), .pointer = mapping.pointer(), .view_first = mapping.view_first };
            uva.* = .{ .start = region.uva, .last = region.uva + (region.size - 1), .pointer = mapping.pointer(), .view_first = mapping.view_first };
            view_end = @max(view_end, mapping.view_first + mapping.view_count);
        }
        std.sort.pdq(Range, by_uva, {}, lessStart);
        const views = try sync.allocator.alloc(View, view_end);
        @memset(views, .{});
        for (sorted) |region| {
            const mapping = region.mapping;
            for (views[mapping.view_first..][0..mapping.view_count], 0..) |*view, number| {
                const offset = @as(u64, number) << layout.view_shift;
                view.* = .{
                    .pointer = mapping.pointer() + @as(usize, offset),
                    .length = @intCast(@min(layout.view_size, region.size - offset)),
                    .mapping = mapping,
                    .gpa = region.gpa + offset,
                };
            }
        }
        self.* = .{ .regions = sorted, .ranges = .{ by_gpa, by_uva }, .views = views };
        return self;
    }

    pub fn destroy(self: *Table) void {
        sync.allocator.free(self.regions);
        for (self.ranges) |ranges| sync.allocator.free(ranges);
        sync.allocator.free(self.views);
        sync.allocator.destroy(self);
    }

    fn lessGpa(_: void, a: Region, b: Region) bool {
        return a.gpa < b.gpa;
    }

    fn lessStart(_: void, a: Range, b: Range) bool {
        return a.start < b.start;
    }

    /// Index of the last range that starts at or below `address`, if it holds it.
    fn find(ranges: []const Range, address: u64) ?u32 {
        if (ranges.len == 0) return null;
        // Without branches: a guest's addresses are not to be predicted, and
        // a wrong guess costs as much as the whole search.
        var low: usize = 0;
        var count = ranges.len;
        while (count > 1) {
            const half = count / 2;
            low += half & -%@as(usize, @intFromBool(ranges[low + half].start <= address));
            count -= half;
        }
        if (address < ranges[low].start or address > ranges[low].last) return null;
        return @intCast(low);
    }

    /// The region that starts at exactly `gpa`.
    pub fn regionAt(self: *const Table, gpa: u64) ?*const Region {
        const index = find(self.ranges[layout.space_gpa], gpa) orelse return null;
        const region = &self.regions[index];
        return if (region.gpa == gpa) region else null;
    }

    /// First piece of [address, address + length), clipped at the end of its
    /// view and of its region. Null when `address` is not mapped or nothing
    /// was asked for; whether the sum wraps does not matter.
    pub fn piece(self: *const Table, cache: *Cache, space: u32, address: u64, length: u64) ?Piece {
        if (length == 0 or space > layout.space_uva) return null;
        const ranges = self.ranges[space];
        var index = cache.index;
        if (index >= ranges.len or address < ranges[index].start or address > ranges[index].last) {
            index = find(ranges, address) orelse return null;
            cache.index = index;
        }
        const range = &ranges[index];
        const offset = address - range.start;
        const in_view: u32 = @truncate(offset & (layout.view_size - 1));
        // `last - address` + 1 bytes are left: at most 2^64 - 1, as no region
        // is that long.
        const left = @min(range.last - address + 1, layout.view_size - in_view);
        return .{
            .pointer = range.pointer + @as(usize, offset),
            .view = range.view_first + @as(u32, @intCast(offset >> layout.view_shift)),
            .offset = in_view,
            .length = @intCast(@min(left, length)),
        };
    }

    /// The whole range when it is inside one region, else null.
    pub fn whole(self: *const Table, space: u32, address: u64, length: u64) ?[*]u8 {
        if (length == 0 or space > layout.space_uva) return null;
        const ranges = self.ranges[space];
        const range = &ranges[find(ranges, address) orelse return null];
        if (length - 1 > range.last - address) return null;
        return range.pointer + @as(usize, address - range.start);
    }

    /// The inverse of `piece`: null when the bytes are not all in this view.
    pub fn pointerOf(self: *const Table, view: u32, offset: u32, length: u32) ?[*]u8 {
        if (view >= self.views.len) return null;
        const entry = &self.views[view];
        if (offset > entry.length or length > entry.length - offset) return null;
        const start = entry.pointer orelse return null;
        return start + offset;
    }

    /// The guest physical address of a byte; null for a view not in use.
    pub inline fn gpaOf(self: *const Table, view: u32, offset: u32) ?u64 {
        if (view >= self.views.len) return null;
        const entry = &self.views[view];
        return if (offset < entry.length) entry.gpa + offset else null;
    }

    pub fn translate(self: *const Table, space: u32, address: u64, length: u64) ?layout.Translation {
        var cache: Cache = .{};
        const found = self.piece(&cache, space, address, length) orelse return null;
        const range = &self.ranges[space][cache.index];
        return .{
            .view = found.view,
            .offset = found.offset,
            .length = found.length,
            .region_view_first = range.view_first,
            .region_offset = address - range.start,
            .contiguous = @min(length, range.last - address + 1),
        };
    }
};

const testing = std.testing;

/// Mappings at made-up addresses: translation never touches them.
fn fake(mappings: []Mapping, size: u64) void {
    for (mappings, 0..) |*mapping, index| {
        mapping.* = .{ .index = 0, .address = 0x1000_0000 + index * 0x1_0000_0000, .size = size, .view_first = @intCast(index), .view_count = 1 };
    }
}

test "each address of 1, 64 and 509 regions is found, and no other" {
    var mappings: [509]Mapping = undefined;
    fake(&mappings, 0x1000);
    for ([_]usize{ 1, 64, 509 }) |count| {
        var regions: [509]Region = undefined;
        // Given from the highest gpa down, with a hole of one page between.
        for (regions[0..count], 0..) |*region, index| region.* = .{
            .gpa = (count - index) * 0x2000,
            .uva = 0x7f00_0000_0000 + index * 0x2000,
            .size = 0x1000,
            .mapping = &mappings[index],
        };
        const table = try Table.build(regions[0..count]);
        defer table.destroy();
        var cache: Cache = .{};
        for (regions[0..count], 0..) |region, index| {
            for ([_]u64{ 0, 1, 0xfff }) |offset| {
                const by_gpa = table.piece(&cache, layout.space_gpa, region.gpa + offset, 0x5000).?;
                const by_uva = table.piece(&cache, layout.space_uva, region.uva + offset, 0x5000).?;
                try testing.expectEqual(mappings[index].address + offset, @intFromPtr(by_gpa.pointer));
                try testing.expectEqual(by_gpa, by_uva);
                try testing.expectEqual(0x1000 - offset, by_gpa.length);
                try testing.expectEqual(index, by_gpa.view);
                try testing.expectEqual(by_gpa.pointer, table.pointerOf(by_gpa.view, by_gpa.offset, by_gpa.length).?);
            }
            try testing.expect(table.piece(&cache, layout.space_gpa, region.gpa + 0x1000, 1) == null);
            try testing.expect(table.piece(&cache, layout.space_gpa, region.gpa - 1, 1) == null);
            try testing.expect(table.regionAt(region.gpa).?.mapping == &mappings[index]);
        }
        try testing.expect(table.piece(&cache, layout.space_gpa, 0, 1) == null);
        try testing.expect(table.piece(&cache, layout.space_gpa, std.math.maxInt(u64), std.math.maxInt(u64)) == null);
        try testing.expect(table.piece(&cache, 2, regions[0].gpa, 1) == null);
        try testing.expect(table.piece(&cache, layout.space_gpa, regions[0].gpa, 0) == null);
    }
}

test "an empty table maps nothing" {
    var cache: Cache = .{ .index = 7 };
    try testing.expect(Table.empty.piece(&cache, layout.space_gpa, 0, 1) == null);
    try testing.expect(Table.empty.whole(layout.space_uva, 0, 1) == null);
    try testing.expect(Table.empty.pointerOf(0, 0, 0) == null);
}

test "addresses and lengths at the top of 2^64 do not wrap" {
    var mappings: [1]Mapping = undefined;
    fake(&mappings, 0x1000);
    const top = std.math.maxInt(u64);
    const table = try Table.build(&.{.{ .gpa = top - 0xfff, .uva = top - 0x1fff, .size = 0x1000, .mapping = &mappings[0] }});
    defer table.destroy();
    var cache: Cache = .{};
    try testing.expectEqual(1, table.piece(&cache, layout.space_gpa, top, top).?.length);
    try testing.expectEqual(0x1000, table.piece(&cache, layout.space_gpa, top - 0xfff, top).?.length);
    try testing.expect(table.whole(layout.space_gpa, top - 0xfff, 0x1000) != null);
    try testing.expect(table.whole(layout.space_gpa, top - 0xfff, 0x1001) == null);
    try testing.expect(table.whole(layout.space_gpa, top, 2) == null);
    try testing.expect(table.whole(layout.space_gpa, top, top) == null);
    try testing.expect(table.piece(&cache, layout.space_uva, top, 1) == null);
}

test "a range over two adjacent regions comes in pieces and never as a whole" {
    var mappings: [2]Mapping = undefined;
    fake(&mappings, 0x1000);
    const table = try Table.build(&.{
        .{ .gpa = 0, .uva = 0x10_0000, .size = 0x1000, .mapping = &mappings[0] },
        .{ .gpa = 0x1000, .uva = 0x20_0000, .size = 0x1000, .mapping = &mappings[1] },
    });
    defer table.destroy();
    var cache: Cache = .{};
    const first = table.piece(&cache, layout.space_gpa, 0xff0, 0x20).?;
    try testing.expectEqual(0x10, first.length);
    const second = table.piece(&cache, layout.space_gpa, 0xff0 + first.length, 0x20 - first.length).?;
    try testing.expectEqual(@intFromPtr(mappings[1].pointer()), @intFromPtr(second.pointer));
    try testing.expectEqual(0x10, second.length);
    try testing.expect(table.whole(layout.space_gpa, 0xff0, 0x20) == null);
    try testing.expect(table.whole(layout.space_gpa, 0xff0, 0x10) != null);
}

test "a region beyond 2 GiB has several views, and pieces end where a view ends" {
    var mapping: Mapping = .{ .index = 0, .address = 0x1000_0000, .size = 5 << 30, .view_first = 3, .view_count = 3 };
    const table = try Table.build(&.{.{ .gpa = 0x1000, .uva = 0, .size = 5 << 30, .mapping = &mapping }});
    defer table.destroy();
    var cache: Cache = .{};
    const before = table.piece(&cache, layout.space_uva, layout.view_size - 8, 100).?;
    try testing.expectEqual(Piece{ .pointer = mapping.pointer() + layout.view_size - 8, .view = 3, .offset = layout.view_size - 8, .length = 8 }, before);
    const after = table.piece(&cache, layout.space_uva, layout.view_size, 5 << 30).?;
    try testing.expectEqual(4, after.view);
    try testing.expectEqual(layout.view_size, after.length);
    try testing.expect(table.whole(layout.space_uva, 0, 5 << 30) != null);
    try testing.expect(table.pointerOf(5, 1 << 30, 0) != null);
    try testing.expect(table.pointerOf(5, 1 << 30, 1) == null);
    try testing.expect(table.pointerOf(2, 0, 1) == null);
    try testing.expect(table.pointerOf(6, 0, 0) == null);
    const answer = table.translate(layout.space_gpa, 0x1000 + layout.view_size - 8, 100).?;
    try testing.expectEqual(8, answer.length);
    try testing.expectEqual(100, answer.contiguous);
    try testing.expectEqual(layout.view_size - 8, answer.region_offset);
    try testing.expectEqual(3, answer.region_view_first);
}
