//! The system calls of VFIO, and nothing else: `group.zig` and `device.zig`
//! are written over a type with these functions, so that their tests run
//! against a kernel of their own (`fake_kernel.zig`). Results are `>= 0` or a
//! negative errno.

const std = @import("std");
const sys = @import("../linux.zig");
const mapping = @import("../memory/mapping.zig");
const linux = sys.linux;

pub const Kernel = struct {
    pub fn open(path: [*:0]const u8) i32 {
        return sys.insist(linux.open, .{ path, .{ .ACCMODE = .RDWR, .CLOEXEC = true }, 0 });
    }

    pub const close = sys.closeQuietly;

    pub fn ioctl(fd: i32, request: u32, argument: usize) i32 {
        return sys.insist(linux.ioctl, .{ fd, request, argument });
    }

    /// Bytes read: a device that has gone answers an error or none.
    pub fn read(fd: i32, buffer: []u8, offset: u64) i32 {
        return sys.result(linux.pread(fd, buffer.ptr, buffer.len, @bitCast(offset)));
    }

    pub fn write(fd: i32, buffer: []const u8, offset: u64) i32 {
        return sys.result(linux.pwrite(fd, buffer.ptr, buffer.len, @bitCast(offset)));
    }

    pub fn map(fd: i32, offset: u64, size: u64, code: *i32) ?*mapping.Mapping {
        return mapping.mapDevice(fd, offset, size, code) catch |failure| {
            if (failure == error.RegisterFull) code.* = sys.fail(.NOSPC);
            return null;
        };
    }

    pub fn unmap(slot: *mapping.Mapping) void {
        slot.unmap();
    }
};

// The tests beside this file run over a fake kernel: without this they pass
// with a real one that does not compile.
test "the real kernel compiles" {
    std.testing.refAllDecls(Kernel);
}
