//! One mmap'ed region, and the process-wide register of all of them in which
//! the SIGBUS handler finds the region of a fault.
//!
//! A `Mapping` is a slot of the register: slots are never freed to the system,
//! so that the handler may look at any of them at any time. Whoever takes a
//! range out of the register waits until no handler is at work (`unwatch`),
//! so that no handler replaces addresses that belong to somebody else by now.

const std = @import("std");
const linux = std.os.linux;
const sync = @import("../sync.zig");
const sys = @import("../linux.zig");
const layout = @import("../layout.zig");
const userfault = @import("userfault.zig");

const Atomic = std.atomic.Value;

/// Suits every page size of the architecture: file offsets are rounded down
/// to it and lengths up.
const page_size: u64 = std.heap.page_size_max;

/// Bytes that zero pages may keep occupied because their views could not be
/// detached (Node 20); beyond it new regions are refused.
pub const quarantine_limit: u64 = 1 << 40;
pub var quarantined: Atomic(u64) = .init(0);

/// A device's condition: all that the signal handler touches of it.
pub const Health = struct {
    state: Atomic(u32) = .init(layout.memory_ok),
    /// An eventfd, or -1.
    event: Atomic(i32) = .init(-1),

    /// Async-signal-safe. Signals on the first fault only.
    pub fn fault(self: *Health) void {
        if (self.state.cmpxchgStrong(layout.memory_ok, layout.memory_faulted, .seq_cst, .seq_cst) != null) return;
        self.notify();
    }

    pub fn isRevoked(self: *const Health) bool {
        const state = self.state.load(.acquire);
        return state == layout.memory_revoked or state == layout.memory_starved;
    }

    /// Has the isolate look at the state. Async-signal-safe.
    pub fn notify(self: *Health) void {
        const fd = self.event.load(.acquire);
        const one: u64 = 1;
        if (fd >= 0) _ = linux.write(fd, std.mem.asBytes(&one), 8);
    }
};

/// Which file a descriptor is, and how it may be mapped.
pub const File = struct {
    device: u64 = 0,
    inode: u64 = 0,
    size: u64 = 0,
    page: u64 = page_size,

    pub const InspectError = error{ Kind, System };

    /// `code` gets the errno of `error.System`. Accepted are regular files
    /// (memfd, shared memory, hugetlbfs, disk). FUSE is refused: its page
    /// faults wait for a process of the peer's choice, possibly for ever.
    pub fn inspect(fd: i32, code: *i32) InspectError!File {
        var status: linux.Statx = undefined;
        code.* = sys.result(linux.statx(fd, "", linux.AT.EMPTY_PATH, .{ .TYPE = true, .SIZE = true, .INO = true }, &status));
        if (code.* < 0) return error.System;
        if (status.mode & linux.S.IFMT != linux.S.IFREG) return error.Kind;
        // struct statfs begins with the words f_type and f_bsize.
        var words: [32]u64 = undefined;
        code.* = sys.result(linux.syscall2(.fstatfs, @as(usize, @bitCast(@as(isize, fd))), @intFromPtr(&words)));
        if (code.* < 0) return error.System;
        const kind: u32 = @truncate(words[0]);
        if (kind == fuse_magic) return error.Kind;
        var page = page_size;
        if (kind == hugetlbfs_magic) {
            if (!std.math.isPowerOfTwo(words[1]) or words[1] > 1 << 40) return error.Kind;
            page = @max(page, words[1]);
        }
        return .{
            .device = @as(u64, status.dev_major) << 32 | status.dev_minor,
            .inode = status.ino,
            .size = status.size,
            .page = page,
        };
    }

    const fuse_magic: u32 = 0x6573_5546;
    const hugetlbfs_magic: u32 = 0x9584_58f6;
};

/// Where in its life a region is; under the lock of the Memory that owns it.
pub const Phase = enum {
    free,
    /// Mapped by `prepare`, in no table yet.
    staged,
    published,
    /// Out of the table; TypeScript still has its view.
    retired,
    /// Released by TypeScript; a reader may still be inside an old table.
    leaving,
    /// No reader is left; in-flight I/O may hold it.
    released,
    /// Not guest memory: a mapping of `map_anonymous` or `map_shared`.
    plain,
};

