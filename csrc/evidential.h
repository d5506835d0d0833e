// Evidential fusion and its loss for one row, or for a vector of rows: the formulas of
// kernels/mics_kernels/evidential/README.md, written once for every device.
//
// A row is V views of C classes. `Lanes` is the layout of a row in a processor: a GPU thread group
// or a vector register spread over the classes, or a vector register spread over rows. It provides
//
//   F                          float, or a vector of floats
//   int steps() const          steps that cover all classes
//   F target(j)                y of the classes of step j (0 or 1 for labels)
//   F evidence(v, j)           evidence of view v, 0 where it is missing or there is no class
//   F evidence(v, j, &slope)   the same again, with d evidence / d input
//   fused(j), keep_fused(j, f) the fused evidence, written once and read back
//   F sum(x)                   sum over the classes that other lanes hold
//   present(v), any_present(), counted(), weight(), target_mass()     of the row; flags are 0 or 1
//   keep_loss(v, x), keep_gradient(v, j, x)
#pragma once

#include "dtype.h"
#include "special_functions.h"

namespace mics {

constexpr int kMaxViews = 8;

enum class Activation : int { identity, softplus, exp, relu };

// A call of evidential_loss (fuse = false) or evidential_fusion_loss; every array is contiguous.
struct EvidentialCall {
    const void* input;       // (B, V, C) logits, or evidence with Activation::identity
    const int64_t* labels;   // (B,), or null if there are `targets`
    const float* targets;    // (B, C) probabilities, or null
    const uint8_t* present;  // (B, V), or null: all present
    const float* weight;     // (B,), or null: all are 1
    const float* count;      // 1 float: every loss and gradient is divided by it; null: by 1
    float* losses;           // fuse: (B,), else (B, V)
    float* fused;            // (B, C), fuse only
    void* gradient;          // (B, V, C) of the input's dtype, or null: not wanted
    int64_t rows;
    int64_t ignore_index;
    int views;
    int classes;
    float kl_weight;
    const float* kl_weight_on_gpu;  // replaces kl_weight if not null
    Activation activation;
    DType dtype;
    bool fuse;
};

}  // namespace mics

