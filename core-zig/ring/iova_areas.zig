//! A ring whose addresses are IOVAs: its three areas are translated again
//! whenever the IOTLB has lost something since, and while one of them is not
//! mapped nothing touches the ring. Also what a pop or a push found missing.

const std = @import("std");
const layout = @import("../layout.zig");
const linux = @import("../linux.zig");
const memory = @import("../memory/memory.zig");
const iova = @import("../memory/iova.zig");
const rings = @import("ring.zig");
const Ring = rings.Ring;

/// Of one ring, known at a time; more are found when these have come.
pub const max_misses = 32;
const no_view = std.math.maxInt(u32);

/// What the device does in the three areas. It reads where it stopped in the
/// used ring, too.
pub const split_accesses = [rings.areas]u32{ layout.access_read, layout.access_read, layout.access_read | layout.access_write };
pub const packed_accesses = [rings.areas]u32{ layout.access_read | layout.access_write, layout.access_read, layout.access_write };

pub const Areas = struct {
    addresses: [rings.areas]u64,
    lengths: [rings.areas]u32,
    alignments: [rings.areas]u32,
    accesses: [rings.areas]u32,
    /// Held; `no_view` where nothing was found yet.
    views: [rings.areas]u32 = @splat(no_view),
    /// The ring's pointers are those of this `Iotlb.removals`.
    removals: u64 = 0,
    is_mapped: bool = false,
    was_mapped: bool = false,
    /// The first time the inflight region is looked at, which needs the ring.
    config: layout.RingConfig,
    /// Why that was refused, as a negative errno.
    refused: i32 = 0,
    /// How often the one thread that uses the ring is inside.
    depth: u32 = 0,
    cache: iova.Cache = .{},
    misses: [max_misses]layout.IotlbMiss = undefined,
    miss_count: u32 = 0,

    /// From here to the last `leave` the IOTLB stands still. Returns 0 when the
    /// areas are mapped; else -EAGAIN with misses, or the ring's error, and there is
    /// nothing to leave.
    pub fn enter(self: *Areas, ring: *Ring) i32 {
        // Not twice: between the two a writer may have begun to wait for us.
        if (self.depth != 0) {
            self.depth += 1;
            return 0;
        }
        const iotlb = &ring.memory.iotlb;
        iotlb.lock.lockShared();
        self.miss_count = 0;
        if (!self.is_mapped or self.removals != iotlb.removals) {
            const result = self.map(ring);
            if (result != 0) {
                iotlb.lock.unlockShared();
                return result;
            }
        }
        self.depth = 1;
        return 0;
    }

    pub fn leave(self: *Areas, ring: *Ring) void {
        self.depth -= 1;
        if (self.depth == 0) ring.memory.iotlb.lock.unlockShared();
    }

    pub fn note(self: *Areas, address: u64, access: u32, reason: u32) void {
        if (self.isFull()) return;
        self.misses[self.miss_count] = .{ .iova = address, .access = access, .reason = reason };
        self.miss_count += 1;
    }

    pub fn isFull(self: *const Areas) bool {
        return self.miss_count == max_misses;
    }

    noinline fn map(self: *Areas, ring: *Ring) i32 {
        self.is_mapped = false;
        const table = ring.memory.enter();
        defer ring.memory.leave();
        var pointers: [rings.areas][*]u8 = undefined;
        var gpas: [rings.areas]u64 = undefined;
        for (0..rings.areas) |i| {
            var reason: u32 = undefined;
            const found = iova.run(ring.memory, table, &self.cache, self.addresses[i], self.lengths[i], self.accesses[i], &reason) orelse {
                self.note(self.addresses[i], self.accesses[i], reason);
                continue;
            };
            if (found.length < self.lengths[i]) {
                const at = self.addresses[i] + found.length;
                if (found.miss) |why| self.note(at, self.accesses[i], why) else return ring.breakWith(layout.broken_unmapped, at);
                continue;
            }
            // The region itself may be mapped at any offset.
            if (@intFromPtr(found.pointer) % self.alignments[i] != 0) return ring.breakWith(layout.broken_unmapped, self.addresses[i]);
            if (found.view != self.views[i]) {
                if (!ring.memory.hold(found.view)) return ring.breakWith(layout.broken_memory, 0);
                if (self.views[i] != no_view) ring.memory.unhold(self.views[i]);
                self.views[i] = found.view;
            }
            iova.keep(ring.memory, &self.cache, self.addresses[i], self.lengths[i]);
            pointers[i] = found.pointer;
            gpas[i] = table.gpaOf(found.view, found.offset) orelse return ring.breakWith(layout.broken_memory, 0);
        }
        if (self.miss_count != 0) return linux.fail(.AGAIN);
        switch (ring.format) {
            inline else => |*format| format.place(pointers, !self.was_mapped),
        }
        if (ring.log) |log| {
            log.descriptor_gpa = gpas[0];
            log.used_gpa = gpas[2];
        }
        if (!self.was_mapped and self.config.inflight != 0) {
            self.refused = ring.attach(&self.config);
            if (self.refused != 0) return ring.breakWith(if (ring.memory.isUsable()) layout.broken_inflight else layout.broken_memory, 0);
        }
        self.was_mapped = true;
        self.is_mapped = true;
        self.removals = ring.memory.iotlb.removals;
        return 0;
    }

    pub fn release(self: *Areas, of: *memory.Memory) void {
        for (self.views) |view| {
            if (view != no_view) of.unhold(view);
        }
        of.unpin();
    }
};
