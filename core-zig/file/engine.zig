//! File I/O between files and guest memory, without a copy: requests go in
//! and completions come out in batches, through io_uring or, where that is
//! refused, through a few threads. An engine belongs to one thread at a time;
//! engines share nothing.
//!
//! A slot is one request in flight. It moves: free -> with the kernel or a
//! thread (maybe several times, see `request.zig`) -> finished -> free.

const std = @import("std");
const builtin = @import("builtin");
const sys = @import("../linux.zig");
const sync = @import("../sync.zig");
const layout = @import("../layout.zig");
const descriptor = @import("../descriptor.zig");
const Handles = @import("../handles.zig").Handles;
const request = @import("request.zig");
const Ring = @import("io_uring.zig").Ring;
const Pool = @import("thread_pool.zig").Pool;
const linux = sys.linux;
const Slot = request.Slot;
const List = request.List;

const max_entries = 4096;
/// How long `destroy` waits for what cannot be cancelled.
const drain_ms: u64 = if (builtin.is_test) 500 else 5000;

const kind_io_uring: i32 = 1;
const kind_threads: i32 = 2;

const Engine = struct {
    slots: []Slot,
    rows: []align(std.heap.page_size_min) request.Row,
    event: i32,
    backend: union(enum) { ring: Ring, pool: Pool },
    free: List = .{},
    finished: List = .{},

    /// Requests that the kernel or a thread has.
    fn outstanding(self: *const Engine) u32 {
        return @intCast(self.slots.len - self.free.count - self.finished.count);
    }

    fn add(self: *Engine, index: u32) void {
        switch (self.backend) {
            .ring => |*ring| ring.add(&self.slots[index], index),
            .pool => |*pool| pool.add(index),
        }
    }

    fn finish(self: *Engine, index: u32, result: i32) void {
        self.slots[index].result = result;
        self.finished.push(self.slots, index);
    }

    /// Hands over what was added, then makes the event readable when there is
    /// something for `reap` that nobody else signals.
    fn flush(self: *Engine) void {
        var is_due = false;
        switch (self.backend) {
            .ring => |*ring| {
                const result = ring.flush();
                // Short of memory: the entries wait for the next reap.
                is_due = result < 0;
                if (result < 0 and result != sys.fail(.AGAIN)) {
                    while (ring.takeBack()) |index| self.finish(index, result);
                }
            },
            .pool => |*pool| pool.flush(),
        }
        if (is_due or self.finished.count > 0) descriptor.signalOwn(self.event);
    }

    /// Moves what came back to `finished`, and adds what has to go on.
    fn collect(self: *Engine, is_closing: bool) void {
        switch (self.backend) {
            .pool => |*pool| pool.collect(&self.finished),
            .ring => |*ring| {
                // Clear, then look: what comes in between signals again.
                _ = descriptor.eventfdTake(self.event);
                ring.poke();
                while (ring.next()) |done| {
                    if (self.slots[done.slot].advance(done.result)) |result| {
                        self.finish(done.slot, result);
                    } else if (is_closing) {
                        self.finish(done.slot, sys.fail(.CANCELED));
                    } else {
                        ring.add(&self.slots[done.slot], done.slot);
                    }
                }
            },
        }
    }

    /// Gives a finished slot back; its memory may go from here on.
    fn take(self: *Engine) ?layout.IoCompletion {
        const index = self.finished.pop(self.slots) orelse return null;
        const slot = &self.slots[index];
        const completion: layout.IoCompletion = .{ .tag = slot.tag, .result = slot.result };
        slot.release();
        self.free.push(self.slots, index);
        return completion;
    }

    fn deinit(self: *Engine) void {
        if (self.event >= 0) sys.closeQuietly(self.event);
        _ = linux.munmap(@ptrCast(self.rows.ptr), @sizeOf(request.Row) * self.rows.len);
        sync.allocator.free(self.slots);
        sync.allocator.destroy(self);
    }
};

var engines: Handles(Engine) = .{};

/// Pools that were left behind with a call that hangs.
pub var hung: std.atomic.Value(u32) = .init(0);

/// A new engine with up to `entries` requests in flight.
pub fn create(entries: u32, use_threads: u32) callconv(.c) i32 {
    if (entries == 0 or entries > max_entries) return sys.fail(.INVAL);
    const self = sync.allocator.create(Engine) catch return sys.fail(.NOMEM);
    const slots = sync.allocator.alloc(Slot, entries) catch {
        sync.allocator.destroy(self);
        return sys.fail(.NOMEM);
    };
    // Straight from the kernel: rows that are never used cost no memory.
    const raw = linux.mmap(null, @sizeOf(request.Row) * entries, .{ .READ = true, .WRITE = true }, .{ .TYPE = .PRIVATE, .ANONYMOUS = true }, -1, 0);
    if (sys.isError(raw)) {
        sync.allocator.free(slots);
        sync.allocator.destroy(self);
        return sys.result(raw);
    }
    const rows: [*]align(std.heap.page_size_min) request.Row = @ptrFromInt(raw);
    self.* = .{ .slots = slots, .rows = rows[0..entries], .event = descriptor.eventfdCreate(), .backend = undefined };
    for (slots, 0..) |*slot, index| {
        slot.* = .{ .row = &rows[index] };
        self.free.push(slots, @intCast(index));
    }
    const started = if (self.event < 0) self.event else start(self, use_threads != 0);
    if (started < 0) {
        self.deinit();
        return started;
    }
    if (engines.insert(self)) |handle| return @intCast(handle);
    _ = close(self);
    return sys.fail(.NFILE);
}

