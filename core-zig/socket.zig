//! Unix stream sockets that carry descriptors. All calls are non-blocking;
//! framing, partial messages and waiting are the transport's.

const std = @import("std");
const sys = @import("linux.zig");
const layout = @import("layout.zig");
const linux = sys.linux;

/// More than any message may carry (8), so that a ninth arrives, is seen and
/// is closed rather than cut off by the kernel.
pub const max_descriptors = 32;

const stream_flags = linux.SOCK.STREAM | linux.SOCK.CLOEXEC | linux.SOCK.NONBLOCK;

fn address(path: [*]const u8, path_length: u32) ?linux.sockaddr.un {
    var result: linux.sockaddr.un = .{ .path = @splat(0) };
    if (path_length == 0 or path_length >= result.path.len) return null;
    @memcpy(result.path[0..path_length], path[0..path_length]);
    return result;
}

fn pathOf(to: *const linux.sockaddr.un) [*:0]const u8 {
    return @ptrCast(&to.path);
}

fn open() i32 {
    return sys.result(linux.socket(linux.AF.UNIX, stream_flags, 0));
}

/// Whether somebody listens at the path: 1, 0 (a socket file without a
/// listener), or a negative errno (ENOTSOCK: the path is something else).
fn isLive(to: *const linux.sockaddr.un) i32 {
    var stat: linux.Statx = undefined;
    const raw = linux.statx(linux.AT.FDCWD, pathOf(to), linux.AT.SYMLINK_NOFOLLOW, linux.STATX.BASIC_STATS, &stat);
    if (sys.isError(raw)) return sys.result(raw);
    if (stat.mode & linux.S.IFMT != linux.S.IFSOCK) return sys.fail(.NOTSOCK);
    const fd = open();
    if (fd < 0) return fd;
    defer sys.closeQuietly(fd);
    return switch (linux.errno(linux.connect(fd, to, @sizeOf(linux.sockaddr.un)))) {
        .CONNREFUSED => 0,
        else => 1, // connected, backlog full, or not ours to ask: in use
    };
}

/// Binds and listens; a socket file that nobody listens on is replaced, a
/// live one is EADDRINUSE, anything else at the path ENOTSOCK. `mode` is the
/// permission of the socket file; 0 leaves it to the umask.
pub fn listen(path: [*]const u8, path_length: u32, mode: u32) callconv(.c) i32 {
    const to = address(path, path_length) orelse return sys.fail(.NAMETOOLONG);
    const fd = open();
    if (fd < 0) return fd;
    const folder = lockFolder(path[0..path_length]);
    defer if (folder >= 0) sys.closeQuietly(folder);
    const result = bindAndListen(fd, &to, mode);
    if (result < 0) sys.closeQuietly(fd);
    return if (result < 0) result else fd;
}

/// sys/file.h
const lock_exclusive = 2;
const lock_non_blocking = 4;

/// Between bind and listen a socket looks like a stale one: of two processes
/// that start at once, one would take the other's away. An advisory lock on
/// the folder keeps them apart, where it can be had in a second.
fn lockFolder(path: []const u8) i32 {
    var buffer: [@sizeOf(linux.sockaddr.un)]u8 = undefined;
    const end = std.mem.lastIndexOfScalar(u8, path, '/') orelse 0;
    const folder: []const u8 = if (end > 0) path[0..end] else if (path[0] == '/') "/" else ".";
    @memcpy(buffer[0..folder.len], folder);
    buffer[folder.len] = 0;
    const fd = sys.result(linux.open(@ptrCast(&buffer), .{ .DIRECTORY = true, .CLOEXEC = true }, 0));
    if (fd < 0) return fd;
    const pause: linux.timespec = .{ .sec = 0, .nsec = 1_000_000 };
    for (0..1000) |_| {
        if (linux.errno(linux.flock(fd, lock_exclusive | lock_non_blocking)) != .AGAIN) break;
        _ = linux.nanosleep(&pause, null);
    }
    return fd;
}

fn bindAndListen(fd: i32, to: *const linux.sockaddr.un, mode: u32) i32 {
    var bound = linux.bind(fd, @ptrCast(to), @sizeOf(linux.sockaddr.un));
    if (linux.errno(bound) == .ADDRINUSE) {
        const live = isLive(to);
        if (live == 1) return sys.fail(.ADDRINUSE);
        if (live < 0) return live;
        _ = linux.unlinkat(linux.AT.FDCWD, pathOf(to), 0);
        bound = linux.bind(fd, @ptrCast(to), @sizeOf(linux.sockaddr.un));
    }
    if (sys.isError(bound)) return sys.result(bound);
    if (mode != 0) {
        const changed = linux.fchmodat(linux.AT.FDCWD, pathOf(to), mode & 0o777);
        if (sys.isError(changed)) return sys.result(changed);
    }
    return sys.result(linux.listen(fd, 128));
}

