// RWKV-7, third and fifth of five kernels of a layer: output and value, [B, FROM] x [FROM, WIDTH]. The rows of the matrix
// are split over SPLIT blocks, whose sums the next kernel adds to the residual stream: parts[SPLIT, B, WIDTH].
//
// Further parameters: FROM (K), SPLIT, SKIP (1: rows whose input is zero in all streams are not read; relu^2 leaves many).
// Grid (blocks of columns, SPLIT).
#include "fused.cuh"

constexpr int SLICE = (FROM + SPLIT - 1) / SPLIT;

#if SKIP
// The rows of the slice with an input that is not zero, in order; returns how many.
__device__ __forceinline__ int listed(unsigned short* list, const float* inputs, int rows, int* counts) {
    constexpr int STRIP = (SLICE + WARPS - 1) / WARPS;  // rows of a warp
    constexpr int TURNS = (STRIP + 31) / 32;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned found[TURNS];
    int mine = 0;
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        const int row = warp * STRIP + turn * 32 + lane;
        bool holds = false;
        if (turn * 32 + lane < STRIP && row < rows)
#pragma unroll
            for (int b = 0; b < BATCH; ++b) holds |= inputs[b * SLICE + row] != 0.0f;
        found[turn] = __ballot_sync(EVERY_LANE, holds);
        mine += __popc(found[turn]);
    }
    if (lane == 0) counts[warp] = mine;
    __syncthreads();
    int at = 0, total = 0;
#pragma unroll
    for (int other = 0; other < WARPS; ++other) {
        at += other < warp ? counts[other] : 0;
        total += counts[other];
    }
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        if (found[turn] >> lane & 1) list[at + __popc(found[turn] & ((1u << lane) - 1))] = warp * STRIP + turn * 32 + lane;
        at += __popc(found[turn]);
    }
    __syncthreads();
    return total;
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
    const float* input, const Matrix* __restrict__ matrix, const Act* __restrict__ scale, float* parts) {
    extern __shared__ float inputs[];  // [BATCH, SLICE]
    __shared__ float scratch[WARPS * BATCH * TILE];
    const int first = blockIdx.x * TILE, top = blockIdx.y * SLICE;
    const int rows = FROM - top < SLICE ? FROM - top : SLICE;
    typedef Columns<Matrix, SLICE, TILE> Slice;
    Slice slice(matrix, WIDTH, top, first);
#if !SKIP
    if (rows == SLICE) slice.prefetch();
#endif
    const int own = first + threadIdx.x % TILE;  // column of every sum that this thread finishes
    const float factor = INT8 && own < WIDTH ? widen(scale[own]) : 1.0f;
    wait_for_previous();
    for (int at = threadIdx.x; at < BATCH * SLICE; at += THREADS) {
        const int b = at / SLICE, row = at % SLICE;
        inputs[at] = row < rows ? input[b * FROM + top + row] : 0.0f;
    }
    __syncthreads();

    float sums[BATCH][PER<Matrix>] = {};
#if SKIP
    __shared__ unsigned short list[SLICE];
    __shared__ int counts[WARPS];
    const int count = listed(list, inputs, rows, counts);
    const Matrix* corner = matrix + static_cast<long long>(top) * WIDTH + first + threadIdx.x % Slice::SPAN * PER<Matrix>;
    for (int start = 0; start < count; start += Slice::GROUPS * AHEAD) {
        uint4 raw[AHEAD];
        int row[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int at = start + slice.group + i * Slice::GROUPS;
            row[i] = at < count ? list[at] : -1;
            raw[i] = {};
            if (row[i] >= 0 && slice.inside) raw[i] = load_once(corner + static_cast<long long>(row[i]) * WIDTH);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            float weights[PER<Matrix>];
            widen_raw(weights, raw[i], Matrix{});
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                const float x = row[i] >= 0 ? inputs[b * SLICE + row[i]] : 0.0f;
#pragma unroll
                for (int e = 0; e < PER<Matrix>; ++e) sums[b][e] += x * weights[e];
            }
        }
    }
#else
    if (rows == SLICE) {
        slice.add(sums, inputs, SLICE);
    } else {  // the last, shorter slice: no row beyond the matrix is read
        const Matrix* corner = matrix + static_cast<long long>(top) * WIDTH + first + threadIdx.x % Slice::SPAN * PER<Matrix>;
        for (int row = slice.group; row < rows; row += Slice::GROUPS) {
            float weights[PER<Matrix>];
            uint4 raw = {};
            if (slice.inside) raw = load_once(corner + static_cast<long long>(row) * WIDTH);
            widen_raw(weights, raw, Matrix{});
#pragma unroll
            for (int b = 0; b < BATCH; ++b)
#pragma unroll
                for (int e = 0; e < PER<Matrix>; ++e) sums[b][e] += inputs[b * SLICE + row] * weights[e];
        }
    }
#endif
    constexpr int pitch = BATCH * TILE;
    warp_sums<Slice::SPAN>(sums, scratch + threadIdx.x / 32 * pitch, TILE);
    __syncthreads();
    for (int at = threadIdx.x; at < pitch; at += THREADS) {
        if (own < WIDTH) parts[(blockIdx.y * BATCH + at / TILE) * WIDTH + own] = over_warps(scratch, pitch, at) * factor;
    }
}
