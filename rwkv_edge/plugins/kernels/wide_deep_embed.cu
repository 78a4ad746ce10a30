// RWKV-7a, between the products of s1 and of s2: output = hs E_token for M rows, where E_token is a matrix of each row's
// token.
//
// Further parameter: RANK, a multiple of 8. hs is [M, RANK] float, a row of `table` a matrix [RANK, RANK], output
// [M, RANK] in ACT. Grid (M): a block is one warp. The kernel ahead writes no tokens, so the first loads do not wait for it.
#include "wide.cuh"

static_assert(THREADS == 32, "a block is one warp");
constexpr int QUADS = RANK / 4;                             // of a row of the matrix
constexpr int SPAN = QUADS < 32 ? power_above(QUADS) : 32;  // lanes that share one
constexpr int GROUPS = 32 / SPAN;                           // rows that a warp reads at once
constexpr int LOADS = (RANK + GROUPS - 1) / GROUPS, AHEAD = LOADS < 8 ? LOADS : 8;

// Every GROUPS-th row of the matrix from `row` on, four columns each; zeros where there are none.
struct Burst {
    Packed<Act> part[AHEAD];
    __device__ __forceinline__ void load(const Act* matrix, int row, int quad) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int k = row + i * GROUPS;
            part[i] = k < RANK && quad < QUADS ? fetch4(matrix + k * RANK + quad * 4) : zero4<Act>();
        }
    }
    __device__ __forceinline__ void add(float (&sums)[4], const float* low, int row) const {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int k = row + i * GROUPS;
            const float share = k < RANK ? low[k] : 0.0f;
            float weight[4];
            widen4(weight, part[i]);
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[e] += share * weight[e];
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
    const int* __restrict__ ids, const Act* __restrict__ table, const float* __restrict__ hs, Act* __restrict__ output) {
    const int lane = threadIdx.x % SPAN, group = threadIdx.x / SPAN;
    const Act* const matrix = table + static_cast<long long>(ids[blockIdx.x]) * RANK * RANK;
    const float* const low = hs + blockIdx.x * RANK;
    Burst burst;
    burst.load(matrix, group, lane);
    wait_for_rows();
#pragma unroll 1
    for (int first = 0; first < QUADS; first += SPAN) {
        const int quad = first + lane;
        float sums[4] = {};
#pragma unroll 1
        for (int at = 0; at < LOADS; at += AHEAD) {
            const int row = at * GROUPS + group;
            if (first + at > 0) burst.load(matrix, row, quad);
            burst.add(sums, low, row);
        }
#pragma unroll
        for (int step = SPAN; step < 32; step *= 2)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[e] += __shfl_xor_sync(EVERY_LANE, sums[e], step);
        if (group == 0 && quad < QUADS) put4(output + blockIdx.x * RANK + quad * 4, sums);
    }
}
