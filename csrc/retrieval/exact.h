// Rows as double, and sums over the features in one fixed order: the float64 distances that define the ranking.
//
// Each pair has 16 lane sums: element k goes to lane k mod 16, in the order of k, and the lanes are added in a tree at the
// end. That order is the same for every vector width, and setup.py forbids fused multiply-adds here, so the same pair has
// the same bits everywhere. Rows are padded with zeros to whole lanes; a zero term changes no sum.
//
// Included by the *_cpu.cpp of this folder; a copy for each instruction set (common/isa.h).
#pragma once

#include "retrieval/order.h"
#include "retrieval/retrieval.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace sabmn {
namespace SABMN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int double_width = 8;
#elif defined(__AVX2__)
constexpr int double_width = 4;
#else
constexpr int double_width = 2;
#endif
constexpr int parts = num_lanes / double_width;
typedef double Doubles __attribute__((vector_size(double_width * sizeof(double)), aligned(sizeof(double)), may_alias));
typedef float HalfFloats __attribute__((vector_size(double_width * sizeof(float)), aligned(sizeof(float)), may_alias));

[[maybe_unused]] int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- reading a matrix as double ----

double widen(float value) { return value; }
double widen(double value) { return value; }

struct BFloat16 {
    uint16_t bits;
};
double widen(BFloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    __builtin_memcpy(&result, &bits, sizeof result);
    return result;
}

struct Float16 {
    uint16_t bits;
};
double widen(Float16 value) {
    // The exponent is moved by a multiplication by 2^112, exact for subnormals too; infinity and NaN have their own.
    const bool special = (value.bits & 0x7c00) == 0x7c00;
    const uint32_t bits = (static_cast<uint32_t>(value.bits & 0x7fff) << 13) | (special ? 0x7f800000u : 0u);
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, sizeof magnitude);
    if (!special) magnitude *= 0x1p112f;
    return value.bits & 0x8000 ? -magnitude : magnitude;
}

// `count` elements of one row from `first` on.
template <typename T>
void read_row(const Matrix& matrix, int64_t row, int64_t first, int64_t count, double* out) {
    const T* values = static_cast<const T*>(matrix.data) + row * matrix.row_stride + first * matrix.column_stride;
    if (matrix.column_stride == 1) {
        for (int64_t k = 0; k < count; ++k) out[k] = widen(values[k]);
    } else {
        for (int64_t k = 0; k < count; ++k) out[k] = widen(values[k * matrix.column_stride]);
    }
}

using ReadRow = void(const Matrix&, int64_t, int64_t, int64_t, double*);

[[maybe_unused]] ReadRow* row_reader(DType dtype) {
    switch (dtype) {
        case DType::float32: return read_row<float>;
        case DType::float64: return read_row<double>;
        case DType::bfloat16: return read_row<BFloat16>;
        case DType::float16: return read_row<Float16>;
    }
    return nullptr;
}

// The whole row, padded.
[[maybe_unused]] void load_row(const Matrix& matrix, ReadRow* read, int64_t row, double* out) {
    read(matrix, row, 0, matrix.columns, out);
    for (int64_t k = matrix.columns; k < padded_dim(matrix.columns); ++k) out[k] = 0.0;
}

// ---- sums ----

Doubles load(const double* values) { return *reinterpret_cast<const Doubles*>(values); }
[[maybe_unused]] Doubles load(const float* values) {
#if defined(__AVX512F__)
    return (Doubles)_mm512_maskz_cvtps_pd(-1, _mm256_loadu_ps(values));  // gcc makes five instructions of the other form
#else
    return __builtin_convertvector(*reinterpret_cast<const HalfFloats*>(values), Doubles);
#endif
}

// Σ (q − g)² or Σ q·g of two contiguous rows; `query` is padded. The sums stay in registers: hence no helper takes them.
template <Metric metric, typename T>
double sum(const double* query, const T* gallery, int64_t dim) {
    Doubles sums[parts] = {};
    const int64_t whole = dim / num_lanes * num_lanes;
    T rest[num_lanes] = {};
    for (int64_t k = whole; k < dim; ++k) rest[k - whole] = gallery[k];
    const T* values = gallery;
    for (int64_t k = 0; k < dim; k += num_lanes, values += num_lanes) {
        if (k == whole) values = rest;
#pragma GCC unroll 8
        for (int part = 0; part < parts; ++part) {
            const Doubles q = load(query + k + part * double_width), g = load(values + part * double_width);
            const Doubles difference = q - g;
            sums[part] += metric == Metric::cosine ? q * g : difference * difference;
        }
    }
    double lanes[num_lanes];
#pragma GCC unroll 8
    for (int part = 0; part < parts; ++part) {
        *reinterpret_cast<Doubles*>(lanes + part * double_width) = sums[part];
    }
#pragma GCC unroll 4
    for (int half = num_lanes / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    return lanes[0];
}

// The same of a padded row and a row of a matrix; `scratch` takes what must be read as double first.
template <Metric metric>
double sum_with_row(const double* query, const Matrix& matrix, ReadRow* read, int64_t row, double* scratch) {
    if (matrix.dtype == DType::float32 && matrix.column_stride == 1) {
        const float* values = static_cast<const float*>(matrix.data) + row * matrix.row_stride;
        return sum<metric>(query, values, matrix.columns);
    }
    load_row(matrix, read, row, scratch);
    return sum<metric>(query, scratch, padded_dim(matrix.columns));
}

[[maybe_unused]] double norm(const double* row, int64_t padded) { return __builtin_sqrt(sum<Metric::cosine>(row, row, padded)); }

[[maybe_unused]] double cosine_distance(double dot, double query_norm, double gallery_norm) {
    return 1.0 - dot / (query_norm * gallery_norm);
}

// The distances of one query after the other to rows of a gallery. `rows` has room for two padded rows.
struct ExactDistances {
    const Matrix& query;
    const Matrix& gallery;
    Metric metric;
    double* rows;
    ReadRow* read = row_reader(query.dtype);
    int64_t padded = padded_dim(query.columns);
    double query_norm = 0.0;

    void load_query(int64_t row) {
        load_row(query, read, row, rows);
        if (metric == Metric::cosine) query_norm = norm(rows, padded);
    }

    double operator()(int64_t item) const {
        double* const row = rows + padded;
        if (metric == Metric::squared_euclidean) {
            return sum_with_row<Metric::squared_euclidean>(rows, gallery, read, item, row);
        }
        load_row(gallery, read, item, row);
        return cosine_distance(sum<Metric::cosine>(rows, row, padded), query_norm, norm(row, padded));
    }
};

}  // namespace
}  // namespace SABMN_ISA
}  // namespace sabmn
