// The window's dual: exchange row and column i of A = shift·I + gram, and of K = A⁻¹ in O(m²).
//
// With k = K eᵢ, p = kᵢ, b the new row of the Gram without its entry i, and w = K b:
//   deleting i:            K − k kᵀ/p
//   and inserting it anew: + v vᵀ/s,  v = w − k (kᵀb)/p − eᵢ (so vᵢ = −1),  s = Aᵢᵢ − bᵀ(v + eᵢ)
// All m × m arrays are symmetric, and stay so to the last bit: both products commute.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int ROWS = 8;

// First launch, a warp a row: w = K b, and a copy of k, which the second launch overwrites.
// w, k: (m,). Grid: ceil(m / WARPS).
extern "C" __global__ void __launch_bounds__(THREADS, 1)
dual_products(const double* __restrict__ K, const double* __restrict__ row,
              double* __restrict__ w, double* __restrict__ k, int m, int i) {
    const int r = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (r >= m) return;  // the whole warp
    const double* of_row = K + (i64)r * m;
    double sum = 0.0;
    for (int j = lane; j < m; j += WARP) sum += j == i ? 0.0 : of_row[j] * row[j];
    sum = warp_sum(sum);
    if (lane == 0) {
        w[r] = sum;
        k[r] = of_row[i];
    }
}

// The sum of v over the block, in every thread. Each block computes the same sums for itself, in
// the same order: that costs less than another launch.
__device__ __forceinline__ double block_sum(double v, double* of_warp) {
    v = warp_sum(v);
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = v;
    __syncthreads();
    double total = 0.0;
    for (int j = 0; j < WARPS; ++j) total += of_warp[j];
    return total;
}

// Second launch, ROWS rows of K and of the Gram a block. Where rounding has eaten the pivot p or the
// Schur complement s (at least the shift, had there been none), K stays and *failed becomes 1.
// Grid: ceil(m / ROWS).
extern "C" __global__ void __launch_bounds__(THREADS, 1)
dual_update(double* __restrict__ K, double* __restrict__ gram, const double* __restrict__ row,
            const double* __restrict__ w, const double* __restrict__ k, int* __restrict__ failed,
            double shift, int m, int i) {
    __shared__ double of_warp[2][WARPS];
    const double pivot = k[i];
    double sum = 0.0;
    for (int j = threadIdx.x; j < m; j += THREADS) sum += j == i ? 0.0 : k[j] * row[j];
    const double ratio = block_sum(sum, of_warp[0]) / pivot;
    sum = 0.0;  // bᵀv from v itself: as a difference of two dot products it would cancel
    for (int j = threadIdx.x; j < m; j += THREADS)
        sum += j == i ? 0.0 : fma(-ratio, k[j], w[j]) * row[j];
    const double schur = shift + row[i] - block_sum(sum, of_warp[1]);
    const bool sound = pivot > 0.0 && schur > 0.5 * shift;  // false for NaN too
    if (blockIdx.x == 0 && threadIdx.x == 0) *failed = !sound;

    const double of_pivot = 1.0 / pivot, of_schur = 1.0 / schur;
    const int first = blockIdx.x * ROWS, last = smaller(first + ROWS, m);
    for (int r = first; r < last; ++r) {
        const double k_r = k[r], v_r = r == i ? -1.0 : fma(-ratio, k_r, w[r]);
        for (int j = threadIdx.x; j < m; j += THREADS) {
            const i64 place = (i64)r * m + j;
            if (r == i || j == i) gram[place] = row[r == i ? j : r];
            if (!sound) continue;
            const double v_j = j == i ? -1.0 : fma(-ratio, k[j], w[j]);
            K[place] += (v_r * v_j) * of_schur - (k_r * k[j]) * of_pivot;
        }
    }
}
