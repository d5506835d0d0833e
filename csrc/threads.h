// Work on the OpenMP threads of torch, found when it is loaded.
//
// Threads of our own, or of a second OpenMP runtime, would wait for a core while torch's spin after
// its last operator. Without torch or its OpenMP the caller works alone.
#pragma once

#include <algorithm>
#include <cstdint>

namespace mics {

// work(context, piece) for every piece in [0, pieces), on the caller and up to threads - 1 others.
// Pieces must not depend on which thread takes them. In a forked child the caller works alone.
void run_pieces(int64_t pieces, int threads, void (*work)(void* context, int64_t piece),
                void* context);

// work(piece), a callable, for every piece in [0, pieces).
template <class Work> void each_piece(int64_t pieces, int threads, Work work) {
    run_pieces(
        pieces, threads,
        [](void* context, int64_t piece) { (*static_cast<Work*>(context))(piece); }, &work);
}

// work(first, last) over [0, rows) in whole tiles, about `elements` numbers in all: small ranges,
// so that others take the share of a late thread; one range if there is little work.
template <class Work>
void spread(int64_t rows, int64_t elements, int tile, int threads, Work work) {
    constexpr int64_t kElementsPerPiece = 16384;  // 20 to 50 microseconds
    const int64_t tiles = (rows + tile - 1) / tile;
    const int64_t pieces = std::max<int64_t>(1, std::min(elements / kElementsPerPiece, tiles));
    const auto edge = [&](int64_t piece) { return std::min(rows, tiles * piece / pieces * tile); };
    each_piece(pieces, threads, [&](int64_t piece) { work(edge(piece), edge(piece + 1)); });
}

}  // namespace mics
