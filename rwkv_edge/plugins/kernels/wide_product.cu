// Products on tensor cores, in tiles of TILE_M x TILE_N; see wide_product.cuh. ACT and WEIGHT are Half, or Brain (sm_80).
// Integers lie in shared memory as they do in the file, and are widened on their way to the registers.
//
// Further parameters: TILE_K: inputs of a stage; STAGES: stages in shared memory, all but one of them in flight;
// WARPS_M, WARPS_N: how the warps share the tile. THREADS is 32 * WARPS_M * WARPS_N.
// Stages lie in shared memory as pieces of 16 bytes, permuted so that eight rows of one column of pieces meet all banks.
#include "wide_integers.cuh"

constexpr int WARP_M = TILE_M / WARPS_M, WARP_N = TILE_N / WARPS_N;
constexpr int BLOCKS_M = WARP_M / 16, BLOCKS_N = WARP_N / 16;
constexpr int PIECE = 8;  // values of 16 bytes
constexpr int INPUT_PIECES = TILE_K / PIECE;  // of a row
constexpr int INPUT_LOADS = TILE_M * INPUT_PIECES / THREADS;
constexpr int LEAST_BLOCK = 32, SCALE_ROWS = TILE_K / LEAST_BLOCK;  // of int4, in a stage
constexpr int INPUT_BYTES = TILE_M * TILE_K * 2, SCALES_AT = INPUT_BYTES + TILE_K * TILE_N * 2;
constexpr int STAGE_BYTES = SCALES_AT + (has(IN_INT4) ? SCALE_ROWS * TILE_N * 2 : 0);
constexpr int PAD = 8;  // floats: rows that eight lanes write begin in different banks
static_assert(TILE_M * (TILE_N + PAD) * 4 <= STAGES * STAGE_BYTES, "sums fit where the stages were");
static_assert(INPUT_LOADS * THREADS == TILE_M * INPUT_PIECES, "threads share the rows' pieces evenly");
static_assert(!has(IN_INT4) || BLOCKS_N % 2 == 0, "a warp has the columns of a fragment's four parts");
static_assert(THREADS == 32 * WARPS_M * WARPS_N, "a thread has a place in the tile");

template <int pieces> __device__ __forceinline__ int piece_at(int row, int piece) {
    constexpr int lines = pieces < 8 ? 8 / pieces : 1;  // rows of 128 bytes
    return (row * pieces + (piece ^ (row / lines & (pieces < 8 ? pieces - 1 : 7)))) * 16;
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// 16 bytes to shared memory, zeros where `there` is false.
__device__ __forceinline__ void load_piece(unsigned to, const void* from, bool there) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
#else
    uint4 raw = {};
    if (there) raw = *static_cast<const uint4*>(from);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(raw.x), "r"(raw.y), "r"(raw.z), "r"(raw.w)
                 : "memory");
#endif
}
__device__ __forceinline__ void end_stage() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int in_flight> __device__ __forceinline__ void wait_for_stage() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(in_flight) : "memory");
#endif
}

__device__ __forceinline__ void load_matrices(unsigned (&to)[4], unsigned from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}
__device__ __forceinline__ void load_transposed(unsigned (&to)[4], unsigned from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}
__device__ __forceinline__ void load_transposed(unsigned (&to)[2], unsigned from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(from)
                 : "memory");
}

// sums[16x8] += a[16x16] * b[16x8]
__device__ __forceinline__ void multiply(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Half) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}
__device__ __forceinline__ void multiply(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Brain) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What a block brings to shared memory: pieces of its rows and of its columns. The pieces of a thread are in one column
// of pieces, and so many rows apart that all have the same permutation.
constexpr int INPUT_JUMP = THREADS / INPUT_PIECES;  // rows
static_assert(INPUT_JUMP % 8 == 0, "rows of a thread have the same permutation");

struct Rows {
    const Act* from;
    unsigned to;
    int rows, left, depth;  // rows and inputs that are left, from this thread's first on

