// The exponential on vectors, for the softmax: e^x for x ≤ 0.
#pragma once

#include "common/simd.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace sabmn {
namespace SABMN_ISA {

#if defined(__AVX512F__)
constexpr bool scales_subnormals = true;  // by vscalefps; elsewhere 2^n is added to the exponent's bits
#else
constexpr bool scales_subnormals = false;
#endif

template <typename T>
struct Exponential;
template <>
struct Exponential<float> {
    // 2^r = 1 + r·(…) for |r| ≤ ½: the least largest relative error of such a polynomial, 9.2e-8; with the rounding of
    // its evaluation the error is under 2^-22.
    static constexpr float terms[] = {1.0f, 0.6931470036506653f, 0.24022242426872253f, 0.05550733581185341f,
                                      0.009671512991189957f, 0.001326472731307149f};
    static constexpr float rounder = 12582912.0f;  // 1.5 · 2^23
    static constexpr float lowest = scales_subnormals ? -110.0f : -87.0f;
    static constexpr int mantissa = 23;
};
// For what will be rounded to bfloat16, which errs by 2^-9: three terms, of the same kind; under 2^-13.
struct RoughExponential : Exponential<float> {
    static constexpr float terms[] = {1.0f, 0.6932829022407532f, 0.24221095442771912f, 0.05500892922282219f};
};
template <>
struct Exponential<double> {
    // Taylor's series, (ln 2)^k / k!; its error is under 1e-17, with rounding under 2^-51.
    static constexpr double terms[] = {1.0,
                                       0.6931471805599453,
                                       0.2402265069591007,
                                       0.05550410866482158,
                                       0.009618129107628477,
                                       0.0013333558146428443,
                                       0.0001540353039338161,
                                       1.5252733804059841e-05,
                                       1.321548679014431e-06,
                                       1.01780860092397e-07,
                                       7.0549116208011235e-09,
                                       4.4455382718708116e-10,
                                       2.5678435993488206e-11,
                                       1.3691488853904128e-12};
    static constexpr double rounder = 6755399441055744.0;  // 1.5 · 2^52
    static constexpr double lowest = scales_subnormals ? -750.0 : -708.0;
    static constexpr int mantissa = 52;
};

// The greater of the two, b where one is NaN.
template <typename T>
static inline Vector<T> greater(Vector<T> a, Vector<T> b) {
#if defined(__AVX512F__)  // of the comparison below the compiler makes two instructions where a is a constant
    if constexpr (sizeof(T) == 4) return (Vector<T>)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
    else return (Vector<T>)_mm512_maskz_max_pd(0xff, (__m512d)a, (__m512d)b);
#else
    return a > b ? a : b;
#endif
}

// e^x for x ≤ 0, with a relative error under 2^-22 + |x|·2^-25 (2^-50 + |x|·2^-53 in double; |x|·2^-23 and |x|·2^-51
// where there is no fused multiply-add; 2^-13 for 2^-22 where it is rough): with n the integer nearest to x·log2 e and
// r = x·log2 e − n, 2^r by a polynomial, times 2^n. e^0 is 1 exactly, which makes one-hot rows exact. 0 below the smallest
// normal number or, with AVX-512, below the smallest subnormal one; NaN stays NaN.
template <typename T, typename E = Exponential<T>>
static inline Vector<T> exponential(Vector<T> x) {
    constexpr T log2_e = static_cast<T>(1.4426950408889634);
    constexpr int degree = sizeof(E::terms) / sizeof(T) - 1;
    const Vector<T> bounded = greater<T>(Vector<T>{} + E::lowest, x);  // a larger |x| would leave no r; NaN passes
    const Vector<T> shifted = bounded * log2_e + E::rounder;
    const Vector<T> n = shifted - E::rounder;
    const Vector<T> r = bounded * log2_e - n;
    Vector<T> sum = r * E::terms[degree] + E::terms[degree - 1];
#pragma GCC unroll 16
    for (int k = degree - 2; k >= 0; --k) sum = sum * r + E::terms[k];
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return (Vector<T>)_mm512_maskz_scalef_ps(0xffff, (__m512)sum, (__m512)n);
    else return (Vector<T>)_mm512_maskz_scalef_pd(0xff, (__m512d)sum, (__m512d)n);
#else
    using Bits = VectorBits<T>;
    const Bits exponent = ((Bits)shifted - (Bits)(Vector<T>{} + E::rounder)) << E::mantissa;
    return (Vector<T>)(((Bits)sum + exponent) & ~(x < E::lowest));
#endif
}

}  // namespace SABMN_ISA
}  // namespace sabmn