fn start(self: *Engine, use_threads: bool) i32 {
    if (!use_threads) {
        self.backend = .{ .ring = undefined };
        const entries = std.math.ceilPowerOfTwoAssert(u32, @intCast(self.slots.len));
        switch (self.backend.ring.init(entries, self.event)) {
            // Missing, forbidden, too old, or out of lockable memory.
            sys.fail(.NOSYS), sys.fail(.PERM), sys.fail(.ACCES), sys.fail(.INVAL), sys.fail(.NOMEM) => {},
            else => |result| return result,
        }
    }
    self.backend = .{ .pool = undefined };
    return self.backend.pool.init(self.slots, self.event);
}

/// The event descriptor, readable while completions wait. It stays ours.
pub fn event(io: u32) callconv(.c) i32 {
    const self = engines.get(io) orelse return sys.fail(.BADF);
    return self.event;
}

/// 1 for io_uring, 2 for threads.
pub fn kind(io: u32) callconv(.c) i32 {
    const self = engines.get(io) orelse return sys.fail(.BADF);
    return switch (self.backend) {
        .ring => kind_io_uring,
        .pool => kind_threads,
    };
}

/// Takes requests in order while there is room; returns how many. A request
/// that is wrong in itself is taken too and completes with its error.
pub fn submit(io: u32, requests: ?[*]const layout.IoRequest, count: u32, segments: ?[*]const layout.Segment, segment_count: u32) callconv(.c) i32 {
    const self = engines.get(io) orelse return sys.fail(.BADF);
    if (count == 0) return 0;
    const list = requests orelse return sys.fail(.FAULT);
    const all: []const layout.Segment = if (segments) |first| first[0..segment_count] else &.{};
    var section: request.Section = .{};
    var taken: u32 = 0;
    while (taken < count) : (taken += 1) {
        const index = self.free.pop(self.slots) orelse break;
        if (self.slots[index].start(list[taken], all, &section)) |result| {
            self.finish(index, result);
        } else {
            self.add(index);
        }
    }
    section.leave();
    self.flush();
    return @intCast(taken);
}

/// Writes up to `capacity` completions, in no particular order, and sends on
/// what came back unfinished. Never waits.
pub fn reap(io: u32, completions: ?[*]layout.IoCompletion, capacity: u32) callconv(.c) i32 {
    const self = engines.get(io) orelse return sys.fail(.BADF);
    const out = completions orelse return sys.fail(.FAULT);
    self.collect(false);
    var count: u32 = 0;
    while (count < capacity) : (count += 1) {
        out[count] = self.take() orelse break;
    }
    self.flush();
    return @intCast(count);
}

/// Ends the engine. The caller drains it first; what is left is cancelled or,
/// for a bounded time, waited for. -ETIMEDOUT: some call hangs, and the guest
/// memory that it may still write to stays held: until the call ends when a
/// thread makes it, for good when io_uring does.
pub fn destroy(io: u32) callconv(.c) i32 {
    const self = engines.remove(io) orelse return sys.fail(.BADF);
    return close(self);
}

fn close(self: *Engine) i32 {
    switch (self.backend) {
        .ring => |*ring| {
            while (ring.takeBack()) |index| self.finish(index, sys.fail(.CANCELED));
            if (self.outstanding() > 0) ring.cancel();
        },
        .pool => |*pool| pool.stop(),
    }
    const deadline = now() + drain_ms;
    while (self.outstanding() > 0) {
        self.collect(true);
        if (self.outstanding() == 0) break;
        const time = now();
        if (time >= deadline) break;
        var waits = [1]linux.pollfd{.{ .fd = self.event, .events = linux.POLL.IN, .revents = 0 }};
        _ = linux.poll(&waits, 1, @intCast(deadline - time));
    }
    const is_drained = self.outstanding() == 0;
    switch (self.backend) {
        .ring => |*ring| {
            while (self.take()) |_| {}
            ring.deinit();
            self.deinit();
            return if (is_drained) 0 else sys.fail(.TIMEDOUT);
        },
        .pool => |*pool| {
            if (!is_drained) {
                const event_fd = self.event;
                self.event = -1;
                _ = hung.fetchAdd(1, .monotonic);
                if (pool.abandon(.{ .context = self, .end = inherit })) {
                    sys.closeQuietly(event_fd);
                    return sys.fail(.TIMEDOUT);
                }
                self.event = event_fd;
                _ = hung.fetchSub(1, .monotonic);
            }
            pool.join();
            finishPool(self);
            return 0;
        },
    }
}

/// Runs in the last thread of an abandoned pool, once nothing hangs any more.
fn inherit(context: *anyopaque) void {
    const self: *Engine = @ptrCast(@alignCast(context));
    finishPool(self);
    _ = hung.fetchSub(1, .release);
    sync.futexWake(&hung, std.math.maxInt(i32));
}

fn finishPool(self: *Engine) void {
    self.collect(true);
    while (self.take()) |_| {}
    self.deinit();
}

fn now() u64 {
    var time: linux.timespec = undefined;
    _ = linux.clock_gettime(.MONOTONIC, &time);
    return @as(u64, @intCast(time.sec)) * 1000 + @as(u64, @intCast(time.nsec)) / 1_000_000;
}

test {
    _ = request;
    _ = @import("engine_test.zig");
}
