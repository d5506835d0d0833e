// evidential.h, the formulas of the CPU and of the GPU kernels, on one row, one class per step:
// loss against the textbook formula in double, gradient against its central differences.
#include <initializer_list>

#define MICS_NAMESPACE mics_test
#include "evidential.h"
#include "expect.h"

namespace {

using mics::Activation;
using mics::EvidentialCall;

constexpr int kViews = 3, kClasses = 5;
constexpr double kKl = 0.7;

struct Case {
    Activation activation;
    double y[kClasses];
    bool present[kViews];
};

template <bool Soft> struct OneRow {
    using F = float;
    const Case& test;
    const float* logits;
    float fused_[kClasses], gradient[kViews * kClasses], loss = 0.0f;

    int steps() const { return kClasses; }
    float target(int j) const { return static_cast<float>(test.y[j]); }
    float evidence(int v, int j) const {
        float slope;
        return evidence(v, j, slope);
    }
    float evidence(int v, int j, float& slope) const {
        const float e = mics_test::activate(logits[v * kClasses + j], test.activation, slope);
        return test.present[v] ? e : 0.0f;
    }
    void keep_fused(int j, float x) { fused_[j] = x; }
    float fused(int j) const { return fused_[j]; }
    float sum(float x) const { return x; }
    float present(int v) const { return test.present[v] ? 1.0f : 0.0f; }
    float any_present() const { return 1.0f; }
    float counted() const { return 1.0f; }
    float weight() const { return 2.0f; }
    float target_mass() const {
        double mass = 0.0;
        for (double y : test.y) mass += y;
        return static_cast<float>(mass);
    }
    void keep_loss(int, float x) { loss = x; }
    void keep_gradient(int v, int j, float x) { gradient[v * kClasses + j] = x; }
};

double digamma(double a) {
    double shift = 0.0;
    for (; a < 20.0; a += 1.0) shift -= 1.0 / a;
    const double q = 1.0 / (a * a);
    return shift + std::log(a) - 0.5 / a -
           q * (1.0 / 12 - q * (1.0 / 120 - q * (1.0 / 252 - q / 240)));
}

double opinion_loss(const double* e, const double* y) {
    double all = kClasses, misleading = kClasses;
    for (int k = 0; k < kClasses; ++k) all += e[k], misleading += (1.0 - y[k]) * e[k];
    double kl = std::lgamma(misleading) - std::lgamma(kClasses), expected = 0.0;
    for (int k = 0; k < kClasses; ++k) {
        const double a = 1.0 + (1.0 - y[k]) * e[k];
        kl += (a - 1.0) * (digamma(a) - digamma(misleading)) - std::lgamma(a);
        expected += y[k] * (digamma(all) - digamma(1.0 + e[k]));
    }
    return expected + kKl * kl;
}

double activate(double z, Activation activation) {
    if (activation == Activation::softplus) return std::log1p(std::exp(z));
    if (activation == Activation::exp) return std::exp(std::fmin(std::fmax(z, -10.0), 10.0));
    return std::fmax(z, 0.0);
}

double row_loss(const Case& test, const double* logits) {
    double total = 0.0, fused[kClasses] = {};
    for (int v = 0; v < kViews; ++v) {
        if (!test.present[v]) continue;
        double e[kClasses];
        for (int k = 0; k < kClasses; ++k) {
            e[k] = activate(logits[v * kClasses + k], test.activation);
            fused[k] += e[k] + fused[k] * e[k] / kClasses;
        }
        total += opinion_loss(e, test.y);
    }
    return 2.0 * (total + opinion_loss(fused, test.y));
}

template <bool Soft> void check(const Case& test) {
    float logits[kViews * kClasses];
    double exact[kViews * kClasses];
    for (int i = 0; i < kViews * kClasses; ++i) {
        logits[i] = 0.25f * static_cast<float>((i * 7) % 11 - 4) + 0.125f;
        exact[i] = logits[i];
    }
    EvidentialCall call{};
    call.views = kViews;
    call.classes = kClasses;
    call.kl_weight = static_cast<float>(kKl);
    call.gradient = logits;  // not null: wanted
    OneRow<Soft> row{test, logits, {}, {}};
    mics_test::evidential_row<Soft, true>(row, call);
    const double wanted = row_loss(test, exact);
    expect_near("loss", 0, row.loss, wanted, 1e-6 * std::fabs(wanted));
    for (int i = 0; i < kViews * kClasses; ++i) {
        const double step = 1e-5, z = exact[i];
        exact[i] = z + step;
        const double above = row_loss(test, exact);
        exact[i] = z - step;
        const double below = row_loss(test, exact);
        exact[i] = z;
        expect_near("gradient", i, row.gradient[i], (above - below) / (2.0 * step), 3e-6);
    }
}

}  // namespace

int main() {
    for (Activation activation : {Activation::softplus, Activation::exp, Activation::relu}) {
        check<false>({activation, {0, 0, 1, 0, 0}, {true, true, true}});
        check<false>({activation, {0, 0, 0, 0, 1}, {true, false, true}});
        check<true>({activation, {0.1, 0.2, 0.3, 0.4, 0}, {true, true, true}});
        check<true>({activation, {0, 0, 1, 0, 0}, {false, true, true}});
    }
    return failures != 0;
}
