//! The dirty log of a migration (vhost-user, "Logging"): a bitmap, shared with
//! the front-end, of the guest pages that were written. Two switches say what
//! is logged: LOG_ALL the buffers, and each ring's VHOST_VRING_F_LOG what we
//! write into that ring, at an address that the front-end names.
//!
//! The front-end takes a page's bit and then copies the page, so a bit is set
//! after its page was written. What it may rely on after a change of the log or
//! of a switch (its reply) is that nobody still goes by what was before: those
//! who mark (`Writer`, any thread) announce themselves in one of two counters,
//! and whoever changes something lets newcomers use the other one and waits
//! until the first is empty.
//!
//! Size, offset and the file itself are the front-end's, so they are checked
//! like those of guest memory: pages beyond the log are not marked, and a file
//! that shrinks reads as zeros and breaks the device, since a migration that
//! loses bits would lose data.

const std = @import("std");
const linux = std.os.linux;
const sync = @import("../sync.zig");
const sys = @import("../linux.zig");
const layout = @import("../layout.zig");
const untrusted_event = @import("../untrusted_event.zig");
const mapping = @import("mapping.zig");
const memory = @import("memory.zig");

const Atomic = std.atomic.Value;

/// VHOST_LOG_PAGE: bytes of guest memory to a bit.
pub const page_size = 0x1000;
/// SET_VRING_KICK has 8 bits for the index.
pub const queue_maximum = 256;

/// What VHOST_VRING_F_LOG and `log_guest_addr` say of one ring: `state` is 0
/// where it is not logged, else one more than the index of the address that
/// counts; the other one is free for the next.
const RingLog = struct {
    state: Atomic(u32),
    addresses: [2]Atomic(u64),
};

pub const DirtyLog = struct {
    log: Atomic(?*mapping.Mapping),
    /// LOG_ALL.
    is_logging: Atomic(bool),
    /// Signalled when bits were set, or -1.
    event: Atomic(i32),
    rings: [queue_maximum]RingLog,

    /// Its lowest bit says which counter newcomers use.
    lap: Atomic(u32),
    writers: [2]Atomic(u32),
    /// Held by whoever changes something, one at a time.
    lock: sync.Mutex,

    /// Of zeroed pages: `rings` is left as it is, so that what no ring uses
    /// takes no memory.
    pub fn init(self: *DirtyLog) void {
        self.log = .init(null);
        self.is_logging = .init(false);
        self.event = .init(-1);
        self.lap = .init(0);
        self.writers = .{ .init(0), .init(0) };
        self.lock = .{};
    }

    /// Begins to mark what was written before. Must not wait for another
    /// thread before `leave`.
    pub fn enter(self: *DirtyLog) Writer {
        while (true) {
            const side = self.lap.load(.seq_cst) & 1;
            // seq_cst: a full barrier between the writes of those who mark and
            // the look at their bits; and with `settle`: either it sees us in
            // the counter or we see its lap and all that it changed.
            _ = self.writers[side].fetchAdd(1, .seq_cst);
            if (self.lap.load(.seq_cst) & 1 == side) {
                const log = self.log.load(.seq_cst);
                return .{
                    .owner = self,
                    .side = side,
                    .bytes = if (log) |found| found.pointer()[0..found.size] else &.{},
                };
            }
            _ = self.writers[side].fetchSub(1, .release);
        }
    }

    /// Returns when nobody goes by what was before the change. Under the lock.
    fn settle(self: *DirtyLog) void {
        const side = self.lap.fetchAdd(1, .seq_cst) & 1;
        while (self.writers[side].load(.seq_cst) != 0) _ = linux.sched_yield();
    }

    fn replaceLog(self: *DirtyLog, next: ?*mapping.Mapping) void {
        self.lock.lock();
        defer self.lock.unlock();
        const old = self.log.swap(next, .seq_cst);
        self.settle();
        if (old) |gone| gone.unmap();
    }

    fn setLogging(self: *DirtyLog, is_on: bool) void {
        self.lock.lock();
        defer self.lock.unlock();
        self.is_logging.store(is_on, .seq_cst);
        self.settle();
    }

    fn replaceEvent(self: *DirtyLog, next: i32) void {
        self.lock.lock();
        defer self.lock.unlock();
        const old = self.event.swap(next, .seq_cst);
        self.settle();
        if (old >= 0) sys.closeQuietly(old);
    }

    fn setRing(self: *DirtyLog, queue: u32, is_logged: bool, address: u64) void {
        self.lock.lock();
        defer self.lock.unlock();
        const ring = &self.rings[queue];
        // A write in the meantime is marked at the one or the other address.
        const next: u32 = if (ring.state.load(.monotonic) == 1) 2 else 1;
        ring.addresses[next - 1].store(address, .seq_cst);
        ring.state.store(if (is_logged) next else 0, .seq_cst);
        self.settle();
    }

    /// As it was made: nothing is logged, nothing is held.
    pub fn drop(self: *DirtyLog) void {
        self.replaceLog(null);
        self.setLogging(false);
        self.replaceEvent(-1);
        for (&self.rings) |*ring| ring.state.store(0, .seq_cst);
    }
};

