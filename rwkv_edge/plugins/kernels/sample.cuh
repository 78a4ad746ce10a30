// What the sampling kernels share: weights in fixed point, scans and maxima over a block, the last block of a stream.
//
// A weight is exp(score - the largest score) in float. Sums of weights are integers, so that they are the same in any
// order: units of 2^-46, what a weight has below is cut off. Blocks of a stream work on slices of its vocabulary; the
// last of them to arrive goes on alone with what all have written.
//
// Compile-time parameters (-D), beside ACT of common.cuh:
//   KERNEL      name of the entry point
//   VOCABULARY  V, a multiple of 4
//   THREADS     of a block
//   SLICE       tokens of a block, 4 for each thread; grid (slices, streams)
//   COUNT       largest values of a stream that the kernel before has left
//   STREAMS     of the whole state, of which the kernel may have some
//   RING        places of fractions and of drawn tokens
#pragma once
#include "common.cuh"

typedef unsigned long long Mass;

constexpr int WARPS = THREADS / 32;
constexpr int SLICES = (VOCABULARY + SLICE - 1) / SLICE;
static_assert(SLICE == 4 * THREADS && SLICES <= THREADS, "a thread has four tokens of a slice, and one slice");
static_assert(VOCABULARY % 4 == 0 && VOCABULARY <= 1 << 17, "sums of weights must fit 63 bits");

constexpr int NO_TOKEN = -1, NOT_A_NUMBER = -2, NONE_LEFT = -3;  // in the place of a drawn token
constexpr int NOWHERE = 0x7fffffff;
__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// How a stream draws; `rwkv_edge.plugins.sampling.SETTINGS` has the same layout.
struct Settings {
    Mass top_p;  // in units of 2^-63; 2^63 keeps all
    double presence, frequency, decay;
    float repetition, temperature, min_p;
    int top_k;  // 0 keeps all
};

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// What other blocks have written lies in the second cache; the first may hold what was there before.
__device__ __forceinline__ unsigned fresh(const unsigned* from) {
    unsigned x;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(x) : "l"(from));
    return x;
}
__device__ __forceinline__ Mass fresh(const Mass* from) {
    Mass x;
    asm volatile("ld.global.cg.u64 %0, [%1];" : "=l"(x) : "l"(from));
    return x;
}

// Whether all other blocks of the stream have arrived; what they wrote before may be read then.
__device__ __forceinline__ bool is_last(unsigned* arrived) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicInc(arrived, gridDim.x - 1) == gridDim.x - 1;
    __syncthreads();
    __threadfence();
    return last;
}

// `units` of 2^(exponent - 150) in those of a Mass; the exponent is that of a float's bits.
__device__ __forceinline__ Mass fixed(Mass units, int exponent) {
    const int shift = exponent - 104;  // 150 - 46
    if (shift >= 0) return units << shift;
    return shift > -64 ? units >> -shift : 0;
}
__device__ __forceinline__ Mass mass_of(float weight) {
    const unsigned bits = __float_as_uint(weight);
    return fixed((bits & 0x7fffff) | 0x800000, bits >> 23);
}

// total * part / 2^63, rounded up
__device__ __forceinline__ Mass share(Mass total, Mass part) {
    const Mass high = __umul64hi(total, part), low = total * part;
    return (high << 1 | low >> 63) + ((low << 1) != 0);
}

// Sum over the threads up to this one. scratch holds WARPS values.
template <typename T> __device__ __forceinline__ T running_sum(T x, T* scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const T other = __shfl_up_sync(EVERY_LANE, x, step);
        if (lane >= step) x += other;
    }
    if (lane == 31) scratch[warp] = x;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < WARPS; ++i)
        if (i < warp) x += scratch[i];
    __syncthreads();
    return x;
}

// The largest score and its token, the smallest of equals. +infinity stands for what is not a number too.
struct Best {
    float score;
    int token;

    __device__ __forceinline__ void meet(float other, int at) {
        if (other != other) other = infinity();
        if (other > score || (other == score && at < token)) score = other, token = at;
    }
};

// Of all threads of the block; every thread gets it.
__device__ __forceinline__ Best best_of(Best best) {
    __shared__ float scores[WARPS];
    __shared__ int tokens[WARPS];
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        best.meet(__shfl_xor_sync(EVERY_LANE, best.score, step), __shfl_xor_sync(EVERY_LANE, best.token, step));
    __syncthreads();
    if (threadIdx.x % 32 == 0) scores[threadIdx.x / 32] = best.score, tokens[threadIdx.x / 32] = best.token;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) best.meet(scores[warp], tokens[warp]);
    return best;
}
template <int count> __device__ __forceinline__ Best best_of(const float* scores, const int* tokens) {
    Best best{-infinity(), NOWHERE};
    for (int i = threadIdx.x; i < count; i += THREADS)
        best.meet(
            __uint_as_float(fresh(reinterpret_cast<const unsigned*>(scores) + i)),
            static_cast<int>(fresh(reinterpret_cast<const unsigned*>(tokens) + i)));
    return best_of(best);
}

// Where the token of a stream goes.
struct Ends {
    int* token;      // that is fed next
    int* history;    // [RING, STREAMS], memory of the host
    unsigned* turn;  // steps so far: the place in both rings
    int* accepted;   // 0: the counts of the penalties lack the token
    int* halted;
    const int* stops;  // their number, then the tokens that halt a stream

    // One thread of a stream does this, once a step.
    __device__ __forceinline__ void give(int drawn) const {
        const unsigned now = *turn;
        *turn = now + 1;
        history[now % RING * STREAMS] = drawn;
        if (drawn == NO_TOKEN) return;
        bool stop = drawn < 0;
        for (int i = 1; i <= stops[0]; ++i) stop = stop || drawn == stops[i];
        if (stop) *halted = 1;
        if (drawn < 0) return;
        *token = drawn, *accepted = 0;
    }
};
