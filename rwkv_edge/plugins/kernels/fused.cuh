// What the fused kernels of RWKV-7 share: matrix-vector products over columns, the layer norm before them, launch order.
//
// A weight is stored [K, N] (row k holds what input k adds to every output). A block computes TILE columns for all rows
// of the batch: a warp reads pieces of 16 bytes of neighbouring columns, the block's threads share out the rows k, and
// sums meet in registers, then in shared memory. Inputs are in shared memory as float; sums are float.
//
// Compile-time parameters (-D), beside those of common.cuh:
//   WEIGHT   Float, Half or Brain: the type of matrices; ACT is that of vectors, scales and token-shift states
//   INT8     which matrices of the kernel are int8 instead, a bit for each in the order of its arguments. Such a matrix
//            has a scale for each column; the arguments `..._scale` of the others are not read.
//   BATCH    streams, 1 to 8
//   WIDTH    D, a multiple of 8
//   TILE     columns of a block
//   PARTS    partial sums that the kernel before left for the residual stream, 0 for none
//   AHEAD    loads of a thread that are in flight at once
#pragma once
#include "common.cuh"

typedef WEIGHT Weight;
struct Int8 { signed char bits; };
#if INT8
typedef Int8 Matrix;  // of a kernel with one matrix that may be int8
#else
typedef Weight Matrix;
#endif

template <typename T> constexpr int PER = 16 / sizeof(T);  // weights of one load
constexpr int WARPS = THREADS / 32;

// A kernel may start before the one ahead of it in the stream has ended (programmatic dependent launch): before it waits
// it reads only what that one does not write. The next kernel is let in after the wait, so that at most two of a chain
// are under way, and what an earlier one wrote may be read at once: weights, and states of the step before.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ uint4 load_once(const void* from) {
    uint4 raw;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
                 : "l"(from));
    return raw;
}

__device__ __forceinline__ void widen_pair(float& low, float& high, unsigned pair, Half) {
    asm("{\n.reg .f16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}"
        : "=f"(low), "=f"(high)
        : "r"(pair));
}
__device__ __forceinline__ void widen_pair(float& low, float& high, unsigned pair, Brain) {
    low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xffff0000u);
}

template <typename T> __device__ __forceinline__ void widen_raw(float (&out)[16 / sizeof(T)], uint4 raw, T kind) {
    widen_pair(out[0], out[1], raw.x, kind), widen_pair(out[2], out[3], raw.y, kind);
    widen_pair(out[4], out[5], raw.z, kind), widen_pair(out[6], out[7], raw.w, kind);
}
__device__ __forceinline__ void widen_raw(float (&out)[4], uint4 raw, Float) {
    out[0] = __uint_as_float(raw.x), out[1] = __uint_as_float(raw.y);
    out[2] = __uint_as_float(raw.z), out[3] = __uint_as_float(raw.w);
}

// A byte moved into the last places of 2^23 is an integer's float: three bytes and the exponent in one permutation.
__device__ __forceinline__ void widen_raw(float (&out)[16], uint4 raw, Int8) {
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const unsigned shifted = words[i / 4] ^ 0x80808080u;  // from -128..127 to 0..255
        out[i] = __uint_as_float(__byte_perm(shifted, 0x4b000000u, 0x7650 + i % 4)) - 8388736.0f;  // 2^23 + 128
    }
}

