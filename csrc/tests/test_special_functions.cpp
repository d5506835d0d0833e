// special_functions.h against 40 digits, as one float and as a vector of floats.
// Tolerances are about twice the errors measured: (absolute, relative) to the value.
#define MICS_NAMESPACE mics_test
#include "expect.h"
#include "simd.h"
#include "truth.h"

namespace {

using namespace mics_test;

void expect_special(const char* what, const Truth& truth, double got, double wanted,
                    double absolute, double relative) {
    expect_near(what, truth.e, got, wanted, absolute + relative * std::fabs(wanted));
}

template <class F> float first(F x) {
    float value;
    memcpy(&value, &x, sizeof value);
    return value;
}

template <class F> void check_all() {
    HalfLogSum<F> logs;
    double sum = 0.0;
    for (const Truth& truth : kTruth) {
        const F e = F{} + truth.e;
        const F a = 1.0f + e;
        const F t = 1.0f / a;
        const F h = 0.5f * log1p_of(e, t) + h_rest(e * t, t);
        expect_special("log1p", truth, first(log1p_of(e, t)), truth.log1p, 0.0, 2.5e-7);
        expect_special("digamma", truth, first(digamma(a)), truth.digamma, 2e-7, 1.5e-7);
        expect_special("trigamma", truth, first(trigamma(a)), truth.trigamma, 0.0, 2.5e-7);
        expect_special("h - 1", truth, first(h), truth.h_less_1, 0.0, 3e-7);
        expect_special("h'", truth, first(h_slope(e * t, t)), truth.h_slope, 0.0, 5e-7);
        logs.add(a, F{} + 1.0f);
        sum += 0.5 * truth.log1p + 1.0;
        if (truth.e < 80.0f) {
            expect_special("exp", truth, first(exp_of(-e)), truth.exp_minus, 0.0, 2e-7);
        }
        if (truth.e <= 1.0f) {
            expect_special("log1p of [0, 1]", truth, first(log1p_of_unit(e)), truth.log1p, 0.0,
                           2e-7);
        }
    }
    expect_near("sum of half logarithms", sum, first(logs.value()), sum, 4e-7 * sum);
}

// Functions of NaN are NaN, and no bit pattern overflows on the way: -DMICS_SANITIZE=ON would
// report it. The logarithm itself is for normal numbers only; what is added to it is NaN.
template <class F> void check_not_numbers() {
    const float inputs[] = {NAN, -NAN, INFINITY, -INFINITY, -1.0f, 0.0f, -3e38f, 3e38f};
    for (float x : inputs) {
        const F a = F{} + x;
        HalfLogSum<F> logs;
        for (int i = 0; i < 3; ++i) logs.add(a, a);
        const float values[] = {first(digamma(a)), first(exp_of(a)), first(logs.value())};
        for (float value : values) {
            if (x != x) expect_near("function of NaN", 0, value != value, 1, 0);
        }
    }
}

void check_halves() {
    for (unsigned pattern = 0; pattern < 0x10000u; ++pattern) {
        const uint16_t half = static_cast<uint16_t>(pattern);
        const float as_bfloat = from_bfloat16(half), as_half = from_float16(half);
        const bool nan = as_half != as_half;
        if (as_bfloat == as_bfloat)
            expect_near("bfloat16", pattern, to_bfloat16(as_bfloat), half, 0);
        if (!nan) expect_near("float16", pattern, to_float16(as_half), half, 0);
    }
    expect_near("1", 1, from_float16(0x3c00), 1.0, 0);
    expect_near("largest", 1, from_float16(0x7bff), 65504.0, 0);
    expect_near("smallest", 1, from_float16(0x0001), 5.9604644775390625e-8, 0);
    expect_near("tie to even", 1, to_float16(1.00048828125f), 0x3c00, 0);
    expect_near("above a tie", 1, to_float16(1.0004884f), 0x3c01, 0);
    expect_near("overflow", 1, to_float16(65520.0f), 0x7c00, 0);
}

}  // namespace

int main() {
    check_all<float>();
    check_all<Vec>();
    check_not_numbers<float>();
    check_not_numbers<Vec>();
    check_halves();
    return failures != 0;
}
