//! Hints to the processor that a cache line will be needed soon. What they
//! point at is never trusted, and need not be there.

const builtin = @import("builtin");

/// The line will be read.
pub inline fn forReading(pointer: [*]const u8) void {
    @prefetch(pointer, .{ .rw = .read });
}

/// The line will be written: it is taken from the other processor at once, and
/// not first shared with it. (`@prefetch` does that only where the target is
/// said to have PREFETCHW; x86_64 processors without it take it for a NOP.)
pub inline fn forWriting(pointer: [*]u8) void {
    // Zig's own back-end, which compiles the tests, does not know the operand.
    if (builtin.cpu.arch == .x86_64 and builtin.zig_backend == .stage2_llvm) {
        asm volatile ("prefetchw (%[pointer])"
            :
            : [pointer] "r" (pointer),
        );
    } else @prefetch(pointer, .{ .rw = .write });
}
