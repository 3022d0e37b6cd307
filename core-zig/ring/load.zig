//! The driver side of a split ring, as a load generator: a vhost-user front-end
//! has set up memory, ring and features, and `run` keeps virtio-blk requests
//! outstanding on it, natively, so that what is measured is the back-end.
//! It writes each descriptor anew for each request, as a guest's driver does.

const std = @import("std");
const layout = @import("../layout.zig");
const linux = @import("../linux.zig");
const sync = @import("../sync.zig");
const rings = @import("ring.zig");
const split = @import("split.zig");
const chain = @import("chain.zig");
const latency = @import("latency.zig");
const sys = linux.linux;

const LoadConfig = layout.LoadConfig;
const sector_size = 512;
/// virtio-blk (5.2.6): header of 16 bytes, data, one status byte.
const Header = extern struct { type: u32, reserved: u32, sector: u64 };
const type_in: u32 = 0;
const type_out: u32 = 1;
const type_flush: u32 = 4;

const Descriptor = extern struct { address: u64, length: u32, flags: u16, next: u16 };

/// One per request outstanding: header and status share a cache line, as they
/// do in Linux's driver; the indirect table follows.
const Control = extern struct {
    header: Header align(64),
    status: u8,
};
const poll_slice_ms = 100;

pub fn run(config: *const LoadConfig, result: *layout.LoadResult) callconv(.c) i32 {
    result.* = std.mem.zeroes(layout.LoadResult);
    var driver = Driver.init(config, result) orelse return linux.fail(.INVAL);
    // Requests of an earlier run may still write into the data area.
    if (driver.used_index != driver.available_index) return linux.fail(.BUSY);
    driver.slots = sync.allocator.alloc(Slot, config.depth) catch return linux.fail(.NOMEM);
    defer sync.allocator.free(driver.slots);
    for (driver.slots, 0..) |*slot, i| slot.* = .{ .next_free = @intCast(i + 1) };
    const start_ns = now();
    const start_ticks = latency.ticks();
    const code = driver.runAll(start_ns);
    result.elapsed_ns = now() - start_ns;
    const ns_per_tick = float(result.elapsed_ns) / float(@max(1, latency.ticks() -% start_ticks));
    driver.takeCalls(0);
    if (config.depth == 1) driver.latency.report(ns_per_tick, result);
    return code;
}

fn float(value: u64) f64 {
    return @floatFromInt(value);
}

fn now() u64 {
    var time: sys.timespec = undefined;
    _ = sys.clock_gettime(.MONOTONIC, &time);
    return @as(u64, @intCast(time.sec)) * 1_000_000_000 + @as(u64, @intCast(time.nsec));
}

const Slot = struct {
    /// The next in the list of free slots, which ends at `depth`.
    next_free: u32,
    block: u64 = 0,
    is_in_flight: bool = false,
};

/// What a phase does with the data: nothing, or verify's two halves.
const Data = enum { ignored, written, compared };

