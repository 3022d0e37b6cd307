//! Signalling an eventfd that a front-end gave us, without ever blocking.
//!
//! A write blocks when the counter is full and O_NONBLOCK is off, and both are
//! in the front-end's hands: the flag belongs to the open file that we share,
//! so setting it, or asking first, only narrows the race. The kernel's own
//! signal never blocks, and it can be had: an asynchronous read of nothing
//! signals the eventfd named by IOCB_FLAG_RESFD as it completes, which is
//! before io_submit returns. It costs about 0.5 us more than a write.

const std = @import("std");
const sys = @import("linux.zig");
const sync = @import("sync.zig");
const linux = sys.linux;

/// linux/aio_abi.h
const Iocb = extern struct {
    data: u64 = 0,
    key: u32 = 0,
    rw_flags: u32 = 0,
    opcode: u16,
    priority: i16 = 0,
    file: u32,
    buffer: u64,
    byte_count: u64,
    offset: i64 = 0,
    reserved: u64 = 0,
    flags: u32,
    result_event: u32,
};
const command_pread: u16 = 0;
const flag_result_event: u32 = 1;

/// The head of the ring that the kernel maps at the context's address.
const CompletionRing = extern struct {
    id: u32,
    count: u32,
    head: u32,
    tail: u32,
};

const capacity = 64;

const State = enum(u32) { unknown, ready, refused };
var state: std.atomic.Value(State) = .init(.unknown);
var lock: sync.Mutex = .{};
var context: usize = 0;
var null_file: i32 = -1;
var nothing: u64 = 0;

/// Called once, when the process is prepared: descriptors that appear later
/// would look like leaks.
pub fn prepare() void {
    lock.lock();
    defer lock.unlock();
    if (state.load(.monotonic) != .unknown) return;
    var result: State = .refused;
    const raw = linux.syscall2(.io_setup, capacity, @intFromPtr(&context));
    if (!sys.isError(raw)) {
        null_file = sys.result(linux.open("/dev/null", .{ .CLOEXEC = true }, 0));
        if (null_file >= 0) result = .ready else _ = linux.syscall1(.io_destroy, context);
    }
    state.store(result, .release);
}

/// Adds one to the counter, if there is room, and wakes who waits. 0, or a
/// negative errno for what is no eventfd.
pub fn signal(fd: i32) i32 {
    if (fd < 0) return sys.fail(.BADF);
    if (state.load(.acquire) != .ready) return signalByWrite(fd);
    var iocb: Iocb = .{
        .opcode = command_pread,
        .file = @intCast(null_file),
        .buffer = @intFromPtr(&nothing),
        .byte_count = 0,
        .flags = flag_result_event,
        .result_event = @intCast(fd),
    };
    const list = [1]*Iocb{&iocb};
    lock.lock();
    defer lock.unlock();
    const raw = linux.syscall3(.io_submit, context, 1, @intFromPtr(&list));
    // It has completed: the ring is emptied by moving its head.
    const ring: *CompletionRing = @ptrFromInt(context);
    @atomicStore(u32, &ring.head, @atomicLoad(u32, &ring.tail, .acquire), .release);
    if (linux.errno(raw) == .AGAIN) return signalByWrite(fd);
    return if (sys.isError(raw)) sys.result(raw) else 0;
}

/// Where a sandbox refuses asynchronous I/O: `descriptor.kind` has set
/// O_NONBLOCK, and a front-end that takes it away again can block us.
fn signalByWrite(fd: i32) i32 {
    const one: u64 = 1;
    while (true) {
        const raw = linux.write(fd, @ptrCast(&one), 8);
        switch (linux.errno(raw)) {
            .SUCCESS, .AGAIN => return 0,
            .INTR => continue,
            else => return sys.result(raw),
        }
    }
}

const testing = std.testing;

test "a signal adds one, as often as it is given" {
    prepare();
    const fd = sys.result(linux.eventfd(0, linux.EFD.CLOEXEC | linux.EFD.NONBLOCK));
    defer sys.closeQuietly(fd);
    for (0..1000) |_| try testing.expectEqual(0, signal(fd));
    var count: u64 = 0;
    try testing.expectEqual(8, linux.read(fd, @ptrCast(&count), 8));
    try testing.expectEqual(1000, count);
}

test "a full, blocking eventfd does not block its signal" {
    prepare();
    const fd = sys.result(linux.eventfd(0, linux.EFD.CLOEXEC));
    defer sys.closeQuietly(fd);
    const full: u64 = std.math.maxInt(u64) - 1;
    try testing.expectEqual(8, linux.write(fd, @ptrCast(&full), 8));
    for (0..200) |_| try testing.expectEqual(0, signal(fd));
}

test "what is no eventfd is refused" {
    prepare();
    const fd = sys.result(linux.memfd_create("x", linux.MFD.CLOEXEC));
    defer sys.closeQuietly(fd);
    try testing.expect(signal(fd) < 0);
    try testing.expectEqual(sys.fail(.BADF), signal(-1));
    try testing.expectEqual(sys.fail(.BADF), signal(1 << 20));
}
