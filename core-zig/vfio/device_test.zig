//! Groups and devices over a kernel of the tests' own.

const std = @import("std");
const abi = @import("abi.zig");
const sys = @import("../linux.zig");
const shared = @import("layout.zig");
const fake = @import("fake_kernel.zig");
const Fake = fake.Fake;
const Group = @import("group.zig").Group(Fake);
const Device = @import("device.zig").Device(Fake);

const testing = std.testing;

/// Opens group 7 and the device; says how that went.
const Opened = struct {
    group: Group = .{},
    device: Device = .{},
    failure: shared.VfioFailure = std.mem.zeroes(shared.VfioFailure),

    fn open(self: *Opened) i32 {
        const grouped = self.group.open(7, &self.failure);
        if (grouped < 0) return grouped;
        const fd = self.group.openDevice("0000:00:05.0");
        const code = self.device.open(fd, &self.failure);
        if (code < 0) self.group.close();
        return code;
    }

    fn close(self: *Opened) void {
        self.device.close();
        self.group.close();
    }
};

test "every step that fails is named, and what was opened is closed" {
    const Case = struct { request: u32, step: u32 };
    const cases = [_]Case{
        .{ .request = abi.request.get_api_version, .step = shared.vfio_api },
        .{ .request = abi.request.check_extension, .step = shared.vfio_iommu_type },
        .{ .request = abi.request.group_get_status, .step = shared.vfio_group_status },
        .{ .request = abi.request.group_set_container, .step = shared.vfio_set_container },
        .{ .request = abi.request.set_iommu, .step = shared.vfio_set_iommu },
        .{ .request = abi.request.iommu_get_info, .step = shared.vfio_iommu_info },
        .{ .request = abi.request.device_get_info, .step = shared.vfio_device_info },
        .{ .request = abi.request.device_get_irq_info, .step = shared.vfio_irq_info },
        .{ .request = abi.request.device_get_region_info, .step = shared.vfio_region_info },
    };
    for (cases) |case| {
        Fake.start();
        Fake.failing = case.request;
        Fake.error_code = sys.fail(.PERM);
        var opened: Opened = .{};
        try testing.expect(opened.open() < 0);
        try testing.expectEqual(case.step, opened.failure.step);
        try testing.expectEqual(0, Fake.open_count);
        if (case.step != shared.vfio_iommu_type) try testing.expectEqual(1, opened.failure.errno);
    }
}

test "no container, no group, no IOMMU and a group that is not viable are told apart" {
    var opened: Opened = .{};
    Fake.start();
    Fake.open_error = sys.fail(.NOENT);
    try testing.expectEqual(sys.fail(.NOENT), opened.open());
    try testing.expectEqual(shared.vfio_container, opened.failure.step);
    Fake.start();
    Fake.group_error = sys.fail(.BUSY);
    try testing.expectEqual(sys.fail(.BUSY), opened.open());
    try testing.expectEqual(shared.vfio_group, opened.failure.step);
    Fake.start();
    Fake.type1 = false;
    try testing.expect(opened.open() < 0);
    try testing.expectEqual(shared.vfio_iommu_type, opened.failure.step);
    Fake.start();
    Fake.is_viable = false;
    try testing.expect(opened.open() < 0);
    try testing.expectEqual(shared.vfio_group_viable, opened.failure.step);
    Fake.start();
    Fake.version = 3;
    try testing.expect(opened.open() < 0);
    try testing.expectEqual(shared.vfio_api, opened.failure.step);
    try testing.expectEqual(3, opened.failure.value);
    try testing.expectEqual(0, Fake.open_count);
}

test "a device that answers nothing, or lies in its capabilities, is refused" {
    Fake.start();
    Fake.is_gone = true;
    var opened: Opened = .{};
    try testing.expectEqual(sys.fail(.IO), opened.open());
    try testing.expectEqual(shared.vfio_config_space, opened.failure.step);
    Fake.start();
    Fake.config[0x40] = 9;
    Fake.config[0x41] = 0x40;
    try testing.expectEqual(sys.fail(.IO), opened.open());
    try testing.expectEqual(shared.vfio_config_space, opened.failure.step);
    try testing.expectEqual(0, Fake.open_count);
}