pub const Mapping = struct {
    // For the signal handler. `watch_start` is 0 when nothing is watched, and
    // is stored last (release) and loaded first (acquire).
    watch_start: Atomic(usize) = .init(0),
    watch_end: Atomic(usize) = .init(0),
    health: Atomic(?*Health) = .init(null),
    /// The file's pages were replaced by zero pages.
    is_zeroed: Atomic(bool) = .init(false),

    /// The userfaultfd that watches it for missing pages, or -1.
    userfault: Atomic(i32) = .init(-1),

    /// One of the owner, and one of each I/O in flight.
    references: Atomic(u32) = .init(0),
    /// Zero pages are due when the I/O in flight ends (`memory_revoke`).
    is_revoked: Atomic(bool) = .init(false),
    index: u32,
    phase: Phase = .free,
    is_detached: bool = false,
    /// A part of a plain mapping (a PCI BAR), which is held as long.
    is_borrowed: bool = false,
    parent: ?*Mapping = null,
    /// Of a plain mapping, under the register's lock: how many have borrowed
    /// of it, and whether one of them left views behind.
    holds: u32 = 0,
    has_views_left: bool = false,

    base: usize = 0,
    map_size: usize = 0,
    /// The region itself: within a page of `base`.
    address: usize = 0,
    size: u64 = 0,
    file: File = .{},
    offset: u64 = 0,

    view_first: u32 = 0,
    view_count: u32 = 0,
    /// The owner's list, or the list of free slots.
    next: ?*Mapping = null,

    pub fn pointer(self: *const Mapping) [*]u8 {
        return @ptrFromInt(self.address);
    }

    /// Whether all of the range is in it.
    fn covers(self: *const Mapping, address: u64, size: u64) bool {
        if (address < self.address) return false;
        const offset = address - self.address;
        return offset <= self.size and size <= self.size - offset;
    }

    /// Is it a mapping of these bytes of this file, and still whole?
    pub fn isOf(self: *const Mapping, file: File, offset: u64, size: u64) bool {
        return !self.is_borrowed and self.size == size and self.offset == offset and
            self.file.device == file.device and self.file.inode == file.inode and
            !self.is_zeroed.load(.acquire);
    }

    /// Is it borrowed, from there, and still whole?
    pub fn isBorrowedAt(self: *const Mapping, address: u64) bool {
        const parent = self.parent orelse return false;
        return self.address == address and !parent.is_zeroed.load(.acquire);
    }

    /// Puts zero pages in the place of all its pages, in one step. Every
    /// pointer into it stays valid and shows nothing. Async-signal-safe.
    /// Anonymous pages even over huge ones: those may run out, these do not.
    pub fn replaceByZeros(self: *Mapping) bool {
        if (self.parent) |parent| return parent.replaceByZeros();
        if (!zeroRange(self.base, self.map_size)) return false;
        self.is_zeroed.store(true, .release);
        self.wakeSleepers();
        return true;
    }

    /// The file's bytes take the place of all its pages, in one step.
    pub fn replaceBy(self: *Mapping, fd: i32) bool {
        const raw = linux.mmap(@ptrFromInt(self.base), self.map_size, Prot, .{ .TYPE = .SHARED, .NORESERVE = true, .FIXED = true }, fd, 0);
        if (sys.isError(raw)) return false;
        self.is_zeroed.store(true, .release);
        self.wakeSleepers();
        return true;
    }

    /// Who waits for a page of a mapping that was replaced would wait for
    /// ever. Async-signal-safe.
    fn wakeSleepers(self: *Mapping) void {
        const fd = self.userfault.load(.seq_cst);
        if (fd >= 0) userfault.wakeRange(fd, self.base, self.map_size);
    }

    fn watch(self: *Mapping, health: ?*Health) void {
        self.health.store(health, .monotonic);
        self.watch_end.store(self.base + self.map_size, .monotonic);
        self.watch_start.store(self.base, .release);
    }

    /// Pairs with `onFault`: either the handler sees that the range is gone,
    /// or we see the handler (both sides seq_cst) and wait until it is through.
    fn unwatch(self: *Mapping) void {
        self.watch_start.store(0, .seq_cst);
        awaitHandlers();
    }

    /// Ends the mapping and frees its slot.
    pub fn unmap(self: *Mapping) void {
        self.unwatch();
        if (!self.is_borrowed) _ = linux.munmap(@ptrFromInt(self.base), self.map_size);
        const parent = self.parent;
        free(self);
        if (parent) |lender| giveBack(lender, false);
    }

    /// Nobody needs a plain mapping any more.
    fn end(self: *Mapping) void {
        if (self.has_views_left) self.quarantine() else self.unmap();
    }

    /// For a view that could not be detached: zero pages stay there for ever.
    pub fn quarantine(self: *Mapping) void {
        if (self.parent) |parent| {
            self.unwatch();
            free(self);
            return giveBack(parent, true);
        }
        _ = quarantined.fetchAdd(self.map_size, .monotonic);
        // When even that fails the region stays as it is and stays watched,
        // for nobody.
        if (!self.replaceByZeros()) return self.health.store(null, .release);
        self.unwatch();
        free(self);
    }
};

