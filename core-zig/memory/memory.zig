//! The guest memory of one device.
//!
//! A table is staged by `prepare` and published by `commit`, a pointer swap;
//! readers (ring pops, in any thread) go on with the table they have. What a
//! commit takes out is first retired (TypeScript still has views of it), then
//! released, then without readers, then without I/O in flight, and only then
//! unmapped. Readers announce themselves in a counter: what was taken out
//! before the counter was seen at zero cannot be in use by any of them.
//!
//! A `Memory` itself is never freed but used again, so that a reader that is
//! just leaving never touches freed memory.

const std = @import("std");
const linux = std.os.linux;
const sync = @import("../sync.zig");
const sys = @import("../linux.zig");
const layout = @import("../layout.zig");
const poll = @import("../poll.zig");
const postcopy = @import("postcopy.zig");
const mapping = @import("mapping.zig");
const stage = @import("stage.zig");
const tables = @import("table.zig");
const views = @import("views.zig");
const copying = @import("copy.zig");
const prefetch = @import("../prefetch.zig");
const iotlb = @import("iotlb.zig");
const DirtyLog = @import("dirty_log.zig").DirtyLog;
const Handles = @import("../handles.zig").Handles;

const Atomic = std.atomic.Value;
const Mapping = mapping.Mapping;
pub const Table = tables.Table;
pub const Piece = tables.Piece;
pub const Window = tables.Window;
pub const Cache = tables.Cache;
pub const copyBytes = copying.copy;

/// Old tables that may wait for their readers before a commit waits for them.
const max_retired_tables = 16;

