// Products on tensor cores, in tiles of TILE_M x TILE_N; see wide_product.cuh. ACT and WEIGHT are Half, or Brain (sm_80).
//
// Further parameters: TILE_K: inputs of a stage; STAGES: stages in shared memory, all but one of them in flight;
// WARPS_M, WARPS_N: how the warps share the tile. THREADS is 32 * WARPS_M * WARPS_N.
// Stages lie in shared memory as pieces of 16 bytes, permuted so that eight rows of one column of pieces meet all banks.
#include "wide_product.cuh"

constexpr int WARP_M = TILE_M / WARPS_M, WARP_N = TILE_N / WARPS_N;
constexpr int BLOCKS_M = WARP_M / 16, BLOCKS_N = WARP_N / 16;
constexpr int PIECE = 8;  // values of 16 bytes
constexpr int INPUT_PIECES = TILE_K / PIECE, MATRIX_PIECES = TILE_N / PIECE;  // of a row
constexpr int INPUT_LOADS = TILE_M * INPUT_PIECES / THREADS, MATRIX_LOADS = TILE_K * MATRIX_PIECES / THREADS;
constexpr int INPUT_BYTES = TILE_M * TILE_K * 2, STAGE_BYTES = INPUT_BYTES + TILE_K * TILE_N * 2;
constexpr int PAD = 8;  // floats: rows that eight lanes write begin in different banks
static_assert(TILE_M * (TILE_N + PAD) * 4 <= STAGES * STAGE_BYTES, "sums fit where the stages were");
static_assert(INPUT_LOADS * THREADS == TILE_M * INPUT_PIECES, "threads share the rows' pieces evenly");
static_assert(MATRIX_LOADS * THREADS == TILE_K * MATRIX_PIECES, "threads share the matrix's pieces evenly");
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
constexpr int INPUT_JUMP = THREADS / INPUT_PIECES, MATRIX_JUMP = THREADS / MATRIX_PIECES;  // rows
static_assert(INPUT_JUMP % 8 == 0 && MATRIX_JUMP % 8 == 0, "rows of a thread have the same permutation");

struct Loader {
    const Act* input;
    const Weight* matrix;
    unsigned input_to, matrix_to;
    int rows, k_row, depth, columns, k_column;  // rows and inputs that are left, from this thread's first on
    bool there;

    __device__ __forceinline__ Loader(
        unsigned stages, const Product& p, int row_count, int first_m, int first_n, int start, int end) {
        const int m = threadIdx.x / INPUT_PIECES, row = threadIdx.x / MATRIX_PIECES;
        const int k = threadIdx.x % INPUT_PIECES, n = threadIdx.x % MATRIX_PIECES;
        depth = p.depth, columns = p.columns;
        input = p.input + static_cast<long long>(first_m + m) * depth + start + k * PIECE;
        matrix = static_cast<const Weight*>(p.matrix) + static_cast<long long>(start + row) * columns + first_n + n * PIECE;
        input_to = stages + piece_at<INPUT_PIECES>(m, k);
        matrix_to = stages + INPUT_BYTES + piece_at<MATRIX_PIECES>(row, n);
        rows = row_count - first_m - m, k_row = end - start - k * PIECE, k_column = end - start - row;
        there = first_n + n * PIECE < columns;
    }
    __device__ __forceinline__ void load_rows(int stage) {
#pragma unroll
        for (int i = 0; i < INPUT_LOADS; ++i)
            load_piece(input_to + stage * STAGE_BYTES + i * INPUT_JUMP * TILE_K * 2,
                       input + static_cast<long long>(i * INPUT_JUMP) * depth, i * INPUT_JUMP < rows && k_row > 0);
        input += TILE_K, k_row -= TILE_K;
    }
    __device__ __forceinline__ void load_columns(int stage) {
#pragma unroll
        for (int i = 0; i < MATRIX_LOADS; ++i)
            load_piece(matrix_to + stage * STAGE_BYTES + i * MATRIX_JUMP * TILE_N * 2,
                       matrix + static_cast<long long>(i * MATRIX_JUMP) * columns, there && i * MATRIX_JUMP < k_column);
        matrix += static_cast<long long>(TILE_K) * columns, k_column -= TILE_K;
    }
};

