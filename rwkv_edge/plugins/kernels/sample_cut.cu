// Where top-k and top-p cut: the bin of weights with which, from the largest down, the count or the sum is reached.
//
// A bin has the weights with the same exponent and first four bits of the mantissa. Of each are known how many there are
// and the sum of the other 19 bits, both exact. `histogram` [B, BINS] is zero before and after.
#include "sample_bins.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
    const float* scores, const float* tops, const Settings* settings, const int* halted, Mass* histogram,
    unsigned* arrived, Cut* cuts) {
    __shared__ unsigned counts[BINS], rests[BINS];
    const int b = blockIdx.y, first = blockIdx.x * SLICE + 4 * threadIdx.x;
    for (int i = threadIdx.x; i < BINS; i += THREADS) counts[i] = rests[i] = 0;
    wait_for_previous();
    if (halted[b]) return;
    const float peak = largest(tops + b * COUNT);  // its barriers also end the filling with zeros
    if (first < VOCABULARY) {
        float x[4];
        load4(x, scores + static_cast<long long>(b) * VOCABULARY + first);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const unsigned bits = weight_bits(x[e] - peak);
            atomicAdd(counts + (bits >> REST), 1u);
            atomicAdd(rests + (bits >> REST), bits & ((1u << REST) - 1));
        }
    }
    __syncthreads();
    histogram += b * BINS;
    for (int i = threadIdx.x; i < BINS; i += THREADS)
        if (counts[i]) atomicAdd(histogram + i, static_cast<Mass>(counts[i]) << COUNT_AT | rests[i]);
    if (!is_last(arrived + b)) return;

    __shared__ Mass all;
    Mass packed[BINS / THREADS];
    Bin bins[BINS / THREADS];
#pragma unroll
    for (int i = 0; i < BINS / THREADS; ++i) packed[i] = fresh(histogram + place_of_bin<BINS>(i));
#pragma unroll
    for (int i = 0; i < BINS / THREADS; ++i) {
        const int at = place_of_bin<BINS>(i);
        const Mass rest = packed[i] & ((1ull << COUNT_AT) - 1);
        bins[i].count = static_cast<unsigned>(packed[i] >> COUNT_AT);
        bins[i].units = fixed(bins[i].count * leading_bits(at) + rest, at >> (23 - REST));
        histogram[at] = 0;
    }
    const Bin upto = running_sum(sum_of(bins));
    if (threadIdx.x == THREADS - 1) all = upto.units;
    __syncthreads();
    const Settings how = settings[b];
    Cut cut;
    cut.wanted = how.top_k > 0 && how.top_k < VOCABULARY ? how.top_k : NO_COUNT;
    cut.target = how.top_p < 1ull << 63 ? share(all, how.top_p) : NO_MASS;
    if (cut.wanted == NO_COUNT && cut.target == NO_MASS) {
        cut.bin = -1;
        if (threadIdx.x == 0) cuts[b] = cut;
        return;
    }
    const Found found = reached<BINS>(bins, upto, [&](unsigned count, Mass mass) {
        return count >= cut.wanted || mass >= cut.target;
    });
    cut.bin = found.bin, cut.above = found.above, cut.mass = found.units;
    if (threadIdx.x == 0) cuts[b] = cut;
}
