// Spectral normalisation on the GPU against its formulas in float64: every pair of types, odd sizes, layouts, scales,
// clamps.

#include <deque>

#include "simt/test.h"
#include "spectral_norm/spectral_norm_cuda.h"

namespace {

using namespace sabmn;
using simt::Buffer;
using simt::expect;
using std::int64_t;

template <typename Weight, typename Normalized>
struct Types {
    using T = Weight;
    using O = Normalized;
    using S = std::conditional_t<std::is_same_v<T, double>, double, float>;
};
#define EVERY_TYPE                                                                                        \
    Types<float, float>, Types<float, bf16>, Types<float, f16>, Types<double, double>, Types<bf16, bf16>, \
        Types<f16, f16>

template <typename T>
constexpr DType dtype = std::is_same_v<T, double>  ? DType::float64
                        : std::is_same_v<T, float> ? DType::float32
                        : std::is_same_v<T, bf16>  ? DType::bfloat16
                                                   : DType::float16;

struct Shape {
    int64_t rows, columns, inner;
    int64_t element(int64_t m) const { return m % inner * (columns / inner) + m / inner; }
};

// The definition, in S: u, v (in the order of v) and σ after some iterations.
template <typename S>
struct Iteration {
    std::vector<S> u, v;
    S sigma = 0;

    template <typename W, typename V>
    Iteration(const Shape& shape, const W& w, const V& u0, const V& v0, int iterations, S eps)
        : u(u0.begin(), u0.end()), v(v0.begin(), v0.end()) {
        const auto at = [&](int64_t row, int64_t m) { return static_cast<S>(w[row * shape.columns + m]); };
        const auto times_v = [&](int64_t row) {
            S sum = 0;
            for (int64_t m = 0; m < shape.columns; ++m) sum += at(row, m) * v[shape.element(m)];
            return sum;
        };
        const auto normalize = [&](std::vector<S>& x) {
            double squares = 0;
            for (const double y : x) squares += y * y;
            for (S& y : x) y /= std::max(static_cast<S>(std::sqrt(squares)), eps);
        };
        for (int i = 0; i < iterations; ++i) {
            for (int64_t row = 0; row < shape.rows; ++row) u[row] = times_v(row);
            normalize(u);
            for (int64_t m = 0; m < shape.columns; ++m) {
                S sum = 0;
                for (int64_t row = 0; row < shape.rows; ++row) sum += at(row, m) * u[row];
                v[shape.element(m)] = sum;
            }
            normalize(v);
        }
        for (int64_t row = 0; row < shape.rows; ++row) sigma += u[row] * times_v(row);
    }
};

// A weight with all that a forward and a backward pass need. `offset` elements before W and Ŵ spoil their alignment.
template <typename Pair>
struct Weight {
    using T = typename Pair::T;
    using O = typename Pair::O;
    Shape shape;
    int offset;
    Buffer<T> w, u, v, u_new, v_new, weight_gradient;
    Buffer<O> normalized, gradient;

    explicit Weight(const Shape& shape, double scale = 1, int offset = 0)
        : shape(shape),
          offset(offset),
          w(simt::random<T>(size(), -scale, scale)),
          u(simt::random<T>(shape.rows)),
          v(simt::random<T>(shape.columns)),
          u_new(shape.rows),
          v_new(shape.columns),
          weight_gradient(size()),
          normalized(size()),
          gradient(simt::random<O>(size())) {
        // Near the singular vectors, as in training: elsewhere σ may vanish, and everything is ill-conditioned.
        const Iteration<double> near(shape, values(w), u, v, 2, 0);
        for (int64_t i = 0; i < shape.rows; ++i) u[i] = static_cast<T>(near.u[i]);
        for (int64_t i = 0; i < shape.columns; ++i) v[i] = static_cast<T>(near.v[i]);
    }
    int64_t size() const { return shape.rows * shape.columns + offset; }
    template <typename E>
    std::vector<E> values(const Buffer<E>& buffer) const {
        return {buffer.begin() + offset, buffer.end()};
    }
    SpectralNormForwardMatrix forward(int64_t index) const {
        return {w.data() + offset, u.data(),     v.data(),   normalized.data() + offset,
                u_new.data(),      v_new.data(), shape.rows, shape.columns,
                shape.inner,       index};
    }
    SpectralNormBackwardMatrix backward(int64_t index) const {
        return {gradient.data() + offset,
                w.data() + offset,
                u_new.data(),
                v_new.data(),
                weight_gradient.data() + offset,
                shape.rows,
                shape.columns,
                shape.inner,
                index};
    }
};

// Ours against what S and double make of the same formula, everything measured in units of `unit`.
template <typename E, typename S>
void compare(const std::string& what, const Shape& shape, const std::vector<E>& ours, const std::vector<S>& computed,
             std::vector<double> reference, double unit) {
    std::vector<double> scaled(ours.begin(), ours.end()), plain;
    for (const S x : computed) plain.push_back(static_cast<double>(static_cast<E>(x)) / unit);
    for (double& x : scaled) x /= unit;
    for (double& x : reference) x /= unit;
    simt::compare_by_rule(what + " of " + std::to_string(shape.rows) + " x " + std::to_string(shape.columns), scaled,
                          plain, reference, simt::epsilon<E>(), std::is_same_v<E, double>);
}

template <typename E>
double largest(const std::vector<E>& values) {
    double result = 0;
    for (const E x : values) result = std::max(result, std::fabs(static_cast<double>(x)));
    return result;
}

template <typename Pair>
class Batch {
  public:
    using T = typename Pair::T;
    using O = typename Pair::O;
    using S = typename Pair::S;
    std::deque<Weight<Pair>> weights;
    Buffer<S> sigma;

