// Evidential operators on an NVIDIA GPU: a group of 2 to 32 threads per row, spread over the
// classes. Sums cross a group by shuffles in a fixed order; there are no atomics, so the same
// inputs give the same bits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define MICS_NAMESPACE mics_cuda
#include "evidential.h"
#include "evidential_cuda.h"

namespace MICS_NAMESPACE {
namespace {

constexpr int kThreads = 128;

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(__half x) { return __half2float(x); }
__device__ __forceinline__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void narrow(float x, float& to) { to = x; }
__device__ __forceinline__ void narrow(float x, __half& to) { to = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

// The lanes of evidential.h: step j of a thread is class lane + j * group.
template <bool Soft, class T> class GpuLanes {
  public:
    using F = float;

    // A group past the last row repeats it and stores nothing: shuffles need every thread of a
    // warp.
    __device__ GpuLanes(const EvidentialCall& call, int group)
        : call_(call), group_(group), lane_(threadIdx.x % group) {
        const int64_t row = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / group;
        real_ = row < call.rows;
        row_ = real_ ? row : call.rows - 1;
        for (int v = 0; v < call.views; ++v) {
            const bool there = !call.present || call.present[row_ * call.views + v];
            present_ |= (there ? 1u : 0u) << v;
        }
        weight_ = call.weight ? call.weight[row_] : 1.0f;
        if (call.count) weight_ /= *call.count;
        if constexpr (Soft) {
            for (int j = 0; j < steps(); ++j) target_mass_ += target(j);
            target_mass_ = sum(target_mass_);
        } else {
            const int64_t label = call.labels[row_];
            const bool valid = label >= 0 && label < call.classes;
            counted_ = label != call.ignore_index ? 1.0f : 0.0f;
            target_mass_ = valid ? 1.0f : 0.0f;
            label_ = valid ? static_cast<int>(label) : -1;
        }
    }

    __device__ int steps() const { return (call_.classes - lane_ + group_ - 1) / group_; }

    __device__ float target(int j) const {
        if constexpr (Soft) return call_.targets[row_ * call_.classes + class_of(j)];
        return class_of(j) == label_ ? 1.0f : 0.0f;
    }

    __device__ float evidence(int v, int j) const {
        float slope;
        return evidence(v, j, slope);
    }

    __device__ float evidence(int v, int j, float& slope) const {
        slope = 0.0f;
        if (!(present_ >> v & 1u)) return 0.0f;
        return activate(wide(static_cast<const T*>(call_.input)[place(v, j)]), call_.activation,
                        slope);
    }

    __device__ void keep_fused(int j, float fused) {
        if (real_) call_.fused[row_ * call_.classes + class_of(j)] = fused;
    }
    __device__ float fused(int j) const { return call_.fused[row_ * call_.classes + class_of(j)]; }

    __device__ float sum(float x) const {
        for (int step = group_ / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
        return x;
    }

    __device__ float present(int v) const { return present_ >> v & 1u ? 1.0f : 0.0f; }
    __device__ float any_present() const { return present_ ? 1.0f : 0.0f; }
    __device__ float counted() const { return counted_; }
    __device__ float weight() const { return weight_; }
    __device__ float target_mass() const { return target_mass_; }

    __device__ void keep_loss(int v, float loss) {
        if (real_ && lane_ == 0) call_.losses[row_ * (call_.fuse ? 1 : call_.views) + v] = loss;
    }
    __device__ void keep_gradient(int v, int j, float g) {
        if (real_) narrow(g, static_cast<T*>(call_.gradient)[place(v, j)]);
    }

  private:
    __device__ int class_of(int j) const { return lane_ + j * group_; }
    __device__ int64_t place(int v, int j) const {
        return (row_ * call_.views + v) * call_.classes + class_of(j);
    }

    const EvidentialCall& call_;
    const int group_, lane_;
    int64_t row_;
    bool real_;
    unsigned present_ = 0;
    int label_ = -1;
    float weight_ = 1.0f, counted_ = 1.0f, target_mass_ = 0.0f;
};

template <bool Soft, bool Fuse, class T> __global__ void __launch_bounds__(kThreads)
    rows_kernel(EvidentialCall call, int group) {
    if (call.kl_weight_on_gpu) call.kl_weight = *call.kl_weight_on_gpu;
    GpuLanes<Soft, T> lanes(call, group);
    evidential_row<Soft, Fuse>(lanes, call);
}

__global__ void count_kernel(const int64_t* labels, int64_t rows, int64_t ignore_index,
                             float* count) {
    __shared__ int warps[32];
    int mine = 0;
    for (int64_t i = threadIdx.x; i < rows; i += blockDim.x) mine += labels[i] != ignore_index;
    mine = __reduce_add_sync(0xffffffffu, mine);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
    __syncthreads();
    if (threadIdx.x < 32) {
        const int total = __reduce_add_sync(0xffffffffu, warps[threadIdx.x]);
        if (threadIdx.x == 0) *count = static_cast<float>(total > 0 ? total : 1);
    }
}

// One thread per class and row.
template <bool Gradient, class T> __global__ void fuse_kernel(mics::FusionCall call) {
    const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (i >= call.rows * call.classes) return;
    const int64_t row = i / call.classes;
    const int64_t first = row * call.views * call.classes + i % call.classes;
    const T* evidence = static_cast<const T*>(call.evidence);
    const float share = 1.0f / static_cast<float>(call.classes);
    const auto is_there = [&](int v) {
        return !call.present || call.present[row * call.views + v];
    };
    const auto place = [&](int v) { return first + int64_t{v} * call.classes; };
    const auto evidence_of = [&](int v) { return is_there(v) ? wide(evidence[place(v)]) : 0.0f; };
    float fused = 0.0f;
    for (int v = 0; v < call.views; ++v) {
        const float e = evidence_of(v);
        fused = fused + e + fused * e * share;
    }
    if constexpr (!Gradient) {
        call.fused[i] = fused;
        return;
    }
    for (int v = 0; v < call.views; ++v) {
        const float g = call.outer[i] * ((1.0f + fused * share) / (1.0f + evidence_of(v) * share));
        narrow(is_there(v) ? g : 0.0f, static_cast<T*>(call.gradient)[place(v)]);
    }
}

cudaStream_t stream_at(uintptr_t address) { return reinterpret_cast<cudaStream_t>(address); }

void check_launch() {
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string("CUDA launch failed: ") + cudaGetErrorString(error));
    }
}

template <bool Soft, bool Fuse> void launch_rows(const EvidentialCall& call, cudaStream_t stream) {
    int group = 2;
    while (group < call.classes && group < 32) group *= 2;
    const unsigned blocks = static_cast<unsigned>((call.rows * group + kThreads - 1) / kThreads);
    if (call.dtype == mics::DType::float32) {
        rows_kernel<Soft, Fuse, float><<<blocks, kThreads, 0, stream>>>(call, group);
    } else if (call.dtype == mics::DType::bfloat16) {
        rows_kernel<Soft, Fuse, __nv_bfloat16><<<blocks, kThreads, 0, stream>>>(call, group);
    } else {
        rows_kernel<Soft, Fuse, __half><<<blocks, kThreads, 0, stream>>>(call, group);
    }
    check_launch();
}

template <bool Gradient> void launch_fuse(const mics::FusionCall& call, cudaStream_t stream) {
    const int64_t threads = call.rows * call.classes;
    if (threads == 0) return;
    const unsigned blocks = static_cast<unsigned>((threads + 255) / 256);
    if (call.dtype == mics::DType::float32) {
        fuse_kernel<Gradient, float><<<blocks, 256, 0, stream>>>(call);
    } else if (call.dtype == mics::DType::bfloat16) {
        fuse_kernel<Gradient, __nv_bfloat16><<<blocks, 256, 0, stream>>>(call);
    } else {
        fuse_kernel<Gradient, __half><<<blocks, 256, 0, stream>>>(call);
    }
    check_launch();
}

}  // namespace
}  // namespace MICS_NAMESPACE

namespace mics {

void evidential_cuda(const EvidentialCall& call, uintptr_t stream) {
    if (call.rows == 0) return;
    const cudaStream_t at = mics_cuda::stream_at(stream);
    if (call.labels) {
        call.fuse ? mics_cuda::launch_rows<false, true>(call, at)
                  : mics_cuda::launch_rows<false, false>(call, at);
    } else {
        call.fuse ? mics_cuda::launch_rows<true, true>(call, at)
                  : mics_cuda::launch_rows<true, false>(call, at);
    }
}

void count_labels_cuda(const int64_t* labels, int64_t rows, int64_t ignore_index, float* count,
                       uintptr_t stream) {
    mics_cuda::count_kernel<<<1, 1024, 0, mics_cuda::stream_at(stream)>>>(labels, rows,
                                                                          ignore_index, count);
    mics_cuda::check_launch();
}

void fuse_evidence_cuda(const FusionCall& call, uintptr_t stream) {
    mics_cuda::launch_fuse<false>(call, mics_cuda::stream_at(stream));
}

void fuse_evidence_gradient_cuda(const FusionCall& call, uintptr_t stream) {
    mics_cuda::launch_fuse<true>(call, mics_cuda::stream_at(stream));
}

}  // namespace mics
