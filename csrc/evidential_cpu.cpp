// Evidential operators on a CPU; compiled once per instruction set (CMakeLists.txt).
//
// With few classes a tile is MICS_WIDTH rows, one per lane; with many, a single row with its
// classes spread over the lanes. In both cases evidential.h sees vectors. No standard containers
// here: their functions, compiled for this instruction set, could be linked into the others.
#include "evidential_cpu.h"
#include "evidential.h"
#include "simd.h"
#include "vector_memory.h"

namespace MICS_NAMESPACE {
namespace {

// Above this the work per row (digammas of its sums) costs less than a transpose.
constexpr int kManyClasses = 8 * kWidth;

// The lanes of evidential.h. AcrossClasses: lane l of step j is class j * width + l of row `first`;
// otherwise step j is class j and lane l is row first + l.
template <bool Soft, bool AcrossClasses> class CpuLanes {
  public:
    using F = Vec;

    CpuLanes(const EvidentialCall& call, float scale, float* scratch)
        : call_(call),
          scale_(scale),
          steps_(AcrossClasses ? (call.classes + kWidth - 1) / kWidth : call.classes) {
        const int64_t block = static_cast<int64_t>(call.views) * steps_;
        values_ = reinterpret_cast<Vec*>(scratch);
        evidence_ = values_ + block;
        slopes_ = evidence_ + block;
        fused_ = slopes_ + block;
        targets_ = fused_ + steps_;
    }

    static int64_t scratch_floats(int views, int classes) {
        const int64_t steps = AcrossClasses ? (classes + kWidth - 1) / kWidth : classes;
        return (3 * views + 2) * steps * kWidth;
    }

    // Load the rows from `first` on into the scratch.
    void begin(int64_t first) {
        first_ = first;
        const int64_t left = call_.rows - first;
        rows_ = AcrossClasses ? 1 : static_cast<int>(left < kWidth ? left : kWidth);
        read_block(call_.input, call_.dtype, call_.views, values_);
        if constexpr (Soft) read_block(call_.targets, mics::DType::float32, 1, targets_);
        read_flags();
    }

    // Store the results in the arrays of the call.
    void end() {
        if (call_.gradient) write_block(values_, call_.views, call_.gradient, call_.dtype);
        if (call_.fused) write_block(fused_, 1, call_.fused, mics::DType::float32);
    }

    int steps() const { return steps_; }

    MICS_INLINE Vec target(int j) const {
        if constexpr (Soft) return targets_[j];
        const IntVec classes = AcrossClasses ? lane_numbers() + j * kWidth : IntVec{} + j;
        return select(classes == labels_, Vec{} + 1.0f, Vec{});
    }

    MICS_INLINE Vec evidence(int v, int j) {
        Vec slope;
        Vec e = activate(values_[v * steps_ + j], call_.activation, slope);
        Vec there = present_[v];
        if (AcrossClasses && j == steps_ - 1) there = there * last_step_;
        e = select(there > 0.0f, e, Vec{});
        evidence_[v * steps_ + j] = e;
        slopes_[v * steps_ + j] = slope;
        return e;
    }

    MICS_INLINE Vec evidence(int v, int j, Vec& slope) const {
        slope = slopes_[v * steps_ + j];
        return evidence_[v * steps_ + j];
    }

    MICS_INLINE void keep_fused(int j, Vec fused) { fused_[j] = fused; }
    MICS_INLINE Vec fused(int j) const { return fused_[j]; }
    MICS_INLINE void keep_gradient(int v, int j, Vec g) { values_[v * steps_ + j] = g; }

    MICS_INLINE Vec sum(Vec x) const { return AcrossClasses ? Vec{} + sum_of_lanes(x) : x; }
    MICS_INLINE Vec present(int v) const { return present_[v]; }
    MICS_INLINE Vec any_present() const { return any_present_; }
    MICS_INLINE Vec counted() const { return counted_; }
    MICS_INLINE Vec weight() const { return weight_; }
    MICS_INLINE Vec target_mass() const { return target_mass_; }

    void keep_loss(int v, Vec loss) {
        const int stride = call_.fuse ? 1 : call_.views;
        float lanes[kWidth];
        store(lanes, loss);
        for (int l = 0; l < rows_; ++l) call_.losses[(first_ + l) * stride + v] = lanes[l];
    }

  private:
    // Lane by lane into arrays, then into vectors at once: setting one lane of a vector stores and
    // loads all of it.
    void read_flags() {
        float present[kMaxViews][kWidth], any[kWidth] = {}, weight[kWidth] = {};
        for (int l = 0; l < kWidth; ++l)
            weight[l] = call_.weight ? call_.weight[row_of(l)] * scale_ : scale_;
        for (int v = 0; v < call_.views; ++v) {
            for (int l = 0; l < kWidth; ++l) {
                const bool there = !call_.present || call_.present[row_of(l) * call_.views + v];
                present[v][l] = there ? 1.0f : 0.0f;
                any[l] = there ? 1.0f : any[l];
            }
            present_[v] = load(present[v]);
        }
        any_present_ = load(any);
        weight_ = load(weight);
        last_step_ =
            select(lane_numbers() + (steps_ - 1) * kWidth < call_.classes, Vec{} + 1.0f, Vec{});
        counted_ = Vec{} + 1.0f;
        target_mass_ = Vec{};
        if constexpr (Soft) {
            for (int j = 0; j < steps_; ++j) target_mass_ += targets_[j];
            target_mass_ = sum(target_mass_);
        } else {
            read_labels();
        }
    }

    void read_labels() {
        int32_t labels[kWidth];
        float counted[kWidth];
        for (int l = 0; l < kWidth; ++l) {
            const int64_t label = call_.labels[row_of(l)];
            counted[l] = label != call_.ignore_index ? 1.0f : 0.0f;
            labels[l] = label >= 0 && label < call_.classes ? static_cast<int32_t>(label) : -1;
        }
        counted_ = load(counted);
        memcpy(&labels_, labels, sizeof labels_);
        target_mass_ = select(labels_ >= 0, Vec{} + 1.0f, Vec{});
    }

    // Row of a lane; lanes past the last row repeat the first and are not stored.
    MICS_INLINE int64_t row_of(int l) const { return first_ + (l < rows_ ? l : 0); }

    // (rows, views, C) of an array, to `views` blocks of steps.
    void read_block(const void* array, mics::DType dtype, int views, Vec* block) const {
        if constexpr (AcrossClasses) {
            for (int v = 0; v < views; ++v) {
                Vec* view = block + v * steps_;
                view[steps_ - 1] = Vec{};
                const int64_t from = (first_ * views + v) * call_.classes;
                read_floats(array, from, dtype, reinterpret_cast<float*>(view), call_.classes);
            }
        } else {
            const int width = views * call_.classes;
            for (int done = 0; done < width; done += kWidth) {
                Vec tile[kWidth];
                const int columns = width - done < kWidth ? width - done : kWidth;
                for (int l = 0; l < kWidth; ++l)
                    tile[l] = read_lanes(array, dtype, l, done, columns, width);
                transpose(tile);
                for (int i = 0; i < columns; ++i) block[done + i] = tile[i];
            }
        }
    }

    // `columns` numbers of row l from `done` on; others of the same tile may follow.
    MICS_INLINE Vec read_lanes(const void* array, mics::DType dtype, int l, int done, int columns,
                               int width) const {
        if (l >= rows_) return Vec{};
        const int64_t from = (first_ + l) * width + done;
        if (dtype == mics::DType::float32 && l * width + done + kWidth <= rows_ * width) {
            return load(static_cast<const float*>(array) + from);
        }
        float lanes[kWidth] = {};
        read_floats(array, from, dtype, lanes, columns);
        return load(lanes);
    }

    void write_block(const Vec* block, int views, void* array, mics::DType dtype) const {
        if constexpr (AcrossClasses) {
            for (int v = 0; v < views; ++v) {
                const int64_t to = (first_ * views + v) * call_.classes;
                const float* view = reinterpret_cast<const float*>(block + v * steps_);
                write_floats(view, array, to, dtype, call_.classes);
            }
        } else {
            // Columns backwards, then down the rows: later vectors overwrite what a vector writes
            // past its columns.
            const int width = views * call_.classes;
            for (int done = (width - 1) / kWidth * kWidth; done >= 0; done -= kWidth) {
                Vec tile[kWidth];
                const int columns = width - done < kWidth ? width - done : kWidth;
                for (int i = 0; i < kWidth; ++i) tile[i] = i < columns ? block[done + i] : Vec{};
                transpose(tile);
                for (int l = 0; l < rows_; ++l)
                    write_lanes(tile[l], array, dtype, l, done, columns, width);
            }
        }
    }

    MICS_INLINE void write_lanes(Vec values, void* array, mics::DType dtype, int l, int done,
                                 int columns, int width) const {
        const int64_t to = (first_ + l) * width + done;
        if (dtype == mics::DType::float32 && l * width + done + kWidth <= rows_ * width) {
            store(static_cast<float*>(array) + to, values);
        } else {
            float lanes[kWidth];
            store(lanes, values);
            write_floats(lanes, array, to, dtype, columns);
        }
    }

    const EvidentialCall& call_;
    const float scale_;
    const int steps_;
    int64_t first_ = 0;
    int rows_ = 0;
    Vec *values_, *evidence_, *slopes_, *fused_, *targets_;
    Vec present_[kMaxViews], any_present_, weight_, counted_, target_mass_, last_step_;
    IntVec labels_;
};

template <bool Soft, bool AcrossClasses>
void run(const EvidentialCall& call, int64_t first, int64_t last, float* scratch) {
    CpuLanes<Soft, AcrossClasses> lanes(call, call.count ? 1.0f / *call.count : 1.0f, scratch);
    for (int64_t row = first; row < last; row += AcrossClasses ? 1 : kWidth) {
        lanes.begin(row);
        if (call.fuse) {
            evidential_row<Soft, true>(lanes, call);
        } else {
            evidential_row<Soft, false>(lanes, call);
        }
        lanes.end();
    }
}

void rows(const EvidentialCall& call, int64_t first, int64_t last, float* scratch) {
    const bool many = call.classes >= kManyClasses;
    if (call.labels) {
        many ? run<false, true>(call, first, last, scratch)
             : run<false, false>(call, first, last, scratch);
    } else {
        many ? run<true, true>(call, first, last, scratch)
             : run<true, false>(call, first, last, scratch);
    }
}

int64_t scratch_floats(int views, int classes) {
    return classes >= kManyClasses ? CpuLanes<true, true>::scratch_floats(views, classes)
                                   : CpuLanes<true, false>::scratch_floats(views, classes);
}

// `count` numbers from index `at` on; up to `end` more may be read than wanted.
template <mics::DType D>
MICS_INLINE Vec read_piece(const void* array, int64_t at, int64_t end, int count) {
    if (at + kWidth <= end) return load_as<D>(array, at);
    return load_as<D>(array, at, count);
}

// Up to `end` more may be written than wanted, if it is overwritten later.
template <mics::DType D>
MICS_INLINE void write_piece(Vec values, void* array, int64_t at, int64_t end, int count) {
    if (count == kWidth || at + kWidth <= end) return store_as<D>(array, at, values);
    store_as<D>(array, at, values, count);
}

// Dempster's rule alone, or its gradient.
template <bool Gradient, mics::DType D>
void fuse_as(const mics::FusionCall& call, int64_t first, int64_t last) {
    constexpr mics::DType kFloat = mics::DType::float32;
    const float share = 1.0f / static_cast<float>(call.classes);
    const int64_t end = last * call.classes, views_end = end * call.views;
    const int64_t rewritten = call.classes < kWidth ? views_end : 0;  // else views alternate
    for (int64_t row = first; row < last; ++row) {
        const uint8_t* present = call.present ? call.present + row * call.views : nullptr;
        for (int k = 0; k < call.classes; k += kWidth) {
            const int count = call.classes - k < kWidth ? call.classes - k : kWidth;
            const int64_t place = row * call.classes + k;
            const int64_t start = row * call.views * call.classes + k;
            Vec fused{}, evidence[mics::kMaxViews];
            for (int v = 0; v < call.views; ++v) {
                const int64_t at = start + int64_t{v} * call.classes;
                const bool there = !present || present[v];
                const Vec e = there ? read_piece<D>(call.evidence, at, views_end, count) : Vec{};
                fused = fused + e + fused * e * share;
                evidence[v] = e;
            }
            if constexpr (!Gradient) {
                write_piece<kFloat>(fused, call.fused, place, end, count);
            } else {
                const Vec outer =
                    read_piece<kFloat>(call.outer, place, end, count) * (1.0f + fused * share);
                for (int v = 0; v < call.views; ++v) {
                    const int64_t at = start + int64_t{v} * call.classes;
                    const bool there = !present || present[v];
                    const Vec g = there ? outer * reciprocal(1.0f + evidence[v] * share) : Vec{};
                    write_piece<D>(g, call.gradient, at, rewritten, count);
                }
            }
        }
    }
}

template <bool Gradient> void fuse_rows(const mics::FusionCall& call, int64_t first, int64_t last) {
    using mics::DType;
    if (call.dtype == DType::float32) return fuse_as<Gradient, DType::float32>(call, first, last);
    if (call.dtype == DType::bfloat16) return fuse_as<Gradient, DType::bfloat16>(call, first, last);
    fuse_as<Gradient, DType::float16>(call, first, last);
}

}  // namespace

extern const mics::EvidentialKernels evidential;
const mics::EvidentialKernels evidential = {kWidth, scratch_floats, rows, fuse_rows<false>,
                                            fuse_rows<true>};

}  // namespace MICS_NAMESPACE
