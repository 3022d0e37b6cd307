//! Memory, locks and threads without a libc of our own: pages come from mmap,
//! locks are futexes, and threads are made by the host process's
//! `pthread_create`, so that one library serves glibc and musl (Zig's own
//! threads need a libc to set up thread-local storage).

const std = @import("std");
const builtin = @import("builtin");
const linux = std.os.linux;

pub const allocator = if (builtin.is_test) std.testing.allocator else @import("objects.zig").allocator;

pub const Mutex = struct {
    /// 0 free, 1 held, 2 held with waiters.
    state: std.atomic.Value(u32) = .init(0),

    pub fn lock(self: *Mutex) void {
        if (self.state.cmpxchgStrong(0, 1, .acquire, .monotonic) == null) return;
        while (self.state.swap(2, .acquire) != 0) futexWait(&self.state, 2, null);
    }

    pub fn unlock(self: *Mutex) void {
        if (self.state.swap(0, .release) == 2) futexWake(&self.state, 1);
    }
};

/// Returns when woken, when `*word != expected`, or after the timeout.
pub fn futexWait(word: *const std.atomic.Value(u32), expected: u32, timeout_ms: ?u32) void {
    var timeout: linux.timespec = undefined;
    if (timeout_ms) |ms| timeout = .{ .sec = ms / 1000, .nsec = @as(isize, ms % 1000) * 1_000_000 };
    _ = linux.futex_4arg(word, .{ .cmd = .WAIT, .private = true }, expected, if (timeout_ms != null) &timeout else null);
}

pub fn futexWake(word: *const std.atomic.Value(u32), count: u32) void {
    _ = linux.futex_3arg(word, .{ .cmd = .WAKE, .private = true }, count);
}

extern fn pthread_create(thread: *usize, attributes: ?*const anyopaque, start: *const fn (?*anyopaque) callconv(.c) ?*anyopaque, argument: ?*anyopaque) c_int;
extern fn pthread_join(thread: usize, result: ?*?*anyopaque) c_int;

pub const Thread = struct {
    id: usize,

    pub fn spawn(start: *const fn (?*anyopaque) callconv(.c) ?*anyopaque, argument: ?*anyopaque) ?Thread {
        // Signals belong to the runtime's threads: ours start with all
        // blocked but those that a fault raises in the thread itself.
        var all = linux.sigfillset();
        linux.sigdelset(&all, .BUS);
        linux.sigdelset(&all, .SEGV);
        var old: linux.sigset_t = undefined;
        _ = linux.sigprocmask(linux.SIG.SETMASK, &all, &old);
        defer _ = linux.sigprocmask(linux.SIG.SETMASK, &old, null);
        var thread: Thread = undefined;
        if (pthread_create(&thread.id, null, start, argument) != 0) return null;
        return thread;
    }

    pub fn join(self: Thread) void {
        _ = pthread_join(self.id, null);
    }
};

test "a mutex excludes and wakes its waiters" {
    const Shared = struct {
        mutex: Mutex = .{},
        count: u32 = 0,
        fn run(argument: ?*anyopaque) callconv(.c) ?*anyopaque {
            const self: *@This() = @ptrCast(@alignCast(argument.?));
            for (0..10_000) |_| {
                self.mutex.lock();
                self.count += 1;
                self.mutex.unlock();
            }
            return null;
        }
    };
    var shared: Shared = .{};
    const first = Thread.spawn(Shared.run, &shared).?;
    const second = Thread.spawn(Shared.run, &shared).?;
    first.join();
    second.join();
    try std.testing.expectEqual(20_000, shared.count);
}