    explicit Batch(const std::vector<Shape>& shapes, double scale = 1, int offset = 0) : sigma(shapes.size()) {
        for (const Shape& shape : shapes) weights.emplace_back(shape, scale, offset);
    }

    void forward(int iterations, double eps) const {
        std::vector<SpectralNormForwardMatrix> matrices;
        for (const auto& weight : weights) matrices.push_back(weight.forward(matrices.size()));
        const Buffer<unsigned char> workspace(bytes().forward);
        expect(spectral_norm_forward_cuda(matrices.data(), matrices.size(), sigma.data(), iterations, eps, dtype<T>,
                                          dtype<O>, workspace.data(), nullptr) == ok,
               "the forward pass failed");
    }

    void backward() const {
        std::vector<SpectralNormBackwardMatrix> matrices;
        for (const auto& weight : weights) matrices.push_back(weight.backward(matrices.size()));
        const Buffer<unsigned char> workspace(bytes().backward);
        expect(spectral_norm_backward_cuda(matrices.data(), matrices.size(), sigma.data(), dtype<T>, dtype<O>,
                                           workspace.data(), nullptr) == ok,
               "the backward pass failed");
    }

    void check_forward(int iterations, double eps) const {
        for (std::size_t i = 0; i < weights.size(); ++i) {
            const Weight<Pair>& weight = weights[i];
            const std::vector<T> w = weight.values(weight.w);
            const Iteration<S> plain(weight.shape, w, weight.u, weight.v, iterations, static_cast<S>(eps));
            const Iteration<double> exact(weight.shape, w, weight.u, weight.v, iterations, eps);
            const auto part = [&](const std::string& name, const auto& ours, const auto& computed,
                                  const auto& reference) {
                compare(name, weight.shape, ours, computed, reference, largest(reference));
            };
            part("u", std::vector<T>(weight.u_new.begin(), weight.u_new.end()), plain.u, exact.u);
            part("v", std::vector<T>(weight.v_new.begin(), weight.v_new.end()), plain.v, exact.v);
            part("sigma", std::vector<S>{sigma[i]}, std::vector<S>{plain.sigma}, std::vector<double>{exact.sigma});
            part("normalized", weight.values(weight.normalized), divided(w, plain.sigma), divided(w, exact.sigma));
        }
    }

    void check_backward() const {
        for (std::size_t i = 0; i < weights.size(); ++i) {
            const Weight<Pair>& weight = weights[i];
            compare("gradient", weight.shape, weight.values(weight.weight_gradient), gradient<S>(weight, sigma[i]),
                    gradient<double>(weight, sigma[i]),
                    largest(weight.values(weight.gradient)) / std::fabs(double(sigma[i])));
        }
    }

  private:
    template <typename R>
    static std::vector<R> divided(const std::vector<T>& w, R sigma) {
        std::vector<R> out;
        for (const T x : w) out.push_back(x / sigma);
        return out;
    }

    // The formula of dW, in R.
    template <typename R>
    static std::vector<R> gradient(const Weight<Pair>& weight, R sigma) {
        const Shape& shape = weight.shape;
        const std::vector<R> w(weight.w.begin() + weight.offset, weight.w.end());
        std::vector<R> out(weight.gradient.begin() + weight.offset, weight.gradient.end());
        R along = 0;
        for (std::size_t k = 0; k < w.size(); ++k) along += out[k] * w[k];
        for (std::size_t k = 0; k < w.size(); ++k) {
            const R u = weight.u_new[k / shape.columns], v = weight.v_new[shape.element(k % shape.columns)];
            out[k] = (out[k] - along / sigma * u * v) / sigma;
        }
        return out;
    }

