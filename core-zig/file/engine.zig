//! File I/O between files and guest memory, without a copy: requests go in
//! and completions come out in batches, through io_uring, through a few
//! threads where that is refused or slower (`flag_io_threaded`), or at once in
//! the caller's thread (`flag_io_inline`; `flag_io_prompt` while that does not
//! wait). An engine belongs to one thread at a time; engines share nothing.
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
const prompt = @import("prompt.zig");
const Ring = @import("io_uring.zig").Ring;
const thread_pool = @import("thread_pool.zig");
const Pool = thread_pool.Pool;
const linux = sys.linux;
const Slot = request.Slot;
const List = request.List;

const max_entries = 4096;
/// How long `destroy` waits for what cannot be cancelled.
const drain_ms: u64 = if (builtin.is_test) 500 else 5000;

/// Enough to overlap a flush with reads; more would only fight over the disk.
const threads_alone = 4;
/// Writes of the page cache: the file's own lock lets one in at a time.
const threads_beside_ring = 2;

const kind_io_uring: i32 = 1;
const kind_threads: i32 = 2;

const Engine = struct {
    slots: []Slot,
    rows: []align(std.heap.page_size_min) request.Row,
    event: i32,
    ring: ?Ring = null,
    /// Beside a ring it starts with the first request that it is to serve.
    pool: Pool = undefined,
    has_pool: bool = false,
    free: List = .{},
    finished: List = .{},
    /// Prompt writes that nobody has yet.
    due: List = .{},
    gates: prompt.Gates = .{},

    /// Requests that the kernel, a thread or `due` has.
    fn outstanding(self: *const Engine) u32 {
        return @intCast(self.slots.len - self.free.count - self.finished.count);
    }

    fn add(self: *Engine, index: u32) void {
        if (self.ring) |*ring| ring.add(&self.slots[index], index) else self.pool.add(index);
    }

    /// To a thread; by the ring where there can be none.
    fn addThreaded(self: *Engine, index: u32) void {
        if (!self.has_pool) {
            if (self.pool.init(self.slots, self.event, threads_beside_ring) < 0) return self.add(index);
            self.has_pool = true;
        }
        self.pool.add(index);
    }

    /// Makes prompt writes for a moment; what would wait goes to a thread.
    fn writeDue(self: *Engine) void {
        if (self.due.count == 0) return;
        var watch = prompt.Watch.start();
        while (!watch.isOver()) {
            const index = self.due.pop(self.slots) orelse return;
            const slot = &self.slots[index];
            if (!self.gates.isOpen(slot.file, watch.now)) {
                self.addThreaded(index);
                continue;
            }
            const outcome = slot.advance(thread_pool.call(slot));
            watch.lap(&self.gates, slot.file);
            // The rest of a short write would wait for what was missing.
            if (outcome) |result| self.finish(index, result) else self.addThreaded(index);
        }
    }

    fn finish(self: *Engine, index: u32, result: i32) void {
        self.slots[index].result = result;
        self.finished.push(self.slots, index);
    }

    /// Hands over what was added. False when some of it has to wait for the
    /// next time, because the kernel is short of memory.
    fn handOver(self: *Engine) bool {
        var is_done = true;
        if (self.ring) |*ring| {
            const result = ring.flush();
            is_done = result >= 0;
            if (result < 0 and result != sys.fail(.AGAIN)) {
                while (ring.takeBack()) |index| self.finish(index, result);
            }
        }
        if (self.has_pool) self.pool.flush();
        return is_done;
    }

    /// Moves what came back to `finished`, and adds what has to go on.
    fn collect(self: *Engine, is_closing: bool) void {
        // Both clear the event, then look: what comes in between signals again.
        if (self.has_pool) {
            self.pool.collect(&self.finished);
        } else {
            _ = descriptor.eventfdTake(self.event);
        }
        const ring = if (self.ring) |*ring| ring else return;
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

    fn end(self: *Engine) void {
        while (self.take()) |_| {}
        self.deinit();
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
    self.* = .{ .slots = slots, .rows = rows[0..entries], .event = descriptor.eventfdCreate() };
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
        var ring: Ring = undefined;
        const entries = std.math.ceilPowerOfTwoAssert(u32, @intCast(self.slots.len));
        switch (ring.init(entries, self.event)) {
            // Missing, forbidden, too old, or out of lockable memory.
            sys.fail(.NOSYS), sys.fail(.PERM), sys.fail(.ACCES), sys.fail(.INVAL), sys.fail(.NOMEM) => {},
            0 => {
                self.ring = ring;
                return 0;
            },
            else => |result| return result,
        }
    }
    const result = self.pool.init(self.slots, self.event, threads_alone);
    self.has_pool = result >= 0;
    return result;
}

/// The event descriptor, readable while completions wait that a `reap` since
/// the last `submit` has not seen or left. It stays ours.
pub fn event(io: u32) callconv(.c) i32 {
    const self = engines.get(io) orelse return sys.fail(.BADF);
    return self.event;
}

/// 1 for io_uring, 2 for threads.
pub fn kind(io: u32) callconv(.c) i32 {
    const self = engines.get(io) orelse return sys.fail(.BADF);
    return if (self.ring != null) kind_io_uring else kind_threads;
}

/// Takes requests in order while there is room; returns how many. A request
/// that is wrong in itself is taken too and completes with its error. Its caller
/// reaps next: what finished in this call is not signalled, since to wake
/// whoever waits for the event costs as much as a write.
pub fn submit(io: u32, requests: ?[*]const layout.IoRequest, count: u32, segments: ?[*]const layout.Segment, segment_count: u32) callconv(.c) i32 {
    const self = engines.get(io) orelse return sys.fail(.BADF);
    if (count == 0) return 0;
    const list = requests orelse return sys.fail(.FAULT);
    const all: []const layout.Segment = if (segments) |first| first[0..segment_count] else &.{};
    var section: request.Section = .{};
    var at_once: List = .{};
    var taken: u32 = 0;
    while (taken < count) : (taken += 1) {
        const index = self.free.pop(self.slots) orelse break;
        // Read once: another isolate may be writing there.
        const one = @as(*const volatile layout.IoRequest, &list[taken]).*;
        if (self.slots[index].start(one, all, &section)) |result| {
            self.finish(index, result);
        } else if (one.flags & layout.flag_io_inline != 0) {
            at_once.push(self.slots, index);
        } else if (one.flags & layout.flag_io_prompt != 0 and self.slots[index].isPrompt()) {
            self.due.push(self.slots, index);
        } else if (one.flags & (layout.flag_io_prompt | layout.flag_io_threaded) != 0) {
            self.addThreaded(index);
        } else {
            self.add(index);
        }
    }
    section.leave();
    while (at_once.pop(self.slots)) |index| self.finish(index, Pool.perform(&self.slots[index], null));
    self.writeDue();
    _ = self.handOver();
    return @intCast(taken);
}

/// Writes up to `capacity` completions, in no particular order, and sends on
/// what came back unfinished. Never waits but for prompt writes.
pub fn reap(io: u32, completions: ?[*]layout.IoCompletion, capacity: u32) callconv(.c) i32 {
    const self = engines.get(io) orelse return sys.fail(.BADF);
    const out = completions orelse return sys.fail(.FAULT);
    self.collect(false);
    self.writeDue();
    var count: u32 = 0;
    while (count < capacity) : (count += 1) {
        out[count] = self.take() orelse break;
    }
    const is_done = self.handOver();
    // Nobody else signals what is left for the next time.
    if (!is_done or self.due.count > 0 or self.finished.count > 0) descriptor.signalOwn(self.event);
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
    while (self.due.pop(self.slots)) |index| self.finish(index, sys.fail(.CANCELED));
    if (self.ring) |*ring| {
        while (ring.takeBack()) |index| self.finish(index, sys.fail(.CANCELED));
        if (self.outstanding() > 0) ring.cancel();
    }
    if (self.has_pool) self.pool.stop();
    const deadline = milliseconds() + drain_ms;
    while (self.outstanding() > 0) {
        self.collect(true);
        if (self.outstanding() == 0) break;
        const time = milliseconds();
        if (time >= deadline) break;
        var waits = [1]linux.pollfd{.{ .fd = self.event, .events = linux.POLL.IN, .revents = 0 }};
        _ = linux.poll(&waits, 1, @intCast(deadline - time));
    }
    const is_drained = self.outstanding() == 0;
    if (self.ring) |*ring| {
        // What the kernel still has it works on from copies of the iovecs.
        ring.deinit();
        self.ring = null;
    }
    if (self.has_pool) {
        if (!is_drained) {
            const event_fd = self.event;
            self.event = -1;
            _ = hung.fetchAdd(1, .monotonic);
            if (self.pool.abandon(.{ .context = self, .end = inherit })) {
                sys.closeQuietly(event_fd);
                return sys.fail(.TIMEDOUT);
            }
            self.event = event_fd;
            _ = hung.fetchSub(1, .monotonic);
        }
        self.pool.join();
        self.pool.collect(&self.finished);
    }
    const result = if (self.outstanding() == 0) 0 else sys.fail(.TIMEDOUT);
    self.end();
    return result;
}

/// Runs in the last thread of an abandoned pool, once nothing hangs any more.
fn inherit(context: *anyopaque) void {
    const self: *Engine = @ptrCast(@alignCast(context));
    self.pool.collect(&self.finished);
    self.end();
    _ = hung.fetchSub(1, .release);
    sync.futexWake(&hung, std.math.maxInt(i32));
}

fn milliseconds() u64 {
    return prompt.monotonic() / std.time.ns_per_ms;
}

test {
    _ = request;
    _ = prompt;
    _ = @import("traits.zig");
    _ = @import("engine_test.zig");
    _ = @import("prompt_test.zig");
}
