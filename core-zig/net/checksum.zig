//! The Internet checksum (RFC 1071), for receivers that did not negotiate to
//! complete it themselves.

const std = @import("std");
const layout = @import("../layout.zig");
const Header = @import("header.zig").Header;

/// Sum of 16-bit words in the machine's order; an odd last byte counts as the
/// first of its word. `initial` is in the same order.
pub fn sum(bytes: []const u8, initial: u64) u64 {
    var total = initial;
    var at: usize = 0;
    while (bytes.len - at >= 8) : (at += 8) {
        const word = std.mem.readInt(u64, bytes[at..][0..8], .little);
        const added = @addWithOverflow(total, word);
        total = added[0] + added[1];
    }
    var last: [8]u8 = @splat(0);
    @memcpy(last[0 .. bytes.len - at], bytes[at..]);
    const added = @addWithOverflow(total, std.mem.readInt(u64, &last, .little));
    return added[0] + added[1];
}

pub fn fold(total: u64) u16 {
    var value = (total & 0xffff_ffff) + (total >> 32);
    while (value > 0xffff) value = (value & 0xffff) + (value >> 16);
    return @intCast(value);
}

/// Completes a partial checksum: the field holds the sum of the pseudo header
/// (5.1.6.2). False when the field is not in the frame.
pub fn complete(frame: []u8, header: Header) bool {
    if (!header.hasChecksumField(@intCast(frame.len))) return false;
    const at = @as(usize, header.csum_start) + header.csum_offset;
    const value = ~fold(sum(frame[header.csum_start..], 0));
    // UDP: zero says that there is none. The other form of the same is right
    // for TCP too.
    std.mem.writeInt(u16, frame[at..][0..2], if (value == 0) 0xffff else value, .little);
    return true;
}

test "the sum of RFC 1071's example" {
    const bytes = [_]u8{ 0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7 };
    try std.testing.expectEqual(std.mem.nativeToBig(u16, 0xddf2), fold(sum(&bytes, 0)));
}

test "every length sums as 16-bit words do" {
    var bytes: [200]u8 = undefined;
    var random = std.Random.DefaultPrng.init(7);
    random.fill(&bytes);
    for (0..bytes.len) |length| {
        var expected: u64 = 0;
        for (bytes[0..length], 0..) |byte, i| expected += @as(u64, byte) << @intCast(i % 2 * 8);
        try std.testing.expectEqual(fold(expected), fold(sum(bytes[0..length], 0)));
    }
}

test "a completed checksum makes its range sum to all ones" {
    var frame: [99]u8 = undefined;
    var random = std.Random.DefaultPrng.init(3);
    random.fill(&frame);
    // The pseudo header's sum.
    std.mem.writeInt(u16, frame[40..42], 0x1234, .big);
    const header: Header = .{ .flags = 1, .csum_start = 34, .csum_offset = 6 };
    try std.testing.expect(complete(&frame, header));
    try std.testing.expectEqual(0xffff, fold(sum(frame[34..], std.mem.nativeToBig(u16, 0x1234))));
    try std.testing.expect(!complete(frame[0..41], header));
}