pub const Memory = struct {
    health: mapping.Health,
    /// How often `state` was asked: the isolate is awake.
    looks: std.atomic.Value(u32) = .init(0),
    table: Atomic(*const Table),
    readers: Atomic(u32),
    /// Something waits until no reader is inside.
    is_pending: Atomic(bool),
    /// Who uses the object without holding a view of it.
    pins: Atomic(u32),
    iotlb: iotlb.Iotlb,
    dirty_log: DirtyLog,

    // Under the lock.
    lock: sync.Mutex,
    staged: ?*Table,
    retired_tables: ?*Table,
    retired_count: u32,
    is_dying: bool,
    next_spare: ?*Memory,
    /// While pages are on their way from another machine.
    postcopy: ?*postcopy.Guard,
    views: views.Views,

    /// A reader section: the table stays whole until `leave`. Sections may
    /// nest, and must not wait for another thread.
    pub fn enter(self: *Memory) *const Table {
        // seq_cst, with `commit` and `reclaim`: either they see us in the
        // counter or we see their table.
        _ = self.readers.fetchAdd(1, .seq_cst);
        return self.table.load(.seq_cst);
    }

    /// The table of now, inside a section that may have begun with another one:
    /// for what somebody has found in this one. It stays whole as long.
    pub fn current(self: *const Memory) *const Table {
        return self.table.load(.seq_cst);
    }

    pub fn leave(self: *Memory) void {
        // seq_cst, with `reclaim`: either it sees the counter at zero or we
        // see that something is pending.
        if (self.readers.fetchSub(1, .seq_cst) == 1 and self.is_pending.load(.seq_cst)) {
            self.lock.lock();
            defer self.lock.unlock();
            self.reclaim();
        }
    }

    pub fn isUsable(self: *const Memory) bool {
        return self.health.state.load(.acquire) == layout.memory_ok;
    }

    pub fn markFaulted(self: *Memory) void {
        self.health.fault();
    }

    /// A system call found a hole in this view's region: as if we had.
    pub fn faultView(self: *Memory, view: u32) void {
        {
            self.lock.lock();
            defer self.lock.unlock();
            if (self.views.at(view)) |found| _ = found.replaceByZeros();
        }
        self.health.fault();
    }

    /// For I/O in flight: the view's region is not unmapped or zeroed before
    /// the matching `unhold`. False when the view is not published or the
    /// memory is not usable any more.
    pub fn hold(self: *Memory, view: u32) bool {
        const table = self.enter();
        defer self.leave();
        if (view >= table.views.len) return false;
        const found = table.views[view].mapping orelse return false;
        _ = found.references.fetchAdd(1, .seq_cst);
        if (self.isUsable()) return true;
        self.unhold(view);
        return false;
    }

    pub fn unhold(self: *Memory, view: u32) void {
        const found = self.views.at(view) orelse return;
        switch (found.references.fetchSub(1, .seq_cst)) {
            1 => {
                self.lock.lock();
                defer self.lock.unlock();
                self.finish(found);
                if (self.is_dying) self.reclaim();
            },
            2 => {
                // seq_cst, with `revoke`: one of the two sees the other.
                if (!found.is_revoked.load(.seq_cst)) return;
                self.lock.lock();
                defer self.lock.unlock();
                // In the meantime the owner's reference may be gone too, and
                // with it the region: only a region that is still ours.
                if (self.views.at(view) == found and found.is_revoked.load(.seq_cst)) _ = found.replaceByZeros();
            },
            else => {},
        }
    }

    /// Until `unpin` the object stays this device's, also after `destroy`.
    pub fn pin(self: *Memory) void {
        _ = self.pins.fetchAdd(1, .seq_cst);
    }

    pub fn unpin(self: *Memory) void {
        if (self.pins.fetchSub(1, .seq_cst) != 1) return;
        self.lock.lock();
        defer self.lock.unlock();
        if (self.is_dying) self.reclaim();
    }

    /// The last reference is gone. Under the lock.
    fn finish(self: *Memory, gone: *Mapping) void {
        self.views.remove(gone);
        if (gone.is_detached) gone.unmap() else gone.quarantine();
    }

    /// Frees what waits for readers, if none is inside. Under the lock.
    fn reclaim(self: *Memory) void {
        self.is_pending.store(true, .seq_cst);
        if (self.readers.load(.seq_cst) != 0) return;
        self.is_pending.store(false, .seq_cst);
        while (self.retired_tables) |table| {
            self.retired_tables = table.next;
            table.destroy();
        }
        self.retired_count = 0;
        var next = self.views.first;
        while (next) |released| {
            next = released.next;
            if (released.phase != .leaving) continue;
            released.phase = .released;
            if (released.references.fetchSub(1, .seq_cst) == 1) self.finish(released);
        }
        self.recycleIfDone();
    }

    /// No reader is inside, no table waits: is I/O still in flight?
    fn recycleIfDone(self: *Memory) void {
        if (!self.is_dying or self.views.first != null or self.pins.load(.seq_cst) != 0) return;
        self.is_dying = false;
        const event = self.health.event.swap(-1, .seq_cst);
        if (event >= 0) sys.closeQuietly(event);
        spares_lock.lock();
        defer spares_lock.unlock();
        self.next_spare = spares;
        spares = self;
    }
};

const no_regions: Table = .empty;
var handles: Handles(Memory) = .{};
var spares: ?*Memory = null;
var spares_lock: sync.Mutex = .{};

/// Null for a dead handle.
pub fn get(handle: u32) ?*Memory {
    return handles.get(handle);
}

fn takeSpare() ?*Memory {
    {
        spares_lock.lock();
        defer spares_lock.unlock();
        if (spares) |spare| {
            spares = spare.next_spare;
            return spare;
        }
    }
    // Zero pages of the system: most of `views.owners` is never touched.
    const raw = linux.mmap(null, @sizeOf(Memory), .{ .READ = true, .WRITE = true }, .{ .TYPE = .PRIVATE, .ANONYMOUS = true, .NORESERVE = true }, -1, 0);
    if (sys.isError(raw)) return null;
    const self: *Memory = @ptrFromInt(raw);
    self.lock = .{};
    self.readers = .init(0);
    self.pins = .init(0);
    self.iotlb = .{};
    self.dirty_log.init();
    return self;
}

