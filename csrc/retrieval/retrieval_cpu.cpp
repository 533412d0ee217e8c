// Ranking by counting on the CPU.
//
// The features of a tile of queries and a tile of gallery items are widened to double and padded with zeros to whole lanes
// (a zero term changes no sum). A register block holds a few pairs; each pair has 16 lane sums: element k goes to lane
// k mod 16, in the order of k, and the lanes are added in a tree at the end. That order is the same for every vector width
// and every tile, and setup.py forbids fused multiply-adds here, so the same pair has the same bits everywhere.
// Threads own tiles of queries. A query's counts are integers in its own slice of the output: no atomics.

#include "retrieval/retrieval.h"

#include <omp.h>

namespace sabmn {
namespace SABMN_ISA {
namespace {

// ---- vectors: the native width, and as many pairs at once as its registers hold ----

#if defined(__AVX512F__)
constexpr int width = 8, query_block = 2, gallery_block = 4;  // 16 of 32 registers are sums
#elif defined(__AVX2__)
constexpr int width = 4, query_block = 1, gallery_block = 2;  // 8 of 16
#elif defined(__aarch64__)
constexpr int width = 2, query_block = 1, gallery_block = 2;  // 16 of 32
#else
constexpr int width = 2, query_block = 1, gallery_block = 1;  // 8 of 16
#endif
constexpr int parts = num_lanes / width;
typedef double Vector __attribute__((vector_size(width * sizeof(double)), aligned(sizeof(double)), may_alias));

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- reading a matrix as double ----

double widen(float value) { return value; }
double widen(double value) { return value; }

struct BFloat16 {
    uint16_t bits;
};
double widen(BFloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    __builtin_memcpy(&result, &bits, sizeof result);
    return result;
}

struct Float16 {
    uint16_t bits;
};
double widen(Float16 value) {
    // The exponent is moved by a multiplication by 2^112, exact for subnormals too; infinity and NaN have their own.
    const bool special = (value.bits & 0x7c00) == 0x7c00;
    const uint32_t bits = (static_cast<uint32_t>(value.bits & 0x7fff) << 13) | (special ? 0x7f800000u : 0u);
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, sizeof magnitude);
    if (!special) magnitude *= 0x1p112f;
    return value.bits & 0x8000 ? -magnitude : magnitude;
}

// `count` elements of one row from `first` on.
template <typename T>
void read_row(const Matrix& matrix, int64_t row, int64_t first, int64_t count, double* out) {
    const T* values = static_cast<const T*>(matrix.data) + row * matrix.row_stride + first * matrix.column_stride;
    if (matrix.column_stride == 1) {
        for (int64_t k = 0; k < count; ++k) out[k] = widen(values[k]);
    } else {
        for (int64_t k = 0; k < count; ++k) out[k] = widen(values[k * matrix.column_stride]);
    }
}

using ReadRow = void(const Matrix&, int64_t, int64_t, int64_t, double*);

ReadRow* row_reader(DType dtype) {
    switch (dtype) {
        case DType::float32: return read_row<float>;
        case DType::float64: return read_row<double>;
        case DType::bfloat16: return read_row<BFloat16>;
        case DType::float16: return read_row<Float16>;
    }
    return nullptr;
}

// ---- sums over the features, in the fixed order ----

// out[i][j] = Σ (q_i − g_j)² or Σ q_i·g_j for Q rows of `query` and G rows of `gallery`, each `padded` long.
template <Metric metric, int Q, int G>
void sum_block(const double* query, const double* gallery, int64_t padded, double* out, int64_t out_stride) {
    Vector sums[Q][G][parts] = {};
    for (int64_t k = 0; k < padded; k += num_lanes) {
#pragma GCC unroll 8
        for (int part = 0; part < parts; ++part) {
            Vector g[G];
#pragma GCC unroll 8
            for (int j = 0; j < G; ++j) {
                g[j] = *reinterpret_cast<const Vector*>(gallery + j * padded + k + part * width);
            }
#pragma GCC unroll 8
            for (int i = 0; i < Q; ++i) {
                const Vector q = *reinterpret_cast<const Vector*>(query + i * padded + k + part * width);
#pragma GCC unroll 8
                for (int j = 0; j < G; ++j) {
                    const Vector difference = q - g[j];
                    sums[i][j][part] += metric == Metric::cosine ? q * g[j] : difference * difference;
                }
            }
        }
    }
    for (int i = 0; i < Q; ++i) {
        for (int j = 0; j < G; ++j) {
            double lanes[num_lanes];
            __builtin_memcpy(lanes, sums[i][j], sizeof lanes);
            for (int half = num_lanes / 2; half > 0; half /= 2) {
                for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
            }
            out[i * out_stride + j] = lanes[0];
        }
    }
}

double norm(const double* row, int64_t padded) {
    double squared;
    sum_block<Metric::cosine, 1, 1>(row, row, padded, &squared, 1);
    return __builtin_sqrt(squared);
}

double cosine_distance(double dot, double query_norm, double gallery_norm) {
    return 1.0 - dot / (query_norm * gallery_norm);
}

// A tile of widened rows with their norms (cosine only).
struct Tile {
    double* rows;   // [capacity, padded]
    double* norms;  // [capacity]

