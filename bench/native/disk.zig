//! The back-end to measure ours against: a disk whose loop is native. It pops
//! and completes by the same core, copies by the host's memcpy, and polls all
//! the time. Memory and ring come from the load generator by /proc, without a
//! protocol.
//!
//!   bench-native disk KIND DISK_BYTES MEMORY_FILE MEMORY_BYTES DESCRIPTORS AVAILABLE
//!     USED QUEUE_SIZE FEATURES
//!
//! KIND is null or memory; addresses are guest addresses, in memory that begins
//! at 0. Says "ready" when it serves, and ends with its standard input.

const std = @import("std");
const core = @import("core.zig");
const layout = core.layout;
const linux = core.linux;

const pop = core.function("ring_pop");
const push = core.function("ring_push");

const batch_maximum = 64;
const header_bytes = 16;
const record_words = @sizeOf(layout.Request) / 4 + header_bytes / 4;
const segment_capacity = 2048;
const sector_size = 512;
const type_in = 0;
const type_out = 1;
const feature_packed = 34;
/// Empty looks at the ring between two looks at the standard input.
const looks_per_check = 1 << 22;

var words: [batch_maximum * record_words + segment_capacity * @sizeOf(layout.Segment) / 4]u32 = undefined;
var completions: [batch_maximum]layout.Completion = undefined;

const Disk = struct {
    /// Null: the disk keeps nothing.
    bytes: ?[*]u8,
    size: u64,
    /// The guest's memory.
    memory: [*]u8,

    fn answer(self: *const Disk, record: *align(4) const layout.Request) u32 {
        const header: [*]const u32 = @ptrFromInt(@intFromPtr(record) + @sizeOf(layout.Request));
        const offset = (header[2] | @as(u64, header[3]) << 32) * sector_size;
        const all: [*]align(4) const layout.Segment = @ptrCast(words[batch_maximum * record_words ..]);
        const segments = all[record.segment_first..][0 .. record.readable_count + record.writable_count];
        const length = record.readable_bytes + record.writable_bytes;
        const status = self.at(record.trailer_view, record.trailer_offset);
        if (header[0] > type_out or offset > self.size or length > self.size - offset) {
            status[0] = 1;
            return 1;
        }
        if (self.bytes) |bytes| {
            var place = bytes + offset;
            for (segments) |segment| {
                const guest = self.at(segment.view, segment.offset);
                if (header[0] == type_in) {
                    _ = memcpy(guest, place, segment.length);
                } else {
                    _ = memcpy(place, guest, segment.length);
                }
                place += segment.length;
            }
        }
        status[0] = 0;
        return record.writable_bytes + 1;
    }

    /// There is one region, and its views follow each other.
    fn at(self: *const Disk, view: u32, offset: u32) [*]u8 {
        return self.memory + (@as(usize, view) << layout.view_shift) + offset;
    }
};

extern fn memcpy(to: [*]u8, from: [*]const u8, length: usize) [*]u8;

fn number(arguments: *std.process.Args.Iterator) u64 {
    return std.fmt.parseInt(u64, arguments.next() orelse "", 0) catch {
        std.debug.print("Cannot serve a disk: an argument is missing or no number\n", .{});
        std.process.exit(2);
    };
}

pub fn main(arguments: *std.process.Args.Iterator) void {
    const kind = arguments.next() orelse "";
    const disk_bytes = number(arguments);
    const file = linux.open(arguments.next() orelse "", .{ .ACCMODE = .RDWR, .CLOEXEC = true }, 0);
    const fd: i32 = @intCast(core.must(core.resultOf(file), "open the guest's memory"));
    const memory_bytes = number(arguments);
    const handle = core.openMemory(fd, memory_bytes, 1, 1);
    const descriptors = number(arguments);
    const available = number(arguments);
    const used = number(arguments);
    const size: u32 = @intCast(number(arguments));
    const features = number(arguments);
    const config: layout.RingConfig = .{
        .descriptor_address = descriptors,
        .available_address = available,
        .used_address = used,
        .features = features,
        .space = layout.space_gpa,
        .size = size,
        .base = if (features >> feature_packed & 1 != 0) 0x8000_8000 else 0,
        .header_bytes = header_bytes,
        .trailer_bytes = 1,
        .flags = 0,
    };
    var reason: u32 = 0;
    const ring = core.must(core.function("ring_create")(handle, &config, &reason), "use the ring");
    _ = core.function("ring_disarm")(ring);
    const disk: Disk = .{
        .bytes = if (std.mem.eql(u8, kind, "memory")) core.map(-1, disk_bytes) else null,
        .size = disk_bytes,
        .memory = core.map(fd, memory_bytes),
    };
    _ = linux.write(1, "ready\n", 6);
    var looks: u32 = 0;
    while (true) {
        const count = core.must(pop(ring, &words, words.len, batch_maximum), "pop");
        if (count == 0) {
            looks +%= 1;
            if (looks % looks_per_check == 0 and hasEnded()) return;
            std.atomic.spinLoopHint();
            continue;
        }
        for (completions[0..count], 0..) |*completion, i| {
            const record: *align(4) const layout.Request = @ptrCast(words[i * record_words ..]);
            completion.* = .{ .head = record.head, .written = disk.answer(record) };
        }
        // The driver spins: it wants no calls.
        _ = core.must(push(ring, &completions, count), "push");
    }
}

fn hasEnded() bool {
    var poll = [1]linux.pollfd{.{ .fd = 0, .events = linux.POLL.IN, .revents = 0 }};
    return linux.poll(&poll, 1, 0) != 0;
}
