// RWKV-7, fourth of five kernels of a layer: residual sum, layer norm, token-shift mix, key, relu^2.
//
// Further parameter: HIDDEN (F). Grid (blocks of columns). stream_out must not be stream, nor shift_out shift.
#include "fused.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
    const float* stream_in, const float* parts, const Act* shift, const Act* __restrict__ norm_weight,
    const Act* __restrict__ norm_bias, const Act* __restrict__ mix, const Matrix* __restrict__ key,
    const Act* __restrict__ key_scale,
#if HALT
    const int* halted_flags,
#endif
    float* stream_out, Act* shift_out, float* hidden) {
    extern __shared__ __align__(16) unsigned char shared[];
    float* inputs = reinterpret_cast<float*>(shared + RING);  // [BATCH, PITCH]
    __shared__ float scratch[WARPS * BATCH * (TILE > 2 ? TILE : 2)];
    const int first = blockIdx.x * TILE;
    auto rows = Opened<Matrix, WIDTH, TILE>::from(key, key_scale, HIDDEN, 0, first, shared);
    rows.prefetch();
    const Vector weight(norm_weight), bias(norm_bias), share(mix);
    const Rows before(shift);
    const int own = first + threadIdx.x % TILE;  // column of every sum that this thread finishes
    const float scale = INT8 && own < HIDDEN ? widen(key_scale[own]) : 1.0f;
#if HALT
    const Halted halted = {halted_flags};
#else
    const Halted halted = {};
#endif
    wait_for_previous();

    Stream stream;
    stream.load(stream_in, parts);
    if (blockIdx.x == 0) stream.keep(stream_out);
    stream.normalize(weight, bias, scratch);
    stream.shift(inputs, before, share);
    if (blockIdx.x == 0) stream.keep_act(shift_out, before, halted);
    __syncthreads();

    float sums[BATCH][PER<Matrix>] = {};
    rows.add(sums, inputs, PITCH);
    constexpr int pitch = BATCH * TILE;
    warp_sums<Columns<Matrix, WIDTH, TILE>::SPAN>(sums, scratch + threadIdx.x / 32 * pitch, TILE);
    __syncthreads();
    for (int at = threadIdx.x; at < pitch; at += THREADS) {
        if (own >= HIDDEN) continue;
        const float positive = fmaxf(over_warps(scratch, pitch, at) * scale, 0.0f);
        hidden[at / TILE * HIDDEN + own] = positive * positive;
    }
}