__device__ constexpr int power_of_two(int least) {
    int power = 1;
    while (power < least) power *= 2;
    return power;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

// `rows` rows of a matrix, `tile` of its columns. Loads are issued by prefetch() and by add(), at most AHEAD at once.
template <typename T, int rows, int tile> struct Columns {
    static constexpr int MANY = PER<T>;
    static constexpr int SPAN = power_of_two((tile + MANY - 1) / MANY);
    static constexpr int GROUPS = THREADS / SPAN;  // rows read at once
    static constexpr int TURNS = (rows + GROUPS - 1) / GROUPS;
    static constexpr int DEPTH = TURNS < AHEAD ? TURNS : AHEAD;
    static_assert(SPAN <= 32 && GROUPS >= 1, "a row of the tile is read by one warp");

    const T* from;
    long long jump;
    int group;
    bool inside;
    uint4 raw[DEPTH];

    // Columns `first` to `first + tile` of a matrix of `columns`, of the rows from `top` on.
    __device__ __forceinline__ Columns(const T* matrix, int columns, int top, int first) {
        const int lane = threadIdx.x % SPAN;
        group = threadIdx.x / SPAN;
        inside = lane * MANY < tile && first + lane * MANY < columns;
        from = matrix + static_cast<long long>(top + group) * columns + first + lane * MANY;
        jump = static_cast<long long>(GROUPS) * columns;
    }
    __device__ __forceinline__ void fetch(int slot, int turn) {
        raw[slot] = {};
        if (inside && group + turn * GROUPS < rows) raw[slot] = load_once(from + turn * jump);
    }
    __device__ __forceinline__ void prefetch() {
#pragma unroll
        for (int turn = 0; turn < DEPTH; ++turn) fetch(turn, turn);
    }
    // sums[b][e] += x[b * pitch + row] * matrix[row][e] over all rows; lanes beyond the columns add zeros
    __device__ __forceinline__ void add(float (&sums)[BATCH][MANY], const float* x, int pitch) {
#pragma unroll 1  // DEPTH turns of code at a time: all of them would compile for seconds and miss the instruction cache
        for (int first = 0; first < TURNS; first += DEPTH) {
#pragma unroll
            for (int slot = 0; slot < DEPTH; ++slot) {
                const int row = group + (first + slot) * GROUPS;
                float weights[MANY];
                widen_raw(weights, raw[slot], T{});
                if (DEPTH < TURNS) fetch(slot, first + slot + DEPTH);
#pragma unroll
                for (int b = 0; b < BATCH; ++b) {
                    const float input = row < rows ? x[b * pitch + row] : 0.0f;
#pragma unroll
                    for (int e = 0; e < MANY; ++e) sums[b][e] += input * weights[e];
                }
            }
        }
    }
};

// Sums of the groups of a warp: to[b * tile + column] for the columns of this warp. Every step halves what a lane holds.
template <int SPAN, int MANY>
__device__ __forceinline__ void warp_sums(float (&sums)[BATCH][MANY], float* to, int tile) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
        int base = lane % SPAN * MANY;
        int count = MANY;
#pragma unroll
        for (int offset = 16; offset >= SPAN; offset /= 2) {
            const bool upper = lane & offset;
            if (count > 1) {
                count /= 2;
#pragma unroll
                for (int e = 0; e < MANY / 2; ++e) {
                    if (e < count) {
                        const float kept = upper ? sums[b][e + count] : sums[b][e];
                        const float sent = upper ? sums[b][e] : sums[b][e + count];
                        sums[b][e] = kept + __shfl_xor_sync(EVERY_LANE, sent, offset);
                    }
                }
                base += upper ? count : 0;
            } else {
                sums[b][0] += __shfl_xor_sync(EVERY_LANE, sums[b][0], offset);
            }
        }
#pragma unroll
        for (int e = 0; e < MANY; ++e)
            if (e < count && base + e < tile) to[b * tile + base + e] = sums[b][e];
    }
}

// Sum over the warps of what warp_sums wrote: warps at `pitch` floats, one value at `index`.
__device__ __forceinline__ float over_warps(const float* from, int pitch, int index) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += from[warp * pitch + index];
    return sum;
}

// Sums over the block of two values for each stream; every thread gets them. scratch holds 2 * WARPS * BATCH floats.
__device__ __forceinline__ void block_sums(float (&values)[2][BATCH], float* scratch) {
#pragma unroll
    for (int b = 0; b < BATCH; ++b)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            values[i][b] = sum_lanes<32>(values[i][b]);
            if (threadIdx.x % 32 == 0) scratch[(threadIdx.x / 32 * 2 + i) * BATCH + b] = values[i][b];
        }
    __syncthreads();
#pragma unroll
    for (int b = 0; b < BATCH; ++b)
#pragma unroll
        for (int i = 0; i < 2; ++i) values[i][b] = over_warps(scratch, 2 * BATCH, i * BATCH + b);
}

// Vectors of WIDTH are spread over the block: thread t has quads t, t + THREADS, ...
constexpr int QUADS = (WIDTH / 4 + THREADS - 1) / THREADS;
__device__ __forceinline__ int place(int quad) { return 4 * (threadIdx.x + quad * THREADS); }

