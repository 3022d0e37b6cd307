//! The driver side of a ring, as a load generator: a vhost-user front-end has
//! set up memory, ring and features, and `run` keeps virtio-blk requests
//! outstanding on it, natively, so that what is measured is the back-end.
//! It writes each descriptor anew for each request, as a guest's driver does.
//! What is particular to a format is in load_split.zig and load_packed.zig;
//! several queues at once are driven by load_queues.zig.

const std = @import("std");
const layout = @import("../layout.zig");
const linux = @import("../linux.zig");
const sync = @import("../sync.zig");
const rings = @import("ring.zig");
const split = @import("load_split.zig");
const packed_side = @import("load_packed.zig");
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

/// One per request outstanding: header and status share a cache line, as they
/// do in Linux's driver; the indirect table follows.
const Control = extern struct {
    header: Header align(64),
    status: u8,
};
const poll_slice_ms = 100;

pub const feature_indirect: u6 = 28;
pub const feature_event_idx: u6 = 29;
const feature_packed: u6 = 34;

pub fn has(config: *const LoadConfig, bit: u6) bool {
    return config.features >> bit & 1 != 0;
}

/// Descriptors of the ring that a request has at most.
pub fn ringDescriptors(config: *const LoadConfig) u32 {
    return if (has(config, feature_indirect)) 1 else config.segment_count + 2;
}

/// A part of the guest's memory, in this process.
pub fn area(config: *const LoadConfig, offset: u64, size: u64, alignment: u64) ?[*]u8 {
    if (size > config.memory_size or offset > config.memory_size - size) return null;
    const address = std.math.add(u64, config.memory_address, offset) catch return null;
    if (config.memory_address == 0 or address % alignment != 0) return null;
    return @ptrFromInt(address);
}

pub fn run(config: *const LoadConfig, result: *layout.LoadResult) callconv(.c) i32 {
    result.* = std.mem.zeroes(layout.LoadResult);
    if (!isUsable(config)) return linux.fail(.INVAL);
    return if (has(config, feature_packed)) runOn(packed_side.Side, config, result) else runOn(split.Side, config, result);
}

fn runOn(comptime Side: type, config: *const LoadConfig, result: *layout.LoadResult) i32 {
    var driver: Driver(Side) = undefined;
    const refused = driver.open(config, result);
    if (refused < 0) return refused;
    defer driver.close();
    return driver.runAll();
}

pub fn isUsable(config: *const LoadConfig) bool {
    const size = config.queue_size;
    const per_request = config.segment_count +| 2;
    const has_indirect = has(config, feature_indirect);
    if (size == 0 or size > rings.size_maximum or config.segment_count == 0) return false;
    if (config.depth == 0 or config.depth > size / @as(u64, if (has_indirect) 1 else per_request)) return false;
    if (has_indirect and per_request > chain.indirect_limit_minimum) return false;
    if (config.request_bytes == 0 or config.request_bytes % sector_size != 0 or config.request_bytes < config.segment_count) return false;
    const blocks = config.disk_sectors / (config.request_bytes / sector_size);
    if (blocks == 0 or config.operation > layout.load_flush or config.timeout_ms == 0) return false;
    if (config.flags & layout.flag_load_spin == 0 and config.call_fd < 0) return false;
    const verifies = config.flags & layout.flag_load_verify != 0;
    return verifies or config.request_count != 0 or config.duration_ms != 0;
}

fn float(value: u64) f64 {
    return @floatFromInt(value);
}

pub fn now() u64 {
    var time: sys.timespec = undefined;
    _ = sys.clock_gettime(.MONOTONIC, &time);
    return @as(u64, @intCast(time.sec)) * 1_000_000_000 + @as(u64, @intCast(time.nsec));
}

const Slot = struct {
    /// The next in the list of free slots, which ends at `depth`.
    next_free: u32,
    block: u64 = 0,
    /// Descriptors of the ring that the request has.
    descriptors: u32 = 0,
    is_in_flight: bool = false,
};

/// What a phase does with the data: nothing, or verify's two halves.
pub const Data = enum { ignored, written, compared };

