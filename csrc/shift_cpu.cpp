// Feature shift, class moments and shifted cross-entropy on a CPU; compiled once per instruction
// set (CMakeLists.txt). No standard containers here: their functions, compiled for this instruction
// set, could be linked into the others.
#include "shift.h"

#include "philox.h"
#include "vector_memory.h"

namespace MICS_NAMESPACE {
namespace {

using mics::DType;
using mics::MomentsCall;
using mics::RowsByClass;
using mics::ShiftCall;
using mics::ShiftedLossCall;

constexpr int kBlock = 4 * kWidth;  // columns per block of draws
constexpr auto kFloat = DType::float32;

constexpr int64_t whole_blocks(int64_t columns) { return (columns + kBlock - 1) / kBlock * kBlock; }
constexpr int lanes(int64_t left) { return static_cast<int>(left < kWidth ? left : kWidth); }

// --- Shift ---------------------------------------------------------------------------------------

// moved = features + strength * deviation * normal, for one row
template <DType D> void add_noise(const ShiftCall& call, const PhiloxKey& key, int64_t row,
                                  const float* deviation, float strength) {
    const int64_t id = call.row_ids ? call.row_ids[row] : row, start = row * call.dim;
    for (int64_t column = 0; column < call.dim; column += kBlock) {
        Vec normals[4];
        normals_of_draws(key, column / 4, id, call.seed[1], normals);
        for (int k = 0; k < 4; ++k) {
            const int64_t d = column + k * kWidth, left = call.dim - d;
            if (left >= kWidth) {
                const Vec noise = strength * load(deviation + d) * normals[k];
                store_as<D>(call.moved, start + d, load_as<D>(call.features, start + d) + noise);
            } else if (left > 0) {
                const int count = lanes(left);
                const Vec noise = strength * load_as<kFloat>(deviation, d, count) * normals[k];
                store_as<D>(call.moved, start + d,
                            load_as<D>(call.features, start + d, count) + noise, count);
            }
        }
    }
}

// deviation (D,) = sqrt(sum_c shares[c] * variance[c])
void mix_deviation(const ShiftCall& call, const float* shares, float* deviation) {
    for (int d = 0; d < call.dim; d += kWidth) {
        const int count = lanes(call.dim - d);
        Vec variance{};
        for (int c = 0; c < call.classes; ++c) {
            const float* own = call.spread + static_cast<int64_t>(c) * call.dim;
            variance +=
                shares[c] * (count == kWidth ? load(own + d) : load_as<kFloat>(own, d, count));
        }
        store(deviation + d, square_root(variance));
    }
}

// coefficients (n,): strength / sqrt(rank) times the first n normals of the row
void draw_coefficients(const ShiftCall& call, const PhiloxKey& key, int64_t row, int64_t n,
                       float strength, float* coefficients) {
    const int64_t id = call.row_ids ? call.row_ids[row] : row;
    const float scale = strength / __builtin_sqrtf(static_cast<float>(call.rank));
    for (int64_t j = 0; j < n; j += kBlock) {
        Vec normals[4];
        normals_of_draws(key, j / 4, id, call.seed[1], normals);
        for (int k = 0; k < 4; ++k) store(coefficients + j + k * kWidth, scale * normals[k]);
    }
}

// moved = features + sum_j coefficients[j] * directions[j], for one row; directions (n, D)
template <DType D> void add_combination(const ShiftCall& call, int64_t row,
                                        const float* coefficients, const float* directions,
                                        int64_t n) {
    const int64_t start = row * call.dim;
    for (int64_t column = 0; column < call.dim; column += kBlock) {
        Vec sums[4] = {};
        const bool whole = column + kBlock <= call.dim;
        for (int64_t j = 0; j < n; ++j) {
            for (int k = 0; k < 4; ++k) {
                const int64_t d = column + k * kWidth, at = j * call.dim + d;
                if (whole) {
                    sums[k] += coefficients[j] * load(directions + at);
                } else if (d < call.dim) {
                    sums[k] +=
                        coefficients[j] * load_as<kFloat>(directions, at, lanes(call.dim - d));
                }
            }
        }
        for (int k = 0; k < 4; ++k) {
            const int64_t d = column + k * kWidth;
            if (d >= call.dim) break;
            const int count = lanes(call.dim - d);
            store_as<D>(call.moved, start + d,
                        load_as<D>(call.features, start + d, count) + sums[k], count);
        }
    }
}

template <DType D>
void shift_row(const ShiftCall& call, const PhiloxKey& key, int64_t row, float* scratch) {
    const float strength = call.strengths ? call.strengths[row] : call.strength;
    const int64_t label = call.labels ? call.labels[row] : 0;
    if (label < 0 || label >= call.classes) {
        const size_t size = (D == DType::float32 ? 4 : 2) * static_cast<size_t>(call.dim);
        memcpy(static_cast<char*>(call.moved) + row * size,
               static_cast<const char*>(call.features) + row * size, size);
        return;
    }
    const float* shares = call.labels ? nullptr : call.shares + row * call.classes;
    if (!call.directions) {
        const float* deviation = call.spread + label * call.dim;
        if (shares) {
            mix_deviation(call, shares, scratch);
            deviation = scratch;
        }
        return add_noise<D>(call, key, row, deviation, strength);
    }
    // With posteriors each class takes its own normals, so that covariances add up.
    const int64_t n = shares ? static_cast<int64_t>(call.classes) * call.rank : call.rank;
    draw_coefficients(call, key, row, n, strength, scratch);
    if (shares) {
        for (int64_t j = 0; j < n; ++j) scratch[j] *= __builtin_sqrtf(shares[j / call.rank]);
    }
    add_combination<D>(call, row, scratch, call.directions + label * call.rank * call.dim, n);
}

int64_t shift_scratch(const ShiftCall& call) {
    if (!call.directions) return call.labels ? 0 : whole_blocks(call.dim);
    return whole_blocks(call.labels ? call.rank : static_cast<int64_t>(call.classes) * call.rank);
}

template <DType D>
void shift_as(const ShiftCall& call, int64_t first, int64_t last, float* scratch) {
    const PhiloxKey key(call.seed[0]);
    for (int64_t row = first; row < last; ++row) shift_row<D>(call, key, row, scratch);
}

void shift(const ShiftCall& call, int64_t first, int64_t last, float* scratch) {
    if (call.dtype == DType::float32) return shift_as<DType::float32>(call, first, last, scratch);
    if (call.dtype == DType::bfloat16) return shift_as<DType::bfloat16>(call, first, last, scratch);
    shift_as<DType::float16>(call, first, last, scratch);
}

void words(int64_t seed, int64_t offset, int64_t row, int64_t draws, uint32_t* to) {
    const PhiloxKey key(seed);
    for (int64_t first = 0; first < draws; first += kWidth) {
        UintVec words[4];
        words_of_draws(key, first, row, offset, words);
        for (int l = 0; l < kWidth; ++l) {
            const int64_t draw = first + draw_of_lane(l);
            for (int k = 0; k < 4 && draw < draws; ++k) to[4 * draw + k] = words[k][l];
        }
    }
}

void uniforms(int64_t seed, const int64_t* row_ids, int64_t rows, int64_t columns, double* to) {
    const PhiloxKey key(seed);
    for (int64_t i = 0; i < rows * columns; ++i) {
        const auto row = static_cast<uint64_t>(row_ids[i / columns]);
        uint64_t counter[1][4] = {{static_cast<uint64_t>(i % columns), row, row >> 32, 0}};
        philox4x32(key, counter);
        to[i] = (static_cast<double>((counter[0][0] & kLowWord) >> 8) + 0.5) * 0x1p-24;
    }
}

// --- Moments -------------------------------------------------------------------------------------

// Rows summed in float32 before they are merged into float64: few enough to keep the rounding below
// 1e-6 of the sum, many enough to make the merge cheap.
constexpr int kChunk = 16;

// Rows of one class, with weights, merged into its moments together.
struct Chunk {
    int size = 0;
    int64_t rows[kChunk];
    float weights[kChunk];
    double mass = 0.0;

