// alpha·base + Gᵀc, summed in double: one read of G, the scaling and the subtraction in the same pass.
//
// A thread owns WIDTH columns and walks down the rows; c is staged in shared memory, TILE rows at
// a time. Where d is small there are too few threads to keep the memory busy, so the rows too are
// cut into slices: each leaves its part in `partial`, and `sum.cu` adds them in order.
//
// With TWOFOLD, a thread sums in two floats, c too in two; where their range does not do, once more
// in double. A c out of range is staged as NaN, which spoils the sums of all threads alike.
#include "common.cuh"

constexpr int THREADS = 128;
constexpr int TILE = 512;

#ifdef TWOFOLD
__device__ __forceinline__ float2 staging(double c) {
    const float high = c == 0.0 || in_range(c) ? (float)c : nanf("");
    return make_float2(high, (float)(c - high));
}
__device__ __forceinline__ void add(Twofold& sum, float g, float2 c) { sum.add(g, c.x, c.y); }
__device__ __forceinline__ double value(Twofold sum) { return sum.value(); }
#else
__device__ __forceinline__ double staging(double c) { return c; }
__device__ __forceinline__ void add(Double& sum, double g, double c) { sum.add(g, c); }
__device__ __forceinline__ double value(Double sum) { return sum.sum; }
#endif

// c: (m, COLUMNS). Grid: groups of columns × slices of rows. With one slice, out (d, COLUMNS) is the
// result and base (d, COLUMNS) is added, unless alpha is 0: then base may be anything. With more,
// OUT_T is double, out is the partial (slices, d, COLUMNS), and alpha is 0.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
combine(const G_T* __restrict__ G, const double* __restrict__ c, const X_T* __restrict__ base,
        double alpha, OUT_T* __restrict__ out, int m, i64 d, int rows_of_slice) {
#ifdef TWOFOLD
    typedef Twofold Sum;
    __shared__ float2 staged[TILE * COLUMNS];
#else
    typedef Double Sum;
    __shared__ double staged[TILE * COLUMNS];
#endif
    const i64 k = ((i64)blockIdx.x * THREADS + threadIdx.x) * WIDTH;
    const int first = blockIdx.y * rows_of_slice;
    const int last = smaller(first + rows_of_slice, m);

    Sum parts[WIDTH * COLUMNS] = {};
    for (int tile = first; tile < last; tile += TILE) {
        const int rows = smaller(last - tile, TILE);
        __syncthreads();  // nobody still reads the tile before
        for (int i = threadIdx.x; i < rows * COLUMNS; i += THREADS)
            staged[i] = staging(c[(i64)tile * COLUMNS + i]);
        __syncthreads();
        if (k < d) {
#pragma unroll 8
            for (int i = 0; i < rows; ++i) {
                Sum::Number g[WIDTH];
                load<WIDTH, (WIDTH > 1)>(G + (i64)(tile + i) * d + k, g);
#pragma unroll
                for (int j = 0; j < WIDTH; ++j)
#pragma unroll
                    for (int column = 0; column < COLUMNS; ++column)
                        add(parts[j * COLUMNS + column], g[j], staged[i * COLUMNS + column]);
            }
        }
    }

    if (k < d) {
        double sums[WIDTH * COLUMNS];
        bool in_range = true;
#pragma unroll
        for (int j = 0; j < WIDTH * COLUMNS; ++j) {
            sums[j] = value(parts[j]);
            in_range = in_range && parts[j].in_range();
        }
        if (!in_range) {
#pragma unroll
            for (int j = 0; j < WIDTH * COLUMNS; ++j) sums[j] = 0.0;
            for (int i = first; i < last; ++i) {
                double g[WIDTH];
                load<WIDTH, (WIDTH > 1)>(G + (i64)i * d + k, g);
#pragma unroll
                for (int j = 0; j < WIDTH * COLUMNS; ++j)
                    sums[j] += g[j / COLUMNS] * c[(i64)i * COLUMNS + j % COLUMNS];
            }
        }
        if (alpha != 0.0) {
            double added[WIDTH * COLUMNS];
            load<WIDTH * COLUMNS, (WIDTH > 1)>(base + k * COLUMNS, added);
#pragma unroll
            for (int j = 0; j < WIDTH * COLUMNS; ++j) sums[j] += alpha * added[j];
        }
        store<WIDTH * COLUMNS, (WIDTH > 1)>(sums, out + (blockIdx.y * d + k) * COLUMNS);
    }
}
