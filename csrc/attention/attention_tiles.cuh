// What the attention's CUDA kernels share: tiles in shared memory, their way there, and the operands of products. An
// element T is bf16, f16, tf32 or fp32; kernels are written once for all four.
//
// All products are made of blocks d[r, s] += Σ_k a[r, k] b[s, k], 16 × 16 × 16. An operand block holds 16 rows of one
// side and 16 elements of the sum; it is the same registers whether it stands left or right, and a result block
// d[r, s], rounded, is an operand block with rows r and sum s. In a lane, with g = lane / 4 and t = lane % 4, a result
// block is
//   {{d[g][2t], d[g][2t+1], d[g+8][2t], d[g+8][2t+1]}, {the same of d[·][8 + ·]}}.
// An operand of 16-bit elements is what mma_m16n8k16 takes. One of 32-bit elements is two of mma_m16n8k8_tf32, which
// has t and t + 4 of the sum where a result has 2t and 2t + 1; since the order of a sum is free, so are these names. fp32
// is multiplied as TF32 in two parts each.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "attention/attention_products.h"
#include "common/cuda.h"

namespace sabmn {
namespace {

constexpr int warp_size = 32;
constexpr float log2_e = 1.44269504f, minus_infinity = -INFINITY;

// What a query's logits are held against: e^(logit − maximum) / e^log_total. In float32 the distance to the maximum is taken
// first, which is exact where logits are large; their products with log2_e are not. Of 16 bits one multiply-add does all:
// an instruction less for every number of the map.
template <typename T>
struct LogSum {
    float shift, rest;
    __device__ static LogSum of(float maximum, float log_total = 0.0f) {
        if constexpr (sizeof(T) == 4) return {maximum, log_total * log2_e};
        else return {(maximum + log_total) * log2_e, 0.0f};
    }
    __device__ float power(float logit) const {
        if constexpr (sizeof(T) == 4) return exp2_approx(fmaf(logit - shift, log2_e, -rest));
        else return exp2_approx(fmaf(logit, log2_e, -shift));
    }
};

// ---- tiles: rows of 4 to 32 chunks of 16 bytes ----

template <typename T>
constexpr int chunk_size = 16 / sizeof(T);

// Where the tile has a chunk of a row. A row's chunks are permuted so that what a warp reads at once lies in different
// banks: the same chunk of eight rows (ldmatrix); of 32-bit elements two neighbouring chunks of four rows, or of every
// second row of eight.
template <typename T>
__device__ inline int chunk_place(int chunks, int row, int chunk) {
    int turn;
    if constexpr (sizeof(T) == 2) turn = chunks == 4 ? row >> 1 & 3 : row & 7;
    else turn = chunks == 4 ? row & 2 : (row << 1 & 4) | ((row << 1 ^ row >> 1) & 2) | (row & 1);
    return (row * chunks + (chunk ^ turn)) * chunk_size<T>;
}

// Fills a chunk with `size` elements (at most a chunk's, or none), `stride` apart, and then zeros.
template <typename T>
__device__ inline void copy_elements(T* to, const T* from, int size, std::int64_t stride) {
    const auto element = [&](int e) -> std::uint32_t { return e < size ? from[e * stride].bits : 0; };
    std::uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 2) words[i] = element(2 * i) | element(2 * i + 1) << 16;
        else words[i] = element(i);
    }
    store_shared_16(to, make_uint4(words[0], words[1], words[2], words[3]));
}

// The same where they lie side by side from a multiple of 16 bytes on; in flight until a cp_async_wait.
template <typename T>
__device__ inline void copy_vector(T* to, const T* from, int size) {
    cp_async_16(to, from, min(max(size, 0), chunk_size<T>) * static_cast<int>(sizeof(T)));
}

// Part of a matrix: `rows` of a tile's rows are to be filled, of which `filled` are there, `stride` apart, with `size`
// elements each.
template <typename T>
struct Panel {
    const T* data;
    int stride, rows, filled, size;
    bool vectors;

