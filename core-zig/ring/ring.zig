//! A virtqueue, device side: the exported functions, and what the split ring
//! (split.zig) and the packed ring (packed.zig) share: the checks at the start,
//! batches, and who has which request.
//!
//! Rings of one memory may be used from different threads, a single ring only
//! by one thread at a time.

const std = @import("std");
const layout = @import("../layout.zig");
const linux = @import("../linux.zig");
const sync = @import("../sync.zig");
const memory = @import("../memory/memory.zig");
const chain = @import("chain.zig");
const split = @import("split.zig");
const packed_ring = @import("packed.zig");
const iova_areas = @import("iova_areas.zig");
const dirty_log = @import("../memory/dirty_log.zig");
const Written = @import("written.zig").Written;
const inflight = @import("inflight.zig");
const Handles = @import("../handles.zig").Handles;

pub const size_maximum: u32 = 32768;
pub const header_maximum: u32 = 256;
pub const trailer_maximum: u32 = 1;

/// Feature bits that change how a ring works.
const feature_indirect: u6 = 28;
const feature_event_idx: u6 = 29;
const feature_packed: u6 = 34;
const feature_in_order: u6 = 35;

pub const HeadState = enum(u8) { free, in_flight, completed };

/// How the two areas behind the descriptors are called follows the split ring;
/// in a packed ring they are driver and device event suppression.
pub const areas = 3;

const ring_flags = layout.flag_ring_logged | layout.flag_ring_resumed | layout.flag_ring_anew;

