//! The requests through an io_uring of our own, by bare system calls.
//!
//! Two rings shared with the kernel: we fill submission entries (SQE) and
//! publish the tail, `io_uring_enter` consumes them; the kernel publishes
//! completions (CQE) and we publish how far we read. A slot has at most one
//! entry outstanding and the completion ring has twice the slots, so neither
//! ring can overflow.

const std = @import("std");
const sys = @import("../linux.zig");
const Slot = @import("request.zig").Slot;
const linux = sys.linux;

/// Marks the completion of a cancellation, which belongs to no slot.
const cancel_mark: u64 = std.math.maxInt(u64);

pub const Ring = struct {
    fd: i32,
    mapping: []align(std.heap.page_size_min) u8,
    entries_mapping: []align(std.heap.page_size_min) u8,
    sqes: [*]linux.io_uring_sqe,
    sq_head: *std.atomic.Value(u32),
    sq_tail: *std.atomic.Value(u32),
    sq_flags: *const std.atomic.Value(u32),
    sq_mask: u32,
    cqes: [*]const linux.io_uring_cqe,
    cq_head: *std.atomic.Value(u32),
    cq_tail: *std.atomic.Value(u32),
    cq_mask: u32,
    /// Our tail; the shared one follows in `flush`.
    tail: u32 = 0,

    /// A ring of `entries` (a power of two) that signals `event`. The errno
    /// says why not.
    pub fn init(self: *Ring, entries: u32, event: i32) i32 {
        var params = std.mem.zeroes(linux.io_uring_params);
        const quiet = linux.IORING_SETUP_COOP_TASKRUN | linux.IORING_SETUP_TASKRUN_FLAG;
        params.flags = linux.IORING_SETUP_CQSIZE | quiet;
        params.cq_entries = entries * 2;
        var fd = sys.result(linux.io_uring_setup(entries, &params));
        if (fd == sys.fail(.INVAL)) {
            // Before 5.19 the kernel interrupts us for each completion.
            params = std.mem.zeroes(linux.io_uring_params);
            params.flags = linux.IORING_SETUP_CQSIZE;
            params.cq_entries = entries * 2;
            fd = sys.result(linux.io_uring_setup(entries, &params));
        }
        if (fd < 0) return fd;
        const result = self.attach(fd, &params, event);
        if (result < 0) sys.closeQuietly(fd);
        return result;
    }

    fn attach(self: *Ring, fd: i32, params: *const linux.io_uring_params, event: i32) i32 {
        // NODROP: no completion is lost. SUBMIT_STABLE: iovecs are copied.
        const needed = linux.IORING_FEAT_SINGLE_MMAP | linux.IORING_FEAT_NODROP | linux.IORING_FEAT_SUBMIT_STABLE;
        if (params.features & needed != needed) return sys.fail(.NOSYS);
        const probed = probe(fd);
        if (probed < 0) return probed;
        const registered = sys.result(linux.io_uring_register(fd, .REGISTER_EVENTFD, &event, 1));
        if (registered < 0) return registered;

        const sq_bytes = params.sq_off.array + params.sq_entries * @sizeOf(u32);
        const cq_bytes = params.cq_off.cqes + params.cq_entries * @sizeOf(linux.io_uring_cqe);
        const mapping = map(fd, linux.IORING_OFF_SQ_RING, @max(sq_bytes, cq_bytes)) orelse return sys.fail(.NOMEM);
        const entries_mapping = map(fd, linux.IORING_OFF_SQES, params.sq_entries * @sizeOf(linux.io_uring_sqe)) orelse {
            _ = linux.munmap(mapping.ptr, mapping.len);
            return sys.fail(.NOMEM);
        };
        const base = mapping.ptr;
        self.* = .{
            .fd = fd,
            .mapping = mapping,
            .entries_mapping = entries_mapping,
            .sqes = @ptrCast(entries_mapping.ptr),
            .sq_head = at(std.atomic.Value(u32), base, params.sq_off.head),
            .sq_tail = at(std.atomic.Value(u32), base, params.sq_off.tail),
            .sq_flags = at(std.atomic.Value(u32), base, params.sq_off.flags),
            .sq_mask = params.sq_entries - 1,
            .cqes = @ptrCast(at(linux.io_uring_cqe, base, params.cq_off.cqes)),
            .cq_head = at(std.atomic.Value(u32), base, params.cq_off.head),
            .cq_tail = at(std.atomic.Value(u32), base, params.cq_off.tail),
            .cq_mask = params.cq_entries - 1,
        };
        // Entry n of the array is SQE n, for good.
        const array: [*]u32 = @ptrCast(at(u32, base, params.sq_off.array));
        for (0..params.sq_entries) |index| array[index] = @intCast(index);
        return 0;
    }

    fn at(comptime T: type, base: [*]u8, offset: u32) *T {
        return @ptrCast(@alignCast(base + offset));
    }

    fn map(fd: i32, offset: i64, length: usize) ?[]align(std.heap.page_size_min) u8 {
        const raw = linux.mmap(null, length, .{ .READ = true, .WRITE = true }, .{ .TYPE = .SHARED, .POPULATE = true }, fd, offset);
        if (sys.isError(raw)) return null;
        const pointer: [*]align(std.heap.page_size_min) u8 = @ptrFromInt(raw);
        return pointer[0..length];
    }

    /// 0 when the kernel has every operation that we use.
    fn probe(fd: i32) i32 {
        // struct io_uring_probe: 16 bytes, then 8 per operation: op, 0, flags.
        var answer: [16 + 256 * 8]u8 align(8) = @splat(0);
        const raw = sys.result(linux.io_uring_register(fd, .REGISTER_PROBE, &answer, 256));
        if (raw < 0) return sys.fail(.NOSYS);
        const needed = [_]linux.IORING_OP{ .READV, .WRITEV, .READ, .WRITE, .FSYNC, .FALLOCATE, .ASYNC_CANCEL };
        for (needed) |operation| {
            const index = @intFromEnum(operation);
            const flags = std.mem.readInt(u16, answer[16 + @as(usize, index) * 8 + 2 ..][0..2], .little);
            if (index > answer[0] or flags & linux.IO_URING_OP_SUPPORTED == 0) return sys.fail(.NOSYS);
        }
        return 0;
    }

    /// The kernel ends what is left by itself; closing does not wait for it.
    pub fn deinit(self: *Ring) void {
        sys.closeQuietly(self.fd);
        _ = linux.munmap(self.mapping.ptr, self.mapping.len);
        _ = linux.munmap(self.entries_mapping.ptr, self.entries_mapping.len);
    }

    /// Prepares the slot's next call; `flush` hands it over.
    pub fn add(self: *Ring, slot: *const Slot, index: u32) void {
        const sqe = &self.sqes[self.tail & self.sq_mask];
        self.tail +%= 1;
        switch (slot.phase) {
            .read, .write, .zero_write => {
                const vectors = slot.callVectors();
                const is_read = slot.phase == .read;
                if (vectors.len == 1) {
                    const length: u32 = @intCast(@min(vectors[0].len, 0x7fff_f000));
                    sqe.prep_rw(if (is_read) .READ else .WRITE, slot.file, @intFromPtr(vectors[0].base), length, slot.offset);
                } else {
                    sqe.prep_rw(if (is_read) .READV else .WRITEV, slot.file, @intFromPtr(vectors.ptr), vectors.len, slot.offset);
                }
                sqe.rw_flags = slot.rw_flags;
            },
            .flush => sqe.prep_fsync(slot.file, linux.IORING_FSYNC_DATASYNC),
            .punch, .zero_range => {
                sqe.prep_rw(.FALLOCATE, slot.file, slot.remaining, slot.fallocateMode(), slot.offset);
            },
        }
        if (slot.is_offloaded) sqe.flags = linux.IOSQE_ASYNC;
        sqe.user_data = index;
    }

    /// Asks the kernel to give up all that has not begun (since 5.19; before,
    /// the request is refused and we just wait). With nothing left to flush.
    pub fn cancel(self: *Ring) void {
        const sqe = &self.sqes[self.tail & self.sq_mask];
        self.tail +%= 1;
        sqe.prep_rw(.ASYNC_CANCEL, -1, 0, 0, 0);
        sqe.rw_flags = linux.IORING_ASYNC_CANCEL_ANY | linux.IORING_ASYNC_CANCEL_ALL;
        sqe.user_data = cancel_mark;
        _ = self.flush();
    }

    /// Entries that the kernel has not taken.
    fn waiting(self: *const Ring) u32 {
        return self.tail -% self.sq_head.load(.acquire);
    }

    /// Hands prepared entries to the kernel in one call. 0 when it took all,
    /// -EAGAIN when it lacks memory now and the next flush tries again, else
    /// why it never will: `takeBack` then returns the entries.
    pub fn flush(self: *Ring) i32 {
        // Release: the entries before the tail; the kernel acquires it.
        self.sq_tail.store(self.tail, .release);
        while (true) {
            const count = self.waiting();
            if (count == 0) return 0;
            const raw = linux.io_uring_enter(self.fd, count, 0, 0, null);
            switch (linux.errno(raw)) {
                .SUCCESS => if (raw == 0) return sys.fail(.AGAIN),
                .INTR => {},
                .AGAIN, .BUSY, .NOMEM => return sys.fail(.AGAIN),
                else => return sys.result(raw),
            }
        }
    }

    /// The slot of the newest entry that the kernel did not take.
    pub fn takeBack(self: *Ring) ?u32 {
        if (self.waiting() == 0) return null;
        self.tail -%= 1;
        self.sq_tail.store(self.tail, .release);
        const user_data = self.sqes[self.tail & self.sq_mask].user_data;
        return if (user_data <= self.sq_mask) @intCast(user_data) else self.takeBack();
    }

    pub const Done = struct { slot: u32, result: i32 };

    /// Lets the kernel post what it holds back until we enter it.
    pub fn poke(self: *Ring) void {
        const held_back = linux.IORING_SQ_TASKRUN | linux.IORING_SQ_CQ_OVERFLOW;
        if (self.sq_flags.load(.monotonic) & held_back == 0) return;
        _ = linux.io_uring_enter(self.fd, 0, 0, linux.IORING_ENTER_GETEVENTS, null);
    }

    pub fn next(self: *Ring) ?Done {
        while (true) {
            const head = self.cq_head.load(.monotonic);
            // Acquire: the kernel releases the tail after the entries.
            if (head == self.cq_tail.load(.acquire)) return null;
            const cqe = self.cqes[head & self.cq_mask];
            // Release: the entry was read; the kernel may overwrite it.
            self.cq_head.store(head +% 1, .release);
            if (cqe.user_data <= self.sq_mask) return .{ .slot = @intCast(cqe.user_data), .result = cqe.res };
        }
    }
};