    __device__ __forceinline__ Rows(unsigned stages, const Product& p, int row_count, int first_m, int start, int end) {
        const int m = threadIdx.x / INPUT_PIECES, k = threadIdx.x % INPUT_PIECES;
        depth = p.depth, rows = row_count - first_m - m, left = end - start - k * PIECE;
        from = p.input + static_cast<long long>(first_m + m) * depth + start + k * PIECE;
        to = stages + piece_at<INPUT_PIECES>(m, k);
    }
    __device__ __forceinline__ void load(int stage) {
#pragma unroll
        for (int i = 0; i < INPUT_LOADS; ++i)
            load_piece(to + stage * STAGE_BYTES + i * INPUT_JUMP * TILE_K * 2,
                       from + static_cast<long long>(i * INPUT_JUMP) * depth, i * INPUT_JUMP < rows && left > 0);
        from += TILE_K, left -= TILE_K;
    }
};

template <Form form> struct Pieces {
    static constexpr int WEIGHTS = form == IN_FLOAT ? PIECE : form == IN_INT8 ? 2 * PIECE : 4 * PIECE;  // of a piece
    static constexpr int ACROSS = TILE_N / WEIGHTS;                                                     // of a row
};

template <Form form> struct Columns {
    static constexpr int ACROSS = Pieces<form>::ACROSS, JUMP = THREADS / ACROSS;
    static constexpr int LOADS = (TILE_K + JUMP - 1) / JUMP;
    static_assert(JUMP % 8 == 0 && (JUMP >= TILE_K || LOADS * JUMP == TILE_K), "threads share the pieces evenly");
    const uint4* from;
    const Act* scale;
    unsigned to, scale_to;
    int pitch, left;                                    // in pieces; inputs from this thread's first on
    int scale_pitch, scale_start, scale_left, block;    // the input that the thread's scale begins with, as above
    bool there, scale_there;

    __device__ __forceinline__ Columns(unsigned stages, const Product& p, int first_n, int start, int end) {
        const int row = threadIdx.x / ACROSS, n = threadIdx.x % ACROSS, first = first_n / Pieces<form>::WEIGHTS + n;
        pitch = p.pitch / Pieces<form>::WEIGHTS, left = end - start - row;
        from = static_cast<const uint4*>(p.matrix) + static_cast<long long>(start + row) * pitch + first;
        to = stages + INPUT_BYTES + piece_at<ACROSS>(row, n);
        there = first < pitch && row < TILE_K;
        if (form != IN_INT4) return;
        const int scale_row = threadIdx.x / (TILE_N / PIECE), at = threadIdx.x % (TILE_N / PIECE) * PIECE;
        scale_start = start + scale_row * LEAST_BLOCK, scale_left = end - scale_start;
        block = p.block, scale_pitch = p.pitch;
        scale = p.scale + first_n + at;
        scale_to = stages + SCALES_AT + (scale_row * TILE_N + at) * 2, scale_there = first_n + at < p.pitch;
    }
    __device__ __forceinline__ void load(int stage) {
#pragma unroll
        for (int i = 0; i < LOADS; ++i)
            if (JUMP <= TILE_K || threadIdx.x / ACROSS < TILE_K)
                load_piece(to + stage * STAGE_BYTES + i * JUMP * ACROSS * 16,
                           from + static_cast<long long>(i * JUMP) * pitch, there && i * JUMP < left);
        from += static_cast<long long>(TILE_K) * pitch, left -= TILE_K;
        if (form != IN_INT4) return;
        if (threadIdx.x < SCALE_ROWS * (TILE_N / PIECE))
            load_piece(scale_to + stage * STAGE_BYTES,
                       scale + static_cast<long long>(scale_start / block) * scale_pitch, scale_there && scale_left > 0);
        scale_start += TILE_K, scale_left -= TILE_K;
    }
};

