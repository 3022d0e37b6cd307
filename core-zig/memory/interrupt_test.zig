//! Signals that ask the process to end, on their way past us.

const std = @import("std");
const linux = std.os.linux;
const interrupt = @import("interrupt.zig");

const testing = std.testing;

/// The runtime's, for all tests: the first that was found is the one that counts.
pub const Handler = struct {
    pub var plain_calls: u32 = 0;
    pub var full_calls: u32 = 0;

    pub fn plain(_: linux.SIG) callconv(.c) void {
        plain_calls += 1;
    }

    pub fn full(signal: linux.SIG, info: *const linux.siginfo_t, _: ?*anyopaque) callconv(.c) void {
        if (info.signo == signal) full_calls += 1;
    }
};

pub fn set(signal: linux.SIG, handler: @FieldType(linux.Sigaction, "handler"), flags: @FieldType(linux.Sigaction, "flags")) void {
    const action: linux.Sigaction = .{ .handler = handler, .mask = linux.sigemptyset(), .flags = flags };
    std.debug.assert(linux.sigaction(signal, &action, null) == 0);
}

fn raise(signal: linux.SIG) void {
    _ = linux.tkill(linux.gettid(), signal);
}

fn handlerOf(signal: linux.SIG) usize {
    var current: linux.Sigaction = undefined;
    _ = linux.sigaction(signal, null, &current);
    return @intFromPtr(current.handler.handler);
}

test "a signal is counted and reaches the handler that was there, as often as it comes" {
    defer for ([_]linux.SIG{ .INT, .TERM }) |signal| set(signal, .{ .handler = linux.SIG.DFL }, 0);
    // Without a handler the default stays, and ends the process.
    interrupt.watch();
    try testing.expectEqual(@intFromPtr(linux.SIG.DFL), handlerOf(.INT));
    set(.INT, .{ .handler = Handler.plain }, 0);
    set(.TERM, .{ .sigaction = Handler.full }, linux.SA.SIGINFO);
    interrupt.watch();
    interrupt.watch();
    const full_calls = Handler.full_calls;
    const before = interrupt.count.load(.seq_cst);
    raise(.INT);
    raise(.INT);
    raise(.TERM);
    try testing.expectEqual(before + 3, interrupt.count.load(.seq_cst));
    try testing.expectEqual(2, Handler.plain_calls);
    try testing.expectEqual(full_calls + 1, Handler.full_calls);
    // Taken away and set again, as a runtime does it.
    set(.INT, .{ .handler = linux.SIG.DFL }, 0);
    interrupt.watch();
    try testing.expectEqual(@intFromPtr(linux.SIG.DFL), handlerOf(.INT));
    set(.INT, .{ .handler = Handler.plain }, 0);
    interrupt.watch();
    raise(.INT);
    try testing.expectEqual(before + 4, interrupt.count.load(.seq_cst));
    try testing.expectEqual(3, Handler.plain_calls);
    // Another one might chain to ours.
    set(.INT, .{ .sigaction = Handler.full }, linux.SA.SIGINFO);
    interrupt.watch();
    raise(.INT);
    try testing.expectEqual(before + 4, interrupt.count.load(.seq_cst));
    try testing.expectEqual(full_calls + 2, Handler.full_calls);
}
