//! Reads what a VFIO information structure says beyond its fixed part: chains
//! of capabilities, in the same buffer. Nothing here makes a system call, and
//! nothing in the bytes is believed: offsets may lead out of the buffer or in
//! a circle, counts may exceed it, areas may pass the end of their region.

const std = @import("std");
const abi = @import("abi.zig");
const shared = @import("layout.zig");

pub const Error = error{
    /// The structure contradicts itself.
    Broken,
};

/// Parts of a region that may be mapped; the rest goes by system calls.
pub const max_pieces = 32;
pub const Piece = struct { offset: u64, size: u64 };
pub const Pieces = struct {
    list: [max_pieces]Piece = undefined,
    count: u32 = 0,

    pub fn slice(self: *const Pieces) []const Piece {
        return self.list[0..self.count];
    }

    /// What does not fit is not mapped, which only makes it slower.
    fn add(self: *Pieces, offset: u64, size: u64) void {
        if (size == 0 or self.count == max_pieces) return;
        self.list[self.count] = .{ .offset = offset, .size = size };
        self.count += 1;
    }
};

fn read(comptime T: type, bytes: []const u8, offset: usize) Error!T {
    if (offset > bytes.len or bytes.len - offset < @sizeOf(T)) return error.Broken;
    return std.mem.readInt(T, bytes[offset..][0..@sizeOf(T)], .little);
}

/// Walks a chain. `fixed_size` is the part of the buffer before any of it.
pub const Chain = struct {
    bytes: []const u8,
    fixed_size: u32,
    next: u32,
    /// More capabilities than fit side by side are a circle.
    steps: usize,

    pub fn init(bytes: []const u8, fixed_size: u32, first: u32) Chain {
        return .{ .bytes = bytes, .fixed_size = fixed_size, .next = first, .steps = bytes.len / @sizeOf(abi.CapabilityHeader) };
    }

    pub const Capability = struct {
        id: u16,
        /// From behind the header to the end of the buffer: it has no length.
        data: []const u8,
    };

    pub fn take(self: *Chain) Error!?Capability {
        if (self.next == 0) return null;
        if (self.steps == 0 or self.next < self.fixed_size) return error.Broken;
        self.steps -= 1;
        const offset: usize = self.next;
        const id = try read(u16, self.bytes, offset);
        self.next = try read(u32, self.bytes, offset + 4);
        return .{ .id = id, .data = self.bytes[offset + @sizeOf(abi.CapabilityHeader) ..] };
    }
};

/// Bytes of a BAR that hold the MSI-X table.
pub const Range = struct { offset: u64, size: u64 };

/// The parts of a region that may be mapped: all of it, or what the kernel
/// lists, and of that not the pages of the MSI-X table unless the kernel says
/// that those may be mapped too. `bytes` is the whole answer.
pub fn mappable(bytes: []const u8, region: abi.RegionInfo, table: ?Range, page_size: u64) Error!Pieces {
    var pieces: Pieces = .{};
    if (region.flags & abi.region_mmap == 0 or region.size == 0) return pieces;
    var is_sparse = false;
    var is_table_mappable = table == null;
    if (region.flags & abi.region_caps != 0) {
        var chain: Chain = .init(bytes, @sizeOf(abi.RegionInfo), region.cap_offset);
        while (try chain.take()) |capability| switch (capability.id) {
            abi.capability_msix_mappable => is_table_mappable = true,
            abi.capability_sparse_mmap => {
                is_sparse = true;
                try sparse(capability.data, region.size, page_size, &pieces);
            },
            else => {},
        };
    }
    if (!is_sparse) pieces.add(0, region.size);
    if (is_table_mappable) return pieces;
    const start = std.mem.alignBackward(u64, table.?.offset, page_size);
    const end = std.mem.alignForward(u64, table.?.offset + table.?.size, page_size);
    var without: Pieces = .{};
    for (pieces.slice()) |piece| {
        const last = piece.offset + piece.size;
        if (piece.offset < start) without.add(piece.offset, @min(last, start) - piece.offset);
        if (last > end) without.add(@max(piece.offset, end), last - @max(piece.offset, end));
    }
    return without;
}

