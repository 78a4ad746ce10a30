// One token of RWKV-7: S <- S diag(w) - (S kk)(kk*a)^T + v k^T, y = S r, for S [B, H, N (value), N (key)].
//
// Rows of S do not depend on each other. LANES threads share a row, one quad of columns each, so a warp reads whole
// rows in 16-byte pieces; a thread has ROWS rows, all loaded before the first use.
// Grid (blocks of rows, H, B). state_out may be state_in: a thread reads its part before it writes it.
#include "common.cuh"

constexpr int GROUPS = THREADS / LANES;

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
    const float* state_in, const Act* __restrict__ r, const float* __restrict__ w, const Act* __restrict__ k,
    const Act* __restrict__ v, const Act* __restrict__ kk, const Act* __restrict__ a, int heads, Act* __restrict__ y,
    float* state_out) {
    const int lane = threadIdx.x % LANES;
    const int first = blockIdx.x * GROUPS * ROWS + threadIdx.x / LANES;
    const long long head = static_cast<long long>(blockIdx.z) * heads + blockIdx.y;
    const long long vector = head * HEAD;
    const bool has_columns = lane * 4 < HEAD;  // LANES is a power of two, HEAD / 4 need not be
    const long long corner = vector * HEAD + lane * 4;

    float s[ROWS][4], v_row[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int row = first + i * GROUPS;
        const bool exists = row < HEAD;
        Packed<float> quad = zero4<float>();
        if (exists && has_columns) quad = fetch4(state_in + corner + row * HEAD);
        widen4(s[i], quad);
        v_row[i] = exists ? widen(v[vector + row]) : 0.0f;
    }

    float r_col[4] = {}, w_col[4] = {}, k_col[4] = {}, kk_col[4] = {}, b_col[4] = {};
    if (has_columns) {
        const long long at = vector + lane * 4;
        widen4(r_col, fetch4(r + at));
        widen4(w_col, fetch4(w + at));
        widen4(k_col, fetch4(k + at));
        widen4(kk_col, fetch4(kk + at));
        widen4(b_col, fetch4(a + at));
#pragma unroll
        for (int e = 0; e < 4; ++e) b_col[e] *= -kk_col[e];
    }

#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int row = first + i * GROUPS;
        float removed = 0.0f, out = 0.0f;
#pragma unroll
        for (int e = 0; e < 4; ++e) removed += s[i][e] * kk_col[e];
        removed = sum_lanes<LANES>(removed);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            s[i][e] = s[i][e] * w_col[e] + removed * b_col[e] + v_row[i] * k_col[e];
            out += s[i][e] * r_col[e];
        }
        out = sum_lanes<LANES>(out);
        if (row < HEAD) {
            if (has_columns) store4(state_out + corner + row * HEAD, s[i]);
            if (lane == 0) store(y + vector + row, out);
        }
    }
}