/// Who marks. All of its writes to guest memory that are to be marked
/// happen before `enter`, or are seq_cst stores, or are followed by one.
pub const Writer = struct {
    owner: *DirtyLog,
    side: u32,
    /// The log; empty where there is none.
    bytes: []u8,
    has_marked: bool = false,

    /// Whether buffers are logged.
    pub fn isLogging(self: *const Writer) bool {
        return self.bytes.len != 0 and self.owner.is_logging.load(.seq_cst);
    }

    /// The address that stands for what we write into a ring, if it is logged.
    pub fn ringAddress(self: *const Writer, queue: u32) ?u64 {
        const ring = &self.owner.rings[queue];
        const state = ring.state.load(.seq_cst);
        if (self.bytes.len == 0 or state == 0) return null;
        return ring.addresses[state - 1].load(.seq_cst);
    }

    /// Sets the bits of all pages of [gpa, gpa + length), where the log has
    /// them.
    pub fn mark(self: *Writer, gpa: u64, length: u64) void {
        if (length == 0) return;
        const first = gpa / page_size;
        if (first / 8 >= self.bytes.len) return;
        // No overflow: a log that is mapped has less than 2^48 bytes.
        const last = @min((gpa +| (length - 1)) / page_size, self.bytes.len * 8 - 1);
        var at: usize = @intCast(first / 8);
        const end: usize = @intCast(last / 8);
        var mask = @as(u8, 0xff) << @as(u3, @intCast(first % 8));
        while (at < end) {
            if (mask == 0xff and end - at > 8 and @intFromPtr(&self.bytes[at]) % 8 == 0) {
                self.set(u64, @ptrCast(@alignCast(&self.bytes[at])), std.math.maxInt(u64));
                at += 8;
            } else {
                self.set(u8, &self.bytes[at], mask);
                mask = 0xff;
                at += 1;
            }
        }
        self.set(u8, &self.bytes[at], mask & @as(u8, 0xff) >> @as(u3, @intCast(7 - last % 8)));
    }

    inline fn set(self: *Writer, comptime T: type, word: *T, mask: T) void {
        // The write before the look, see `enter`: a bit that is found set is
        // one that the front-end has still to take, and the page after it.
        if (@atomicLoad(T, word, .seq_cst) & mask == mask) return;
        _ = @atomicRmw(T, word, .Or, mask, .seq_cst);
        self.has_marked = true;
    }

    pub fn leave(self: *Writer) void {
        if (self.has_marked) {
            const event = self.owner.event.load(.seq_cst);
            if (event >= 0) _ = untrusted_event.signal(event);
        }
        _ = self.owner.writers[self.side].fetchSub(1, .release);
    }
};

