//! The system calls of VDUSE, and nothing else: `device.zig` is written over a
//! type with these functions, so that its tests run against a kernel of their
//! own (`fake_kernel.zig`). Results are `>= 0` or a negative errno.

const std = @import("std");
const sys = @import("../linux.zig");
const mapping = @import("../memory/mapping.zig");
const linux = sys.linux;

pub const Kernel = struct {
    /// Non-blocking: what has no message answers -EAGAIN.
    pub fn open(path: [*:0]const u8) i32 {
        return sys.insist(linux.open, .{ path, .{ .ACCMODE = .RDWR, .CLOEXEC = true, .NONBLOCK = true }, 0 });
    }

    pub const close = sys.closeQuietly;

    pub fn ioctl(fd: i32, request: u32, argument: usize) i32 {
        return sys.insist(linux.ioctl, .{ fd, request, argument });
    }

    pub fn read(fd: i32, buffer: []u8) i32 {
        return sys.insist(linux.read, .{ fd, buffer.ptr, buffer.len });
    }

    pub fn write(fd: i32, buffer: []const u8) i32 {
        return sys.insist(linux.write, .{ fd, buffer.ptr, buffer.len });
    }

    pub fn closeOnExec(fd: i32) void {
        _ = linux.fcntl(fd, linux.F.SETFD, linux.FD_CLOEXEC);
    }

    /// Whether the file is the kernel's own memory for its driver's rings and
    /// bounce buffers, not one that a process made.
    pub fn isDomain(fd: i32) bool {
        var path_buffer: [32]u8 = undefined;
        const path = std.fmt.bufPrintZ(&path_buffer, "/proc/self/fd/{d}", .{fd}) catch return false;
        var link: [64]u8 = undefined;
        const length = linux.readlink(path, &link, link.len);
        return !sys.isError(length) and std.mem.eql(u8, link[0..length], "anon_inode:[vduse-domain]");
    }

    pub fn map(fd: i32, offset: u64, size: u64, code: *i32) ?*mapping.Mapping {
        return mapping.mapDevice(fd, offset, size, code) catch |failure| {
            if (failure == error.RegisterFull) code.* = sys.fail(.NOSPC);
            return null;
        };
    }
};

// The tests beside this file run over a fake kernel: without this they pass
// with a real one that does not compile.
test "the real kernel compiles" {
    std.testing.refAllDecls(Kernel);
}
