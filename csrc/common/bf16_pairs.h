// Pairs of bfloat16 and the instruction that multiplies them (AVX512-BF16): to a sum of float32 it adds the products of
// the first and of the second numbers of two pairs. Numbers under 2^-126 count as 0 for it.
#pragma once

#include "common/half.h"
#include "common/simd.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace sabmn {
namespace SABMN_ISA {

struct Pair {
    BFloat16 first, second;  // neighbours along the depth of a product
};

// What products of T are summed in.
template <typename T>
struct SumOf {
    typedef T Type;
};
template <>
struct SumOf<Pair> {
    typedef float Type;
};
template <typename T>
using Sum = typename SumOf<T>::Type;

#if defined(__AVX512BF16__)

template <>
struct Simd<Pair> {
    typedef std::int32_t Vector __attribute__((vector_size(vector_bytes), aligned(2), may_alias));
    typedef std::int32_t Bits __attribute__((vector_size(vector_bytes)));
};

static inline void add_product(Vector<float>& sum, Vector<Pair> left, Vector<Pair> right) {
    sum = (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
}
static inline void add_product(Vector<float>& sum, Pair factor, Vector<Pair> right) {
    std::int32_t bits;
    __builtin_memcpy(&bits, &factor, sizeof bits);
    add_product(sum, Vector<Pair>{} + bits, right);
}

// Two vectors rounded to nearest even, one after the other.
typedef std::int16_t Rounded __attribute__((vector_size(vector_bytes)));
static inline Rounded rounded(Vector<float> first, Vector<float> second) {
    return (Rounded)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
// The same as pairs of first and second numbers.
static inline Vector<Pair> pairs_of(Rounded both) {
    const Rounded turns = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (Vector<Pair>)__builtin_shuffle(both, turns);
}
static inline Vector<Pair> pairs_of(Vector<float> first, Vector<float> second) {
    return pairs_of(rounded(first, second));
}

#endif

}  // namespace SABMN_ISA
}  // namespace sabmn
