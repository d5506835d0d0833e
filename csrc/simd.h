// A vector of MICS_WIDTH floats, in the compiler's own vector types (gcc and clang; x86 and ARM).
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "dtype.h"
#include "special_functions.h"

#ifndef MICS_WIDTH
#define MICS_WIDTH 4  // SSE2 and NEON, the baselines of x86-64 and arm64
#endif

// Before a loop whose arrays are to live in registers.
#define MICS_UNROLLED _Pragma("GCC unroll 32")

namespace MICS_NAMESPACE {

constexpr int kWidth = MICS_WIDTH;
typedef float Vec __attribute__((vector_size(4 * MICS_WIDTH)));
typedef int32_t IntVec __attribute__((vector_size(4 * MICS_WIDTH)));

template <> struct Lanes32<Vec> {
    using Int = IntVec;
    static MICS_INLINE Vec to_float(IntVec i) { return __builtin_convertvector(i, Vec); }
};

#if defined(__AVX512F__) && MICS_WIDTH == 16
// 14 bits and a step of Newton's method, within 1 ulp: a third of the time of a division.
template <> MICS_INLINE Vec reciprocal<Vec>(Vec a) {
    const Vec t = (Vec)_mm512_rcp14_ps((__m512)a);
    return t + t * (1.0f - a * t);
}
#endif

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
template <int Half> MICS_INLINE void swap_blocks(Vec (&rows)[kWidth]) {
    IntVec low, high;
    for (int i = 0; i < kWidth; ++i) {
        low[i] = i & Half ? kWidth + (i ^ Half) : i;
        high[i] = i & Half ? kWidth + i : i ^ Half;
    }
    for (int i = 0; i < kWidth; ++i) {
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

template <int Half = kWidth / 2> MICS_INLINE void transpose(Vec (&rows)[kWidth]) {
    swap_blocks<Half>(rows);
    if constexpr (Half > 1) transpose<Half / 2>(rows);
}

MICS_INLINE float sum_of_lanes(Vec v) {  // pairwise, so the order is fixed and the error small
    float lanes[kWidth];
    store(lanes, v);
    for (int half = kWidth / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

MICS_INLINE float from_bfloat16(uint16_t x) { return bits<float>(static_cast<uint32_t>(x) << 16); }

MICS_INLINE uint16_t to_bfloat16(float x) {  // to nearest, ties to even
    const uint32_t pattern = bits<uint32_t>(x);
    const uint32_t rounded = (pattern + 0x7fffu + ((pattern >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

MICS_INLINE float from_float16(uint16_t x) {
    const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16;
    const uint32_t rest = static_cast<uint32_t>(x & 0x7fffu) << 13;
    // Read as float32 the exponent is 112 too small; a product with 2^112 mends subnormals too.
    const float scaled = bits<float>(rest) * 5.192296858534828e33f;
    const uint32_t magnitude = (x & 0x7c00u) == 0x7c00u ? rest | 0x7f800000u : bits<uint32_t>(scaled);
    return bits<float>(sign | magnitude);
}

MICS_INLINE uint16_t to_float16(float x) {  // to nearest, ties to even
    const uint32_t pattern = bits<uint32_t>(x);
    const uint32_t sign = (pattern >> 16) & 0x8000u;
    const uint32_t magnitude = pattern & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 aligns the bits of a subnormal
        return static_cast<uint16_t>(sign | (bits<uint32_t>(bits<float>(magnitude) + 0.5f) & 0x7ffu));
    }
    return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}

// Numbers of an array from index `from` on, as float32.
MICS_INLINE void widen(const void* array, int64_t from, mics::DType dtype, float* to, int count) {
    if (dtype == mics::DType::float32) {
        memcpy(to, static_cast<const float*>(array) + from, sizeof(float) * count);
        return;
    }
    const uint16_t* halves = static_cast<const uint16_t*>(array) + from;
    if (dtype == mics::DType::bfloat16) {
        for (int i = 0; i < count; ++i) to[i] = from_bfloat16(halves[i]);
    } else {
        for (int i = 0; i < count; ++i) to[i] = from_float16(halves[i]);
    }
}

// float32 numbers into an array from index `to` on.
MICS_INLINE void narrow(const float* from, void* array, int64_t to, mics::DType dtype, int count) {
    if (dtype == mics::DType::float32) {
        memcpy(static_cast<float*>(array) + to, from, sizeof(float) * count);
        return;
    }
    uint16_t* halves = static_cast<uint16_t*>(array) + to;
    if (dtype == mics::DType::bfloat16) {
        for (int i = 0; i < count; ++i) halves[i] = to_bfloat16(from[i]);
    } else {
        for (int i = 0; i < count; ++i) halves[i] = to_float16(from[i]);
    }
}

}  // namespace MICS_NAMESPACE
