// RWKV-7, second of five kernels of a layer: second halves of the LoRAs, decay, removal key, value residual, the
// recurrence, group norm, bonus and gate. One block has one head of one stream.
//
// Further parameters: INNER (A), RANK_W, RANK_A, RANK_G, RANK_V (0 in layer 0). All of r, k, v, h* and y is float.
// v_first is layer 0's v. Grid (H, B). state_out may be state_in: a thread reads its part before it writes it.
#include "fused.cuh"

constexpr int QUAD_LANES = power_of_two(HEAD / 4);  // threads of a row of the state
constexpr int ROW_GROUPS = THREADS / QUAD_LANES;
constexpr int ROWS = (HEAD + ROW_GROUPS - 1) / ROW_GROUPS;
constexpr int CHANNELS = (HEAD + 31) / 32;  // of a lane, where a warp has the whole head
constexpr int HIDDEN = RANK_W + RANK_A + RANK_G + RANK_V;
constexpr int LORAS = RANK_V > 0 ? 4 : 3;
constexpr int FINISHED = (LORAS * HEAD + THREADS - 1) / THREADS;
constexpr float DECAY_SCALE = -0.6065306597126334f;  // -exp(-0.5)

typedef Matrix Gate;  // g2 alone may be int8: the others feed the state

// What a matrix adds to the head's channels, summed over each warp: to[warp * pitch + channel].
template <typename T, int rank>
__device__ __forceinline__ void second_half(Columns<T, rank, HEAD>& matrix, const float* hidden, float* to, int pitch) {
    float sums[BATCH][PER<T>] = {};
    matrix.add(sums, hidden, 0);
    warp_sums<Columns<T, rank, HEAD>::SPAN>(sums, to + threadIdx.x / 32 * pitch, HEAD);
}

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
    const float* r, const float* k, const float* v, const float* hw, const float* ha, const float* hg,
#if RANK_V
    const float* hv, const float* v_first,
#endif
    const Weight* __restrict__ w2, const Weight* __restrict__ a2, const Gate* __restrict__ g2,
    const Act* __restrict__ g2_scale,
#if RANK_V
    const Weight* __restrict__ v2,
#endif
    const float* __restrict__ w0, const Act* __restrict__ a0,
#if RANK_V
    const Act* __restrict__ v0,
#endif
    const float* __restrict__ k_k, const float* __restrict__ k_a, const float* __restrict__ r_k,
    const float* __restrict__ norm_weight, const float* __restrict__ norm_bias, const float* state_in,
#if HALT
    const int* halted_flags,
#endif
    float* y, float* state_out) {
    extern __shared__ __align__(16) unsigned char shared[];  // rings
    __shared__ float hidden[HIDDEN];
    __shared__ float partial[WARPS * LORAS * HEAD];
    __shared__ __align__(16) float r_s[HEAD], w_s[HEAD], k_s[HEAD], v_s[HEAD], kk_s[HEAD], b_s[HEAD];
    __shared__ float finished[LORAS * HEAD], y_s[HEAD];  // of a, g and v; w's place is empty
    __shared__ float bonus_s;

    const int channel = blockIdx.x * HEAD;
    const long long row_at = static_cast<long long>(blockIdx.y) * INNER + channel;
    const long long corner = row_at * HEAD;
    const int lane = threadIdx.x % 32, quad = threadIdx.x % QUAD_LANES, group = threadIdx.x / QUAD_LANES;
    const bool has_quad = quad * 4 < HEAD;

    typedef Columns<Weight, RANK_W, HEAD> Decay;
    typedef Columns<Weight, RANK_A, HEAD> Rate;
    typedef Columns<Gate, RANK_G, HEAD> Gates;
    Decay decay(w2, INNER, 0, channel, shared);
    Rate rate(a2, INNER, 0, channel, shared + Decay::ROOM);
    Gates gate(g2, INNER, 0, channel, shared + Decay::ROOM + Rate::ROOM);
    decay.prefetch(), rate.prefetch(), gate.prefetch();
#if RANK_V
    Columns<Weight, RANK_V, HEAD> blend(v2, INNER, 0, channel, shared + Decay::ROOM + Rate::ROOM + Gates::ROOM);
    blend.prefetch();
#endif
    Packed<float> rows[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int row = group + i * ROW_GROUPS;
        rows[i] = zero4<float>();
        if (row < HEAD && has_quad) rows[i] = fetch4(state_in + corner + row * HEAD + quad * 4);
    }
    // small parameters, for the one warp that has all channels of the head
    float k_k_c[CHANNELS], k_a_c[CHANNELS], r_k_c[CHANNELS], scale_c[CHANNELS], bias_c[CHANNELS];
    if (threadIdx.x < 32)
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            const int at = channel + min(lane + 32 * c, HEAD - 1);
            k_k_c[c] = k_k[at], k_a_c[c] = k_a[at], r_k_c[c] = r_k[at];
            scale_c[c] = norm_weight[at], bias_c[c] = norm_bias[at];
        }
    // of the LoRAs' outputs, LORAS * HEAD in the order w, a, g, v, thread t finishes those at t, t + THREADS, ...
    float offset[FINISHED], factor[FINISHED];
