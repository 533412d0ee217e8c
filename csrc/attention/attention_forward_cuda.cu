// The forward pass on the GPU: the projections in one launch, attention with output projection and residual in a
// second. Values wider than a slice take a third, for w_out: their slices meet only there.

#include "attention/attention_forward_kernels.cuh"
#include "attention/attention_products.h"

namespace sabmn {
namespace {

// Value channels that one block has registers for. Exact float32 has one form only.
template <typename T>
constexpr int max_slice = sizeof(T) == 2 ? 256 : std::is_same_v<T, tf32> ? 128 : 64;

constexpr int wanted_blocks = 256, part_channels = 256;

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
        add_part<T>(product.a, i, weights[i], 0, in.channels, 1);
        product.results[i] = plain_result<T>(outputs[i], i == 2 ? value_width : key_width, in.positions, biases[i]);
    }
    add_part<T>(product.b, 0, in.x.data, in.x.batch_stride, in.x.position_stride, in.x.channel_stride);
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
    add_part<T>(last ? product.b : product.a, 0, in.w_out, 0, in.value_width, 1);
    add_part<T>(last ? product.a : product.b, 0, in.out, in.value_width * in.positions, 1, in.positions);
    product.results[0] = map_result<T>(y, in.x, in.channels, in.positions, in.b_out, in.gamma);
    return launch_product<T>(product, in.batch, stream);
}

template <typename T, int width>
cudaError_t attend(const AttentionCuda& in, const AttentionMap& y, cudaStream_t stream) {
    ForwardArguments arguments{};
    arguments.channels = in.channels, arguments.positions = in.positions;
    arguments.key_width = in.key_width, arguments.value_width = in.value_width;
    arguments.query = in.query, arguments.key = in.key, arguments.value = in.value;
    arguments.out = in.out, arguments.lse = in.lse;
    arguments.out_part = in.batch * in.value_width * in.positions;
    arguments.vectors = takes_vectors<T>(in.query, in.positions) && aligned(16, in.key) && aligned(16, in.value);
    arguments.out_pairs = takes_pairs<T>(in.out, in.positions);  // both parts: the first has as many rows
    arguments.w_vectors = takes_vectors<T>(in.w_out, in.value_width);
    arguments.w_out = in.value_width <= max_slice<T> ? in.w_out : nullptr;
    arguments.writes_y = !in.w_out || arguments.w_out;
    arguments.y_is_channels_last = channels_last(y);
    arguments.y = map_result<T>(y, in.x, in.channels, in.positions, in.b_out, in.gamma);
    using Plan = ForwardPlan<T, width>;
    const int blocks = in.batch * ceil_div(in.positions, Plan::queries);
    // Of small images there are few blocks, and most of the work is w_out's.
    const int most_parts = arguments.w_out ? ceil_div(in.channels, part_channels) : 1;
    const int parts = std::min(ceil_div(wanted_blocks, blocks), most_parts);
    arguments.channels_per_block = ceil_div(ceil_div(in.channels, parts), part_channels) * part_channels;
    const dim3 grid(blocks, ceil_div(in.value_width, width), ceil_div(in.channels, arguments.channels_per_block));
    return launch(attention_forward_kernel<T, width>, grid, Plan::threads, Plan::shared_bytes(in.key_width), stream,
                  arguments);
}

template <typename T>
cudaError_t forward(const AttentionCuda& in, const AttentionMap& y, cudaStream_t stream) {
    if (const cudaError_t status = project<T>(in, stream); status != cudaSuccess) return status;
    const auto attend_in = [&] {
        if constexpr (max_slice<T> >= 128) {
            if (in.value_width > 64) return in.value_width <= 128 ? attend<T, 128> : attend<T, max_slice<T>>;
        }
        return attend<T, 64>;
    }();
    const cudaError_t status = attend_in(in, y, stream);
    if (status != cudaSuccess || !in.w_out || in.value_width <= max_slice<T>) return status;
    return project_out<T>(in, y, stream);
}

}  // namespace

int attention_forward_cuda(const AttentionCuda& in, const AttentionMap& y, void* stream) {
    return run_for_elements(in, [&](auto element) {
        return forward<decltype(element)>(in, y, static_cast<cudaStream_t>(stream));
    });
}

}  // namespace sabmn
