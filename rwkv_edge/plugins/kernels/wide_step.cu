// One token of many streams: key and removal key, the recurrence, group norm, bonus and gate. A block has a head of a
// stream. Grid (H, B). r, w, k, v, a, g [B, A] float; state [B, H, HEAD, HEAD], updated in place unless halted[b].
#include "wide_wkv.cuh"

constexpr int QUAD_LANES = power_above(HEAD / 4);  // threads of a row of the state
constexpr int ROW_GROUPS = THREADS / QUAD_LANES;
constexpr int ROWS = (HEAD + ROW_GROUPS - 1) / ROW_GROUPS;

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
    const float* __restrict__ r, const float* __restrict__ w, const float* __restrict__ k, const float* __restrict__ v,
    const float* __restrict__ a, const float* __restrict__ g, const float* __restrict__ k_k,
    const float* __restrict__ k_a, const float* __restrict__ r_k, const float* __restrict__ norm_weight,
    const float* __restrict__ norm_bias, const int* __restrict__ halted, float* state, Act* __restrict__ output) {
    __shared__ __align__(16) float r_s[HEAD], w_s[HEAD], k_s[HEAD], v_s[HEAD], kk_s[HEAD], b_s[HEAD];
    __shared__ float y_s[HEAD];
    const int channel = blockIdx.x * HEAD;
    const long long at = static_cast<long long>(blockIdx.y) * INNER + channel;
    float* const corner = state + at * HEAD;
    const int quad = threadIdx.x % QUAD_LANES, group = threadIdx.x / QUAD_LANES;
    const bool has_quad = quad * 4 < HEAD;
    Packed<float> rows[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int row = group + i * ROW_GROUPS;
        rows[i] = zero4<float>();
        if (row < HEAD && has_quad) rows[i] = fetch4(corner + row * HEAD + quad * 4);
    }
    const Head head(k_k, k_a, r_k, channel);
    wait_for_rows();

    Row row_of;
    float bonus = 0.0f;
    if (threadIdx.x < 32) {
        float kk[CHANNELS], b[CHANNELS];
        row_of.load(r, w, k, v, a, at, true);
        bonus = head.prepare(row_of, kk, b);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            const int n = threadIdx.x + 32 * c;
            if (n >= HEAD) continue;
            r_s[n] = row_of.r[c], w_s[n] = row_of.w[c], k_s[n] = row_of.k[c], v_s[n] = row_of.v[c];
            kk_s[n] = kk[c], b_s[n] = b[c];
        }
    }
    __syncthreads();

    float r_q[4] = {}, w_q[4] = {}, k_q[4] = {}, kk_q[4] = {}, b_q[4] = {};
    if (has_quad) {
        load4(r_q, r_s + quad * 4), load4(w_q, w_s + quad * 4), load4(k_q, k_s + quad * 4);
        load4(kk_q, kk_s + quad * 4), load4(b_q, b_s + quad * 4);
    }
    const bool kept = halted[blockIdx.y] == 0;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int row = group + i * ROW_GROUPS;
        float s[4], removed = 0.0f, out = 0.0f;
        widen4(s, rows[i]);
#pragma unroll
        for (int e = 0; e < 4; ++e) removed += s[e] * kk_q[e];
        removed = sum_lanes<QUAD_LANES>(removed);
        const float value = row < HEAD ? v_s[row] : 0.0f;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            s[e] = s[e] * w_q[e] + removed * b_q[e] + value * k_q[e];
            out += s[e] * r_q[e];
        }
        out = sum_lanes<QUAD_LANES>(out);
        if (row < HEAD) {
            if (has_quad && kept) store4(corner + row * HEAD + quad * 4, s);
            if (quad == 0) y_s[row] = out;
        }
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        float y[CHANNELS], scale[CHANNELS], shift[CHANNELS], gate[CHANNELS];
        load_channels(y, y_s), load_channels(gate, g + at);
        load_channels(scale, norm_weight + channel), load_channels(shift, norm_bias + channel);
        give_head(y, row_of.v, bonus, scale, shift, gate, output + at);
    }
}
