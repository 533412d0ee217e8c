// The functions of common/ptx.h, operand for operand, in plain C++.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simt/simt.h"

namespace sabmn {

struct bf16;
struct f16;

#if defined(__aarch64__)
using half_float = __fp16;
#else
using half_float = _Float16;
#endif

inline std::uint16_t bf16_bits(float x) {
    const unsigned bits = __float_as_uint(x);
    if (std::isnan(x)) return 0x7fff;
    return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline std::uint16_t f16_bits(float x) {
    return std::isnan(x) ? 0x7fff : simt::bits_of<std::uint16_t>(static_cast<half_float>(x));
}

inline float bf16_value(std::uint16_t bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }
inline float f16_value(std::uint16_t bits) { return static_cast<float>(simt::bits_of<half_float>(bits)); }

template <typename T>
std::uint32_t pack(float low, float high) {
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>, "pack makes bf16 or f16");
    constexpr auto bits = std::is_same_v<T, bf16> ? bf16_bits : f16_bits;
    return bits(low) | static_cast<std::uint32_t>(bits(high)) << 16;
}

template <typename T>
T shuffle_xor(T value, int lane_mask, simt::Site site = simt::Site::here()) {
    return __shfl_xor_sync(0xffffffffu, value, lane_mask, site);
}

template <typename T>
T shuffle_down(T value, unsigned delta, simt::Site site = simt::Site::here()) {
    return __shfl_down_sync(0xffffffffu, value, delta, site);
}

template <typename T>
T shuffle(T value, int lane, simt::Site site = simt::Site::here()) {
    return __shfl_sync(0xffffffffu, value, lane, site);
}

inline void store_shared_16(void* shared, uint4 words) { *static_cast<uint4*>(shared) = words; }

// The source is read now; until the wait the destination holds NaN, whatever stood there before.
inline void cp_async_16(void* shared, const void* global, int bytes = 16, simt::Site site = simt::Site::here()) {
    simt::check_copy(shared, global, bytes, site);
    simt::Copy copy = {static_cast<std::uint32_t*>(shared), {}};
    for (int i = 0; i < bytes; ++i) reinterpret_cast<char*>(copy.data)[i] = static_cast<const char*>(global)[i];
    for (int i = 0; i < 4; ++i) copy.shared[i] = 0xffffffffu;
    simt::start_copy(copy);
}

inline void cp_async_commit() { simt::commit_copies(); }

template <int N>
void cp_async_wait() {
    simt::Copy copy;
    while (simt::land_copy(N, &copy)) {
        for (int i = 0; i < 4; ++i) copy.shared[i] = copy.data[i];
    }
}

// Element (row, column) of matrix `index` stands in the row that lane 8·index + row named.
inline std::uint16_t ldmatrix_element(const char (*rows)[32], int index, int row, int column) {
    return simt::of_lane<std::uint16_t[8]>(rows, 8 * index + row)[column];
}

inline const char (*ldmatrix_rows(const char* what, const void* row, simt::Site site))[32] {
    if (reinterpret_cast<std::uintptr_t>(row) % 16) simt::fail("ldmatrix needs rows at multiples of 16 bytes", site);
    std::uint32_t elements[4];
    for (int i = 0; i < 4; ++i) elements[i] = static_cast<const std::uint32_t*>(row)[i];
    return simt::meet(what, 0xffffffffu, elements, sizeof elements, site);
}

inline void ldmatrix_x4(std::uint32_t (&matrices)[4], const void* row, simt::Site site = simt::Site::here()) {
    const auto rows = ldmatrix_rows("ldmatrix_x4", row, site);
    const int g = simt::lane() / 4, t = simt::lane() % 4;
    for (int i = 0; i < 4; ++i) {
        matrices[i] = ldmatrix_element(rows, i, g, 2 * t) |
                      static_cast<std::uint32_t>(ldmatrix_element(rows, i, g, 2 * t + 1)) << 16;
    }
}

inline void ldmatrix_x4_trans(std::uint32_t (&matrices)[4], const void* row, simt::Site site = simt::Site::here()) {
    const auto rows = ldmatrix_rows("ldmatrix_x4_trans", row, site);
    const int g = simt::lane() / 4, t = simt::lane() % 4;
    for (int i = 0; i < 4; ++i) {
        matrices[i] = ldmatrix_element(rows, i, 2 * t, g) |
                      static_cast<std::uint32_t>(ldmatrix_element(rows, i, 2 * t + 1, g)) << 16;
    }
}

inline std::uint32_t transpose_8x8(std::uint32_t matrix, simt::Site site = simt::Site::here()) {
    const auto all = simt::meet("transpose_8x8", 0xffffffffu, &matrix, sizeof matrix, site);
    const int g = simt::lane() / 4, t = simt::lane() % 4;
    const auto element = [&](int row, int column) {
        return simt::of_lane<std::uint16_t[2]>(all, 4 * row + column / 2)[column % 2];
    };
    return element(2 * t, g) | static_cast<std::uint32_t>(element(2 * t + 1, g)) << 16;
}

// What a tensor core makes of the terms of a sum, products that are exact in double: each is cut off, not rounded, where
// a float as large as the largest of them has its last bit, and so is the sum. A V100 was found to do so, later GPUs to
// keep a bit or two more (Fasi et al., Numerical behavior of NVIDIA tensor cores, PeerJ CS 2021).
template <std::size_t terms>
float tensor_core_sum(const double (&values)[terms]) {
    double largest = 0, plain = 0;
    for (const double value : values) {
        largest = std::max(largest, std::fabs(value));
        plain += value;
    }
    if (!std::isfinite(plain) || largest < 0x1p-100) return static_cast<float>(plain);
    constexpr std::uint64_t exponent = 0x7ffULL << 52, beyond_float = (1ULL << 29) - 1;
    const double last = simt::bits_of<double>(simt::bits_of<std::uint64_t>(largest) & exponent) * 0x1p-23;
    const double times = 1 / last;
    int sum = 0;
    for (const double value : values) sum += static_cast<int>(value * times);
    return static_cast<float>(simt::bits_of<double>(simt::bits_of<std::uint64_t>(sum * last) & ~beyond_float));
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                  simt::Site site = simt::Site::here()) {
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>, "mma_m16n8k16 multiplies bf16 or f16");
    constexpr auto value = std::is_same_v<T, bf16> ? bf16_value : f16_value;
    struct Fragments {
        std::uint16_t a[4][2], b[2][2];
    };
    Fragments mine;
    std::memcpy(mine.a, a, sizeof a);
    std::memcpy(mine.b, b, sizeof b);
    const auto all = simt::meet("mma_m16n8k16", 0xffffffffu, &mine, sizeof mine, site);
    const int g = simt::lane() / 4, t = simt::lane() % 4;
    double terms[4][17];
    for (int k = 0; k < 16; ++k) {
        const int owner = k % 8 / 2, half = k % 2, upper = k / 8;
        const Fragments& rows = simt::of_lane<Fragments>(all, 4 * g + owner);
        for (int column = 0; column < 2; ++column) {
            const float right = value(simt::of_lane<Fragments>(all, 4 * (2 * t + column) + owner).b[upper][half]);
            terms[column][k] = value(rows.a[2 * upper][half]) * right;
            terms[2 + column][k] = value(rows.a[2 * upper + 1][half]) * right;
        }
    }
    for (int i = 0; i < 4; ++i) {
        terms[i][16] = d[i];
        d[i] = tensor_core_sum(terms[i]);
    }
}

