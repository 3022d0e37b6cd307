//! One request's life. `start` checks it and turns its segments into iovecs,
//! the only place here where guest memory becomes a pointer; `advance` takes
//! the result of each system call and says whether another one is needed:
//!
//!   read, write ──> rest of a short transfer ──────────┐
//!   discard ──> punch                                  ├─> flush ──> result
//!   write zeroes ──> punch ──> zero range ──> zeros ───┘ (dsync)
//!                    (may unmap)  (each when the one before is unsupported)
//!
//! Both kinds of engine drive this machine, so they answer alike.

const std = @import("std");
const builtin = @import("builtin");
const sys = @import("../linux.zig");
const sync = @import("../sync.zig");
const layout = @import("../layout.zig");
const memory = @import("../memory/memory.zig");
const copying = @import("../memory/copy.zig");
const prompt = @import("prompt.zig");
const traits = @import("traits.zig");
const linux = sys.linux;
const iovec = std.posix.iovec;

pub const max_segments = 2048;
/// UIO_MAXIOV: the kernel refuses more in one call.
pub const max_vectors_per_call = 1024;
const row_vectors = 64;
/// EINTR and EAGAIN in a row before the request fails with it.
const max_retries = 100;

/// Storage that each slot has for good; longer requests allocate.
pub const Row = struct {
    vectors: [row_vectors]iovec,
    views: [row_vectors]u32,
};

/// What a request with badly aligned memory moves at once, for O_DIRECT.
const bounce_bytes = if (builtin.is_test) 64 << 10 else 1 << 20;
const Bounce = []align(traits.alignment_maximum) u8;

const zeros_bytes = 64 * 1024;
/// Aligned for files opened with O_DIRECT. Never written.
var zeros: [zeros_bytes]u8 align(4096) = @splat(0);

pub const Phase = enum(u8) { read, write, flush, punch, zero_range, zero_write };

/// The memory of the requests of one `submit`: consecutive requests on the
/// same memory share a reader section. No system call that may block is made
/// inside, because a commit waits for the section's end.
pub const Section = struct {
    handle: u32 = 0,
    memory: ?*memory.Memory = null,
    table: *const memory.Table = undefined,

    fn enter(self: *Section, handle: u32) ?*memory.Memory {
        if (self.memory) |held| {
            if (self.handle == handle) return held;
            self.leave();
        }
        const found = memory.get(handle) orelse return null;
        self.table = found.enter();
        self.memory = found;
        self.handle = handle;
        return found;
    }

    pub fn leave(self: *Section) void {
        if (self.memory) |held| held.leave();
        self.memory = null;
    }
};

