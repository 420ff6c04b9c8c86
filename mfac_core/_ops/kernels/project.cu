// G x: one read of G, for x of COLUMNS columns, summed in double.
//
// A block takes ROWS rows and one chunk of the d elements, so that an element of x, once loaded,
// serves ROWS rows. It leaves its part of each product in `partial`, and `sum.cu` adds the parts:
// the order of every sum is fixed by the sizes alone, and results are the same bit for bit each time.
//
// With EXCHANGE, x is a new gradient in the storage type: row `slot` of G is not read but replaced
// by it, in the same pass, and its product is that of the new row with itself, the square norm.
// The block whose rows hold the slot is the only one to touch that row's chunk. Where `norm2`, the
// square norm computed before, is not finite, nothing is written, and the product is that of G with
// the old row: as if it had been exchanged for itself.
//
// With TWOFOLD, a thread sums in two floats; where their range does not do, once more in double.
#include "common.cuh"

#ifdef EXCHANGE
typedef G_T* rows_t;
#else
typedef const G_T* __restrict__ rows_t;
#endif

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int ROWS = COLUMNS == 1 ? 8 : 4;  // fewer where each needs more sums in registers
#ifdef TWOFOLD
constexpr int BLOCKS = 2;  // of a multiprocessor: four columns would take some registers too many
#else
constexpr int BLOCKS = 1;
#endif
constexpr int SUMS = ROWS * COLUMNS;
constexpr int UNROLL = 4 / WIDTH;  // enough loads in flight, and few registers

__device__ __forceinline__ double value(double sum) { return sum; }
__device__ __forceinline__ double value(Double sum) { return sum.sum; }

// A thread's part of the sums over columns `start` to `end`; `each` sees the elements of x.
template <class Sum, class Each>
__device__ __forceinline__ void multiply(const G_T* const (&rows)[ROWS], const X_T* factor,
                                         i64 start, i64 end, Sum (&sums)[ROWS][COLUMNS],
                                         Each each) {
#pragma unroll UNROLL
    for (i64 k = start + threadIdx.x * WIDTH; k < end; k += THREADS * WIDTH) {
        typename Sum::Number xs[WIDTH * COLUMNS];
        load<WIDTH * COLUMNS, (WIDTH > 1)>(factor + k * COLUMNS, xs);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            typename Sum::Number g[WIDTH];
            load<WIDTH, (WIDTH > 1)>(rows[r] + k, g);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j)
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) sums[r][c].add(g[j], xs[j * COLUMNS + c]);
        }
        each(k, xs);
    }
}

// partial: (chunks, m, COLUMNS); x: (d, COLUMNS). Grid: groups of rows × chunks.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
project(rows_t G, const X_T* __restrict__ x, double* __restrict__ partial, int m, i64 d, i64 chunk,
        int slot, const double* __restrict__ norm2) {
    __shared__ double of_warp[WARPS][SUMS];
    const int first = blockIdx.x * ROWS;
    const i64 start = blockIdx.y * chunk;
    const i64 end = smaller(start + chunk, d);

#ifdef EXCHANGE
    const bool accepted = isfinite(*norm2);
    const X_T* factor = accepted ? x : G + slot * d;
#else
    const X_T* factor = x;
#endif

    const G_T* rows[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        // Past the last row the last is read again, and its sum is dropped below.
        const int row = smaller(first + r, m - 1);
        rows[r] = G + row * d;
#ifdef EXCHANGE
        if (row == slot) rows[r] = factor;
#endif
    }

#ifdef TWOFOLD
    double sums[ROWS][COLUMNS];
    Twofold twofold[ROWS][COLUMNS] = {};
    multiply(rows, factor, start, end, twofold, [](auto...) {});
    bool in_range = true;
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            sums[r][c] = twofold[r][c].value();
            in_range = in_range && twofold[r][c].in_range();
        }
    if (!in_range) {
        Double again[ROWS][COLUMNS] = {};
        multiply(rows, factor, start, end, again, [](auto...) {});
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) sums[r][c] = again[r][c].sum;
    }
#else
    Double sums[ROWS][COLUMNS] = {};
    multiply(rows, factor, start, end, sums, [&](i64 k, const double* xs) {
#ifdef EXCHANGE
        if (accepted && first <= slot && slot < first + ROWS)
            store<WIDTH, (WIDTH > 1)>(xs, G + slot * d + k);
#endif
    });
#endif

    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            const double sum = warp_sum(value(sums[r][c]));
            if (lane == 0) of_warp[warp][r * COLUMNS + c] = sum;
        }
    __syncthreads();

    const int row = first + threadIdx.x / COLUMNS;
    if (threadIdx.x < SUMS && row < m) {
        double total = 0.0;
        for (int w = 0; w < WARPS; ++w) total += of_warp[w][threadIdx.x];
        const i64 place = ((i64)blockIdx.y * m + row) * COLUMNS + threadIdx.x % COLUMNS;
        partial[place] = total;
    }
}
