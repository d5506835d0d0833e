// Runs the rows of the evidential operators on threads.
#include "evidential_cpu.h"
#include "instruction_set.h"
#include "scratch.h"
#include "threads.h"

namespace mics {

void evidential_cpu(const EvidentialCall& call, int threads) {
    const EvidentialKernels& kernels = *instruction_set().evidential;
    const int64_t elements = call.rows * call.views * call.classes;
    spread(call.rows, elements, kernels.tile, threads, [&](int64_t first, int64_t last) {
        const Scratch scratch(kernels.scratch_floats(call.views, call.classes));
        kernels.rows(call, first, last, scratch.get());
    });
}

void fuse_evidence_cpu(const FusionCall& call, int threads) {
    const EvidentialKernels& kernels = *instruction_set().evidential;
    spread(call.rows, call.rows * call.views * call.classes, 1, threads,
           [&](int64_t first, int64_t last) { kernels.fuse(call, first, last); });
}

void fuse_evidence_gradient_cpu(const FusionCall& call, int threads) {
    const EvidentialKernels& kernels = *instruction_set().evidential;
    spread(call.rows, call.rows * call.views * call.classes, 1, threads,
           [&](int64_t first, int64_t last) { kernels.fuse_gradient(call, first, last); });
}

}  // namespace mics
