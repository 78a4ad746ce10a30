// Several products in one kernel, all of inputs [B, WIDTH]: a block computes TILE columns of one of them.
#pragma once
#include "fused.cuh"

enum Finish { PLAIN, TANH, SIGMOID, RELU_SQUARED };  // what becomes of a sum

struct Product {
    const void* from;  // what its input is made of: coefficients of a mix, or the input
    const void* matrix;
    const Act* scale;
    float* to;  // [B, columns]
    int columns, finish, tile, index;
};

// Whether this block has columns of the product `index`; `block` counts the blocks that are left for those behind it.
__device__ __forceinline__ bool is_mine(
    Product& product, int& block, int index, const void* from, const void* matrix, const Act* scale, float* to,
    int columns, int finish) {
    product = {from, matrix, scale, to, columns, finish, block, index};
    block -= (columns + TILE - 1) / TILE;
    return block < 0;
}

constexpr int SCRATCH = WARPS * BATCH * (TILE > 2 ? TILE : 2);  // floats that a product and a layer norm need

template <typename T> constexpr bool IS_INT8 = false;
template <> constexpr bool IS_INT8<Int8> = true;

// Where the residual stream comes from: the embedding's rows in layer 0.
#if EMBED_INT8
typedef Int8 Row;
#else
typedef Act Row;
#endif
struct Source {
#if EMBED
    const int* tokens;
    const Row* table;
    const Act* row_scales;
#else
    const float* stream;
    const float* parts;
#endif
};

// The norm of the stream. Block 0 keeps the stream and the new token-shift state.
__device__ __forceinline__ Stream begun(
    const Source& source, const Vector& weight, const Vector& bias, const Rows& before, const Halted& halted,
    float* stream_out, Act* shift_out, float* scratch) {
    Stream stream;
#if EMBED && EMBED_INT8
    stream.load_rows(source.tokens, source.table, source.row_scales);
#elif EMBED
    stream.load_rows(source.tokens, source.table);
#else
    stream.load(source.stream, source.parts);
#endif
    if (blockIdx.x == 0) stream.keep(stream_out);
    stream.normalize(weight, bias, scratch);
    if (blockIdx.x == 0) stream.keep_act(shift_out, before, halted);
    return stream;
}

// prepare(inputs, scratch) waits for the kernel before and writes the input, [BATCH, PITCH].
template <typename T, typename Prepare>
__device__ __forceinline__ void multiply_as(const Product& mine, float* scratch, Prepare prepare) {
    extern __shared__ __align__(16) unsigned char shared[];
    float* inputs = reinterpret_cast<float*>(shared + RING);
    constexpr int pitch = BATCH * TILE;
    const int first = mine.tile * TILE;
    const int own = first + threadIdx.x % TILE;  // column of the first sum that this thread finishes, and of all others
    auto rows = Opened<T, WIDTH, TILE>::from(mine.matrix, mine.scale, mine.columns, 0, first, shared);
    rows.prefetch();
    const float scale = IS_INT8<T> && own < mine.columns ? widen(mine.scale[own]) : 1.0f;
    prepare(inputs, scratch);
    __syncthreads();

    float sums[BATCH][PER<T>] = {};
    rows.add(sums, inputs, PITCH);
    warp_sums<Columns<T, WIDTH, TILE>::SPAN>(sums, scratch + threadIdx.x / 32 * pitch, TILE);
    __syncthreads();
    for (int at = threadIdx.x; at < pitch; at += THREADS) {  // TILE divides THREADS, or no thread comes back
        if (own >= mine.columns) continue;
        float sum = over_warps(scratch, pitch, at) * scale;
        if (mine.finish == TANH) sum = tanhf(sum);
        if (mine.finish == SIGMOID) sum = sigmoid(sum);
        if (mine.finish == RELU_SQUARED) sum = fmaxf(sum, 0.0f) * fmaxf(sum, 0.0f);
        mine.to[at / TILE * mine.columns + own] = sum;
    }
}

// The product in the type of its matrix; the kernel has `products` of them.
template <int products, typename Prepare>
__device__ __forceinline__ void multiply(const Product& mine, float* scratch, Prepare prepare) {
#if INT8
    if (INT8 >> mine.index & 1) {
        multiply_as<Int8>(mine, scratch, prepare);
        return;
    }
#endif
#if INT4
    if (INT4 >> mine.index & 1) {
        multiply_as<Int4>(mine, scratch, prepare);
        return;
    }
#endif
    if constexpr ((~(INT8 | INT4) & ((1 << products) - 1)) != 0) multiply_as<Weight>(mine, scratch, prepare);
}
