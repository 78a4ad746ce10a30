// Group norm, bonus and gate after `wide_sequence`: a warp has one head of one row.
// Grid (blocks of WARPS heads, M). bonus [M, H]; y, v, g [M, A] float; output ACT.
#include "wide_wkv.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
    const float* __restrict__ y, const float* __restrict__ v, const float* __restrict__ g,
    const float* __restrict__ bonus, const float* __restrict__ norm_weight, const float* __restrict__ norm_bias,
    Act* __restrict__ output) {
    const int head = blockIdx.x * WARPS + threadIdx.x / 32, heads = INNER / HEAD;
    const bool there = head < heads;
    const int channel = (there ? head : 0) * HEAD;
    const long long at = static_cast<long long>(blockIdx.y) * INNER + channel;
    float scale[CHANNELS], shift[CHANNELS], out[CHANNELS], value[CHANNELS], gate[CHANNELS];
    load_channels(scale, norm_weight + channel), load_channels(shift, norm_bias + channel);
    wait_for_rows();
    load_channels(out, y + at), load_channels(value, v + at), load_channels(gate, g + at);
    const float factor = bonus[static_cast<long long>(blockIdx.y) * heads + channel / HEAD];
    if (there) give_head(out, value, factor, scale, shift, gate, output + at);
}
