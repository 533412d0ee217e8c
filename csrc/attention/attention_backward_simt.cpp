// The backward kernels against the definition in float64: odd sizes, widths, both memory formats, biases.

#include "attention/attention_simt.h"

namespace {

template <typename T>
void check(const Shape& shape) {
    const Problem<T> problem(shape);
    problem.forward();
    problem.check_backward();
}

bool any() { return simt::random_int(0, 1) == 1; }

}  // namespace

SIMT_TEST(attention_backward_positions, bf16, f16) {
    for (const int64_t positions : {1, 7, 64, 127}) check<T>({2, 24, positions, 17, 40, true, any(), any()});
}

SIMT_TEST(attention_backward_streams, bf16) { check<T>({3, 40, 136, 32, 17, true, any(), any()}); }

// Slices, with the own side kept (at most 4 panels) and fetched again.
SIMT_TEST(attention_backward_widths, bf16) {
    check<T>({1, 24, 72, 128, 72, true, any(), any()});
    check<T>({1, 24, 129, 200, 136, true, any(), any()});
}

SIMT_TEST(attention_backward_without_w_out, bf16) { check<T>({1, 136, 33, 8, 136, false, any(), any()}); }
