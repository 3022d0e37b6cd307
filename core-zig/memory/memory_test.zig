//! What becomes of a front-end's table, over real memfds; `life_test.zig` has
//! the ends that a region can come to.

const std = @import("std");
const linux = std.os.linux;
const sys = @import("../linux.zig");
const layout = @import("../layout.zig");
const memory = @import("memory.zig");

const testing = std.testing;
const Request = layout.RegionRequest;

pub fn memfd(size: u64) i32 {
    const fd: i32 = @intCast(linux.memfd_create("vhost2-test", linux.MFD.CLOEXEC));
    resize(fd, size);
    return fd;
}

pub fn resize(fd: i32, size: u64) void {
    std.debug.assert(linux.ftruncate(fd, @intCast(size)) == 0);
}

pub fn request(fd: i32, gpa: u64, size: u64, offset: u64) Request {
    return .{ .gpa = gpa, .uva = gpa + 0x7000_0000_0000, .size = size, .mmap_offset = offset, .address = 0, .fd = fd, .flags = 0 };
}

/// A Memory with helpers that fail the test when the call fails.
pub const Fixture = struct {
    handle: u32,
    self: *memory.Memory,
    retired: [layout.max_regions]u32 = undefined,
    result: layout.PrepareResult = undefined,

    pub fn init() Fixture {
        const handle: u32 = @intCast(memory.createWithEvent(-1));
        return .{ .handle = handle, .self = memory.get(handle).? };
    }

    pub fn prepare(self: *Fixture, kind: u32, list: []const Request) i32 {
        return memory.prepare(self.handle, kind, list.ptr, @intCast(list.len), &self.result);
    }

    pub fn refused(self: *Fixture, kind: u32, list: []const Request, reason: u32, index: u32) !void {
        try testing.expect(self.prepare(kind, list) < 0);
        try testing.expectEqual(reason, self.result.reason);
        try testing.expectEqual(index, self.result.region);
    }

    /// Returns the first views of the regions that went away.
    pub fn apply(self: *Fixture, kind: u32, list: []const Request) ![]const u32 {
        try testing.expectEqual(0, self.prepare(kind, list));
        const count = memory.commit(self.handle, &self.retired, self.retired.len);
        try testing.expect(count >= 0);
        return self.retired[0..@intCast(count)];
    }

    pub fn set(self: *Fixture, list: []const Request) !void {
        for (try self.apply(layout.prepare_replace, list)) |view| {
            try testing.expectEqual(0, memory.release(self.handle, view, 1));
        }
    }

    pub fn at(self: *Fixture, gpa: u64, length: u64) ?[*]u8 {
        const table = self.self.enter();
        defer self.self.leave();
        return table.whole(layout.space_gpa, gpa, length);
    }

    pub fn viewOf(self: *Fixture, gpa: u64) u32 {
        var out: layout.Translation = undefined;
        std.debug.assert(memory.translate(self.handle, layout.space_gpa, gpa, 1, &out) == 0);
        return out.view;
    }

    pub fn deinit(self: *Fixture) void {
        const views = self.apply(layout.prepare_replace, &.{}) catch unreachable;
        for (views) |view| std.debug.assert(memory.release(self.handle, view, 1) >= 0);
        std.debug.assert(memory.destroy(self.handle) == 0);
    }
};

/// Mappings of memfds of these tests, and open descriptors.
pub fn resources() struct { maps: usize, descriptors: usize } {
    const fd: i32 = @intCast(linux.open("/proc/self/maps", .{}, 0));
    defer sys.closeQuietly(fd);
    var buffer: [1 << 16]u8 = undefined;
    var maps: usize = 0;
    var length: usize = 0;
    while (true) {
        const got = linux.read(fd, buffer[length..].ptr, buffer.len - length);
        if (got == 0 or sys.isError(got)) break;
        length += got;
        var start: usize = 0;
        while (std.mem.indexOfScalarPos(u8, buffer[0..length], start, '\n')) |end| : (start = end + 1) {
            maps += @intFromBool(std.mem.indexOf(u8, buffer[start..end], "vhost2-test") != null);
        }
        std.mem.copyForwards(u8, &buffer, buffer[start..length]);
        length -= start;
    }
    var descriptors: usize = 0;
    for (0..256) |number| descriptors += @intFromBool(!sys.isError(linux.fcntl(@intCast(number), linux.F.GETFD, 0)));
    return .{ .maps = maps, .descriptors = descriptors };
}

