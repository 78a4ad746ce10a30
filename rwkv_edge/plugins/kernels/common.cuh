// Activation types, 4-element loads and sums over lanes, without any header of CUDA: NVRTC compiles this alone.
//
// Compile-time parameters of all kernels (-D):
//   KERNEL          name of the entry point
//   ACT             Float, Half or Brain: the type of r, k, v, kk, a and y. States, decays and bonuses are always float.
//   HEAD            head size N, a multiple of 4
//   THREADS, LANES  threads of a block; threads that share one row (or column group) of a state
#pragma once

typedef float Float;
struct Half { unsigned short bits; };
struct Brain { unsigned short bits; };  // bfloat16
typedef ACT Act;

// Four consecutive values as they lie in memory: 16 bytes of float, 8 of the 16-bit types.
template <typename T> struct Packed { uint2 raw; };
template <> struct Packed<float> { float4 raw; };

template <typename T> __device__ __forceinline__ Packed<T> fetch4(const T* from) {
    return *reinterpret_cast<const Packed<T>*>(from);
}

template <typename T> __device__ __forceinline__ Packed<T> zero4() {
    Packed<T> packed;
    packed.raw = {};
    return packed;
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(Half x) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
}
__device__ __forceinline__ float widen(Brain x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

__device__ __forceinline__ void widen4(float (&out)[4], Packed<float> in) {
    out[0] = in.raw.x, out[1] = in.raw.y, out[2] = in.raw.z, out[3] = in.raw.w;
}
template <typename T> __device__ __forceinline__ void widen4(float (&out)[4], Packed<T> in) {
    out[0] = widen(T{static_cast<unsigned short>(in.raw.x)}), out[1] = widen(T{static_cast<unsigned short>(in.raw.x >> 16)});
    out[2] = widen(T{static_cast<unsigned short>(in.raw.y)}), out[3] = widen(T{static_cast<unsigned short>(in.raw.y >> 16)});
}

__device__ __forceinline__ void store(float* to, float x) { *to = x; }
__device__ __forceinline__ void store(Half* to, float x) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
}
// Round to nearest even in integers: the instruction needs sm_80, Turing has none. NaN stays NaN.
__device__ __forceinline__ void store(Brain* to, float x) {
    const unsigned bits = __float_as_uint(x);
    to->bits = x != x ? 0x7fff : static_cast<unsigned short>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

__device__ __forceinline__ void load4(float (&out)[4], const float* from) {
    widen4(out, fetch4(from));
}
__device__ __forceinline__ void store4(float* to, const float (&x)[4]) {
    *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
}

constexpr unsigned WARP = 32;
constexpr unsigned EVERY_LANE = 0xffffffffu;

// Sum over groups of `lanes` neighbours; every lane gets it.
template <int lanes> __device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
    for (int step = 1; step < lanes; step *= 2) x += __shfl_xor_sync(EVERY_LANE, x, step);
    return x;
}

// Four sums over groups of `lanes` >= 4 neighbours, lane l getting the sum of x[l % 4]: half the shuffles of sum_lanes.
template <int lanes> __device__ __forceinline__ float scatter_sum4(const float (&x)[4], int lane) {
    const bool odd = lane & 1, high = lane & 2;
    float low_pair = odd ? x[1] : x[0], high_pair = odd ? x[3] : x[2];
    low_pair += __shfl_xor_sync(EVERY_LANE, odd ? x[0] : x[1], 1);
    high_pair += __shfl_xor_sync(EVERY_LANE, odd ? x[2] : x[3], 1);
    float mine = high ? high_pair : low_pair;
    mine += __shfl_xor_sync(EVERY_LANE, high ? low_pair : high_pair, 2);
#pragma unroll
    for (int step = 4; step < lanes; step *= 2) mine += __shfl_xor_sync(EVERY_LANE, mine, step);
    return mine;
}
