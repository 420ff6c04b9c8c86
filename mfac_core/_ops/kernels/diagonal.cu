// A block of columns of diag F⁻¹: (1 − Σ W²)/λ, held to [1/F_ii, 1/λ], with F_ii = λ + Σ G²/n.
//
// W = L⁻¹G is the whitened block. 32 columns a block; SLICES threads share the rows of a column.
#include "common.cuh"

constexpr int SLICES = 8;

// whitened, columns: (m, width), the first with steps of its own: solvers for triangular systems
// give it with contiguous columns. diagonal, rest: (width,), rest being 1 − Σ W², of which the caller
// judges how much rounding has left of it. Block: (32, SLICES).
extern "C" __global__ void __launch_bounds__(WARP * SLICES, 1)
clamped_diagonal(const double* __restrict__ whitened, const double* __restrict__ columns,
                 double* __restrict__ diagonal, double* __restrict__ rest, int m, int width,
                 i64 row_step, i64 column_step, double damping, double divisor) {
    __shared__ double of_slice[2][SLICES][WARP];
    const int column = blockIdx.x * WARP + threadIdx.x;
    double taken = 0.0, fisher = 0.0;
    if (column < width)
        for (int row = threadIdx.y; row < m; row += SLICES) {
            const double w = whitened[row * row_step + column * column_step];
            const double g = columns[(i64)row * width + column];
            taken += w * w;
            fisher += g * g;
        }
    of_slice[0][threadIdx.y][threadIdx.x] = taken;
    of_slice[1][threadIdx.y][threadIdx.x] = fisher;
    __syncthreads();

    if (threadIdx.y == 0 && column < width) {
        taken = fisher = 0.0;
        for (int s = 0; s < SLICES; ++s) {
            taken += of_slice[0][s][threadIdx.x];
            fisher += of_slice[1][s][threadIdx.x];
        }
        const double left = 1.0 - taken;
        const double low = 1.0 / (damping + fisher / divisor), high = 1.0 / damping;
        const double value = left / damping;
        rest[column] = left;
        diagonal[column] = value < low ? low : value > high ? high : value;
    }
}
