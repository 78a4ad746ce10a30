// Scores [B, V] from logits: bias, repetition penalty, presence and frequency penalty; the largest of every slice. Where
// all streams are greedy, the last block of each draws its token.
//
// Further parameters: BIAS, PENALTIES, GREEDY: what there is to do. A history [B, V] of doubles holds the decayed count
// of every generated token, or one of the marks below. The token drawn last is counted here, by the block that has it.
#include "sample.cuh"

constexpr double UNTOUCHED = -1.0, SEEN = -2.0;  // never generated; the second was in a prompt
constexpr double SPARED = -3.0, SPARED_GENERATED = -5.0;  // of tokens that are not counted; -4: seen

__device__ __forceinline__ double counted(double count, double decay, bool drawn) {
    if (count >= 0.0) {
        count = __dmul_rn(count, decay);
        return drawn ? __dadd_rn(count, 1.0) : count;
    }
    if (!drawn) return count;
    return count >= SEEN ? 1.0 : SPARED_GENERATED;
}

__device__ __forceinline__ float penalized(float score, double count, const Settings& how) {
    if (count == UNTOUCHED || count == SPARED) return score;
    if (how.repetition != 1.0f)
        score = score > 0.0f ? __fdiv_rn(score, how.repetition) : __fmul_rn(score, how.repetition);
    if (count < 0.0 && count != SPARED_GENERATED) return score;
    const double penalty = __dadd_rn(how.presence, __dmul_rn(count < 0.0 ? 0.0 : count, how.frequency));
    return __fsub_rn(score, __double2float_rn(penalty));
}

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
    const float* logits, const Settings* settings, const float* bias, double* history_counts, const int* stops,
    float* scores, float* tops, int* tops_at, unsigned* arrived, int* tokens, int* history, unsigned* turns,
    int* accepted, int* halted) {
    const int b = blockIdx.y, first = blockIdx.x * SLICE + 4 * threadIdx.x;
    const long long row = static_cast<long long>(b) * VOCABULARY;
    wait_for_previous();
    const Ends ends{tokens + b, history + b, turns + b, accepted + b, halted + b, stops};
    if (halted[b]) {
        if (GREEDY && blockIdx.x == 0 && threadIdx.x == 0) ends.give(NO_TOKEN);
        return;
    }
    Best best{-infinity(), NOWHERE};
    if (first < VOCABULARY) {
        float x[4];
        load4(x, logits + row + first);
        if (BIAS) {
            float added[4];
            load4(added, bias + row + first);
#pragma unroll
            for (int e = 0; e < 4; ++e) x[e] = __fadd_rn(x[e], added[e]);
        }
        if (PENALTIES) {
            const Settings how = settings[b];
            const bool count_first = !accepted[b];
            const int drawn = tokens[b];
            double* counts = history_counts + row + first;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                double count = counts[e];
                if (count_first) counts[e] = count = counted(count, how.decay, first + e == drawn);
                x[e] = penalized(x[e], count, how);
            }
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) best.meet(x[e], first + e);
        if (!GREEDY) store4(scores + row + first, x);
    }
    best = best_of(best);
    if (threadIdx.x == 0) tops[b * SLICES + blockIdx.x] = best.score, tops_at[b * SLICES + blockIdx.x] = best.token;
    if (!GREEDY || !is_last(arrived + b)) return;

    best = best_of<SLICES>(tops + b * SLICES, tops_at + b * SLICES);
    if (threadIdx.x != 0) return;
    const bool finite = best.score < infinity() && best.score > -infinity();
    ends.give(finite ? best.token : best.score > 0.0f ? NOT_A_NUMBER : NONE_LEFT);
}
