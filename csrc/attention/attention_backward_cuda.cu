// The backward pass on the GPU, in six launches: context, row terms, the gradients of query, key and value, then of x,
// and of the weights in two, for these are summed over images in groups, and the groups' sums added up by the last
// launch.

#include "attention/attention_backward_kernels.cuh"
#include "attention/attention_block_kernels.cuh"
#include "attention/attention_products.h"

namespace sabmn {
namespace {

// The weights' gradients are cut into groups of images so that a launch has about this many blocks. The number does not
// depend on the GPU, and so the order of the sums does not either.
constexpr int64_t weight_blocks = 128;

// How the workspace is laid out, and how the weights' gradients are cut.
struct BackwardLayout {
    int64_t row_term_floats, sum_floats, stacked_floats, w_out_floats, images_per_group, groups;

    BackwardLayout(int64_t batch, int64_t channels, int64_t positions, int64_t key_width, int64_t value_width,
                   bool w_out) {
        const int64_t stacked = 2 * key_width + value_width;
        const auto tiles = [](int64_t rows, int64_t columns) {
            return ceil_div(rows, product_side) * ceil_div(columns, product_side);
        };
        const int64_t blocks = tiles(stacked, channels) + (w_out ? tiles(channels, value_width) : 0);
        const int64_t wanted = std::clamp<int64_t>(weight_blocks / blocks, 1, std::max<int64_t>(batch, 1));
        images_per_group = std::max<int64_t>((batch + wanted - 1) / wanted, 1);
        groups = (batch + images_per_group - 1) / images_per_group;
        row_term_floats = padded(batch * positions);
        sum_floats = padded(batch * ceil_div(positions, row_positions));
        stacked_floats = padded(groups * stacked * channels);
        w_out_floats = w_out ? padded(groups * channels * value_width) : 0;
    }
    static int64_t padded(int64_t floats) { return (floats + 63) / 64 * 64; }
    int64_t floats() const { return row_term_floats + sum_floats + stacked_floats + w_out_floats; }
};

template <typename T>
class Backward {
  public:
    Backward(const AttentionCuda& in, const AttentionCudaGradients& grads, void* workspace, cudaStream_t stream)
        : in(in),
          grads(grads),
          layout(in.batch, in.channels, in.positions, in.key_width, in.value_width, in.w_out),
          row_term(static_cast<float*>(workspace)),
          sums(row_term + layout.row_term_floats),
          stacked_partial(sums + layout.sum_floats),
          w_out_partial(stacked_partial + layout.stacked_floats),
          stream(stream) {}

    cudaError_t run() const {
        cudaError_t status = in.w_out ? find_context() : cudaSuccess;
        if (status == cudaSuccess) status = find_row_terms();
        if (status == cudaSuccess && grads.grad_query) status = find_map_gradients();
        if (status == cudaSuccess && grads.grad_x.data) status = find_x_gradient();
        const bool weights = grads.w_query || grads.w_key || grads.w_value || grads.w_out;
        if (status == cudaSuccess && weights) status = find_weight_gradients();
        if (status == cudaSuccess && (weights || grads.gamma)) status = reduce();
        return status;
    }

  private:
    using Stored = std::conditional_t<sizeof(T) == 2, T, fp32>;  // where nothing is multiplied as TF32
    const AttentionCuda& in;
    const AttentionCudaGradients& grads;
    const BackwardLayout layout;
    float *const row_term, *const sums, *const stacked_partial, *const w_out_partial;
    cudaStream_t const stream;

    // context = w_outᵀ grad_y
    cudaError_t find_context() const {
        const AttentionMap& dy = grads.grad_y;
        Product product{};
        set_rows(product, in.value_width);
        product.columns = in.positions;
        product.depths[0] = in.channels;
        add_part<T>(product.a, 0, in.w_out, 0, 1, in.value_width);
        add_part<T>(product.b, 0, dy.data, dy.batch_stride, dy.position_stride, dy.channel_stride);
        product.results[0] = plain_result<T>(grads.context, in.value_width, in.positions, nullptr);
        return launch_product<T>(product, in.batch, stream);
    }

    int64_t row_blocks() const { return in.batch * ceil_div(in.positions, row_positions); }

    cudaError_t find_row_terms() const {
        const AttentionMap& dy = grads.grad_y;
        const RowArguments arguments = {static_cast<int>(in.channels),
                                        static_cast<int>(in.positions),
                                        static_cast<int>(in.value_width),
                                        grads.context,
                                        in.out,
                                        in.batch * in.value_width * in.positions,
                                        in.b_out,
                                        dy.data,
                                        dy.batch_stride,
                                        dy.channel_stride,
                                        dy.position_stride,
                                        row_term,
                                        sums};
        return launch(attention_row_term_kernel<T>, row_blocks(), row_warps * warp_size, 0, stream, arguments);
    }

