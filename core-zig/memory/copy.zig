//! Copies between guest memory and buffers. `@memcpy` is not used: without a
//! libc it is slower than the host's, and its check against aliasing would
//! end the process when a guest page is also the buffer. Each byte is read
//! once; the guest may change it meanwhile, and may take the page away (then
//! `fault.zig` lets the copy go on over zeros).

const std = @import("std");
const builtin = @import("builtin");

const V16 = @Vector(16, u8);

fn load(comptime T: type, from: [*]const u8) T {
    return @as(*align(1) const volatile T, @ptrCast(from)).*;
}

fn store(comptime T: type, to: [*]u8, value: T) void {
    @as(*align(1) volatile T, @ptrCast(to)).* = value;
}

/// First and last `T` of a range of 1 to 2 `T`s: they overlap in the middle.
fn ends(comptime T: type, to: [*]u8, from: [*]const u8, length: usize) void {
    const head = load(T, from);
    const tail = load(T, from + length - @sizeOf(T));
    store(T, to, head);
    store(T, to + length - @sizeOf(T), tail);
}

pub fn copy(to: [*]u8, from: [*]const u8, length: usize) void {
    if (length <= 64) return small(to, from, length);
    if (builtin.cpu.arch == .x86_64) {
        if (length >= string_least) return string(to, from, length);
    }
    blocks(to, from, length);
}

fn small(to: [*]u8, from: [*]const u8, length: usize) void {
    if (length > 32) {
        const second = load(V16, from + 16);
        const third = load(V16, from + length - 32);
        ends(V16, to, from, length);
        store(V16, to + 16, second);
        store(V16, to + length - 32, third);
    } else if (length >= 16) {
        ends(V16, to, from, length);
    } else if (length >= 8) {
        ends(u64, to, from, length);
    } else if (length >= 4) {
        ends(u32, to, from, length);
    } else if (length >= 2) {
        ends(u16, to, from, length);
    } else if (length == 1) {
        store(u8, to, load(u8, from));
    }
}

/// More than 64 bytes: blocks of 64, then the last 64 once more as a whole.
fn blocks(to: [*]u8, from: [*]const u8, length: usize) void {
    const tail = [4]V16{
        load(V16, from + length - 64),
        load(V16, from + length - 48),
        load(V16, from + length - 32),
        load(V16, from + length - 16),
    };
    var at: usize = 0;
    while (length - at > 64) : (at += 64) {
        const a = load(V16, from + at);
        const b = load(V16, from + at + 16);
        const c = load(V16, from + at + 32);
        const d = load(V16, from + at + 48);
        store(V16, to + at, a);
        store(V16, to + at + 16, b);
        store(V16, to + at + 32, c);
        store(V16, to + at + 48, d);
    }
    inline for (tail, 0..) |value, index| store(V16, to + length - 64 + 16 * index, value);
}

/// Bytes from which `rep movsb` beats the blocks on processors of the last
/// ten years (ERMS); older ones are slower by it but still correct.
const string_least = 1024;

fn string(to: [*]u8, from: [*]const u8, length: usize) void {
    asm volatile ("rep movsb"
        :
        : [to] "{rdi}" (to),
          [from] "{rsi}" (from),
          [length] "{rcx}" (length),
        : .{ .rdi = true, .rsi = true, .rcx = true, .memory = true });
}

test "every length from 0 to 300 and some long ones are copied exactly" {
    var source: [10_000]u8 = undefined;
    for (&source, 0..) |*byte, index| byte.* = @truncate(index *% 31 +% index / 256);
    var target: [10_000]u8 = undefined;
    var lengths: [306]usize = undefined;
    for (0..300) |length| lengths[length] = length;
    lengths[300..306].* = .{ 1023, 1024, 1025, 4096, 4097, 9900 };
    for (lengths) |length| {
        for ([_]usize{ 1, 16 }) |skew| {
            @memset(&target, 0xee);
            copy(target[skew..].ptr, source[3..].ptr, length);
            try std.testing.expectEqualSlices(u8, source[3..][0..length], target[skew..][0..length]);
            for (target[0..skew]) |byte| try std.testing.expectEqual(0xee, byte);
            try std.testing.expectEqual(0xee, target[skew + length]);
        }
    }
}
