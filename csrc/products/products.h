// Matrix products in float32, many at a time.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace sabmn {

// A batch of matrices; strides are counted in numbers.
struct Matrices {
    float* data;
    std::int64_t batch_stride, row_stride, column_stride;
};

// result[i] (+)= left[i]·right[i], of [rows, depth] and [depth, columns]; the result's column_stride is 1. Sums are taken
// in the order of the depth, at least 1, 128 terms at a time, whatever the number of threads.
struct Products {
    std::int64_t batch, rows, depth, columns;
    Matrices left, right, result;
    bool add;
};

SABMN_FOR_EACH_ISA(void products(const Products& sizes, int threads);)

}  // namespace sabmn
