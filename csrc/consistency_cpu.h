// CPU entry points of the consistency losses.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace mics {

// Keys of one modality: the rows of `keys`, the first B of them positives, then `queue`.
struct KeySource {
    const void* keys;          // (K, D)
    const void* queue;         // (Q, D), or null
    const uint8_t* present;    // K flags, `present_stride` apart, or null: all present
    const int64_t* queue_ids;  // (Q,), or null: equal to no key's id
    int64_t queue_length;      // filled rows of the queue
    DType keys_dtype, queue_dtype;
};

// Queries of one modality against the keys of another; every array is contiguous.
struct ConsistencyPair {
    const float* query;      // (B, D)
    const float* teacher;    // (B, D)
    const uint8_t* present;  // B flags, `present_stride` apart, or null: all present
    KeySource source;
    float* losses;       // (B,)
    uint8_t* counted;    // (B,)
    float* gradient;     // (B, D), or null: not wanted
    float* temperature;  // (B,) gradient in T, or null
};

struct ConsistencyCall {
    const ConsistencyPair* pairs;
    const int64_t* key_ids;  // (K,), or null
    int64_t queries;         // B
    int64_t keys;            // K
    int64_t present_stride;
    int pair_count;
    int dim;  // D
    float temperature;
    float alpha;
    bool want_gradient;
};

// Layout of queries in vectors: a tile is `lanes` rows, one per lane. Unless alpha is 0, its second
// half holds the teachers of the queries in its first half.
struct TilePlan {
    int lanes;
    int queries;      // per tile
    int64_t tiles;    // of all queries
    int padded_dim;   // D in whole vectors
    int block;        // keys per step
    int64_t scratch;  // floats needed by `sweep` and `combine`
};

// The running softmaxes of all tiles over a part of the keys; a row is a lane of a tile.
struct Partial {
    float* top;     // (tiles, lanes) largest score
    float* weight;  // (tiles, lanes) sum of exp(score - top)
    float* values;  // gradient wanted: (tiles, lanes, padded D) sum of exp(score - top) * key
                    // else: (tiles, lanes) of a teacher the sum of exp(score - top) * query's score
};

// Functions of consistency_cpu.cpp, for one instruction set.
struct ConsistencyKernels {
    TilePlan (*plan)(const ConsistencyCall&);
    // A tile of a pair, transposed: (padded D, lanes).
    void (*pack)(const ConsistencyCall&, const TilePlan&, const ConsistencyPair&, int64_t tile,
                 float* packed);
    // Keys [first, last) against tiles [first_tile, last_tile); `packed` and `part` are of all
    // tiles.
    void (*sweep)(const ConsistencyCall&, const TilePlan&, const ConsistencyPair&, int64_t first,
                  int64_t last, int64_t first_tile, int64_t last_tile, const float* packed,
                  const Partial& part, float* scratch);
    // Losses and gradients of a tile from the partials of all parts of the keys.
    void (*combine)(const ConsistencyCall&, const TilePlan&, const ConsistencyPair&, int64_t tile,
                    const Partial* parts, int64_t part_count, float* scratch);
};

void consistency_cpu(const ConsistencyCall& call, int threads);

}  // namespace mics
