//! A lock that many readers hold together, or one writer alone. Sections are
//! short (microseconds); a waiting writer lets no new reader in, so that it
//! gets its turn however busy the readers are.

const std = @import("std");
const sync = @import("sync.zig");

const writer: u32 = 1 << 31;

pub const SharedLock = struct {
    /// Readers inside, and whether a writer is or waits to be.
    state: std.atomic.Value(u32) = .init(0),
    writers: sync.Mutex = .{},

    pub fn lockShared(self: *SharedLock) void {
        while (true) {
            const seen = self.state.load(.monotonic);
            if (seen & writer != 0) {
                sync.futexWait(&self.state, seen, null);
                continue;
            }
            if (self.state.cmpxchgWeak(seen, seen + 1, .acquire, .monotonic) == null) return;
        }
    }

    pub fn unlockShared(self: *SharedLock) void {
        if (self.state.fetchSub(1, .release) == writer | 1) sync.futexWake(&self.state, std.math.maxInt(i32));
    }

    pub fn lock(self: *SharedLock) void {
        self.writers.lock();
        // Acquire: pairs with the release of each reader that leaves.
        var seen = self.state.fetchOr(writer, .acquire) | writer;
        while (seen != writer) {
            sync.futexWait(&self.state, seen, null);
            seen = self.state.load(.acquire);
        }
    }

    pub fn unlock(self: *SharedLock) void {
        self.state.store(0, .release);
        sync.futexWake(&self.state, std.math.maxInt(i32));
        self.writers.unlock();
    }
};

test "writers exclude readers and each other, and everybody gets his turn" {
    const Shared = struct {
        lock: SharedLock = .{},
        values: [2]u64 = .{ 0, 0 },
        torn: std.atomic.Value(u32) = .init(0),

        fn write(argument: ?*anyopaque) callconv(.c) ?*anyopaque {
            const self: *@This() = @ptrCast(@alignCast(argument.?));
            for (0..2000) |_| {
                self.lock.lock();
                self.values[0] += 1;
                self.values[1] += 1;
                self.lock.unlock();
            }
            return null;
        }

        fn read(argument: ?*anyopaque) callconv(.c) ?*anyopaque {
            const self: *@This() = @ptrCast(@alignCast(argument.?));
            for (0..10_000) |_| {
                self.lock.lockShared();
                if (self.values[0] != self.values[1]) _ = self.torn.fetchAdd(1, .monotonic);
                self.lock.unlockShared();
            }
            return null;
        }
    };
    var shared: Shared = .{};
    const threads = [_]sync.Thread{
        sync.Thread.spawn(Shared.write, &shared).?,
        sync.Thread.spawn(Shared.write, &shared).?,
        sync.Thread.spawn(Shared.read, &shared).?,
        sync.Thread.spawn(Shared.read, &shared).?,
    };
    for (threads) |thread| thread.join();
    try std.testing.expectEqual(4000, shared.values[0]);
    try std.testing.expectEqual(4000, shared.values[1]);
    try std.testing.expectEqual(0, shared.torn.load(.monotonic));
}
