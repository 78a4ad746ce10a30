// Greedy choice: the index of the largest of `best` [B, COUNT], the smallest index of equals; 0 where none is above
// -infinity, so that the next step has a token of the vocabulary. One block a stream.
//
// Further parameter: COUNT. tokens [B].
#include "fused.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(const float* best, const int* best_at, int* tokens) {
    constexpr int NOWHERE = 0x7fffffff;
    __shared__ float tops[WARPS];
    __shared__ int places[WARPS];
    wait_for_previous();
    float top = __int_as_float(0xff800000);  // -infinity
    int top_at = NOWHERE;
    auto larger = [&](float other, int other_at) {
        if (other > top || (other == top && other_at < top_at)) top = other, top_at = other_at;
    };
    for (int at = threadIdx.x; at < COUNT; at += THREADS)
        larger(best[blockIdx.x * COUNT + at], best_at[blockIdx.x * COUNT + at]);
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        larger(__shfl_xor_sync(EVERY_LANE, top, step), __shfl_xor_sync(EVERY_LANE, top_at, step));
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top, places[threadIdx.x / 32] = top_at;
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll
        for (int warp = 1; warp < WARPS; ++warp) larger(tops[warp], places[warp]);
        tokens[blockIdx.x] = top_at == NOWHERE ? 0 : top_at;
    }
}
