// Ranks of the true matches by counting, and the float64 distances that they rest on. The definition is
// sabmn_ext/ops/reference.py (section "retrieval"); the bits are those of the reference, whatever the instruction set, the
// tiles and the number of threads.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace sabmn {

enum class Metric : int { squared_euclidean = 0, cosine = 1 };

struct Matrix {
    const void* data;  // [rows, columns]
    int64_t rows, columns;
    int64_t row_stride, column_stride;  // in elements
    DType dtype;
};

// The labels of both sides and every query's true matches, sorted by (distance, index), in CSR form.
struct Matches {
    const int64_t* query_pids;    // [Q]
    const int64_t* gallery_pids;  // [G], -1: dropped
    const int64_t* offsets;       // [Q + 1]
    const double* distances;      // [M]
    const int64_t* indices;       // [M]
    int64_t* counts;              // [M], written: the valid non-matches before each true match
};

// `query_rows` × `gallery_rows` pairs at a time, in a workspace of `threads` parts; see rank_workspace.
struct Tiles {
    int64_t query_rows, gallery_rows;  // multiples of 4
    double* workspace;
    int threads;
};

constexpr int num_lanes = 16;  // a sum over the features is 16 interleaved sums, added in a fixed tree

// static: a copy for each instruction set, see isa.h.
static inline int64_t padded_dim(int64_t dim) { return (dim + num_lanes - 1) / num_lanes * num_lanes; }

// Doubles that one thread needs.
static inline int64_t rank_workspace(int64_t query_rows, int64_t gallery_rows, int64_t dim) {
    return (query_rows + gallery_rows) * (padded_dim(dim) + 1) + query_rows * gallery_rows;
}

SABMN_FOR_EACH_ISA(
    int pair_distances(const Matrix& query, const Matrix& gallery, const int64_t* query_indices,
                       const int64_t* gallery_indices, int64_t num_pairs, Metric metric, double* distances,
                       const Tiles& tiles);
    int count_nonmatches(const Matrix& query, const Matrix& gallery, const Matches& matches, Metric metric,
                         const Tiles& tiles);
    int count_nonmatches_in_rows(const Matrix& rows, const Matches& matches, int threads);)

}  // namespace sabmn