#pragma unroll
    for (int i = 0; i < FINISHED; ++i) {
        const int at = threadIdx.x + i * THREADS, n = channel + at % HEAD;
        offset[i] = 0.0f, factor[i] = 1.0f;
        if (at < HEAD) offset[i] = w0[n];
        else if (at < 2 * HEAD) offset[i] = widen(a0[n]);
        else if (INT8 && at < 3 * HEAD) factor[i] = widen(g2_scale[n]);
#if RANK_V
        else if (at >= 3 * HEAD && at < 4 * HEAD) offset[i] = widen(v0[n]);
#endif
    }
#if HALT
    const bool halted = halted_flags[blockIdx.y] != 0;
#else
    constexpr bool halted = false;
#endif
    wait_for_previous();
    for (int at = threadIdx.x; at < HIDDEN; at += THREADS) {
        const int b = blockIdx.y;
        float h;
        if (at < RANK_W) h = hw[b * RANK_W + at];
        else if (at < RANK_W + RANK_A) h = ha[b * RANK_A + at - RANK_W];
        else if (at < RANK_W + RANK_A + RANK_G) h = hg[b * RANK_G + at - RANK_W - RANK_A];
#if RANK_V
        else h = hv[b * RANK_V + at - RANK_W - RANK_A - RANK_G];
#else
        else h = 0.0f;
#endif
        hidden[at] = h;
    }
    // one warp has all channels of the head, so that its sums need no further barrier
    float r_c[CHANNELS] = {}, k_c[CHANNELS] = {}, v_c[CHANNELS] = {};
#if RANK_V
    float first_c[CHANNELS] = {};
#endif
    if (threadIdx.x < 32)
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            const int n = lane + 32 * c;
            if (n >= HEAD) continue;
            r_c[c] = r[row_at + n], k_c[c] = k[row_at + n], v_c[c] = v[row_at + n];
#if RANK_V
            first_c[c] = v_first[row_at + n];
#endif
        }
    __syncthreads();

    constexpr int pitch = LORAS * HEAD;
    second_half(decay, hidden, partial, pitch);
    second_half(rate, hidden + RANK_W, partial + HEAD, pitch);
    second_half(gate, hidden + RANK_W + RANK_A, partial + 2 * HEAD, pitch);
#if RANK_V
    second_half(blend, hidden + RANK_W + RANK_A + RANK_G, partial + 3 * HEAD, pitch);
#endif
    __syncthreads();
#pragma unroll
    for (int i = 0; i < FINISHED; ++i) {
        const int at = threadIdx.x + i * THREADS;
        if (at >= LORAS * HEAD) continue;
        const float sum = over_warps(partial, pitch, at) * factor[i] + offset[i];
        if (at < HEAD) w_s[at] = expf(DECAY_SCALE * sigmoid(sum));
        else finished[at] = at < 2 * HEAD || at >= 3 * HEAD ? sigmoid(sum) : sum;
    }
    __syncthreads();

    if (threadIdx.x < 32) {
        float a_c[CHANNELS], kk_c[CHANNELS], square = 0.0f, bonus = 0.0f;
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            const int n = lane + 32 * c;
            a_c[c] = kk_c[c] = 0.0f;
            if (n >= HEAD) continue;
            a_c[c] = finished[HEAD + n];
#if RANK_V
            v_c[c] += (first_c[c] - v_c[c]) * finished[3 * HEAD + n];
#endif
            kk_c[c] = k_c[c] * k_k_c[c];
            square += kk_c[c] * kk_c[c];
            k_c[c] *= (a_c[c] - 1.0f) * k_a_c[c] + 1.0f;
            bonus += r_c[c] * k_c[c] * r_k_c[c];
        }
        square = sum_lanes<32>(square);
        bonus = sum_lanes<32>(bonus);
        const float inverse = 1.0f / fmaxf(sqrtf(square), 1e-12f);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            const int n = lane + 32 * c;
            if (n >= HEAD) continue;
            kk_c[c] *= inverse;
            r_s[n] = r_c[c], k_s[n] = k_c[c], v_s[n] = v_c[c], kk_s[n] = kk_c[c], b_s[n] = -kk_c[c] * a_c[c];
        }
        if (lane == 0) bonus_s = bonus;
    }
    __syncthreads();

    float r_q[4] = {}, w_q[4] = {}, k_q[4] = {}, kk_q[4] = {}, b_q[4] = {};
    if (has_quad) {
        load4(r_q, r_s + quad * 4), load4(w_q, w_s + quad * 4), load4(k_q, k_s + quad * 4);
        load4(kk_q, kk_s + quad * 4), load4(b_q, b_s + quad * 4);
    }
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
            if (has_quad && !halted) store4(state_out + corner + row * HEAD + quad * 4, s);
            if (quad == 0) y_s[row] = out;
        }
    }
    __syncthreads();

    if (threadIdx.x < 32) {
        float y_c[CHANNELS], mean = 0.0f, square = 0.0f;
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            y_c[c] = lane + 32 * c < HEAD ? y_s[lane + 32 * c] : 0.0f;
            mean += y_c[c];
        }
        mean = sum_lanes<32>(mean) / HEAD;
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c)
            if (lane + 32 * c < HEAD) square += (y_c[c] - mean) * (y_c[c] - mean);
        const float inverse = rsqrtf(sum_lanes<32>(square) / HEAD + 64e-5f);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            const int n = lane + 32 * c;
            if (n >= HEAD) continue;
            const float normed = (y_c[c] - mean) * inverse * scale_c[c] + bias_c[c];
            y[row_at + n] = (normed + bonus_s * v_s[n]) * finished[2 * HEAD + n];
        }
    }
}
