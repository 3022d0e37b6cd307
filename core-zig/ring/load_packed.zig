//! The driver's side of a packed ring, as the load generator uses it.

const std = @import("std");
const layout = @import("../layout.zig");
const packed_ring = @import("packed.zig");
const chain = @import("chain.zig");
const load = @import("load.zig");
const Position = packed_ring.Position;

const id_shift = 32;
const flags_shift = 48;

pub const Side = struct {
    descriptors: [*]align(16) [2]u64,
    driver_event: *u32,
    device_event: *const u32,
    size: u32,
    has_event_idx: bool,
    has_indirect: bool,
    /// What the driver wants to be called for is in memory already.
    is_wanted: ?bool = null,
    available: Position,
    used: Position,

    /// The first descriptor of what is new is written last, so that the device
    /// sees none or all of it.
    has_first: bool = false,
    first: Position = undefined,
    first_word: u64 = undefined,

    /// The chain under way: where it started and, indirect, its table.
    table: [*]align(16) [2]u64 = undefined,
    number: u32 = 0,
    count: u32 = 0,

    pub fn init(config: *const layout.LoadConfig) ?Side {
        const size = config.queue_size;
        if (config.position > std.math.maxInt(u16)) return null;
        const position_: Position = @bitCast(@as(u16, @intCast(config.position)));
        if (position_.slot >= size) return null;
        return .{
            .descriptors = @ptrCast(@alignCast(load.area(config, config.descriptor_offset, 16 * size, 16) orelse return null)),
            .driver_event = @ptrCast(@alignCast(load.area(config, config.available_offset, 4, 4) orelse return null)),
            .device_event = @ptrCast(@alignCast(load.area(config, config.used_offset, 4, 4) orelse return null)),
            .size = size,
            .has_event_idx = load.has(config, load.feature_event_idx),
            .has_indirect = load.has(config, load.feature_indirect),
            .available = position_,
            .used = position_,
        };
    }

    /// A run that left something outstanding has no position to go on from.
    pub fn isIdle(self: *const Side) bool {
        return self.used == self.available;
    }

    pub fn position(self: *const Side) u64 {
        return if (self.isIdle()) self.available.bits() else layout.load_position_lost;
    }

    pub inline fn begin(self: *Side, number: u32, table: [*]align(16) [2]u64) void {
        self.table = table;
        self.number = number;
        self.count = 0;
    }

    pub inline fn add(self: *Side, address: u64, length: u32, flags: u16, is_last: bool) void {
        if (self.has_indirect) {
            self.table[self.count] = .{ address, @as(u64, flags) << flags_shift | length };
        } else {
            self.put(address, length, if (is_last) flags else flags | chain.flag_next);
        }
        self.count += 1;
    }

    pub inline fn end(self: *Side, _: u32, table_gpa: u64) u32 {
        if (!self.has_indirect) return self.count;
        self.put(table_gpa, self.count * chain.descriptor_size, chain.flag_indirect);
        return 1;
    }

    inline fn put(self: *Side, address: u64, length: u32, flags: u16) void {
        const at = self.available;
        const all = flags | at.availableFlags();
        const word = @as(u64, all) << flags_shift | @as(u64, self.number) << id_shift | length;
        @atomicStore(u64, &self.descriptors[at.slot][0], address, .monotonic);
        if (self.has_first) {
            @atomicStore(u64, &self.descriptors[at.slot][1], word, .monotonic);
        } else {
            self.has_first = true;
            self.first = at;
            self.first_word = word;
        }
        self.available = at.after(1, self.size);
    }

    /// Makes all that is new available; whether the device is to be kicked.
    pub inline fn expose(self: *Side) bool {
        if (!self.has_first) return false;
        self.has_first = false;
        // Release: all else before these flags; pairs with the device's acquire
        // load. Full: before its wish is read; pairs with its barrier between
        // writing that and looking at the flags again.
        @atomicStore(u64, &self.descriptors[self.first.slot][1], self.first_word, .seq_cst);
        const wish = @atomicLoad(u32, self.device_event, .seq_cst);
        if (wish & packed_ring.event_disable != 0) return false;
        if (wish & packed_ring.event_descriptor == 0 or !self.has_event_idx) return true;
        const event: Position = @bitCast(@as(u16, @truncate(wish)));
        return packed_ring.isPassed(event, self.available, self.first, self.size);
    }

    pub inline fn refresh(_: *const Side, _: u32) bool {
        return true;
    }

    pub inline fn isReady(self: *const Side) bool {
        return self.usedWord(.acquire) != null;
    }

    inline fn usedWord(self: *const Side, comptime order: std.builtin.AtomicOrder) ?u64 {
        const word = @atomicLoad(u64, &self.descriptors[self.used.slot][1], order);
        const flags: u16 = @truncate(word >> flags_shift);
        const both = packed_ring.flag_available | packed_ring.flag_used;
        return if (flags & both == self.used.usedFlags()) word else null;
    }

    pub inline fn take(self: *const Side) ?u32 {
        const word = self.usedWord(.monotonic) orelse return null;
        return @as(u16, @truncate(word >> id_shift));
    }

    pub inline fn skip(self: *Side, count: u32) void {
        self.used = self.used.after(count, self.size);
    }

    pub fn want(self: *Side, wanted: bool) void {
        // An event is where the driver is now, so it is written each time.
        if (self.is_wanted == wanted and !(wanted and self.has_event_idx)) return;
        self.is_wanted = wanted;
        const wish = if (!wanted)
            packed_ring.event_disable
        else if (self.has_event_idx)
            packed_ring.event_descriptor | self.used.bits()
        else
            packed_ring.event_enable;
        @atomicStore(u32, self.driver_event, wish, .seq_cst);
    }

    /// Full: after `want`; pairs with the device's barrier between storing the
    /// flags and reading the wish.
    pub fn hasUsed(self: *const Side) bool {
        return self.usedWord(.seq_cst) != null;
    }
};
