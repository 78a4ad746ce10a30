// What the fused kernels share: matrix-vector products over columns, the layer norm before them, launch order.
//
// A weight is stored [K, N] (row k holds what input k adds to every output). A block computes TILE columns for all rows
// of the batch: a warp reads pieces of 16 bytes of neighbouring columns, the block's threads share out the rows k, and
// sums meet in registers, then in shared memory. Inputs are in shared memory as float; sums are float.
//
// Compile-time parameters (-D), beside those of common.cuh:
//   WEIGHT   Float, Half or Brain: the type of matrices; ACT is that of vectors, scales and token-shift states
//   INT8     which matrices of the kernel are int8 instead, a bit for each in the order of its arguments. Such a matrix
//            has a scale for each column; the arguments `..._scale` of matrices in float are not read.
//   INT4     the same for int4: two columns a byte, the first in the low half, and scales [K / BLOCK, N]
//   BLOCK    inputs that share a scale in int4
//   BATCH    streams, 1 to 8
//   WIDTH    D, a multiple of 8
//   TILE     columns of a block
//   PARTS    partial sums that the kernel before left for the residual stream, 0 for none
//   AHEAD    loads of a thread that are in flight at once
//   RING     bytes of shared memory for them; a kernel's inputs lie behind
//   EAGER    1: the next kernel is let in at once, else when the wait for the one before has ended
//   HALVE    1: the residual stream is halved when it is summed
//   BEFORE   1: a token-shift mix is before + (x - before)*mix, else x + (before - x)*mix
//   HALT     1: streams may be halted. Their state stays as it is: matrices are not written, token shifts are copied.
#pragma once
#include "common.cuh"

typedef WEIGHT Weight;
struct Int8 { signed char bits; };
struct Int4 { unsigned char pair; };
#if INT8
typedef Int8 Matrix;  // of a kernel with one matrix
#elif INT4
typedef Int4 Matrix;
#else
typedef Weight Matrix;
#endif

constexpr int WARPS = THREADS / 32;
constexpr int LOAD4 = BATCH > 4 ? 4 : BATCH > 2 ? 8 : 16;  // bytes of a load of int4: sums of all its columns fit registers

// Bytes of a load, and weights in it.
template <typename T> constexpr int BYTES = 16;
template <> constexpr int BYTES<Int4> = LOAD4;
template <typename T> constexpr int PER = 16 / sizeof(T);
template <> constexpr int PER<Int4> = 2 * LOAD4;

// A kernel may start before the one ahead of it in the stream has ended (programmatic dependent launch): before it waits
// it reads only weights, and states of the step before. The one ahead has itself waited, so after the wait all that any
// kernel before wrote may be read, and nothing that is still read is overwritten.
__device__ __forceinline__ void let_next_in() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
    if (EAGER) let_next_in();
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    if (!EAGER) let_next_in();
}

template <int bytes> struct Raw { typedef uint4 type; };
template <> struct Raw<8> { typedef uint2 type; };
template <> struct Raw<4> { typedef uint1 type; };

// Copies into shared memory that run on their own (sm_80), in groups that arrive in order.
template <int bytes> __device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
    const unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(to));
    const int count = valid ? bytes : 0;  // what is not read is filled with zeros
    if (bytes == 16)
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(count) : "memory");
    else
        asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %3, %2;"
                     :: "r"(place), "l"(from), "r"(count), "n"(bytes) : "memory");
#else
    typedef typename Raw<bytes>::type Piece;
    Piece piece = {};
    if (valid) piece = *static_cast<const Piece*>(from);
    *static_cast<Piece*>(to) = piece;
#endif
}
__device__ __forceinline__ void close_group() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// All groups but the `open` last ones have arrived.
template <int open> __device__ __forceinline__ void wait_groups() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(open) : "memory");
#endif
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

// Four bits moved to the first places behind the point of 1.5 and the sign's turned: 1.5 + q / 16, exactly.
__device__ __forceinline__ void widen_word(float* out, unsigned word) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const unsigned moved = i < 5 ? word << (19 - 4 * i) : word >> (4 * i - 19);
        out[i] = __uint_as_float((moved & 0x00780000u) ^ 0x3fc00000u);
    }
}
__device__ __forceinline__ void widen_raw(float (&out)[32], uint4 raw, Int4) {
    widen_word(out, raw.x), widen_word(out + 8, raw.y), widen_word(out + 16, raw.z), widen_word(out + 24, raw.w);
}
__device__ __forceinline__ void widen_raw(float (&out)[16], uint2 raw, Int4) {
    widen_word(out, raw.x), widen_word(out + 8, raw.y);
}
__device__ __forceinline__ void widen_raw(float (&out)[8], uint1 raw, Int4) { widen_word(out, raw.x); }

