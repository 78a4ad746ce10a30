// Several products of rows and matrices in one launch: output[m][n] = finish(sum over k of input[m][k] * matrix[k][n]).
//
// Further parameters: TILE_M, TILE_N: rows and columns of a block. The grid is (tiles of all products, the row tiles of
// one column tile side by side, so that they read the same weights; SPLIT): a block adds up one of SPLIT ranges of k,
// and SPLIT > 1 leaves as many partial sums, [SPLIT, M, N].
#pragma once
#include "wide.cuh"

enum Finish {
    TO_FLOAT,       // float
    TO_ACT,         // ACT
    TO_TANH,        // ACT
    TO_SIGMOID,     // ACT
    TO_RELU_SQUARE, // ACT
    TO_DECAY,       // float: exp(-exp(-0.5) * sigmoid(x + offset)), offset float
    TO_RATE,        // float: sigmoid(x + offset), offset ACT
    TO_BLEND        // float: output + (other - output) * sigmoid(x + offset), offset ACT
};

struct Product {
    const Act* input;      // [M, depth]
    const void* matrix;    // [depth, columns]
    void* output;          // [M, columns]
    const void* offset;    // [columns]
    const float* other;    // [M, columns]
    int columns, depth, finish;
};

constexpr int PRODUCTS = 7;
#define PRODUCT(i) \
    const Act *__restrict__ input##i, const void *__restrict__ matrix##i, void *output##i, \
        const void *__restrict__ offset##i, const float *__restrict__ other##i, Number columns##i, Number depth##i, \
        Number finish##i
#define PRODUCT_ARGUMENTS Number rows, PRODUCT(0), PRODUCT(1), PRODUCT(2), PRODUCT(3), PRODUCT(4), PRODUCT(5), PRODUCT(6)

// The product of this block, and the first row and column of its tile. Products that are not there have no columns.
#define TAKE_PRODUCT(i) \
    if (tile >= 0) { \
        mine = {input##i, matrix##i, output##i, offset##i, other##i, static_cast<int>(columns##i), \
                static_cast<int>(depth##i), static_cast<int>(finish##i)}; \
        first_n = tile / row_tiles * TILE_N; \
        tile -= (mine.columns + TILE_N - 1) / TILE_N * row_tiles; \
    }
#define FIND_PRODUCT \
    const int row_tiles = (static_cast<int>(rows) + TILE_M - 1) / TILE_M; \
    const int first_m = blockIdx.x % row_tiles * TILE_M; \
    int tile = blockIdx.x, first_n = 0; \
    Product mine; \
    TAKE_PRODUCT(0) TAKE_PRODUCT(1) TAKE_PRODUCT(2) TAKE_PRODUCT(3) TAKE_PRODUCT(4) TAKE_PRODUCT(5) TAKE_PRODUCT(6)

template <typename T> __device__ __forceinline__ void add_offset(float (&x)[4], const void* from, int n) {
    float offset[4];
    widen4(offset, fetch4(static_cast<const T*>(from) + n));
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] += offset[e];
}

// Four neighbouring columns of a row; n is a multiple of 4, and columns are.
__device__ __forceinline__ void finish_quad(const Product& p, int rows, int m, int n, float (&x)[4]) {
    if (m >= rows || n >= p.columns) return;
    const long long at = static_cast<long long>(m) * p.columns + n;
    float* const wide = static_cast<float*>(p.output) + at;
    switch (p.finish) {
    case TO_FLOAT: store4(wide + static_cast<long long>(blockIdx.y) * rows * p.columns, x); return;
    case TO_DECAY:
        add_offset<float>(x, p.offset, n);
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] = __expf(DECAY_SCALE * logistic(x[e]));
        store4(wide, x);
        return;
    case TO_RATE:
        add_offset<Act>(x, p.offset, n);
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] = logistic(x[e]);
        store4(wide, x);
        return;
    case TO_BLEND: {
        float own[4], first[4];
        add_offset<Act>(x, p.offset, n);
        load4(own, wide), load4(first, p.other + at);
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] = own[e] + (first[e] - own[e]) * logistic(x[e]);
        store4(wide, x);
        return;
    }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        if (p.finish == TO_TANH) x[e] = tanhf(x[e]);
        if (p.finish == TO_SIGMOID) x[e] = logistic(x[e]);
        if (p.finish == TO_RELU_SQUARE) x[e] = fmaxf(x[e], 0.0f) * fmaxf(x[e], 0.0f);
    }
    put4(static_cast<Act*>(p.output) + at, x);
}
