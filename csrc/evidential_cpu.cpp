// Evidential operators on a CPU, for one instruction set: compiled once for each (CMakeLists.txt).
//
// A tile is MICS_WIDTH rows with one row in each lane where classes are few, and a single row with
// its classes spread over the lanes where they are many. Either way evidential.h sees vectors.
// No standard containers here: their functions would be compiled for this instruction set and
// might serve the others.
#include "evidential.h"
#include "evidential_cpu.h"
#include "simd.h"

namespace MICS_NAMESPACE {
namespace {

// From here on the work of a row (digammas of its sums) costs less than transposing it.
constexpr int kManyClasses = 8 * kWidth;

MICS_INLINE float read(const void* array, int64_t i, mics::DType dtype) {
    if (dtype == mics::DType::float32) return static_cast<const float*>(array)[i];
    const uint16_t half = static_cast<const uint16_t*>(array)[i];
    return dtype == mics::DType::bfloat16 ? from_bfloat16(half) : from_float16(half);
}

MICS_INLINE void write(void* array, int64_t i, mics::DType dtype, float x) {
    if (dtype == mics::DType::float32) {
        static_cast<float*>(array)[i] = x;
    } else {
        const bool brain = dtype == mics::DType::bfloat16;
        static_cast<uint16_t*>(array)[i] = brain ? to_bfloat16(x) : to_float16(x);
    }
}

// The lanes of evidential.h. AcrossClasses: lane l of step j is class j * width + l of row `first`;
// otherwise step j is class j and lane l is row first + l.
template <bool Soft, bool AcrossClasses> class CpuLanes {
  public:
    using F = Vec;

    CpuLanes(const EvidentialCall& call, float scale, float* scratch)
        : call_(call), scale_(scale), steps_(AcrossClasses ? (call.classes + kWidth - 1) / kWidth : call.classes) {
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

    // Bring the rows from `first` on into the scratch.
    void begin(int64_t first) {
        first_ = first;
        const int64_t left = call_.rows - first;
        rows_ = AcrossClasses ? 1 : static_cast<int>(left < kWidth ? left : kWidth);
        read_block(call_.input, call_.dtype, call_.views, values_);
        if constexpr (Soft) read_block(call_.targets, mics::DType::float32, 1, targets_);
        read_flags();
    }

    // Send what was kept back to the arrays of the call.
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
    // Lane by lane into arrays, and then at once into vectors: setting one lane of a vector costs
    // a store and a load of all of it.
    void read_flags() {
        float present[kMaxViews][kWidth] = {}, any[kWidth] = {}, weight[kWidth] = {};
        float counted[kWidth] = {}, mass[kWidth] = {}, last_step[kWidth] = {};
        int32_t labels[kWidth];
        for (int l = 0; l < kWidth; ++l) {
            labels[l] = -1;
            last_step[l] = (steps_ - 1) * kWidth + l < call_.classes ? 1.0f : 0.0f;
            if (!AcrossClasses && l >= rows_) continue;
            const int64_t row = first_ + (AcrossClasses ? 0 : l);
            for (int v = 0; v < call_.views; ++v) {
                const bool there = !call_.present || call_.present[row * call_.views + v];
                present[v][l] = there ? 1.0f : 0.0f;
                any[l] = there ? 1.0f : any[l];
            }
            weight[l] = (call_.weight ? call_.weight[row] : 1.0f) * scale_;
            counted[l] = 1.0f;
            if constexpr (!Soft) {
                const int64_t label = call_.labels[row];
                const bool valid = label >= 0 && label < call_.classes;
                counted[l] = label != call_.ignore_index ? 1.0f : 0.0f;
                mass[l] = valid ? 1.0f : 0.0f;
                labels[l] = valid ? static_cast<int32_t>(label) : -1;
            }
        }
        for (int v = 0; v < call_.views; ++v) present_[v] = load(present[v]);
        any_present_ = load(any);
        weight_ = load(weight);
        counted_ = load(counted);
        target_mass_ = load(mass);
        last_step_ = load(last_step);
        memcpy(&labels_, labels, sizeof labels_);
        if constexpr (Soft) {
            for (int j = 0; j < steps_; ++j) target_mass_ += targets_[j];
            target_mass_ = sum(target_mass_);
        }
    }

    // (rows, views, C) of an array, to `views` blocks of steps.
    void read_block(const void* array, mics::DType dtype, int views, Vec* block) const {
        float* to = reinterpret_cast<float*>(block);
        const int64_t width = static_cast<int64_t>(views) * call_.classes;
        if constexpr (AcrossClasses) {
            for (int v = 0; v < views; ++v) {
                block[v * steps_ + steps_ - 1] = Vec{};
                float* view = to + static_cast<int64_t>(v) * steps_ * kWidth;
                const int64_t from = first_ * width + static_cast<int64_t>(v) * call_.classes;
                if (dtype == mics::DType::float32) {
                    memcpy(view, static_cast<const float*>(array) + from, sizeof(float) * call_.classes);
                } else {
                    for (int k = 0; k < call_.classes; ++k) view[k] = read(array, from + k, dtype);
                }
            }
        } else {
            if (rows_ < kWidth) memset(to, 0, sizeof(float) * kWidth * width);
            int64_t done = 0;
            if (rows_ == kWidth && dtype == mics::DType::float32) {
                const float* from = static_cast<const float*>(array) + first_ * width;
                for (; done + kWidth <= width; done += kWidth) {
                    Vec tile[kWidth];
                    for (int l = 0; l < kWidth; ++l) tile[l] = load(from + l * width + done);
                    transpose(tile);
                    for (int i = 0; i < kWidth; ++i) block[done + i] = tile[i];
                }
            }
            for (int l = 0; l < rows_; ++l) {
                const int64_t from = (first_ + l) * width;
                for (int64_t i = done; i < width; ++i) to[i * kWidth + l] = read(array, from + i, dtype);
            }
        }
    }

    void write_block(const Vec* block, int views, void* array, mics::DType dtype) const {
        const float* from = reinterpret_cast<const float*>(block);
        const int64_t width = static_cast<int64_t>(views) * call_.classes;
        if constexpr (AcrossClasses) {
            for (int v = 0; v < views; ++v) {
                const float* view = from + static_cast<int64_t>(v) * steps_ * kWidth;
                const int64_t to = first_ * width + static_cast<int64_t>(v) * call_.classes;
                if (dtype == mics::DType::float32) {
                    memcpy(static_cast<float*>(array) + to, view, sizeof(float) * call_.classes);
                } else {
                    for (int k = 0; k < call_.classes; ++k) write(array, to + k, dtype, view[k]);
                }
            }
        } else {
            int64_t done = 0;
            if (rows_ == kWidth && dtype == mics::DType::float32) {
                float* to = static_cast<float*>(array) + first_ * width;
                for (; done + kWidth <= width; done += kWidth) {
                    Vec tile[kWidth];
                    for (int i = 0; i < kWidth; ++i) tile[i] = block[done + i];
                    transpose(tile);
                    for (int l = 0; l < kWidth; ++l) store(to + l * width + done, tile[l]);
                }
            }
            for (int l = 0; l < rows_; ++l) {
                const int64_t to = (first_ + l) * width;
                for (int64_t i = done; i < width; ++i) write(array, to + i, dtype, from[i * kWidth + l]);
            }
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
        many ? run<false, true>(call, first, last, scratch) : run<false, false>(call, first, last, scratch);
    } else {
        many ? run<true, true>(call, first, last, scratch) : run<true, false>(call, first, last, scratch);
    }
}

int64_t scratch_floats(int views, int classes) {
    return classes >= kManyClasses ? CpuLanes<true, true>::scratch_floats(views, classes)
                                   : CpuLanes<true, false>::scratch_floats(views, classes);
}

template <mics::DType D> void fuse_as(const mics::FusionCall& call, int64_t first, int64_t last) {
    const float share = 1.0f / static_cast<float>(call.classes);
    for (int64_t row = first; row < last; ++row) {
        float* __restrict fused = call.fused + row * call.classes;
        for (int k = 0; k < call.classes; ++k) fused[k] = 0.0f;
        for (int v = 0; v < call.views; ++v) {
            const int64_t view = row * call.views + v;
            if (call.present && !call.present[view]) continue;
            for (int k = 0; k < call.classes; ++k) {
                const float e = read(call.evidence, view * call.classes + k, D);
                fused[k] = fused[k] + e + fused[k] * e * share;
            }
        }
    }
}

template <mics::DType D>
void fuse_gradient_as(const mics::FusionCall& call, int64_t first, int64_t last) {
    const float share = 1.0f / static_cast<float>(call.classes);
    for (int64_t row = first; row < last; ++row) {
        const float* __restrict fused = call.fused + row * call.classes;
        const float* __restrict outer = call.outer + row * call.classes;
        for (int64_t view = row * call.views; view < (row + 1) * call.views; ++view) {
            const bool there = !call.present || call.present[view];
            for (int k = 0; k < call.classes; ++k) {
                const int64_t i = view * call.classes + k;
                const float e = there ? read(call.evidence, i, D) : 0.0f;
                const float g = outer[k] * ((1.0f + fused[k] * share) / (1.0f + e * share));
                write(call.gradient, i, D, there ? g : 0.0f);
            }
        }
    }
}

void fuse(const mics::FusionCall& call, int64_t first, int64_t last) {
    if (call.dtype == mics::DType::float32) return fuse_as<mics::DType::float32>(call, first, last);
    if (call.dtype == mics::DType::bfloat16) return fuse_as<mics::DType::bfloat16>(call, first, last);
    fuse_as<mics::DType::float16>(call, first, last);
}

void fuse_gradient(const mics::FusionCall& call, int64_t first, int64_t last) {
    using mics::DType;
    if (call.dtype == DType::float32) return fuse_gradient_as<DType::float32>(call, first, last);
    if (call.dtype == DType::bfloat16) return fuse_gradient_as<DType::bfloat16>(call, first, last);
    fuse_gradient_as<DType::float16>(call, first, last);
}

}  // namespace

extern const mics::EvidentialKernels kernels;
const mics::EvidentialKernels kernels = {kWidth, scratch_floats, rows, fuse, fuse_gradient};

}  // namespace MICS_NAMESPACE
