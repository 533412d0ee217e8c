// The exact distances of listed pairs, and counting in given distances. Threads own pairs or queries.

#include "retrieval/exact.h"

#include <omp.h>

namespace sabmn {
namespace SABMN_ISA {

int squared_norms(const Matrix& features, double* norms, double* workspace, int threads) {
    ReadRow* read = row_reader(features.dtype);
    if (read == nullptr) return unsupported_dtype;
    const int64_t padded = padded_dim(features.columns);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < features.rows; ++row) {
        double* values = workspace + omp_get_thread_num() * padded;
        load_row(features, read, row, values);
        norms[row] = sum<Metric::cosine>(values, values, padded);
    }
    return ok;
}

int pair_distances(const Matrix& query, const Matrix& gallery, const int64_t* query_indices, const int64_t* gallery_indices,
                   int64_t num_pairs, Metric metric, double* distances, double* workspace, int threads) {
    ReadRow* read = row_reader(query.dtype);
    if (read == nullptr) return unsupported_dtype;
    const int64_t padded = padded_dim(query.columns);
#pragma omp parallel num_threads(threads)
    {
        double* query_row = workspace + omp_get_thread_num() * 2 * padded;
        double* gallery_row = query_row + padded;
        double query_norm = 0.0;
        int64_t loaded = -1;
#pragma omp for schedule(static)
        for (int64_t pair = 0; pair < num_pairs; ++pair) {
            if (query_indices[pair] != loaded) {
                loaded = query_indices[pair];
                load_row(query, read, loaded, query_row);
                if (metric == Metric::cosine) query_norm = norm(query_row, padded);
            }
            load_row(gallery, read, gallery_indices[pair], gallery_row);
            distances[pair] = metric == Metric::cosine
                                  ? cosine_distance(sum<Metric::cosine>(query_row, gallery_row, padded), query_norm,
                                                    norm(gallery_row, padded))
                                  : sum<Metric::squared_euclidean>(query_row, gallery_row, padded);
        }
    }
    return ok;
}

int count_nonmatches_in_rows(const Matrix& rows, const Labels& labels, const Matches& matches, const Bins& bins,
                             int threads) {
    ReadRow* read = row_reader(rows.dtype);
    if (read == nullptr) return unsupported_dtype;
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads)
    for (int64_t query = 0; query < rows.rows; ++query) {
        const int64_t begin = matches.offsets[query], num_matches = matches.offsets[query + 1] - begin;
        const double* thresholds = matches.distances + begin;
        int64_t* counts = matches.counts + begin;
        for (int64_t m = 0; m < num_matches; ++m) counts[m] = 0;
        const int32_t pid = labels.query_pids[query];
        if (pid == -1) continue;
        constexpr int64_t chunk = 1024;
        double distances[chunk];
        for (int64_t first = 0; first < rows.columns; first += chunk) {
            const int64_t count = smaller(chunk, rows.columns - first);
            read(rows, query, first, count, distances);
            for (int64_t j = 0; j < count; ++j) {
                const int64_t item = first + j;
                if (labels.gallery_pids[item] == pid || labels.gallery_pids[item] == -1) continue;
                if (labels.query_camids == nullptr || labels.gallery_camids[item] != labels.query_camids[query]) {
#pragma omp atomic
                    ++bins.counts[bin_of(distances[j], bins)];
                }
                if (num_matches == 0 || distances[j] > thresholds[num_matches - 1]) continue;
                const int64_t before =
                    matches_before(distances[j], labels.first + item, thresholds, matches.indices + begin, num_matches);
                if (before < num_matches) ++counts[before];
            }
        }
        for (int64_t m = 1; m < num_matches; ++m) counts[m] += counts[m - 1];
    }
    return ok;
}

}  // namespace SABMN_ISA
}  // namespace sabmn
