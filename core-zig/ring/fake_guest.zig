//! A small driver for tests of the split ring's device side, with its memory:
//! two regions, adjacent for the guest and apart in this process.

const std = @import("std");
const layout = @import("../layout.zig");
const linux = @import("../linux.zig");
const memory = @import("../memory/memory.zig");
const translation = @import("../memory/iova.zig");
const chain = @import("chain.zig");
const rings = @import("ring.zig");
const split = @import("split.zig");
const inflight = @import("inflight.zig");
const sys = linux.linux;
const expect = std.testing.expect;
const expectEqual = std.testing.expectEqual;

pub const region_size = 1 << 20;
pub const low = 0x10000;
pub const high = low + region_size;
pub const uva_offset = 0x7f12_3400_0000;
pub const iova_offset = 0x4_0000_0000;
pub const write = chain.flag_write;
pub const next = chain.flag_next;
pub const indirect = chain.flag_indirect;
pub const feature_indirect: u64 = 1 << 28;
pub const feature_event_idx: u64 = 1 << 29;
pub const feature_packed: u64 = 1 << 34;
pub const feature_in_order: u64 = 1 << 35;

pub const Options = struct {
    size: u32 = 8,
    features: u64 = 0,
    header_bytes: u32 = 0,
    trailer_bytes: u32 = 0,
    base: u32 = 0,
    used_index: u16 = 0,
    batch_max: u32 = 64,
    segments: u32 = 128,
    /// Of the two regions; the ring's areas are given by uva.
    gpas: [2]u64 = .{ low, high },
    /// The ring's areas, and its descriptors, are given by IOVA instead.
    is_translated: bool = false,
    /// `flag_ring_logged`.
    flags: u32 = 0,
    /// Entries in an inflight region; 0 for none.
    inflight_size: u32 = 0,
};

