//! What of VFIO crosses the FFI boundary; see ../layout.zig.

const std = @import("std");

/// `vfio_group_open`, `vfio_device_open`, `vfio_dma_map` and so on: which step
/// failed. `errno` is the system's, 0 where the answer itself is the failure.
pub const VfioFailure = extern struct {
    step: u32,
    errno: u32,
    /// What the step was about: a region's index, the API's version.
    value: u32,
    reserved: u32 = 0,
};
pub const vfio_container: u32 = 1; // /dev/vfio/vfio cannot be opened
pub const vfio_api: u32 = 2; // value = its version, which is not 0
pub const vfio_iommu_type: u32 = 3; // no type1 IOMMU driver in the kernel
pub const vfio_group: u32 = 4; // /dev/vfio/N cannot be opened
pub const vfio_group_status: u32 = 5;
pub const vfio_group_viable: u32 = 6; // a device of it has another driver
pub const vfio_set_container: u32 = 7;
pub const vfio_set_iommu: u32 = 8;
pub const vfio_iommu_info: u32 = 9;
pub const vfio_device_fd: u32 = 10;
pub const vfio_device_info: u32 = 11; // errno 0: it is no PCI device
pub const vfio_region_info: u32 = 12; // value = index
pub const vfio_irq_info: u32 = 13; // value = index
pub const vfio_config_space: u32 = 14; // it cannot be read, or it lies
pub const vfio_objects: u32 = 15; // this process holds too many

/// Where a device may reach through its IOMMU; `last` is inclusive.
pub const IovaRange = extern struct {
    start: u64,
    last: u64,
};
pub const max_iova_ranges: u32 = 16;

pub const VfioGroupInfo = extern struct {
    /// Bytes: addresses and sizes of DMA are multiples of it.
    page_size: u64,
    range_count: u32,
    reserved: u32 = 0,
};

pub const VfioDeviceInfo = extern struct {
    /// Vectors; 0 where the device has none.
    intx_count: u32,
    msix_count: u32,
    request_count: u32,
    has_reset: u32,
    /// Bytes of BAR 0 to 5; 0 where there is none.
    bar_size_0: u64,
    bar_size_1: u64,
    bar_size_2: u64,
    bar_size_3: u64,
    bar_size_4: u64,
    bar_size_5: u64,
};

/// `vfio_interrupts`
pub const interrupt_intx: u32 = 0;
pub const interrupt_msix: u32 = 2;
pub const interrupt_request: u32 = 4;
/// Index of the configuration space for `vfio_read` and `vfio_write`.
pub const vfio_config_region: u32 = 7;

comptime {
    std.debug.assert(@sizeOf(VfioFailure) == 16);
    std.debug.assert(@sizeOf(IovaRange) == 16);
    std.debug.assert(@sizeOf(VfioDeviceInfo) == 64);
}
