//! The ends that a region can come to: its file shrinks, its table is replaced
//! under readers and I/O, its view cannot be detached, the device is revoked.

const std = @import("std");
const linux = std.os.linux;
const sync = @import("../sync.zig");
const sys = @import("../linux.zig");
const layout = @import("../layout.zig");
const memory = @import("memory.zig");
const mapping = @import("mapping.zig");
const fault = @import("fault.zig");
const given = @import("memory_test.zig");

const testing = std.testing;
const Fixture = given.Fixture;
const memfd = given.memfd;
const resize = given.resize;
const request = given.request;
const resources = given.resources;

test "a shrunk file reads as zeros, marks its device, and no other" {
    try testing.expectEqual(0, fault.install());
    try testing.expectEqual(0, fault.install());
    const event: i32 = @intCast(linux.eventfd(0, linux.EFD.NONBLOCK | linux.EFD.CLOEXEC));
    defer sys.closeQuietly(event);
    const handle: u32 = @intCast(memory.createWithEvent(event));
    var broken: Fixture = .{ .handle = handle, .self = memory.get(handle).? };
    defer broken.deinit();
    var healthy: Fixture = .init();
    defer healthy.deinit();
    const fd = memfd(0x4000);
    defer sys.closeQuietly(fd);
    const other = memfd(0x4000);
    defer sys.closeQuietly(other);
    try broken.set(&.{request(fd, 0, 0x4000, 0)});
    try healthy.set(&.{request(other, 0, 0x4000, 0)});
    @memset(healthy.at(0, 0x4000).?[0..0x4000], 0x55);
    const bytes = broken.at(0, 0x4000).?;
    @memset(bytes[0..0x4000], 0xaa);
    resize(fd, 0x1000);
    // Two threads fall into the same hole.
    const Toucher = struct {
        fn run(argument: ?*anyopaque) callconv(.c) ?*anyopaque {
            const at: [*]volatile u8 = @ptrCast(argument.?);
            for (1..4) |page| if (at[page * 0x1000] != 0) return argument;
            return null;
        }
    };
    const first = sync.Thread.spawn(Toucher.run, bytes).?;
    const second = sync.Thread.spawn(Toucher.run, bytes).?;
    first.join();
    second.join();
    for (bytes[0..0x4000]) |byte| try testing.expectEqual(0, byte);
    bytes[0x3fff] = 1;
    var count: u64 = 0;
    try testing.expectEqual(8, linux.read(event, std.mem.asBytes(&count), 8));
    try testing.expectEqual(1, count);
    try testing.expectEqual(@as(i32, layout.memory_faulted), memory.state(broken.handle));
    try testing.expect(!broken.self.isUsable());
    try testing.expect(!broken.self.hold(broken.viewOf(0)));
    try testing.expectEqual(@as(i32, layout.memory_ok), memory.state(healthy.handle));
    for (healthy.at(0, 0x4000).?[0..0x4000]) |byte| try testing.expectEqual(0x55, byte);
    // The zero pages are not taken for the file when it is mapped again.
    resize(fd, 0x4000);
    try broken.set(&.{request(fd, 0, 0x4000, 0)});
    try testing.expectEqual(0xaa, broken.at(0, 1).?[0]);
}

test "a hole found by a system call is the same as one found by a touch" {
    var fixture: Fixture = .init();
    defer fixture.deinit();
    const fd = memfd(0x1000);
    defer sys.closeQuietly(fd);
    try fixture.set(&.{request(fd, 0, 0x1000, 0)});
    fixture.at(0, 1).?[0] = 1;
    const view = fixture.viewOf(0);
    try testing.expect(fixture.self.hold(view));
    fixture.self.faultView(view);
    fixture.self.unhold(view);
    try testing.expectEqual(0, fixture.at(0, 1).?[0]);
    try testing.expectEqual(@as(i32, layout.memory_faulted), memory.state(fixture.handle));
}

test "I/O in flight delays the unmap, and the end of the Memory" {
    const event: i32 = @intCast(linux.eventfd(0, linux.EFD.CLOEXEC));
    defer sys.closeQuietly(event);
    const fd = memfd(0x1000);
    defer sys.closeQuietly(fd);
    const before = resources();
    const handle: u32 = @intCast(memory.createWithEvent(event));
    var fixture: Fixture = .{ .handle = handle, .self = memory.get(handle).? };
    try fixture.set(&.{request(fd, 0, 0x1000, 0)});
    const view = fixture.viewOf(0);
    const bytes = fixture.at(0, 1).?;
    bytes[0] = 9;
    try testing.expect(fixture.self.hold(view));
    try testing.expect(fixture.self.hold(view));
    try testing.expect(!fixture.self.hold(view + 1));
    const gone = try fixture.apply(layout.prepare_replace, &.{});
    try testing.expectEqual(1, memory.release(fixture.handle, gone[0], 1));
    try testing.expect(!fixture.self.hold(view));
    try testing.expectEqual(0, memory.destroy(fixture.handle));
    try testing.expectEqual(sys.fail(.BADF), memory.state(fixture.handle));
    try testing.expectEqual(9, bytes[0]);
    fixture.self.unhold(view);
    try testing.expectEqual(9, bytes[0]);
    fixture.self.unhold(view);
    try testing.expectEqual(before, resources());
}

