// Spectral normalisation on the CPU. One thread works on one weight; the weights are handed out longest first, so that the
// last ones to finish are short. Norms are summed in double: in float they would overflow near |W| = 1e19.

#include <cmath>
#include <cstdint>

#include "spectral_norm/spectral_norm.h"

namespace sabmn {
namespace SABMN_ISA {
namespace {

using std::int64_t;

template <typename T>
T dot(const T* a, const T* b, int64_t n) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

template <typename T>
double norm(const T* a, int64_t n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(a[i]);
    return __builtin_sqrt(sum);
}

template <typename T>
void scale(const T* a, T* out, double factor, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(a[i] * factor);
}

// out = W v
template <typename T>
void times_vector(const T* w, const T* v, T* out, int64_t rows, int64_t columns) {
    for (int64_t row = 0; row < rows; ++row) out[row] = dot(w + row * columns, v, columns);
}

// out = Wᵀ u, four rows at a time so that `out` is read and written a quarter as often
template <typename T>
void transposed_times_vector(const T* w, const T* u, T* out, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < columns; ++i) out[i] = 0;
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) {
        const T *w0 = w + row * columns, *w1 = w0 + columns, *w2 = w1 + columns, *w3 = w2 + columns;
        const T u0 = u[row], u1 = u[row + 1], u2 = u[row + 2], u3 = u[row + 3];
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) out[i] += (u0 * w0[i] + u1 * w1[i]) + (u2 * w2[i] + u3 * w3[i]);
    }
    for (; row < rows; ++row) {
        const T* w0 = w + row * columns;
        const T u0 = u[row];
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) out[i] += u0 * w0[i];
    }
}

// a ← a / max(‖a‖, eps); returns ‖a‖
template <typename T>
double normalize(T* a, int64_t n, double eps) {
    const double length = norm(a, n);
    scale(a, a, 1.0 / (length > eps ? length : eps), n);
    return length;
}

template <typename T>
T forward_one(const SpectralNormForwardMatrix& m, int iterations, double eps) {
    const T* w = static_cast<const T*>(m.weight);
    T* u = static_cast<T*>(m.u_new);
    T* v = static_cast<T*>(m.v_new);
    for (int64_t i = 0; i < m.rows; ++i) u[i] = static_cast<const T*>(m.u)[i];
    for (int64_t i = 0; i < m.columns; ++i) v[i] = static_cast<const T*>(m.v)[i];
    double sigma = 0;
    for (int iteration = 0; iteration < iterations; ++iteration) {
        times_vector(w, v, u, m.rows, m.columns);
        normalize(u, m.rows, eps);
        transposed_times_vector(w, u, v, m.rows, m.columns);
        const double length = normalize(v, m.columns, eps);
        // σ = uᵀWv = (Wᵀu)·v = ‖Wᵀu‖² / max(‖Wᵀu‖, eps): no third product.
        sigma = length > eps ? length : length * (length / eps);
    }
    if (iterations == 0) {
        for (int64_t row = 0; row < m.rows; ++row) {
            sigma += static_cast<double>(u[row]) * static_cast<double>(dot(w + row * m.columns, v, m.columns));
        }
    }
    const T rounded = static_cast<T>(sigma);
    scale(w, static_cast<T*>(m.normalized), 1.0 / static_cast<double>(rounded), m.rows * m.columns);
    return rounded;
}

template <typename T>
void backward_one(const SpectralNormBackwardMatrix& m, double sigma) {
    const T* gradient = static_cast<const T*>(m.gradient);
    const T* w = static_cast<const T*>(m.weight);
    const T* u = static_cast<const T*>(m.u);
    const T* v = static_cast<const T*>(m.v);
    T* out = static_cast<T*>(m.weight_gradient);
    double inner = 0;  // ⟨G, W⟩
    for (int64_t row = 0; row < m.rows; ++row) {
        inner += static_cast<double>(dot(gradient + row * m.columns, w + row * m.columns, m.columns));
    }
    const double along = inner / sigma;
    const T inverse = static_cast<T>(1.0 / sigma);
    for (int64_t row = 0; row < m.rows; ++row) {
        const T* g = gradient + row * m.columns;
        T* o = out + row * m.columns;
        const T factor = static_cast<T>(along * static_cast<double>(u[row]));
#pragma omp simd
        for (int64_t i = 0; i < m.columns; ++i) o[i] = (g[i] - factor * v[i]) * inverse;
    }
}

}  // namespace

int spectral_norm_forward(const SpectralNormForwardMatrix* matrices, int64_t count, void* sigma, int iterations,
                          double eps, DType dtype, int threads) {
    if (dtype != DType::float32 && dtype != DType::float64) return unsupported_dtype;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < count; ++i) {
        if (dtype == DType::float32) {
            static_cast<float*>(sigma)[i] = forward_one<float>(matrices[i], iterations, eps);
        } else {
            static_cast<double*>(sigma)[i] = forward_one<double>(matrices[i], iterations, eps);
        }
    }
    return ok;
}

int spectral_norm_backward(const SpectralNormBackwardMatrix* matrices, int64_t count, const void* sigma, DType dtype,
                           int threads) {
    if (dtype != DType::float32 && dtype != DType::float64) return unsupported_dtype;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < count; ++i) {
        if (dtype == DType::float32) {
            backward_one<float>(matrices[i], static_cast<const float*>(sigma)[i]);
        } else {
            backward_one<double>(matrices[i], static_cast<const double*>(sigma)[i]);
        }
    }
    return ok;
}

}  // namespace SABMN_ISA
}  // namespace sabmn
