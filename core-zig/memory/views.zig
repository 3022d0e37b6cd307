//! View numbers of one Memory. A region has consecutive numbers, one for each
//! 2 GiB, from when it is staged until it is unmapped, so that a number never
//! means two regions while anybody may still use it.

const std = @import("std");
const layout = @import("../layout.zig");
const mapping_file = @import("mapping.zig");
const Mapping = mapping_file.Mapping;

/// 128 TiB of views: more than an address space of 47 bits holds.
pub const max_views: u32 = 1 << 16;

pub const Views = struct {
    /// All regions that have numbers, in their order; under the Memory's lock.
    first: ?*Mapping = null,
    /// Number of the mapping of a view, plus one, or 0. All zeros is valid.
    owners: [max_views]std.atomic.Value(u32),

    /// Gives `mapping` the lowest numbers that suffice for its size.
    pub fn insert(self: *Views, mapping: *Mapping) bool {
        const wanted = (mapping.size - 1) / layout.view_size + 1;
        if (wanted > max_views) return false;
        const count: u32 = @intCast(wanted);
        var number: u32 = 0;
        var link = &self.first;
        while (link.*) |other| : (link = &other.next) {
            if (other.view_first - number >= count) break;
            number = other.view_first + other.view_count;
        }
        if (max_views - number < count) return false;
        mapping.view_first = number;
        mapping.view_count = count;
        mapping.next = link.*;
        link.* = mapping;
        for (self.owners[number..][0..count]) |*owner| owner.store(mapping.index + 1, .release);
        return true;
    }

    pub fn remove(self: *Views, mapping: *Mapping) void {
        var link = &self.first;
        while (link.*) |other| : (link = &other.next) {
            if (other != mapping) continue;
            link.* = other.next;
            other.next = null;
            break;
        }
        for (self.owners[mapping.view_first..][0..mapping.view_count]) |*owner| owner.store(0, .release);
    }

    pub fn at(self: *Views, view: u32) ?*Mapping {
        if (view >= max_views) return null;
        const owner = self.owners[view].load(.acquire);
        return if (owner == 0) null else mapping_file.at(owner - 1);
    }
};

test "numbers are the lowest free ones, consecutive and never shared" {
    const views = try std.testing.allocator.create(Views);
    defer std.testing.allocator.destroy(views);
    views.first = null;
    @memset(&views.owners, .init(0));
    var slots: [5]Mapping = undefined;
    for (&slots, 0..) |*slot, index| slot.* = .{ .index = @intCast(index), .size = layout.view_size };
    slots[1].size = 2 * layout.view_size + 1;
    slots[4].size = 2 * layout.view_size;
    for (slots[0..3]) |*slot| try std.testing.expect(views.insert(slot));
    try std.testing.expectEqual(1, slots[1].view_first);
    try std.testing.expectEqual(3, slots[1].view_count);
    try std.testing.expectEqual(4, slots[2].view_first);
    views.remove(&slots[1]);
    try std.testing.expectEqual(0, views.owners[2].load(.monotonic));
    try std.testing.expect(views.insert(&slots[3]));
    try std.testing.expectEqual(1, slots[3].view_first);
    try std.testing.expect(views.insert(&slots[4]));
    try std.testing.expectEqual(2, slots[4].view_first);
    slots[1].size = max_views * layout.view_size;
    try std.testing.expect(!views.insert(&slots[1]));
    slots[1].size = std.math.maxInt(u64);
    try std.testing.expect(!views.insert(&slots[1]));
}
