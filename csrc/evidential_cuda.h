// CUDA entry points of the evidential operators. A stream is the address of a cudaStream_t; a
// failed launch throws std::runtime_error.
#pragma once

#include "evidential_cpu.h"

namespace mics {

void evidential_cuda(const EvidentialCall& call, uintptr_t stream);
// Number of labels that are not ignored, at least 1, as one float.
void count_labels_cuda(const int64_t* labels, int64_t rows, int64_t ignore_index, float* count,
                       uintptr_t stream);
void fuse_evidence_cuda(const FusionCall& call, uintptr_t stream);
void fuse_evidence_gradient_cuda(const FusionCall& call, uintptr_t stream);

}  // namespace mics
