// RWKV-7, second of five kernels of a layer: second halves of the LoRAs, decay, removal key, value residual, the
// recurrence, group norm, bonus and gate. One block has one head of one stream.
//
// Further parameters: INNER (A), RANK_W, RANK_A, RANK_G, RANK_V (0 in layer 0). All of r, k, v, h* and y is float.
// v_first is layer 0's v. Grid (H, B). state_out may be state_in: a thread reads its part before it writes it.
//
// With OUT 1, the third kernel is part of it: a block multiplies its head's y by the head's rows of the output matrix,
// which leaves one partial sum a head for the residual stream, parts[H, B, WIDTH]. OUT_AHEAD: loads in flight of those.
// Bits of INT8 and INT4: g2, output.
#include "heads.cuh"

constexpr int HIDDEN_W = skewed(RANK_W), HIDDEN_A = skewed(RANK_A), HIDDEN_G = skewed(RANK_G), HIDDEN_V = skewed(RANK_V);
constexpr int LORAS = RANK_V > 0 ? 4 : 3;
constexpr int FINISHED = (LORAS * HEAD + THREADS - 1) / THREADS;
constexpr int HEAD_PITCH = skewed(HEAD);
constexpr float DECAY_SCALE = -0.6065306597126334f;  // -exp(-0.5)

#if INT8 & 1
typedef Int8 Gate;  // g2 alone may be int8: the other LoRAs feed the state
#else
typedef Weight Gate;
#endif
#if OUT
#if INT8 & 2
typedef Int8 Out;
#elif INT4 & 2
typedef Int4 Out;
#else
typedef Weight Out;
#endif
typedef Opened<Out, HEAD, WIDTH, OUT_AHEAD, WIDTH / PER<Out>> Output;
#endif

struct Small {  // four channels of the head's parameters
    float k_k[4], k_a[4], r_k[4], norm_weight[4], norm_bias[4];
};

// Four channels of the head, as every row of threads has them: what the recurrence takes, the bonus and the gate.
struct Quads {
    float r[4], w[4], k[4], v[4], kk[4], b[4], gate[4], bonus;

    // From r, k, v as they were made, `finished` (decay, rate, gate, blend of the values) and layer 0's values.
    __device__ __forceinline__ void complete(const Small& small, const float* finished, const float (&first)[4]) {
        float rate[4], square = 0.0f;
        bonus = 0.0f;
        load4(w, finished), load4(rate, finished + HEAD), load4(gate, finished + 2 * HEAD);
#if RANK_V
        float blend[4];
        load4(blend, finished + 3 * HEAD);
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] += (first[e] - v[e]) * blend[e];
#endif
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            kk[e] = k[e] * small.k_k[e];
            square += kk[e] * kk[e];
            k[e] *= (rate[e] - 1.0f) * small.k_a[e] + 1.0f;
            bonus += r[e] * k[e] * small.r_k[e];
        }
        square = sum_lanes<QUAD_LANES>(square), bonus = sum_lanes<QUAD_LANES>(bonus);
        const float inverse = 1.0f / fmaxf(sqrtf(square), 1e-12f);
#pragma unroll
        for (int e = 0; e < 4; ++e) kk[e] *= inverse, b[e] = -kk[e] * rate[e];
    }
};

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
#if OUT
    const void* __restrict__ output, const Act* __restrict__ output_scale,
#endif
#if HALT
    const int* halted_flags,
