//! System calls with their result as `>= 0` or a negative errno, and EINTR
//! handled where a call may simply be made again.

const std = @import("std");
pub const linux = std.os.linux;
pub const E = linux.E;

/// A system call's raw result as i32: results of ours all fit.
pub fn result(raw: usize) i32 {
    const signed: isize = @bitCast(raw);
    return @intCast(std.math.clamp(signed, std.math.minInt(i32), std.math.maxInt(i32)));
}

pub fn fail(code: E) i32 {
    return -@as(i32, @intCast(@intFromEnum(code)));
}

pub fn isError(raw: usize) bool {
    return @as(isize, @bitCast(raw)) < 0 and @as(isize, @bitCast(raw)) > -4096;
}

/// The result of a call that is made again where a signal came first.
pub fn insist(comptime call: anytype, arguments: std.meta.ArgsTuple(@TypeOf(call))) i32 {
    while (true) {
        const raw: usize = @call(.auto, call, arguments);
        if (linux.errno(raw) != .INTR) return result(raw);
    }
}

pub fn closeQuietly(fd: i32) void {
    _ = linux.close(fd);
}

test "a raw error becomes a negative errno" {
    try std.testing.expectEqual(fail(.BADF), result(linux.close(-1)));
}