/// Returns when no signal handler is at work that began before the call.
pub fn awaitHandlers() void {
    while (handlers_inside.load(.seq_cst) != 0) _ = linux.sched_yield();
}

const Prot = linux.PROT{ .READ = true, .WRITE = true };
const dontdump = 16; // MADV_DONTDUMP: guest memory is not for core dumps

fn zeroRange(base: usize, size: usize) bool {
    const raw = linux.mmap(@ptrFromInt(base), size, Prot, .{ .TYPE = .PRIVATE, .ANONYMOUS = true, .NORESERVE = true, .FIXED = true }, -1, 0);
    if (sys.isError(raw)) return false;
    _ = linux.madvise(@ptrFromInt(base), size, dontdump);
    return true;
}

const chunk_size = 512;
const Chunk = [chunk_size]Mapping;
/// Linux gives a process 65,530 mappings unless told otherwise.
const capacity = 1 << 16;
var chunks: [capacity / chunk_size]Atomic(?*Chunk) = @splat(.init(null));
var used: Atomic(u32) = .init(0);
var free_slots: ?*Mapping = null;
var lock: sync.Mutex = .{};
/// Signal handlers that are looking at the register now.
var handlers_inside: Atomic(u32) = .init(0);

pub fn at(index: u32) *Mapping {
    return &chunks[index / chunk_size].load(.acquire).?[index % chunk_size];
}

fn take() ?*Mapping {
    lock.lock();
    defer lock.unlock();
    if (free_slots) |slot| {
        free_slots = slot.next;
        slot.next = null;
        return slot;
    }
    const index = used.load(.monotonic);
    if (index == capacity) return null;
    if (index % chunk_size == 0) {
        const raw = linux.mmap(null, @sizeOf(Chunk), Prot, .{ .TYPE = .PRIVATE, .ANONYMOUS = true }, -1, 0);
        if (sys.isError(raw)) return null;
        const chunk: *Chunk = @ptrFromInt(raw);
        for (chunk, index..) |*slot, number| slot.* = .{ .index = @intCast(number) };
        chunks[index / chunk_size].store(chunk, .release);
    }
    used.store(index + 1, .release);
    return at(index);
}

fn free(slot: *Mapping) void {
    lock.lock();
    defer lock.unlock();
    // Field by field: a handler may be reading the atomic ones.
    slot.health.store(null, .monotonic);
    slot.is_zeroed.store(false, .monotonic);
    slot.is_revoked.store(false, .monotonic);
    slot.userfault.store(-1, .monotonic);
    slot.references.store(0, .monotonic);
    slot.phase = .free;
    slot.is_borrowed = false;
    slot.parent = null;
    slot.holds = 0;
    slot.has_views_left = false;
    slot.next = free_slots;
    free_slots = slot;
}

pub const MapError = error{ RegisterFull, System };

