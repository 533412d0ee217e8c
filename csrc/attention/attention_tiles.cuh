// What the attention's CUDA kernels share: tiles of 16-bit elements in shared memory, their way there, and the tensor
// cores' operands.
//
// All products are made of blocks d[r, s] += Σ_k a[r, k] b[s, k], 16 × 16 × 16. An operand block holds 16 rows of one
// side and 16 elements of the sum; it is the same four registers whether it stands left or right, and a result block
// d[r, s], rounded, is an operand block with rows r and sum s. In a lane, with g = lane / 4 and t = lane % 4, a result
// block is
//   {{d[g][2t], d[g][2t+1], d[g+8][2t], d[g+8][2t+1]}, {the same of d[·][8 + ·]}}.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention/attention_products.h"
#include "common/cuda.h"

namespace sabmn {
namespace {

constexpr int warp_size = 32;
constexpr float log2_e = 1.44269504f, minus_infinity = -INFINITY;

// ---- tiles: rows of 8·chunks elements ----

// Where the tile has a chunk, 16 bytes, of a row; chunks is 4, 8 or 16. A row's chunks are permuted so that the same
// chunk of eight rows, which ldmatrix reads at once, lies in different banks.
__device__ inline int chunk_place(int chunks, int row, int chunk) {
    return (row * chunks + (chunk ^ (chunks == 4 ? row >> 1 & 3 : row & 7))) * 8;
}

// Begins to fill a chunk with `size` elements (at most 8, or none) and then zeros. Neighbours are `stride` elements
// apart; with `vectors` they lie side by side from a multiple of 16 bytes on. What cannot be copied asynchronously is
// stored.
template <typename T>
__device__ inline void copy_chunk(T* to, const T* from, int size, std::int64_t stride, bool vectors) {
    if (vectors) {
        cp_async_16(to, from, min(max(size, 0), 8) * static_cast<int>(sizeof(T)));
    } else {
        std::uint32_t pairs[4];
#pragma unroll
        for (int e = 0; e < 8; e += 2) {
            const std::uint32_t low = e < size ? from[e * stride].bits : 0,
                                high = e + 1 < size ? from[(e + 1) * stride].bits : 0;
            pairs[e / 2] = low | high << 16;
        }
        *reinterpret_cast<uint4*>(to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}

// Part of a matrix for a tile of `rows` rows and 8 or 16 chunks: `filled` rows are there, `stride` apart, with `size`
// elements each.
template <typename T>
struct Panel {
    const T* data;
    int stride, chunks, rows, filled, size;
    bool vectors;

    __device__ void copy_to(T* tile) const {
        const int shift = chunks == 8 ? 3 : 4;
#pragma unroll 1
        for (int i = threadIdx.x; i < rows * chunks; i += blockDim.x) {
            const int row = i >> shift, chunk = i & (chunks - 1);
            copy_chunk(tile + chunk_place(chunks, row, chunk),
                       data + static_cast<std::int64_t>(row) * stride + 8 * chunk, row < filled ? size - 8 * chunk : 0,
                       1, vectors);
        }
    }
};

// ---- operands ----

using Operand = std::uint32_t[4];
using Block = float[2][4];

// Rows `row` … of one side and elements `k` … of the sum, multiples of 16. The tile's rows are the side's, or
// (`across`) the sum's. What depends on the lane is computed once: the chunk, a multiple of 2, only changes bits that a
// lane's own place has to itself.
template <int chunks, bool across, typename T>
__device__ inline void load_operand(Operand& operand, const T* tile, int row, int k) {
    const int lane = threadIdx.x % warp_size;
    if constexpr (across) {
        const int own = chunk_place(chunks, lane / 16 * 8 + lane % 8, lane / 8 % 2);
        ldmatrix_x4_trans(operand, tile + k * chunks * 8 + (own ^ row));
    } else {
        const int own = chunk_place(chunks, lane % 16, lane / 16);
        ldmatrix_x4(operand, tile + row * chunks * 8 + (own ^ k));
    }
}

template <typename T>
__device__ inline void multiply(Block& d, const Operand& a, const Operand& b) {
    mma_m16n8k16<T>(d[0], a, {b[0], b[2]});
    mma_m16n8k16<T>(d[1], a, {b[1], b[3]});
}

// d's lower rows times low, its upper rows times high.
template <typename T>
__device__ inline void round_block(Operand& operand, const Block& d, float low, float high) {
    operand[0] = pack<T>(d[0][0] * low, d[0][1] * low);
    operand[1] = pack<T>(d[0][2] * high, d[0][3] * high);
    operand[2] = pack<T>(d[1][0] * low, d[1][1] * low);
    operand[3] = pack<T>(d[1][2] * high, d[1][3] * high);
}

template <typename T>
__device__ inline float2 unpack(std::uint32_t both) {
    T low, high;
    low.bits = static_cast<std::uint16_t>(both);
    high.bits = static_cast<std::uint16_t>(both >> 16);
    return make_float2(low, high);
}

// ---- results ----

// A block of a tensor [channels, positions] that a warp holds as an operand: its rows are the positions from `position`
// on, its sum the channels from `channel` on. `turned` becomes the same with rows and sum exchanged. `pairs`: two
// neighbours begin at a multiple of 4 bytes.
template <typename T>
__device__ inline void store_turned(T* data, int channels, int positions, int channel, int position, bool pairs,
                                    const Operand& operand, Operand& turned) {
    const int lane = threadIdx.x % warp_size;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        turned[e] = transpose_8x8(operand[e]);
        const int c = channel + e / 2 * 8 + lane / 4, n = position + e % 2 * 8 + lane % 4 * 2;
        if (c >= channels || n >= positions) continue;
        T* const to = data + static_cast<std::int64_t>(c) * positions + n;
        if (pairs) {
            *reinterpret_cast<std::uint32_t*>(to) = turned[e];
        } else {
            to[0].bits = static_cast<std::uint16_t>(turned[e]);
            if (n + 1 < positions) to[1].bits = static_cast<std::uint16_t>(turned[e] >> 16);
        }
    }
}

// The part of a result that a warp holds as one Block: its rows g, g + 8 and columns 2t, 2t + 1, 2t + 8, 2t + 9 from
// (row, column) on, of a matrix of rows × columns.
template <typename T>
struct BlockResult {
    const ProductResult& result;
    std::int64_t image;
    int rows, columns;

    template <typename Work>
    __device__ void for_pairs(int row, int column, const Work& work) const {
        const int lane = threadIdx.x % warp_size;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int lower = 0; lower < 2; ++lower) {
                const int r = row + lane / 4 + 8 * lower, c = column + 8 * half + lane % 4 * 2;
                if (r >= 0 && r < rows && c < columns) work(r, c, half, lower);
            }
        }
    }

