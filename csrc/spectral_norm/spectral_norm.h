// Spectral normalisation of many weights at once: W / σ, where σ ≈ the largest singular value by power iteration
// (Miyato et al., 2018; the order of torch.nn.utils.parametrizations.spectral_norm).
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace sabmn {

// One weight, seen as a contiguous matrix.
struct SpectralNormForwardMatrix {
    const void* weight;  // [rows, columns]
    const void* u;       // [rows]     left singular vector so far
    const void* v;       // [columns]  right singular vector so far
    void* normalized;    // [rows, columns]  weight / sigma
    void* u_new;         // [rows]
    void* v_new;         // [columns]
    std::int64_t rows, columns;
};

struct SpectralNormBackwardMatrix {
    const void* gradient;         // [rows, columns]  with respect to the normalised weight
    const void* weight;           // [rows, columns]
    const void* u;                // [rows]     those that the forward pass ended with
    const void* v;                // [columns]
    void* weight_gradient;        // [rows, columns]
    std::int64_t rows, columns;
};

// Each iteration: u ← Wv/‖Wv‖, v ← Wᵀu/‖Wᵀu‖; then σ = uᵀWv. With 0 iterations u and v stay. sigma: [count].
// dtype: float32 or float64, of every tensor.
SABMN_FOR_EACH_ISA(int spectral_norm_forward(const SpectralNormForwardMatrix* matrices, std::int64_t count, void* sigma,
                                             int iterations, double eps, DType dtype, int threads);)

// dW = (G − ⟨G, W⟩/σ · u vᵀ)/σ
SABMN_FOR_EACH_ISA(int spectral_norm_backward(const SpectralNormBackwardMatrix* matrices, std::int64_t count,
                                              const void* sigma, DType dtype, int threads);)

}  // namespace sabmn
