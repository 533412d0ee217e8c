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
    if (row_reader(query.dtype) == nullptr) return unsupported_dtype;
#pragma omp parallel num_threads(threads)
    {
        double* const rows = workspace + omp_get_thread_num() * 2 * padded_dim(query.columns);
        ExactDistances exact{query, gallery, metric, rows};
        int64_t loaded = -1;
#pragma omp for schedule(static)
        for (int64_t pair = 0; pair < num_pairs; ++pair) {
            if (query_indices[pair] != loaded) exact.load_query(loaded = query_indices[pair]);
            distances[pair] = exact(gallery_indices[pair]);
        }
    }
    return ok;
}

int count_nonmatches_in_rows(const Matrix& rows, const Labels& labels, const Matches& matches, const Bins& bins,
                             int64_t* workspace, int threads) {
    ReadRow* read = row_reader(rows.dtype);
    if (read == nullptr) return unsupported_dtype;
#pragma omp parallel num_threads(threads)
    {
        // Each thread's own; the last bin takes what is not counted.
        int64_t* const histogram = workspace + omp_get_thread_num() * (bins.count + 1);
        for (int64_t bin = 0; bin <= bins.count; ++bin) histogram[bin] = 0;
#pragma omp for schedule(dynamic, 8)
        for (int64_t query = 0; query < rows.rows; ++query) {
            const int64_t begin = matches.offsets[query], num_matches = matches.offsets[query + 1] - begin;
            const double* thresholds = matches.distances + begin;
            int64_t* counts = matches.counts + begin;
            for (int64_t m = 0; m < num_matches; ++m) counts[m] = 0;
            const int32_t pid = labels.query_pids[query];
            if (pid == -1) continue;
            constexpr int64_t chunk = 1024;
            double distances[chunk];
            int64_t bin[chunk];
            for (int64_t first = 0; first < rows.columns; first += chunk) {
                const int64_t count = smaller(chunk, rows.columns - first);
                const int32_t* const pids = labels.gallery_pids + first;
                const int32_t* const camids = labels.query_camids == nullptr ? nullptr : labels.gallery_camids + first;
                read(rows, query, first, count, distances);
                for (int64_t j = 0; j < count; ++j) {
                    const int64_t found = bin_of(distances[j], bins);
                    bin[j] = (pids[j] == pid) | (pids[j] == -1) ? bins.count : found;
                }
                for (int64_t j = 0; camids != nullptr && j < count; ++j) {
                    bin[j] = camids[j] == labels.query_camids[query] ? bins.count : bin[j];
                }
                for (int64_t j = 0; j < count; ++j) ++histogram[bin[j]];
                if (num_matches == 0) continue;
                for (int64_t j = 0; j < count; ++j) {
                    if (distances[j] > thresholds[num_matches - 1] || pids[j] == pid || pids[j] == -1) continue;
                    const int64_t before = matches_before(distances[j], labels.first + first + j, thresholds,
                                                          matches.indices + begin, num_matches);
                    if (before < num_matches) ++counts[before];
                }
            }
            for (int64_t m = 1; m < num_matches; ++m) counts[m] += counts[m - 1];
        }
        const int64_t histograms = omp_get_num_threads();
#pragma omp for
        for (int64_t bin = 0; bin < bins.count; ++bin) {
            for (int64_t i = 0; i < histograms; ++i) bins.counts[bin] += workspace[i * (bins.count + 1) + bin];
        }
    }
    return ok;
}

}  // namespace SABMN_ISA
}  // namespace sabmn
