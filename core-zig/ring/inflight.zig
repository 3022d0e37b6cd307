//! The inflight region (vhost-user, "Inflight I/O tracking"): shared memory in
//! which the device notes which requests it has taken, so that after a crash
//! its successor resubmits exactly those. One part per queue, in the layout of
//! its ring's format (split_inflight.zig, packed_inflight.zig), one after the
//! other at multiples of `alignment`.
//!
//! The front-end holds the same memory and may write anything into it: it is
//! read once, when a ring starts, and each index in it is checked then. While
//! the ring runs the region is only written. Its file may shrink: the pages
//! then read as zeros and the device's memory counts as faulted.
//!
//! A crash ends the process between two stores; the processor finishes those
//! it has begun, in order. So release stores, which keep the compiler from
//! moving them, are all the ordering that is needed.

const std = @import("std");
const builtin = @import("builtin");
const linux = @import("../linux.zig");
const sync = @import("../sync.zig");
const mapping = @import("../memory/mapping.zig");
const memory = @import("../memory/memory.zig");
const Handles = @import("../handles.zig").Handles;
const split_inflight = @import("split_inflight.zig");
const packed_inflight = @import("packed_inflight.zig");

/// `version` of a queue's part: 0 in one that nobody has used.
pub const version_fresh: u16 = 0;
pub const version: u16 = 1;

/// Other implementations align each queue's part so.
const alignment: u64 = 64;
const queue_count_maximum: u32 = 256;
const queue_size_maximum: u32 = 32768;

/// The region's content breaks a rule, so that nobody can say what is in
/// flight; or this ring has no part in it.
pub const Error = error{ Damaged, OutOfMemory };

/// Bytes of one queue's part.
pub fn stride(queue_size: u32, is_packed: bool) u64 {
    const bytes: u64 = if (is_packed)
        @sizeOf(packed_inflight.Header) + @as(u64, queue_size) * @sizeOf(packed_inflight.Entry)
    else
        @sizeOf(split_inflight.Header) + @as(u64, queue_size) * @sizeOf(split_inflight.Entry);
    return std.mem.alignForward(u64, bytes, alignment);
}

/// A queue's part: what a ring tracks its requests in.
pub const Area = struct {
    bytes: [*]align(8) u8,
    queue_size: u32,

    /// As if nobody had used it.
    pub fn forget(self: Area) void {
        const offset = @offsetOf(split_inflight.Header, "version");
        comptime std.debug.assert(offset == @offsetOf(packed_inflight.Header, "version"));
        const field: *u16 = @ptrCast(@alignCast(self.bytes + offset));
        store(field, version_fresh);
    }
};

/// The region of a device; lives as long as its handle or a ring that uses it.
pub const Inflight = struct {
    mapped: *mapping.Mapping,
    references: std.atomic.Value(u32) = .init(1),
    queue_count: u32,
    queue_size: u32,
    size: u64,

    /// The part of queue `index` for a ring of `size`, if it has one.
    pub fn area(self: *const Inflight, index: u32, size: u32, is_packed: bool) ?Area {
        if (index >= self.queue_count or size > self.queue_size) return null;
        const length = stride(self.queue_size, is_packed);
        // The format may have changed since the region was opened.
        if ((index + 1) * length > self.size) return null;
        return .{
            .bytes = @alignCast(self.mapped.pointer() + @as(usize, @intCast(index * length))),
            .queue_size = self.queue_size,
        };
    }

    pub fn release(self: *Inflight) void {
        if (self.references.fetchSub(1, .acq_rel) != 1) return;
        self.mapped.unmap();
        sync.allocator.destroy(self);
    }
};

var regions: Handles(Inflight) = .{};
var lock: sync.Mutex = .{};

/// Bytes of one queue's part, for whoever makes a region; -EINVAL for a size
/// that no queue has.
pub fn inflightStride(queue_size: u32, is_packed: u32) callconv(.c) i32 {
    if (queue_size == 0 or queue_size > queue_size_maximum) return linux.fail(.INVAL);
    return @intCast(stride(queue_size, is_packed != 0));
}

