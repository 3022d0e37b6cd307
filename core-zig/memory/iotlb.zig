//! The device IOTLB of one memory (vhost-user, "IOMMU support"): which I/O
//! virtual addresses the front-end has translated so far, and what the device
//! may do there. It is a cache: what is missing is asked for again.
//!
//! Whoever translates holds `lock` shared, for as long as it uses what it got;
//! whoever changes entries holds it alone. So when `invalidate` returns, no
//! ring operation that still runs goes by what it took away, and none that
//! begins later finds it.
//!
//! The number of entries is bounded. A full cache evicts rather than refuses:
//! a guest whose working set is larger must go on, if slowly. What is evicted
//! is drawn at random, so that no pattern of accesses can starve itself for
//! ever, and sparing the areas of rings: those are looked up all the time, and
//! a ring that stops must be able to publish what it has completed.

const std = @import("std");
const layout = @import("../layout.zig");
const sync = @import("../sync.zig");
const SharedLock = @import("../shared_lock.zig").SharedLock;

/// 512 KiB per device; one chain needs at most some 2048 at once.
pub const max_entries: u32 = 1 << 14;
const first_capacity: u32 = 128;
/// Draws before an area of a ring is evicted after all.
const max_draws = 16;

/// A range of IOVAs, `last` inclusive. Entries do not overlap.
pub const Entry = struct {
    start: u64,
    last: u64,
    /// What `start` translates to, in `Iotlb.space`.
    target: u64,
    /// access_read, access_write or both.
    access: u32,
    /// An area of a ring is here. Set by readers, which may be several.
    is_ring: std.atomic.Value(bool) = .init(false),

    fn at(self: *const Entry, iova: u64) u64 {
        return self.target + (iova - self.start);
    }
};

