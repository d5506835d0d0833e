// The consistency losses on a CPU; compiled once per instruction set (CMakeLists.txt).
//
// Attention with the keys as values: a block of keys that fits the cache is read once and serves
// both products of a tile of rows, scores = rows . keys and values += softmax(scores) . keys. The
// lanes of vectors hold rows in the first product and columns in the second, so that keys are used
// as they lie in memory. Derivation: kernels/mics_kernels/consistency/README.md. No standard
// containers here: their functions, compiled for this instruction set, could be linked into the
// others.
#include "consistency_cpu.h"
#include "simd.h"
#include "vector_memory.h"

namespace MICS_NAMESPACE {
namespace {

using mics::ConsistencyCall;
using mics::ConsistencyPair;
using mics::KeySource;
using mics::Partial;
using mics::TilePlan;

constexpr float kLowest =
    -1e12f;  // masks a score; finite, so that products and differences stay numbers

// Sizes of the register tiles: 24 accumulators of 32 registers, or 12 of 16.
constexpr int kKeysAtOnce = kWidth == 16 ? 12 : 6;
constexpr int kRowsAtOnce = kWidth == 16 ? 8 : 4;

bool is_soft(const ConsistencyCall& call) { return call.alpha != 0.0f; }

TilePlan plan(const ConsistencyCall& call) {
    TilePlan plan{};
    const int share = is_soft(call) ? 2 : 1;
    plan.lanes = call.queries * share <= kWidth ? kWidth : 2 * kWidth;
    plan.queries = plan.lanes / share;
    plan.tiles = (call.queries + plan.queries - 1) / plan.queries;
    plan.padded_dim = (call.dim + kWidth - 1) / kWidth * kWidth;
    const int fits = 65536 / plan.padded_dim;  // 256 KiB of keys, part of the second-level cache
    plan.block = (fits < 16    ? 1
                  : fits > 512 ? 512 / kKeysAtOnce
                               : fits / kKeysAtOnce) *
                 kKeysAtOnce;
    const int64_t rows = int64_t{plan.block} * plan.padded_dim;
    plan.scratch = rows + int64_t{plan.block} * (plan.lanes + 3) + 4 * kWidth;
    return plan;
}

MICS_INLINE bool readable(const ConsistencyCall& call, const KeySource& source, int64_t key) {
    if (source.present && !source.present[key * call.present_stride]) return false;
    return !call.key_ids || call.key_ids[key] >= 0;
}

MICS_INLINE bool counts(const ConsistencyCall& call, const ConsistencyPair& pair, int64_t query) {
    if (pair.present && !pair.present[query * call.present_stride]) return false;
    return readable(call, pair.source, query);
}

// A query that does not count is never read: its rows are 0.
void pack(const ConsistencyCall& call, const TilePlan& plan, const ConsistencyPair& pair,
          int64_t tile, float* packed) {
    memset(packed, 0, sizeof(float) * plan.padded_dim * plan.lanes);
    for (int lane = 0; lane < plan.lanes; ++lane) {
        const int64_t query = tile * plan.queries + lane % plan.queries;
        if (query >= call.queries || !counts(call, pair, query)) continue;
        const float* row = (lane < plan.queries ? pair.query : pair.teacher) + query * call.dim;
        for (int d = 0; d < call.dim; ++d) packed[d * plan.lanes + lane] = row[d];
    }
}

// Readable keys as float32 rows, in place if they are float32 rows already.
struct Block {
    const float* rows;
    int64_t stride;
    int count;
    int64_t* ids;  // with key_ids only; -1: equal to no query's id
    int32_t* own;  // the query whose positive a key is, or -1
};

struct Scratch {
    float* rows;    // (block, padded D)
    float* scores;  // (block, lanes)
    int64_t* ids;
    int32_t* own;
};

Scratch divide(const TilePlan& plan, float* scratch) {
    Scratch parts;
    parts.rows = scratch;
    parts.scores = parts.rows + int64_t{plan.block} * plan.padded_dim;
    parts.ids = reinterpret_cast<int64_t*>(parts.scores + int64_t{plan.block} * plan.lanes);
    parts.own = reinterpret_cast<int32_t*>(parts.ids + plan.block);
    return parts;
}

// Keys [first, last), which lie all in `keys` or all in `queue`.
Block gather(const ConsistencyCall& call, const TilePlan& plan, const KeySource& source,
             int64_t first, int64_t last, const Scratch& scratch) {
    const bool queued = first >= call.keys;
    const void* array = queued ? source.queue : source.keys;
    const mics::DType dtype = queued ? source.queue_dtype : source.keys_dtype;
    const int64_t start = queued ? first - call.keys : first;
    Block block{scratch.rows, plan.padded_dim, 0, scratch.ids, scratch.own};
    for (int64_t i = start; i < start + last - first; ++i) {
        const int64_t id = !queued && call.key_ids      ? call.key_ids[i]
                           : queued && source.queue_ids ? source.queue_ids[i]
                                                        : 0;
        if (queued ? id < 0 : !readable(call, source, i)) continue;
        block.ids[block.count] = !queued || source.queue_ids ? id : -1;
        block.own[block.count++] = queued || i >= call.queries ? -1 : static_cast<int32_t>(i);
    }
    const bool whole = block.count == last - first;
    if (whole && dtype == mics::DType::float32 && call.dim % kWidth == 0) {
        block.rows = static_cast<const float*>(array) + start * call.dim;
        return block;
    }
    float* to = scratch.rows;
    for (int64_t i = start; i < start + last - first; ++i) {
        if (queued ? source.queue_ids && source.queue_ids[i] < 0 : !readable(call, source, i))
            continue;
        for (int d = call.dim; d < plan.padded_dim; ++d) to[d] = 0.0f;
        read_floats(array, i * call.dim, dtype, to, call.dim);
        to += plan.padded_dim;
    }
    return block;
}

// scores[key][row] = rows . keys for `Keys` keys; packed (D, Vectors * kWidth). Fetch: prefetch the
// next keys, since the hardware does not follow so many streams.
template <int Keys, int Vectors, bool Fetch>
MICS_INLINE void score(const float* __restrict packed, const float* __restrict key, int64_t stride,
                       int dim, float* __restrict scores) {
    constexpr int kLine = 16;  // floats
    Vec sums[Keys][Vectors] = {};
    for (int start = 0; start < dim; start += kLine) {
        if constexpr (Fetch) {
            for (int k = 0; k < Keys; ++k) __builtin_prefetch(key + (Keys + k) * stride + start);
        }
        const int end = dim < start + kLine ? dim : start + kLine;
        for (int d = start; d < end; ++d) {
            Vec rows[Vectors];
            MICS_UNROLLED for (int v = 0; v < Vectors; ++v) rows[v] =
                load(packed + (d * Vectors + v) * kWidth);
            MICS_UNROLLED for (int k = 0; k < Keys; ++k) {
                MICS_UNROLLED for (int v = 0; v < Vectors; ++v) sums[k][v] +=
                    rows[v] * key[k * stride + d];
            }
        }
    }
    MICS_UNROLLED for (int k = 0; k < Keys; ++k) {
        MICS_UNROLLED for (int v = 0; v < Vectors; ++v)
            store(scores + (k * Vectors + v) * kWidth, sums[k][v]);
    }
}

template <int Vectors, bool Fetch>
void score_block(const float* packed, const Block& block, int dim, float* scores) {
    int key = 0;
    for (; key + kKeysAtOnce <= block.count; key += kKeysAtOnce) {
        score<kKeysAtOnce, Vectors, Fetch>(packed, block.rows + key * block.stride, block.stride,
                                           dim, scores + int64_t{key} * Vectors * kWidth);
    }
    for (; key < block.count; ++key) {
        score<1, Vectors, Fetch>(packed, block.rows + key * block.stride, block.stride, dim,
                                 scores + int64_t{key} * Vectors * kWidth);
    }
}

// values[row][d] = values[row][d] * fade[row] + sum_k weights[k][row] * keys[k][d], for Rows rows
// and Vectors vectors of d.
template <int Rows, int Vectors>
MICS_INLINE void add_values(const float* __restrict weights, int lanes, const Block& block,
                            const float* __restrict fade, float* __restrict values,
                            int padded_dim) {
    Vec sums[Rows][Vectors];
    MICS_UNROLLED for (int r = 0; r < Rows; ++r) {
        MICS_UNROLLED for (int v = 0; v < Vectors; ++v) {
            sums[r][v] = load(values + int64_t{r} * padded_dim + v * kWidth) * fade[r];
        }
    }
    const float* __restrict key = block.rows;
    for (int k = 0; k < block.count; ++k, key += block.stride, weights += lanes) {
        Vec part[Vectors];
        MICS_UNROLLED for (int v = 0; v < Vectors; ++v) part[v] = load(key + v * kWidth);
        MICS_UNROLLED for (int r = 0; r < Rows; ++r) {
            MICS_UNROLLED for (int v = 0; v < Vectors; ++v) sums[r][v] += part[v] * weights[r];
        }
    }
    MICS_UNROLLED for (int r = 0; r < Rows; ++r) {
        MICS_UNROLLED for (int v = 0; v < Vectors; ++v) {
            store(values + int64_t{r} * padded_dim + v * kWidth, sums[r][v]);
        }
    }
}

void add_all_values(const float* weights, int lanes, Block block, const float* fade, float* values,
                    int padded_dim) {
    for (int d = 0; d < padded_dim;) {
        const bool two = d + 2 * kWidth <= padded_dim;
        for (int row = 0; row < lanes; row += kRowsAtOnce) {
            float* to = values + int64_t{row} * padded_dim + d;
            if (two) {
                add_values<kRowsAtOnce, 2>(weights + row, lanes, block, fade + row, to, padded_dim);
            } else {
                add_values<kRowsAtOnce, 1>(weights + row, lanes, block, fade + row, to, padded_dim);
            }
        }
        const int step = two ? 2 * kWidth : kWidth;
        d += step;
        block.rows += step;
    }
}

// Queries whose rows are in a vector, and their ids: a key with the id of a
// query is left out for this query, unless it is the positive.
struct Owners {
    IntVec query, low, high;

