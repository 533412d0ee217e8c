// Tests of the attention's kernels: a problem with all its tensors, and the definition to compare with.
#pragma once

#include <numeric>

#include "attention/attention_products.h"
#include "simt/test.h"

namespace {

using namespace sabmn;
using simt::Buffer;
using simt::expect;
using std::int64_t;

inline bool any() { return simt::random_int(0, 1) == 1; }

struct Shape {
    int64_t batch, channels, positions, key_width, value_width;
    bool w_out = true, biases = false, channels_last = false;
    int64_t step = 1, gap = 0;  // of x's and y's rows: elements from one number to the next; left out between rows

    int64_t row() const { return (channels_last ? channels : positions) * step + gap; }
    int64_t image() const { return (channels_last ? positions : channels) * row(); }
    int64_t x_at(int64_t b, int64_t c, int64_t n) const {
        return b * image() + (channels_last ? n * row() + c * step : c * row() + n * step);
    }
    int64_t x_size() const { return x_at(batch - 1, channels - 1, positions - 1) + 1; }
    std::string text() const {
        std::string text;
        for (const int64_t size : {batch, channels, positions, key_width, value_width})
            text += std::to_string(size) + " ";
        return text + (w_out ? "with" : "without") + " w_out" + (biases ? ", biases" : "") +
               (channels_last ? ", last" : "") +
               (step > 1 || gap ? ", apart" : "");
    }
};

template <typename T>
constexpr DType dtype = std::is_same_v<T, bf16>  ? DType::bfloat16
                        : std::is_same_v<T, f16> ? DType::float16
                                                 : DType::float32;

template <typename T>
double epsilon() {
    return sizeof(T) == 2 ? simt::epsilon<T>() : simt::epsilon<float>();
}

// What S makes of the formulas in attention_cuda.h. In float, every tensor that plain torch would store is rounded to
// T, and what a product takes to TF32 where T is that.
template <typename T, typename S>
class Definition {
  public:
    using Values = std::vector<S>;
    Shape shape;
    Values x, w_query, w_key, w_value, w_out, b_query, b_key, b_value, b_out;
    S gamma;
    Values query, key, value, out, y;  // y as [B, C, N]
    Values context, grad_query, grad_key, grad_value, grad_x, grad_w_query, grad_w_key, grad_w_value, grad_w_out;

    template <typename Problem>
    explicit Definition(const Problem& problem) : shape(problem.shape), gamma(problem.gamma[0]) {
        const auto copy = [](Values& to, const Buffer<T>& from) { to.assign(from.begin(), from.end()); };
        for (int64_t b = 0; b < shape.batch; ++b) {
            for (int64_t c = 0; c < shape.channels; ++c) {
                for (int64_t n = 0; n < shape.positions; ++n) x.push_back(problem.x[shape.x_at(b, c, n)]);
            }
        }
        copy(w_query, problem.w_query), copy(w_key, problem.w_key), copy(w_value, problem.w_value);
        copy(w_out, problem.w_out);
        copy(b_query, problem.b_query), copy(b_key, problem.b_key), copy(b_value, problem.b_value);
        copy(b_out, problem.b_out);
        query = project(w_query, x, b_query, shape.key_width, shape.channels);
        key = project(w_key, x, b_key, shape.key_width, shape.channels);
        value = project(w_value, x, b_value, shape.value_width, shape.channels);
        attend();
        y = shape.w_out ? project(w_out, out, b_out, shape.channels, shape.value_width) : out;
        for (std::size_t i = 0; i < y.size(); ++i) y[i] = rounded(gamma * y[i] + x[i]);
    }

    // The gradients for one of y, [B, C, N].
    void backward(const Values& grad_y) {
        context = grad_y;
        if (shape.w_out)
            context = project(transposed(w_out, shape.channels), grad_y, {}, shape.value_width, shape.channels);
        map_gradients();
        grad_x = grad_y;
        const auto through = [&](const Values& w, const Values& grad, int64_t width) {
            const Values part = project(transposed(w, width), grad, {}, shape.channels, width);
            for (std::size_t i = 0; i < part.size(); ++i) grad_x[i] = rounded(grad_x[i] + part[i]);
            return weight_gradient(grad, x, width, shape.channels, 1);
        };
        grad_w_query = through(w_query, grad_query, shape.key_width);
        grad_w_key = through(w_key, grad_key, shape.key_width);
        grad_w_value = through(w_value, grad_value, shape.value_width);
        if (shape.w_out) grad_w_out = weight_gradient(grad_y, out, shape.channels, shape.value_width, gamma);
    }

