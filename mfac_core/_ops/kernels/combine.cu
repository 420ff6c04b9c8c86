// alpha·base + Gᵀc in double: one read of G, the scaling and the subtraction in the same pass.
//
// A thread owns WIDTH columns and walks down the rows; c is staged in shared memory, TILE rows at
// a time. Where d is small there are too few threads to keep the memory busy, so the rows too are
// cut into slices: each leaves its part in `partial`, and `sum.cu` adds them in order.
#include "common.cuh"

constexpr int THREADS = 128;
constexpr int TILE = 512;

// c: (m, COLUMNS). Grid: groups of columns × slices of rows. With one slice, out (d, COLUMNS) is the
// result and base (d, COLUMNS) is added, unless alpha is 0: then base may be anything. With more,
// OUT_T is double, out is the partial (slices, d, COLUMNS), and alpha is 0.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
combine(const G_T* __restrict__ G, const double* __restrict__ c, const X_T* __restrict__ base,
        double alpha, OUT_T* __restrict__ out, int m, i64 d, int rows_of_slice) {
    __shared__ double staged[TILE * COLUMNS];
    const i64 k = ((i64)blockIdx.x * THREADS + threadIdx.x) * WIDTH;
    const int first = blockIdx.y * rows_of_slice;
    const int last = smaller(first + rows_of_slice, m);

    double sums[WIDTH * COLUMNS] = {};
    for (int tile = first; tile < last; tile += TILE) {
        const int rows = smaller(last - tile, TILE);
        __syncthreads();  // nobody still reads the tile before
        for (int i = threadIdx.x; i < rows * COLUMNS; i += THREADS)
            staged[i] = c[(i64)tile * COLUMNS + i];
        __syncthreads();
        if (k < d) {
#pragma unroll 8
            for (int i = 0; i < rows; ++i) {
                double g[WIDTH];
                load<WIDTH, (WIDTH > 1)>(G + (i64)(tile + i) * d + k, g);
#pragma unroll
                for (int j = 0; j < WIDTH; ++j)
#pragma unroll
                    for (int column = 0; column < COLUMNS; ++column)
                        sums[j * COLUMNS + column] += g[j] * staged[i * COLUMNS + column];
            }
        }
    }

    if (k < d) {
        if (alpha != 0.0) {
            double added[WIDTH * COLUMNS];
            load<WIDTH * COLUMNS, (WIDTH > 1)>(base + k * COLUMNS, added);
#pragma unroll
            for (int j = 0; j < WIDTH * COLUMNS; ++j) sums[j] += alpha * added[j];
        }
        store<WIDTH * COLUMNS, (WIDTH > 1)>(sums, out + (blockIdx.y * d + k) * COLUMNS);
    }
}
