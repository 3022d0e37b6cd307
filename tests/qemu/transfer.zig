//! Moves bytes over TCP between a guest and whoever is at the other end, in
//! large pieces, with a checksum: busybox's nc and md5sum take a minute for
//! what this does in seconds under TCG.
//!
//!   transfer receive PORT BYTES        takes one connection, after the line
//!                                      `transfer listening <port>` (0: a free one)
//!   transfer send ADDRESS PORT BYTES   connects
//!
//! The bytes sent are words of a counter, each mixed up (splitmix64), so that
//! no two blocks are the same. Ends with one line `transfer <mode> ok: <crc32c>`
//! over all bytes, in hexadecimal, or `transfer FAILED: ...` and exit code 1.

const std = @import("std");
const linux = std.os.linux;

const piece = 256 << 10;
var buffer: [piece]u8 align(8) = undefined;

pub fn main(init: std.process.Init.Minimal) void {
    const args = init.args.vector;
    if (args.len == 4 and std.mem.eql(u8, std.mem.span(args[1]), "receive")) {
        receive(number(u16, args[2]), number(u64, args[3]));
    } else if (args.len == 5 and std.mem.eql(u8, std.mem.span(args[1]), "send")) {
        send(address(args[2], number(u16, args[3])), number(u64, args[4]));
    } else fail("cannot understand", 0);
}

fn receive(port: u16, size: u64) noreturn {
    const listener = opened(linux.socket(linux.AF.INET, linux.SOCK.STREAM, 0));
    const any: linux.sockaddr.in = .{ .port = std.mem.nativeToBig(u16, port), .addr = 0 };
    need(linux.bind(listener, @ptrCast(&any), @sizeOf(@TypeOf(any))), "bind");
    need(linux.listen(listener, 1), "listen");
    var bound = any;
    var length: linux.socklen_t = @sizeOf(@TypeOf(bound));
    need(linux.getsockname(listener, @ptrCast(&bound), &length), "getsockname");
    print("transfer listening {d}\n", .{std.mem.bigToNative(u16, bound.port)});
    const socket = opened(linux.accept(listener, null, null));
    var sum: Crc32c = .{};
    var left = size;
    while (left > 0) {
        // Whole words, but for the end of all.
        const wanted: usize = @intCast(@min(left, piece));
        var filled: usize = 0;
        while (filled < wanted) {
            const result = linux.read(socket, buffer[filled..].ptr, wanted - filled);
            need(result, "read");
            if (result == 0) fail("too few bytes: left", left - filled);
            filled += result;
        }
        sum.add(buffer[0..filled]);
        left -= filled;
    }
    print("transfer receive ok: {x:0>8}\n", .{sum.value()});
    linux.exit_group(0);
}

fn send(to: linux.sockaddr.in, size: u64) noreturn {
    const socket = opened(linux.socket(linux.AF.INET, linux.SOCK.STREAM, 0));
    need(linux.connect(socket, &to, @sizeOf(@TypeOf(to))), "connect");
    var sum: Crc32c = .{};
    var counter: u64 = 0;
    var left = size;
    while (left > 0) {
        const words: *[piece / 8]u64 = @ptrCast(&buffer);
        for (words) |*word| {
            word.* = mixed(counter);
            counter += 1;
        }
        const length: usize = @intCast(@min(left, piece));
        sum.add(buffer[0..length]);
        var sent: usize = 0;
        while (sent < length) {
            const result = linux.write(socket, buffer[sent..].ptr, length - sent);
            need(result, "write");
            sent += result;
        }
        left -= length;
    }
    // The other end has all when it closes.
    need(linux.shutdown(socket, linux.SHUT.WR), "shutdown");
    var last: [1]u8 = undefined;
    need(linux.read(socket, &last, 1), "the end");
    print("transfer send ok: {x:0>8}\n", .{sum.value()});
    linux.exit_group(0);
}

fn mixed(counter: u64) u64 {
    var z = counter *% 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) *% 0xbf58476d1ce4e5b9;
    return z ^ (z >> 31);
}

/// By the processor's instruction, eight bytes at a time.
const Crc32c = struct {
    state: u64 = 0xffffffff,

    fn add(self: *Crc32c, bytes: []const u8) void {
        const words = bytes.len / 8;
        const list: [*]const u64 = @ptrCast(@alignCast(bytes.ptr));
        var state = self.state;
        for (list[0..words]) |word| {
            state = asm ("crc32q %[word], %[state]"
                : [state] "=r" (-> u64),
                : [word] "r" (word),
                  [in] "0" (state),
            );
        }
        for (bytes[words * 8 ..]) |byte| {
            state = asm ("crc32b %[byte], %[state]"
                : [state] "=r" (-> u64),
                : [byte] "r" (byte),
                  [in] "0" (state),
            );
        }
        self.state = state;
    }

    fn value(self: Crc32c) u32 {
        return ~@as(u32, @truncate(self.state));
    }
};

fn address(text: [*:0]const u8, port: u16) linux.sockaddr.in {
    var bytes: [4]u8 = undefined;
    var parts = std.mem.splitScalar(u8, std.mem.span(text), '.');
    for (&bytes) |*byte| {
        const part = parts.next() orelse fail("no address", 0);
        byte.* = std.fmt.parseInt(u8, part, 10) catch fail("no address", 0);
    }
    return .{ .port = std.mem.nativeToBig(u16, port), .addr = @bitCast(bytes) };
}

fn number(comptime Int: type, text: [*:0]const u8) Int {
    return std.fmt.parseInt(Int, std.mem.span(text), 10) catch fail("no number", 0);
}

fn opened(result: usize) i32 {
    need(result, "open a socket");
    return @intCast(result);
}

fn need(result: usize, what: []const u8) void {
    const errno = linux.errno(result);
    if (errno != .SUCCESS) fail(what, @intFromEnum(errno));
}

fn fail(what: []const u8, value: u64) noreturn {
    print("transfer FAILED: {s} ({d})\n", .{ what, value });
    linux.exit_group(1);
}

fn print(comptime format: []const u8, values: anytype) void {
    var line: [256]u8 = undefined;
    const text = std.fmt.bufPrint(&line, format, values) catch "transfer FAILED: line too long\n";
    _ = linux.write(1, text.ptr, text.len);
}