/// `offset + size` was checked against the file; `code` gets the errno.
pub fn mapFile(fd: i32, file: File, offset: u64, size: u64, health: ?*Health, code: *i32) MapError!*Mapping {
    const start = offset & ~(file.page - 1);
    const wanted = std.math.add(u64, offset - start + size, file.page - 1) catch {
        code.* = sys.fail(.NOMEM);
        return error.System;
    };
    const map_size: usize = wanted & ~(file.page - 1);
    const slot = take() orelse return error.RegisterFull;
    const raw = linux.mmap(null, map_size, Prot, .{ .TYPE = .SHARED, .NORESERVE = true }, fd, @intCast(start));
    if (sys.isError(raw)) {
        code.* = sys.result(raw);
        free(slot);
        return error.System;
    }
    _ = linux.madvise(@ptrFromInt(raw), map_size, dontdump);
    slot.base = raw;
    slot.map_size = map_size;
    slot.address = raw + @as(usize, offset - start);
    slot.size = size;
    slot.file = file;
    slot.offset = offset;
    slot.watch(health);
    return slot;
}

pub const BorrowError = error{ RegisterFull, Outside };

/// A part of a plain mapping of ours, which stays mapped as long, even when
/// its owner ends it. Any other address is refused.
pub fn borrow(address: u64, size: u64, health: ?*Health) BorrowError!*Mapping {
    const slot = take() orelse return error.RegisterFull;
    const parent = findPlain(address, size, true) orelse {
        free(slot);
        return error.Outside;
    };
    slot.is_borrowed = true;
    slot.parent = parent;
    slot.base = address;
    slot.map_size = size;
    slot.address = address;
    slot.size = size;
    slot.watch(health);
    return slot;
}

fn findPlain(address: u64, size: u64, is_held: bool) ?*Mapping {
    lock.lock();
    defer lock.unlock();
    for (0..used.load(.monotonic)) |index| {
        const slot = at(@intCast(index));
        if (slot.phase != .plain or !slot.covers(address, size)) continue;
        if (is_held) slot.holds += 1;
        return slot;
    }
    return null;
}

/// Whether a device may reach all of the range by DMA: a plain mapping of ours
/// has it, or a region of guest memory that is in its table.
pub fn isReachable(address: u64, size: u64) bool {
    lock.lock();
    defer lock.unlock();
    for (0..used.load(.monotonic)) |index| {
        const slot = at(@intCast(index));
        if (slot.phase != .plain and slot.phase != .published) continue;
        if (slot.covers(address, size)) return true;
    }
    return false;
}

/// One borrower less; the last one ends what the owner has given up.
fn giveBack(parent: *Mapping, has_views_left: bool) void {
    {
        lock.lock();
        defer lock.unlock();
        parent.holds -= 1;
        if (has_views_left) parent.has_views_left = true;
        if (parent.holds > 0 or parent.phase != .released) return;
    }
    parent.end();
}

pub fn mapAnonymous(size: u64, code: *i32) MapError!*Mapping {
    const map_size: usize = std.mem.alignForward(u64, size, page_size);
    const slot = take() orelse return error.RegisterFull;
    const raw = linux.mmap(null, map_size, Prot, .{ .TYPE = .PRIVATE, .ANONYMOUS = true, .NORESERVE = true }, -1, 0);
    if (sys.isError(raw)) {
        code.* = sys.result(raw);
        free(slot);
        return error.System;
    }
    slot.base = raw;
    slot.map_size = map_size;
    slot.address = raw;
    slot.size = size;
    slot.watch(null);
    return slot;
}

/// Ends the plain mapping of exactly this range, now or when nobody borrows of
/// it any more; false when there is none.
pub fn endPlain(address: u64, size: u64) bool {
    const slot = takePlain(address, size) orelse return false;
    if (slot.is_last) slot.mapping.end();
    return true;
}

fn takePlain(address: u64, size: u64) ?struct { mapping: *Mapping, is_last: bool } {
    lock.lock();
    defer lock.unlock();
    for (0..used.load(.monotonic)) |index| {
        const slot = at(@intCast(index));
        if (slot.phase != .plain or slot.address != address or slot.size != size) continue;
        slot.phase = .released;
        return .{ .mapping = slot, .is_last = slot.holds == 0 };
    }
    return null;
}

extern fn getauxval(kind: c_ulong) c_ulong;

