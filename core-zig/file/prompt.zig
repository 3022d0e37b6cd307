//! Writes into the page cache by a thread that must not wait long: an event
//! loop's.
//!
//! Such a write is a copy of some microseconds, less than it costs to have a
//! thread do it. But it may wait as well: for the disk when too much is dirty,
//! for the journal, for a page that has to be read first. RWF_NOWAIT would say
//! so beforehand; ext4 and tmpfs refuse it (EOPNOTSUPP), and those that take it
//! need none of this (`traits.zig`). So the calls are watched:
//!
//! - A file whose write has slept is left to the threads for a hundred times as
//!   long as that took. So the loop stands still for such writes during at most
//!   a hundredth of its time, however slow the disk, once per file.
//! - One call of the engine writes for `budget_ns`; the next `reap` goes on.

const std = @import("std");
const sys = @import("../linux.zig");
const linux = sys.linux;

/// What the loop does not notice.
const budget_ns: u64 = 200_000;
/// A shorter call than this did not wait for anything worth a thread.
const suspicious_ns: u64 = 50_000;
const hold_factor = 100;
const longest_hold_ns: u64 = 60 * std.time.ns_per_s;

/// Larger writes copy long enough to be worth a thread, which may have a
/// processor of its own.
pub const largest_bytes: u64 = 64 << 10;

/// Until when files are left to the threads. Files whose numbers agree in
/// their lower bits share one, and so a slow disk's: that costs rate only.
pub const Gates = struct {
    closed_until: [count]u64 = @splat(0),

    const count = 64;

    fn gate(self: *Gates, file: i32) *u64 {
        return &self.closed_until[@as(u32, @bitCast(file)) % count];
    }

    pub fn isOpen(self: *Gates, file: i32, now: u64) bool {
        return now >= self.gate(file).*;
    }

    /// A write of `file` has slept for `duration`, until `now`.
    fn close(self: *Gates, file: i32, duration: u64, now: u64) void {
        self.gate(file).* = now + @min(duration *| hold_factor, longest_hold_ns);
    }
};

/// Watches the calls of one turn.
pub const Watch = struct {
    begin: u64,
    now: u64,
    sleeps: isize,

    pub fn start() Watch {
        const now = monotonic();
        return .{ .begin = now, .now = now, .sleeps = sleepsOfThread() };
    }

    /// After a call that wrote into `file`.
    pub fn lap(self: *Watch, gates: *Gates, file: i32) void {
        const before = self.now;
        self.now = monotonic();
        if (self.now - before < suspicious_ns) return;
        // Who was only preempted has not slept: the disk is not to blame.
        const sleeps = sleepsOfThread();
        if (sleeps != self.sleeps) gates.close(file, self.now - before, self.now);
        self.sleeps = sleeps;
    }

    pub fn isOver(self: *const Watch) bool {
        return self.now - self.begin >= budget_ns;
    }
};

/// How often the calling thread gave its processor away to wait.
fn sleepsOfThread() isize {
    const rusage_thread = 1;
    var usage: linux.rusage = undefined;
    return if (sys.isError(linux.getrusage(rusage_thread, &usage))) 0 else usage.nvcsw;
}

pub fn monotonic() u64 {
    var time: linux.timespec = undefined;
    _ = linux.clock_gettime(.MONOTONIC, &time);
    return @as(u64, @intCast(time.sec)) * std.time.ns_per_s + @as(u64, @intCast(time.nsec));
}

test "a file whose write slept is left to threads for a hundred times as long, others are not" {
    var gates: Gates = .{};
    try std.testing.expect(gates.isOpen(7, 0));
    gates.close(7, 3_000, 10_000);
    try std.testing.expect(!gates.isOpen(7, 309_999));
    try std.testing.expect(gates.isOpen(7, 310_000));
    try std.testing.expect(gates.isOpen(8, 10_000));
    gates.close(7, std.math.maxInt(u64), 0);
    try std.testing.expect(gates.isOpen(7, longest_hold_ns));
    // Numbers that no file has are numbers all the same.
    try std.testing.expect(gates.isOpen(-1, 0));
}

test "a call that slept closes its file's gate, one that only took long does not" {
    var gates: Gates = .{};
    var watch = Watch.start();
    const end = watch.begin + 3 * suspicious_ns;
    while (monotonic() < end) {}
    watch.lap(&gates, 3);
    try std.testing.expect(gates.isOpen(3, watch.now));
    const nap: linux.timespec = .{ .sec = 0, .nsec = 2 * suspicious_ns };
    _ = linux.nanosleep(&nap, null);
    watch.lap(&gates, 3);
    try std.testing.expect(!gates.isOpen(3, watch.now));
    try std.testing.expect(gates.isOpen(4, watch.now));
    // 250 us by then.
    try std.testing.expect(watch.isOver());
}