    // To a tile with rows of `length` elements, by `threads` threads.
    template <int length, int threads>
    __device__ void copy_to(T* tile) const {
        constexpr int chunks = length / chunk_size<T>, rows_apart = threads / chunks;
        // What depends on the thread is found once: its chunks lie in one column, in whose rows the order repeats itself.
        static_assert(rows_apart % 8 == 0 || sizeof(T) == 4, "the order of chunks repeats itself after eight rows");
        const int first = threadIdx.x / chunks, chunk = threadIdx.x % chunks, there = size - chunk * chunk_size<T>;
        const T* from = data + static_cast<std::int64_t>(first) * stride + chunk * chunk_size<T>;
        T* to = tile + chunk_place<T>(chunks, first, chunk);
        const auto copy_all = [&](const auto& copy) {
#pragma unroll 1
            for (int row = first; row < rows; row += rows_apart) {
                if constexpr (rows_apart % 8) to = tile + chunk_place<T>(chunks, row, chunk);
                copy(to, from, row < filled ? there : 0);
                from += static_cast<std::int64_t>(rows_apart) * stride, to += rows_apart * length;
            }
        };
        if (vectors) copy_all([](T* to, const T* from, int size) { copy_vector(to, from, size); });
        else copy_all([](T* to, const T* from, int size) { copy_elements(to, from, size, 1); });
    }
};

// ---- operands ----

template <typename T>
using Operand = std::uint32_t[2 * sizeof(T)];
using Block = float[2][4];

// Two neighbours of a row; a lane holds 4 such pairs of a block, index 2·half + lower: rows g + 8·lower, columns 2t and
// 2t + 1 from 8·half on.
template <typename T>
using Pair = std::conditional_t<sizeof(T) == 2, std::uint32_t, uint2>;
template <typename T>
using Pairs = Pair<T>[4];

template <typename T>
__device__ inline Pair<T> join(float x, float y) {
    if constexpr (sizeof(T) == 2) return pack<T>(x, y);
    else return make_uint2(__float_as_uint(x), __float_as_uint(y));
}

template <typename T>
__device__ inline Pair<T> join(T x, T y) {
    if constexpr (sizeof(T) == 2) return x.bits | static_cast<std::uint32_t>(y.bits) << 16;
    else return make_uint2(x.bits, y.bits);
}

template <typename T>
__device__ inline T left_of(const Pair<T>& pair) {
    T x;
    if constexpr (sizeof(T) == 2) x.bits = static_cast<std::uint16_t>(pair);
    else x.bits = pair.x;
    return x;
}

template <typename T>
__device__ inline T right_of(const Pair<T>& pair) {
    T x;
    if constexpr (sizeof(T) == 2) x.bits = static_cast<std::uint16_t>(pair >> 16);
    else x.bits = pair.y;
    return x;
}

template <typename T>
__device__ inline Pair<T> pair_of(const Operand<T>& operand, int i) {
    if constexpr (sizeof(T) == 2) return operand[i];
    else return make_uint2(operand[i / 2 * 4 + i % 2], operand[i / 2 * 4 + 2 + i % 2]);
}

template <typename T>
__device__ inline void set_pair(Operand<T>& operand, int i, float x, float y) {
    if constexpr (sizeof(T) == 2) {
        operand[i] = pack<T>(x, y);
    } else {
        operand[i / 2 * 4 + i % 2] = __float_as_uint(x);
        operand[i / 2 * 4 + 2 + i % 2] = __float_as_uint(y);
    }
}

// Of what did not come from load_operand: rounded to what the tensor cores multiply.
template <typename T>
__device__ inline void prepare(Operand<T>& operand) {
    if constexpr (std::is_same_v<T, tf32>) {
#pragma unroll
        for (std::uint32_t& bits : operand) bits = tf32_bits(__uint_as_float(bits));
    }
}

// Rows `row` … of one side and elements `k` … of the sum, multiples of 16, from a tile with rows of `length` elements.
// These are the side's rows, or (`across`) the sum's. What depends on the lane is computed once: the chunk, a multiple
// of 2, only changes bits that a lane's own place has to itself.
template <int length, bool across, bool right = false, typename T>
__device__ inline void load_operand(Operand<T>& operand, const T* tile, int row, int k) {
    constexpr int chunks = length / chunk_size<T>;
    const int lane = threadIdx.x % warp_size;
    const int first = lane / 8 % 2, second = lane / 16;  // halves of rows and of the sum, of the lane's own matrix
    if constexpr (sizeof(T) == 2 && across) {
        const int own = chunk_place<T>(chunks, (right ? first : second) * 8 + lane % 8, right ? second : first);
        ldmatrix_x4_trans(operand, tile + k * length + (own ^ row));
    } else if constexpr (sizeof(T) == 2) {
        const int own = chunk_place<T>(chunks, (right ? second : first) * 8 + lane % 8, right ? first : second);
        ldmatrix_x4(operand, tile + row * length + (own ^ k));
    } else {
#pragma unroll
        for (int e = 0; e < 2; ++e) {  // of the pair
            const int own = across ? chunk_place<T>(chunks, lane % 4 * 2 + e, lane / 16) + lane / 4 % 4
                                   : chunk_place<T>(chunks, lane / 4, lane % 4 / 2) + lane % 2 * 2;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int half = i / 2 * 8, lower = i % 2 * 8;
                if constexpr (across) {
                    operand[i / 2 * 4 + 2 * e + i % 2] = tile[(k + half) * length + (own ^ (row + lower))].bits;
                } else if (e == 0) {
                    const T* const from = tile + (row + lower) * length + (own ^ (k + half));
                    const uint2 both = *reinterpret_cast<const uint2*>(from);
                    operand[i / 2 * 4 + i % 2] = both.x, operand[i / 2 * 4 + 2 + i % 2] = both.y;
                }
            }
        }
        prepare<T>(operand);
    }
}

