// Batch normalisation with the statistics of the batch, a residual and a ReLU in one operation, and its gradient:
//   y = act((x − mean)/√(var + eps) · weight + bias + residual)
// (Ioffe and Szegedy, 2015; the blocks of He et al., 2016). Mean and variance are each channel's, over batch and positions.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace sabmn {

// Images [batch, channels, positions], dense in memory in this order or, channels_last, as [batch, positions, channels].
struct BatchNormImages {
    DType dtype;  // float32, bfloat16 or float16: of x, residual, y and their gradients; all else is float
    std::int64_t batch, channels, positions;
    bool channels_last;
};

struct BatchNormForward {
    BatchNormImages images;
    const void* x;
    const void* residual;  // null: none
    const float* weight;   // [channels]  null: 1
    const float* bias;     // [channels]  null: 0
    float* running_mean;   // [channels]  moved by `momentum` towards mean and unbiased variance; both null: none
    float* running_var;    // [channels]
    double momentum, eps;
    bool relu;
    void* y;
    float* statistics;  // [3, channels]  mean, what rounding left of it, 1/√(var + eps)
};

// The ReLU let through what is greater than 0: in y, where there was a residual; else the kernel computes those numbers of
// y again from x, to the bit. Then the gradient that passed is written too: it is the residual's.
struct BatchNormBackward {
    BatchNormImages images;
    const void* grad_y;
    const void* x;
    const void* y;  // null: without a residual or without a ReLU
    const float* weight;
    const float* bias;
    const float* statistics;
    bool relu;
    void* grad_x;         // null: not wanted. May be grad_y, unless grad_residual is
    void* grad_residual;  // with y alone. May be grad_y
    float* grad_weight;   // [channels]
    float* grad_bias;     // [channels]
};

// Bytes, aligned to 64, for either pass.
SABMN_FOR_EACH_ISA(std::int64_t batch_norm_workspace(const BatchNormImages& images);)
SABMN_FOR_EACH_ISA(int batch_norm_forward(const BatchNormForward& pass, void* workspace, int threads);)
SABMN_FOR_EACH_ISA(int batch_norm_backward(const BatchNormBackward& pass, void* workspace, int threads);)

}  // namespace sabmn
