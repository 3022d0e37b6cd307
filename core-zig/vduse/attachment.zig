//! Attaching and detaching, from a thread of its own: the kernel answers when
//! its driver has probed (or let go of) the device, and the driver meanwhile
//! asks the device things that the caller's event loop has to answer.

const std = @import("std");
const sys = @import("../linux.zig");
const sync = @import("../sync.zig");
const shared = @import("layout.zig");
const netlink = @import("netlink.zig");
const descriptor = @import("../descriptor.zig");
const Handles = @import("../handles.zig").Handles;
const linux = sys.linux;

const Attachment = struct {
    name: [255]u8,
    name_length: u32,
    is_attached: bool,
    event: i32,
    thread: sync.Thread = undefined,
    is_done: std.atomic.Value(bool) = .init(false),
    outcome: shared.VduseAttachment = .{ .step = 0, .errno = 0 },

    fn run(argument: ?*anyopaque) callconv(.c) ?*anyopaque {
        const self: *Attachment = @ptrCast(@alignCast(argument.?));
        self.outcome = self.ask();
        self.is_done.store(true, .release);
        descriptor.signalOwn(self.event);
        return null;
    }

    fn ask(self: *Attachment) shared.VduseAttachment {
        const fd = sys.result(linux.socket(linux.AF.NETLINK, linux.SOCK.RAW | linux.SOCK.CLOEXEC, netlink.protocol));
        if (fd < 0) return .{ .step = shared.attachment_socket, .errno = @intCast(-fd) };
        defer sys.closeQuietly(fd);
        var buffer: [netlink.request_size]u8 align(4) = undefined;
        const family = exchange(fd, netlink.familyRequest(&buffer, 1), 1);
        if (family.errno.? != 0 or family.family == 0) {
            return .{ .step = shared.attachment_family, .errno = family.errno.? };
        }
        const name = self.name[0..self.name_length];
        const done = exchange(fd, netlink.deviceRequest(&buffer, 2, family.family, name, self.is_attached), 2);
        return .{ .step = if (done.errno.? == 0) 0 else shared.attachment_request, .errno = done.errno.? };
    }

    /// One request and its answers up to the ack.
    fn exchange(fd: i32, request: []const u8, sequence: u32) netlink.Answer {
        var answer: netlink.Answer = .{};
        // To the kernel, which handles it inside this call.
        const kernel: linux.sockaddr.nl = .{ .pid = 0, .groups = 0 };
        const sent = sys.result(linux.sendto(fd, request.ptr, request.len, 0, @ptrCast(&kernel), @sizeOf(linux.sockaddr.nl)));
        if (sent < 0) return .{ .errno = @intCast(-sent) };
        var buffer: [8192]u8 align(4) = undefined;
        while (answer.errno == null) {
            const count = sys.result(linux.recvfrom(fd, &buffer, buffer.len, 0, null, null));
            if (count == sys.fail(.INTR)) continue;
            if (count <= 0) return .{ .errno = if (count < 0) @intCast(-count) else @intFromEnum(sys.E.PROTO) };
            const read = netlink.read(buffer[0..@intCast(count)], sequence);
            if (read.family != 0) answer.family = read.family;
            answer.errno = read.errno;
        }
        return answer;
    }
};

var attachments: Handles(Attachment) = .{};

/// Begins to put the VDUSE device on the vDPA bus (`is_attached` 1) or to take
/// it off. Returns a handle, whose event is signalled when that is done.
pub fn start(name: [*]const u8, name_length: u32, is_attached: u32) callconv(.c) i32 {
    if (name_length == 0 or name_length > 255) return sys.fail(.INVAL);
    const self = sync.allocator.create(Attachment) catch return sys.fail(.NOMEM);
    self.* = .{ .name = undefined, .name_length = name_length, .is_attached = is_attached != 0, .event = descriptor.eventfdCreate() };
    @memcpy(self.name[0..name_length], name[0..name_length]);
    if (self.event < 0) return discard(self, self.event);
    const handle = attachments.insert(self) orelse return discard(self, sys.fail(.NFILE));
    self.thread = sync.Thread.spawn(Attachment.run, self) orelse {
        _ = attachments.remove(handle);
        return discard(self, sys.fail(.AGAIN));
    };
    return @intCast(handle);
}

fn discard(self: *Attachment, code: i32) i32 {
    if (self.event >= 0) sys.closeQuietly(self.event);
    sync.allocator.destroy(self);
    return code;
}

/// The eventfd, which ends with the handle.
pub fn event(handle: u32) callconv(.c) i32 {
    const self = attachments.get(handle) orelse return sys.fail(.BADF);
    return self.event;
}

/// How it went, and the end of the handle; -EAGAIN while it goes on.
pub fn result(handle: u32, out: *shared.VduseAttachment) callconv(.c) i32 {
    const found = attachments.get(handle) orelse return sys.fail(.BADF);
    if (!found.is_done.load(.acquire)) return sys.fail(.AGAIN);
    const self = attachments.remove(handle) orelse return sys.fail(.BADF);
    self.thread.join();
    out.* = self.outcome;
    return discard(self, 0);
}

test "a kernel that knows no such device says so, and nothing is left" {
    const handle = start("vhost2-no-such-device", 21, 0);
    try std.testing.expect(handle > 0);
    var watched = [1]linux.pollfd{.{ .fd = event(@intCast(handle)), .events = linux.POLL.IN, .revents = 0 }};
    _ = linux.poll(&watched, 1, 10_000);
    var outcome: shared.VduseAttachment = .{ .step = 0, .errno = 0 };
    try std.testing.expectEqual(0, result(@intCast(handle), &outcome));
    try std.testing.expect(outcome.step != 0 and outcome.errno != 0);
    try std.testing.expectEqual(sys.fail(.BADF), result(@intCast(handle), &outcome));
    try std.testing.expectEqual(sys.fail(.INVAL), start("", 0, 1));
}

test {
    _ = netlink;
}
