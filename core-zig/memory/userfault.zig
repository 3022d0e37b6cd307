//! userfaultfd(2), as far as postcopy migration needs it: the back-end's side
//! opens it and has the kernel watch its mappings for missing pages, the
//! front-end's reads which page somebody waits for and fills it.
//!
//! Faults of system calls count too (io_uring and preadv touch guest memory in
//! the kernel), so UFFD_USER_MODE_ONLY, which unprivileged processes get, is
//! not enough.

const std = @import("std");
const linux = std.os.linux;
const sys = @import("../linux.zig");

/// <linux/userfaultfd.h>
const Range = extern struct { start: u64, len: u64 };
const Api = extern struct { api: u64, features: u64, ioctls: u64 };
const Register = extern struct { range: Range, mode: u64, ioctls: u64 };
const Copy = extern struct { dst: u64, src: u64, len: u64, mode: u64, copy: i64 };
/// struct uffd_msg with its page fault; others do not come unasked.
const Message = extern struct { event: u8, reserved1: u8, reserved2: u16, reserved3: u32, flags: u64, address: u64, feature: u64 };

const magic = 0xaa;
const UFFDIO_API = linux.IOCTL.IOWR(magic, 0x3f, Api);
const UFFDIO_REGISTER = linux.IOCTL.IOWR(magic, 0x00, Register);
const UFFDIO_UNREGISTER = linux.IOCTL.IOR(magic, 0x01, Range);
const UFFDIO_WAKE = linux.IOCTL.IOR(magic, 0x02, Range);
const UFFDIO_COPY = linux.IOCTL.IOWR(magic, 0x03, Copy);
const USERFAULTFD_IOC_NEW = linux.IOCTL.IO(magic, 0x00);
const mode_missing = 1;
const event_pagefault = 0x12;
const feature_missing_hugetlbfs = 1 << 4;
const feature_missing_shmem = 1 << 5;
/// Numbers of the ioctls that a registered range must allow.
const ioctl_wake = 1 << 2;
const ioctl_copy = 1 << 3;

comptime {
    std.debug.assert(UFFDIO_API == 0xc018aa3f);
    std.debug.assert(UFFDIO_REGISTER == 0xc020aa00);
    std.debug.assert(UFFDIO_UNREGISTER == 0x8010aa01);
    std.debug.assert(UFFDIO_COPY == 0xc028aa03);
    std.debug.assert(@sizeOf(Message) == 32);
}

fn control(fd: i32, request: u32, argument: anytype) i32 {
    return sys.result(linux.ioctl(fd, request, @intFromPtr(argument)));
}

fn openAny() i32 {
    const flags: u32 = @bitCast(linux.O{ .CLOEXEC = true, .NONBLOCK = true });
    const direct = sys.result(linux.syscall1(.userfaultfd, flags));
    if (direct >= 0) return direct;
    // Who may not make the call may have been given the device (Linux 6.1).
    const device = sys.result(linux.open("/dev/userfaultfd", .{ .ACCMODE = .RDWR, .CLOEXEC = true }, 0));
    if (device < 0) return direct;
    defer sys.closeQuietly(device);
    const made = sys.result(linux.ioctl(device, USERFAULTFD_IOC_NEW, flags));
    return if (made < 0) direct else made;
}

/// A userfaultfd, the caller's; -EPERM where the process may not have one,
/// -ENOSYS or -EOPNOTSUPP where the kernel lacks it for shared memory.
pub fn open() callconv(.c) i32 {
    const fd = openAny();
    if (fd < 0) return fd;
    // `features` asks for nothing and answers what there is.
    var api: Api = .{ .api = magic, .features = 0, .ioctls = 0 };
    var code = control(fd, UFFDIO_API, &api);
    if (code >= 0 and api.features & feature_missing_shmem == 0) code = sys.fail(.OPNOTSUPP);
    if (code >= 0) return fd;
    sys.closeQuietly(fd);
    return code;
}

