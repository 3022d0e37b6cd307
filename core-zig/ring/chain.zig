//! Requests as a device sees them: a chain of descriptors in guest memory
//! becomes one record (`layout.Request`, then the header's bytes) and a run of
//! segments in the caller's batch. Descriptors are hostile: each field is read
//! once, checked, translated, and never looked at again.

const std = @import("std");
const layout = @import("../layout.zig");
const memory = @import("../memory/memory.zig");
const iova = @import("../memory/iova.zig");
const Areas = @import("iova_areas.zig").Areas;
const prefetch = @import("../prefetch.zig");

pub const descriptor_size = 16;
/// Virtio 1.3, 2.7.5: `flags` of a descriptor.
pub const flag_next: u16 = 1;
pub const flag_write: u16 = 2;
pub const flag_indirect: u16 = 4;

/// Drivers may make an indirect table longer than the queue (Linux does).
pub const indirect_limit_minimum: u32 = 1024;

pub const request_words = @sizeOf(layout.Request) / 4;
pub const segment_words = @sizeOf(layout.Segment) / 4;

/// Words from one record to the next: segments behind them stay aligned.
pub fn recordStride(header_bytes: u32) u32 {
    return std.mem.alignForward(u32, request_words + (header_bytes + 3) / 4, 4);
}

pub const Descriptor = struct {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,

    /// The one read of a descriptor in a table aligned as the queue's own is.
    pub inline fn load(pointer: *align(16) const [2]u64) Descriptor {
        return make(@atomicLoad(u64, &pointer[0], .monotonic), @atomicLoad(u64, &pointer[1], .monotonic));
    }

    /// The one read of a descriptor at any address (indirect tables).
    pub inline fn loadUnaligned(pointer: *align(1) const volatile [2]u64) Descriptor {
        return make(pointer[0], pointer[1]);
    }

    inline fn make(low: u64, high: u64) Descriptor {
        return .{
            .address = low,
            .length = @truncate(high),
            .flags = @truncate(high >> 32),
            .next = @truncate(high >> 48),
        };
    }
};

/// `Broken`: the driver broke a rule, see `Batch.reason` and `Batch.value`.
/// `Full`: the segments do not fit in what is left of the batch.
/// `Missing`: the IOTLB lacks something, which the ring's `Areas` has noted.
pub const Error = error{ Broken, Full, Missing };

/// What a miss is noted for: the smallest page of any IOMMU.
const page_size = 4096;

/// The view hit last, translated inline. As the table, it is good only within
/// the reader section.
const Window = struct {
    start: u64 = 0,
    length: u64 = 0,
    pointer: [*]u8 = undefined,
    view: u32 = 0,
    /// Of `start`, in the view.
    offset: u32 = 0,
    /// What the device may do there.
    access: u32 = 0,
};