    static S rounded(S value) {
        if constexpr (std::is_same_v<S, double>) return value;
        else return static_cast<T>(value);
    }

    static S taken(S value) {
        if constexpr (std::is_same_v<S, float> && std::is_same_v<T, tf32>) return __uint_as_float(tf32_bits(value));
        else return value;
    }
    static Values taken(Values values) {
        for (S& value : values) value = taken(value);
        return values;
    }

    // [B, rows, N] of a weight [rows, columns] and [B, columns, N]
    Values project(const Values& weight, const Values& x, const Values& bias, int64_t rows, int64_t columns) const {
        const int64_t size = shape.positions;
        const Values w = taken(weight), in = taken(x);
        Values result(shape.batch * rows * size), sums(size);
        for (int64_t b = 0; b < shape.batch; ++b) {
            for (int64_t r = 0; r < rows; ++r) {
                std::fill(sums.begin(), sums.end(), S(0));
                for (int64_t c = 0; c < columns; ++c) {
                    const S weight = w[r * columns + c];
                    const S* const from = &in[(b * columns + c) * size];
                    for (int64_t n = 0; n < size; ++n) sums[n] += weight * from[n];
                }
                for (int64_t n = 0; n < size; ++n) {
                    S sum = rounded(sums[n]);
                    if (!bias.empty()) sum = rounded(sum + bias[r]);
                    result[(b * rows + r) * size + n] = sum;
                }
            }
        }
        return result;
    }

  private:
    static Values transposed(const Values& w, int64_t rows) {
        const int64_t columns = w.size() / rows;
        Values result(w.size());
        for (int64_t i = 0; i < static_cast<int64_t>(w.size()); ++i) result[i % columns * rows + i / columns] = w[i];
        return result;
    }

    // scale · Σ over images and positions of left [B, rows, N] times right [B, columns, N]
    Values weight_gradient(const Values& grad, const Values& in, int64_t rows, int64_t columns, S scale) const {
        const int64_t size = shape.positions;
        const Values left = taken(grad), right = taken(in);
        Values result(rows * columns);
        for (int64_t b = 0; b < shape.batch; ++b) {
            for (int64_t r = 0; r < rows; ++r) {
                for (int64_t c = 0; c < columns; ++c) {
                    const S* const from = &left[(b * rows + r) * size];
                    result[r * columns + c] +=
                        std::inner_product(from, from + size, &right[(b * columns + c) * size], S(0));
                }
            }
        }
        for (S& value : result) value = rounded(scale * value);
        return result;
    }

    void map_gradients() {
        const int64_t size = shape.positions;
        const Values query = taken(this->query), key = taken(this->key), value = taken(this->value),
                     context = taken(this->context);
        grad_query.resize(query.size()), grad_key.resize(key.size()), grad_value.resize(value.size());
        Values powers(size), slopes(size);
        for (int64_t b = 0; b < shape.batch; ++b) {
            const auto row = [&](int64_t width, int64_t c) { return (b * width + c) * size; };
            for (int64_t j = 0; j < size; ++j) {
                logits_of(b, j, powers);
                const S maximum = *std::max_element(powers.begin(), powers.end());
                S total = 0, mean = 0;
                for (S& power : powers) total += power = std::exp(power - maximum);
                std::fill(slopes.begin(), slopes.end(), S(0));
                for (int64_t c = 0; c < shape.value_width; ++c) {
                    const int64_t from = row(shape.value_width, c);
                    for (int64_t i = 0; i < size; ++i) slopes[i] += context[from + j] * value[from + i];
                }
                for (S& power : powers) power /= total;
                for (int64_t i = 0; i < size; ++i) mean += powers[i] * slopes[i];
                for (int64_t c = 0; c < shape.value_width; ++c) {
                    const int64_t to = row(shape.value_width, c);
                    for (int64_t i = 0; i < size; ++i) grad_value[to + i] += gamma * taken(powers[i]) * context[to + j];
                }
                for (int64_t i = 0; i < size; ++i) slopes[i] = taken(gamma * powers[i] * (slopes[i] - mean));
                for (int64_t c = 0; c < shape.key_width; ++c) {
                    const int64_t at = row(shape.key_width, c);
                    grad_query[at + j] = rounded(std::inner_product(slopes.begin(), slopes.end(), &key[at], S(0)));
                    for (int64_t i = 0; i < size; ++i) grad_key[at + i] += slopes[i] * query[at + j];
                }
            }
        }
        for (S& x : grad_key) x = rounded(x);
        for (S& x : grad_value) x = rounded(x);
    }