/// The event is duplicated: the signal handler must never write into a
/// descriptor that is somebody else's by now.
pub fn createWithEvent(event: i32) i32 {
    var own: i32 = -1;
    if (event >= 0) {
        own = sys.result(linux.fcntl(event, linux.F.DUPFD_CLOEXEC, 0));
        if (own < 0) return own;
    }
    const self = takeSpare() orelse {
        if (own >= 0) sys.closeQuietly(own);
        return sys.fail(.NOMEM);
    };
    self.lock.lock();
    self.health.state.store(layout.memory_ok, .seq_cst);
    self.health.event.store(own, .seq_cst);
    self.table.store(&no_regions, .seq_cst);
    self.is_pending.store(false, .seq_cst);
    self.staged = null;
    self.retired_tables = null;
    self.retired_count = 0;
    self.is_dying = false;
    self.postcopy = null;
    self.views.first = null;
    self.lock.unlock();
    if (handles.insert(self)) |handle| return @intCast(handle);
    self.lock.lock();
    defer self.lock.unlock();
    self.is_dying = true;
    self.reclaim();
    return sys.fail(.NOSPC);
}

/// An empty Memory. Faults are told to poll set `poll_handle`, if not 0.
pub fn create(poll_handle: u32) callconv(.c) i32 {
    if (poll_handle == 0) return createWithEvent(-1);
    const event = poll.faultEvent(poll_handle);
    return if (event < 0) event else createWithEvent(event);
}

/// Stages the next table: all of it, or nothing and `result` says why.
pub fn prepare(handle: u32, kind: u32, requests: ?[*]const layout.RegionRequest, count: u32, result: *layout.PrepareResult) callconv(.c) i32 {
    result.* = std.mem.zeroes(layout.PrepareResult);
    const self = get(handle) orelse return sys.fail(.BADF);
    if (kind > layout.prepare_remove or (requests == null and count > 0)) return sys.fail(.INVAL);
    self.lock.lock();
    defer self.lock.unlock();
    if (self.staged != null) return sys.fail(.BUSY);
    if (count > 0 and kind != layout.prepare_remove and self.health.isRevoked()) return sys.fail(.STALE);
    var next: stage.Stage = .{ .current = self.table.load(.acquire), .views = &self.views, .health = &self.health, .result = result };
    if (self.postcopy) |guard| next.userfault = guard.fd;
    var code: i32 = 0;
    const asked: []const layout.RegionRequest = if (count > 0) requests.?[0..count] else &.{};
    self.staged = next.run(kind, asked, &code) catch return code;
    return 0;
}

/// Publishes what is staged. Writes the first view of each region that is no
/// longer published, and returns their number.
pub fn commit(handle: u32, retired_views: ?[*]u32, capacity: u32) callconv(.c) i32 {
    const self = get(handle) orelse return sys.fail(.BADF);
    self.lock.lock();
    // Readers leave within microseconds. Not under the lock: they may need it.
    while (self.retired_count >= max_retired_tables) {
        self.reclaim();
        if (self.retired_count == 0) break;
        self.lock.unlock();
        _ = linux.sched_yield();
        self.lock.lock();
    }
    defer self.lock.unlock();
    const next = self.staged orelse return sys.fail(.INVAL);
    const old = self.table.load(.acquire);
    for (old.regions) |region| region.mapping.phase = .retired;
    for (next.regions) |region| region.mapping.phase = .published;
    var retired: u32 = 0;
    for (old.regions) |region| retired += @intFromBool(region.mapping.phase == .retired);
    if (retired > capacity or (retired > 0 and retired_views == null)) {
        for (next.regions) |region| region.mapping.phase = .staged;
        for (old.regions) |region| region.mapping.phase = .published;
        return sys.fail(.NOSPC);
    }
    var at: u32 = 0;
    for (old.regions) |region| {
        if (region.mapping.phase != .retired) continue;
        retired_views.?[at] = region.mapping.view_first;
        at += 1;
    }
    self.staged = null;
    self.table.store(next, .seq_cst);
    if (old != &no_regions) {
        const freed: *Table = @constCast(old);
        freed.next = self.retired_tables;
        self.retired_tables = freed;
        self.retired_count += 1;
        self.reclaim();
    }
    return @intCast(retired);
}