struct Sums {
    float of[BLOCKS_M][2 * BLOCKS_N][4] = {};

    // one stage of this warp's part of the tile
    __device__ __forceinline__ void add(unsigned inputs, unsigned matrix, int warp_m, int warp_n) {
        const int line = threadIdx.x % 16, half = threadIdx.x / 16 % 2;
#pragma unroll
        for (int k = 0; k < TILE_K; k += 16) {
            unsigned a[BLOCKS_M][4], b[BLOCKS_N][4];
#pragma unroll
            for (int i = 0; i < BLOCKS_M; ++i)
                load_matrices(a[i], inputs + piece_at<INPUT_PIECES>(warp_m + i * 16 + line, k / PIECE + half));
#pragma unroll
            for (int j = 0; j < BLOCKS_N; ++j)
                load_transposed(b[j], matrix + piece_at<MATRIX_PIECES>(k + line, (warp_n + j * 16) / PIECE + half));
#pragma unroll
            for (int i = 0; i < BLOCKS_M; ++i)
#pragma unroll
                for (int j = 0; j < BLOCKS_N; ++j) {
                    multiply(of[i][2 * j], a[i], b[j][0], b[j][1], Act{});
                    multiply(of[i][2 * j + 1], a[i], b[j][2], b[j][3], Act{});
                }
        }
    }
    // to shared memory, rows of TILE_N + PAD floats
    __device__ __forceinline__ void keep(float* to, int warp_m, int warp_n) const {
        to += (warp_m + threadIdx.x % 32 / 4) * (TILE_N + PAD) + warp_n + threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < BLOCKS_M; ++i)
#pragma unroll
            for (int j = 0; j < 2 * BLOCKS_N; ++j)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float* const at = to + (i * 16 + half * 8) * (TILE_N + PAD) + j * 8;
                    *reinterpret_cast<float2*>(at) = make_float2(of[i][j][2 * half], of[i][j][2 * half + 1]);
                }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) KERNEL(PRODUCT_ARGUMENTS) {
    FIND_PRODUCT
    extern __shared__ uint4 shared[];
    const unsigned stages_at = shared_address(shared);
    const int stages = (mine.depth + TILE_K - 1) / TILE_K, share = (stages + SPLIT - 1) / SPLIT;
    const int start = blockIdx.y * share * TILE_K, end = min(mine.depth, start + share * TILE_K);
    Loader loader(stages_at, mine, rows, first_m, first_n, start, end);
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) loader.load_columns(stage);
    wait_for_rows();
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        loader.load_rows(stage);
        end_stage();
    }
    const int warp = threadIdx.x / 32, warp_m = warp / WARPS_N * WARP_M, warp_n = warp % WARPS_N * WARP_N;
    Sums sums;
    int now = 0, next = STAGES - 1;
#pragma unroll 1
    for (int k = start; k < end; k += TILE_K) {
        wait_for_stage<STAGES - 2>();
        __syncthreads();
        loader.load_columns(next);
        loader.load_rows(next);
        end_stage();
        const unsigned inputs = stages_at + now * STAGE_BYTES;
        sums.add(inputs, inputs + INPUT_BYTES, warp_m, warp_n);
        now = now + 1 == STAGES ? 0 : now + 1;
        next = next + 1 == STAGES ? 0 : next + 1;
    }
    wait_for_stage<0>();  // of zeros past the end
    __syncthreads();
    float* const tile_sums = reinterpret_cast<float*>(shared);
    sums.keep(tile_sums, warp_m, warp_n);
    __syncthreads();
#pragma unroll 1
    for (int at = threadIdx.x * 4; at < TILE_M * TILE_N; at += THREADS * 4) {
        const int m = at / TILE_N, n = at % TILE_N;
        float x[4];
        load4(x, tile_sums + m * (TILE_N + PAD) + n);
        finish_quad(mine, rows, first_m + m, first_n + n, x);
    }
}