/// Removes a socket file that nobody listens on any more. Another listener
/// that has taken the path over in the meantime is left alone.
pub fn unlink(path: [*]const u8, path_length: u32) callconv(.c) i32 {
    const to = address(path, path_length) orelse return sys.fail(.NAMETOOLONG);
    const live = isLive(&to);
    if (live == 1) return sys.fail(.BUSY);
    if (live < 0) return live;
    return sys.result(linux.unlinkat(linux.AT.FDCWD, pathOf(&to), 0));
}

pub fn connect(path: [*]const u8, path_length: u32) callconv(.c) i32 {
    const to = address(path, path_length) orelse return sys.fail(.NAMETOOLONG);
    const fd = open();
    if (fd < 0) return fd;
    while (true) {
        const raw = linux.connect(fd, &to, @sizeOf(linux.sockaddr.un));
        if (linux.errno(raw) == .INTR) continue;
        if (!sys.isError(raw)) return fd;
        sys.closeQuietly(fd);
        return sys.result(raw);
    }
}

pub fn accept(fd: i32) callconv(.c) i32 {
    while (true) {
        const raw = linux.accept4(fd, null, null, linux.SOCK.CLOEXEC | linux.SOCK.NONBLOCK);
        switch (linux.errno(raw)) {
            // A peer that gave up in the queue is no failure of the listener.
            .INTR, .CONNABORTED => continue,
            else => return sys.result(raw),
        }
    }
}

pub fn pair(fds_out: *[2]i32) callconv(.c) i32 {
    return sys.result(linux.socketpair(linux.AF.UNIX, stream_flags, 0, fds_out));
}

const header_size = @sizeOf(linux.cmsghdr);

/// Sends what the socket takes; returns the number of bytes. Descriptors go
/// with the first byte, or not at all when nothing was sent.
pub fn send(fd: i32, data: [*]const u8, length: u32, fds: ?[*]const i32, fd_count: u32) callconv(.c) i32 {
    if (fd_count > max_descriptors) return sys.fail(.INVAL);
    var control: [header_size + 4 * max_descriptors]u8 align(8) = undefined;
    const iov = [1]std.posix.iovec_const{.{ .base = data, .len = length }};
    var message: linux.msghdr_const = .{
        .name = null,
        .namelen = 0,
        .iov = &iov,
        .iovlen = 1,
        .control = null,
        .controllen = 0,
        .flags = 0,
    };
    if (fd_count > 0) {
        const list = fds orelse return sys.fail(.INVAL);
        const header: *linux.cmsghdr = @ptrCast(&control);
        header.* = .{ .len = header_size + 4 * fd_count, .level = linux.SOL.SOCKET, .type = linux.SCM.RIGHTS };
        @memcpy(control[header_size..][0 .. 4 * fd_count], std.mem.sliceAsBytes(list[0..fd_count]));
        message.control = &control;
        message.controllen = header_size + 4 * fd_count;
    }
    while (true) {
        const raw = linux.sendmsg(fd, &message, linux.MSG.NOSIGNAL | linux.MSG.DONTWAIT);
        if (linux.errno(raw) == .INTR) continue;
        return sys.result(raw);
    }
}

/// Receives up to `capacity` bytes and up to `fd_capacity` descriptors; those
/// beyond are closed and `truncated` says so. 0 is the end of the stream.
pub fn receive(fd: i32, data: [*]u8, capacity: u32, fds_out: [*]i32, fd_capacity: u32, info: *layout.ReceiveInfo) callconv(.c) i32 {
    info.* = .{ .descriptor_count = 0, .truncated = 0 };
    var control: [header_size + 4 * max_descriptors]u8 align(8) = undefined;
    var iov = [1]std.posix.iovec{.{ .base = data, .len = capacity }};
    var message: linux.msghdr = .{
        .name = null,
        .namelen = 0,
        .iov = &iov,
        .iovlen = 1,
        .control = &control,
        .controllen = control.len,
        .flags = 0,
    };
    const raw = while (true) {
        const raw = linux.recvmsg(fd, &message, linux.MSG.DONTWAIT | linux.MSG.CMSG_CLOEXEC);
        if (linux.errno(raw) != .INTR) break raw;
    };
    if (sys.isError(raw)) return sys.result(raw);
    if (message.flags & linux.MSG.CTRUNC != 0) info.truncated = 1;
    var position: usize = 0;
    while (position + header_size <= message.controllen) {
        const header: *align(1) linux.cmsghdr = @ptrCast(control[position..].ptr);
        if (header.len < header_size or header.len > message.controllen - position) break;
        if (header.level == linux.SOL.SOCKET and header.type == linux.SCM.RIGHTS) {
            const bytes = control[position + header_size ..][0 .. header.len - header_size];
            for (std.mem.bytesAsSlice(i32, bytes)) |received| {
                if (info.descriptor_count < fd_capacity and info.truncated == 0) {
                    fds_out[info.descriptor_count] = received;
                    info.descriptor_count += 1;
                } else {
                    sys.closeQuietly(received);
                    info.truncated = 1;
                }
            }
        }
        position += std.mem.alignForward(usize, header.len, 8);
    }
    if (info.truncated != 0) {
        // A message that lost a descriptor is of no use: keep none of them.
        for (fds_out[0..info.descriptor_count]) |received| sys.closeQuietly(received);
        info.descriptor_count = 0;
    }
    return sys.result(raw);
}

