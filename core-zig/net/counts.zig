//! The counters of a queue.

const layout = @import("../layout.zig");

/// A frame that was delivered, by its first bytes and its length.
pub inline fn add(counts: *layout.NetCounts, frame: [*]const u8, length: u32) void {
    counts.packets += 1;
    counts.bytes += @floatFromInt(length);
    if (frame[0] & 1 != 0) addGroup(counts, frame);
    const counter = switch (length) {
        0...63 => &counts.below_64,
        64 => &counts.exactly_64,
        65...127 => &counts.to_127,
        128...255 => &counts.to_255,
        256...511 => &counts.to_511,
        512...1023 => &counts.to_1023,
        1024...1518 => &counts.to_1518,
        else => &counts.above_1518,
    };
    counter.* += 1;
}

/// The address's group bit is set (IEEE 802.3, 3.2.3).
noinline fn addGroup(counts: *layout.NetCounts, frame: [*]const u8) void {
    for (frame[0..6]) |byte| {
        if (byte == 0xff) continue;
        counts.multicast += 1;
        return;
    }
    counts.broadcast += 1;
}
