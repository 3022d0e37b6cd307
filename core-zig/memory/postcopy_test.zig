//! Missing pages: who touches one sleeps until it is filled, until the file
//! shrinks, or until the front-end has gone. Where the kernel refuses a
//! userfaultfd these tests are skipped.

const std = @import("std");
const linux = std.os.linux;
const sync = @import("../sync.zig");
const sys = @import("../linux.zig");
const layout = @import("../layout.zig");
const descriptor = @import("../descriptor.zig");
const fault = @import("fault.zig");
const interrupt = @import("interrupt.zig");
const given_signal = @import("interrupt_test.zig");
const memory = @import("memory.zig");
const postcopy = @import("postcopy.zig");
const userfault = @import("userfault.zig");
const given = @import("memory_test.zig");

const testing = std.testing;
const Fixture = given.Fixture;
const page = 4096;

/// A Memory that listens, with the front-end's ends of socket and userfaultfd.
const Listening = struct {
    fixture: Fixture,
    front: i32,
    back: i32,
    faults: i32,

    fn init() !Listening {
        return patient(60_000);
    }

    fn patient(timeout_ms: u32) !Listening {
        const fd = userfault.open();
        if (fd == sys.fail(.PERM) or fd == sys.fail(.NOSYS) or fd == sys.fail(.OPNOTSUPP)) return error.SkipZigTest;
        try testing.expect(fd >= 0);
        var ends: [2]i32 = undefined;
        try testing.expectEqual(0, linux.socketpair(linux.AF.UNIX, linux.SOCK.STREAM | linux.SOCK.CLOEXEC, 0, &ends));
        const self: Listening = .{ .fixture = .init(), .front = ends[0], .back = ends[1], .faults = @intCast(linux.dup(fd)) };
        try testing.expectEqual(0, postcopy.listen(self.fixture.handle, fd, self.back, timeout_ms));
        return self;
    }

    fn hangUp(self: *Listening) void {
        if (self.front >= 0) sys.closeQuietly(self.front);
        self.front = -1;
    }

    fn deinit(self: *Listening) void {
        std.debug.assert(postcopy.end(self.fixture.handle, 0) == 0);
        self.fixture.deinit();
        self.hangUp();
        sys.closeQuietly(self.back);
        sys.closeQuietly(self.faults);
    }

    /// The page that somebody waits for.
    fn next(self: *const Listening) !u64 {
        var watched = [1]linux.pollfd{.{ .fd = self.faults, .events = linux.POLL.IN, .revents = 0 }};
        try testing.expectEqual(1, linux.poll(&watched, 1, 20_000));
        var address: [4]u64 = undefined;
        try testing.expectEqual(1, userfault.read(self.faults, &address, address.len));
        return address[0] & ~@as(u64, page - 1);
    }
};

/// A thread that reads one byte of guest memory.
const Toucher = struct {
    at: *volatile u8,
    seen: u8 = 0,

    fn start(self: *Toucher) sync.Thread {
        return sync.Thread.spawn(run, self).?;
    }

    fn run(argument: ?*anyopaque) callconv(.c) ?*anyopaque {
        const self: *Toucher = @ptrCast(@alignCast(argument.?));
        self.seen = self.at.*;
        return null;
    }
};

test "who touches a missing page gets what the front-end fills it with" {
    var given_memory: Listening = try .init();
    defer given_memory.deinit();
    const fd = given.memfd(4 * page);
    defer sys.closeQuietly(fd);
    try given_memory.fixture.set(&.{given.request(fd, 0, 4 * page, 0)});
    const bytes = given_memory.fixture.at(0, 4 * page).?;
    var toucher: Toucher = .{ .at = &bytes[page + 7] };
    const thread = toucher.start();
    try testing.expectEqual(@intFromPtr(bytes) + page, try given_memory.next());
    const source: [page]u8 = @splat(0x5a);
    try testing.expectEqual(0, userfault.copy(given_memory.faults, @intFromPtr(bytes) + page, &source, page));
    thread.join();
    try testing.expectEqual(0x5a, toucher.seen);
    try testing.expectEqual(sys.fail(.EXIST), userfault.copy(given_memory.faults, @intFromPtr(bytes) + page, &source, page));
    // As QEMU does it: through its own mapping of the file, and a wake.
    var other: Toucher = .{ .at = &bytes[2 * page] };
    const second = other.start();
    const address = try given_memory.next();
    try testing.expectEqual(page, linux.pwrite(fd, &source, page, 2 * page));
    try testing.expectEqual(0, userfault.wake(given_memory.faults, address, page));
    second.join();
    try testing.expectEqual(0x5a, other.seen);
    // After the end a page that never came is a page of zeros.
    try testing.expectEqual(0, postcopy.end(given_memory.fixture.handle, 0));
    try testing.expectEqual(0, bytes[3 * page]);
    try testing.expectEqual(@as(i32, layout.memory_ok), memory.state(given_memory.fixture.handle));
}

