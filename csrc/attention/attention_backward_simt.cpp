// The backward kernels against the definition in float64: odd sizes, widths, both memory formats, biases.

#include "attention/attention_simt.h"

namespace {

template <typename T>
void check(const Shape& shape) {
    const Problem<T> problem(shape);
    problem.forward();
    problem.check_backward();
}

}  // namespace

SIMT_TEST(attention_backward_positions, bf16, f16) {
    for (const int64_t positions : {1, 7, 64, 127}) check<T>({2, 24, positions, 17, 40, true, any(), any()});
}

SIMT_TEST(attention_backward_streams, bf16) { check<T>({3, 40, 136, 32, 17, true, any(), any()}); }

SIMT_TEST(attention_backward_float32, tf32, fp32) {
    check<T>({8, 20, 7, 17, 17, true, true, any()});
    check<T>({1, 12, 68, 36, 8, true, false, any()});
}
SIMT_TEST(attention_backward_float32_heavy, tf32, fp32) { check<T>({1, 40, 129, 140, 72, true, true, any()}); }

// Of up to about a thousand, and exact: small integers. Most rows of the map are one-hot; the others say how exact a
// power is where its logit is large.
SIMT_TEST(attention_large_logits, fp32) {
    const Problem<T> problem({24, 16, 35, 3, 4, true, false, any()});
    for (const Buffer<T>* buffer : {&problem.x, &problem.w_query, &problem.w_key}) {
        for (std::size_t i = 0; i < buffer->size(); ++i) (*buffer)[i] = static_cast<T>(simt::random_int(-2, 2));
    }
    for (std::size_t i = 0; i < problem.w_query.size(); ++i)
        problem.w_query[i] = static_cast<T>(2.0f * problem.w_query[i]);
    problem.check_forward();
    problem.check_backward();
}

// All logits are -128: those of padding are 0, and a power of such a one would be infinite. Not as TF32, where nothing but
// noise is left of the query's gradient.
SIMT_TEST(attention_logits_below_padding, bf16, f16, fp32) {
    for (const int64_t positions : {35, 131}) {
        const Problem<T> problem({2, 16, positions, 8, 12, true, true, any()});
        for (const Buffer<T>* weight : {&problem.w_query, &problem.w_key})
            std::fill(weight->begin(), weight->end(), static_cast<T>(0.0f));
        std::fill(problem.b_query.begin(), problem.b_query.end(), static_cast<T>(128.0f));
        std::fill(problem.b_key.begin(), problem.b_key.end(), static_cast<T>(-0.125f));
        problem.check_forward();
        problem.check_backward();
    }
}

// Slices, with the own side kept (at most 4 panels) and fetched again.
SIMT_TEST(attention_backward_widths, bf16) {
    check<T>({1, 24, 72, 128, 72, true, any(), any()});
    check<T>({1, 24, 129, 200, 136, true, any(), any()});
}

SIMT_TEST(attention_backward_without_w_out, bf16) { check<T>({1, 136, 33, 8, 136, false, any(), any()}); }

SIMT_TEST(attention_backward_long_heavy, bf16) {
    check<T>({1, 24, 512, 64, 64, true, any(), any()});
    check<T>({1, 24, 2047, 32, 32, true, any(), any()});
}

SIMT_TEST(attention_backward_wide_heavy, f16) {
    check<T>({1, 40, 129, 256, 256, true, any(), any()});
    check<T>({2, 40, 72, 320, 320, true, any(), any()});
}

// Queries and keys of one number; many images, for few numbers are left of their gradients.
SIMT_TEST(attention_backward_one_channel, bf16, f16, tf32) { check<T>({32, 40, 33, 1, 17, true, any(), any()}); }

// Rows of even length where no two numbers can be moved as a pair.
SIMT_TEST(attention_strides, bf16, fp32) {
    for (const bool last : {false, true}) {
        for (const int step : {1, 2}) {
            const Problem<T> problem({2, 24, 34, 17, 12, true, any(), last, step, 3});
            problem.check_forward();
            problem.check_backward();
        }
    }
}

// Any of these sizes and strides, drawn anew for every seed; of few positions more images, for a mean of their errors.
template <typename T>
void check_drawn(std::initializer_list<int> sizes, std::initializer_list<int> widths) {
    const auto one_of = [](std::initializer_list<int> list) {
        return list.begin()[simt::random_int(0, static_cast<int>(list.size()) - 1)];
    };
    const int positions = one_of(sizes), batch = 1 + (positions == 1 ? 1 : 64 / positions);
    const int step = one_of({1, 1, 1, 2}), gap = one_of({0, 0, 1, 2, 8});
    const Problem<T> problem(
        {batch, simt::random_int(8, 40), positions, one_of(widths), one_of(widths), true, any(), any(), step, gap});
    problem.check_forward();
    problem.check_backward();
}

SIMT_TEST(attention_drawn_sizes) {
    const auto small = [](auto check) { check({1, 7, 33, 34}, {17, 32, 40, 128}); };
    any() ? small(check_drawn<bf16>) : small(check_drawn<f16>);
    any() ? small(check_drawn<tf32>) : small(check_drawn<fp32>);
}
SIMT_TEST(attention_drawn_sizes_heavy, bf16, f16, tf32, fp32) {
    check_drawn<T>({1, 7, 127, 129}, {17, 32, 40, 128, 200, 256, 320});
}

// What is not wanted is left alone, and γ = 0 is no special case.
SIMT_TEST(attention_backward_needs, bf16) {
    const Problem<T> problem({2, 16, 24, 8, 8});
    problem.gamma[0] = 0;
    problem.forward();
    expect(std::equal(problem.x.begin(), problem.x.end(), problem.y.begin(), [](float x, float y) { return x == y; }),
           "y is not x at gamma = 0");
    const Buffer<T> grad_y = simt::random<T>(problem.x.size()), context(problem.value.size());
    const Buffer<float> grad_gamma(1);
    const Buffer<char> workspace(attention_backward_cuda_workspace(2, 16, 24, 8, 8, true));
    AttentionCudaGradients gradients{};
    gradients.grad_y = problem.map(grad_y), gradients.context = context.data(), gradients.gamma = grad_gamma.data();
    expect(attention_backward_cuda(problem.arguments(), gradients, workspace.data(), nullptr) == ok,
           "the backward pass failed");
    problem.check_gamma(grad_gamma[0], context, {});
}

SIMT_TEST(attention_refuses, void) {
    AttentionCuda arguments{};
    arguments.dtype = DType::float64, arguments.batch = arguments.positions = 1;
    expect(attention_forward_cuda(arguments, {}, nullptr) == unsupported_dtype, "a type without kernels is taken");
    arguments.dtype = DType::bfloat16, arguments.batch = 1 << 16;
    expect(attention_forward_cuda(arguments, {}, nullptr) == unsupported_size, "too many images are taken");
    expect(attention_backward_cuda(arguments, {}, nullptr, nullptr) == unsupported_size, "too many images are taken");
}
