// The greedy choice of every stream: the largest of `columns` logits, the first of equals. Grid (B).
#include "wide.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(Number columns, const float* __restrict__ logits, int* ids) {
    __shared__ float tops[WARPS];
    __shared__ int places[WARPS];
    wait_for_rows();
    const float* const row = logits + blockIdx.x * columns;
    float top = __int_as_float(0xff800000);  // -infinity
    int at = 0;
    const bool aligned = columns % 4 == 0;
    for (int n = threadIdx.x * 4; n < columns; n += THREADS * 4) {
        float x[4];
        if (aligned) load4(x, row + n);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            if (!aligned) x[e] = n + e < columns ? row[n + e] : __int_as_float(0xff800000);
            if (x[e] > top) top = x[e], at = n + e;
        }
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const float other = __shfl_xor_sync(EVERY_LANE, top, step);
        const int other_at = __shfl_xor_sync(EVERY_LANE, at, step);
        if (other > top || (other == top && other_at < at)) top = other, at = other_at;
    }
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top, places[threadIdx.x / 32] = at;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int warp = 1; warp < WARPS; ++warp)
        if (tops[warp] > top || (tops[warp] == top && places[warp] < at)) top = tops[warp], at = places[warp];
    ids[blockIdx.x] = at;
}
