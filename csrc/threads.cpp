#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>

namespace mics {
namespace {

// GNU's and LLVM's OpenMP both export this entry: run `work` on a team, the caller included.
using Parallel = void (*)(void (*work)(void*), void* context, unsigned threads, unsigned flags);

std::atomic<bool> forked{false};  // a child has none of the team, but waits for it

Parallel threads_of_torch() {
    void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    void* const entry = torch ? dlsym(torch, "GOMP_parallel") : nullptr;
    if (entry) pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
    return reinterpret_cast<Parallel>(entry);
}

struct Pieces {
    int64_t count;
    void (*work)(void*, int64_t);
    void* context;
    std::atomic<int64_t> next{0};

    void take() {
        while (true) {
            const int64_t piece = next.fetch_add(1, std::memory_order_relaxed);
            if (piece >= count) return;
            work(context, piece);
        }
    }
};

}  // namespace

void run_pieces(int64_t pieces, int threads, void (*work)(void*, int64_t), void* context) {
    static const Parallel parallel = threads_of_torch();
    Pieces left{pieces, work, context};
    if (!parallel || threads < 2 || pieces < 2 || forked.load(std::memory_order_relaxed)) {
        left.take();
        return;
    }
    parallel([](void* it) { static_cast<Pieces*>(it)->take(); }, &left, threads, 0);
}

}  // namespace mics
