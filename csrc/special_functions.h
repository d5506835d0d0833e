// Digamma, trigamma and their relatives for arguments a = 1 + e >= 1, e >= 0, in float32.
//
// With t = 1/a in (0, 1], each function without its logarithm is a polynomial in t
// (special_coefficients.h; derivation: kernels/mics_kernels/evidential/README.md). No branch, no
// recurrence, no table: F is float on a GPU and a vector of floats on a CPU.
//
// Translation units are compiled for different instruction sets, so everything here is in a
// namespace of its own, MICS_NAMESPACE: the linker must never merge two versions of a function.
#pragma once

#include <cstdint>
#include <cstring>

#include "special_coefficients.h"

#if defined(__CUDACC__)
#define MICS_INLINE __device__ __forceinline__
#define MICS_UNROLL _Pragma("unroll")
#else
#define MICS_INLINE inline __attribute__((always_inline))
#define MICS_UNROLL
#endif

#ifndef MICS_NAMESPACE
#define MICS_NAMESPACE mics_scalar
#endif

namespace MICS_NAMESPACE {

// Integer types with the lanes of F, and the conversion to F. Bit patterns are computed on without
// sign: those of NaN and infinity would overflow.
template <class F> struct Lanes32;
template <> struct Lanes32<float> {
    using Int = int32_t;
    using Unsigned = uint32_t;
    static MICS_INLINE float to_float(int32_t i) { return static_cast<float>(i); }
};

template <class To, class From> MICS_INLINE To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "same number of bits");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

template <class Mask, class F> MICS_INLINE F select(Mask mask, F yes, F no) {
    return mask ? yes : no;
}

// 1 / a; vector types may have a faster way (simd.h).
template <class F> MICS_INLINE F reciprocal(F a) { return 1.0f / a; }

// c0 + c1 t + c2 t^2 + ... in pairs, by Horner's rule in t^2: the chain of dependent operations,
// which limits these kernels, is half as long.
template <class F> MICS_INLINE F pairs(F, F, float c) { return F{} + c; }
template <class F> MICS_INLINE F pairs(F t, F, float c0, float c1) { return c0 + t * c1; }
template <class F, class... Rest>
MICS_INLINE F pairs(F t, F square, float c0, float c1, float c2, Rest... rest) {
    return (c0 + t * c1) + square * pairs(t, square, c2, rest...);
}
template <class F, class... C> MICS_INLINE F polynomial(F t, C... c) {
    return pairs(t, t * t, c...);
}

// ln(x) for positive, normal x.
template <class F> MICS_INLINE F log_of(F x) {
#if defined(__CUDA_ARCH__)
    return logf(x);
#else
    using Int = typename Lanes32<F>::Int;
    using Unsigned = typename Lanes32<F>::Unsigned;
    const Unsigned pattern = bits<Unsigned>(x);
    const Int exponent = Int(pattern - 0x3f3504f3u) >> 23;  // so that x / 2^exponent >= sqrt(1/2)
    const F f = bits<F>(Unsigned(pattern - (Unsigned(exponent) << 23))) - 1.0f;
    const F k = Lanes32<F>::to_float(exponent);
    const F rest = f * f * (f * polynomial(f, MICS_LOG_COEFFICIENTS) - 0.5f);
    return k * 0.693359375f + (f + (rest - k * 2.12194440e-4f));  // ln(2) in two parts
#endif
}

// exp(x) for x <= 88, constant below -87.
template <class F> MICS_INLINE F exp_of(F x) {
#if defined(__CUDA_ARCH__)
    return expf(x);
#else
    using Unsigned = typename Lanes32<F>::Unsigned;
    x = select(x < -87.0f, F{} - 87.0f, x);
    const F shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the fraction is rounded off
    const F n = shifted - 12582912.0f;
    const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const F p = 1.0f + (r + r * r * polynomial(r, MICS_EXP_COEFFICIENTS));
    const Unsigned power = (bits<Unsigned>(shifted) - 0x4b400000u + 127u) << 23;
    return p * bits<F>(power);
#endif
}

// ln(1 + q) for q in [0, 1].
template <class F> MICS_INLINE F log1p_of_unit(F q) {
    return q * polynomial(q, MICS_LOG1P_COEFFICIENTS);
}

// Error of ln(1 + e) from rounding 1 + e.
template <class F> MICS_INLINE F rounded_off(F e, F t) {
    return select(e < 1.0f, (e - ((1.0f + e) - 1.0f)) * t, F{});
}

// ln(1 + e), relatively accurate for small e, too: the rounding error of 1 + e is added back.
template <class F> MICS_INLINE F log1p_of(F e, F t) { return log_of(1.0f + e) + rounded_off(e, t); }

// The sum of ln(x) / 2 + rest over positive, normal x. On a CPU it takes one logarithm, that of
// their product, whose exponent is moved to a sum after each factor. A GPU has a cheap logarithm
// and needs the registers.
template <class F> class HalfLogSum {
  public:
#if defined(__CUDA_ARCH__)
    MICS_INLINE void add(F x, F rest) { rest_ += 0.5f * logf(x) + rest; }
    MICS_INLINE F value() const { return rest_; }
#else
    MICS_INLINE void add(F x, F rest) {
        const Unsigned pattern = bits<Unsigned>(product_ * x);
        const Int exponent = Int(pattern - 0x3f3504f3u) >> 23;  // leaves a product >= sqrt(1/2)
        exponents_ += exponent;
        product_ = bits<F>(Unsigned(pattern - (Unsigned(exponent) << 23)));
        rest_ += rest;
    }
    MICS_INLINE F value() const {
        const F whole = Lanes32<F>::to_float(exponents_) * 0.69314718f;
        return rest_ + 0.5f * (whole + log_of(product_));
    }
#endif

  private:
    F rest_{};
#if !defined(__CUDA_ARCH__)
    using Int = typename Lanes32<F>::Int;
    using Unsigned = typename Lanes32<F>::Unsigned;
    F product_ = F{} + 1.0f;
    Int exponents_{};
#endif
};

// h(1 + e) - 1 with h(a) = lnGamma(a) - (a - 1) digamma(a) + a, less its logarithm ln(a) / 2.
template <class F> MICS_INLINE F h_rest(F one_minus_t, F t) {
    return one_minus_t * polynomial(t, MICS_H_REST_COEFFICIENTS);
}

// digamma(a) - ln(a)
template <class F> MICS_INLINE F digamma_rest(F t) {
    return t * polynomial(t, MICS_DIGAMMA_COEFFICIENTS);
}

template <class F> MICS_INLINE F digamma(F a) { return log_of(a) + digamma_rest(reciprocal(a)); }

template <class F> MICS_INLINE F trigamma(F a) {
    const F t = reciprocal(a);
    return t * polynomial(t, MICS_TRIGAMMA_COEFFICIENTS);
}

// h'(a) = 1 - (a - 1) trigamma(a), from 1 - 1/a and t = 1/a; 1 at a = 1, near 1/(2a) for large a
template <class F> MICS_INLINE F h_slope(F one_minus_t, F t) {
    return t * (1.0f - one_minus_t * polynomial(t, MICS_H_SLOPE_COEFFICIENTS));
}

}  // namespace MICS_NAMESPACE