__device__ constexpr int power_of_two(int least) {
    int power = 1;
    while (power < least) power *= 2;
    return power;
}
__device__ constexpr int power_up_to(int most) {
    int power = 1;
    while (2 * power <= most) power *= 2;
    return power;
}
__device__ constexpr int least_of(int a, int b) { return a < b ? a : b; }

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

// Where input `row` lies in shared memory: with int4, every 32 rows are moved by 16 bytes, since then the threads of a warp
// read rows that are a block apart.
__device__ constexpr int skewed(int row) { return INT4 ? row + row / 32 * 4 : row; }

// Threads that read a row of a tile, where one warp does.
template <typename T> __device__ constexpr int lanes_of(int tile) { return power_of_two((tile + PER<T> - 1) / PER<T>); }

// `rows` rows of a matrix, `tile` of its columns, a row by `span` threads. A thread's loads go through a ring of its own
// in shared memory, so that no barrier is needed: prefetch() and add() keep at most `ahead` of them in flight.
template <typename T, int rows, int tile, int ahead = AHEAD, int span = lanes_of<T>(tile)> struct Columns {
    static constexpr int MANY = PER<T>;
    static constexpr int SPAN = span;
    static constexpr int GROUPS = THREADS / SPAN;  // rows read at once
    static constexpr int TURNS = (rows + GROUPS - 1) / GROUPS;
    static constexpr int BURST = least_of(least_of(TURNS, ahead), 4);  // loads that are waited for together
    static constexpr int DEPTH = (least_of(TURNS, ahead) + BURST - 1) / BURST * BURST;
    static constexpr int ROOM = DEPTH * THREADS * BYTES<T>;  // of the ring, in bytes
    static_assert(GROUPS >= 1, "a block reads whole rows of its tile");
    static_assert(ROOM <= RING, "the ring is too small");
    typedef typename Raw<BYTES<T>>::type Piece;

    const T* from;
    Piece* ring;
    long long jump;
    int group, limit;
    bool inside;

    // Columns `first` to `first + tile` of a matrix of `columns`, of the rows from `top` on; those from `top + most` on
    // count as zeros. `ring` is where its loads go.
    __device__ __forceinline__ Columns(const T* matrix, int columns, int top, int first, void* room, int most = rows) {
        const int lane = threadIdx.x % SPAN;
        group = threadIdx.x / SPAN;
        limit = most;
        inside = group < GROUPS && lane * MANY < tile && first + lane * MANY < columns;
        from = inside ? matrix + static_cast<long long>(top + group) * columns + first + lane * MANY : matrix;
        jump = static_cast<long long>(GROUPS) * columns;
        ring = static_cast<Piece*>(room) + threadIdx.x;
    }
    __device__ __forceinline__ void fetch(int slot, int turn) {
        const bool valid = inside && group + turn * GROUPS < limit;
        copy_async<BYTES<T>>(ring + slot * THREADS, valid ? from + turn * jump : from, valid);
    }
    __device__ __forceinline__ void prefetch() {
#pragma unroll
        for (int turn = 0; turn < DEPTH; ++turn) {
            fetch(turn, turn);
            if (turn % BURST == BURST - 1) close_group();
        }
    }
    // sums[b][e] += x[b * pitch + row] * matrix[row][e] over all rows; lanes beyond the columns add zeros
    __device__ __forceinline__ void add(float (&sums)[BATCH][MANY], const float* x, int pitch) {
        int slot = 0;
#pragma unroll 1  // a burst of code at a time: all of it would compile for seconds and miss the instruction cache
        for (int first = 0; first < TURNS; first += BURST) {
            Piece raw[BURST];
            wait_groups<DEPTH / BURST - 1>();
#pragma unroll
            for (int i = 0; i < BURST; ++i) raw[i] = ring[(slot + i) * THREADS];
            if (DEPTH < TURNS)
#pragma unroll
                for (int i = 0; i < BURST; ++i) fetch(slot + i, first + i + DEPTH);
            close_group();
            slot = slot + BURST == DEPTH ? 0 : slot + BURST;
#pragma unroll
            for (int i = 0; i < BURST; ++i) {
                const int row = group + (first + i) * GROUPS;
                float weights[MANY];
                widen_raw(weights, raw[i], T{});
#pragma unroll
                for (int b = 0; b < BATCH; ++b) {
                    const float input = row < limit ? x[b * pitch + skewed(row)] : 0.0f;
#pragma unroll
                    for (int e = 0; e < MANY; ++e) sums[b][e] += input * weights[e];
                }
            }
        }
    }
};

