// Self-attention over a feature map with its projections, residual and gradients.
//
//   query = w_query x + b_query,  key, value alike;  p[i, j] = softmax over i of key_i · query_j;
//   out_j = Σ_i p[i, j] value_i;  y = gamma (w_out out + b_out) + x.
//
// The N×N map is stored nowhere. The matrices written "[B, d, N]" are contiguous; images go through their strides.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace sabmn {

// A feature map [B, C, H, W], any strides (counted in elements).
struct Image {
    void* data;
    int64_t batch_stride, channel_stride, height_stride, width_stride;
};

struct AttentionSizes {
    int64_t batch, channels, height, width, key_width, value_width;
    int64_t positions() const { return height * width; }
};

// What both passes read. An absent projection or bias is a null pointer. gamma, lse and workspace have the wide type:
// float for the 16-bit types, else the type itself.
struct AttentionInputs {
    DType dtype;
    int threads;
    AttentionSizes sizes;
    Image x;
    const void *w_query, *w_key;  // [key_width, C]
    const void *w_value;          // [value_width, C]
    const void *w_out;            // [C, value_width]; null: the identity, value_width is C
    const void *gamma;            // one number
    const void *b_query, *b_key, *b_value, *b_out;
    void *query, *key;            // [B, key_width, N]: the forward writes them, the backward reads them, and so for
    void* value;                  // [B, value_width, N]
    void* out;                    // [parts, B, value_width, N]: out is their sum. Of 16 bits what rounding left is the
                                  // second: a softmax's gradient is a difference from context · out
    void *lse;                    // [B, 2, N]: the logits' maximum m_j, log Σ_i exp(key_i · query_j − m_j). Their sum
                                  // would lose the second beside logits of 10³
    void *workspace;              // attention_workspace() elements (workspace.h)
};

// The gradients; null where one is not wanted. b_key's is 0, and b_out's, a sum over grad_y alone, is the caller's.
struct AttentionGradients {
    Image grad_y, grad_x;
    void *w_query, *w_key, *w_value, *w_out, *gamma, *b_query, *b_value;
};

template <typename T>
constexpr int attention_out_parts = sizeof(T) == 2 ? 2 : 1;

constexpr int64_t attention_lanes = 64;   // positions in a tile: one row of a tile
constexpr int64_t attention_chunk = 128;  // rows of the tiles that are walked in chunks

SABMN_FOR_EACH_ISA(Status attention_forward(const AttentionInputs& inputs, const Image& y);)
SABMN_FOR_BF16_ISA(Status attention_forward(const AttentionInputs& inputs, const Image& y);)
SABMN_FOR_EACH_ISA(Status attention_backward(const AttentionInputs& inputs, const AttentionGradients& gradients);)
SABMN_FOR_BF16_ISA(Status attention_backward(const AttentionInputs& inputs, const AttentionGradients& gradients);)
// result[i] = exp(x[i]) for x[i] ≤ 0, as the kernels compute it, for its test: float32, float64; bfloat16 stands for
// float32 as it is computed where it will be rounded to bfloat16.
SABMN_FOR_EACH_ISA(Status attention_exponential(DType dtype, const void* x, void* result, int64_t count);)

}  // namespace sabmn