/// What is common to both formats. Each has `take` (pop), `publish` and
/// `announce` (push), `arm`, `disarm`, `position`, `rewind`, `usedPosition`,
/// `track` and `toResubmit`; `markUsed` and `markEvent` say in the dirty log
/// what those have written.
pub const Ring = struct {
    format: union(enum) { split: split.Split, packed_ring: packed_ring.Packed },
    /// Stays valid while we hold views of it, also after its handle is dead.
    memory: *memory.Memory,
    size: u32,
    /// Where the areas are: held until `destroy`. Not for IOVAs.
    views: [areas]u32,
    /// Of a ring whose addresses are IOVAs.
    iova: ?*iova_areas.Areas = null,
    /// Holds the region in which the format tracks what is in flight.
    region: ?*inflight.Inflight = null,
    cache: memory.Cache = .{},
    /// Where the front-end may ask for a dirty log.
    log: ?*Written = null,

    header_bytes: u32,
    trailer_bytes: u32,
    has_indirect: bool,
    has_event_idx: bool,
    is_in_order: bool,
    /// Whether the driver was called since the start: until then it may wait
    /// for a call of which an earlier back-end died.
    is_called: bool = false,

    in_flight: u32 = 0,
    broken: u32 = layout.broken_none,
    broken_value: u64 = 0,
    popped: u64 = 0,
    pushed: u64 = 0,

    /// One per head (packed: per buffer id).
    heads: []HeadState = &.{},
    /// IN_ORDER only: heads in the order of their pop, `ordered` of them not
    /// yet published, the oldest at `oldest`; and per head how many bytes can
    /// be, and were, written.
    order: []u16 = &.{},
    writable: []u32 = &.{},
    written: []u32 = &.{},
    oldest: u32 = 0,
    ordered: u32 = 0,

    pub fn breakWith(self: *Ring, reason: u32, value: u64) i32 {
        self.broken = reason;
        self.broken_value = value;
        return self.failure();
    }

    pub fn failure(self: *const Ring) i32 {
        return linux.fail(if (self.broken == layout.broken_memory) .FAULT else .PROTO);
    }

    /// Whether the ring may touch guest memory.
    pub inline fn isUsable(self: *Ring) bool {
        if (self.broken != layout.broken_none) return false;
        if (self.memory.isUsable()) return true;
        _ = self.breakWith(layout.broken_memory, 0);
        return false;
    }

    /// From here to `leave` the ring may be touched, and what is popped stays
    /// mapped; may nest. Returns 0, or a negative errno and there is nothing to
    /// leave: -EAGAIN when the ring waits for the IOTLB.
    pub inline fn enter(self: *Ring) i32 {
        return if (self.iova) |where| where.enter(self) else 0;
    }

    pub inline fn leave(self: *Ring) void {
        if (self.iova) |where| where.leave(self);
    }

    /// Goes on where the inflight region says that the last run ended.
    pub fn attach(ring: *Ring, config: *const layout.RingConfig) i32 {
        const region = inflight.acquire(config.inflight) orelse return linux.fail(.BADF);
        ring.region = region;
        const area = region.area(config.queue_index, ring.size, has(config.features, feature_packed)) orelse return linux.fail(.INVAL);
        if (config.flags & layout.flag_ring_anew != 0) area.forget();
        const tracked = switch (ring.format) {
            inline else => |*format| format.track(area, ring.size),
        };
        tracked catch |why| return switch (why) {
            error.Damaged => linux.fail(.UCLEAN),
            error.OutOfMemory => linux.fail(.NOMEM),
        };
        // What was read since a fault may be zeros that nobody wrote.
        return if (ring.memory.isUsable()) 0 else linux.fail(.FAULT);
    }

    /// A head that the driver made available.
    pub inline fn requireFree(self: *const Ring, batch: anytype, head: u32) chain.Error!void {
        if (head >= self.size) return batch.breach(layout.broken_head, head);
        if (self.heads[head] != .free) return batch.breach(layout.broken_head_in_flight, head);
    }

    /// The request in the batch is complete: it is the device's now.
    pub inline fn own(self: *Ring, batch: anytype, head: u32) void {
        self.heads[head] = .in_flight;
        if (self.log) |log| log.remember(batch, head);
        self.popped += 1;
        if (!self.is_in_order) return;
        self.writable[head] = @intCast(batch.writable);
        // No more are unpublished than there are heads.
        const last = self.oldest + self.ordered;
        self.order[if (last < self.size) last else last - self.size] = @intCast(head);
        self.ordered += 1;
    }

    /// As if `head`, the request popped last of those in flight, had not been
    /// popped: it stays in the ring for the next pop.
    pub fn unpop(self: *Ring, head: u32) void {
        switch (self.format) {
            inline else => |*format| format.untake(self, head),
        }
        self.heads[head] = .free;
        if (self.log) |log| log.drop(head);
        self.in_flight -= 1;
        self.popped -= 1;
        if (self.is_in_order) self.ordered -= 1;
    }

    /// Makes visible what was published since `old`. Returns 1 when the driver
    /// must be called.
    pub inline fn announce(self: *Ring, format: anytype, old: u16) i32 {
        if (!format.announce(old)) return 0;
        if (self.log) |log| format.markUsed(self, log, old);
        if (self.is_called) return @intFromBool(format.wantsCall(self, old));
        self.is_called = true;
        return 1;
    }

    /// Of IN_ORDER completions, those that no older request holds back. One
    /// used element stands for a run of them (2.7.9, 2.8.8): it has the head
    /// and the length of the last, and the driver takes the others for written
    /// completely. So what was not ends its run.
    fn publishOrdered(self: *Ring, format: anytype) void {
        while (true) {
            var last: ?u32 = null;
            var steps: u32 = 0;
            while (self.ordered != 0) {
                const head = self.order[self.oldest];
                if (self.heads[head] != .completed) break;
                self.heads[head] = .free;
                if (self.log) |log| log.settle(head);
                self.oldest = if (self.oldest + 1 == self.size) 0 else self.oldest + 1;
                self.ordered -= 1;
                last = head;
                format.retire(head);
                steps += format.stepsOf(head);
                if (self.written[head] != self.writable[head]) break;
            }
            const head = last orelse return;
            format.publish(self, head, self.written[head], steps);
        }
    }
};

var rings: Handles(Ring) = .{};

/// Null for a dead handle.
pub fn get(handle: u32) ?*Ring {
    return rings.get(handle);
}

