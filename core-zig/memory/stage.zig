//! Makes the next table out of the published one and what a front-end asked
//! for. All of it is checked before anything is mapped, and when anything
//! fails, everything that was mapped for it goes away again.

const std = @import("std");
const linux = std.os.linux;
const sys = @import("../linux.zig");
const layout = @import("../layout.zig");
const mapping = @import("mapping.zig");
const tables = @import("table.zig");
const userfault = @import("userfault.zig");
const view_numbers = @import("views.zig");

const Mapping = mapping.Mapping;
const Request = layout.RegionRequest;
const Result = layout.PrepareResult;

/// A region of the next table; `mapping` is null until it has one.
const Candidate = struct {
    gpa: u64,
    uva: u64,
    size: u64,
    mapping: ?*Mapping,
    /// Index of its request; unused when it is kept.
    request: u32,

    fn lessGpa(_: void, a: Candidate, b: Candidate) bool {
        return a.gpa < b.gpa;
    }

    fn lessUva(_: void, a: Candidate, b: Candidate) bool {
        return a.uva < b.uva;
    }
};

pub const Stage = struct {
    current: *const tables.Table,
    views: *view_numbers.Views,
    health: *mapping.Health,
    result: *Result,
    /// In postcopy: what watches the new regions for missing pages, else -1.
    userfault: i32 = -1,
    list: [layout.max_regions]Candidate = undefined,
    count: u32 = 0,
    /// Bytes that this stage has mapped.
    new_bytes: u64 = 0,

    const Refused = error{Refused};

    /// The table, whose new regions are in phase `staged`, or a negative
    /// errno in `code` with the reason in `result`.
    pub fn run(self: *Stage, kind: u32, requests: []const Request, code: *i32) Refused!*tables.Table {
        try self.collect(kind, requests, code);
        if (kind != layout.prepare_remove) {
            for (requests, 0..) |*request, index| try self.checkNumbers(request, @intCast(index), code);
            try self.checkOverlap(code);
        }
        errdefer self.undo();
        for (self.list[0..self.count]) |*candidate| {
            if (candidate.mapping == null) try self.map(candidate, &requests[candidate.request], code);
        }
        var regions: [layout.max_regions]tables.Region = undefined;
        for (self.list[0..self.count], regions[0..self.count]) |candidate, *region| {
            region.* = .{ .gpa = candidate.gpa, .uva = candidate.uva, .size = candidate.size, .mapping = candidate.mapping.? };
        }
        const table = tables.Table.build(regions[0..self.count]) catch
            return self.refuse(0, layout.refuse_mmap, @intFromEnum(linux.E.NOMEM), 0, .NOMEM, code);
        self.result.kept = self.count - self.result.added;
        self.result.removed = @as(u32, @intCast(self.current.regions.len)) - self.result.kept;
        return table;
    }

    fn refuse(self: *Stage, request: u32, reason: u32, value: u64, limit: u64, errno: linux.E, code: *i32) Refused {
        self.result.* = std.mem.zeroes(Result);
        self.result.reason = reason;
        self.result.region = request;
        self.result.value = value;
        self.result.limit = limit;
        code.* = sys.fail(errno);
        return error.Refused;
    }

    fn keep(self: *Stage, region: tables.Region) void {
        self.list[self.count] = .{ .gpa = region.gpa, .uva = region.uva, .size = region.size, .mapping = region.mapping, .request = 0 };
        self.count += 1;
    }

    /// Fills the list: what stays, and what is asked for.
    fn collect(self: *Stage, kind: u32, requests: []const Request, code: *i32) Refused!void {
        if (kind == layout.prepare_remove) return self.collectRemaining(requests, code);
        if (kind == layout.prepare_add) {
            for (self.current.regions) |region| self.keep(region);
        }
        for (requests, 0..) |request, index| {
            if (self.count == layout.max_regions) {
                return self.refuse(@intCast(index), layout.refuse_too_many, self.count + (requests.len - index), layout.max_regions, .@"2BIG", code);
            }
            self.list[self.count] = .{ .gpa = request.gpa, .uva = request.uva, .size = request.size, .mapping = null, .request = @intCast(index) };
            self.count += 1;
        }
    }

    /// The front-end names a region by gpa, uva and size; it may leave the
    /// offset 0 (vhost-user, REM_MEM_REG).
    fn collectRemaining(self: *Stage, requests: []const Request, code: *i32) Refused!void {
        var gone: [layout.max_regions]bool = @splat(false);
        for (requests, 0..) |request, index| {
            const found: ?usize = if (self.current.regionAt(request.gpa)) |region|
                (if (region.uva == request.uva and region.size == request.size)
                    region - self.current.regions.ptr
                else
                    null)
            else
                null;
            const position = found orelse
                return self.refuse(@intCast(index), layout.refuse_not_found, request.gpa, 0, .NOENT, code);
            if (gone[position]) return self.refuse(@intCast(index), layout.refuse_not_found, request.gpa, 0, .NOENT, code);
            gone[position] = true;
        }
        for (self.current.regions, 0..) |region, position| {
            if (!gone[position]) self.keep(region);
        }
    }

    /// No sum may reach 2^64, so that `start + size` is safe for everybody.
    fn checkNumbers(self: *Stage, request: *const Request, index: u32, code: *i32) Refused!void {
        if (request.size == 0) return self.refuse(index, layout.refuse_size_zero, 0, 0, .INVAL, code);
        for ([_]u64{ request.gpa, request.uva }) |start| {
            if (start > std.math.maxInt(u64) - request.size) {
                return self.refuse(index, layout.refuse_address_wraps, start, 0, .INVAL, code);
            }
        }
        if (request.flags & layout.flag_region_address != 0) {
            if (request.address == 0 or request.address > std.math.maxInt(u64) - request.size) {
                return self.refuse(index, layout.refuse_address_wraps, request.address, 0, .INVAL, code);
            }
        } else if (request.mmap_offset > std.math.maxInt(u64) - request.size) {
            return self.refuse(index, layout.refuse_file_offset_wraps, request.mmap_offset, 0, .INVAL, code);
        }
    }

    fn checkOverlap(self: *Stage, code: *i32) Refused!void {
        const list = self.list[0..self.count];
        std.sort.pdq(Candidate, list, {}, Candidate.lessUva);
        for (list[0..list.len -| 1], list[@min(1, list.len)..]) |a, b| {
            if (b.uva - a.uva < a.size) return self.refuse(newer(a, b), layout.refuse_overlap_uva, b.uva, 0, .EXIST, code);
        }
        std.sort.pdq(Candidate, list, {}, Candidate.lessGpa);
        for (list[0..list.len -| 1], list[@min(1, list.len)..]) |a, b| {
            if (b.gpa - a.gpa < a.size) return self.refuse(newer(a, b), layout.refuse_overlap_gpa, b.gpa, 0, .EXIST, code);
        }
    }

    /// Of two that overlap: the request that came later.
    fn newer(a: Candidate, b: Candidate) u32 {
        const from_a = if (a.mapping == null) a.request else 0;
        const from_b = if (b.mapping == null) b.request else 0;
        return @max(from_a, from_b);
    }

    fn map(self: *Stage, candidate: *Candidate, request: *const Request, code: *i32) Refused!void {
        const index = candidate.request;
        var region_mapping: *Mapping = undefined;
        if (request.flags & layout.flag_region_address != 0) {
            if (self.existing(request)) |found| {
                if (found.isBorrowedAt(request.address)) {
                    candidate.mapping = found;
                    return;
                }
            }
            region_mapping = mapping.borrow(request.address, request.size, self.health) catch |failure| switch (failure) {
                error.RegisterFull => return self.refuse(index, layout.refuse_mappings, 0, 0, .NOSPC, code),
                error.Outside => return self.refuse(index, layout.refuse_address, request.address, 0, .FAULT, code),
            };
        } else {
            var errno: i32 = 0;
            const file = mapping.File.inspect(request.fd, &errno) catch |failure| switch (failure) {
                error.Kind => return self.refuse(index, layout.refuse_file_kind, 0, 0, .INVAL, code),
                error.System => return self.refuseMap(index, errno, code),
            };
            const needed = request.mmap_offset + request.size;
            if (file.size < needed) return self.refuse(index, layout.refuse_file_too_small, file.size, needed, .INVAL, code);
            if (self.existing(request)) |found| {
                if (found.isOf(file, request.mmap_offset, request.size)) {
                    candidate.mapping = found;
                    return;
                }
            }
            const quarantined = mapping.quarantined.load(.monotonic);
            const limit = mapping.quarantine_limit;
            // The first guest may be of any size; what comes after it must
            // leave the address space usable, whatever cannot be given back.
            if (quarantined > 0 and (quarantined >= limit or self.new_bytes +| request.size > limit - quarantined)) {
                return self.refuse(index, layout.refuse_quarantine, quarantined, limit, .NOMEM, code);
            }
            region_mapping = mapping.mapFile(request.fd, file, request.mmap_offset, request.size, self.health, &errno) catch |failure| switch (failure) {
                error.RegisterFull => return self.refuse(index, layout.refuse_mappings, 0, 0, .NOSPC, code),
                error.System => return self.refuseMap(index, errno, code),
            };
            // Before anybody can touch it: a page that is touched unwatched
            // is a page of zeros, and stays one.
            if (self.userfault >= 0) try self.watch(region_mapping, index, code);
        }
        if (!self.views.insert(region_mapping)) {
            region_mapping.unmap();
            return self.refuse(index, layout.refuse_too_many, 0, view_numbers.max_views, .@"2BIG", code);
        }
        region_mapping.phase = .staged;
        region_mapping.references.store(1, .release);
        candidate.mapping = region_mapping;
        self.new_bytes +|= request.size;
        self.result.added += 1;
    }

    fn watch(self: *Stage, region_mapping: *Mapping, index: u32, code: *i32) Refused!void {
        const watched = userfault.register(self.userfault, region_mapping.base, region_mapping.map_size);
        if (watched >= 0) return region_mapping.userfault.store(self.userfault, .release);
        region_mapping.unmap();
        return self.refuse(index, layout.refuse_userfault, @intCast(-watched), 0, .INVAL, code);
    }

    fn refuseMap(self: *Stage, index: u32, errno: i32, code: *i32) Refused {
        const refused = self.refuse(index, layout.refuse_mmap, @intCast(-errno), 0, .INVAL, code);
        code.* = errno;
        return refused;
    }

    /// The published mapping of the same gpa, uva and size.
    fn existing(self: *Stage, request: *const Request) ?*Mapping {
        const region = self.current.regionAt(request.gpa) orelse return null;
        if (region.uva != request.uva or region.size != request.size) return null;
        return region.mapping;
    }

    fn undo(self: *Stage) void {
        for (self.list[0..self.count]) |candidate| drop(self.views, candidate.mapping orelse continue);
    }
};

/// Unmaps a region that was staged and never published.
pub fn drop(views: *view_numbers.Views, staged: *Mapping) void {
    if (staged.phase != .staged) return;
    views.remove(staged);
    staged.unmap();
}
