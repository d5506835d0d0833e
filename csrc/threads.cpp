#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

namespace mics {
namespace {

// Time a helper spins for more work before it sleeps; a wake-up costs about as much.
constexpr auto kPatience = std::chrono::microseconds(50);

void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
  public:
    void run(int64_t pieces, int threads, void (*work)(void*, int64_t), void* context) {
        const std::unique_lock<std::mutex> mine(busy_, std::try_to_lock);
        const int64_t helpers = mine ? std::min<int64_t>(threads, pieces) - 1 : 0;
        if (helpers < 1) {
            for (int64_t piece = 0; piece < pieces; ++piece) work(context, piece);
            return;
        }
        for (; started_ < helpers; ++started_) std::thread([this] { help(); }).detach();
        {
            const std::lock_guard<std::mutex> lock(door_);
            work_ = work;
            context_ = context;
            pieces_ = pieces;
            seats_ = helpers;
            next_.store(0, std::memory_order_relaxed);
            round_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        take_pieces();
        {
            const std::lock_guard<std::mutex> lock(door_);  // helpers that are late stay out
            seats_ = 0;
        }
        while (inside_.load(std::memory_order_acquire) > 0) pause_briefly();
    }

  private:
    void take_pieces() {
        while (true) {
            const int64_t piece = next_.fetch_add(1, std::memory_order_relaxed);
            if (piece >= pieces_) return;
            work_(context_, piece);
        }
    }

    void help() {
        uint64_t seen = 0;
        while (true) {
            wait_for_round_after(seen);
            {
                const std::lock_guard<std::mutex> lock(door_);
                seen = round_.load(std::memory_order_relaxed);
                if (seats_ == 0) continue;
                --seats_;
                inside_.fetch_add(1, std::memory_order_relaxed);
            }
            take_pieces();
            inside_.fetch_sub(1, std::memory_order_release);
        }
    }

    void wait_for_round_after(uint64_t seen) {
        const auto until = std::chrono::steady_clock::now() + kPatience;
        while (round_.load(std::memory_order_acquire) == seen) {
            if (std::chrono::steady_clock::now() > until) {
                std::unique_lock<std::mutex> lock(door_);
                wake_.wait(lock, [&] { return round_.load(std::memory_order_relaxed) != seen; });
                return;
            }
            pause_briefly();
        }
    }

    std::mutex busy_;  // held while the work of a caller is shared
    int started_ = 0;

    std::mutex door_;  // guards the round and its seats
    std::condition_variable wake_;
    void (*work_)(void*, int64_t) = nullptr;
    void* context_ = nullptr;
    int64_t pieces_ = 0;
    int64_t seats_ = 0;

    std::atomic<uint64_t> round_{0};
    std::atomic<int64_t> next_{0};
    std::atomic<int> inside_{0};
};

// Never destroyed: its threads sleep in it until the process ends.
alignas(Pool) unsigned char memory[sizeof(Pool)];

Pool& pool() {
    static Pool* const made = [] {
        // A forked child has no threads, and locks in any state: it starts anew.
        pthread_atfork(nullptr, nullptr, [] { new (memory) Pool; });
        return new (memory) Pool;
    }();
    return *made;
}

}  // namespace

void run_pieces(int64_t pieces, int threads, void (*work)(void*, int64_t), void* context) {
    pool().run(pieces, threads, work, context);
}

}  // namespace mics
