// Re-ranking by k-reciprocal neighbours (Zhong et al., CVPR 2017), sparse: lists of neighbours instead of N × N matrices.
// The definition is in sabmn_ext/retrieval/reranking.py; the same bits from every instruction set and number of threads.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "retrieval/retrieval.h"

namespace sabmn {

// Every item's nearest items, itself among them, the nearest first.
struct Neighbors {
    const int64_t* items;  // [count, width]
    int64_t count, width;
};

// A sparse matrix by rows: row i holds the entries offsets[i] … offsets[i + 1] − 1, its columns ascending.
struct SparseRows {
    const int64_t* offsets;
    const int64_t* columns;
    const double* values;
};

// What a function writes that is called twice: first with `columns` null, for the length of each row; then for the entries.
struct SparseOutput {
    int64_t* lengths;        // [count]
    const int64_t* offsets;  // [count + 1]
    int64_t* columns;
    double* values;
};

SABMN_FOR_EACH_ISA(
    // Row i: the expanded k-reciprocal neighbours of item i, from the first k_width and half_width of each list.
    // Workspace: for each thread k_width + half_width + k_width · (half_width + 1) numbers.
    int reciprocal_neighbors(const Neighbors& neighbors, int64_t k_width, int64_t half_width, const SparseOutput& output,
                             int64_t* workspace, int threads);
    // Row i: the mean of `rows` over the first `k` of item i's neighbours. Workspace: 2 · count doubles for each thread.
    int mean_of_rows(const SparseRows& rows, const Neighbors& neighbors, int64_t k, const SparseOutput& output,
                     double* workspace, int threads);
    // distances[q][g] = (1 − λ) (1 − m / (2 − m)) + λ d / largest[q], where m = Σ_c min(query_rows[q][c], columns[c][g]) and
    // d is the distance of the features less `center` [columns]: of float64 features, or such that q − center has at most 24
    // significant bits.
    int64_t reranked_workspace(int64_t dim, int64_t query_rows, int threads);  // in doubles
    int reranked_distances(const Matrix& query, const Matrix& gallery, Metric metric, const double* center,
                           const double* largest, const SparseRows& query_rows, const SparseRows& columns, double lambda,
                           double* distances, double* workspace, int threads);)

}  // namespace sabmn
