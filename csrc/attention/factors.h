// What the products of self-attention multiply. A tile is the right operand with its rows as the depth; the left one is
// a matrix with its columns as the depth, or a tile again. As numbers of the wide type they are the same thing; as
// pairs, neighbouring rows or neighbouring columns are one factor, and what is missing at an odd end is 0.
#pragma once

#include <type_traits>

#include "common/bf16_pairs.h"
#include "attention/exponential.h"
#include "common/product.h"
#include "attention/tiles.h"

namespace sabmn {
namespace SABMN_ISA {

// The one place that decides which product runs: pairs for bfloat16 where there is an instruction for them.
template <typename T>
struct FactorOf {
    typedef Wide<T> Type;
    static constexpr std::int64_t terms = 1;
};
#if defined(__AVX512BF16__)
template <>
struct FactorOf<BFloat16> {
    typedef Pair Type;
    static constexpr std::int64_t terms = 2;
};
#endif
template <typename T>
using Factor = typename FactorOf<T>::Type;
template <typename T>
constexpr bool in_pairs = FactorOf<T>::terms == 2;
// How well the powers of a softmax are computed that become factors.
template <typename T>
using Powers = std::conditional_t<in_pairs<T>, RoughExponential, Exponential<Wide<T>>>;
// One term of a factor.
template <typename T>
using Term = std::conditional_t<in_pairs<T>, T, Wide<T>>;

// Factors along so many terms.
template <typename T>
static inline std::int64_t steps(std::int64_t terms) {
    return blocks_of(terms, FactorOf<T>::terms);
}

template <typename T>
static inline Factor<T>* take_factors(Arena<Wide<T>>& arena, std::int64_t count) {
    static_assert(sizeof(Factor<T>) == sizeof(Wide<T>), "the workspace is counted in the wide type");
    return reinterpret_cast<Factor<T>*>(arena.take(count));
}

// Space for the factors that a tile of results becomes: its own, but for pairs.
template <typename T>
static inline Factor<T>* take_factors_of(Arena<Wide<T>>& arena, Wide<T>* tile, std::int64_t count) {
    if constexpr (in_pairs<T>) return take_factors<T>(arena, count);
    else return tile;
}

// ---- pairs along the rows ----

static inline void interleave(const BFloat16* first, const BFloat16* second, std::int64_t count, Pair* to) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = {first[i], second ? second[i] : BFloat16{0}};
}

// tile[row / 2][i] = (matrix[row][i], matrix[row + 1][i]) for i < count, then zeros up to `filled`.
template <typename T>
static void load_tile(const T* matrix, std::int64_t rows, std::int64_t row_length, std::int64_t count, Pair* tile,
                      std::int64_t tile_row = lanes, std::int64_t filled = lanes) {
    for (std::int64_t row = 0; row < rows; row += 2, matrix += 2 * row_length, tile += tile_row) {
        if (row + 1 == rows) interleave(matrix, nullptr, count, tile);
        else if (count == lanes) interleave(matrix, matrix + row_length, lanes, tile);
        else interleave(matrix, matrix + row_length, count, tile);
        for (std::int64_t i = count; i < filled; ++i) tile[i] = {};
    }
}

// Channels of a window.
template <typename T>
static void load_factors(const Window<T>& window, std::int64_t first_channel, std::int64_t channels, Wide<T>* tile) {
    window.load(first_channel, channels, tile);
}
template <typename T>
static void load_factors(const Window<T>& window, std::int64_t first_channel, std::int64_t channels, Pair* tile) {
    const T* const from = window.base + first_channel * window.channel_stride;
    if (window.contiguous())
        return load_tile<T>(from + window.offset[0], channels, window.channel_stride, window.count, tile);
    std::int64_t channel = 0;
    if (window.channel_stride == 1) {  // the pairs are there
        channel = channels / 2 * 2;
        const auto pairs = [&](std::int64_t lane) { return reinterpret_cast<const Pair*>(from + window.offset[lane]); };
        transpose<Pair>(window.count, channels / 2, pairs, tile, lanes);
    }
    for (; channel < channels; channel += 2)
        for (std::int64_t lane = 0; lane < window.count; ++lane) {
            const T* const at = from + channel * window.channel_stride + window.offset[lane];
            tile[channel / 2 * lanes + lane] = {at[0], channel + 1 < channels ? at[window.channel_stride] : T{0}};
        }
    for (std::int64_t pair = 0; pair < steps<T>(channels); ++pair)
        for (std::int64_t lane = window.count; lane < lanes; ++lane) tile[pair * lanes + lane] = {};
}

// A tile of results as the right operand of a product: where it stands, or rounded to pairs in `to`.
template <typename T>
static const Factor<T>* tile_factors(std::int64_t rows, std::int64_t columns, const Wide<T>* tile, Factor<T>* to) {
    if constexpr (in_pairs<T>) {
        each_vector<Wide<T>>(steps<T>(rows), columns, [=](std::int64_t pair, std::int64_t lane, std::int64_t at) {
            const Wide<T>* const first = tile + 2 * pair * lanes + lane;
            const Vector<Wide<T>> second = 2 * pair + 1 < rows ? vector_at(first + lanes) : Vector<Wide<T>>{};
            vector_at(to + at) = pairs_of(vector_at(first), second);
        });
        return to;
    } else {
        return tile;
    }
}

// ---- pairs along the columns ----

// to[row][0 … steps(count)) = matrix[row]; rows are row_length and to_row apart.
template <typename T>
static void load_rows(const T* matrix, std::int64_t rows, std::int64_t row_length, std::int64_t count, Wide<T>* to,
                      std::int64_t to_row) {
    load_tile<T>(matrix, rows, row_length, count, to, to_row, count);
}
template <typename T>
static void load_rows(const T* matrix, std::int64_t rows, std::int64_t row_length, std::int64_t count, Pair* to,
                      std::int64_t to_row) {
    for (std::int64_t row = 0; row < rows; ++row, matrix += row_length, to += to_row) {
        __builtin_memcpy(to, matrix, count * sizeof(T));
        if (count % 2) to[count / 2].second = {};
    }
}

// Positions of the channels of a window as the depth of a left operand: where they stand, or a copy in `tile`.
template <typename T>
static Left<Wide<T>> left_factors(const Window<T>& window, std::int64_t first_channel, std::int64_t channels,
                                  Wide<T>* tile) {
    if constexpr (sizeof(T) == sizeof(Wide<T>)) {
        const T* const start = window.base + first_channel * window.channel_stride + window.offset[0];
        if (window.uniform) return {start, window.channel_stride, window.step()};
    }
    window.load(first_channel, channels, tile, chunk);
    return {tile, chunk, 1};
}
template <typename T>
static Left<Pair> left_factors(const Window<T>& window, std::int64_t first_channel, std::int64_t channels, Pair* tile) {
    const T* const from = window.base + first_channel * window.channel_stride;
    const std::int64_t count = window.count, stride = window.channel_stride;
    if (window.contiguous()) {
        const T* const start = from + window.offset[0];
        if (count % 2 == 0 && stride % 2 == 0) return {reinterpret_cast<const Pair*>(start), stride / 2, 1};
        load_rows<T>(start, channels, stride, count, tile, chunk / 2);
        return {tile, chunk / 2, 1};
    }
    for (std::int64_t lane = 0; lane < count; lane += 2) {
        const T* const first = from + window.offset[lane];
        const T* const second = lane + 1 < count ? from + window.offset[lane + 1] : nullptr;
        Pair* const to = tile + lane / 2 * lanes;
        if (stride == 1)
            interleave(first, second, channels, to);
        else
            for (std::int64_t c = 0; c < channels; ++c)
                to[c] = {first[c * stride], second ? second[c * stride] : T{0}};
    }
    return {tile, 1, lanes};
}

// The weights [rows][columns] as a left operand [rows][steps(columns)]: where they stand, or a copy in `memory`.
template <typename T>
static const Factor<T>* weight_factors(const AttentionInputs& in, const void* weights, std::int64_t rows,
                                       std::int64_t columns, Arena<Wide<T>>& memory) {
    const T* const from = static_cast<const T*>(weights);
    if (!weights || (sizeof(T) * FactorOf<T>::terms == sizeof(Factor<T>) && columns % FactorOf<T>::terms == 0))
        return reinterpret_cast<const Factor<T>*>(from);
    Factor<T>* const to = take_factors<T>(memory, rows * steps<T>(columns));
#pragma omp parallel for num_threads(in.threads)
    for (std::int64_t row = 0; row < rows; ++row)
        load_rows<T>(from + row * columns, 1, columns, columns, to + row * steps<T>(columns), steps<T>(columns));
    return to;
}

}  // namespace SABMN_ISA
}  // namespace sabmn