/// Writes the records and segments of one pop. For each request: `begin`,
/// `add` per descriptor, then `finish`; one that fails is the batch's last.
/// Where addresses are IOVAs (`is_translated`) it is another type, so that
/// nobody else pays for it.
pub fn Batch(comptime is_translated: bool) type {
    return struct {
        const Self = @This();

        table: *const memory.Table,
        cache: *memory.Cache,
        words: [*]u32,
        stride: u32,
        segments: [*]align(4) layout.Segment,
        segment_capacity: u32,
        header_bytes: u32,
        trailer_bytes: u32,

        /// Where addresses are IOVAs.
        iova: if (is_translated) *Areas else void = undefined,
        memory: *const memory.Memory = undefined,
        is_missing: bool = false,

        window: Window = .{},
        record_count: u32 = 0,
        segment_count: u32 = 0,

        // The request under way.
        first: u32 = 0,
        readable_end: u32 = 0,
        header_length: u32 = 0,
        readable: u64 = 0,
        writable: u64 = 0,
        has_writable: bool = false,

        reason: u32 = layout.broken_none,
        value: u64 = 0,

        /// The room for segments is what `max` records leave of the batch; null
        /// when they do not fit.
        pub inline fn init(table: *const memory.Table, cache: *memory.Cache, words: [*]u32, word_count: u32, max: u32, header_bytes: u32, trailer_bytes: u32) ?Self {
            const stride = recordStride(header_bytes);
            const start = @as(u64, max) * stride;
            if (start > word_count) return null;
            return .{
                .table = table,
                .cache = cache,
                .words = words,
                .stride = stride,
                .segments = @ptrCast(words + @as(usize, @intCast(start))),
                .segment_capacity = (word_count - @as(u32, @intCast(start))) / segment_words,
                .header_bytes = header_bytes,
                .trailer_bytes = trailer_bytes,
            };
        }

        pub inline fn begin(self: *Self) void {
            self.first = self.segment_count;
            self.readable_end = self.segment_count;
            self.header_length = 0;
            self.readable = 0;
            self.writable = 0;
            self.has_writable = false;
            if (is_translated) self.is_missing = false;
        }

        pub noinline fn breach(self: *Self, reason: u32, value: u64) Error {
            self.reason = reason;
            self.value = value;
            return error.Broken;
        }

        /// First piece of a range in guest memory (at least one byte).
        inline fn piece(self: *Self, address: u64, length: u32, access: u32) Error!memory.Piece {
            const is_inside = address -% self.window.start < self.window.length;
            if (!is_inside or (is_translated and self.window.access & access == 0)) try self.moveWindow(address, access);
            const offset: u32 = @intCast(address - self.window.start);
            return .{
                .pointer = self.window.pointer + offset,
                .view = self.window.view,
                .offset = if (is_translated) self.window.offset + offset else offset,
                .length = @intCast(@min(length, self.window.length - offset)),
            };
        }

        /// A chain that is taken later begins with this descriptor: what it
        /// points at comes nearer. Only a hint, so no more is checked than that
        /// the bytes may be looked at; `add` reads and checks everything again.
        pub inline fn hint(self: *const Self, descriptor: Descriptor) void {
            if (descriptor.flags & flag_write != 0) return;
            const offset = descriptor.address -% self.window.start;
            if (offset >= self.window.length) return;
            const pointer = self.window.pointer + @as(usize, @intCast(offset));
            // A driver keeps the byte of the answer beside the header.
            if (self.trailer_bytes != 0) prefetch.forWriting(pointer) else prefetch.forReading(pointer);
        }

        /// The same of the first buffer in an indirect table that has been hinted
        /// at before.
        pub inline fn hintInside(self: *const Self, descriptor: Descriptor) void {
            if (descriptor.flags & flag_indirect == 0) return;
            const offset = descriptor.address -% self.window.start;
            if (offset >= self.window.length or self.window.length - offset < descriptor_size) return;
            var first: Descriptor = .loadUnaligned(@ptrCast(self.window.pointer + @as(usize, @intCast(offset))));
            // Where it is flags or not depends on the format.
            first.flags = 0;
            self.hint(first);
        }

        noinline fn moveWindow(self: *Self, address: u64, access: u32) Error!void {
            if (is_translated) {
                const areas = self.iova;
                switch (iova.find(self.memory, self.table, &areas.cache, address, access)) {
                    .window => |found| self.window = .{ .start = found.start, .length = found.length, .pointer = found.pointer, .view = found.view, .offset = found.offset, .access = found.access },
                    .miss => |reason| {
                        self.is_missing = true;
                        areas.note(address, access, reason);
                        return error.Missing;
                    },
                }
                return;
            }
            const found = self.table.window(self.cache, address) orelse return self.breach(layout.broken_unmapped, address);
            self.window = .{ .start = found.start, .length = found.length, .pointer = found.pointer, .view = found.view };
        }

        /// One buffer of the request, `index` being its descriptor.
        pub inline fn add(self: *Self, descriptor: Descriptor, index: u32) Error!void {
            const is_writable = descriptor.flags & flag_write != 0;
            if (is_writable) {
                self.has_writable = true;
            } else if (self.has_writable) {
                return self.breach(layout.broken_order, index);
            }
            // Nothing to reach, so its address need not be mapped.
            if (descriptor.length == 0) return;
            // At most 2^17 descriptors of less than 2^32 bytes: no overflow.
            if (is_writable) self.writable += descriptor.length else self.readable += descriptor.length;
            if (self.readable + self.writable > std.math.maxInt(u32)) {
                return self.breach(layout.broken_length, self.readable + self.writable);
            }
            var address = descriptor.address;
            var left: u32 = descriptor.length;
            while (true) {
                const access = if (is_writable) layout.access_write else layout.access_read;
                var part = self.piece(address, left, access) catch |failure| {
                    if (!is_translated) return failure;
                    // All that the chain lacks is found in one walk, and asked for
                    // at once.
                    if (failure != error.Missing or self.iova.isFull()) return failure;
                    const skipped: u32 = @intCast(@min(left, page_size - address % page_size));
                    address +%= skipped;
                    left -= skipped;
                    if (left == 0) return;
                    if (address == 0) return self.breach(layout.broken_unmapped, descriptor.address);
                    continue;
                };
                // No region holds the last byte below 2^64, but IOVAs reach it.
                address = if (is_translated) address +% part.length else address + part.length;
                left -= part.length;
                if (is_translated and address == 0 and left != 0) return self.breach(layout.broken_unmapped, descriptor.address);
                if (!is_writable and self.header_length < self.header_bytes) {
                    const count = @min(part.length, self.header_bytes - self.header_length);
                    copyFromGuest(self.header() + self.header_length, part.pointer, count);
                    self.header_length += count;
                    part.offset += count;
                    part.length -= count;
                }
                if (part.length != 0) {
                    if (self.segment_count == self.segment_capacity) return error.Full;
                    self.segments[self.segment_count] = .{
                        .view = part.view,
                        .offset = part.offset,
                        .length = part.length,
                        .access = if (is_writable) layout.access_write else layout.access_read,
                    };
                    self.segment_count += 1;
                    if (!is_writable) self.readable_end = self.segment_count;
                }
                if (left == 0) return;
            }
        }

        /// The record of the request finished last.
        pub inline fn finished(self: *const Self) *align(4) const layout.Request {
            return @ptrCast(self.words + @as(usize, self.record_count - 1) * self.stride);
        }

        inline fn header(self: *Self) [*]u8 {
            return @ptrCast(self.words + @as(usize, self.record_count) * self.stride + request_words);
        }

        /// Writes the record of the request under way.
        pub inline fn finish(self: *Self, head: u32, serial: u32) Error!void {
            if (is_translated and self.is_missing) return error.Missing;
            if (self.readable + self.writable == 0) return self.breach(layout.broken_empty, head);
            var record: layout.Request = .{
                .head = head,
                .segment_first = self.first,
                .readable_count = self.readable_end - self.first,
                .writable_count = self.segment_count - self.readable_end,
                .readable_bytes = @intCast(self.readable - self.header_length),
                .writable_bytes = @intCast(self.writable),
                .header_length = self.header_length,
                .trailer_length = 0,
                .trailer_view = 0,
                .trailer_offset = 0,
                .serial = serial,
                .reserved = 0,
            };
            if (self.trailer_bytes != 0 and record.writable_count != 0) {
                const last = &self.segments[self.segment_count - 1];
                last.length -= 1;
                record.trailer_length = 1;
                record.trailer_view = last.view;
                record.trailer_offset = last.offset + last.length;
                record.writable_bytes -= 1;
                if (last.length == 0) {
                    record.writable_count -= 1;
                    self.segment_count -= 1;
                }
            }
            if (self.header_length < self.header_bytes) {
                // No bytes of an earlier request in the place of those missing.
                @memset((self.header() + self.header_length)[0 .. self.header_bytes - self.header_length], 0);
            }
            const out: *align(4) layout.Request = @ptrCast(self.words + @as(usize, self.record_count) * self.stride);
            out.* = record;
            self.record_count += 1;
        }
    };
}

