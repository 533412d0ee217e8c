// The matrix products around the attention: projections, gradients of the input and of the weights.
//
// out[r, s] = Σ_k a[r, k] b[s, k], for every image, or (weights) summed over the images too. Where a matrix has parts,
// they are separate tensors: along its rows (the stacked weights of query, key and value, and their products), or along
// the sum (the gradient of the input, which is a sum over them). So nothing is concatenated in memory.
//
// A block of 8 warps owns 128 × 128 of the result, a warp 32 × 64 of them. The operands pass through shared memory in
// slices of 64 bytes of the sum; two slices are under way while one is multiplied.
#pragma once

#include <type_traits>

#include "attention/attention_tiles.cuh"

namespace sabmn {
namespace {

constexpr int product_stages = 3, product_threads = 256;
template <typename T>
constexpr int product_blocks_per_sm = sizeof(T) == 2 ? 2 : 1;  // as registers allow
template <typename T>
constexpr int product_depth = 64 / sizeof(T);  // elements of the sum in a slice
template <typename T>
constexpr int product_slice = product_side * product_depth<T>;  // elements of one operand
constexpr int product_shared_bytes = product_stages * 2 * product_side * 64;

// Walks over the slices of the sum, images outermost.
struct ProductSlice {
    int image, part = 0, k = 0;

    __device__ void advance(int depth, const int (&depths)[max_parts]) {
        k += depth;
        while (k >= depths[part]) {
            k = 0;
            if (++part == max_parts) part = 0, ++image;
        }
    }
};

// A thread's share of an operand's slices: two chunks of the tile, always the same ones. `along`:
// ProductOperand::along_sum.
template <typename T, bool along>
struct SliceCopier {
    static constexpr int size = chunk_size<T>, chunks = (along ? product_depth<T> : product_side) / size,
                         rows_apart = product_threads / chunks, share = 2;
    static_assert(share * product_threads * size == product_slice<T> && rows_apart % 8 == 0,
                  "the threads share a slice");

    const ProductOperand& operand;
    const int tile_row, chunk, place;  // of the first of them
    const int first, rows;             // of the tile's rows, and how many the operand has
    const T* from[share];              // at the next slice

    __device__ SliceCopier(const ProductOperand& operand, int first, int rows)
        : operand(operand),
          tile_row(threadIdx.x / chunks),
          chunk(threadIdx.x % chunks),
          place(chunk_place<T>(chunks, tile_row, chunk)),
          first(first),
          rows(rows) {}

    // Before the first slice of a part of the sum.
    __device__ void begin(const ProductSlice& slice, const int (&row_ends)[max_parts], bool stacked) {
#pragma unroll
        for (int i = 0; i < share; ++i) {
            const int in_tile = tile_row + i * rows_apart, k = along ? size * chunk : in_tile;
            int row = first + (along ? in_tile : size * chunk), part = slice.part;
            if (stacked) {
                part = (row >= row_ends[0]) + (row >= row_ends[1]);
                if (part) row -= row_ends[part - 1];
            }
            from[i] = static_cast<const T*>(operand.parts[part]) + slice.image * operand.batch_strides[part] +
                      row * operand.row_stride + k * operand.sum_stride;
        }
    }

