// RWKV-4, second of five kernels of a layer: the recurrence, channel by channel, times the receptance.
//
// An average of values weighted by e^key, kept as a numerator and a denominator whose exponents are relative to their
// largest so far. Further parameter: INNER (A). r is the receptance after the sigmoid; all values are float; decay is
// -e^time_decay. Grid (blocks of THREADS channels, B). The new state may be the old: a thread reads before it writes.
#include "fused.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
    const float* r, const float* k, const float* v, const float* __restrict__ decay, const float* __restrict__ first,
    const float* num_in, const float* den_in, const float* max_in,
#if HALT
    const int* halted_flags,
#endif
    float* y, float* num_out, float* den_out, float* max_out) {
    const int channel = blockIdx.x * THREADS + threadIdx.x;
    const bool exists = channel < INNER;
    const long long at = static_cast<long long>(blockIdx.y) * INNER + channel;
    float num = 0.0f, den = 0.0f, top = 0.0f, rate = 0.0f, bonus = 0.0f;
    if (exists) num = num_in[at], den = den_in[at], top = max_in[at], rate = decay[channel], bonus = first[channel];
#if HALT
    const bool halted = halted_flags[blockIdx.y] != 0;
#else
    constexpr bool halted = false;
#endif
    wait_for_previous();
    if (!exists) return;
    const float key = k[at], value = v[at];

    const float now = fmaxf(top, bonus + key);
    const float past = expf(top - now), current = expf(bonus + key - now);
    y[at] = r[at] * (past * num + current * value) / (past * den + current);
    if (halted) return;
    const float next = fmaxf(top + rate, key);
    const float kept = expf(top + rate - next), added = expf(key - next);
    num_out[at] = kept * num + added * value;
    den_out[at] = kept * den + added;
    max_out[at] = next;
}
