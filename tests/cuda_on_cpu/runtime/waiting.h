// Where threads wait for each other: __syncthreads, __syncwarp and shuffles.
#pragma once
#include <algorithm>
#include <array>

#include "memory.h"

// ---- the barrier ------------------------------------------------------------------------------

void release_barrier() {
    int line = 0;
    bool divergent = false;
    for (const auto& fiber : fibers)
        if (fiber.status == Status::at_barrier) {
            divergent |= line && line != fiber.line;
            line = fiber.line;
        }
    if (divergent)
        error("DIVERGENT: threads of block (%u,%u,%u) wait at __syncthreads of different lines",
              blockIdx.x, blockIdx.y, blockIdx.z);
    if (done_count)
        error("EXITED: %d of %zu threads of block (%u,%u,%u) have returned before the "
              "__syncthreads at line %d", done_count, fibers.size(), blockIdx.x, blockIdx.y,
              blockIdx.z, line);
    for (auto& fiber : fibers)
        if (fiber.status == Status::at_barrier) fiber.status = Status::ready;
    waiting_count = 0;
    ++epoch;
}

bool all_at_barrier() {
    return waiting_count && (size_t)(waiting_count + done_count) == fibers.size();
}

extern "C" void cpu_syncthreads(int line) {
    Fiber& fiber = fibers[current];
    fiber.status = Status::at_barrier;
    fiber.line = line;
    ++waiting_count;
    if (all_at_barrier()) release_barrier();
    else to_scheduler();
}

// ---- operations of a warp ---------------------------------------------------------------------
enum Operation { SYNCWARP, SHUFFLE, SHUFFLE_DOWN, SHUFFLE_XOR };

struct Gathering {  // the lanes that have come, of those that must
    unsigned mask, arrived;
    int operation, width;
    uint64_t value[WARP];
    int by[WARP];
};
std::vector<std::array<Gathering, WARP>> gatherings;  // a warp's, by the mask's lowest lane

int source_lane(const Gathering& g, int lane) {
    const int first = lane & ~(g.width - 1), last = first + g.width - 1, by = g.by[lane];
    switch (g.operation) {
        case SHUFFLE: return first | (by & (g.width - 1));
        case SHUFFLE_DOWN: return lane + by > last ? lane : lane + by;
        case SHUFFLE_XOR: return (lane ^ by) > last ? lane : lane ^ by;
    }
    return lane;
}

// Each lane learns all that any lane of the mask knows: only __syncwarp orders memory.
void join_clocks(unsigned mask, int base) {
    uint32_t joined[WARP] = {};
    for (int lane = 0; lane < WARP; ++lane)
        if (mask >> lane & 1)
            for (int k = 0; k < WARP; ++k)
                joined[k] = std::max(joined[k], fibers[base + lane].clock[k]);
    for (int lane = 0; lane < WARP; ++lane)
        if (mask >> lane & 1) {
            memcpy(fibers[base + lane].clock, joined, sizeof joined);
            ++fibers[base + lane].clock[lane];
        }
}

void complete(Gathering& g, int base) {
    for (int lane = 0; lane < WARP; ++lane)
        if (g.mask >> lane & 1) {
            const int from = source_lane(g, lane);
            const bool takes_part = g.mask >> from & 1;
            fibers[base + lane].result = takes_part ? g.value[from] : ~0ull;  // poison: NaN
            fibers[base + lane].status = Status::ready;
        }
    if (g.operation == SYNCWARP) join_clocks(g.mask, base);
    g.mask = g.arrived = 0;
}

extern "C" uint64_t cpu_warp(int operation, unsigned mask, uint64_t value, int by, int width) {
    const int lane = current % WARP, base = current - lane;
    const int lanes = std::min<int>(WARP, (int)fibers.size() - base);
    if (lanes < WARP && mask == 0xffffffffu) mask = (1u << lanes) - 1;  // a partial last warp
    if (!(mask >> lane & 1)) {
        error("WARP: lane %d is not in its own mask %08x; " WHERE, lane, mask, WHERE_ARGUMENTS);
        die();
    }
    Gathering& g = gatherings[current / WARP][__builtin_ctz(mask)];
    if (!g.mask) g = {mask, 0, operation, width, {}, {}};  // the first lane to come
    if (g.mask != mask || g.operation != operation || g.width != width) {
        error("WARP: lanes of one warp meet in different operations; " WHERE, WHERE_ARGUMENTS);
        die();
    }
    g.value[lane] = value;
    g.by[lane] = by;
    g.arrived |= 1u << lane;
    fibers[current].status = Status::in_warp_operation;
    if (g.arrived == mask) complete(g, base);
    else to_scheduler();
    return fibers[current].result;
}
