// Chooses the instruction set at run time and spreads rows over threads.
//
// Plain threads, started for a call and joined at its end: a second OpenMP beside
// the one inside torch, or a pool that does not survive a fork, would cost more than it saves.
#include <algorithm>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "evidential_cpu.h"

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

// Below this many elements a thread costs more than it brings: on two cores, 196,608 elements took
// 1.3 ms alone and 2.0 ms shared.
constexpr int64_t kElementsPerThread = 262144;

// work(first, last) over [0, rows), in pieces of whole tiles. The pieces depend on nothing but
// their number, and no piece reads another's results: any number of threads gives the same bits.
template <class Work> void spread(int64_t rows, int64_t elements, int tile, int threads, Work work) {
    const int64_t tiles = (rows + tile - 1) / tile;
    int64_t pieces = elements / kElementsPerThread;
    pieces = std::max<int64_t>(1, std::min({pieces, static_cast<int64_t>(threads), tiles}));
    const auto edge = [&](int64_t piece) { return std::min(rows, tiles * piece / pieces * tile); };
    std::vector<std::thread> helpers;
    for (int64_t p = 1; p < pieces; ++p) helpers.emplace_back(work, edge(p), edge(p + 1));
    work(int64_t{0}, edge(1));
    for (std::thread& helper : helpers) helper.join();
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