#endif
    float* y, float* state_out) {  // with OUT, y is parts
    extern __shared__ __align__(16) unsigned char shared[];  // rings
    __shared__ float hidden[HIDDEN_W + HIDDEN_A + HIDDEN_G + HIDDEN_V];
    __shared__ float partial[WARPS * LORAS * HEAD];
    __shared__ __align__(16) float finished[LORAS * HEAD];  // decay, rate, gate, blend
    __shared__ __align__(16) float y_s[HEAD], of_warp[WARPS * HEAD_PITCH];

    const int channel = blockIdx.x * HEAD;
    const long long row_at = static_cast<long long>(blockIdx.y) * INNER + channel;

    typedef Columns<Weight, RANK_W, HEAD> Decay;
    typedef Columns<Weight, RANK_A, HEAD> Rate;
    typedef Columns<Gate, RANK_G, HEAD> Gates;
    Decay decay(w2, INNER, 0, channel, shared);
    Rate rate(a2, INNER, 0, channel, shared + Decay::ROOM);
    Gates gate(g2, INNER, 0, channel, shared + Decay::ROOM + Rate::ROOM);
    decay.prefetch(), rate.prefetch(), gate.prefetch();
    constexpr int THREE = Decay::ROOM + Rate::ROOM + Gates::ROOM;
#if RANK_V
    typedef Columns<Weight, RANK_V, HEAD> Blend;
    Blend blend(v2, INNER, 0, channel, shared + THREE);
    blend.prefetch();
    constexpr int ROOMS = THREE + Blend::ROOM;
#else
    constexpr int ROOMS = THREE;
#endif
#if OUT
    auto out = Output::from(output, output_scale, WIDTH, channel, 0, shared + ROOMS);
    out.prefetch();
#endif
    const HeadState state(state_in + row_at * HEAD);
    const int quad_at = state.has_quad ? state.quad * 4 : 0;  // lanes past the head repeat its first quad, for nothing
    Small small;
    load4(small.k_k, k_k + channel + quad_at), load4(small.k_a, k_a + channel + quad_at);
    load4(small.r_k, r_k + channel + quad_at);
    load4(small.norm_weight, norm_weight + channel + quad_at), load4(small.norm_bias, norm_bias + channel + quad_at);
    // of the LoRAs' outputs, LORAS * HEAD in the order w, a, g, v, thread t finishes those at t, t + THREADS, ...
    float offset[FINISHED], factor[FINISHED];
#pragma unroll
    for (int i = 0; i < FINISHED; ++i) {
        const int at = threadIdx.x + i * THREADS, n = channel + at % HEAD;
        offset[i] = 0.0f, factor[i] = 1.0f;
        if (at < HEAD) offset[i] = w0[n];
        else if (at < 2 * HEAD) offset[i] = widen(a0[n]);
        else if ((INT8 & 1) && at < 3 * HEAD) factor[i] = widen(g2_scale[n]);
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
    float* const hidden_a = hidden + HIDDEN_W;
    float* const hidden_g = hidden_a + HIDDEN_A;
    for (int at = threadIdx.x; at < RANK_W; at += THREADS) hidden[skewed(at)] = hw[blockIdx.y * RANK_W + at];
    for (int at = threadIdx.x; at < RANK_A; at += THREADS) hidden_a[skewed(at)] = ha[blockIdx.y * RANK_A + at];
    for (int at = threadIdx.x; at < RANK_G; at += THREADS) hidden_g[skewed(at)] = hg[blockIdx.y * RANK_G + at];
#if RANK_V
    float* const hidden_v = hidden_g + HIDDEN_G;
    for (int at = threadIdx.x; at < RANK_V; at += THREADS) hidden_v[skewed(at)] = hv[blockIdx.y * RANK_V + at];
#endif
    // every row of threads has all channels of the head, so that its sums need no further barrier
    Quads q;
    float first[4] = {};
    load4(q.r, r + row_at + quad_at), load4(q.k, k + row_at + quad_at), load4(q.v, v + row_at + quad_at);
#if RANK_V
    load4(first, v_first + row_at + quad_at);
#endif
    if (!state.has_quad)
#pragma unroll
        for (int e = 0; e < 4; ++e) q.r[e] = q.k[e] = 0.0f;
    __syncthreads();

    constexpr int pitch = LORAS * HEAD;
    second_half(decay, hidden, partial, pitch);
    second_half(rate, hidden_a, partial + HEAD, pitch);
    second_half(gate, hidden_g, partial + 2 * HEAD, pitch);
#if RANK_V
    second_half(blend, hidden_v, partial + 3 * HEAD, pitch);
#endif
    __syncthreads();
#pragma unroll
    for (int i = 0; i < FINISHED; ++i) {
        const int at = threadIdx.x + i * THREADS;
        if (at >= LORAS * HEAD) continue;
        const float sum = over_warps(partial, pitch, at) * factor[i] + offset[i];
        if (at < HEAD) finished[at] = expf(DECAY_SCALE * sigmoid(sum));
        else finished[at] = at < 2 * HEAD || at >= 3 * HEAD ? sigmoid(sum) : sum;
    }
    __syncthreads();

    q.complete(small, finished + quad_at, first);
    float* const mine = of_warp + threadIdx.x / 32 * HEAD_PITCH;  // first the values, then y
    if (state.has_quad) store4(mine + skewed(quad_at), q.v);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int row = state.row(i);
        float s[4], removed = 0.0f, given = 0.0f;
        widen4(s, state.rows[i]);
#pragma unroll
        for (int e = 0; e < 4; ++e) removed += s[e] * q.kk[e];
        removed = sum_lanes<QUAD_LANES>(removed);
        const float value = row < HEAD ? mine[skewed(row)] : 0.0f;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            s[e] = s[e] * q.w[e] + removed * q.b[e] + value * q.k[e];
            given += s[e] * q.r[e];
        }
        given = sum_lanes<QUAD_LANES>(given);
        if (row < HEAD) {
            if (state.has_quad && !halted) store4(state_out + (row_at + row) * HEAD + state.quad * 4, s);
            if (state.quad == 0) y_s[row] = given;
        }
    }
    __syncthreads();

    float y_q[4] = {}, mean = 0.0f, square = 0.0f;
    if (state.has_quad) load4(y_q, y_s + quad_at);
