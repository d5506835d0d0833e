// Every piece runs once: on one thread, with OpenMP's, called from several threads at once, and in
// a forked child, which has none of its parent's threads.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "expect.h"
#include "threads.h"

namespace {

bool each_once(int64_t pieces, int threads) {
    std::vector<std::atomic<int>> times(pieces);
    mics::each_piece(pieces, threads, [&](int64_t piece) { ++times[piece]; });
    for (const std::atomic<int>& count : times) {
        if (count != 1) return false;
    }
    return true;
}

void expect_each_once() {
    for (int64_t pieces : {0, 1, 2, 7, 1000}) {
        for (int threads : {1, 2, 3, 8}) {
            for (int repeat = 0; repeat < 200; ++repeat) {
                expect("every piece is worked on once", each_once(pieces, threads));
            }
        }
    }
}

void expect_several_threads() {
    std::atomic<int> inside{0};
    std::atomic<bool> together{true};
    mics::each_piece(2, 2, [&](int64_t) {  // each piece waits for the other one
        ++inside;
        const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
        while (inside < 2 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
        if (inside < 2) together = false;
    });
    expect("two pieces are worked on at the same time", together);
}

void expect_several_callers() {
    std::atomic<bool> fine{true};
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i) {
        callers.emplace_back([&] {
            for (int repeat = 0; repeat < 500; ++repeat) fine = fine && each_once(50, 3);
        });
    }
    for (std::thread& caller : callers) caller.join();
    expect("callers do not disturb each other", fine);
}

void expect_a_child_works_too() {
    const pid_t child = fork();
    if (child == 0) _exit(each_once(100, 3) && each_once(100, 3) ? 0 : 1);
    int status = 1;
    waitpid(child, &status, 0);
    expect("a forked child works alone", WIFEXITED(status) && WEXITSTATUS(status) == 0);
    expect("its parent goes on", each_once(100, 3));
}

void expect_whole_tiles() {
    std::vector<std::atomic<int>> rows(1001);
    std::atomic<bool> aligned{true};
    mics::spread(1001, int64_t{1001} * 1000, 16, 3, [&](int64_t first, int64_t last) {
        aligned = aligned && first % 16 == 0;
        for (int64_t row = first; row < last; ++row) ++rows[row];
    });
    expect("a range starts at a tile", aligned);
    for (const std::atomic<int>& count : rows) expect("every row is worked on once", count == 1);
}

}  // namespace

int main() {
    expect_each_once();
    expect_several_threads();
    expect_several_callers();
    expect_a_child_works_too();
    expect_whole_tiles();
    return failures != 0;
}
