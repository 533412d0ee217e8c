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

// Codes that are compared for equality; pid −1: dropped. Without cameras both camids are null.
struct Labels {
    const int32_t* query_pids;      // [Q]
    const int32_t* gallery_pids;    // [G]
    const int32_t* query_camids;    // [Q]
    const int32_t* gallery_camids;  // [G]
    int64_t first;                  // the index of the first gallery item in the whole gallery
};

// Every query's true matches, sorted by (distance, index), in CSR form.
struct Matches {
    const int64_t* offsets;    // [Q + 1]
    const double* distances;   // [M]
    const int64_t* indices;    // [M] in the whole gallery
    int64_t* counts;           // [M], written: the valid non-matches before each true match
};

// The histogram's bins: see bin_of in exact.h. Edges are the numbers with 1 + bin_bits significant bits; those up to the
// key `lowest` (a double's leading bits) are left out; `negative` bins hold distances ≤ 0.
constexpr int bin_bits = 10;
struct Bins {
    int64_t lowest, negative, count;
    int64_t* counts;  // [count], written: the negatives
};

// The features of both sides less `center`, times 2^scale, should be at most 1 long: else the filter is sure of nothing.
struct Filter {
    const double* center;  // [columns]; of the unit vectors for the cosine
    int scale;
    int64_t block_rows;   // queries that are held packed at a time
    int64_t tile_rows;    // gallery items that are
    char* workspace;      // count_workspace bytes
    int threads;
};

constexpr int num_lanes = 16;  // a sum over the features is 16 interleaved sums, added in a fixed tree

// static: a copy for each instruction set, see isa.h.
static inline int64_t padded_dim(int64_t dim) { return (dim + num_lanes - 1) / num_lanes * num_lanes; }

SABMN_FOR_EACH_ISA(
    int squared_norms(const Matrix& features, double* norms, double* workspace, int threads);
    int pair_distances(const Matrix& query, const Matrix& gallery, const int64_t* query_indices,
                       const int64_t* gallery_indices, int64_t num_pairs, Metric metric, double* distances,
                       double* workspace, int threads);
    int64_t count_workspace(int64_t dim, int64_t block_rows, int64_t tile_rows, int64_t num_bins, int threads);
    int count_nonmatches(const Matrix& query, const Matrix& gallery, const Labels& labels, const Matches& matches,
                         Metric metric, const Bins& bins, const Filter& filter);
    // Workspace: for each thread bins.count + 1 numbers.
    int count_nonmatches_in_rows(const Matrix& rows, const Labels& labels, const Matches& matches, const Bins& bins,
                                 int64_t* workspace, int threads);)

}  // namespace sabmn