const Driver = struct {
    config: *const LoadConfig,
    result: *layout.LoadResult,
    descriptors: [*]Descriptor,
    available: *split.Available,
    used: *split.Used,
    data: [*]u8,
    data_gpa: u64,
    control_size: u32,
    buffers_offset: u64,
    has_event_idx: bool,
    has_indirect: bool,
    spins: bool,
    /// Places on the disk that requests go to, and the next one's number.
    blocks: u64,
    random: std.Random.SplitMix64,
    sequence: u64 = 0,

    available_index: u16,
    used_index: u16,
    in_flight: u32 = 0,
    slots: []Slot = &.{},
    free: u32 = 0,
    /// When something was last completed, and when this was last looked at.
    progress_ns: u64 = 0,
    rounds: u32 = 0,
    sent_ticks: u64 = 0,
    latency: latency.Histogram = .{},

    fn init(config: *const LoadConfig, result: *layout.LoadResult) ?Driver {
        const size = config.queue_size;
        const per_request = config.segment_count +| 2;
        const has_indirect = has(config, 28);
        if (@popCount(size) != 1 or size > rings.size_maximum or config.segment_count == 0) return null;
        if (config.depth == 0 or config.depth > size / @as(u64, if (has_indirect) 1 else per_request)) return null;
        if (has_indirect and per_request > chain.indirect_limit_minimum) return null;
        if (config.request_bytes == 0 or config.request_bytes % sector_size != 0 or config.request_bytes < config.segment_count) return null;
        const blocks = config.disk_sectors / (config.request_bytes / sector_size);
        if (blocks == 0 or config.operation > layout.load_flush or config.timeout_ms == 0) return null;
        const spins = config.flags & layout.flag_load_spin != 0;
        if (!spins and config.call_fd < 0) return null;
        const verifies = config.flags & layout.flag_load_verify != 0;
        if (!verifies and config.request_count == 0 and config.duration_ms == 0) return null;

        const control_size = std.mem.alignForward(u32, @sizeOf(Control) + chain.descriptor_size * per_request, 64);
        const buffers_offset = std.mem.alignForward(u64, @as(u64, config.depth) * control_size, 4096);
        const data_size = buffers_offset + @as(u64, config.depth) * config.request_bytes;
        var driver: Driver = .{
            .config = config,
            .result = result,
            .descriptors = @ptrCast(@alignCast(area(config, config.descriptor_offset, 16 * size, 16) orelse return null)),
            .available = @ptrCast(@alignCast(area(config, config.available_offset, split.Available.byteCount(size), 2) orelse return null)),
            .used = @ptrCast(@alignCast(area(config, config.used_offset, split.Used.byteCount(size), 4) orelse return null)),
            .data = area(config, config.data_offset, data_size, 64) orelse return null,
            .data_gpa = config.memory_gpa +% config.data_offset,
            .control_size = control_size,
            .buffers_offset = buffers_offset,
            .has_event_idx = has(config, 29),
            .has_indirect = has_indirect,
            .spins = spins,
            .blocks = blocks,
            .random = .init(config.seed),
            .available_index = 0,
            .used_index = 0,
        };
        // An earlier run may have used the ring.
        driver.available_index = @atomicLoad(u16, &driver.available.index, .monotonic);
        driver.used_index = @atomicLoad(u16, &driver.used.index, .acquire);
        return driver;
    }

    fn has(config: *const LoadConfig, bit: u6) bool {
        return config.features >> bit & 1 != 0;
    }

    fn area(config: *const LoadConfig, offset: u64, size: u64, alignment: u64) ?[*]u8 {
        if (size > config.memory_size or offset > config.memory_size - size) return null;
        const address = std.math.add(u64, config.memory_address, offset) catch return null;
        if (address == 0 or address % alignment != 0) return null;
        return @ptrFromInt(address);
    }

    fn control(self: *Driver, slot: u32) *Control {
        return @ptrCast(@alignCast(self.data + @as(usize, slot) * self.control_size));
    }

    fn bufferOffset(self: *Driver, slot: u32) u64 {
        return self.buffers_offset + @as(u64, slot) * self.config.request_bytes;
    }

    fn buffer(self: *Driver, slot: u32) []align(64) u8 {
        const start: [*]align(64) u8 = @alignCast(self.data + @as(usize, @intCast(self.bufferOffset(slot))));
        return start[0..self.config.request_bytes];
    }

    fn runAll(self: *Driver, start_ns: u64) i32 {
        const config = self.config;
        self.progress_ns = start_ns;
        self.want(!self.spins);
        if (config.flags & layout.flag_load_verify == 0) {
            const end = if (config.duration_ms == 0) std.math.maxInt(u64) else start_ns +| @as(u64, config.duration_ms) * 1_000_000;
            const limit = if (config.request_count == 0) std.math.maxInt(u64) else config.request_count;
            return self.phase(config.operation, .ignored, limit, end);
        }
        const limit = if (config.request_count == 0) self.blocks else config.request_count;
        const code = self.phase(layout.load_write, .written, limit, std.math.maxInt(u64));
        if (code < 0) return code;
        // The same places again.
        self.random = .init(config.seed);
        self.sequence = 0;
        return self.phase(layout.load_read, .compared, limit, std.math.maxInt(u64));
    }

    /// Sends `limit` requests, or as many as go out before `end_ns`, and waits
    /// for all of them.
    fn phase(self: *Driver, operation: u32, data: Data, limit: u64, end_ns: u64) i32 {
        var left = limit;
        while (true) {
            if (left != 0) {
                const code = self.send(operation, data, &left);
                if (code < 0) return code;
            }
            if (self.in_flight == 0) return 0;
            const done = self.reap(data);
            if (done < 0) return done;
            self.rounds +%= 1;
            if (done == 0 and !self.spins) {
                self.sleep();
            } else if (self.rounds % 256 != 0) {
                if (done == 0) std.atomic.spinLoopHint();
                if (done != 0) self.progress_ns = 0;
                continue;
            }
            const time = now();
            if (done != 0 or self.progress_ns == 0) self.progress_ns = time;
            if (time >= end_ns) left = 0;
            // A call may have been lost: only the ring says that nothing came.
            if (time - self.progress_ns > @as(u64, self.config.timeout_ms) * 1_000_000 and
                @atomicLoad(u16, &self.used.index, .acquire) == self.used_index) return linux.fail(.TIMEDOUT);
        }
    }

    /// Makes all free slots available, then kicks once if the device wants it.
    fn send(self: *Driver, operation: u32, data: Data, left: *u64) i32 {
        const old = self.available_index;
        const mask = self.config.queue_size - 1;
        while (left.* != 0 and self.free < self.slots.len) : (left.* -= 1) {
            const number = self.free;
            const slot = &self.slots[number];
            self.free = slot.next_free;
            slot.is_in_flight = true;
            slot.block = self.nextBlock();
            self.available.ring()[self.available_index & mask] = self.prepare(number, slot.block, operation, data);
            self.available_index +%= 1;
            self.in_flight += 1;
        }
        if (self.available_index == old) return 0;
        if (self.slots.len == 1) self.sent_ticks = latency.ticks();
        // Release: the requests before the index; pairs with the device's
        // acquire load. Full: the index before its wish is read; pairs with
        // its barrier between writing avail_event (or flags) and looking again.
        @atomicStore(u16, &self.available.index, self.available_index, .seq_cst);
        const is_wanted = if (self.has_event_idx)
            split.isWanted(@atomicLoad(u16, self.used.availableEvent(self.config.queue_size), .seq_cst), self.available_index, old)
        else
            @atomicLoad(u16, &self.used.flags, .seq_cst) & split.flag_no_notify == 0;
        if (!is_wanted) return 0;
        self.result.kicks += 1;
        const one: u64 = 1;
        const code = linux.result(sys.write(self.config.kick_fd, std.mem.asBytes(&one), 8));
        return if (code < 0 and code != linux.fail(.AGAIN) and code != linux.fail(.INTR)) code else 0;
    }

    fn nextBlock(self: *Driver) u64 {
        if (self.config.flags & layout.flag_load_random != 0) {
            return @truncate(@as(u128, self.random.next()) * self.blocks >> 64);
        }
        defer self.sequence = if (self.sequence + 1 == self.blocks) 0 else self.sequence + 1;
        return self.sequence;
    }

    /// Writes the request and its descriptors; returns its head.
    fn prepare(self: *Driver, number: u32, block: u64, operation: u32, data: Data) u16 {
        const config = self.config;
        const place = self.control(number);
        const place_gpa = self.data_gpa +% @as(u64, number) * self.control_size;
        const sector = block * (config.request_bytes / sector_size);
        place.header = .{
            .type = switch (operation) {
                layout.load_read => type_in,
                layout.load_write => type_out,
                else => type_flush,
            },
            .reserved = 0,
            .sector = if (operation == layout.load_flush) 0 else sector,
        };
        place.status = 0xff;
        switch (data) {
            .ignored => {},
            .written => fillPattern(self.buffer(number), sector, config.seed),
            // What the device does not write must not look right.
            .compared => fillPattern(self.buffer(number), sector, ~config.seed),
        }

        const per_request = config.segment_count + 2;
        const first: u32 = if (self.has_indirect) 0 else number * per_request;
        const table: [*]Descriptor = if (self.has_indirect)
            @ptrCast(@alignCast(self.data + @as(usize, number) * self.control_size + @sizeOf(Control)))
        else
            self.descriptors;
        var index = first;
        table[index] = .{ .address = place_gpa, .length = @sizeOf(Header), .flags = chain.flag_next, .next = @intCast(index + 1) };
        index += 1;
        if (operation != layout.load_flush) {
            const flags: u16 = if (operation == layout.load_read) chain.flag_next | chain.flag_write else chain.flag_next;
            const share = config.request_bytes / config.segment_count;
            var address = self.data_gpa +% self.bufferOffset(number);
            var left = config.request_bytes;
            for (1..config.segment_count + 1) |i| {
                const length = if (i == config.segment_count) left else share;
                table[index] = .{ .address = address, .length = length, .flags = flags, .next = @intCast(index + 1) };
                address +%= length;
                left -= length;
                index += 1;
            }
        }
        table[index] = .{ .address = place_gpa +% @offsetOf(Control, "status"), .length = 1, .flags = chain.flag_write, .next = 0 };
        if (!self.has_indirect) return @intCast(first);
        self.descriptors[number] = .{
            .address = place_gpa +% @sizeOf(Control),
            .length = (index + 1) * chain.descriptor_size,
            .flags = chain.flag_indirect,
            .next = 0,
        };
        return @intCast(number);
    }

    /// Takes what was completed; -EPROTO when that was not ours to take.
    fn reap(self: *Driver, data: Data) i32 {
        const index = @atomicLoad(u16, &self.used.index, .acquire);
        const count: u32 = index -% self.used_index;
        if (count == 0) return 0;
        if (count > self.in_flight) return linux.fail(.PROTO);
        if (self.slots.len == 1) self.latency.add(latency.ticks() -| self.sent_ticks);
        const mask = self.config.queue_size - 1;
        const per_head: u32 = if (self.has_indirect) 1 else self.config.segment_count + 2;
        while (self.used_index != index) : (self.used_index +%= 1) {
            const id = @as(*const volatile u32, &self.used.ring()[self.used_index & mask].id).*;
            const number = id / per_head;
            if (id % per_head != 0 or number >= self.slots.len) return linux.fail(.PROTO);
            const slot = &self.slots[number];
            if (!slot.is_in_flight) return linux.fail(.PROTO);
            slot.is_in_flight = false;
            slot.next_free = self.free;
            self.free = number;
            self.in_flight -= 1;
            self.result.requests += 1;
            const status = @as(*const volatile u8, &self.control(number).status).*;
            const sector = slot.block * (self.config.request_bytes / sector_size);
            if (status != 0 or (data == .compared and !hasPattern(self.buffer(number), sector, self.config.seed))) {
                self.result.errors += 1;
            }
        }
        return @intCast(count);
    }

    /// Asks for a call at the next completion, or for none.
    fn want(self: *Driver, wanted: bool) void {
        if (self.has_event_idx) {
            // An event just passed is as good as none.
            const event = if (wanted) self.used_index else self.used_index -% 1;
            @atomicStore(u16, self.available.usedEvent(self.config.queue_size), event, .seq_cst);
        } else {
            @atomicStore(u16, &self.available.flags, if (wanted) 0 else split.flag_no_interrupt, .seq_cst);
        }
    }

    fn sleep(self: *Driver) void {
        // Full: the wish before the index is read again; pairs with the
        // device's barrier between storing used.idx and reading the wish.
        self.want(true);
        if (@atomicLoad(u16, &self.used.index, .seq_cst) == self.used_index) {
            self.takeCalls(@min(poll_slice_ms, self.config.timeout_ms));
        }
        if (!self.has_event_idx) self.want(false);
    }

    /// Counts the calls that came, waiting for the first if there is none.
    fn takeCalls(self: *Driver, timeout_ms: u32) void {
        if (self.config.call_fd < 0) return;
        var poll = [1]sys.pollfd{.{ .fd = self.config.call_fd, .events = sys.POLL.IN, .revents = 0 }};
        const ready = linux.result(sys.poll(&poll, 1, @intCast(timeout_ms)));
        if (ready <= 0 or poll[0].revents & sys.POLL.IN == 0) return;
        var count: u64 = 0;
        if (linux.result(sys.read(self.config.call_fd, std.mem.asBytes(&count), 8)) != 8) return;
        self.result.calls += count;
    }
};

/// Each word of a sector differs, and differs between sectors and seeds.
inline fn patternStart(sector: u64, seed: u64) u64 {
    return (sector +% seed) *% 0x9e37_79b9_7f4a_7c15;
}

fn fillPattern(buffer: []align(64) u8, sector: u64, seed: u64) void {
    const words: []u64 = @ptrCast(buffer);
    for (words, 0..) |*word, i| word.* = patternStart(sector + i / 64, seed) +% i;
}

fn hasPattern(buffer: []align(64) const u8, sector: u64, seed: u64) bool {
    const words: []const u64 = @ptrCast(buffer);
    for (words, 0..) |word, i| {
        if (word != patternStart(sector + i / 64, seed) +% i) return false;
    }
    return true;
}

test {
    _ = latency;
    _ = @import("load_test.zig");
}
