//! The split virtqueue (virtio 1.3, 2.7), device side. The driver writes the
//! descriptor table and the available ring: heads of chains, then `avail.idx`.
//! We pop what is new, and push the used ring: head and bytes written, then
//! `used.idx`. Indices run freely over 16 bits; `index % size` is the slot.
//!
//! Either side may ask not to be told: with EVENT_IDX by the index from which
//! on it wants to know (`used_event` behind the available ring, `avail_event`
//! behind the used ring), else by a flag. Whoever publishes an index and then
//! reads the other's wish needs a full barrier between the two, and so does
//! whoever writes a wish and then looks at the index again: here each such
//! pair is a seq_cst store and a seq_cst load.
//!
//! Rings of one memory may be used from different threads, a single ring only
//! by one thread at a time.

const std = @import("std");
const layout = @import("../layout.zig");
const linux = @import("../linux.zig");
const sync = @import("../sync.zig");
const memory = @import("../memory/memory.zig");
const chain = @import("chain.zig");
const Handles = @import("../handles.zig").Handles;

pub const size_maximum: u32 = 32768;
pub const header_maximum: u32 = 256;
pub const trailer_maximum: u32 = 1;

/// Feature bits that change how a split ring works.
const feature_indirect: u6 = 28;
const feature_event_idx: u6 = 29;
const feature_packed: u6 = 34;
const feature_in_order: u6 = 35;

/// `avail.flags` and `used.flags`, both meaningless with EVENT_IDX.
pub const flag_no_interrupt: u16 = 1;
pub const flag_no_notify: u16 = 1;

/// What `create` refuses (`reason_out`): -EINVAL says that its value or
/// alignment is wrong, -EFAULT that it is not whole inside one region.
pub const refuse_none: u32 = 0;
pub const refuse_size: u32 = 1;
pub const refuse_descriptor_area: u32 = 2;
pub const refuse_available_area: u32 = 3;
pub const refuse_used_area: u32 = 4;
/// Another field: features, space, header_bytes, trailer_bytes.
pub const refuse_config: u32 = 5;

pub const UsedElement = extern struct { id: u32, length: u32 };

pub const Available = extern struct {
    flags: u16,
    index: u16,

    pub inline fn ring(self: *Available) [*]u16 {
        return @ptrCast(@as([*]Available, @ptrCast(self)) + 1);
    }
    pub inline fn usedEvent(self: *Available, size: u32) *u16 {
        return &self.ring()[size];
    }
    pub fn byteCount(size: u32) u32 {
        return 6 + 2 * size;
    }
};

pub const Used = extern struct {
    flags: u16 align(4),
    index: u16,

    pub inline fn ring(self: *Used) [*]UsedElement {
        return @ptrCast(@as([*]Used, @ptrCast(self)) + 1);
    }
    pub inline fn availableEvent(self: *Used, size: u32) *u16 {
        return @ptrCast(self.ring() + size);
    }
    pub fn byteCount(size: u32) u32 {
        return 6 + 8 * size;
    }
};

comptime {
    std.debug.assert(@sizeOf(Available) == 4 and @alignOf(Available) == 2);
    std.debug.assert(@sizeOf(Used) == 4 and @alignOf(Used) == 4);
    std.debug.assert(@sizeOf(UsedElement) == 8 and @alignOf(UsedElement) == 4);
}

/// Whether the side that wrote `event` wants to be told of the step from
/// `old` to `new` (2.7.10, `vring_need_event`).
pub inline fn isWanted(event: u16, new: u16, old: u16) bool {
    return new -% event -% 1 < new -% old;
}

const HeadState = enum(u8) { free, in_flight, completed };