// The right side of a product: the registers of an operand, those side by side that an instruction takes together.
template <typename T>
struct Right {
    Operand<T> registers;

    Right() = default;
    __device__ explicit Right(const Operand<T>& operand) {
#pragma unroll
        for (int i = 0; i < static_cast<int>(2 * sizeof(T)); ++i) {
            registers[i] = operand[sizeof(T) == 2 ? i % 2 * 2 + i / 2 : i];
        }
    }
};

template <int length, bool across, typename T>
__device__ inline void load_right(Right<T>& right, const T* tile, int row, int k) {
    load_operand<length, across, true>(right.registers, tile, row, k);
}

__device__ inline void multiply_tf32(Block& d, const Operand<tf32>& a, const Operand<tf32>& b) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        mma_m16n8k8_tf32(d[0], {a[i], a[i + 1], a[i + 2], a[i + 3]}, {b[i], b[i + 2]});
        mma_m16n8k8_tf32(d[1], {a[i], a[i + 1], a[i + 2], a[i + 3]}, {b[i + 1], b[i + 3]});
    }
}

// What TF32 has of a float, and of what that leaves.
struct Split {
    Operand<tf32> high, low;

    __device__ explicit Split(const Operand<fp32>& operand) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float x = __uint_as_float(operand[i]);
            high[i] = tf32_bits(x);
            low[i] = tf32_bits(x - __uint_as_float(high[i]));
        }
    }
};

// Of float32, three of the four products of the parts; the fourth is below its rounding. The small ones are added first.
template <typename T>
__device__ inline void multiply(Block& d, const Operand<T>& a, const Right<T>& right) {
    const Operand<T>& b = right.registers;
    if constexpr (sizeof(T) == 2) {
        mma_m16n8k16<T>(d[0], a, {b[0], b[1]});
        mma_m16n8k16<T>(d[1], a, {b[2], b[3]});
    } else if constexpr (std::is_same_v<T, tf32>) {
        multiply_tf32(d, a, b);
    } else {
        // The tensor cores cut off what a sum has too many bits for: they make sums of 16 products only.
        const Split x(a), y(b);
        Block sum = {};
        multiply_tf32(sum, x.low, y.high);
        multiply_tf32(sum, x.high, y.low);
        multiply_tf32(sum, x.high, y.high);
#pragma unroll
        for (int e = 0; e < 8; ++e) d[e / 4][e % 4] += sum[e / 4][e % 4];
    }
}

// d's lower rows times low, its upper rows times high.
template <typename T>
__device__ inline void round_block(Operand<T>& operand, const Block& d, float low, float high) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float scale = i % 2 ? high : low;
        set_pair<T>(operand, i, d[i / 2][i % 2 * 2] * scale, d[i / 2][i % 2 * 2 + 1] * scale);
    }
}

// Of the same, what `rounded` left.
template <typename T>
__device__ inline void round_rest(Operand<T>& operand, const Block& d, float low, float high,
                                  const Operand<T>& rounded) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float scale = i % 2 ? high : low;
        const Pair<T> pair = pair_of<T>(rounded, i);
        set_pair<T>(operand, i, d[i / 2][i % 2 * 2] * scale - left_of<T>(pair),
                    d[i / 2][i % 2 * 2 + 1] * scale - right_of<T>(pair));
    }
}

// ---- results ----

// An 8 × 8 block, of which a lane holds the pair of row g and columns 2t and 2t + 1, with rows and columns exchanged.
template <typename T>
__device__ inline Pair<T> exchange(const Pair<T>& pair) {
    if constexpr (sizeof(T) == 2) {
        return transpose_8x8(pair);
    } else {
        const int lane = threadIdx.x % warp_size, from = lane % 4 * 8 + lane / 8;
        const bool right = lane / 4 % 2;
        const uint2 first = {shuffle(pair.x, from), shuffle(pair.y, from)};
        const uint2 second = {shuffle(pair.x, from + 4), shuffle(pair.y, from + 4)};
        return make_uint2(right ? first.y : first.x, right ? second.y : second.x);
    }
}

