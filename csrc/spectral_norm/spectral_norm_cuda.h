// Spectral normalisation on the GPU; what the arguments mean stands in spectral_norm.h. Nothing here allocates, waits
// for the device or reads from it, so that a CUDA graph can record it.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "spectral_norm/spectral_norm.h"

namespace sabmn {

struct SpectralNormCudaBytes {
    std::int64_t forward, backward;
};

// The workspace of a call, in bytes; to be aligned to 256.
SpectralNormCudaBytes spectral_norm_cuda_workspace(const std::int64_t* rows, const std::int64_t* columns,
                                                   std::int64_t count, DType dtype);

// stream: a cudaStream_t. Matrices should come longest first.
int spectral_norm_forward_cuda(const SpectralNormForwardMatrix* matrices, std::int64_t count, void* sigma,
                               int iterations, double eps, DType dtype, DType normalized_dtype, void* workspace,
                               void* stream);
int spectral_norm_backward_cuda(const SpectralNormBackwardMatrix* matrices, std::int64_t count, const void* sigma,
                                DType dtype, DType normalized_dtype, void* workspace, void* stream);

}  // namespace sabmn
