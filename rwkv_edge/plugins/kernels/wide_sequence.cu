// The recurrence of RWKV-7 over T tokens. A block has ROWS * CONSUMERS / LANES rows of the state of one head of one stream,
// in registers from the first token to the last; other warps of it prepare the vectors of the tokens to come.
//
// A consumer has ROWS rows and every LANES-th quad of their columns. What a token removes is summed two tokens ahead, so
// that the shuffles of one sum overlap the update of the other token: with S' = S diag(w) + v k^T + (S kk) b^T,
//   S' kk' = S (w kk') + v (k . kk') + (S kk) (b . kk'),  kk' of the token after,
// where w kk' and both scalars are prepared. Sums for y are exchanged once a chunk. Two buffers of CHUNK tokens: one is
// read, one is filled. Tokens past T leave S as it is (w = 1, all else 0), so that the loop over a chunk unrolls.
//
// Further parameters: CONSUMERS, ROWS, LANES, CHUNK. Grid (blocks of rows, H, B). r, w, k, v, a, y [M, A] float, bonus
// [M, H]; state [B, H, HEAD, HEAD], updated in place unless halted[b].
// Dynamic shared memory: 2 * CHUNK * (5 * WIDE + HEAD + 4) + WIDE floats, WIDE = 4 * LANES * QUADS.
#include "wide_wkv.cuh"

constexpr int QUADS = (HEAD / 4 + LANES - 1) / LANES;
constexpr int WIDE = QUADS * LANES * 4;  // HEAD, padded with zeros
constexpr int TOKEN = 5 * WIDE + HEAD + 4, BUFFER = CHUNK * TOKEN;
constexpr int PRODUCERS = WARPS - CONSUMERS / 32;  // warps
constexpr int EACH = CHUNK / PRODUCERS;             // tokens of a warp
static_assert(EACH * PRODUCERS == CHUNK, "warps share a chunk evenly");
// Of a token: r, w, k, w kk', b, v, and the scalars k . kk' and b . kk'.
enum Part { R = 0, W = WIDE, K = 2 * WIDE, NEXT = 3 * WIDE, B = 4 * WIDE, V = 5 * WIDE, SCALARS = 5 * WIDE + HEAD };

struct Inputs {
    const float *r, *w, *k, *v, *a;
    float* bonus;  // of this head, null where another block writes it
    long long origin;  // of the first token's channels
    int tokens, heads;
};

// A producer warp: its tokens of a chunk and the key of the one after, asked for one chunk before they are prepared.
struct Producer {
    Row row[EACH];
    float after[CHANNELS];

    // `start`: first token of the chunk
    __device__ __forceinline__ int token(int start, int i) const {
        return start + (threadIdx.x / 32 - CONSUMERS / 32) * EACH + i;
    }
    __device__ __forceinline__ void load(const Inputs& in, int start) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int t = token(start, i);
            row[i].load(in.r, in.w, in.k, in.v, in.a, in.origin + static_cast<long long>(t) * INNER, t < in.tokens);
        }
        const int t = token(start, EACH);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            const int n = threadIdx.x % 32 + 32 * c;
            after[c] = t < in.tokens && n < HEAD ? in.k[in.origin + static_cast<long long>(t) * INNER + n] : 0.0f;
        }
    }
    // `first` gets the removal key of token 0
    __device__ __forceinline__ void put(float* buffer, float* first, const Inputs& in, const Head& head, int start) {
        float kk[EACH + 1][CHANNELS], b[EACH][CHANNELS];
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int t = token(start, i);
            const float bonus = head.prepare(row[i], kk[i], b[i]);
            if (in.bonus && threadIdx.x % 32 == 0 && t < in.tokens) in.bonus[static_cast<long long>(t) * in.heads] = bonus;
        }
        head.removal_key(after, kk[EACH]);
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            float* const to = buffer + token(0, i) * TOKEN;
            float of_key = 0.0f, of_removed = 0.0f;
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) {
                of_key += row[i].k[c] * kk[i + 1][c], of_removed += b[i][c] * kk[i + 1][c];
                const int n = threadIdx.x % 32 + 32 * c;
                if (n >= HEAD) continue;
                to[R + n] = row[i].r[c], to[W + n] = row[i].w[c], to[K + n] = row[i].k[c];
                to[NEXT + n] = row[i].w[c] * kk[i + 1][c], to[B + n] = b[i][c], to[V + n] = row[i].v[c];
                if (token(start, i) == 0) first[n] = kk[i][c];
            }
            of_key = sum_lanes<32>(of_key), of_removed = sum_lanes<32>(of_removed);
            if (threadIdx.x % 32 == 0) to[SCALARS] = of_key, to[SCALARS + 1] = of_removed;
        }
    }
};

// Sums over groups of LANES of CHUNK values; afterwards a lane has `count` of them, those from `base` on.
__device__ __forceinline__ int exchange(float (&x)[CHUNK], int lane) {
    int base = 0, count = CHUNK;
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) {
        const bool upper = lane & step;
        if (count > 1) {
            count /= 2;
#pragma unroll
            for (int e = 0; e < CHUNK / 2; ++e) {
                if (e >= count) continue;
                const float kept = upper ? x[e + count] : x[e], sent = upper ? x[e] : x[e + count];
                x[e] = kept + __shfl_xor_sync(EVERY_LANE, sent, step);
            }
            base += upper ? count : 0;
        } else {
            x[0] += __shfl_xor_sync(EVERY_LANE, x[0], step);
        }
    }
    return base;
}
constexpr int LEFT = CHUNK > LANES ? CHUNK / LANES : 1;  // values of a lane after that

struct State {
    float s[ROWS][QUADS][4], removed[ROWS];

