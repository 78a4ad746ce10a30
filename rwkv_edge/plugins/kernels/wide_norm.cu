// Residual sum, layer norm and token-shift mixes of M = B*T rows, each with the row before it in its stream.
//
// Further parameters: ROWS: of a block, neighbours in one stream; MIXES: mixed inputs [MIXES, M, D], 0 for the normed rows
// themselves, [M, D]; PLAIN: 1 where these come after the mixed inputs; PARTS: partial sums that the product ahead left,
// [PARTS, M, D]; EMBED: 1 where the stream is rows of the embedding; EMBED_INT8: they are int8 with a scale each.
// Grid (blocks of rows in a stream, B). stream_out must not be stream_in, nor shift_out shift_in.
// MIXES = 0: no shift, and `tokens` counts rows of a stream of which the last `kept` are normed.
#include "wide.cuh"

constexpr int QUADS = (WIDTH / 4 + THREADS - 1) / THREADS;  // thread t has quads t, t + THREADS, ...
constexpr int LINES = MIXES ? ROWS + 1 : ROWS;              // with the row before the first

__device__ __forceinline__ int place(int quad) { return 4 * (threadIdx.x + quad * THREADS); }

// A vector of WIDTH over the block, as it lies in memory.
struct Vector {
    Packed<Act> quad[QUADS];
    __device__ __forceinline__ explicit Vector(const Act* from) {
#pragma unroll
        for (int q = 0; q < QUADS; ++q) quad[q] = place(q) < WIDTH ? fetch4(from + place(q)) : zero4<Act>();
    }
};

#if EMBED_INT8
typedef signed char Embedded;
__device__ __forceinline__ void embed(float (&x)[4], const Embedded* table, const Act* scales, int token, int at) {
    const char4 row = *reinterpret_cast<const char4*>(table + static_cast<long long>(token) * WIDTH + at);
    const float scale = widen(scales[token]);
    x[0] = row.x * scale, x[1] = row.y * scale, x[2] = row.z * scale, x[3] = row.w * scale;
}
#else
typedef Act Embedded;
__device__ __forceinline__ void embed(float (&x)[4], const Embedded* table, const Act*, int token, int at) {
    widen4(x, fetch4(table + static_cast<long long>(token) * WIDTH + at));
}
#endif

struct Lines {
    float x[LINES][QUADS][4];