/// Returns the ring's handle; -EINVAL with `reason_out` when a value or an
/// alignment is wrong, -EFAULT when an area is not whole inside one region.
pub fn create(memory_handle: u32, config: *const layout.RingConfig, reason_out: *u32) callconv(.c) i32 {
    reason_out.* = layout.refuse_none;
    const object = memory.get(memory_handle) orelse return linux.fail(.BADF);
    const is_packed = has(config.features, feature_packed);
    const size = config.size;
    if (size == 0 or size > size_maximum or (!is_packed and @popCount(size) != 1)) {
        reason_out.* = layout.refuse_ring_size;
        return linux.fail(.INVAL);
    }
    if (config.header_bytes > header_maximum or config.trailer_bytes > trailer_maximum or
        config.space > layout.space_iova or config.flags & ~ring_flags != 0 or
        config.queue_index >= dirty_log.queue_maximum or
        (is_packed and !packed_ring.isBase(config.base, size)))
    {
        reason_out.* = layout.refuse_ring_config;
        return linux.fail(.INVAL);
    }
    const table = object.enter();
    defer object.leave();
    if (!object.isUsable()) return linux.fail(.FAULT);

    const addresses = [areas]u64{ config.descriptor_address, config.available_address, config.used_address };
    const lengths = if (is_packed) packed_ring.areaLengths(size) else split.areaLengths(size);
    const alignments = if (is_packed) packed_ring.alignments else split.alignments;
    if (config.space == layout.space_iova) {
        for (addresses, lengths, alignments, 0..) |address, length, alignment, i| {
            reason_out.* = layout.refuse_ring_descriptor_area + @as(u32, @intCast(i));
            if (address % alignment != 0 or address > std.math.maxInt(u64) - @as(u64, length - 1)) return linux.fail(.INVAL);
        }
        reason_out.* = layout.refuse_none;
        // They need not be mapped yet, nor stay so.
        return createTranslated(object, config, reason_out, .{
            .addresses = addresses,
            .lengths = lengths,
            .alignments = alignments,
            .accesses = if (is_packed) iova_areas.packed_accesses else iova_areas.split_accesses,
            .config = config.*,
        });
    }
    var pointers: [areas][*]u8 = undefined;
    var views: [areas]u32 = undefined;
    var descriptor_gpa: u64 = 0;
    var cache: memory.Cache = .{};
    for (addresses, lengths, alignments, 0..) |address, length, alignment, i| {
        reason_out.* = layout.refuse_ring_descriptor_area + @as(u32, @intCast(i));
        if (address % alignment != 0) return linux.fail(.INVAL);
        pointers[i] = table.whole(config.space, address, length) orelse return linux.fail(.FAULT);
        // The region itself may be mapped at any offset.
        if (@intFromPtr(pointers[i]) % alignment != 0) return linux.fail(.INVAL);
        const piece = table.piece(&cache, config.space, address, length) orelse return linux.fail(.FAULT);
        views[i] = piece.view;
        if (i == 0) descriptor_gpa = table.gpaOf(piece.view, piece.offset) orelse return linux.fail(.FAULT);
    }
    reason_out.* = layout.refuse_none;

    const ring = sync.allocator.create(Ring) catch return linux.fail(.NOMEM);
    ring.* = made(object, config);
    ring.views = views;
    switch (ring.format) {
        inline else => |*format| format.place(pointers, true),
    }
    for (views, 0..) |view, i| {
        if (object.hold(view)) continue;
        for (views[0..i]) |held| object.unhold(held);
        sync.allocator.destroy(ring);
        return linux.fail(.FAULT);
    }
    if (config.flags & layout.flag_ring_logged != 0) {
        ring.log = Written.create(&object.dirty_log, config.queue_index, descriptor_gpa, size) orelse {
            release(ring);
            return linux.fail(.NOMEM);
        };
    }
    if (config.inflight != 0) {
        const refused = ring.attach(config);
        if (refused < 0) {
            reason_out.* = layout.refuse_ring_inflight;
            release(ring);
            return refused;
        }
    }
    if (allocate(ring)) {
        if (rings.insert(ring)) |handle| return @intCast(handle);
    }
    release(ring);
    return linux.fail(.NOMEM);
}

fn has(features: u64, bit: u6) bool {
    return features >> bit & 1 != 0;
}

fn made(object: *memory.Memory, config: *const layout.RingConfig) Ring {
    return .{
        .format = if (has(config.features, feature_packed))
            .{ .packed_ring = .init(config.base) }
        else
            .{ .split = .init(if (config.flags & layout.flag_ring_resumed != 0) null else config.base) },
        .memory = object,
        .size = config.size,
        .views = undefined,
        .header_bytes = config.header_bytes,
        .trailer_bytes = config.trailer_bytes,
        .has_indirect = has(config.features, feature_indirect),
        .has_event_idx = has(config.features, feature_event_idx),
        .is_in_order = has(config.features, feature_in_order),
    };
}