test "the end of postcopy wakes who still sleeps" {
    var given_memory: Listening = try .init();
    defer given_memory.deinit();
    const fd = given.memfd(page);
    defer sys.closeQuietly(fd);
    try given_memory.fixture.set(&.{given.request(fd, 0, page, 0)});
    var toucher: Toucher = .{ .at = &given_memory.fixture.at(0, page).?[0], .seen = 1 };
    const thread = toucher.start();
    _ = try given_memory.next();
    try testing.expectEqual(0, postcopy.end(given_memory.fixture.handle, 0));
    thread.join();
    try testing.expectEqual(0, toucher.seen);
}

test "a front-end that goes while somebody sleeps costs its memory, not the sleeper" {
    try testing.expectEqual(0, fault.install());
    var given_memory: Listening = try .init();
    defer given_memory.deinit();
    const fd = given.memfd(2 * page);
    defer sys.closeQuietly(fd);
    try given_memory.fixture.set(&.{given.request(fd, 0, 2 * page, 0)});
    const bytes = given_memory.fixture.at(0, 2 * page).?;
    // A system call sleeps too, and must not put zeros in the file.
    const disk = given.memfd(page);
    defer sys.closeQuietly(disk);
    const Writer = struct {
        from: [*]u8,
        to: i32,
        result: i32 = 0,
        fn run(argument: ?*anyopaque) callconv(.c) ?*anyopaque {
            const self: *@This() = @ptrCast(@alignCast(argument.?));
            self.result = sys.result(linux.pwrite(self.to, self.from, page, 0));
            return null;
        }
    };
    var writer: Writer = .{ .from = bytes + page, .to = disk };
    const writing = sync.Thread.spawn(Writer.run, &writer).?;
    try testing.expectEqual(@intFromPtr(bytes) + page, try given_memory.next());
    given_memory.hangUp();
    writing.join();
    try testing.expectEqual(sys.fail(.FAULT), writer.result);
    var toucher: Toucher = .{ .at = &bytes[0], .seen = 1 };
    toucher.start().join();
    try testing.expectEqual(0, toucher.seen);
    try testing.expectEqual(@as(i32, layout.memory_revoked), memory.state(given_memory.fixture.handle));
}

test "a signal to end the process while somebody sleeps costs the memory, not the sleeper" {
    try testing.expectEqual(0, fault.install());
    given_signal.set(.TERM, .{ .sigaction = given_signal.Handler.full }, linux.SA.SIGINFO);
    defer given_signal.set(.TERM, .{ .handler = linux.SIG.DFL }, 0);
    const calls = given_signal.Handler.full_calls;
    var given_memory: Listening = try .init();
    defer given_memory.deinit();
    const fd = given.memfd(page);
    defer sys.closeQuietly(fd);
    try given_memory.fixture.set(&.{given.request(fd, 0, page, 0)});
    var toucher: Toucher = .{ .at = &given_memory.fixture.at(0, page).?[0], .seen = 1 };
    const thread = toucher.start();
    _ = try given_memory.next();

    _ = linux.tkill(linux.gettid(), .TERM);
    thread.join();
    try testing.expectEqual(0, toucher.seen);
    try testing.expectEqual(calls + 1, given_signal.Handler.full_calls);
    try testing.expectEqual(@as(i32, layout.memory_starved), memory.state(given_memory.fixture.handle));
}

test "an isolate that sleeps for longer than it may gets zeros in the place of the memory" {
    try testing.expectEqual(0, fault.install());
    var given_memory: Listening = try .patient(400);
    defer given_memory.deinit();
    const handle = given_memory.fixture.handle;
    const event = descriptor.eventfdCreate();
    defer sys.closeQuietly(event);
    given_memory.fixture.self.health.event.store(@intCast(linux.dup(event)), .seq_cst);
    const fd = given.memfd(page);
    defer sys.closeQuietly(fd);
    try given_memory.fixture.set(&.{given.request(fd, 0, page, 0)});
    var toucher: Toucher = .{ .at = &given_memory.fixture.at(0, page).?[0], .seen = 1 };
    const thread = toucher.start();
    _ = try given_memory.next();

    // Awake, it is asked again and again, and loses nothing although a Worker
    // sleeps for longer.
    for (0..6) |_| {
        try askedToLook(event);
        try testing.expectEqual(@as(i32, layout.memory_ok), memory.state(handle));
    }
    try testing.expectEqual(1, toucher.seen);
    thread.join();
    try testing.expectEqual(0, toucher.seen);
    try testing.expectEqual(@as(i32, layout.memory_starved), memory.state(handle));
    // It is told, when it can be.
    try askedToLook(event);
    const more = given.request(fd, page, page, 0);
    try testing.expectEqual(sys.fail(.STALE), given_memory.fixture.prepare(layout.prepare_add, &.{more}));
}