/// The one read of header bytes. The usual lengths are whole words.
inline fn copyFromGuest(to: [*]u8, from: [*]const u8, length: u32) void {
    var at: u32 = 0;
    while (length - at >= 8) : (at += 8) {
        const word = @as(*align(1) const volatile u64, @ptrCast(from + at)).*;
        std.mem.writeInt(u64, to[at..][0..8], word, .little);
    }
    while (at < length) : (at += 1) {
        to[at] = @as(*const volatile u8, @ptrCast(from + at)).*;
    }
}

/// Adds the buffers of an indirect table of a split ring.
pub fn addIndirect(batch: anytype, address: u64, length: u32, queue_size: u32) Error!void {
    const table = try Table.init(batch, address, length, queue_size);
    var index: u32 = 0;
    for (0..table.count) |_| {
        const descriptor = try table.load(batch, index);
        if (descriptor.flags & flag_indirect != 0) return batch.breach(layout.broken_indirect_nested, index);
        try batch.add(descriptor, index);
        if (descriptor.flags & flag_next == 0) return;
        if (descriptor.next >= table.count) return batch.breach(layout.broken_next, descriptor.next);
        index = descriptor.next;
    }
    return batch.breach(layout.broken_loop, table.count);
}

/// The same of a packed ring, whose descriptors are used in their order and up
/// to the last; all flags but WRITE, and the id, mean nothing there (2.8.7).
pub fn addOrderedIndirect(batch: anytype, address: u64, length: u32, queue_size: u32) Error!void {
    const table = try Table.init(batch, address, length, queue_size);
    for (0..table.count) |index| {
        var descriptor = try table.load(batch, @intCast(index));
        // The flags of a packed ring's descriptor come last.
        descriptor.flags = descriptor.next;
        try batch.add(descriptor, @intCast(index));
    }
}

