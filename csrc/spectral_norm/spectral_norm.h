// Spectral normalisation of many weights at once: W / σ, where σ ≈ the largest singular value by power iteration
// (Miyato et al., 2018; the order of torch.nn.utils.parametrizations.spectral_norm).
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace sabmn {

// A weight is a dense matrix in memory. Its column m belongs to element (m % inner)·(columns / inner) + m / inner of v: inner
// is `columns` for a contiguous weight, and the number of input channels for a channels_last convolution.
struct SpectralNormForwardMatrix {
    const void* weight;  // [rows, columns]
    const void* u;       // [rows]     left singular vector so far
    const void* v;       // [columns]  right singular vector so far
    void* normalized;    // [rows, columns]  weight / sigma
    void* u_new;         // [rows]
    void* v_new;         // [columns]
    std::int64_t rows, columns, inner;
    std::int64_t index;  // of its sigma
};

struct SpectralNormBackwardMatrix {
    const void* gradient;   // [rows, columns]  with respect to the normalised weight
    const void* weight;     // [rows, columns]
    const void* u;          // [rows]     those that the forward pass ended with
    const void* v;          // [columns]
    void* weight_gradient;  // [rows, columns]  may be `gradient` itself where it has the weight's dtype
    std::int64_t rows, columns, inner;
    std::int64_t index;  // of its sigma
};

// dtype: of weights, u, v and the weights' gradients. normalized_dtype: of the normalised weights and their gradients; the same,
// or a 16-bit type beside float32. sigma [count]: float64 for float64, else float32. Weights should come longest first.
// workspace: spectral_norm_workspace bytes, aligned to 64.
SABMN_FOR_EACH_ISA(std::int64_t spectral_norm_workspace(const std::int64_t* rows, const std::int64_t* columns,
                                                        std::int64_t count, DType dtype);)

// Each iteration: u ← Wv/‖Wv‖, v ← Wᵀu/‖Wᵀu‖; then σ = uᵀWv. With 0 iterations u and v stay.
SABMN_FOR_EACH_ISA(int spectral_norm_forward(const SpectralNormForwardMatrix* matrices, std::int64_t count, void* sigma,
                                             int iterations, double eps, DType dtype, DType normalized_dtype,
                                             void* workspace, int threads);)

// dW = (G − ⟨G, W⟩/σ · u vᵀ)/σ
SABMN_FOR_EACH_ISA(int spectral_norm_backward(const SpectralNormBackwardMatrix* matrices, std::int64_t count,
                                              const void* sigma, DType dtype, DType normalized_dtype, void* workspace,
                                              int threads);)

}  // namespace sabmn