/// Forgets what is staged; nothing staged is no error.
pub fn abort(handle: u32) callconv(.c) i32 {
    const self = get(handle) orelse return sys.fail(.BADF);
    self.lock.lock();
    defer self.lock.unlock();
    const table = self.staged orelse return 0;
    self.staged = null;
    for (table.regions) |region| stage.drop(&self.views, region.mapping);
    table.destroy();
    return 0;
}

/// How many regions are published; writes as many as there is room for.
pub fn regions(handle: u32, out: ?[*]layout.RegionInfo, capacity: u32) callconv(.c) i32 {
    const self = get(handle) orelse return sys.fail(.BADF);
    const table = self.enter();
    defer self.leave();
    if (out) |infos| {
        for (table.regions[0..@min(table.regions.len, capacity)], 0..) |region, index| infos[index] = .{
            .gpa = region.gpa,
            .uva = region.uva,
            .size = region.size,
            .address = region.mapping.address,
            .view_first = region.mapping.view_first,
            .view_count = region.mapping.view_count,
        };
    }
    return @intCast(table.regions.len);
}

/// TypeScript is done with a retired region. `is_detached` = 1: no view of it
/// is left, it is unmapped. 0: views may be left, zero pages stay there for
/// ever. Returns 1 when that has to wait for readers or I/O in flight.
pub fn release(handle: u32, view_first: u32, is_detached: u32) callconv(.c) i32 {
    const self = get(handle) orelse return sys.fail(.BADF);
    self.lock.lock();
    defer self.lock.unlock();
    const retired = self.views.at(view_first) orelse return sys.fail(.NOENT);
    if (retired.phase != .retired or retired.view_first != view_first) return sys.fail(.NOENT);
    retired.is_detached = is_detached != 0;
    retired.phase = .leaving;
    self.reclaim();
    return @intFromBool(self.views.at(view_first) != null);
}

/// The end of all access, also through views that somebody still holds: every
/// region becomes zero pages. A region with I/O in flight does when that ends,
/// so that a write under way does not put zeros on the disk.
pub fn revoke(handle: u32) callconv(.c) i32 {
    const self = get(handle) orelse return sys.fail(.BADF);
    self.lock.lock();
    defer self.lock.unlock();
    self.health.state.store(layout.memory_revoked, .seq_cst);
    var failed = false;
    var next = self.views.first;
    while (next) |region| : (next = region.next) {
        region.is_revoked.store(true, .seq_cst);
        if (region.references.load(.seq_cst) > 1) continue;
        if (!region.replaceByZeros()) failed = true;
    }
    return if (failed) sys.fail(.NOMEM) else 0;
}

pub fn state(handle: u32) callconv(.c) i32 {
    const self = get(handle) orelse return sys.fail(.BADF);
    _ = self.looks.fetchAdd(1, .seq_cst);
    return @intCast(self.health.state.load(.acquire));
}

/// -EFAULT when `address` is not mapped.
pub fn translate(handle: u32, space: u32, address: u64, length: u64, out: *layout.Translation) callconv(.c) i32 {
    const self = get(handle) orelse return sys.fail(.BADF);
    if (space > layout.space_uva or length == 0) return sys.fail(.INVAL);
    const table = self.enter();
    defer self.leave();
    out.* = table.translate(space, address, length) orelse return sys.fail(.FAULT);
    return 0;
}

