// Integers of a matrix in the registers of tensor cores. A matrix of 8 x 8 pairs of bytes comes transposed from shared
// memory: a lane gets two neighbouring rows k of a pair of columns in int8, or of four columns in int4. So a fragment has
// every second column, or every fourth, and `Sums` puts the columns of its results back in order.
#pragma once
#include "wide_product.cuh"

// a - b and a * b of pairs. Brain has neither before sm_90, but fused multiply-add.
__device__ __forceinline__ unsigned subtract2(unsigned a, unsigned b, Half) {
    asm("sub.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
    return a;
}
__device__ __forceinline__ unsigned multiply2(unsigned a, unsigned b, Half) {
    asm("mul.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
    return a;
}
__device__ __forceinline__ unsigned multiply_add2(unsigned a, unsigned b, unsigned c) {
    asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(a) : "r"(b), "r"(c));
    return a;
}
__device__ __forceinline__ unsigned subtract2(unsigned a, unsigned b, Brain) {
    return multiply_add2(a, 0x3f803f80, b ^ 0x80008000);
}
__device__ __forceinline__ unsigned multiply2(unsigned a, unsigned b, Brain) { return multiply_add2(a, b, 0x80008000); }

// Two rows of two columns in int8: the pair of the first column, and of the second. In Half, the low bits of 1024 + n are n.
__device__ __forceinline__ void widen_bytes(unsigned (&to)[2], unsigned raw, Half) {
    raw ^= 0x80808080;  // n + 128
    to[0] = subtract2(__byte_perm(raw, 0x64646464, 0x4240), 0x64806480, Half{});
    to[1] = subtract2(__byte_perm(raw, 0x64646464, 0x4341), 0x64806480, Half{});
}
// Brain has too few bits for that, float has not: 2^23 + n. Eight bits are exact in Brain.
__device__ __forceinline__ unsigned byte_bits(unsigned raw, unsigned select) {
    return __float_as_uint(__uint_as_float(__byte_perm(raw, 0x4b000000, select)) - 8388736.0f);
}
__device__ __forceinline__ void widen_bytes(unsigned (&to)[2], unsigned raw, Brain) {
    raw ^= 0x80808080;
    to[0] = __byte_perm(byte_bits(raw, 0x7440), byte_bits(raw, 0x7442), 0x7632);
    to[1] = __byte_perm(byte_bits(raw, 0x7441), byte_bits(raw, 0x7443), 0x7632);
}

// The lowest four bits of two rows, times their scale: 1024 + n in Half, 128 + n in Brain, n + 8 by the flipped sign.
__device__ __forceinline__ unsigned widen_nibbles(unsigned raw, unsigned scale, Half) {
    return multiply2(subtract2((raw & 0x000f000f) ^ 0x64086408, 0x64086408, Half{}), scale, Half{});
}
__device__ __forceinline__ unsigned widen_nibbles(unsigned raw, unsigned scale, Brain) {
    return multiply2(subtract2((raw & 0x000f000f) ^ 0x43084308, 0x43084308, Brain{}), scale, Brain{});
}