    void attend() {
        const int64_t size = shape.positions;
        const Values value = taken(this->value);
        out.resize(value.size());
        Values powers(size);
        for (int64_t b = 0; b < shape.batch; ++b) {
            for (int64_t j = 0; j < size; ++j) {
                logits_of(b, j, powers);
                const S maximum = *std::max_element(powers.begin(), powers.end());
                S total = 0;
                for (S& power : powers) total += power = std::exp(power - maximum);
                for (int64_t c = 0; c < shape.value_width; ++c) {
                    const S* const v = &value[(b * shape.value_width + c) * size];
                    S sum = 0;
                    for (int64_t i = 0; i < size; ++i) sum += taken(powers[i]) * v[i];
                    out[(b * shape.value_width + c) * size + j] = rounded(sum / total);
                }
            }
        }
    }

    void logits_of(int64_t b, int64_t j, Values& logits) const {
        const int64_t size = shape.positions;
        std::fill(logits.begin(), logits.end(), S(0));
        for (int64_t c = 0; c < shape.key_width; ++c) {
            const int64_t row = (b * shape.key_width + c) * size;
            for (int64_t i = 0; i < size; ++i) logits[i] += taken(query[row + j]) * taken(key[row + i]);
        }
    }
};

// Random tensors of a shape, with what a forward pass writes. The standard deviation of the logits is about scale²,
// whatever the widths. Where it is large, few positions have a gradient that is more than noise, and the errors of two
// computations of one precision say little about each other.
template <typename T>
struct Problem {
    Shape shape;
    Buffer<T> x, w_query, w_key, w_value, w_out, b_query, b_key, b_value, b_out;
    Buffer<float> gamma, lse;
    Buffer<T> query, key, value, out, y;

    explicit Problem(const Shape& shape, double scale = 1.5)
        : shape(shape),
          x(simt::random<T>(shape.x_size())),
          w_query(weight(shape.key_width, shape.channels, key_scale(scale))),
          w_key(weight(shape.key_width, shape.channels, key_scale(scale))),
          w_value(weight(shape.value_width, shape.channels, 1)),
          w_out(shape.w_out ? weight(shape.channels, shape.value_width, 1) : simt::empty<T>(0)),
          b_query(bias(shape.key_width, key_scale(scale))),
          b_key(bias(shape.key_width, key_scale(scale))),
          b_value(bias(shape.value_width, 1)),
          b_out(bias(shape.w_out ? shape.channels : 0, 1)),
          gamma(simt::random<float>(1, 0.5, 2)),
          lse(shape.batch * 2 * shape.positions),
          query(shape.batch * shape.key_width * shape.positions),
          key(query.size()),
          value(shape.batch * shape.value_width * shape.positions),
          out((sizeof(T) == 2 ? 2 : 1) * value.size()),
          y(x.size()) {
        if (any()) gamma[0] = -gamma[0];
    }

    AttentionMap map(const Buffer<T>& buffer) const {
        return shape.channels_last ? AttentionMap{buffer.data(), shape.image(), shape.step, shape.row()}
                                   : AttentionMap{buffer.data(), shape.image(), shape.row(), shape.step};
    }

    AttentionCuda arguments() const {
        return {dtype<T>,
                std::is_same_v<T, tf32>,
                shape.batch,
                shape.channels,
                shape.positions,
                shape.key_width,
                shape.value_width,
                map(x),
                w_query.data(),
                w_key.data(),
                w_value.data(),
                given(w_out),
                gamma.data(),
                given(b_query),
                given(b_key),
                given(b_value),
                given(b_out),
                query.data(),
                key.data(),
                value.data(),
                out.data(),
                lse.data()};
    }

    void forward() const {
        expect(attention_forward_cuda(arguments(), map(y), nullptr) == ok, "the forward pass failed");
    }

    template <typename Ours, typename Plain>
    void compare(const char* name, const Ours& ours, const Plain& plain, const std::vector<double>& reference) const {
        simt::compare_by_rule(std::string(name) + " of " + shape.text(), std::vector<double>(ours.begin(), ours.end()),
                              std::vector<double>(plain.begin(), plain.end()), reference, epsilon<T>(), false);
    }

    // A feature map in the order [B, C, N].
    std::vector<double> in_order(const Buffer<T>& buffer) const {
        std::vector<double> values;
        for (int64_t b = 0; b < shape.batch; ++b) {
            for (int64_t c = 0; c < shape.channels; ++c) {
                for (int64_t n = 0; n < shape.positions; ++n) values.push_back(buffer[shape.x_at(b, c, n)]);
            }
        }
        return values;
    }