#pragma unroll
    for (int e = 0; e < 4; ++e) mean += y_q[e];
    mean = sum_lanes<QUAD_LANES>(mean) / HEAD;
#pragma unroll
    for (int e = 0; e < 4; ++e) square += state.has_quad ? (y_q[e] - mean) * (y_q[e] - mean) : 0.0f;
    const float inverse = rsqrtf(sum_lanes<QUAD_LANES>(square) / HEAD + 64e-5f);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        const float normed = (y_q[e] - mean) * inverse * small.norm_weight[e] + small.norm_bias[e];
        y_q[e] = (normed + q.bonus * q.v[e]) * q.gate[e];
    }
#if !OUT
    if (state.group == 0 && state.has_quad) store4(y + row_at + quad_at, y_q);
#else
    if (state.has_quad) store4(mine + skewed(quad_at), y_q);
    __syncwarp();
    typedef Output::Found Turns;
    constexpr int COLUMNS = Turns::MANY;
    float sums[BATCH][COLUMNS] = {};
    out.add(sums, mine, 0);
    float* const scratch = reinterpret_cast<float*>(shared + RING);  // [GROUPS, WIDTH]
    const int column = threadIdx.x % Turns::SPAN * COLUMNS;
    if (out.inside)
#pragma unroll
        for (int e = 0; e < COLUMNS; e += 4) {
            const float four[4] = {sums[0][e], sums[0][e + 1], sums[0][e + 2], sums[0][e + 3]};
            store4(scratch + threadIdx.x / Turns::SPAN * WIDTH + column + e, four);
        }
    __syncthreads();
    float* const parts = y + (static_cast<long long>(blockIdx.x) * gridDim.y + blockIdx.y) * WIDTH;
    for (int at = threadIdx.x; at < WIDTH; at += THREADS) {
        float sum = 0.0f;
#pragma unroll
        for (int group = 0; group < Turns::GROUPS; ++group) sum += scratch[group * WIDTH + at];
        parts[at] = INT8 & 2 ? sum * widen(output_scale[at]) : sum;
    }
#endif
}
