// The ranking on the GPU; what the arguments mean stands in retrieval.h. Nothing here allocates, waits for the device
// or reads from it, so that a CUDA graph can record it. Labels and matches are on the GPU, too; matches.counts and
// bins.counts are added to. counts[m] takes the items between match m of a query and the one before it: what the caller
// sums up.
#pragma once

#include <cstdint>

#include "retrieval/retrieval.h"

namespace sabmn {

// Squared lengths of all rows of query [Q] and gallery [G], for the cosine; else null.
struct SquaredNorms {
    const double *query, *gallery;
};

int squared_norms_cuda(const Matrix& features, double* norms, void* stream);
int pair_distances_cuda(const Matrix& query, const Matrix& gallery, const SquaredNorms& norms,
                        const std::int64_t* query_indices, const std::int64_t* gallery_indices, std::int64_t num_pairs,
                        double* distances, void* stream);
int count_nonmatches_in_rows_cuda(const Matrix& rows, const Labels& labels, const Matches& matches, const Bins& bins,
                                  void* stream);

// The filter's product of two rows is off by at most this times the sum of its terms' magnitudes.
double tensor_product_error(std::int64_t dim);

// Rows are packed in multiples of packed_rows, features in multiples of packed_depth; what is not there is 0.
constexpr std::int64_t packed_rows = 128, packed_depth = 32;

// a = 2^scale (x − center) in the tensor cores' order, and of every row its square, its factor of the other side's
// length in the bound e, and its own part of e.
struct PackedSide {
    float* panels;  // [rows / 16, depth / 8, 32 lanes, 4]
    float* values;  // [3, rows]
    std::int64_t rows;
};

// Packs `count` rows: items[i], or i where items is null. squared_norms: of all rows of `features` for the cosine, else
// null. The query's factors hold the bound's, those of the gallery are lengths.
int pack_features_cuda(const Matrix& features, const std::int64_t* items, std::int64_t count,
                       const double* squared_norms, const double* center, int scale, bool query,
                       const PackedSide& packed, void* stream);

// What one call counts: all queries, and `count` gallery items that are not junk. At most 2^30 pairs.
struct RankingTile {
    PackedSide query, gallery;
    const std::int64_t* items;  // [count] rows of the gallery
    std::int64_t count;
    const float *below,
        *above;             // [M] enclose the true matches' distances, times 2^(2 scale), or twice that for the cosine
    std::uint32_t* listed;  // [Q · count] the pairs that the filter leaves open; as many as there are, so none is lost
    std::uint32_t* num_listed;  // [1] 0 before the call
};

int count_nonmatches_cuda(const Matrix& query, const Matrix& gallery, const SquaredNorms& norms, const Labels& labels,
                          const Matches& matches, const Bins& bins, int scale, const RankingTile& tile, void* stream);

}  // namespace sabmn