/// `nr_areas`, padding, then offset and size of each.
fn sparse(data: []const u8, region_size: u64, page_size: u64, pieces: *Pieces) Error!void {
    const count = try read(u32, data, 0);
    if (count > (data.len -| 8) / 16) return error.Broken;
    for (0..count) |index| {
        const offset = try read(u64, data, 8 + 16 * index);
        const size = try read(u64, data, 16 + 16 * index);
        if (offset > region_size or size > region_size - offset) return error.Broken;
        if (offset % page_size != 0) return error.Broken;
        pieces.add(offset, size);
    }
}

/// Where the IOMMU lets the device reach.
pub const Ranges = struct {
    list: [shared.max_iova_ranges]shared.IovaRange = undefined,
    count: u32 = 0,

    pub fn slice(self: *const Ranges) []const shared.IovaRange {
        return self.list[0..self.count];
    }

    fn add(self: *Ranges, start: u64, last: u64) void {
        if (self.count == self.list.len) return;
        self.list[self.count] = .{ .start = start, .last = last };
        self.count += 1;
    }

    pub fn holds(self: *const Ranges, start: u64, size: u64) bool {
        if (size == 0 or start > std.math.maxInt(u64) - (size - 1)) return false;
        for (self.slice()) |range| {
            if (start >= range.start and start + (size - 1) <= range.last) return true;
        }
        return false;
    }
};

/// Ranges of IOVA from the answer of VFIO_IOMMU_GET_INFO. A kernel before 5.4
/// names none: then what every IOMMU of this architecture can do, without the
/// window of interrupt messages.
pub fn iovaRanges(bytes: []const u8, info: abi.Type1Info) Error!Ranges {
    var ranges: Ranges = .{};
    if (info.flags & abi.iommu_caps != 0) {
        var chain: Chain = .init(bytes, @sizeOf(abi.Type1Info), info.cap_offset);
        while (try chain.take()) |capability| {
            if (capability.id != abi.capability_iova_range) continue;
            const count = try read(u32, capability.data, 0);
            if (count > (capability.data.len -| 8) / 16) return error.Broken;
            for (0..count) |index| {
                const start = try read(u64, capability.data, 8 + 16 * index);
                const last = try read(u64, capability.data, 16 + 16 * index);
                if (start > last) return error.Broken;
                ranges.add(start, last);
            }
            return ranges;
        }
    }
    ranges.add(0, 0xfedf_ffff);
    ranges.add(0xfef0_0000, (1 << 39) - 1);
    return ranges;
}

const msix_capability = 0x11;
const first_capability = 0x40;

pub const Table = struct { bar: u32, range: Range };

/// The MSI-X table that a PCI configuration space of 256 bytes describes.
pub fn msixTable(config: *const [256]u8) Error!?Table {
    const status = std.mem.readInt(u16, config[6..8], .little);
    if (status & 0x10 == 0) return null;
    var next: usize = config[0x34] & 0xfc;
    // 48 capabilities of 4 bytes fill the space.
    for (0..48) |_| {
        if (next == 0) return null;
        if (next < first_capability) return error.Broken;
        if (config[next] == msix_capability) {
            if (next > 256 - 12) return error.Broken;
            const control = std.mem.readInt(u16, config[next + 2 ..][0..2], .little);
            const place = std.mem.readInt(u32, config[next + 4 ..][0..4], .little);
            const bar = place & 7;
            if (bar >= abi.bar_count) return error.Broken;
            return .{ .bar = bar, .range = .{ .offset = place & ~@as(u32, 7), .size = 16 * (@as(u64, control & 0x7ff) + 1) } };
        }
        next = config[next + 1] & 0xfc;
    }
    return error.Broken;
}

const testing = std.testing;

