// k-reciprocal re-ranking on sparse rows. Threads own items or chunks of queries: no atomics, one order of every sum.

#include "retrieval/rerank.h"

#include <omp.h>

#include "retrieval/product.h"

namespace sabmn {
namespace SABMN_ISA {
namespace {

bool contains(const int64_t* items, int64_t count, int64_t item) {
    int64_t found = 0;
    for (int64_t i = 0; i < count; ++i) found |= items[i] == item;  // without a way out: a vector at a time
    return found != 0;
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

// ---- distances ----
//
// d = ‖a‖² + ‖b‖² − 2 a·b in double, or 1 − cos. Features of at most 24 significant bits, less the caller's center, keep at most
// 24: then each product of two is exact in double, a fused multiply-add has the bits of an addition, and the sums, one term
// after the other in chunks, have the same bits from every instruction set. float64 features get no fused multiply-add.

namespace {

constexpr int64_t chunk = 256;  // features: a chunk of a panel of queries stays in the first-level cache
constexpr int gallery_panel = panel_columns<double>;
constexpr int64_t tile_rows = 64 / gallery_panel * gallery_panel;  // of the gallery: with the rest in the second-level cache
constexpr int64_t group_panels = 8;                                // of queries, whose products with a tile are made together

// The rows first … first + count − 1 of a matrix less `center`, packed feature by feature, filled up with zeros; and their
// squared lengths.
template <int panel>
void pack_panel(const Matrix& matrix, ReadRow* read, const double* center, int64_t first, int64_t count, double* out,
                double* squares) {
    double totals[panel] = {};
    for (int64_t begin = 0; begin < matrix.columns; begin += chunk) {
        const int64_t size = smaller(chunk, matrix.columns - begin);
        double* const block = out + begin * panel;
        for (int64_t i = 0; i < panel; ++i) {
            double values[chunk] = {};
            if (i < count) {
                read(matrix, first + i, begin, size, values);
                for (int64_t k = 0; k < size; ++k) values[k] -= center[begin + k];
            }
            for (int64_t k = 0; k < size; ++k) block[k * panel + i] = values[k];
        }
        double sums[panel] = {};
        for (int64_t k = 0; k < size; ++k) {
            for (int i = 0; i < panel; ++i) sums[i] += block[k * panel + i] * block[k * panel + i];
        }
        for (int i = 0; i < panel; ++i) totals[i] += sums[i];
    }
    for (int i = 0; i < panel; ++i) squares[i] = totals[i];
}

// product[i][j] of some panels of queries with a tile of the gallery.
template <bool fused>
void multiply(const double* queries, int64_t query_panels, const double* tile, int64_t tile_panels, int64_t dim,
              double* product) {
    for (int64_t k = 0; k < dim; k += chunk) {
        const int64_t depth = smaller(chunk, dim - k);
        for (int64_t i = 0; i < query_panels; ++i) {
            for (int64_t j = 0; j < tile_panels; ++j) {
                multiply_panels<fused>(queries + (i * dim + k) * panel_rows, tile + (j * dim + k) * gallery_panel, depth,
                                       product + i * panel_rows * tile_rows + j * gallery_panel, tile_rows, k > 0);
            }
        }
    }
}

int64_t whole_panels(int64_t rows) { return (rows + panel_rows - 1) / panel_rows; }

// m of one query with every gallery item.
void shared_weights(const SparseRows& query_rows, int64_t query, const SparseRows& columns, double* shared, int64_t num_items) {
    for (int64_t item = 0; item < num_items; ++item) shared[item] = 0.0;
    for (int64_t entry = query_rows.offsets[query]; entry < query_rows.offsets[query + 1]; ++entry) {
        const int64_t column = query_rows.columns[entry];
        const double value = query_rows.values[entry];
        for (int64_t other = columns.offsets[column]; other < columns.offsets[column + 1]; ++other) {
            const double theirs = columns.values[other];
            shared[columns.columns[other]] += value < theirs ? value : theirs;
        }
    }
}

// From m to the new distances, in place.
template <Metric metric>
void mix(const double* products, double query_square, const double* squares, int64_t count, double lambda, double scale,
         double* out) {
    for (int64_t j = 0; j < count; ++j) {
        const double distance = metric == Metric::cosine
                                    ? cosine_distance(products[j], __builtin_sqrt(query_square), __builtin_sqrt(squares[j]))
                                    : (query_square + squares[j]) - 2.0 * products[j];
        out[j] = (1.0 - lambda) * (1.0 - out[j] / (2.0 - out[j])) + scale * distance;
    }
}

}  // namespace

int64_t reranked_workspace(int64_t dim, int64_t query_rows, int threads) {
    return threads * tile_rows * (dim + 1 + group_panels * panel_rows) + whole_panels(query_rows) * panel_rows * (dim + 1);
}

int reranked_distances(const Matrix& query, const Matrix& gallery, Metric metric, const double* center, const double* largest,
                       const SparseRows& query_rows, const SparseRows& columns, double lambda, double* distances,
                       double* workspace, int threads) {
    ReadRow* read = row_reader(query.dtype);
    if (read == nullptr) return unsupported_dtype;
    const int64_t dim = query.columns, num_items = gallery.rows, num_panels = whole_panels(query.rows);
    const auto multiply_with = query.dtype == DType::float64 ? multiply<false> : multiply<true>;
    const auto mix_row = metric == Metric::cosine ? mix<Metric::cosine> : mix<Metric::squared_euclidean>;
    const int64_t own_size = tile_rows * (dim + 1 + group_panels * panel_rows);
    double* const queries = workspace + threads * own_size;
    double* const query_squares = queries + num_panels * panel_rows * dim;
#pragma omp parallel num_threads(threads)
    {
        double* const tile = workspace + omp_get_thread_num() * own_size;
        double* const squares = tile + tile_rows * dim;
        double* const product = squares + tile_rows;
#pragma omp for schedule(dynamic) nowait
        for (int64_t panel = 0; panel < num_panels; ++panel) {
            const int64_t first = panel * panel_rows;
            pack_panel<panel_rows>(query, read, center, first, smaller(panel_rows, query.rows - first), queries + first * dim,
                                   query_squares + first);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < query.rows; ++i) {
            shared_weights(query_rows, i, columns, distances + i * num_items, num_items);
        }
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < num_items; first += tile_rows) {
            const int64_t count = smaller(tile_rows, num_items - first);
            const int64_t tile_panels = (count + gallery_panel - 1) / gallery_panel;
            for (int64_t j = 0; j < tile_panels * gallery_panel; j += gallery_panel) {
                pack_panel<gallery_panel>(gallery, read, center, first + j, smaller(gallery_panel, count - j), tile + j * dim,
                                          squares + j);
            }
            for (int64_t panel = 0; panel < num_panels; panel += group_panels) {
                const int64_t begin = panel * panel_rows, panels = smaller(group_panels, num_panels - panel);
                multiply_with(queries + begin * dim, panels, tile, tile_panels, dim, product);
                for (int64_t i = begin; i < smaller(begin + panels * panel_rows, query.rows); ++i) {
                    const double scale = largest[i] > 0.0 ? lambda / largest[i] : 0.0;
                    mix_row(product + (i - begin) * tile_rows, query_squares[i], squares, count, lambda, scale,
                            distances + i * num_items + first);
                }
            }
        }
    }
    return ok;
}

}  // namespace SABMN_ISA
}  // namespace sabmn
