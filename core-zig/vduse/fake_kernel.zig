//! A kernel with one VDUSE device, for tests: it answers as Linux does, and at
//! any step it can be told to fail.

const std = @import("std");
const abi = @import("abi.zig");
const sys = @import("../linux.zig");
const mapping = @import("../memory/mapping.zig");

const control = 100;
pub const device = 101;
pub const domain = 102;
pub const memfd = 103;

pub const Fake = struct {
    /// The request that fails, and how.
    pub var failing: u32 = 0;
    pub var error_code: i32 = 0;
    pub var open_count: i32 = 0;
    pub var created: ?abi.DevConfig = null;
    pub var config: [16]u8 = undefined;
    pub var destroyed: ?abi.Name = null;
    pub var queues: [2]abi.VqConfig = undefined;
    pub var info: abi.VqInfo = .{ .index = 0 };
    pub var kick: abi.VqEventfd = .{ .index = 0, .fd = 0 };
    pub var injected: u32 = 0;
    pub var message: abi.DevRequest = .{};
    /// Bytes that a read or a write handles.
    pub var moved: usize = @sizeOf(abi.DevRequest);
    pub var response: abi.DevResponse = undefined;
    pub var entry: abi.IotlbEntry = .{ .start = 0, .last = 0 };
    pub var entry_file: i32 = domain;
    pub var mapped_offset: u64 = 0;

    pub fn start() void {
        failing = 0;
        error_code = 0;
        open_count = 0;
        created = null;
        destroyed = null;
        moved = @sizeOf(abi.DevRequest);
        entry_file = domain;
    }

    pub fn open(path: [*:0]const u8) i32 {
        const name = std.mem.span(path);
        if (failing == 1) return error_code;
        const is_control = std.mem.eql(u8, name, "/dev/vduse/control");
        if (!is_control and !std.mem.eql(u8, name, "/dev/vduse/disk0")) return sys.fail(.NOENT);
        open_count += 1;
        return if (is_control) control else device;
    }

    pub fn close(_: i32) void {
        open_count -= 1;
    }

    fn at(comptime T: type, argument: usize) *T {
        return @ptrFromInt(argument);
    }

    pub fn ioctl(fd: i32, request: u32, argument: usize) i32 {
        if (request == failing) return error_code;
        if (fd == control) switch (request) {
            abi.request.set_api_version => return if (at(u64, argument).* == 0) 0 else sys.fail(.INVAL),
            abi.request.create_dev => {
                created = at(abi.DevConfig, argument).*;
                const bytes: [*]const u8 = @ptrFromInt(argument + @sizeOf(abi.DevConfig));
                @memcpy(config[0..created.?.config_size], bytes);
                return 0;
            },
            abi.request.destroy_dev => {
                destroyed = at(abi.Name, argument).*;
                return 0;
            },
            else => return sys.fail(.INVAL),
        };
        if (fd != device) return sys.fail(.NOTTY);
        switch (request) {
            abi.request.vq_setup => queues[at(abi.VqConfig, argument).index] = at(abi.VqConfig, argument).*,
            abi.request.vq_get_info => {
                if (at(abi.VqInfo, argument).index > 1) return sys.fail(.INVAL);
                at(abi.VqInfo, argument).* = info;
            },
            abi.request.vq_setup_kickfd => kick = at(abi.VqEventfd, argument).*,
            abi.request.vq_inject_irq => injected = at(u32, argument).*,
            abi.request.dev_inject_config_irq => injected = 0xffff,
            abi.request.dev_get_features => at(u64, argument).* = 1 << 33,
            abi.request.dev_set_config => {
                const data = at(abi.ConfigData, argument);
                const bytes: [*]const u8 = @ptrFromInt(argument + @sizeOf(abi.ConfigData));
                @memcpy(config[data.offset..][0..data.length], bytes);
            },
            abi.request.iotlb_get_fd => {
                const asked = at(abi.IotlbEntry, argument);
                if (asked.start > entry.last or asked.last < entry.start) return sys.fail(.INVAL);
                asked.* = entry;
                return entry_file;
            },
            else => return sys.fail(.NOTTY),
        }
        return 0;
    }

    pub fn read(_: i32, buffer: []u8) i32 {
        if (failing == 2) return error_code;
        @memcpy(buffer[0..@min(moved, buffer.len)], std.mem.asBytes(&message)[0..@min(moved, buffer.len)]);
        return @intCast(moved);
    }

    pub fn write(_: i32, buffer: []const u8) i32 {
        if (failing == 3) return error_code;
        @memcpy(std.mem.asBytes(&response), buffer);
        return @intCast(moved);
    }

    pub fn closeOnExec(_: i32) void {}

    pub fn isDomain(fd: i32) bool {
        return fd == domain;
    }

    pub fn map(_: i32, offset: u64, size: u64, code: *i32) ?*mapping.Mapping {
        mapped_offset = offset;
        return mapping.mapAnonymous(size, code) catch null;
    }
};