template <Form form> struct Sums {
    float of[BLOCKS_M][2 * BLOCKS_N][4] = {};

    // a stage of this warp's part of the tile
    __device__ __forceinline__ void add(unsigned stage, int warp_m, int warp_n) {
        const int line = threadIdx.x % 16, half = threadIdx.x / 16 % 2;
        unsigned scales[BLOCKS_N / 2 + 1][4];
#pragma unroll
        for (int k = 0; k < TILE_K; k += 16) {
            unsigned a[BLOCKS_M][4];
#pragma unroll
            for (int i = 0; i < BLOCKS_M; ++i)
                load_matrices(a[i], stage + piece_at<INPUT_PIECES>(warp_m + i * 16 + line, k / PIECE + half));
            if (form == IN_INT4 && k % LEAST_BLOCK == 0) load_scales(scales, stage, k / LEAST_BLOCK, warp_n);
#pragma unroll
            for (int j = 0; j < BLOCKS_N; ++j) {
                const unsigned at = stage + INPUT_BYTES;
                const int piece = (warp_n + j * 16) / Pieces<form>::WEIGHTS;
                if (form == IN_FLOAT) {
                    unsigned b[4];
                    load_transposed(b, at + piece_at<Pieces<form>::ACROSS>(k + line, piece + half));
                    add_pair(a, 2 * j, b[0], b[1], b[2], b[3]);
                } else if (form == IN_INT8 || j % 2 == 0) {
                    unsigned raw[2], low[2], high[2];
                    load_transposed(raw, at + piece_at<Pieces<form>::ACROSS>(k + line, piece));
                    if (form == IN_INT8) {
                        widen_bytes(low, raw[0], Act{}), widen_bytes(high, raw[1], Act{});
                        add_pair(a, 2 * j, low[0], high[0], low[1], high[1]);
                    } else {
                        add_nibbles(a, 2 * j, raw, scales[j / 2]);
                    }
                }
            }
        }
    }
    __device__ __forceinline__ void add_pair(
        const unsigned (&a)[BLOCKS_M][4], int at, unsigned low0, unsigned high0, unsigned low1, unsigned high1) {
#pragma unroll
        for (int i = 0; i < BLOCKS_M; ++i)
            multiply(of[i][at], a[i], low0, high0, Act{}), multiply(of[i][at + 1], a[i], low1, high1, Act{});
    }
    __device__ __forceinline__ void add_nibbles(
        const unsigned (&a)[BLOCKS_M][4], int at, const unsigned (&raw)[2], const unsigned (&scale)[4]) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const unsigned low = widen_nibbles(raw[0] >> 4 * q, scale[q], Act{});
            const unsigned high = widen_nibbles(raw[1] >> 4 * q, scale[q], Act{});
#pragma unroll
            for (int i = 0; i < BLOCKS_M; ++i) multiply(of[i][at + q], a[i], low, high, Act{});
        }
    }
    // those of a lane's four columns in every 32, each twice; a row for every LEAST_BLOCK inputs
    __device__ __forceinline__ void load_scales(
        unsigned (&to)[BLOCKS_N / 2 + 1][4], unsigned stage, int row, int warp_n) {
#pragma unroll
        for (int j = 0; j < BLOCKS_N / 2; ++j) {
            uint2 raw;
            const unsigned at = stage + SCALES_AT + (row * TILE_N + warp_n + j * 32 + threadIdx.x % 32 / 4 * 4) * 2;
            asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(raw.x), "=r"(raw.y) : "r"(at) : "memory");
            to[j][0] = __byte_perm(raw.x, raw.x, 0x1010), to[j][1] = __byte_perm(raw.x, raw.x, 0x3232);
            to[j][2] = __byte_perm(raw.y, raw.y, 0x1010), to[j][3] = __byte_perm(raw.y, raw.y, 0x3232);
        }
    }
    // to shared memory, rows of TILE_N + PAD floats
    __device__ __forceinline__ void keep(float* to, int warp_m, int warp_n) const {
        const int pair = threadIdx.x % 4;
        to += (warp_m + threadIdx.x % 32 / 4) * (TILE_N + PAD) + warp_n;
#pragma unroll
        for (int i = 0; i < BLOCKS_M; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float* const row = to + (i * 16 + half * 8) * (TILE_N + PAD);
#pragma unroll
                for (int j = 0; j < BLOCKS_N; ++j) {
                    const float(&x)[4] = of[i][2 * j], (&y)[4] = of[i][2 * j + 1];
                    const int low = 2 * half, high = 2 * half + 1;
                    if (form == IN_FLOAT) {
                        *reinterpret_cast<float2*>(row + j * 16 + pair * 2) = make_float2(x[low], x[high]);
                        *reinterpret_cast<float2*>(row + j * 16 + pair * 2 + 8) = make_float2(y[low], y[high]);
                    } else if (form == IN_INT8) {  // every second column each
                        float* const at = row + j * 16 + pair * 4;
                        *reinterpret_cast<float4*>(at) = make_float4(x[low], y[low], x[high], y[high]);
                    } else {  // two of every four
                        float* const at = row + j / 2 * 32 + pair * 8 + j % 2 * 2;
                        *reinterpret_cast<float2*>(at) = make_float2(x[low], y[low]);
                        *reinterpret_cast<float2*>(at + 4) = make_float2(x[high], y[high]);
                    }
                }
            }
    }
};

