//! Regions that are a part of a mapping of somebody else's (a PCI BAR), and
//! windows into which files come and go.

const std = @import("std");
const sys = @import("../linux.zig");
const layout = @import("../layout.zig");
const memory = @import("memory.zig");
const fault = @import("fault.zig");
const helpers = @import("memory_test.zig");

const testing = std.testing;
const linux = sys.linux;

fn borrowed(gpa: u64, size: u64, address: u64) layout.RegionRequest {
    var request = helpers.request(-1, gpa, size, 0);
    request.address = address;
    request.flags = layout.flag_region_address;
    return request;
}

fn isMapped(address: u64) bool {
    const raw = linux.madvise(@ptrFromInt(address), 0x1000, 0);
    return !sys.isError(raw);
}

test "only addresses inside a mapping of the core's can be a region" {
    var window: u64 = 0;
    try testing.expectEqual(0, memory.mapAnonymous(0x3000, &window));
    var fixture: helpers.Fixture = .init();
    defer fixture.deinit();
    const stack = @intFromPtr(&fixture) & ~@as(u64, 0xfff);
    for ([_]layout.RegionRequest{
        borrowed(0, 0x1000, stack),
        borrowed(0, 0x1000, window - 0x1000),
        borrowed(0, 0x2000, window + 0x2000),
        borrowed(0, 0x1000, window + 0x3000),
        borrowed(0, 1 << 62, window),
    }) |request| try fixture.refused(layout.prepare_replace, &.{request}, layout.refuse_address, 0);
    try fixture.set(&.{borrowed(0, 0x2000, window + 0x1000)});
    try testing.expectEqual(window + 0x1000, @intFromPtr(fixture.at(0, 0x2000).?));
    try testing.expectEqual(0, memory.unmap(window, 0x3000));
    try fixture.refused(layout.prepare_add, &.{borrowed(0x10000, 0x1000, window)}, layout.refuse_address, 0);
}

test "a mapping that its owner ends stays until the last borrower goes" {
    var window: u64 = 0;
    try testing.expectEqual(0, memory.mapAnonymous(0x2000, &window));
    var fixture: helpers.Fixture = .init();
    try fixture.set(&.{ borrowed(0, 0x1000, window), borrowed(0x10000, 0x1000, window + 0x1000) });
    try testing.expectEqual(0, memory.unmap(window, 0x2000));
    try testing.expectEqual(sys.fail(.INVAL), memory.unmap(window, 0x2000));
    fixture.at(0, 1).?[0] = 1;
    try fixture.set(&.{borrowed(0, 0x1000, window)});
    try testing.expect(isMapped(window));
    fixture.deinit();
    try testing.expect(!isMapped(window));
}

test "views left behind keep zero pages in the place of an ended mapping" {
    var window: u64 = 0;
    try testing.expectEqual(0, memory.mapAnonymous(0x1000, &window));
    const bytes: [*]volatile u8 = @ptrFromInt(window);
    bytes[0] = 5;
    var fixture: helpers.Fixture = .init();
    try fixture.set(&.{borrowed(0, 0x1000, window)});
    for (try fixture.apply(layout.prepare_replace, &.{})) |view| {
        try testing.expectEqual(0, memory.release(fixture.handle, view, 0));
    }
    fixture.deinit();
    try testing.expectEqual(5, bytes[0]);
    try testing.expectEqual(0, memory.unmap(window, 0x1000));
    try testing.expectEqual(0, bytes[0]);
}

