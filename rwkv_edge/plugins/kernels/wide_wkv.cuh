// One warp has all channels of a head of one row: what comes before the recurrence, and what comes after it.
#pragma once
#include "wide.cuh"

constexpr int CHANNELS = (HEAD + 31) / 32;  // of a lane: lane, lane + 32, ...

// The vectors of one row that the recurrence reads.
struct Row {
    float r[CHANNELS], w[CHANNELS], k[CHANNELS], v[CHANNELS], a[CHANNELS];

    __device__ __forceinline__ void load(const float* r_, const float* w_, const float* k_, const float* v_,
                                         const float* a_, long long at, bool there) {
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            const int n = threadIdx.x % 32 + 32 * c;
            r[c] = k[c] = v[c] = a[c] = 0.0f, w[c] = 1.0f;
            if (there && n < HEAD) r[c] = r_[at + n], w[c] = w_[at + n], k[c] = k_[at + n], v[c] = v_[at + n], a[c] = a_[at + n];
        }
    }
};

// Parameters of a head.
struct Head {
    float k_k[CHANNELS], k_a[CHANNELS], r_k[CHANNELS];

    __device__ __forceinline__ Head(const float* k_k_, const float* k_a_, const float* r_k_, int channel) {
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            const int n = channel + min(static_cast<int>(threadIdx.x) % 32 + 32 * c, HEAD - 1);
            k_k[c] = k_k_[n], k_a[c] = k_a_[n], r_k[c] = r_k_[n];
        }
    }
    // k becomes the key, kk the removal key, b its negative times the rate; returns the sum over r, k and r_k
    __device__ __forceinline__ float prepare(Row& row, float (&kk)[CHANNELS], float (&b)[CHANNELS]) const {
        removal_key(row.k, kk);
        float bonus = 0.0f;
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            row.k[c] *= (row.a[c] - 1.0f) * k_a[c] + 1.0f;
            bonus += row.r[c] * row.k[c] * r_k[c];
            b[c] = -kk[c] * row.a[c];
        }
        return sum_lanes<32>(bonus);
    }
    __device__ __forceinline__ void removal_key(const float (&k)[CHANNELS], float (&kk)[CHANNELS]) const {
        float square = 0.0f;
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) kk[c] = k[c] * k_k[c], square += kk[c] * kk[c];
        const float inverse = 1.0f / fmaxf(sqrtf(sum_lanes<32>(square)), 1e-12f);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) kk[c] *= inverse;
    }
};

// Group norm of y, bonus, gate, rounding: one head of one row.
__device__ __forceinline__ void give_head(const float (&y)[CHANNELS], const float (&v)[CHANNELS], float bonus,
                                          const float (&scale)[CHANNELS], const float (&shift)[CHANNELS],
                                          const float (&gate)[CHANNELS], Act* to) {
    float mean = 0.0f, square = 0.0f;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) mean += y[c];  // zero past the head
    mean = sum_lanes<32>(mean) / HEAD;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c)
        if (threadIdx.x % 32 + 32 * c < HEAD) square += (y[c] - mean) * (y[c] - mean);
    const float inverse = rsqrtf(sum_lanes<32>(square) / HEAD + 64e-5f);
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
        const int n = threadIdx.x % 32 + 32 * c;
        if (n < HEAD) store(to + n, ((y[c] - mean) * inverse * scale[c] + shift[c] + bonus * v[c]) * gate[c]);
    }
}

__device__ __forceinline__ void load_channels(float (&to)[CHANNELS], const float* from) {
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
        const int n = threadIdx.x % 32 + 32 * c;
        to[c] = n < HEAD ? from[n] : 0.0f;
    }
}
