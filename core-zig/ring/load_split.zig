//! The driver's side of a split ring, as the load generator uses it.

const layout = @import("../layout.zig");
const split = @import("split.zig");
const chain = @import("chain.zig");
const load = @import("load.zig");

const Descriptor = extern struct { address: u64, length: u32, flags: u16, next: u16 };

pub const Side = struct {
    descriptors: [*]Descriptor,
    available: *split.Available,
    used: *split.Used,
    size: u32,
    /// Descriptors of the table that each request has.
    per_request: u32,
    has_event_idx: bool,
    has_indirect: bool,
    available_index: u16,
    exposed_index: u16,
    used_index: u16,
    /// used.idx as last read.
    ready_index: u16,

    /// Where the chain under way goes.
    table: [*]Descriptor = undefined,
    first: u32 = 0,
    index: u32 = 0,

    pub fn init(config: *const layout.LoadConfig) ?Side {
        const size = config.queue_size;
        if (@popCount(size) != 1) return null;
        const available: *split.Available = @ptrCast(@alignCast(load.area(config, config.available_offset, split.Available.byteCount(size), 2) orelse return null));
        const used: *split.Used = @ptrCast(@alignCast(load.area(config, config.used_offset, split.Used.byteCount(size), 4) orelse return null));
        // An earlier run may have used the ring.
        const available_index = @atomicLoad(u16, &available.index, .monotonic);
        const used_index = @atomicLoad(u16, &used.index, .acquire);
        return .{
            .descriptors = @ptrCast(@alignCast(load.area(config, config.descriptor_offset, 16 * size, 16) orelse return null)),
            .available = available,
            .used = used,
            .size = size,
            .per_request = load.ringDescriptors(config),
            .has_event_idx = load.has(config, load.feature_event_idx),
            .has_indirect = load.has(config, load.feature_indirect),
            .available_index = available_index,
            .exposed_index = available_index,
            .used_index = used_index,
            .ready_index = used_index,
        };
    }

    /// Whether the device has nothing of an earlier run any more.
    pub fn isIdle(self: *const Side) bool {
        return self.used_index == self.available_index;
    }

    /// The ring itself says where to go on.
    pub fn position(_: *const Side) u64 {
        return 0;
    }

    pub inline fn begin(self: *Side, number: u32, table: [*]align(16) [2]u64) void {
        self.table = if (self.has_indirect) @ptrCast(table) else self.descriptors;
        self.first = if (self.has_indirect) 0 else number * self.per_request;
        self.index = self.first;
    }

    pub inline fn add(self: *Side, address: u64, length: u32, flags: u16, is_last: bool) void {
        self.table[self.index] = .{
            .address = address,
            .length = length,
            .flags = if (is_last) flags else flags | chain.flag_next,
            .next = if (is_last) 0 else @intCast(self.index + 1),
        };
        self.index += 1;
    }

    /// Returns how many descriptors of the ring the request has.
    pub inline fn end(self: *Side, number: u32, table_gpa: u64) u32 {
        const count = self.index - self.first;
        var head = self.first;
        if (self.has_indirect) {
            head = number;
            self.descriptors[head] = .{
                .address = table_gpa,
                .length = count * chain.descriptor_size,
                .flags = chain.flag_indirect,
                .next = 0,
            };
        }
        self.available.ring()[self.available_index & (self.size - 1)] = @intCast(head);
        self.available_index +%= 1;
        return if (self.has_indirect) 1 else count;
    }

    /// Makes all that is new available; whether the device is to be kicked.
    pub inline fn expose(self: *Side) bool {
        const old = self.exposed_index;
        if (self.available_index == old) return false;
        self.exposed_index = self.available_index;
        // Release: the requests before the index; pairs with the device's
        // acquire load. Full: the index before its wish is read; pairs with
        // its barrier between writing avail_event (or flags) and looking again.
        @atomicStore(u16, &self.available.index, self.available_index, .seq_cst);
        if (!self.has_event_idx) return @atomicLoad(u16, &self.used.flags, .seq_cst) & split.flag_no_notify == 0;
        const event = @atomicLoad(u16, self.used.availableEvent(self.size), .seq_cst);
        return split.isWanted(event, self.available_index, old);
    }

    /// Looks for used elements; false when there are more than can be.
    pub inline fn refresh(self: *Side, in_flight: u32) bool {
        self.ready_index = @atomicLoad(u16, &self.used.index, .acquire);
        return self.ready_index -% self.used_index <= in_flight;
    }

    pub inline fn isReady(self: *const Side) bool {
        return self.used_index != self.ready_index;
    }

    /// The number of the request used next; null for what is none of ours.
    pub inline fn take(self: *const Side) ?u32 {
        const id = @as(*const volatile u32, &self.used.ring()[self.used_index & (self.size - 1)].id).*;
        if (id % self.per_request != 0) return null;
        return id / self.per_request;
    }

    pub inline fn skip(self: *Side, _: u32) void {
        self.used_index +%= 1;
    }

    /// Asks for a call at the next completion, or for none.
    pub fn want(self: *Side, wanted: bool) void {
        if (self.has_event_idx) {
            // An event just passed is as good as none.
            const event = if (wanted) self.used_index else self.used_index -% 1;
            @atomicStore(u16, self.available.usedEvent(self.size), event, .seq_cst);
        } else {
            @atomicStore(u16, &self.available.flags, if (wanted) 0 else split.flag_no_interrupt, .seq_cst);
        }
    }

    /// Whether anything was used. Full: after `want`; pairs with the device's
    /// barrier between storing used.idx and reading the wish.
    pub fn hasUsed(self: *const Side) bool {
        return @atomicLoad(u16, &self.used.index, .seq_cst) != self.used_index;
    }
};
