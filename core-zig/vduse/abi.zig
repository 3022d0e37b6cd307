//! What Linux says about VDUSE (include/uapi/linux/vduse.h, API version 0):
//! requests, structures and numbers, under their own names. Sizes are asserted
//! at the end.

const std = @import("std");

/// `_IO*(0x81, n)`; the size of the argument is in the number.
pub const request = struct {
    pub const set_api_version: u32 = 0x4008_8101;
    pub const create_dev: u32 = 0x4150_8102;
    pub const destroy_dev: u32 = 0x4100_8103;
    pub const iotlb_get_fd: u32 = 0xc020_8110;
    pub const dev_get_features: u32 = 0x8008_8111;
    pub const dev_set_config: u32 = 0x4008_8112;
    pub const dev_inject_config_irq: u32 = 0x0000_8113;
    pub const vq_setup: u32 = 0x4020_8114;
    pub const vq_get_info: u32 = 0xc030_8115;
    pub const vq_setup_kickfd: u32 = 0x4008_8116;
    pub const vq_inject_irq: u32 = 0x4004_8117;
};

pub const api_version: u64 = 0;
pub const name_size = 256;
pub const Name = [name_size]u8;
/// A page: the kernel takes no larger configuration space.
pub const config_maximum = 4096;

/// `config_size` bytes of configuration space follow.
pub const DevConfig = extern struct {
    name: Name = @splat(0),
    vendor_id: u32 = 0,
    device_id: u32,
    features: u64,
    vq_num: u32,
    vq_align: u32,
    reserved: [13]u32 = @splat(0),
    config_size: u32,
};

/// `length` bytes follow.
pub const ConfigData = extern struct { offset: u32, length: u32 };

/// In: any range. Out: the first entry that overlaps it.
pub const IotlbEntry = extern struct { offset: u64 = 0, start: u64, last: u64, perm: u8 = 0, padding: [7]u8 = @splat(0) };

pub const VqConfig = extern struct { index: u32, max_size: u16, reserved: [13]u16 = @splat(0) };

pub const PackedState = extern struct { last_avail_counter: u16, last_avail_idx: u16, last_used_counter: u16, last_used_idx: u16 };
/// Of the two layouts, the one of the negotiated ring format.
pub const VqState = extern union { split: extern struct { avail_index: u16 }, packed_ring: PackedState };

pub const VqInfo = extern struct {
    index: u32,
    num: u32 = 0,
    desc_addr: u64 = 0,
    driver_addr: u64 = 0,
    device_addr: u64 = 0,
    state: VqState = .{ .packed_ring = std.mem.zeroes(PackedState) },
    ready: u8 = 0,
    padding: [7]u8 = @splat(0),
};

/// `fd` -1: none any more.
pub const VqEventfd = extern struct { index: u32, fd: i32 };

pub const get_vq_state: u32 = 0;
pub const set_status: u32 = 1;
pub const update_iotlb: u32 = 2;

pub const DevRequest = extern struct {
    kind: u32 = 0,
    request_id: u32 = 0,
    reserved: [4]u32 = @splat(0),
    payload: extern union {
        vq_state: extern struct { index: u32, state: VqState align(4) },
        status: u8,
        iova: extern struct { start: u64, last: u64 },
        padding: [32]u32,
    } = .{ .padding = @splat(0) },
};

pub const result_ok: u32 = 0;
pub const result_failed: u32 = 1;

pub const DevResponse = extern struct {
    request_id: u32,
    result: u32,
    reserved: [4]u32 = @splat(0),
    payload: extern union {
        vq_state: extern struct { index: u32, state: VqState align(4) },
        padding: [32]u32,
    } = .{ .padding = @splat(0) },
};

comptime {
    std.debug.assert(@sizeOf(DevConfig) == 336);
    std.debug.assert(@offsetOf(DevConfig, "config_size") == 332);
    std.debug.assert(@sizeOf(IotlbEntry) == 32);
    std.debug.assert(@sizeOf(VqConfig) == 32);
    std.debug.assert(@sizeOf(VqInfo) == 48);
    std.debug.assert(@offsetOf(VqInfo, "state") == 32);
    std.debug.assert(@sizeOf(VqEventfd) == 8);
    std.debug.assert(@sizeOf(DevRequest) == 152);
    std.debug.assert(@offsetOf(DevRequest, "payload") == 24);
    std.debug.assert(@sizeOf(DevResponse) == 152);
    std.debug.assert(@sizeOf(ConfigData) == 8);
}
