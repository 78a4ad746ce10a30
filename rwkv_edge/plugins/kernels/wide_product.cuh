// Several products of rows and matrices in one launch: output[m][n] = finish(sum over k of input[m][k] * matrix[k][n]).
//
// Further parameters: TILE_M, TILE_N: rows and columns of a block; FORMS: bits of the forms (below) that matrices have.
// The grid is (tiles of all products, the row tiles of one column tile side by side, so that they read the same weights;
// SPLIT): a block adds up one of SPLIT ranges of k, and SPLIT > 1 leaves as many partial sums, [SPLIT, M, N].
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
    TO_BLEND,       // float: output + (other - output) * sigmoid(x + offset), offset ACT
    TO_MULTIPLE     // ACT: output * (x + offset), offset ACT
};

// How a matrix is stored: in WEIGHT; in int8 with a scale for each column; or in int4, two columns a byte, the first in
// the low half, with a scale for each column of `block` inputs.
enum Form { IN_FLOAT, IN_INT8, IN_INT4 };
__device__ constexpr bool has(Form form) { return FORMS >> form & 1; }

struct Product {
    const Act* input;      // [M, depth]
    const void* matrix;    // [depth, pitch]
    const Act* scale;      // [pitch], or [depth / block, pitch]
    void* output;          // [M, columns]
    const void* offset;    // [columns]
    const float* other;    // [M, columns]
    int columns, pitch, depth, finish, form, block;
};

constexpr int PRODUCTS = 7;
#define PRODUCT(i) \
    const Act *__restrict__ input##i, const void *__restrict__ matrix##i, const Act *__restrict__ scale##i, \
        void *output##i, const void *__restrict__ offset##i, const float *__restrict__ other##i, Number columns##i, \
        Number pitch##i, Number depth##i, Number finish##i, Number form##i, Number block##i
#define PRODUCT_ARGUMENTS Number rows, PRODUCT(0), PRODUCT(1), PRODUCT(2), PRODUCT(3), PRODUCT(4), PRODUCT(5), PRODUCT(6)

// The product of this block, and the first row and column of its tile. Products that are not there have no columns.
#define TAKE_PRODUCT(i) \
    if (tile >= 0) { \
        mine = {input##i, matrix##i, scale##i, output##i, offset##i, other##i, static_cast<int>(columns##i), \
                static_cast<int>(pitch##i), static_cast<int>(depth##i), static_cast<int>(finish##i), \
                static_cast<int>(form##i), static_cast<int>(block##i)}; \
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

// A head may have any number of columns.
__device__ __forceinline__ void put_columns(float* to, const Product& p, int n, const float (&x)[4]) {
    if (p.columns % 4 == 0) return store4(to, x);
#pragma unroll
    for (int e = 0; e < 4; ++e)
        if (n + e < p.columns) to[e] = x[e];
}

// Four neighbouring columns of a row; n is a multiple of 4, and columns are, but for those that go TO_FLOAT.
__device__ __forceinline__ void finish_quad(const Product& p, int rows, int m, int n, float (&x)[4]) {
    if (m >= rows || n >= p.columns) return;
    const long long at = static_cast<long long>(m) * p.columns + n;
    float* const wide = static_cast<float*>(p.output) + at;
    switch (p.finish) {
    case TO_FLOAT: put_columns(wide + static_cast<long long>(blockIdx.y) * rows * p.columns, p, n, x); return;
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
    case TO_MULTIPLE: {
        Act* const narrow = static_cast<Act*>(p.output) + at;
        float own[4];
        add_offset<Act>(x, p.offset, n);
        widen4(own, fetch4(narrow));
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] *= own[e];
        put4(narrow, x);
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
