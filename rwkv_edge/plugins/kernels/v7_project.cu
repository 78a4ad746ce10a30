// The kernel that ends a half of a layer: output and value, [B, FROM] x [FROM, WIDTH]. The rows of the matrix are split
// over SPLIT blocks, whose sums the next kernel adds to the residual stream: parts[SPLIT, B, WIDTH].
//
// Further parameters: FROM (K), SPLIT, SKIP (1: rows whose input is zero in all streams are not read, but for those that
// are on their way already; relu^2 leaves many). SKIP is not for int4. FACTOR (1: sums are multiplied by shares [B, WIDTH]).
// Grid (blocks of columns, SPLIT).
#include "fused.cuh"

constexpr int UNIT = INT4 ? BLOCK : 1;  // a slice holds whole blocks
constexpr int SLICE = ((FROM + SPLIT - 1) / SPLIT + UNIT - 1) / UNIT * UNIT;
constexpr int SLICE_PITCH = skewed(SLICE);
typedef Opened<Matrix, SLICE, TILE> Slice;
typedef Columns<Matrix, SLICE, TILE> Turns;

#if SKIP
constexpr int DENSE = least_of(Turns::DEPTH * Turns::GROUPS, SLICE);  // rows that are read before the wait, zero or not
constexpr int REST = SLICE - DENSE;

// The rows from DENSE on with an input that is not zero, in order; returns how many.
__device__ __forceinline__ int listed(unsigned short* list, const float* inputs, int rows, int* counts) {
    constexpr int STRIP = REST > 0 ? (REST + WARPS - 1) / WARPS : 1;  // rows of a warp
    constexpr int TURNS = (STRIP + 31) / 32;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned found[TURNS];
    int mine = 0;
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        const int row = DENSE + warp * STRIP + turn * 32 + lane;
        bool holds = false;
        if (turn * 32 + lane < STRIP && row < rows)
#pragma unroll
            for (int b = 0; b < BATCH; ++b) holds |= inputs[b * SLICE_PITCH + skewed(row)] != 0.0f;
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
        const int row = DENSE + warp * STRIP + turn * 32 + lane;
        if (found[turn] >> lane & 1) list[at + __popc(found[turn] & ((1u << lane) - 1))] = row;
        at += __popc(found[turn]);
    }
    __syncthreads();
    return total;
}

// sums += x[row] * matrix[row] over the first DENSE rows, whose loads are under way, and over those listed.
__device__ __forceinline__ void add_listed(
    Turns& slice, float (&sums)[BATCH][Turns::MANY], const float* inputs, const unsigned short* list, int count) {
    constexpr int BURST = Turns::BURST, DEPTH = Turns::DEPTH, GROUPS = Turns::GROUPS;
    const int mine = count > slice.group ? (count - slice.group + GROUPS - 1) / GROUPS : 0;  // listed rows of this thread
    int slot = 0;
#pragma unroll 1
    for (int first = 0; first < DEPTH + mine; first += BURST) {
        uint4 raw[BURST];
        float x[BURST][BATCH];
        wait_groups<DEPTH / BURST - 1>();
#pragma unroll
        for (int i = 0; i < BURST; ++i) raw[i] = slice.ring[(slot + i) * THREADS];
#pragma unroll
        for (int i = 0; i < BURST; ++i) {  // row of this turn, and of the one that its place in the ring is given to
            const int turn = first + i, next = slice.group + turn * GROUPS;
            const bool valid = next < count && slice.inside;
            const long long ahead = valid ? static_cast<long long>(list[next] - slice.group) * WIDTH : 0;
            copy_async<16>(slice.ring + (slot + i) * THREADS, slice.from + ahead, valid);
            int row = slice.group + turn * GROUPS;
            if (turn >= DEPTH) row = turn - DEPTH < mine ? list[row - DEPTH * GROUPS] : SLICE;
#pragma unroll
            for (int b = 0; b < BATCH; ++b) x[i][b] = row < slice.limit ? inputs[b * SLICE_PITCH + skewed(row)] : 0.0f;
        }
        close_group();
        slot = slot + BURST == DEPTH ? 0 : slot + BURST;
#pragma unroll
        for (int i = 0; i < BURST; ++i) {
            float weights[Turns::MANY];
            widen_raw(weights, raw[i], Matrix{});
#pragma unroll
            for (int b = 0; b < BATCH; ++b)
#pragma unroll
                for (int e = 0; e < Turns::MANY; ++e) sums[b][e] += x[i][b] * weights[e];
        }
    }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
    const float* input, const Matrix* __restrict__ matrix, const Act* __restrict__ scale,
#if FACTOR
    const float* shares,
#endif
    float* parts) {
    extern __shared__ __align__(16) unsigned char shared[];
    float* inputs = reinterpret_cast<float*>(shared + RING);  // [BATCH, SLICE_PITCH]
    __shared__ float scratch[WARPS * BATCH * TILE];
    const int first = blockIdx.x * TILE, top = blockIdx.y * SLICE;
    const int rows = FROM - top < SLICE ? (FROM - top > 0 ? FROM - top : 0) : SLICE;
    auto slice = Slice::from(matrix, scale, WIDTH, top, first, shared, rows);
    slice.prefetch();
    const int own = first + threadIdx.x % TILE;  // column of every sum that this thread finishes
    const float factor = INT8 && own < WIDTH ? widen(scale[own]) : 1.0f;
    wait_for_previous();
    for (int at = threadIdx.x; at < BATCH * SLICE; at += THREADS) {
        const int b = at / SLICE, row = at % SLICE;
        inputs[b * SLICE_PITCH + skewed(row)] = row < rows ? input[b * FROM + top + row] : 0.0f;
    }
    __syncthreads();

    float sums[BATCH][Turns::MANY] = {};
#if SKIP
    __shared__ unsigned short list[REST > 0 ? REST : 1];
    __shared__ int counts[WARPS];
    add_listed(slice, sums, inputs, list, REST > 0 ? listed(list, inputs, rows, counts) : 0);
#else
    slice.add(sums, inputs, SLICE_PITCH);
#endif
    constexpr int pitch = BATCH * TILE;
    warp_sums<Turns::SPAN>(sums, scratch + threadIdx.x / 32 * pitch, TILE);
    __syncthreads();
    for (int at = threadIdx.x; at < pitch; at += THREADS) {
        if (own >= WIDTH) continue;
        float sum = over_warps(scratch, pitch, at) * factor;
#if FACTOR
        sum *= shares[at / TILE * WIDTH + own];
#endif
        parts[(blockIdx.y * BATCH + at / TILE) * WIDTH + own] = sum;
    }
}
