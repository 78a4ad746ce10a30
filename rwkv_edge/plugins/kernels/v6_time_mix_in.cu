// RWKV-6, third of seven kernels of a layer: receptance, key, value, gate and the first half of the decay's LoRA, each of
// its own mixed input. A block computes TILE columns of one of the five matrices.
//
// Further parameters: INNER (A), RANK (of the decay's LoRA). mixed is [5, B, WIDTH] float, in the order w, k, v, r, g; hw
// is the LoRA's hidden values after tanh. Grid (blocks of columns).
#include "products.cuh"

enum Mix { MIX_W, MIX_K, MIX_V, MIX_R, MIX_G };  // the order in which the inputs are stored

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
    const float* mixed, const void* __restrict__ receptance, const void* __restrict__ key,
    const void* __restrict__ value, const void* __restrict__ gate, const void* __restrict__ w1,
    const Act* __restrict__ receptance_scale, const Act* __restrict__ key_scale, const Act* __restrict__ value_scale,
    const Act* __restrict__ gate_scale, const Act* __restrict__ w1_scale, float* r, float* k, float* v, float* g,
    float* hw) {
    __shared__ float scratch[SCRATCH];
    constexpr int row = BATCH * WIDTH;
    Product mine;
    int block = blockIdx.x;
    if (!is_mine(mine, block, 0, mixed + MIX_R * row, receptance, receptance_scale, r, INNER, PLAIN) &&
        !is_mine(mine, block, 1, mixed + MIX_K * row, key, key_scale, k, INNER, PLAIN) &&
        !is_mine(mine, block, 2, mixed + MIX_V * row, value, value_scale, v, INNER, PLAIN) &&
        !is_mine(mine, block, 3, mixed + MIX_G * row, gate, gate_scale, g, INNER, PLAIN))
        is_mine(mine, block, 4, mixed + MIX_W * row, w1, w1_scale, hw, RANK, TANH);
    multiply<5>(mine, scratch, [&](float* inputs, float*) {
        wait_for_previous();
        const float* from = static_cast<const float*>(mine.from);
#pragma unroll
        for (int b = 0; b < BATCH; ++b)
#pragma unroll
            for (int q = 0; q < QUADS; ++q) {
                if (place(q) >= WIDTH) continue;
                float four[4];
                load4(four, from + b * WIDTH + place(q));
                store4(inputs + b * PITCH + skewed(place(q)), four);
            }
    });
}
