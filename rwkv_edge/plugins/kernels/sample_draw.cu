// The token of every stream: of what top-k, top-p and min-p keep, raised to 1/temperature, where the running sum reaches
// the fraction that the host has drawn. A stream of temperature 0 gets its largest score's token.
//
// Further parameter: CUT, whether `sample_cut` came before; it is 0 where no stream has a top-k or top-p.
//
// Every block sums what is certainly kept of its slice and lists the tokens of the bin in which the cut lies. The last
// block finds the cut among those, adds what passes, and looks for the token: first for its slice, then in it.
#include "sample_bins.cuh"

constexpr int HIGH = 10, LOW = REST - HIGH;  // bits of the two searches within a bin
constexpr int WORDS = VOCABULARY / 32 + 1 > 2 << HIGH ? VOCABULARY / 32 + 1 : 2 << HIGH;

struct Listed {
    int token;
    unsigned bits;  // of its weight
};

// What passes: larger weights, and of equal ones the tokens up to `last`.
struct Limit {
    unsigned bits;
    int last;
    __device__ __forceinline__ bool passes(unsigned weight, int token) const {
        return weight > bits || (weight == bits && token <= last);
    }
};

// The scores of one stream.
struct Stream {
    const float* scores;
    float peak;
    float temperature, min_p;

    // The weight of a token raised to 1/temperature, 0 where it does not pass.
    __device__ __forceinline__ Mass mass(float below, unsigned bits, int token, const Limit& limit) const {
        if (!limit.passes(bits, token) || __uint_as_float(bits) < min_p) return 0;
        if (temperature == 1.0f) return mass_of(__uint_as_float(bits));
        return mass_of(__uint_as_float(weight_bits(__fdiv_rn(below, fmaxf(temperature, 1e-30f)))));
    }
    __device__ __forceinline__ Mass mass(const Listed& item, const Limit& limit) const {
        return mass(scores[item.token] - peak, item.bits, item.token, limit);
    }
};

// Four tokens of a stream from `first` on; behind the vocabulary they weigh nothing.
struct Four {
    int first;
    float below[4];    // the largest score
    unsigned bits[4];  // of the weights
    bool fault;        // a score is no number

    __device__ __forceinline__ Four(const Stream& stream, int first) : first(first), fault(false) {
        float x[4] = {-infinity(), -infinity(), -infinity(), -infinity()};
        if (first < VOCABULARY) load4(x, stream.scores + first);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            fault = fault || (first < VOCABULARY && !(x[e] <= stream.peak));
            below[e] = x[e] - stream.peak, bits[e] = weight_bits(below[e]);
        }
    }
    // Returns their sum.
    __device__ __forceinline__ Mass masses(Mass (&kept)[4], const Stream& stream, const Limit& limit) const {
#pragma unroll
        for (int e = 0; e < 4; ++e) kept[e] = stream.mass(below[e], bits[e], first + e, limit);
        return kept[0] + kept[1] + kept[2] + kept[3];
    }
};