// A vector as it lies in memory, read before the wait: a parameter, or a state that the step before has written.
struct Vector {
    Packed<Act> quad[QUADS];
    __device__ __forceinline__ explicit Vector(const Act* from) {
#pragma unroll
        for (int q = 0; q < QUADS; ++q) quad[q] = place(q) < WIDTH ? fetch4(from + place(q)) : zero4<Act>();
    }
    __device__ __forceinline__ Vector() {}
};
struct Rows {
    Vector row[BATCH];
    __device__ __forceinline__ explicit Rows(const Act* from) {
#pragma unroll
        for (int b = 0; b < BATCH; ++b) row[b] = Vector(from + b * WIDTH);
    }
};

// The residual stream and its layer norm.
struct Stream {
    float x[BATCH][QUADS][4];

    __device__ __forceinline__ void load(const float* stream, const float* parts) {
#pragma unroll
        for (int b = 0; b < BATCH; ++b)
#pragma unroll
            for (int q = 0; q < QUADS; ++q) {
                const int d = place(q);
                x[b][q][0] = x[b][q][1] = x[b][q][2] = x[b][q][3] = 0.0f;
                if (d >= WIDTH) continue;
                load4(x[b][q], stream + b * WIDTH + d);
#pragma unroll
                for (int part = 0; part < PARTS; ++part) {
                    float added[4];
                    load4(added, parts + (part * BATCH + b) * WIDTH + d);
#pragma unroll
                    for (int e = 0; e < 4; ++e) x[b][q][e] += added[e];
                }
            }
    }
    __device__ __forceinline__ void load_rows(const int* tokens, const Act* table) {
#pragma unroll
        for (int b = 0; b < BATCH; ++b)
#pragma unroll
            for (int q = 0; q < QUADS; ++q) {
                const int d = place(q);
                x[b][q][0] = x[b][q][1] = x[b][q][2] = x[b][q][3] = 0.0f;
                if (d < WIDTH) widen4(x[b][q], fetch4(table + static_cast<long long>(tokens[b]) * WIDTH + d));
            }
    }
    __device__ __forceinline__ void keep(float* to) const {
#pragma unroll
        for (int b = 0; b < BATCH; ++b)
#pragma unroll
            for (int q = 0; q < QUADS; ++q)
                if (place(q) < WIDTH) store4(to + b * WIDTH + place(q), x[b][q]);
    }
    // x <- (x - mean) / sqrt(variance + 1e-5) * weight + bias; scratch holds 2 * WARPS * BATCH floats
    __device__ __forceinline__ void normalize(const Vector& weight, const Vector& bias, float* scratch) {
        float sums[2][BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            sums[0][b] = sums[1][b] = 0.0f;
#pragma unroll
            for (int q = 0; q < QUADS; ++q)  // quads beyond the width are zero
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[0][b] += x[b][q][e], sums[1][b] += x[b][q][e] * x[b][q][e];
        }
        block_sums(sums, scratch);
        float mean[BATCH], inverse[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            mean[b] = sums[0][b] / WIDTH;
            inverse[b] = rsqrtf(fmaxf(sums[1][b] / WIDTH - mean[b] * mean[b], 0.0f) + 1e-5f);
        }
#pragma unroll
        for (int q = 0; q < QUADS; ++q) {
            float scale[4], shift[4];
            widen4(scale, weight.quad[q]), widen4(shift, bias.quad[q]);
#pragma unroll
            for (int b = 0; b < BATCH; ++b)
#pragma unroll
                for (int e = 0; e < 4; ++e) x[b][q][e] = (x[b][q][e] - mean[b]) * inverse[b] * scale[e] + shift[e];
        }
    }
    // to[b][d] = x + (before - x) * mix; the new token-shift state is x
    __device__ __forceinline__ void shift(float* to, const Rows& before, const Vector& mix) const {
#pragma unroll
        for (int q = 0; q < QUADS; ++q) {
            if (place(q) >= WIDTH) continue;
            float share[4];
            widen4(share, mix.quad[q]);
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                float old[4], mixed[4];
                widen4(old, before.row[b].quad[q]);
#pragma unroll
                for (int e = 0; e < 4; ++e) mixed[e] = x[b][q][e] + (old[e] - x[b][q][e]) * share[e];
                store4(to + b * WIDTH + place(q), mixed);
            }
        }
    }
    __device__ __forceinline__ void keep_act(Act* to) const {
#pragma unroll
        for (int b = 0; b < BATCH; ++b)
#pragma unroll
            for (int q = 0; q < QUADS; ++q)
                if (place(q) < WIDTH)
#pragma unroll
                    for (int e = 0; e < 4; ++e) store(to + b * WIDTH + place(q) + e, x[b][q][e]);
    }
};