test "a reader inside keeps the old table and its mappings" {
    var fixture: Fixture = .init();
    defer fixture.deinit();
    const fd = memfd(0x1000);
    defer sys.closeQuietly(fd);
    try fixture.set(&.{request(fd, 0, 0x1000, 0)});
    const before = resources();
    const table = fixture.self.enter();
    const gone = try fixture.apply(layout.prepare_replace, &.{});
    try testing.expectEqual(1, memory.release(fixture.handle, gone[0], 1));
    try testing.expectEqual(before, resources());
    table.whole(layout.space_gpa, 0, 0x1000).?[0] = 1;
    fixture.self.leave();
    try testing.expectEqual(before.maps - 1, resources().maps);
}

test "a view that cannot be detached ends as zero pages, up to a bound" {
    const before = mapping.quarantined.load(.monotonic);
    defer mapping.quarantined.store(before, .monotonic);
    var fixture: Fixture = .init();
    defer fixture.deinit();
    const fd = memfd(0x2000);
    defer sys.closeQuietly(fd);
    try fixture.set(&.{request(fd, 0, 0x2000, 0)});
    const bytes = fixture.at(0, 1).?;
    bytes[0x1fff] = 7;
    const gone = try fixture.apply(layout.prepare_replace, &.{});
    try testing.expectEqual(7, bytes[0x1fff]);
    try testing.expectEqual(0, memory.release(fixture.handle, gone[0], 0));
    try testing.expectEqual(0, bytes[0x1fff]);
    bytes[0x1fff] = 1;
    var byte: [1]u8 = undefined;
    _ = linux.pread(fd, &byte, 1, 0x1fff);
    try testing.expectEqual(7, byte[0]);
    try testing.expectEqual(before + 0x2000, mapping.quarantined.load(.monotonic));
    mapping.quarantined.store(mapping.quarantine_limit - 0x1000, .monotonic);
    try fixture.refused(layout.prepare_replace, &.{request(fd, 0, 0x2000, 0)}, layout.refuse_quarantine, 0);
    try testing.expectEqual(mapping.quarantine_limit, fixture.result.limit);
    try fixture.set(&.{request(fd, 0, 0x1000, 0)});
    _ = linux.munmap(@alignCast(bytes), 0x2000);
}

test "revoked memory shows nothing, retired regions and late I/O included" {
    var fixture: Fixture = .init();
    defer fixture.deinit();
    const fd = memfd(0x3000);
    defer sys.closeQuietly(fd);
    try fixture.set(&.{ request(fd, 0, 0x1000, 0), request(fd, 0x1000, 0x1000, 0x1000), request(fd, 0x2000, 0x1000, 0x2000) });
    var pointers: [3][*]u8 = undefined;
    for (&pointers, 0..) |*pointer, index| {
        pointer.* = fixture.at(index * 0x1000, 1).?;
        pointer.*[0] = 5;
    }
    const held = fixture.viewOf(0x1000);
    try testing.expect(fixture.self.hold(held));
    const gone = try fixture.apply(layout.prepare_remove, &.{request(fd, 0, 0x1000, 0)});
    try testing.expectEqual(0, memory.revoke(fixture.handle));
    try testing.expectEqual(@as(i32, layout.memory_revoked), memory.state(fixture.handle));
    try testing.expect(!fixture.self.hold(held));
    try testing.expectEqual(0, pointers[0][0]);
    try testing.expectEqual(5, pointers[1][0]);
    try testing.expectEqual(0, pointers[2][0]);
    fixture.self.unhold(held);
    try testing.expectEqual(0, pointers[1][0]);
    try testing.expectEqual(sys.fail(.STALE), fixture.prepare(layout.prepare_replace, &.{request(fd, 0, 0x1000, 0)}));
    try testing.expectEqual(0, memory.release(fixture.handle, gone[0], 1));
}

