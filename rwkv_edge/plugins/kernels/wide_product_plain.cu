// Products without tensor cores, for dtypes that have none; see wide_product.cuh. A thread has 4 x 4 sums.
//
// Further parameter: TILE_K, inputs that are in shared memory at once. THREADS is TILE_M * TILE_N / 16.
#include "wide_product.cuh"

// One weight as it is meant.
__device__ __forceinline__ float weight_of(const Product& p, int k, int n) {
    const long long at = static_cast<long long>(k) * p.pitch + n;
    if (has(IN_INT8) && p.form == IN_INT8) return static_cast<const signed char*>(p.matrix)[at] * widen(p.scale[n]);
    if (has(IN_INT4) && p.form == IN_INT4) {
        const int pair = static_cast<const unsigned char*>(p.matrix)[at / 2], nibble = at % 2 ? pair >> 4 : pair & 15;
        return ((nibble ^ 8) - 8) * widen(p.scale[static_cast<long long>(k / p.block) * p.pitch + n]);
    }
    return widen(static_cast<const Weight*>(p.matrix)[at]);
}

constexpr int ACROSS = TILE_N / 4;
static_assert(THREADS == TILE_M * TILE_N / 16, "a thread has 4 x 4 sums");

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(PRODUCT_ARGUMENTS) {
    __shared__ __align__(16) float inputs[TILE_K][TILE_M + 4], weights[TILE_K][TILE_N];
    FIND_PRODUCT
    const int share = (mine.depth + SPLIT - 1) / SPLIT;
    const int start = blockIdx.y * share, end = min(mine.depth, start + share);
    const int m = threadIdx.x / ACROSS * 4, n = threadIdx.x % ACROSS * 4;
    float sums[4][4] = {};
    wait_for_rows();
    for (int first = start; first < end; first += TILE_K) {
        for (int index = threadIdx.x; index < TILE_M * TILE_K; index += THREADS) {
            const int row = first_m + index / TILE_K, k = first + index % TILE_K;
            const bool there = row < rows && k < end;
            const long long at = static_cast<long long>(row) * mine.depth + k;
            inputs[index % TILE_K][index / TILE_K] = there ? widen(mine.input[at]) : 0.0f;
        }
        for (int index = threadIdx.x; index < TILE_K * TILE_N; index += THREADS) {
            const int k = first + index / TILE_N, column = first_n + index % TILE_N;
            const bool there = k < end && column < mine.columns;
            weights[index / TILE_N][index % TILE_N] = there ? weight_of(mine, k, column) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < TILE_K; ++k) {
            float x[4], w[4];
            load4(x, &inputs[k][m]), load4(w, &weights[k][n]);
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) sums[i][j] += x[i] * w[j];
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) finish_quad(mine, rows, first_m + m + i, first_n + n, sums[i]);
}
