//! `struct virtio_net_hdr` (virtio 1.3, 5.1.6): what one side has left to the
//! other to do to a frame. A guest's is checked once, in a copy that it can no
//! longer change; whoever meets it afterwards can rely on it.

const std = @import("std");
const layout = @import("../layout.zig");

pub const flag_needs_checksum: u8 = 1;
pub const flag_data_valid: u8 = 2;

pub const gso_none: u8 = 0;
pub const gso_tcp4: u8 = 1;
pub const gso_udp: u8 = 3;
pub const gso_tcp6: u8 = 4;
pub const gso_udp_l4: u8 = 5;
pub const gso_ecn: u8 = 0x80;

/// An Ethernet header: shorter is no frame.
pub const frame_minimum: u32 = 14;

pub const Header = extern struct {
    flags: u8 = 0,
    gso_type: u8 = gso_none,
    hdr_len: u16 = 0,
    gso_size: u16 = 0,
    csum_start: u16 = 0,
    csum_offset: u16 = 0,
    num_buffers: u16 = 0,

    pub inline fn load(bytes: *const [layout.net_header_size]u8) Header {
        return @bitCast(bytes.*);
    }

    pub inline fn store(self: Header, bytes: *[layout.net_header_size]u8) void {
        bytes.* = @bitCast(self);
    }

    /// Nothing is asked for: most frames.
    pub inline fn isPlain(self: Header) bool {
        return self.flags == 0 and self.gso_type == gso_none;
    }

    /// Whether the checksum field is in the frame.
    pub fn hasChecksumField(self: Header, length: u32) bool {
        return @as(u32, self.csum_start) + self.csum_offset + 2 <= length and self.csum_start >= frame_minimum;
    }

    /// What the driver must have negotiated to send this, or the other driver
    /// to get it; null for a type that does not exist.
    pub fn offloads(self: Header) ?u32 {
        var needed: u32 = if (self.flags & flag_needs_checksum != 0) layout.net_offload_checksum else 0;
        needed |= switch (self.gso_type & ~gso_ecn) {
            gso_none => if (self.gso_type == gso_none) 0 else return null,
            gso_tcp4 => layout.net_offload_tso4,
            gso_tcp6 => layout.net_offload_tso6,
            gso_udp => layout.net_offload_ufo,
            gso_udp_l4 => layout.net_offload_uso,
            else => return null,
        };
        if (self.gso_type & gso_ecn != 0) needed |= layout.net_offload_ecn;
        return needed;
    }

    /// The header to go on with, or null when the driver broke a rule
    /// (5.1.6.2): asked for what it has not negotiated, a checksum outside the
    /// frame, segments of no size.
    pub fn checked(self: Header, length: u32, allowed: u32) ?Header {
        // DATA_VALID and RSC_INFO mean nothing in this direction.
        const needed = self.offloads() orelse return null;
        if (needed & ~allowed != 0) return null;
        if (self.flags & flag_needs_checksum == 0) {
            // Segments need their checksums computed.
            return if (self.gso_type == gso_none) .{} else null;
        }
        if (!self.hasChecksumField(length)) return null;
        var result: Header = .{
            .flags = flag_needs_checksum,
            .csum_start = self.csum_start,
            .csum_offset = self.csum_offset,
        };
        if (self.gso_type == gso_none) return result;
        if (self.gso_size == 0) return null;
        result.gso_type = self.gso_type;
        result.gso_size = self.gso_size;
        // A hint: a value that cannot be is left for the receiver to find.
        result.hdr_len = if (self.hdr_len <= length) self.hdr_len else 0;
        return result;
    }
};

comptime {
    std.debug.assert(@sizeOf(Header) == layout.net_header_size);
}

const testing = std.testing;
const everything: u32 = 63;

test "a driver may ask for what it has negotiated, and for nothing else" {
    const checksum: Header = .{ .flags = flag_needs_checksum, .csum_start = 34, .csum_offset = 6 };
    try testing.expect(checksum.checked(60, layout.net_offload_checksum) != null);
    try testing.expect(checksum.checked(60, 0) == null);
    var segmented = checksum;
    segmented.gso_type = gso_tcp4 | gso_ecn;
    segmented.gso_size = 1000;
    try testing.expect(segmented.checked(3000, everything) != null);
    try testing.expect(segmented.checked(3000, everything & ~layout.net_offload_ecn) == null);
    try testing.expect(segmented.checked(3000, everything & ~layout.net_offload_tso4) == null);
    for ([_]u8{ 2, 6, 7, 0x7f, gso_ecn, 0xff }) |gso_type| {
        segmented.gso_type = gso_type;
        try testing.expect(segmented.checked(3000, everything) == null);
    }
}

test "a checksum field must be in the frame, behind its Ethernet header" {
    const max = std.math.maxInt(u16);
    const wrong = [_][2]u16{ .{ 54, 5 }, .{ 60, 0 }, .{ 61, 0 }, .{ max, max }, .{ 0, max }, .{ max, 0 }, .{ 13, 2 } };
    for (wrong) |one| {
        const header: Header = .{ .flags = flag_needs_checksum, .csum_start = one[0], .csum_offset = one[1] };
        try testing.expect(header.checked(60, everything) == null);
    }
    const last: Header = .{ .flags = flag_needs_checksum, .csum_start = 54, .csum_offset = 4 };
    try testing.expect(last.checked(60, everything) != null);
}

test "segments have a size, and a checksum" {
    const header: Header = .{ .flags = flag_needs_checksum, .gso_type = gso_tcp4, .csum_start = 34, .csum_offset = 16 };
    try testing.expect(header.checked(3000, everything) == null);
    const plain: Header = .{ .gso_type = gso_tcp4, .gso_size = 1000 };
    try testing.expect(plain.checked(3000, everything) == null);
}
