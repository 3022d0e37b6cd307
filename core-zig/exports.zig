//! The core's whole surface: the only file with exports. Each function takes
//! fixed-width integers, f64 and pointers, and returns a result (>= 0) or a
//! negative errno. `manifest` names every one of them with its parameters;
//! `abi.zig` makes `ffi/abi.gen.ts` of it.

const std = @import("std");
const builtin = @import("builtin");
const abi = @import("abi.zig");
/// Public for programs that link the core instead of loading it (bench/native).
pub const layout = @import("layout.zig");
pub const copyBytes = memory.copyBytes;
const process = @import("process.zig");
const descriptor = @import("descriptor.zig");
const socket = @import("socket.zig");
const poll = @import("poll.zig");
const memory = @import("memory/memory.zig");
const iova = @import("memory/iova.zig");
const postcopy = @import("memory/postcopy.zig");
const userfault = @import("memory/userfault.zig");
const dirty_log = @import("memory/dirty_log.zig");
const ring = @import("ring/ring.zig");
const inflight = @import("ring/inflight.zig");
const file = @import("file/engine.zig");
const file_traits = @import("file/traits.zig");
const driver = @import("ring/load.zig");
const queues_driver = @import("ring/load_queues.zig");
const net = @import("net/burst.zig");
const ahead = @import("net/ahead.zig");
const tap = @import("net/tap.zig");
const vfio = @import("vfio/vfio.zig");
const vduse = @import("vduse/vduse.zig");
const attachment = @import("vduse/attachment.zig");

pub const panic = process.panic;

fn core_hash() callconv(.c) u32 {
    return comptime abi.hash(manifest);
}

