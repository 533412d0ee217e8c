// Self-attention over a feature map on the GPU, in bfloat16, float16 and float32. Nothing here allocates, waits for the
// device or reads from it, so that a CUDA graph can record it.
//
// Which kernel serves what, for any width (docs/cuda_attention.md has a table). T is bf16 or f16; of float32 it is tf32
// or fp32, by the caller's choice. 26 in all:
//   both passes  attention_product_kernel<T>         the projections; w_out where values are wider than a slice;
//                                                    context = w_out^T grad_y; the gradients of x and of the weights
//   forward      attention_forward_kernel<T, 64>     values of at most 64 channels; fp32: of any width, in slices of 64
//                attention_forward_kernel<T, 128>    of 65 to 128; tf32: wider ones too, in slices of 128
//                attention_forward_kernel<T, 256>    bf16 and f16: of 129 to 256, and wider ones in slices of 256
//   backward     attention_row_term_kernel<T>        every width
//                attention_backward_block_kernel<T>  bf16 and f16, at most 128 positions
//                attention_backward_kernel<T>        all else, in slices of 64 channels (float32: 32)
//                attention_reduce_kernel<T>          every width; tf32 uses that of fp32
// A forward pass is two launches, three where values are wider than a slice and there is a w_out; a backward pass six.
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
    bool tf32;    // float32 may be multiplied as TF32
    std::int64_t batch, channels, positions, key_width, value_width;
    AttentionMap x;
    const void *w_query, *w_key;                    // [key width, C]
    const void* w_value;                            // [value width, C]
    const void* w_out;                              // [C, value width] or null
    const float* gamma;                             // []
    const void *b_query, *b_key, *b_value, *b_out;  // a vector each, or null
    void *query, *key;                              // [B, key width, N]
    void* value;                                    // [B, value width, N]
    void* out;  // [parts, B, value width, N]: out is their sum, of 16 bits with what rounding left as the second part
    float* lse;  // [B, 2, N]: of every row of logits the maximum m, and the logarithm of the sum of exp(logit - m)
};

// Fills query, key, value, out, lse and y.
int attention_forward_cuda(const AttentionCuda& arguments, const AttentionMap& y, void* stream);

// The gradients; those that are null are not wanted. Those of the biases are the sums of grad_query and grad_value over
// images and positions, and gamma times that of grad_y; a key bias has none.
struct AttentionCudaGradients {
    AttentionMap grad_y, grad_x;
    void *w_query, *w_key, *w_value, *w_out;
    float* gamma;
    void* context;                             // [B, value width, N]: w_out^T grad_y; given where there is no w_out
    void *grad_query, *grad_key, *grad_value;  // as query, key and value; needed for all but w_out and gamma
};

// In bytes; to be aligned to 256.
std::int64_t attention_backward_cuda_workspace(std::int64_t batch, std::int64_t channels, std::int64_t positions,
                                               std::int64_t key_width, std::int64_t value_width, bool w_out);

int attention_backward_cuda(const AttentionCuda& arguments, const AttentionCudaGradients& gradients, void* workspace,
                            void* stream);

}  // namespace sabmn
