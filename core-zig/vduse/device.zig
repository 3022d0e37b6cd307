//! A VDUSE device by its descriptor: the kernel's structures on one side, what
//! TypeScript reads and writes (`layout.zig`) on the other. What the kernel
//! says is checked by whoever uses it; here it only has to be whole.

const std = @import("std");
const abi = @import("abi.zig");
const sys = @import("../linux.zig");
const layout = @import("../layout.zig");
const shared = @import("layout.zig");
const mapping = @import("../memory/mapping.zig");

/// Zero-terminated; null for a name that the kernel could not have.
fn nameOf(bytes: []const u8) ?abi.Name {
    if (bytes.len == 0 or bytes.len >= abi.name_size) return null;
    for (bytes) |byte| if (byte == 0 or byte == '/') return null;
    var name: abi.Name = @splat(0);
    @memcpy(name[0..bytes.len], bytes);
    return name;
}

/// The state of a queue as SET_VRING_BASE and GET_VRING_BASE have it. Packed:
/// position (15 bits) and wrap counter of what is available, then of what is
/// used.
fn baseOf(state: abi.VqState, is_packed: bool) u32 {
    if (!is_packed) return state.split.avail_index;
    const ring = state.packed_ring;
    return half(ring.last_avail_idx, ring.last_avail_counter) | half(ring.last_used_idx, ring.last_used_counter) << 16;
}

fn half(index: u16, counter: u16) u32 {
    return (index & 0x7fff) | @as(u32, counter & 1) << 15;
}

fn stateOf(base: u32, is_packed: bool) abi.VqState {
    if (!is_packed) return .{ .split = .{ .avail_index = @truncate(base) } };
    return .{ .packed_ring = .{
        .last_avail_idx = @truncate(base & 0x7fff),
        .last_avail_counter = @truncate(base >> 15 & 1),
        .last_used_idx = @truncate(base >> 16 & 0x7fff),
        .last_used_counter = @truncate(base >> 31),
    } };
}

