//! The requests by a few threads that make ordinary blocking calls: for where
//! io_uring is refused (containers, hardened kernels), and for writes that
//! io_uring would only hand to threads of the kernel's. A thread has a slot to
//! itself from the pending list to the done list; the mutex hands it over.

const std = @import("std");
const sys = @import("../linux.zig");
const sync = @import("../sync.zig");
const descriptor = @import("../descriptor.zig");
const request = @import("request.zig");
const linux = sys.linux;
const Slot = request.Slot;
const List = request.List;

const max_threads = 4;

pub const Pool = struct {
    slots: []Slot,
    event: i32,
    mutex: sync.Mutex = .{},
    /// Changes with each wake-up: what idle threads sleep on.
    bell: std.atomic.Value(u32) = .init(0),
    idle: u32 = 0,
    pending: List = .{},
    done: List = .{},
    /// Read between the calls of one request without the mutex.
    is_stopping: std.atomic.Value(bool) = .init(false),
    /// The owner's alone: prepared and not yet handed over.
    prepared: List = .{},
    threads: [max_threads]sync.Thread = undefined,
    thread_count: u32 = 0,
    living: u32 = 0,
    /// Set when the owner gave up waiting: the last thread ends the engine.
    heir: ?Heir = null,

    pub const Heir = struct {
        context: *anyopaque,
        end: *const fn (*anyopaque) void,
    };

    /// The pool stays where it is: its threads know its address.
    pub fn init(self: *Pool, slots: []Slot, event: i32, thread_limit: u32) i32 {
        self.* = .{ .slots = slots, .event = event };
        self.mutex.lock();
        defer self.mutex.unlock();
        while (self.thread_count < @min(max_threads, thread_limit, slots.len)) : (self.thread_count += 1) {
            self.threads[self.thread_count] = sync.Thread.spawn(run, self) orelse break;
        }
        self.living = self.thread_count;
        return if (self.thread_count == 0) sys.fail(.AGAIN) else 0;
    }

    pub fn add(self: *Pool, index: u32) void {
        self.prepared.push(self.slots, index);
    }

    pub fn flush(self: *Pool) void {
        if (self.prepared.count == 0) return;
        self.mutex.lock();
        const woken = @min(self.idle, self.prepared.count);
        self.pending.append(self.slots, &self.prepared);
        _ = self.bell.fetchAdd(1, .release);
        self.mutex.unlock();
        if (woken > 0) sync.futexWake(&self.bell, woken);
    }

    /// Moves what is done to the end of `list` and clears the event, both
    /// under the mutex: the event is readable exactly while `done` holds any.
    pub fn collect(self: *Pool, list: *List) void {
        self.mutex.lock();
        defer self.mutex.unlock();
        if (self.event >= 0) _ = descriptor.eventfdTake(self.event);
        list.append(self.slots, &self.done);
    }

    /// What has not begun ends with -ECANCELED; what runs ends its call.
    pub fn stop(self: *Pool) void {
        self.mutex.lock();
        self.is_stopping.store(true, .monotonic);
        while (self.pending.pop(self.slots)) |index| self.finish(index, sys.fail(.CANCELED));
        _ = self.bell.fetchAdd(1, .release);
        self.mutex.unlock();
        sync.futexWake(&self.bell, max_threads);
    }

    pub fn join(self: *Pool) void {
        for (self.threads[0..self.thread_count]) |thread| thread.join();
    }

    /// With the mutex held.
    fn finish(self: *Pool, index: u32, result: i32) void {
        self.slots[index].result = result;
        // -1: the owner has closed it, the number may be somebody else's.
        if (self.done.count == 0 and self.event >= 0) descriptor.signalOwn(self.event);
        self.done.push(self.slots, index);
    }

    /// The owner, which has stopped the pool and got tired of waiting, leaves
    /// everything to the last thread. False when none is left: then join.
    pub fn abandon(self: *Pool, heir: Heir) bool {
        self.mutex.lock();
        defer self.mutex.unlock();
        if (self.living == 0) return false;
        self.event = -1;
        self.heir = heir;
        return true;
    }

    fn run(argument: ?*anyopaque) callconv(.c) ?*anyopaque {
        const self: *Pool = @ptrCast(@alignCast(argument.?));
        self.mutex.lock();
        while (true) {
            const index = self.pending.pop(self.slots) orelse {
                if (self.is_stopping.load(.monotonic)) break;
                const bell = self.bell.load(.acquire);
                self.idle += 1;
                self.mutex.unlock();
                sync.futexWait(&self.bell, bell, null);
                self.mutex.lock();
                self.idle -= 1;
                continue;
            };
            self.mutex.unlock();
            const result = perform(&self.slots[index], &self.is_stopping);
            self.mutex.lock();
            self.finish(index, result);
        }
        self.living -= 1;
        const heir = if (self.living == 0) self.heir else null;
        self.mutex.unlock();
        // Without an heir the owner joins us before it frees the pool.
        if (heir) |value| value.end(value.context);
        return null;
    }

    /// All the calls that a request needs.
    pub fn perform(slot: *Slot, is_stopping: ?*const std.atomic.Value(bool)) i32 {
        while (true) {
            if (slot.advance(call(slot))) |result| return result;
            if (is_stopping) |flag| if (flag.load(.monotonic)) return sys.fail(.CANCELED);
            // EAGAIN and EINTR alone set it and count: do not spin on them.
            if (slot.retries > 0) pause();
        }
    }
};

fn pause() void {
    const millisecond: linux.timespec = .{ .sec = 0, .nsec = 1_000_000 };
    _ = linux.nanosleep(&millisecond, null);
}

/// The next call of a request, made here and now.
pub fn call(slot: *const Slot) i32 {
    const offset: i64 = @intCast(slot.offset);
    return sys.result(switch (slot.phase) {
        .read => read: {
            const vectors = slot.callVectors();
            break :read linux.preadv(slot.file, vectors.ptr, vectors.len, offset);
        },
        .write, .zero_write => write: {
            const vectors = slot.callVectors();
            break :write linux.pwritev2(slot.file, @ptrCast(vectors.ptr), vectors.len, offset, slot.rw_flags);
        },
        .flush => linux.fdatasync(slot.file),
        .punch, .zero_range => linux.fallocate(slot.file, @intCast(slot.fallocateMode()), offset, @intCast(slot.remaining)),
    });
}
