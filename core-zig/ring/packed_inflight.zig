//! The inflight region of a packed ring. The ring's slots are overwritten by
//! used descriptors while older requests are still in flight, so the region
//! holds copies of the descriptors, in entries from a list of free ones.
//!
//! What is being changed is `free_head`, `used_idx` and `used_wrap_counter`;
//! what counts is in `old_...`. Taking a chain: its entries are filled, then
//! `free_head` and `old_free_head` move behind them. Returning a batch: each
//! chain is put before the free ones and `free_head` moved to it; then
//! `used_idx`; then the flags of the first used descriptor, which is what the
//! driver sees; then `inflight` = 0 for all; then the `old_...` ones.
//!
//! At the start a `used` other than the old one says that a batch was under
//! way: were the driver's flags still there, it is rolled back, else it counts.
//! All that is marked and not in the free list then was taken and not
//! returned.
//!
//! The wrap counter belongs to the index: both are compared (a batch of a whole
//! lap ends where it began), and the old ones are set by one store, since with
//! one of them old and one new the driver's flags would be misread.

const std = @import("std");
const sync = @import("../sync.zig");
const inflight = @import("inflight.zig");
const chain = @import("chain.zig");
const packed_ring = @import("packed.zig");
const Position = packed_ring.Position;
const store = inflight.store;
const load = inflight.load;

/// QueueRegionPacked, before its entries.
pub const Header = extern struct {
    features: u64,
    version: u16,
    desc_num: u16,
    free_head: u16,
    old_free_head: u16,
    used: Used,
    padding: u64,

    /// used_idx, old_used_idx, used_wrap_counter, old_used_wrap_counter.
    pub const Used = packed struct(u64) {
        index: u16,
        old_index: u16,
        wrap: u8,
        old_wrap: u8,
        padding: u16 = 0,

        fn of(now: Position, old: Position) Used {
            return .{ .index = now.slot, .old_index = old.slot, .wrap = @intFromBool(now.wrap), .old_wrap = @intFromBool(old.wrap) };
        }

        fn position(index: u16, wrap: u8, size: u32) inflight.Error!Position {
            if (index >= size or wrap > 1) return error.Damaged;
            return .{ .slot = @intCast(index), .wrap = wrap == 1 };
        }
    };
};

/// DescStatePacked. `inflight`, `last`, `num` and `counter` count in a chain's
/// first entry only.
pub const Entry = extern struct {
    inflight: u8,
    padding: u8,
    next: u16,
    last: u16,
    num: u16,
    counter: u64,
    id: u16,
    flags: u16,
    len: u32,
    addr: u64,
};

comptime {
    std.debug.assert(@sizeOf(Header) == 32 and @offsetOf(Header, "used") == 16);
    std.debug.assert(@sizeOf(Entry) == 32 and @offsetOf(Entry, "id") == 16 and @offsetOf(Entry, "addr") == 24);
}

/// A descriptor as the ring had it: address, and length, id and flags.
pub const Copy = [2]u64;

/// A chain to pop again.
pub const Resubmit = struct {
    id: u16,
    /// Of its descriptors in `PackedInflight.copies`.
    first: u32,
    count: u16,
};