/// A region's answer with capabilities at the end, built by the tests.
const Answer = struct {
    bytes: [512]u8 = @splat(0),
    used: usize = @sizeOf(abi.RegionInfo),
    last: usize = 0,
    first: u32 = 0,

    fn word(self: *Answer, comptime T: type, value: T) void {
        std.mem.writeInt(T, self.bytes[self.used..][0..@sizeOf(T)], value, .little);
        self.used += @sizeOf(T);
    }

    fn capability(self: *Answer, id: u16) void {
        if (self.last == 0) self.first = @intCast(self.used) else std.mem.writeInt(u32, self.bytes[self.last + 4 ..][0..4], @intCast(self.used), .little);
        self.last = self.used;
        self.word(u16, id);
        self.word(u16, 1);
        self.word(u32, 0);
    }

    fn areas(self: *Answer, list: []const Piece) void {
        self.capability(abi.capability_sparse_mmap);
        self.word(u32, @intCast(list.len));
        self.word(u32, 0);
        for (list) |area| {
            self.word(u64, area.offset);
            self.word(u64, area.size);
        }
    }

    fn region(self: *const Answer, size: u64) abi.RegionInfo {
        return .{
            .argsz = @intCast(self.used),
            .flags = abi.region_read | abi.region_write | abi.region_mmap | abi.region_caps,
            .index = 2,
            .cap_offset = self.first,
            .size = size,
        };
    }

    fn pieces(self: *const Answer, size: u64, table: ?Range) Error!Pieces {
        return mappable(self.bytes[0..self.used], self.region(size), table, 4096);
    }
};

fn expectPieces(expected: []const Piece, actual: Pieces) !void {
    try testing.expectEqualSlices(Piece, expected, actual.slice());
}

test "a region without capabilities is mapped whole, one that cannot be not at all" {
    const answer: Answer = .{};
    try expectPieces(&.{.{ .offset = 0, .size = 0x4000 }}, try answer.pieces(0x4000, null));
    var plain = answer.region(0x4000);
    plain.flags = abi.region_read;
    try expectPieces(&.{}, try mappable(&answer.bytes, plain, null, 4096));
    try expectPieces(&.{}, try answer.pieces(0, null));
}

test "the pages of the MSI-X table are left out unless they may be mapped" {
    var answer: Answer = .{};
    const table: Range = .{ .offset = 0x2010, .size = 0x20 };
    const around = [_]Piece{ .{ .offset = 0, .size = 0x2000 }, .{ .offset = 0x3000, .size = 0x1000 } };
    try expectPieces(&around, try answer.pieces(0x4000, table));
    try expectPieces(around[1..], try answer.pieces(0x4000, .{ .offset = 0, .size = 0x3000 }));
    try expectPieces(&.{}, try answer.pieces(0x1000, .{ .offset = 0, .size = 16 }));
    answer.capability(abi.capability_msix_mappable);
    try expectPieces(&.{.{ .offset = 0, .size = 0x4000 }}, try answer.pieces(0x4000, table));
}

test "a sparse region is mapped where the kernel says" {
    var answer: Answer = .{};
    const areas = [_]Piece{ .{ .offset = 0x1000, .size = 0x1000 }, .{ .offset = 0x3000, .size = 0x1000 } };
    answer.areas(&areas);
    answer.capability(99);
    try expectPieces(&areas, try answer.pieces(0x4000, null));
    try expectPieces(areas[1..], try answer.pieces(0x4000, .{ .offset = 0x1800, .size = 16 }));
}

test "a region whose capabilities lie is refused" {
    const wrong = [_]Piece{
        .{ .offset = 0x3000, .size = 0x2000 },
        .{ .offset = 0x5000, .size = 0 },
        .{ .offset = 0x1000, .size = std.math.maxInt(u64) },
        .{ .offset = 0x10, .size = 0x100 },
    };
    for (wrong) |area| {
        var answer: Answer = .{};
        answer.areas(&.{area});
        try testing.expectError(error.Broken, answer.pieces(0x4000, null));
    }
    var counted: Answer = .{};
    counted.areas(&.{.{ .offset = 0, .size = 0x1000 }});
    std.mem.writeInt(u32, counted.bytes[counted.last + 8 ..][0..4], 2, .little);
    try testing.expectError(error.Broken, counted.pieces(0x4000, null));
    // A circle, a way into the fixed part, and two ways out of the buffer.
    var circle: Answer = .{};
    circle.capability(7);
    for ([_]u32{ circle.first, 8, 500, 0xffff_fff8 }) |next| {
        std.mem.writeInt(u32, circle.bytes[circle.last + 4 ..][0..4], next, .little);
        try testing.expectError(error.Broken, circle.pieces(0x4000, null));
    }
    var out = circle.region(0x4000);
    out.cap_offset = @intCast(circle.used - 4);
    try testing.expectError(error.Broken, mappable(circle.bytes[0..circle.used], out, null, 4096));
}