    void check_forward() const {
        forward();
        const Definition<T, float> plain(*this);
        const Definition<T, double> exact(*this);
        compare("query", query, plain.query, exact.query);
        compare("key", key, plain.key, exact.key);
        compare("value", value, plain.value, exact.value);
        compare("out", std::vector<T>(out.begin(), out.begin() + value.size()), plain.out, exact.out);
        for (std::size_t i = 0; i < value.size(); ++i) {
            expect(std::fabs(whole_out(i) - out[i]) <= epsilon<T>() / 2 * std::fabs(out[i]) + 0x1p-24,
                   "the second part of out is no rounding error of the first: " + shape.text());
        }
        compare("y", in_order(y), plain.y, exact.y);
    }

    float whole_out(std::size_t i) const {
        float sum = 0;
        for (; i < out.size(); i += value.size()) sum += out[i];
        return sum;
    }

    // The gradients for a random one of y, after a forward pass.
    void check_backward() const {
        const Buffer<T> grad_y = simt::random<T>(x.size()), grad_x(x.size()), grad_w_query(w_query.size()),
                        grad_w_key(w_key.size()), grad_w_value(w_value.size()), grad_w_out(w_out.size()),
                        grad_query(query.size()), grad_key(key.size()), grad_value(value.size()), context(value.size());
        const Buffer<float> grad_gamma(1);
        const Buffer<char> workspace(attention_backward_cuda_workspace(
            shape.batch, shape.channels, shape.positions, shape.key_width, shape.value_width, shape.w_out));
        const std::vector<double> ordered = in_order(grad_y);
        if (!shape.w_out)
            for (std::size_t i = 0; i < ordered.size(); ++i) context[i] = static_cast<T>(ordered[i]);
        const AttentionCudaGradients gradients = {map(grad_y),       map(grad_x),         grad_w_query.data(),
                                                  grad_w_key.data(), grad_w_value.data(), given(grad_w_out),
                                                  grad_gamma.data(), context.data(),      grad_query.data(),
                                                  grad_key.data(),   grad_value.data()};
        expect(attention_backward_cuda(arguments(), gradients, workspace.data(), nullptr) == ok,
               "the backward pass failed");

        Definition<T, float> plain(*this);
        plain.backward(std::vector<float>(ordered.begin(), ordered.end()));
        Definition<T, double> exact(*this);
        exact.backward(ordered);
        compare("grad_query", grad_query, plain.grad_query, exact.grad_query);
        compare("grad_key", grad_key, plain.grad_key, exact.grad_key);
        compare("grad_value", grad_value, plain.grad_value, exact.grad_value);
        compare("grad_x", in_order(grad_x), plain.grad_x, exact.grad_x);
        compare("grad_w_query", grad_w_query, plain.grad_w_query, exact.grad_w_query);
        compare("grad_w_key", grad_w_key, plain.grad_w_key, exact.grad_w_key);
        compare("grad_w_value", grad_w_value, plain.grad_w_value, exact.grad_w_value);
        compare("grad_w_out", grad_w_out, plain.grad_w_out, exact.grad_w_out);
        compare("context", context, plain.context, exact.context);
        check_gamma(grad_gamma[0], context, ordered);
    }

    // One number, of what is stored. By the rule's bound on the largest error: of one number the RMS error says no more.
    void check_gamma(float ours, const Buffer<T>& context, const std::vector<double>& grad_y) const {
        double exact = 0;
        float plain = 0;
        const auto add = [&](auto a, auto b) { exact += double(a) * double(b), plain += float(a) * float(b); };
        for (std::size_t i = 0; i < value.size(); ++i) add(context[i], whole_out(i));
        for (std::size_t i = 0; i < grad_y.size() && b_out.size(); ++i)
            add(grad_y[i], b_out[i / shape.positions % shape.channels]);
        const double allowed = 3 * std::fabs(plain - exact) + 1e-5 * (1 + std::fabs(exact));
        expect(std::fabs(ours - exact) <= allowed, "grad_gamma of " + shape.text() + " is " + std::to_string(ours) +
                                                       ", expected " + std::to_string(exact));
    }

  private:
    static T* given(const Buffer<T>& buffer) { return buffer.size() ? buffer.data() : nullptr; }

    static Buffer<T> weight(int64_t rows, int64_t columns, double scale) {
        const double bound = 3 * scale / std::sqrt(columns);
        return simt::random<T>(rows * columns, -bound, bound);
    }
    Buffer<T> bias(int64_t size, double bound) const { return simt::random<T>(shape.biases ? size : 0, -bound, bound); }
    double key_scale(double scale) const { return scale * std::pow(shape.key_width, -0.25); }
};

}  // namespace
