// Ranking by counting on the GPU, filter and refine: see count_cpu.cpp for the plan, the error bound and its proof.
//
// Of gallery items that are not junk a call takes a tile. One launch packs them; one, the filter, multiplies them with
// all queries, counts what is certain, and lists the other pairs; the last computes these in float64. No distance is
// stored. The list has room for every pair of the tile, so that it cannot overflow; how many it holds only the GPU
// knows.
//
// The product. A float32 x is x₁ + x₂ + δ with TF32 numbers x₁ (nearest: |x − x₁| ≤ 2⁻¹¹|x|) and x₂ (of x − x₁, which
// is exact), |δ| ≤ 2⁻²²|x|. a₁b₂ + a₂b₁ + a₁b₁ differs from ab by a₂b₂ and what the two δ make: less than 3.01 ·
// 2⁻²²|ab|, or 13 u in units of u = 2⁻²⁴. Tensor cores multiply exactly. How they add PTX leaves open, but for "at
// least single precision"; the GPUs that have been examined cut every addend to 24 bits or more below the largest one,
// four or eight products and the accumulator at a time, and cut the sum again (Fasi, Higham, Mikaitis, Pranesh:
// Numerical behavior of NVIDIA tensor cores, PeerJ CS 2021). For 8 features that is at most 12 cuts of 2⁻²³ times the
// sum of all magnitudes; 16 are allowed for: 32 u, and with the two small products 33 u. No accumulator goes on from
// one 8 features to the next: their sums are added in float32, first those of 64 features, then those of all. So γ = 46
// u + the roundings of 8 + ⌈D / 64⌉ + 1 sums. Underflow of parts and products is in the bound's absolute term.

#include <algorithm>
#include <climits>
#include <cmath>

#include "retrieval/retrieval_cuda.h"
#include "retrieval/retrieval_filter_kernels.cuh"

namespace sabmn {
namespace {

constexpr int max_refine_blocks = 2048;  // a GPU holds fewer at a time; they share the list
constexpr int64_t max_listed = int64_t{1} << 30;

int64_t blocks_of(int64_t size, int64_t per_block) { return (size + per_block - 1) / per_block; }

int status_of(cudaError_t status) { return status == cudaSuccess ? ok : cuda_error + static_cast<int>(status); }

bool supported(const Matrix& matrix) { return std::max(matrix.rows, matrix.columns) <= INT32_MAX; }

int launch_pairs(const ExactDistance& distance, const int64_t* query_indices, const int64_t* gallery_indices,
                 int64_t num_pairs, double* distances, void* stream) {
    const int64_t blocks = blocks_of(num_pairs, exact_pairs);
    if (!supported(distance.query) || !supported(distance.gallery) || blocks > INT32_MAX) return unsupported_size;
    if (num_pairs == 0) return ok;
    return status_of(launch(retrieval_pairs_kernel, static_cast<unsigned>(blocks), exact_threads, 0,
                            static_cast<cudaStream_t>(stream), distance, query_indices, gallery_indices, num_pairs,
                            distances));
}

}  // namespace

double tensor_product_error(int64_t dim) {
    constexpr int chunk = filter_chunk * filter_depth;
    const double sums = chunk / panel_depth + static_cast<double>(blocks_of(dim, chunk)) + 1;
    return 46.0 * unit_roundoff + 1.01 * rounding_error(sums);
}

int squared_norms_cuda(const Matrix& features, double* norms, void* stream) {
    return launch_pairs({features, features, nullptr, nullptr, true}, nullptr, nullptr, features.rows, norms, stream);
}

int pair_distances_cuda(const Matrix& query, const Matrix& gallery, const SquaredNorms& norms,
                        const int64_t* query_indices, const int64_t* gallery_indices, int64_t num_pairs,
                        double* distances, void* stream) {
    return launch_pairs({query, gallery, norms.query, norms.gallery, norms.query != nullptr}, query_indices,
                        gallery_indices, num_pairs, distances, stream);
}

int count_nonmatches_in_rows_cuda(const Matrix& rows, const Labels& labels, const Matches& matches, const Bins& bins,
                                  void* stream) {
    const int64_t blocks_per_row = blocks_of(rows.columns, exact_threads), blocks = rows.rows * blocks_per_row;
    if (!supported(rows) || blocks > INT32_MAX) return unsupported_size;
    if (blocks == 0) return ok;
    return status_of(launch(retrieval_rows_kernel, static_cast<unsigned>(blocks), exact_threads, 0,
                            static_cast<cudaStream_t>(stream), rows, labels, Counters{matches, bins},
                            static_cast<int>(blocks_per_row)));
}

int pack_features_cuda(const Matrix& features, const int64_t* items, int64_t count, const double* squared_norms,
                       const double* center, int scale, bool query, const PackedSide& packed, void* stream) {
    if (!supported(features)) return unsupported_size;
    if (packed.rows == 0) return ok;
    const Metric metric = squared_norms ? Metric::cosine : Metric::squared_euclidean;
    const Bound bound(features.columns, metric, scale, tensor_product_error(features.columns));
    const int steps = static_cast<int>(blocks_of(features.columns, packed_depth)) * filter_steps;
    const PackArguments arguments = {features,
                                     items,
                                     count,
                                     squared_norms,
                                     center,
                                     std::ldexp(1.0, scale),
                                     query ? bound.dot : 1.0,
                                     bound.sum,
                                     bound.absolute / 2,
                                     packed,
                                     steps};
    return status_of(launch(retrieval_pack_kernel, static_cast<unsigned>(packed.rows / panel_rows), pack_threads, 0,
                            static_cast<cudaStream_t>(stream), arguments));
}

int count_nonmatches_cuda(const Matrix& query, const Matrix& gallery, const SquaredNorms& norms, const Labels& labels,
                          const Matches& matches, const Bins& bins, int scale, const RankingTile& tile, void* stream) {
    const int64_t pairs = query.rows * tile.count;
    if (!supported(query) || !supported(gallery) || bins.count > INT32_MAX || pairs > max_listed)
        return unsupported_size;
    if (pairs == 0) return ok;
    const dim3 grid(static_cast<unsigned>(blocks_of(tile.count, filter_side)),
                    static_cast<unsigned>(blocks_of(query.rows, filter_side)));
    if (grid.y > 65535) return unsupported_size;
    const Metric metric = norms.query ? Metric::cosine : Metric::squared_euclidean;
    const Counters counters = {matches, bins};
    const FilterArguments filter = {tile.query,
                                    tile.gallery,
                                    labels,
                                    counters,
                                    tile.items,
                                    tile.below,
                                    tile.above,
                                    tile.listed,
                                    tile.num_listed,
                                    static_cast<int>(query.rows),
                                    static_cast<int>(tile.count),
                                    static_cast<int>(blocks_of(query.columns, packed_depth)) * filter_steps,
                                    lowest_float_bin(bins, scaled_exponent(metric, scale))};
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    const cudaError_t status = launch(retrieval_filter_kernel, grid, filter_threads, filter_shared_bytes, on, filter);
    if (status != cudaSuccess) return status_of(status);
    const ExactDistance distance = {query, gallery, norms.query, norms.gallery, norms.query != nullptr};
    const int64_t blocks = std::min<int64_t>(blocks_of(pairs, exact_pairs), max_refine_blocks);
    return status_of(launch(retrieval_refine_kernel, static_cast<unsigned>(blocks), exact_threads, 0, on, distance,
                            counters, tile.items, static_cast<int>(tile.count), labels.first, tile.listed,
                            tile.num_listed));
}

}  // namespace sabmn
