//! What the library does to its process, once: it takes over SIGBUS, pins
//! itself in memory, and says why on a safety panic.

const std = @import("std");
const builtin = @import("builtin");
const linux = @import("linux.zig");
const sync = @import("sync.zig");
const fault = @import("memory/fault.zig");
const untrusted_event = @import("untrusted_event.zig");

/// A panic is a bug of ours: one line and an end. The default handler would
/// add 270 KB of stack-trace printing to each library.
pub const panic = std.debug.FullPanic(panicNow);

fn panicNow(message: []const u8, _: ?usize) noreturn {
    const parts = [_][]const u8{ "vhost2 core: internal error: ", message, "\n" };
    for (parts) |part| _ = linux.linux.write(2, part.ptr, part.len);
    _ = linux.linux.kill(linux.linux.getpid(), .ABRT);
    linux.linux.exit_group(134);
}

/// The calling thread, as `thread_is_alive` knows it.
pub fn threadId() callconv(.c) i32 {
    return linux.linux.gettid();
}

/// Whether a thread of this process has not ended yet: 1 or 0.
pub fn threadIsAlive(thread: i32) callconv(.c) i32 {
    if (thread <= 0) return linux.fail(.INVAL);
    const pid: usize = @intCast(linux.linux.getpid());
    const raw = linux.linux.syscall3(.tgkill, pid, @intCast(thread), 0);
    return @intFromBool(linux.linux.errno(raw) != .SRCH);
}

/// Bytes from the start of a page to the start of `buffer`.
pub fn pageOffset(buffer: ?[*]u8) callconv(.c) u32 {
    return @truncate(@intFromPtr(buffer) % std.heap.page_size_min);
}

var lock: sync.Mutex = .{};
var is_ready: bool = false;

/// May be called by every isolate; only the first call does anything.
pub fn init() callconv(.c) i32 {
    lock.lock();
    defer lock.unlock();
    if (is_ready) return 0;
    pin();
    const result = fault.install();
    if (result < 0) return result;
    untrusted_event.prepare();
    is_ready = true;
    return 0;
}

const DlInfo = extern struct { file_name: ?[*:0]const u8, base: ?*anyopaque, symbol_name: ?[*:0]const u8, symbol: ?*anyopaque };
extern fn dladdr(address: *const anyopaque, info: *DlInfo) c_int;
extern fn dlopen(path: [*:0]const u8, flags: c_int) ?*anyopaque;
const RTLD_LAZY = 1;
const RTLD_NOLOAD = 4;
const RTLD_NODELETE = 0x1000;

/// A library that only a Worker has loaded is unmapped when the Worker ends,
/// and its signal handler and threads would be left without code.
fn pin() void {
    if (builtin.is_test) return;
    var info: DlInfo = undefined;
    if (dladdr(@ptrCast(&init), &info) == 0) return;
    const name = info.file_name orelse return;
    _ = dlopen(name, RTLD_LAZY | RTLD_NOLOAD | RTLD_NODELETE);
}

test "a thread is alive until it has ended" {
    const Seen = struct {
        var id: std.atomic.Value(i32) = .init(0);
        fn run(_: ?*anyopaque) callconv(.c) ?*anyopaque {
            id.store(threadId(), .release);
            return null;
        }
    };
    try std.testing.expectEqual(1, threadIsAlive(threadId()));
    const thread = sync.Thread.spawn(Seen.run, null).?;
    thread.join();
    const id = Seen.id.load(.acquire);
    try std.testing.expect(id > 0 and id != threadId());
    try std.testing.expectEqual(0, threadIsAlive(id));
    try std.testing.expectEqual(linux.fail(.INVAL), threadIsAlive(0));
}