fn refuse(result: *layout.PrepareResult, reason: u32, value: u64, limit: u64, code: i32) i32 {
    result.reason = reason;
    result.value = value;
    result.limit = limit;
    return code;
}

/// SET_LOG_BASE: `size` bytes at `offset` of the file, which stays the
/// caller's; no log with fd -1. On return nobody uses the log before. Where
/// this one is refused (`result` says why) that stays as it is.
pub fn setBase(handle: u32, fd: i32, size: u64, offset: u64, result: *layout.PrepareResult) callconv(.c) i32 {
    result.* = std.mem.zeroes(layout.PrepareResult);
    const object = memory.get(handle) orelse return sys.fail(.BADF);
    if (fd == -1) {
        object.dirty_log.replaceLog(null);
        return 0;
    }
    if (size == 0) return refuse(result, layout.refuse_size_zero, 0, 0, sys.fail(.INVAL));
    const needed = std.math.add(u64, size, offset) catch
        return refuse(result, layout.refuse_file_offset_wraps, offset, 0, sys.fail(.INVAL));
    var code: i32 = 0;
    const file = mapping.File.inspect(fd, &code) catch |failure| switch (failure) {
        error.Kind => return refuse(result, layout.refuse_file_kind, 0, 0, sys.fail(.INVAL)),
        error.System => return refuse(result, layout.refuse_mmap, @intCast(-code), 0, code),
    };
    if (file.size < needed) {
        return refuse(result, layout.refuse_file_too_small, file.size, needed, sys.fail(.INVAL));
    }
    const next = mapping.mapFile(fd, file, offset, size, &object.health, &code) catch |failure| switch (failure) {
        error.RegisterFull => return refuse(result, layout.refuse_mappings, 0, 0, sys.fail(.NOSPC)),
        error.System => return refuse(result, layout.refuse_mmap, @intCast(-code), 0, code),
    };
    object.dirty_log.replaceLog(next);
    return 0;
}

/// LOG_ALL: on return everybody goes by it.
pub fn setLogging(handle: u32, is_on: u32) callconv(.c) i32 {
    const object = memory.get(handle) orelse return sys.fail(.BADF);
    object.dirty_log.setLogging(is_on != 0);
    return 0;
}

/// VHOST_VRING_F_LOG and `log_guest_addr` of a ring: likewise.
pub fn setRing(handle: u32, queue: u32, is_logged: u32, address: u64) callconv(.c) i32 {
    const object = memory.get(handle) orelse return sys.fail(.BADF);
    if (queue >= queue_maximum) return sys.fail(.INVAL);
    object.dirty_log.setRing(queue, is_logged != 0, address);
    return 0;
}

/// SET_LOG_FD: takes the eventfd over; -1: none. On return the one before is
/// closed.
pub fn setEvent(handle: u32, fd: i32) callconv(.c) i32 {
    const object = memory.get(handle) orelse return sys.fail(.BADF);
    object.dirty_log.replaceEvent(fd);
    return 0;
}

/// Somebody else than a ring has written guest memory.
pub fn mark(handle: u32, gpa: u64, length: u64) callconv(.c) i32 {
    const object = memory.get(handle) orelse return sys.fail(.BADF);
    var writer = object.dirty_log.enter();
    defer writer.leave();
    if (writer.isLogging()) writer.mark(gpa, length);
    return 0;
}

/// Somebody has written `length` bytes at `offset` of a used ring by himself.
pub fn markRing(handle: u32, queue: u32, offset: u32, length: u32) callconv(.c) i32 {
    const object = memory.get(handle) orelse return sys.fail(.BADF);
    if (queue >= queue_maximum) return sys.fail(.INVAL);
    var writer = object.dirty_log.enter();
    defer writer.leave();
    if (writer.ringAddress(queue)) |address| writer.mark(address +| offset, length);
    return 0;
}

test {
    _ = @import("dirty_log_test.zig");
}