const Ring = struct {
    /// Stays valid while we hold views of it, also after its handle is dead.
    memory: *memory.Memory,
    size: u32,
    /// Into guest memory: `views` are held until `destroy`.
    descriptors: [*]align(16) const [2]u64,
    available: *Available,
    used: *Used,
    views: [3]u32,
    cache: memory.Cache = .{},

    header_bytes: u32,
    trailer_bytes: u32,
    has_indirect: bool,
    has_event_idx: bool,
    is_in_order: bool,
    /// Whether the driver was called since the start: until then it may wait
    /// for a call of which an earlier back-end died.
    is_called: bool = false,

    last_available: u16,
    used_index: u16,
    in_flight: u32 = 0,
    broken: u32 = layout.broken_none,
    broken_value: u64 = 0,
    popped: u64 = 0,
    pushed: u64 = 0,

    /// One per head.
    heads: []HeadState,
    /// IN_ORDER only: heads in the order of their pop, from `ordered` (oldest
    /// not yet published) on; and what was written for completed ones.
    order: []u16,
    written: []u32,
    ordered: u32 = 0,

    fn breakWith(self: *Ring, reason: u32, value: u64) i32 {
        self.broken = reason;
        self.broken_value = value;
        return self.failure();
    }

    fn failure(self: *const Ring) i32 {
        return linux.fail(if (self.broken == layout.broken_memory) .FAULT else .PROTO);
    }

    /// Whether the ring may touch guest memory.
    inline fn isUsable(self: *Ring) bool {
        if (self.broken != layout.broken_none) return false;
        if (self.memory.isUsable()) return true;
        _ = self.breakWith(layout.broken_memory, 0);
        return false;
    }

    inline fn walk(self: *Ring, batch: *chain.Batch, head: u32) chain.Error!void {
        var index = head;
        for (0..self.size) |_| {
            const descriptor: chain.Descriptor = .load(&self.descriptors[index]);
            if (descriptor.flags & chain.flag_indirect != 0) {
                if (!self.has_indirect or descriptor.flags & chain.flag_next != 0) {
                    return batch.breach(layout.broken_indirect_refused, index);
                }
                // Its WRITE flag means nothing (2.7.5.3.2).
                return chain.addIndirect(batch, descriptor.address, descriptor.length, self.size);
            }
            try batch.add(descriptor, index);
            if (descriptor.flags & chain.flag_next == 0) return;
            if (descriptor.next >= self.size) return batch.breach(layout.broken_next, descriptor.next);
            index = descriptor.next;
        }
        return batch.breach(layout.broken_loop, self.size);
    }

    inline fn publish(self: *Ring, head: u32, length: u32) void {
        self.used.ring()[self.used_index & (self.size - 1)] = .{ .id = head, .length = length };
        self.used_index +%= 1;
    }

    /// Of IN_ORDER completions, those that no older request holds back.
    fn publishOrdered(self: *Ring) void {
        while (self.ordered != @as(u32, @truncate(self.popped))) {
            const head = self.order[self.ordered & (self.size - 1)];
            if (self.heads[head] != .completed) return;
            self.publish(head, self.written[head]);
            self.heads[head] = .free;
            self.ordered +%= 1;
        }
    }

    inline fn wantsCall(self: *Ring, old: u16) bool {
        if (!self.is_called) {
            self.is_called = true;
            return true;
        }
        if (self.has_event_idx) {
            const event = @atomicLoad(u16, self.available.usedEvent(self.size), .seq_cst);
            return isWanted(event, self.used_index, old);
        }
        return @atomicLoad(u16, &self.available.flags, .seq_cst) & flag_no_interrupt == 0;
    }
};

var rings: Handles(Ring) = .{};

/// Returns the ring's handle.
pub fn create(memory_handle: u32, config: *const layout.RingConfig, reason_out: *u32) callconv(.c) i32 {
    reason_out.* = refuse_none;
    const object = memory.get(memory_handle) orelse return linux.fail(.BADF);
    if (@popCount(config.size) != 1 or config.size > size_maximum) {
        reason_out.* = refuse_size;
        return linux.fail(.INVAL);
    }
    if (config.header_bytes > header_maximum or config.trailer_bytes > trailer_maximum or
        config.space > layout.space_uva or config.flags != 0 or has(config.features, feature_packed))
    {
        reason_out.* = refuse_config;
        return linux.fail(.INVAL);
    }
    const table = object.enter();
    defer object.leave();
    if (!object.isUsable()) return linux.fail(.FAULT);

    const size = config.size;
    const addresses = [3]u64{ config.descriptor_address, config.available_address, config.used_address };
    const lengths = [3]u32{ chain.descriptor_size * size, Available.byteCount(size), Used.byteCount(size) };
    const alignments = [3]u32{ 16, 2, 4 };
    var pointers: [3][*]u8 = undefined;
    var views: [3]u32 = undefined;
    var cache: memory.Cache = .{};
    for (addresses, lengths, alignments, 0..) |address, length, alignment, i| {
        reason_out.* = refuse_descriptor_area + @as(u32, @intCast(i));
        if (address % alignment != 0) return linux.fail(.INVAL);
        pointers[i] = table.whole(config.space, address, length) orelse return linux.fail(.FAULT);
        // The region itself may be mapped at any offset.
        if (@intFromPtr(pointers[i]) % alignment != 0) return linux.fail(.INVAL);
        const piece = table.piece(&cache, config.space, address, length) orelse return linux.fail(.FAULT);
        views[i] = piece.view;
    }
    reason_out.* = refuse_none;

    const is_in_order = has(config.features, feature_in_order);
    const ring = sync.allocator.create(Ring) catch return linux.fail(.NOMEM);
    ring.* = .{
        .memory = object,
        .size = size,
        .descriptors = @ptrCast(@alignCast(pointers[0])),
        .available = @ptrCast(@alignCast(pointers[1])),
        .used = @ptrCast(@alignCast(pointers[2])),
        .views = views,
        .header_bytes = config.header_bytes,
        .trailer_bytes = config.trailer_bytes,
        .has_indirect = has(config.features, feature_indirect),
        .has_event_idx = has(config.features, feature_event_idx),
        .is_in_order = is_in_order,
        .last_available = @truncate(config.base),
        .used_index = undefined,
        .heads = &.{},
        .order = &.{},
        .written = &.{},
    };
    // The driver may have been reset since: what it reads is what counts.
    ring.used_index = @atomicLoad(u16, &ring.used.index, .acquire);
    for (views, 0..) |view, i| {
        if (object.hold(view)) continue;
        for (views[0..i]) |held| object.unhold(held);
        sync.allocator.destroy(ring);
        return linux.fail(.FAULT);
    }
    if (allocate(ring, is_in_order)) {
        if (rings.insert(ring)) |handle| return @intCast(handle);
    }
    release(ring);
    return linux.fail(.NOMEM);
}

