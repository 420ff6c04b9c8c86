// The second stage of a deterministic reduction: out[j] = alpha·base[j] + Σ_p partial[p, j].
//
// 32 neighbouring elements a block, so that reads are whole lines; SLICES threads share the parts
// of one element, and their sums are added in order.
#include "common.cuh"

constexpr int SLICES = 8;

// partial: (parts, n), base: (n,) or, with alpha 0, anything. Block: (32, SLICES).
extern "C" __global__ void __launch_bounds__(WARP * SLICES, 1)
sum_parts(const double* __restrict__ partial, const X_T* __restrict__ base, double alpha,
          OUT_T* __restrict__ out, int parts, i64 n) {
    __shared__ double of_slice[SLICES][WARP];
    const i64 j = (i64)blockIdx.x * WARP + threadIdx.x;
    double sum = 0.0;
    if (j < n)
        for (int p = threadIdx.y; p < parts; p += SLICES) sum += partial[p * n + j];
    of_slice[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();

    if (threadIdx.y == 0 && j < n) {
        double total = alpha == 0.0 ? 0.0 : alpha * wide(base[j]);
        for (int s = 0; s < SLICES; ++s) total += of_slice[s][threadIdx.x];
        out[j] = Narrow<OUT_T>::from(total);
    }
}