/// A parameter that is a number of bytes.
fn bytes(value: f64) ?u64 {
    if (!(value >= 0 and value <= 1 << 53)) return null; // false for NaN
    return @intFromFloat(value);
}

/// Copies between guest memory and `buffer`. All are checked before the first
/// byte moves: -EFAULT when a range is not in its view, -EINVAL when one is
/// not in the buffer.
pub fn copy(handle: u32, copies: ?[*]const layout.Copy, count: u32, buffer: ?[*]u8, buffer_size: f64) callconv(.c) i32 {
    const self = get(handle) orelse return sys.fail(.BADF);
    const size = bytes(buffer_size) orelse return sys.fail(.INVAL);
    if (count == 0) return 0;
    const list = copies orelse return sys.fail(.INVAL);
    const target = buffer orelse return sys.fail(.INVAL);
    const table = self.enter();
    defer self.leave();
    var place: Place = .{ .table = table, .buffer = target, .size = size };
    for (list[0..count]) |*one| {
        const errno = place.find(one);
        if (errno != 0) return errno;
    }
    for (list[0..count], 0..) |*one, i| {
        // Checked again: another isolate may be writing there.
        const errno = place.find(one);
        if (errno != 0) return errno;
        const now = place;
        if (i + 1 < count and place.find(&list[i + 1]) == 0) place.expect();
        copying.copy(now.to, now.from, now.length);
    }
    return 0;
}

/// Where a copy is from and to.
const Place = struct {
    table: *const Table,
    buffer: [*]u8,
    size: u64,
    to: [*]u8 = undefined,
    from: [*]const u8 = undefined,
    length: u32 = undefined,

    /// Returns 0, or a negative errno.
    inline fn find(self: *Place, shared: *const layout.Copy) i32 {
        // Read once, and only then checked.
        const one = @as(*const volatile layout.Copy, shared).*;
        const guest = self.table.pointerOf(one.view, one.offset, one.length) orelse return sys.fail(.FAULT);
        if (one.buffer_offset > self.size or one.length > self.size - one.buffer_offset) return sys.fail(.INVAL);
        const local = self.buffer + @as(usize, @intCast(one.buffer_offset));
        self.length = one.length;
        switch (one.access) {
            layout.access_write => {
                self.to = guest;
                self.from = local;
            },
            layout.access_read => {
                self.to = local;
                self.from = guest;
            },
            else => return sys.fail(.INVAL),
        }
        return 0;
    }

    /// It is copied next: what comes first, the processor's own prefetcher
    /// would have to be told by missing it.
    inline fn expect(self: *const Place) void {
        const most = 8 * 64;
        var at: u32 = 0;
        while (at < @min(self.length, most)) : (at += 64) prefetch.forReading(self.from + at);
    }
};

/// -EBUSY while a region is published, staged or not released, and before the
/// end of postcopy. Afterwards the
/// handle is dead; I/O in flight and readers finish first.
pub fn destroy(handle: u32) callconv(.c) i32 {
    const self = get(handle) orelse return sys.fail(.BADF);
    // Before the lock, for which a reader inside the IOTLB may be waiting.
    self.iotlb.clear(layout.space_uva);
    // Not under the lock: those who mark may need it before they are through.
    self.dirty_log.drop();
    self.lock.lock();
    defer self.lock.unlock();
    const table = self.table.load(.acquire);
    if (self.staged != null or table.regions.len > 0 or self.postcopy != null) return sys.fail(.BUSY);
    var next = self.views.first;
    while (next) |region| : (next = region.next) {
        if (region.phase == .retired) return sys.fail(.BUSY);
    }
    if (handles.remove(handle) != self) return sys.fail(.BADF);
    if (table != &no_regions) {
        self.table.store(&no_regions, .seq_cst);
        const freed: *Table = @constCast(table);
        freed.next = self.retired_tables;
        self.retired_tables = freed;
        self.retired_count += 1;
    }
    self.is_dying = true;
    self.reclaim();
    return 0;
}

