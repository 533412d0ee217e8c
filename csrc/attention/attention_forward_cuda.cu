// The forward pass on the GPU: the projections in one launch, attention with output projection and residual in a
// second. Values wider than 256 channels take a third, for w_out: their slices meet only there.

#include "attention/attention_forward_kernels.cuh"
#include "attention/attention_products.h"

namespace sabmn {
namespace {

constexpr int max_fused_width = 256;

template <typename T>
cudaError_t project(const AttentionCuda& in, cudaStream_t stream) {
    Product product{};
    const int64_t key_width = in.key_width, value_width = in.value_width;
    set_rows(product, key_width, key_width, value_width);
    product.stacked = true;
    product.columns = in.positions;
    product.depths[0] = in.channels;
    const void* const weights[] = {in.w_query, in.w_key, in.w_value};
    const void* const biases[] = {in.b_query, in.b_key, in.b_value};
    void* const outputs[] = {in.query, in.key, in.value};
    for (int i = 0; i < max_parts; ++i) {
        add_part(product.a, i, weights[i], 0, in.channels, 1);
        product.results[i] = plain_result(outputs[i], i == 2 ? value_width : key_width, in.positions, biases[i]);
    }
    add_part(product.b, 0, in.x.data, in.x.batch_stride, in.x.position_stride, in.x.channel_stride);
    return launch_product<T>(product, in.batch, stream);
}

// y = gamma (w_out out + b_out) + x
template <typename T>
cudaError_t project_out(const AttentionCuda& in, const AttentionMap& y, cudaStream_t stream) {
    Product product{};
    const bool last = channels_last(y);
    set_rows(product, last ? in.positions : in.channels);
    product.columns = last ? in.channels : in.positions;
    product.depths[0] = in.value_width;
    add_part(last ? product.b : product.a, 0, in.w_out, 0, in.value_width, 1);
    add_part(last ? product.a : product.b, 0, in.out, in.value_width * in.positions, 1, in.positions);
    product.results[0] = map_result(y, in.x, in.channels, in.positions, in.b_out, in.gamma);
    return launch_product<T>(product, in.batch, stream);
}

template <typename T, int width>
cudaError_t attend(const AttentionCuda& in, const AttentionMap& y, cudaStream_t stream) {
    ForwardArguments arguments{};
    arguments.channels = in.channels, arguments.positions = in.positions;
    arguments.key_width = in.key_width, arguments.value_width = in.value_width;
    arguments.query = in.query, arguments.key = in.key, arguments.value = in.value;
    arguments.out = in.out, arguments.lse = in.lse;
    arguments.vectors =
        multiples_of(8, in.positions) && aligned(16, in.query) && aligned(16, in.key) && aligned(16, in.value);
    arguments.out_pairs = multiples_of(2, in.positions) && aligned(4, in.out);
    arguments.w_vectors = multiples_of(8, in.value_width) && aligned(16, in.w_out);
    arguments.w_out = in.value_width <= max_fused_width ? in.w_out : nullptr;
    arguments.writes_y = !in.w_out || arguments.w_out;
    arguments.y_is_channels_last = channels_last(y);
    arguments.y = map_result(y, in.x, in.channels, in.positions, in.b_out, in.gamma);
    using Plan = ForwardPlan<width>;
    const dim3 grid(in.batch * ceil_div(in.positions, Plan::queries), ceil_div(in.value_width, width));
    return launch(attention_forward_kernel<T, width>, grid, Plan::threads, Plan::shared_bytes(in.key_width), stream,
                  arguments);
}

template <typename T>
cudaError_t forward(const AttentionCuda& in, const AttentionMap& y, cudaStream_t stream) {
    if (const cudaError_t status = project<T>(in, stream); status != cudaSuccess) return status;
    const auto attend_in = in.value_width <= 64    ? attend<T, 64>
                           : in.value_width <= 128 ? attend<T, 128>
                                                   : attend<T, 256>;
    const cudaError_t status = attend_in(in, y, stream);
    if (status != cudaSuccess || !in.w_out || in.value_width <= max_fused_width) return status;
    return project_out<T>(in, y, stream);
}

}  // namespace

int attention_forward_cuda(const AttentionCuda& in, const AttentionMap& y, void* stream) {
    if (in.dtype != DType::bfloat16 && in.dtype != DType::float16) return unsupported_dtype;
    if (!supported_size(in)) return unsupported_size;
    if (in.batch == 0 || in.positions == 0) return ok;
    const auto work = in.dtype == DType::bfloat16 ? forward<bf16> : forward<f16>;
    const cudaError_t status = work(in, y, static_cast<cudaStream_t>(stream));
    return status == cudaSuccess ? ok : cuda_error + static_cast<int>(status);
}

}  // namespace sabmn
