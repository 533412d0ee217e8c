// The forward kernels against the definition in float64: odd sizes, widths, both memory formats, biases, large logits.

#include "attention/attention_simt.h"

namespace {

// out of the stored query, key and value, with the powers of e rounded as the tensor cores get them.
template <typename T>
std::vector<double> out_of_rounded_powers(const Problem<T>& problem) {
    const Buffer<T>&query = problem.query, &key = problem.key, &value = problem.value;
    const int64_t size = problem.shape.positions, keys = problem.shape.key_width, values = problem.shape.value_width;
    std::vector<double> out(value.size()), powers(size);
    for (int64_t b = 0; b < problem.shape.batch; ++b) {
        for (int64_t j = 0; j < size; ++j) {
            std::fill(powers.begin(), powers.end(), 0);
            for (int64_t c = b * keys; c < (b + 1) * keys; ++c) {
                for (int64_t i = 0; i < size; ++i) powers[i] += double(query[c * size + j]) * double(key[c * size + i]);
            }
            const double maximum = *std::max_element(powers.begin(), powers.end());
            double total = 0;
            for (double& power : powers) {
                total += power = std::exp(power - maximum);
                power = static_cast<T>(static_cast<float>(power));
            }
            for (int64_t c = b * values; c < (b + 1) * values; ++c) {
                for (int64_t i = 0; i < size; ++i) out[c * size + j] += powers[i] * value[c * size + i] / total;
            }
        }
    }
    return out;
}

}  // namespace

// Without and with alignment to 16 bytes, one tile and several, and both memory formats.
SIMT_TEST(attention_forward_positions, bf16, f16) {
    for (const int64_t positions : {1, 7, 127, 128}) {
        Problem<T>({2, 24, positions, 17, 17, true, false, any()}).check_forward();
    }
}

// float32: slices of 64 (exact) and of 64 and 128 value channels.
SIMT_TEST(attention_forward_float32, tf32, fp32) {
    Problem<T>({1, 20, 7, 17, 17, true, true, any()}).check_forward();
    Problem<T>({1, 8, 132, 8, 68, true, false, any()}).check_forward();
}
SIMT_TEST(attention_forward_float32_slices, tf32) {
    Problem<T>({1, 136, 33, 40, 136, false, true, any()}).check_forward();
}
SIMT_TEST(attention_forward_float32_heavy, tf32, fp32) {
    Problem<T>({1, 40, 264, 140, 200, true, true, any()}).check_forward();
}

SIMT_TEST(attention_forward_streams, bf16) {
    Problem<T>({1, 20, 129, 17, 40}).check_forward();
    Problem<T>({1, 32, 264, 32, 32, true, false, true}).check_forward();
}

SIMT_TEST(attention_forward_widths, bf16) {
    for (const int64_t width : {1, 40, 128, 200}) {
        Problem<T>({1, 136, 72, width, width, true, true, any()}).check_forward();
    }
}

// Up to 128 positions; beyond, the powers depend on the order of keys. The bound leaves room for powers that lie so near
// the middle of two numbers that they are rounded to the other one.
SIMT_TEST(attention_forward_keeps_what_rounding_left, bf16, f16) {
    const Problem<T> problem({2, 24, 127, 17, 40});
    problem.forward();
    const std::vector<double> exact = out_of_rounded_powers(problem);
    double with = 0, without = 0;
    for (std::size_t i = 0; i < exact.size(); ++i) {
        with += std::pow(problem.whole_out(i) - exact[i], 2), without += std::pow(problem.out[i] - exact[i], 2);
    }
    expect(with <= without / 4,
           "both parts of out leave " + std::to_string(with / without) + " of the first's squared error");
}

SIMT_TEST(attention_forward_wide, f16) { Problem<T>({1, 40, 136, 320, 320, true, true, any()}).check_forward(); }

// The form of Zhang et al.: values as wide as x, no output projection.
SIMT_TEST(attention_forward_without_w_out, bf16) {
    for (const bool last : {false, true}) Problem<T>({1, 264, 33, 32, 264, false, true, last}).check_forward();
}

SIMT_TEST(attention_forward_long_heavy, bf16) {
    Problem<T>({1, 24, 512, 64, 64, true, true, false}).check_forward();
    Problem<T>({1, 24, 2047, 32, 32, true, false, true}).check_forward();
}

// Rows that are near one-hot: logits with a standard deviation of 144.
SIMT_TEST(attention_forward_large_logits, bf16, f16) { Problem<T>({1, 64, 136, 64, 24}, 12).check_forward(); }
