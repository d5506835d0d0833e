// Runs the rows, or columns, of the shift's operators on threads.
#include <algorithm>
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

void shifted_loss_cpu(const ShiftedLossCall& call, int threads) {
    const ShiftKernels& k = *instruction_set().shift;
    spread(call.rows, call.rows * call.classes, 1, threads, [&](int64_t first, int64_t last) {
        const Scratch scratch(k.loss_scratch(call));
        k.loss(call, first, last, scratch.get());
    });
}

void philox_words_cpu(int64_t seed, int64_t offset, int64_t row, int64_t draws, uint32_t* words) {
    instruction_set().shift->words(seed, offset, row, draws, words);
}

}  // namespace mics
