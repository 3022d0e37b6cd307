//! A PCI device by VFIO: its registers, its interrupts, its end.
//!
//! Registers are reached by region, offset and width, never by address: what
//! may be mapped is mapped, the rest goes by system calls, and everything is
//! checked against the region's size first. A device may go away at any time;
//! then mapped registers fault, the fault handler puts zero pages in their
//! place, and every access answers -ENODEV.

const std = @import("std");
const abi = @import("abi.zig");
const info = @import("info.zig");
const group_file = @import("group.zig");
const sys = @import("../linux.zig");
const shared = @import("layout.zig");
const mapping = @import("../memory/mapping.zig");

const failed = group_file.failed;
const answer_size = 4096;
/// A device with more vectors gets the first ones used.
const max_vectors = 2048;

pub fn Device(comptime Kernel: type) type {
    return struct {
        const Self = @This();

        const Region = struct {
            size: u64 = 0,
            flags: u32 = 0,
            offset: u64 = 0,
            pieces: info.Pieces = .{},
            mapped: [info.max_pieces]?*mapping.Mapping = @splat(null),
        };

        fd: i32 = -1,
        has_reset: bool = false,
        regions: [abi.config_region + 1]Region = @splat(.{}),
        irq_counts: [5]u32 = @splat(0),
        /// Accesses under way, in any thread: `close` waits for them.
        users: std.atomic.Value(u32) = .init(0),
        is_open: std.atomic.Value(bool) = .init(false),

        /// `fd` is the device's from here on.
        pub fn open(self: *Self, fd: i32, failure: *shared.VfioFailure) i32 {
            // Not as a whole: a user of the device before may just be leaving.
            self.fd = fd;
            self.has_reset = false;
            self.regions = @splat(.{});
            self.irq_counts = @splat(0);
            const code = self.inspect(failure);
            if (code < 0) {
                self.release();
                return code;
            }
            self.is_open.store(true, .seq_cst);
            return 0;
        }

        fn inspect(self: *Self, failure: *shared.VfioFailure) i32 {
            var device: abi.DeviceInfo = .{ .argsz = @sizeOf(abi.DeviceInfo) };
            const asked = Kernel.ioctl(self.fd, abi.request.device_get_info, @intFromPtr(&device));
            if (asked < 0) return failed(failure, shared.vfio_device_info, asked, 0);
            if (device.flags & abi.device_is_pci == 0 or device.num_regions <= abi.config_region) {
                return failed(failure, shared.vfio_device_info, 0, 0);
            }
            self.has_reset = device.flags & abi.device_reset_supported != 0;
            for ([_]u32{ abi.irq_intx, abi.irq_msix, abi.irq_request }) |index| {
                if (index >= device.num_irqs) continue;
                var irq: abi.IrqInfo = .{ .argsz = @sizeOf(abi.IrqInfo), .index = index };
                const code = Kernel.ioctl(self.fd, abi.request.device_get_irq_info, @intFromPtr(&irq));
                // The request interrupt is younger than the rest.
                if (code < 0 and index == abi.irq_request) continue;
                if (code < 0) return failed(failure, shared.vfio_irq_info, code, index);
                if (irq.flags & 1 != 0) self.irq_counts[index] = @min(irq.count, max_vectors);
            }
            const configured = self.inspectRegion(abi.config_region, null, failure);
            if (configured < 0) return configured;
            var config: [256]u8 = undefined;
            const space = &self.regions[abi.config_region];
            const count = Kernel.read(self.fd, &config, space.offset);
            if (count != config.len) return failed(failure, shared.vfio_config_space, @min(count, 0), 0);
            const table = info.msixTable(&config) catch return failed(failure, shared.vfio_config_space, 0, 1);
            for (0..abi.bar_count) |index| {
                const range = if (table) |found| (if (found.bar == index) found.range else null) else null;
                const code = self.inspectRegion(@intCast(index), range, failure);
                if (code < 0) return code;
            }
            return 0;
        }

        fn inspectRegion(self: *Self, index: u32, table: ?info.Range, failure: *shared.VfioFailure) i32 {
            var answer: [answer_size]u8 align(8) = @splat(0);
            const asked: *abi.RegionInfo = @ptrCast(&answer);
            asked.argsz = answer_size;
            asked.index = index;
            const code = Kernel.ioctl(self.fd, abi.request.device_get_region_info, @intFromPtr(&answer));
            if (code < 0) return failed(failure, shared.vfio_region_info, code, index);
            if (asked.size > std.math.maxInt(i64) - @min(asked.offset, std.math.maxInt(i64)))
                return failed(failure, shared.vfio_region_info, 0, index);
            self.regions[index] = .{
                .size = asked.size,
                .flags = asked.flags,
                .offset = asked.offset,
                .pieces = info.mappable(&answer, asked.*, table, mapping.systemPage()) catch
                    return failed(failure, shared.vfio_region_info, 0, index),
            };
            return 0;
        }

        /// False when the device has been closed; otherwise `leave` follows.
        fn enter(self: *Self) bool {
            _ = self.users.fetchAdd(1, .seq_cst);
            if (self.is_open.load(.seq_cst)) return true;
            self.leave();
            return false;
        }

        fn leave(self: *Self) void {
            _ = self.users.fetchSub(1, .seq_cst);
        }

        /// Maps the registers of a BAR, which makes accesses to it cheap. Up
        /// to `limit` bytes: a BAR may be a window to all of a guest's memory.
        pub fn mapRegisters(self: *Self, index: u32, limit: u64) i32 {
            if (index >= abi.bar_count) return sys.fail(.INVAL);
            const region = &self.regions[index];
            for (region.pieces.slice(), 0..) |piece, number| {
                if (region.mapped[number] != null or piece.offset >= limit) continue;
                const page = mapping.systemPage();
                const size = std.mem.alignBackward(u64, @min(piece.size, limit - piece.offset), page);
                if (size == 0) continue;
                var code: i32 = 0;
                const slot = Kernel.map(self.fd, region.offset + piece.offset, size, &code) orelse return code;
                region.mapped[number] = slot;
            }
            return 0;
        }

        /// Maps a part of a BAR for whoever reads and writes it as memory; it
        /// must be in one piece. The mapping is a plain one, the caller's.
        pub fn mapMemory(self: *Self, index: u32, offset: u64, size: u64, code: *i32) ?*mapping.Mapping {
            code.* = sys.fail(.INVAL);
            if (!self.enter()) return null;
            defer self.leave();
            const position = self.mappablePart(index, offset, size) orelse return null;
            return Kernel.map(self.fd, position, size, code);
        }

        /// The same for whoever maps it in another process: the descriptor.
        pub fn barFile(self: *Self, index: u32, offset: u64, size: u64, position_out: *u64) i32 {
            if (!self.enter()) return sys.fail(.BADF);
            defer self.leave();
            position_out.* = self.mappablePart(index, offset, size) orelse return sys.fail(.INVAL);
            return self.fd;
        }

        /// Where in the device's file whole pages of a BAR are that may be
        /// mapped in one piece; null for any other part.
        fn mappablePart(self: *const Self, index: u32, offset: u64, size: u64) ?u64 {
            if (index >= abi.bar_count) return null;
            const page = mapping.systemPage();
            if (size == 0 or (offset | size) % page != 0) return null;
            const region = &self.regions[index];
            for (region.pieces.slice()) |piece| {
                if (offset < piece.offset or offset - piece.offset > piece.size) continue;
                if (size > piece.size - (offset - piece.offset)) continue;
                return region.offset + offset;
            }
            return null;
        }

        /// Where an access of `width` bytes goes; an error for one that leaves
        /// the region or is not aligned.
        const Place = union(enum) { mapped: struct { slot: *mapping.Mapping, address: usize }, file: u64 };
        fn place(self: *Self, index: u32, offset: u64, width: u32) ?Place {
            if (index >= self.regions.len) return null;
            const region = &self.regions[index];
            if (width != 1 and width != 2 and width != 4) return null;
            if (offset % width != 0 or offset > region.size or width > region.size - offset) return null;
            for (region.pieces.slice(), 0..) |piece, number| {
                const slot = region.mapped[number] orelse continue;
                if (offset < piece.offset or offset - piece.offset >= slot.size) continue;
                if (width > slot.size - (offset - piece.offset)) continue;
                return .{ .mapped = .{ .slot = slot, .address = slot.address + @as(usize, @intCast(offset - piece.offset)) } };
            }
            return .{ .file = region.offset + offset };
        }

        /// A register, or a negative errno: -EINVAL for one outside the region.
        pub fn read(self: *Self, index: u32, offset: u64, width: u32) i64 {
            if (!self.enter()) return sys.fail(.BADF);
            defer self.leave();
            const found = self.place(index, offset, width) orelse return sys.fail(.INVAL);
            switch (found) {
                .mapped => |where| {
                    const value: u32 = switch (width) {
                        1 => @as(*const volatile u8, @ptrFromInt(where.address)).*,
                        2 => @as(*const volatile u16, @ptrFromInt(where.address)).*,
                        else => @as(*const volatile u32, @ptrFromInt(where.address)).*,
                    };
                    return if (where.slot.is_zeroed.load(.acquire)) sys.fail(.NODEV) else value;
                },
                .file => |position| {
                    var bytes: [4]u8 = @splat(0);
                    const count = Kernel.read(self.fd, bytes[0..width], position);
                    if (count != @as(i32, @intCast(width))) return if (count < 0) count else sys.fail(.NODEV);
                    return std.mem.readInt(u32, &bytes, .little);
                },
            }
        }

        pub fn write(self: *Self, index: u32, offset: u64, width: u32, value: u32) i32 {
            if (!self.enter()) return sys.fail(.BADF);
            defer self.leave();
            const found = self.place(index, offset, width) orelse return sys.fail(.INVAL);
            switch (found) {
                .mapped => |where| {
                    // What was written to memory before (a ring's index, a
                    // used element) is seen before the register is.
                    releaseToDevice();
                    switch (width) {
                        1 => @as(*volatile u8, @ptrFromInt(where.address)).* = @truncate(value),
                        2 => @as(*volatile u16, @ptrFromInt(where.address)).* = @truncate(value),
                        else => @as(*volatile u32, @ptrFromInt(where.address)).* = value,
                    }
                    return if (where.slot.is_zeroed.load(.acquire)) sys.fail(.NODEV) else 0;
                },
                .file => |position| {
                    var bytes: [4]u8 = undefined;
                    std.mem.writeInt(u32, &bytes, value, .little);
                    const count = Kernel.write(self.fd, bytes[0..width], position);
                    if (count != @as(i32, @intCast(width))) return if (count < 0) count else sys.fail(.NODEV);
                    return 0;
                },
            }
        }

        /// Routes vectors from `first` on to eventfds (-1: none) and leaves
        /// the others as they are; none at all turns the kind of interrupt off.
        pub fn interrupts(self: *Self, index: u32, first: u32, fds: []const i32) i32 {
            if (index >= self.irq_counts.len) return sys.fail(.INVAL);
            const count = self.irq_counts[index];
            if (first > count or fds.len > count - first) return sys.fail(.INVAL);
            var bytes: [@sizeOf(abi.IrqSet) + 4 * max_vectors]u8 align(4) = undefined;
            const set: *abi.IrqSet = @ptrCast(&bytes);
            set.* = .{
                .argsz = @intCast(@sizeOf(abi.IrqSet) + 4 * fds.len),
                .flags = abi.irq_flag_trigger | if (fds.len == 0) abi.irq_flag_none else abi.irq_flag_eventfd,
                .index = index,
                .start = if (fds.len == 0) 0 else first,
                .count = @intCast(fds.len),
            };
            @memcpy(bytes[@sizeOf(abi.IrqSet)..][0 .. 4 * fds.len], std.mem.sliceAsBytes(fds));
            return Kernel.ioctl(self.fd, abi.request.device_set_irqs, @intFromPtr(&bytes));
        }

        /// An INTx interrupt is masked when it is told: it was handled.
        pub fn unmask(self: *Self) i32 {
            var set: abi.IrqSet = .{
                .argsz = @sizeOf(abi.IrqSet),
                .flags = abi.irq_flag_none | abi.irq_flag_unmask,
                .index = abi.irq_intx,
                .start = 0,
                .count = 1,
            };
            return Kernel.ioctl(self.fd, abi.request.device_set_irqs, @intFromPtr(&set));
        }

        /// -ENOTTY where the device cannot be reset.
        pub fn reset(self: *Self) i32 {
            if (!self.has_reset) return sys.fail(.NOTTY);
            return Kernel.ioctl(self.fd, abi.request.device_reset, 0);
        }

        /// Resets the device, so that nothing of ours goes on in it, and
        /// closes it. Accesses under way in other threads end first.
        pub fn close(self: *Self) void {
            self.is_open.store(false, .seq_cst);
            while (self.users.load(.seq_cst) != 0) _ = sys.linux.sched_yield();
            _ = self.reset();
            self.release();
        }

        fn release(self: *Self) void {
            for (&self.regions) |*region| {
                for (&region.mapped) |*slot| {
                    if (slot.*) |mapped| Kernel.unmap(mapped);
                    slot.* = null;
                }
            }
            Kernel.close(self.fd);
            self.fd = -1;
        }
    };
}

/// Orders stores to memory before a store to a register: x86 does by itself
/// (both are write-back or uncached), ARM needs a barrier of the outer domain.
inline fn releaseToDevice() void {
    switch (@import("builtin").cpu.arch) {
        .aarch64 => asm volatile ("dmb oshst" ::: .{ .memory = true }),
        else => asm volatile ("" ::: .{ .memory = true }),
    }
}
