// The matrix products around the attention, as host code describes them to attention_product_kernel, and their launch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/attention_cuda.h"
#include "common/cuda.h"

namespace sabmn {

// Two ways to multiply float32: on the tensor cores, which take TF32, or exactly, by ordinary multiply-adds. The bits
// are those of the float.
struct tf32 {
    std::uint32_t bits;
    tf32() = default;
    __device__ explicit tf32(float x) { bits = __float_as_uint(x); }
    __device__ operator float() const { return __uint_as_float(bits); }
};

struct fp32 {
    std::uint32_t bits;
    fp32() = default;
    __device__ explicit fp32(float x) { bits = __float_as_uint(x); }
    __device__ operator float() const { return __uint_as_float(bits); }
};

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// ---- what a launch is told ----

// out[row, column] = scale (value + bias) + residual; what is null is left out. `pairs`: two neighbours of a row lie
// side by side and begin at a multiple of their size, here and in the residual.
struct ProductResult {
    void* data;
    std::int64_t batch_stride, row_stride, column_stride;
    const void* residual;
    std::int64_t residual_batch_stride, residual_row_stride, residual_column_stride;
    const void* bias;
    const float* scale;
    bool bias_of_rows, pairs;
};

constexpr int product_side = 128;  // of a block's part of a result
constexpr int max_parts = 3;

// One operand: element (row, k) of an image lies at row·row_stride + k·sum_stride.
struct ProductOperand {
    const void* parts[max_parts];
    std::int64_t batch_strides[max_parts], row_stride, sum_stride;
    bool along_sum;  // neighbours in memory are neighbours in the sum, else neighbouring rows
    bool vectors;    // and may be copied 16 bytes at a time
};

struct Product {
    ProductOperand a, b;
    int row_ends[max_parts];  // of a's parts that are stacked; else all are the number of rows
    int columns;              // rows of b
    int depths[max_parts];    // of the parts of the sum; those that are not there 0
    int batch, images_per_block;
    bool stacked;                      // parts are along the rows of a, else along the sum
    ProductResult results[max_parts];  // of the parts along the rows, else the first only
    float* partial;                    // [blocks in z, rows, columns] instead of a result
};

// At most two products in one launch: the second has the blocks in y from first_blocks on.
struct Products {
    Product product[2];
    int first_blocks;
};

// The products' blocks in z: images, or groups of them where the sum goes over images. T is bf16, f16, tf32
// or fp32.
template <typename T>
cudaError_t launch_products(const Products& products, int count, int blocks, cudaStream_t stream);

// ---- how it is told ----

using std::int64_t;

template <typename... Numbers>
bool multiples_of(int64_t unit, Numbers... numbers) {
    return (... && (static_cast<int64_t>(numbers) % unit == 0));
}

inline bool aligned(int64_t bytes, const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

inline bool channels_last(const AttentionMap& map) { return map.channel_stride == 1 && map.position_stride != 1; }

// 16 bytes can be copied, or two neighbours stored, at a time.
template <typename T, typename... Sizes>
bool takes_vectors(const void* data, Sizes... sizes) {
    return aligned(16, data) && multiples_of(16 / sizeof(T), sizes...);
}

template <typename T, typename... Sizes>
bool takes_pairs(const void* data, Sizes... sizes) {
    return aligned(2 * sizeof(T), data) && multiples_of(2, sizes...);
}

// Of `parts` a [rows, sum] matrix with these strides; images are batch_strides apart.
template <typename T>
void add_part(ProductOperand& operand, int part, const void* data, int64_t batch_stride, int64_t row_stride,
              int64_t sum_stride) {
    operand.parts[part] = data;
    operand.batch_strides[part] = batch_stride;
    operand.row_stride = row_stride, operand.sum_stride = sum_stride;
    operand.along_sum = sum_stride == 1;
    const bool side_by_side = operand.along_sum || row_stride == 1;
    const bool vectors =
        side_by_side && takes_vectors<T>(data, batch_stride, operand.along_sum ? row_stride : sum_stride);
    operand.vectors = vectors && (part == 0 || operand.vectors);
}

// One that has columns from an [B, rows, N] tensor.
template <typename T>
ProductResult plain_result(void* data, int64_t rows, int64_t columns, const void* bias) {
    ProductResult result{};
    result.data = data;
    result.batch_stride = rows * columns, result.row_stride = columns, result.column_stride = 1;
    result.bias = bias, result.bias_of_rows = true;
    result.pairs = takes_pairs<T>(data, columns);
    return result;
}

// y = scale (· + bias) + residual, transposed where y is channels_last.
template <typename T>
ProductResult map_result(const AttentionMap& y, const AttentionMap& residual, int64_t channels,
                         int64_t positions, const void* bias, const float* scale) {
    const bool last = channels_last(y);
    ProductResult result{};
    result.data = y.data, result.residual = residual.data;
    result.batch_stride = y.batch_stride, result.residual_batch_stride = residual.batch_stride;
    result.row_stride = last ? y.position_stride : y.channel_stride;
    result.column_stride = last ? y.channel_stride : y.position_stride;
    result.residual_row_stride = last ? residual.position_stride : residual.channel_stride;
    result.residual_column_stride = last ? residual.channel_stride : residual.position_stride;
    result.bias = bias, result.bias_of_rows = !last, result.scale = scale;
    result.pairs = result.column_stride == 1 && result.residual_column_stride == 1 &&
                   takes_pairs<T>(y.data, y.batch_stride, result.row_stride, last ? channels : positions) &&
                   takes_pairs<T>(residual.data, residual.batch_stride, result.residual_row_stride);
    return result;
}

// A product of every image by itself.
template <typename T>
cudaError_t launch_product(Product product, int64_t batch, cudaStream_t stream) {
    product.batch = static_cast<int>(batch), product.images_per_block = 1;
    Products products{};
    products.product[0] = product;
    products.first_blocks = ceil_div(product.row_ends[max_parts - 1], product_side);
    return launch_products<T>(products, 1, static_cast<int>(batch), stream);
}

// Whether the kernels can count in 32 bits.
inline bool supported_size(const AttentionCuda& in) {
    constexpr int64_t max_side = 1 << 24, max_batch = 65535;
    return std::max({in.channels, in.positions, in.key_width, in.value_width}) <= max_side && in.batch <= max_batch &&
           in.batch * in.positions <= INT64_C(16) * INT32_MAX;
}

// The status of work(T()) for the elements T that `in` is to be multiplied as.
template <typename Work>
int run_for_elements(const AttentionCuda& in, const Work& work) {
    if (in.dtype == DType::float64) return unsupported_dtype;
    if (!supported_size(in)) return unsupported_size;
    if (in.batch == 0 || in.positions == 0) return ok;
    const cudaError_t status = in.dtype == DType::bfloat16  ? work(bf16())
                               : in.dtype == DType::float16 ? work(f16())
                               : in.tf32                    ? work(tf32())
                                                            : work(fp32());
    return status == cudaSuccess ? ok : cuda_error + static_cast<int>(status);
}

inline void set_rows(Product& product, int first, int second = 0, int third = 0) {
    product.row_ends[0] = first, product.row_ends[1] = first + second, product.row_ends[2] = first + second + third;
}

}  // namespace sabmn