/// Pages for a buffer of TypeScript's or for the driver's side of a test.
pub fn mapAnonymous(size: f64, address_out: *u64) callconv(.c) i32 {
    const length = bytes(size) orelse return sys.fail(.INVAL);
    if (length == 0) return sys.fail(.INVAL);
    var code: i32 = 0;
    const mapped = mapping.mapAnonymous(length, &code);
    return plain(mapped, code, address_out);
}

/// Whole pages of a device's file (registers), which another process has handed
/// out: for the front-end's side. End it by `unmap`.
pub fn mapPages(fd: i32, file_offset: f64, size: f64, address_out: *u64) callconv(.c) i32 {
    const length = bytes(size) orelse return sys.fail(.INVAL);
    const offset = bytes(file_offset) orelse return sys.fail(.INVAL);
    const page = mapping.systemPage();
    if (length == 0 or (length | offset) % page != 0) return sys.fail(.INVAL);
    var code: i32 = 0;
    const mapped = mapping.mapDevice(fd, offset, length, &code);
    return plain(mapped, code, address_out);
}

/// The start of a file, for the front-end's side and for small shared areas.
/// When the file shrinks it reads as zeros, like guest memory.
pub fn mapShared(fd: i32, size: f64, address_out: *u64) callconv(.c) i32 {
    const length = bytes(size) orelse return sys.fail(.INVAL);
    if (length == 0) return sys.fail(.INVAL);
    var code: i32 = 0;
    const file = mapping.File.inspect(fd, &code) catch |failure| switch (failure) {
        error.Kind => return sys.fail(.INVAL),
        error.System => return code,
    };
    if (file.size < length) return sys.fail(.INVAL);
    const mapped = mapping.mapFile(fd, file, 0, length, null, &code);
    return plain(mapped, code, address_out);
}

fn plain(mapped: mapping.MapError!*Mapping, code: i32, address_out: *u64) i32 {
    const slot = mapped catch |failure| switch (failure) {
        error.RegisterFull => return sys.fail(.NOSPC),
        error.System => return code,
    };
    address_out.* = slot.address;
    mapping.setPlain(slot);
    return 0;
}

/// Ends a mapping of `map_anonymous` or `map_shared`; -EINVAL for any other.
pub fn unmap(address: u64, size: f64) callconv(.c) i32 {
    const length = bytes(size) orelse return sys.fail(.INVAL);
    return if (mapping.endPlain(address, length)) 0 else sys.fail(.INVAL);
}

/// Puts `size` bytes of a file from `file_offset` on over a part of a mapping
/// of `map_anonymous`, or with `fd` -1 zero pages again: a window into which
/// files come and go. All numbers are multiples of the system's page; who
/// changes what is mapped must know that nobody reads it. The file must not
/// be one that cannot be mapped safely (as in `memory_prepare`).
pub fn mapOver(address: u64, size: f64, fd: i32, file_offset: f64) callconv(.c) i32 {
    const length = bytes(size) orelse return sys.fail(.INVAL);
    const offset = bytes(file_offset) orelse return sys.fail(.INVAL);
    if (fd >= 0) {
        var code: i32 = 0;
        const file = mapping.File.inspect(fd, &code) catch |failure| switch (failure) {
            error.Kind => return sys.fail(.INVAL),
            error.System => return code,
        };
        if (file.size < offset or file.size - offset < length) return sys.fail(.INVAL);
    }
    return mapping.mapOver(address, length, fd, offset);
}

test {
    _ = copying;
    _ = @import("dirty_log.zig");
    _ = mapping;
    _ = postcopy;
    _ = @import("userfault.zig");
    _ = stage;
    _ = tables;
    _ = views;
    _ = @import("memory_test.zig");
    _ = @import("life_test.zig");
    _ = @import("borrowed_test.zig");
}
