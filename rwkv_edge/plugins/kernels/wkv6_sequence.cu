// T tokens of RWKV-5 and 6; see wkv6_step.cu for the formula. S is read once, kept in registers, and written once.
//
// A thread has TILE quads of columns of S and every LANES-th quad of rows, so that the sum of y stays within a warp. The
// vectors of CHUNK tokens are widened into shared memory, doubly buffered: the loads of the next chunk are in flight while
// this one is computed; one barrier a chunk. What does not depend on the token (u, and w of RWKV-5) stays in registers.
// Tokens past T leave S as it is (w = 1, k = 0; RWKV-5 stops there), so that the loop over a chunk unrolls.
// Grid (blocks of columns, H, B); dynamic shared memory 2 * CHUNK * VECTORS * WIDTH floats. state_out may be state_in.
#include "common.cuh"

constexpr int GROUPS = THREADS / LANES;
constexpr int COLUMNS = 4 * TILE;                      // of a thread
constexpr int QUADS = (HEAD / 4 + LANES - 1) / LANES;  // of rows, of a thread
constexpr int WIDTH = QUADS * LANES * 4;               // HEAD, padded with zeros
constexpr int ITEMS = CHUNK * WIDTH / 4;               // (token, quad) pairs of a chunk
constexpr int LOADS = (ITEMS + THREADS - 1) / THREADS;

#if STATIC_DECAY
enum Vector { R, K, V, VECTORS };
#else
enum Vector { R, K, V, W, VECTORS };
#endif

struct Item {  // one quad of every vector
    Packed<Act> r, k, v;
#if !STATIC_DECAY
    Packed<float> w;
#endif
};

__device__ __forceinline__ float* vector_of(float* buffer, int token, Vector which) {
    return buffer + (token * VECTORS + which) * WIDTH;
}

__device__ __forceinline__ void put(float* buffer, int index, const Item& item) {
    const int token = index / (WIDTH / 4), at = index % (WIDTH / 4) * 4;
    float x[4];
    widen4(x, item.r), store4(vector_of(buffer, token, R) + at, x);
    widen4(x, item.k), store4(vector_of(buffer, token, K) + at, x);
    widen4(x, item.v), store4(vector_of(buffer, token, V) + at, x);
#if !STATIC_DECAY
    widen4(x, item.w), store4(vector_of(buffer, token, W) + at, x);
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) KERNEL(
    const float* state_in, const Act* __restrict__ r, const float* __restrict__ w, const float* __restrict__ u,
    const Act* __restrict__ k, const Act* __restrict__ v, int heads, int tokens, Act* __restrict__ y,
    float* state_out) {
    extern __shared__ float4 shared[];
    float* const buffers = reinterpret_cast<float*>(shared);
    constexpr int BUFFER = CHUNK * VECTORS * WIDTH;
    const int lane = threadIdx.x % LANES;
    const long long state = (static_cast<long long>(blockIdx.z) * heads + blockIdx.y) * HEAD * HEAD;
    const long long stride = static_cast<long long>(heads) * HEAD;  // from token to token
    const long long origin = blockIdx.z * stride * tokens + blockIdx.y * HEAD;
    int column[TILE], safe_column[TILE];  // the first of each quad; columns past HEAD compute what nobody reads
#pragma unroll
    for (int p = 0; p < TILE; ++p) {
        column[p] = ((blockIdx.x * TILE + p) * GROUPS + threadIdx.x / LANES) * 4;
        safe_column[p] = column[p] < HEAD ? column[p] : 0;
    }

    Item items[LOADS];
    auto fetch = [&](int start) {  // the quads of this thread in the chunk that starts at token `start`
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const int index = threadIdx.x + i * THREADS;
            const int token = start + index / (WIDTH / 4), row = index % (WIDTH / 4) * 4;
            items[i].r = items[i].k = items[i].v = zero4<Act>();
#if !STATIC_DECAY
            items[i].w.raw = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
#endif
            if (index < ITEMS && token < tokens && row < HEAD) {
                const long long at = origin + token * stride + row;
                items[i].r = fetch4(r + at), items[i].k = fetch4(k + at), items[i].v = fetch4(v + at);
#if !STATIC_DECAY
                items[i].w = fetch4(w + at);
#endif
            }
        }
    };
    auto put_all = [&](float* buffer) {
#pragma unroll
        for (int i = 0; i < LOADS; ++i)
            if (threadIdx.x + i * THREADS < ITEMS) put(buffer, threadIdx.x + i * THREADS, items[i]);
    };

    fetch(0);
    float s[QUADS][4][COLUMNS], u_row[QUADS][4] = {}, w_row[QUADS][4] = {};
