//! A VDUSE device over a kernel of the tests' own.

const std = @import("std");
const abi = @import("abi.zig");
const sys = @import("../linux.zig");
const shared = @import("layout.zig");
const fake = @import("fake_kernel.zig");
const Fake = fake.Fake;
const Device = @import("device.zig").Device(Fake);

const testing = std.testing;
const what: shared.VduseConfig = .{ .features = 1 << 33, .device_id = 2, .queue_count = 2, .alignment = 4096 };

test "a device is created as described, and the control device closed" {
    Fake.start();
    try testing.expectEqual(0, Device.create("disk0", &what, "config"));
    const created = Fake.created.?;
    try testing.expectEqualStrings("disk0", std.mem.sliceTo(&created.name, 0));
    try testing.expectEqual(2, created.device_id);
    try testing.expectEqual(1 << 33, created.features);
    try testing.expectEqual(6, created.config_size);
    try testing.expectEqual(@as([13]u32, @splat(0)), created.reserved);
    try testing.expectEqualStrings("config", Fake.config[0..6]);
    try testing.expectEqual(0, Device.destroy("disk0"));
    try testing.expectEqualStrings("disk0", std.mem.sliceTo(&Fake.destroyed.?, 0));
    try testing.expectEqual(0, Fake.open_count);
}

test "each step of creating that fails is told, and nothing stays open" {
    const cases = [_]struct { u32, sys.E, sys.E }{
        .{ 1, .NOENT, .NOENT },
        .{ abi.request.set_api_version, .INVAL, .PROTO },
        .{ abi.request.create_dev, .PERM, .PERM },
    };
    for (cases) |case| {
        Fake.start();
        Fake.failing = case[0];
        Fake.error_code = sys.fail(case[1]);
        try testing.expectEqual(sys.fail(case[2]), Device.create("disk0", &what, "c"));
        try testing.expectEqual(0, Fake.open_count);
    }
}

test "names and sizes that the kernel could misread never reach it" {
    Fake.start();
    const long: [256]u8 = @splat('x');
    for ([_][]const u8{ "", "a/b", "../x", "a\x00b", &long }) |name| {
        try testing.expectEqual(sys.fail(.INVAL), Device.open(name));
        try testing.expectEqual(sys.fail(.INVAL), Device.create(name, &what, "c"));
        try testing.expectEqual(sys.fail(.INVAL), Device.destroy(name));
    }
    const large: [4097]u8 = @splat(0);
    try testing.expectEqual(sys.fail(.INVAL), Device.create("disk0", &what, &large));
    try testing.expectEqual(sys.fail(.INVAL), Device.setConfig(fake.device, &large));
    try testing.expectEqual(sys.fail(.INVAL), Device.setConfig(fake.device, ""));
    for ([_]u32{ 0, 32769, 1 << 31 }) |size| try testing.expectEqual(sys.fail(.INVAL), Device.setUpQueue(fake.device, 0, size));
    try testing.expectEqual(null, Fake.created);
    try testing.expectEqual(0, Fake.open_count);
}

test "a queue's state crosses in both formats, and back" {
    Fake.start();
    Fake.info = .{ .index = 1, .num = 256, .desc_addr = 0x1000, .driver_addr = 0x2000, .device_addr = 0x3000, .ready = 1 };
    Fake.info.state.split.avail_index = 0xfffe;
    var info: shared.VduseQueueInfo = undefined;
    try testing.expectEqual(0, Device.queueInfo(fake.device, 1, false, &info));
    try testing.expectEqual(shared.VduseQueueInfo{ .descriptor = 0x1000, .driver = 0x2000, .device = 0x3000, .size = 256, .base = 0xfffe, .is_ready = 1 }, info);
    Fake.info.state = .{ .packed_ring = .{ .last_avail_counter = 1, .last_avail_idx = 5, .last_used_counter = 0, .last_used_idx = 3 } };
    try testing.expectEqual(0, Device.queueInfo(fake.device, 1, true, &info));
    try testing.expectEqual(0x0003_8005, info.base);
    // Whatever the counters are.
    Fake.info.state = .{ .packed_ring = .{ .last_avail_counter = 0xfffe, .last_avail_idx = 0xffff, .last_used_counter = 7, .last_used_idx = 0x8000 } };
    try testing.expectEqual(0, Device.queueInfo(fake.device, 1, true, &info));
    try testing.expectEqual(0x8000_7fff, info.base);
    try testing.expectEqual(sys.fail(.INVAL), Device.queueInfo(fake.device, 2, true, &info));

    var response: shared.VduseResponse = .{ .id = 9, .is_failed = 0, .has_state = 1, .queue = 1, .base = 0x8003_0005, .is_packed = 1 };
    try testing.expectEqual(0, Device.respond(fake.device, &response));
    const state = Fake.response.payload.vq_state;
    try testing.expectEqual(1, state.index);
    try testing.expectEqual(abi.PackedState{ .last_avail_counter = 0, .last_avail_idx = 5, .last_used_counter = 1, .last_used_idx = 3 }, state.state.packed_ring);
    response.is_packed = 0;
    try testing.expectEqual(0, Device.respond(fake.device, &response));
    try testing.expectEqual(5, Fake.response.payload.vq_state.state.split.avail_index);
    try testing.expectEqual(9, Fake.response.request_id);
    response.is_failed = 1;
    try testing.expectEqual(0, Device.respond(fake.device, &response));
    try testing.expectEqual(abi.result_failed, Fake.response.result);
}

