// The one product routine of the CPU kernels: C (+)= A·B, with A read factor by factor and B by vectors. A factor is a
// number, or a pair of them along the depth (bf16_pairs.h), which makes a step of the depth two terms.
//
// A block of C is block_rows × block_vectors vectors of sums in registers (6 × 4 of 32 with AVX-512, 6 × 2 of 16
// otherwise). A step of the depth loads block_vectors vectors and block_rows factors for their product of
// multiply-adds: 10 loads for 24 of them, where the processor can make one for each.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/bf16_pairs.h"
#include "common/simd.h"

namespace sabmn {
namespace SABMN_ISA {

static inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
static inline std::int64_t blocks_of(std::int64_t n, std::int64_t size) { return (n + size - 1) / size; }

constexpr int block_rows = 6, block_vectors = vector_bytes == 64 ? 4 : 2;
constexpr std::int64_t product_depth = 128;  // longer sums are added up in parts of so many steps

// a(row, k) = data[row·row_stride + k·step].
template <typename P>
struct Left {
    const P* data;
    std::int64_t row_stride, step;
    Left at(std::int64_t row, std::int64_t k) const {
        return {data + row * row_stride + k * step, row_stride, step};
    }
};

template <typename T>
static inline void add_product(Vector<T>& sum, T factor, Vector<T> right) {
    sum += factor * right;
}

// What else goes on between the blocks of a product.
struct Nothing {
    void operator()() const {}
};

// Summed from 0 and then added to c, so that a large c costs one rounding only. Rows of a that are far apart are those of
// weights, which are in no near cache: the next block's are fetched meanwhile, a cache line at a time.
// Inlined: a call takes a tenth of the time of a product with a depth of 32.
template <int rows, int vectors, bool far_apart, typename P>
static inline __attribute__((always_inline)) void product_block(std::int64_t depth, Left<P> a, const P* b, std::int64_t b_row, Sum<P>* c,
                                 std::int64_t c_row, bool add) {
    constexpr int width = vector_lanes<P>;
    const std::int64_t stretch = far_apart ? 64 / sizeof(P) : depth;
    Vector<Sum<P>> sums[rows][vectors] = {};
    for (std::int64_t left = depth; left > 0; left -= stretch) {
        if constexpr (far_apart) {
#pragma GCC unroll 6
            for (int row = 0; row < rows; ++row) __builtin_prefetch(a.data + (rows + row) * a.row_stride);
        }
        const std::int64_t steps = smaller(left, stretch);
#pragma GCC unroll 4
        for (std::int64_t k = 0; k < steps; ++k, a.data += a.step, b += b_row) {
            Vector<P> right[vectors];
#pragma GCC unroll 4
            for (int j = 0; j < vectors; ++j) right[j] = vector_at(b + j * width);
#pragma GCC unroll 6
            for (int row = 0; row < rows; ++row) {
                const P factor = a.data[row * a.row_stride];
#pragma GCC unroll 4
                for (int j = 0; j < vectors; ++j) add_product(sums[row][j], factor, right[j]);
            }
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < rows; ++row, c += c_row) {
#pragma GCC unroll 4
        for (int j = 0; j < vectors; ++j)
            vector_at(c + j * width) = add ? vector_at(c + j * width) + sums[row][j] : sums[row][j];
    }
}

template <int vectors, typename P, typename Meanwhile>
static void product_columns(std::int64_t rows, std::int64_t depth, Left<P> a, const P* b, std::int64_t b_row,
                            Sum<P>* c, std::int64_t c_row, bool add, Meanwhile& meanwhile) {
    std::int64_t row = 0;
    const bool far_apart = a.step == 1 && a.row_stride > product_depth;
    const auto block = [&](auto height) {
        const auto run = [&](auto fetching) {
            product_block<height.value, vectors, fetching.value>(depth, a.at(row, 0), b, b_row, c + row * c_row, c_row,
                                                                 add);
        };
        if (height.value == block_rows && far_apart) run(std::true_type{});
        else run(std::false_type{});
        row += height.value;
        meanwhile();
    };
    while (row < rows) {
        // What is left after the full blocks is split in two, since low blocks wait for their own sums.
        const std::int64_t left = rows - row;
        const std::int64_t height = left >= 2 * block_rows || left == block_rows ? block_rows
                                    : left > block_rows                          ? (left + 1) / 2
                                                                                 : left;
        switch (height) {
            case 6: block(std::integral_constant<int, 6>{}); break;
            case 5: block(std::integral_constant<int, 5>{}); break;
            case 4: block(std::integral_constant<int, 4>{}); break;
            case 3: block(std::integral_constant<int, 3>{}); break;
            case 2: block(std::integral_constant<int, 2>{}); break;
            default: block(std::integral_constant<int, 1>{});
        }
    }
}

// c[rows][columns] (+)= a[rows][depth] · b[depth][columns]; rows of b and c are b_row and c_row apart. Columns are
// computed in whole vectors: b and c are that wide.
template <typename P, typename Meanwhile = Nothing>
static void product(std::int64_t rows, std::int64_t columns, std::int64_t depth, Left<P> a, const P* b,
                    std::int64_t b_row, Sum<P>* c, std::int64_t c_row, bool add, Meanwhile&& meanwhile = {}) {
    constexpr std::int64_t width = vector_lanes<P>;
    for (std::int64_t k = 0; k < depth; k += product_depth, add = true) {
        const std::int64_t part = smaller(product_depth, depth - k);
        for (std::int64_t column = 0; column < columns;) {
            const std::int64_t vectors = blocks_of(columns - column, width);
            const P* right = b + k * b_row + column;
            const auto run = [&](auto count) {
                product_columns<count.value>(rows, part, a.at(0, k), right, b_row, c + column, c_row, add, meanwhile);
                column += count.value * width;
            };
            if constexpr (block_vectors == 4) {
                if (vectors >= 4) { run(std::integral_constant<int, 4>{}); continue; }
                if (vectors == 3) { run(std::integral_constant<int, 3>{}); continue; }
            }
            if (vectors >= 2) run(std::integral_constant<int, 2>{});
            else run(std::integral_constant<int, 1>{});
        }
    }
}

// sums[lane] = Σ over rows of a·b, added up exactly as product() does it: where a row of the map is one-hot, its
// gradient of the map less this sum is then 0, not rounding noise times a large logit's gradient. Rows of a and b are
// a_row and b_row apart.
template <typename P>
static void row_dots(std::int64_t rows, std::int64_t columns, const P* a, std::int64_t a_row, const P* b,
                     std::int64_t b_row, Sum<P>* sums) {
    for (std::int64_t lane = 0; lane < columns; lane += vector_lanes<P>) {
        Vector<Sum<P>> total = {};
        for (std::int64_t row = 0; row < rows; row += product_depth) {
            Vector<Sum<P>> sum = {};
            for (std::int64_t k = row; k < rows && k < row + product_depth; ++k) {
                const Vector<P> left = vector_at(a + k * a_row + lane), right = vector_at(b + k * b_row + lane);
                if constexpr (std::is_same<P, Pair>::value) add_product(sum, left, right);
                else sum += left * right;
            }
            total = row ? total + sum : sum;
        }
        vector_at(sums + lane) = total;
    }
}

}  // namespace SABMN_ISA
}  // namespace sabmn
