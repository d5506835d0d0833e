// Runs the rows, or columns, of the shift's operators on threads.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "instruction_set.h"
#include "scratch.h"
#include "shift.h"
#include "threads.h"

namespace mics {
namespace {

// Columns per piece: two pieces per thread, but wide enough for long reads of each row, in whole
// cache lines, so that no two threads write to the same one.
int columns_at_once(int columns, int threads) {
    constexpr int kLine = 16, kLeast = 192;
    const int share = columns / (2 * std::max(threads, 1));
    return std::max(kLeast, (share + kLine - 1) / kLine * kLine);
}

// Counting sort of the rows by label, ascending within a class.
struct SortedRows {
    std::vector<int64_t> rows, starts;

    explicit SortedRows(const MomentsCall& call) : rows(call.rows), starts(call.classes + 1) {
        const auto counts = [&](int64_t row) {
            return call.labels[row] >= 0 && call.labels[row] < call.classes;
        };
        for (int64_t row = 0; row < call.rows; ++row) {
            if (counts(row)) ++starts[call.labels[row] + 1];
        }
        for (int c = 0; c < call.classes; ++c) starts[c + 1] += starts[c];
        std::vector<int64_t> next(starts.begin(), starts.end() - 1);
        for (int64_t row = 0; row < call.rows; ++row) {
            if (counts(row)) rows[next[call.labels[row]]++] = row;
        }
    }
};

void merge_class(const MergeCall& call, int64_t c) {
    const double added = call.new_count[c], before = call.count[c];
    if (!(added > 0.0)) return;
    double weight = before, kept = 1.0;
    if (call.momentum > 0.0) {
        const double fade = added * std::log1p(-call.momentum);
        weight = std::min(before, added * std::exp(fade) / -std::expm1(fade));
        kept = before > 0.0 ? weight / before : 0.0;
    }
    const double share = added / (weight + added);
    const double scale = (before + added) / (weight + added);
    double* mean = call.mean + c * call.dim;
    double* m2 = call.m2 + c * call.dim;
    const float* new_mean = call.new_mean + c * call.dim;
    const float* new_m2 = call.new_m2 + c * call.dim;
    for (int d = 0; d < call.dim; ++d) {
        const double distance = new_mean[d] - mean[d];
        mean[d] += distance * share;
        m2[d] = (m2[d] * kept + new_m2[d] + distance * distance * share * weight) * scale;
    }
    call.count[c] = before + added;
}

}  // namespace

void shift_cpu(const ShiftCall& call, int threads) {
    const ShiftKernels& k = *instruction_set().shift;
    spread(call.rows, call.rows * call.dim, 1, threads, [&](int64_t first, int64_t last) {
        const Scratch scratch(k.shift_scratch(call));
        k.shift(call, first, last, scratch.get());
    });
}

// Threads share columns and see all rows in the same order: there is nothing to merge, and any
// number of threads gives the same bits.
void class_moments_cpu(const MomentsCall& call, int threads) {
    const ShiftKernels& k = *instruction_set().shift;
    std::unique_ptr<SortedRows> sorted;
    RowsByClass by_class{};
    if (call.labels) {
        sorted.reset(new SortedRows(call));
        by_class = {sorted->rows.data(), sorted->starts.data()};
    }
    spread(call.dim, call.rows * call.dim, columns_at_once(call.dim, threads), threads,
           [&](int64_t first, int64_t last) {
               const std::unique_ptr<double[]> scratch(
                   new double[k.moments_scratch(call, last - first)]);
               k.moments(call, by_class, first, last, scratch.get());
           });
}

// Chan, Golub, LeVeque, 1979, equations 2.1. With momentum an old count N counts as at most the
// cap that gives n new rows the share n / (cap + n) = 1 - (1 - momentum)^n.
void merge_moments_cpu(const MergeCall& call, int threads) {
    spread(call.classes, int64_t{call.classes} * call.dim, 1, threads,
           [&](int64_t first, int64_t last) {
               for (int64_t c = first; c < last; ++c) merge_class(call, c);
           });
}

void shifted_loss_cpu(const ShiftedLossCall& call, int threads) {
    const ShiftKernels& k = *instruction_set().shift;
    spread(call.rows, call.rows * call.classes, 1, threads, [&](int64_t first, int64_t last) {
        const Scratch scratch(k.loss_scratch(call));
        k.loss(call, first, last, scratch.get());
    });
}

void philox_uniforms_cpu(int64_t seed, const int64_t* row_ids, int64_t rows, int64_t columns,
                         double* uniforms, int threads) {
    const ShiftKernels& k = *instruction_set().shift;
    spread(rows, 16 * rows * columns, 1, threads, [&](int64_t first, int64_t last) {
        k.uniforms(seed, row_ids + first, last - first, columns, uniforms + first * columns);
    });
}

void philox_words_cpu(int64_t seed, int64_t offset, int64_t row, int64_t draws, uint32_t* words) {
    instruction_set().shift->words(seed, offset, row, draws, words);
}

}  // namespace mics
