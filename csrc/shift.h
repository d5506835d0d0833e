// CPU entry points of feature shift, class moments and shifted cross-entropy; formulas:
// kernels/mics_kernels/shift/README.md. B rows, D columns, C classes; arrays are contiguous. Rows
// with a label outside [0, C) stay unchanged, are skipped, or have loss 0.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace mics {

struct ShiftCall {
    const void* features;     // (B, D)
    void* moved;              // (B, D), of the features' dtype
    const int64_t* labels;    // (B,), or null if there are `shares`
    const float* shares;      // (B, C) posteriors, or null
    const float* spread;      // (C, D): deviations for labels, variances for shares
    const float* directions;  // (C, rank, D) instead of `spread`, or null
    const float* strengths;   // (B,), or null: `strength` for all rows
    const int64_t* row_ids;   // (B,), or null: 0 .. B - 1
    const int64_t* seed;      // 2: seed and offset
    int64_t rows;
    int dim;
    int classes;
    int rank;
    float strength;
    DType dtype;
};

struct MomentsCall {
    const void* features;   // (B, D)
    const int64_t* labels;  // (B,), or null if there are `shares`
    const float* shares;    // (B, C) posteriors, or null
    const float* weight;    // (B,), or null: all are 1
    double* count;          // (C,)
    float* mean;            // (C, D)
    float* m2;              // (C, D)
    int64_t rows;
    int dim;
    int classes;
    DType dtype;
};

// Rows of each class, in ascending order: rows[starts[c]] .. rows[starts[c + 1] - 1].
struct RowsByClass {
    const int64_t* rows;
    const int64_t* starts;
};

// Running statistics of each class, updated in place, and the moments of new rows to merge into
// them. Classes without new rows stay as they are.
struct MergeCall {
    double* count;            // (C,)
    double* mean;             // (C, D)
    double* m2;               // (C, D)
    const double* new_count;  // (C,)
    const float* new_mean;    // (C, D)
    const float* new_m2;      // (C, D)
    int classes;
    int dim;
    double momentum;  // weight of one new row, in (0, 1); 0: all rows count alike
};

struct ShiftedLossCall {
    const void* logits;      // (B, C)
    const int64_t* labels;   // (B,)
    const float* table;      // (C, C): what strength^2 / 2 adds to logit j of a row of class y
    const float* strengths;  // (B,), or null: `strength` for all rows
    float* losses;           // (B,)
    void* gradient;          // (B, C) of the logits' dtype, or null: not wanted
    int64_t rows;
    int classes;
    float strength;
    DType dtype;
};

// Functions of shift_cpu.cpp, for one instruction set.
struct ShiftKernels {
    int64_t (*shift_scratch)(const ShiftCall&);  // floats
    void (*shift)(const ShiftCall&, int64_t first_row, int64_t last_row, float* scratch);
    int64_t (*moments_scratch)(const MomentsCall&, int64_t columns);  // doubles
    void (*moments)(const MomentsCall&, const RowsByClass&, int64_t first_column,
                    int64_t last_column, double* scratch);
    int64_t (*loss_scratch)(const ShiftedLossCall&);  // floats
    void (*loss)(const ShiftedLossCall&, int64_t first_row, int64_t last_row, float* scratch);
    void (*words)(int64_t seed, int64_t offset, int64_t row, int64_t draws, uint32_t* words);
    void (*uniforms)(int64_t seed, const int64_t* row_ids, int64_t rows, int64_t columns,
                     double* uniforms);
};

void shift_cpu(const ShiftCall& call, int threads);
void class_moments_cpu(const MomentsCall& call, int threads);
void shifted_loss_cpu(const ShiftedLossCall& call, int threads);
void merge_moments_cpu(const MergeCall& call, int threads);
// uniforms (B, columns), in (0, 1), from word 0 of the counter (column, row low, row high, 0) with
// the halves of the seed as the key.
void philox_uniforms_cpu(int64_t seed, const int64_t* row_ids, int64_t rows, int64_t columns,
                         double* uniforms, int threads);
// For tests: words of draws 0 .. draws - 1 of a row, (draws, 4).
void philox_words_cpu(int64_t seed, int64_t offset, int64_t row, int64_t draws, uint32_t* words);

}  // namespace mics