    SpectralNormCudaBytes bytes() const {
        std::vector<int64_t> rows, columns;
        for (const auto& weight : weights) rows.push_back(weight.shape.rows), columns.push_back(weight.shape.columns);
        return spectral_norm_cuda_workspace(rows.data(), columns.data(), weights.size(), dtype<T>);
    }
};

template <typename Pair>
void check(const Batch<Pair>& batch, int iterations, double eps = 1e-12) {
    batch.forward(iterations, eps);
    batch.check_forward(iterations, eps);
    batch.backward();
    batch.check_backward();
}

// A scalar, a row, a column, primes, several blocks of rows, aligned rows, and two channels_last convolutions.
const std::vector<Shape> shapes = {{1, 1, 1},    {1, 37, 37}, {41, 1, 1},  {131, 67, 67},
                                   {37, 64, 64}, {21, 27, 3}, {34, 48, 16}};

}  // namespace

SIMT_TEST(spectral_norm_types, EVERY_TYPE) {
    for (const int iterations : {0, 1}) check(Batch<T>(shapes), iterations);
}

SIMT_TEST(spectral_norm_iterations, Types<float, float>, Types<double, double>) { check(Batch<T>(shapes), 3); }

SIMT_TEST(spectral_norm_unaligned, Types<float, float>, Types<bf16, bf16>) {
    check(Batch<T>({{35, 64, 64}, {9, 48, 16}}, 1, 1), 1);
}

// More than the part of v that is in shared memory at a time.
SIMT_TEST(spectral_norm_long_rows, Types<double, double>) { check(Batch<T>({{9, 2311, 2311}, {2, 2340, 260}}), 1); }

// Where WᵀW is beyond float; and below eps, where the lengths are clamped and u and v are no unit vectors.
SIMT_TEST(spectral_norm_scales, Types<float, float>, Types<double, double>, Types<bf16, bf16>) {
    struct Scale {
        double scale, eps;
    };
    for (const auto [scale, eps] : {Scale{1e-25, 1e-35}, Scale{1e-15, 1e-12}, Scale{1e15, 1e-12}, Scale{1e25, 1e-12}}) {
        for (const int iterations : {0, 2}) check(Batch<T>({{33, 70, 70}}, scale), iterations, eps);
    }
}

// More than one launch holds; the sizes are drawn.
SIMT_TEST(spectral_norm_groups, Types<float, float>) {
    std::vector<Shape> many;
    for (int i = 0; i < 66; ++i) {
        const int64_t inner = simt::random_int(1, 5);
        many.push_back({simt::random_int(1, 19), inner * simt::random_int(1, 6), inner});
    }
    check(Batch<T>(many), 1);
}

SIMT_TEST(spectral_norm_zero_and_nan, Types<float, bf16>, Types<double, double>, Types<f16, f16>) {
    for (const int iterations : {0, 1}) {
        const Batch<T> batch({{5, 9, 9}, {11, 40, 40}, {6, 12, 3}, {0, 7, 7}});
        using Element = typename T::T;
        for (Element& x : batch.weights[0].w) x = static_cast<Element>(0);
        batch.weights[1].w[simt::random_int(0, 11 * 40 - 1)] = static_cast<Element>(NAN);
        batch.forward(iterations, 1e-12);
        expect(batch.sigma[0] == 0, "sigma of a zero weight is not 0");
        expect(std::isnan(batch.sigma[1]), "sigma of a weight with a NaN is not NaN");
        expect(batch.sigma[3] == 0, "sigma of a weight without elements is not 0");
        expect(std::isfinite(batch.sigma[2]) && batch.sigma[2] != 0, "sigma of the weight beside them is harmed");
    }
}

// The same bits whatever order the threads run in.
SIMT_TEST(spectral_norm_order, Types<float, float>) {
    const Batch<T> batch(shapes);
    std::vector<std::vector<typename T::O>> results[2];
    for (int run = 0; run < 2; ++run) {
        simt::set_seed(simt::random_int(0, 1 << 30));
        batch.forward(2, 1e-12);
        batch.backward();
        for (const auto& weight : batch.weights) {
            results[run].push_back(weight.values(weight.normalized));
            results[run].push_back(weight.values(weight.weight_gradient));
        }
    }
    expect(results[0] == results[1], "the order of the threads changes the result");
}

SIMT_TEST(spectral_norm_refuses, void) {
    SpectralNormForwardMatrix matrix{};
    matrix.rows = 1, matrix.columns = matrix.inner = int64_t(1) << 31;
    expect(spectral_norm_forward_cuda(&matrix, 1, nullptr, 1, 1e-12, DType::float32, DType::float32, nullptr,
                                      nullptr) == unsupported_size,
           "a row of 2^31 columns is taken");
    expect(spectral_norm_forward_cuda(&matrix, 1, nullptr, 1, 1e-12, DType::float64, DType::float32, nullptr,
                                      nullptr) == unsupported_dtype,
           "a pair of types without kernels is taken");
}
