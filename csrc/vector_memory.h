// Arrays of any dtype, to and from float32 and vectors (whole, or the first `count` lanes).
#pragma once

#include "dtype.h"
#include "simd.h"

namespace MICS_NAMESPACE {

typedef uint16_t HalfVec __attribute__((vector_size(2 * MICS_WIDTH)));

template <mics::DType D> MICS_INLINE Vec widen(HalfVec halves) {
    const UintVec wide = __builtin_convertvector(halves, UintVec);
    return D == mics::DType::bfloat16 ? widen_bfloat16<Vec>(wide) : widen_float16<Vec>(wide);
}

template <mics::DType D> MICS_INLINE HalfVec narrow(Vec v) {
    const UintVec wide =
        D == mics::DType::bfloat16 ? narrow_bfloat16<UintVec>(v) : narrow_float16<UintVec>(v);
    return __builtin_convertvector(wide, HalfVec);
}

// Elements i .. i + count - 1, then zeros.
template <mics::DType D> MICS_INLINE Vec load_as(const void* array, int64_t i, int count = kWidth) {
    if constexpr (D == mics::DType::float32) {
        Vec v{};
        memcpy(&v, static_cast<const float*>(array) + i,
               sizeof(float) * static_cast<size_t>(count));
        return v;
    } else {
        HalfVec halves{};
        memcpy(&halves, static_cast<const uint16_t*>(array) + i,
               sizeof(uint16_t) * static_cast<size_t>(count));
        return widen<D>(halves);
    }
}

template <mics::DType D>
MICS_INLINE void store_as(void* array, int64_t i, Vec v, int count = kWidth) {
    if constexpr (D == mics::DType::float32) {
        memcpy(static_cast<float*>(array) + i, &v, sizeof(float) * static_cast<size_t>(count));
    } else {
        const HalfVec halves = narrow<D>(v);
        memcpy(static_cast<uint16_t*>(array) + i, &halves,
               sizeof(uint16_t) * static_cast<size_t>(count));
    }
}

// Numbers of an array from index `from` on, as float32.
MICS_INLINE void read_floats(const void* array, int64_t from, mics::DType dtype, float* to,
                             int count) {
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
MICS_INLINE void write_floats(const float* from, void* array, int64_t to, mics::DType dtype,
                              int count) {
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
