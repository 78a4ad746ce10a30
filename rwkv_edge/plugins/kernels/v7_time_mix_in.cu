// RWKV-7, first of five kernels of a layer: residual sum, layer norm, six token-shift mixes, receptance, key, value and
// the first halves of the LoRAs. A block computes TILE columns of one of the seven matrices.
//
// Further parameters: INNER (A), RANK_W, RANK_A, RANK_G, RANK_V (0 in layer 0), EMBED (1: the stream is rows of the
// embedding). hw, ha, hg and hv are the LoRAs' hidden values after tanh, nothing, sigmoid and nothing.
// Grid (blocks of columns). stream_out must not be stream, nor shift_out shift.
#include "fused.cuh"

enum Mix { MIX_R, MIX_W, MIX_K, MIX_V, MIX_A, MIX_G };  // the order in which the coefficients are stored

struct Product {
    const Weight* matrix;
    float* to;  // [B, columns]
    int columns, mix, tile;
};

__device__ __forceinline__ bool is_mine(Product& product, int& block, const Weight* matrix, float* to, int columns, int mix) {
    const int blocks = (columns + TILE - 1) / TILE;
    product = {matrix, to, columns, mix, block};
    block -= blocks;
    return block < 0;
}

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
#if EMBED
    const int* __restrict__ tokens, const Act* __restrict__ table,
#else
    const float* stream_in, const float* parts,
#endif
    const Act* shift, const Act* __restrict__ norm_weight, const Act* __restrict__ norm_bias,
    const Act* __restrict__ mix, const Weight* __restrict__ receptance, const Weight* __restrict__ key,
    const Weight* __restrict__ value, const Weight* __restrict__ w1, const Weight* __restrict__ a1,
    const Weight* __restrict__ g1,
#if RANK_V
    const Weight* __restrict__ v1,
#endif
    float* stream_out, Act* shift_out, float* r, float* k, float* v, float* hw, float* ha, float* hg
#if RANK_V
    , float* hv
#endif
) {
    extern __shared__ float inputs[];  // [BATCH, WIDTH]
    __shared__ float scratch[WARPS * BATCH * (TILE > 2 ? TILE : 2)];

    Product mine;
    int block = blockIdx.x;
    if (!is_mine(mine, block, receptance, r, INNER, MIX_R) && !is_mine(mine, block, key, k, INNER, MIX_K) &&
        !is_mine(mine, block, value, v, INNER, MIX_V) && !is_mine(mine, block, w1, hw, RANK_W, MIX_W) &&
        !is_mine(mine, block, a1, ha, RANK_A, MIX_A) && !is_mine(mine, block, g1, hg, RANK_G, MIX_G)) {
#if RANK_V
        is_mine(mine, block, v1, hv, RANK_V, MIX_V);
#endif
    }
    const int first = mine.tile * TILE;
    Columns<WIDTH, TILE> rows(mine.matrix, mine.columns, 0, first);
    rows.prefetch();
    const Vector weight(norm_weight), bias(norm_bias), share(mix + mine.mix * WIDTH);
    const Rows before(shift);
    wait_for_previous();

    Stream stream;
#if EMBED
    stream.load_rows(tokens, table);
#else
    stream.load(stream_in, parts);
#endif
    if (blockIdx.x == 0) stream.keep(stream_out);
    stream.normalize(weight, bias, scratch);
    stream.shift(inputs, before, share);
    if (blockIdx.x == 0) stream.keep_act(shift_out);
    __syncthreads();

    float sums[BATCH][PER] = {};
    rows.add(sums, inputs, WIDTH);
    constexpr int pitch = BATCH * TILE;
    warp_sums<Columns<WIDTH, TILE>::SPAN>(sums, scratch + threadIdx.x / 32 * pitch, TILE);
    __syncthreads();
    for (int at = threadIdx.x; at < pitch; at += THREADS) {
        const int column = first + at % TILE;
        if (column >= mine.columns) continue;
        float sum = over_warps(scratch, pitch, at);
        if (mine.mix == MIX_W) sum = tanhf(sum);
        if (mine.mix == MIX_G) sum = sigmoid(sum);
        mine.to[at / TILE * mine.columns + column] = sum;
    }
}