pub const PackedInflight = struct {
    header: *Header,
    entries: [*]Entry,
    /// Of the next request taken.
    counter: u64 = 0,
    /// Our own copy of the list of free entries, and of chains' links.
    next: []u16,
    free_head: u16 = 0,
    /// By buffer id: first and last entry of its chain.
    first: []u16,
    last: []u16,
    /// First entries of chains published since the last `settle`.
    batch: []u16,
    batch_count: u32 = 0,
    /// Where the used descriptors that count end.
    old_used: Position,

    // The chain under way: its first and last entry, and how many it has.
    head: u16 = 0,
    tail: u16 = 0,
    cursor: u16 = 0,
    count: u16 = 0,

    /// Chains to pop again, oldest first, those before `resubmitted` done.
    resubmits: []Resubmit = &.{},
    copies: []Copy = &.{},
    resubmitted: u32 = 0,
    /// What was popped last was one of them.
    is_retaking: bool = false,
    /// An earlier run used the region.
    is_recovered: bool = false,

    /// Takes over what the region says, for a ring of `size`. `used` is where a
    /// region that nobody has used begins.
    pub fn init(area: inflight.Area, size: u32, descriptors: [*]align(16) [2]u64, used: Position) inflight.Error!PackedInflight {
        const allocator = sync.allocator;
        const next = try allocator.alloc(u16, area.queue_size);
        errdefer allocator.free(next);
        const first = try allocator.alloc(u16, size);
        errdefer allocator.free(first);
        const last = try allocator.alloc(u16, size);
        errdefer allocator.free(last);
        const batch = try allocator.alloc(u16, size);
        errdefer allocator.free(batch);
        var self: PackedInflight = .{
            .header = @ptrCast(area.bytes),
            .entries = @ptrCast(area.bytes + @sizeOf(Header)),
            .next = next,
            .first = first,
            .last = last,
            .batch = batch,
            .old_used = used,
        };
        switch (load(&self.header.version)) {
            inflight.version_fresh => self.begin(),
            inflight.version => try self.recover(size, descriptors),
            else => return error.Damaged,
        }
        return self;
    }

    pub fn deinit(self: *PackedInflight) void {
        sync.allocator.free(self.next);
        sync.allocator.free(self.first);
        sync.allocator.free(self.last);
        sync.allocator.free(self.batch);
        sync.allocator.free(self.resubmits);
        sync.allocator.free(self.copies);
    }

    fn begin(self: *PackedInflight) void {
        for (self.next, self.entries[0..self.next.len], 1..) |*next, *entry, following| {
            next.* = @intCast(following);
            store(&entry.inflight, 0);
            store(&entry.next, next.*);
        }
        store(&self.header.desc_num, @intCast(self.next.len));
        store(&self.header.free_head, 0);
        store(&self.header.old_free_head, 0);
        store(&self.header.used, .of(self.old_used, self.old_used));
        // Last: from here on the rest counts.
        store(&self.header.version, inflight.version);
    }

    fn recover(self: *PackedInflight, size: u32, descriptors: [*]align(16) [2]u64) inflight.Error!void {
        self.is_recovered = true;
        const count = load(&self.header.desc_num);
        if (count < size or count > self.next.len) return error.Damaged;
        const used = load(&self.header.used);
        const now: Position = try Header.Used.position(used.index, used.wrap, size);
        const old: Position = try Header.Used.position(used.old_index, used.old_wrap, size);
        // Was the batch under way seen by the driver?
        const flags = packed_ring.flagsOf(@atomicLoad(u64, &descriptors[old.slot][1], .monotonic));
        const is_committed = now != old and flags & packed_ring.lap_flags != old.availableFlags();
        self.old_used = if (is_committed) now else old;
        self.free_head = if (is_committed) load(&self.header.free_head) else load(&self.header.old_free_head);

        var is_free = try std.DynamicBitSetUnmanaged.initEmpty(sync.allocator, count);
        defer is_free.deinit(sync.allocator);
        var accounted: u32 = 0;
        var index = self.free_head;
        while (index < count) {
            // Also the end of every cycle.
            if (is_free.isSet(index)) return error.Damaged;
            is_free.set(index);
            accounted += 1;
            self.next[index] = load(&self.entries[index].next);
            index = self.next[index];
        }
        if (index != count) return error.Damaged;
        try self.collect(count, size, accounted, &is_free);

        // Nothing can fail any more. After a crash in here it is done again.
        if (is_committed) {
            store(&self.header.old_free_head, self.free_head);
        } else {
            store(&self.header.free_head, self.free_head);
        }
        store(&self.header.used, .of(self.old_used, self.old_used));
        var free = is_free.iterator(.{});
        while (free.next()) |i| store(&self.entries[i].inflight, 0);
        self.restore(size, descriptors);
    }

    /// All chains in flight, checked and copied.
    fn collect(self: *PackedInflight, count: u16, size: u32, free_count: u32, is_free: *const std.DynamicBitSetUnmanaged) inflight.Error!void {
        const allocator = sync.allocator;
        var accounted = free_count;
        var is_seen = try is_free.clone(allocator);
        defer is_seen.deinit(allocator);
        var is_owned = try std.DynamicBitSetUnmanaged.initEmpty(allocator, size);
        defer is_owned.deinit(allocator);
        const taken = try allocator.alloc(inflight.Taken, count);
        defer allocator.free(taken);
        const lengths = try allocator.alloc(u16, size);
        defer allocator.free(lengths);
        var open: u32 = 0;
        var total: u32 = 0;
        for (self.entries[0..count], 0..) |*entry, i| {
            if (is_free.isSet(i) or load(&entry.inflight) == 0) continue;
            const length = load(&entry.num);
            const last = load(&entry.last);
            if (length == 0 or length > size - total) return error.Damaged;
            total += length;
            var index: u16 = @intCast(i);
            for (1..@as(u32, length) + 1) |step| {
                if (index >= count or is_seen.isSet(index)) return error.Damaged;
                is_seen.set(index);
                accounted += 1;
                if (step == length) break;
                self.next[index] = load(&self.entries[index].next);
                index = self.next[index];
            }
            if (index != last) return error.Damaged;
            const id = load(&self.entries[last].id);
            if (id >= size or is_owned.isSet(id)) return error.Damaged;
            is_owned.set(id);
            self.first[id] = @intCast(i);
            self.last[id] = last;
            lengths[id] = length;
            taken[open] = .{ .head = id, .counter = load(&entry.counter) };
            open += 1;
        }
        // One that is neither free nor in a chain would be lost for ever.
        if (accounted != count) return error.Damaged;
        self.counter = inflight.Taken.sort(taken[0..open]);
        const resubmits = try allocator.alloc(Resubmit, open);
        errdefer allocator.free(resubmits);
        const copies = try allocator.alloc(Copy, total);
        var at: u32 = 0;
        for (resubmits, taken[0..open]) |*resubmit, found| {
            const length = lengths[found.head];
            resubmit.* = .{ .id = found.head, .first = at, .count = length };
            var index = self.first[found.head];
            for (copies[at..][0..length]) |*copy| {
                const entry = &self.entries[index];
                copy.* = .{ load(&entry.addr), packed_ring.secondWord(load(&entry.flags), found.head, load(&entry.len)) };
                index = self.next[index];
            }
            at += length;
        }
        self.resubmits = resubmits;
        self.copies = copies;
    }

    /// Of a batch that was rolled back, all used descriptors but the first may
    /// be in the ring. They would count as soon as the driver gets there.
    fn restore(self: *const PackedInflight, size: u32, descriptors: [*]align(16) [2]u64) void {
        var at = self.old_used;
        for (0..self.copies.len) |_| {
            const slot = &descriptors[at.slot][1];
            const found = @atomicLoad(u64, slot, .monotonic);
            if (packed_ring.flagsOf(found) & packed_ring.lap_flags == at.usedFlags()) {
                store(slot, packed_ring.secondWord(at.availableFlags(), 0, 0));
            }
            at = at.after(1, size);
        }
    }

    /// Chains still to be popped again.
    pub inline fn pending(self: *const PackedInflight) u32 {
        return @as(u32, @intCast(self.resubmits.len)) - self.resubmitted;
    }

    /// Descriptors of all chains that were in flight at the start.
    pub fn outstanding(self: *const PackedInflight) u32 {
        return @intCast(self.copies.len);
    }

    /// A chain begins; only `commit` makes it count.
    pub inline fn beginChain(self: *PackedInflight) void {
        self.head = self.free_head;
        self.cursor = self.free_head;
        self.count = 0;
        const entry = &self.entries[self.head];
        store(&entry.num, 0);
        store(&entry.counter, self.counter);
        store(&entry.inflight, 1);
    }

    /// A descriptor of the chain under way. The ring has no more than there are
    /// entries.
    pub inline fn add(self: *PackedInflight, address: u64, second: u64) void {
        const entry = &self.entries[self.cursor];
        store(&entry.addr, address);
        store(&entry.len, @truncate(second));
        store(&entry.flags, packed_ring.flagsOf(second));
        store(&entry.id, packed_ring.idOf(second));
        self.tail = self.cursor;
        self.count += 1;
        self.cursor = self.next[self.cursor];
    }

    /// The chain under way is complete, and the device's.
    pub inline fn commit(self: *PackedInflight, id: u16) void {
        const entry = &self.entries[self.head];
        store(&entry.last, self.tail);
        store(&entry.num, self.count);
        self.first[id] = self.head;
        self.last[id] = self.tail;
        self.counter +%= 1;
        self.free_head = self.cursor;
        store(&self.header.free_head, self.free_head);
        store(&self.header.old_free_head, self.free_head);
        self.is_retaking = false;
    }

    /// The next one of `resubmits` was popped.
    pub inline fn retake(self: *PackedInflight) void {
        self.resubmitted += 1;
        self.is_retaking = true;
    }

    /// As if the chain, which was popped last, had not been; true if that was
    /// not for the first time.
    pub inline fn untake(self: *PackedInflight, id: u16) bool {
        if (self.is_retaking) {
            self.resubmitted -= 1;
            return true;
        }
        const head = self.first[id];
        const last = self.last[id];
        self.next[last] = self.free_head;
        store(&self.entries[last].next, self.free_head);
        self.free_head = head;
        store(&self.header.free_head, head);
        // From here on it is a free one, whatever its mark says.
        store(&self.header.old_free_head, head);
        store(&self.entries[head].inflight, 0);
        self.counter -%= 1;
        return false;
    }

    /// The chain's used descriptor is written, or will be by `announce`.
    pub inline fn publish(self: *PackedInflight, id: u16) void {
        const head = self.first[id];
        const last = self.last[id];
        self.next[last] = self.free_head;
        store(&self.entries[last].next, self.free_head);
        self.free_head = head;
        store(&self.header.free_head, head);
        self.batch[self.batch_count] = head;
        self.batch_count += 1;
    }

    /// The driver will see the batch next; its used descriptors end at `used`.
    pub inline fn announce(self: *PackedInflight, used: Position) void {
        store(&self.header.used, .of(used, self.old_used));
    }

    /// The driver sees the batch.
    pub inline fn settle(self: *PackedInflight, used: Position) void {
        for (self.batch[0..self.batch_count]) |head| store(&self.entries[head].inflight, 0);
        self.batch_count = 0;
        self.old_used = used;
        store(&self.header.old_free_head, self.free_head);
        store(&self.header.used, .of(used, used));
    }
};
