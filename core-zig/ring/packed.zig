//! The packed virtqueue (virtio 1.3, 2.8), device side. One ring of descriptors
//! for both directions: the driver makes a chain available by writing its
//! descriptors one behind the other, the flags of the first one last; we give
//! it back by overwriting a descriptor, at a position of our own, with its
//! buffer id and length, and skip as many as the chain had. Each side has a
//! wrap counter, a bit that flips whenever its position passes the end of the
//! ring; the AVAIL and USED flags of a descriptor say by it in which lap they
//! were written.
//!
//! Each side has a structure in which it says when to be told: always, never,
//! or (EVENT_IDX) when a position and wrap counter is passed. As in the split
//! ring, whoever publishes a descriptor and then reads the other's wish, or
//! writes a wish and then looks at a descriptor again, needs a full barrier
//! between the two: a seq_cst store and a seq_cst load.

const std = @import("std");
const layout = @import("../layout.zig");
const sync = @import("../sync.zig");
const chain = @import("chain.zig");
const prefetch = @import("../prefetch.zig");
const isWanted = @import("split.zig").isWanted;
const Ring = @import("ring.zig").Ring;
const Written = @import("written.zig").Written;
const inflight = @import("inflight.zig");
const PackedInflight = @import("packed_inflight.zig").PackedInflight;

/// Further flags of a descriptor, and where each field is in its second word.
pub const flag_available: u16 = 1 << 7;
pub const flag_used: u16 = 1 << 15;
/// They say in which lap a descriptor was written, and by whom.
pub const lap_flags: u16 = flag_available | flag_used;
const id_shift = 32;
const flags_shift = 48;

/// The second word of a descriptor.
pub inline fn secondWord(flags: u16, id: u16, length: u32) u64 {
    return @as(u64, flags) << flags_shift | @as(u64, id) << id_shift | length;
}

pub inline fn flagsOf(second: u64) u16 {
    return @truncate(second >> flags_shift);
}

pub inline fn idOf(second: u64) u16 {
    return @truncate(second >> id_shift);
}

/// Event suppression (2.8.10), one word: position and wrap counter, then flags.
pub const event_enable: u32 = 0 << 16;
pub const event_disable: u32 = 1 << 16;
pub const event_descriptor: u32 = 2 << 16;
const event_flags: u32 = 3 << 16;

pub fn areaLengths(size: u32) [3]u32 {
    return .{ chain.descriptor_size * size, 4, 4 };
}
pub const alignments = [3]u32{ 16, 4, 4 };

/// A place in the ring and the wrap counter there, as event suppression and
/// SET_VRING_BASE carry it: 15 bits and one.
pub const Position = packed struct(u16) {
    slot: u15,
    wrap: bool,

    /// `count` descriptors further, which are at most `size`.
    pub inline fn after(self: Position, count: u32, size: u32) Position {
        const slot = self.slot + count;
        if (slot < size) return .{ .slot = @intCast(slot), .wrap = self.wrap };
        return .{ .slot = @intCast(slot - size), .wrap = !self.wrap };
    }

    /// `count` descriptors back, which are at most `size`.
    pub inline fn before(self: Position, count: u32, size: u32) Position {
        if (self.slot >= count) return .{ .slot = @intCast(self.slot - count), .wrap = self.wrap };
        return .{ .slot = @intCast(self.slot + size - count), .wrap = !self.wrap };
    }

    pub inline fn bits(self: Position) u16 {
        return @bitCast(self);
    }

    /// AVAIL and USED as the driver sets them here.
    pub inline fn availableFlags(self: Position) u16 {
        return if (self.wrap) flag_available else flag_used;
    }

    /// As the device sets them here.
    pub inline fn usedFlags(self: Position) u16 {
        return if (self.wrap) flag_available | flag_used else 0;
    }
};