const testing = std.testing;

fn temporaryPath(buffer: []u8, name: []const u8) ![]const u8 {
    return std.fmt.bufPrint(buffer, "/tmp/vhost2-{d}-{s}.sock", .{ linux.getpid(), name });
}

test "descriptors arrive with the bytes, close-on-exec" {
    var ends: [2]i32 = undefined;
    try testing.expectEqual(0, pair(&ends));
    defer for (ends) |fd| sys.closeQuietly(fd);
    const event = sys.result(linux.eventfd(7, 0));
    defer sys.closeQuietly(event);
    try testing.expectEqual(3, send(ends[0], "abc", 3, @ptrCast(&event), 1));
    var data: [8]u8 = undefined;
    var fds: [8]i32 = undefined;
    var info: layout.ReceiveInfo = undefined;
    try testing.expectEqual(3, receive(ends[1], &data, data.len, &fds, fds.len, &info));
    try testing.expectEqual(1, info.descriptor_count);
    defer sys.closeQuietly(fds[0]);
    try testing.expectEqual(1, linux.fcntl(fds[0], linux.F.GETFD, 0));
    try testing.expectEqual(sys.fail(.AGAIN), receive(ends[1], &data, data.len, &fds, fds.len, &info));
}

test "more descriptors than wanted: all are closed and the loss is told" {
    var ends: [2]i32 = undefined;
    try testing.expectEqual(0, pair(&ends));
    defer for (ends) |fd| sys.closeQuietly(fd);
    const event = sys.result(linux.eventfd(0, 0));
    defer sys.closeQuietly(event);
    const many: [max_descriptors]i32 = @splat(event);
    const before = sys.result(linux.dup(event));
    sys.closeQuietly(before);
    try testing.expectEqual(1, send(ends[0], "a", 1, &many, 12));
    var data: [8]u8 = undefined;
    var fds: [8]i32 = undefined;
    var info: layout.ReceiveInfo = undefined;
    try testing.expectEqual(1, receive(ends[1], &data, data.len, &fds, fds.len, &info));
    try testing.expectEqual(0, info.descriptor_count);
    try testing.expectEqual(1, info.truncated);
    const after = sys.result(linux.dup(event));
    sys.closeQuietly(after);
    try testing.expectEqual(before, after);
}

test "a stale socket file is replaced, a live one refused, a plain file kept" {
    var buffer: [100]u8 = undefined;
    const path = try temporaryPath(&buffer, "stale");
    const length: u32 = @intCast(path.len);
    const first = listen(path.ptr, length, 0o600);
    try testing.expect(first >= 0);
    try testing.expectEqual(sys.fail(.ADDRINUSE), listen(path.ptr, length, 0));
    try testing.expectEqual(sys.fail(.BUSY), unlink(path.ptr, length));
    sys.closeQuietly(first);
    const second = listen(path.ptr, length, 0);
    try testing.expect(second >= 0);
    const client = connect(path.ptr, length);
    try testing.expect(client >= 0);
    const served = accept(second);
    try testing.expect(served >= 0);
    try testing.expectEqual(sys.fail(.AGAIN), accept(second));
    for ([_]i32{ client, served, second }) |fd| sys.closeQuietly(fd);
    try testing.expectEqual(0, unlink(path.ptr, length));
    try testing.expectEqual(sys.fail(.NOENT), unlink(path.ptr, length));
    try testing.expectEqual(sys.fail(.NAMETOOLONG), listen(path.ptr, 200, 0));
}