test "what a front-end gets wrong is named, and nothing of its table stays" {
    const before = resources();
    {
        var fixture: Fixture = .init();
        defer fixture.deinit();
        const fd = memfd(0x4000);
        defer sys.closeQuietly(fd);
        const good = request(fd, 0x10_0000, 0x1000, 0);
        try fixture.set(&.{good});
        const base = resources();
        const replace = layout.prepare_replace;
        const top = std.math.maxInt(u64);

        try fixture.refused(replace, &.{ good, request(fd, 0, 0, 0) }, layout.refuse_size_zero, 1);
        var bad = good;
        bad.gpa = top - 0xfff;
        try fixture.refused(replace, &.{bad}, layout.refuse_address_wraps, 0);
        bad = good;
        bad.uva = top;
        try fixture.refused(replace, &.{bad}, layout.refuse_address_wraps, 0);
        bad = good;
        bad.size = top;
        try fixture.refused(replace, &.{bad}, layout.refuse_address_wraps, 0);
        try fixture.refused(replace, &.{request(fd, 0, 0x1000, top - 0x10)}, layout.refuse_file_offset_wraps, 0);
        // New ones are mapped before the last one turns out to be too large.
        const many = [_]Request{ request(fd, 0, 0x1000, 0x1000), request(fd, 0x1000, 0x1000, 0x2000), request(fd, 0x2000, 0x1001, 0x3000) };
        try fixture.refused(replace, &many, layout.refuse_file_too_small, 2);
        try testing.expectEqual(0x4000, fixture.result.value);
        try testing.expectEqual(0x4001, fixture.result.limit);
        try fixture.refused(replace, &.{ request(fd, 0, 0x2000, 0), request(fd, 0x1fff, 0x1000, 0) }, layout.refuse_overlap_uva, 1);
        var twin = request(fd, 0x1fff, 0x1000, 0);
        twin.uva = 0;
        try fixture.refused(replace, &.{ twin, request(fd, 0, 0x2000, 0) }, layout.refuse_overlap_gpa, 1);
        try fixture.refused(layout.prepare_add, &.{good}, layout.refuse_overlap_uva, 0);
        try fixture.refused(layout.prepare_remove, &.{request(fd, 0, 0x1000, 0)}, layout.refuse_not_found, 0);
        try fixture.refused(layout.prepare_remove, &.{ good, good }, layout.refuse_not_found, 1);
        try fixture.refused(replace, &.{ good, request(-1, 0x20_0000, 0x1000, 0) }, layout.refuse_mmap, 1);
        try testing.expectEqual(@intFromEnum(linux.E.BADF), fixture.result.value);
        const event: i32 = @intCast(linux.eventfd(0, 0));
        try fixture.refused(replace, &.{request(event, 0, 0x1000, 0)}, layout.refuse_file_kind, 0);
        sys.closeQuietly(event);
        var list: [layout.max_regions + 1]Request = undefined;
        for (&list, 0..) |*one, index| one.* = request(fd, index * 0x1000, 0x1000, 0);
        try fixture.refused(replace, &list, layout.refuse_too_many, layout.max_regions);

        try testing.expectEqual(base, resources());
        try testing.expectEqual(1, memory.regions(fixture.handle, null, 0));
        try testing.expect(fixture.at(0x10_0000, 0x1000) != null);
        try testing.expect(fixture.at(0, 1) == null);
    }
    try testing.expectEqual(before, resources());
}

test "all 509 regions are mapped and given back" {
    const before = resources();
    {
        var fixture: Fixture = .init();
        defer fixture.deinit();
        const fd = memfd(layout.max_regions * 0x1000);
        defer sys.closeQuietly(fd);
        var list: [layout.max_regions]Request = undefined;
        for (&list, 0..) |*one, index| one.* = request(fd, index * 0x2000, 0x1000, index * 0x1000);
        try fixture.set(&list);
        try fixture.refused(layout.prepare_add, &.{request(fd, 0x1000, 0x1000, 0)}, layout.refuse_too_many, 0);
        for (list, 0..) |one, index| fixture.at(one.gpa, 0x1000).?[0] = @truncate(index);
        var byte: [1]u8 = undefined;
        _ = linux.pread(fd, &byte, 1, 300 * 0x1000);
        try testing.expectEqual(300 & 0xff, byte[0]);
    }
    try testing.expectEqual(before, resources());
}