/// The same where a ring is walked: AVAIL and USED as the driver sets them, and
/// not a bit to make them of.
const Cursor = struct {
    slot: u32,
    available: u16,

    inline fn init(at: Position) Cursor {
        return .{ .slot = at.slot, .available = at.availableFlags() };
    }

    inline fn position(self: Cursor) Position {
        return .{ .slot = @intCast(self.slot), .wrap = self.available == flag_available };
    }

    /// At most `size`.
    inline fn advance(self: *Cursor, count: u32, size: u32) void {
        self.slot += count;
        if (self.slot < size) return;
        self.slot -= size;
        self.available ^= lap_flags;
    }
};

/// Whether the side that wrote `event` wants to be told of the step from `old`
/// to `new`, which is not longer than the ring.
pub inline fn isPassed(event: Position, new: Position, old: Position, size: u32) bool {
    // All counted from the start of the lap in which `new` is.
    const length: u16 = @intCast(size);
    const start = if (old.wrap == new.wrap) old.slot else @as(u16, old.slot) -% length;
    const at = if (event.wrap == new.wrap) event.slot else @as(u16, event.slot) -% length;
    return isWanted(at, new.slot, start);
}

/// Whether both positions of a base (available, then used) are in the ring.
pub fn isBase(value: u32, size: u32) bool {
    return value & 0x7fff < size and value >> 16 & 0x7fff < size;
}

