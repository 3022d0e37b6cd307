//! A TAP device: frames with their `virtio_net_hdr` from and to the kernel,
//! one system call each, which is what the kernel offers.

const std = @import("std");
const layout = @import("../layout.zig");
const sys = @import("../linux.zig");
const headers = @import("header.zig");
const linux = sys.linux;

const Frame = layout.Frame;
const Header = headers.Header;
const header_size = layout.net_header_size;
const frame_alignment = 16;

// <linux/if_tun.h>
const TUNSETIFF = 0x400454ca;
const TUNSETOFFLOAD = 0x400454d0;
const TUNSETVNETHDRSZ = 0x400454d8;
const TUNSETQUEUE = 0x400454d9;
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_ATTACH_QUEUE: u16 = 0x0200;
const IFF_DETACH_QUEUE: u16 = 0x0400;
const TUN_F_CSUM = 0x01;
const TUN_F_TSO4 = 0x02;
const TUN_F_TSO6 = 0x04;
const TUN_F_TSO_ECN = 0x08;
const TUN_F_UFO = 0x10;
const TUN_F_USO4 = 0x20;
const TUN_F_USO6 = 0x40;

/// struct ifreq with ifr_flags.
const InterfaceRequest = extern struct {
    name: [16]u8 = @splat(0),
    flags: u16 = 0,
    rest: [22]u8 = @splat(0),
};

/// Opens one queue of the interface `name` (`%d` in it is a number of the
/// kernel's), making it where there is none. Its name is written to
/// `name_out` (16 bytes). The kernel may leave to us what `offloads` names.
/// Returns the descriptor, non-blocking.
pub fn open(name: [*]const u8, name_length: u32, offloads: u32, is_multi_queue: u32, name_out: [*]u8) callconv(.c) i32 {
    var request: InterfaceRequest = .{ .flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR };
    if (name_length >= request.name.len) return sys.fail(.NAMETOOLONG);
    @memcpy(request.name[0..name_length], name[0..name_length]);
    if (is_multi_queue != 0) request.flags |= IFF_MULTI_QUEUE;
    const fd = sys.result(linux.open("/dev/net/tun", .{ .ACCMODE = .RDWR, .NONBLOCK = true, .CLOEXEC = true }, 0));
    if (fd < 0) return fd;
    const result = configure(fd, &request, offloads);
    if (result < 0) {
        sys.closeQuietly(fd);
        return result;
    }
    @memcpy(name_out[0..request.name.len], &request.name);
    return fd;
}

fn configure(fd: i32, request: *InterfaceRequest, offloads: u32) i32 {
    const made = sys.result(linux.ioctl(fd, TUNSETIFF, @intFromPtr(request)));
    if (made < 0) return made;
    const size: i32 = header_size;
    const sized = sys.result(linux.ioctl(fd, TUNSETVNETHDRSZ, @intFromPtr(&size)));
    if (sized < 0) return sized;
    return setOffloads(fd, offloads);
}

/// What the kernel may leave undone in the frames that it gives us.
pub fn setOffloads(fd: i32, offloads: u32) callconv(.c) i32 {
    var mask: usize = 0;
    if (offloads & layout.net_offload_checksum != 0) {
        mask |= TUN_F_CSUM;
        if (offloads & layout.net_offload_tso4 != 0) mask |= TUN_F_TSO4;
        if (offloads & layout.net_offload_tso6 != 0) mask |= TUN_F_TSO6;
        if (offloads & layout.net_offload_ecn != 0) mask |= TUN_F_TSO_ECN;
        if (offloads & layout.net_offload_ufo != 0) mask |= TUN_F_UFO;
        if (offloads & layout.net_offload_uso != 0) mask |= TUN_F_USO4 | TUN_F_USO6;
    }
    return sys.result(linux.ioctl(fd, TUNSETOFFLOAD, mask));
}

/// Whether the kernel sends frames to this queue of an interface that has
/// several. What is so already stays so.
pub fn attachQueue(fd: i32, is_attached: u32) callconv(.c) i32 {
    var request: InterfaceRequest = .{ .flags = if (is_attached != 0) IFF_ATTACH_QUEUE else IFF_DETACH_QUEUE };
    const result = sys.result(linux.ioctl(fd, TUNSETQUEUE, @intFromPtr(&request)));
    return if (result == sys.fail(.INVAL)) 0 else result;
}

/// Reads up to `max` frames, as many as there are and fit. Returns how many.
pub fn read(fd: i32, frames: [*]Frame, max: u32, buffer: [*]u8, buffer_size: u32) callconv(.c) i32 {
    var position: u32 = 0;
    var count: u32 = 0;
    while (count < max) {
        const start = @as(u64, position) + frame_alignment;
        if (start + layout.net_frame_maximum > buffer_size) break;
        const frame = buffer + @as(usize, @intCast(start));
        const raw = linux.read(fd, frame - header_size, header_size + layout.net_frame_maximum);
        switch (linux.errno(raw)) {
            .SUCCESS => {},
            .INTR => continue,
            .AGAIN => break,
            // The interface is down, or was removed.
            else => return if (count > 0) @intCast(count) else sys.result(raw),
        }
        if (raw < header_size + headers.frame_minimum) continue;
        const length: u32 = @intCast(raw - header_size);
        frames[count] = .{ .offset = @intCast(start), .length = length };
        count += 1;
        position = std.mem.alignForward(u32, @as(u32, @intCast(start)) + length, frame_alignment);
    }
    return @intCast(count);
}

/// Writes frames `first` to `first + count`; returns how many are done with,
/// and in `dropped_out` how many of those the kernel did not take. Fewer than
/// `count` when the interface has no room now.
pub fn write(fd: i32, frames: [*]const Frame, first: u32, count: u32, buffer: [*]u8, buffer_size: u32, dropped_out: *u32) callconv(.c) i32 {
    dropped_out.* = 0;
    var done: u32 = 0;
    while (done < count) {
        const frame = frames[first + done];
        if (frame.offset < header_size or frame.offset > buffer_size or
            frame.length > buffer_size - frame.offset) return sys.fail(.INVAL);
        const start = buffer + (frame.offset - header_size);
        // Its last field means nothing in this direction.
        var header: Header = .load(start[0..header_size]);
        if (header.num_buffers != 0) {
            header.num_buffers = 0;
            header.store(start[0..header_size]);
        }
        const raw = linux.write(fd, start, header_size + frame.length);
        switch (linux.errno(raw)) {
            .SUCCESS => {},
            .INTR => continue,
            .AGAIN => break,
            .BADF, .BADFD => return sys.result(raw),
            // Down, or a frame that it does not like.
            else => dropped_out.* += 1,
        }
        done += 1;
    }
    return @intCast(done);
}
