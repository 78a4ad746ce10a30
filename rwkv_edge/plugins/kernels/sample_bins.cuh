// Bins of weights, and the search from the largest down.
#pragma once
#include "sample.cuh"

constexpr int REST = 19;                  // bits of a weight below those of its bin
constexpr int BINS = 2048;                // 0x3f800000 >> 19, the bin of weight 1, is 2032
constexpr unsigned ONE = 0x3f800000;
constexpr int COUNT_AT = 40;              // a bin of the histogram: the count above, the sum of rests below
constexpr unsigned NO_COUNT = 0xffffffff;
constexpr Mass NO_MASS = ~0ull;

// What top-k and top-p have found, for one stream.
struct Cut {
    Mass mass;        // of all bins above
    Mass target;      // of top-p; NO_MASS: none
    unsigned wanted;  // of top-k; NO_COUNT: none
    unsigned above;   // tokens in all bins above
    int bin;          // that holds the smallest weight kept; -1: all are kept
    int unused;
};

// The bits of exp(x), x <= 0; what is no number becomes 1, and the kernel that draws finds out.
__device__ __forceinline__ unsigned weight_bits(float x) {
    const unsigned bits = __float_as_uint(expf(x));
    return bits < ONE ? bits : ONE;
}

// The bits of a bin's smallest mantissa.
__device__ __forceinline__ Mass leading_bits(int bin) {
    return 0x800000u | (static_cast<unsigned>(bin) << REST & 0x7fffff);
}

__device__ __forceinline__ float largest(const float* tops) {
    __shared__ float found[WARPS];
    float top = -infinity();
    for (int i = threadIdx.x; i < COUNT; i += THREADS) top = fmaxf(top, tops[i]);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(EVERY_LANE, top, step));
    if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = top;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) top = fmaxf(top, found[warp]);
    return top;
}

struct Bin {
    unsigned count;
    Mass units;
};

// Sums over the threads up to this one.
__device__ __forceinline__ Bin running_sum(Bin sum) {
    __shared__ unsigned counts[WARPS];
    __shared__ Mass units[WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const unsigned count = __shfl_up_sync(EVERY_LANE, sum.count, step);
        const Mass unit = __shfl_up_sync(EVERY_LANE, sum.units, step);
        if (lane >= step) sum.count += count, sum.units += unit;
    }
    if (lane == 31) counts[warp] = sum.count, units[warp] = sum.units;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < WARPS; ++i)
        if (i < warp) sum.count += counts[i], sum.units += units[i];
    __syncthreads();
    return sum;
}
struct Found {
    int bin;
    unsigned above;  // counts of the bins above
    Mass units;      // and their units
};

// A thread has bins[i] at this place, so that the threads in order go from the last bin to the first.
template <int bins> __device__ __forceinline__ int place_of_bin(int i) {
    return bins - 1 - (static_cast<int>(threadIdx.x) * (bins / THREADS) + i);
}

// Sums of a thread's own bins.
template <int each> __device__ __forceinline__ Bin sum_of(const Bin (&mine)[each]) {
    Bin sum{0, 0};
#pragma unroll
    for (int i = 0; i < each; ++i) sum.count += mine[i].count, sum.units += mine[i].units;
    return sum;
}

// The first bin, from the last down, with which `enough(count, units)` of the sums is true; it is true for the sums of
// all bins. `upto` are the running sums of `sum_of(mine)`. Every thread gets it.
template <int bins, typename Enough>
__device__ __forceinline__ Found reached(const Bin (&mine)[bins / THREADS], Bin upto, Enough enough) {
    __shared__ Found found;
    const Bin own = sum_of(mine);
    unsigned count = upto.count - own.count;
    Mass sum = upto.units - own.units;
    // counts and units only grow: one thread has the bin before which there is not enough, and with which there is
    bool before = enough(count, sum);
#pragma unroll
    for (int i = 0; i < bins / THREADS; ++i) {
        const bool with = enough(count + mine[i].count, sum + mine[i].units);
        if (with && !before) found = {place_of_bin<bins>(i), count, sum};
        before = with, count += mine[i].count, sum += mine[i].units;
    }
    __syncthreads();
    return found;
}