    // removed = S kk of the first token
    __device__ __forceinline__ void start(const float* kk, int lane) {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            removed[i] = 0.0f;
#pragma unroll
            for (int q = 0; q < QUADS; ++q) {
                float column[4];
                load4(column, kk + (lane + q * LANES) * 4);
#pragma unroll
                for (int e = 0; e < 4; ++e) removed[i] += s[i][q][e] * column[e];
            }
            removed[i] = sum_lanes<LANES>(removed[i]);
        }
    }
    // one token; `row` is the first of this thread's
    __device__ __forceinline__ void advance(const float* token, int lane, int row, float (&out)[ROWS]) {
        const float of_key = token[SCALARS], of_removed = token[SCALARS + 1];
        float next[ROWS] = {}, value[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; ++i) out[i] = 0.0f, value[i] = token[V + row + i];
#pragma unroll
        for (int q = 0; q < QUADS; ++q) {
            float kk[4];
            load4(kk, token + NEXT + (lane + q * LANES) * 4);
#pragma unroll
            for (int e = 0; e < 4; ++e)
#pragma unroll
                for (int i = 0; i < ROWS; ++i) next[i] += s[i][q][e] * kk[e];
        }
#pragma unroll
        for (int i = 0; i < ROWS; ++i) next[i] = sum_lanes<LANES>(next[i]) + value[i] * of_key;
#pragma unroll
        for (int q = 0; q < QUADS; ++q) {
            const int at = (lane + q * LANES) * 4;
            float r[4], w[4], k[4], b[4];
            load4(w, token + W + at), load4(k, token + K + at), load4(b, token + B + at), load4(r, token + R + at);
#pragma unroll
            for (int e = 0; e < 4; ++e)
#pragma unroll
                for (int i = 0; i < ROWS; ++i) {
                    float& x = s[i][q][e];
                    x = x * w[e] + value[i] * k[e] + removed[i] * b[e];
                    out[i] += x * r[e];
                }
        }
#pragma unroll
        for (int i = 0; i < ROWS; ++i) removed[i] = next[i] + removed[i] * of_removed;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2) KERNEL(
    Number tokens, const float* __restrict__ r, const float* __restrict__ w, const float* __restrict__ k,
    const float* __restrict__ v, const float* __restrict__ a, const float* __restrict__ k_k,
    const float* __restrict__ k_a, const float* __restrict__ r_k, const int* __restrict__ halted, float* state,
    float* __restrict__ y, float* __restrict__ bonus) {
    extern __shared__ float4 shared[];
    float *const buffers = reinterpret_cast<float*>(shared), *const first_kk = buffers + 2 * BUFFER;
    const int count = static_cast<int>(tokens), heads = INNER / HEAD, head_at = blockIdx.y, b = blockIdx.z;
    const bool consumes = threadIdx.x < CONSUMERS;
    const int lane = threadIdx.x % LANES;
    const int row = (blockIdx.x * (CONSUMERS / LANES) + threadIdx.x / LANES) * ROWS;
    const int safe_row = row < HEAD ? row : 0;  // rows past the head compute what nobody reads
    const long long first = static_cast<long long>(b) * count;
    const Inputs in = {r, w, k, v, a, blockIdx.x == 0 ? bonus + first * heads + head_at : nullptr,
                       first * INNER + head_at * HEAD, count, heads};
    float* const corner = state + (static_cast<long long>(b) * heads + head_at) * HEAD * HEAD;
    for (int at = threadIdx.x; at < 2 * BUFFER + WIDE; at += THREADS) buffers[at] = 0.0f;  // what pads a head
    const Head head(k_k, k_a, r_k, head_at * HEAD);
    State mine;
    if (consumes)
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
#pragma unroll
            for (int q = 0; q < QUADS; ++q) {
                const int column = (lane + q * LANES) * 4;
                Packed<float> quad = zero4<float>();
                if (row < HEAD && column < HEAD) quad = fetch4(corner + (row + i) * HEAD + column);
                widen4(mine.s[i][q], quad);
            }
    wait_for_rows();
    __syncthreads();
    Producer producer;
    if (!consumes) {
        producer.load(in, 0), producer.put(buffers, first_kk, in, head, 0);
        producer.load(in, CHUNK);
    }
    __syncthreads();
    if (consumes) mine.start(first_kk, lane);

    int now = 0;
#pragma unroll 1
    for (int start = 0; start < count; start += CHUNK) {
        if (consumes) {
            const float* const chunk = buffers + now * BUFFER;
            float out[ROWS][CHUNK];
#pragma unroll
            for (int t = 0; t < CHUNK; ++t) {
                float sums[ROWS];
                mine.advance(chunk + t * TOKEN, lane, safe_row, sums);
#pragma unroll
                for (int i = 0; i < ROWS; ++i) out[i][t] = sums[i];
            }
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
                const int base = exchange(out[i], lane);
#pragma unroll
                for (int e = 0; e < LEFT; ++e) {
                    const int t = start + base + e;
                    if (row < HEAD && t < count && lane < CHUNK)
                        y[in.origin + static_cast<long long>(t) * INNER + row + i] = out[i][e];
                }
            }
        } else {
            producer.put(buffers + (1 - now) * BUFFER, first_kk, in, head, start + CHUNK);
            producer.load(in, start + 2 * CHUNK);
        }
        __syncthreads();
        now = 1 - now;
    }
    if (consumes && halted[b] == 0)
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
#pragma unroll
            for (int q = 0; q < QUADS; ++q) {
                const int column = (lane + q * LANES) * 4;
                if (row < HEAD && column < HEAD) store4(corner + (row + i) * HEAD + column, mine.s[i][q]);
            }
}
