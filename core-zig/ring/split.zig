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

const std = @import("std");
const layout = @import("../layout.zig");
const chain = @import("chain.zig");
const prefetch = @import("../prefetch.zig");
const Ring = @import("ring.zig").Ring;
const Written = @import("written.zig").Written;
const inflight = @import("inflight.zig");
const SplitInflight = @import("split_inflight.zig").SplitInflight;

/// `avail.flags` and `used.flags`, both meaningless with EVENT_IDX.
pub const flag_no_interrupt: u16 = 1;
pub const flag_no_notify: u16 = 1;

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

/// Bytes of the three areas (2.7), and what each is aligned to.
pub fn areaLengths(size: u32) [3]u32 {
    return .{ chain.descriptor_size * size, Available.byteCount(size), Used.byteCount(size) };
}
pub const alignments = [3]u32{ 16, 2, 4 };

/// What a ring has of this format. The pointers are into guest memory.
pub const Split = struct {
    descriptors: [*]align(16) const [2]u64,
    available: *Available,
    used: *Used,
    /// Nobody has said where to begin.
    is_resumed: bool,
    last_available: u16,
    used_index: u16,
    /// Where the front-end gave a region for it.
    inflight: ?SplitInflight = null,

    /// `place` comes next. Without a start it goes on where the used ring ends.
    pub fn init(start: ?u32) Split {
        return .{ .descriptors = undefined, .available = undefined, .used = undefined, .is_resumed = start == null, .last_available = @truncate(start orelse 0), .used_index = 0 };
    }

    /// Where the areas are, from now on.
    pub fn place(self: *Split, pointers: [3][*]u8, is_first: bool) void {
        self.descriptors = @ptrCast(@alignCast(pointers[0]));
        self.available = @ptrCast(@alignCast(pointers[1]));
        self.used = @ptrCast(@alignCast(pointers[2]));
        if (!is_first) return;
        // The driver may have been reset since: what it reads counts.
        self.used_index = @atomicLoad(u16, &self.used.index, .acquire);
        if (self.is_resumed) self.last_available = self.used_index;
    }

    /// Goes on where the region says that an earlier run ended.
    pub fn track(self: *Split, area: inflight.Area, size: u32) inflight.Error!void {
        const tracker: SplitInflight = try .init(area, size, self.used_index);
        if (tracker.is_recovered) {
            self.last_available = self.used_index +% @as(u16, @intCast(tracker.pending()));
        }
        self.inflight = tracker;
    }

    pub fn release(self: *Split) void {
        if (self.inflight) |*tracker| tracker.deinit();
    }

    /// Requests to pop before any new one.
    pub fn toResubmit(self: *const Split) u32 {
        return if (self.inflight) |*tracker| tracker.pending() else 0;
    }

    /// As SET_VRING_BASE carries it.
    pub fn base(self: *const Split) u32 {
        return self.last_available;
    }
    pub inline fn position(self: *const Split) u16 {
        return self.last_available;
    }
    pub fn rewind(self: *Split, to: u16) void {
        self.last_available = to;
    }
    pub inline fn usedPosition(self: *const Split) u16 {
        return self.used_index;
    }

    /// Pops into the batch until it is full, the ring empty or a rule broken.
    /// Requests of an earlier run come first, and not together with new ones.
    pub inline fn take(self: *Split, ring: *Ring, batch: anytype, max: u32) chain.Error!void {
        if (self.toResubmit() != 0) return self.retake(ring, batch, max);
        // Acquire: pairs with the driver's barrier before it stores avail.idx;
        // heads and descriptors are read after it.
        const index = @atomicLoad(u16, &self.available.index, .acquire);
        const pending: u32 = index -% self.last_available;
        if (pending > ring.size) return batch.breach(layout.broken_available_index, index);
        const count = @min(pending, max);
        const mask = ring.size - 1;
        defer self.last_available +%= @intCast(batch.record_count);

        var ahead: Ahead = .{ .ring = self, .start = self.last_available, .count = count, .mask = mask };
        for (0..count) |_| {
            const head: u32 = ahead.next(batch);
            batch.begin();
            try ring.requireFree(batch, head);
            try self.walk(ring, batch, head);
            try batch.finish(head, @truncate(ring.popped));
            if (self.inflight) |*tracker| tracker.take(@intCast(head));
            ring.own(batch, head);
        }
        self.expectPush(ring, count);
    }

    /// Takes chains of one buffer, up to the first of another shape.
    pub inline fn takeSingles(self: *Split, ring: *const Ring, taker: anytype, max: u32) void {
        // Acquire: as in `take`.
        const index = @atomicLoad(u16, &self.available.index, .acquire);
        const pending: u32 = index -% self.last_available;
        if (pending > ring.size) {
            // An error, for `take` to find.
            taker.has_other = true;
            return;
        }
        const count = @min(pending, max);
        const mask = ring.size - 1;
        const heads = self.available.ring();
        var heads_ahead: [Ahead.window]u16 = undefined;
        var read: u32 = 0;
        while (taker.count < count) {
            while (read < count and read < taker.count + Ahead.window) : (read += 1) {
                const head = @atomicLoad(u16, &heads[(self.last_available + read) & mask], .monotonic);
                prefetch.forReading(@ptrCast(&self.descriptors[head & mask]));
                heads_ahead[read % Ahead.window] = head;
            }
            const head = heads_ahead[taker.count % Ahead.window];
            if (!taker.add(.load(&self.descriptors[head & mask]), head)) break;
        }
        self.last_available +%= @intCast(taker.count);
        self.expectPush(ring, taker.count);
    }

    /// The last `count` of those are available again.
    pub inline fn untakeSingles(self: *Split, _: *const Ring, count: u32) void {
        self.last_available -%= @intCast(count);
    }

    /// So many requests will be used: the elements for them are wanted here.
    inline fn expectPush(self: *const Split, ring: *const Ring, count: u32) void {
        const in_line = 64 / @sizeOf(UsedElement);
        var index: u32 = self.used_index;
        const end = index + count;
        while (index < end) : (index += in_line) {
            prefetch.forWriting(@ptrCast(&self.used.ring()[index & (ring.size - 1)]));
        }
    }

    /// Heads are read before their turn, and what hangs on them, one after the
    /// other, is called from the driver's processor: descriptor, indirect table,
    /// the first buffer of that. Each is a round trip of a cache line, and they
    /// overlap with those of other requests.
    const Ahead = struct {
        ring: *const Split,
        start: u16,
        count: u32,
        mask: u32,
        heads: [window]u16 = undefined,
        taken: u32 = 0,
        /// How far each step is.
        read: u32 = 0,
        descriptors: u32 = 0,
        tables: u32 = 0,

        const window = 16;
        const read_ahead = 12;
        const descriptors_ahead = 8;
        const tables_ahead = 4;

        inline fn next(self: *Ahead, batch: anytype) u16 {
            const ring = self.ring;
            const list = ring.available.ring();
            while (self.read < self.count and self.read < self.taken + read_ahead) : (self.read += 1) {
                const head = @atomicLoad(u16, &list[(self.start + self.read) & self.mask], .monotonic);
                prefetch.forReading(@ptrCast(&ring.descriptors[head & self.mask]));
                self.heads[self.read % window] = head;
            }
            while (self.descriptors < self.count and self.descriptors < self.taken + descriptors_ahead) : (self.descriptors += 1) {
                batch.hint(self.descriptor(self.descriptors));
            }
            while (self.tables < self.count and self.tables < self.taken + tables_ahead) : (self.tables += 1) {
                batch.hintInside(self.descriptor(self.tables));
            }
            defer self.taken += 1;
            return self.heads[self.taken % window];
        }

        /// Only for hints: it is read again in its turn.
        inline fn descriptor(self: *const Ahead, index: u32) chain.Descriptor {
            return .load(&self.ring.descriptors[self.heads[index % window] & self.mask]);
        }
    };

    /// They are marked in the region already, and behind `last_available`.
    noinline fn retake(self: *Split, ring: *Ring, batch: anytype, max: u32) chain.Error!void {
        const tracker = &self.inflight.?;
        for (0..@min(tracker.pending(), max)) |_| {
            const head = tracker.resubmits[tracker.resubmitted];
            batch.begin();
            try ring.requireFree(batch, head);
            try self.walk(ring, batch, head);
            try batch.finish(head, @truncate(ring.popped));
            ring.own(batch, head);
            tracker.retake();
        }
    }

    /// The chain taken last is available again.
    pub inline fn untake(self: *Split, _: *Ring, head: u32) void {
        // One of an earlier run has its place behind `last_available` already.
        if (self.inflight) |*tracker| if (tracker.untake(@intCast(head))) return;
        self.last_available -%= 1;
    }

    inline fn walk(self: *Split, ring: *const Ring, batch: anytype, head: u32) chain.Error!void {
        var index = head;
        for (0..ring.size) |_| {
            const descriptor: chain.Descriptor = .load(&self.descriptors[index]);
            if (descriptor.flags & chain.flag_indirect != 0) {
                if (!ring.has_indirect or descriptor.flags & chain.flag_next != 0) {
                    return batch.breach(layout.broken_indirect_refused, index);
                }
                // Its WRITE flag means nothing (2.7.5.3.2).
                return chain.addIndirect(batch, descriptor.address, descriptor.length, ring.size);
            }
            try batch.add(descriptor, index);
            if (descriptor.flags & chain.flag_next == 0) return;
            if (descriptor.next >= ring.size) return batch.breach(layout.broken_next, descriptor.next);
            index = descriptor.next;
        }
        return batch.breach(layout.broken_loop, ring.size);
    }

    /// How far a request of this head takes the used index.
    pub inline fn stepsOf(_: *const Split, _: u32) u32 {
        return 1;
    }

    /// The request is published next, by itself or in a run.
    pub inline fn retire(self: *Split, head: u32) void {
        if (self.inflight) |*tracker| tracker.publish(@intCast(head));
    }

    /// Writes a used element; `announce` makes it visible.
    pub inline fn publish(self: *Split, ring: *const Ring, head: u32, length: u32, steps: u32) void {
        self.used.ring()[self.used_index & (ring.size - 1)] = .{ .id = head, .length = length };
        self.used_index +%= @intCast(steps);
    }

    /// Whether anything was published since `old`.
    pub inline fn announce(self: *Split, old: u16) bool {
        if (self.used_index == old) return false;
        // Release: elements, and the data behind them, before the index; pairs
        // with the driver's barrier after it reads used.idx. Full: the index
        // before the driver's wish is read; pairs with its barrier between
        // writing used_event (or flags) and looking at used.idx again.
        @atomicStore(u16, &self.used.index, self.used_index, .seq_cst);
        if (self.inflight) |*tracker| {
            inflight.stored();
            tracker.settle(self.used_index);
        }
        return true;
    }

    /// Marks used elements and used.idx, written since `old`.
    pub fn markUsed(self: *const Split, ring: *const Ring, log: *Written, old: u16) void {
        const address = log.ringAddress() orelse return;
        const mask = ring.size - 1;
        const first = old & mask;
        const count: u32 = self.used_index -% old;
        const straight = @min(count, ring.size - first);
        const elements = address +| @sizeOf(Used);
        log.writer.mark(elements +| @sizeOf(UsedElement) * @as(u64, first), @sizeOf(UsedElement) * straight);
        // Round the end of the ring.
        log.writer.mark(elements, @sizeOf(UsedElement) * (count - straight));
        log.writer.mark(address +| @offsetOf(Used, "index"), @sizeOf(u16));
    }

    /// Marks what `arm` and `disarm` write.
    pub fn markEvent(_: *const Split, ring: *const Ring, log: *const Written) void {
        const event = Used.byteCount(ring.size) - @sizeOf(u16);
        log.markRing(if (ring.has_event_idx) event else @offsetOf(Used, "flags"), @sizeOf(u16));
    }

    pub inline fn wantsCall(self: *Split, ring: *const Ring, old: u16) bool {
        if (ring.has_event_idx) {
            const event = @atomicLoad(u16, self.available.usedEvent(ring.size), .seq_cst);
            return isWanted(event, self.used_index, old);
        }
        return @atomicLoad(u16, &self.available.flags, .seq_cst) & flag_no_interrupt == 0;
    }

    /// Whether there is more to pop already.
    pub inline fn arm(self: *Split, ring: *const Ring) bool {
        // Full: the wish before the index is read; pairs with the driver's
        // barrier between storing avail.idx and reading avail_event (or
        // used.flags).
        if (ring.has_event_idx) {
            @atomicStore(u16, self.used.availableEvent(ring.size), self.last_available, .seq_cst);
        } else {
            @atomicStore(u16, &self.used.flags, 0, .seq_cst);
        }
        return @atomicLoad(u16, &self.available.index, .seq_cst) != self.last_available or self.toResubmit() != 0;
    }

    /// With EVENT_IDX the event stays behind at an index that has passed,
    /// which says the same.
    pub inline fn disarm(self: *Split, ring: *const Ring) void {
        if (!ring.has_event_idx) @atomicStore(u16, &self.used.flags, flag_no_notify, .monotonic);
    }
};