test "messages are read by their kind; half of one, and none, are told apart" {
    Fake.start();
    var request: shared.VduseRequest = undefined;
    Fake.message = .{ .kind = abi.set_status, .request_id = 3, .payload = .{ .status = 15 } };
    try testing.expectEqual(0, Device.receive(fake.device, &request));
    try testing.expectEqual(15, request.status);
    try testing.expectEqual(3, request.id);
    Fake.message = .{ .kind = abi.update_iotlb, .payload = .{ .iova = .{ .start = 1, .last = std.math.maxInt(u64) } } };
    try testing.expectEqual(0, Device.receive(fake.device, &request));
    try testing.expectEqual(1, request.start);
    try testing.expectEqual(std.math.maxInt(u64), request.last);
    // Of a kind that this version does not know: nothing is made of the rest.
    Fake.message = .{ .kind = 77, .payload = .{ .padding = @splat(0xffff_ffff) } };
    try testing.expectEqual(0, Device.receive(fake.device, &request));
    try testing.expectEqual(shared.VduseRequest{ .kind = 77, .id = 0 }, request);
    for ([_]usize{ 0, 8, 151 }) |count| {
        Fake.moved = count;
        try testing.expectEqual(sys.fail(.PROTO), Device.receive(fake.device, &request));
        try testing.expectEqual(sys.fail(.PROTO), Device.respond(fake.device, &std.mem.zeroes(shared.VduseResponse)));
    }
    Fake.failing = 2;
    for ([_]sys.E{ .AGAIN, .PERM }) |code| {
        Fake.error_code = sys.fail(code);
        try testing.expectEqual(sys.fail(code), Device.receive(fake.device, &request));
    }
}

test "only the kernel's own memory is mapped, in whole pages" {
    Fake.start();
    Fake.entry = .{ .start = 0x4000, .last = 0x4fff, .offset = 0x4000, .perm = 3 };
    var entry: shared.VduseEntry = undefined;
    try testing.expectEqual(fake.domain, Device.entry(fake.device, 0, std.math.maxInt(u64), &entry));
    try testing.expectEqual(shared.VduseEntry{ .start = 0x4000, .last = 0x4fff, .offset = 0x4000, .access = 3, .is_domain = 1 }, entry);
    try testing.expectEqual(sys.fail(.INVAL), Device.entry(fake.device, 0x5000, 0x5000, &entry));
    Fake.entry_file = fake.memfd;
    _ = Device.entry(fake.device, 0x4000, 0x4000, &entry);
    try testing.expectEqual(0, entry.is_domain);
    var code: i32 = 0;
    const slot = Device.map(fake.domain, 0x4000, 0x1000, &code).?;
    try testing.expectEqual(0x4000, Fake.mapped_offset);
    slot.unmap();
    for ([_]struct { i32, u64, u64 }{ .{ fake.memfd, 0, 0x1000 }, .{ fake.domain, 1, 0x1000 }, .{ fake.domain, 0, 0 }, .{ fake.domain, 0, 0x1001 } }) |case| {
        try testing.expectEqual(null, Device.map(case[0], case[1], case[2], &code));
        try testing.expectEqual(sys.fail(.INVAL), code);
    }
}

test "kicks, calls and configuration reach the kernel as they are" {
    Fake.start();
    try testing.expectEqual(0, Device.setUpQueue(fake.device, 1, 32768));
    try testing.expectEqual(32768, Fake.queues[1].max_size);
    try testing.expectEqual(0, Device.setKick(fake.device, 1, -1));
    try testing.expectEqual(abi.VqEventfd{ .index = 1, .fd = -1 }, Fake.kick);
    try testing.expectEqual(0, Device.inject(fake.device, 1));
    try testing.expectEqual(1, Fake.injected);
    try testing.expectEqual(0, Device.injectConfig(fake.device));
    try testing.expectEqual(0xffff, Fake.injected);
    try testing.expectEqual(0, Device.setConfig(fake.device, "again"));
    try testing.expectEqualStrings("again", Fake.config[0..5]);
    var features: u64 = 0;
    try testing.expectEqual(0, Device.features(fake.device, &features));
    try testing.expectEqual(1 << 33, features);
    Fake.failing = abi.request.vq_inject_irq;
    Fake.error_code = sys.fail(.PERM);
    try testing.expectEqual(sys.fail(.PERM), Device.inject(fake.device, 0));
}
