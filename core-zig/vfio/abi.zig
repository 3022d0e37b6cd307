//! What Linux says about VFIO (include/uapi/linux/vfio.h): requests, structures
//! and numbers, under their own names. Sizes are asserted at the end.

const std = @import("std");

/// `_IO(';', 100 + n)`. 112 to 114 mean different things by descriptor.
pub const request = struct {
    pub const get_api_version: u32 = 0x3b64;
    pub const check_extension: u32 = 0x3b65;
    pub const set_iommu: u32 = 0x3b66;
    pub const group_get_status: u32 = 0x3b67;
    pub const group_set_container: u32 = 0x3b68;
    pub const group_unset_container: u32 = 0x3b69;
    pub const group_get_device_fd: u32 = 0x3b6a;
    pub const device_get_info: u32 = 0x3b6b;
    pub const device_get_region_info: u32 = 0x3b6c;
    pub const device_get_irq_info: u32 = 0x3b6d;
    pub const device_set_irqs: u32 = 0x3b6e;
    pub const device_reset: u32 = 0x3b6f;
    pub const iommu_get_info: u32 = 0x3b70;
    pub const iommu_map_dma: u32 = 0x3b71;
    pub const iommu_unmap_dma: u32 = 0x3b72;
};

pub const api_version: i32 = 0;
/// IOMMU types. v2: an unmap must match a map, and nothing is split.
pub const type1: usize = 1;
pub const type1_v2: usize = 3;

pub const group_viable: u32 = 1;
pub const GroupStatus = extern struct { argsz: u32, flags: u32 = 0 };

pub const device_reset_supported: u32 = 1;
pub const device_is_pci: u32 = 2;
/// Newer kernels append `cap_offset` and a pad; this part is in all.
pub const DeviceInfo = extern struct { argsz: u32, flags: u32 = 0, num_regions: u32 = 0, num_irqs: u32 = 0 };

pub const region_read: u32 = 1;
pub const region_write: u32 = 2;
pub const region_mmap: u32 = 4;
pub const region_caps: u32 = 8;
pub const RegionInfo = extern struct { argsz: u32, flags: u32 = 0, index: u32, cap_offset: u32 = 0, size: u64 = 0, offset: u64 = 0 };
/// BAR 0 to 5 are 0 to 5.
pub const bar_count = 6;
pub const config_region = 7;

pub const IrqInfo = extern struct { argsz: u32, flags: u32 = 0, index: u32, count: u32 = 0 };
pub const irq_intx: u32 = 0;
pub const irq_msix: u32 = 2;
/// The kernel wants the device back (it is being unplugged).
pub const irq_request: u32 = 4;
pub const irq_flag_none: u32 = 1;
pub const irq_flag_eventfd: u32 = 4;
pub const irq_flag_unmask: u32 = 0x10;
pub const irq_flag_trigger: u32 = 0x20;
/// `count` descriptors (-1: none) follow.
pub const IrqSet = extern struct { argsz: u32, flags: u32, index: u32, start: u32, count: u32 };

pub const iommu_page_sizes: u32 = 1;
pub const iommu_caps: u32 = 2;
pub const Type1Info = extern struct { argsz: u32, flags: u32 = 0, iova_pgsizes: u64 = 0, cap_offset: u32 = 0, pad: u32 = 0 };

pub const dma_read: u32 = 1;
pub const dma_write: u32 = 2;
pub const DmaMap = extern struct { argsz: u32, flags: u32, vaddr: u64, iova: u64, size: u64 };
pub const DmaUnmap = extern struct { argsz: u32, flags: u32 = 0, iova: u64, size: u64 };

/// `struct vfio_info_cap_header`; `next` counts from the start of the info.
pub const CapabilityHeader = extern struct { id: u16, version: u16, next: u32 };
pub const capability_sparse_mmap: u16 = 1;
pub const capability_msix_mappable: u16 = 3;
pub const capability_iova_range: u16 = 1;

comptime {
    std.debug.assert(@sizeOf(GroupStatus) == 8);
    std.debug.assert(@sizeOf(DeviceInfo) == 16);
    std.debug.assert(@sizeOf(RegionInfo) == 32);
    std.debug.assert(@sizeOf(IrqInfo) == 16);
    std.debug.assert(@sizeOf(IrqSet) == 20);
    std.debug.assert(@sizeOf(Type1Info) == 24);
    std.debug.assert(@sizeOf(DmaMap) == 32);
    std.debug.assert(@sizeOf(DmaUnmap) == 24);
    std.debug.assert(@sizeOf(CapabilityHeader) == 8);
}