// What is listed, a thread's share of it; the loads of AT_ONCE are under way together.
template <typename Use> __device__ __forceinline__ void for_each(const Listed* list, unsigned count, Use use) {
    constexpr int AT_ONCE = 4;
    for (unsigned first = threadIdx.x; first < count; first += AT_ONCE * THREADS) {
        Mass raw[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
            raw[i] = fresh(reinterpret_cast<const Mass*>(list) + min(first + i * THREADS, count - 1));
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
            if (first + i * THREADS < count)
                use(Listed{static_cast<int>(raw[i] & 0xffffffff), static_cast<unsigned>(raw[i] >> 32)});
    }
}

// The token of rank `rank` (from 1) of those with this weight.
__device__ int ranked(const Listed* list, unsigned count, unsigned bits, unsigned rank, unsigned* words) {
    __shared__ unsigned scratch[WARPS];
    __shared__ int found;
    constexpr int EACH = (WORDS + THREADS - 1) / THREADS;
    for (int i = threadIdx.x; i < WORDS; i += THREADS) words[i] = 0;
    __syncthreads();
    for_each(list, count, [&](const Listed& item) {
        if (item.bits == bits) atomicOr(words + item.token / 32, 1u << item.token % 32);
    });
    __syncthreads();
    unsigned mine = 0;
    for (int i = 0; i < EACH; ++i) {
        const int at = threadIdx.x * EACH + i;
        mine += at < WORDS ? __popc(words[at]) : 0;
    }
    unsigned before = running_sum(mine, scratch) - mine;
    for (int i = 0; i < EACH && before < rank && rank <= before + mine; ++i) {
        const unsigned word = words[threadIdx.x * EACH + i];
        const unsigned here = __popc(word);
        if (rank <= before + here) {
            unsigned left = word;
            for (unsigned skip = rank - before; skip > 1; --skip) left &= left - 1;
            found = (threadIdx.x * EACH + i) * 32 + __ffs(left) - 1;
            break;
        }
        before += here, mine -= here;
    }
    __syncthreads();
    return found;
}

// The limit within the bin of the cut, by the other 19 bits: first their upper 10, then the rest. words are zeros.
__device__ Limit limit_of(const Cut& cut, const Listed* list, unsigned count, unsigned* words) {
    unsigned *counts = words, *rests = words + (1 << HIGH);
    const int exponent = cut.bin >> (23 - REST);
    const auto enough = [&](unsigned n, Mass units) {
        return cut.above + n >= cut.wanted || (cut.target != NO_MASS && cut.mass + fixed(units, exponent) >= cut.target);
    };
    for_each(list, count, [&](const Listed& item) {
        const unsigned at = item.bits >> LOW & ((1u << HIGH) - 1);
        atomicAdd(counts + at, 1u), atomicAdd(rests + at, item.bits & ((1u << LOW) - 1));
    });
    __syncthreads();
    const Mass leading = leading_bits(cut.bin);
    Bin upper[(1 << HIGH) / THREADS];
#pragma unroll
    for (int i = 0; i < (1 << HIGH) / THREADS; ++i) {
        const int at = place_of_bin<1 << HIGH>(i);
        upper[i] = {counts[at], counts[at] * (leading | static_cast<Mass>(at) << LOW) + rests[at]};
    }
    const Found part = reached<1 << HIGH>(upper, running_sum(sum_of(upper)), enough);

    for (int i = threadIdx.x; i < 1 << LOW; i += THREADS) counts[i] = 0;
    __syncthreads();
    const unsigned prefix = static_cast<unsigned>(cut.bin) << HIGH | part.bin;
    for_each(list, count, [&](const Listed& item) {
        if (item.bits >> LOW == prefix) atomicAdd(counts + (item.bits & ((1u << LOW) - 1)), 1u);
    });
    __syncthreads();
    Bin lower[(1 << LOW) / THREADS];
#pragma unroll
    for (int i = 0; i < (1 << LOW) / THREADS; ++i) {
        const int at = place_of_bin<1 << LOW>(i);
        const Mass mantissa = leading | static_cast<Mass>(part.bin) << LOW | at;
        lower[i] = {counts[at], counts[at] * mantissa};
    }
    const Found last = reached<1 << LOW>(lower, running_sum(sum_of(lower)), [&](unsigned n, Mass units) {
        return enough(part.above + n, part.units + units);
    });
    const unsigned equal = counts[last.bin], room = cut.wanted - (cut.above + part.above + last.above);
    Limit limit{prefix << LOW | last.bin, NOWHERE};
    __syncthreads();
    if (room < equal) limit.last = ranked(list, count, limit.bits, room, words);
    return limit;
}

// Puts the block's tokens of the bin of the cut on the list, side by side. here [2] holds a zero first.
__device__ __forceinline__ void gather(const Four& four, int bin, Listed* list, unsigned* count, unsigned* here) {
    bool inside[4];
    unsigned mine = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        inside[e] = four.first < VOCABULARY && static_cast<int>(four.bits[e] >> REST) == bin;
        mine += inside[e];
    }
    unsigned at = mine ? atomicAdd(here, mine) : 0;
    __syncthreads();
    if (threadIdx.x == 0 && here[0]) here[1] = atomicAdd(count, here[0]);
    __syncthreads();
    if (!mine) return;
    at += here[1];
#pragma unroll
    for (int e = 0; e < 4; ++e)
        if (inside[e]) list[at++] = {four.first + e, four.bits[e]};
}

