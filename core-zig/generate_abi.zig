//! Prints `ffi/abi.gen.ts`.

const std = @import("std");
const abi = @import("abi.zig");
const exports = @import("exports.zig");

pub fn main() void {
    var rest: []const u8 = comptime abi.text(exports.manifest);
    while (rest.len > 0) {
        const written = std.os.linux.write(1, rest.ptr, rest.len);
        if (std.os.linux.errno(written) != .SUCCESS) std.process.exit(1);
        rest = rest[written..];
    }
}