/// What a ring has of this format. The pointers are into guest memory.
pub const Packed = struct {
    descriptors: [*]align(16) [2]u64,
    driver_event: *const u32,
    device_event: *u32,
    /// Where the driver's next chain will be, and our next used descriptor.
    available: Position,
    used: Position,
    /// Descriptors of the requests in flight.
    outstanding: u32 = 0,
    /// Per buffer id in flight: descriptors of its chain.
    lengths: []u16 = &.{},
    /// The first used descriptor of a push is written last, so that the driver
    /// sees none or all of them.
    has_first: bool = false,
    first_slot: u16 = undefined,
    first_word: u64 = undefined,
    is_disarmed: bool = false,
    /// Descriptors of the chain taken last.
    stride: u32 = 1,
    /// Where the front-end gave a region for it.
    inflight: ?PackedInflight = null,

    /// `place` comes next.
    pub fn init(start: u32) Packed {
        return .{
            .descriptors = undefined,
            .driver_event = undefined,
            .device_event = undefined,
            .available = @bitCast(@as(u16, @truncate(start))),
            .used = @bitCast(@as(u16, @truncate(start >> 16))),
        };
    }

    /// Where the areas are, from now on.
    pub fn place(self: *Packed, pointers: [3][*]u8, _: bool) void {
        self.descriptors = @ptrCast(@alignCast(pointers[0]));
        self.driver_event = @ptrCast(@alignCast(pointers[1]));
        self.device_event = @ptrCast(@alignCast(pointers[2]));
    }

    pub fn allocate(self: *Packed, size: u32) bool {
        self.lengths = sync.allocator.alloc(u16, size) catch return false;
        return true;
    }

    /// Goes on where the region says that an earlier run ended: a front-end
    /// whose back-end crashed cannot know.
    pub fn track(self: *Packed, area: inflight.Area, size: u32) inflight.Error!void {
        const tracker: PackedInflight = try .init(area, size, self.descriptors, self.used);
        if (tracker.is_recovered) {
            self.used = tracker.old_used;
            self.outstanding = tracker.outstanding();
            self.available = self.used.after(self.outstanding, size);
        }
        self.inflight = tracker;
    }

    /// Requests to pop before any new one.
    pub fn toResubmit(self: *const Packed) u32 {
        return if (self.inflight) |*tracker| tracker.pending() else 0;
    }

    pub fn release(self: *Packed) void {
        if (self.inflight) |*tracker| tracker.deinit();
        sync.allocator.free(self.lengths);
    }

    /// As SET_VRING_BASE carries it: position and wrap counter of what is
    /// available, then of what is used.
    pub fn base(self: *const Packed) u32 {
        return self.available.bits() | @as(u32, self.used.bits()) << 16;
    }
    pub inline fn position(self: *const Packed) Position {
        return self.available;
    }
    pub fn rewind(self: *Packed, to: Position) void {
        self.available = to;
    }
    pub inline fn usedPosition(self: *const Packed) u16 {
        return self.used.bits();
    }

    /// The second word of a descriptor, if the driver has made it available.
    inline fn availableAt(self: *const Packed, at: Cursor, comptime order: std.builtin.AtomicOrder) ?u64 {
        // One read for length, id and flags: the driver writes the flags last.
        const word = @atomicLoad(u64, &self.descriptors[at.slot][1], order);
        const flags: u16 = @truncate(word >> flags_shift);
        return if (flags & lap_flags == at.available) word else null;
    }

    /// Pops into the batch until it is full, the ring empty or a rule broken.
    /// Requests of an earlier run come first, and not together with new ones.
    pub inline fn take(self: *Packed, ring: *Ring, batch: anytype, max: u32) chain.Error!void {
        if (self.toResubmit() != 0) return self.retake(ring, batch, max);
        // In registers: for all that the compiler knows the batch is the ring.
        var at: Cursor = .init(self.available);
        var outstanding = self.outstanding;
        defer {
            self.available = at.position();
            self.outstanding = outstanding;
        }
        for (0..max) |_| {
            // Acquire: pairs with the driver's barrier before it stores the
            // flags of a chain's first descriptor; all else is read after it.
            const word = self.availableAt(at, .acquire) orelse return;
            self.lookAhead(ring, batch, at);
            const left = ring.size - outstanding;
            if (left == 0) return batch.breach(layout.broken_available_index, at.slot);
            batch.begin();
            if (self.inflight) |*tracker| tracker.beginChain();
            const count, const last = try self.walk(ring, batch, at.slot, word, left);
            // It is the last one's that counts.
            const id: u32 = @as(u16, @truncate(last >> id_shift));
            try ring.requireFree(batch, id);
            try batch.finish(id, @truncate(ring.popped));
            if (self.inflight) |*tracker| tracker.commit(@intCast(id));
            ring.own(batch, id);
            self.lengths[id] = @intCast(count);
            self.stride = count;
            outstanding += count;
            // Where a request was, another one's used descriptor will be.
            prefetch.forWriting(@ptrCast(&self.descriptors[at.slot]));
            at.advance(count, ring.size);
        }
    }

    /// Takes chains of one buffer, up to the first of another shape.
    pub inline fn takeSingles(self: *Packed, ring: *const Ring, taker: anytype, max: u32) void {
        var at: Cursor = .init(self.available);
        const most = @min(max, ring.size - self.outstanding);
        while (taker.count < most) {
            // Acquire: as in `take`.
            const word = self.availableAt(at, .acquire) orelse break;
            const descriptor: chain.Descriptor = .{
                .address = @atomicLoad(u64, &self.descriptors[at.slot][0], .monotonic),
                .length = @truncate(word),
                .flags = flagsOf(word),
                .next = 0,
            };
            const id: u32 = idOf(word);
            if (!taker.add(descriptor, id)) break;
            // Four of them are in a line, and used ones take their place.
            if (at.slot % 4 == 0) prefetch.forWriting(@ptrCast(&self.descriptors[at.slot]));
            at.advance(1, ring.size);
        }
        self.available = at.position();
        self.outstanding += taker.count;
    }

    /// The last `count` of those are available again.
    pub inline fn untakeSingles(self: *Packed, ring: *const Ring, count: u32) void {
        self.outstanding -= count;
        self.available = self.available.before(count, ring.size);
    }

    /// What hangs on the chains some places on is called from the driver's
    /// processor: an indirect table, then the first buffer in it, or the first
    /// buffer. Each is a round trip of a cache line, and they overlap with those
    /// of other requests. Chains are taken to be as long as the last one.
    inline fn lookAhead(self: *const Packed, ring: *const Ring, batch: anytype, at: Cursor) void {
        if (self.hinted(ring, at, 8 * self.stride)) |descriptor| batch.hint(descriptor);
        if (self.hinted(ring, at, 4 * self.stride)) |descriptor| batch.hintInside(descriptor);
    }

    /// Only for hints: it is read again in its turn.
    inline fn hinted(self: *const Packed, ring: *const Ring, at: Cursor, ahead: u32) ?chain.Descriptor {
        if (ahead >= ring.size) return null;
        var there = at;
        there.advance(ahead, ring.size);
        const word = self.availableAt(there, .monotonic) orelse return null;
        const address = @atomicLoad(u64, &self.descriptors[there.slot][0], .monotonic);
        return .{ .address = address, .length = @truncate(word), .flags = flagsOf(word), .next = 0 };
    }

    /// Their descriptors are in the region and perhaps no longer in the ring;
    /// `available` is behind them already.
    noinline fn retake(self: *Packed, ring: *Ring, batch: anytype, max: u32) chain.Error!void {
        const tracker = &self.inflight.?;
        for (0..@min(tracker.pending(), max)) |_| {
            const resubmit = tracker.resubmits[tracker.resubmitted];
            batch.begin();
            try ring.requireFree(batch, resubmit.id);
            for (tracker.copies[resubmit.first..][0..resubmit.count], 0..) |copy, i| {
                const address, const second = copy;
                const flags = flagsOf(second);
                const has_more = i + 1 < resubmit.count;
                if (flags & chain.flag_indirect != 0) {
                    if (!ring.has_indirect or flags & chain.flag_next != 0 or resubmit.count != 1) {
                        return batch.breach(layout.broken_indirect_refused, resubmit.id);
                    }
                    try chain.addOrderedIndirect(batch, address, @truncate(second), ring.size);
                    break;
                }
                if ((flags & chain.flag_next != 0) != has_more) return batch.breach(layout.broken_next, resubmit.id);
                try batch.add(.{ .address = address, .length = @truncate(second), .flags = flags, .next = 0 }, @intCast(i));
            }
            try batch.finish(resubmit.id, @truncate(ring.popped));
            ring.own(batch, resubmit.id);
            self.lengths[resubmit.id] = resubmit.count;
            tracker.retake();
        }
    }

    /// The chain taken last is available again.
    pub inline fn untake(self: *Packed, ring: *Ring, id: u32) void {
        // One of an earlier run has its place behind `available` already.
        if (self.inflight) |*tracker| if (tracker.untake(@intCast(id))) return;
        const count = self.lengths[id];
        self.outstanding -= count;
        self.available = self.available.before(count, ring.size);
    }

    /// Returns how many descriptors the chain has, at most `limit`, and the
    /// second word of the last.
    inline fn walk(self: *Packed, ring: *const Ring, batch: anytype, start: u32, first: u64, limit: u32) chain.Error!struct { u32, u64 } {
        var slot = start;
        var word = first;
        var count: u32 = 1;
        while (true) : (count += 1) {
            const address = @atomicLoad(u64, &self.descriptors[slot][0], .monotonic);
            const flags: u16 = @truncate(word >> flags_shift);
            if (self.inflight) |*tracker| tracker.add(address, word);
            if (flags & chain.flag_indirect != 0) {
                // A table is the whole chain (2.8.7).
                if (!ring.has_indirect or flags & chain.flag_next != 0 or count != 1) {
                    return batch.breach(layout.broken_indirect_refused, slot);
                }
                try chain.addOrderedIndirect(batch, address, @truncate(word), ring.size);
                return .{ count, word };
            }
            try batch.add(.{ .address = address, .length = @truncate(word), .flags = flags, .next = 0 }, slot);
            if (flags & chain.flag_next == 0) return .{ count, word };
            if (count == limit) return batch.breach(layout.broken_loop, limit);
            slot = if (slot + 1 == ring.size) 0 else slot + 1;
            word = @atomicLoad(u64, &self.descriptors[slot][1], .monotonic);
        }
    }

    /// How many descriptors a request of this buffer id has.
    pub inline fn stepsOf(self: *const Packed, id: u32) u32 {
        return self.lengths[id];
    }

    /// The request is published next, by itself or in a run.
    pub inline fn retire(self: *Packed, id: u32) void {
        if (self.inflight) |*tracker| tracker.publish(@intCast(id));
    }

    /// Writes a used descriptor; `announce` makes it visible.
    pub inline fn publish(self: *Packed, ring: *const Ring, id: u32, written: u32, steps: u32) void {
        const flags = self.used.usedFlags() | if (written != 0) chain.flag_write else 0;
        const word = secondWord(flags, @intCast(id), written);
        if (self.has_first) {
            @atomicStore(u64, &self.descriptors[self.used.slot][1], word, .monotonic);
            if (self.inflight != null) inflight.stored();
        } else {
            self.has_first = true;
            self.first_slot = self.used.slot;
            self.first_word = word;
        }
        self.outstanding -= steps;
        self.used = self.used.after(steps, ring.size);
    }

    /// Whether anything was published.
    pub inline fn announce(self: *Packed, _: u16) bool {
        if (!self.has_first) return false;
        self.has_first = false;
        if (self.inflight) |*tracker| tracker.announce(self.used);
        // Release: the other used descriptors, and the data behind all of them,
        // before this one; pairs with the driver's barrier after it reads the
        // flags. Full: before the driver's wish is read; pairs with its barrier
        // between writing that and looking at the flags again.
        @atomicStore(u64, &self.descriptors[self.first_slot][1], self.first_word, .seq_cst);
        if (self.inflight) |*tracker| {
            inflight.stored();
            tracker.settle(self.used);
        }
        return true;
    }

    /// Marks the used descriptors written since `old`, and those between.
    pub fn markUsed(self: *const Packed, ring: *const Ring, log: *Written, old: u16) void {
        if (log.ringAddress() == null) return;
        const first: Position = @bitCast(old);
        const size = chain.descriptor_size;
        const start = log.descriptor_gpa + size * @as(u64, first.slot);
        if (first.wrap == self.used.wrap) {
            return log.writer.mark(start, size * @as(u64, self.used.slot - first.slot));
        }
        log.writer.mark(start, size * @as(u64, ring.size - first.slot));
        log.writer.mark(log.descriptor_gpa, size * @as(u64, self.used.slot));
    }

    /// Marks what `arm` and `disarm` write.
    pub fn markEvent(_: *const Packed, _: *const Ring, log: *const Written) void {
        log.markRing(0, @sizeOf(u32));
    }

    pub inline fn wantsCall(self: *Packed, ring: *const Ring, old: u16) bool {
        const wish = @atomicLoad(u32, self.driver_event, .seq_cst);
        return switch (wish & event_flags) {
            event_disable => false,
            event_descriptor => !ring.has_event_idx or
                isPassed(@bitCast(@as(u16, @truncate(wish))), self.used, @bitCast(old), ring.size),
            else => true,
        };
    }

    /// Whether there is more to pop already.
    pub inline fn arm(self: *Packed, ring: *const Ring) bool {
        const wish = if (ring.has_event_idx) event_descriptor | self.available.bits() else event_enable;
        self.is_disarmed = false;
        // Full: the wish before the flags are read; pairs with the driver's
        // barrier between storing those and reading the wish.
        @atomicStore(u32, self.device_event, wish, .seq_cst);
        return self.availableAt(.init(self.available), .seq_cst) != null or self.toResubmit() != 0;
    }

    /// Unlike the split ring's, an event that has passed comes again two laps
    /// later.
    pub inline fn disarm(self: *Packed, _: *const Ring) void {
        if (self.is_disarmed) return;
        self.is_disarmed = true;
        @atomicStore(u32, self.device_event, event_disable, .monotonic);
    }
};
