// The dtypes that kernels read and write; they compute in float32.
#pragma once

namespace mics {

enum class DType : int { float32, bfloat16, float16 };

}  // namespace mics
