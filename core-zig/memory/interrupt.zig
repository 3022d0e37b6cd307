//! SIGINT and SIGTERM while a thread sleeps on a missing page (`postcopy.zig`).
//!
//! A runtime handles them in JavaScript, on the thread that may be the sleeper:
//! then nothing but SIGKILL would end the process. So they are counted on their
//! way to the runtime's handler. Where there is none the default ends the
//! process, sleepers included, and is left alone.
//!
//! The handler uses one atomic and goes on to the one that was there before.

const std = @import("std");
const linux = std.os.linux;
const sync = @import("../sync.zig");
const sys = @import("../linux.zig");

/// How many have come since somebody watches.
pub var count: std.atomic.Value(u32) = .init(0);

const signals = [_]linux.SIG{ .INT, .TERM };
/// The runtime's handlers; complete before ours can run.
var previous: [signals.len]linux.Sigaction = undefined;
var has_previous: [signals.len]bool = @splat(false);
var lock: sync.Mutex = .{};

/// Counts from here on. To be called again now and then: a handler may come
/// later, or come back. One that takes the place of the first that was found
/// may chain to ours, and is left alone: chained in a ring they would not end.
pub fn watch() void {
    lock.lock();
    defer lock.unlock();
    for (signals, &previous, &has_previous) |signal, *old, *has_old| {
        var current: linux.Sigaction = undefined;
        if (linux.sigaction(signal, null, &current) != 0) continue;
        const address = @intFromPtr(current.handler.handler);
        if (address == @intFromPtr(linux.SIG.DFL) or address == @intFromPtr(linux.SIG.IGN)) continue;
        if (address == @intFromPtr(&onSignal)) continue;
        if (has_old.* and address != @intFromPtr(old.handler.handler)) continue;
        old.* = current;
        has_old.* = true;
        var ours = current;
        ours.handler = .{ .sigaction = onSignal };
        ours.flags |= linux.SA.SIGINFO;
        _ = linux.sigaction(signal, &ours, null);
    }
}

fn onSignal(signal: linux.SIG, info: *const linux.siginfo_t, context: ?*anyopaque) callconv(.c) void {
    _ = count.fetchAdd(1, .seq_cst);
    for (signals, &previous) |watched, *old| {
        if (watched != signal) continue;
        if (old.flags & linux.SA.SIGINFO != 0) {
            old.handler.sigaction.?(signal, info, context);
        } else {
            old.handler.handler.?(signal);
        }
    }
}

test {
    _ = @import("interrupt_test.zig");
}
