// Philox4x32-10 and normal numbers from it: functions of a key and a counter, on any processor.
// Layout and derivation: kernels/mics_kernels/shift/README.md; Salmon, Moraes, Dror, Shaw,
// "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include "simd.h"

namespace MICS_NAMESPACE {

// Lanes of 64 bits with a 32-bit word in their low half. The high half is ignored, so a product of
// two words can stay where its low word is wanted.
typedef uint64_t WordVec __attribute__((vector_size(4 * MICS_WIDTH)));

constexpr uint64_t kLowWord = 0xffffffffu;

// 64-bit products of the low halves.
MICS_INLINE uint64_t multiply_words(uint64_t a, uint64_t b) {
    return (a & kLowWord) * (b & kLowWord);
}
MICS_INLINE WordVec multiply_words(WordVec a, WordVec b) {
#if defined(__AVX512F__) && MICS_WIDTH == 16
    return (WordVec)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && MICS_WIDTH == 8
    return (WordVec)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && MICS_WIDTH == 4
    return (WordVec)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & kLowWord) * (b & kLowWord);
#endif
}

// a ^ b ^ c
MICS_INLINE uint64_t xor3(uint64_t a, uint64_t b, uint64_t c) { return a ^ b ^ c; }
MICS_INLINE WordVec xor3(WordVec a, WordVec b, uint64_t c) {
#if defined(__AVX512F__) && MICS_WIDTH == 16
    return (WordVec)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)(WordVec{} + c),
                                              0x96);
#else
    return a ^ b ^ c;
#endif
}

constexpr int kRounds = 10;

// Key words of every round.
struct PhiloxKey {
    uint64_t words[kRounds][2];

    explicit PhiloxKey(int64_t seed) {
        uint32_t low = static_cast<uint32_t>(seed);
        uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
        for (int round = 0; round < kRounds; ++round) {
            words[round][0] = low;
            words[round][1] = high;
            low += 0x9e3779b9u;
            high += 0xbb67ae85u;
        }
    }
};

// Counters to random words, in place; W is uint64_t or WordVec. Several at once, since each is one
// long chain of dependent operations.
template <class W, int Count>
MICS_INLINE void philox4x32(const PhiloxKey& key, W (&counters)[Count][4]) {
    for (int round = 0; round < kRounds; ++round) {
        for (W(&c)[4] : counters) {
            const W first = multiply_words(c[0], W{} + uint64_t{0xd2511f53u});
            const W second = multiply_words(c[2], W{} + uint64_t{0xcd9e8d57u});
            c[0] = xor3(second >> 32, c[1], key.words[round][0]);
            c[1] = second;
            c[2] = xor3(first >> 32, c[3], key.words[round][1]);
            c[3] = first;
        }
    }
}

// Lane l of a vector belongs to draw `first` + draw_of_lane(l), so that the transpose of four
// vectors in blocks of four lanes brings the normals of a row into the order of its columns.
constexpr int draw_of_lane(int lane) { return lane % 4 * (kWidth / 4) + lane / 4; }

// The words of kWidth draws of a row: words[k] is word k, one draw in each lane.
MICS_INLINE void words_of_draws(const PhiloxKey& key, int64_t first, int64_t row, int64_t offset,
                                UintVec (&words)[4]) {
    WordVec halves[2][4];  // lanes 0, 2, 4 .. and lanes 1, 3, 5 ..
    for (int odd = 0; odd < 2; ++odd) {
        WordVec(&c)[4] = halves[odd];
        for (int l = 0; l < kWidth / 2; ++l)
            c[0][l] = static_cast<uint64_t>(draw_of_lane(2 * l + odd));
        c[0] += static_cast<uint64_t>(first);
        c[1] = WordVec{} + static_cast<uint64_t>(row);
        c[2] = WordVec{} + (static_cast<uint64_t>(row) >> 32);
        c[3] = WordVec{} + static_cast<uint64_t>(offset);
    }
    philox4x32(key, halves);
    for (int k = 0; k < 4; ++k) {
        words[k] = bits<UintVec>(WordVec((halves[0][k] & kLowWord) | (halves[1][k] << 32)));
    }
}

// sqrt(-2 ln u) with u = (n + 1/2) 2^-24, n the upper 24 bits of a word.
MICS_INLINE Vec radius_of(UintVec word) {
    const Vec n = Lanes32<Vec>::to_float(IntVec(word >> 8));
    // u = 2^k (1 + f), f in [sqrt(1/2) - 1, sqrt(2) - 1]; k stays in the exponent field.
    const IntVec k = (bits<IntVec>(Vec(n + 0.5f)) - (0x3f3504f3 + (24 << 23))) & ~0x7fffff;
    const Vec scale = bits<Vec>(IntVec(((127 - 24) << 23) - k));
    // u has 25 bits, but f at most 24: every step is exact, so ln(u) is accurate up to u = 1.
    const Vec f = (n * scale - 1.0f) + 0.5f * scale;
    const Vec rest = f + f * f * (f * polynomial(f, MICS_LOG_SHORT_COEFFICIENTS) - 0.5f);
    const Vec log = Lanes32<Vec>::to_float(k) * 8.2629582e-8f + rest;  // ln(2) / 2^23
    return square_root(-2.0f * log);
}

// cos and sin of 2 pi u, with the same u; a quarter turn is a swap and a sign.
MICS_INLINE void turn_of(UintVec word, Vec& cosine, Vec& sine) {
    const UintVec angle = (word & 0xffffff00u) | 0x80u;  // u in units of 2^-32
    const UintVec quarter = angle + 0x20000000u;  // nearest quarter turn, in the upper two bits
    const Vec t = Lanes32<Vec>::to_float(IntVec(angle << 2)) *
                  2.3283064365386963e-10f;  // quarters from there
    const Vec square = t * t;
    const Vec s = t * polynomial(square, MICS_SINE_COEFFICIENTS);
    const Vec c = 1.0f + square * polynomial(square, MICS_COSINE_COEFFICIENTS);
    const auto odd = IntVec(quarter << 1) < 0;
    const UintVec cosine_sign = (quarter + 0x40000000u) & 0x80000000u,
                  sine_sign = quarter & 0x80000000u;
    cosine = bits<Vec>(UintVec(bits<UintVec>(select(odd, s, c)) ^ cosine_sign));
    sine = bits<Vec>(UintVec(bits<UintVec>(select(odd, c, s)) ^ sine_sign));
}

// Normals of the 4 kWidth columns of kWidth draws of a row, in the order of the columns.
MICS_INLINE void normals_of_draws(const PhiloxKey& key, int64_t first, int64_t row, int64_t offset,
                                  Vec (&normals)[4]) {
    UintVec words[4];
    words_of_draws(key, first, row, offset, words);
    for (int pair = 0; pair < 4; pair += 2) {
        Vec cosine, sine;
        turn_of(words[pair + 1], cosine, sine);
        const Vec radius = radius_of(words[pair]);
        normals[pair] = radius * cosine;
        normals[pair + 1] = radius * sine;
    }
    transpose(normals);
}

}  // namespace MICS_NAMESPACE
