//! The driver of a packed ring, for tests of its device side, over the memory
//! of the split ring's.

const std = @import("std");
const layout = @import("../layout.zig");
const packed_ring = @import("packed.zig");
const fake_guest = @import("fake_guest.zig");
const Guest = fake_guest.Guest;
const Position = packed_ring.Position;
const next = fake_guest.next;

/// Both positions at the start, with their wrap counters set.
pub const first_base: u32 = 0x8000_8000;

/// A buffer: address, length, flags without NEXT.
pub const Part = struct { u64, u32, u16 };
pub const Used = struct { id: u16, length: u32 };

pub const PackedGuest = struct {
    guest: *Guest,
    size: u32,
    /// Where the next chain goes, and where the next used descriptor will be.
    available: Position,
    used: Position,
    /// Descriptors of the chain, by buffer id.
    lengths: [64]u32 = @splat(0),

    pub const table = Guest.descriptors;
    pub const driver_event = Guest.available;
    pub const device_event = Guest.used;

    pub fn start(options: fake_guest.Options) !PackedGuest {
        var all = options;
        all.features |= fake_guest.feature_packed;
        if (all.base == 0) all.base = first_base;
        const guest = try Guest.start(all);
        var self: PackedGuest = .{
            .guest = guest,
            .size = options.size,
            .available = @bitCast(@as(u16, @truncate(all.base))),
            .used = @bitCast(@as(u16, @truncate(all.base >> 16))),
        };
        // As the lap before left it: all used, none available.
        for (0..options.size) |slot| {
            const flags = if (slot < self.available.slot) self.available.usedFlags() else ~self.available.usedFlags() & 0x8080;
            self.describe(@intCast(slot), 0, 0, 0, flags);
        }
        return self;
    }

    pub fn stop(self: *PackedGuest) void {
        self.guest.stop();
    }

    pub fn describe(self: *PackedGuest, slot: u32, address: u64, length: u32, id: u16, flags: u16) void {
        self.guest.describe(table, slot, address, length, id, flags);
    }

    /// Makes a chain available.
    pub fn offer(self: *PackedGuest, id: u16, parts: []const Part) void {
        const head = self.available;
        var at = head;
        for (parts, 0..) |part, i| {
            const is_last = i + 1 == parts.len;
            const more: u16 = if (is_last) 0 else next;
            // Only the last one's id counts.
            const own_id = if (is_last) id else 0xffff;
            const flags = if (i == 0) 0 else at.availableFlags();
            self.describe(at.slot, part[0], part[1], own_id, part[2] | more | flags);
            at = at.after(1, self.size);
        }
        const flags_gpa = table + 16 * @as(u64, head.slot) + 14;
        const old = self.guest.get(u16, flags_gpa) & ~@as(u16, 0x8080);
        if (id < self.lengths.len) self.lengths[id] = @intCast(parts.len);
        self.available = at;
        self.guest.put(u16, flags_gpa, old | head.availableFlags());
    }

    /// The next used descriptor, if there is one.
    pub fn take(self: *PackedGuest) ?Used {
        const gpa = table + 16 * @as(u64, self.used.slot);
        const flags = self.guest.get(u16, gpa + 14);
        if (flags & 0x8080 != self.used.usedFlags()) return null;
        const found: Used = .{ .id = self.guest.get(u16, gpa + 12), .length = self.guest.get(u32, gpa + 8) };
        self.used = self.used.after(self.lengths[found.id], self.size);
        return found;
    }

    pub fn wantCalls(self: *PackedGuest, wish: u32) void {
        self.guest.put(u32, driver_event, wish);
    }

    pub fn deviceWish(self: *PackedGuest) u32 {
        return self.guest.get(u32, device_event);
    }
};