/// Maps a region that the front-end describes (SET_INFLIGHT_FD): of `size`
/// bytes from `offset` of the file, the parts of `queue_count` queues. Faults
/// in it are faults of the memory, which must outlive the handle. Returns a
/// handle; -EINVAL when the description cannot be, -ENODATA when the file is
/// shorter than it says. `fd` stays the caller's.
pub fn open(memory_handle: u32, fd: i32, size: u64, offset: u64, queue_count: u32, queue_size: u32, is_packed: u32) callconv(.c) i32 {
    const object = memory.get(memory_handle) orelse return linux.fail(.BADF);
    if (queue_count == 0 or queue_count > queue_count_maximum) return linux.fail(.INVAL);
    if (queue_size == 0 or queue_size > queue_size_maximum) return linux.fail(.INVAL);
    if (offset % @alignOf(u64) != 0) return linux.fail(.INVAL);
    const needed = queue_count * stride(queue_size, is_packed != 0);
    if (size < needed) return linux.fail(.INVAL);
    const end = std.math.add(u64, offset, size) catch return linux.fail(.INVAL);
    var code: i32 = 0;
    const file = mapping.File.inspect(fd, &code) catch |failure| switch (failure) {
        error.Kind => return linux.fail(.INVAL),
        error.System => return code,
    };
    if (end > file.size) return linux.fail(.NODATA);
    const mapped = mapping.mapFile(fd, file, offset, needed, &object.health, &code) catch |failure| switch (failure) {
        error.RegisterFull => return linux.fail(.NOSPC),
        error.System => return code,
    };
    const region = sync.allocator.create(Inflight) catch {
        mapped.unmap();
        return linux.fail(.NOMEM);
    };
    region.* = .{ .mapped = mapped, .queue_count = queue_count, .queue_size = queue_size, .size = needed };
    if (regions.insert(region)) |handle| return @intCast(handle);
    region.release();
    return linux.fail(.NOMEM);
}

/// For a ring that starts; `release` when it ends.
pub fn acquire(handle: u32) ?*Inflight {
    lock.lock();
    defer lock.unlock();
    const region = regions.get(handle) orelse return null;
    _ = region.references.fetchAdd(1, .monotonic);
    return region;
}

/// The handle is dead; rings that use the region keep it until they end.
pub fn close(handle: u32) callconv(.c) i32 {
    lock.lock();
    const removed = regions.remove(handle);
    lock.unlock();
    const region = removed orelse return linux.fail(.BADF);
    region.release();
    return 0;
}

/// A store that recovery relies on: not moved across another one.
pub inline fn store(pointer: anytype, value: @typeInfo(@TypeOf(pointer)).pointer.child) void {
    @atomicStore(@TypeOf(value), pointer, value, .release);
    stored();
}

/// The one read of a field at the start; each value is checked afterwards.
pub inline fn load(pointer: anytype) @typeInfo(@TypeOf(pointer)).pointer.child {
    return @atomicLoad(@typeInfo(@TypeOf(pointer)).pointer.child, pointer, .monotonic);
}

/// Tests take a picture of the memory after each store, as a crash there would
/// leave it.
pub var observer: if (builtin.is_test) ?*const fn () void else void = if (builtin.is_test) null else {};

pub inline fn stored() void {
    if (builtin.is_test) {
        if (observer) |observe| observe();
    }
}

/// A request to resubmit, and when it was taken.
pub const Taken = struct {
    head: u16,
    counter: u64,

    /// Sorts oldest first, also across the end of 64 bits; returns the counter
    /// of the next request. Whatever the counters are, the order is total.
    pub fn sort(list: []Taken) u64 {
        if (list.len == 0) return 0;
        const middle = list[0].counter;
        std.sort.heap(Taken, list, middle, isOlder);
        return list[list.len - 1].counter +% 1;
    }

    fn isOlder(middle: u64, a: Taken, b: Taken) bool {
        const half = 1 << 63;
        const left = a.counter -% middle +% half;
        const right = b.counter -% middle +% half;
        return if (left == right) a.head < b.head else left < right;
    }
};

test "a queue's part is aligned and has room for every entry" {
    try std.testing.expectEqual(64, stride(1, false));
    try std.testing.expectEqual(16 + 16 * 128 + 48, stride(128, false));
    try std.testing.expectEqual(64, stride(1, true));
    try std.testing.expectEqual(32 + 32 * 128 + 32, stride(128, true));
    try std.testing.expectEqual(linux.fail(.INVAL), inflightStride(0, 0));
    try std.testing.expectEqual(linux.fail(.INVAL), inflightStride(32769, 1));
}

test "the oldest request is found across the end of 64 bits" {
    const top = std.math.maxInt(u64);
    var list = [_]Taken{
        .{ .head = 1, .counter = 1 },
        .{ .head = 2, .counter = top },
        .{ .head = 4, .counter = 0 },
        .{ .head = 3, .counter = top - 1 },
        .{ .head = 0, .counter = 0 },
    };
    try std.testing.expectEqual(2, Taken.sort(&list));
    for ([_]u16{ 3, 2, 0, 4, 1 }, list) |head, taken| try std.testing.expectEqual(head, taken.head);
    try std.testing.expectEqual(0, Taken.sort(list[0..0]));
}