#pragma unroll
    for (int q = 0; q < QUADS; ++q) {
        const int row = (lane + q * LANES) * 4;
        if (row < HEAD) load4(u_row[q], u + blockIdx.y * HEAD + row);
#if STATIC_DECAY
        if (row < HEAD) load4(w_row[q], w + blockIdx.y * HEAD + row);
#endif
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int p = 0; p < TILE; ++p) {
                Packed<float> quad = zero4<float>();
                if (column[p] < HEAD && row < HEAD) quad = fetch4(state_in + state + (row + i) * HEAD + column[p]);
                float x[4];
                widen4(x, quad);
#pragma unroll
                for (int e = 0; e < 4; ++e) s[q][i][4 * p + e] = x[e];
            }
    }
    put_all(buffers);
    __syncthreads();

    for (int start = 0, phase = 0; start < tokens; start += CHUNK, phase ^= 1) {
        const bool more = start + CHUNK < tokens;
        if (more) fetch(start + CHUNK);
        float* const now = buffers + phase * BUFFER;
        Act* const y_now = y + origin + start * stride + lane;
#pragma unroll
        for (int t = 0; t < CHUNK; ++t) {
#if STATIC_DECAY
            if (start + t >= tokens) break;
#endif
            float out[TILE][4] = {}, v_col[TILE][4], bonus = 0.0f;
#pragma unroll
            for (int p = 0; p < TILE; ++p) load4(v_col[p], vector_of(now, t, V) + safe_column[p]);
#pragma unroll
            for (int q = 0; q < QUADS; ++q) {
                float r_row[4], k_row[4];
                const int at = (lane + q * LANES) * 4;
                load4(r_row, vector_of(now, t, R) + at);
                load4(k_row, vector_of(now, t, K) + at);
#if !STATIC_DECAY
                load4(w_row[q], vector_of(now, t, W) + at);
#endif
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    bonus += u_row[q][i] * k_row[i] * r_row[i];
#pragma unroll
                    for (int c = 0; c < COLUMNS; ++c) {
                        float& x = s[q][i][c];
                        out[c / 4][c % 4] += r_row[i] * x;
                        x = x * w_row[q][i] + k_row[i] * v_col[c / 4][c % 4];
                    }
                }
            }
#pragma unroll
            for (int p = 0; p < TILE; ++p) {
#pragma unroll
                for (int e = 0; e < 4; ++e) out[p][e] += bonus * v_col[p][e];
                const float mine = scatter_sum4<LANES>(out[p], lane);
                if (column[p] < HEAD && lane < 4 && start + t < tokens) store(y_now + t * stride + column[p], mine);
            }
        }
        if (more) put_all(buffers + (phase ^ 1) * BUFFER);  // last read before the previous barrier
        __syncthreads();
    }

#pragma unroll
    for (int q = 0; q < QUADS; ++q)
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int p = 0; p < TILE; ++p) {
                const int row = (lane + q * LANES) * 4 + i;
                const float x[4] = {s[q][i][4 * p], s[q][i][4 * p + 1], s[q][i][4 * p + 2], s[q][i][4 * p + 3]};
                if (column[p] < HEAD && row < HEAD) store4(state_out + state + row * HEAD + column[p], x);
            }
}