#if INT4
// A thread has rows of one block of BLOCK inputs at a time, so that a scale is applied once for all of them: SHARE threads
// of neighbouring groups take turns in a block's rows.
template <int rows, int tile, int ahead, int span> struct Columns<Int4, rows, tile, ahead, span> {
    static constexpr int MANY = PER<Int4>;
    static constexpr int SPAN = span;
    static constexpr int GROUPS = THREADS / SPAN;
    static constexpr int BLOCKS = rows / BLOCK;
    static constexpr int SHARE = least_of(power_up_to(GROUPS / BLOCKS), BLOCK / 4);
    static constexpr int STRIDE = GROUPS / SHARE;                    // blocks under way at once
    static constexpr int SEGMENTS = (BLOCKS + STRIDE - 1) / STRIDE;  // blocks of a thread, one after another
    static constexpr int STEPS = BLOCK / SHARE;                      // rows of a block that a thread has
    static constexpr int TURNS = SEGMENTS * STEPS;
    static constexpr int BURST = 4;
    static constexpr int DEPTH = least_of(TURNS, (ahead + BURST - 1) / BURST * BURST);
    static constexpr int ROOM = DEPTH * THREADS * LOAD4;
    static_assert(GROUPS >= 1, "a block reads whole rows of its tile");
    static_assert(rows % BLOCK == 0, "a slice of the rows holds whole blocks");
    static_assert(ROOM <= RING, "the ring is too small");
    typedef typename Raw<LOAD4>::type Piece;

    const unsigned char* from;
    const Act* scale;
    Piece* ring;
    long long pitch_bytes;
    int columns, first_row, block, limit;
    bool inside;
    Packed<Act> scales[MANY / 4];

    // See the other; `scales_from` are the matrix's, [K / BLOCK, columns].
    __device__ __forceinline__ Columns(
        const Int4* matrix, int all, int top, int first, void* room, int most, const Act* scales_from) {
        const int lane = threadIdx.x % SPAN, group = threadIdx.x / SPAN;
        columns = all, limit = most, block = group / SHARE, first_row = group % SHARE;
        inside = group < GROUPS && lane * MANY < tile && first + lane * MANY < all;
        pitch_bytes = all / 2;
        from = inside ? &matrix->pair + top * pitch_bytes + (first + lane * MANY) / 2 : &matrix->pair;
        scale = scales_from + static_cast<long long>(top / BLOCK) * all + first + lane * MANY;
        ring = static_cast<Piece*>(room) + threadIdx.x;
    }
    __device__ __forceinline__ int row_of(int turn) const {
        return (block + turn / STEPS * STRIDE) * BLOCK + first_row + turn % STEPS * SHARE;
    }
    __device__ __forceinline__ void fetch(int slot, int turn) {
        const int row = row_of(turn);
        const bool valid = inside && row < limit;
        copy_async<LOAD4>(ring + slot * THREADS, valid ? from + row * pitch_bytes : from, valid);
    }
    __device__ __forceinline__ void fetch_scales(int segment) {
        const int at = block + segment * STRIDE;
#pragma unroll
        for (int i = 0; i < MANY / 4; ++i) {
            scales[i] = zero4<Act>();
            if (inside && at * BLOCK < limit) scales[i] = fetch4(scale + static_cast<long long>(at) * columns + 4 * i);
        }
    }
    __device__ __forceinline__ void prefetch() {
#pragma unroll
        for (int turn = 0; turn < DEPTH; ++turn) {
            fetch(turn, turn);
            if (turn % BURST == BURST - 1) close_group();
        }
        fetch_scales(0);
    }
    // sums[b][e] += x[row] * q[row][e] * scale of the row's block; x is skewed
    __device__ __forceinline__ void add(float (&sums)[BATCH][MANY], const float* x, int pitch) {
        int slot = 0;
#pragma unroll 1
        for (int segment = 0; segment < SEGMENTS; ++segment) {
            float part[BATCH][MANY] = {}, total[BATCH] = {};
#pragma unroll 1
            for (int first = 0; first < STEPS; first += BURST) {
                Piece raw[BURST];
                wait_groups<DEPTH / BURST - 1>();
#pragma unroll
                for (int i = 0; i < BURST; ++i) raw[i] = ring[(slot + i) * THREADS];
                if (DEPTH < TURNS)
#pragma unroll
                    for (int i = 0; i < BURST; ++i) {
                        const int turn = segment * STEPS + first + i + DEPTH;
                        if (turn < TURNS) fetch(slot + i, turn);
                    }
                close_group();
                slot = slot + BURST == DEPTH ? 0 : slot + BURST;
#pragma unroll
                for (int i = 0; i < BURST; ++i) {
                    const int row = row_of(segment * STEPS + first + i);
                    float weights[MANY];
                    widen_raw(weights, raw[i], Int4{});
#pragma unroll
                    for (int b = 0; b < BATCH; ++b) {
                        const float input = row < limit ? x[b * pitch + skewed(row)] : 0.0f;
                        total[b] += input;
#pragma unroll
                        for (int e = 0; e < MANY; ++e) part[b][e] += input * weights[e];
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < MANY / 4; ++i) {
                float wide[4];
                widen4(wide, scales[i]);
#pragma unroll
                for (int b = 0; b < BATCH; ++b)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        sums[b][4 * i + e] += 16.0f * wide[e] * (part[b][4 * i + e] - 1.5f * total[b]);
            }
            if (segment + 1 < SEGMENTS) fetch_scales(segment + 1);
        }
    }
};
#endif

// Columns of whichever type; the scales matter for int4 alone.
template <typename T, int rows, int tile, int ahead = AHEAD, int span = lanes_of<T>(tile)> struct Opened {
    typedef Columns<T, rows, tile, ahead, span> Found;
    static __device__ __forceinline__ Found from(
        const void* matrix, const Act*, int columns, int top, int first, void* room, int most = rows) {
        return Found(static_cast<const T*>(matrix), columns, top, first, room, most);
    }
};
#if INT4
template <int rows, int tile, int ahead, int span> struct Opened<Int4, rows, tile, ahead, span> {
    typedef Columns<Int4, rows, tile, ahead, span> Found;
    static __device__ __forceinline__ Found from(
        const void* matrix, const Act* scale, int columns, int top, int first, void* room, int most = rows) {
        return Found(static_cast<const Int4*>(matrix), columns, top, first, room, most, scale);
    }
};
#endif

// Sums of the groups of a warp: to[b * tile + column] for the columns of this warp. Every step halves what a lane holds.
template <int SPAN, int MANY>
__device__ __forceinline__ void warp_sums(float (&sums)[BATCH][MANY], float* to, int tile) {
    static_assert(SPAN <= 32, "a row of the tile is read by one warp");
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
constexpr int PITCH = skewed(WIDTH);  // floats from one stream's inputs to the next one's
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

// Which streams are halted: decided by the step before.
struct Halted {
#if HALT
    const int* flags;
    __device__ __forceinline__ bool stream(int b) const { return flags[b] != 0; }
#else
    __device__ __forceinline__ bool stream(int) const { return false; }
#endif
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
                if (HALVE)
#pragma unroll
                    for (int e = 0; e < 4; ++e) x[b][q][e] *= 0.5f;
            }
    }
    // Rows of the embedding; in int8 each has a scale.
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
    __device__ __forceinline__ void load_rows(const int* tokens, const Int8* table, const Act* scales) {
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            const float scale = widen(scales[tokens[b]]);
#pragma unroll
            for (int q = 0; q < QUADS; ++q) {
                const int d = place(q);
                char4 four = {};
                if (d < WIDTH) four = *reinterpret_cast<const char4*>(table + static_cast<long long>(tokens[b]) * WIDTH + d);
                x[b][q][0] = four.x * scale, x[b][q][1] = four.y * scale;
                x[b][q][2] = four.z * scale, x[b][q][3] = four.w * scale;
            }
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
    // to[b][d] = x + (before - x)*mix, or the other way round; the new token-shift state is x
    __device__ __forceinline__ void shift(float* to, const Rows& before, const Vector& mix) const {
#pragma unroll
        for (int q = 0; q < QUADS; ++q) {
            if (place(q) >= WIDTH) continue;
            float share[4];
            widen4(share, mix.quad[q]);
            if (BEFORE)
#pragma unroll
                for (int e = 0; e < 4; ++e) share[e] = 1.0f - share[e];
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                float old[4], mixed[4];
                widen4(old, before.row[b].quad[q]);
#pragma unroll
                for (int e = 0; e < 4; ++e) mixed[e] = x[b][q][e] + (old[e] - x[b][q][e]) * share[e];
                store4(to + b * PITCH + skewed(place(q)), mixed);
            }
        }
    }
    // to[b][d] = x, as the input of a product
    __device__ __forceinline__ void give(float* to) const {
#pragma unroll
        for (int b = 0; b < BATCH; ++b)
#pragma unroll
            for (int q = 0; q < QUADS; ++q)
                if (place(q) < WIDTH) store4(to + b * PITCH + skewed(place(q)), x[b][q]);
    }
    // The new token-shift state: x, or what it was where a stream is halted.
    __device__ __forceinline__ void keep_act(Act* to, const Rows& before, const Halted& halted) const {
#pragma unroll
        for (int b = 0; b < BATCH; ++b)
#pragma unroll
            for (int q = 0; q < QUADS; ++q)
                if (place(q) < WIDTH) {
                    if (halted.stream(b)) {
                        *reinterpret_cast<Packed<Act>*>(to + b * WIDTH + place(q)) = before.row[b].quad[q];
                        continue;
                    }
#pragma unroll
                    for (int e = 0; e < 4; ++e) store(to + b * WIDTH + place(q) + e, x[b][q][e]);
                }
    }
};
