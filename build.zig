//! Builds the core: one shared library per architecture, its tests, and the
//! TypeScript bindings made from its own declarations.
//!
//!   zig build                  the libraries, and what is generated into ffi/
//!   zig build test             the core's own tests
//!   zig build abi-check        fails when ffi/abi.gen.ts is stale
//!   zig build bench            what the bench compares with, in zig-out/bin
//!   zig build bench-profiled   the core with its symbols, for profiles

const std = @import("std");

const architectures = [_]std.Target.Cpu.Arch{ .x86_64, .aarch64 };

pub fn build(b: *std.Build) void {
    const optimize: std.builtin.OptimizeMode = switch (b.release_mode) {
        .fast => .ReleaseFast,
        .small => .ReleaseSmall,
        .off => .Debug,
        else => .ReleaseSafe,
    };
    const update = b.addUpdateSourceFiles();
    b.getInstallStep().dependOn(&update.step);

    const embedder = tool(b, "embed");
    for (architectures) |arch| {
        const library = core(b, arch, optimize, true);
        b.getInstallStep().dependOn(&b.addInstallArtifact(library, .{}).step);
        const embed = b.addRunArtifact(embedder);
        embed.addFileArg(library.getEmittedBin());
        const module = b.fmt("ffi/embedded/{s}.ts", .{@tagName(arch)});
        update.addCopyFileToSource(embed.captureStdOut(.{}), module);
    }

    const generated = b.addRunArtifact(tool(b, "generate_abi")).captureStdOut(.{});
    update.addCopyFileToSource(generated, "ffi/abi.gen.ts");

    const compare = b.addSystemCommand(&.{"cmp"});
    compare.addFileArg(generated);
    compare.addFileArg(b.path("ffi/abi.gen.ts"));
    b.step("abi-check", "Fail when ffi/abi.gen.ts is stale").dependOn(&compare.step);

    benchPrograms(b, optimize);

    const tests = b.addTest(.{
        .root_module = b.createModule(.{
            .root_source_file = b.path("core-zig/exports.zig"),
            .target = b.graph.host,
            .optimize = .Debug,
            .link_libc = true,
        }),
    });
    const run_tests = b.addRunArtifact(tests);
    b.step("test", "Run the core's tests").dependOn(&run_tests.step);
}

/// A program that runs while building.
fn tool(b: *std.Build, name: []const u8) *std.Build.Step.Compile {
    return b.addExecutable(.{
        .name = name,
        .root_module = b.createModule(.{
            .root_source_file = b.path(b.fmt("core-zig/{s}.zig", .{name})),
            .target = b.graph.host,
            .optimize = .Debug,
            .link_libc = true,
        }),
    });
}

/// `linux-none`: no libc of its own, so that one file serves glibc and musl;
/// the few symbols it needs (`pthread_create`, `dlopen`) are the host's.
fn core(b: *std.Build, arch: std.Target.Cpu.Arch, optimize: std.builtin.OptimizeMode, is_stripped: bool) *std.Build.Step.Compile {
    return b.addLibrary(.{
        .name = b.fmt("vhost2-{s}", .{@tagName(arch)}),
        .linkage = .dynamic,
        .root_module = b.createModule(.{
            .root_source_file = b.path("core-zig/exports.zig"),
            .target = b.resolveTargetQuery(.{ .cpu_arch = arch, .os_tag = .linux, .abi = .none }),
            .optimize = optimize,
            .pic = true,
            .strip = is_stripped,
            // A profile follows them.
            .omit_frame_pointer = if (is_stripped) null else false,
            .link_libc = false,
            .single_threaded = false,
        }),
    });
}

/// Programs that link the core, for this machine, and the core as a profiler
/// likes it.
fn benchPrograms(b: *std.Build, optimize: std.builtin.OptimizeMode) void {
    const step = b.step("bench", "Build the native program of the bench");
    // As the library is: for any processor of the architecture.
    const target = b.resolveTargetQuery(.{ .cpu_model = .baseline });
    const linked = b.createModule(.{
        .root_source_file = b.path("core-zig/exports.zig"),
        .target = target,
        .optimize = optimize,
        .link_libc = true,
    });
    const program = b.addExecutable(.{
        .name = "bench-native",
        .root_module = b.createModule(.{
            .root_source_file = b.path("bench/native/main.zig"),
            .target = target,
            .optimize = optimize,
            .link_libc = true,
            .imports = &.{.{ .name = "core", .module = linked }},
        }),
    });
    step.dependOn(&b.addInstallArtifact(program, .{}).step);
    const profiled = core(b, b.graph.host.result.cpu.arch, optimize, false);
    const destination: std.Build.Step.InstallArtifact.Options.Dir = .{ .override = .{ .custom = "profiled" } };
    b.step("bench-profiled", "Build the core with its symbols")
        .dependOn(&b.addInstallArtifact(profiled, .{ .dest_dir = destination }).step);
}