pub const Slot = struct {
    /// Next in whichever list the slot is.
    next: u32 = none,
    tag: u32 = 0,
    result: i32 = 0,
    file: i32 = -1,
    phase: Phase = .flush,
    /// A discard is a hint; zeroes have to be written one way or another.
    is_hint: bool = false,
    is_flushed_after: bool = false,
    /// Let a kernel worker do the next call instead of the caller's thread.
    is_offloaded: bool = false,
    /// The kernel found no memory behind a mapping that we gave it.
    is_hole: bool = false,
    retries: u8 = 0,
    rw_flags: u32 = 0,
    vector_count: u32 = 0,
    held_count: u32 = 0,
    /// Where the next call goes on, and the bytes from there to the end.
    offset: u64 = 0,
    remaining: u64 = 0,
    memory: ?*memory.Memory = null,
    /// What is left of the iovecs: starts in the row or in `wide`.
    vectors: [*]iovec = undefined,
    row: *Row = undefined,
    wide: ?[]align(@alignOf(iovec)) u8 = null,
    /// Stands in for memory that O_DIRECT would refuse, part by part.
    bounce: ?Bounce = null,
    bounce_vector: iovec = undefined,

    pub const none: u32 = 0xffff_ffff;

    /// Null when a call is to be made, else the request's result.
    pub fn start(self: *Slot, request: layout.IoRequest, segments: []const layout.Segment, section: *Section) ?i32 {
        self.* = .{ .row = self.row, .tag = request.tag, .file = request.file, .offset = request.offset };
        if (request.file < 0) return sys.fail(.BADF);
        const is_durable = request.flags & layout.flag_io_dsync != 0;
        switch (request.operation) {
            layout.io_read, layout.io_write => {
                self.phase = if (request.operation == layout.io_read) .read else .write;
                // Not on reads: there it would only mean O_SYNC's read flush.
                if (is_durable and self.phase == .write) self.rw_flags = linux.RWF.DSYNC;
                return self.gather(request, segments, section);
            },
            layout.io_flush => {
                self.phase = .flush;
                self.offset = 0; // without meaning here, and not checked
                return null;
            },
            layout.io_discard, layout.io_write_zeroes => {
                self.is_hint = request.operation == layout.io_discard;
                self.is_flushed_after = is_durable;
                self.remaining = request.length;
                if (!isRange(self.offset, self.remaining)) return sys.fail(.INVAL);
                if (self.remaining == 0) return 0;
                const is_punched = self.is_hint or request.flags & layout.flag_io_unmap != 0;
                self.phase = if (is_punched) .punch else .zero_range;
                return null;
            },
            else => return sys.fail(.INVAL),
        }
    }

    fn gather(self: *Slot, request: layout.IoRequest, all: []const layout.Segment, section: *Section) ?i32 {
        if (request.segment_count > max_segments) return sys.fail(.INVAL);
        if (request.segment_first > all.len) return sys.fail(.INVAL);
        if (request.segment_count > all.len - request.segment_first) return sys.fail(.INVAL);
        if (request.segment_count == 0) return if (isRange(self.offset, 0)) 0 else sys.fail(.INVAL);
        const segments = all[request.segment_first..][0..request.segment_count];
        const held = section.enter(request.memory) orelse return sys.fail(.INVAL);
        if (!held.isUsable()) return sys.fail(.FAULT);

        self.vectors = &self.row.vectors;
        var views: [*]u32 = &self.row.views;
        if (segments.len > row_vectors) {
            const bytes = sync.allocator.alignedAlloc(u8, .of(iovec), segments.len * (@sizeOf(iovec) + @sizeOf(u32))) catch
                return sys.fail(.NOMEM);
            self.wide = bytes;
            self.vectors = @ptrCast(bytes.ptr);
            views = @ptrCast(@alignCast(bytes.ptr + segments.len * @sizeOf(iovec)));
        }
        if (request.alignment > traits.alignment_maximum) return sys.fail(.INVAL);
        const alignment = @max(request.alignment, 1);
        var is_aligned = true;
        self.memory = held;
        const access = if (self.phase == .read) layout.access_write else layout.access_read;
        for (segments) |segment| {
            if (segment.access != access) return sys.fail(.INVAL);
            if (segment.length == 0) continue;
            const pointer = section.table.pointerOf(segment.view, segment.offset, segment.length) orelse
                return sys.fail(.FAULT);
            // One hold serves neighbours in the same view.
            if (self.held_count == 0 or views[self.held_count - 1] != segment.view) {
                if (!held.hold(segment.view)) return sys.fail(.FAULT);
                views[self.held_count] = segment.view;
                self.held_count += 1;
            }
            self.vectors[self.vector_count] = .{ .base = pointer, .len = segment.length };
            self.vector_count += 1;
            self.remaining += segment.length;
            if (@intFromPtr(pointer) % alignment != 0 or segment.length % alignment != 0) is_aligned = false;
        }
        if (!isRange(self.offset, self.remaining)) return sys.fail(.INVAL);
        if (self.remaining == 0) return 0;
        if (!is_aligned) {
            const size: usize = @intCast(@min(self.remaining, bounce_bytes));
            self.bounce = sync.allocator.alignedAlloc(u8, .fromByteUnits(traits.alignment_maximum), size) catch
                return sys.fail(.NOMEM);
            self.fillBounce();
        }
        return null;
    }

    /// The next part, for a write with what is to be written.
    fn fillBounce(self: *Slot) void {
        const bounce = self.bounce orelse return;
        const length: usize = @intCast(@min(self.remaining, bounce.len));
        self.bounce_vector = .{ .base = bounce.ptr, .len = length };
        if (self.phase == .write) self.copyBounce(length);
    }

    /// Between the bounce buffer's first bytes and what is left of the iovecs.
    fn copyBounce(self: *Slot, length: usize) void {
        var rest: []u8 = self.bounce.?[0..length];
        for (self.vectors[0..self.vector_count]) |vector| {
            const count = @min(rest.len, vector.len);
            if (count == 0) return;
            if (self.phase == .write) {
                copying.copy(rest.ptr, vector.base, count);
            } else {
                copying.copy(vector.base, rest.ptr, count);
            }
            rest = rest[count..];
        }
    }

    fn heldViews(self: *const Slot) []const u32 {
        const wide = self.wide orelse return self.row.views[0..self.held_count];
        const capacity = wide.len / (@sizeOf(iovec) + @sizeOf(u32));
        const views: [*]const u32 = @ptrCast(@alignCast(wide.ptr + capacity * @sizeOf(iovec)));
        return views[0..self.held_count];
    }

    /// Lets go of the memory. Not before the kernel is done with it.
    pub fn release(self: *Slot) void {
        if (self.memory) |held| {
            if (self.is_hole) {
                // Which of several views has it is not known; the memory is
                // broken all the same, and a touch of the hole finds it.
                if (self.held_count == 1) held.faultView(self.heldViews()[0]) else held.markFaulted();
            }
            for (self.heldViews()) |view| held.unhold(view);
        }
        if (self.wide) |bytes| sync.allocator.free(bytes);
        if (self.bounce) |bytes| sync.allocator.free(bytes);
        self.* = .{ .row = self.row };
    }

    /// Takes a call's result. Null when another call is to be made, else the
    /// request's result.
    pub fn advance(self: *Slot, raw: i32) ?i32 {
        if (raw < 0) return self.fallBack(raw);
        self.retries = 0;
        self.is_offloaded = false;
        switch (self.phase) {
            .flush => return 0,
            .punch, .zero_range => return self.afterData(),
            .read, .write, .zero_write => {},
        }
        const done: u64 = @intCast(raw);
        // 0: the file or device ends here.
        if (done == 0 or done > self.remaining) return sys.fail(.IO);
        if (self.bounce != null and self.phase == .read) self.copyBounce(@intCast(done));
        self.offset += done;
        self.remaining -= done;
        // A region that faulted meanwhile reads as zeros: not what was meant.
        if (self.memory) |held| if (!held.isUsable()) return sys.fail(.FAULT);
        if (self.remaining == 0) return self.afterData();
        if (self.phase == .zero_write) self.fillZeroes() else {
            self.skip(done);
            self.fillBounce();
        }
        return null;
    }

    fn afterData(self: *Slot) ?i32 {
        if (!self.is_flushed_after) return 0;
        self.is_flushed_after = false;
        self.phase = .flush;
        return null;
    }

    fn fallBack(self: *Slot, raw: i32) ?i32 {
        switch (@as(linux.E, @enumFromInt(@as(u16, @intCast(@min(-@as(i64, raw), 4095)))))) {
            .INTR, .AGAIN => {
                if (self.retries == max_retries) return raw;
                self.retries += 1;
                self.is_offloaded = true;
                return null;
            },
            .FAULT => self.is_hole = self.memory != null,
            .OPNOTSUPP => switch (self.phase) {
                .punch => {
                    // virtio leaves it to the device whether it deallocates.
                    if (self.is_hint) return 0;
                    self.phase = .zero_range;
                    return null;
                },
                .zero_range => return self.writeZeroes(),
                .write => if (self.rw_flags != 0) {
                    self.rw_flags = 0;
                    self.is_flushed_after = true;
                    return null;
                },
                else => {},
            },
            // Some file systems and devices say so for a range not aligned.
            .INVAL => switch (self.phase) {
                .punch => if (!self.is_hint) {
                    self.phase = .zero_range;
                    return null;
                },
                .zero_range => return self.writeZeroes(),
                else => {},
            },
            else => {},
        }
        return raw;
    }

    fn writeZeroes(self: *Slot) ?i32 {
        self.phase = .zero_write;
        self.fillZeroes();
        return null;
    }

    /// At most 4 MiB at once, by a kernel worker, so that nobody waits long.
    fn fillZeroes(self: *Slot) void {
        self.is_offloaded = true;
        self.vectors = &self.row.vectors;
        self.vector_count = 0;
        var left = self.remaining;
        while (left > 0 and self.vector_count < row_vectors) : (self.vector_count += 1) {
            const length = @min(left, zeros_bytes);
            self.row.vectors[self.vector_count] = .{ .base = &zeros, .len = length };
            left -= length;
        }
    }

    /// Drops the first `done` bytes of the iovecs; less than all of them.
    fn skip(self: *Slot, done: u64) void {
        var left = done;
        while (left > 0 and self.vector_count > 0) {
            const first = &self.vectors[0];
            if (left < first.len) {
                first.base += left;
                first.len -= left;
                return;
            }
            left -= first.len;
            self.vectors += 1;
            self.vector_count -= 1;
        }
    }

    /// Whether it is nothing but a copy of a moment into the page cache, as
    /// far as one can know.
    pub fn isPrompt(self: *const Slot) bool {
        return self.phase == .write and self.rw_flags == 0 and self.remaining <= prompt.largest_bytes;
    }

    /// Iovecs for the next call.
    pub fn callVectors(self: *const Slot) []const iovec {
        if (self.bounce != null) return (&self.bounce_vector)[0..1];
        return self.vectors[0..@min(self.vector_count, max_vectors_per_call)];
    }

    pub fn fallocateMode(self: *const Slot) u32 {
        const kind: u32 = if (self.phase == .punch) linux.FALLOC.FL_PUNCH_HOLE else linux.FALLOC.FL_ZERO_RANGE;
        return kind | linux.FALLOC.FL_KEEP_SIZE;
    }
};

