//! The guest's check of a disk: writes blocks whose content says which block it
//! is and when it was written, and reads them back, in random order, at a queue
//! depth, through io_uring and O_DIRECT (no page cache of the guest in between).
//!
//!   verify fill    /dev/vda [options]   write every block with one generation
//!   verify check   /dev/vda [options]   every block must hold that generation
//!   verify mix     /dev/vda [options]   random reads and writes, each read
//!                                       checked, then all blocks once more
//!   verify bench   /dev/vda [options]   random reads, unchecked, and their rate
//!   verify discard /dev/vda [options]   discard, write zeroes, must read zeroes
//!
//!   --offset=BYTES --size=BYTES   the range; all of the disk unless given
//!   --depth=N                     requests in flight (16; at most 256)
//!   --count=N                     requests of mix and bench (2000)
//!   --seed=N --generation=N       (1, 1)
//!
//! mix says `verify mix running` when an eighth of its requests are made.
//! Ends with one line `verify <mode> ok: ...` and exit code 0, or with
//! `verify <mode> FAILED: ...` and exit code 1 at the first wrong block.

const std = @import("std");
const linux = std.os.linux;

const block_size = 4096;
/// Requests are 1 to this many blocks long.
const max_blocks = 16;
const max_depth = 256;
const magic: u64 = 0x7665726966792e32;

/// The first bytes of a block; `block_size - 4` is where its crc32c stands.
const Header = extern struct {
    magic: u64,
    block: u64,
    generation: u64,
    seed: u64,
};
const crc_offset = block_size - @sizeOf(u32);

const Mode = enum { fill, check, mix, bench, discard };

const Options = struct {
    mode: Mode,
    path: [*:0]const u8,
    offset: u64 = 0,
    size: u64 = 0,
    depth: u32 = 16,
    count: u64 = 2000,
    seed: u64 = 1,
    generation: u64 = 1,
};

/// One request in flight, and its own buffer.
const Slot = struct {
    buffer: []align(block_size) u8,
    first: u64,
    blocks: u32,
    is_write: bool,
    generation: u64,
};

pub fn main(init: std.process.Init.Minimal) u8 {
    const options = parse(init.args.vector);
    var run: Run = .init(options);
    switch (options.mode) {
        .fill => run.sequence(.fill),
        .check => run.sequence(.check),
        .mix => {
            run.mix();
            run.sequence(.mix);
            run.report();
        },
        .bench => run.bench(),
        .discard => run.discard(),
    }
    return 0;
}

