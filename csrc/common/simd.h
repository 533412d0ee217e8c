// Vectors of the widest kind that this instruction set has, through the compiler's vector types.
//
// Everything here is `static`: a copy that was compiled for another instruction set must not replace it (isa.h).
#pragma once

#include <cstdint>

namespace sabmn {
namespace SABMN_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <typename T>
struct Simd;
template <>
struct Simd<float> {
    typedef float Vector __attribute__((vector_size(vector_bytes), aligned(4)));
    typedef std::int32_t Bits __attribute__((vector_size(vector_bytes), aligned(4)));
};
template <>
struct Simd<double> {
    typedef double Vector __attribute__((vector_size(vector_bytes), aligned(8)));
    typedef std::int64_t Bits __attribute__((vector_size(vector_bytes), aligned(8)));
};

template <typename T>
using Vector = typename Simd<T>::Vector;
template <typename T>
using VectorBits = typename Simd<T>::Bits;
template <typename T>
constexpr int vector_lanes = vector_bytes / static_cast<int>(sizeof(T));

// The vector at an address, aligned or not.
template <typename T>
static inline Vector<T>& vector_at(T* address) {
    return *reinterpret_cast<Vector<T>*>(address);
}
template <typename T>
static inline Vector<T> vector_at(const T* address) {
    return *reinterpret_cast<const Vector<T>*>(address);
}

// Transposes a square of vectors in place: log2(lanes) rounds that each exchange blocks of twice the size.
template <typename T>
static inline void transpose_square(Vector<T> (&rows)[vector_lanes<T>]) {
    constexpr int width = vector_lanes<T>;
#pragma GCC unroll 4
    for (int size = 1; size < width; size *= 2) {
        VectorBits<T> upper, lower;  // of two rows: what goes to the first, what to the second
        for (int lane = 0; lane < width; ++lane) {
            upper[lane] = lane & size ? width + lane - size : lane;
            lower[lane] = lane & size ? width + lane : lane + size;
        }
#pragma GCC unroll 16
        for (int row = 0; row < width; ++row) {
            if (row & size) continue;
            const Vector<T> first = rows[row], second = rows[row + size];
            rows[row] = __builtin_shuffle(first, second, upper);
            rows[row + size] = __builtin_shuffle(first, second, lower);
        }
    }
}

// to[column][row] = from(row)[column], for row < rows and column < columns; from(row) is the row's address.
template <typename T, typename From>
static inline void transpose(std::int64_t rows, std::int64_t columns, From from, T* to, std::int64_t to_row) {
    constexpr std::int64_t width = vector_lanes<T>;
    std::int64_t row = 0;
    for (; row + width <= rows; row += width) {
        std::int64_t column = 0;
        for (; column + width <= columns; column += width) {
            Vector<T> square[width];
#pragma GCC unroll 16
            for (int i = 0; i < width; ++i) square[i] = vector_at(from(row + i) + column);
            transpose_square<T>(square);
#pragma GCC unroll 16
            for (int i = 0; i < width; ++i) vector_at(to + (column + i) * to_row + row) = square[i];
        }
        for (; column < columns; ++column)
            for (std::int64_t i = 0; i < width; ++i) to[column * to_row + row + i] = from(row + i)[column];
    }
    for (; row < rows; ++row)
        for (std::int64_t column = 0; column < columns; ++column) to[column * to_row + row] = from(row)[column];
}

}  // namespace SABMN_ISA
}  // namespace sabmn
