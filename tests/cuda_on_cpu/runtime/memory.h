// The memory checker: who touched which byte, and was it ordered with those who touched it before?
//
// Every byte of every argument and of shared memory has a cell with its last write and its last two
// readers. Two accesses of different threads are ordered when a __syncthreads lies between them
// (they have different epochs), or, within a warp, a __syncwarp (a vector clock a lane). Nothing
// orders blocks: what one writes no other may touch.
#pragma once
#include <unordered_map>

#include "fibers.h"

struct Stamp {
    uint32_t block, epoch, clock;
    int thread;
    bool set;
};

struct Cell {
    Stamp write, reader, other_reader;
};

struct Region {
    char* begin;
    size_t size;
    int argument;  // its index, or -1 for shared memory
    std::vector<Cell> cells;
    bool shared() const { return argument < 0; }
    bool holds(const char* p, size_t n) const { return p >= begin && p + n <= begin + size; }
};

std::vector<Region> regions;
Region* last_region;  // most accesses are where the one before was
std::unordered_map<uint64_t, int> reported;  // one report for a place in the code
uintptr_t image_begin, image_end;            // of the kernel's library: its constants

void add_region(void* begin, size_t size, int argument) {
    if (size) regions.push_back({(char*)begin, size, argument, std::vector<Cell>(size)});
    last_region = nullptr;
}

Region* region_of(const char* p, size_t n) {
    if (last_region && last_region->holds(p, n)) return last_region;
    for (auto& region : regions)
        if (region.holds(p, n)) return last_region = &region;
    return nullptr;
}

bool ordered(const Stamp& before, const Stamp& now, bool shared) {
    if (!before.set) return true;
    if (before.block != now.block) return shared;  // each block has its own shared memory
    if (before.thread == now.thread || before.epoch != now.epoch) return true;
    const bool same_warp = before.thread / WARP == now.thread / WARP;
    return same_warp && fibers[now.thread].clock[before.thread % WARP] >= before.clock;
}

bool first_report(const void* pc, bool write) {
    return reported[(uint64_t)(uintptr_t)pc * 2 + write]++ == 0;
}

void out_of_bounds(const char* p, size_t n, bool write, const void* pc) {
    const Region* near = nullptr;
    long best = 4096, offset = 0;
    for (const auto& region : regions) {
        const long behind = p + n - (region.begin + region.size);
        const long distance = p < region.begin ? region.begin - p : behind;
        if (distance < best) best = distance, near = &region, offset = p - region.begin;
    }
    const char* what = write ? "write" : "read";
    if (near)
        error("OUT OF BOUNDS %s of %zu bytes at byte %ld of %s %d, which has %zu; pc=%p " WHERE,
              what, n, offset, near->shared() ? "shared memory" : "argument", near->argument,
              near->size, pc, WHERE_ARGUMENTS);
    else
        error("OUT OF BOUNDS %s of %zu bytes far from any array; pc=%p " WHERE, what, n, pc,
              WHERE_ARGUMENTS);
}

struct OutsideOfKernel {
    OutsideOfKernel() { in_kernel = false; }
    ~OutsideOfKernel() { in_kernel = true; }
};

void access(const void* address, size_t n, bool write, const void* pc) {
    if (!checking) return;
    const OutsideOfKernel outside;  // no signal is to leave anything here half done
    char* p = (char*)address;
    if (on_a_stack(p)) return;
    Region* region = region_of(p, n);
    if (!region) {
        const uintptr_t at = (uintptr_t)p;
        const bool built_in = at - (uintptr_t)&threadIdx < 12 || at - (uintptr_t)&blockIdx < 12 ||
                              at - (uintptr_t)&blockDim < 12 || at - (uintptr_t)&gridDim < 12;
        if (!write && (built_in || (at >= image_begin && at < image_end))) return;
        if (first_report(pc, write)) out_of_bounds(p, n, write, pc);
        if (write) die();  // rather than damage the process
        return;
    }
    const Stamp now{block_number, epoch, fibers[current].clock[current % WARP], current, true};
    Cell* cell = region->cells.data() + (p - region->begin);
    for (size_t i = 0; i < n; ++i, ++cell) {
        const char* what = nullptr;
        const Stamp* other = nullptr;
        const bool own_write = cell->write.set && cell->write.block == block_number;
        if (region->shared() && !write && !own_write) what = "UNINITIALISED shared memory read";
        else if (!ordered(cell->write, now, region->shared()))
            what = write ? "RACE: write after write" : "RACE: read after write", other = &cell->write;
        else if (write && !ordered(cell->reader, now, region->shared()))
            what = "RACE: write after read", other = &cell->reader;
        else if (write && !ordered(cell->other_reader, now, region->shared()))
            what = "RACE: write after read", other = &cell->other_reader;
        if (what) {
            if (first_report(pc, write))
                error("%s, byte %zu of %s %d, the other: block #%u thread #%d; pc=%p " WHERE, what,
                      (size_t)(p - region->begin) + i, region->shared() ? "shared" : "argument",
                      region->argument, other ? other->block - 1 : 0, other ? other->thread : -1, pc,
                      WHERE_ARGUMENTS);
            return;
        }
        if (write) cell->write = now;
        else {
            if (cell->reader.set && cell->reader.thread != current) cell->other_reader = cell->reader;
            cell->reader = now;
        }
    }
}

// ---- what g++ -fsanitize=thread calls before every load and store; its own library is not used --
#define PC __builtin_return_address(0)
#define HOOKS(N)                                                                \
    void __tsan_read##N(void* p) { access(p, N, false, PC); }                   \
    void __tsan_write##N(void* p) { access(p, N, true, PC); }                   \
    void __tsan_unaligned_read##N(void* p) { access(p, N, false, PC); }         \
    void __tsan_unaligned_write##N(void* p) { access(p, N, true, PC); }
extern "C" {
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
void __tsan_read_range(void* p, size_t n) { access(p, n, false, PC); }
void __tsan_write_range(void* p, size_t n) { access(p, n, true, PC); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
