// The filter's error bound, for the CPU and the GPU; it is derived at the top of count_cpu.cpp.
#pragma once

#include <cstdint>

#include "retrieval/order.h"

namespace sabmn {
namespace {

constexpr double unit_roundoff = 0x1p-24;

struct Bound {
    double dot, sum, absolute;  // e = dot ‖a‖‖b‖ + sum (A + B) + absolute

    // product_error: of the float32 product, γ of step 2.
    Bound(int64_t dim, Metric metric, int scale, double product_error) {
        const double u = unit_roundoff, spare = 1.0 + 0x1p-10, roundings = (dim + 64) * 0x1p-52;
        const double shift = __builtin_ldexp(1.0, 2 * scale);
        dot = spare * 2.0 * (product_error * (1.0 + u) * (1.0 + u) + 2.0 * u + u * u);
        sum = spare * (8.0 * u + 4.0 * roundings);
        absolute = spare * (64.0 * dim * 0x1p-126 + dim * 0x1p-1074 * shift);
        if (metric == Metric::cosine) absolute += spare * 32.0 * roundings * shift;
    }
};

// γ of `depth` roundings.
[[maybe_unused]] double rounding_error(double depth) {
    const double error = depth * unit_roundoff;
    return error < 0.5 ? error / (1.0 - error) : __builtin_inf();
}

// Not below `value`, up to the few ulp that the bound has to spare.
[[maybe_unused]] SABMN_HOST_DEVICE float round_up(double value) { return static_cast<float>(value * (1.0 + 0x1p-20)); }

// x = 2^exponent · distance.
[[maybe_unused]] int scaled_exponent(Metric metric, int scale) { return 2 * scale + (metric == Metric::cosine); }

}  // namespace
}  // namespace sabmn
