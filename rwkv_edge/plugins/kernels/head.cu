// Last norm and head: logits [B, V] float, and the largest of each block of columns with its index: what `argmax` reads.
//
// Further parameters: VOCABULARY (V), HEAD_COLUMNS (of the matrix; those from V on are zeros). Grid (blocks of columns).
#include "fused.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
    const float* stream_in, const float* parts, const Act* __restrict__ norm_weight,
    const Act* __restrict__ norm_bias, const Matrix* __restrict__ head, const Act* __restrict__ head_scale, float* logits,
    float* best, int* best_at) {
    extern __shared__ __align__(16) unsigned char shared[];
    float* inputs = reinterpret_cast<float*>(shared + RING);  // [BATCH, PITCH]
    __shared__ float scratch[WARPS * BATCH * (TILE > 2 ? TILE : 2)];
    const int first = blockIdx.x * TILE;
    auto rows = Opened<Matrix, WIDTH, TILE>::from(head, head_scale, HEAD_COLUMNS, 0, first, shared);
    rows.prefetch();
    const Vector weight(norm_weight), bias(norm_bias);
    wait_for_previous();

    Stream stream;
    stream.load(stream_in, parts);
    stream.normalize(weight, bias, scratch);
    stream.give(inputs);
    __syncthreads();

    float sums[BATCH][PER<Matrix>] = {};
    rows.add(sums, inputs, PITCH);
    constexpr int pitch = BATCH * TILE;
    warp_sums<Columns<Matrix, WIDTH, TILE>::SPAN>(sums, scratch + threadIdx.x / 32 * pitch, TILE);
    __syncthreads();
    // a warp at a time has one stream: the largest logit of the block, the first of equals
    for (int b = threadIdx.x / 32; b < BATCH; b += WARPS) {
        float top = __int_as_float(0xff800000);  // -infinity
        int top_at = 0x7fffffff;
        for (int at = threadIdx.x % 32; at < TILE; at += 32) {
            const int column = first + at;
            if (column >= VOCABULARY) continue;
            float logit = over_warps(scratch, pitch, b * TILE + at);
            if (INT8) logit *= widen(head_scale[column]);
            logits[static_cast<long long>(b) * VOCABULARY + column] = logit;
            if (logit > top || top_at == 0x7fffffff) top = logit, top_at = column;
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
            const float other = __shfl_xor_sync(EVERY_LANE, top, step);
            const int other_at = __shfl_xor_sync(EVERY_LANE, top_at, step);
            if (other > top || (other == top && other_at < top_at)) top = other, top_at = other_at;
        }
        if (threadIdx.x % 32 == 0) best[b * gridDim.x + blockIdx.x] = top, best_at[b * gridDim.x + blockIdx.x] = top_at;
    }
}