fn has(features: u64, bit: u6) bool {
    return features >> bit & 1 != 0;
}

fn allocate(ring: *Ring, is_in_order: bool) bool {
    ring.heads = sync.allocator.alloc(HeadState, ring.size) catch return false;
    @memset(ring.heads, .free);
    if (!is_in_order) return true;
    ring.order = sync.allocator.alloc(u16, ring.size) catch return false;
    ring.written = sync.allocator.alloc(u32, ring.size) catch return false;
    return true;
}

fn release(ring: *Ring) void {
    for (ring.views) |view| ring.memory.unhold(view);
    sync.allocator.free(ring.heads);
    sync.allocator.free(ring.order);
    sync.allocator.free(ring.written);
    sync.allocator.destroy(ring);
}

/// How far ahead heads are read, so that their descriptors are on their way
/// from the driver's processor.
const heads_ahead = 4;

/// Takes up to `max` requests off the available ring into `batch`: record i
/// at word i * stride, segments from word max * stride on. Returns how many,
/// -EPROTO when the driver broke the ring, -EFAULT when the memory is gone.
/// A request whose segments (the trailer's own included) do not fit behind
/// those before it stays for the next call.
pub fn pop(handle: u32, words: [*]u32, word_count: u32, max: u32) callconv(.c) i32 {
    const ring = rings.get(handle) orelse return linux.fail(.BADF);
    if (!ring.isUsable()) return ring.failure();
    const table = ring.memory.enter();
    defer ring.memory.leave();
    // Work on a copy: the compiler need not fear that the batch is the cache.
    var cache = ring.cache;
    defer ring.cache = cache;
    var batch = chain.Batch.init(table, &cache, words, word_count, max, ring.header_bytes, ring.trailer_bytes) orelse
        return linux.fail(.INVAL);

    // Acquire: pairs with the driver's barrier before it stores avail.idx;
    // heads and descriptors are read after it.
    const index = @atomicLoad(u16, &ring.available.index, .acquire);
    const pending: u32 = index -% ring.last_available;
    if (pending > ring.size) return ring.breakWith(layout.broken_available_index, index);
    const count = @min(pending, max);
    const mask = ring.size - 1;
    const heads = ring.available.ring();

    var window: [heads_ahead]u16 = undefined;
    var read: u32 = 0;
    var outcome: chain.Error!void = {};
    for (0..count) |_| {
        while (read < count and read < batch.record_count + heads_ahead) : (read += 1) {
            const head = @atomicLoad(u16, &heads[(ring.last_available + read) & mask], .monotonic);
            @prefetch(&ring.descriptors[head & mask], .{});
            window[read % heads_ahead] = head;
        }
        const head: u32 = window[batch.record_count % heads_ahead];
        batch.begin();
        outcome = one(ring, &batch, head);
        outcome catch break;
        ring.heads[head] = .in_flight;
        if (ring.is_in_order) ring.order[@as(u32, @truncate(ring.popped)) & mask] = @intCast(head);
        ring.popped += 1;
    }
    // What was read since the fault may be zeros that nobody wrote.
    if (!ring.memory.isUsable()) return ring.breakWith(layout.broken_memory, 0);
    const done = batch.record_count;
    // Requests before a broken one are delivered; the next call meets it first.
    if (done == 0) outcome catch |reason| return switch (reason) {
        error.Full => ring.breakWith(layout.broken_segments, batch.segment_capacity),
        error.Broken => ring.breakWith(batch.reason, batch.value),
    };
    ring.last_available +%= @intCast(done);
    ring.in_flight += done;
    return @intCast(done);
}

