// What is known of the running launch: its fibers, its errors.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

struct uint3 {
    unsigned x, y, z;
};
extern "C" {
uint3 threadIdx, blockIdx, blockDim, gridDim;  // what kernels read
}

constexpr int WARP = 32;

enum class Status : uint8_t { ready, at_barrier, in_warp_operation, done };

// One thread of the block.
struct Fiber {
    void* stack_pointer;
    Status status;
    uint3 index;
    int line;               // of the barrier it waits at
    uint64_t result;        // of the warp operation it waited in
    uint32_t clock[WARP];   // what it knows of each lane of its warp, see memory.h
};

std::vector<Fiber> fibers;
int current;         // the running fiber
int done_count;      // fibers that have returned
int waiting_count;   // fibers at the barrier
uint32_t block_number;  // 1 for the first block to run: 0 is "never"
uint32_t epoch;         // barriers the block has passed
volatile bool in_kernel;  // and not in what is ours: a signal then ends the launch

// ---- errors -----------------------------------------------------------------------------------
constexpr int MOST_ERRORS = 20;
std::string messages;
int error_count;
bool failed;  // the launch cannot go on

__attribute__((format(printf, 1, 2))) void error(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (error_count++ < MOST_ERRORS) messages.append(text).append("\n");
}

#define WHERE "block (%u,%u,%u) thread (%u,%u,%u)"
#define WHERE_ARGUMENTS \
    blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z
