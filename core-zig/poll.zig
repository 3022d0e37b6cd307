//! Wake-ups: one epoll set for all that an isolate waits for, and a byte on a
//! socket pair that wakes its event loop.
//!
//! Everything is edge-triggered: a kick costs no read, and a descriptor that
//! stays ready cannot spin. A native thread waits on the set (through an outer
//! epoll, edge-triggered too) and writes at most one byte until the isolate
//! has drained; the isolate asks the set itself what is ready. A Worker needs
//! no thread: it blocks in `wait`.

const std = @import("std");
const sys = @import("linux.zig");
const sync = @import("sync.zig");
const layout = @import("layout.zig");
const Handles = @import("handles.zig").Handles;
const descriptor = @import("descriptor.zig");
const linux = sys.linux;

const Poll = struct {
    epoll: i32,
    /// Signalled by the SIGBUS handler.
    fault: i32,
    /// -1 when there is no thread.
    outer: i32 = -1,
    stop: i32 = -1,
    wake: i32 = -1,
    thread: ?sync.Thread = null,
    /// 1: a byte is on its way.
    pending: std.atomic.Value(u32) = .init(0),
};

var polls: Handles(Poll) = .{};

const EPOLLIN = linux.EPOLL.IN;
const EPOLLET: u32 = 1 << 31;
const EPOLLRDHUP: u32 = 0x2000;

fn control(epoll: i32, operation: u32, fd: i32, events: u32, token: u32) i32 {
    var event: linux.epoll_event = .{ .events = events, .data = .{ .u64 = token } };
    return sys.result(linux.epoll_ctl(epoll, operation, fd, &event));
}

/// With `wake_fd_out` a thread is started, and the descriptor written there,
/// which becomes the caller's, gets a byte when there is something to drain.
pub fn create(wake_fd_out: ?*i32) callconv(.c) i32 {
    const self = sync.allocator.create(Poll) catch return sys.fail(.NOMEM);
    self.* = .{
        .epoll = sys.result(linux.epoll_create1(linux.EPOLL.CLOEXEC)),
        .fault = descriptor.eventfdCreate(),
    };
    var isolate_end: i32 = -1;
    const result = start(self, wake_fd_out != null, &isolate_end);
    const handle = if (result < 0) null else polls.insert(self);
    if (handle) |value| {
        if (wake_fd_out) |out| out.* = isolate_end;
        return @intCast(value);
    }
    if (isolate_end >= 0) sys.closeQuietly(isolate_end);
    stopThread(self);
    finish(self);
    return if (result < 0) result else sys.fail(.NFILE);
}

fn start(self: *Poll, has_thread: bool, isolate_end: *i32) i32 {
    if (self.epoll < 0) return self.epoll;
    if (self.fault < 0) return self.fault;
    const added = control(self.epoll, linux.EPOLL.CTL_ADD, self.fault, EPOLLIN | EPOLLET, layout.token_fault);
    if (added < 0 or !has_thread) return added;

    var ends: [2]i32 = undefined;
    const paired = sys.result(linux.socketpair(linux.AF.UNIX, linux.SOCK.STREAM | linux.SOCK.CLOEXEC | linux.SOCK.NONBLOCK, 0, &ends));
    if (paired < 0) return paired;
    isolate_end.* = ends[0];
    self.wake = ends[1];
    self.outer = sys.result(linux.epoll_create1(linux.EPOLL.CLOEXEC));
    if (self.outer < 0) return self.outer;
    self.stop = descriptor.eventfdCreate();
    if (self.stop < 0) return self.stop;
    const watched = control(self.outer, linux.EPOLL.CTL_ADD, self.epoll, EPOLLIN | EPOLLET, 0);
    if (watched < 0) return watched;
    const stoppable = control(self.outer, linux.EPOLL.CTL_ADD, self.stop, EPOLLIN, 1);
    if (stoppable < 0) return stoppable;
    self.thread = sync.Thread.spawn(run, self) orelse return sys.fail(.AGAIN);
    return 0;
}

fn run(argument: ?*anyopaque) callconv(.c) ?*anyopaque {
    const self: *Poll = @ptrCast(@alignCast(argument.?));
    var events: [2]linux.epoll_event = undefined;
    while (true) {
        const count = linux.epoll_wait(self.outer, &events, events.len, -1);
        if (sys.isError(count)) continue; // EINTR; the descriptors are ours
        for (events[0..count]) |event| {
            if (event.data.u64 == 1) return null;
        }
        wakeIsolate(self);
    }
}

