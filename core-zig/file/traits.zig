//! What a file asks of those who read and write it.

const std = @import("std");
const sys = @import("../linux.zig");
const layout = @import("../layout.zig");
const linux = sys.linux;

/// Larger than any block device's logical block in use.
pub const alignment_maximum = 4096;

/// File systems whose buffered writes io_uring makes at once where it can
/// (they take IOCB_NOWAIT); ext4, tmpfs and the rest refuse that.
const magic_xfs: u64 = 0x5846_5342;
const magic_btrfs: u64 = 0x9123_683e;

/// `struct statfs` of 64-bit kernels: f_type is its first word.
const statfs_words = 16;

/// BLKSSZGET: the logical block size of a block device.
const blkssz_get = 0x1268;

/// STATX_DIOALIGN (since 6.1) and where its two answers are in struct statx.
const statx_dioalign = 0x2000;
const statx_bytes = 256;
const statx_mask_at = 0;
const statx_memory_alignment_at = 0x98;
const statx_offset_alignment_at = 0x9c;

pub fn inspect(fd: i32, traits_out: *layout.FileTraits) callconv(.c) i32 {
    var words: [statfs_words]u64 = @splat(0);
    const raw = linux.syscall2(.fstatfs, @as(usize, @bitCast(@as(isize, fd))), @intFromPtr(&words));
    if (sys.isError(raw)) return sys.result(raw);
    const magic = words[0];
    traits_out.* = .{
        .alignment = alignmentOf(fd),
        .has_blocking_writes = @intFromBool(magic != magic_xfs and magic != magic_btrfs),
    };
    return 0;
}

fn alignmentOf(fd: i32) u32 {
    var block: u32 = 0;
    if (!sys.isError(linux.ioctl(fd, blkssz_get, @intFromPtr(&block)))) return bounded(block);
    var answer: [statx_bytes]u8 align(8) = @splat(0);
    const raw = linux.syscall5(
        .statx,
        @as(usize, @bitCast(@as(isize, fd))),
        @intFromPtr(""),
        linux.AT.EMPTY_PATH,
        statx_dioalign,
        @intFromPtr(&answer),
    );
    // An older kernel does not know: what suits every disk suits this one.
    if (sys.isError(raw) or word(&answer, statx_mask_at) & statx_dioalign == 0) return alignment_maximum;
    const asked = @max(word(&answer, statx_memory_alignment_at), word(&answer, statx_offset_alignment_at));
    return if (asked == 0) alignment_maximum else bounded(asked);
}

fn word(bytes: []const u8, at: usize) u32 {
    return std.mem.readInt(u32, bytes[at..][0..4], .little);
}

fn bounded(alignment: u32) u32 {
    return if (alignment > alignment_maximum or @popCount(alignment) != 1) alignment_maximum else alignment;
}

test "a file says how it wants to be written, a dead descriptor that it is one" {
    const fd = sys.result(linux.open("/var/tmp", .{ .ACCMODE = .RDWR, .DIRECTORY = true, .TMPFILE = true, .CLOEXEC = true }, 0o600));
    if (fd < 0) return error.SkipZigTest;
    defer sys.closeQuietly(fd);
    var traits: layout.FileTraits = undefined;
    try std.testing.expectEqual(0, inspect(fd, &traits));
    try std.testing.expectEqual(1, @popCount(traits.alignment));
    try std.testing.expect(traits.alignment >= 1 and traits.alignment <= alignment_maximum);
    try std.testing.expect(traits.has_blocking_writes <= 1);
    try std.testing.expectEqual(sys.fail(.BADF), inspect(-1, &traits));
}
