// The matrix products around the attention: projections, gradients of the input and of the weights.
//
// out[r, s] = Σ_k a[r, k] b[s, k], for every image, or (weights) summed over the images too. Where a matrix has parts, they
// are separate tensors: along its rows (the stacked weights of query, key and value, and their products), or along the sum
// (the gradient of the input, which is a sum over them). So nothing is concatenated in memory.
//
// A block of 8 warps owns 128 × 128 of the result, a warp 32 × 64 of them. The operands pass through shared memory in slices
// of 32 elements of the sum; two slices are under way while one is multiplied.
#pragma once

#include "attention/attention_tiles.cuh"

namespace sabmn {
namespace {

constexpr int product_side = 128, product_depth = 32, product_stages = 3, product_threads = 256;
constexpr int product_blocks_per_sm = 2;
constexpr int product_slice = product_side * product_depth;  // elements of one operand
constexpr int product_shared_bytes = product_stages * 2 * product_slice * 2;
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
    bool stacked;             // parts are along the rows of a, else along the sum
    Result results[max_parts];  // of the parts along the rows, else the first only
    float* partial;           // [blocks in z, rows, columns] instead of a result
};

// At most two products in one launch: the second has the blocks in y from first_blocks on.
struct Products {
    Product product[2];
    int first_blocks;
};

// Walks over the slices of the sum, images outermost.
struct ProductSlice {
    int image, part = 0, k = 0;

    __device__ void advance(const int (&depths)[max_parts]) {
        k += product_depth;
        while (k >= depths[part]) {
            k = 0;
            if (++part == max_parts) part = 0, ++image;
        }
    }
};

template <typename T>
__device__ void copy_slice(T* tile, const ProductOperand& operand, const ProductSlice& slice, const int (&row_ends)[max_parts],
                           bool stacked, int first, int depth) {
    const auto data = [&](int part) {
        return static_cast<const T*>(operand.parts[part]) + slice.image * operand.batch_strides[part];
    };
    const bool along = operand.along_sum;
    const int chunks = (along ? product_depth : product_side) / 8, tile_rows = along ? product_side : product_depth;
    const int rows = row_ends[max_parts - 1];
    copy_tile(tile, chunks, tile_rows, along ? operand.sum_stride : operand.row_stride, operand.vectors, [&](int i) {
        int row = first + (along ? i : 0), part = slice.part;
        const int k = slice.k + (along ? 0 : i);
        if (row >= rows || k >= depth) return Row<T>{nullptr, 0};
        const int size = along ? depth - k : rows - row;
        if (stacked) {
            part = (row >= row_ends[0]) + (row >= row_ends[1]);
            if (part) row -= row_ends[part - 1];
        }
        return Row<T>{data(part) + row * operand.row_stride + k * operand.sum_stride, size};
    });
}

template <typename T>
__global__ void __launch_bounds__(product_threads, product_blocks_per_sm)
    attention_product_kernel(SABMN_GRID_CONSTANT(Products) products) {
    SABMN_DYNAMIC_SHARED(T, shared);
    const bool second = blockIdx.y >= static_cast<unsigned>(products.first_blocks);
    const Product& product = products.product[second];
    const int first_row = (blockIdx.y - (second ? products.first_blocks : 0)) * product_side;
    const int first_column = blockIdx.x * product_side;
    const int rows = product.row_ends[max_parts - 1], columns = product.columns;
    if (first_column >= columns) return;  // of the wider product of the two
    const int column_ends[max_parts] = {columns, columns, columns};

    const int images = min(product.images_per_block, product.batch - static_cast<int>(blockIdx.z) * product.images_per_block);
    int slices = 0;
    for (const int depth : product.depths) slices += ceil_div(depth, product_depth);
    slices *= images;

    ProductSlice next = {static_cast<int>(blockIdx.z) * product.images_per_block};
    const auto fetch = [&](int slice) {
        if (slice < slices) {
            T* const tile = shared + slice % product_stages * 2 * product_slice;
            const int depth = product.depths[next.part];
            copy_slice(tile, product.a, next, product.row_ends, product.stacked, first_row, depth);
            copy_slice(tile + product_slice, product.b, next, column_ends, false, first_column, depth);
            next.advance(product.depths);
        }
        cp_async_commit();
    };

    const int warp = threadIdx.x / warp_size, warp_row = warp / 2 * 32, warp_column = warp % 2 * 64;
    // A warp without a result has nothing to multiply, but copies with the others.
    const int row_blocks = min(ceil_div(max(rows - first_row - warp_row, 0), 16), 2);
    const int column_blocks = min(ceil_div(max(columns - first_column - warp_column, 0), 16), 4);
    Block sums[2][4] = {};
    for (int slice = 0; slice < product_stages - 1; ++slice) fetch(slice);
    for (int slice = 0; slice < slices; ++slice) {
        cp_async_wait<product_stages - 2>();
        __syncthreads();
        fetch(slice + product_stages - 1);
        const T* const tile = shared + slice % product_stages * 2 * product_slice;
#pragma unroll
        for (int k = 0; k < product_depth; k += 16) {
            Operand a[2], b;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (product.a.along_sum) load_operand<product_depth / 8, false>(a[i], tile, warp_row + 16 * i, k);
                else load_operand<product_side / 8, true>(a[i], tile, warp_row + 16 * i, k);
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (j >= column_blocks) break;
                const T* const right = tile + product_slice;
                if (product.b.along_sum) load_operand<product_depth / 8, false>(b, right, warp_column + 16 * j, k);
                else load_operand<product_side / 8, true>(b, right, warp_column + 16 * j, k);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    if (i < row_blocks) multiply<T>(sums[i][j], a[i], b);
                }
            }
        }
    }

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
                    if (r < rows && c < columns) out[static_cast<std::int64_t>(r) * columns + c] = sums[i][j][e / 4][e % 4];
                }
            }
            continue;
        }
        // Blocks of 16 rows may lie across two parts: each part takes its own rows.
        for (int part = 0; part < (product.stacked ? max_parts : 1); ++part) {
            const int begin = part ? product.row_ends[part - 1] : 0, end = product.row_ends[product.stacked ? part : max_parts - 1];
            if (row + 16 <= begin || row >= end) continue;
            const BlockResult<T> result{product.results[part], blockIdx.z, end - begin, columns};
#pragma unroll
            for (int j = 0; j < 4; j += 2) {  // more residuals at once would take too many registers
                Operand residual[2];
                const int column = first_column + warp_column + 16 * j;
                result.load_residual(residual[0], row - begin, column);
                result.load_residual(residual[1], row - begin, column + 16);
                result.store(sums[i][j], residual[0], row - begin, column);
                result.store(sums[i][j + 1], residual[1], row - begin, column + 16);
            }
        }
    }
}

}  // namespace
}  // namespace sabmn