pub const Iotlb = struct {
    lock: SharedLock = .{},
    /// In the order of IOVAs; the first `count` are in use.
    entries: []Entry = &.{},
    count: u32 = 0,
    /// Counts what took a translation away: who remembers one looks here.
    removals: u64 = 0,
    /// In which space targets are: space_uva, or space_gpa (GPA_ADDRESSES).
    space: u32 = layout.space_uva,
    random: std.Random.SplitMix64 = .init(0),

    /// The entry that holds `iova`; `hint` is where the last one was. Under
    /// the lock, shared.
    pub fn find(self: *const Iotlb, hint: *u32, iova: u64) ?*Entry {
        const index = hint.*;
        if (index < self.count) {
            const entry = &self.entries[index];
            if (entry.start <= iova and iova <= entry.last) return entry;
        }
        const found = self.firstFrom(iova);
        if (found == self.count or self.entries[found].start > iova) return null;
        hint.* = found;
        return &self.entries[found];
    }

    /// -EINVAL for a range that is empty or wraps; -ENOMEM.
    pub fn update(self: *Iotlb, start: u64, size: u64, target: u64, access: u32) error{ Invalid, OutOfMemory }!void {
        const last = lastOf(start, size) orelse return error.Invalid;
        if (lastOf(target, size) == null) return error.Invalid;
        if (access == 0 or access & ~(layout.access_read | layout.access_write) != 0) return error.Invalid;
        self.lock.lock();
        defer self.lock.unlock();
        // Two queues may have asked for the same: nothing changes.
        var hint: u32 = 0;
        if (self.find(&hint, start)) |entry| {
            if (entry.last >= last and entry.at(start) == target and entry.access == access) return;
        }
        if (self.cut(start, last)) self.removals += 1;
        try self.reserve();
        const index = self.firstFrom(start);
        self.insert(index, .{ .start = start, .last = last, .target = target, .access = access });
        self.join(index);
        if (index > 0) self.join(index - 1);
    }

    /// Takes away all of the range, whatever entries it is in.
    pub fn invalidate(self: *Iotlb, start: u64, size: u64) error{Invalid}!void {
        const last = lastOf(start, size) orelse return error.Invalid;
        self.lock.lock();
        defer self.lock.unlock();
        if (self.cut(start, last)) self.removals += 1;
    }

    /// Forgets everything; later targets are in `space`.
    pub fn clear(self: *Iotlb, space: u32) void {
        self.lock.lock();
        defer self.lock.unlock();
        sync.allocator.free(self.entries);
        self.entries = &.{};
        self.count = 0;
        self.removals += 1;
        self.space = space;
    }

    /// The last address of a range; null when it is empty or passes 2^64.
    fn lastOf(start: u64, size: u64) ?u64 {
        if (size == 0 or size - 1 > std.math.maxInt(u64) - start) return null;
        return start + (size - 1);
    }

    /// Index of the first entry that does not end before `iova`.
    fn firstFrom(self: *const Iotlb, iova: u64) u32 {
        var low: u32 = 0;
        var high = self.count;
        while (low < high) {
            const middle = low + (high - low) / 2;
            if (self.entries[middle].last < iova) low = middle + 1 else high = middle;
        }
        return low;
    }

    /// Whether anything was there.
    fn cut(self: *Iotlb, start: u64, last: u64) bool {
        var index = self.firstFrom(start);
        if (index == self.count or self.entries[index].start > last) return false;
        const first = &self.entries[index];
        if (first.start < start) {
            const whole = first.*;
            first.last = start - 1;
            index += 1;
            if (whole.last > last) {
                // Where there is no room the rest is forgotten: a miss brings
                // it back.
                if (self.count == max_entries or !self.grow()) return true;
                var rest = whole;
                rest.start = last + 1;
                rest.target = whole.at(last + 1);
                self.insert(index, rest);
                return true;
            }
        }
        var end = index;
        while (end < self.count and self.entries[end].last <= last) end += 1;
        self.remove(index, end);
        if (index < self.count and self.entries[index].start <= last) {
            const tail = &self.entries[index];
            tail.target = tail.at(last + 1);
            tail.start = last + 1;
        }
        return true;
    }

    /// Room for one more entry.
    fn reserve(self: *Iotlb) error{OutOfMemory}!void {
        if (self.count < max_entries and self.grow()) return;
        if (self.count == 0) return error.OutOfMemory;
        var index: u32 = 0;
        for (0..max_draws) |_| {
            index = @intCast(self.random.next() % self.count);
            if (!self.entries[index].is_ring.load(.monotonic)) break;
        }
        // No removal: the front-end has taken nothing back, so a ring that
        // was evicted may go on with what it has translated.
        self.remove(index, index + 1);
    }

    fn grow(self: *Iotlb) bool {
        if (self.count < self.entries.len) return true;
        const wanted: usize = @max(first_capacity, self.entries.len * 2);
        const larger = sync.allocator.alloc(Entry, wanted) catch return false;
        @memcpy(larger[0..self.count], self.entries[0..self.count]);
        sync.allocator.free(self.entries);
        self.entries = larger;
        return true;
    }

    fn insert(self: *Iotlb, index: u32, entry: Entry) void {
        const moved = self.entries[index .. self.count + 1];
        @memmove(moved[1..], moved[0 .. moved.len - 1]);
        self.entries[index] = entry;
        self.count += 1;
    }

    fn remove(self: *Iotlb, from: u32, to: u32) void {
        if (from == to) return;
        @memmove(self.entries[from..][0 .. self.count - to], self.entries[to..self.count]);
        self.count -= to - from;
    }

    /// Makes one entry of `index` and the next where they say one thing: a
    /// guest in pass-through mode needs one for each region then.
    fn join(self: *Iotlb, index: u32) void {
        if (index + 1 >= self.count) return;
        const entry = &self.entries[index];
        const after = &self.entries[index + 1];
        if (entry.last + 1 != after.start or entry.access != after.access) return;
        if (entry.target +% (after.start - entry.start) != after.target or after.target == 0) return;
        entry.last = after.last;
        if (after.is_ring.load(.monotonic)) entry.is_ring.store(true, .monotonic);
        self.remove(index + 1, index + 2);
    }
};

test {
    _ = @import("iotlb_test.zig");
}