/// An indirect table. It may lie at any address (2.7.7.2 asks for no
/// alignment) and across regions.
const Table = struct {
    address: u64,
    count: u32,
    /// The whole table, where it is in one piece.
    pointer: ?[*]const u8,

    inline fn init(batch: anytype, address: u64, length: u32, queue_size: u32) Error!Table {
        const count = length / descriptor_size;
        if (count == 0 or length % descriptor_size != 0 or count > @max(queue_size, indirect_limit_minimum)) {
            return batch.breach(layout.broken_indirect_size, length);
        }
        // `next` may lead there without a look at what lies between.
        if (address > std.math.maxInt(u64) - @as(u64, length - 1)) return batch.breach(layout.broken_unmapped, address);
        const piece = try batch.piece(address, length, layout.access_read);
        return .{ .address = address, .count = count, .pointer = if (piece.length == length) piece.pointer else null };
    }

    inline fn load(self: *const Table, batch: anytype, index: u32) Error!Descriptor {
        const offset = @as(usize, index) * descriptor_size;
        if (self.pointer) |pointer| return .loadUnaligned(@ptrCast(pointer + offset));
        return gather(batch, self.address + offset);
    }
};

/// A descriptor whose table is not in one piece.
fn gather(batch: anytype, address: u64) Error!Descriptor {
    var bytes: [descriptor_size]u8 = undefined;
    var at: u32 = 0;
    while (at < descriptor_size) {
        const piece = try batch.piece(address + at, descriptor_size - at, layout.access_read);
        copyFromGuest(bytes[at..].ptr, piece.pointer, piece.length);
        at += piece.length;
    }
    return .loadUnaligned(@ptrCast(&bytes));
}

test "records keep the segments behind them aligned" {
    try std.testing.expectEqual(12, recordStride(0));
    try std.testing.expectEqual(16, recordStride(1));
    try std.testing.expectEqual(16, recordStride(16));
    try std.testing.expectEqual(20, recordStride(17));
}

test "bytes are copied for every length" {
    var from: [40]u8 = undefined;
    for (&from, 0..) |*byte, i| byte.* = @intCast(i + 1);
    for (0..33) |length| {
        var to: [40]u8 = @splat(0);
        copyFromGuest(&to, from[3..].ptr, @intCast(length));
        try std.testing.expectEqualSlices(u8, from[3..][0..length], to[0..length]);
        try std.testing.expectEqual(0, to[length]);
    }
}
