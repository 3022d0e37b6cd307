//! The few generic netlink messages that put a VDUSE device on the kernel's
//! vDPA bus and take it off (include/uapi/linux/{netlink,genetlink,vdpa}.h;
//! what `vdpa dev add NAME mgmtdev vduse` sends). Messages are in the byte
//! order of the machine, everything in them at multiples of 4 bytes.

const std = @import("std");

pub const protocol = 16; // NETLINK_GENERIC
const message_error = 2; // NLMSG_ERROR: also an ack, with error 0
const flag_request = 1;
const flag_ack = 4;

/// The family that knows families.
const controller = 16;
const controller_get_family = 3;
const controller_family_id = 1;
const controller_family_name = 2;

const device_new = 3;
const device_delete = 4;
const management_device_name = 2;
const device_name = 4;

const Header = extern struct { length: u32, kind: u16, flags: u16, sequence: u32, port: u32 = 0 };
const Generic = extern struct { command: u8, version: u8 = 1, reserved: u16 = 0 };
const Attribute = extern struct { length: u16, kind: u16 };

/// Room for the longest request: a name has at most 255 bytes.
pub const request_size = 512;

const Writer = struct {
    buffer: *align(4) [request_size]u8,
    length: usize = 0,

    fn put(self: *Writer, value: anytype) void {
        const bytes = std.mem.asBytes(&value);
        @memcpy(self.buffer[self.length..][0..bytes.len], bytes);
        self.length += bytes.len;
    }

    fn begin(self: *Writer, kind: u16, sequence: u32, command: u8) void {
        self.put(Header{ .length = 0, .kind = kind, .flags = flag_request | flag_ack, .sequence = sequence });
        self.put(Generic{ .command = command });
    }

    fn text(self: *Writer, kind: u16, value: []const u8) void {
        self.put(Attribute{ .length = @intCast(@sizeOf(Attribute) + value.len + 1), .kind = kind });
        @memcpy(self.buffer[self.length..][0..value.len], value);
        const end = std.mem.alignForward(usize, self.length + value.len + 1, 4);
        @memset(self.buffer[self.length + value.len .. end], 0);
        self.length = end;
    }

    fn finish(self: *Writer) []const u8 {
        const length: u32 = @intCast(self.length);
        @memcpy(self.buffer[0..4], std.mem.asBytes(&length));
        return self.buffer[0..self.length];
    }
};

/// Asks for the number of the family "vdpa".
pub fn familyRequest(buffer: *align(4) [request_size]u8, sequence: u32) []const u8 {
    var writer: Writer = .{ .buffer = buffer };
    writer.begin(controller, sequence, controller_get_family);
    writer.text(controller_family_name, "vdpa");
    return writer.finish();
}

/// Attaches the VDUSE device `name`, at most 255 bytes, or takes it off.
pub fn deviceRequest(buffer: *align(4) [request_size]u8, sequence: u32, family: u16, name: []const u8, is_attached: bool) []const u8 {
    var writer: Writer = .{ .buffer = buffer };
    writer.begin(family, sequence, if (is_attached) device_new else device_delete);
    if (is_attached) writer.text(management_device_name, "vduse");
    writer.text(device_name, name);
    return writer.finish();
}

/// What an answer says of the request `sequence`.
pub const Answer = struct {
    /// The number of the family; 0 where it is not in there.
    family: u16 = 0,
    /// The ack's errno: 0 done, null no ack yet.
    errno: ?u32 = null,
};

/// Reads the messages of one datagram; what is no answer is passed over.
pub fn read(datagram: []align(4) const u8, sequence: u32) Answer {
    var answer: Answer = .{};
    var at: usize = 0;
    while (datagram.len - at >= @sizeOf(Header)) {
        const header: *const Header = @ptrCast(@alignCast(datagram[at..].ptr));
        if (header.length < @sizeOf(Header) or header.length > datagram.len - at) break;
        const body = datagram[at + @sizeOf(Header) .. at + header.length];
        if (header.sequence == sequence) {
            if (header.kind == message_error) {
                if (body.len >= 4) answer.errno = @abs(std.mem.readInt(i32, body[0..4], @import("builtin").cpu.arch.endian()));
            } else if (header.kind == controller) {
                answer.family = familyOf(body) orelse answer.family;
            }
        }
        at = @min(datagram.len, std.mem.alignForward(usize, at + header.length, 4));
    }
    return answer;
}

fn familyOf(body: []const u8) ?u16 {
    var at: usize = @sizeOf(Generic);
    while (at < body.len and body.len - at >= @sizeOf(Attribute)) {
        var attribute: Attribute = undefined;
        @memcpy(std.mem.asBytes(&attribute), body[at..][0..@sizeOf(Attribute)]);
        if (attribute.length < @sizeOf(Attribute) or attribute.length > body.len - at) return null;
        const value = body[at + @sizeOf(Attribute) .. at + attribute.length];
        if (attribute.kind == controller_family_id and value.len >= 2) {
            return std.mem.readInt(u16, value[0..2], @import("builtin").cpu.arch.endian());
        }
        at = std.mem.alignForward(usize, at + attribute.length, 4);
    }
    return null;
}

const testing = std.testing;

test "requests are what the kernel reads" {
    var buffer: [request_size]u8 align(4) = undefined;
    const family = familyRequest(&buffer, 7);
    try testing.expectEqualSlices(u8, &(.{ 32, 0, 0, 0, 16, 0, 5, 0, 7, 0, 0, 0, 0, 0, 0, 0 } ++ .{ 3, 1, 0, 0, 9, 0, 2, 0 } ++ "vdpa\x00\x00\x00\x00".*), family);
    const add = deviceRequest(&buffer, 8, 0x1d, "disk0", true);
    try testing.expectEqualSlices(u8, &(.{ 44, 0, 0, 0, 0x1d, 0, 5, 0, 8, 0, 0, 0, 0, 0, 0, 0, 3, 1, 0, 0 } ++
        .{ 10, 0, 2, 0 } ++ "vduse\x00\x00\x00".* ++ .{ 10, 0, 4, 0 } ++ "disk0\x00\x00\x00".*), add);
    const longest: [255]u8 = @splat('x');
    try testing.expectEqual(20 + 12 + 260, deviceRequest(&buffer, 9, 1, &longest, true).len);
    try testing.expectEqual(20 + 260, deviceRequest(&buffer, 9, 1, &longest, false).len);
}

test "answers that are short, cut off or somebody else's are passed over" {
    var good: [80]u8 align(4) = @splat(0);
    const reply = .{ 32, 0, 0, 0, 16, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0 } ++ .{ 6, 0, 1, 0, 0x1d, 0, 0, 0 } ++ .{ 4, 0, 9, 0 };
    const ack = .{ 20, 0, 0, 0, 2, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0 } ++ .{ 0xef, 0xff, 0xff, 0xff };
    const whole: [52]u8 = reply ++ ack;
    @memcpy(good[0..whole.len], &whole);
    const answer = read(good[0..52], 7);
    try testing.expectEqual(0x1d, answer.family);
    try testing.expectEqual(17, answer.errno);
    try testing.expectEqual(Answer{}, read(good[0..52], 6));
    // Any prefix, any length field: no answer out of nothing, and no crash.
    for (0..53) |length| _ = read(good[0..length], 7);
    for ([_]u8{ 0, 3, 15, 255 }) |length| {
        for ([_]usize{ 0, 20, 32 }) |place| {
            var bad: [80]u8 align(4) = good;
            bad[place] = length;
            const read_so = read(bad[0..52], 7);
            try testing.expect(read_so.errno == null or read_so.errno == 17);
        }
    }
}
