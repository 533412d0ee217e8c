// Self-attention over a feature map on the GPU, in bfloat16 and float16. Nothing here allocates, waits for the device or
// reads from it, so that a CUDA graph can record it.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace sabmn {

// A feature map [B, C, N] with any strides, in elements.
struct AttentionMap {
    void* data;
    std::int64_t batch_stride, channel_stride, position_stride;
};

// query = w_query x + b_query, key and value likewise; out_j = sum_i softmax_i(key_i · query_j) value_i;
// y = gamma (w_out out + b_out) + x. Weights and biases are dense; without w_out (null) the value width is C.
struct AttentionCuda {
    DType dtype;  // of everything but gamma and lse
    std::int64_t batch, channels, positions, key_width, value_width;
    AttentionMap x;
    const void *w_query, *w_key;                         // [key width, C]
    const void* w_value;                                 // [value width, C]
    const void* w_out;                                   // [C, value width] or null
    const float* gamma;                                  // []
    const void *b_query, *b_key, *b_value, *b_out;       // a vector each, or null
    void *query, *key;                                   // [B, key width, N]
    void *value, *out;                                   // [B, value width, N]
    float* lse;  // [B, 2, N]: of every row of logits the maximum m, and the logarithm of the sum of exp(logit - m)
};

// Fills query, key, value, out, lse and y.
int attention_forward_cuda(const AttentionCuda& arguments, const AttentionMap& y, void* stream);

}  // namespace sabmn