fn wakeIsolate(self: *Poll) void {
    // Pairs with the store in `wait`: the isolate clears `pending` first and
    // looks afterwards, so an event that comes in between wakes it again.
    if (self.pending.swap(1, .acq_rel) != 0) return;
    const byte = [1]u8{1};
    _ = linux.sendto(self.wake, &byte, 1, linux.MSG.NOSIGNAL | linux.MSG.DONTWAIT, null, 0);
}

/// The eventfd that says to this poll's owner that some memory faulted.
pub fn faultEvent(handle: u32) i32 {
    const self = polls.get(handle) orelse return sys.fail(.BADF);
    return self.fault;
}

/// Watches `fd` for input, and with `writable` = 1 for room to write, under
/// `token`. Called again for the same descriptor it changes what is watched.
pub fn add(handle: u32, fd: i32, token: u32, writable: u32) callconv(.c) i32 {
    const self = polls.get(handle) orelse return sys.fail(.BADF);
    if (token == layout.token_fault) return sys.fail(.INVAL);
    const events = EPOLLIN | EPOLLRDHUP | EPOLLET | (if (writable != 0) @as(u32, linux.EPOLL.OUT) else 0);
    const added = control(self.epoll, linux.EPOLL.CTL_ADD, fd, events, token);
    if (added != sys.fail(.EXIST)) return added;
    return control(self.epoll, linux.EPOLL.CTL_MOD, fd, events, token);
}

pub fn remove(handle: u32, fd: i32) callconv(.c) i32 {
    const self = polls.get(handle) orelse return sys.fail(.BADF);
    return control(self.epoll, linux.EPOLL.CTL_DEL, fd, 0, 0);
}

/// What is ready: waits for it up to `timeout_us` microseconds (a Worker's
/// wait; keep it at 100,000 or less), or not at all with 0. When `capacity`
/// events were returned there may be more: call again.
pub fn wait(handle: u32, timeout_us: u32, events_out: [*]layout.PollEvent, capacity: u32) callconv(.c) i32 {
    const self = polls.get(handle) orelse return sys.fail(.BADF);
    self.pending.store(0, .seq_cst);
    var events: [64]linux.epoll_event = undefined;
    const room: u32 = @min(capacity, events.len);
    const raw = waitFor(self.epoll, &events, room, @min(timeout_us, 1_000_000));
    if (linux.errno(raw) == .INTR) return 0;
    if (sys.isError(raw)) return sys.result(raw);
    for (events[0..raw], 0..) |event, index| {
        const token: u32 = @truncate(event.data.u64);
        if (token == layout.token_fault) _ = descriptor.eventfdTake(self.fault);
        var flags: u32 = event.events & (layout.event_readable | layout.event_writable | layout.event_error | layout.event_hangup);
        if (event.events & EPOLLRDHUP != 0) flags |= layout.event_hangup;
        events_out[index] = .{ .token = token, .events = flags };
    }
    return sys.result(raw);
}

fn waitFor(epoll: i32, events: [*]linux.epoll_event, room: u32, timeout_us: u32) usize {
    if (timeout_us == 0) return linux.epoll_wait(epoll, events, room, 0);
    const timeout: linux.timespec = .{ .sec = timeout_us / 1_000_000, .nsec = @as(isize, timeout_us % 1_000_000) * 1000 };
    const raw = linux.syscall6(.epoll_pwait2, @as(usize, @bitCast(@as(isize, epoll))), @intFromPtr(events), room, @intFromPtr(&timeout), 0, 8);
    if (linux.errno(raw) != .NOSYS) return raw;
    // Before Linux 5.11: whole milliseconds.
    return linux.epoll_wait(epoll, events, room, @intCast((timeout_us + 999) / 1000));
}

/// While quiet, the thread sleeps on and no byte is sent: the isolate looks by
/// itself. What came in the meantime is told when the quiet ends.
pub fn quiet(handle: u32, is_quiet: u32) callconv(.c) i32 {
    const self = polls.get(handle) orelse return sys.fail(.BADF);
    if (self.outer < 0) return 0;
    if (is_quiet != 0) return control(self.outer, linux.EPOLL.CTL_DEL, self.epoll, 0, 0);
    return control(self.outer, linux.EPOLL.CTL_ADD, self.epoll, EPOLLIN | EPOLLET, 0);
}

