//! VFIO for TypeScript: groups and devices by handles.

const std = @import("std");
const abi = @import("abi.zig");
const sys = @import("../linux.zig");
const sync = @import("../sync.zig");
const layout = @import("../layout.zig");
const shared = @import("layout.zig");
const mapping = @import("../memory/mapping.zig");
const Handles = @import("../handles.zig").Handles;
const Kernel = @import("kernel.zig").Kernel;
const group_file = @import("group.zig");
const sizeOf = @import("../descriptor.zig").sizeOf;

const Group = group_file.Group(Kernel);
/// Never freed but used again: another thread may just be leaving one.
const Device = struct {
    device: @import("device.zig").Device(Kernel) = .{},
    next_spare: ?*Device = null,
};

var groups: Handles(Group) = .{};
var devices: Handles(Device) = .{};
var spares: ?*Device = null;
var spares_lock: sync.Mutex = .{};

/// Opens `/dev/vfio/NUMBER` in a container of its own. A group can be open
/// once in the system.
pub fn groupOpen(number: u32, failure: *shared.VfioFailure) callconv(.c) i32 {
    failure.* = std.mem.zeroes(shared.VfioFailure);
    const self = sync.allocator.create(Group) catch return group_file.failed(failure, shared.vfio_objects, sys.fail(.NOMEM), 0);
    const code = self.open(number, failure);
    if (code >= 0) {
        if (groups.insert(self)) |handle| return @intCast(handle);
        self.close();
    }
    sync.allocator.destroy(self);
    return if (code < 0) code else group_file.failed(failure, shared.vfio_objects, sys.fail(.NFILE), 0);
}

/// Writes as many ranges as there is room for.
pub fn groupInfo(handle: u32, out: *shared.VfioGroupInfo, ranges_out: ?[*]shared.IovaRange, capacity: u32) callconv(.c) i32 {
    const self = groups.get(handle) orelse return sys.fail(.BADF);
    out.* = .{ .page_size = self.page_size, .range_count = self.ranges.count };
    if (ranges_out) |ranges| {
        const count = @min(self.ranges.count, capacity);
        @memcpy(ranges[0..count], self.ranges.list[0..count]);
    }
    return 0;
}

/// Its devices must be closed. DMA mappings end.
pub fn groupClose(handle: u32) callconv(.c) i32 {
    const self = groups.remove(handle) orelse return sys.fail(.BADF);
    self.close();
    sync.allocator.destroy(self);
    return 0;
}

/// Lets the group's devices reach memory of the core's (`map_shared`,
/// `map_anonymous`, a region of guest memory) by `iova`. -EADDRNOTAVAIL outside the IOMMU's ranges,
/// -EINVAL for memory that is not the core's or not in whole pages, -ENOMEM
/// when the limit of locked memory is reached.
pub fn dmaMap(handle: u32, address: u64, size: f64, iova: u64) callconv(.c) i32 {
    const self = groups.get(handle) orelse return sys.fail(.BADF);
    const length = sizeOf(size) orelse return sys.fail(.INVAL);
    if (length == 0 or !mapping.isReachable(address, length)) return sys.fail(.INVAL);
    return self.map(address, length, iova);
}

pub fn dmaUnmap(handle: u32, size: f64, iova: u64) callconv(.c) i32 {
    const self = groups.get(handle) orelse return sys.fail(.BADF);
    return self.unmap(sizeOf(size) orelse return sys.fail(.INVAL), iova);
}

fn takeSpare() ?*Device {
    {
        spares_lock.lock();
        defer spares_lock.unlock();
        if (spares) |spare| {
            spares = spare.next_spare;
            return spare;
        }
    }
    const raw = sys.linux.mmap(null, @sizeOf(Device), .{ .READ = true, .WRITE = true }, .{ .TYPE = .PRIVATE, .ANONYMOUS = true }, -1, 0);
    if (sys.isError(raw)) return null;
    const self: *Device = @ptrFromInt(raw);
    self.* = .{};
    return self;
}

fn giveSpare(self: *Device) void {
    spares_lock.lock();
    defer spares_lock.unlock();
    self.next_spare = spares;
    spares = self;
}

/// Opens a device of the group by its name, such as `0000:00:05.0`.
pub fn deviceOpen(group_handle: u32, name: [*]const u8, name_length: u32, failure: *shared.VfioFailure) callconv(.c) i32 {
    failure.* = std.mem.zeroes(shared.VfioFailure);
    const group = groups.get(group_handle) orelse return sys.fail(.BADF);
    var buffer: [64]u8 = undefined;
    if (name_length == 0 or name_length >= buffer.len) return sys.fail(.INVAL);
    @memcpy(buffer[0..name_length], name[0..name_length]);
    buffer[name_length] = 0;
    const fd = group.openDevice(@ptrCast(&buffer));
    if (fd < 0) return group_file.failed(failure, shared.vfio_device_fd, fd, 0);
    const self = takeSpare() orelse {
        sys.closeQuietly(fd);
        return group_file.failed(failure, shared.vfio_objects, sys.fail(.NOMEM), 0);
    };
    const code = self.device.open(fd, failure);
    if (code >= 0) {
        if (devices.insert(self)) |handle| return @intCast(handle);
        self.device.close();
    }
    giveSpare(self);
    return if (code < 0) code else group_file.failed(failure, shared.vfio_objects, sys.fail(.NFILE), 0);
}