inline fn one(ring: *Ring, batch: *chain.Batch, head: u32) chain.Error!void {
    if (head >= ring.size) return batch.breach(layout.broken_head, head);
    if (ring.heads[head] != .free) return batch.breach(layout.broken_head_in_flight, head);
    try ring.walk(batch, head);
    try batch.finish(head, @truncate(ring.popped));
}

/// Gives requests back to the driver. Returns 1 when it must be called, 0
/// when not; -EINVAL (and nothing is published) when a head is not in flight,
/// -EPROTO or -EFAULT when the ring is broken, and the completions are lost.
pub fn push(handle: u32, completions: [*]const layout.Completion, count: u32) callconv(.c) i32 {
    const ring = rings.get(handle) orelse return linux.fail(.BADF);
    if (!ring.isUsable()) return ring.failure();
    if (count > ring.in_flight) return linux.fail(.INVAL);
    const checked: HeadState = if (ring.is_in_order) .completed else .free;
    for (completions[0..count], 0..) |completion, i| {
        if (completion.head < ring.size and ring.heads[completion.head] == .in_flight) {
            ring.heads[completion.head] = checked;
            if (ring.is_in_order) ring.written[completion.head] = completion.written;
            continue;
        }
        for (completions[0..i]) |earlier| {
            if (earlier.head < ring.size) ring.heads[earlier.head] = .in_flight;
        }
        return linux.fail(.INVAL);
    }
    const old = ring.used_index;
    if (ring.is_in_order) {
        ring.publishOrdered();
    } else {
        for (completions[0..count]) |completion| ring.publish(completion.head, completion.written);
    }
    ring.in_flight -= count;
    ring.pushed += count;
    if (ring.used_index == old) return 0;
    // Release: elements, and the data behind them, before the index; pairs
    // with the driver's barrier after it reads used.idx. Full: the index
    // before the driver's wish is read; pairs with its barrier between
    // writing used_event (or flags) and looking at used.idx again.
    @atomicStore(u16, &ring.used.index, ring.used_index, .seq_cst);
    return @intFromBool(ring.wantsCall(old));
}

/// Asks for kicks. Returns 1 when there is already more to pop, for which no
/// kick may come: the caller must pop before it waits.
pub fn arm(handle: u32) callconv(.c) i32 {
    const ring = rings.get(handle) orelse return linux.fail(.BADF);
    if (!ring.isUsable()) return ring.failure();
    // Full: the wish before the index is read; pairs with the driver's barrier
    // between storing avail.idx and reading avail_event (or used.flags).
    if (ring.has_event_idx) {
        @atomicStore(u16, ring.used.availableEvent(ring.size), ring.last_available, .seq_cst);
    } else {
        @atomicStore(u16, &ring.used.flags, 0, .seq_cst);
    }
    const index = @atomicLoad(u16, &ring.available.index, .seq_cst);
    return @intFromBool(index != ring.last_available);
}

/// Asks for no kicks, as long as the queue is polled. With EVENT_IDX the
/// event stays behind at an index that has passed, which says the same.
pub fn disarm(handle: u32) callconv(.c) i32 {
    const ring = rings.get(handle) orelse return linux.fail(.BADF);
    if (!ring.isUsable()) return ring.failure();
    if (!ring.has_event_idx) @atomicStore(u16, &ring.used.flags, flag_no_notify, .monotonic);
    return 0;
}

pub fn state(handle: u32, state_out: *layout.RingState) callconv(.c) i32 {
    const ring = rings.get(handle) orelse return linux.fail(.BADF);
    state_out.* = .{
        .last_available = ring.last_available,
        .used_index = ring.used_index,
        .in_flight = ring.in_flight,
        .broken = ring.broken,
        .broken_value = ring.broken_value,
        .popped = ring.popped,
        .pushed = ring.pushed,
    };
    return 0;
}

pub fn destroy(handle: u32) callconv(.c) i32 {
    const ring = rings.remove(handle) orelse return linux.fail(.BADF);
    release(ring);
    return 0;
}

test {
    _ = chain;
    _ = @import("split_test.zig");
    _ = @import("hostile_test.zig");
}