    // the sums over the block of x and x*x of every line; scratch holds 2 * WARPS * LINES floats
    __device__ __forceinline__ void sums(float (&values)[LINES][2], float* scratch) const {
#pragma unroll
        for (int i = 0; i < LINES; ++i) {
            values[i][0] = values[i][1] = 0.0f;
#pragma unroll
            for (int q = 0; q < QUADS; ++q)
#pragma unroll
                for (int e = 0; e < 4; ++e) values[i][0] += x[i][q][e], values[i][1] += x[i][q][e] * x[i][q][e];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                values[i][j] = sum_lanes<32>(values[i][j]);
                if (threadIdx.x % 32 == 0) scratch[(threadIdx.x / 32 * LINES + i) * 2 + j] = values[i][j];
            }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < LINES; ++i)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                values[i][j] = 0.0f;
#pragma unroll
                for (int warp = 0; warp < WARPS; ++warp) values[i][j] += scratch[(warp * LINES + i) * 2 + j];
            }
    }
    __device__ __forceinline__ void normalize(const Vector& weight, const Vector& bias, float* scratch) {
        float values[LINES][2];
        sums(values, scratch);
#pragma unroll
        for (int i = 0; i < LINES; ++i) {
            const float mean = values[i][0] / WIDTH;
            const float inverse = rsqrtf(fmaxf(values[i][1] / WIDTH - mean * mean, 0.0f) + 1e-5f);
#pragma unroll
            for (int q = 0; q < QUADS; ++q) {
                float scale[4], shift[4];
                widen4(scale, weight.quad[q]), widen4(shift, bias.quad[q]);
#pragma unroll
                for (int e = 0; e < 4; ++e) x[i][q][e] = (x[i][q][e] - mean) * inverse * scale[e] + shift[e];
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
    Number tokens,
#if EMBED
    const int* __restrict__ ids, const Embedded* __restrict__ table, const Act* __restrict__ table_scale,
#else
    const float* __restrict__ stream_in, const float* __restrict__ parts,
#endif
    const Act* __restrict__ norm_weight, const Act* __restrict__ norm_bias,
#if MIXES
    const Act* __restrict__ shift_in, const Act* __restrict__ mix, const int* __restrict__ halted,
    float* __restrict__ stream_out, Act* __restrict__ shift_out,
#else
    Number kept,
#endif
    Act* __restrict__ output) {
    __shared__ float scratch[2 * WARPS * LINES];
    const int b = blockIdx.y, count = static_cast<int>(tokens);
    const long long total = static_cast<long long>(gridDim.y) * count;  // M
#if MIXES
    const int first = blockIdx.x * ROWS, lines_before = 1;
#else
    const int first = count - static_cast<int>(kept) + blockIdx.x * ROWS, lines_before = 0;
#endif
    const long long origin = static_cast<long long>(b) * count;
    const Vector weight(norm_weight), bias(norm_bias);
#if MIXES
    const Vector state(shift_in + b * WIDTH);  // written by the step before
#endif
    wait_for_rows();

    Lines lines;
#pragma unroll
    for (int i = 0; i < LINES; ++i) {
        const int t = first + i - lines_before;
        const bool there = t >= 0 && t < count;
#pragma unroll
        for (int q = 0; q < QUADS; ++q) {
            float(&x)[4] = lines.x[i][q];
            x[0] = x[1] = x[2] = x[3] = 0.0f;
            if (!there || place(q) >= WIDTH) continue;
#if EMBED
            embed(x, table, table_scale, ids[origin + t], place(q));
#else
            const long long at = (origin + t) * WIDTH + place(q);
            load4(x, stream_in + at);
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                float added[4];
                load4(added, parts + part * total * WIDTH + at);
#pragma unroll
                for (int e = 0; e < 4; ++e) x[e] += added[e];
            }
#endif
#if MIXES
            if (i > 0) store4(stream_out + (origin + t) * WIDTH + place(q), x);
#endif
        }
    }
    lines.normalize(weight, bias, scratch);
#if MIXES
    if (first == 0)
#pragma unroll
        for (int q = 0; q < QUADS; ++q) widen4(lines.x[0][q], state.quad[q]);
#pragma unroll
    for (int m = 0; m < MIXES; ++m) {
        const Vector share(mix + m * WIDTH);
#pragma unroll
        for (int i = 1; i < LINES; ++i) {
            const int t = first + i - 1;
            if (t >= count) continue;
#pragma unroll
            for (int q = 0; q < QUADS; ++q) {
                if (place(q) >= WIDTH) continue;
                float part[4], mixed[4];
                widen4(part, share.quad[q]);
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    mixed[e] = lines.x[i][q][e] + (lines.x[i - 1][q][e] - lines.x[i][q][e]) * part[e];
                put4(output + (m * total + origin + t) * WIDTH + place(q), mixed);
            }
        }
    }
#if PLAIN
#pragma unroll
    for (int i = 1; i < LINES; ++i)
#pragma unroll
        for (int q = 0; q < QUADS; ++q)
            if (first + i - 1 < count && place(q) < WIDTH)
                put4(output + (MIXES * total + origin + first + i - 1) * WIDTH + place(q), lines.x[i][q]);
#endif
#pragma unroll
    for (int i = 1; i < LINES; ++i) {
        if (first + i != count) continue;  // the last row is the new state
#pragma unroll
        for (int q = 0; q < QUADS; ++q) {
            if (place(q) >= WIDTH) continue;
            float last[4];
            widen4(last, state.quad[q]);
            put4(shift_out + b * WIDTH + place(q), halted[b] ? last : lines.x[i][q]);
        }
    }
#else
#pragma unroll
    for (int i = 0; i < LINES; ++i)
#pragma unroll
        for (int q = 0; q < QUADS; ++q)
            if (first + i < count && place(q) < WIDTH)
                put4(output + (b * kept + first + i - (count - kept)) * WIDTH + place(q), lines.x[i][q]);
#endif
}
