//! What the device may write for each request that it has, so that it can be
//! logged (memory/dirty_log.zig) when the request is given back: the descriptors
//! themselves may belong to the driver, or to others' used ones, by then. Kept
//! only where the front-end may ask for a log (`flag_ring_logged`).
//!
//! A device may write anywhere in a request's writable segments, whatever it
//! says that it has written: all of them are marked.
//!
//! Of the ring itself we write, and mark where its VHOST_VRING_F_LOG is set:
//! - split: used elements, used.idx, used.flags and avail_event, at their
//!   offsets from `log_guest_addr`, which stands for the used ring;
//! - packed: the device event suppression at `log_guest_addr`, which is what
//!   QEMU gives there, and used descriptors at their own guest address. (DPDK
//!   marks those from `log_guest_addr` on, which are other pages.)

const std = @import("std");
const layout = @import("../layout.zig");
const sync = @import("../sync.zig");
const memory = @import("../memory/memory.zig");
const dirty_log = @import("../memory/dirty_log.zig");
const chain = @import("chain.zig");

const Extent = struct {
    view: u32,
    offset: u32,
    length: u32,
};

const inline_extents = 3;
const block_extents = 8;
/// Where a guest makes us remember more, all of its memory is marked instead.
const block_maximum = 1 << 15;
const no_block = std.math.maxInt(u32);

const Request = struct {
    /// `everything`: too much to remember.
    count: u32 = 0,
    /// The first of the blocks with what does not fit here.
    block: u32 = no_block,
    extents: [inline_extents]Extent = undefined,
};
const everything = std.math.maxInt(u32);

const Block = struct {
    extents: [block_extents]Extent,
    next: u32,
};

