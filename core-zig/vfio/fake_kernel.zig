//! A kernel with one VFIO group and one PCI device, for tests: it answers as
//! Linux does, and at any step it can be told to fail.

const std = @import("std");
const abi = @import("abi.zig");
const sys = @import("../linux.zig");
const mapping = @import("../memory/mapping.zig");

const container = 100;
const group = 101;
pub const device = 102;
pub const bar_size = 0x4000;
/// Where region N begins in the device's file.
const region_shift = 40;

pub const Fake = struct {
    /// The request that fails, and how.
    pub var failing: u32 = 0;
    pub var error_code: i32 = 0;
    pub var open_error: i32 = 0;
    pub var group_error: i32 = 0;
    pub var is_viable = true;
    pub var type1 = true;
    pub var version: i32 = 0;
    pub var open_count: i32 = 0;
    pub var config: [256]u8 = undefined;
    pub var is_gone = false;
    pub var has_reset = true;
    pub var resets: u32 = 0;
    pub var vectors: [8]i32 = @splat(-1);
    pub var vector_count: u32 = 0;
    pub var unmasks: u32 = 0;
    pub var maps: [4]abi.DmaMap = undefined;
    pub var map_count: u32 = 0;
    /// BAR 2, once somebody has mapped it; before, reads and writes go here.
    pub var registers: [bar_size]u8 = undefined;
    pub var system_calls: u32 = 0;

    pub fn start() void {
        failing = 0;
        error_code = 0;
        open_error = 0;
        group_error = 0;
        is_viable = true;
        type1 = true;
        version = 0;
        open_count = 0;
        is_gone = false;
        has_reset = true;
        resets = 0;
        vectors = @splat(-1);
        vector_count = 0;
        unmasks = 0;
        map_count = 0;
        system_calls = 0;
        for (&registers, 0..) |*byte, index| byte.* = @truncate(index);
        config = @splat(0);
        config[0] = 0xf4;
        config[1] = 0x1a;
        config[6] = 0x10;
        config[0x34] = 0x40;
        // MSI-X: 4 vectors, the table at 0x2000 of BAR 2.
        config[0x40] = 0x11;
        config[0x42] = 3;
        std.mem.writeInt(u32, config[0x44..0x48], 0x2002, .little);
    }

    pub fn open(path: [*:0]const u8) i32 {
        const name = std.mem.span(path);
        const is_container = std.mem.eql(u8, name, "/dev/vfio/vfio");
        const code = if (is_container) open_error else group_error;
        if (code < 0) return code;
        if (!is_container and !std.mem.eql(u8, name, "/dev/vfio/7")) return sys.fail(.NOENT);
        open_count += 1;
        return if (is_container) container else group;
    }

    pub fn close(_: i32) void {
        open_count -= 1;
    }

    pub fn ioctl(fd: i32, request: u32, argument: usize) i32 {
        if (request == failing) return error_code;
        return switch (fd) {
            container => containerRequest(request, argument),
            group => groupRequest(request, argument),
            device => deviceRequest(request, argument),
            else => sys.fail(.BADF),
        };
    }

    fn containerRequest(request: u32, argument: usize) i32 {
        switch (request) {
            abi.request.get_api_version => return version,
            abi.request.check_extension => return @intFromBool(type1 and argument == abi.type1_v2),
            abi.request.set_iommu => return if (argument == abi.type1_v2) 0 else sys.fail(.INVAL),
            abi.request.iommu_get_info => {
                const info: *abi.Type1Info = @ptrFromInt(argument);
                info.flags = abi.iommu_page_sizes;
                info.iova_pgsizes = 0x4020_1000;
                return 0;
            },
            abi.request.iommu_map_dma => {
                const map_: *const abi.DmaMap = @ptrFromInt(argument);
                for (maps[0..map_count]) |other| if (other.iova == map_.iova) return sys.fail(.EXIST);
                if (map_count == maps.len) return sys.fail(.NOMEM);
                maps[map_count] = map_.*;
                map_count += 1;
                return 0;
            },
            abi.request.iommu_unmap_dma => {
                const unmap_: *abi.DmaUnmap = @ptrFromInt(argument);
                for (maps[0..map_count], 0..) |other, index| {
                    if (other.iova != unmap_.iova or other.size != unmap_.size) continue;
                    map_count -= 1;
                    maps[index] = maps[map_count];
                    return 0;
                }
                unmap_.size = 0;
                return 0;
            },
            else => return sys.fail(.NOTTY),
        }
    }

    fn groupRequest(request: u32, argument: usize) i32 {
        switch (request) {
            abi.request.group_get_status => {
                const status: *abi.GroupStatus = @ptrFromInt(argument);
                status.flags = @intFromBool(is_viable);
                return 0;
            },
            abi.request.group_set_container => return if (@as(*const i32, @ptrFromInt(argument)).* == container) 0 else sys.fail(.BADF),
            abi.request.group_get_device_fd => {
                const name = std.mem.span(@as([*:0]const u8, @ptrFromInt(argument)));
                if (!std.mem.eql(u8, name, "0000:00:05.0")) return sys.fail(.NODEV);
                open_count += 1;
                return device;
            },
            else => return sys.fail(.NOTTY),
        }
    }

    fn deviceRequest(request: u32, argument: usize) i32 {
        switch (request) {
            abi.request.device_get_info => {
                const info: *abi.DeviceInfo = @ptrFromInt(argument);
                info.flags = abi.device_is_pci | if (has_reset) abi.device_reset_supported else 0;
                info.num_regions = 9;
                info.num_irqs = 5;
                return 0;
            },
            abi.request.device_get_irq_info => {
                const irq: *abi.IrqInfo = @ptrFromInt(argument);
                irq.flags = 1;
                irq.count = if (irq.index == abi.irq_msix) 4 else 1;
                return 0;
            },
            abi.request.device_get_region_info => {
                const region: *abi.RegionInfo = @ptrFromInt(argument);
                region.offset = @as(u64, region.index) << region_shift;
                region.flags = abi.region_read | abi.region_write;
                region.size = switch (region.index) {
                    2 => bar_size,
                    abi.config_region => 256,
                    else => 0,
                };
                if (region.index == 2) region.flags |= abi.region_mmap;
                return 0;
            },
            abi.request.device_set_irqs => {
                const set: *align(4) const abi.IrqSet = @ptrFromInt(argument);
                if (set.flags & abi.irq_flag_unmask != 0) {
                    unmasks += 1;
                    return 0;
                }
                const fds: [*]align(4) const i32 = @ptrFromInt(argument + @sizeOf(abi.IrqSet));
                if (set.argsz != @sizeOf(abi.IrqSet) + 4 * set.count) return sys.fail(.INVAL);
                vector_count = if (set.count == 0) 0 else @max(vector_count, set.start + set.count);
                for (fds[0..set.count], set.start..) |fd, index| vectors[index] = fd;
                return 0;
            },
            abi.request.device_reset => {
                resets += 1;
                return 0;
            },
            else => return sys.fail(.NOTTY),
        }
    }

    fn bytesAt(offset: u64, size: usize) ?[]u8 {
        if (is_gone) return null;
        const first: usize = @intCast(offset & ((1 << region_shift) - 1));
        return switch (offset >> region_shift) {
            2 => registers[first..][0..size],
            abi.config_region => config[first..][0..size],
            else => null,
        };
    }

    pub fn read(_: i32, buffer: []u8, offset: u64) i32 {
        system_calls += 1;
        const bytes = bytesAt(offset, buffer.len) orelse return sys.fail(.IO);
        @memcpy(buffer, bytes);
        return @intCast(buffer.len);
    }

    pub fn write(_: i32, buffer: []const u8, offset: u64) i32 {
        system_calls += 1;
        const bytes = bytesAt(offset, buffer.len) orelse return sys.fail(.IO);
        @memcpy(bytes, buffer);
        return @intCast(buffer.len);
    }

    pub fn map(_: i32, _: u64, size: u64, code: *i32) ?*mapping.Mapping {
        return mapping.mapAnonymous(size, code) catch null;
    }

    pub fn unmap(slot: *mapping.Mapping) void {
        slot.unmap();
    }
};
