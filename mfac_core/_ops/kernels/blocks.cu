// The block-diagonal form: P = λI + GᵀG/n restricted to small blocks of columns, and its inverse.
//
// A block of threads owns one block of columns, at most BLOCK wide, and keeps its matrix in shared
// memory in double: the lower triangle, row by row. The inverse comes by sweeping, a symmetric
// Gauss-Jordan elimination that needs no pivoting for a positive definite matrix, and no second
// array: sweeping index k, with a = column k and p = a_k before it,
//   P_kk ← −1/p,   P_ik ← a_i/p,   P_ij ← P_ij − a_i a_j/p,
// and after all indices −P⁻¹ has taken the place of P.
#include "common.cuh"

constexpr int SIDE = 16;  // threads a side
constexpr int THREADS = SIDE * SIDE;
constexpr int WARPS = THREADS / WARP;
constexpr int SPAN = BLOCK / SIDE;  // a thread's entries a side: (y + 16a, x + 16b)
constexpr int ROWS = 8;             // of G in shared memory at a time
constexpr int TRIANGLE = BLOCK * (BLOCK + 1) / 2;

__device__ __forceinline__ int packed(int i, int j) {  // an entry at or below the diagonal
    return i * (i + 1) / 2 + j;
}

// starts: (blocks + 1,), where each block of columns begins, and d. inverses: (blocks, stride,
// stride), each in its leading part. failed: (blocks,), 1 where rounding has left a pivot that is
// not positive. Grid: blocks. Block: (16, 16). Shared memory: TRIANGLE + BLOCK + ROWS·BLOCK doubles.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
block_inverses(const G_T* __restrict__ G, const i64* __restrict__ starts,
               double* __restrict__ inverses, int* __restrict__ failed, int m, i64 d, int stride,
               double damping, double divisor) {
    extern __shared__ double shared[];
    double* matrix = shared;
    double* column = matrix + TRIANGLE;
    double* staged = column + BLOCK;  // (ROWS, BLOCK)
    const i64 start = starts[blockIdx.x];
    const int size = (int)(starts[blockIdx.x + 1] - start);
    const int x = threadIdx.x, y = threadIdx.y, thread = y * SIDE + x;

    double sums[SPAN][SPAN] = {};
    for (int first = 0; first < m; first += ROWS) {
        __syncthreads();  // nobody still reads the rows before
        for (int e = thread; e < ROWS * BLOCK; e += THREADS) {
            const int row = first + e / BLOCK, j = e % BLOCK;
            staged[e] = row < m && j < size ? wide(G[row * d + start + j]) : 0.0;
        }
        __syncthreads();
        for (int r = 0; r < ROWS; ++r) {
            double left[SPAN], right[SPAN];
#pragma unroll
            for (int a = 0; a < SPAN; ++a) {
                left[a] = staged[r * BLOCK + y + SIDE * a];
                right[a] = staged[r * BLOCK + x + SIDE * a];
            }
#pragma unroll
            for (int a = 0; a < SPAN; ++a)
#pragma unroll
                for (int b = 0; b <= a; ++b) sums[a][b] += left[a] * right[b];
        }
    }
#pragma unroll
    for (int a = 0; a < SPAN; ++a)
#pragma unroll
        for (int b = 0; b <= a; ++b) {
            const int i = y + SIDE * a, j = x + SIDE * b;
            if (j <= i) matrix[packed(i, j)] = sums[a][b] / divisor + (i == j ? damping : 0.0);
        }
    __syncthreads();

    bool sound = true;
    for (int k = 0; k < size; ++k) {
        if (thread < size)  // all of the column, before any of it changes
            column[thread] = thread > k ? matrix[packed(thread, k)] : matrix[packed(k, thread)];
        __syncthreads();
        const double pivot = column[k], of_pivot = 1.0 / pivot;
        sound = sound && pivot > 0.0;
        for (int i = y; i < size; i += SIDE)
            for (int j = x; j <= i; j += SIDE) {
                double& entry = matrix[packed(i, j)];
                if (i != k && j != k) entry -= column[i] * column[j] * of_pivot;
                else if (i == j) entry = -of_pivot;
                else entry = column[i == k ? j : i] * of_pivot;
            }
        __syncthreads();
    }

    double* inverse = inverses + (i64)blockIdx.x * stride * stride;
    for (int i = y; i < size; i += SIDE)
        for (int j = x; j < size; j += SIDE)
            inverse[i * stride + j] = -(j > i ? matrix[packed(j, i)] : matrix[packed(i, j)]);
    if (thread == 0) failed[blockIdx.x] = !sound;
}

// out = P⁻¹x, block by block, a warp a row. x, out: (d,). Grid: blocks.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
block_product(const double* __restrict__ inverses, const i64* __restrict__ starts,
              const X_T* __restrict__ x, OUT_T* __restrict__ out, int stride) {
    const i64 start = starts[blockIdx.x];
    const int size = (int)(starts[blockIdx.x + 1] - start);
    const double* inverse = inverses + (i64)blockIdx.x * stride * stride;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (int i = warp; i < size; i += WARPS) {
        double sum = 0.0;
        for (int j = lane; j < size; j += WARP) sum += inverse[i * stride + j] * wide(x[start + j]);
        sum = warp_sum(sum);
        if (lane == 0) out[start + i] = Narrow<OUT_T>::from(sum);
    }
}
