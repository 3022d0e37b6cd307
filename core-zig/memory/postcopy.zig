//! Postcopy: while the guest's pages are still on their way from another
//! machine, whoever touches a missing one sleeps until the front-end has
//! filled it. Only the front-end is needed for that, nothing of this process.
//!
//! That makes the front-end's death a danger: the sleeper may be the isolate's
//! own thread, which then never hears of it. So a thread of its own waits for
//! the hang-up; then it takes the memory away: every region is replaced by a
//! file of no bytes, and the sleepers are woken. A system call gets EFAULT, so
//! that no write puts zeros on a disk; a thread gets the SIGBUS of a shrunk
//! file (`fault.zig`).
//!
//! A front-end that lives may take its time: a migration can be paused for
//! minutes. But it must not hold what others need of this process. So the thread
//! has the memory's isolate look at its poll set now and then; where it has not
//! done so for as long as it may sleep, or a signal asks the process to end
//! (`interrupt.zig`) and it does not look then, the thread takes the memory away
//! too. A Worker that sleeps holds nobody but the guest whose page it is.

const std = @import("std");
const linux = std.os.linux;
const sync = @import("../sync.zig");
const sys = @import("../linux.zig");
const layout = @import("../layout.zig");
const descriptor = @import("../descriptor.zig");
const interrupt = @import("interrupt.zig");
const mapping = @import("mapping.zig");
const memory = @import("memory.zig");
const userfault = @import("userfault.zig");

pub const Guard = struct {
    owner: *memory.Memory,
    /// The userfaultfd, the guard's.
    fd: i32,
    /// Made in advance: what takes a region's place when the front-end dies.
    nothing: i32,
    epoll: i32 = -1,
    stop: i32 = -1,
    thread: ?sync.Thread = null,
    /// So many looks in vain mean that the isolate has slept for too long.
    patience: u64,
    /// How often it had looked, and for how many of ours it has not since.
    looks: u32 = 0,
    unanswered: u64 = 0,
    /// Signals to end the process, at the look before.
    signals: u32 = 0,
    is_signalled: bool = false,

    const token_hangup = 0;
    const token_stop = 1;
    /// Between two looks: an isolate that is awake needs less to answer one.
    const look_ms = 200;

    /// The socket is watched without a reference: when its owner closes it the
    /// watch ends by itself.
    fn start(self: *Guard, hangup_fd: i32) i32 {
        if (self.nothing < 0) return self.nothing;
        self.epoll = sys.result(linux.epoll_create1(linux.EPOLL.CLOEXEC));
        if (self.epoll < 0) return self.epoll;
        self.stop = descriptor.eventfdCreate();
        if (self.stop < 0) return self.stop;
        const stoppable = self.add(self.stop, linux.EPOLL.IN, token_stop);
        if (stoppable < 0) return stoppable;
        const watched = self.add(hangup_fd, linux.EPOLL.RDHUP, token_hangup);
        if (watched < 0) return watched;
        interrupt.watch();
        self.signals = interrupt.count.load(.seq_cst);
        self.thread = sync.Thread.spawn(run, self) orelse return sys.fail(.AGAIN);
        return 0;
    }

    fn add(self: *Guard, fd: i32, events: u32, token: u64) i32 {
        var event: linux.epoll_event = .{ .events = events, .data = .{ .u64 = token } };
        return sys.result(linux.epoll_ctl(self.epoll, linux.EPOLL.CTL_ADD, fd, &event));
    }

    fn run(argument: ?*anyopaque) callconv(.c) ?*anyopaque {
        const self: *Guard = @ptrCast(@alignCast(argument.?));
        while (true) {
            interrupt.watch();
            var events: [2]linux.epoll_event = undefined;
            const count = linux.epoll_wait(self.epoll, &events, events.len, look_ms);
            if (sys.isError(count)) continue; // EINTR; the descriptors are ours
            if (count == 0 and !self.isStarved()) continue;
            for (events[0..count]) |event| {
                if (event.data.u64 == token_stop) return null;
            }
            self.takeMemory(if (count == 0) layout.memory_starved else layout.memory_revoked);
            // Only the stop is of interest now; the socket may stay hung up.
            self.awaitStop();
            return null;
        }
    }

    /// Whether the isolate sleeps when it may not any more. Asks it to look.
    fn isStarved(self: *Guard) bool {
        const looks = self.owner.looks.load(.seq_cst);
        self.unanswered = if (looks == self.looks) self.unanswered + 1 else 0;
        self.looks = looks;
        if (self.unanswered > 0 and self.is_signalled) return true;
        if (self.unanswered > self.patience) return true;
        const signals = interrupt.count.load(.seq_cst);
        self.is_signalled = signals != self.signals;
        self.signals = signals;
        self.owner.health.notify();
        return false;
    }

    fn awaitStop(self: *Guard) void {
        var watched = [1]linux.pollfd{.{ .fd = self.stop, .events = linux.POLL.IN, .revents = 0 }};
        while (linux.poll(&watched, 1, -1) != 1) {}
    }

    fn takeMemory(self: *Guard, state: u32) void {
        self.owner.lock.lock();
        defer self.owner.lock.unlock();
        self.owner.health.state.store(state, .seq_cst);
        defer self.owner.health.notify();
        var next = self.owner.views.first;
        while (next) |region| : (next = region.next) {
            if (region.userfault.load(.acquire) < 0) continue;
            region.is_revoked.store(true, .seq_cst);
            // When the system refuses, whoever sleeps there sees zeros.
            if (!region.replaceBy(self.nothing)) userfault.unregister(self.fd, region.base, region.map_size);
        }
    }

    /// No region is watched any more; all that was held is given back.
    fn finish(self: *Guard) void {
        if (self.thread) |thread| {
            descriptor.signalOwn(self.stop);
            thread.join();
        }
        self.owner.lock.lock();
        var next = self.owner.views.first;
        while (next) |region| : (next = region.next) {
            if (self.fd < 0 or region.userfault.cmpxchgStrong(self.fd, -1, .seq_cst, .seq_cst) != null) continue;
            userfault.unregister(self.fd, region.base, region.map_size);
        }
        self.owner.lock.unlock();
        // A signal handler may have read the number before.
        mapping.awaitHandlers();
        for ([_]i32{ self.fd, self.nothing, self.epoll, self.stop }) |fd| {
            if (fd >= 0) sys.closeQuietly(fd);
        }
        sync.allocator.destroy(self);
    }
};

