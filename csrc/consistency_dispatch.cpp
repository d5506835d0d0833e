// Cuts the consistency losses into parts of the keys and groups of rows, and runs these on threads.
// The cut depends on sizes alone and parts are combined in order: the same inputs give the same
// bits on any number of threads.
#include <algorithm>
#include <vector>

#include "consistency_cpu.h"
#include "instruction_set.h"
#include "scratch.h"
#include "threads.h"

namespace mics {
namespace {

constexpr int64_t kKeysPerPart = 2048;                // enough to pay for a combination
constexpr int64_t kPartialFloats = int64_t{1} << 22;  // 16 MiB for all parts together
constexpr int64_t kRowsPerGroup = 512;                // their values stay in cache

int64_t all_keys(const ConsistencyCall& call, const ConsistencyPair& pair) {
    return call.keys + (pair.source.queue ? pair.source.queue_length : 0);
}

// Cut of a call into parts of the keys and groups of the tiles.
struct Cut {
    int64_t parts, groups;
    int64_t tiles_per_group;

    Cut(const ConsistencyCall& call, const TilePlan& plan) {
        int64_t keys = 0;
        for (int p = 0; p < call.pair_count; ++p)
            keys = std::max(keys, all_keys(call, call.pairs[p]));
        const int64_t width = call.want_gradient ? plan.padded_dim + 2 : 3;
        const int64_t floats =
            std::max<int64_t>(1, call.pair_count * plan.tiles * plan.lanes * width);
        parts = std::max<int64_t>(1, std::min(keys / kKeysPerPart, kPartialFloats / floats));
        tiles_per_group = std::max<int64_t>(1, kRowsPerGroup / plan.lanes);
        groups = (plan.tiles + tiles_per_group - 1) / tiles_per_group;
    }

    // First key of a part, at the edge of a block.
    int64_t edge(const ConsistencyCall& call, const TilePlan& plan, const ConsistencyPair& pair,
                 int64_t part) const {
        const int64_t keys = all_keys(call, pair);
        const int64_t blocks = (keys + plan.block - 1) / plan.block;
        return std::min(keys, blocks * part / parts * plan.block);
    }
};

// Memory for the partial softmaxes of every pair and part.
class Partials {
  public:
    Partials(const ConsistencyCall& call, const TilePlan& plan, const Cut& cut)
        : rows_(plan.tiles * plan.lanes),
          parts_(cut.parts),
          width_(call.want_gradient ? plan.padded_dim : 1),
          memory_(call.pair_count * parts_ * rows_ * (width_ + 2)) {
        float* at = memory_.get();
        for (int64_t i = 0; i < call.pair_count * parts_; ++i) {
            all_.push_back({at + rows_ * width_, at + rows_ * (width_ + 1), at});
            at += rows_ * (width_ + 2);
        }
    }

    const Partial* of(int pair) const { return &all_[pair * parts_]; }

  private:
    const int64_t rows_, parts_, width_;
    const Scratch memory_;
    std::vector<Partial> all_;
};

}  // namespace

void consistency_cpu(const ConsistencyCall& call, int threads) {
    if (call.queries == 0) return;
    const ConsistencyKernels& kernels = *instruction_set().consistency;
    const TilePlan plan = kernels.plan(call);
    const Cut cut(call, plan);
    const Partials partials(call, plan, cut);
    const int64_t packed_floats = plan.tiles * plan.lanes * plan.padded_dim;
    const Scratch packed(call.pair_count * packed_floats);

    each_piece(call.pair_count * plan.tiles, threads, [&](int64_t piece) {
        const int64_t pair = piece / plan.tiles, tile = piece % plan.tiles;
        float* to = packed.get() + pair * packed_floats + tile * plan.lanes * plan.padded_dim;
        kernels.pack(call, plan, call.pairs[pair], tile, to);
    });
    each_piece(call.pair_count * cut.parts * cut.groups, threads, [&](int64_t piece) {
        const int pair = static_cast<int>(piece / (cut.parts * cut.groups));
        const int64_t part = piece / cut.groups % cut.parts, group = piece % cut.groups;
        const ConsistencyPair& one = call.pairs[pair];
        const Scratch scratch(plan.scratch);
        kernels.sweep(call, plan, one, cut.edge(call, plan, one, part),
                      cut.edge(call, plan, one, part + 1), group * cut.tiles_per_group,
                      std::min(plan.tiles, (group + 1) * cut.tiles_per_group),
                      packed.get() + pair * packed_floats, partials.of(pair)[part], scratch.get());
    });
    each_piece(call.pair_count * plan.tiles, threads, [&](int64_t piece) {
        const int pair = static_cast<int>(piece / plan.tiles);
        const Scratch scratch(plan.scratch);
        kernels.combine(call, plan, call.pairs[pair], piece % plan.tiles, partials.of(pair),
                        cut.parts, scratch.get());
    });
}

}  // namespace mics