    MICS_INLINE IntVec leave_out(int64_t id, int32_t own) const {
        return (low == static_cast<int32_t>(id)) & (high == static_cast<int32_t>(id >> 32)) &
               (query != own);
    }
};

Owners owners_of(const ConsistencyCall& call, const TilePlan& plan, int64_t tile, int vector) {
    int32_t query[kWidth], low[kWidth], high[kWidth];
    for (int lane = 0; lane < kWidth; ++lane) {
        const int64_t at = tile * plan.queries + (vector * kWidth + lane) % plan.queries;
        const int64_t id = at < call.queries ? call.key_ids[at] : -1;
        query[lane] = static_cast<int32_t>(at);
        low[lane] = static_cast<int32_t>(id);
        // Queries with a negative id do not count; no key has this one.
        high[lane] = id < 0 ? INT32_MIN : static_cast<int32_t>(id >> 32);
    }
    Owners owners;
    memcpy(&owners.query, query, sizeof query);
    memcpy(&owners.low, low, sizeof low);
    memcpy(&owners.high, high, sizeof high);
    return owners;
}

// Scales and masks the scores of one vector of rows; returns the largest of each row.
MICS_INLINE Vec scale_and_mask(const ConsistencyCall& call, const TilePlan& plan,
                               const Block& block, int64_t tile, int vector, float* scores) {
    const float scale = 1.0f / call.temperature;
    Vec top = Vec{} + kLowest;
    const Owners owners = call.key_ids ? owners_of(call, plan, tile, vector) : Owners{};
    for (int k = 0; k < block.count; ++k) {
        float* at = scores + int64_t{k} * plan.lanes + vector * kWidth;
        Vec s = load(at) * scale;
        if (call.key_ids)
            s = select(owners.leave_out(block.ids[k], block.own[k]), Vec{} + kLowest, s);
        store(at, s);
        top = select(s > top, s, top);
    }
    return top;
}

// In the lanes of a teacher, the score of its query, which the forward pass alone sums.
template <int Vectors> MICS_INLINE Vec scores_of_queries(const float* scores) {
    if constexpr (Vectors == 2) return load(scores);
    return shuffle(load(scores), lane_numbers() ^ (kWidth / 2));
}

// One block of keys against one tile of rows: the online softmax.
template <int Vectors, bool Gradient>
void attend(const ConsistencyCall& call, const TilePlan& plan, const Block& block, int64_t tile,
            const float* packed, const Partial& part, float* scores, bool unseen) {
    const auto score_all = unseen ? score_block<Vectors, true> : score_block<Vectors, false>;
    score_all(packed + tile * plan.padded_dim * plan.lanes, block, call.dim, scores);
    float fade[2 * kWidth];
    for (int v = 0; v < Vectors; ++v) {
        float* const top_at = part.top + tile * plan.lanes + v * kWidth;
        float* const weight_at = part.weight + tile * plan.lanes + v * kWidth;
        const Vec before = load(top_at), here = scale_and_mask(call, plan, block, tile, v, scores);
        const Vec top = select(here > before, here, before);
        const Vec faded = exp_of(before - top);
        Vec weight = load(weight_at) * faded, product{};
        for (int k = 0; k < block.count; ++k) {
            float* at = scores + int64_t{k} * plan.lanes + v * kWidth;
            const Vec p = exp_of(load(at) - top);
            weight += p;
            if constexpr (Gradient) {
                store(at, p);
            } else {
                product += p * scores_of_queries<Vectors>(scores + int64_t{k} * plan.lanes);
            }
        }
        store(top_at, top);
        store(weight_at, weight);
        store(fade + v * kWidth, faded);
        if constexpr (!Gradient) {
            float* const value_at = part.values + tile * plan.lanes + v * kWidth;
            store(value_at, load(value_at) * faded + product);
        }
    }
    if constexpr (Gradient) {
        float* values = part.values + tile * plan.lanes * plan.padded_dim;
        add_all_values(scores, plan.lanes, block, fade, values, plan.padded_dim);
    }
}

template <int Vectors, bool Gradient>
void sweep_as(const ConsistencyCall& call, const TilePlan& plan, const ConsistencyPair& pair,
              int64_t first, int64_t last, int64_t first_tile, int64_t last_tile,
              const float* packed, const Partial& part, float* scratch) {
    const Scratch parts = divide(plan, scratch);
    while (first < last) {
        int64_t end = first + plan.block < last ? first + plan.block : last;
        if (first < call.keys && end > call.keys) end = call.keys;
        const Block block = gather(call, plan, pair.source, first, end, parts);
        for (int64_t tile = first_tile; block.count > 0 && tile < last_tile; ++tile) {
            const bool unseen = tile == first_tile;  // the block is not in cache yet
            attend<Vectors, Gradient>(call, plan, block, tile, packed, part, parts.scores, unseen);
        }
        first = end;
    }
}

void sweep(const ConsistencyCall& call, const TilePlan& plan, const ConsistencyPair& pair,
           int64_t first, int64_t last, int64_t first_tile, int64_t last_tile, const float* packed,
           const Partial& part, float* scratch) {
    const int64_t rows = plan.lanes * (last_tile - first_tile), start = plan.lanes * first_tile;
    const int64_t width = call.want_gradient ? plan.padded_dim : 1;
    for (int64_t i = start; i < start + rows; ++i) part.top[i] = kLowest;
    memset(part.weight + start, 0, sizeof(float) * rows);
    memset(part.values + start * width, 0, sizeof(float) * rows * width);
    const auto run = plan.lanes == kWidth
                         ? (call.want_gradient ? sweep_as<1, true> : sweep_as<1, false>)
                         : (call.want_gradient ? sweep_as<2, true> : sweep_as<2, false>);
    run(call, plan, pair, first, last, first_tile, last_tile, packed, part, scratch);
}

// Softmax of a row over all parts: the log of its sum, and its values divided by the sum.
float finish(const TilePlan& plan, const Partial* parts, int64_t part_count, int64_t row, int width,
             float* values) {
    float top = kLowest;
    for (int64_t p = 0; p < part_count; ++p)
        top = parts[p].top[row] > top ? parts[p].top[row] : top;
    double weight = 0.0;
    for (int d = 0; d < width; ++d) values[d] = 0.0f;
    for (int64_t p = 0; p < part_count; ++p) {
        const float share = exp_of(parts[p].top[row] - top);
        weight += double{share} * parts[p].weight[row];
        const float* part = parts[p].values + row * (width == 1 ? 1 : plan.padded_dim);
        for (int d = 0; d < width; ++d) values[d] += share * part[d];
    }
    const float scale = static_cast<float>(1.0 / weight);
    for (int d = 0; d < width; ++d) values[d] *= scale;
    return top + static_cast<float>(__builtin_log(weight));
}

double dot(const float* a, const float* b, int dim) {
    double sum = 0.0;
    for (int d = 0; d < dim; ++d) sum += double{a[d]} * b[d];
    return sum;
}

// loss = log sum - x . g / T with g = alpha softmax(r) K + (1 - alpha) k_i; without a gradient,
// softmax(r) . s replaces softmax(r) K . x / T.
void combine_query(const ConsistencyCall& call, const TilePlan& plan, const ConsistencyPair& pair,
                   int64_t query, const Partial* parts, int64_t part_count, float* scratch) {
    const int width = call.want_gradient ? call.dim : 1;
    float* const own = scratch;
    float* const outer = own + plan.padded_dim;
    float* const taught = outer + plan.padded_dim;
    const float* const x = pair.query + query * call.dim;
    const int64_t row = query / plan.queries * plan.lanes + query % plan.queries;
    read_floats(pair.source.keys, query * call.dim, pair.source.keys_dtype, own, call.dim);
    const float log_sum = finish(plan, parts, part_count, row, width, outer);
    for (int d = 0; d < width; ++d) taught[d] = 0.0f;
    if (is_soft(call)) finish(plan, parts, part_count, row + plan.queries, width, taught);

    const double scale = 1.0 / call.temperature, alpha = call.alpha;
    double target = (1.0 - alpha) * scale * dot(x, own, call.dim);
    target += alpha * (call.want_gradient ? scale * dot(x, taught, call.dim) : taught[0]);
    pair.losses[query] = static_cast<float>(log_sum - target);
    if (!call.want_gradient) return;
    float* const gradient = pair.gradient + query * call.dim;
    for (int d = 0; d < call.dim; ++d) {
        const float g = call.alpha * taught[d] + (1.0f - call.alpha) * own[d];
        gradient[d] = (outer[d] - g) * static_cast<float>(scale);
    }
    pair.temperature[query] = static_cast<float>(-scale * dot(x, gradient, call.dim));
}

void combine(const ConsistencyCall& call, const TilePlan& plan, const ConsistencyPair& pair,
             int64_t tile, const Partial* parts, int64_t part_count, float* scratch) {
    for (int64_t query = tile * plan.queries;
         query < (tile + 1) * plan.queries && query < call.queries; ++query) {
        pair.counted[query] = counts(call, pair, query);
        if (pair.counted[query]) {
            combine_query(call, plan, pair, query, parts, part_count, scratch);
            continue;
        }
        pair.losses[query] = 0.0f;
        if (!call.want_gradient) continue;
        memset(pair.gradient + query * call.dim, 0, sizeof(float) * call.dim);
        pair.temperature[query] = 0.0f;
    }
}

}  // namespace

extern const mics::ConsistencyKernels consistency;
const mics::ConsistencyKernels consistency = {plan, pack, sweep, combine};

}  // namespace MICS_NAMESPACE
