//! SIGBUS: a front-end shrank the file behind a region (or a disk filled up
//! behind a sparse one) and somebody touched a page that is no more. The
//! region is replaced by zero pages and the access goes on; its device is
//! marked, every other one never notices.
//!
//! The handler uses atomics, `mmap`, `madvise` and `write` only. Faults
//! elsewhere go to the handler that was there before (Deno has one). A handler
//! that somebody installs after ours takes the signal away from us: nothing
//! can prevent that; it has to chain, as ours does.

const std = @import("std");
const linux = std.os.linux;
const sync = @import("../sync.zig");
const sys = @import("../linux.zig");
const mapping = @import("mapping.zig");

var previous: linux.Sigaction = undefined;
var is_installed = false;
var lock: sync.Mutex = .{};

/// Installs the handler, once per process however often it is called.
pub fn install() i32 {
    lock.lock();
    defer lock.unlock();
    if (is_installed) return 0;
    // `previous` is complete before our handler can run and read it.
    const asked = sys.result(linux.sigaction(.BUS, null, &previous));
    if (asked < 0) return asked;
    const action: linux.Sigaction = .{
        .handler = .{ .sigaction = onSignal },
        .mask = linux.sigemptyset(),
        .flags = linux.SA.SIGINFO | linux.SA.ONSTACK | linux.SA.RESTART,
    };
    const set = sys.result(linux.sigaction(.BUS, &action, null));
    if (set >= 0) is_installed = true;
    return set;
}

fn onSignal(signal: linux.SIG, info: *const linux.siginfo_t, context: ?*anyopaque) callconv(.c) void {
    // Codes above 0 are the kernel's, about an address; others come from
    // kill(2) and the like and name none.
    const is_fault = info.code > 0;
    if (is_fault and mapping.onFault(@intFromPtr(info.fields.sigfault.addr))) return;
    chain(signal, info, context, is_fault);
}

fn chain(signal: linux.SIG, info: *const linux.siginfo_t, context: ?*anyopaque, is_fault: bool) void {
    const address = @intFromPtr(previous.handler.handler);
    const default = @intFromPtr(linux.SIG.DFL);
    const ignore = @intFromPtr(linux.SIG.IGN);
    if (address == ignore and !is_fault) return;
    if (address == default or address == ignore) {
        // With the default restored the faulting instruction runs again and
        // ends the process as if we were not there.
        const action: linux.Sigaction = .{ .handler = .{ .handler = linux.SIG.DFL }, .mask = linux.sigemptyset(), .flags = 0 };
        _ = linux.sigaction(signal, &action, null);
        if (!is_fault) _ = linux.tkill(linux.gettid(), signal);
        return;
    }
    if (previous.flags & linux.SA.SIGINFO != 0) {
        previous.handler.sigaction.?(signal, info, context);
    } else {
        previous.handler.handler.?(signal);
    }
}

const testing = std.testing;

/// Runs `body` in a child and says how it ended: the wait status.
fn inChild(comptime body: fn () void) u32 {
    const pid: i32 = @intCast(linux.fork());
    if (pid == 0) {
        body();
        linux.exit_group(7);
    }
    var status: u32 = 0;
    _ = linux.waitpid(pid, &status, 0);
    return status;
}

fn shrunkPage() *volatile u8 {
    const fd: i32 = @intCast(linux.memfd_create("vhost2-test", linux.MFD.CLOEXEC));
    _ = linux.ftruncate(fd, 4096);
    const raw = linux.mmap(null, 4096, .{ .READ = true, .WRITE = true }, .{ .TYPE = .SHARED }, fd, 0);
    _ = linux.ftruncate(fd, 0);
    sys.closeQuietly(fd);
    return @ptrFromInt(raw);
}

fn setHandler(handler: ?linux.Sigaction.handler_fn) void {
    const action: linux.Sigaction = .{ .handler = .{ .handler = handler }, .mask = linux.sigemptyset(), .flags = 0 };
    _ = linux.sigaction(.BUS, &action, null);
    is_installed = false;
    _ = install();
}

test "a foreign fault ends the process as before when there was no handler" {
    const status = inChild(struct {
        fn body() void {
            setHandler(linux.SIG.DFL);
            shrunkPage().* = 1;
        }
    }.body);
    try testing.expectEqual(@intFromEnum(linux.SIG.BUS), status & 0x7f);
}

test "a foreign fault reaches the handler that was there before" {
    const Exit = struct {
        fn plain(_: linux.SIG) callconv(.c) void {
            linux.exit_group(42);
        }
        fn body() void {
            setHandler(plain);
            shrunkPage().* = 1;
        }
        fn kill() void {
            setHandler(plain);
            _ = linux.tkill(linux.gettid(), .BUS);
        }
    };
    try testing.expectEqual(42 << 8, inChild(Exit.body));
    try testing.expectEqual(42 << 8, inChild(Exit.kill));
}

test "kill -BUS ends the process by default and is ignored where it was" {
    const Kill = struct {
        fn byDefault() void {
            setHandler(linux.SIG.DFL);
            _ = linux.tkill(linux.gettid(), .BUS);
        }
        fn ignored() void {
            setHandler(linux.SIG.IGN);
            _ = linux.tkill(linux.gettid(), .BUS);
        }
    };
    try testing.expectEqual(@intFromEnum(linux.SIG.BUS), inChild(Kill.byDefault) & 0x7f);
    try testing.expectEqual(7 << 8, inChild(Kill.ignored));
}
