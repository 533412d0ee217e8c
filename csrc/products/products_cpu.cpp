// Matrix products on the CPU by the one product routine (common/product.h). A block of the result is as wide as the
// routine's tiles. The right operand is read where it stands if its rows lie in memory as such: its tile is then fetched
// from the second cache for each few rows of the result, and still the multiply-adds are the limit. Else a tile is copied.

#include "products/products.h"

#include "common/product.h"

namespace sabmn {
namespace SABMN_ISA {
namespace {

using std::int64_t;

constexpr int64_t width = 64;  // of a block of the result; its rows are many, since a tile is copied for each block
constexpr int64_t most_rows = 512, fewest_rows = 16;

// tile[depth][width] = right, and zeros after its last column
void copy_tile(const float* right, const Matrices& strides, int64_t depth, int64_t columns, float* tile) {
    if (strides.row_stride == 1)
        transpose<float>(columns, depth, [=](int64_t column) { return right + column * strides.column_stride; }, tile,
                         width);
    else
        for (int64_t k = 0; k < depth; ++k)
            for (int64_t j = 0; j < columns; ++j)
                tile[k * width + j] = right[k * strides.row_stride + j * strides.column_stride];
    for (int64_t k = 0; k < depth; ++k)
        for (int64_t j = columns; j < width; ++j) tile[k * width + j] = 0;
}

void block(const Products& p, int64_t index, int64_t row, int64_t rows, int64_t column, int64_t columns) {
    const bool whole = columns % vector_lanes<float> == 0;
    float tile[product_depth * width], sums[most_rows * width];
    float* const result = p.result.data + index * p.result.batch_stride + row * p.result.row_stride + column;
    float* const to = whole ? result : sums;
    const int64_t to_row = whole ? p.result.row_stride : width;
    const float* const left = p.left.data + index * p.left.batch_stride + row * p.left.row_stride;
    const float* const right = p.right.data + index * p.right.batch_stride + column * p.right.column_stride;
    for (int64_t k = 0; k < p.depth; k += product_depth) {
        const int64_t depth = smaller(product_depth, p.depth - k);
        const float* factors = right + k * p.right.row_stride;
        int64_t factors_row = p.right.row_stride;
        if (!whole || p.right.column_stride != 1) {
            copy_tile(factors, p.right, depth, columns, tile);
            factors = tile, factors_row = width;
        }
        const Left<float> a{left + k * p.left.column_stride, p.left.row_stride, p.left.column_stride};
        product(rows, columns, depth, a, factors, factors_row, to, to_row, k > 0 || (whole && p.add));
    }
    if (!whole)
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; ++j) {
                float& sum = result[i * p.result.row_stride + j];
                sum = sums[i * width + j] + (p.add ? sum : 0);
            }
}

}  // namespace

void products(const Products& p, int threads) {
    const int64_t panels = blocks_of(p.columns, width);
    int64_t rows = most_rows;
    while (rows > fewest_rows && p.batch * panels * blocks_of(p.rows, rows) < 4 * threads) rows /= 2;
    const int64_t groups = blocks_of(p.rows, rows);
#pragma omp parallel for collapse(3) schedule(dynamic) num_threads(threads)
    for (int64_t index = 0; index < p.batch; ++index)
        for (int64_t group = 0; group < groups; ++group)
            for (int64_t panel = 0; panel < panels; ++panel)
                block(p, index, group * rows, smaller(rows, p.rows - group * rows), panel * width,
                      smaller(width, p.columns - panel * width));
}

}  // namespace SABMN_ISA
}  // namespace sabmn