const Run = struct {
    options: Options,
    fd: i32,
    ring: linux.IoUring,
    /// Blocks of the range.
    blocks: u64,
    slots: [max_depth]Slot = undefined,
    free: [max_depth]u32 = undefined,
    free_count: u32,
    /// The generation that each block holds, and whether it is in flight: mix.
    generations: []u32,
    busy: []u8,
    /// The mode's own state must not depend on the seed of the content.
    random: u64,
    requests: u64 = 0,
    bytes: u64 = 0,
    began_ns: u64,

    fn init(options: Options) Run {
        const opened = linux.open(options.path, .{ .ACCMODE = switch (options.mode) {
            .check, .bench => .RDONLY,
            .fill, .mix, .discard => .RDWR,
        }, .DIRECT = true, .CLOEXEC = true }, 0);
        if (linux.errno(opened) != .SUCCESS) {
            fail(options.mode, "cannot open {s}: {t}", .{ options.path, linux.errno(opened) });
        }
        const fd: i32 = @intCast(opened);
        const end = linux.lseek(fd, 0, linux.SEEK.END);
        const size = if (options.size != 0) options.size else end - options.offset;
        if (options.offset + size > end or size < max_blocks * block_size or
            options.offset % block_size != 0)
        {
            fail(options.mode, "range {d}+{d} does not fit into {d} bytes", .{ options.offset, size, end });
        }
        const blocks = size / block_size;
        var run: Run = .{
            .options = options,
            .fd = fd,
            .ring = linux.IoUring.init(max_depth, 0) catch |err|
                fail(options.mode, "io_uring: {t}", .{err}),
            .blocks = blocks,
            .free_count = options.depth,
            .generations = @alignCast(std.mem.bytesAsSlice(u32, pages(options.mode, blocks * @sizeOf(u32)))),
            .busy = pages(options.mode, blocks),
            .random = options.seed *% 0x9e3779b97f4a7c15 | 1,
            .began_ns = now(),
        };
        const buffers = pages(options.mode, options.depth * max_blocks * block_size);
        for (0..options.depth) |index| {
            run.slots[index].buffer = @alignCast(
                buffers[index * max_blocks * block_size ..][0 .. max_blocks * block_size],
            );
            run.free[index] = @intCast(index);
        }
        return run;
    }

    /// One pass over all blocks, the pieces in a scattered order: writes the
    /// generation (fill), or reads and expects it (check), or expects what mix
    /// has written.
    fn sequence(run: *Run, kind: enum { fill, check, mix }) void {
        const pieces = (run.blocks + max_blocks - 1) / max_blocks;
        const stride = coprime(pieces);
        var piece: u64 = 0;
        for (0..pieces) |_| {
            piece = (piece + stride) % pieces;
            const first = piece * max_blocks;
            const count: u32 = @intCast(@min(max_blocks, run.blocks - first));
            run.start(kind == .fill, first, count, run.options.generation);
        }
        run.drain();
        if (kind != .mix) run.report();
    }

    fn mix(run: *Run) void {
        while (run.requests < run.options.count) {
            const count: u32 = @intCast(1 + run.next() % max_blocks);
            const first = run.next() % (run.blocks - count + 1);
            const range = run.busy[first..][0..count];
            // Overlapping requests have no defined outcome: wait instead.
            while (std.mem.indexOfScalar(u8, range, 1) != null) run.reap(1);
            const generation = run.requests + 1;
            run.start(run.next() & 1 == 0, first, count, generation);
            if (run.requests == run.options.count / 8) print("verify mix running\n", .{});
        }
        run.drain();
        run.flush();
    }

    fn bench(run: *Run) void {
        while (run.requests < run.options.count) {
            run.start(false, run.next() % run.blocks, 1, 0);
        }
        run.drain();
        const elapsed = @max(1, now() - run.began_ns);
        print("verify bench ok: {d} reads of {d} bytes at depth {d}: {d} requests/s\n", .{
            run.requests, block_size, run.options.depth, run.requests * std.time.ns_per_s / elapsed,
        });
    }

    fn discard(run: *Run) void {
        // <linux/fs.h>: _IO(0x12, 119) and _IO(0x12, 127), a pair of u64.
        const requests = [_]struct { []const u8, u32 }{ .{ "BLKDISCARD", 0x1277 }, .{ "BLKZEROOUT", 0x127f } };
        for (requests) |request| {
            const range = [2]u64{ run.options.offset, run.blocks * block_size };
            const result = linux.ioctl(run.fd, request[1], @intFromPtr(&range));
            if (linux.errno(result) != .SUCCESS) {
                fail(.discard, "{s}: {t}", .{ request[0], linux.errno(result) });
            }
        }
        // Generation 0 in `generations` means: must be zeroes.
        run.sequence(.mix);
        run.report();
    }

    fn start(run: *Run, is_write: bool, first: u64, blocks: u32, generation: u64) void {
        while (run.free_count == 0) run.reap(1);
        run.free_count -= 1;
        const index = run.free[run.free_count];
        const slot = &run.slots[index];
        slot.* = .{
            .buffer = slot.buffer,
            .first = first,
            .blocks = blocks,
            .is_write = is_write,
            .generation = generation,
        };
        @memset(run.busy[first..][0..blocks], 1);
        const bytes = slot.buffer[0 .. blocks * block_size];
        const at = run.options.offset + first * block_size;
        if (is_write) {
            for (0..blocks) |n| run.pattern(blockOf(bytes, n), first + n, generation);
        } else if (run.options.mode != .bench) {
            // What the device does not write must not look right by chance.
            @memset(bytes, 0xaa);
        }
        const sqe = if (is_write)
            run.ring.write(index, run.fd, bytes, at)
        else
            run.ring.read(index, run.fd, .{ .buffer = bytes }, at);
        _ = sqe catch |err| fail(run.options.mode, "io_uring: {t}", .{err});
        run.requests += 1;
        run.bytes += bytes.len;
        _ = run.ring.submit() catch |err| fail(run.options.mode, "submit: {t}", .{err});
        run.reap(0);
    }

    fn drain(run: *Run) void {
        while (run.free_count < run.options.depth) run.reap(1);
    }

    fn reap(run: *Run, wait_count: u32) void {
        var cqes: [max_depth]linux.io_uring_cqe = undefined;
        const count = run.ring.copy_cqes(&cqes, wait_count) catch |err| switch (err) {
            error.SignalInterrupt => return,
            else => fail(run.options.mode, "wait: {t}", .{err}),
        };
        for (cqes[0..count]) |cqe| run.finish(@intCast(cqe.user_data), cqe.res);
    }

    fn finish(run: *Run, index: u32, result: i32) void {
        const slot = &run.slots[index];
        const what = if (slot.is_write) "write" else "read";
        if (result != slot.blocks * block_size) {
            fail(run.options.mode, "{s} of {d} blocks at block {d} ended with {d}", .{
                what, slot.blocks, slot.first, result,
            });
        }
        for (0..slot.blocks) |n| {
            const block = slot.first + n;
            run.busy[block] = 0;
            if (slot.is_write) {
                run.generations[block] = @intCast(slot.generation);
                continue;
            }
            switch (run.options.mode) {
                .bench => {},
                .check => run.expect(blockOf(slot.buffer, n), block, slot.generation),
                .fill, .mix => if (run.generations[block] != 0) {
                    run.expect(blockOf(slot.buffer, n), block, run.generations[block]);
                },
                .discard => if (!std.mem.allEqual(u8, blockOf(slot.buffer, n), 0)) {
                    fail(.discard, "block {d} is not zero", .{block});
                },
            }
        }
        run.free[run.free_count] = index;
        run.free_count += 1;
    }

    fn flush(run: *Run) void {
        const result = linux.fsync(run.fd);
        if (linux.errno(result) != .SUCCESS) fail(run.options.mode, "flush: {t}", .{linux.errno(result)});
    }

    /// Fills one block; each block of each generation differs in every word.
    fn pattern(run: *Run, bytes: *align(8) [block_size]u8, block: u64, generation: u64) void {
        const words = std.mem.bytesAsSlice(u64, bytes);
        var word = (block +% 1) *% 0x9e3779b97f4a7c15 ^ generation *% 0xd1b54a32d192ed03 ^ run.options.seed;
        for (words) |*at| {
            word +%= 0x9e3779b97f4a7c15;
            at.* = word ^ word >> 29;
        }
        const header: *Header = @ptrCast(bytes);
        header.* = .{ .magic = magic, .block = block, .generation = generation, .seed = run.options.seed };
        std.mem.writeInt(u32, bytes[crc_offset..], crc32c(bytes[0..crc_offset]), .little);
    }

    fn expect(run: *Run, bytes: *align(8) [block_size]u8, block: u64, generation: u64) void {
        const header: *const Header = @ptrCast(bytes);
        const mode = run.options.mode;
        if (header.magic != magic) {
            fail(mode, "block {d} starts with {x}, never written by this program", .{ block, header.magic });
        }
        if (header.block != block or header.generation != generation or header.seed != run.options.seed) {
            fail(mode, "block {d} generation {d} seed {d} expected, found block {d} generation {d} seed {d}", .{
                block,             generation,  run.options.seed, header.block,
                header.generation, header.seed,
            });
        }
        const written = std.mem.readInt(u32, bytes[crc_offset..], .little);
        const actual = crc32c(bytes[0..crc_offset]);
        if (written != actual) fail(mode, "block {d} has crc32c {x}, its data {x}", .{ block, written, actual });
    }

    fn report(run: *Run) void {
        print("verify {t} ok: {d} blocks, {d} requests, {d} MiB, {d} ms\n", .{
            run.options.mode,                            run.blocks, run.requests, run.bytes >> 20,
            (now() - run.began_ns) / std.time.ns_per_ms,
        });
    }

    /// xorshift64*: the same requests for the same seed.
    fn next(run: *Run) u64 {
        run.random ^= run.random >> 12;
        run.random ^= run.random << 25;
        run.random ^= run.random >> 27;
        return (run.random *% 0x2545f4914f6cdd1d) >> 16;
    }
};