    // `left` elements of the sum are left.
    __device__ void copy(T* tile, int left) {
        T* const to = tile + place;
        constexpr int apart = product_threads * size;
        if (operand.vectors && rows - first >= product_side && left >= product_depth<T>) {
#pragma unroll
            for (int i = 0; i < share; ++i) cp_async_16(to + i * apart, from[i]);
        } else {
#pragma unroll
            for (int i = 0; i < share; ++i) {
                const int in_tile = tile_row + i * rows_apart;
                const int filled = along ? (first + in_tile < rows ? left - size * chunk : 0)
                                         : (in_tile < left ? rows - first - size * chunk : 0);
                if (operand.vectors) copy_vector(to + i * apart, from[i], filled);
                else copy_elements(to + i * apart, from[i], filled, along ? operand.sum_stride : operand.row_stride);
            }
        }
#pragma unroll
        for (int i = 0; i < share; ++i) from[i] += product_depth<T> * operand.sum_stride;
    }
};

// One slice of the sum, for a warp's part of the result: all of its columns, or the first half. A branch for every 16
// would keep the compiler from loading operands while others are multiplied.
template <typename T, bool a_along, bool b_along, int column_blocks>
__device__ inline void multiply_slice(Block (&sums)[2][4], const T* tile, int warp_row, int warp_column) {
    constexpr int depth = product_depth<T>;
#pragma unroll
    for (int k = 0; k < depth; k += 16) {
        Operand<T> left[2];
        Right<T> right;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            load_operand<a_along ? depth : product_side, !a_along>(left[i], tile, warp_row + 16 * i, k);
        }
#pragma unroll
        for (int j = 0; j < column_blocks; ++j) {
            load_right<b_along ? depth : product_side, !b_along>(right, tile + product_slice<T>, warp_column + 16 * j,
                                                                 k);
            multiply<T>(sums[0][j], left[0], right);
            multiply<T>(sums[1][j], left[1], right);
        }
    }
}

// The sums of a warp, from (warp_row, warp_column) of the block's 128 × 128 on.
template <typename T, bool a_along, bool b_along>
__device__ void sum_product(Block (&sums)[2][4], const Product& product, T* shared, int first_row, int first_column,
                            int warp_row, int warp_column) {
    constexpr int depth = product_depth<T>, size = product_slice<T>;
    const int rows = product.row_ends[max_parts - 1], columns = product.columns, no_parts[max_parts] = {};
    ProductSlice next = {static_cast<int>(blockIdx.z) * product.images_per_block};
    const int images = min(product.images_per_block, product.batch - next.image);
    int slices = 0;
    for (const int part : product.depths) slices += ceil_div(part, depth);
    slices *= images;

    SliceCopier<T, a_along> a(product.a, first_row, rows);
    SliceCopier<T, b_along> b(product.b, first_column, columns);
    const auto fetch = [&](int slice) {
        if (slice < slices) {
            if (next.k == 0) {
                a.begin(next, product.row_ends, product.stacked);
                b.begin(next, no_parts, false);
            }
            T* const tile = shared + slice % product_stages * 2 * size;
            const int left = product.depths[next.part] - next.k;
            a.copy(tile, left);
            b.copy(tile + size, left);
            next.advance(depth, product.depths);
        }
        cp_async_commit();
    };

    // A warp without a result has nothing to multiply, but copies with the others.
    const int own_columns = first_row + warp_row < rows ? columns - first_column - warp_column : 0;
    // Before the first slice there is nothing to wait for and to multiply.
#pragma unroll 1
    for (int slice = 1 - product_stages; slice < slices; ++slice) {
        if (slice >= 0) {
            cp_async_wait<product_stages - 2>();
            __syncthreads();
        }
        fetch(slice + product_stages - 1);
        if (own_columns <= 0 || slice < 0) continue;
        const T* const tile = shared + slice % product_stages * 2 * size;
        if (own_columns > 32) {
            multiply_slice<T, a_along, b_along, 4>(sums, tile, warp_row, warp_column);
        } else {
            multiply_slice<T, a_along, b_along, 2>(sums, tile, warp_row, warp_column);
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(product_threads, product_blocks_per_sm<T>)
    attention_product_kernel(SABMN_GRID_CONSTANT(Products) products) {
    SABMN_DYNAMIC_SHARED(T, shared);
    const bool second = blockIdx.y >= static_cast<unsigned>(products.first_blocks);
    const Product& product = products.product[second];
    const int first_row = (blockIdx.y - (second ? products.first_blocks : 0)) * product_side;
    const int first_column = blockIdx.x * product_side;
    const int rows = product.row_ends[max_parts - 1], columns = product.columns;
    if (first_column >= columns) return;  // of the wider product of the two

    const int warp = threadIdx.x / warp_size, warp_row = warp / 2 * 32, warp_column = warp % 2 * 64;
    Block sums[2][4] = {};
    const auto sum = [&](auto a_along, auto b_along) {
        sum_product<T, a_along.value, b_along.value>(sums, product, shared, first_row, first_column, warp_row,
                                                     warp_column);
    };
    const std::true_type yes;
    const std::false_type no;
    if (product.a.along_sum) product.b.along_sum ? sum(yes, yes) : sum(yes, no);
    else product.b.along_sum ? sum(no, yes) : sum(no, no);

#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = first_row + warp_row + 16 * i;
        if (product.partial) {
            float* const out = product.partial + static_cast<std::int64_t>(blockIdx.z) * rows * columns;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    const int lane = threadIdx.x % warp_size;
                    const int r = row + lane / 4 + e / 2 % 2 * 8;
                    const int c = first_column + warp_column + 16 * j + e / 4 * 8 + lane % 4 * 2 + e % 2;
                    if (r < rows && c < columns)
                        out[static_cast<std::int64_t>(r) * columns + c] = sums[i][j][e / 4][e % 4];
                }
            }
            continue;
        }
        // Blocks of 16 rows may lie across two parts: each part takes its own rows.
        for (int part = 0; part < (product.stacked ? max_parts : 1); ++part) {
            const int begin = part ? product.row_ends[part - 1] : 0,
                      end = product.row_ends[product.stacked ? part : max_parts - 1];
            if (row + 16 <= begin || row >= end) continue;
            const BlockResult<T> result{product.results[part], blockIdx.z, end - begin, columns};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                Pairs<T> residual;
                const int column = first_column + warp_column + 16 * j;
                result.load_residual(residual, row - begin, column);
                result.store(sums[i][j], residual, row - begin, column);
            }
        }
    }
}

}  // namespace
}  // namespace sabmn
