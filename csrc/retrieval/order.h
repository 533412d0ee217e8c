// The order of the ranking and the bins of the histogram, for the CPU and the GPU. The CPU needs a copy for each
// instruction set: hence the unnamed namespace.
#pragma once

#include <cstdint>
#include <cstring>

#include "retrieval/retrieval.h"

#ifdef __CUDACC__
#define SABMN_HOST_DEVICE __host__ __device__
#else
#define SABMN_HOST_DEVICE
#endif

namespace sabmn {
namespace {

// How many of a query's true matches come before an item; (distance, index) is compared.
[[maybe_unused]] SABMN_HOST_DEVICE int64_t matches_before(double distance, int64_t index, const double* thresholds,
                                                          const int64_t* indices, int64_t num_matches) {
    int64_t before = 0;
    for (int64_t left = num_matches; left > 0;) {
        const int64_t half = left / 2, middle = before + half;
        const bool match_first =
            thresholds[middle] < distance || (thresholds[middle] == distance && indices[middle] < index);
        before = match_first ? middle + 1 : before;
        left = match_first ? left - half - 1 : half;
    }
    return before;
}

// The bin of a distance. The bits of a double, as a signed number, are in its order; 10 of the mantissa's are kept. An
// upper edge belongs to its bin: hence − 1.
[[maybe_unused]] SABMN_HOST_DEVICE int64_t bin_of(double distance, const Bins& bins) {
    int64_t order;
    memcpy(&order, &distance, sizeof order);
    if (order < 0) order = -(order & INT64_MAX);
    int64_t bin = (order - 1) >> (52 - bin_bits);
    if (bin >= 0) {
        bin = bin > bins.lowest ? bin - bins.lowest : 0;
    } else {
        bin = bin < -bins.lowest ? bin + bins.lowest - 1 : -1;
    }
    bin += bins.negative;
    return bin < 0 ? 0 : bin < bins.count ? bin : bins.count - 1;
}

// The key of the lowest bin for x = 2^exponent · distance in float: the exponents differ by the two biases and this
// one.
[[maybe_unused]] int32_t lowest_float_bin(const Bins& bins, int exponent) {
    const int64_t lowest = bins.lowest - (static_cast<int64_t>(1023 - 127 - exponent) << bin_bits);
    const int64_t most = int64_t{256} << bin_bits;
    return static_cast<int32_t>(lowest < 0 ? 0 : lowest < most ? lowest : most);
}

}  // namespace
}  // namespace sabmn