/// Offsets are signed in the kernel, and -1 means "where the file stands".
fn isRange(offset: u64, length: u64) bool {
    const end = std.math.maxInt(i64);
    return offset <= end and length <= end - offset;
}

/// First in, first out, through the slots' `next`.
pub const List = struct {
    first: u32 = Slot.none,
    last: u32 = Slot.none,
    count: u32 = 0,

    pub fn push(self: *List, slots: []Slot, index: u32) void {
        slots[index].next = Slot.none;
        if (self.count == 0) self.first = index else slots[self.last].next = index;
        self.last = index;
        self.count += 1;
    }

    pub fn pop(self: *List, slots: []Slot) ?u32 {
        if (self.count == 0) return null;
        const index = self.first;
        self.first = slots[index].next;
        self.count -= 1;
        return index;
    }

    /// Moves all of `other` to the end.
    pub fn append(self: *List, slots: []Slot, other: *List) void {
        if (other.count == 0) return;
        if (self.count == 0) self.first = other.first else slots[self.last].next = other.first;
        self.last = other.last;
        self.count += other.count;
        other.* = .{};
    }
};

test "a short transfer goes on in the middle of an iovec" {
    var row: Row = undefined;
    var bytes: [30]u8 = undefined;
    var slot: Slot = .{ .row = &row, .phase = .read, .remaining = 30, .offset = 100, .vectors = &row.vectors, .vector_count = 3 };
    for (0..3) |index| row.vectors[index] = .{ .base = bytes[index * 10 ..].ptr, .len = 10 };
    try std.testing.expectEqual(null, slot.advance(13));
    try std.testing.expectEqual(113, slot.offset);
    try std.testing.expectEqual(2, slot.callVectors().len);
    try std.testing.expect(slot.callVectors()[0].base == bytes[13..].ptr);
    try std.testing.expectEqual(7, slot.callVectors()[0].len);
    try std.testing.expectEqual(null, slot.advance(7));
    try std.testing.expectEqual(1, slot.callVectors().len);
    try std.testing.expectEqual(sys.fail(.IO), slot.advance(0).?);
    try std.testing.expectEqual(sys.fail(.IO), slot.advance(11).?);
    try std.testing.expectEqual(0, slot.advance(10).?);
}

