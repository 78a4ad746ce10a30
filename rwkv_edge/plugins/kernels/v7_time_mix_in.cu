// RWKV-7, first of five kernels of a layer: residual sum, layer norm, six token-shift mixes, receptance, key, value and
// the first halves of the LoRAs. A block computes TILE columns of one of the seven matrices.
//
// Further parameters: INNER (A), RANK_W, RANK_A, RANK_G, RANK_V (0 in layer 0), EMBED (1: the stream is rows of the
// embedding), EMBED_INT8 (1: those are int8, with a scale each). hw, ha, hg and hv are the LoRAs' hidden values after
// tanh, nothing, sigmoid and nothing.
// Grid (blocks of columns). stream_out must not be stream, nor shift_out shift.
#include "products.cuh"

enum Mix { MIX_R, MIX_W, MIX_K, MIX_V, MIX_A, MIX_G };  // the order in which the coefficients are stored

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
#if EMBED
    const int* tokens, const Row* __restrict__ table, const Act* __restrict__ row_scales,
#else
    const float* stream_in, const float* parts,
#endif
    const Act* shift, const Act* __restrict__ norm_weight, const Act* __restrict__ norm_bias,
    const Act* __restrict__ mix, const void* __restrict__ receptance, const void* __restrict__ key,
    const void* __restrict__ value, const void* __restrict__ w1, const void* __restrict__ a1,
    const void* __restrict__ g1,
#if RANK_V
    const void* __restrict__ v1,
#endif
    const Act* __restrict__ receptance_scale, const Act* __restrict__ key_scale, const Act* __restrict__ value_scale,
    const Act* __restrict__ w1_scale, const Act* __restrict__ a1_scale, const Act* __restrict__ g1_scale,
#if RANK_V
    const Act* __restrict__ v1_scale,
#endif
#if HALT
    const int* halted_flags,
#endif
    float* stream_out, Act* shift_out, float* r, float* k, float* v, float* hw, float* ha, float* hg
#if RANK_V
    , float* hv
#endif
) {
    __shared__ float scratch[SCRATCH];
    Product mine;
    int block = blockIdx.x;
    if (!is_mine(mine, block, 0, mix + MIX_R * WIDTH, receptance, receptance_scale, r, INNER, PLAIN) &&
        !is_mine(mine, block, 1, mix + MIX_K * WIDTH, key, key_scale, k, INNER, PLAIN) &&
        !is_mine(mine, block, 2, mix + MIX_V * WIDTH, value, value_scale, v, INNER, PLAIN) &&
        !is_mine(mine, block, 3, mix + MIX_W * WIDTH, w1, w1_scale, hw, RANK_W, TANH) &&
        !is_mine(mine, block, 4, mix + MIX_A * WIDTH, a1, a1_scale, ha, RANK_A, PLAIN) &&
        !is_mine(mine, block, 5, mix + MIX_G * WIDTH, g1, g1_scale, hg, RANK_G, SIGMOID)) {
#if RANK_V
        is_mine(mine, block, 6, mix + MIX_V * WIDTH, v1, v1_scale, hv, RANK_V, PLAIN);
#endif
    }
#if HALT
    const Halted halted = {halted_flags};
#else
    const Halted halted = {};
#endif
#if EMBED
    const Source source = {tokens, table, row_scales};
#else
    const Source source = {stream_in, parts};
#endif
    multiply<RANK_V ? 7 : 6>(mine, scratch, [&](float* inputs, float* space) {
        const Vector weight(norm_weight), bias(norm_bias), share(static_cast<const Act*>(mine.from));
        const Rows before(shift);
        wait_for_previous();
        begun(source, weight, bias, before, halted, stream_out, shift_out, space).shift(inputs, before, share);
    });
}
