//! The core's functions by the names under which they are exported, and a guest
//! memory for them: what the programs here have in common.

const std = @import("std");
pub const module = @import("core");
pub const layout = module.layout;
pub const linux = std.os.linux;

/// `function("ring_pop")` is what `vhost2_ring_pop` is in the library.
pub fn function(comptime name: []const u8) @TypeOf(module.manifest[comptime indexOf(name)][1]) {
    return module.manifest[comptime indexOf(name)][1];
}

fn indexOf(comptime name: []const u8) usize {
    @setEvalBranchQuota(10_000);
    inline for (module.manifest, 0..) |entry, index| {
        if (std.mem.eql(u8, entry[0], name)) return index;
    }
    @compileError("no such export: " ++ name);
}

/// Ends the program where a result of the core's is an errno.
pub fn must(value: i32, comptime action: []const u8) u32 {
    if (value >= 0) return @intCast(value);
    std.debug.print("Cannot {s}: errno {d}\n", .{ action, -value });
    std.process.exit(1);
}

/// A memory of `size` bytes at gpa 0, in `count` adjacent regions of one file.
/// Their boundaries are at multiples of 4 KiB; the rest is the first one's.
pub fn openMemory(fd: i32, size: u64, comptime maximum: u32, count: u32) u32 {
    const handle = must(function("memory_create")(0), "make a memory");
    var requests: [maximum]layout.RegionRequest = undefined;
    const share = size / count & ~@as(u64, 4095);
    const first = size - share * (count - 1);
    for (requests[0..count], 0..) |*request, i| {
        const start = if (i == 0) 0 else first + share * (i - 1);
        request.* = .{ .gpa = start, .uva = start, .size = if (i == 0) first else share, .mmap_offset = start, .address = 0, .fd = fd, .flags = 0 };
    }
    var result: layout.PrepareResult = undefined;
    _ = must(function("memory_prepare")(handle, layout.prepare_replace, &requests, count, &result), "map the memory");
    _ = must(function("memory_commit")(handle, null, 0), "publish the memory");
    return handle;
}

pub fn map(fd: i32, size: usize) [*]align(4096) u8 {
    const flags: linux.MAP = if (fd < 0) .{ .TYPE = .PRIVATE, .ANONYMOUS = true } else .{ .TYPE = .SHARED };
    const raw = linux.mmap(null, size, .{ .READ = true, .WRITE = true }, flags, fd, 0);
    if (linux.errno(raw) != .SUCCESS) {
        std.debug.print("Cannot map {d} bytes\n", .{size});
        std.process.exit(1);
    }
    return @ptrFromInt(raw);
}

pub fn now() u64 {
    var time: linux.timespec = undefined;
    _ = linux.clock_gettime(.MONOTONIC, &time);
    return @as(u64, @intCast(time.sec)) * 1_000_000_000 + @as(u64, @intCast(time.nsec));
}

/// What a system call returned, as the core returns it: an errno is negative.
pub fn resultOf(raw: usize) i32 {
    const errno = linux.errno(raw);
    return if (errno == .SUCCESS) @intCast(raw) else -@as(i32, @intCast(@intFromEnum(errno)));
}
