// The product of two packed panels, float32 or double: outer products whose sums stay in registers.
//
// Included by the *_cpu.cpp of this folder; a copy for each instruction set (common/isa.h).
#pragma once

#include "retrieval/exact.h"

namespace sabmn {
namespace SABMN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64, panel_rows = 12, panel_vectors = 2;  // 24 of 32 registers are sums
#elif defined(__AVX2__)
constexpr int vector_bytes = 32, panel_rows = 6, panel_vectors = 2;  // 12 of 16
#elif defined(__aarch64__)
constexpr int vector_bytes = 16, panel_rows = 8, panel_vectors = 3;  // 24 of 32
#else
constexpr int vector_bytes = 16, panel_rows = 4, panel_vectors = 2;  // 8 of 16
#endif
template <typename T>
constexpr int panel_columns = panel_vectors * vector_bytes / static_cast<int>(sizeof(T));

typedef float Floats __attribute__((vector_size(vector_bytes), aligned(sizeof(float)), may_alias));
template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
    using type = Floats;
};
template <>
struct VectorOf<double> {
    using type = Doubles;
};

[[maybe_unused]] Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

[[maybe_unused]] Doubles multiply_add(Doubles a, Doubles b, Doubles c) {
#if defined(__AVX512F__)
    return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
    return (Doubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
    return (Doubles)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
    return a * b + c;
#endif
}

// product[i][j] = Σ_k rows[k][i] columns[k][j] for one panel of each side, `depth` long, or, if `add`, that much more. `fused`:
// multiplication and addition in one rounding, where the processor has that.
template <bool fused, typename T>
void multiply_panels(const T* rows, const T* columns, int64_t depth, T* product, int64_t stride, bool add) {
    using Vector = typename VectorOf<T>::type;
    constexpr int width = vector_bytes / static_cast<int>(sizeof(T)), num_columns = panel_columns<T>;
    Vector sums[panel_rows][panel_vectors] = {};
    for (int64_t k = 0; k < depth; ++k) {
        Vector column[panel_vectors];
#pragma GCC unroll 4
        for (int j = 0; j < panel_vectors; ++j) {
            column[j] = *reinterpret_cast<const Vector*>(columns + k * num_columns + j * width);
        }
#pragma GCC unroll 16
        for (int i = 0; i < panel_rows; ++i) {
            const Vector row = rows[k * panel_rows + i] - Vector{};
#pragma GCC unroll 4
            for (int j = 0; j < panel_vectors; ++j) {
                if constexpr (fused) {
                    sums[i][j] = multiply_add(row, column[j], sums[i][j]);
                } else {
                    sums[i][j] += row * column[j];
                }
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < panel_rows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < panel_vectors; ++j) {
            Vector* out = reinterpret_cast<Vector*>(product + i * stride + j * width);
            *out = add ? *out + sums[i][j] : sums[i][j];
        }
    }
}

}  // namespace
}  // namespace SABMN_ISA
}  // namespace sabmn
