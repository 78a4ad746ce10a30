// RWKV-7, first of five kernels of a layer: residual sum, layer norm, six token-shift mixes, receptance, key, value and
// the first halves of the LoRAs. A block computes TILE columns of one of the seven matrices.
//
// Further parameters: INNER (A), RANK_W, RANK_A, RANK_G, RANK_V (0 in layer 0), EMBED (1: the stream is rows of the
// embedding), EMBED_INT8 (1: those are int8, with a scale each). hw, ha, hg and hv are the LoRAs' hidden values after
// tanh, nothing, sigmoid and nothing.
// Grid (blocks of columns). stream_out must not be stream, nor shift_out shift.
#include "fused.cuh"

enum Mix { MIX_R, MIX_W, MIX_K, MIX_V, MIX_A, MIX_G };  // the order in which the coefficients are stored

#if EMBED_INT8
typedef Int8 Row;
#else
typedef Act Row;
#endif

struct Product {
    const void* matrix;
    const Act* scale;
    float* to;  // [B, columns]
    int columns, mix, tile, index;
};

__device__ __forceinline__ bool is_mine(
    Product& product, int& block, int index, const void* matrix, const Act* scale, float* to, int columns, int mix) {
    const int blocks = (columns + TILE - 1) / TILE;
    product = {matrix, scale, to, columns, mix, block, index};
    block -= blocks;
    return block < 0;
}

struct Source {
#if EMBED
    const int* tokens;
    const Row* table;
    const Act* row_scales;
#else
    const float* stream;
    const float* parts;
#endif
    const Act *shift, *norm_weight, *norm_bias, *mix;
    float* stream_out;
    Act* shift_out;
    Halted halted;
};

template <typename T> constexpr bool IS_INT8 = false;
template <> constexpr bool IS_INT8<Int8> = true;

template <typename T> __device__ __forceinline__ void compute(const Product& mine, const Source& source) {
    extern __shared__ __align__(16) unsigned char shared[];
    float* inputs = reinterpret_cast<float*>(shared + RING);  // [BATCH, PITCH]
    __shared__ float scratch[WARPS * BATCH * (TILE > 2 ? TILE : 2)];
    constexpr int pitch = BATCH * TILE;
    const int first = mine.tile * TILE;
    const int own = first + threadIdx.x % TILE;  // column of the first sum that this thread finishes, and of all others
    auto rows = Opened<T, WIDTH, TILE>::from(mine.matrix, mine.scale, mine.columns, 0, first, shared);
    rows.prefetch();
    const Vector weight(source.norm_weight), bias(source.norm_bias), share(source.mix + mine.mix * WIDTH);
    const Rows before(source.shift);
    const float scale = IS_INT8<T> && own < mine.columns ? widen(mine.scale[own]) : 1.0f;
    wait_for_previous();

    Stream stream;
#if EMBED
#if EMBED_INT8
    stream.load_rows(source.tokens, source.table, source.row_scales);
#else
    stream.load_rows(source.tokens, source.table);
#endif
#else
    stream.load(source.stream, source.parts);
#endif
    if (blockIdx.x == 0) stream.keep(source.stream_out);
    stream.normalize(weight, bias, scratch);
    stream.shift(inputs, before, share);
    if (blockIdx.x == 0) stream.keep_act(source.shift_out, before, source.halted);
    __syncthreads();

    float sums[BATCH][PER<T>] = {};
    rows.add(sums, inputs, PITCH);
    warp_sums<Columns<T, WIDTH, TILE>::SPAN>(sums, scratch + threadIdx.x / 32 * pitch, TILE);
    __syncthreads();
    for (int at = threadIdx.x; at < pitch; at += THREADS) {  // TILE divides THREADS, or no thread comes back
        if (own >= mine.columns) continue;
        float sum = over_warps(scratch, pitch, at) * scale;
        if (mine.mix == MIX_W) sum = tanhf(sum);
        if (mine.mix == MIX_G) sum = sigmoid(sum);
        mine.to[at / TILE * mine.columns + own] = sum;
    }
}

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
    Product mine;
    int block = blockIdx.x;
    if (!is_mine(mine, block, 0, receptance, receptance_scale, r, INNER, MIX_R) &&
        !is_mine(mine, block, 1, key, key_scale, k, INNER, MIX_K) &&
        !is_mine(mine, block, 2, value, value_scale, v, INNER, MIX_V) &&
        !is_mine(mine, block, 3, w1, w1_scale, hw, RANK_W, MIX_W) &&
        !is_mine(mine, block, 4, a1, a1_scale, ha, RANK_A, MIX_A) &&
        !is_mine(mine, block, 5, g1, g1_scale, hg, RANK_G, MIX_G)) {
#if RANK_V
        is_mine(mine, block, 6, v1, v1_scale, hv, RANK_V, MIX_V);
#endif
    }
#if HALT
    const Halted halted = {halted_flags};
#else
    const Halted halted = {};
#endif
#if EMBED
    const Source source = {tokens, table, row_scales, shift, norm_weight, norm_bias, mix, stream_out, shift_out, halted};
#else
    const Source source = {stream_in, parts, shift, norm_weight, norm_bias, mix, stream_out, shift_out, halted};
#endif
#if INT8
    if (INT8 >> mine.index & 1) {
        compute<Int8>(mine, source);
        return;
    }
#endif
#if INT4
    if (INT4 >> mine.index & 1) {
        compute<Int4>(mine, source);
        return;
    }
#endif
    if (~(INT8 | INT4) >> mine.index & 1) compute<Weight>(mine, source);
}
