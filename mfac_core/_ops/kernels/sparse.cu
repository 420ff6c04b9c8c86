// Products with rows that hold K entries of each block of columns, by index and value.
//
// indices, values: (blocks, capacity, K), of which the first m rows of each block are in use. An
// index is relative to the start of its block, which is at most WIDEST columns wide; the indices of a
// row within a block are ascending, all different, and below `width`. Entries past the end of the
// last block are zero.
#include "common.cuh"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP;
constexpr int WIDEST = 4096;
constexpr int LANES = 8;  // that share a row's entries, of which there are few
constexpr int GROUPS = THREADS / LANES;
constexpr int TILE = 512;  // entries in shared memory at a time

// C x in parts, for x (d, columns): partial (blocks, m, columns). Grid: blocks × slices of rows ×
// columns.
//
// A block of threads keeps its part of x in shared memory, and reads its entries one after another.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
sparse_project(const short* __restrict__ indices, const V_T* __restrict__ values,
               const X_T* __restrict__ x, double* __restrict__ partial, int m, int capacity, int k,
               i64 d, int width, int rows_of_slice) {
    __shared__ X_T staged[WIDEST];
    const i64 start = (i64)blockIdx.x * width;
    const int size = (int)smaller(d - start, (i64)width);
    const int first = blockIdx.y * rows_of_slice;
    const int last = smaller(first + rows_of_slice, m);
    const i64 step = gridDim.z, column = blockIdx.z;
    for (int j = threadIdx.x; j < size; j += THREADS) staged[j] = x[(start + j) * step + column];
    __syncthreads();

    const int lane = threadIdx.x % LANES;
    // All lanes of a warp go round together: they pass their sums on to each other.
    for (int group = first; group < last; group += GROUPS) {
        const int row = group + threadIdx.x / LANES;
        double sum = 0.0;
        if (row < last) {
            const i64 begin = ((i64)blockIdx.x * capacity + row) * k;
            for (int t = lane; t < k; t += LANES) {
                const int j = indices[begin + t];
                if (j < size) sum += wide(values[begin + t]) * wide(staged[j]);
            }
        }
#pragma unroll
        for (int offset = LANES / 2; offset > 0; offset /= 2)
            sum += __shfl_down_sync(ALL_LANES, sum, offset, LANES);
        if (lane == 0 && row < last)
            partial[((i64)blockIdx.x * m + row) * step + column] = sum;
    }
}

// alpha·base + Cᵀc, for c (m, columns). Grid: blocks × slices of rows × columns. With one slice, out
// (d, columns) is the result and base (d, columns) is added, unless alpha is 0: then base may be
// anything. With more, OUT_T is double, out is the partial (slices, d, columns), and alpha is 0.
//
// The sums of a block of columns are kept in shared memory. Each warp owns a quarter of them and
// adds the entries that fall there, row after row: no sum is ever anybody else's, and its order is
// that of the rows.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
sparse_combine(const short* __restrict__ indices, const V_T* __restrict__ values,
               const double* __restrict__ c, const X_T* __restrict__ base, double alpha,
               OUT_T* __restrict__ out, int m, int capacity, int k, i64 d, int width,
               int rows_of_slice) {
    __shared__ double sums[WIDEST];
    __shared__ double terms[TILE];
    __shared__ short places[TILE];
    const i64 start = (i64)blockIdx.x * width;
    const int size = (int)smaller(d - start, (i64)width);
    const i64 step = gridDim.z, column = blockIdx.z;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int share = (width + WARPS - 1) / WARPS, own = warp * share;
    const int first = blockIdx.y * rows_of_slice;
    const int last = smaller(first + rows_of_slice, m);
    for (int j = threadIdx.x; j < width; j += THREADS) sums[j] = 0.0;

    // A tile is some whole rows or, where they are long, a part of one.
    const int rows = smaller(k, TILE) == k ? TILE / k : 1;
    const int part = smaller(k, TILE);
    for (int tile = first; tile < last; tile += rows)
        for (int from = 0; from < k; from += part) {
            const int held = smaller(last - tile, rows), taken = smaller(k - from, part);
            __syncthreads();  // nobody still reads the tile before; the sums are zero
            for (int r = warp; r < held; r += WARPS) {
                const double weight = c[(tile + r) * step + column];
                const i64 begin = ((i64)blockIdx.x * capacity + tile + r) * k + from;
                for (int t = lane; t < taken; t += WARP) {
                    terms[r * part + t] = weight * wide(values[begin + t]);
                    places[r * part + t] = indices[begin + t];
                }
            }
            __syncthreads();
            for (int r = 0; r < held; ++r) {
                for (int t = lane; t < taken; t += WARP) {
                    const int j = places[r * part + t] - own;
                    if (0 <= j && j < share) sums[own + j] += terms[r * part + t];
                }
                __syncwarp();  // the next row may add to the same sums by other lanes
            }
        }
    __syncthreads();

    for (int j = threadIdx.x; j < size; j += THREADS) {
        const i64 place = (start + j) * step + column;
        double sum = sums[j];
        if (alpha != 0.0) sum += alpha * wide(base[place]);
        out[blockIdx.y * d * step + place] = Narrow<OUT_T>::from(sum);
    }
}