fn type1Answer(list: []const shared.IovaRange, buffer: *[512]u8) abi.Type1Info {
    const first = @sizeOf(abi.Type1Info);
    @memset(buffer, 0);
    std.mem.writeInt(u16, buffer[first..][0..2], abi.capability_iova_range, .little);
    std.mem.writeInt(u32, buffer[first + 8 ..][0..4], @intCast(list.len), .little);
    for (list, 0..) |range, index| {
        std.mem.writeInt(u64, buffer[first + 16 + 16 * index ..][0..8], range.start, .little);
        std.mem.writeInt(u64, buffer[first + 24 + 16 * index ..][0..8], range.last, .little);
    }
    return .{ .argsz = buffer.len, .flags = abi.iommu_caps, .cap_offset = first };
}

test "IOVA ranges are those of the kernel, and a default without" {
    var buffer: [512]u8 = undefined;
    const list = [_]shared.IovaRange{ .{ .start = 0, .last = 0xfedf_ffff }, .{ .start = 0xfef0_0000, .last = std.math.maxInt(u64) } };
    const ranges = try iovaRanges(&buffer, type1Answer(&list, &buffer));
    try testing.expectEqualSlices(shared.IovaRange, &list, ranges.slice());
    try testing.expect(ranges.holds(0xfedf_f000, 0x1000));
    try testing.expect(!ranges.holds(0xfedf_f000, 0x2000));
    try testing.expect(!ranges.holds(0xfee0_0000, 0x1000));
    try testing.expect(ranges.holds(std.math.maxInt(u64) - 0xfff, 0x1000));
    try testing.expect(!ranges.holds(std.math.maxInt(u64) - 0xffe, 0x1000));
    const old = try iovaRanges(&buffer, .{ .argsz = 24 });
    try testing.expectEqual(2, old.count);
    try testing.expect(!old.holds(0xfee0_0000, 1));
}

test "IOVA ranges that lie are refused, more than we keep are cut" {
    var buffer: [512]u8 = undefined;
    const backwards = [_]shared.IovaRange{.{ .start = 2, .last = 1 }};
    try testing.expectError(error.Broken, iovaRanges(&buffer, type1Answer(&backwards, &buffer)));
    const info = type1Answer(&.{}, &buffer);
    std.mem.writeInt(u32, buffer[32..36], 0xffff_ffff, .little);
    try testing.expectError(error.Broken, iovaRanges(&buffer, info));
    const many: [20]shared.IovaRange = @splat(.{ .start = 0, .last = 1 });
    const cut = try iovaRanges(&buffer, type1Answer(&many, &buffer));
    try testing.expectEqual(shared.max_iova_ranges, cut.count);
}

test "the MSI-X table is found, and a list that lies is refused" {
    var config: [256]u8 = @splat(0);
    try testing.expectEqual(null, try msixTable(&config));
    config[6] = 0x10;
    try testing.expectEqual(null, try msixTable(&config));
    config[0x34] = 0x40;
    config[0x40] = 9;
    config[0x41] = 0x50;
    config[0x50] = msix_capability;
    std.mem.writeInt(u16, config[0x52..0x54], 4, .little);
    std.mem.writeInt(u32, config[0x54..0x58], 0x2001, .little);
    const table = (try msixTable(&config)).?;
    try testing.expectEqual(1, table.bar);
    try testing.expectEqual(Range{ .offset = 0x2000, .size = 80 }, table.range);
    config[0x54] = 7;
    try testing.expectError(error.Broken, msixTable(&config));
    config[0x50] = 9;
    for ([_]u8{ 0x40, 0x50, 0x20 }) |next| {
        config[0x51] = next;
        try testing.expectError(error.Broken, msixTable(&config));
    }
    config[0x51] = 0xf8;
    config[0xf8] = msix_capability;
    try testing.expectError(error.Broken, msixTable(&config));
}
