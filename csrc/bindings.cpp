// The native module's Python bindings. They take addresses, sizes, dtypes and streams, and include
// no torch header: one binary serves every torch version. Private: callers have checked shapes,
// devices and addresses; sizes are checked here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "consistency_cpu.h"
#include "evidential_cpu.h"
#include "instruction_set.h"
#include "shift.h"
#ifdef MICS_WITH_CUDA
#include "evidential_cuda.h"
#endif

namespace py = pybind11;

namespace {

template <class T> T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

// Sizes that the kernels rely on; shapes have been checked in Python.
void require(bool holds, const char* sentence) {
    if (!holds) throw std::invalid_argument(sentence);
}

mics::DType dtype_of(const std::string& name) {
    if (name == "float32") return mics::DType::float32;
    if (name == "bfloat16") return mics::DType::bfloat16;
    if (name == "float16") return mics::DType::float16;
    throw std::invalid_argument("dtype must be float32, bfloat16 or float16, got " + name);
}

mics::Activation activation_of(const std::string& name) {
    if (name == "identity") return mics::Activation::identity;
    if (name == "softplus") return mics::Activation::softplus;
    if (name == "exp") return mics::Activation::exp;
    if (name == "relu") return mics::Activation::relu;
    throw std::invalid_argument("activation must be identity, softplus, exp or relu, got " + name);
}

mics::EvidentialCall evidential_call(uintptr_t input, const std::string& dtype, uintptr_t labels,
                                     uintptr_t targets, uintptr_t present, uintptr_t weight,
                                     uintptr_t count, uintptr_t losses, uintptr_t fused,
                                     uintptr_t gradient, int64_t rows, int views, int classes,
                                     const std::string& activation, float kl_weight,
                                     uintptr_t kl_weight_on_gpu, int64_t ignore_index) {
    require(rows >= 0 && classes >= 1, "rows must be >= 0 and classes >= 1");
    require(views >= 1 && views <= mics::kMaxViews, "views must be in [1, 8]");
    mics::EvidentialCall call{};
    call.input = pointer<const void>(input);
    call.labels = pointer<const int64_t>(labels);
    call.targets = pointer<const float>(targets);
    call.present = pointer<const uint8_t>(present);
    call.weight = pointer<const float>(weight);
    call.count = pointer<const float>(count);
    call.losses = pointer<float>(losses);
    call.fused = pointer<float>(fused);
    call.gradient = pointer<void>(gradient);
    call.rows = rows;
    call.ignore_index = ignore_index;
    call.views = views;
    call.classes = classes;
    call.kl_weight = kl_weight;
    call.kl_weight_on_gpu = pointer<const float>(kl_weight_on_gpu);
    call.activation = activation_of(activation);
    call.dtype = dtype_of(dtype);
    call.fuse = fused != 0;
    return call;
}

mics::FusionCall fusion_call(uintptr_t evidence, const std::string& dtype, uintptr_t present,
                             uintptr_t fused, uintptr_t outer, uintptr_t gradient, int64_t rows,
                             int views, int classes) {
    require(rows >= 0 && classes >= 1, "rows must be >= 0 and classes >= 1");
    require(views >= 1 && views <= mics::kMaxViews, "views must be in [1, 8]");
    mics::FusionCall call{};
    call.evidence = pointer<const void>(evidence);
    call.present = pointer<const uint8_t>(present);
    call.fused = pointer<float>(fused);
    call.outer = pointer<const float>(outer);
    call.gradient = pointer<void>(gradient);
    call.rows = rows;
    call.views = views;
    call.classes = classes;
    call.dtype = dtype_of(dtype);
    return call;
}

// The caller keeps the tensors alive that a pair points to.
mics::ConsistencyPair consistency_pair(uintptr_t query, uintptr_t teacher, uintptr_t query_present,
                                       uintptr_t keys, const std::string& keys_dtype,
                                       uintptr_t queue, const std::string& queue_dtype,
                                       uintptr_t key_present, uintptr_t queue_ids,
                                       int64_t queue_length, uintptr_t losses, uintptr_t counted,
                                       uintptr_t gradient, uintptr_t temperature) {
    require(queue_length >= 0, "queue_length must be >= 0");
    mics::ConsistencyPair pair{};
    pair.query = pointer<const float>(query);
    pair.teacher = pointer<const float>(teacher);
    pair.present = pointer<const uint8_t>(query_present);
    pair.source.keys = pointer<const void>(keys);
    pair.source.queue = pointer<const void>(queue);
    pair.source.present = pointer<const uint8_t>(key_present);
    pair.source.queue_ids = pointer<const int64_t>(queue_ids);
    pair.source.queue_length = queue_length;
    pair.source.keys_dtype = dtype_of(keys_dtype);
    pair.source.queue_dtype = dtype_of(queue_dtype);
    pair.losses = pointer<float>(losses);
    pair.counted = pointer<uint8_t>(counted);
    pair.gradient = pointer<float>(gradient);
    pair.temperature = pointer<float>(temperature);
    return pair;
}

void consistency_cpu(const std::vector<mics::ConsistencyPair>& pairs, uintptr_t key_ids,
                     int64_t queries, int64_t keys, int64_t present_stride, int dim,
                     float temperature, float alpha, bool want_gradient, int threads) {
    require(dim >= 1, "dim must be >= 1");
    require(queries >= 0 && keys >= queries, "queries must be >= 0, and keys at least as many");
    mics::ConsistencyCall call{};
    call.pairs = pairs.data();
    call.pair_count = static_cast<int>(pairs.size());
    call.key_ids = pointer<const int64_t>(key_ids);
    call.queries = queries;
    call.keys = keys;
    call.present_stride = present_stride;
    call.dim = dim;
    call.temperature = temperature;
    call.alpha = alpha;
    call.want_gradient = want_gradient;
    const py::gil_scoped_release unlocked;
    mics::consistency_cpu(call, threads);
}

mics::ShiftCall shift_call(uintptr_t features, const std::string& dtype, uintptr_t moved,
                           uintptr_t labels, uintptr_t shares, uintptr_t spread,
                           uintptr_t directions, uintptr_t strengths, uintptr_t row_ids,
                           uintptr_t seed, int64_t rows, int dim, int classes, int rank,
                           float strength) {
    require(dim >= 1 && classes >= 1, "dim and classes must be >= 1");
    require(rows >= 0 && rank >= (directions ? 1 : 0), "rows must be >= 0, and directions >= 1");
    mics::ShiftCall call{};
    call.features = pointer<const void>(features);
    call.moved = pointer<void>(moved);
    call.labels = pointer<const int64_t>(labels);
    call.shares = pointer<const float>(shares);
    call.spread = pointer<const float>(spread);
    call.directions = pointer<const float>(directions);
    call.strengths = pointer<const float>(strengths);
    call.row_ids = pointer<const int64_t>(row_ids);
    call.seed = pointer<const int64_t>(seed);
    call.rows = rows;
    call.dim = dim;
    call.classes = classes;
    call.rank = rank;
    call.strength = strength;
    call.dtype = dtype_of(dtype);
    return call;
}

mics::MomentsCall moments_call(uintptr_t features, const std::string& dtype, uintptr_t labels,
                               uintptr_t shares, uintptr_t weight, uintptr_t count, uintptr_t mean,
                               uintptr_t m2, int64_t rows, int dim, int classes) {
    require(rows >= 0 && dim >= 1 && classes >= 1, "rows must be >= 0, dim and classes >= 1");
    mics::MomentsCall call{};
    call.features = pointer<const void>(features);
    call.labels = pointer<const int64_t>(labels);
    call.shares = pointer<const float>(shares);
    call.weight = pointer<const float>(weight);
    call.count = pointer<double>(count);
    call.mean = pointer<float>(mean);
    call.m2 = pointer<float>(m2);
    call.rows = rows;
    call.dim = dim;
    call.classes = classes;
    call.dtype = dtype_of(dtype);
    return call;
}

mics::MergeCall merge_call(uintptr_t count, uintptr_t mean, uintptr_t m2, uintptr_t new_count,
                           uintptr_t new_mean, uintptr_t new_m2, int classes, int dim,
                           double momentum) {
    require(classes >= 1 && dim >= 1, "classes and dim must be >= 1");
    mics::MergeCall call{};
    call.count = pointer<double>(count);
    call.mean = pointer<double>(mean);
    call.m2 = pointer<double>(m2);
    call.new_count = pointer<const double>(new_count);
    call.new_mean = pointer<const float>(new_mean);
    call.new_m2 = pointer<const float>(new_m2);
    call.classes = classes;
    call.dim = dim;
    call.momentum = momentum;
    return call;
}

mics::ShiftedLossCall shifted_loss_call(uintptr_t logits, const std::string& dtype,
                                        uintptr_t labels, uintptr_t table, uintptr_t strengths,
                                        uintptr_t losses, uintptr_t gradient, int64_t rows,
                                        int classes, float strength) {
    require(rows >= 0 && classes >= 1, "rows must be >= 0 and classes >= 1");
    mics::ShiftedLossCall call{};
    call.logits = pointer<const void>(logits);
    call.labels = pointer<const int64_t>(labels);
    call.table = pointer<const float>(table);
    call.strengths = pointer<const float>(strengths);
    call.losses = pointer<float>(losses);
    call.gradient = pointer<void>(gradient);
    call.rows = rows;
    call.classes = classes;
    call.strength = strength;
    call.dtype = dtype_of(dtype);
    return call;
}

std::string compiler() {
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#else
    return "unknown compiler";
#endif
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Native (C++ and CUDA) implementations of the mics_kernels operators.";

    module.def("build_info", [] {
        py::dict info;
        info["compiler"] = compiler();
        info["instruction set"] = mics::instruction_set().name;
#ifdef MICS_WITH_CUDA
        info["cuda"] = MICS_CUDA_VERSION;
        info["cuda architectures"] = MICS_CUDA_ARCHITECTURES;
#else
        info["cuda"] = false;
#endif
        return info;
    });
    module.def("use_instruction_set",
               [](const std::string& name) { return mics::use_instruction_set(name.c_str()); });

    // Addresses of 0 stand for None.
    using namespace py::literals;
    py::class_<mics::EvidentialCall>(module, "EvidentialCall")
        .def(py::init(&evidential_call), py::kw_only(), "input"_a, "dtype"_a, "labels"_a,
             "targets"_a, "present"_a, "weight"_a, "count"_a, "losses"_a, "fused"_a, "gradient"_a,
             "rows"_a, "views"_a, "classes"_a, "activation"_a, "kl_weight"_a, "kl_weight_on_gpu"_a,
             "ignore_index"_a);
    py::class_<mics::FusionCall>(module, "FusionCall")
        .def(py::init(&fusion_call), py::kw_only(), "evidence"_a, "dtype"_a, "present"_a, "fused"_a,
             "outer"_a, "gradient"_a, "rows"_a, "views"_a, "classes"_a);
    py::class_<mics::ShiftCall>(module, "ShiftCall")
        .def(py::init(&shift_call), py::kw_only(), "features"_a, "dtype"_a, "moved"_a, "labels"_a,
             "shares"_a, "spread"_a, "directions"_a, "strengths"_a, "row_ids"_a, "seed"_a, "rows"_a,
             "dim"_a, "classes"_a, "rank"_a, "strength"_a);
    py::class_<mics::MomentsCall>(module, "MomentsCall")
        .def(py::init(&moments_call), py::kw_only(), "features"_a, "dtype"_a, "labels"_a,
             "shares"_a, "weight"_a, "count"_a, "mean"_a, "m2"_a, "rows"_a, "dim"_a, "classes"_a);
    py::class_<mics::MergeCall>(module, "MergeCall")
        .def(py::init(&merge_call), py::kw_only(), "count"_a, "mean"_a, "m2"_a, "new_count"_a,
             "new_mean"_a, "new_m2"_a, "classes"_a, "dim"_a, "momentum"_a);
    py::class_<mics::ShiftedLossCall>(module, "ShiftedLossCall")
        .def(py::init(&shifted_loss_call), py::kw_only(), "logits"_a, "dtype"_a, "labels"_a,
             "table"_a, "strengths"_a, "losses"_a, "gradient"_a, "rows"_a, "classes"_a,
             "strength"_a);

    py::class_<mics::ConsistencyPair>(module, "ConsistencyPair")
        .def(py::init(&consistency_pair), py::kw_only(), "query"_a, "teacher"_a, "query_present"_a,
             "keys"_a, "keys_dtype"_a, "queue"_a, "queue_dtype"_a, "key_present"_a, "queue_ids"_a,
             "queue_length"_a, "losses"_a, "counted"_a, "gradient"_a, "temperature"_a);
    module.def("consistency_cpu", &consistency_cpu, "pairs"_a, py::kw_only(), "key_ids"_a,
               "queries"_a, "keys"_a, "present_stride"_a, "dim"_a, "temperature"_a, "alpha"_a,
               "want_gradient"_a, "threads"_a);

    const auto unlocked = py::call_guard<py::gil_scoped_release>();
    module.def("evidential_cpu", &mics::evidential_cpu, "call"_a, "threads"_a, unlocked);
    module.def("fuse_evidence_cpu", &mics::fuse_evidence_cpu, "call"_a, "threads"_a, unlocked);
    module.def("fuse_evidence_gradient_cpu", &mics::fuse_evidence_gradient_cpu, "call"_a,
               "threads"_a, unlocked);
    module.def("shift_cpu", &mics::shift_cpu, "call"_a, "threads"_a, unlocked);
    module.def("class_moments_cpu", &mics::class_moments_cpu, "call"_a, "threads"_a, unlocked);
    module.def("merge_moments_cpu", &mics::merge_moments_cpu, "call"_a, "threads"_a, unlocked);
    module.def("philox_uniforms_cpu", [](int64_t seed, uintptr_t row_ids, int64_t rows,
                                         int64_t columns, uintptr_t uniforms, int threads) {
        require(rows >= 0 && columns >= 1, "rows must be >= 0 and columns >= 1");
        mics::philox_uniforms_cpu(seed, pointer<const int64_t>(row_ids), rows, columns,
                                  pointer<double>(uniforms), threads);
    });
    module.def("shifted_loss_cpu", &mics::shifted_loss_cpu, "call"_a, "threads"_a, unlocked);
    module.def("philox_words_cpu",
               [](int64_t seed, int64_t offset, int64_t row, int64_t draws, uintptr_t words) {
                   mics::philox_words_cpu(seed, offset, row, draws, pointer<uint32_t>(words));
               });
#ifdef MICS_WITH_CUDA
    // stream: the address of a cudaStream_t
    module.def("count_labels_cuda", [](uintptr_t labels, int64_t rows, int64_t ignore_index,
                                       uintptr_t count, uintptr_t stream) {
        mics::count_labels_cuda(pointer<const int64_t>(labels), rows, ignore_index,
                                pointer<float>(count), stream);
    });
    module.def("evidential_cuda", &mics::evidential_cuda, "call"_a, "stream"_a, unlocked);
    module.def("fuse_evidence_cuda", &mics::fuse_evidence_cuda, "call"_a, "stream"_a, unlocked);
    module.def("fuse_evidence_gradient_cuda", &mics::fuse_evidence_gradient_cuda, "call"_a,
               "stream"_a, unlocked);
#endif
}
