//! Chains of one buffer: the shape of almost all that a network card's driver
//! gives. They are taken as a pointer and a length, used at once, and given
//! back before anybody else looks at the ring, so that nobody need remember
//! which heads are with the device. What has another shape, or breaks a rule,
//! is left in the ring for `rings.pop`, which says what is wrong with it.

const memory = @import("../memory/memory.zig");
const chain = @import("chain.zig");
const Ring = @import("ring.zig").Ring;

/// A chain that was taken; good only within the reader section.
pub const Single = extern struct {
    address: u64,
    length: u32,
    head: u32,
    /// Bytes that were written, once they are.
    written: u32 = 0,
    reserved: u32 = 0,

    pub inline fn pointer(self: *align(4) const Single) [*]u8 {
        return @ptrFromInt(self.address);
    }
};

/// Words of one in a list.
pub const words = @sizeOf(Single) / 4;

/// Guest addresses of buffers, by the part of memory that the last one was in.
pub const Lookup = struct {
    table: *const memory.Table,
    cache: *memory.Cache,
    window: memory.Window = .{},

    /// Null for what is not in one piece.
    inline fn find(self: *Lookup, address: u64, length: u32) ?[*]u8 {
        if (address -% self.window.start >= self.window.length and !self.move(address)) return null;
        const offset = address - self.window.start;
        if (length > self.window.length - offset) return null;
        return self.window.pointer + @as(usize, @intCast(offset));
    }

    noinline fn move(self: *Lookup, address: u64) bool {
        self.window = self.table.window(self.cache, address) orelse return false;
        return true;
    }
};

/// The list of one `take`, and what becomes of it. `flags` of a chain that is
/// taken: none, or WRITE.
pub fn Taker(comptime flags: u16) type {
    return struct {
        const Self = @This();

        lookup: Lookup,
        /// Heads (packed: buffer ids) are below it.
        size: u32,
        list: [*]align(4) Single,
        count: u32 = 0,
        /// There is more, but not of this kind.
        has_other: bool = false,

        /// False when it is no single buffer of this kind.
        pub inline fn add(self: *Self, descriptor: chain.Descriptor, head: u32) bool {
            const pointer = if (head < self.size) self.pointerOf(descriptor) else null;
            const found = pointer orelse {
                self.has_other = true;
                return false;
            };
            self.list[self.count] = .{ .address = @intFromPtr(found), .length = descriptor.length, .head = head };
            self.count += 1;
            return true;
        }

        inline fn pointerOf(self: *Self, descriptor: chain.Descriptor) ?[*]u8 {
            if (descriptor.flags & (chain.flag_next | chain.flag_write | chain.flag_indirect) != flags) return null;
            return if (descriptor.length == 0) null else self.lookup.find(descriptor.address, descriptor.length);
        }
    };
}

/// Whether a ring can be used in this way: addresses are the guest's, and
/// nobody wants to know what is in flight.
pub inline fn suits(ring: *const Ring) bool {
    return ring.iova == null and ring.region == null;
}

/// Gives back the first `count` of what was taken, and leaves the others in the
/// ring. Returns 1 when the driver must be called. `is_filled`: each was
/// written completely, or is not writable, so that one used element can stand
/// for all of them where both sides go in order (2.7.9, 2.8.8).
pub inline fn giveBack(ring: *Ring, format: anytype, list: []align(4) const Single, taken: u32, comptime is_filled: bool) i32 {
    if (list.len < taken) format.untakeSingles(ring, taken - @as(u32, @intCast(list.len)));
    if (list.len == 0) return 0;
    const old = format.usedPosition();
    const count: u32 = @intCast(list.len);
    if (is_filled and ring.is_in_order) {
        const last = &list[list.len - 1];
        format.publish(ring, last.head, last.written, count);
    } else {
        for (list) |*one| format.publish(ring, one.head, one.written, 1);
    }
    ring.popped += count;
    ring.pushed += count;
    return ring.announce(format, old);
}