/// From here on who touches a page of the range that its file lacks sleeps
/// until the page is there. -EINVAL for files other than memfd, tmpfs and
/// hugetlbfs.
pub fn register(fd: i32, base: usize, size: usize) i32 {
    // Huge pages made behind our back would be woken page by page.
    const nohugepage = 15; // MADV_NOHUGEPAGE
    _ = linux.madvise(@ptrFromInt(base), size, nohugepage);
    var argument: Register = .{ .range = .{ .start = base, .len = size }, .mode = mode_missing, .ioctls = 0 };
    const code = control(fd, UFFDIO_REGISTER, &argument);
    if (code < 0) return code;
    if (argument.ioctls & ioctl_wake != 0 and argument.ioctls & ioctl_copy != 0) return 0;
    unregister(fd, base, size);
    return sys.fail(.OPNOTSUPP);
}

/// The range is watched no longer, and nobody sleeps in it.
pub fn unregister(fd: i32, base: usize, size: usize) void {
    var argument: Range = .{ .start = base, .len = size };
    _ = control(fd, UFFDIO_UNREGISTER, &argument);
}

/// Whoever sleeps in the range looks again. Async-signal-safe.
pub fn wakeRange(fd: i32, base: usize, size: usize) void {
    var argument: Range = .{ .start = base, .len = size };
    _ = control(fd, UFFDIO_WAKE, &argument);
}

/// The front-end's side: the addresses, in the back-end's process, of pages
/// that it waits for. Returns how many were written, at most 64; 0 when nobody
/// waits any more.
pub fn read(fd: i32, addresses_out: [*]u64, capacity: u32) callconv(.c) i32 {
    var messages: [64]Message = undefined;
    const room: u32 = @min(capacity, messages.len);
    if (room == 0) return sys.fail(.INVAL);
    const raw = linux.read(fd, @ptrCast(&messages), room * @sizeOf(Message));
    switch (linux.errno(raw)) {
        .SUCCESS => {},
        .AGAIN, .INTR => return 0,
        else => return sys.result(raw),
    }
    var count: u32 = 0;
    for (messages[0 .. raw / @sizeOf(Message)]) |message| {
        if (message.event != event_pagefault) continue;
        addresses_out[count] = message.address;
        count += 1;
    }
    return @intCast(count);
}

/// The front-end's side: fills missing pages with `size` bytes and wakes who
/// waits. `address` (in the back-end's process) and `size` are multiples of
/// the page's size. -EEXIST when the page is there already.
pub fn copy(fd: i32, address: u64, source: [*]const u8, size: u32) callconv(.c) i32 {
    var argument: Copy = .{ .dst = address, .src = @intFromPtr(source), .len = size, .mode = 0, .copy = 0 };
    return control(fd, UFFDIO_COPY, &argument);
}

/// The front-end's side: the range's pages came another way (through the
/// front-end's own mapping): who waits for them looks again.
pub fn wake(fd: i32, address: u64, size: f64) callconv(.c) i32 {
    if (!(size >= 1 and size <= 1 << 53)) return sys.fail(.INVAL);
    var argument: Range = .{ .start = address, .len = @intFromFloat(size) };
    return control(fd, UFFDIO_WAKE, &argument);
}

test "what is no userfaultfd is refused" {
    var address: [1]u64 = undefined;
    try std.testing.expectEqual(sys.fail(.BADF), read(-1, &address, 1));
    try std.testing.expectEqual(sys.fail(.INVAL), read(-1, &address, 0));
    try std.testing.expectEqual(sys.fail(.BADF), copy(-1, 0, @ptrCast(&address), 8));
    try std.testing.expectEqual(sys.fail(.BADF), wake(-1, 0, 4096));
    try std.testing.expectEqual(sys.fail(.INVAL), wake(-1, 0, std.math.nan(f64)));
    try std.testing.expect(register(-1, 4096, 4096) < 0);
}