fn createTranslated(object: *memory.Memory, config: *const layout.RingConfig, reason_out: *u32, where: iova_areas.Areas) i32 {
    const ring = sync.allocator.create(Ring) catch return linux.fail(.NOMEM);
    ring.* = made(object, config);
    ring.iova = sync.allocator.create(iova_areas.Areas) catch {
        sync.allocator.destroy(ring);
        return linux.fail(.NOMEM);
    };
    ring.iova.?.* = where;
    object.pin();
    if (config.flags & layout.flag_ring_logged != 0) {
        ring.log = Written.create(&object.dirty_log, config.queue_index, 0, config.size) orelse {
            release(ring);
            return linux.fail(.NOMEM);
        };
    }
    if (!allocate(ring)) {
        release(ring);
        return linux.fail(.NOMEM);
    }
    const entered = ring.enter();
    if (entered == 0) ring.leave();
    // That it is not mapped at the moment is no error.
    if (entered != 0 and entered != linux.fail(.AGAIN)) {
        const refused = ring.iova.?.refused;
        if (refused != 0) reason_out.* = layout.refuse_ring_inflight;
        release(ring);
        return if (refused != 0) refused else linux.fail(.FAULT);
    }
    if (rings.insert(ring)) |handle| return @intCast(handle);
    release(ring);
    return linux.fail(.NOMEM);
}

fn allocate(ring: *Ring) bool {
    ring.heads = sync.allocator.alloc(HeadState, ring.size) catch return false;
    @memset(ring.heads, .free);
    if (ring.is_in_order) {
        ring.order = sync.allocator.alloc(u16, ring.size) catch return false;
        ring.writable = sync.allocator.alloc(u32, ring.size) catch return false;
        ring.written = sync.allocator.alloc(u32, ring.size) catch return false;
    }
    return switch (ring.format) {
        .split => true,
        .packed_ring => |*format| format.allocate(ring.size),
    };
}

fn release(ring: *Ring) void {
    if (ring.iova) |where| {
        where.release(ring.memory);
        sync.allocator.destroy(where);
    } else {
        for (ring.views) |view| ring.memory.unhold(view);
    }
    sync.allocator.free(ring.heads);
    sync.allocator.free(ring.order);
    sync.allocator.free(ring.writable);
    sync.allocator.free(ring.written);
    if (ring.log) |log| log.destroy();
    switch (ring.format) {
        inline else => |*format| format.release(),
    }
    // Last: it is what they write into.
    if (ring.region) |region| region.release();
    sync.allocator.destroy(ring);
}

/// Takes up to `max` available requests into `batch`: record i at word
/// i * stride, segments from word max * stride on. Returns how many, -EPROTO
/// when the driver broke the ring, -EFAULT when the memory is gone, -EAGAIN
/// when the next request, or the ring, waits for the IOTLB (`misses`). A request
/// whose segments (the trailer's own included) do not fit behind those before
/// it stays for the next call. What an earlier run left in the inflight region
/// comes first, oldest first, in calls of its own.
pub fn pop(handle: u32, words: [*]u32, word_count: u32, max: u32) callconv(.c) i32 {
    const ring = rings.get(handle) orelse return linux.fail(.BADF);
    if (!ring.isUsable()) return ring.failure();
    if (ring.iova) |where| return popTranslated(ring, where, words, word_count, max);
    return switch (ring.format) {
        inline else => |*format| popFrom(false, ring, format, words, word_count, max),
    };
}

noinline fn popTranslated(ring: *Ring, where: *iova_areas.Areas, words: [*]u32, word_count: u32, max: u32) i32 {
    const result = where.enter(ring);
    if (result != 0) return result;
    defer where.leave(ring);
    where.miss_count = 0;
    return switch (ring.format) {
        inline else => |*format| popFrom(true, ring, format, words, word_count, max),
    };
}

inline fn popFrom(comptime is_translated: bool, ring: *Ring, format: anytype, words: [*]u32, word_count: u32, max: u32) i32 {
    const table = ring.memory.enter();
    defer ring.memory.leave();
    // Work on a copy: the compiler need not fear that the batch is the cache.
    var cache = ring.cache;
    defer ring.cache = cache;
    var batch = chain.Batch(is_translated).init(table, &cache, words, word_count, max, ring.header_bytes, ring.trailer_bytes) orelse
        return linux.fail(.INVAL);
    if (is_translated) {
        batch.iova = ring.iova.?;
        batch.memory = ring.memory;
    }

    const start = format.position();
    const outcome = format.take(ring, &batch, max);
    // What was read since the fault may be zeros that nobody wrote.
    if (!ring.memory.isUsable()) {
        format.rewind(start);
        return ring.breakWith(layout.broken_memory, 0);
    }
    const done = batch.record_count;
    // Requests before a broken one are delivered; the next call meets it first.
    if (done == 0) outcome catch |reason| return switch (reason) {
        error.Full => ring.breakWith(layout.broken_segments, batch.segment_capacity),
        error.Broken => ring.breakWith(batch.reason, batch.value),
        error.Missing => linux.fail(.AGAIN),
    };
    ring.in_flight += done;
    return @intCast(done);
}

