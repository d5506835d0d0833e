// Spreads rows over threads.
//
// Plain threads, started for a call and joined at its end: a second OpenMP beside
// the one inside torch, or a pool that does not survive a fork, would cost more than it saves.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace mics {

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

}  // namespace mics