// The sums of a tile over the block's range of k, in shared memory.
template <Form form>
__device__ __forceinline__ void add_up(const Product& mine, uint4* shared, int rows, int first_m, int first_n) {
    const unsigned stages_at = shared_address(shared);
    const int stages = (mine.depth + TILE_K - 1) / TILE_K, share = (stages + SPLIT - 1) / SPLIT;
    const int start = blockIdx.y * share * TILE_K, end = min(mine.depth, start + share * TILE_K);
    Rows inputs(stages_at, mine, rows, first_m, start, end);
    Columns<form> matrix(stages_at, mine, first_n, start, end);
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) matrix.load(stage);
    wait_for_rows();
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        inputs.load(stage);
        end_stage();
    }
    const int warp = threadIdx.x / 32, warp_m = warp / WARPS_N * WARP_M, warp_n = warp % WARPS_N * WARP_N;
    Sums<form> sums;
    int now = 0, next = STAGES - 1;
#pragma unroll 1
    for (int k = start; k < end; k += TILE_K) {
        wait_for_stage<STAGES - 2>();
        __syncthreads();
        matrix.load(next);
        inputs.load(next);
        end_stage();
        sums.add(stages_at + now * STAGE_BYTES, warp_m, warp_n);
        now = now + 1 == STAGES ? 0 : now + 1;
        next = next + 1 == STAGES ? 0 : next + 1;
    }
    wait_for_stage<0>();  // of zeros past the end
    __syncthreads();
    sums.keep(reinterpret_cast<float*>(shared), warp_m, warp_n);
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) KERNEL(PRODUCT_ARGUMENTS) {
    FIND_PRODUCT
    extern __shared__ uint4 shared[];
#if FORMS & 1
    if (mine.form == IN_FLOAT) add_up<IN_FLOAT>(mine, shared, rows, first_m, first_n);
#endif
#if FORMS & 2
    if (mine.form == IN_INT8) add_up<IN_INT8>(mine, shared, rows, first_m, first_n);
#endif
#if FORMS & 4
    if (mine.form == IN_INT4) add_up<IN_INT4>(mine, shared, rows, first_m, first_n);
#endif
    __syncthreads();
    const float* const tile_sums = reinterpret_cast<float*>(shared);
#pragma unroll 1
    for (int at = threadIdx.x * 4; at < TILE_M * TILE_N; at += THREADS * 4) {
        const int m = at / TILE_N, n = at % TILE_N;
        float x[4];
        load4(x, tile_sums + m * (TILE_N + PAD) + n);
        if (has(IN_INT8) && mine.form == IN_INT8 && first_n + n < mine.columns) {
            float scale[4];
            widen4(scale, fetch4(mine.scale + first_n + n));
#pragma unroll
            for (int e = 0; e < 4; ++e) x[e] *= scale[e];
        }
        finish_quad(mine, rows, first_m + m, first_n + n, x);
    }
}
