// One token of RWKV-5 and 6: y = r^T (S + u*k v^T), S <- diag(w) S + k v^T, for S [B, H, N (key), N (value)].
// With STATIC_DECAY (RWKV-5) w is a parameter [H, N], else (RWKV-6) it belongs to the token [B, H, N].
//
// LANES threads share a row, one quad of columns each; a thread has ROWS rows. y sums over rows: over the groups of a
// warp by shuffles, over warps through shared memory. Grid (1, H, B); state_out may be state_in.
#include "common.cuh"

constexpr int GROUPS = THREADS / LANES;
constexpr int WARPS = THREADS / WARP;

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
    const float* state_in, const Act* __restrict__ r, const float* __restrict__ w, const float* __restrict__ u,
    const Act* __restrict__ k, const Act* __restrict__ v, int heads, Act* __restrict__ y, float* state_out) {
    __shared__ float4 partial[WARPS][LANES];
    const int lane = threadIdx.x % LANES, first = threadIdx.x / LANES;
    const long long head = static_cast<long long>(blockIdx.z) * heads + blockIdx.y;
    const long long vector = head * HEAD;
    const int parameter = blockIdx.y * HEAD;
    const bool has_columns = lane * 4 < HEAD;
    const long long corner = vector * HEAD + lane * 4;

    float s[ROWS][4], r_row[ROWS], w_row[ROWS], k_row[ROWS], v_col[4] = {}, bonus = 0.0f;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int row = first + i * GROUPS;
        const bool exists = row < HEAD;
        Packed<float> quad = zero4<float>();
        if (exists && has_columns) quad = fetch4(state_in + corner + row * HEAD);
        widen4(s[i], quad);
        r_row[i] = exists ? widen(r[vector + row]) : 0.0f;
        k_row[i] = exists ? widen(k[vector + row]) : 0.0f;
        w_row[i] = exists ? w[(STATIC_DECAY ? parameter : vector) + row] : 0.0f;
        bonus += exists ? u[parameter + row] * r_row[i] * k_row[i] : 0.0f;
    }
    if (has_columns) widen4(v_col, fetch4(v + vector + lane * 4));

    float out[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) out[e] = bonus * v_col[e];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            out[e] += r_row[i] * s[i][e];
            s[i][e] = s[i][e] * w_row[i] + k_row[i] * v_col[e];
        }
        const int row = first + i * GROUPS;
        if (row < HEAD && has_columns) store4(state_out + corner + row * HEAD, s[i]);
    }

#pragma unroll
    for (int e = 0; e < 4; ++e)
#pragma unroll
        for (int step = LANES; step < WARP; step *= 2) out[e] += __shfl_xor_sync(EVERY_LANE, out[e], step);
    if (threadIdx.x % WARP < LANES) partial[threadIdx.x / WARP][lane] = make_float4(out[0], out[1], out[2], out[3]);
    __syncthreads();
    const float* const sums = reinterpret_cast<const float*>(partial);
    for (int column = threadIdx.x; column < HEAD; column += THREADS) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) sum += sums[i * LANES * 4 + column];
        store(y + vector + column, sum);
    }
}
