// Element types of tensors; arithmetic is float32 throughout.
#pragma once

namespace mics {

enum class DType : int { float32, bfloat16, float16 };

}  // namespace mics
