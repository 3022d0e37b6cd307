//! What of VDUSE crosses the FFI boundary; see ../layout.zig.

const std = @import("std");

/// `vduse_create`
pub const VduseConfig = extern struct {
    /// As the kernel offers them to its driver.
    features: u64,
    /// virtio's number of the kind of device.
    device_id: u32,
    queue_count: u32,
    /// Bytes to which the parts of a ring are aligned.
    alignment: u32,
    reserved: u32 = 0,
};

/// A queue as the kernel's driver has set it up; addresses are IOVAs.
pub const VduseQueueInfo = extern struct {
    descriptor: u64,
    driver: u64,
    device: u64,
    size: u32,
    /// Where it began, as in SET_VRING_BASE.
    base: u32,
    is_ready: u32,
    reserved: u32 = 0,
};

/// A message of the kernel's, which waits for the answer.
pub const VduseRequest = extern struct {
    kind: u32,
    id: u32,
    /// vduse_get_queue_state
    queue: u32 = 0,
    /// vduse_set_status
    status: u32 = 0,
    /// vduse_update_iotlb: what has changed, `last` inclusive.
    start: u64 = 0,
    last: u64 = 0,
};
pub const vduse_get_queue_state: u32 = 0;
pub const vduse_set_status: u32 = 1;
pub const vduse_update_iotlb: u32 = 2;

pub const VduseResponse = extern struct {
    id: u32,
    is_failed: u32,
    /// With the state of a queue, as in GET_VRING_BASE.
    has_state: u32,
    queue: u32,
    base: u32,
    is_packed: u32,
};

/// An entry of the kernel's IOTLB; `last` is inclusive.
pub const VduseEntry = extern struct {
    start: u64,
    last: u64,
    /// Bytes from the start of the file to `start`.
    offset: u64,
    /// access_read, access_write or both; whatever the kernel says.
    access: u32,
    /// The file is the kernel's own memory, for `vduse_map`.
    is_domain: u32,
};

/// `vduse_attachment_result`: which step failed.
pub const VduseAttachment = extern struct {
    step: u32,
    errno: u32,
};
pub const attachment_socket: u32 = 1; // no netlink socket
pub const attachment_family: u32 = 2; // the kernel has no vDPA
pub const attachment_request: u32 = 3; // it refused
pub const attachment_thread: u32 = 4; // no thread to ask from

comptime {
    std.debug.assert(@sizeOf(VduseConfig) == 24);
    std.debug.assert(@sizeOf(VduseQueueInfo) == 40);
    std.debug.assert(@sizeOf(VduseRequest) == 32);
    std.debug.assert(@sizeOf(VduseResponse) == 24);
    std.debug.assert(@sizeOf(VduseEntry) == 32);
}