/// The driver: it writes guest memory through mappings of its own.
pub const Guest = struct {
    options: Options,
    fds: [2]i32,
    bytes: [2][*]u8,
    memory: u32,
    ring: u32,
    words: [8192]u32,
    /// avail.idx as last written.
    offered: u16,
    /// The inflight region, as the front-end maps it; empty if there is none.
    region: []align(std.heap.page_size_min) u8,
    region_fd: i32,
    inflight: u32,

    pub const descriptors = low;
    pub const available = low + 0x80000;
    pub const used = low + 0xa0000;
    /// Free for buffers, in both regions up to and over their border.
    pub const buffers = low + 0xf0000;

    pub fn start(options: Options) !*Guest {
        const self = try std.testing.allocator.create(Guest);
        self.options = options;
        self.offered = @truncate(options.base);
        var requests: [2]layout.RegionRequest = undefined;
        for (&self.fds, &self.bytes, &requests, 0..) |*fd, *bytes, *request, i| {
            fd.* = linux.result(sys.memfd_create("guest", 0));
            try expect(fd.* >= 0);
            // The second region starts within its file.
            const offset = i * 0x1000;
            try expectEqual(0, sys.ftruncate(fd.*, @intCast(region_size + offset)));
            const raw = sys.mmap(null, region_size, .{ .READ = true, .WRITE = true }, .{ .TYPE = .SHARED }, fd.*, @intCast(offset));
            try expect(!linux.isError(raw));
            bytes.* = @ptrFromInt(raw);
            const gpa = low + region_size * i;
            request.* = .{ .gpa = options.gpas[i], .uva = gpa + uva_offset, .size = region_size, .mmap_offset = offset, .address = 0, .fd = fd.*, .flags = 0 };
        }
        const handle = memory.create(0);
        try expect(handle > 0);
        self.memory = @intCast(handle);
        var result: layout.PrepareResult = undefined;
        try expect(memory.prepare(self.memory, layout.prepare_replace, &requests, 2, &result) >= 0);
        var retired: [8]u32 = undefined;
        try expect(memory.commit(self.memory, &retired, retired.len) >= 0);
        if (options.features & feature_packed == 0) {
            self.put(u16, used + 2, options.used_index);
            self.put(u16, available + 2, self.offered);
        }
        try self.makeRegion();
        const config = self.ringConfig();
        var reason: u32 = undefined;
        const ring = rings.create(self.memory, &config, &reason);
        try expect(ring > 0);
        self.ring = @intCast(ring);
        return self;
    }

    fn makeRegion(self: *Guest) !void {
        self.region = &.{};
        self.region_fd = -1;
        self.inflight = 0;
        const size = self.options.inflight_size;
        if (size == 0) return;
        const is_packed = self.options.features & feature_packed != 0;
        // The last of four queues.
        const bytes = 4 * inflight.stride(size, is_packed);
        self.region_fd = linux.result(sys.memfd_create("inflight", 0));
        try expectEqual(0, sys.ftruncate(self.region_fd, @intCast(bytes)));
        const raw = sys.mmap(null, bytes, .{ .READ = true, .WRITE = true }, .{ .TYPE = .SHARED }, self.region_fd, 0);
        try expect(!linux.isError(raw));
        self.region = @as([*]align(std.heap.page_size_min) u8, @ptrFromInt(raw))[0..bytes];
        const handle = inflight.open(self.memory, self.region_fd, bytes, 0, 4, size, @intFromBool(is_packed));
        try expect(handle > 0);
        self.inflight = @intCast(handle);
    }

    /// The queue's part of the inflight region.
    pub fn part(self: *Guest) []align(8) u8 {
        return @alignCast(self.region[self.region.len / 4 * 3 ..]);
    }

    /// As a device that starts in the place of one that has gone.
    pub fn restart(self: *Guest) i32 {
        _ = rings.destroy(self.ring);
        const config = self.ringConfig();
        var reason: u32 = undefined;
        const ring = rings.create(self.memory, &config, &reason);
        if (ring > 0) self.ring = @intCast(ring);
        return ring;
    }

    pub fn ringConfig(self: *Guest) layout.RingConfig {
        const offset: u64 = if (self.options.is_translated) iova_offset else uva_offset;
        return .{
            .descriptor_address = descriptors + offset,
            .available_address = available + offset,
            .used_address = used + offset,
            .features = self.options.features,
            .space = if (self.options.is_translated) layout.space_iova else layout.space_uva,
            .size = self.options.size,
            .base = self.options.base,
            .header_bytes = self.options.header_bytes,
            .trailer_bytes = self.options.trailer_bytes,
            .flags = self.options.flags,
            .queue_index = 3,
            .inflight = self.inflight,
        };
    }

    pub fn stop(self: *Guest) void {
        _ = rings.destroy(self.ring);
        if (self.inflight != 0) {
            _ = inflight.close(self.inflight);
            _ = sys.munmap(self.region.ptr, self.region.len);
            linux.closeQuietly(self.region_fd);
        }
        closeMemory(self.memory);
        for (self.fds, self.bytes) |fd, bytes| {
            _ = sys.munmap(bytes, region_size);
            linux.closeQuietly(fd);
        }
        std.testing.allocator.destroy(self);
    }

    /// Lets the device reach `size` bytes at an IOVA, which are at `gpa`.
    pub fn map(self: *Guest, iova: u64, gpa: u64, size: u64, access: u32) !void {
        try expectEqual(0, translation.update(self.memory, iova, size, gpa + uva_offset, access));
    }

    pub fn unmap(self: *Guest, iova: u64, size: u64) !void {
        try expectEqual(0, translation.invalidate(self.memory, iova, size));
    }

    /// Maps the ring's areas, each to its own pages.
    pub fn mapRing(self: *Guest) !void {
        for ([_]u64{ descriptors, available, used }) |area| {
            try self.map(area + iova_offset, area, 0x1000, layout.access_read | layout.access_write);
        }
    }

    /// What the last call lacked, in its order.
    pub fn expectMisses(self: *Guest, expected: []const layout.IotlbMiss) !void {
        var found: [40]layout.IotlbMiss = undefined;
        const count: usize = @intCast(rings.misses(self.ring, &found, found.len));
        try std.testing.expectEqualSlices(layout.IotlbMiss, expected, found[0..count]);
    }

    /// Guest memory from `gpa` to the end of its region.
    pub fn at(self: *Guest, gpa: u64) []u8 {
        const i = (gpa - low) / region_size;
        return self.bytes[i][(gpa - low) % region_size .. region_size];
    }

    pub fn put(self: *Guest, comptime T: type, gpa: u64, value: T) void {
        std.mem.writeInt(T, self.at(gpa)[0..@sizeOf(T)], value, .little);
    }

    pub fn get(self: *Guest, comptime T: type, gpa: u64) T {
        return std.mem.readInt(T, self.at(gpa)[0..@sizeOf(T)], .little);
    }

    /// Byte by byte, as a table may lie across regions.
    pub fn fill(self: *Guest, gpa: u64, bytes: []const u8) void {
        for (bytes, 0..) |byte, i| self.at(gpa + i)[0] = byte;
    }

    pub fn describe(self: *Guest, table: u64, index: u32, address: u64, length: u32, flags: u16, following: u16) void {
        var bytes: [16]u8 = undefined;
        std.mem.writeInt(u64, bytes[0..8], address, .little);
        std.mem.writeInt(u32, bytes[8..12], length, .little);
        std.mem.writeInt(u16, bytes[12..14], flags, .little);
        std.mem.writeInt(u16, bytes[14..16], following, .little);
        self.fill(table + 16 * @as(u64, index), &bytes);
    }

    pub fn offer(self: *Guest, head: u16) void {
        self.put(u16, available + 4 + 2 * @as(u64, self.offered % self.options.size), head);
        self.offered +%= 1;
        self.put(u16, available + 2, self.offered);
    }

    pub fn pop(self: *Guest) i32 {
        const words = self.options.batch_max * self.stride() + self.options.segments * 4;
        return rings.pop(self.ring, &self.words, words, self.options.batch_max);
    }

    pub fn stride(self: *Guest) u32 {
        return chain.recordStride(self.options.header_bytes);
    }

    pub fn record(self: *Guest, index: u32) layout.Request {
        return @as(*align(4) layout.Request, @ptrCast(&self.words[index * self.stride()])).*;
    }

    pub fn header(self: *Guest, index: u32) []const u8 {
        return std.mem.sliceAsBytes(self.words[index * self.stride() + 12 ..])[0..self.options.header_bytes];
    }

    pub fn segment(self: *Guest, index: u32) layout.Segment {
        return @as(*align(4) layout.Segment, @ptrCast(&self.words[self.options.batch_max * self.stride() + 4 * index])).*;
    }

    /// The guest address of a segment's first byte, found by its content's place.
    pub fn expectSegment(self: *Guest, index: u32, gpa: u64, length: u32, access: u32) !void {
        const found = self.segment(index);
        try expectEqual(length, found.length);
        try expectEqual(access, found.access);
        const expected = self.translate(gpa);
        try expectEqual(expected.view, found.view);
        try expectEqual(expected.offset, found.offset);
    }

    pub fn translate(self: *Guest, gpa: u64) memory.Piece {
        const object = memory.get(self.memory).?;
        const table = object.enter();
        defer object.leave();
        var cache: memory.Cache = .{};
        return table.piece(&cache, layout.space_gpa, gpa, 1).?;
    }

    pub fn push(self: *Guest, heads: []const u32) i32 {
        var completions: [64]layout.Completion = undefined;
        for (heads, completions[0..heads.len]) |head, *completion| completion.* = .{ .head = head, .written = head +% 100 };
        return rings.push(self.ring, &completions, @intCast(heads.len));
    }

    pub fn usedIndex(self: *Guest) u16 {
        return self.get(u16, used + 2);
    }

    pub fn usedAt(self: *Guest, index: u16) split.UsedElement {
        const gpa = used + 4 + 8 * @as(u64, index % self.options.size);
        return .{ .id = self.get(u32, gpa), .length = self.get(u32, gpa + 4) };
    }

    pub fn setUsedEvent(self: *Guest, event: u16) void {
        self.put(u16, available + 4 + 2 * @as(u64, self.options.size), event);
    }

    pub fn state(self: *Guest) layout.RingState {
        var out: layout.RingState = undefined;
        std.debug.assert(rings.state(self.ring, &out) == 0);
        return out;
    }

    pub fn expectBroken(self: *Guest, reason: u32, value: u64) !void {
        try expectEqual(linux.fail(.PROTO), self.pop());
        try expectEqual(reason, self.state().broken);
        try expectEqual(value, self.state().broken_value);
        // It stays broken for all that touches guest memory.
        const before = self.usedIndex();
        try expectEqual(linux.fail(.PROTO), self.pop());
        try expectEqual(linux.fail(.PROTO), self.push(&.{0}));
        try expectEqual(linux.fail(.PROTO), rings.arm(self.ring));
        try expectEqual(linux.fail(.PROTO), rings.disarm(self.ring));
        try expectEqual(before, self.usedIndex());
    }
};

/// Unpublishes and releases all regions; returns whether that had to wait.
pub fn emptyMemory(handle: u32) bool {
    var result: layout.PrepareResult = undefined;
    if (memory.prepare(handle, layout.prepare_replace, null, 0, &result) < 0) return false;
    var retired: [8]u32 = undefined;
    const count: usize = @intCast(memory.commit(handle, &retired, retired.len));
    var waits = false;
    for (retired[0..count]) |view| waits = memory.release(handle, view, 1) == 1 or waits;
    return waits;
}

pub fn closeMemory(handle: u32) void {
    _ = emptyMemory(handle);
    _ = memory.destroy(handle);
}

/// A chain of `parts` (length, flags without NEXT) from descriptor `first` on.
pub fn link(guest: *Guest, first: u16, address: u64, parts: []const [2]u32) u64 {
    var at = address;
    for (parts, 0..) |part, i| {
        const index: u16 = first + @as(u16, @intCast(i));
        const flags: u16 = @intCast(part[1] | if (i + 1 < parts.len) @as(u32, next) else 0);
        guest.describe(Guest.descriptors, index, at, part[0], flags, index + 1);
        at += part[0];
    }
    return at;
}
