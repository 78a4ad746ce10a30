// RWKV-5 and 6: the recurrence, group norm and gate; in RWKV-6 also the second half of the decay's LoRA. One block has
// one head of one stream. y = r^T (S + u*k v^T), S <- diag(w) S + k v^T, for S [B, H, N (key), N (value)].
//
// Further parameters: INNER (A), RANK (of the decay's LoRA; 0 in RWKV-5, whose `decay` is log w, else w is
// e^-e^(decay + hw w2)), GATE (1: y is multiplied by silu(g)). All of r, k, v, g, hw and y is float. Grid (H, B).
// state_out may be state_in: a thread reads its part before it writes it.
#include "heads.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
    const float* r, const float* k, const float* v,
#if GATE
    const float* g,
#endif
#if RANK
    const float* hw, const Weight* __restrict__ w2,
#endif
    const float* __restrict__ decay, const float* __restrict__ first, const float* __restrict__ norm_weight,
    const float* __restrict__ norm_bias, const float* state_in,
#if HALT
    const int* halted_flags,
#endif
    float* y, float* state_out) {
    __shared__ __align__(16) float v_s[HEAD];
    __shared__ float r_s[HEAD], k_s[HEAD], w_s[HEAD], partial[WARPS * HEAD];
    static_assert(THREADS >= HEAD, "a thread has a channel");

    const int channel = blockIdx.x * HEAD;
    const long long row_at = static_cast<long long>(blockIdx.y) * INNER + channel;
    const int lane = threadIdx.x % 32, own = threadIdx.x;
#if RANK
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ float hidden[RANK];
    Columns<Weight, RANK, HEAD> lora(w2, INNER, 0, channel, shared);
    lora.prefetch();
#endif
    const HeadState state(state_in + row_at * HEAD);
    const float offset = own < HEAD ? decay[channel + own] : 0.0f;
    // small parameters, for the one warp that has all channels of the head
    float first_c[CHANNELS], scale_c[CHANNELS], bias_c[CHANNELS];
    if (threadIdx.x < 32)
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            const int at = channel + min(lane + 32 * c, HEAD - 1);
            first_c[c] = first[at], scale_c[c] = norm_weight[at], bias_c[c] = norm_bias[at];
        }
#if HALT
    const bool halted = halted_flags[blockIdx.y] != 0;
#else
    constexpr bool halted = false;
#endif
    wait_for_previous();
#if RANK
    for (int at = threadIdx.x; at < RANK; at += THREADS) hidden[at] = hw[blockIdx.y * RANK + at];
#endif
    if (own < HEAD) r_s[own] = r[row_at + own], k_s[own] = k[row_at + own], v_s[own] = v[row_at + own];
#if GATE
    float gate_c[CHANNELS] = {};
    if (threadIdx.x < 32)
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c)
            if (lane + 32 * c < HEAD) gate_c[c] = g[row_at + lane + 32 * c];
#endif
#if RANK
    __syncthreads();
    second_half(lora, hidden, partial, HEAD);
    __syncthreads();
    if (own < HEAD) w_s[own] = expf(-expf(over_warps(partial, HEAD, own) + offset));
#else
    if (own < HEAD) w_s[own] = expf(offset);
#endif
    __syncthreads();

    float v_q[4] = {}, out[4] = {};
    if (state.has_quad) load4(v_q, v_s + state.quad * 4);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int row = state.row(i);
        if (row >= HEAD) continue;
        float s[4];
        widen4(s, state.rows[i]);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            out[e] += r_s[row] * s[e];
            s[e] = s[e] * w_s[row] + k_s[row] * v_q[e];
        }
        if (state.has_quad && !halted) store4(state_out + (row_at + row) * HEAD + state.quad * 4, s);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e)
#pragma unroll
        for (int step = QUAD_LANES; step < 32; step *= 2) out[e] += __shfl_xor_sync(EVERY_LANE, out[e], step);
    if (lane < QUAD_LANES && state.has_quad)
#pragma unroll
        for (int e = 0; e < 4; ++e) partial[threadIdx.x / 32 * HEAD + state.quad * 4 + e] = out[e];
    __syncthreads();

    if (threadIdx.x < 32) {
        float y_c[CHANNELS] = {}, bonus = 0.0f;
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            const int n = lane + 32 * c;
            if (n < HEAD) bonus += r_s[n] * first_c[c] * k_s[n];
        }
        bonus = sum_lanes<32>(bonus);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            const int n = lane + 32 * c;
            if (n < HEAD) y_c[c] = over_warps(partial, HEAD, n) + bonus * v_s[n];
        }
        normalize_head(y_c);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            const int n = lane + 32 * c;
            if (n >= HEAD) continue;
            float finished = y_c[c] * scale_c[c] + bias_c[c];
#if GATE
            finished *= gate_c[c] * sigmoid(gate_c[c]);
#endif
            y[row_at + n] = finished;
        }
    }
}
