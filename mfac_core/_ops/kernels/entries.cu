// Elements of GᵀMG: for pairs (i, j) of columns of G, the sum over r of G_ri R_rj with R = MG.
//
// M is applied in between, to the columns j alone and to many at once: that is O(m²) a pair and
// nearly all the work, and the libraries' matrix products and triangular solves do it best. What is
// left for kernels is memory: columns j come straight as double, and columns i are never gathered.
//
// A read of G is of one element in a line, so a warp takes 32 neighbouring pairs: where they ask for
// neighbouring columns they share it. SLICES threads share the rows of a pair.
#include "common.cuh"

constexpr int SLICES = 16;

// taken: (m, count), columns of G by index. Grid: groups of columns × groups of rows, which go on
// from there by the height of the grid. Block: (32, SLICES).
extern "C" __global__ void __launch_bounds__(WARP * SLICES, 1)
take_columns(const G_T* __restrict__ G, const i64* __restrict__ columns,
             double* __restrict__ taken, int m, i64 d, i64 count) {
    const i64 p = (i64)blockIdx.x * WARP + threadIdx.x;
    if (p < count) {
        const G_T* column = G + columns[p];
        for (int row = blockIdx.y * SLICES + threadIdx.y; row < m; row += gridDim.y * SLICES)
            taken[row * count + p] = wide(column[row * d]);
    }
}

// right: (m, count), with steps of its own: solvers for triangular systems give it with contiguous
// columns. products: (count,). Grid: groups of pairs. Block: (32, SLICES).
extern "C" __global__ void __launch_bounds__(WARP * SLICES, 1)
pair_products(const G_T* __restrict__ G, const i64* __restrict__ columns,
              const double* __restrict__ right, double* __restrict__ products, int m, i64 d,
              i64 count, i64 row_step, i64 column_step) {
    __shared__ double of_slice[SLICES][WARP];
    const i64 p = (i64)blockIdx.x * WARP + threadIdx.x;
    double sum = 0.0;
    if (p < count) {
        const G_T* column = G + columns[p];
#pragma unroll 4
        for (int row = threadIdx.y; row < m; row += SLICES)
            sum += wide(column[row * d]) * right[row * row_step + p * column_step];
    }
    of_slice[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();

    if (threadIdx.y == 0 && p < count) {
        double total = 0.0;
        for (int s = 0; s < SLICES; ++s) total += of_slice[s][threadIdx.x];
        products[p] = total;
    }
}