test "a region that stays keeps its mapping and its views" {
    var fixture: Fixture = .init();
    defer fixture.deinit();
    const fd = memfd(0x4000);
    defer sys.closeQuietly(fd);
    const low = request(fd, 0, 0x1000, 0);
    const high = request(fd, 0x10000, 0x1000, 0x1000);
    try fixture.set(&.{ low, high });
    const pointer = fixture.at(0x10000, 1).?;
    const view = fixture.viewOf(0x10000);

    const gone = try fixture.apply(layout.prepare_replace, &.{ high, request(fd, 0x20000, 0x1000, 0x2000) });
    try testing.expectEqual(1, fixture.result.kept);
    try testing.expectEqual(1, fixture.result.added);
    try testing.expectEqual(1, fixture.result.removed);
    try testing.expectEqual(1, gone.len);
    try testing.expectEqual(pointer, fixture.at(0x10000, 1).?);
    try testing.expectEqual(view, fixture.viewOf(0x10000));
    // The retired region's number is not used again before it is released.
    const retired = gone[0];
    try testing.expect(fixture.viewOf(0x20000) != retired);
    try testing.expectEqual(sys.fail(.BUSY), memory.destroy(fixture.handle));
    try testing.expectEqual(0, memory.release(fixture.handle, retired, 1));
    try testing.expectEqual(sys.fail(.NOENT), memory.release(fixture.handle, retired, 1));
    try testing.expectEqual(sys.fail(.NOENT), memory.release(fixture.handle, view, 1));
    _ = try fixture.apply(layout.prepare_add, &.{low});
    try testing.expectEqual(retired, fixture.viewOf(0));

    // The same place over another file is another region.
    const other = memfd(0x2000);
    defer sys.closeQuietly(other);
    var moved = high;
    moved.fd = other;
    const changed = try fixture.apply(layout.prepare_replace, &.{ low, moved });
    try testing.expectEqual(2, changed.len);
    for (changed) |one| _ = memory.release(fixture.handle, one, 1);
    // Removal goes by gpa, uva and size; the offset does not matter.
    var named = low;
    named.mmap_offset = 0x3000;
    named.fd = -1;
    const removed = try fixture.apply(layout.prepare_remove, &.{named});
    try testing.expectEqual(1, removed.len);
    try testing.expectEqual(0, memory.release(fixture.handle, removed[0], 1));
}

test "a stage is one at a time, and aborting it leaves the published table" {
    var fixture: Fixture = .init();
    defer fixture.deinit();
    const fd = memfd(0x2000);
    defer sys.closeQuietly(fd);
    const kept = request(fd, 0, 0x1000, 0);
    try fixture.set(&.{kept});
    const before = resources();
    try testing.expectEqual(0, fixture.prepare(layout.prepare_replace, &.{ kept, request(fd, 0x5000, 0x2000, 0) }));
    try testing.expectEqual(1, fixture.result.kept);
    try testing.expectEqual(sys.fail(.BUSY), fixture.prepare(layout.prepare_replace, &.{}));
    try testing.expectEqual(sys.fail(.BUSY), memory.destroy(fixture.handle));
    try testing.expectEqual(0, memory.abort(fixture.handle));
    // Too little room for the answer: nothing has happened.
    try testing.expectEqual(0, fixture.prepare(layout.prepare_replace, &.{}));
    try testing.expectEqual(sys.fail(.NOSPC), memory.commit(fixture.handle, &fixture.retired, 0));
    try testing.expectEqual(sys.fail(.NOENT), memory.release(fixture.handle, fixture.viewOf(0), 1));
    try testing.expectEqual(0, memory.abort(fixture.handle));
    try testing.expectEqual(0, memory.abort(fixture.handle));
    try testing.expectEqual(sys.fail(.INVAL), memory.commit(fixture.handle, &fixture.retired, 1));
    try testing.expectEqual(before, resources());
    try testing.expect(fixture.at(0, 0x1000) != null);
    try testing.expect(fixture.at(0x5000, 1) == null);
}

test "offsets and sizes need not be multiples of a page" {
    var fixture: Fixture = .init();
    defer fixture.deinit();
    const fd = memfd(0x5000);
    defer sys.closeQuietly(fd);
    _ = linux.pwrite(fd, "here", 4, 0x1234);
    var odd = request(fd, 0x777, 0x2001, 0x1234);
    odd.uva = odd.gpa;
    try fixture.set(&.{odd});
    try testing.expectEqualStrings("here", fixture.at(0x777, 0x2001).?[0..4]);
    try testing.expect(fixture.at(0x777, 0x2002) == null);
}

test "a sparse region of 5 GiB has three views" {
    var fixture: Fixture = .init();
    defer fixture.deinit();
    const fd = memfd(5 << 30);
    defer sys.closeQuietly(fd);
    try fixture.set(&.{request(fd, 0, 5 << 30, 0)});
    var info: [1]layout.RegionInfo = undefined;
    try testing.expectEqual(1, memory.regions(fixture.handle, &info, 1));
    try testing.expectEqual(3, info[0].view_count);
    var out: layout.Translation = undefined;
    try testing.expectEqual(0, memory.translate(fixture.handle, layout.space_gpa, (2 << 30) - 4, 8, &out));
    try testing.expectEqual(4, out.length);
    try testing.expectEqual(8, out.contiguous);
    const copies = [_]layout.Copy{.{ .view = 2, .offset = (1 << 30) - 4, .length = 4, .access = layout.access_write, .buffer_offset = 0 }};
    var text = "last".*;
    try testing.expectEqual(0, memory.copy(fixture.handle, &copies, 1, &text, 4));
    var back: [4]u8 = undefined;
    _ = linux.pread(fd, &back, 4, (5 << 30) - 4);
    try testing.expectEqualStrings("last", &back);
    try testing.expectEqual(sys.fail(.FAULT), memory.translate(fixture.handle, layout.space_gpa, 5 << 30, 1, &out));
    try testing.expectEqual(sys.fail(.INVAL), memory.translate(fixture.handle, 2, 0, 1, &out));
}

