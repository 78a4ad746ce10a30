// T tokens of RWKV-7; see wkv7_step.cu for the formula. S is read once, kept in registers, and written once.
//
// A thread has TILE quads of rows of S and every LANES-th quad of columns. While a token updates S, the product S kk of
// the next token is summed too, so that a token costs one round of shuffles. The vectors of CHUNK tokens are widened into
// shared memory, doubly buffered: the loads of the next chunk are in flight while this one is computed; one barrier a
// chunk. Tokens past T leave S as it is (w = 1, all else 0), so that the loop over a chunk unrolls.
// Grid (blocks of rows, H, B); dynamic shared memory 2 * CHUNK * 6 * WIDTH floats. state_out may be state_in.
#include "common.cuh"

constexpr int GROUPS = THREADS / LANES;
constexpr int ROWS = 4 * TILE;                         // of a thread
constexpr int QUADS = (HEAD / 4 + LANES - 1) / LANES;  // of columns, of a thread
constexpr int WIDTH = QUADS * LANES * 4;               // HEAD, padded with zeros
constexpr int ITEMS = CHUNK * WIDTH / 4;               // (token, quad) pairs of a chunk
constexpr int LOADS = (ITEMS + THREADS - 1) / THREADS;

enum Vector { R, W, K, V, NEXT_KK, B, VECTORS };  // B = -kk*a

struct Item {  // one quad of every vector
    Packed<Act> r, k, v, kk, a, next_kk;
    Packed<float> w;
};

__device__ __forceinline__ float* vector_of(float* buffer, int token, Vector which) {
    return buffer + (token * VECTORS + which) * WIDTH;
}

__device__ __forceinline__ void put(float* buffer, int index, const Item& item) {
    const int token = index / (WIDTH / 4), at = index % (WIDTH / 4) * 4;
    float x[4], kk[4];
    widen4(x, item.r), store4(vector_of(buffer, token, R) + at, x);
    widen4(x, item.w), store4(vector_of(buffer, token, W) + at, x);
    widen4(x, item.k), store4(vector_of(buffer, token, K) + at, x);
    widen4(x, item.v), store4(vector_of(buffer, token, V) + at, x);
    widen4(x, item.next_kk), store4(vector_of(buffer, token, NEXT_KK) + at, x);
    widen4(x, item.a), widen4(kk, item.kk);
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] *= -kk[e];
    store4(vector_of(buffer, token, B) + at, x);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) KERNEL(
    const float* state_in, const Act* __restrict__ r, const float* __restrict__ w, const Act* __restrict__ k,
    const Act* __restrict__ v, const Act* __restrict__ kk, const Act* __restrict__ a, int heads, int tokens,
    Act* __restrict__ y, float* state_out) {
    extern __shared__ float4 shared[];
    float* const buffers = reinterpret_cast<float*>(shared);
    constexpr int BUFFER = CHUNK * VECTORS * WIDTH;
    const int lane = threadIdx.x % LANES;
    const long long state = (static_cast<long long>(blockIdx.z) * heads + blockIdx.y) * HEAD * HEAD;
    const long long stride = static_cast<long long>(heads) * HEAD;  // from token to token
    const long long origin = blockIdx.z * stride * tokens + blockIdx.y * HEAD;
    int row[TILE], safe_row[TILE];  // the first of each quad; rows past HEAD compute what nobody reads
#pragma unroll
    for (int p = 0; p < TILE; ++p) {
        row[p] = ((blockIdx.x * TILE + p) * GROUPS + threadIdx.x / LANES) * 4;
        safe_row[p] = row[p] < HEAD ? row[p] : 0;
    }

    Item items[LOADS];
    auto fetch = [&](int start) {  // the quads of this thread in the chunk that starts at token `start`
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const int index = threadIdx.x + i * THREADS;
            const int token = start + index / (WIDTH / 4), column = index % (WIDTH / 4) * 4;
            const Packed<Act> none = zero4<Act>();
            items[i] = {none, none, none, none, none, none, {make_float4(1.0f, 1.0f, 1.0f, 1.0f)}};
            if (index < ITEMS && token < tokens && column < HEAD) {
                const long long at = origin + token * stride + column;
                items[i].r = fetch4(r + at), items[i].w = fetch4(w + at), items[i].k = fetch4(k + at);
                items[i].v = fetch4(v + at), items[i].kk = fetch4(kk + at), items[i].a = fetch4(a + at);
                if (token + 1 < tokens) items[i].next_kk = fetch4(kk + at + stride);
            }
        }
    };
    auto put_all = [&](float* buffer) {
#pragma unroll
        for (int i = 0; i < LOADS; ++i)
            if (threadIdx.x + i * THREADS < ITEMS) put(buffer, threadIdx.x + i * THREADS, items[i]);
    };

    fetch(0);
    float s[ROWS][QUADS][4], removed[ROWS] = {};