    void load(const Matrix& matrix, ReadRow* read, int64_t first, int64_t count, int64_t capacity, Metric metric) {
        const int64_t padded = padded_dim(matrix.columns);
        for (int64_t i = 0; i < capacity; ++i) {
            double* row = rows + i * padded;
            const int64_t filled = i < count ? matrix.columns : 0;
            if (i < count) read(matrix, first + i, 0, matrix.columns, row);
            for (int64_t k = filled; k < padded; ++k) row[k] = 0.0;
            if (metric == Metric::cosine && i < count) norms[i] = norm(row, padded);
        }
    }
};

// ---- counting ----

// Adds, for items first … first + count − 1 of one query's gallery, each valid non-match to the bin of the first true match
// that it comes before; (distance, index) is compared.
void count_row(const double* distances, int64_t first, int64_t count, int64_t query, const Matches& matches) {
    const int64_t begin = matches.offsets[query], num_matches = matches.offsets[query + 1] - begin;
    const double* thresholds = matches.distances + begin;
    const int64_t* indices = matches.indices + begin;
    const int64_t pid = matches.query_pids[query];
    const int64_t* pids = matches.gallery_pids + first;
    for (int64_t j = 0; j < count; ++j) {
        const double distance = distances[j];
        if (distance > thresholds[num_matches - 1] || pids[j] == pid || pids[j] == -1) continue;
        int64_t bin = 0;  // how many true matches come before this item
        for (int64_t left = num_matches; left > 0;) {
            const int64_t half = left / 2, middle = bin + half;
            const bool match_first = thresholds[middle] < distance ||
                                     (thresholds[middle] == distance && indices[middle] < first + j);
            bin = match_first ? middle + 1 : bin;
            left = match_first ? left - half - 1 : half;
        }
        if (bin < num_matches) ++matches.counts[begin + bin];
    }
}

void clear_counts(const Matches& matches, int64_t query) {
    for (int64_t m = matches.offsets[query]; m < matches.offsets[query + 1]; ++m) matches.counts[m] = 0;
}

// From the bins to "all non-matches before match m".
void add_up_counts(const Matches& matches, int64_t query) {
    for (int64_t m = matches.offsets[query] + 1; m < matches.offsets[query + 1]; ++m) {
        matches.counts[m] += matches.counts[m - 1];
    }
}

bool has_matches(const Matches& matches, int64_t query) { return matches.offsets[query] < matches.offsets[query + 1]; }

template <Metric metric>
void count_query_tile(const Matrix& query, const Matrix& gallery, const Matches& matches, const Tiles& tiles,
                      int64_t first_query, double* workspace, ReadRow* read) {
    const int64_t padded = padded_dim(query.columns);
    const int64_t num_queries = smaller(tiles.query_rows, query.rows - first_query);
    bool needed = false;
    for (int64_t i = 0; i < num_queries; ++i) {
        needed |= has_matches(matches, first_query + i);
        clear_counts(matches, first_query + i);
    }
    if (!needed) return;

    Tile query_tile = {workspace, workspace + tiles.query_rows * padded};
    Tile gallery_tile = {query_tile.norms + tiles.query_rows, nullptr};
    gallery_tile.norms = gallery_tile.rows + tiles.gallery_rows * padded;
    double* distances = gallery_tile.norms + tiles.gallery_rows;  // [query_rows, gallery_rows]

    query_tile.load(query, read, first_query, num_queries, tiles.query_rows, metric);
    for (int64_t first = 0; first < gallery.rows; first += tiles.gallery_rows) {
        const int64_t count = smaller(tiles.gallery_rows, gallery.rows - first);
        gallery_tile.load(gallery, read, first, count, tiles.gallery_rows, metric);
        for (int64_t j = 0; j < count; j += gallery_block) {
            for (int64_t i = 0; i < num_queries; i += query_block) {
                sum_block<metric, query_block, gallery_block>(query_tile.rows + i * padded,
                                                              gallery_tile.rows + j * padded, padded,
                                                              distances + i * tiles.gallery_rows + j, tiles.gallery_rows);
            }
        }
        for (int64_t i = 0; i < num_queries; ++i) {
            if (!has_matches(matches, first_query + i)) continue;
            double* row = distances + i * tiles.gallery_rows;
            if (metric == Metric::cosine) {
                for (int64_t j = 0; j < count; ++j) {
                    row[j] = cosine_distance(row[j], query_tile.norms[i], gallery_tile.norms[j]);
                }
            }
            count_row(row, first, count, first_query + i, matches);
        }
    }
    for (int64_t i = 0; i < num_queries; ++i) add_up_counts(matches, first_query + i);
}

}  // namespace

int pair_distances(const Matrix& query, const Matrix& gallery, const int64_t* query_indices, const int64_t* gallery_indices,
                   int64_t num_pairs, Metric metric, double* distances, const Tiles& tiles) {
    ReadRow* read = row_reader(query.dtype);
    if (read == nullptr) return unsupported_dtype;
    const int64_t padded = padded_dim(query.columns), stride = rank_workspace(1, 1, query.columns);
#pragma omp parallel num_threads(tiles.threads)
    {
        double* workspace = tiles.workspace + omp_get_thread_num() * stride;
        Tile query_row = {workspace, workspace + padded};
        Tile gallery_row = {workspace + padded + 1, workspace + 2 * padded + 1};
        int64_t loaded = -1;
#pragma omp for schedule(static)
        for (int64_t pair = 0; pair < num_pairs; ++pair) {
            if (query_indices[pair] != loaded) {
                loaded = query_indices[pair];
                query_row.load(query, read, loaded, 1, 1, metric);
            }
            gallery_row.load(gallery, read, gallery_indices[pair], 1, 1, metric);
            double sum;
            if (metric == Metric::cosine) {
                sum_block<Metric::cosine, 1, 1>(query_row.rows, gallery_row.rows, padded, &sum, 1);
                sum = cosine_distance(sum, query_row.norms[0], gallery_row.norms[0]);
            } else {
                sum_block<Metric::squared_euclidean, 1, 1>(query_row.rows, gallery_row.rows, padded, &sum, 1);
            }
            distances[pair] = sum;
        }
    }
    return ok;
}

int count_nonmatches(const Matrix& query, const Matrix& gallery, const Matches& matches, Metric metric,
                     const Tiles& tiles) {
    ReadRow* read = row_reader(query.dtype);
    if (read == nullptr) return unsupported_dtype;
    const int64_t stride = rank_workspace(tiles.query_rows, tiles.gallery_rows, query.columns);
#pragma omp parallel for schedule(dynamic) num_threads(tiles.threads)
    for (int64_t first = 0; first < query.rows; first += tiles.query_rows) {
        double* workspace = tiles.workspace + omp_get_thread_num() * stride;
        if (metric == Metric::cosine) {
            count_query_tile<Metric::cosine>(query, gallery, matches, tiles, first, workspace, read);
        } else {
            count_query_tile<Metric::squared_euclidean>(query, gallery, matches, tiles, first, workspace, read);
        }
    }
    return ok;
}

int count_nonmatches_in_rows(const Matrix& rows, const Matches& matches, int threads) {
    ReadRow* read = row_reader(rows.dtype);
    if (read == nullptr) return unsupported_dtype;
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads)
    for (int64_t query = 0; query < rows.rows; ++query) {
        if (!has_matches(matches, query)) continue;
        clear_counts(matches, query);
        constexpr int64_t chunk = 1024;
        double distances[chunk];
        for (int64_t first = 0; first < rows.columns; first += chunk) {
            const int64_t count = smaller(chunk, rows.columns - first);
            read(rows, query, first, count, distances);
            count_row(distances, first, count, query, matches);
        }
        add_up_counts(matches, query);
    }
    return ok;
}

}  // namespace SABMN_ISA
}  // namespace sabmn