test "a copy outside view or buffer is refused before a byte moves" {
    var fixture: Fixture = .init();
    defer fixture.deinit();
    const fd = memfd(0x1000);
    defer sys.closeQuietly(fd);
    try fixture.set(&.{request(fd, 0, 0x1000, 0)});
    var buffer: [16]u8 = @splat('x');
    const good: layout.Copy = .{ .view = 0, .offset = 0, .length = 16, .access = layout.access_write, .buffer_offset = 0 };
    const Case = struct { copy: layout.Copy, code: linux.E };
    for ([_]Case{
        .{ .copy = .{ .view = 0, .offset = 0xff1, .length = 16, .access = 1, .buffer_offset = 0 }, .code = .FAULT },
        .{ .copy = .{ .view = 1, .offset = 0, .length = 1, .access = 1, .buffer_offset = 0 }, .code = .FAULT },
        .{ .copy = .{ .view = 0, .offset = 0xffff_ffff, .length = 0xffff_ffff, .access = 1, .buffer_offset = 0 }, .code = .FAULT },
        .{ .copy = .{ .view = 0, .offset = 0, .length = 16, .access = 1, .buffer_offset = 1 }, .code = .INVAL },
        .{ .copy = .{ .view = 0, .offset = 0, .length = 16, .access = 1, .buffer_offset = std.math.maxInt(u64) }, .code = .INVAL },
        .{ .copy = .{ .view = 0, .offset = 0, .length = 1, .access = 3, .buffer_offset = 0 }, .code = .INVAL },
    }) |case| {
        const list = [_]layout.Copy{ good, case.copy };
        try testing.expectEqual(sys.fail(case.code), memory.copy(fixture.handle, &list, 2, &buffer, 16));
        try testing.expectEqual(0, fixture.at(0, 1).?[0]);
    }
    for ([_]f64{ -1, std.math.nan(f64), std.math.inf(f64), 1e30 }) |size| {
        try testing.expectEqual(sys.fail(.INVAL), memory.copy(fixture.handle, &.{good}, 1, &buffer, size));
    }
}

test "a region given by address is neither unmapped nor zeroed" {
    var address: u64 = 0;
    try testing.expectEqual(0, memory.mapAnonymous(0x1000, &address));
    const bytes: [*]u8 = @ptrFromInt(address);
    bytes[0] = 3;
    var fixture: Fixture = .init();
    var bar: Request = request(-1, 0, 0x1000, 0);
    bar.address = address;
    bar.flags = layout.flag_region_address;
    try fixture.set(&.{bar});
    _ = try fixture.apply(layout.prepare_replace, &.{bar});
    try testing.expectEqual(1, fixture.result.kept);
    try testing.expectEqual(bytes, fixture.at(0, 1).?);
    fixture.deinit();
    try testing.expectEqual(3, bytes[0]);
    try testing.expectEqual(sys.fail(.INVAL), memory.unmap(address, 0x2000));
    try testing.expectEqual(0, memory.unmap(address, 0x1000));
    try testing.expectEqual(sys.fail(.INVAL), memory.unmap(address, 0x1000));
}

test "a dead handle is refused everywhere" {
    var fixture: Fixture = .init();
    const dead = fixture.handle;
    fixture.deinit();
    var result: layout.PrepareResult = undefined;
    var out: layout.Translation = undefined;
    for ([_]u32{ dead, 0, 0xffff_ffff }) |handle| {
        const bad = sys.fail(.BADF);
        try testing.expectEqual(bad, memory.prepare(handle, 0, null, 0, &result));
        try testing.expectEqual(bad, memory.commit(handle, null, 0));
        try testing.expectEqual(bad, memory.abort(handle));
        try testing.expectEqual(bad, memory.regions(handle, null, 0));
        try testing.expectEqual(bad, memory.release(handle, 0, 1));
        try testing.expectEqual(bad, memory.revoke(handle));
        try testing.expectEqual(bad, memory.state(handle));
        try testing.expectEqual(bad, memory.translate(handle, 0, 0, 1, &out));
        try testing.expectEqual(bad, memory.copy(handle, null, 0, null, 0));
        try testing.expectEqual(bad, memory.destroy(handle));
    }
}
