// The smallest lower bounds of every row, kept while a matrix passes by in tiles (sabmn_ext/retrieval/search.py).
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "retrieval/retrieval.h"

namespace sabmn {

// Of every row the `count` items with the smallest sign · entry + offset so far are among the first `filled`, in any order;
// what is not there is at least the row's limit. `room` > count.
struct Kept {
    double* values;  // [rows, room]
    std::int64_t* items;
    double* limits;        // [rows] ∞ at first
    std::int64_t* filled;  // [rows] 0 at first
    std::int64_t rows, count, room;
};

// float32 [rows, columns], dense.
struct Tile {
    const float* entries;
    const double* offsets;  // [rows]
    std::int64_t rows, columns, first_item;
    double sign;  // 1 or −1
};

SABMN_FOR_EACH_ISA(
    // Row i of the tile belongs to row i of what is kept; its column j is item first_item + j.
    int keep_smallest_of_rows(const Kept& kept, const Tile& tile, int threads);
    // Column j of the tile belongs to row j of what is kept; its row i is item first_item + i.
    int keep_smallest_of_columns(const Kept& kept, const Tile& tile, int threads);
    // Leaves no more than `count` of each row.
    int settle_smallest(const Kept& kept, int threads);
    // The k nearest of each row's settled items by sign · exact distance (exact.h), ties to the lower index. An item whose
    // value is above the k-th smallest by more than `slack` is none of them. What is kept is spent.
    // Workspace: for each thread two padded rows.
    int rank_kept(const Kept& kept, const Matrix& query, const Matrix& gallery, Metric metric, double sign,
                  double slack, std::int64_t k, double* distances, std::int64_t* items, double* workspace, int threads);)

}  // namespace sabmn
