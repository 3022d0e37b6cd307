//! The native programs of the bench, in one: the core is compiled once.
//!
//!   bench-native disk|floor|ring ARGUMENTS

const std = @import("std");

const programs = .{
    .disk = @import("disk.zig").main,
    .floor = @import("floor.zig").main,
    .ring = @import("ring.zig").main,
};

pub fn main(init: std.process.Init.Minimal) !void {
    var arguments = init.args.iterate();
    _ = arguments.next();
    const name = arguments.next() orelse "";
    inline for (@typeInfo(@TypeOf(programs)).@"struct".fields) |field| {
        if (std.mem.eql(u8, name, field.name)) return @field(programs, field.name)(&arguments);
    }
    return error.NoSuchProgram;
}