    // The residual is fetched early: many loads are to be under way at once.
    __device__ void load_residual(Operand& kept, int row, int column) const {
        if (!result.residual) return;
        const T* const from = static_cast<const T*>(result.residual) + image * result.residual_batch_stride;
        for_pairs(row, column, [&](int r, int c, int half, int lower) {
            const T* const start = from + r * result.residual_row_stride;
            std::uint32_t& both = kept[2 * half + lower];
            if (result.pairs) {
                both = *reinterpret_cast<const std::uint32_t*>(start + c);
            } else {
                const T* const at = start + c * result.residual_column_stride;
                both = at->bits;
                if (c + 1 < columns) {
                    both |= static_cast<std::uint32_t>(at[result.residual_column_stride].bits) << 16;
                }
            }
        });
    }

    __device__ void store(const Block& values, const Operand& residual, int row, int column) const {
        const float scale = result.scale ? *result.scale : 1.0f;
        const T* const bias = static_cast<const T*>(result.bias);
        T* const to = static_cast<T*>(result.data) + image * result.batch_stride;
        for_pairs(row, column, [&](int r, int c, int half, int lower) {
            float2 x = make_float2(values[half][2 * lower], values[half][2 * lower + 1]);
            const bool both = c + 1 < columns;
            if (bias) {
                x.x += bias[result.bias_of_rows ? r : c];
                if (both) x.y += bias[result.bias_of_rows ? r : c + 1];
            }
            x.x *= scale, x.y *= scale;
            if (result.residual) {
                const float2 add = unpack<T>(residual[2 * half + lower]);
                x.x += add.x, x.y += add.y;
            }
            T* const start = to + r * result.row_stride;
            if (result.pairs) {
                *reinterpret_cast<std::uint32_t*>(start + c) = pack<T>(x.x, x.y);
            } else {
                T* const at = start + c * result.column_stride;
                *at = static_cast<T>(x.x);
                if (both) at[result.column_stride] = static_cast<T>(x.y);
            }
        });
    }
};

}  // namespace
}  // namespace sabmn
