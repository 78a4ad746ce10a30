// RWKV-4: an average of values weighted by e^key, with its exponents kept near zero; see rwkv_edge.models.ops.Ops.wkv4.
// A channel is one thread. SEQUENCE 0: one token, k and v [B, A]. SEQUENCE 1: T tokens, k and v [B, T, A].
// Grid (blocks of channels, 1, B); the new state may be the old one.
#include "common.cuh"

struct Average {
    float num, den, top;

    __device__ __forceinline__ float step(float decay, float first, float k, float v) {
        // Of the two weights e^(top - max) and e^(key - max), the larger is 1.
        const float boosted = first + k;
        float less = expf(-fabsf(top - boosted));
        float old = top > boosted ? 1.0f : less, fresh = top > boosted ? less : 1.0f;
        const float y = __fdividef(old * num + fresh * v, old * den + fresh);  // the divisor is far below 2^126
        const float decayed = top + decay;
        less = expf(-fabsf(decayed - k));
        old = decayed > k ? 1.0f : less, fresh = decayed > k ? less : 1.0f;
        num = old * num + fresh * v;
        den = old * den + fresh;
        top = fmaxf(decayed, k);
        return y;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
    const float* num_in, const float* den_in, const float* top_in, const float* __restrict__ w,
    const float* __restrict__ u, const Act* __restrict__ k, const Act* __restrict__ v, int channels,
#if SEQUENCE
    int tokens,
#endif
    Act* __restrict__ y, float* num_out, float* den_out, float* top_out) {
#if !SEQUENCE
    constexpr int tokens = 1;
#endif
    const int channel = blockIdx.x * THREADS + threadIdx.x;
    if (channel >= channels) return;
    const long long state = static_cast<long long>(blockIdx.z) * channels + channel;
    const long long origin = static_cast<long long>(blockIdx.z) * tokens * channels + channel;
    Average average = {num_in[state], den_in[state], top_in[state]};
    const float decay = w[channel], first = u[channel];

    Act k_next[CHUNK] = {}, v_next[CHUNK] = {};  // of the next CHUNK tokens: in flight while these are computed
    auto fetch = [&](int start) {
#pragma unroll
        for (int i = 0; i < CHUNK; ++i)
            if (start + i < tokens) {
                k_next[i] = k[origin + static_cast<long long>(start + i) * channels];
                v_next[i] = v[origin + static_cast<long long>(start + i) * channels];
            }
    };
    fetch(0);
    for (int start = 0; start < tokens; start += CHUNK) {
        float k_now[CHUNK], v_now[CHUNK];
        Act* const y_now = y + origin + static_cast<long long>(start) * channels;
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) k_now[i] = widen(k_next[i]), v_now[i] = widen(v_next[i]);
        fetch(start + CHUNK);
        if (start + CHUNK <= tokens) {  // no branch between tokens: their exponentials overlap
            float out[CHUNK];
#pragma unroll
            for (int i = 0; i < CHUNK; ++i) out[i] = average.step(decay, first, k_now[i], v_now[i]);
#pragma unroll
            for (int i = 0; i < CHUNK; ++i) store(y_now + static_cast<long long>(i) * channels, out[i]);
        } else {
#pragma unroll
            for (int i = 0; i < CHUNK; ++i)
                if (start + i < tokens)
                    store(y_now + static_cast<long long>(i) * channels, average.step(decay, first, k_now[i], v_now[i]));
        }
    }
    num_out[state] = average.num, den_out[state] = average.den, top_out[state] = average.top;
}
