// A vector of MICS_WIDTH floats, in the compiler's own vector types (gcc and clang; x86 and ARM).
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "special_functions.h"

#ifndef MICS_WIDTH
#define MICS_WIDTH 4  // SSE2 and NEON, the baselines of x86-64 and arm64
#endif

// Before loops whose arrays must stay in registers.
#define MICS_UNROLLED _Pragma("GCC unroll 32")

namespace MICS_NAMESPACE {

constexpr int kWidth = MICS_WIDTH;
typedef float Vec __attribute__((vector_size(4 * MICS_WIDTH)));
typedef int32_t IntVec __attribute__((vector_size(4 * MICS_WIDTH)));
typedef uint32_t UintVec __attribute__((vector_size(4 * MICS_WIDTH)));

template <> struct Lanes32<Vec> {
    using Int = IntVec;
    using Unsigned = UintVec;
    static MICS_INLINE Vec to_float(IntVec i) { return __builtin_convertvector(i, Vec); }
};

#if defined(__AVX512F__) && MICS_WIDTH == 16
// 14 bits and a Newton step, within 1 ulp, in a third of the time of a division.
template <> MICS_INLINE Vec reciprocal<Vec>(Vec a) {
    const Vec t = (Vec)_mm512_rcp14_ps((__m512)a);
    return t + t * (1.0f - a * t);
}
#endif

MICS_INLINE Vec square_root(Vec x) {
#if defined(__AVX512F__) && MICS_WIDTH == 16
    return (Vec)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__) && MICS_WIDTH == 8
    return (Vec)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__) && MICS_WIDTH == 4
    return (Vec)_mm_sqrt_ps((__m128)x);
#else
    for (int l = 0; l < kWidth; ++l) x[l] = __builtin_sqrtf(x[l]);
    return x;
#endif
}

MICS_INLINE Vec load(const float* from) {
    Vec v;
    memcpy(&v, from, sizeof v);
    return v;
}

MICS_INLINE void store(float* to, Vec v) { memcpy(to, &v, sizeof v); }

MICS_INLINE IntVec lane_numbers() {
    IntVec v;
    for (int i = 0; i < kWidth; ++i) v[i] = i;
    return v;
}

// Lane l of the result is lane `from[l]` of `v`.
MICS_INLINE Vec shuffle(Vec v, IntVec from) {
#if defined(__clang__)
    Vec to;
    for (int l = 0; l < kWidth; ++l) to[l] = v[from[l]];
    return to;
#else
    return __builtin_shuffle(v, from);
#endif
}

// Stage of a transpose: rows i and i + Half of each block of 2 Half swap their off-diagonal blocks.
template <int Half, int Rows> MICS_INLINE void swap_blocks(Vec (&rows)[Rows]) {
    IntVec low, high;
    for (int i = 0; i < kWidth; ++i) {
        low[i] = i & Half ? kWidth + (i ^ Half) : i;
        high[i] = i & Half ? kWidth + i : i ^ Half;
    }
    for (int i = 0; i < Rows; ++i) {
        if (i & Half) continue;
        const Vec a = rows[i], b = rows[i + Half];
#if defined(__clang__)
        for (int l = 0; l < kWidth; ++l) {
            rows[i][l] = low[l] < kWidth ? a[low[l]] : b[low[l] - kWidth];
            rows[i + Half][l] = high[l] < kWidth ? a[high[l]] : b[high[l] - kWidth];
        }
#else
        rows[i] = __builtin_shuffle(a, b, low);
        rows[i + Half] = __builtin_shuffle(a, b, high);
#endif
    }
}

// Transposes Rows vectors in blocks of Rows lanes.
template <int Rows, int Half = Rows / 2> MICS_INLINE void transpose(Vec (&rows)[Rows]) {
    swap_blocks<Half>(rows);
    if constexpr (Half > 1) transpose<Rows, Half / 2>(rows);
}

MICS_INLINE float sum_of_lanes(Vec v) {  // pairwise, so the order is fixed and the error small
    float lanes[kWidth];
    store(lanes, v);
    for (int half = kWidth / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

// Halves in the low 16 bits of U (uint32_t, or a vector of them), to F and back.
template <class F, class U> MICS_INLINE F widen_bfloat16(U x) { return bits<F>(U(x << 16)); }

template <class U, class F> MICS_INLINE U narrow_bfloat16(F x) {  // to nearest, ties to even
    const U pattern = bits<U>(x);
    const U rounded = (pattern + 0x7fffu + ((pattern >> 16) & 1u)) >> 16;
    return select(x != x, U{} + 0x7fc0u, rounded);
}

template <class F, class U> MICS_INLINE F widen_float16(U x) {
    const U sign = (x & 0x8000u) << 16;
    const U rest = (x & 0x7fffu) << 13;
    // Read as float32 the exponent is 112 too small; a product with 2^112 corrects it, for
    // subnormals, too.
    const F scaled = bits<F>(rest) * 5.192296858534828e33f;
    const U magnitude = select((x & 0x7c00u) == 0x7c00u, U(rest | 0x7f800000u), bits<U>(scaled));
    return bits<F>(U(sign | magnitude));
}

template <class U, class F> MICS_INLINE U narrow_float16(F x) {  // to nearest, ties to even
    const U pattern = bits<U>(x);
    const U sign = (pattern >> 16) & 0x8000u;
    const U magnitude = pattern & 0x7fffffffu;
    // Below 2^-14: adding 0.5 aligns the bits of a subnormal.
    const U subnormal = bits<U>(F(bits<F>(magnitude) + 0.5f)) & 0x7ffu;
    U half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    half = select(magnitude < 0x38800000u, subnormal, half);
    half = select(magnitude >= 0x477ff000u, U{} + 0x7c00u, half);
    return sign | select(magnitude > 0x7f800000u, U{} + 0x7e00u, half);
}

MICS_INLINE float from_bfloat16(uint16_t x) { return widen_bfloat16<float>(uint32_t{x}); }
MICS_INLINE float from_float16(uint16_t x) { return widen_float16<float>(uint32_t{x}); }

MICS_INLINE uint16_t to_bfloat16(float x) {
    return static_cast<uint16_t>(narrow_bfloat16<uint32_t>(x));
}

MICS_INLINE uint16_t to_float16(float x) {
    return static_cast<uint16_t>(narrow_float16<uint32_t>(x));
}

}  // namespace MICS_NAMESPACE
