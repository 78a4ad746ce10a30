// RWKV-7a, fifth of six kernels of a layer: hidden *= ((hs E_token) s2 + s0), where E_token is a matrix of each token.
// A block computes TILE columns of the hidden values.
//
// Further parameters: HIDDEN (F), RANK. hs is [B, RANK] float, a row of `table` a matrix [RANK, RANK].
// Grid (blocks of columns). hidden_out may be hidden_in.
#include "fused.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
    const int* tokens, const Act* __restrict__ table, const float* hs, const Matrix* __restrict__ s2,
    const Act* __restrict__ s2_scale, const Act* __restrict__ s0, const float* hidden_in, float* hidden_out) {
    extern __shared__ __align__(16) unsigned char shared[];
    constexpr int pitch = BATCH * TILE, turned_pitch = skewed(RANK);
    __shared__ float scratch[WARPS * pitch], low[BATCH * RANK], turned[BATCH * turned_pitch];
    typedef Columns<Matrix, RANK, TILE> Second;
    const int first = blockIdx.x * TILE;
    auto rows = Opened<Matrix, RANK, TILE>::from(s2, s2_scale, HIDDEN, 0, first, shared);
    rows.prefetch();
    const int own = first + threadIdx.x % TILE;  // column of every sum that this thread finishes
    const float offset = own < HIDDEN ? widen(s0[own]) : 0.0f;
    const float scale = INT8 && own < HIDDEN ? widen(s2_scale[own]) : 1.0f;
    wait_for_previous();
    for (int at = threadIdx.x; at < BATCH * RANK; at += THREADS) low[at] = hs[at];
    __syncthreads();
    for (int at = threadIdx.x; at < BATCH * RANK; at += THREADS) {
        const int b = at / RANK, column = at % RANK;
        const Act* matrix = table + static_cast<long long>(tokens[b]) * RANK * RANK + column;
        float sum = 0.0f;
#pragma unroll 32
        for (int row = 0; row < RANK; ++row) sum += low[b * RANK + row] * widen(matrix[row * RANK]);
        turned[b * turned_pitch + skewed(column)] = sum;
    }
    __syncthreads();

    float sums[BATCH][PER<Matrix>] = {};
    rows.add(sums, turned, turned_pitch);
    warp_sums<Second::SPAN>(sums, scratch + threadIdx.x / 32 * pitch, TILE);
    __syncthreads();
    for (int at = threadIdx.x; at < pitch; at += THREADS) {
        if (own >= HIDDEN) continue;
        const int place = at / TILE * HIDDEN + own;
        hidden_out[place] = hidden_in[place] * (over_warps(scratch, pitch, at) * scale + offset);
    }
}
