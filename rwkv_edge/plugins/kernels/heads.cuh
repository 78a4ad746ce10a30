// What the kernels of the recurrences share: one block has one head of one stream, and one warp can have all channels.
#pragma once
#include "fused.cuh"

constexpr int QUAD_LANES = power_of_two(HEAD / 4);  // threads of a row of the state
constexpr int ROW_GROUPS = THREADS / QUAD_LANES;
constexpr int ROWS = (HEAD + ROW_GROUPS - 1) / ROW_GROUPS;
constexpr int CHANNELS = (HEAD + 31) / 32;  // of a lane, where a warp has the whole head: lane + 32 c

// A head's state as it lies in memory: a thread has quads of its rows.
struct HeadState {
    int quad, group;
    bool has_quad;
    Packed<float> rows[ROWS];

    __device__ __forceinline__ explicit HeadState(const float* corner) {
        quad = threadIdx.x % QUAD_LANES, group = threadIdx.x / QUAD_LANES, has_quad = quad * 4 < HEAD;
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            rows[i] = zero4<float>();
            if (row(i) < HEAD && has_quad) rows[i] = fetch4(corner + row(i) * HEAD + quad * 4);
        }
    }
    __device__ __forceinline__ int row(int i) const { return group + i * ROW_GROUPS; }
};

// What a matrix adds to the head's channels, summed over each warp: to[warp * pitch + channel].
template <typename T, int rank>
__device__ __forceinline__ void second_half(Columns<T, rank, HEAD>& matrix, const float* hidden, float* to, int pitch) {
    float sums[BATCH][PER<T>] = {};
    matrix.add(sums, hidden, 0);
    warp_sums<Columns<T, rank, HEAD>::SPAN>(sums, to + threadIdx.x / 32 * pitch, HEAD);
}

// (y - mean) / sqrt(variance + 64e-5) over the head, by one warp; channels beyond the head are zero.
__device__ __forceinline__ void normalize_head(float (&y)[CHANNELS]) {
    const int lane = threadIdx.x % 32;
    float mean = 0.0f, square = 0.0f;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) mean += y[c];
    mean = sum_lanes<32>(mean) / HEAD;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c)
        if (lane + 32 * c < HEAD) square += (y[c] - mean) * (y[c] - mean);
    const float inverse = rsqrtf(sum_lanes<32>(square) / HEAD + 64e-5f);
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) y[c] = (y[c] - mean) * inverse;
}
