//! File descriptors: eventfds, memfds, files, and what kind one is. All that
//! are made here are close-on-exec.

const std = @import("std");
const sys = @import("linux.zig");
const layout = @import("layout.zig");
const untrusted_event = @import("untrusted_event.zig");
const linux = sys.linux;

pub fn close(fd: i32) callconv(.c) i32 {
    // Not repeated on EINTR: Linux has released the number by then.
    return sys.result(linux.close(fd));
}

/// `layout.kind_*`. An eventfd is also made non-blocking here, for systems
/// where `untrusted_event` has to write to it; so is a listening socket.
pub fn kind(fd: i32) callconv(.c) i32 {
    var stat: linux.Statx = undefined;
    const raw = linux.statx(fd, "", linux.AT.EMPTY_PATH, linux.STATX.BASIC_STATS, &stat);
    if (sys.isError(raw)) return sys.result(raw);
    switch (stat.mode & linux.S.IFMT) {
        linux.S.IFREG => return layout.kind_file,
        linux.S.IFBLK => return layout.kind_block,
        linux.S.IFSOCK => {
            var value: i32 = 0;
            var length: linux.socklen_t = 4;
            const option = linux.getsockopt(fd, linux.SOL.SOCKET, linux.SO.ACCEPTCONN, @ptrCast(&value), &length);
            if (sys.isError(option)) return sys.result(option);
            if (value == 0) return layout.kind_socket;
            // An inherited one may block, and `accept` must not.
            const set = setNonBlocking(fd);
            return if (set < 0) set else layout.kind_listener;
        },
        else => {},
    }
    var path_buffer: [32]u8 = undefined;
    const path = std.fmt.bufPrintZ(&path_buffer, "/proc/self/fd/{d}", .{fd}) catch return sys.fail(.INVAL);
    var link: [64]u8 = undefined;
    const length = linux.readlink(path, &link, link.len);
    if (sys.isError(length)) return layout.kind_other;
    if (!std.mem.eql(u8, link[0..length], "anon_inode:[eventfd]")) return layout.kind_other;
    const set = setNonBlocking(fd);
    return if (set < 0) set else layout.kind_eventfd;
}

fn setNonBlocking(fd: i32) i32 {
    const flags = linux.fcntl(fd, linux.F.GETFL, 0);
    if (sys.isError(flags)) return sys.result(flags);
    const non_blocking: u32 = @bitCast(linux.O{ .NONBLOCK = true });
    return sys.result(linux.fcntl(fd, linux.F.SETFL, flags | non_blocking));
}

pub fn duplicate(fd: i32) callconv(.c) i32 {
    const F_DUPFD_CLOEXEC = 1030;
    return sys.result(linux.fcntl(fd, F_DUPFD_CLOEXEC, 3));
}

/// Tells files apart that have had the same number; negative errno.
pub fn inode(fd: i32) callconv(.c) f64 {
    var stat: linux.Statx = undefined;
    const raw = linux.statx(fd, "", linux.AT.EMPTY_PATH, .{ .INO = true }, &stat);
    if (sys.isError(raw)) return @floatFromInt(sys.result(raw));
    return @floatFromInt(stat.ino & (1 << 53) - 1);
}

/// Makes `target`, an open number, name the same file as `fd`, in one step:
/// another thread that writes to the number reaches the old file or the new.
pub fn replace(fd: i32, target: i32) callconv(.c) i32 {
    if (fd == target) return sys.fail(.INVAL);
    return sys.result(linux.dup3(fd, target, @bitCast(linux.O{ .CLOEXEC = true })));
}

pub fn eventfdCreate() callconv(.c) i32 {
    return sys.result(linux.eventfd(0, linux.EFD.CLOEXEC | linux.EFD.NONBLOCK));
}

/// Adds one; never blocks, whatever the front-end did to the eventfd.
pub fn eventfdSignal(fd: i32) callconv(.c) i32 {
    return untrusted_event.signal(fd);
}

/// Adds one to an eventfd of our own, which is non-blocking: a full counter
/// already says what we have to say.
pub fn signalOwn(fd: i32) void {
    const one: u64 = 1;
    _ = linux.write(fd, @ptrCast(&one), 8);
}

/// Reads and clears the counter: 0 when it was clear; clipped to 31 bits.
pub fn eventfdTake(fd: i32) callconv(.c) i32 {
    var count: u64 = 0;
    while (true) {
        const raw = linux.read(fd, @ptrCast(&count), 8);
        switch (linux.errno(raw)) {
            .SUCCESS => return @intCast(@min(count, std.math.maxInt(i32))),
            .AGAIN => return 0,
            .INTR => continue,
            else => return sys.result(raw),
        }
    }
}

/// An f64 that is a size: a whole number from 0 to 2^53.
pub fn sizeOf(value: f64) ?u64 {
    if (!(value >= 0 and value <= 9007199254740992.0)) return null;
    return @intFromFloat(value);
}

