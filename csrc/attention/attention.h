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

// What both passes read. An absent projection or bias is a null pointer.
struct AttentionInputs {
    DType dtype;
    int threads;
    int64_t batch, channels, height, width, key_width, value_width;
    Image x;
    const void *w_query, *w_key;  // [key_width, C]
    const void *w_value;          // [value_width, C]
    const void *w_out;            // [C, value_width]; null: the identity, value_width is C
    const void *gamma;            // one number
    const void *b_query, *b_key, *b_value, *b_out;
    void *query, *key;            // [B, key_width, N]: the forward writes them, the backward reads them, and so for
    void *value, *out;            // [B, value_width, N]
    void *lse;                    // [B, 2, N]: the logits' maximum m_j, and log Σ_i exp(key_i · query_j − m_j). Their sum
                                  // would lose the second beside logits of 10³
    void *scratch;                // threads × attention_scratch() elements
};

// The gradients. Those of the biases are sums that the caller takes: over query, value and grad_y here.
struct AttentionGradients {
    Image grad_y;
    Image grad_x;                 // wanted where its data is not null; needs query and key
    void *w_query, *w_key, *w_value, *w_out, *gamma;  // null: not wanted
    void *query;                  // [B, key_width, N]: the gradient of query; null where nothing wanted needs it
    void *key, *value;            // [B, key_width or value_width, N]: of key and value; both or neither
    void *context;                // [B, value_width, N]: w_outᵀ grad_y, the gradient of out over gamma
    void *row_term;               // [2, B, N], workspace
};

constexpr int64_t attention_lanes = 64;  // positions in a tile: one row of a tile
constexpr int64_t attention_chunk = 128; // rows of the tiles that are walked in chunks

// Elements of scratch for each thread.
constexpr int64_t attention_scratch(int64_t key_width, int64_t value_width) {
    return attention_lanes * 2 * (attention_chunk + key_width + value_width);
}

SABMN_FOR_EACH_ISA(Status attention_forward(const AttentionInputs& inputs, const Image& y);)
SABMN_FOR_EACH_ISA(Status attention_backward(const AttentionInputs& inputs, const AttentionGradients& gradients);)

}  // namespace sabmn
