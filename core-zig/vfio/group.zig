//! A VFIO group in a container of its own: the unit that an IOMMU isolates.
//! Its devices see one space of I/O addresses (IOVA), into which memory is
//! mapped before any of them may reach it.

const std = @import("std");
const abi = @import("abi.zig");
const info = @import("info.zig");
const sys = @import("../linux.zig");
const shared = @import("layout.zig");

/// Fills in which step failed; the errno is the result's.
pub fn failed(failure: *shared.VfioFailure, step: u32, code: i32, value: u32) i32 {
    failure.* = .{ .step = step, .errno = if (code < 0) @intCast(-code) else 0, .value = value };
    return if (code < 0) code else sys.fail(.IO);
}

/// Room for what a structure's capabilities take.
const answer_size = 4096;

pub fn Group(comptime Kernel: type) type {
    return struct {
        const Self = @This();

        container: i32 = -1,
        group: i32 = -1,
        page_size: u64 = 0,
        ranges: info.Ranges = .{},

        /// Opens `/dev/vfio/NUMBER`. What was opened is closed on failure.
        pub fn open(self: *Self, number: u32, failure: *shared.VfioFailure) i32 {
            self.* = .{};
            const code = self.attach(number, failure);
            if (code < 0) self.close();
            return code;
        }

        fn attach(self: *Self, number: u32, failure: *shared.VfioFailure) i32 {
            self.container = Kernel.open("/dev/vfio/vfio");
            if (self.container < 0) return failed(failure, shared.vfio_container, self.container, 0);
            const version = Kernel.ioctl(self.container, abi.request.get_api_version, 0);
            if (version != abi.api_version) return failed(failure, shared.vfio_api, @min(version, 0), @intCast(@max(version, 0)));
            const kind = self.iommuType() orelse return failed(failure, shared.vfio_iommu_type, 0, 0);

            var buffer: [32]u8 = undefined;
            const path = std.fmt.bufPrintZ(&buffer, "/dev/vfio/{d}", .{number}) catch unreachable;
            self.group = Kernel.open(path);
            if (self.group < 0) return failed(failure, shared.vfio_group, self.group, number);
            var status: abi.GroupStatus = .{ .argsz = @sizeOf(abi.GroupStatus) };
            const asked = Kernel.ioctl(self.group, abi.request.group_get_status, @intFromPtr(&status));
            if (asked < 0) return failed(failure, shared.vfio_group_status, asked, number);
            if (status.flags & abi.group_viable == 0) return failed(failure, shared.vfio_group_viable, 0, number);
            const joined = Kernel.ioctl(self.group, abi.request.group_set_container, @intFromPtr(&self.container));
            if (joined < 0) return failed(failure, shared.vfio_set_container, joined, number);
            const set = Kernel.ioctl(self.container, abi.request.set_iommu, kind);
            if (set < 0) return failed(failure, shared.vfio_set_iommu, set, number);
            return self.readLimits(failure);
        }

        fn iommuType(self: *Self) ?usize {
            for ([_]usize{ abi.type1_v2, abi.type1 }) |kind| {
                if (Kernel.ioctl(self.container, abi.request.check_extension, kind) > 0) return kind;
            }
            return null;
        }

        fn readLimits(self: *Self, failure: *shared.VfioFailure) i32 {
            var answer: [answer_size]u8 align(8) = @splat(0);
            const type1: *abi.Type1Info = @ptrCast(&answer);
            type1.argsz = answer_size;
            const asked = Kernel.ioctl(self.container, abi.request.iommu_get_info, @intFromPtr(&answer));
            if (asked < 0) return failed(failure, shared.vfio_iommu_info, asked, 0);
            self.ranges = info.iovaRanges(&answer, type1.*) catch return failed(failure, shared.vfio_iommu_info, 0, 0);
            // Each bit is a page size that it can map.
            const sizes: u64 = if (type1.flags & abi.iommu_page_sizes != 0) type1.iova_pgsizes else 4096;
            self.page_size = sizes & -%sizes;
            if (self.page_size == 0 or self.page_size > 1 << 21) return failed(failure, shared.vfio_iommu_info, 0, 1);
            return 0;
        }

        /// Lets the devices reach `size` bytes at `address` of this process by
        /// `iova`. Pages are locked in memory for it.
        pub fn map(self: *Self, address: u64, size: u64, iova: u64) i32 {
            if ((address | size | iova) % self.page_size != 0) return sys.fail(.INVAL);
            if (!self.ranges.holds(iova, size)) return sys.fail(.ADDRNOTAVAIL);
            const argument: abi.DmaMap = .{
                .argsz = @sizeOf(abi.DmaMap),
                .flags = abi.dma_read | abi.dma_write,
                .vaddr = address,
                .iova = iova,
                .size = size,
            };
            return Kernel.ioctl(self.container, abi.request.iommu_map_dma, @intFromPtr(&argument));
        }

        /// As it was mapped; -ENOENT when that much was not mapped there.
        pub fn unmap(self: *Self, size: u64, iova: u64) i32 {
            var argument: abi.DmaUnmap = .{ .argsz = @sizeOf(abi.DmaUnmap), .iova = iova, .size = size };
            const code = Kernel.ioctl(self.container, abi.request.iommu_unmap_dma, @intFromPtr(&argument));
            if (code < 0) return code;
            return if (argument.size == size) 0 else sys.fail(.NOENT);
        }

        pub fn openDevice(self: *Self, name: [*:0]const u8) i32 {
            return Kernel.ioctl(self.group, abi.request.group_get_device_fd, @intFromPtr(name));
        }

        /// Devices must be closed; DMA mappings go with the container.
        pub fn close(self: *Self) void {
            for ([_]i32{ self.group, self.container }) |fd| {
                if (fd >= 0) Kernel.close(fd);
            }
            self.group = -1;
            self.container = -1;
        }
    };
}
