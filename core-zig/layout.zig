//! Every structure and constant that crosses the FFI boundary, written once:
//! here, or, of what one room alone has, in its own `layout.zig`. `abi.zig` turns
//! the structures' sizes and offsets into `ffi/abi.gen.ts`.
//! All words are little-endian, as are the machines that this library serves.

const std = @import("std");

/// A guest address space in which an address may be given.
pub const space_gpa: u32 = 0;
pub const space_uva: u32 = 1;
/// Translated by the IOTLB, to an address in one of the other two.
pub const space_iova: u32 = 2;

pub const access_read: u32 = 1;
pub const access_write: u32 = 2;

/// Regions per device: what the kernel and QEMU (512) can follow, minus spares.
pub const max_regions: u32 = 509;

/// Guest memory is addressed as (view, offset): a view is a window of at most
/// 2 GiB of one region, so that an offset is a non-negative 32-bit integer,
/// which V8 keeps unboxed, and so that Node 20 can make the view at all.
pub const view_shift: u6 = 31;
pub const view_size: u64 = 1 << view_shift;

/// `memory_prepare`: what the regions given do to the table.
pub const prepare_replace: u32 = 0;
pub const prepare_add: u32 = 1;
pub const prepare_remove: u32 = 2;

/// One region as a front-end describes it. `fd` is read while
/// `memory_prepare` runs and stays the caller's. With `flag_region_address`
/// the region is already mapped at `address`, in a mapping of the core's (a PCI
/// BAR), and `fd` is ignored.
pub const RegionRequest = extern struct {
    gpa: u64,
    uva: u64,
    size: u64,
    mmap_offset: u64,
    address: u64,
    fd: i32,
    flags: u32,
};
pub const flag_region_address: u32 = 1;

/// Why `memory_prepare` refused (`PrepareResult.reason`).
pub const refuse_none: u32 = 0;
pub const refuse_size_zero: u32 = 1;
pub const refuse_userfault: u32 = 13; // postcopy cannot watch the file; value = errno
pub const refuse_file_offset_wraps: u32 = 3;
pub const refuse_file_too_small: u32 = 4; // value = file size, limit = bytes needed
pub const refuse_file_kind: u32 = 5; // neither shared memory nor a regular file on a safe file system
pub const refuse_overlap_gpa: u32 = 6;
pub const refuse_overlap_uva: u32 = 7;
pub const refuse_too_many: u32 = 8; // limit = max_regions
pub const refuse_not_found: u32 = 9;
pub const refuse_mmap: u32 = 10; // value = errno
pub const refuse_quarantine: u32 = 11; // value = bytes in quarantine, limit = its bound
pub const refuse_mappings: u32 = 12; // the process-wide table of mappings is full
pub const refuse_address: u32 = 14; // value = the address, which is in no mapping of the core's
pub const refuse_address_wraps: u32 = 2;

pub const PrepareResult = extern struct {
    reason: u32,
    /// Index into the requests of the region refused.
    region: u32,
    kept: u32,
    added: u32,
    removed: u32,
    reserved: u32,
    value: u64,
    limit: u64,
};

/// One region of the published table.
pub const RegionInfo = extern struct {
    gpa: u64,
    uva: u64,
    size: u64,
    /// Where the region starts in this process.
    address: u64,
    /// First of the region's views; they are consecutive.
    view_first: u32,
    view_count: u32,
};

/// Answer of `memory_translate`. `length` is clipped at the end of the view.
pub const Translation = extern struct {
    view: u32,
    offset: u32,
    length: u32,
    region_view_first: u32,
    /// Offset from the start of the region, and bytes from there to its end
    /// or to the length asked for, whichever is less.
    region_offset: u64,
    contiguous: u64,
};

/// `memory_state`
pub const memory_ok: u32 = 0;
/// The file behind a region shrank: the region reads as zeros from now on.
pub const memory_faulted: u32 = 1;
pub const memory_revoked: u32 = 2;
/// Revoked because a page of a guest that migrates here did not come.
pub const memory_starved: u32 = 3;