pub fn close(handle: u32) callconv(.c) i32 {
    const self = polls.remove(handle) orelse return sys.fail(.BADF);
    stopThread(self);
    finish(self);
    return 0;
}

fn stopThread(self: *Poll) void {
    const thread = self.thread orelse return;
    descriptor.signalOwn(self.stop);
    thread.join();
}

fn finish(self: *Poll) void {
    for ([_]i32{ self.epoll, self.fault, self.outer, self.stop, self.wake }) |fd| {
        if (fd >= 0) sys.closeQuietly(fd);
    }
    sync.allocator.destroy(self);
}

const testing = std.testing;

fn readWake(fd: i32) !void {
    var poll_fd = [1]linux.pollfd{.{ .fd = fd, .events = linux.POLL.IN, .revents = 0 }};
    try testing.expectEqual(1, linux.poll(&poll_fd, 1, 10_000));
    var byte: [8]u8 = undefined;
    try testing.expectEqual(1, linux.read(fd, &byte, byte.len));
}

test "an event wakes the isolate once, and again after a drain" {
    var wake: i32 = -1;
    const poll_handle: u32 = @intCast(create(&wake));
    defer sys.closeQuietly(wake);
    defer _ = close(poll_handle);
    const event = descriptor.eventfdCreate();
    defer sys.closeQuietly(event);
    try testing.expectEqual(0, add(poll_handle, event, 42, 0));
    for (0..100) |_| {
        descriptor.signalOwn(event);
        try readWake(wake);
        var events: [4]layout.PollEvent = undefined;
        try testing.expectEqual(1, wait(poll_handle, 0, &events, events.len));
        try testing.expectEqual(42, events[0].token);
        // Edge-triggered: nothing more although nobody read the counter.
        try testing.expectEqual(0, wait(poll_handle, 0, &events, events.len));
    }
}

test "a worker's wait ends by an event or by its time" {
    const poll_handle: u32 = @intCast(create(null));
    defer _ = close(poll_handle);
    const event = descriptor.eventfdCreate();
    defer sys.closeQuietly(event);
    var events: [4]layout.PollEvent = undefined;
    try testing.expectEqual(0, wait(poll_handle, 1000, &events, events.len));
    try testing.expectEqual(0, add(poll_handle, event, 3, 0));
    descriptor.signalOwn(event);
    try testing.expectEqual(1, wait(poll_handle, 100_000, &events, events.len));
    try testing.expectEqual(3, events[0].token);
    try testing.expectEqual(0, remove(poll_handle, event));
    descriptor.signalOwn(event);
    try testing.expectEqual(0, wait(poll_handle, 1000, &events, events.len));
}

test "in the quiet nobody is woken, and what came is told at its end" {
    var wake: i32 = -1;
    const poll_handle: u32 = @intCast(create(&wake));
    defer sys.closeQuietly(wake);
    defer _ = close(poll_handle);
    const event = descriptor.eventfdCreate();
    defer sys.closeQuietly(event);
    try testing.expectEqual(0, add(poll_handle, event, 7, 0));
    try testing.expectEqual(0, quiet(poll_handle, 1));
    descriptor.signalOwn(event);
    var byte: [1]u8 = undefined;
    try testing.expectEqual(sys.fail(.AGAIN), sys.result(linux.read(wake, &byte, 1)));
    try testing.expectEqual(0, quiet(poll_handle, 0));
    try readWake(wake);
    var events: [4]layout.PollEvent = undefined;
    try testing.expectEqual(1, wait(poll_handle, 0, &events, events.len));
}

test "a regular file cannot be watched, a dead handle is refused" {
    const poll_handle: u32 = @intCast(create(null));
    const memfd = descriptor.memfdCreate(1);
    defer sys.closeQuietly(memfd);
    try testing.expectEqual(sys.fail(.PERM), add(poll_handle, memfd, 1, 0));
    try testing.expectEqual(0, close(poll_handle));
    try testing.expectEqual(sys.fail(.BADF), close(poll_handle));
    try testing.expectEqual(sys.fail(.BADF), add(poll_handle, memfd, 1, 0));
}