test "readers in other threads never see half a table while it is replaced" {
    var fixture: Fixture = .init();
    defer fixture.deinit();
    const fd = memfd(0x2000);
    defer sys.closeQuietly(fd);
    const always = request(fd, 0, 0x1000, 0);
    const sometimes = request(fd, 0x1000, 0x1000, 0x1000);
    try fixture.set(&.{always});
    const Reader = struct {
        self: *memory.Memory,
        is_over: std.atomic.Value(bool) = .init(false),
        failures: std.atomic.Value(u32) = .init(0),

        fn run(argument: ?*anyopaque) callconv(.c) ?*anyopaque {
            const reader: *@This() = @ptrCast(@alignCast(argument.?));
            while (!reader.is_over.load(.acquire)) {
                const table = reader.self.enter();
                if (table.whole(layout.space_gpa, 0, 0x1000)) |found| {
                    _ = @as(*volatile u8, &found[0]).*;
                } else _ = reader.failures.fetchAdd(1, .monotonic);
                if (table.whole(layout.space_gpa, 0x1000, 0x1000)) |found| @as(*volatile u8, &found[5]).* = 1;
                reader.self.leave();
                const view: u32 = 1;
                if (reader.self.hold(view)) reader.self.unhold(view);
            }
            return null;
        }
    };
    var reader: Reader = .{ .self = fixture.self };
    const first = sync.Thread.spawn(Reader.run, &reader).?;
    const second = sync.Thread.spawn(Reader.run, &reader).?;
    for (0..500) |round| {
        const gone = try fixture.apply(layout.prepare_replace, if (round % 2 == 0) &.{ always, sometimes } else &.{always});
        for (gone) |view| try testing.expect(memory.release(fixture.handle, view, 1) >= 0);
    }
    reader.is_over.store(true, .release);
    first.join();
    second.join();
    try testing.expectEqual(0, reader.failures.load(.monotonic));
}

test "a plain shared mapping survives a shrunk file too" {
    try testing.expectEqual(0, fault.install());
    const fd = memfd(0x1000);
    defer sys.closeQuietly(fd);
    var address: u64 = 0;
    try testing.expectEqual(sys.fail(.INVAL), memory.mapShared(fd, 0x1001, &address));
    try testing.expectEqual(sys.fail(.INVAL), memory.mapShared(fd, 0, &address));
    try testing.expectEqual(sys.fail(.BADF), memory.mapShared(-1, 1, &address));
    try testing.expectEqual(0, memory.mapShared(fd, 0x1000, &address));
    resize(fd, 0);
    try testing.expectEqual(0, @as(*volatile u8, @ptrFromInt(address)).*);
    try testing.expectEqual(0, memory.unmap(address, 0x1000));
}

test "a region in huge pages is mapped at their granularity, and survives their lack" {
    try testing.expectEqual(0, fault.install());
    // No huge page need exist: the first touch finds none and is a fault.
    const huge: u64 = 2 << 20;
    const MFD_HUGE_2MB = 21 << 26;
    const raw = linux.memfd_create("vhost2-test", linux.MFD.CLOEXEC | linux.MFD.HUGETLB | MFD_HUGE_2MB);
    if (sys.isError(raw)) return error.SkipZigTest;
    const fd: i32 = @intCast(raw);
    defer sys.closeQuietly(fd);
    resize(fd, 2 * huge);
    const before = resources();
    {
        var fixture: Fixture = .init();
        defer fixture.deinit();
        try fixture.set(&.{request(fd, 0x1000, huge, 0x1000)});
        const bytes = fixture.at(0x1000, huge).?;
        resize(fd, 0);
        for ([_]usize{ 0, huge - 0x1001, huge - 1 }) |offset| try testing.expectEqual(0, bytes[offset]);
        bytes[huge - 1] = 1;
        try testing.expectEqual(@as(i32, layout.memory_faulted), memory.state(fixture.handle));
    }
    try testing.expectEqual(before, resources());
}

test "DMA may reach a region while it is in its table, and only what it holds" {
    const fd = memfd(0x4000);
    defer sys.closeQuietly(fd);
    var fixture: Fixture = .init();
    defer fixture.deinit();
    try fixture.set(&.{request(fd, 0, 0x2000, 0x1000)});
    const address = @intFromPtr(fixture.at(0, 0x2000).?);
    try testing.expect(mapping.isReachable(address, 0x2000));
    try testing.expect(mapping.isReachable(address + 0x1000, 0x1000));
    // The file's first page is mapped too, and not the guest's.
    try testing.expect(!mapping.isReachable(address, 0x3000));
    try testing.expect(!mapping.isReachable(address - 0x1000, 0x1000));
    try testing.expect(!mapping.isReachable(@intFromPtr(&fixture) & ~@as(u64, 0xfff), 0x1000));
    try fixture.set(&.{});
    try testing.expect(!mapping.isReachable(address, 0x2000));
}