fn blockOf(bytes: []align(block_size) u8, index: usize) *align(8) [block_size]u8 {
    return @alignCast(bytes[index * block_size ..][0..block_size]);
}

/// A step that visits all of `count` pieces before it repeats.
fn coprime(count: u64) u64 {
    if (count < 4) return 1;
    var step = count * 5 / 8;
    while (std.math.gcd(step, count) != 1) step += 1;
    return step;
}

/// CRC-32C with the instruction of SSE 4.2; `bytes` starts at an 8-byte boundary.
fn crc32c(bytes: []const u8) u32 {
    var crc: u64 = 0xffff_ffff;
    var rest = bytes;
    while (rest.len >= 8) : (rest = rest[8..]) {
        crc = asm ("crc32q %[value], %[crc]"
            : [crc] "=r" (-> u64),
            : [value] "r" (std.mem.readInt(u64, rest[0..8], .little)),
              [in] "0" (crc),
        );
    }
    var short: u32 = @truncate(crc);
    for (rest) |byte| {
        short = asm ("crc32b %[value], %[crc]"
            : [crc] "=r" (-> u32),
            : [value] "r" (byte),
              [in] "0" (short),
        );
    }
    return ~short;
}

fn pages(mode: Mode, size: u64) []align(block_size) u8 {
    const result = linux.mmap(null, @max(size, 1), .{ .READ = true, .WRITE = true }, .{ .TYPE = .PRIVATE, .ANONYMOUS = true }, -1, 0);
    if (linux.errno(result) != .SUCCESS) fail(mode, "no memory for {d} bytes", .{size});
    return @as([*]align(block_size) u8, @ptrFromInt(result))[0..size];
}

