#include "instruction_set.h"

#include <cstring>
#include <vector>

#define MICS_DECLARE_KERNELS(set)                      \
    namespace set {                                    \
    extern const mics::EvidentialKernels evidential;   \
    extern const mics::ConsistencyKernels consistency; \
    extern const mics::ShiftKernels shifts;            \
    }
MICS_DECLARE_KERNELS(mics_baseline)
#if defined(__x86_64__)
MICS_DECLARE_KERNELS(mics_avx2)
MICS_DECLARE_KERNELS(mics_avx512)
#endif

namespace mics {
namespace {

#define MICS_KERNELS(set) &set::evidential, &set::consistency, &set::shifts

const std::vector<InstructionSet>& instruction_sets() {  // best first
    static const std::vector<InstructionSet> sets = [] {
#if defined(__x86_64__)
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool avx512 =
            __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
        return std::vector<InstructionSet>{{"avx512", avx512, MICS_KERNELS(mics_avx512)},
                                           {"avx2", avx2, MICS_KERNELS(mics_avx2)},
                                           {"sse2", true, MICS_KERNELS(mics_baseline)}};
#elif defined(__aarch64__)
        return std::vector<InstructionSet>{{"neon", true, MICS_KERNELS(mics_baseline)}};
#else
        return std::vector<InstructionSet>{{"generic", true, MICS_KERNELS(mics_baseline)}};
#endif
    }();
    return sets;
}

const InstructionSet*& chosen() {
    static const InstructionSet* set = [] {
        for (const InstructionSet& one : instruction_sets()) {
            if (one.available) return &one;
        }
        return &instruction_sets().back();
    }();
    return set;
}

}  // namespace

const InstructionSet& instruction_set() { return *chosen(); }

bool use_instruction_set(const char* name) {
    for (const InstructionSet& set : instruction_sets()) {
        if (set.available && std::strcmp(set.name, name) == 0) {
            chosen() = &set;
            return true;
        }
    }
    return false;
}

}  // namespace mics