#pragma unroll
    for (int q = 0; q < QUADS; ++q) {
        const int column = (lane + q * LANES) * 4;
        float kk_col[4] = {};
        if (column < HEAD) widen4(kk_col, fetch4(kk + origin + column));
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            Packed<float> quad = zero4<float>();
            if (row[i / 4] < HEAD && column < HEAD)
                quad = fetch4(state_in + state + (row[i / 4] + i % 4) * HEAD + column);
            widen4(s[i][q], quad);
#pragma unroll
            for (int e = 0; e < 4; ++e) removed[i] += s[i][q][e] * kk_col[e];
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) removed[i] = sum_lanes<LANES>(removed[i]);
    put_all(buffers);
    __syncthreads();

    for (int start = 0, phase = 0; start < tokens; start += CHUNK, phase ^= 1) {
        const bool more = start + CHUNK < tokens;
        if (more) fetch(start + CHUNK);
        float* const now = buffers + phase * BUFFER;
        Act* const y_now = y + origin + start * stride + lane;
#pragma unroll
        for (int t = 0; t < CHUNK; ++t) {
            float next[ROWS] = {}, out[TILE][4] = {}, v_row[TILE][4];
#pragma unroll
            for (int p = 0; p < TILE; ++p) load4(v_row[p], vector_of(now, t, V) + safe_row[p]);
#pragma unroll
            for (int q = 0; q < QUADS; ++q) {
                float w_col[4], k_col[4], b_col[4], r_col[4], next_kk[4];
                const int at = (lane + q * LANES) * 4;
                load4(w_col, vector_of(now, t, W) + at);
                load4(k_col, vector_of(now, t, K) + at);
                load4(b_col, vector_of(now, t, B) + at);
                load4(r_col, vector_of(now, t, R) + at);
                load4(next_kk, vector_of(now, t, NEXT_KK) + at);
#pragma unroll
                for (int e = 0; e < 4; ++e)
#pragma unroll
                    for (int i = 0; i < ROWS; ++i) {
                        float& x = s[i][q][e];
                        x = x * w_col[e] + v_row[i / 4][i % 4] * k_col[e] + removed[i] * b_col[e];
                        next[i] += x * next_kk[e];
                        out[i / 4][i % 4] += x * r_col[e];
                    }
            }
#pragma unroll
            for (int i = 0; i < ROWS; ++i) removed[i] = sum_lanes<LANES>(next[i]);
#pragma unroll
            for (int p = 0; p < TILE; ++p) {
                const float mine = scatter_sum4<LANES>(out[p], lane);
                if (row[p] < HEAD && lane < 4 && start + t < tokens) store(y_now + t * stride + row[p], mine);
            }
        }
        if (more) put_all(buffers + (phase ^ 1) * BUFFER);  // last read before the previous barrier
        __syncthreads();
    }

#pragma unroll
    for (int q = 0; q < QUADS; ++q)
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            const int column = (lane + q * LANES) * 4;
            if (row[i / 4] < HEAD && column < HEAD)
                store4(state_out + state + (row[i / 4] + i % 4) * HEAD + column, s[i][q]);
        }
}
