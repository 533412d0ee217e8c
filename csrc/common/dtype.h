// Codes of the element types that cross the border between Python and the native core (sabmn_ext/ops/dispatch.py).
#pragma once

namespace sabmn {

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// What a native function returns: 0, or one of these. Python turns it into an error that names the operation and the shapes.
// From cuda_error on it is a cudaError_t plus that.
enum Status : int { ok = 0, unsupported_dtype = 1, unsupported_size = 2, cuda_error = 1000 };

}  // namespace sabmn
