// CPU entry points of the evidential operators.
#pragma once

#include "evidential.h"

namespace mics {

// A call of fuse_evidence, or of its gradient; every array is contiguous.
struct FusionCall {
    const void* evidence;    // (B, V, C)
    const uint8_t* present;  // (B, V), or null: all present
    float* fused;            // (B, C); null for the gradient
    const float* outer;      // (B, C) gradient of the result, gradient only
    void* gradient;          // (B, V, C) of the evidence's dtype, gradient only
    int64_t rows;
    int views;
    int classes;
    DType dtype;
};

// Functions of evidential_cpu.cpp, for one instruction set. Rows are a range [first, last).
struct EvidentialKernels {
    int tile;  // rows per step
    int64_t (*scratch_floats)(int views, int classes);
    void (*rows)(const EvidentialCall&, int64_t first, int64_t last, float* scratch);
    void (*fuse)(const FusionCall&, int64_t first, int64_t last);
    void (*fuse_gradient)(const FusionCall&, int64_t first, int64_t last);
};

void evidential_cpu(const EvidentialCall& call, int threads);
void fuse_evidence_cpu(const FusionCall& call, int threads);
void fuse_evidence_gradient_cpu(const FusionCall& call, int threads);

}  // namespace mics