test "registers are reached inside their region, aligned, and nowhere else" {
    Fake.start();
    var opened: Opened = .{};
    try testing.expectEqual(0, opened.open());
    defer opened.close();
    const device = &opened.device;
    try testing.expectEqual(0x1af4, device.read(abi.config_region, 0, 2));
    try testing.expectEqual(0x13121110, device.read(2, 0x10, 4));
    try testing.expectEqual(0, device.write(2, 0x10, 2, 0xabcd));
    try testing.expectEqual(0xcd, device.read(2, 0x10, 1));
    const Access = struct { region: u32, offset: u64, width: u32 };
    const outside = [_]Access{
        .{ .region = 2, .offset = fake.bar_size, .width = 1 },
        .{ .region = 2, .offset = fake.bar_size - 2, .width = 4 },
        .{ .region = 2, .offset = 0x11, .width = 2 },
        .{ .region = 2, .offset = 0, .width = 3 },
        .{ .region = 2, .offset = 0, .width = 8 },
        .{ .region = 2, .offset = std.math.maxInt(u64), .width = 1 },
        .{ .region = 1, .offset = 0, .width = 1 },
        .{ .region = 6, .offset = 0, .width = 1 },
        .{ .region = 8, .offset = 0, .width = 1 },
        .{ .region = 0xffff_ffff, .offset = 0, .width = 1 },
        .{ .region = abi.config_region, .offset = 256, .width = 1 },
    };
    for (outside) |access| {
        try testing.expectEqual(sys.fail(.INVAL), device.read(access.region, access.offset, access.width));
        try testing.expectEqual(sys.fail(.INVAL), device.write(access.region, access.offset, access.width, 0));
    }
}

test "mapped registers need no system call, the MSI-X table's page does" {
    Fake.start();
    var opened: Opened = .{};
    try testing.expectEqual(0, opened.open());
    defer opened.close();
    const device = &opened.device;
    try testing.expectEqual(0, device.mapRegisters(2, fake.bar_size));
    try testing.expectEqual(0, device.mapRegisters(2, fake.bar_size));
    const before = Fake.system_calls;
    try testing.expectEqual(0, device.write(2, 0x1000, 4, 0x01020304));
    try testing.expectEqual(0x0304, device.read(2, 0x1000, 2));
    try testing.expectEqual(0, device.write(2, 0x3ffc, 4, 7));
    try testing.expectEqual(before, Fake.system_calls);
    try testing.expectEqual(0x03020100, device.read(2, 0x2000, 4));
    try testing.expectEqual(before + 1, Fake.system_calls);
    try testing.expectEqual(sys.fail(.INVAL), device.mapRegisters(6, 0x1000));
}

test "a part of a BAR is memory only where it may be mapped" {
    Fake.start();
    var opened: Opened = .{};
    try testing.expectEqual(0, opened.open());
    defer opened.close();
    var code: i32 = 0;
    const slot = opened.device.mapMemory(2, 0, 0x2000, &code).?;
    slot.unmap();
    const Part = struct { bar: u32, offset: u64, size: u64 };
    for ([_]Part{
        .{ .bar = 2, .offset = 0x1000, .size = 0x2000 },
        .{ .bar = 2, .offset = 0x2000, .size = 0x1000 },
        .{ .bar = 2, .offset = 0x3000, .size = 0x2000 },
        .{ .bar = 2, .offset = 0, .size = 0 },
        .{ .bar = 2, .offset = 0x10, .size = 0x1000 },
        .{ .bar = 2, .offset = 1 << 63, .size = 0x1000 },
        .{ .bar = 1, .offset = 0, .size = 0x1000 },
        .{ .bar = 7, .offset = 0, .size = 0x100 },
    }) |part| {
        try testing.expectEqual(null, opened.device.mapMemory(part.bar, part.offset, part.size, &code));
        try testing.expectEqual(sys.fail(.INVAL), code);
        var position: u64 = 0;
        try testing.expectEqual(sys.fail(.INVAL), opened.device.barFile(part.bar, part.offset, part.size, &position));
    }
}

test "another process may map what this one may" {
    Fake.start();
    var opened: Opened = .{};
    try testing.expectEqual(0, opened.open());
    var position: u64 = 0;
    try testing.expectEqual(fake.device, opened.device.barFile(2, 0x1000, 0x1000, &position));
    try testing.expectEqual((2 << 40) + 0x1000, position);
    opened.close();
    try testing.expectEqual(sys.fail(.BADF), opened.device.barFile(2, 0x1000, 0x1000, &position));
}