/// Gives requests back to the driver. Returns 1 when it must be called, 0
/// when not; -EINVAL (and nothing is published) when a head is not in flight,
/// -EPROTO or -EFAULT when the ring is broken, and the completions are lost;
/// -EAGAIN when the ring waits for the IOTLB (`misses`) and nothing is taken.
pub fn push(handle: u32, completions: [*]const layout.Completion, count: u32) callconv(.c) i32 {
    const ring = rings.get(handle) orelse return linux.fail(.BADF);
    if (!ring.isUsable()) return ring.failure();
    const entered = ring.enter();
    if (entered != 0) return entered;
    defer ring.leave();
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
    ring.in_flight -= count;
    ring.pushed += count;
    return switch (ring.format) {
        inline else => |*format| pushTo(ring, format, completions[0..count]),
    };
}

inline fn pushTo(ring: *Ring, format: anytype, completions: []const layout.Completion) i32 {
    const old = format.usedPosition();
    if (ring.log) |log| log.begin(ring.memory);
    defer if (ring.log) |log| log.end(ring.memory);
    if (ring.is_in_order) {
        ring.publishOrdered(format);
    } else {
        for (completions) |completion| {
            if (ring.log) |log| log.settle(completion.head);
            format.retire(completion.head);
            format.publish(ring, completion.head, completion.written, format.stepsOf(completion.head));
        }
    }
    return ring.announce(format, old);
}

/// Asks for kicks. Returns 1 when there is already more to pop, for which no
/// kick may come: the caller must pop before it waits. -EAGAIN as `pop`.
pub fn arm(handle: u32) callconv(.c) i32 {
    const ring = rings.get(handle) orelse return linux.fail(.BADF);
    if (!ring.isUsable()) return ring.failure();
    const entered = ring.enter();
    if (entered != 0) return entered;
    defer ring.leave();
    return switch (ring.format) {
        inline else => |*format| {
            const has_more = format.arm(ring);
            if (ring.log) |log| format.markEvent(ring, log);
            return @intFromBool(has_more);
        },
    };
}

/// Asks for no kicks, as long as the queue is polled.
pub fn disarm(handle: u32) callconv(.c) i32 {
    const ring = rings.get(handle) orelse return linux.fail(.BADF);
    if (!ring.isUsable()) return ring.failure();
    const entered = ring.enter();
    if (entered != 0) return entered;
    defer ring.leave();
    switch (ring.format) {
        inline else => |*format| {
            format.disarm(ring);
            if (ring.log) |log| format.markEvent(ring, log);
        },
    }
    return 0;
}

/// What the last pop, or the call that returned -EAGAIN, lacked; how many.
pub fn misses(handle: u32, out: [*]layout.IotlbMiss, capacity: u32) callconv(.c) i32 {
    const ring = rings.get(handle) orelse return linux.fail(.BADF);
    const where = ring.iova orelse return 0;
    const count = @min(where.miss_count, capacity);
    @memcpy(out[0..count], where.misses[0..count]);
    return @intCast(count);
}

pub fn state(handle: u32, state_out: *layout.RingState) callconv(.c) i32 {
    const ring = rings.get(handle) orelse return linux.fail(.BADF);
    state_out.* = .{
        .last_available = switch (ring.format) {
            inline else => |*format| format.base(),
        },
        .used_index = switch (ring.format) {
            inline else => |*format| format.usedPosition(),
        },
        .in_flight = ring.in_flight,
        .to_resubmit = switch (ring.format) {
            inline else => |*format| format.toResubmit(),
        },
        .reserved = 0,
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
    _ = iova_areas;
    _ = @import("written_test.zig");
    _ = split;
    _ = packed_ring;
    _ = @import("split_test.zig");
    _ = @import("packed_test.zig");
    _ = @import("hostile_test.zig");
    _ = @import("packed_hostile_test.zig");
    _ = @import("in_order_test.zig");
    _ = inflight;
    _ = @import("inflight_test.zig");
    _ = @import("iova_test.zig");
    _ = @import("wakeup_test.zig");
}