pub const RingConfig = extern struct {
    /// Descriptor area, driver area and device area, by their names in a split
    /// ring.
    descriptor_address: u64,
    available_address: u64,
    used_address: u64,
    /// Negotiated virtio features, without LOG_ALL.
    features: u64,
    /// In which the three addresses are. With `space_iova` those in
    /// descriptors are IOVAs too, otherwise they are gpas.
    space: u32,
    /// Number of descriptors: up to 32768, and a power of two in a split ring.
    size: u32,
    /// Where to go on, as SET_VRING_BASE carries it: in the available ring or,
    /// packed, 15 bits of position and a wrap counter of what is available,
    /// then the same of what is used.
    base: u32,
    /// Readable bytes at the start of each request, copied into its record
    /// (at most 256), and writable bytes at its end kept apart (at most 1).
    header_bytes: u32,
    trailer_bytes: u32,
    flags: u32,
    /// 0-based.
    queue_index: u32 = 0,
    /// Handle of the inflight region in which the queue has its part, or 0. A
    /// region in use says where to go on, whatever `base` says.
    inflight: u32 = 0,
};
/// What the device writes may have to be logged (LOG_SHMFD is negotiated).
pub const flag_ring_logged: u32 = 1;
/// The device gives back in order, nothing in flight in between: a split ring
/// goes on where its used ring ends, whatever `base` says. DPDK's virtio_user
/// goes on with its rings after a reconnect and says 0.
pub const flag_ring_resumed: u32 = 2;
/// The driver has begun the ring anew, at `base`: the inflight region speaks of
/// an earlier one.
pub const flag_ring_anew: u32 = 4;

/// Why `ring_create` refused: the number of descriptors, one of the areas, or
/// another field (space, base, header_bytes, trailer_bytes, flags).
pub const refuse_ring_size: u32 = 1;
pub const refuse_ring_descriptor_area: u32 = 2;
pub const refuse_ring_available_area: u32 = 3;
pub const refuse_ring_used_area: u32 = 4;
pub const refuse_ring_config: u32 = 5;
/// The inflight region has no part for this ring, or (-EUCLEAN) one whose
/// content breaks a rule.
pub const refuse_ring_inflight: u32 = 6;

/// Why a ring is broken (`RingState.broken`).
pub const broken_none: u32 = 0;
pub const broken_available_index: u32 = 1; // more than `size` ahead of us
pub const broken_head: u32 = 2; // head (packed: buffer id) not below `size`
pub const broken_head_in_flight: u32 = 3; // made available again before it was used
pub const broken_next: u32 = 4; // next outside the table
pub const broken_loop: u32 = 5; // more descriptors than the limit
pub const broken_unmapped: u32 = 6; // address not mapped as a whole
pub const broken_length: u32 = 7; // chain of 4 GiB or more
pub const broken_order: u32 = 8; // readable after writable
pub const broken_indirect_size: u32 = 9; // zero, not a multiple of 16, too long
pub const broken_indirect_nested: u32 = 10;
pub const broken_indirect_refused: u32 = 11; // INDIRECT without the feature, or with NEXT
pub const broken_segments: u32 = 12; // more pieces than a batch can hold
pub const broken_memory: u32 = 13; // the memory faulted or was revoked
pub const broken_empty: u32 = 14; // an empty chain
pub const broken_inflight: u32 = 15; // its part of the inflight region is damaged

/// Why an IOVA has no translation (`IotlbMiss.reason`).
pub const miss_absent: u32 = 1;
/// There is an entry, and it does not permit the access.
pub const miss_forbidden: u32 = 2;
/// There is an entry, and it leads to no region of the memory.
pub const miss_unmapped: u32 = 3;

/// What a ring waits for (`ring_misses`).
pub const IotlbMiss = extern struct {
    iova: u64,
    /// access_read, access_write or both.
    access: u32,
    reason: u32,
};

pub const RingState = extern struct {
    /// The base of a ring that goes on from here; packed: all 32 bits of it.
    last_available: u32,
    /// Packed: position and wrap counter.
    used_index: u32,
    in_flight: u32,
    broken: u32,
    /// Requests of an earlier run that have not been popped again yet.
    to_resubmit: u32,
    reserved: u32,
    /// The descriptor index or length that broke it.
    broken_value: u64,
    popped: u64,
    pushed: u64,
};

/// A request in a batch: `record_words` words, then the header's bytes.
/// The views and offsets of the segments follow after the last record.
pub const Request = extern struct {
    head: u32,
    /// Index of the first segment; readable ones first, then writable ones.
    segment_first: u32,
    readable_count: u32,
    writable_count: u32,
    /// Bytes in the segments, so without header and trailer.
    readable_bytes: u32,
    writable_bytes: u32,
    /// Bytes of the header that the request has (less than asked for if short).
    header_length: u32,
    trailer_length: u32,
    trailer_view: u32,
    trailer_offset: u32,
    /// Counts the requests popped from this ring, modulo 2^32.
    serial: u32,
    reserved: u32,
};

pub const Segment = extern struct {
    view: u32,
    offset: u32,
    length: u32,
    /// access_read (device reads) or access_write.
    access: u32,
};