pub fn memfdCreate(size: f64) callconv(.c) i32 {
    const bytes = sizeOf(size) orelse return sys.fail(.INVAL);
    const fd = sys.result(linux.memfd_create("vhost2", linux.MFD.CLOEXEC | linux.MFD.ALLOW_SEALING));
    if (fd < 0) return fd;
    const resized = linux.ftruncate(fd, @intCast(bytes));
    if (sys.isError(resized)) {
        sys.closeQuietly(fd);
        return sys.result(resized);
    }
    return fd;
}

pub fn memfdResize(fd: i32, size: f64) callconv(.c) i32 {
    const bytes = sizeOf(size) orelse return sys.fail(.INVAL);
    return sys.result(linux.ftruncate(fd, @intCast(bytes)));
}

/// Nobody can make it shorter or longer any more.
pub fn memfdSeal(fd: i32) callconv(.c) i32 {
    const F_ADD_SEALS = 1033;
    const seal_seal = 1;
    const seal_shrink = 2;
    const seal_grow = 4;
    return sys.result(linux.fcntl(fd, F_ADD_SEALS, seal_seal | seal_shrink | seal_grow));
}

/// flags: bit 0 write, bit 1 create, bit 2 O_DIRECT.
pub fn fileOpen(path: [*]const u8, path_length: u32, flags: u32) callconv(.c) i32 {
    var buffer: [4096]u8 = undefined;
    if (path_length >= buffer.len) return sys.fail(.NAMETOOLONG);
    @memcpy(buffer[0..path_length], path[0..path_length]);
    buffer[path_length] = 0;
    const open_flags: linux.O = .{
        .ACCMODE = if (flags & 1 != 0) .RDWR else .RDONLY,
        .CREAT = flags & 2 != 0,
        .DIRECT = flags & 4 != 0,
        .CLOEXEC = true,
    };
    while (true) {
        const raw = linux.open(@ptrCast(&buffer), open_flags, 0o644);
        if (linux.errno(raw) == .INTR) continue;
        return sys.result(raw);
    }
}

/// Bytes of a file or a block device, or a negative errno.
pub fn fileSize(fd: i32) callconv(.c) f64 {
    const raw = linux.lseek(fd, 0, linux.SEEK.END);
    return @floatFromInt(@as(isize, @bitCast(raw)));
}

test "the kind of a descriptor is told apart" {
    const event = eventfdCreate();
    defer sys.closeQuietly(event);
    const memfd = memfdCreate(4096);
    defer sys.closeQuietly(memfd);
    try std.testing.expectEqual(@as(i32, layout.kind_eventfd), kind(event));
    try std.testing.expectEqual(@as(i32, layout.kind_file), kind(memfd));
    try std.testing.expectEqual(sys.fail(.BADF), kind(-1));
    try std.testing.expectEqual(4096.0, fileSize(memfd));
}

test "a full eventfd never blocks a signal" {
    const fd = sys.result(linux.eventfd(0, linux.EFD.CLOEXEC));
    defer sys.closeQuietly(fd);
    try std.testing.expectEqual(@as(i32, layout.kind_eventfd), kind(fd));
    const nearly: u64 = std.math.maxInt(u64) - 1;
    _ = linux.write(fd, @ptrCast(&nearly), 8);
    try std.testing.expectEqual(0, eventfdSignal(fd));
    try std.testing.expectEqual(std.math.maxInt(i32), eventfdTake(fd));
    try std.testing.expectEqual(0, eventfdTake(fd));
}

test "sizes that are no whole number of bytes are refused" {
    try std.testing.expectEqual(null, sizeOf(-1));
    try std.testing.expectEqual(null, sizeOf(std.math.nan(f64)));
    try std.testing.expectEqual(null, sizeOf(1e300));
    try std.testing.expectEqual(sys.fail(.INVAL), memfdCreate(-5));
}

test "a number that is replaced names the other file at once" {
    const first = eventfdCreate();
    defer sys.closeQuietly(first);
    const second = eventfdCreate();
    defer sys.closeQuietly(second);
    const number = duplicate(first);
    defer sys.closeQuietly(number);
    try std.testing.expectEqual(number, replace(second, number));
    const pair = [2]i32{ memfdCreate(1), memfdCreate(1) };
    defer for (pair) |fd| sys.closeQuietly(fd);
    try std.testing.expect(inode(pair[0]) > 0 and inode(pair[0]) != inode(pair[1]));
    try std.testing.expectEqual(@as(f64, @floatFromInt(sys.fail(.BADF))), inode(-1));
    signalOwn(number);
    try std.testing.expectEqual(0, eventfdTake(first));
    try std.testing.expectEqual(1, eventfdTake(second));
    try std.testing.expectEqual(sys.fail(.BADF), replace(-1, number));
    try std.testing.expectEqual(sys.fail(.INVAL), replace(number, number));
}