fn now() u64 {
    var time: linux.timespec = undefined;
    _ = linux.clock_gettime(.MONOTONIC, &time);
    return @as(u64, @intCast(time.sec)) * std.time.ns_per_s + @as(u64, @intCast(time.nsec));
}

fn parse(args: []const [*:0]const u8) Options {
    if (args.len < 3) usage("no mode or no disk");
    var options: Options = .{
        .mode = std.meta.stringToEnum(Mode, std.mem.span(args[1])) orelse usage(std.mem.span(args[1])),
        .path = args[2],
    };
    for (args[3..]) |pointer| {
        const arg = std.mem.span(pointer);
        const equals = std.mem.indexOfScalar(u8, arg, '=') orelse usage(arg);
        const value = std.fmt.parseInt(u64, arg[equals + 1 ..], 10) catch usage(arg);
        const name = arg[0..equals];
        if (std.mem.eql(u8, name, "--offset")) {
            options.offset = value;
        } else if (std.mem.eql(u8, name, "--size")) {
            options.size = value;
        } else if (std.mem.eql(u8, name, "--depth")) {
            if (value == 0 or value > max_depth) usage(arg);
            options.depth = @intCast(value);
        } else if (std.mem.eql(u8, name, "--count")) {
            options.count = value;
        } else if (std.mem.eql(u8, name, "--seed")) {
            options.seed = value;
        } else if (std.mem.eql(u8, name, "--generation")) {
            options.generation = value;
        } else usage(arg);
    }
    return options;
}

fn usage(found: []const u8) noreturn {
    print("verify FAILED: cannot understand: {s}\n", .{found});
    linux.exit_group(2);
}

fn fail(mode: Mode, comptime format: []const u8, values: anytype) noreturn {
    print("verify {t} FAILED: " ++ format ++ "\n", .{mode} ++ values);
    linux.exit_group(1);
}

fn print(comptime format: []const u8, values: anytype) void {
    var buffer: [512]u8 = undefined;
    const line = std.fmt.bufPrint(&buffer, format, values) catch "verify FAILED: line too long\n";
    _ = linux.write(1, line.ptr, line.len);
}
