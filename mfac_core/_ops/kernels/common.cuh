// What all kernels share: storage types, vector loads, and sums over a warp.
//
// The macros G_T, X_T and OUT_T name the types in memory: float, double, __half or __nv_bfloat16.
// All arithmetic is double. WIDTH is how many consecutive elements a thread takes at a time; where
// it is more than 1, the caller has seen to it that every row starts at a multiple of 16 bytes.
#ifdef USE_FP16
#include <cuda_fp16.h>
#endif
#ifdef USE_BF16
#include <cuda_bf16.h>
#endif

typedef long long i64;  // d and m·d pass 2^31

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ __forceinline__ double wide(double v) { return v; }
__device__ __forceinline__ double wide(float v) { return v; }

template <class T> struct Narrow;
template <> struct Narrow<double> {
    static __device__ __forceinline__ double from(double v) { return v; }
};
template <> struct Narrow<float> {
    static __device__ __forceinline__ float from(double v) { return (float)v; }
};

#ifdef USE_FP16
__device__ __forceinline__ double wide(__half v) { return __half2float(v); }
template <> struct Narrow<__half> {
    static __device__ __forceinline__ __half from(double v) { return __double2half(v); }
};
#endif

#ifdef USE_BF16
__device__ __forceinline__ double wide(__nv_bfloat16 v) { return __bfloat162float(v); }
template <> struct Narrow<__nv_bfloat16> {
    static __device__ __forceinline__ __nv_bfloat16 from(double v) { return __double2bfloat16(v); }
};
#endif

template <class T> __device__ __forceinline__ constexpr T smaller(T a, T b) {
    return a < b ? a : b;
}

// ---- N consecutive elements, moved in the fewest instructions their alignment allows ---------

constexpr int alignment(int count, int size, bool wide_rows) {
    const int bytes = count * size;
    const int power = bytes & -bytes;  // the largest power of two that divides it
    return wide_rows ? smaller(power, 16) : size;
}

template <class T, int N, bool WIDE_ROWS>
struct alignas(alignment(N, sizeof(T), WIDE_ROWS)) Pack {
    T v[N];
};

template <int N, bool WIDE_ROWS, class T>
__device__ __forceinline__ void load(const T* __restrict__ from, double* to) {
    const auto pack = *reinterpret_cast<const Pack<T, N, WIDE_ROWS>*>(from);
#pragma unroll
    for (int j = 0; j < N; ++j) to[j] = wide(pack.v[j]);
}

template <int N, bool WIDE_ROWS, class T>
__device__ __forceinline__ void store(const double* from, T* to) {
    Pack<T, N, WIDE_ROWS> pack;
#pragma unroll
    for (int j = 0; j < N; ++j) pack.v[j] = Narrow<T>::from(from[j]);
    *reinterpret_cast<Pack<T, N, WIDE_ROWS>*>(to) = pack;
}

// ---- sums in a fixed order --------------------------------------------------------------------

// The sum over the warp, in lane 0.
__device__ __forceinline__ double warp_sum(double v) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        v += __shfl_down_sync(ALL_LANES, v, offset);
    return v;
}