// Where the running sum of what passes reaches the fraction of all; slices [THREADS] are the sums of the slices.
__device__ int drawn(const Stream& stream, const Limit& limit, const Mass* slices, Mass fraction) {
    __shared__ Mass scratch[WARPS], point;
    __shared__ int place;
    const Mass slice = slices[threadIdx.x];
    Mass sum = running_sum(slice, scratch);
    if (threadIdx.x == THREADS - 1) point = share(sum, fraction);
    __syncthreads();
    const Mass all = point;
    __syncthreads();
    if (sum - slice < all && all <= sum) place = threadIdx.x, point = all - (sum - slice);
    __syncthreads();
    const Four four(stream, place * SLICE + 4 * threadIdx.x);
    const Mass rest = point;
    Mass kept[4];
    const Mass mine = four.masses(kept, stream, limit);
    sum = running_sum(mine, scratch);
    if (sum - mine < rest && rest <= sum) {
        Mass before = sum - mine;
        int e = 0;
        while (e < 3 && before + kept[e] < rest) before += kept[e++];
        place = four.first + e;
    }
    __syncthreads();
    return place;
}

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
    const float* scores, const float* tops, const int* tops_at, const Settings* settings, const Mass* fractions,
    const Cut* cuts, const int* stops, Mass* masses, Listed* list, unsigned* list_count, unsigned* faults,
    unsigned* arrived, int* tokens, int* history, unsigned* turns, int* accepted, int* halted) {
    __shared__ unsigned words[CUT ? WORDS : 1], here[2];
    __shared__ Mass slices[THREADS], scratch[WARPS];
    const int b = blockIdx.y;
    if (threadIdx.x == 0) here[0] = 0;
    for (int i = threadIdx.x; i < (CUT ? WORDS : 1); i += THREADS) words[i] = 0;
    wait_for_previous();
    const Ends ends{tokens + b, history + b, turns + b, accepted + b, halted + b, stops};
    if (halted[b]) {
        if (blockIdx.x == 0 && threadIdx.x == 0) ends.give(NO_TOKEN);
        return;
    }
    list += static_cast<long long>(b) * VOCABULARY, masses += b * SLICES;
    const Settings how = settings[b];
    const float* row = scores + static_cast<long long>(b) * VOCABULARY;
    const Stream stream{row, largest(tops + b * COUNT), how.temperature, how.min_p};  // its barrier ends the zeros
    Cut cut;
    cut.bin = -1;
    if (CUT) cut = cuts[b];
    const bool all = cut.bin < 0;
    Limit limit{static_cast<unsigned>(cut.bin + 1) << REST, NOWHERE};  // all of the bins above

    Mass kept[4];
    const Four four(stream, blockIdx.x * SLICE + 4 * threadIdx.x);
    if (CUT && !all) gather(four, cut.bin, list, list_count + b, here);
    const Mass sum = running_sum(four.masses(kept, stream, limit), scratch);
    if (four.fault) faults[b] = 1;
    if (threadIdx.x == THREADS - 1) masses[blockIdx.x] = sum;
    if (!is_last(arrived + b)) return;

    const unsigned count = all ? 0 : fresh(list_count + b);
    const bool fault = fresh(faults + b) || stream.peak == infinity();
    slices[threadIdx.x] = threadIdx.x < SLICES ? fresh(masses + threadIdx.x) : 0;
    __syncthreads();
    if (threadIdx.x == 0) list_count[b] = faults[b] = 0;
    if (fault || stream.peak == -infinity()) {
        if (threadIdx.x == 0) ends.give(fault ? NOT_A_NUMBER : NONE_LEFT);
        return;
    }
    int token;
    if (how.temperature == 0.0f) {
        token = best_of<COUNT>(tops + b * COUNT, tops_at + b * COUNT).token;
    } else {
        if (CUT && !all) {
            limit = limit_of(cut, list, count, words);
            for_each(list, count, [&](const Listed& item) {
                atomicAdd(slices + item.token / SLICE, stream.mass(item, limit));
            });
            __syncthreads();
        }
        token = drawn(stream, limit, slices, fractions[*ends.turn % RING * STREAMS + b]);
    }
    if (threadIdx.x == 0) ends.give(token);
}
