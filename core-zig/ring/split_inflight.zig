//! The inflight region of a split ring.
//!
//! Taking head i: `counter`, then `inflight` = 1. Returning a batch: each
//! head's `next` leads to the one before it and `last_batch_head` to the last;
//! then used.idx, which is what the driver sees; then `inflight` = 0 for all
//! of them; then `used_idx`. So at the start `used_idx` other than used.idx
//! says that the last batch was published and may still be marked: it is
//! walked whole. All that is marked then was taken and not returned.

const std = @import("std");
const sync = @import("../sync.zig");
const inflight = @import("inflight.zig");
const store = inflight.store;
const load = inflight.load;

/// QueueRegionSplit, before its entries.
pub const Header = extern struct {
    features: u64,
    version: u16,
    desc_num: u16,
    last_batch_head: u16,
    used_idx: u16,
};

/// DescStateSplit, by head.
pub const Entry = extern struct {
    inflight: u8,
    padding: [5]u8,
    next: u16,
    counter: u64,
};

comptime {
    std.debug.assert(@sizeOf(Header) == 16 and @offsetOf(Header, "used_idx") == 14);
    std.debug.assert(@sizeOf(Entry) == 16 and @offsetOf(Entry, "next") == 6);
}

pub const SplitInflight = struct {
    header: *Header,
    entries: [*]Entry,
    /// Of the next request taken.
    counter: u64,
    last_batch_head: u16,
    /// Heads published since the last `settle`.
    batch: []u16,
    batch_count: u32 = 0,
    /// Heads to pop again, oldest first, those before `resubmitted` done.
    resubmits: []u16,
    resubmitted: u32 = 0,
    /// What was popped last was one of them.
    is_retaking: bool = false,
    /// An earlier run used the region.
    is_recovered: bool = false,

    /// Takes over what the region says, for a ring of `size` whose used index
    /// is `used_index`.
    pub fn init(area: inflight.Area, size: u32, used_index: u16) inflight.Error!SplitInflight {
        const header: *Header = @ptrCast(area.bytes);
        const entries: [*]Entry = @ptrCast(area.bytes + @sizeOf(Header));
        const batch = try sync.allocator.alloc(u16, size);
        errdefer sync.allocator.free(batch);
        var self: SplitInflight = .{ .header = header, .entries = entries, .counter = 0, .last_batch_head = 0, .batch = batch, .resubmits = &.{} };
        switch (load(&header.version)) {
            inflight.version_fresh => self.begin(area.queue_size, used_index),
            inflight.version => try self.recover(area.queue_size, size, used_index),
            else => return error.Damaged,
        }
        return self;
    }

    pub fn deinit(self: *SplitInflight) void {
        sync.allocator.free(self.batch);
        sync.allocator.free(self.resubmits);
    }

    fn begin(self: *SplitInflight, queue_size: u32, used_index: u16) void {
        for (self.entries[0..queue_size]) |*entry| store(&entry.inflight, 0);
        store(&self.header.desc_num, @intCast(queue_size));
        store(&self.header.last_batch_head, 0);
        store(&self.header.used_idx, used_index);
        // Last: from here on the rest counts.
        store(&self.header.version, inflight.version);
    }

    fn recover(self: *SplitInflight, queue_size: u32, size: u32, used_index: u16) inflight.Error!void {
        self.is_recovered = true;
        const count = load(&self.header.desc_num);
        if (count < size or count > queue_size) return error.Damaged;
        const published: u32 = used_index -% load(&self.header.used_idx);
        if (published > size) return error.Damaged;

        var is_returned = try std.DynamicBitSetUnmanaged.initEmpty(sync.allocator, size);
        defer is_returned.deinit(sync.allocator);
        self.last_batch_head = load(&self.header.last_batch_head);
        var head = self.last_batch_head;
        for (0..published) |_| {
            // Also the end of every cycle.
            if (head >= size or is_returned.isSet(head)) return error.Damaged;
            is_returned.set(head);
            head = load(&self.entries[head].next);
        }
        const taken = try sync.allocator.alloc(inflight.Taken, size);
        defer sync.allocator.free(taken);
        var open: u32 = 0;
        for (self.entries[0..count], 0..) |*entry, i| {
            if (load(&entry.inflight) == 0 or (i < size and is_returned.isSet(i))) continue;
            // Marked for a ring that is larger than this one.
            if (i >= size) return error.Damaged;
            taken[open] = .{ .head = @intCast(i), .counter = load(&entry.counter) };
            open += 1;
        }
        self.counter = inflight.Taken.sort(taken[0..open]);
        self.resubmits = try sync.allocator.alloc(u16, open);
        for (self.resubmits, taken[0..open]) |*to, from| to.* = from.head;

        // Nothing can fail any more. After a crash in here it is done again.
        var returned = is_returned.iterator(.{});
        while (returned.next()) |i| store(&self.entries[i].inflight, 0);
        store(&self.header.used_idx, used_index);
    }

    /// Heads still to be popped again.
    pub inline fn pending(self: *const SplitInflight) u32 {
        return @as(u32, @intCast(self.resubmits.len)) - self.resubmitted;
    }

    /// `head` is the device's now.
    pub inline fn take(self: *SplitInflight, head: u16) void {
        const entry = &self.entries[head];
        store(&entry.counter, self.counter);
        self.counter +%= 1;
        store(&entry.inflight, 1);
        self.is_retaking = false;
    }

    /// The next one of `resubmits` was popped.
    pub inline fn retake(self: *SplitInflight) void {
        self.resubmitted += 1;
        self.is_retaking = true;
    }

    /// As if `head`, which was popped last, had not been; true if that was not
    /// for the first time.
    pub inline fn untake(self: *SplitInflight, head: u16) bool {
        if (self.is_retaking) {
            self.resubmitted -= 1;
        } else {
            store(&self.entries[head].inflight, 0);
            self.counter -%= 1;
        }
        return self.is_retaking;
    }

    /// `head` is in the used ring, which the driver does not see yet.
    pub inline fn publish(self: *SplitInflight, head: u16) void {
        store(&self.entries[head].next, self.last_batch_head);
        store(&self.header.last_batch_head, head);
        self.last_batch_head = head;
        self.batch[self.batch_count] = head;
        self.batch_count += 1;
    }

    /// The driver sees the batch: used.idx is `used_index`.
    pub inline fn settle(self: *SplitInflight, used_index: u16) void {
        for (self.batch[0..self.batch_count]) |head| store(&self.entries[head].inflight, 0);
        self.batch_count = 0;
        store(&self.header.used_idx, used_index);
    }
};