/// Bytes of a page of this system. (Zig's own way needs a start-up of its own,
/// which a library has not.)
pub fn systemPage() u64 {
    const AT_PAGESZ = 6;
    const size: u64 = getauxval(AT_PAGESZ);
    return if (std.math.isPowerOfTwo(size) and size <= page_size) size else 4096;
}

/// A part of a device's file, which is no file to inspect: registers, or a
/// shared-memory BAR. `offset` and `size` are multiples of the system's page.
pub fn mapDevice(fd: i32, offset: u64, size: u64, code: *i32) MapError!*Mapping {
    const slot = take() orelse return error.RegisterFull;
    const raw = linux.mmap(null, size, Prot, .{ .TYPE = .SHARED }, fd, @bitCast(offset));
    if (sys.isError(raw)) {
        code.* = sys.result(raw);
        free(slot);
        return error.System;
    }
    slot.base = raw;
    slot.map_size = size;
    slot.address = raw;
    slot.size = size;
    slot.watch(null);
    return slot;
}

/// Puts `size` bytes of a file over a part of a plain mapping, or with `fd` -1
/// zero pages. All are multiples of the system's page.
pub fn mapOver(address: u64, size: u64, fd: i32, offset: u64) i32 {
    const slot = findPlain(address, size, true) orelse return sys.fail(.INVAL);
    defer giveBack(slot, false);
    const page = systemPage();
    if (size == 0 or (address | size | offset) % page != 0) return sys.fail(.INVAL);
    if (fd < 0) return if (zeroRange(address, size)) 0 else sys.fail(.NOMEM);
    const raw = linux.mmap(@ptrFromInt(address), size, Prot, .{ .TYPE = .SHARED, .NORESERVE = true, .FIXED = true }, fd, @bitCast(offset));
    return if (sys.isError(raw)) sys.result(raw) else 0;
}

/// The slot becomes one that `takePlain` finds.
pub fn setPlain(slot: *Mapping) void {
    lock.lock();
    defer lock.unlock();
    slot.phase = .plain;
}

/// The signal handler's part: when `address` is in a mapping of ours all of
/// it reads as zeros on return and its device is marked. Two threads may fault
/// in one region: the second replaces zeros by zeros.
pub fn onFault(address: usize) bool {
    _ = handlers_inside.fetchAdd(1, .seq_cst);
    defer _ = handlers_inside.fetchSub(1, .seq_cst);
    const count = used.load(.acquire);
    var is_ours = false;
    var index: u32 = 0;
    while (index < count) : (index += 1) {
        const slot = at(index);
        const start = slot.watch_start.load(.seq_cst);
        if (start == 0 or address < start or address >= slot.watch_end.load(.monotonic)) continue;
        // Who borrowed the range is told too; its lender has the pages.
        if (!slot.is_borrowed) {
            if (!zeroRange(start, slot.watch_end.load(.monotonic) - start)) return false;
            is_ours = true;
        }
        slot.is_zeroed.store(true, .release);
        slot.wakeSleepers();
        if (slot.health.load(.monotonic)) |health| health.fault();
    }
    return is_ours;
}

test "a file is known by what it is, not by its descriptor" {
    const fd: i32 = @intCast(linux.memfd_create("vhost2-test", linux.MFD.CLOEXEC));
    defer sys.closeQuietly(fd);
    const twin: i32 = @intCast(linux.dup(fd));
    defer sys.closeQuietly(twin);
    var code: i32 = 0;
    const file = try File.inspect(fd, &code);
    try std.testing.expectEqual(file, try File.inspect(twin, &code));
    try std.testing.expectError(error.System, File.inspect(-1, &code));
    try std.testing.expectEqual(sys.fail(.BADF), code);
    const event: i32 = @intCast(linux.eventfd(0, 0));
    defer sys.closeQuietly(event);
    try std.testing.expectError(error.Kind, File.inspect(event, &code));
}

test "slots are used again" {
    var code: i32 = 0;
    const first = try mapAnonymous(10, &code);
    const before = used.load(.monotonic);
    first.unmap();
    const second = try mapAnonymous(10, &code);
    try std.testing.expectEqual(before, used.load(.monotonic));
    second.unmap();
}
