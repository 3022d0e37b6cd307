//! Receive buffers whose IOVAs are not in the IOTLB yet: a card looks at a buffer
//! only when the frame for it has come, which is too late to ask where it is.

const layout = @import("../layout.zig");
const linux = @import("../linux.zig");
const chain = @import("../ring/chain.zig");
const rings = @import("../ring/ring.zig");

/// Looks at the chains that are available, at most a burst of them, and leaves
/// them in the ring: what they lack is in `ring_misses` then. Returns how many
/// could be used at once, or what `ring_pop` returns. `scratch` is as that of
/// `net_send`.
pub fn lookAhead(handle: u32, scratch: [*]u32, scratch_words: u32) callconv(.c) i32 {
    const ring = rings.get(handle) orelse return linux.fail(.BADF);
    const max = layout.net_burst_maximum;
    // As one holder: the next pop must meet what this one has found.
    const entered = ring.enter();
    if (entered != 0) return entered;
    defer ring.leave();
    const popped = rings.pop(handle, scratch, scratch_words, max);
    if (popped <= 0) return popped;
    const stride = chain.recordStride(ring.header_bytes);
    var index: u32 = @intCast(popped);
    while (index > 0) {
        index -= 1;
        const record: *const layout.Request = @ptrCast(scratch + @as(usize, index) * stride);
        ring.unpop(record.head);
    }
    return popped;
}

test {
    _ = @import("ahead_test.zig");
}