test "a fault under a borrowed region marks its memory, and it reads as zeros" {
    try testing.expectEqual(0, fault.install());
    var window: u64 = 0;
    try testing.expectEqual(0, memory.mapAnonymous(0x10000, &window));
    const fd = helpers.memfd(0x2000);
    defer sys.closeQuietly(fd);
    try testing.expectEqual(0, memory.mapOver(window + 0x4000, 0x2000, fd, 0));
    var fixture: helpers.Fixture = .init();
    try fixture.set(&.{borrowed(0, 0x2000, window + 0x4000)});
    const bytes: [*]volatile u8 = fixture.at(0, 0x2000).?;
    bytes[0x1000] = 9;
    helpers.resize(fd, 0);
    try testing.expectEqual(0, bytes[0x1000]);
    try testing.expectEqual(@as(i32, layout.memory_faulted), memory.state(fixture.handle));
    // A mapping that has become zeros is not one to keep.
    var kept = borrowed(0, 0x2000, window + 0x4000);
    kept.uva = fixture.self.table.load(.acquire).regions[0].uva;
    try testing.expectEqual(0, fixture.prepare(layout.prepare_replace, &.{kept}));
    try testing.expectEqual(0, fixture.result.kept);
    try testing.expectEqual(0, memory.abort(fixture.handle));
    fixture.deinit();
    try testing.expectEqual(0, memory.unmap(window, 0x10000));
}

test "revoking takes a borrowed region away" {
    var window: u64 = 0;
    try testing.expectEqual(0, memory.mapAnonymous(0x1000, &window));
    const bytes: [*]volatile u8 = @ptrFromInt(window);
    bytes[0] = 5;
    var fixture: helpers.Fixture = .init();
    try fixture.set(&.{borrowed(0, 0x1000, window)});
    try testing.expectEqual(0, memory.revoke(fixture.handle));
    try testing.expectEqual(0, bytes[0]);
    fixture.deinit();
    try testing.expectEqual(0, memory.unmap(window, 0x1000));
}

test "a file is put over a part of a window, and taken away again" {
    var window: u64 = 0;
    try testing.expectEqual(0, memory.mapAnonymous(0x4000, &window));
    defer _ = memory.unmap(window, 0x4000);
    const bytes: [*]volatile u8 = @ptrFromInt(window);
    const fd = helpers.memfd(0x3000);
    defer sys.closeQuietly(fd);
    const five = [1]u8{5};
    _ = linux.pwrite(fd, &five, 1, 0x1000);
    try testing.expectEqual(0, memory.mapOver(window + 0x2000, 0x2000, fd, 0x1000));
    try testing.expectEqual(5, bytes[0x2000]);
    try testing.expectEqual(0, memory.mapOver(window + 0x2000, 0x2000, -1, 0));
    try testing.expectEqual(0, bytes[0x2000]);
    const wrong = sys.fail(.INVAL);
    try testing.expectEqual(wrong, memory.mapOver(window + 0x3000, 0x2000, -1, 0));
    try testing.expectEqual(wrong, memory.mapOver(window + 0x100, 0x1000, -1, 0));
    try testing.expectEqual(wrong, memory.mapOver(window, 0, -1, 0));
    try testing.expectEqual(wrong, memory.mapOver(window, 0x1000, fd, 0x2800));
    try testing.expectEqual(wrong, memory.mapOver(window, 0x2000, fd, 0x2000));
    try testing.expectEqual(wrong, memory.mapOver(@intFromPtr(&window), 0x1000, -1, 0));
}

test "pages of a device's file are mapped whole, and ended" {
    const fd = helpers.memfd(0x3000);
    defer sys.closeQuietly(fd);
    var address: u64 = 0;
    try testing.expectEqual(0, memory.mapPages(fd, 0x1000, 0x2000, &address));
    const five = [1]u8{5};
    _ = linux.pwrite(fd, &five, 1, 0x2000);
    const bytes: [*]volatile u8 = @ptrFromInt(address);
    try testing.expectEqual(5, bytes[0x1000]);
    try testing.expectEqual(0, memory.unmap(address, 0x2000));
    try testing.expect(!isMapped(address));
    const wrong = sys.fail(.INVAL);
    try testing.expectEqual(wrong, memory.mapPages(fd, 0x800, 0x1000, &address));
    try testing.expectEqual(wrong, memory.mapPages(fd, 0, 0x1001, &address));
    try testing.expectEqual(wrong, memory.mapPages(fd, 0, 0, &address));
    try testing.expectEqual(sys.fail(.BADF), memory.mapPages(-1, 0, 0x1000, &address));
}