inline std::uint32_t tf32_bits(float x) {
    const unsigned bits = __float_as_uint(x);
    return std::isfinite(x) ? (bits + 0x1000) & ~0x1fffu : bits;
}

// The lowest 13 bits of an operand do not count.
inline void mma_m16n8k8_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                             simt::Site site = simt::Site::here()) {
    struct Fragments {
        std::uint32_t a[4], b[2];
    };
    Fragments mine;
    std::memcpy(mine.a, a, sizeof a);
    std::memcpy(mine.b, b, sizeof b);
    const auto all = simt::meet("mma_m16n8k8_tf32", 0xffffffffu, &mine, sizeof mine, site);
    const auto value = [](std::uint32_t bits) { return static_cast<double>(__uint_as_float(bits & ~0x1fffu)); };
    const int g = simt::lane() / 4, t = simt::lane() % 4;
    double terms[4][9];
    for (int k = 0; k < 8; ++k) {
        const int owner = k % 4, upper = k / 4;
        const Fragments& rows = simt::of_lane<Fragments>(all, 4 * g + owner);
        for (int column = 0; column < 2; ++column) {
            const double right = value(simt::of_lane<Fragments>(all, 4 * (2 * t + column) + owner).b[upper]);
            terms[column][k] = value(rows.a[2 * upper]) * right;
            terms[2 + column][k] = value(rows.a[2 * upper + 1]) * right;
        }
    }
    for (int i = 0; i < 4; ++i) {
        terms[i][8] = d[i];
        d[i] = tensor_core_sum(terms[i]);
    }
}

inline float exp2_approx(float x) {
    const float result = std::exp2(x);
    return result < 0x1p-126f ? 0.0f : result;
}

}  // namespace sabmn