pub fn Driver(comptime Side: type) type {
    return struct {
        const Self = @This();

        config: *const LoadConfig,
        result: *layout.LoadResult,
        side: Side,
        data: [*]u8,
        data_gpa: u64,
        control_size: u32,
        buffers_offset: u64,
        spins: bool,
        /// Places on the disk that requests go to, and the next one's number.
        blocks: u64,
        random: std.Random.SplitMix64,
        sequence: u64 = 0,

        in_flight: u32 = 0,
        slots: []Slot = &.{},
        free: u32 = 0,
        /// When something was last completed, and when this was last looked at.
        progress_ns: u64 = 0,
        rounds: u32 = 0,
        sent_ticks: u64 = 0,
        latency: latency.Histogram = .{},
        start_ns: u64 = 0,
        start_ticks: u64 = 0,

        /// `config` is usable. Returns 0, and then `close` ends it.
        pub fn open(self: *Self, config: *const LoadConfig, result: *layout.LoadResult) i32 {
            if (config.position == layout.load_position_lost) return linux.fail(.BUSY);
            self.* = init(config, result) orelse return linux.fail(.INVAL);
            // Requests of an earlier run may still write into the data area.
            if (!self.side.isIdle()) return linux.fail(.BUSY);
            self.slots = sync.allocator.alloc(Slot, config.depth) catch return linux.fail(.NOMEM);
            for (self.slots, 0..) |*slot, i| slot.* = .{ .next_free = @intCast(i + 1) };
            self.start_ns = now();
            self.start_ticks = latency.ticks();
            self.progress_ns = self.start_ns;
            return 0;
        }

        /// Completes the result.
        pub fn close(self: *Self) void {
            const result = self.result;
            result.elapsed_ns = now() - self.start_ns;
            result.position = self.side.position();
            const ns_per_tick = float(result.elapsed_ns) / float(@max(1, latency.ticks() -% self.start_ticks));
            self.takeCalls(0);
            if (self.config.depth == 1) self.latency.report(ns_per_tick, result);
            sync.allocator.free(self.slots);
        }

        fn init(config: *const LoadConfig, result: *layout.LoadResult) ?Self {
            const per_request = config.segment_count + 2;
            const control_size = std.mem.alignForward(u32, @sizeOf(Control) + chain.descriptor_size * per_request, 64);
            const buffers_offset = std.mem.alignForward(u64, @as(u64, config.depth) * control_size, 4096);
            const data_size = buffers_offset + @as(u64, config.depth) * config.request_bytes;
            return .{
                .config = config,
                .result = result,
                .side = Side.init(config) orelse return null,
                .data = area(config, config.data_offset, data_size, 64) orelse return null,
                .data_gpa = config.memory_gpa +% config.data_offset,
                .control_size = control_size,
                .buffers_offset = buffers_offset,
                .spins = config.flags & layout.flag_load_spin != 0,
                .blocks = config.disk_sectors / (config.request_bytes / sector_size),
                .random = .init(config.seed),
            };
        }

        fn control(self: *Self, slot: u32) *Control {
            return @ptrCast(@alignCast(self.data + @as(usize, slot) * self.control_size));
        }

        fn bufferOffset(self: *Self, slot: u32) u64 {
            return self.buffers_offset + @as(u64, slot) * self.config.request_bytes;
        }

        fn buffer(self: *Self, slot: u32) []align(64) u8 {
            const start: [*]align(64) u8 = @alignCast(self.data + @as(usize, @intCast(self.bufferOffset(slot))));
            return start[0..self.config.request_bytes];
        }

        fn runAll(self: *Self) i32 {
            const config = self.config;
            self.side.want(!self.spins);
            if (config.flags & layout.flag_load_verify == 0) {
                return self.phase(config.operation, .ignored, self.limit(), self.end());
            }
            const count = if (config.request_count == 0) self.blocks else config.request_count;
            const code = self.phase(layout.load_write, .written, count, std.math.maxInt(u64));
            if (code < 0) return code;
            // The same places again.
            self.random = .init(config.seed);
            self.sequence = 0;
            return self.phase(layout.load_read, .compared, count, std.math.maxInt(u64));
        }

        /// How many requests, and until when, in a run that does not verify.
        pub fn limit(self: *const Self) u64 {
            return if (self.config.request_count == 0) std.math.maxInt(u64) else self.config.request_count;
        }

        pub fn end(self: *const Self) u64 {
            return if (self.config.duration_ms == 0) std.math.maxInt(u64) else self.start_ns +| @as(u64, self.config.duration_ms) * 1_000_000;
        }

        /// Sends `count` requests, or as many as go out before `end_ns`, and waits
        /// for all of them.
        fn phase(self: *Self, operation: u32, data: Data, count: u64, end_ns: u64) i32 {
            var left = count;
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
                    !self.side.hasUsed()) return linux.fail(.TIMEDOUT);
            }
        }

        /// Makes all free slots available, then kicks once if the device wants it.
        pub fn send(self: *Self, operation: u32, data: Data, left: *u64) i32 {
            while (left.* != 0 and self.free < self.slots.len) : (left.* -= 1) {
                const number = self.free;
                const slot = &self.slots[number];
                self.free = slot.next_free;
                slot.is_in_flight = true;
                slot.block = self.nextBlock();
                slot.descriptors = self.prepare(number, slot.block, operation, data);
                self.in_flight += 1;
                if (self.slots.len == 1) self.sent_ticks = latency.ticks();
            }
            if (!self.side.expose()) return 0;
            self.result.kicks += 1;
            const one: u64 = 1;
            const code = linux.result(sys.write(self.config.kick_fd, std.mem.asBytes(&one), 8));
            return if (code < 0 and code != linux.fail(.AGAIN) and code != linux.fail(.INTR)) code else 0;
        }

        fn nextBlock(self: *Self) u64 {
            if (self.config.flags & layout.flag_load_random != 0) {
                return @truncate(@as(u128, self.random.next()) * self.blocks >> 64);
            }
            defer self.sequence = if (self.sequence + 1 == self.blocks) 0 else self.sequence + 1;
            return self.sequence;
        }

        /// Writes the request and its descriptors; returns how many of the
        /// ring's it has.
        fn prepare(self: *Self, number: u32, block: u64, operation: u32, data: Data) u32 {
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

            const table: [*]align(16) [2]u64 = @ptrCast(@alignCast(self.data + @as(usize, number) * self.control_size + @sizeOf(Control)));
            self.side.begin(number, table);
            self.side.add(place_gpa, @sizeOf(Header), 0, false);
            if (operation != layout.load_flush) {
                const flags: u16 = if (operation == layout.load_read) chain.flag_write else 0;
                const share = config.request_bytes / config.segment_count;
                var address = self.data_gpa +% self.bufferOffset(number);
                var left = config.request_bytes;
                for (1..config.segment_count + 1) |i| {
                    const length = if (i == config.segment_count) left else share;
                    self.side.add(address, length, flags, false);
                    address +%= length;
                    left -= length;
                }
            }
            self.side.add(place_gpa +% @offsetOf(Control, "status"), 1, chain.flag_write, true);
            return self.side.end(number, place_gpa +% @sizeOf(Control));
        }

        /// Takes what was completed; -EPROTO when that was not ours to take.
        pub fn reap(self: *Self, data: Data) i32 {
            if (!self.side.refresh(self.in_flight)) return linux.fail(.PROTO);
            if (!self.side.isReady()) return 0;
            if (self.slots.len == 1) self.latency.add(latency.ticks() -| self.sent_ticks);
            const before = self.in_flight;
            while (self.side.isReady()) {
                const number = self.side.take() orelse return linux.fail(.PROTO);
                if (number >= self.slots.len) return linux.fail(.PROTO);
                const slot = &self.slots[number];
                if (!slot.is_in_flight) return linux.fail(.PROTO);
                self.side.skip(slot.descriptors);
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
            return @intCast(before - self.in_flight);
        }

        fn sleep(self: *Self) void {
            self.side.want(true);
            if (!self.side.hasUsed()) self.takeCalls(@min(poll_slice_ms, self.config.timeout_ms));
            // With EVENT_IDX the event passes by itself.
            if (!has(self.config, feature_event_idx)) self.side.want(false);
        }

        /// Counts the calls that came, waiting for the first if there is none.
        fn takeCalls(self: *Self, timeout_ms: u32) void {
            if (self.config.call_fd < 0) return;
            var poll = [1]sys.pollfd{.{ .fd = self.config.call_fd, .events = sys.POLL.IN, .revents = 0 }};
            const ready = linux.result(sys.poll(&poll, 1, @intCast(timeout_ms)));
            if (ready <= 0 or poll[0].revents & sys.POLL.IN == 0) return;
            var count: u64 = 0;
            if (linux.result(sys.read(self.config.call_fd, std.mem.asBytes(&count), 8)) != 8) return;
            self.result.calls += count;
        }
    };
}

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
    _ = @import("load_queues.zig");
    _ = @import("load_test.zig");
}