pub const Written = struct {
    log: *dirty_log.DirtyLog,
    queue: u32,
    /// Where the descriptors are, for a packed ring.
    descriptor_gpa: u64,
    /// Where the used ring is, if its address is an IOVA: what the front-end
    /// gives for the log is one then, too (as QEMU and DPDK have it).
    used_gpa: ?u64 = null,
    /// One per head.
    requests: []Request,
    blocks: std.ArrayList(Block) = .empty,
    free_block: u32 = no_block,

    // While requests are given back: from `begin` to `end`.
    writer: dirty_log.Writer = undefined,
    /// Where buffers are logged.
    table: ?*const memory.Table = null,
    has_everything: bool = false,

    pub fn create(log: *dirty_log.DirtyLog, queue: u32, descriptor_gpa: u64, size: u32) ?*Written {
        const self = sync.allocator.create(Written) catch return null;
        const requests = sync.allocator.alloc(Request, size) catch {
            sync.allocator.destroy(self);
            return null;
        };
        @memset(requests, .{});
        self.* = .{ .log = log, .queue = queue, .descriptor_gpa = descriptor_gpa, .requests = requests };
        return self;
    }

    pub fn destroy(self: *Written) void {
        self.blocks.deinit(sync.allocator);
        sync.allocator.free(self.requests);
        sync.allocator.destroy(self);
    }

    /// The request that the batch has just finished.
    pub inline fn remember(self: *Written, batch: anytype, head: u32) void {
        const record = batch.finished();
        const request = &self.requests[head];
        const segments = batch.segments[batch.segment_count - record.writable_count .. batch.segment_count];
        const count = segments.len + record.trailer_length;
        if (count > inline_extents) return self.rememberMany(request, segments, record);
        for (segments, request.extents[0..segments.len]) |segment, *extent| {
            extent.* = .{ .view = segment.view, .offset = segment.offset, .length = segment.length };
        }
        if (record.trailer_length != 0) request.extents[segments.len] = trailerOf(record);
        request.count = @intCast(count);
    }

    fn trailerOf(record: *align(4) const layout.Request) Extent {
        return .{ .view = record.trailer_view, .offset = record.trailer_offset, .length = record.trailer_length };
    }

    noinline fn rememberMany(self: *Written, request: *Request, segments: []align(4) const layout.Segment, record: *align(4) const layout.Request) void {
        request.count = 0;
        for (segments) |segment| {
            self.add(request, .{ .view = segment.view, .offset = segment.offset, .length = segment.length });
        }
        if (record.trailer_length != 0) self.add(request, trailerOf(record));
    }

    fn add(self: *Written, request: *Request, extent: Extent) void {
        if (request.count == everything) return;
        if (request.count < inline_extents) {
            request.extents[request.count] = extent;
            request.count += 1;
            return;
        }
        const place = (request.count - inline_extents) % block_extents;
        if (place == 0) {
            const block = self.takeBlock() orelse {
                self.forget(request);
                request.count = everything;
                return;
            };
            self.blocks.items[block].next = request.block;
            request.block = block;
        }
        self.blocks.items[request.block].extents[place] = extent;
        request.count += 1;
    }

    fn takeBlock(self: *Written) ?u32 {
        const block = self.free_block;
        if (block != no_block) {
            self.free_block = self.blocks.items[block].next;
            return block;
        }
        if (self.blocks.items.len == block_maximum) return null;
        _ = self.blocks.addOne(sync.allocator) catch return null;
        return @intCast(self.blocks.items.len - 1);
    }

    /// The request was not the device's after all.
    pub fn drop(self: *Written, head: u32) void {
        const request = &self.requests[head];
        if (request.block != no_block) self.forget(request);
    }

    fn forget(self: *Written, request: *Request) void {
        while (request.block != no_block) {
            const block = &self.blocks.items[request.block];
            const next = block.next;
            block.next = self.free_block;
            self.free_block = request.block;
            request.block = next;
        }
    }

    /// Before requests are given back.
    pub fn begin(self: *Written, object: *memory.Memory) void {
        self.writer = self.log.enter();
        self.has_everything = false;
        self.table = if (self.writer.isLogging()) object.enter() else null;
    }

    /// Marks what may have been written for the request, before it is used.
    pub inline fn settle(self: *Written, head: u32) void {
        const request = &self.requests[head];
        if (self.table) |table| self.markRequest(table, request);
        if (request.block != no_block) self.forget(request);
    }

    fn markRequest(self: *Written, table: *const memory.Table, request: *const Request) void {
        if (request.count == everything) return self.markEverything(table);
        for (request.extents[0..@min(request.count, inline_extents)]) |extent| self.markExtent(table, extent);
        if (request.count <= inline_extents) return;
        // The first block is the one filled last.
        var left = request.count - inline_extents;
        var block = request.block;
        while (left != 0) {
            const filled = (left - 1) % block_extents + 1;
            for (self.blocks.items[block].extents[0..filled]) |extent| self.markExtent(table, extent);
            left -= filled;
            block = self.blocks.items[block].next;
        }
    }

    inline fn markExtent(self: *Written, table: *const memory.Table, extent: Extent) void {
        if (table.gpaOf(extent.view, extent.offset)) |gpa| self.writer.mark(gpa, extent.length);
    }

    noinline fn markEverything(self: *Written, table: *const memory.Table) void {
        if (self.has_everything) return;
        self.has_everything = true;
        for (table.regions) |region| self.writer.mark(region.gpa, region.size);
    }

    /// The address that stands for the used ring, if that is logged; between
    /// `begin` and `end`.
    pub fn ringAddress(self: *const Written) ?u64 {
        const address = self.writer.ringAddress(self.queue) orelse return null;
        return self.used_gpa orelse address;
    }

    /// After the requests were given back.
    pub fn end(self: *Written, object: *memory.Memory) void {
        if (self.table != null) object.leave();
        self.table = null;
        self.writer.leave();
    }

    /// Something at `offset` of the used ring was written outside a push.
    pub fn markRing(self: *const Written, offset: u64, length: u64) void {
        var writer = self.log.enter();
        defer writer.leave();
        if (writer.ringAddress(self.queue)) |address| writer.mark((self.used_gpa orelse address) +| offset, length);
    }
};
