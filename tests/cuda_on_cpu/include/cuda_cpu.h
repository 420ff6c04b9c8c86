// Lets CUDA C++ kernels be compiled by g++ and run on the CPU: included before each source.
//
// The threads of a block are fibers, run one at a time by the runtime beside this folder, and
// blocks run one after another. What is not here does not compile: atomics, cooperative groups,
// inline PTX, tensor cores, asynchronous copies.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

// ---- what CUDA adds to the language ------------------------------------------------------------
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// Shared variables are statics in a section of their own, wiped before each block.
#define __shared__ static __attribute__((section("cuda_on_cpu_shared")))

#define CPU_UNCHECKED __attribute__((no_sanitize("thread", "undefined")))
#define CPU_EXPORT __attribute__((visibility("default")))

// What kernels use of <cmath>, which takes half of the time of compiling them.
inline double fabs(double v) { return __builtin_fabs(v); }
inline float fabs(float v) { return __builtin_fabsf(v); }
inline bool isfinite(double v) { return __builtin_isfinite(v); }
inline double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline float nanf(const char*) { return __builtin_nanf(""); }

// ---- float by its instructions, and pairs of it --------------------------------------------------
// -ftz=true makes 0 of results below 2^-126. So it does of operands, but there double sums lose the
// same: they convert by cvt.ftz.f64.f32.
inline float cpu_flushed(float v) { return fabs(v) < 0x1p-126f ? 0.0f : v; }
inline float __fmul_rn(float a, float b) { return cpu_flushed(a * b); }
inline float __fmaf_rn(float a, float b, float c) { return cpu_flushed(__builtin_fmaf(a, b, c)); }
struct alignas(8) float2 {
    float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

struct uint3 {
    unsigned x, y, z;
};
extern "C" {
CPU_EXPORT extern uint3 threadIdx, blockIdx, blockDim, gridDim;
}
constexpr int warpSize = 32;

// ---- entry points of the runtime ---------------------------------------------------------------
enum CpuWarpOperation { CPU_SYNCWARP, CPU_SHUFFLE, CPU_SHUFFLE_DOWN, CPU_SHUFFLE_XOR };
extern "C" {
CPU_EXPORT void* cpu_dynamic_shared();
CPU_EXPORT void cpu_syncthreads(int line);
CPU_EXPORT uint64_t cpu_warp(int operation, unsigned mask, uint64_t value, int by, int width);
}

#define __syncthreads() cpu_syncthreads(__LINE__)

inline void __syncwarp(unsigned mask = 0xffffffffu) { cpu_warp(CPU_SYNCWARP, mask, 0, 0, 32); }

template <class T>
CPU_UNCHECKED inline T cpu_shuffle(int operation, unsigned mask, T value, int by, int width) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = cpu_warp(operation, mask, bits, by, width);
    memcpy(&value, &bits, sizeof(T));
    return value;
}
template <class T> inline T __shfl_sync(unsigned mask, T v, int lane, int width = 32) {
    return cpu_shuffle(CPU_SHUFFLE, mask, v, lane, width);
}
template <class T> inline T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32) {
    return cpu_shuffle(CPU_SHUFFLE_DOWN, mask, v, (int)by, width);
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T v, int by, int width = 32) {
    return cpu_shuffle(CPU_SHUFFLE_XOR, mask, v, by, width);
}

struct alignas(16) float4 {
    float x, y, z, w;
};

// ---- the kernels of a source, for Python: name(void** arguments) and their parameters' types ------
struct __half;
struct __nv_bfloat16;

namespace cpu {
template <class T> constexpr char kind() {
    if (std::is_same_v<T, __half>) return 'h';
    if (std::is_same_v<T, __nv_bfloat16>) return 'b';
    if (std::is_floating_point_v<T>) return 'f';
    return std::is_signed_v<T> ? 'i' : 'u';
}
template <class T> constexpr char size() {
    const bool two = std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>;
    if constexpr (two) return '2';
    else return '0' + sizeof(T);
}
// "const float*" is cf4, "double*" is pf8, "int" is vi4.
template <class T> void describe(char* to) {
    if constexpr (std::is_pointer_v<T>) {
        using Element = std::remove_pointer_t<T>;
        to[0] = std::is_const_v<Element> ? 'c' : 'p';
        to[1] = kind<std::remove_cv_t<Element>>();
        to[2] = size<std::remove_cv_t<Element>>();
    } else {
        to[0] = 'v';
        to[1] = kind<T>();
        to[2] = size<T>();
    }
    to[3] = ' ';
}
template <class... T> const char* signature(void (*)(T...)) {
    static char text[4 * sizeof...(T) + 1];
    int place = 0;
    ((describe<T>(text + place), place += 4), ...);
    return text;
}
template <class... T, size_t... I>
CPU_UNCHECKED inline void call(void (*f)(T...), void** arguments, std::index_sequence<I...>) {
    f(*static_cast<T*>(arguments[I])...);
}
template <class... T> CPU_UNCHECKED inline void invoke(void (*f)(T...), void** arguments) {
    call(f, arguments, std::index_sequence_for<T...>{});
}
}  // namespace cpu

#define CPU_KERNEL(name)                                                                   \
    extern "C" CPU_EXPORT CPU_UNCHECKED void cpu_run_##name(void** arguments) {            \
        cpu::invoke(&name, arguments);                                                     \
    }                                                                                      \
    extern "C" CPU_EXPORT CPU_UNCHECKED const char* cpu_signature_##name() {               \
        return cpu::signature(&name);                                                      \
    }

// The section's bounds; one variable keeps it present in sources without shared memory.
__shared__ int cpu_keep_section __attribute__((used));
extern "C" __attribute__((visibility("hidden"))) char __start_cuda_on_cpu_shared[],
    __stop_cuda_on_cpu_shared[];
extern "C" CPU_EXPORT CPU_UNCHECKED void cpu_shared_range(char** begin, char** end) {
    *begin = __start_cuda_on_cpu_shared;
    *end = __stop_cuda_on_cpu_shared;
}
