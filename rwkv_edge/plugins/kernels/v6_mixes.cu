// RWKV-6, second of seven kernels of a layer: x + (before - x)*(mu_i + h_i W_i), the five mixed inputs of the products
// that follow, [5, B, WIDTH] float. A block computes TILE channels of one of them.
//
// Further parameter: RANK (of a mix). normed is x, [B, WIDTH] float; h is [B, 5 * RANK] float after tanh.
// Grid (blocks of channels, 5).
#include "fused.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
    const float* normed, const Act* shift, const float* h, const Act* __restrict__ mix, const Weight* __restrict__ w2,
    float* mixed) {
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ float hidden[BATCH * RANK];
    __shared__ float scratch[WARPS * BATCH * TILE];
    const int first = blockIdx.x * TILE, index = blockIdx.y;
    typedef Columns<Weight, RANK, TILE> Second;
    Second rows(w2, WIDTH, index * RANK, first, shared);
    rows.prefetch();
    const int own = first + threadIdx.x % TILE;  // channel of every sum that this thread finishes
    const float share = own < WIDTH ? widen(mix[index * WIDTH + own]) : 0.0f;
    wait_for_previous();
    for (int at = threadIdx.x; at < BATCH * RANK; at += THREADS)
        hidden[at] = h[(at / RANK * gridDim.y + index) * RANK + at % RANK];
    __syncthreads();

    float sums[BATCH][PER<Weight>] = {};
    rows.add(sums, hidden, RANK);
    constexpr int pitch = BATCH * TILE;
    warp_sums<Second::SPAN>(sums, scratch + threadIdx.x / 32 * pitch, TILE);
    __syncthreads();
    for (int at = threadIdx.x; at < pitch; at += THREADS) {
        if (own >= WIDTH) continue;
        const int b = at / TILE;
        const float x = normed[b * WIDTH + own], before = widen(shift[b * WIDTH + own]);
        mixed[(index * BATCH + b) * WIDTH + own] = x + (before - x) * (share + over_warps(scratch, pitch, at));
    }
}