    void add(int64_t row, double weight) {
        if (weight == 0.0) return;  // never read
        rows[size] = row;
        weights[size++] = static_cast<float>(weight);
        mass += weight;
    }
};

// Merges the chunk into the moments of its class, whose rows weigh `before` so far; Chan, Golub,
// LeVeque, 1979. Columns d .. of `Vectors` whole vectors, or of one of which `count` lanes are
// real.
template <DType D, int Vectors, bool Whole>
MICS_INLINE void merge_columns(const MomentsCall& call, const Chunk& chunk, double before,
                               int64_t d, int count, double* __restrict mean,
                               double* __restrict m2) {
    const auto load_row = [&](int i, int k) {
        const int64_t at = chunk.rows[i] * call.dim + d + k * kWidth;
        return Whole ? load_as<D>(call.features, at) : load_as<D>(call.features, at, count);
    };
    const double per_mass = 1.0 / chunk.mass, share = chunk.mass / (before + chunk.mass);
    // The mean up to rounding; then the remainder and the squares around it, from rows still in
    // cache.
    Vec centre[Vectors] = {}, rest[Vectors] = {}, squares[Vectors] = {};
    for (int i = 0; i < chunk.size; ++i) {
        for (int k = 0; k < Vectors; ++k) centre[k] += chunk.weights[i] * load_row(i, k);
    }
    for (int k = 0; k < Vectors; ++k) centre[k] *= static_cast<float>(per_mass);
    for (int i = 0; i < chunk.size; ++i) {
        for (int k = 0; k < Vectors; ++k) {
            const Vec distance = load_row(i, k) - centre[k];
            const Vec weighted = chunk.weights[i] * distance;
            rest[k] += weighted;
            squares[k] += weighted * distance;
        }
    }
    float centres[Vectors * kWidth], rests[Vectors * kWidth], square_sums[Vectors * kWidth];
    for (int k = 0; k < Vectors; ++k) {
        store(centres + k * kWidth, centre[k]);
        store(rests + k * kWidth, rest[k]);
        store(square_sums + k * kWidth, squares[k]);
    }
    for (int l = 0; l < (Whole ? Vectors * kWidth : count); ++l) {
        const double offset = rests[l] * per_mass;
        const double distance = centres[l] + offset - mean[l];
        mean[l] += distance * share;
        m2[l] += square_sums[l] - rests[l] * offset + distance * distance * (share * before);
    }
}

// The same for columns [first, last), whose moments are mean and m2.
template <DType D> void merge(const MomentsCall& call, const Chunk& chunk, double before,
                              int64_t first, int64_t last, double* mean, double* m2) {
    int64_t d = first;
    for (; d + kBlock <= last; d += kBlock) {
        merge_columns<D, 4, true>(call, chunk, before, d, kWidth, mean + (d - first),
                                  m2 + (d - first));
    }
    for (; d < last; d += kWidth) {
        merge_columns<D, 1, false>(call, chunk, before, d, lanes(last - d), mean + (d - first),
                                   m2 + (d - first));
    }
}

void write_moments(const MomentsCall& call, int64_t label, double count, int64_t first,
                   int64_t last, const double* mean, const double* m2) {
    if (first == 0) call.count[label] = count;
    for (int64_t d = first; d < last; ++d) {
        call.mean[label * call.dim + d] = static_cast<float>(mean[d - first]);
        call.m2[label * call.dim + d] = static_cast<float>(m2[d - first]);
    }
}

// Labels: class by class, so that only the running moments of one class are in use.
template <DType D> void moments_of_labels(const MomentsCall& call, const RowsByClass& by_class,
                                          int64_t first, int64_t last, double* scratch) {
    const int64_t columns = last - first;
    for (int64_t c = 0; c < call.classes; ++c) {
        double count = 0.0;
        memset(scratch, 0, sizeof(double) * 2 * static_cast<size_t>(columns));
        for (int64_t i = by_class.starts[c]; i < by_class.starts[c + 1];) {
            Chunk chunk;
            for (; i < by_class.starts[c + 1] && chunk.size < kChunk; ++i) {
                const int64_t row = by_class.rows[i];
                chunk.add(row, call.weight ? call.weight[row] : 1.0);
            }
            if (chunk.size == 0) continue;
            merge<D>(call, chunk, count, first, last, scratch, scratch + columns);
            count += chunk.mass;
        }
        write_moments(call, c, count, first, last, scratch, scratch + columns);
    }
}

// Posteriors: chunk by chunk, so that a row is read from memory once for all classes.
template <DType D>
void moments_of_shares(const MomentsCall& call, int64_t first, int64_t last, double* scratch) {
    const int64_t columns = last - first, stride = 2 * columns + 1;  // of a class: count, mean, m2
    memset(scratch, 0, sizeof(double) * static_cast<size_t>(stride * call.classes));
    for (int64_t start = 0; start < call.rows; start += kChunk) {
        const int64_t end = start + kChunk < call.rows ? start + kChunk : call.rows;
        for (int64_t c = 0; c < call.classes; ++c) {
            Chunk chunk;
            for (int64_t row = start; row < end; ++row) {
                const double weight = call.weight ? call.weight[row] : 1.0;
                chunk.add(row, weight * call.shares[row * call.classes + c]);
            }
            if (chunk.size == 0) continue;
            double* own = scratch + c * stride;
            merge<D>(call, chunk, own[0], first, last, own + 1, own + 1 + columns);
            own[0] += chunk.mass;
        }
    }
    for (int64_t c = 0; c < call.classes; ++c) {
        const double* own = scratch + c * stride;
        write_moments(call, c, own[0], first, last, own + 1, own + 1 + columns);
    }
}

int64_t moments_scratch(const MomentsCall& call, int64_t columns) {
    return call.labels ? 2 * columns : (2 * columns + 1) * call.classes;
}

template <DType D> void moments_as(const MomentsCall& call, const RowsByClass& by_class,
                                   int64_t first, int64_t last, double* scratch) {
    if (call.labels) return moments_of_labels<D>(call, by_class, first, last, scratch);
    moments_of_shares<D>(call, first, last, scratch);
}

void moments(const MomentsCall& call, const RowsByClass& by_class, int64_t first, int64_t last,
             double* scratch) {
    if (call.dtype == DType::float32)
        return moments_as<DType::float32>(call, by_class, first, last, scratch);
    if (call.dtype == DType::bfloat16)
        return moments_as<DType::bfloat16>(call, by_class, first, last, scratch);
    moments_as<DType::float16>(call, by_class, first, last, scratch);
}

// --- Shifted cross-entropy -----------------------------------------------------------------------

MICS_INLINE Vec larger(Vec a, Vec b) { return select(a < b, b, a); }

float largest_of_lanes(Vec v) {
    float largest = v[0];
    for (int l = 1; l < kWidth; ++l) largest = largest < v[l] ? v[l] : largest;
    return largest;
}

// Loss and gradient of one row: softmax cross-entropy of logits + strength^2 / 2 * table[label].
// scratch: (C,) rounded up to whole vectors.
template <DType D> void loss_of_row(const ShiftedLossCall& call, int64_t row, float* scratch) {
    const int64_t label = call.labels[row], start = row * call.classes;
    if (label < 0 || label >= call.classes) {
        call.losses[row] = 0.0f;
        for (int k = 0; call.gradient && k < call.classes; k += kWidth) {
            store_as<D>(call.gradient, start + k, Vec{}, lanes(call.classes - k));
        }
        return;
    }
    const float strength = call.strengths ? call.strengths[row] : call.strength;
    const float* extra = call.table + label * call.classes;
    Vec largest = Vec{} - __builtin_inff();
    for (int k = 0; k < call.classes; k += kWidth) {
        const int count = lanes(call.classes - k);
        Vec z = load_as<D>(call.logits, start + k, count);
        z += 0.5f * strength * strength * load_as<kFloat>(extra, k, count);
        z = select(lane_numbers() < count, z, Vec{} - __builtin_inff());
        store(scratch + k, z);
        largest = larger(largest, z);
    }
    const float top = largest_of_lanes(largest), right = scratch[label] - top;
    Vec sums{};
    for (int k = 0; k < call.classes; k += kWidth) {
        const Vec e = exp_of(load(scratch + k) - top);
        store(scratch + k, e);
        sums += e;
    }
    const float sum = sum_of_lanes(sums);
    call.losses[row] = log_of(sum) - right;
    for (int k = 0; call.gradient && k < call.classes; k += kWidth) {
        const Vec one = select(lane_numbers() + k == static_cast<int>(label), Vec{} + 1.0f, Vec{});
        store_as<D>(call.gradient, start + k, load(scratch + k) * (1.0f / sum) - one,
                    lanes(call.classes - k));
    }
}

int64_t loss_scratch(const ShiftedLossCall& call) { return whole_blocks(call.classes); }

template <DType D>
void loss_as(const ShiftedLossCall& call, int64_t first, int64_t last, float* scratch) {
    for (int64_t row = first; row < last; ++row) loss_of_row<D>(call, row, scratch);
}

void loss(const ShiftedLossCall& call, int64_t first, int64_t last, float* scratch) {
    if (call.dtype == DType::float32) return loss_as<DType::float32>(call, first, last, scratch);
    if (call.dtype == DType::bfloat16) return loss_as<DType::bfloat16>(call, first, last, scratch);
    loss_as<DType::float16>(call, first, last, scratch);
}

}  // namespace

extern const mics::ShiftKernels shifts;
const mics::ShiftKernels shifts = {shift_scratch, shift, moments_scratch, moments,
                                   loss_scratch,  loss,  words,           uniforms};

}  // namespace MICS_NAMESPACE
