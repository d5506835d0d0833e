// Chooses the instruction set at run time; the entry points of the evidential operators.
#include <cstring>
#include <memory>
#include <vector>

#include "evidential_cpu.h"
#include "threads.h"

namespace mics_baseline {
extern const mics::EvidentialKernels kernels;
}
#if defined(__x86_64__)
namespace mics_avx2 {
extern const mics::EvidentialKernels kernels;
}
namespace mics_avx512 {
extern const mics::EvidentialKernels kernels;
}
#endif

namespace mics {
namespace {

struct InstructionSet {
    const char* name;
    bool available;
    const EvidentialKernels* kernels;
};

std::vector<InstructionSet> instruction_sets() {  // best first
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
    return {{"avx512", avx512, &mics_avx512::kernels},
            {"avx2", avx2, &mics_avx2::kernels},
            {"sse2", true, &mics_baseline::kernels}};
#elif defined(__aarch64__)
    return {{"neon", true, &mics_baseline::kernels}};
#else
    return {{"generic", true, &mics_baseline::kernels}};
#endif
}

const InstructionSet* best() {
    static const std::vector<InstructionSet> sets = instruction_sets();
    for (const InstructionSet& set : sets) {
        if (set.available) return &set;
    }
    return &sets.back();
}

const InstructionSet*& chosen() {
    static const InstructionSet* set = best();
    return set;
}

}  // namespace

const char* instruction_set() { return chosen()->name; }

bool use_instruction_set(const char* name) {
    static const std::vector<InstructionSet> sets = instruction_sets();
    for (const InstructionSet& set : sets) {
        if (set.available && std::strcmp(set.name, name) == 0) {
            chosen() = &set;
            return true;
        }
    }
    return false;
}

void evidential_cpu(const EvidentialCall& call, int threads) {
    const EvidentialKernels& kernels = *chosen()->kernels;
    const int64_t elements = call.rows * call.views * call.classes;
    const size_t floats = kernels.scratch_floats(call.views, call.classes) + 16;
    spread(call.rows, elements, kernels.tile, threads, [&](int64_t first, int64_t last) {
        const std::unique_ptr<float[]> memory(new float[floats]);
        void* start = memory.get();
        size_t space = floats * sizeof(float);
        kernels.rows(call, first, last, static_cast<float*>(std::align(64, space - 64, start, space)));
    });
}

void fuse_evidence_cpu(const FusionCall& call, int threads) {
    const EvidentialKernels& kernels = *chosen()->kernels;
    spread(call.rows, call.rows * call.views * call.classes, 1, threads,
           [&](int64_t first, int64_t last) { kernels.fuse(call, first, last); });
}

void fuse_evidence_gradient_cpu(const FusionCall& call, int threads) {
    const EvidentialKernels& kernels = *chosen()->kernels;
    spread(call.rows, call.rows * call.views * call.classes, 1, threads,
           [&](int64_t first, int64_t last) { kernels.fuse_gradient(call, first, last); });
}

}  // namespace mics