test "vectors get eventfds, and no more than there are" {
    Fake.start();
    var opened: Opened = .{};
    try testing.expectEqual(0, opened.open());
    defer opened.close();
    const device = &opened.device;
    try testing.expectEqual(0, device.interrupts(abi.irq_msix, 0, &.{ 5, -1, 6 }));
    try testing.expectEqualSlices(i32, &.{ 5, -1, 6 }, Fake.vectors[0..Fake.vector_count]);
    try testing.expectEqual(0, device.interrupts(abi.irq_msix, 1, &.{7}));
    try testing.expectEqualSlices(i32, &.{ 5, 7, 6 }, Fake.vectors[0..Fake.vector_count]);
    for ([_]u32{ 4, 5, std.math.maxInt(u32) }) |first| {
        try testing.expectEqual(sys.fail(.INVAL), device.interrupts(abi.irq_msix, first, &.{1}));
    }
    try testing.expectEqual(0, device.interrupts(abi.irq_msix, 0, &.{}));
    try testing.expectEqual(0, Fake.vector_count);
    try testing.expectEqual(sys.fail(.INVAL), device.interrupts(abi.irq_msix, 0, &.{ 1, 2, 3, 4, 5 }));
    try testing.expectEqual(sys.fail(.INVAL), device.interrupts(9, 0, &.{1}));
    try testing.expectEqual(0, device.unmask());
    try testing.expectEqual(1, Fake.unmasks);
}

test "DMA stays in the IOMMU's ranges, in whole pages, and is undone as it was done" {
    Fake.start();
    var opened: Opened = .{};
    try testing.expectEqual(0, opened.open());
    defer opened.close();
    const group = &opened.group;
    try testing.expectEqual(0x1000, group.page_size);
    try testing.expectEqual(0, group.map(0x7000_0000, 0x2000, 0x10_0000));
    try testing.expectEqual(abi.dma_read | abi.dma_write, Fake.maps[0].flags);
    try testing.expectEqual(sys.fail(.EXIST), group.map(0x7000_0000, 0x2000, 0x10_0000));
    try testing.expectEqual(sys.fail(.ADDRNOTAVAIL), group.map(0x7000_0000, 0x1000, 0xfee0_0000));
    try testing.expectEqual(sys.fail(.ADDRNOTAVAIL), group.map(0x7000_0000, 0x2000, 0xffff_ffff_ffff_f000));
    try testing.expectEqual(sys.fail(.INVAL), group.map(0x7000_0100, 0x1000, 0));
    try testing.expectEqual(sys.fail(.INVAL), group.map(0x7000_0000, 0x1001, 0));
    try testing.expectEqual(sys.fail(.NOENT), group.unmap(0x1000, 0x10_0000));
    try testing.expectEqual(0, group.unmap(0x2000, 0x10_0000));
    try testing.expectEqual(0, Fake.map_count);
}

test "closing resets the device, and what comes later finds nothing" {
    Fake.start();
    var opened: Opened = .{};
    try testing.expectEqual(0, opened.open());
    opened.close();
    try testing.expectEqual(1, Fake.resets);
    try testing.expectEqual(0, Fake.open_count);
    try testing.expectEqual(sys.fail(.BADF), opened.device.read(2, 0, 4));
    try testing.expectEqual(sys.fail(.BADF), opened.device.write(2, 0, 4, 0));
    Fake.has_reset = false;
    try testing.expectEqual(0, opened.open());
    try testing.expectEqual(sys.fail(.NOTTY), opened.device.reset());
    opened.close();
}

test "a device that goes away answers errors" {
    Fake.start();
    var opened: Opened = .{};
    try testing.expectEqual(0, opened.open());
    defer opened.close();
    try testing.expectEqual(0, opened.device.mapRegisters(2, 0x1000));
    Fake.is_gone = true;
    try testing.expectEqual(sys.fail(.IO), opened.device.read(abi.config_region, 0, 2));
    try testing.expectEqual(sys.fail(.IO), opened.device.write(2, 0x3000, 4, 0));
    // As the fault handler leaves mapped registers.
    try testing.expect(opened.device.regions[2].mapped[0].?.replaceByZeros());
    try testing.expectEqual(sys.fail(.NODEV), opened.device.read(2, 0, 4));
    try testing.expectEqual(sys.fail(.NODEV), opened.device.write(2, 0, 4, 1));
}
