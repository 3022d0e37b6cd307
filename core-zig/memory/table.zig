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

/// The ranges of one address space, in the order of their starts.
const Space = struct {
    ranges: []Range,
    /// Where to look for an address: the space from the first start on is cut
    /// into buckets of 2^shift bytes, and for each this is the range in which
    /// its first byte is, or the last one before that.
    buckets: []u16,
    shift: u6,

    const empty: Space = .{ .ranges = &.{}, .buckets = &.{}, .shift = 0 };
    /// For one range: as regions of a guest are of like sizes, most buckets
    /// see one border at most.
    const buckets_per_range = 4;

    fn bucketsAtMost(count: usize) usize {
        return count * buckets_per_range + 1;
    }

    /// Of sorted ranges; `room` is for as many buckets as there are at most.
    fn over(ranges: []Range, room: []u16) Space {
        if (ranges.len == 0) return .empty;
        const first = ranges[0].start;
        const span = ranges[ranges.len - 1].start - first;
        var shift: u6 = 0;
        while (span >> shift >= ranges.len * buckets_per_range) shift += 1;
        // One more, for the end of the last.
        const buckets = room[0..@intCast((span >> shift) + 2)];
        var at: u16 = 0;
        for (buckets, 0..) |*bucket, number| {
            const distance = @as(u128, number) << shift;
            while (at + 1 < ranges.len and ranges[at + 1].start - first <= distance) at += 1;
            bucket.* = at;
        }
        return .{ .ranges = ranges, .buckets = buckets, .shift = shift };
    }

    /// Index of the last range that starts at or below `address`, if it holds
    /// it. A guest's addresses are not to be predicted, and a wrong guess costs
    /// as much as a search: few steps, and no branches within them.
    fn find(self: *const Space, address: u64) ?u32 {
        if (self.buckets.len == 0) return null;
        const ranges = self.ranges;
        const bucket = (address -% ranges[0].start) >> self.shift;
        // Behind the last start, or, having wrapped, before the first.
        const known: usize = @intCast(@min(bucket, self.buckets.len - 2));
        var low: usize = self.buckets[known];
        var count = self.buckets[known + 1] - low + 1;
        while (count > 1) {
            const half = count / 2;
            low += half & -%@as(usize, @intFromBool(ranges[low + half].start <= address));
            count -= half;
        }
        if (address < ranges[low].start or address > ranges[low].last) return null;
        return @intCast(low);
    }
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

/// All that is mapped of one view around an address: what is looked up next is
/// mostly there too.
pub const Window = struct {
    start: u64 = 0,
    length: u64 = 0,
    pointer: [*]u8 = undefined,
    view: u32 = 0,
};

/// The region hit last, a hint that is checked on each use.
pub const Cache = struct { index: u32 = 0 };

pub const Table = struct {
    /// All parts of it lie here: one page, where there are a few regions.
    block: []align(8) u8,
    /// In the order of gpa, as the ranges of `spaces[space_gpa]`.
    regions: []Region,
    spaces: [2]Space,
    views: []View,
    /// The list of tables that wait for their last reader.
    next: ?*Table = null,

    pub const empty: Table = .{ .block = &.{}, .regions = &.{}, .spaces = .{ .empty, .empty }, .views = &.{} };

    /// `regions` do not overlap in either space and have their view numbers.
    pub fn build(regions: []const Region) error{OutOfMemory}!*Table {
        const count = regions.len;
        var view_end: u32 = 0;
        for (regions) |region| view_end = @max(view_end, region.mapping.view_first + region.mapping.view_count);
        const buckets = Space.bucketsAtMost(count);
        const size = @sizeOf(Table) + count * (@sizeOf(Region) + 2 * @sizeOf(Range)) +
            view_end * @sizeOf(View) + 2 * buckets * @sizeOf(u16);
        const block = try sync.allocator.alignedAlloc(u8, .@"8", size);
        errdefer sync.allocator.free(block);
        var room: std.heap.FixedBufferAllocator = .init(block);
        const parts = room.allocator();
        const self = try parts.create(Table);
        const sorted = try parts.dupe(Region, regions);
        const by_gpa = try parts.alloc(Range, count);
        const by_uva = try parts.alloc(Range, count);
        const views = try parts.alloc(View, view_end);
        std.sort.pdq(Region, sorted, {}, lessGpa);
        fill(sorted, by_gpa, by_uva, views);
        self.* = .{
            .block = block,
            .regions = sorted,
            .spaces = .{
                .over(by_gpa, try parts.alloc(u16, buckets)),
                .over(by_uva, try parts.alloc(u16, buckets)),
            },
            .views = views,
        };
        return self;
    }

    fn fill(sorted: []const Region, by_gpa: []Range, by_uva: []Range, views: []View) void {
        @memset(views, .{});
        for (sorted, by_gpa, by_uva) |region, *gpa, *uva| {
            const mapping = region.mapping;
            gpa.* = .{ .start = region.gpa, .last = region.gpa + (region.size - 1), .pointer = mapping.pointer(), .view_first = mapping.view_first };
            uva.* = .{ .start = region.uva, .last = region.uva + (region.size - 1), .pointer = mapping.pointer(), .view_first = mapping.view_first };
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
        std.sort.pdq(Range, by_uva, {}, lessStart);
    }

    pub fn destroy(self: *Table) void {
        sync.allocator.free(self.block);
    }

    fn lessGpa(_: void, a: Region, b: Region) bool {
        return a.gpa < b.gpa;
    }

    fn lessStart(_: void, a: Range, b: Range) bool {
        return a.start < b.start;
    }

    /// The region that starts at exactly `gpa`.
    pub fn regionAt(self: *const Table, gpa: u64) ?*const Region {
        const index = self.spaces[layout.space_gpa].find(gpa) orelse return null;
        const region = &self.regions[index];
        return if (region.gpa == gpa) region else null;
    }

    /// First piece of [address, address + length), clipped at the end of its
    /// view and of its region. Null when `address` is not mapped or nothing
    /// was asked for; whether the sum wraps does not matter.
    pub fn piece(self: *const Table, cache: *Cache, space: u32, address: u64, length: u64) ?Piece {
        if (length == 0 or space > layout.space_uva) return null;
        const ranges = self.spaces[space].ranges;
        var index = cache.index;
        if (index >= ranges.len or address < ranges[index].start or address > ranges[index].last) {
            index = self.spaces[space].find(address) orelse return null;
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

    /// The window of a guest physical address; null where nothing is mapped.
    pub fn window(self: *const Table, cache: *Cache, address: u64) ?Window {
        const found = self.piece(cache, layout.space_gpa, address, layout.view_size) orelse return null;
        // A view's offset 0 is mapped too: all of it can be reached.
        return .{
            .start = address - found.offset,
            .length = @as(u64, found.offset) + found.length,
            .pointer = found.pointer - found.offset,
            .view = found.view,
        };
    }

    /// The whole range when it is inside one region, else null.
    pub fn whole(self: *const Table, space: u32, address: u64, length: u64) ?[*]u8 {
        if (length == 0 or space > layout.space_uva) return null;
        const here = &self.spaces[space];
        const range = &here.ranges[here.find(address) orelse return null];
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
        const range = &self.spaces[space].ranges[cache.index];
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

test "regions of unlike sizes, close together and far apart, are found by either address" {
    var mappings: [200]Mapping = undefined;
    var random: std.Random.SplitMix64 = .init(7);
    for (0..50) |round| {
        var regions: [200]Region = undefined;
        // From crowded at one end to spread over the whole space.
        const count = 1 + random.next() % regions.len;
        const bits: u6 = @intCast(round);
        var gpa: u64 = random.next() >> 20;
        var uva: u64 = random.next() >> 2;
        for (regions[0..count], mappings[0..count], 0..) |*region, *mapping, index| {
            const size = 0x1000 * (1 + (random.next() >> 58));
            mapping.* = .{ .index = 0, .address = 0x1000_0000 + index * 0x1_0000_0000, .size = size, .view_first = @intCast(index), .view_count = 1 };
            region.* = .{ .gpa = gpa, .uva = uva, .size = size, .mapping = mapping };
            // Some are neighbours, and one is far away.
            const gap = if (index % 3 == 0) 0 else random.next() >> @max(20, 63 - bits);
            gpa += size + gap;
            uva += size + if (index == count / 2) @as(u64, 1) << 61 else gap & 0xffff_f000;
        }
        const table = try Table.build(regions[0..count]);
        defer table.destroy();
        for (regions[0..count], 0..) |region, index| {
            for ([_]u64{ 0, region.size / 2, region.size - 1 }) |offset| {
                for ([_]u32{ layout.space_gpa, layout.space_uva }, [_]u64{ region.gpa, region.uva }) |space, start| {
                    var cache: Cache = .{ .index = @intCast(count) };
                    const found = table.piece(&cache, space, start + offset, 1).?;
                    try testing.expectEqual(mappings[index].address + offset, @intFromPtr(found.pointer));
                }
            }
            // Right behind it is the next one, or nothing.
            const behind = region.gpa + region.size;
            const next = index + 1 < count and regions[index + 1].gpa == behind;
            try testing.expectEqual(next, table.whole(layout.space_gpa, behind, 1) != null);
            const before = region.gpa -% 1;
            const previous = index > 0 and regions[index - 1].gpa + regions[index - 1].size == region.gpa;
            try testing.expectEqual(previous, table.whole(layout.space_gpa, before, 1) != null);
        }
        for ([_]u64{ 0, std.math.maxInt(u64), regions[0].gpa -% 1, gpa +% (1 << 62) }) |address| {
            try testing.expect(table.whole(layout.space_gpa, address, 1) == null);
        }
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