pub fn deviceInfo(handle: u32, out: *shared.VfioDeviceInfo) callconv(.c) i32 {
    const self = devices.get(handle) orelse return sys.fail(.BADF);
    const regions = &self.device.regions;
    out.* = .{
        .intx_count = self.device.irq_counts[abi.irq_intx],
        .msix_count = self.device.irq_counts[abi.irq_msix],
        .request_count = self.device.irq_counts[abi.irq_request],
        .has_reset = @intFromBool(self.device.has_reset),
        .bar_size_0 = regions[0].size,
        .bar_size_1 = regions[1].size,
        .bar_size_2 = regions[2].size,
        .bar_size_3 = regions[3].size,
        .bar_size_4 = regions[4].size,
        .bar_size_5 = regions[5].size,
    };
    return 0;
}

/// Maps the first `limit` bytes of a BAR where that is allowed, so that
/// `vfio_read` and `vfio_write` need no system call there.
pub fn mapRegisters(handle: u32, bar: u32, limit: f64) callconv(.c) i32 {
    const self = devices.get(handle) orelse return sys.fail(.BADF);
    return self.device.mapRegisters(bar, sizeOf(limit) orelse return sys.fail(.INVAL));
}

/// Maps a part of a BAR as memory, in whole pages; end it by `unmap`. -EINVAL
/// where it is outside the BAR or must not be mapped.
pub fn mapMemory(handle: u32, bar: u32, offset: f64, size: f64, address_out: *u64) callconv(.c) i32 {
    const self = devices.get(handle) orelse return sys.fail(.BADF);
    const start = sizeOf(offset) orelse return sys.fail(.INVAL);
    const length = sizeOf(size) orelse return sys.fail(.INVAL);
    var code: i32 = 0;
    const slot = self.device.mapMemory(bar, start, length, &code) orelse return code;
    address_out.* = slot.address;
    mapping.setPlain(slot);
    return 0;
}

/// The device's file, for another process that is to map a part of a BAR; where
/// in the file that is goes to `offset_out`. It stays the device's. -EINVAL
/// where the part could not be mapped here either.
pub fn barFile(handle: u32, bar: u32, offset: f64, size: f64, offset_out: *u64) callconv(.c) i32 {
    const self = devices.get(handle) orelse return sys.fail(.BADF);
    const start = sizeOf(offset) orelse return sys.fail(.INVAL);
    const length = sizeOf(size) orelse return sys.fail(.INVAL);
    return self.device.barFile(bar, start, length, offset_out);
}

/// The register of `width` 1, 2 or 4 bytes at an offset that is a multiple of
/// it, in BAR 0 to 5 or the configuration space; or a negative errno: -EINVAL
/// outside the region, others for a device that has gone.
pub fn read(handle: u32, region: u32, offset: f64, width: u32) callconv(.c) f64 {
    const self = devices.get(handle) orelse return @floatFromInt(sys.fail(.BADF));
    const start = sizeOf(offset) orelse return @floatFromInt(sys.fail(.INVAL));
    return @floatFromInt(self.device.read(region, start, width));
}

pub fn write(handle: u32, region: u32, offset: f64, width: u32, value: u32) callconv(.c) i32 {
    const self = devices.get(handle) orelse return sys.fail(.BADF);
    const start = sizeOf(offset) orelse return sys.fail(.INVAL);
    return self.device.write(region, start, width, value);
}

/// Routes vectors of one kind (`layout.interrupt_*`), from `first` on, to
/// eventfds, -1 for none; a count of 0 turns the kind off.
pub fn interrupts(handle: u32, kind: u32, first: u32, fds: ?[*]const i32, count: u32) callconv(.c) i32 {
    const self = devices.get(handle) orelse return sys.fail(.BADF);
    if (count == 0) return self.device.interrupts(kind, 0, &.{});
    const list = fds orelse return sys.fail(.INVAL);
    return self.device.interrupts(kind, first, list[0..count]);
}

pub fn unmask(handle: u32) callconv(.c) i32 {
    const self = devices.get(handle) orelse return sys.fail(.BADF);
    return self.device.unmask();
}

pub fn reset(handle: u32) callconv(.c) i32 {
    const self = devices.get(handle) orelse return sys.fail(.BADF);
    return self.device.reset();
}

pub fn deviceClose(handle: u32) callconv(.c) i32 {
    const self = devices.remove(handle) orelse return sys.fail(.BADF);
    self.device.close();
    giveSpare(self);
    return 0;
}

test {
    _ = @import("info.zig");
    _ = @import("device_test.zig");
    _ = @import("kernel.zig");
}