namespace MICS_NAMESPACE {

using mics::Activation;
using mics::EvidentialCall;
using mics::kMaxViews;

// Evidence from a logit, and its derivative.
template <class F> MICS_INLINE F activate(F z, Activation activation, F& slope) {
    if (activation == Activation::softplus) {
        const F q = exp_of(select(z < 0.0f, z, -z));
        const F positive = reciprocal(1.0f + q);
        slope = select(z < 0.0f, q * positive, positive);
        return select(z < 0.0f, F{}, z) + log1p_of_unit(q);
    }
    if (activation == Activation::exp) {
        const F inside = select(z < -10.0f, F{} - 10.0f, select(z > 10.0f, F{} + 10.0f, z));
        const F e = exp_of(inside);
        slope = select(inside == z, e, F{});
        return e;
    }
    if (activation == Activation::relu) {
        slope = select(z > 0.0f, F{} + 1.0f, F{});
        return select(z < 0.0f, F{}, z);
    }
    slope = F{} + 1.0f;
    return z;
}

// Sums over classes that the loss of an opinion needs.
template <class F> struct Sums {
    F evidence{};     // of all classes
    F misleading{};   // of the wrong ones, (1 - y) e
    HalfLogSum<F> h;  // h(1 + (1 - y) e) - 1
    F expected{};     // labels: e of the right class; probabilities: y digamma(1 + e)
};

template <bool Soft, class F> MICS_INLINE void add_class(Sums<F>& sums, F e, F y) {
    const F wrong = (1.0f - y) * e;
    const F t = reciprocal(1.0f + wrong);
    sums.evidence += e;
    sums.misleading += wrong;
    sums.h.add(1.0f + wrong, 0.5f * rounded_off(wrong, t) + h_rest(wrong * t, t));
    if constexpr (Soft) {
        sums.expected += y * digamma(1.0f + e);
    } else {
        sums.expected += y * e;
    }
}

// The same sums over the classes of all lanes.
template <class F> struct Totals {
    F evidence, misleading, h, expected;
};

// Loss of an opinion, and the gradient terms that all classes share.
template <class F> struct Opinion {
    F loss;
    F strength;  // sum(y) trigamma(S)
    F right;     // labels: trigamma(alpha_y)
    F kl;        // (C - 1) trigamma(S~) + h'(S~) = 1 - (S~ - C) trigamma(S~)
};

template <bool Soft, class F>
MICS_INLINE Opinion<F> judge(const Totals<F>& sums, F target_mass, int classes, float kl_weight) {
    const float flat = static_cast<float>(classes);
    const float flat_t = 1.0f / flat;
    const F alpha_right = 1.0f + sums.expected;
    F expected = sums.expected;
    if constexpr (!Soft) expected = target_mass * digamma(alpha_right);

    // S~ / C - 1: with it, KL is relatively accurate down to no evidence at all.
    const F excess = sums.misleading * flat_t;
    const F strength = flat + sums.misleading;
    const F t = reciprocal(strength);
    const F rest = h_rest(1.0f - t, t) - h_rest(1.0f - flat_t, flat_t) +
                   (flat - 1.0f) * (digamma_rest(t) - digamma_rest(flat_t));
    const F kl = (flat - 0.5f) * log1p_of(excess, reciprocal(1.0f + excess)) + (rest - sums.h);

    Opinion<F> opinion;
    const F all = flat + sums.evidence;
    opinion.loss = target_mass * digamma(all) - expected + kl_weight * select(kl < 0.0f, F{}, kl);
    opinion.strength = target_mass * trigamma(all);
    opinion.right = trigamma(alpha_right);
    // Two forms of one number, each where its terms do not cancel.
    const F psi1 = trigamma(strength);
    opinion.kl = select(excess < 1.0f, 1.0f - sums.misleading * psi1,
                        (flat - 1.0f) * psi1 + h_slope(1.0f - t, t));
    return opinion;
}

// d loss / d evidence of one class.
template <bool Soft, class F>
MICS_INLINE F slope_of(const Opinion<F>& opinion, F e, F y, float kl_weight) {
    F right = opinion.right;
    if constexpr (Soft) right = trigamma(1.0f + e);
    const F wrong = 1.0f - y;
    const F misleading = wrong * e;
    const F t = reciprocal(1.0f + misleading);
    const F kl = wrong * (opinion.kl - h_slope(misleading * t, t));
    return opinion.strength - y * right + kl_weight * kl;
}

// Two sweeps over the classes of a row: sums and fusion, then the gradient.
template <bool Soft, bool Fuse, class Lanes>
MICS_INLINE void evidential_row(Lanes& lanes, const EvidentialCall& call) {
    using F = typename Lanes::F;
    const float share = 1.0f / static_cast<float>(call.classes);
    const int steps = lanes.steps();
    constexpr int kOpinions = kMaxViews + (Fuse ? 1 : 0);  // the fused one comes last

    Sums<F> sums[kOpinions];
    for (int j = 0; j < steps; ++j) {
        const F y = lanes.target(j);
        F fused{};
        MICS_UNROLL
        for (int v = 0; v < kMaxViews; ++v) {
            if (v >= call.views) break;
            const F e = lanes.evidence(v, j);
            add_class<Soft>(sums[v], e, y);
            fused = fused + e + fused * e * share;  // every term >= 0: nothing cancels
        }
        if constexpr (Fuse) {
            add_class<Soft>(sums[kMaxViews], fused, y);
            lanes.keep_fused(j, fused);
        }
    }

    Opinion<F> opinions[kOpinions];
    F total{};
    MICS_UNROLL
    for (int v = 0; v < kOpinions; ++v) {
        if (v >= call.views && v < kMaxViews) continue;
        const Sums<F>& s = sums[v];
        const Totals<F> totals = {lanes.sum(s.evidence), lanes.sum(s.misleading),
                                  lanes.sum(s.h.value()), lanes.sum(s.expected)};
        opinions[v] = judge<Soft>(totals, lanes.target_mass(), call.classes, call.kl_weight);
        const F there = v < kMaxViews ? lanes.present(v) : lanes.any_present();
        const F loss =
            select(there * lanes.counted() > 0.0f, lanes.weight() * opinions[v].loss, F{});
        total += loss;
        if constexpr (!Fuse) lanes.keep_loss(v, loss);
    }
    if constexpr (Fuse) lanes.keep_loss(0, total);
    if (call.gradient == nullptr) return;

    for (int j = 0; j < steps; ++j) {
        const F y = lanes.target(j);
        F fused{}, fused_slope{};
        if constexpr (Fuse) {
            fused = lanes.fused(j);
            fused_slope = slope_of<Soft>(opinions[kMaxViews], fused, y, call.kl_weight);
        }
        MICS_UNROLL
        for (int v = 0; v < kMaxViews; ++v) {
            if (v >= call.views) break;
            F slope;
            const F e = lanes.evidence(v, j, slope);
            F g = slope_of<Soft>(opinions[v], e, y, call.kl_weight);
            if constexpr (Fuse) {
                g += fused_slope * ((1.0f + fused * share) * reciprocal(1.0f + e * share));
            }
            const F there = lanes.present(v) * lanes.counted();
            lanes.keep_gradient(v, j, select(there > 0.0f, g * slope * lanes.weight(), F{}));
        }
    }
}

}  // namespace MICS_NAMESPACE
