//! Handles: what TypeScript holds instead of pointers. A handle is a slot
//! number (low 16 bits) and the slot's generation (high 15 bits), so that a
//! handle kept after its object was destroyed is refused and never aliases.

const std = @import("std");
const sync = @import("sync.zig");

pub fn Handles(comptime T: type) type {
    return struct {
        const Self = @This();
        const capacity = 1 << 16;
        const chunk_size = 256; // slots: one page
        const Slot = struct {
            object: std.atomic.Value(?*T) = .init(null),
            generation: std.atomic.Value(u32) = .init(1),
        };
        const Chunk = [chunk_size]Slot;

        chunks: [capacity / chunk_size]std.atomic.Value(?*Chunk) =
            @splat(.init(null)),
        lock: sync.Mutex = .{},
        /// Slots below this were used at some time.
        used: u32 = 0,

        fn slotAt(self: *Self, index: u32) ?*Slot {
            const chunk = self.chunks[index / chunk_size].load(.acquire) orelse return null;
            return &chunk[index % chunk_size];
        }

        /// Returns the new handle (> 0) or null when memory or slots ran out.
        pub fn insert(self: *Self, object: *T) ?u32 {
            self.lock.lock();
            defer self.lock.unlock();
            var index: u32 = 0;
            while (index < self.used) : (index += 1) {
                if (self.slotAt(index).?.object.load(.monotonic) == null) break;
            } else {
                if (self.used == capacity) return null;
                if (self.used % chunk_size == 0) {
                    // Chunks stay for the life of the process.
                    const chunk = std.heap.page_allocator.create(Chunk) catch return null;
                    chunk.* = @splat(.{});
                    self.chunks[self.used / chunk_size].store(chunk, .release);
                }
                self.used += 1;
            }
            const slot = self.slotAt(index).?;
            slot.object.store(object, .release);
            return (slot.generation.load(.monotonic) << 16) | index;
        }

        pub fn get(self: *Self, handle: u32) ?*T {
            const slot = self.slotAt(handle & 0xffff) orelse return null;
            const object = slot.object.load(.acquire);
            if (slot.generation.load(.acquire) != handle >> 16) return null;
            return object;
        }

        /// Takes the object out; the handle is dead from here on.
        pub fn remove(self: *Self, handle: u32) ?*T {
            self.lock.lock();
            defer self.lock.unlock();
            const object = self.get(handle) orelse return null;
            const slot = self.slotAt(handle & 0xffff).?;
            // 15 bits, so that a handle stays a positive i32; never 0.
            const next = (slot.generation.load(.monotonic) % 0x7fff) + 1;
            slot.generation.store(next, .release);
            slot.object.store(null, .release);
            return object;
        }

        /// For walks over all objects, under `lock` held by the caller.
        pub fn at(self: *Self, index: u32) ?*T {
            const slot = self.slotAt(index) orelse return null;
            return slot.object.load(.acquire);
        }
    };
}

test "a handle is refused after its object was removed" {
    var handles: Handles(u32) = .{};
    var first: u32 = 1;
    var second: u32 = 2;
    const old = handles.insert(&first).?;
    try std.testing.expect(handles.get(old) == &first);
    try std.testing.expect(handles.remove(old) == &first);
    try std.testing.expect(handles.get(old) == null);
    const new = handles.insert(&second).?;
    try std.testing.expect(new != old);
    try std.testing.expect(handles.get(old) == null);
    try std.testing.expect(handles.remove(old) == null);
    try std.testing.expect(handles.get(new) == &second);
}

test "handles reach past one chunk" {
    var handles: Handles(u32) = .{};
    var values: [600]u32 = undefined;
    var keys: [600]u32 = undefined;
    for (&values, &keys) |*value, *key| key.* = handles.insert(value).?;
    for (&values, keys) |*value, key| try std.testing.expect(handles.get(key) == value);
}
