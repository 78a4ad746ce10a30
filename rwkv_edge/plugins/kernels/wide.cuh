// What the wide kernels of RWKV-7 and 7a share: those that compute M = B*T rows at once (row b*T + t), for prompts and for
// large batches. Rows that feed a matrix are in ACT, everything else is float.
//
// Compile-time parameters (-D), beside those of common.cuh:
//   WEIGHT  Float, Half or Brain: the type of matrices; ACT is that of vectors, token-shift states and products' inputs
//   WIDTH   D, a multiple of 8, and INNER, A = H * HEAD, of the kernels that need them
// Numbers that change from launch to launch are 8 bytes wide, as pointers are.
#pragma once
#include "common.cuh"

typedef WEIGHT Weight;
typedef long long Number;

constexpr int WARPS = THREADS / 32;
constexpr float DECAY_SCALE = -0.6065306597126334f;  // -exp(-0.5)

// Programmatic dependent launch, as in fused.cuh: before it waits a kernel reads only what the one ahead does not write.
__device__ __forceinline__ void wait_for_rows() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ float logistic(float x) { return 1.0f / (1.0f + __expf(-x)); }

__device__ constexpr int power_above(int least) {
    int power = 1;
    while (power < least) power *= 2;
    return power;
}

// Neighbouring values, rounded and stored at once.
__device__ __forceinline__ void put4(float* to, const float (&x)[4]) { store4(to, x); }
template <typename T> __device__ __forceinline__ void put4(T* to, const float (&x)[4]) {
    T part[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) store(part + e, x[e]);
    uint2 raw;
    raw.x = part[0].bits | static_cast<unsigned>(part[1].bits) << 16;
    raw.y = part[2].bits | static_cast<unsigned>(part[3].bits) << 16;
    *reinterpret_cast<uint2*>(to) = raw;
}