    cudaError_t find_map_gradients() const {
        BackwardArguments arguments{};
        arguments.positions = in.positions, arguments.key_width = in.key_width, arguments.value_width = in.value_width;
        arguments.query = in.query, arguments.key = in.key, arguments.value = in.value,
        arguments.context = grads.context;
        arguments.lse = in.lse, arguments.row_term = row_term, arguments.gamma = in.gamma;
        arguments.grad_query = grads.grad_query, arguments.grad_key = grads.grad_key,
        arguments.grad_value = grads.grad_value;
        arguments.vectors = takes_vectors<T>(in.query, in.positions) && aligned(16, in.key) && aligned(16, in.value) &&
                            aligned(16, grads.context);
        arguments.pairs = takes_pairs<T>(grads.grad_query, in.positions) && takes_pairs<T>(grads.grad_key) &&
                          takes_pairs<T>(grads.grad_value);
        if constexpr (sizeof(T) == 2) {
            if (in.positions <= block_positions)
                return launch(attention_backward_block_kernel<T>, in.batch, block_threads, block_shared_bytes, stream,
                              arguments);
        }
        const BackwardPlan plan(in.key_width, in.value_width, backward_panel<T>);
        const dim3 grid(in.batch * 2 * ceil_div(in.positions, backward_side), plan.slices());
        return launch(attention_backward_kernel<T>, grid, backward_threads, plan.bytes(), stream, arguments);
    }

    // grad_x = grad_y + w_queryᵀ grad_query + w_keyᵀ grad_key + w_valueᵀ grad_value
    cudaError_t find_x_gradient() const {
        Product product{};
        const bool last = channels_last(grads.grad_x);
        set_rows(product, last ? in.positions : in.channels);
        product.columns = last ? in.channels : in.positions;
        ProductOperand &weights = last ? product.b : product.a, &parts = last ? product.a : product.b;
        const void* const w[] = {in.w_query, in.w_key, in.w_value};
        void* const of[] = {grads.grad_query, grads.grad_key, grads.grad_value};
        for (int i = 0; i < max_parts; ++i) {
            const int64_t width = i == 2 ? in.value_width : in.key_width;
            product.depths[i] = width;
            add_part<T>(weights, i, w[i], 0, 1, in.channels);
            add_part<T>(parts, i, of[i], width * in.positions, 1, in.positions);
        }
        product.results[0] = map_result<T>(grads.grad_x, grads.grad_y, in.channels, in.positions, nullptr, nullptr);
        return launch_product<T>(product, in.batch, stream);
    }

    // Of a group of images, grad_query xᵀ and so on for key and value, and grad_y outᵀ.
    cudaError_t find_weight_gradients() const {
        Products products{};
        Product& stacked = products.product[0];
        void* const of[] = {grads.grad_query, grads.grad_key, grads.grad_value};
        set_rows(stacked, in.key_width, in.key_width, in.value_width);
        stacked.stacked = true;
        stacked.columns = in.channels;
        for (int i = 0; i < max_parts; ++i) {
            add_part<T>(stacked.a, i, of[i], (i == 2 ? in.value_width : in.key_width) * in.positions, in.positions, 1);
        }
        add_part<T>(stacked.b, 0, in.x.data, in.x.batch_stride, in.x.channel_stride, in.x.position_stride);
        stacked.partial = stacked_partial;

        Product& w_out = products.product[1];
        const AttentionMap& dy = grads.grad_y;
        set_rows(w_out, in.channels);
        w_out.columns = in.value_width;
        add_part<T>(w_out.a, 0, dy.data, dy.batch_stride, dy.channel_stride, dy.position_stride);
        add_part<T>(w_out.b, 0, in.out, in.value_width * in.positions, in.positions, 1);
        w_out.partial = w_out_partial;
        for (Product& product : products.product) {
            product.depths[0] = in.positions;
            product.batch = in.batch, product.images_per_block = layout.images_per_group;
        }
        int count = grads.w_out ? 2 : 1;
        if (!grads.w_query && !grads.w_key && !grads.w_value) stacked = w_out, count = 1;
        products.first_blocks = ceil_div(stacked.row_ends[max_parts - 1], product_side);
        return launch_products<T>(products, count, layout.groups, stream);
    }

    cudaError_t reduce() const {
        ReduceArguments arguments{};
        const int64_t key_size = in.key_width * in.channels, value_size = in.value_width * in.channels;
        const int64_t stride = 2 * key_size + value_size;
        arguments.matrices[0] = {stacked_partial, nullptr, grads.w_query, key_size, stride};
        arguments.matrices[1] = {stacked_partial + key_size, nullptr, grads.w_key, key_size, stride};
        arguments.matrices[2] = {stacked_partial + 2 * key_size, nullptr, grads.w_value, value_size, stride};
        arguments.matrices[3] = {w_out_partial, in.gamma, grads.w_out, in.w_out ? value_size : 0, value_size};
        arguments.parts = layout.groups;
        arguments.gamma_sums = sums, arguments.grad_gamma = grads.gamma, arguments.gamma_count = row_blocks();
        const int64_t size = stride + arguments.matrices[3].size;
        return launch(attention_reduce_kernel<Stored>, (size + reduce_threads - 1) / reduce_threads, reduce_threads, 0,
                      stream, arguments);
    }
};

}  // namespace

int64_t attention_backward_cuda_workspace(int64_t batch, int64_t channels, int64_t positions, int64_t key_width,
                                          int64_t value_width, bool w_out) {
    return 4 * BackwardLayout(batch, channels, positions, key_width, value_width, w_out).floats();
}

int attention_backward_cuda(const AttentionCuda& in, const AttentionCudaGradients& gradients, void* workspace,
                            void* stream) {
    return run_for_elements(in, [&](auto element) {
        return Backward<decltype(element)>(in, gradients, workspace, static_cast<cudaStream_t>(stream)).run();
    });
}

}  // namespace sabmn
