//! VDUSE for TypeScript, by the device's descriptor. A descriptor that is
//! something else answers an error and has nothing done to it.

const sys = @import("../linux.zig");
const shared = @import("layout.zig");
const mapping = @import("../memory/mapping.zig");
const sizeOf = @import("../descriptor.zig").sizeOf;
const Device = @import("device.zig").Device(@import("kernel.zig").Kernel);

pub fn open(name: [*]const u8, name_length: u32) callconv(.c) i32 {
    return Device.open(name[0..name_length]);
}

pub fn create(name: [*]const u8, name_length: u32, what: *const shared.VduseConfig, config: [*]const u8, config_size: u32) callconv(.c) i32 {
    return Device.create(name[0..name_length], what, config[0..config_size]);
}

pub fn destroy(name: [*]const u8, name_length: u32) callconv(.c) i32 {
    return Device.destroy(name[0..name_length]);
}

/// The most descriptors that a queue may have; before the device is attached.
pub fn queueSetUp(fd: i32, index: u32, size: u32) callconv(.c) i32 {
    return Device.setUpQueue(fd, index, size);
}

pub fn queueInfo(fd: i32, index: u32, is_packed: u32, out: *shared.VduseQueueInfo) callconv(.c) i32 {
    return Device.queueInfo(fd, index, is_packed != 0, out);
}

/// The kernel signals `event` for each kick, and at once for one that came
/// before; -1 ends that.
pub fn queueKick(fd: i32, index: u32, event: i32) callconv(.c) i32 {
    return Device.setKick(fd, index, event);
}

/// Interrupts the driver; -EINVAL before the kernel has heard of DRIVER_OK.
pub fn queueInject(fd: i32, index: u32) callconv(.c) i32 {
    return Device.inject(fd, index);
}

pub fn configInject(fd: i32) callconv(.c) i32 {
    return Device.injectConfig(fd);
}

pub fn configSet(fd: i32, config: [*]const u8, config_size: u32) callconv(.c) i32 {
    return Device.setConfig(fd, config[0..config_size]);
}

pub fn features(fd: i32, features_out: *u64) callconv(.c) i32 {
    return Device.features(fd, features_out);
}

pub fn receive(fd: i32, request_out: *shared.VduseRequest) callconv(.c) i32 {
    return Device.receive(fd, request_out);
}

pub fn respond(fd: i32, response: *const shared.VduseResponse) callconv(.c) i32 {
    return Device.respond(fd, response);
}

/// Returns the descriptor of the entry's file, the caller's.
pub fn entry(fd: i32, start: u64, last: u64, entry_out: *shared.VduseEntry) callconv(.c) i32 {
    return Device.entry(fd, start, last, entry_out);
}

/// Maps a part of the kernel's memory (an entry with `is_domain`), in whole
/// pages; end it by `unmap`. `file` stays the caller's.
pub fn map(file: i32, offset: f64, size: f64, address_out: *u64) callconv(.c) i32 {
    const start = sizeOf(offset) orelse return sys.fail(.INVAL);
    const length = sizeOf(size) orelse return sys.fail(.INVAL);
    var code: i32 = 0;
    const slot = Device.map(file, start, length, &code) orelse return code;
    address_out.* = slot.address;
    mapping.setPlain(slot);
    return 0;
}

test {
    _ = @import("device_test.zig");
    _ = @import("kernel.zig");
}