fn askedToLook(event: i32) !void {
    var watched = [1]linux.pollfd{.{ .fd = event, .events = linux.POLL.IN, .revents = 0 }};
    try testing.expectEqual(1, linux.poll(&watched, 1, 20_000));
    _ = descriptor.eventfdTake(event);
}

test "a signal that the isolate can handle costs nothing" {
    given_signal.set(.TERM, .{ .sigaction = given_signal.Handler.full }, linux.SA.SIGINFO);
    defer given_signal.set(.TERM, .{ .handler = linux.SIG.DFL }, 0);
    var given_memory: Listening = try .init();
    defer given_memory.deinit();
    const handle = given_memory.fixture.handle;
    const event = descriptor.eventfdCreate();
    defer sys.closeQuietly(event);
    given_memory.fixture.self.health.event.store(@intCast(linux.dup(event)), .seq_cst);

    // Twice: had it taken the memory it would look no more.
    for (0..2) |_| {
        _ = linux.tkill(linux.gettid(), .TERM);
        // As an isolate that is awake does: it answers, whether the question
        // came before the signal or after.
        for (0..2) |_| {
            try askedToLook(event);
            try testing.expectEqual(@as(i32, layout.memory_ok), memory.state(handle));
        }
    }
}

test "a file that shrinks under postcopy wakes who sleeps in it" {
    try testing.expectEqual(0, fault.install());
    var given_memory: Listening = try .init();
    defer given_memory.deinit();
    const fd = given.memfd(4 * page);
    defer sys.closeQuietly(fd);
    try given_memory.fixture.set(&.{given.request(fd, 0, 4 * page, 0)});
    const bytes = given_memory.fixture.at(0, 4 * page).?;
    var sleeper: Toucher = .{ .at = &bytes[0], .seen = 1 };
    const sleeping = sleeper.start();
    _ = try given_memory.next();
    given.resize(fd, page);
    var toucher: Toucher = .{ .at = &bytes[2 * page], .seen = 1 };
    toucher.start().join();
    sleeping.join();
    try testing.expectEqual(0, toucher.seen);
    try testing.expectEqual(0, sleeper.seen);
    try testing.expectEqual(@as(i32, layout.memory_faulted), memory.state(given_memory.fixture.handle));
}

test "a memory that has regions, or listens, cannot begin; a disk file cannot be watched" {
    var given_memory: Listening = try .init();
    defer given_memory.deinit();
    const handle = given_memory.fixture.handle;
    const fd = given.memfd(page);
    defer sys.closeQuietly(fd);
    try testing.expectEqual(sys.fail(.BUSY), postcopy.listen(handle, given_memory.faults, given_memory.back, 60_000));
    try testing.expectEqual(sys.fail(.BADF), postcopy.listen(handle, given_memory.faults, -1, 60_000));
    try testing.expectEqual(sys.fail(.BUSY), memory.destroy(handle));
    try given_memory.fixture.set(&.{given.request(fd, 0, page, 0)});
    // The failed attempts have left the regions watched.
    var toucher: Toucher = .{ .at = &given_memory.fixture.at(0, page).?[0] };
    const thread = toucher.start();
    try testing.expectEqual(@intFromPtr(toucher.at), try given_memory.next());
    try testing.expectEqual(sys.fail(.BUSY), postcopy.listen(handle, given_memory.faults, given_memory.back, 60_000));
    const source: [page]u8 = @splat(9);
    try testing.expectEqual(0, userfault.copy(given_memory.faults, @intFromPtr(toucher.at), &source, page));
    thread.join();
    try testing.expectEqual(9, toucher.seen);
    try testing.expectEqual(0, postcopy.end(handle, 0));
    try testing.expectEqual(sys.fail(.BUSY), postcopy.listen(handle, given_memory.faults, given_memory.back, 60_000));
}
