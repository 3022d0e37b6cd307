//! The core's allocator. Most of its objects are small and live as long as a
//! device or a queue, so that a page for each would be most of what an idle
//! queue takes: small ones share pages with others of their size, up to a
//! power of two. None shares a cache line with another, as threads may write
//! them side by side. A page, once made, stays for objects of its size.

const std = @import("std");
const sync = @import("sync.zig");

const Alignment = std.mem.Alignment;

pub const allocator: std.mem.Allocator = .{ .ptr = &shared, .vtable = &Objects.table };

var shared: Objects = .{ .pages = std.heap.page_allocator };

/// A pair of cache lines, as processors fetch them, and the most that are not
/// whole pages.
const least_shift = 7;
const most_shift = 11;
const page_size = 4096;

const Free = struct { next: ?*Free };

const Objects = struct {
    /// For pages, and for what is larger.
    pages: std.mem.Allocator,
    lock: sync.Mutex = .{},
    free: [most_shift + 1 - least_shift]?*Free = @splat(null),

    const table: std.mem.Allocator.VTable = .{ .alloc = alloc, .resize = resize, .remap = remap, .free = release };

    /// Which list has objects of such a size; null: none.
    fn listOf(length: usize, alignment: Alignment) ?usize {
        const size = @max(length, alignment.toByteUnits(), 1 << least_shift);
        if (size > 1 << most_shift) return null;
        return std.math.log2_int_ceil(usize, size) - least_shift;
    }

    fn alloc(context: *anyopaque, length: usize, alignment: Alignment, address: usize) ?[*]u8 {
        const self: *Objects = @ptrCast(@alignCast(context));
        const list = listOf(length, alignment) orelse return self.pages.rawAlloc(length, alignment, address);
        self.lock.lock();
        defer self.lock.unlock();
        if (self.free[list] == null) self.cut(list, address);
        const first = self.free[list] orelse return null;
        self.free[list] = first.next;
        return @ptrCast(first);
    }

    /// One page more. Without one the list stays empty.
    fn cut(self: *Objects, list: usize, address: usize) void {
        const page = self.pages.rawAlloc(page_size, .fromByteUnits(page_size), address) orelse return;
        const size = @as(usize, 1) << @intCast(list + least_shift);
        var offset: usize = page_size;
        while (offset != 0) {
            offset -= size;
            self.put(list, page + offset);
        }
    }

    fn put(self: *Objects, list: usize, object: [*]u8) void {
        const first: *Free = @ptrCast(@alignCast(object));
        first.* = .{ .next = self.free[list] };
        self.free[list] = first;
    }

    fn release(context: *anyopaque, memory: []u8, alignment: Alignment, address: usize) void {
        const self: *Objects = @ptrCast(@alignCast(context));
        const list = listOf(memory.len, alignment) orelse return self.pages.rawFree(memory, alignment, address);
        self.lock.lock();
        defer self.lock.unlock();
        self.put(list, memory.ptr);
    }

    fn resize(context: *anyopaque, memory: []u8, alignment: Alignment, length: usize, address: usize) bool {
        const self: *Objects = @ptrCast(@alignCast(context));
        const old = listOf(memory.len, alignment);
        const new = listOf(length, alignment);
        if (old == null and new == null) return self.pages.rawResize(memory, alignment, length, address);
        return old != null and new != null and old.? == new.?;
    }

    fn remap(context: *anyopaque, memory: []u8, alignment: Alignment, length: usize, address: usize) ?[*]u8 {
        const self: *Objects = @ptrCast(@alignCast(context));
        const old = listOf(memory.len, alignment);
        const new = listOf(length, alignment);
        if (old == null and new == null) return self.pages.rawRemap(memory, alignment, length, address);
        return if (old != null and new != null and old.? == new.?) memory.ptr else null;
    }
};

/// Over pages that are counted, so that the test sees what is asked for.
fn testing() struct { objects: *Objects, made: std.mem.Allocator } {
    const objects = std.testing.allocator.create(Objects) catch unreachable;
    objects.* = .{ .pages = std.heap.page_allocator };
    return .{ .objects = objects, .made = .{ .ptr = objects, .vtable = &Objects.table } };
}

test "objects of every size are apart, aligned, and used again" {
    const kit = testing();
    defer std.testing.allocator.destroy(kit.objects);
    const made = kit.made;
    const sizes = [_]usize{ 1, 63, 64, 65, 128, 300, 1024, 2047, 2048, 2049, 4096, 10_000 };
    var all: [sizes.len * 20][]align(64) u8 = undefined;
    for (&all, 0..) |*object, i| {
        object.* = try made.alignedAlloc(u8, .@"64", sizes[i % sizes.len]);
        @memset(object.*, @truncate(i));
    }
    // Nobody has written into another's.
    for (all, 0..) |object, i| {
        for (object) |byte| try std.testing.expectEqual(@as(u8, @truncate(i)), byte);
    }
    const first = all[0].ptr;
    made.free(all[0]);
    const again = try made.alignedAlloc(u8, .@"64", 50);
    try std.testing.expectEqual(first, again.ptr);
    made.free(again);
    for (all[1..]) |object| made.free(object);
}

test "small objects share a page" {
    const kit = testing();
    defer std.testing.allocator.destroy(kit.objects);
    const made = kit.made;
    var all: [16]*[250]u8 = undefined;
    for (&all) |*object| object.* = try made.create([250]u8);
    for (all) |object| {
        try std.testing.expectEqual(@intFromPtr(all[0]) / page_size, @intFromPtr(object) / page_size);
    }
    for (all) |object| made.destroy(object);
}

test "an object grows in place within its size, over sizes by moving" {
    const kit = testing();
    defer std.testing.allocator.destroy(kit.objects);
    const made = kit.made;
    var object = try made.alloc(u8, 70);
    try std.testing.expect(made.resize(object, 128));
    object.len = 128;
    try std.testing.expect(!made.resize(object, 129));
    object[127] = 7;
    for ([_]usize{ 3000, 20_000, 100 }) |length| {
        object = try made.realloc(object, length);
        try std.testing.expectEqual(length, object.len);
        if (length >= 128) try std.testing.expectEqual(7, object[127]);
    }
    made.free(object);
}

test "threads share a list, and no object is two threads' at once" {
    const kit = testing();
    defer std.testing.allocator.destroy(kit.objects);
    const Worker = struct {
        made: std.mem.Allocator,
        number: u8,
        is_through: bool = false,

        fn run(argument: ?*anyopaque) callconv(.c) ?*anyopaque {
            const self: *@This() = @ptrCast(@alignCast(argument.?));
            for (0..200_000) |_| {
                var all: [3]*[8]u8 = undefined;
                for (&all) |*object| {
                    object.* = self.made.create([8]u8) catch return null;
                    object.*.* = @splat(self.number);
                }
                for (all) |object| {
                    if (std.mem.indexOfNone(u8, object, &.{self.number}) != null) return null;
                    self.made.destroy(object);
                }
            }
            self.is_through = true;
            return null;
        }
    };
    var workers: [4]Worker = undefined;
    var threads: [4]sync.Thread = undefined;
    for (&workers, &threads, 1..) |*worker, *thread, number| {
        worker.* = .{ .made = kit.made, .number = @intCast(number) };
        thread.* = sync.Thread.spawn(Worker.run, worker).?;
    }
    for (threads) |thread| thread.join();
    for (workers) |worker| try std.testing.expect(worker.is_through);
}
