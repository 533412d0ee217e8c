// Launches the matrix products around the attention, for both passes.

#include "attention/attention_product_kernels.cuh"

namespace sabmn {

template <typename T>
cudaError_t launch_products(const Products& products, int count, int blocks, cudaStream_t stream) {
    int rows = 0, columns = 0;
    for (int i = 0; i < count; ++i) {
        rows += ceil_div(products.product[i].row_ends[max_parts - 1], product_side);
        columns = std::max(columns, ceil_div(products.product[i].columns, product_side));
    }
    return launch(attention_product_kernel<T>, dim3(columns, rows, blocks), product_threads, product_shared_bytes,
                  stream, products);
}

template cudaError_t launch_products<bf16>(const Products&, int, int, cudaStream_t);
template cudaError_t launch_products<f16>(const Products&, int, int, cudaStream_t);
template cudaError_t launch_products<tf32>(const Products&, int, int, cudaStream_t);
template cudaError_t launch_products<fp32>(const Products&, int, int, cudaStream_t);

}  // namespace sabmn