test "an interrupted call is made again, but not for ever" {
    var slot: Slot = .{ .phase = .flush };
    for (0..max_retries) |_| try std.testing.expectEqual(null, slot.advance(sys.fail(.INTR)));
    try std.testing.expectEqual(sys.fail(.INTR), slot.advance(sys.fail(.INTR)).?);
}

test "zeroes fall back from punching to zeroing to writing, then flush" {
    var row: Row = undefined;
    var slot: Slot = .{ .row = &row, .phase = .punch, .remaining = 5 << 20, .is_flushed_after = true };
    try std.testing.expectEqual(null, slot.advance(sys.fail(.OPNOTSUPP)));
    try std.testing.expectEqual(.zero_range, slot.phase);
    try std.testing.expectEqual(null, slot.advance(sys.fail(.OPNOTSUPP)));
    try std.testing.expectEqual(.zero_write, slot.phase);
    try std.testing.expectEqual(row_vectors, slot.callVectors().len);
    try std.testing.expectEqual(null, slot.advance(4 << 20));
    try std.testing.expectEqual(16, slot.callVectors().len);
    try std.testing.expect(slot.is_offloaded);
    try std.testing.expectEqual(null, slot.advance(1 << 20));
    try std.testing.expectEqual(.flush, slot.phase);
    try std.testing.expectEqual(0, slot.advance(0).?);
}

test "a discard that the file system cannot do succeeds as the hint that it is" {
    var slot: Slot = .{ .phase = .punch, .remaining = 4096, .is_hint = true };
    try std.testing.expectEqual(0, slot.advance(sys.fail(.OPNOTSUPP)).?);
    try std.testing.expectEqual(sys.fail(.NOSPC), slot.advance(sys.fail(.NOSPC)).?);
}