/// Regions mapped from here on are watched by the userfaultfd `fd`, which on
/// success becomes the memory's. When `hangup_fd`, the front-end's socket,
/// hangs up before `end`, the memory is taken away; so it is when the isolate
/// has slept for `timeout_ms`. -EBUSY when there are regions, or it listens
/// already.
pub fn listen(handle: u32, fd: i32, hangup_fd: i32, timeout_ms: u32) callconv(.c) i32 {
    const self = memory.get(handle) orelse return sys.fail(.BADF);
    const guard = sync.allocator.create(Guard) catch return sys.fail(.NOMEM);
    guard.* = .{
        .owner = self,
        .fd = -1,
        .nothing = descriptor.memfdCreate(0),
        .patience = timeout_ms / Guard.look_ms,
    };
    const started = guard.start(hangup_fd);
    if (started < 0) {
        guard.finish();
        return started;
    }
    self.lock.lock();
    const is_busy = self.postcopy != null or self.views.first != null;
    if (!is_busy) {
        guard.fd = fd;
        self.postcopy = guard;
    }
    self.lock.unlock();
    if (!is_busy) return 0;
    guard.finish();
    return sys.fail(.BUSY);
}

/// All pages are there, or (`is_gone` = 1) will never be: then the memory is
/// taken away. Not listening is no error.
pub fn end(handle: u32, is_gone: u32) callconv(.c) i32 {
    const self = memory.get(handle) orelse return sys.fail(.BADF);
    self.lock.lock();
    const guard = self.postcopy;
    self.postcopy = null;
    self.lock.unlock();
    const found = guard orelse return 0;
    if (is_gone != 0) found.takeMemory(layout.memory_revoked);
    found.finish();
    return 0;
}

test {
    _ = interrupt;
    _ = @import("postcopy_test.zig");
}
