// k-reciprocal re-ranking on sparse rows. Threads own items or chunks of queries: no atomics, one order of every sum.

#include "retrieval/rerank.h"

#include <omp.h>

#include "retrieval/exact.h"

namespace sabmn {
namespace SABMN_ISA {
namespace {

bool contains(const int64_t* items, int64_t count, int64_t item) {
    for (int64_t i = 0; i < count; ++i) {
        if (items[i] == item) return true;
    }
    return false;
}

// The place of the first entry that is not below `item`.
int64_t lower_bound(const int64_t* items, int64_t count, int64_t item) {
    int64_t first = 0;
    while (count > 0) {
        const int64_t half = count / 2;
        const bool below = items[first + half] < item;
        first = below ? first + half + 1 : first;
        count = below ? count - half - 1 : half;
    }
    return first;
}

// Adds an item to an ascending list unless it is there.
void insert(int64_t* items, int64_t& count, int64_t item) {
    const int64_t place = lower_bound(items, count, item);
    if (place < count && items[place] == item) return;
    for (int64_t i = count; i > place; --i) items[i] = items[i - 1];
    items[place] = item;
    ++count;
}

// Those of the first `width` neighbours of `item` that have it among their own first `width`; returns how many.
int64_t reciprocal(const Neighbors& neighbors, int64_t item, int64_t width, int64_t* found) {
    int64_t count = 0;
    for (int64_t i = 0; i < width; ++i) {
        const int64_t other = neighbors.items[item * neighbors.width + i];
        if (contains(neighbors.items + other * neighbors.width, width, item)) found[count++] = other;
    }
    return count;
}

}  // namespace

int reciprocal_neighbors(const Neighbors& neighbors, int64_t k_width, int64_t half_width, const SparseOutput& output,
                         int64_t* workspace, int threads) {
    const int64_t own_size = k_width + half_width + k_width * (half_width + 1);
#pragma omp parallel for schedule(dynamic, 64) num_threads(threads)
    for (int64_t item = 0; item < neighbors.count; ++item) {
        int64_t* first = workspace + omp_get_thread_num() * own_size;
        int64_t* second = first + k_width;
        int64_t* expanded = second + half_width;
        const int64_t num_first = reciprocal(neighbors, item, k_width, first);
        int64_t length = 0;
        for (int64_t i = 0; i < num_first; ++i) insert(expanded, length, first[i]);
        for (int64_t i = 0; i < num_first; ++i) {
            const int64_t num_second = reciprocal(neighbors, first[i], half_width, second);
            int64_t shared = 0;
            for (int64_t j = 0; j < num_second; ++j) shared += contains(first, num_first, second[j]);
            if (3 * shared <= 2 * num_second) continue;
            for (int64_t j = 0; j < num_second; ++j) insert(expanded, length, second[j]);
        }
        output.lengths[item] = length;
        if (output.columns == nullptr) continue;
        for (int64_t i = 0; i < length; ++i) output.columns[output.offsets[item] + i] = expanded[i];
    }
    return ok;
}

int mean_of_rows(const SparseRows& rows, const Neighbors& neighbors, int64_t k, const SparseOutput& output,
                 double* workspace, int threads) {
#pragma omp parallel num_threads(threads)
    {
        double* sums = workspace + omp_get_thread_num() * 2 * neighbors.count;  // 0 where there is no entry: all are positive
        int64_t* columns = reinterpret_cast<int64_t*>(sums + neighbors.count);
        for (int64_t i = 0; i < neighbors.count; ++i) sums[i] = 0.0;
#pragma omp for schedule(dynamic, 64)
        for (int64_t item = 0; item < neighbors.count; ++item) {
            int64_t length = 0;
            for (int64_t i = 0; i < k; ++i) {
                const int64_t neighbor = neighbors.items[item * neighbors.width + i];
                for (int64_t entry = rows.offsets[neighbor]; entry < rows.offsets[neighbor + 1]; ++entry) {
                    const int64_t column = rows.columns[entry];
                    if (sums[column] == 0.0) insert(columns, length, column);
                    sums[column] += rows.values[entry];
                }
            }
            output.lengths[item] = length;
            for (int64_t i = 0; i < length; ++i) {
                if (output.columns != nullptr) {
                    output.columns[output.offsets[item] + i] = columns[i];
                    output.values[output.offsets[item] + i] = sums[columns[i]] / static_cast<double>(k);
                }
                sums[columns[i]] = 0.0;
            }
        }
    }
    return ok;
}

namespace {

constexpr int64_t tile_rows = 32;  // of the gallery, as double: with a chunk of queries in the second-level cache

// The sums of exact.h, several at a time: as many as stay in registers, since one alone waits for its own additions, and for
// two queries where there is room, since each row of the gallery then leaves the second-level cache half as often.
constexpr int group_queries = parts == 2 ? 2 : 1, group_rows = 8 / parts;

template <Metric metric>
void group_of_sums(const double* query, const double* gallery, int64_t padded, double (*out)[group_rows]) {
    Doubles sums[group_queries][group_rows][parts] = {};
    for (int64_t k = 0; k < padded; k += num_lanes) {
#pragma GCC unroll 8
        for (int part = 0; part < parts; ++part) {
            Doubles q[group_queries];
#pragma GCC unroll 2
            for (int i = 0; i < group_queries; ++i) q[i] = load(query + i * padded + k + part * double_width);
#pragma GCC unroll 4
            for (int j = 0; j < group_rows; ++j) {
                const Doubles g = load(gallery + j * padded + k + part * double_width);
#pragma GCC unroll 2
                for (int i = 0; i < group_queries; ++i) {
                    const Doubles difference = q[i] - g;
                    sums[i][j][part] += metric == Metric::cosine ? q[i] * g : difference * difference;
                }
            }
        }
    }
#pragma GCC unroll 2
    for (int i = 0; i < group_queries; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < group_rows; ++j) {
            double lanes[num_lanes];
#pragma GCC unroll 8
            for (int part = 0; part < parts; ++part) {
                *reinterpret_cast<Doubles*>(lanes + part * double_width) = sums[i][j][part];
            }
            for (int half = num_lanes / 2; half > 0; half /= 2) {
                for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
            }
            out[i][j] = lanes[0];
        }
    }
}

struct Rows {
    const double* values;  // [count rounded up to a whole group, padded]
    const double* norms;
    int64_t count;
};

template <Metric metric>
void tile_of_distances(const Rows& query, const Rows& gallery, int64_t padded, double* out, int64_t stride) {
    for (int64_t first_query = 0; first_query < query.count; first_query += group_queries) {
        for (int64_t first_row = 0; first_row < gallery.count; first_row += group_rows) {
            double sums[group_queries][group_rows];
            group_of_sums<metric>(query.values + first_query * padded, gallery.values + first_row * padded, padded, sums);
            for (int64_t i = first_query; i < smaller(first_query + group_queries, query.count); ++i) {
                for (int64_t j = first_row; j < smaller(first_row + group_rows, gallery.count); ++j) {
                    const double total = sums[i - first_query][j - first_row];
                    out[i * stride + j] = metric == Metric::cosine
                                              ? cosine_distance(total, query.norms[i], gallery.norms[j])
                                              : total;
                }
            }
        }
    }
}

// Whole groups, and whole cache lines of doubles: a vector that crosses two lines is loaded twice.
int64_t whole_lines(int64_t count) { return (count + 7) / 8 * 8; }

// Rows as double, and their norms.
void load_rows(const Matrix& matrix, ReadRow* read, int64_t first, int64_t count, double* rows, double* norms) {
    const int64_t padded = padded_dim(matrix.columns);
    for (int64_t i = 0; i < count; ++i) {
        load_row(matrix, read, first + i, rows + i * padded);
        norms[i] = norm(rows + i * padded, padded);
    }
}

}  // namespace

int64_t reranked_workspace(int64_t dim, int64_t gallery_rows, int64_t chunk, int threads) {
    return threads * ((whole_lines(chunk) + tile_rows) * (padded_dim(dim) + 1) + whole_lines(gallery_rows));
}

int reranked_distances(const Matrix& query, const Matrix& gallery, Metric metric, const double* largest,
                       const SparseRows& query_rows, const SparseRows& columns, double lambda, int64_t chunk,
                       double* distances, double* workspace, int threads) {
    ReadRow* read = row_reader(query.dtype);
    if (read == nullptr) return unsupported_dtype;
    const int64_t padded = padded_dim(query.columns), num_items = gallery.rows, chunk_rows = whole_lines(chunk);
    const auto tile_distances = metric == Metric::cosine ? tile_of_distances<Metric::cosine>
                                                         : tile_of_distances<Metric::squared_euclidean>;
#pragma omp parallel num_threads(threads)
    {
        double* shared = workspace + omp_get_thread_num() * reranked_workspace(query.columns, num_items, chunk, 1);
        double* query_norms = shared + whole_lines(num_items);
        double* tile_norms = query_norms + chunk_rows;
        double* query_values = tile_norms + tile_rows;
        double* tile_values = query_values + chunk_rows * padded;
        // Rows that only fill up a group are computed, and must hold numbers.
        for (int64_t i = 0; i < (chunk_rows + tile_rows) * padded; ++i) query_values[i] = 0.0;
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < query.rows; first += chunk) {
            const int64_t num_queries = smaller(chunk, query.rows - first);
            load_rows(query, read, first, num_queries, query_values, query_norms);
            for (int64_t tile = 0; tile < num_items; tile += tile_rows) {
                const int64_t count = smaller(tile_rows, num_items - tile);
                load_rows(gallery, read, tile, count, tile_values, tile_norms);
                tile_distances({query_values, query_norms, num_queries}, {tile_values, tile_norms, count}, padded,
                               distances + first * num_items + tile, num_items);
            }
            for (int64_t i = first; i < first + num_queries; ++i) {
                for (int64_t item = 0; item < num_items; ++item) shared[item] = 0.0;
                for (int64_t entry = query_rows.offsets[i]; entry < query_rows.offsets[i + 1]; ++entry) {
                    const int64_t column = query_rows.columns[entry];
                    const double value = query_rows.values[entry];
                    for (int64_t other = columns.offsets[column]; other < columns.offsets[column + 1]; ++other) {
                        const double theirs = columns.values[other];
                        shared[columns.columns[other]] += value < theirs ? value : theirs;
                    }
                }
                double* out = distances + i * num_items;
                const double scale = largest[i] > 0.0 ? lambda / largest[i] : 0.0;
                for (int64_t item = 0; item < num_items; ++item) {
                    out[item] = (1.0 - lambda) * (1.0 - shared[item] / (2.0 - shared[item])) + scale * out[item];
                }
            }
        }
    }
    return ok;
}

}  // namespace SABMN_ISA
}  // namespace sabmn
