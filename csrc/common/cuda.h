// The one header that a CUDA kernel includes. Under nvcc the kernels run on a GPU; under g++ simt/ gives the same names
// in plain C++ and runs them thread by thread on a CPU, which is how they are tested (csrc/simt/README.md).
//
// Kernels stand in <operation>_kernels.cuh, in an unnamed namespace (AddressSanitizer guards their static __shared__
// arrays only there); host code launches them with launch(), dynamic shared memory comes from SABMN_DYNAMIC_SHARED, and
// a large parameter is a SABMN_GRID_CONSTANT. Everything else is CUDA C++ as usual, but shuffles and the other _sync
// functions take full warps only.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <utility>

#include "common/ptx.h"

// In a kernel's parameter list, SABMN_GRID_CONSTANT(T) name: a structure that every thread reads where the launch put
// it.
#define SABMN_GRID_CONSTANT(T) const __grid_constant__ T

// T* name: the block's dynamic shared memory, aligned to 16 bytes.
#define SABMN_DYNAMIC_SHARED(T, name)                                       \
    extern __shared__ __align__(16) unsigned char sabmn_dynamic_shared[]; \
    T* const name = reinterpret_cast<T*>(sabmn_dynamic_shared)

namespace sabmn {

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...); returns the launch's own error and leaves none behind.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
    cudaError_t status = cudaSuccess;
    if (shared_bytes > 48 * 1024) {  // above that a kernel must ask
        status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                      cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    }
    if (status == cudaSuccess) {
        cudaLaunchConfig_t config = {};
        config.gridDim = grid;
        config.blockDim = block;
        config.dynamicSmemBytes = shared_bytes;
        config.stream = stream;
        status = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
    }
    if (status != cudaSuccess) cudaGetLastError();
    return status;
}

}  // namespace sabmn
#else
#include "simt/simt.h"
#endif

namespace sabmn {

// bfloat16 and float16: 16 bits in memory, float in arithmetic. Reading is implicit and exact; rounding is written out,
// static_cast<bf16>(x), and goes to the nearest, ties to even.
struct bf16 {
    std::uint16_t bits;
    bf16() = default;
    __device__ explicit bf16(float x) : bits(bf16_bits(x)) {}
    __device__ operator float() const { return bf16_value(bits); }
};

struct f16 {
    std::uint16_t bits;
    f16() = default;
    __device__ explicit f16(float x) : bits(f16_bits(x)) {}
    __device__ operator float() const { return f16_value(bits); }
};

}  // namespace sabmn