pub fn Device(comptime Kernel: type) type {
    return struct {
        /// Opens `/dev/vduse/NAME`, which one process at a time can: -EBUSY.
        pub fn open(bytes: []const u8) i32 {
            const name = nameOf(bytes) orelse return sys.fail(.INVAL);
            var buffer: [abi.name_size + 16]u8 = undefined;
            const path = std.fmt.bufPrintZ(&buffer, "/dev/vduse/{s}", .{std.mem.sliceTo(&name, 0)}) catch unreachable;
            return Kernel.open(path);
        }

        fn openControl() i32 {
            const fd = Kernel.open("/dev/vduse/control");
            if (fd < 0) return fd;
            const version = abi.api_version;
            const code = Kernel.ioctl(fd, abi.request.set_api_version, @intFromPtr(&version));
            if (code >= 0) return fd;
            Kernel.close(fd);
            // No errno of any other step.
            return sys.fail(.PROTO);
        }

        /// -EPROTO: the kernel does not have this version of the interface.
        pub fn create(bytes: []const u8, what: *const shared.VduseConfig, config: []const u8) i32 {
            if (config.len > abi.config_maximum) return sys.fail(.INVAL);
            const Argument = extern struct { head: abi.DevConfig, config: [abi.config_maximum]u8 };
            var argument: Argument = .{ .head = .{
                .name = nameOf(bytes) orelse return sys.fail(.INVAL),
                .device_id = what.device_id,
                .features = what.features,
                .vq_num = what.queue_count,
                .vq_align = what.alignment,
                .config_size = @intCast(config.len),
            }, .config = undefined };
            @memcpy(argument.config[0..config.len], config);
            const control = openControl();
            if (control < 0) return control;
            defer Kernel.close(control);
            return Kernel.ioctl(control, abi.request.create_dev, @intFromPtr(&argument));
        }

        /// -EBUSY while it is open or attached; -EINVAL when there is none.
        pub fn destroy(bytes: []const u8) i32 {
            const name = nameOf(bytes) orelse return sys.fail(.INVAL);
            const control = openControl();
            if (control < 0) return control;
            defer Kernel.close(control);
            return Kernel.ioctl(control, abi.request.destroy_dev, @intFromPtr(&name));
        }

        pub fn setUpQueue(fd: i32, index: u32, size: u32) i32 {
            if (size == 0 or size > 32768) return sys.fail(.INVAL);
            const argument: abi.VqConfig = .{ .index = index, .max_size = @intCast(size) };
            return Kernel.ioctl(fd, abi.request.vq_setup, @intFromPtr(&argument));
        }

        /// As the driver has set it up, and where it was told to begin; the
        /// kernel does not follow it from there.
        pub fn queueInfo(fd: i32, index: u32, is_packed: bool, out: *shared.VduseQueueInfo) i32 {
            var info: abi.VqInfo = .{ .index = index };
            const code = Kernel.ioctl(fd, abi.request.vq_get_info, @intFromPtr(&info));
            if (code < 0) return code;
            out.* = .{
                .descriptor = info.desc_addr,
                .driver = info.driver_addr,
                .device = info.device_addr,
                .size = info.num,
                .base = baseOf(info.state, is_packed),
                .is_ready = @intFromBool(info.ready != 0),
            };
            return 0;
        }

        pub fn setKick(fd: i32, index: u32, event: i32) i32 {
            const argument: abi.VqEventfd = .{ .index = index, .fd = event };
            return Kernel.ioctl(fd, abi.request.vq_setup_kickfd, @intFromPtr(&argument));
        }

        /// -EINVAL before the kernel has heard of DRIVER_OK.
        pub fn inject(fd: i32, index: u32) i32 {
            return Kernel.ioctl(fd, abi.request.vq_inject_irq, @intFromPtr(&index));
        }

        /// The same.
        pub fn injectConfig(fd: i32) i32 {
            return Kernel.ioctl(fd, abi.request.dev_inject_config_irq, 0);
        }

        pub fn setConfig(fd: i32, config: []const u8) i32 {
            if (config.len == 0 or config.len > abi.config_maximum) return sys.fail(.INVAL);
            const Argument = extern struct { head: abi.ConfigData, config: [abi.config_maximum]u8 };
            var argument: Argument = .{ .head = .{ .offset = 0, .length = @intCast(config.len) }, .config = undefined };
            @memcpy(argument.config[0..config.len], config);
            return Kernel.ioctl(fd, abi.request.dev_set_config, @intFromPtr(&argument));
        }

        pub fn features(fd: i32, out: *u64) i32 {
            return Kernel.ioctl(fd, abi.request.dev_get_features, @intFromPtr(out));
        }

        /// The kernel's next message; -EAGAIN when there is none, -EPERM when
        /// the device is broken, -EPROTO for half of one.
        pub fn receive(fd: i32, out: *shared.VduseRequest) i32 {
            var message: abi.DevRequest = .{};
            const count = Kernel.read(fd, std.mem.asBytes(&message));
            if (count < 0) return count;
            if (count != @sizeOf(abi.DevRequest)) return sys.fail(.PROTO);
            out.* = .{ .kind = message.kind, .id = message.request_id };
            switch (message.kind) {
                abi.get_vq_state => out.queue = message.payload.vq_state.index,
                abi.set_status => out.status = message.payload.status,
                abi.update_iotlb => {
                    out.start = message.payload.iova.start;
                    out.last = message.payload.iova.last;
                },
                else => {},
            }
            return 0;
        }

        /// -ENOENT when the kernel does not wait for it any more.
        pub fn respond(fd: i32, response: *const shared.VduseResponse) i32 {
            var message: abi.DevResponse = .{
                .request_id = response.id,
                .result = if (response.is_failed != 0) abi.result_failed else abi.result_ok,
            };
            if (response.has_state != 0) {
                message.payload = .{ .padding = @splat(0) };
                message.payload.vq_state.index = response.queue;
                message.payload.vq_state.state = stateOf(response.base, response.is_packed != 0);
            }
            const count = Kernel.write(fd, std.mem.asBytes(&message));
            if (count < 0) return count;
            return if (count == @sizeOf(abi.DevResponse)) 0 else sys.fail(.PROTO);
        }

        /// The first entry of the kernel's IOTLB that overlaps a range: its
        /// file, the caller's; -EINVAL when there is none.
        pub fn entry(fd: i32, start: u64, last: u64, out: *shared.VduseEntry) i32 {
            var found: abi.IotlbEntry = .{ .start = start, .last = last };
            const file = Kernel.ioctl(fd, abi.request.iotlb_get_fd, @intFromPtr(&found));
            if (file < 0) return file;
            Kernel.closeOnExec(file);
            out.* = .{
                .start = found.start,
                .last = found.last,
                .offset = found.offset,
                .access = found.perm,
                .is_domain = @intFromBool(Kernel.isDomain(file)),
            };
            return file;
        }

        /// A part of the kernel's own memory, in whole pages, as a plain
        /// mapping. -EINVAL for any other file.
        pub fn map(file: i32, offset: u64, size: u64, code: *i32) ?*mapping.Mapping {
            code.* = sys.fail(.INVAL);
            const page = mapping.systemPage();
            if (size == 0 or (offset | size) % page != 0) return null;
            if (!Kernel.isDomain(file)) return null;
            return Kernel.map(file, offset, size, code);
        }
    };
}
