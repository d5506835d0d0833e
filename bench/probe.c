/* The most that one thread of this processor can do; bench/peaks.py builds, runs and times it. */

#include <string.h>

#if defined(__AVX512F__)
#define WIDTH 64 /* bytes of a vector register */
#define CHAINS 24
#elif defined(__AVX__)
#define WIDTH 32
#define CHAINS 12 /* of 16 registers; two hold the factors */
#elif defined(__aarch64__)
#define WIDTH 16
#define CHAINS 24
#else
#define WIDTH 16
#define CHAINS 12
#endif

#if defined(__clang__)
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 32")
#endif

typedef float vector __attribute__((vector_size(WIDTH), aligned(WIDTH)));

/* Independent multiply-adds: more chains than latency times units. */
#define ADVANCE(more)                 \
    for (long k = 0; k < rounds; k++) \
        UNROLLED for (int chain = 0; chain < CHAINS; chain++) more;

static float total(const vector *sums, int count) {
    float sum = 0;
    for (int chain = 0; chain < count; chain++)
        for (int lane = 0; lane < WIDTH / 4; lane++) sum += sums[chain][lane];
    return sum;
}

/* FLOPs per round. */
long fma_flops(void) { return 2L * CHAINS * WIDTH / 4; }

float fma_rounds(long rounds, float factor, float term) {
    vector sums[CHAINS], factors, terms;
    for (int lane = 0; lane < WIDTH / 4; lane++) factors[lane] = factor, terms[lane] = term;
    for (int chain = 0; chain < CHAINS; chain++) sums[chain] = terms * (float)chain;
    ADVANCE(sums[chain] = sums[chain] * factors + terms)
    return total(sums, CHAINS);
}

/* The same for bfloat16 products summed in float32; 0 FLOPs without such an instruction. */
#if defined(__AVX512BF16__)
#include <immintrin.h>

long bf16_flops(void) { return 2L * CHAINS * WIDTH / 2; }

float bf16_rounds(long rounds, float factor, float term) {
    __m512 sums[CHAINS];
    __m512bh left = _mm512_cvtne2ps_pbh(_mm512_set1_ps(factor), _mm512_set1_ps(factor));
    __m512bh right = _mm512_cvtne2ps_pbh(_mm512_set1_ps(term), _mm512_set1_ps(term));
    for (int chain = 0; chain < CHAINS; chain++) sums[chain] = _mm512_set1_ps((float)chain);
    ADVANCE(sums[chain] = _mm512_dpbf16_ps(sums[chain], left, right))
    return total((const vector *)sums, CHAINS);
}
#else
long bf16_flops(void) { return 0; }
float bf16_rounds(long rounds, float factor, float term) { return rounds * factor * term; }
#endif

#define BLOCK 65536L /* bytes per step; passes alternate in direction, to meet what a cache kept */

static long place(long pass, long block, long blocks) {
    return BLOCK * (pass % 2 ? blocks - 1 - block : block);
}

/* Reads `bytes`, a multiple of BLOCK, `passes` times. */
float read_passes(const char *data, long bytes, long passes) {
    vector sums[8] = {{0}};
    for (long pass = 0; pass < passes; pass++)
        for (long block = 0; block < bytes / BLOCK; block++) {
            const vector *values = (const vector *)(data + place(pass, block, bytes / BLOCK));
            for (long k = 0; k < BLOCK / WIDTH; k += 8)
                for (int chain = 0; chain < 8; chain++) sums[chain] += values[k + chain];
        }
    return total(sums, 8);
}

/* Copies the first half of `bytes` to the second one, block by block or, with `whole`, at once, so
   that the C library may write around the caches. */
float copy_passes(char *data, long bytes, long passes, int whole) {
    long half = bytes / 2;
    for (long pass = 0; pass < passes; pass++)
        if (whole)
            memcpy(data + half, data, half);
        else
            for (long block = 0; block < half / BLOCK; block++) {
                long from = place(pass, block, half / BLOCK);
                memcpy(data + half + from, data + from, BLOCK);
            }
    return data[bytes - 1];
}