/// A completion: how many bytes the device wrote for `head`.
pub const Completion = extern struct {
    head: u32,
    written: u32,
};

/// `io_submit` operations.
pub const io_read: u32 = 0; // file -> writable segments
pub const io_write: u32 = 1; // readable segments -> file
pub const io_flush: u32 = 2; // fdatasync
pub const io_discard: u32 = 3; // punch a hole of `length` bytes
pub const io_write_zeroes: u32 = 4; // zero `length` bytes; flag: may unmap
pub const flag_io_unmap: u32 = 1;
/// Write through: the data is durable when the request completes (RWF_DSYNC).
pub const flag_io_dsync: u32 = 2;
/// By a thread of the engine's: for writes that the file's file system makes
/// only in a thread that may block (`file_traits`). io_uring would hand each to
/// a thread of the kernel's, which costs more.
pub const flag_io_threaded: u32 = 4;
/// At once, in the thread that submits, which may block: for a Worker that has
/// nothing else to do.
pub const flag_io_inline: u32 = 8;
/// A write into the page cache: at once, in the thread that submits or reaps,
/// which must not wait, while the file's writes have not; else, and when it is
/// large or to be durable, as with `flag_io_threaded`.
pub const flag_io_prompt: u32 = 16;

pub const IoRequest = extern struct {
    operation: u32,
    file: i32,
    offset: u64,
    /// For discard and write zeroes; otherwise the segments' sum is used.
    length: u64,
    segment_first: u32,
    segment_count: u32,
    tag: u32,
    flags: u32,
    memory: u32,
    /// What address and length of each transfer must be a multiple of, at most
    /// 4096; 0 or 1: nothing (not O_DIRECT).
    alignment: u32,
};

/// Answer of `file_traits`.
pub const FileTraits = extern struct {
    /// For O_DIRECT: what offset, length and address must be multiples of.
    alignment: u32,
    /// 1 when a buffered write needs a thread that may block.
    has_blocking_writes: u32,
};

pub const IoCompletion = extern struct {
    tag: u32,
    /// 0 or a negative errno. A file that ends early is -EIO; a hole in guest
    /// memory is -EFAULT and marks the memory faulted.
    result: i32,
};

/// One copy of `memory_copy`, between guest memory and a buffer.
pub const Copy = extern struct {
    view: u32,
    offset: u32,
    length: u32,
    /// access_write: buffer -> guest; access_read: guest -> buffer.
    access: u32,
    buffer_offset: u64,
};

/// A network frame in a caller's buffer. In the 12 bytes before it is its
/// `virtio_net_hdr` (virtio 1.3, 5.1.6), whatever the guest's format.
pub const Frame = extern struct {
    offset: u32,
    /// Bytes, without the header.
    length: u32,
};
pub const net_header_size: u32 = 12;
/// 64 KiB of payload, an Ethernet header with a VLAN tag (5.1.6.3.1).
pub const net_frame_maximum: u32 = 65550;
/// Chains per `net_receive`, and that one frame may take in `net_send`.
pub const net_burst_maximum: u32 = 256;

/// What the driver may leave to the device, or the device to the driver.
pub const net_offload_checksum: u32 = 1;
pub const net_offload_tso4: u32 = 2;
pub const net_offload_tso6: u32 = 4;
pub const net_offload_ecn: u32 = 8;
pub const net_offload_ufo: u32 = 16;
pub const net_offload_uso: u32 = 32;
/// MRG_RXBUF: a frame may take several chains.
pub const flag_net_mergeable: u32 = 1 << 16;
/// A legacy driver without MRG_RXBUF: its header ends before num_buffers.
pub const flag_net_short_header: u32 = 1 << 17;

/// What a burst did; the first words of its scratch area.
pub const NetProgress = extern struct {
    /// Received, or taken from the caller (sent or dropped).
    frames: u32,
    /// Chains that were used up.
    chains: u32,
    /// 1: the driver must be called.
    call: u32,
    reserved: u32,
};

/// Counters of one queue, as DPDK counts.
pub const NetCounts = extern struct {
    packets: f64,
    bytes: f64,
    multicast: f64,
    broadcast: f64,
    /// By length in bytes, without the checksum behind the frame.
    below_64: f64,
    exactly_64: f64,
    to_127: f64,
    to_255: f64,
    to_511: f64,
    to_1023: f64,
    to_1518: f64,
    above_1518: f64,
    /// Broke a rule: not delivered.
    errors: f64,
    /// Correct, and not delivered for another reason.
    dropped: f64,
};

