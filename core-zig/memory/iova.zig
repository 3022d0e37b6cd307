//! From an I/O virtual address to memory: through the IOTLB to the
//! front-end's address, and from there through the table of regions. The only
//! place where an IOVA becomes a pointer.

const std = @import("std");
const layout = @import("../layout.zig");
const sys = @import("../linux.zig");
const memory = @import("memory.zig");
const tables = @import("table.zig");
const Memory = memory.Memory;
const Table = tables.Table;

/// Where the last translations were, hints that are checked on each use.
pub const Cache = struct { table: tables.Cache = .{}, entry: u32 = 0 };

/// A stretch of IOVAs within one entry, one region and one view.
pub const Window = struct {
    start: u64,
    length: u64,
    pointer: [*]u8,
    view: u32,
    /// Of the first byte, in the view.
    offset: u32,
    access: u32,
};

pub const Found = union(enum) { window: Window, miss: u32 };

/// The largest window that holds `iova` and permits `access`. Under the
/// IOTLB's lock, shared, and in a reader section of the memory.
pub fn find(self: *const Memory, table: *const Table, cache: *Cache, iova: u64, access: u32) Found {
    const iotlb = &self.iotlb;
    const entry = iotlb.find(&cache.entry, iova) orelse return .{ .miss = layout.miss_absent };
    if (entry.access & access != access) return .{ .miss = layout.miss_forbidden };
    const inside = iova - entry.start;
    // At most 2^64 - 1: what an entry has is bounded by a u64.
    const ahead = entry.last - iova;
    const piece = table.piece(&cache.table, iotlb.space, entry.target + inside, ahead +| 1) orelse
        return .{ .miss = layout.miss_unmapped };
    // A view's offset 0 is in the same region: so far back it can reach.
    const back: u32 = @intCast(@min(inside, piece.offset));
    return .{ .window = .{
        .start = iova - back,
        .length = @as(u64, back) + piece.length,
        .pointer = piece.pointer - back,
        .view = piece.view,
        .offset = piece.offset - back,
        .access = entry.access,
    } };
}

/// A stretch of memory that is contiguous here, through however many entries.
pub const Run = struct {
    pointer: [*]u8,
    view: u32,
    offset: u32,
    /// At most what was asked for.
    length: u64,
    /// The region's number among those in `Iotlb.space`.
    region: u32,
    /// Why it ends before what was asked for; null: in another place.
    miss: ?u32,
};

/// How far [iova, iova + length) goes on in one region; null and the reason
/// when not even its first byte is there. The sum must not wrap.
pub fn run(self: *const Memory, table: *const Table, cache: *Cache, iova: u64, length: u64, access: u32, reason: *u32) ?Run {
    const first = switch (find(self, table, cache, iova, access)) {
        .window => |window| window,
        .miss => |why| {
            reason.* = why;
            return null;
        },
    };
    const skip: usize = @intCast(iova - first.start);
    var result: Run = .{
        .pointer = first.pointer + skip,
        .view = first.view,
        .offset = first.offset + @as(u32, @intCast(skip)),
        .length = @min(length, first.length - skip),
        .region = cache.table.index,
        .miss = null,
    };
    while (result.length < length) {
        const next = switch (find(self, table, cache, iova + result.length, access)) {
            .window => |window| window,
            .miss => |why| {
                result.miss = why;
                return result;
            },
        };
        const at: usize = @intCast(iova + result.length - next.start);
        // The region too: two may be neighbours here by chance.
        if (cache.table.index != result.region or next.pointer + at != result.pointer + @as(usize, @intCast(result.length))) return result;
        result.length += @min(length - result.length, next.length - at);
    }
    return result;
}

/// Says that an area of a ring is there: it is evicted last.
pub fn keep(self: *const Memory, cache: *Cache, iova: u64, length: u64) void {
    var at = iova;
    const last = iova + (length - 1);
    while (self.iotlb.find(&cache.entry, at)) |entry| {
        entry.is_ring.store(true, .monotonic);
        if (entry.last >= last) return;
        at = entry.last + 1;
    }
}

/// -EAGAIN: not in the IOTLB; -EACCES: its entry does not permit that;
/// -EFAULT: its entry leads to no region.
fn codeOf(reason: u32) i32 {
    return sys.fail(switch (reason) {
        layout.miss_absent => .AGAIN,
        layout.miss_forbidden => .ACCES,
        else => .FAULT,
    });
}

/// As `memory_translate`, of an IOVA: `contiguous` counts over entries too.
pub fn translate(handle: u32, iova: u64, length: u64, access: u32, out: *layout.Translation) callconv(.c) i32 {
    const self = memory.get(handle) orelse return sys.fail(.BADF);
    if (length == 0 or length - 1 > std.math.maxInt(u64) - iova) return sys.fail(.INVAL);
    self.iotlb.lock.lockShared();
    defer self.iotlb.lock.unlockShared();
    const table = self.enter();
    defer self.leave();
    var cache: Cache = .{};
    var reason: u32 = 0;
    const found = run(self, table, &cache, iova, length, access, &reason) orelse return codeOf(reason);
    const view = &table.views[found.view];
    const mapping = view.mapping.?;
    const region_offset = (@as(u64, found.view - mapping.view_first) << layout.view_shift) + found.offset;
    out.* = .{
        .view = found.view,
        .offset = found.offset,
        .length = @intCast(@min(found.length, view.length - found.offset)),
        .region_view_first = mapping.view_first,
        .region_offset = region_offset,
        .contiguous = found.length,
    };
    return 0;
}

/// -EINVAL for a range that is empty or wraps, or no permission; -ENOMEM.
pub fn update(handle: u32, iova: u64, size: u64, target: u64, access: u32) callconv(.c) i32 {
    const self = memory.get(handle) orelse return sys.fail(.BADF);
    self.iotlb.update(iova, size, target, access) catch |failure| return switch (failure) {
        error.Invalid => sys.fail(.INVAL),
        error.OutOfMemory => sys.fail(.NOMEM),
    };
    return 0;
}

/// When this returns nobody goes by what it took away. -EINVAL for a range
/// that is empty or wraps.
pub fn invalidate(handle: u32, iova: u64, size: u64) callconv(.c) i32 {
    const self = memory.get(handle) orelse return sys.fail(.BADF);
    self.iotlb.invalidate(iova, size) catch return sys.fail(.INVAL);
    return 0;
}

/// Forgets all; targets of later updates are in `space`, gpa or uva.
pub fn clear(handle: u32, space: u32) callconv(.c) i32 {
    const self = memory.get(handle) orelse return sys.fail(.BADF);
    if (space > layout.space_uva) return sys.fail(.INVAL);
    self.iotlb.clear(space);
    return 0;
}

test {
    _ = @import("iotlb.zig");
}
