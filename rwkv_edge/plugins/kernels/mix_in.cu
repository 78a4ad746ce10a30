// The kernel that begins a half of a layer of RWKV-4 to 6, and the channel mix of 7a: residual sum, layer norm, token-shift
// mixes, and one to four products of what they give.
//
// Further parameters: PRODUCTS; COLUMNS_i and FINISH_i of each (see `products.cuh`); PLAIN_INPUT (a bit for each product
// whose input is the norm's output, without a mix); EMBED (1: the stream is rows of the embedding) and EMBED_INT8 (1:
// those are int8, with a scale each); NORMED (1: the norm's output is kept too, in float).
// Grid (blocks of columns). stream_out must not be stream, nor shift_out shift.
#include "products.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
#if EMBED
    const int* tokens, const Row* __restrict__ table, const Act* __restrict__ row_scales,
#else
    const float* stream_in, const float* parts,
#endif
    const Act* shift, const Act* __restrict__ norm_weight, const Act* __restrict__ norm_bias,
    const Act* __restrict__ mix_0,
#if PRODUCTS > 1
    const Act* __restrict__ mix_1,
#endif
#if PRODUCTS > 2
    const Act* __restrict__ mix_2,
#endif
#if PRODUCTS > 3
    const Act* __restrict__ mix_3,
#endif
    const void* __restrict__ matrix_0,
#if PRODUCTS > 1
    const void* __restrict__ matrix_1,
#endif
#if PRODUCTS > 2
    const void* __restrict__ matrix_2,
#endif
#if PRODUCTS > 3
    const void* __restrict__ matrix_3,
#endif
    const Act* __restrict__ scale_0,
#if PRODUCTS > 1
    const Act* __restrict__ scale_1,
#endif
#if PRODUCTS > 2
    const Act* __restrict__ scale_2,
#endif
#if PRODUCTS > 3
    const Act* __restrict__ scale_3,
#endif
#if HALT
    const int* halted_flags,
#endif
    float* stream_out, Act* shift_out,
#if NORMED
    float* normed,
#endif
    float* to_0
#if PRODUCTS > 1
    , float* to_1
#endif
#if PRODUCTS > 2
    , float* to_2
#endif
#if PRODUCTS > 3
    , float* to_3
#endif
) {
    __shared__ float scratch[SCRATCH];
    Product mine;
    int block = blockIdx.x;
    bool found = is_mine(mine, block, 0, mix_0, matrix_0, scale_0, to_0, COLUMNS_0, FINISH_0);
#if PRODUCTS > 1
    found = found || is_mine(mine, block, 1, mix_1, matrix_1, scale_1, to_1, COLUMNS_1, FINISH_1);
#endif
#if PRODUCTS > 2
    found = found || is_mine(mine, block, 2, mix_2, matrix_2, scale_2, to_2, COLUMNS_2, FINISH_2);
#endif
#if PRODUCTS > 3
    found = found || is_mine(mine, block, 3, mix_3, matrix_3, scale_3, to_3, COLUMNS_3, FINISH_3);
#endif
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
    multiply<PRODUCTS>(mine, scratch, [&](float* inputs, float* space) {
        const bool mixed = !(PLAIN_INPUT >> mine.index & 1);
        const Vector weight(norm_weight), bias(norm_bias);
        const Vector share = mixed ? Vector(static_cast<const Act*>(mine.from)) : Vector();
        const Rows before(shift);
        wait_for_previous();
        const Stream stream = begun(source, weight, bias, before, halted, stream_out, shift_out, space);
        if (mixed) stream.shift(inputs, before, share);
        else stream.give(inputs);
#if NORMED
        if (blockIdx.x == 0) stream.keep(normed);
#endif
    });
}
