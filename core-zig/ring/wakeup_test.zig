//! The race of going to sleep, in a model: every order in which two processors
//! can take their steps, store buffers included.
//!
//! The producer publishes (driver: what is available; device: what is used) and
//! then reads whether the other side wants to be told. The consumer takes all
//! there is, writes that it wants to be told, looks again, and sleeps. A store
//! may reach memory after the loads that follow it, unless there is a full
//! barrier: the one reordering of x86, and the one that loses a wake-up.
//!
//! `arm`, `announce` and `wantsCall` of `split.zig` and `packed.zig` are these
//! steps in this order, their stores and loads sequentially consistent; what is
//! wanted is decided by the code itself (`isWanted`, `isPassed`).

const std = @import("std");
const packed_ring = @import("packed.zig");
const split = @import("split.zig");

const testing = std.testing;

const Format = enum { split_flags, split_event, packed_flags, packed_event };

const Model = struct {
    format: Format,
    /// Published by one store.
    burst: u8,
    /// A full barrier before the producer reads the wish.
    has_producer_barrier: bool = true,
    /// The same before the consumer looks again.
    has_consumer_barrier: bool = true,

    /// Descriptors, which bounds how far the producer is ahead.
    const size = 4;
    /// More than two laps: a packed ring's events come again.
    const total = 10;
    const never = 0;
    const always = 1;
    /// An event: the position, counted from the start, beyond this.
    const at = 2;

    fn armed(self: Model, taken: u8) u8 {
        return switch (self.format) {
            .split_flags, .packed_flags => always,
            .split_event, .packed_event => at + taken,
        };
    }

    fn disarms(self: Model) bool {
        return self.format != .split_event;
    }

    fn isWanted(self: Model, wish: u8, new: u8, old: u8) bool {
        if (wish <= always) return wish == always;
        const event = wish - at;
        if (self.format == .packed_event) {
            return packed_ring.isPassed(position(event), position(new), position(old), size);
        }
        // Free-running indices come round 2^16.
        const start: u16 = 0xfffd;
        return split.isWanted(start +% event, start +% new, start +% old);
    }

    fn position(count: u8) packed_ring.Position {
        const first: packed_ring.Position = .{ .slot = 1, .wrap = true };
        var found = first;
        for (0..count) |_| found = found.after(1, size);
        return found;
    }
};

const State = struct {
    /// As the producer sees it, and as it is in memory.
    published: u8 = 0,
    visible: u8 = 0,
    /// What the producer had published when it last read the wish.
    told: u8 = 0,
    is_looking: bool = false,
    taken: u8 = 0,
    /// The wish in memory, and stores of it that are on their way.
    wish: u8,
    stores: [3]u8 = @splat(0),
    store_count: u8 = 0,
    consumer: enum { takes, arms, looks, sleeps } = .takes,
    /// The kick, or call, that nobody has taken yet.
    is_called: bool = false,

    fn store(self: State, wish: u8) State {
        var next = self;
        next.stores[self.store_count] = wish;
        next.store_count += 1;
        return next;
    }
};

/// All that can be reached.
const Search = struct {
    model: Model,
    seen: std.AutoHashMapUnmanaged(State, void) = .empty,
    left: std.ArrayList(State) = .empty,

    fn reach(self: *Search, state: State) !void {
        const entry = try self.seen.getOrPut(testing.allocator, state);
        if (!entry.found_existing) try self.left.append(testing.allocator, state);
    }

    /// Whether an end can be reached in which somebody sleeps for ever.
    fn losesWakeUp(model: Model) !bool {
        var self: Search = .{ .model = model };
        defer self.seen.deinit(testing.allocator);
        defer self.left.deinit(testing.allocator);
        try self.reach(.{ .wish = model.armed(0) });
        var has_ended = false;
        while (self.left.pop()) |state| {
            if (try self.step(state) > 0) continue;
            if (state.taken < Model.total) return true;
            has_ended = true;
        }
        try testing.expect(has_ended);
        return false;
    }

    /// Reaches what one step leads to; returns how many steps there are.
    fn step(self: *Search, state: State) !u32 {
        const model = self.model;
        var count: u32 = 0;
        // A store of the producer's reaches memory, or one of the consumer's.
        if (state.visible < state.published) {
            var next = state;
            next.visible += model.burst;
            try self.reach(next);
            count += 1;
        }
        if (state.store_count > 0) {
            var next = state;
            next.wish = state.stores[0];
            next.stores = .{ state.stores[1], state.stores[2], 0 };
            next.store_count -= 1;
            try self.reach(next);
            count += 1;
        }
        if (state.is_looking) {
            if (!model.has_producer_barrier or state.visible == state.published) {
                var next = state;
                if (model.isWanted(state.wish, state.published, state.told)) next.is_called = true;
                next.told = state.published;
                next.is_looking = false;
                try self.reach(next);
                count += 1;
            }
        } else if (state.published < Model.total and state.published + model.burst <= state.taken + Model.size) {
            var next = state;
            next.published += model.burst;
            next.is_looking = true;
            try self.reach(next);
            count += 1;
        }
        return count + try self.consume(state);
    }

    fn consume(self: *Search, state: State) !u32 {
        const model = self.model;
        var next = state;
        switch (state.consumer) {
            .takes => {
                next.taken = state.visible;
                next.consumer = .arms;
            },
            .arms => {
                if (state.store_count == state.stores.len) return 0;
                next = state.store(model.armed(state.taken));
                next.consumer = .looks;
            },
            .looks => {
                if (model.has_consumer_barrier and state.store_count > 0) return 0;
                next.consumer = if (state.visible == state.taken) .sleeps else .takes;
            },
            .sleeps => {
                if (!state.is_called) return 0;
                if (model.disarms()) {
                    if (state.store_count == state.stores.len) return 0;
                    next = state.store(Model.never);
                }
                next.is_called = false;
                next.consumer = .takes;
            },
        }
        try self.reach(next);
        return 1;
    }
};

test "no order of steps loses a wake-up, in either format, by flags or by events" {
    for (std.enums.values(Format)) |format| {
        for ([_]u8{ 1, 2 }) |burst| {
            try testing.expect(!try Search.losesWakeUp(.{ .format = format, .burst = burst }));
        }
    }
}

test "without the barrier of either side there is an order that loses one" {
    for (std.enums.values(Format)) |format| {
        for ([_]u8{ 1, 2 }) |burst| {
            try testing.expect(try Search.losesWakeUp(.{ .format = format, .burst = burst, .has_producer_barrier = false }));
            try testing.expect(try Search.losesWakeUp(.{ .format = format, .burst = burst, .has_consumer_barrier = false }));
        }
    }
}