// A block of a tensor [channels, positions] that a warp holds as an operand: its rows are the positions from `position`
// on, its sum the channels from `channel` on. `turned` becomes its pairs with rows and sum exchanged, channels first.
// `pairs`: two neighbours begin at a multiple of their size.
template <typename T>
__device__ inline void store_turned(T* data, int channels, int positions, int channel, int position, bool pairs,
                                    const Operand<T>& operand, Pairs<T>& turned) {
    const int lane = threadIdx.x % warp_size;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        turned[e] = exchange<T>(pair_of<T>(operand, e));
        const int c = channel + e / 2 * 8 + lane / 4, n = position + e % 2 * 8 + lane % 4 * 2;
        if (c >= channels || n >= positions) continue;
        T* const to = data + static_cast<std::int64_t>(c) * positions + n;
        if (pairs) {
            *reinterpret_cast<Pair<T>*>(to) = turned[e];
        } else {
            to[0] = left_of<T>(turned[e]);
            if (n + 1 < positions) to[1] = right_of<T>(turned[e]);
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

    // Where all of the block is there, and its pairs can be moved, nothing is asked for each of them.
    __device__ bool whole(int row, int column) const {
        return result.pairs && row >= 0 && row + 16 <= rows && column + 16 <= columns;
    }

    template <typename Whole, typename Work>
    __device__ void for_pairs(Whole whole, int row, int column, const Work& work) const {
        const int lane = threadIdx.x % warp_size;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int lower = 0; lower < 2; ++lower) {
                const int r = row + lane / 4 + 8 * lower, c = column + 8 * half + lane % 4 * 2;
                if (whole.value || (r >= 0 && r < rows && c < columns)) work(r, c, half, lower);
            }
        }
    }

    template <typename Whole>
    __device__ void load_pairs(Whole whole, Pairs<T>& kept, int row, int column) const {
        const T* const from = static_cast<const T*>(result.residual) + image * result.residual_batch_stride;
        for_pairs(whole, row, column, [&](int r, int c, int half, int lower) {
            const T* const start = from + r * result.residual_row_stride;
            Pair<T>& both = kept[2 * half + lower];
            if (whole.value || result.pairs) {
                both = *reinterpret_cast<const Pair<T>*>(start + c);
            } else {
                const T* const at = start + c * result.residual_column_stride;
                both = join<T>(at[0], at[c + 1 < columns ? result.residual_column_stride : 0]);
            }
        });
    }

    // The residual is fetched early: many loads are to be under way at once.
    __device__ void load_residual(Pairs<T>& kept, int row, int column) const {
        if (!result.residual) return;
        if (whole(row, column)) load_pairs(std::true_type(), kept, row, column);
        else load_pairs(std::false_type(), kept, row, column);
    }

    template <typename Whole>
    __device__ void store_pairs(Whole whole, Block& x, const Pairs<T>& residual, int row, int column) const {
        if (const T* const bias = static_cast<const T*>(result.bias)) {
            for_pairs(whole, row, column, [&](int r, int c, int half, int lower) {
                x[half][2 * lower] += bias[result.bias_of_rows ? r : c];
                if (whole.value || c + 1 < columns) x[half][2 * lower + 1] += bias[result.bias_of_rows ? r : c + 1];
            });
        }
        if (result.scale) {
            const float scale = *result.scale;
#pragma unroll
            for (int e = 0; e < 8; ++e) x[e / 4][e % 4] *= scale;
        }
        if (result.residual) {
            for_pairs(whole, row, column, [&](int, int, int half, int lower) {
                x[half][2 * lower] += left_of<T>(residual[2 * half + lower]);
                x[half][2 * lower + 1] += right_of<T>(residual[2 * half + lower]);
            });
        }
        T* const to = static_cast<T*>(result.data) + image * result.batch_stride;
        for_pairs(whole, row, column, [&](int r, int c, int half, int lower) {
            const float left = x[half][2 * lower], right = x[half][2 * lower + 1];
            T* const start = to + r * result.row_stride;
            if (whole.value || result.pairs) {
                *reinterpret_cast<Pair<T>*>(start + c) = join<T>(left, right);
            } else {
                T* const at = start + c * result.column_stride;
                *at = static_cast<T>(left);
                if (c + 1 < columns) at[result.column_stride] = static_cast<T>(right);
            }
        });
    }

    // Changes `values`.
    __device__ void store(Block& values, const Pairs<T>& residual, int row, int column) const {
        if (whole(row, column)) store_pairs(std::true_type(), values, residual, row, column);
        else store_pairs(std::false_type(), values, residual, row, column);
    }
};

}  // namespace
}  // namespace sabmn
