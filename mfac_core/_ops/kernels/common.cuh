// What all kernels share: storage types, vector loads, and sums over a warp.
//
// The macros G_T, X_T and OUT_T name the types in memory: float, double, __half or __nv_bfloat16.
// All arithmetic is double, but for sums in two floats where TWOFOLD asks for them. WIDTH is how many
// consecutive elements a thread takes at a time; where it is more than 1, the caller has seen to it
// that every row starts at a multiple of 16 bytes.
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

#ifdef TWOFOLD
__device__ __forceinline__ float single(float v) { return v; }
#ifdef USE_FP16
__device__ __forceinline__ float single(__half v) { return __half2float(v); }
#endif
#ifdef USE_BF16
__device__ __forceinline__ float single(__nv_bfloat16 v) { return __bfloat162float(v); }
#endif
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

#ifdef TWOFOLD
template <int N, bool WIDE_ROWS, class T>
__device__ __forceinline__ void load(const T* __restrict__ from, float* to) {
    const auto pack = *reinterpret_cast<const Pack<T, N, WIDE_ROWS>*>(from);
#pragma unroll
    for (int j = 0; j < N; ++j) to[j] = single(pack.v[j]);
}
#endif

template <int N, bool WIDE_ROWS, class T>
__device__ __forceinline__ void store(const double* from, T* to) {
    Pack<T, N, WIDE_ROWS> pack;
#pragma unroll
    for (int j = 0; j < N; ++j) pack.v[j] = Narrow<T>::from(from[j]);
    *reinterpret_cast<Pack<T, N, WIDE_ROWS>*>(to) = pack;
}

// ---- sums of products -------------------------------------------------------------------------

struct Double {
    typedef double Number;
    double sum;
    __device__ __forceinline__ void add(double a, double b) { sum += a * b; }
    __device__ __forceinline__ bool in_range() const { return true; }
};

#ifdef TWOFOLD
// Whether two floats have all digits of a number of this size. Not where it is NaN; nor where it is
// 0, since what is too small for a float becomes 0.
template <class T> __device__ __forceinline__ bool in_range(T v) {
    return fabs(v) >= (T)0x1p-78 && fabs(v) <= (T)0x1p127;
}

// A sum in two floats, for devices that have little double: high + low, |low| ≤ 2^-24 |high|.
//
// With u = 2^-24, n products are off by at most (7 n + 14) u² Σ|a b|, less than (n + 2) 2^-45 Σ|a b|.
// A step's roundings: those of e + q and of their sum with low, each of at most u times
// 2u (|high| + |a b|) or so; the last two lines are exact, or off by 2u |low| where high has
// cancelled. Products and their errors below 2^-126 vanish, 2^-48 of a sum that is `in_range`.
struct Twofold {
    typedef float Number;
    float high, low;

    __device__ __forceinline__ void add(float a, float b) {
        const float p = __fmul_rn(a, b);  // never contracted
        take(p, __fmaf_rn(a, b, -p));
    }

    // a (b + c), for c no more than the rounding of b.
    __device__ __forceinline__ void add(float a, float b, float c) {
        const float p = __fmul_rn(a, b);
        take(p, __fmaf_rn(a, c, __fmaf_rn(a, b, -p)));
    }

    __device__ __forceinline__ void take(float p, float q) {
        const float t = high + p, z = t - high;
        const float e = (high - (t - z)) + (p - z);  // t + e = high + p
        const float rest = low + (e + q);
        high = t + rest;
        low = rest - (high - t);
    }

    __device__ __forceinline__ double value() const { return (double)high + (double)low; }
    __device__ __forceinline__ bool in_range() const { return ::in_range(high); }
};
#endif

// ---- sums in a fixed order --------------------------------------------------------------------

// The sum over the warp, in lane 0.
__device__ __forceinline__ double warp_sum(double v) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        v += __shfl_down_sync(ALL_LANES, v, offset);
    return v;
}