/// `poll_wait`: which descriptor is ready and how.
pub const PollEvent = extern struct {
    token: u32,
    events: u32,
};
/// Token of the event that says that some memory faulted.
pub const token_fault: u32 = 0xffff_ffff;
pub const event_readable: u32 = 1;
pub const event_writable: u32 = 4;
pub const event_error: u32 = 8;
pub const event_hangup: u32 = 16;

/// `socket_receive`
pub const ReceiveInfo = extern struct {
    descriptor_count: u32,
    /// 1 when descriptors were lost (MSG_CTRUNC); what arrived is closed.
    truncated: u32,
};

/// `descriptor_kind`
pub const kind_other: u32 = 0;
pub const kind_eventfd: u32 = 1;
pub const kind_socket: u32 = 2;
pub const kind_listener: u32 = 3;
pub const kind_file: u32 = 4;
pub const kind_block: u32 = 5;

comptime {
    std.debug.assert(@sizeOf(RegionRequest) == 48);
    std.debug.assert(@sizeOf(PrepareResult) == 40);
    std.debug.assert(@sizeOf(RegionInfo) == 40);
    std.debug.assert(@sizeOf(Translation) == 32);
    std.debug.assert(@sizeOf(RingConfig) == 64);
    std.debug.assert(@sizeOf(RingState) == 48);
    std.debug.assert(@sizeOf(Request) == 48);
    std.debug.assert(@sizeOf(Segment) == 16);
    std.debug.assert(@sizeOf(IoRequest) == 48);
    std.debug.assert(@sizeOf(Copy) == 24);
    std.debug.assert(@sizeOf(IotlbMiss) == 16);
    std.debug.assert(@sizeOf(Frame) == 8);
    std.debug.assert(@sizeOf(NetProgress) == 16);
    std.debug.assert(@sizeOf(NetCounts) == 112);
}

/// `load_run`: what each request does.
pub const load_read: u32 = 0;
pub const load_write: u32 = 1;
/// Header and status only: a flush.
pub const load_flush: u32 = 2;
pub const flag_load_random: u32 = 1;
/// Poll the used ring, and ask for no calls, instead of sleeping.
pub const flag_load_spin: u32 = 2;
/// Write a pattern, then read it back and compare: `operation` and
/// `duration_ms` are ignored; `request_count` 0 means the whole disk.
pub const flag_load_verify: u32 = 4;

pub const LoadConfig = extern struct {
    /// Where the guest's memory is mapped in this process, its size, and the
    /// guest's address of its first byte.
    memory_address: u64,
    memory_size: u64,
    memory_gpa: u64,
    /// Offsets in that memory. The data area takes, per request outstanding,
    /// 64 + 16 * (segment_count + 2) bytes rounded up to 64, all that rounded
    /// up to 4096, and then `request_bytes` per request outstanding.
    descriptor_offset: u64,
    available_offset: u64,
    used_offset: u64,
    data_offset: u64,
    /// Negotiated: PACKED, EVENT_IDX and INDIRECT are used when they are there.
    features: u64,
    disk_sectors: u64,
    /// The run ends after so many requests (0: no such end).
    request_count: u64,
    seed: u64,
    queue_size: u32,
    /// Requests outstanding.
    depth: u32,
    /// A multiple of 512.
    request_bytes: u32,
    /// Data descriptors per request.
    segment_count: u32,
    /// The run ends after so long (0: no such end).
    duration_ms: u32,
    /// A peer that completes nothing for so long hangs: -ETIMEDOUT.
    timeout_ms: u32,
    operation: u32,
    flags: u32,
    kick_fd: i32,
    /// May be -1 with flag_load_spin.
    call_fd: i32,
    /// Packed: position and wrap counter of a ring on which nothing is
    /// outstanding, 0x8000 at first; later what the run before returned.
    position: u32,
    reserved: u32,
};

/// `LoadResult.position` of a run that left requests on the ring.
pub const load_position_lost: u32 = 0xffff_ffff;

pub const LoadResult = extern struct {
    requests: u64,
    /// Requests with a status other than 0 or, in verify mode, wrong data.
    errors: u64,
    elapsed_ns: u64,
    /// Notifications sent and received.
    kicks: u64,
    calls: u64,
    /// Latency, at depth 1 only (otherwise 0).
    p50_ns: u64,
    p99_ns: u64,
    mean_ns: u64,
    /// Packed: where to go on.
    position: u64,
};

comptime {
    std.debug.assert(@sizeOf(LoadConfig) == 136);
    std.debug.assert(@sizeOf(LoadResult) == 72);
}
