// The smallest lower bounds of every row, kept while a matrix passes by in tiles (sabmn_ext/retrieval/search.py).
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace sabmn {

// Of every row the `count` columns with the smallest sign · entry + offset so far. The first `filled` entries are
// there; once all are, they are a heap, the largest first.
struct Kept {
    double* values;  // [rows, count]
    std::int64_t* items;
    std::int64_t rows, count, filled;
};

// float32 [rows, columns], dense; column j is item first_item + j.
struct Tile {
    const float* entries;
    const double* offsets;  // [rows]
    std::int64_t columns, first_item;
    double sign;  // 1 or −1
};

SABMN_FOR_EACH_ISA(int keep_smallest(const Kept& kept, const Tile& tile, int threads);)

}  // namespace sabmn
