// Uninitialised floats that start at a cache line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace mics {

class Scratch {
  public:
    explicit Scratch(int64_t floats) : memory_(new float[floats + kAlignment]) {}

    float* get() const {
        const uintptr_t bytes = kAlignment * sizeof(float);
        return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_.get()) + bytes - 1) /
                                        bytes * bytes);
    }

  private:
    static constexpr uintptr_t kAlignment = 16;  // floats
    std::unique_ptr<float[]> memory_;
};

}  // namespace mics