/// Name, function, parameter names. A parameter's width is the function's.
pub const manifest = .{
    // The process: call `core_init` once per isolate, it counts nothing.
    .{ "core_hash", core_hash, "" },
    .{ "core_init", process.init, "" },
    .{ "page_offset", process.pageOffset, "buffer" },
    .{ "thread_id", process.threadId, "" },
    .{ "thread_is_alive", process.threadIsAlive, "thread" },

    // Descriptors
    .{ "descriptor_close", descriptor.close, "fd" },
    .{ "descriptor_kind", descriptor.kind, "fd" },
    .{ "descriptor_duplicate", descriptor.duplicate, "fd" },
    .{ "descriptor_inode", descriptor.inode, "fd" },
    .{ "descriptor_replace", descriptor.replace, "fd target" },
    .{ "eventfd_create", descriptor.eventfdCreate, "" },
    .{ "eventfd_signal", descriptor.eventfdSignal, "fd" },
    .{ "eventfd_take", descriptor.eventfdTake, "fd" },
    .{ "memfd_create", descriptor.memfdCreate, "size" },
    .{ "memfd_resize", descriptor.memfdResize, "fd size" },
    .{ "memfd_seal", descriptor.memfdSeal, "fd" },
    .{ "file_open", descriptor.fileOpen, "path path_length flags" },
    .{ "file_size", descriptor.fileSize, "fd" },
    .{ "file_traits", file_traits.inspect, "fd traits_out" },

    // Unix sockets
    .{ "socket_listen", socket.listen, "path path_length mode" },
    .{ "socket_unlink", socket.unlink, "path path_length" },
    .{ "socket_connect", socket.connect, "path path_length" },
    .{ "socket_accept", socket.accept, "fd" },
    .{ "socket_pair", socket.pair, "fds_out" },
    .{ "socket_send", socket.send, "fd data length fds fd_count" },
    .{ "socket_receive", socket.receive, "fd data capacity fds_out fd_capacity info_out" },

    // Wake-ups
    .{ "poll_create", poll.create, "wake_fd_out" },
    .{ "poll_add", poll.add, "poll fd token writable" },
    .{ "poll_remove", poll.remove, "poll fd" },
    .{ "poll_wait", poll.wait, "poll timeout_us events_out capacity" },
    .{ "poll_quiet", poll.quiet, "poll is_quiet" },
    .{ "poll_close", poll.close, "poll" },

    // Guest memory
    .{ "memory_create", memory.create, "poll" },
    .{ "memory_prepare", memory.prepare, "memory kind requests count result_out" },
    .{ "memory_commit", memory.commit, "memory retired_views_out capacity" },
    .{ "memory_abort", memory.abort, "memory" },
    .{ "memory_regions", memory.regions, "memory regions_out capacity" },
    .{ "memory_release", memory.release, "memory view_first is_detached" },
    .{ "memory_revoke", memory.revoke, "memory" },
    .{ "memory_state", memory.state, "memory" },
    .{ "memory_translate", memory.translate, "memory space address length translation_out" },
    .{ "memory_copy", memory.copy, "memory copies count buffer buffer_size" },
    .{ "memory_destroy", memory.destroy, "memory" },
    .{ "iotlb_update", iova.update, "memory iova size target access" },
    .{ "iotlb_invalidate", iova.invalidate, "memory iova size" },
    .{ "iotlb_clear", iova.clear, "memory target_space" },
    .{ "iotlb_translate", iova.translate, "memory iova length access translation_out" },
    .{ "map_anonymous", memory.mapAnonymous, "size address_out" },
    .{ "map_shared", memory.mapShared, "fd size address_out" },
    .{ "map_pages", memory.mapPages, "fd file_offset size address_out" },
    .{ "map_over", memory.mapOver, "address size fd file_offset" },
    .{ "unmap", memory.unmap, "address size" },

    // Postcopy: the back-end's side, then the front-end's
    .{ "userfault_open", userfault.open, "" },
    .{ "postcopy_listen", postcopy.listen, "memory fd hangup_fd timeout_ms" },
    .{ "postcopy_end", postcopy.end, "memory is_gone" },
    .{ "userfault_read", userfault.read, "fd addresses_out capacity" },
    .{ "userfault_copy", userfault.copy, "fd address source size" },
    .{ "userfault_wake", userfault.wake, "fd address size" },

    // The dirty log of a guest memory
    .{ "log_set_base", dirty_log.setBase, "memory fd size offset result_out" },
    .{ "log_set_event", dirty_log.setEvent, "memory fd" },
    .{ "log_set_logging", dirty_log.setLogging, "memory is_on" },
    .{ "log_set_ring", dirty_log.setRing, "memory queue is_logged address" },
    .{ "log_mark", dirty_log.mark, "memory gpa length" },
    .{ "log_mark_ring", dirty_log.markRing, "memory queue offset length" },

    // Virtqueues, split and packed, device side
    .{ "ring_create", ring.create, "memory config reason_out" },
    .{ "ring_pop", ring.pop, "ring batch batch_words max" },
    .{ "ring_push", ring.push, "ring completions count" },
    .{ "ring_arm", ring.arm, "ring" },
    .{ "ring_disarm", ring.disarm, "ring" },
    .{ "ring_misses", ring.misses, "ring misses_out capacity" },
    .{ "ring_state", ring.state, "ring state_out" },
    .{ "ring_destroy", ring.destroy, "ring" },

    // Inflight regions: what a ring of a crashed process had taken
    .{ "inflight_stride", inflight.inflightStride, "queue_size is_packed" },
    .{ "inflight_open", inflight.open, "memory fd size offset queue_count queue_size is_packed" },
    .{ "inflight_close", inflight.close, "inflight" },

    // File I/O between files and guest memory
    .{ "io_create", file.create, "entries use_threads" },
    .{ "io_event", file.event, "io" },
    .{ "io_kind", file.kind, "io" },
    .{ "io_submit", file.submit, "io requests count segments segment_count" },
    .{ "io_reap", file.reap, "io completions_out capacity" },
    .{ "io_destroy", file.destroy, "io" },

    // Bursts of network frames, between a caller's buffer and rings or a TAP
    .{ "net_receive", net.receive, "ring scratch scratch_words frames max buffer buffer_size flags counts" },
    .{ "net_send", net.send, "ring scratch scratch_words frames first count buffer buffer_size flags counts" },
    .{ "net_look_ahead", ahead.lookAhead, "ring scratch scratch_words" },
    .{ "tap_open", tap.open, "name name_length offloads is_multi_queue name_out" },
    .{ "tap_set_offloads", tap.setOffloads, "fd offloads" },
    .{ "tap_attach_queue", tap.attachQueue, "fd is_attached" },
    .{ "tap_read", tap.read, "fd frames max buffer buffer_size" },
    .{ "tap_write", tap.write, "fd frames first count buffer buffer_size dropped_out" },

    // PCI devices by VFIO
    .{ "vfio_group_open", vfio.groupOpen, "number failure_out" },
    .{ "vfio_group_info", vfio.groupInfo, "group info_out ranges_out capacity" },
    .{ "vfio_group_close", vfio.groupClose, "group" },
    .{ "vfio_dma_map", vfio.dmaMap, "group address size iova" },
    .{ "vfio_dma_unmap", vfio.dmaUnmap, "group size iova" },
    .{ "vfio_device_open", vfio.deviceOpen, "group name name_length failure_out" },
    .{ "vfio_device_info", vfio.deviceInfo, "device info_out" },
    .{ "vfio_map_registers", vfio.mapRegisters, "device bar limit" },
    .{ "vfio_map_memory", vfio.mapMemory, "device bar offset size address_out" },
    .{ "vfio_bar_file", vfio.barFile, "device bar offset size offset_out" },
    .{ "vfio_read", vfio.read, "device region offset width" },
    .{ "vfio_write", vfio.write, "device region offset width value" },
    .{ "vfio_interrupts", vfio.interrupts, "device kind first fds count" },
    .{ "vfio_unmask", vfio.unmask, "device" },
    .{ "vfio_reset", vfio.reset, "device" },
    .{ "vfio_device_close", vfio.deviceClose, "device" },

    // Devices of the kernel's own drivers, by VDUSE
    .{ "vduse_open", vduse.open, "name name_length" },
    .{ "vduse_create", vduse.create, "name name_length what config config_size" },
    .{ "vduse_destroy", vduse.destroy, "name name_length" },
    .{ "vduse_queue_set_up", vduse.queueSetUp, "fd index size" },
    .{ "vduse_queue_info", vduse.queueInfo, "fd index is_packed info_out" },
    .{ "vduse_queue_kick", vduse.queueKick, "fd index event" },
    .{ "vduse_queue_inject", vduse.queueInject, "fd index" },
    .{ "vduse_config_inject", vduse.configInject, "fd" },
    .{ "vduse_config_set", vduse.configSet, "fd config config_size" },
    .{ "vduse_features", vduse.features, "fd features_out" },
    .{ "vduse_receive", vduse.receive, "fd request_out" },
    .{ "vduse_respond", vduse.respond, "fd response" },
    .{ "vduse_entry", vduse.entry, "fd start last entry_out" },
    .{ "vduse_map", vduse.map, "file offset size address_out" },
    .{ "vduse_attachment_start", attachment.start, "name name_length is_attached" },
    .{ "vduse_attachment_event", attachment.event, "attachment" },
    .{ "vduse_attachment_result", attachment.result, "attachment result_out" },

    // The other side of the ring, for load generation (frontend/)
    .{ "load_run", driver.run, "config result_out" },
    .{ "load_run_queues", queues_driver.run, "configs count results_out" },
};

comptime {
    if (!builtin.is_test) {
        for (manifest) |entry| {
            const function = entry[1];
            @export(&function, .{ .name = "vhost2_" ++ entry[0] });
        }
    }
}

test {
    _ = abi;
    _ = @import("handles.zig");
    _ = @import("sync.zig");
    _ = @import("objects.zig");
    _ = @import("linux.zig");
    _ = process;
    _ = descriptor;
    _ = @import("untrusted_event.zig");
    _ = socket;
    _ = poll;
    _ = memory;
    _ = iova;
    _ = @import("shared_lock.zig");
    _ = ring;
    _ = file;
    _ = driver;
    _ = net;
    _ = ahead;
    _ = tap;
    _ = vfio;
    _ = vduse;
    _ = attachment;
}
