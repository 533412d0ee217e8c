// Ranking by counting: filter and refine. No sort, no distance matrix; the result is that of float64 distances.
//
// Filter. With a = 2^scale (q − c), b = 2^scale (g − c) for a fixed vector c (unit vectors q, g for the cosine), the distance
// is, up to a power of two, ‖a‖² + ‖b‖² − 2 a·b. The squares are summed in double; the dot product s is a float32 product of
// tiles. What is wanted is a bound e of |x − exact| for x = (A + B) − 2 s computed in float32, where A, B round ‖a‖², ‖b‖²
// and "exact" is the float64 distance that defines the ranking. u = 2⁻²⁴, D the number of features.
//   1. â = a (1 + δ) elementwise, |δ| ≤ u, so |â·b̂ − a·b| ≤ (2u + u²) Σ|a_k b_k| ≤ (2u + u²) ‖a‖‖b‖.
//   2. A sum of products in which every term goes through at most m roundings is off by at most γ Σ|â_k b̂_k|, where
//      γ = m u / (1 − m u), with fused multiply-adds or without. Here m = 64 + ⌈D / 64⌉ + 1: the products of 64 features are
//      summed, and then those sums. So |s − a·b| ≤ β ‖a‖‖b‖ with β = γ (1 + u)² + 2u + u².
//   3. Rounding of A, of B, of their sum, of x, of x ± e: at most u (A + B), 1.0001 u (A + B), 2.0001 u (A + B) and
//      u (2.0001 (A + B) + e) in turn, since |x| ≤ 2.0001 (A + B). Together less than 7 u (A + B) + u e.
//   4. ‖a‖², ‖b‖² in double and the exact distance: each is off by at most (D + 64) 2⁻⁵² of 2 (A + B); for the cosine by
//      32 (D + 64) 2⁻⁵² times 2^(2 scale), since unit vectors are subtracted from c.
//   5. Underflow, gradual or flushed to zero: each of at most 20 D roundings, as many as a product on the tensor cores takes,
//      loses at most 2⁻¹²⁶ more, of one factor of at most √2 or of a term. The exact distance's own, D 2⁻¹⁰⁷⁴, times
//      2^(2 scale).
// So e = 2 β ‖a‖‖b‖ + κ (A + B) + η, with every constant rounded up and 1 + 2⁻¹⁰ to spare for the arithmetic of e itself.
// lo = x − e and hi = x + e then enclose the exact distance, and a pair is certain where both lie on the same side of each
// threshold (a true match's distance), and in the same bin of the histogram. Nothing rests on who computes the product.
//
// Refine. Every other pair is computed exactly and compared as (distance, index). A row that is too long for the scale, or not
// finite, has e = ∞: all its pairs are refined.
//
// Plan. A block of queries is packed once: panels of `panel_rows` rows, feature by feature. The gallery passes by in tiles,
// packed in panels of `tile_columns`, junk left out. In each tile threads take a few query panels at a time: product into a
// small buffer, then the buffer's rows are counted while they are in the cache. A query's counts and a thread's histogram
// have one writer: no atomics.

#include "retrieval/bound.h"
#include "retrieval/product.h"

#include <omp.h>

namespace sabmn {
namespace SABMN_ISA {
namespace {

constexpr int tile_columns = panel_columns<float>;
constexpr int64_t chunk = 64;  // features summed in registers before the sum goes to memory: keeps the error bound small

// ---- the error bound ----

// Of a term of the product: see 2. above.
double product_error(int64_t dim) { return rounding_error(static_cast<double>(chunk + (dim + chunk - 1) / chunk + 1)); }

// ---- packing ----

// What stands beside the packed rows of one side.
struct Packed {
    float* panels;   // [rows / panel, dim, panel]
    float* squares;  // [rows] A or B
    float* lengths;  // [rows] ‖a‖ or ‖b‖, not rounded down
    float* errors;   // [rows] this row's part of e: sum · A + absolute / 2
    double* norms;   // [rows] of the row as it is (cosine only)
};

struct Sides {
    const Matrix& query;
    const Matrix& gallery;
    const Labels& labels;
    const Matches& matches;
    const Bins& bins;
    const Filter& filter;
    Bound bound;
    ReadRow* read;
    int64_t dim, padded;
};

// Packs one panel: `count` of its `panel` rows are there, items[i] or first + i; the others are zero.
template <Metric metric>
void pack_panel(const Sides& sides, const Matrix& matrix, const int64_t* items, int64_t first, int64_t count, int panel,
                int64_t position, const Packed& packed, double* row) {
    float* out = packed.panels + position * sides.dim;
    const double scale = __builtin_ldexp(1.0, sides.filter.scale);
    constexpr int64_t block = 128;  // of features: what is written stays in the first-level cache
    double squares[64] = {}, inverse[64];
    for (int64_t i = 0; i < count; ++i) {
        inverse[i] = 1.0;
        if (metric == Metric::cosine) {
            load_row(matrix, sides.read, items ? items[i] : first + i, row);
            packed.norms[position + i] = norm(row, sides.padded);
            inverse[i] = 1.0 / packed.norms[position + i];
        }
    }
    for (int64_t begin = 0; begin < sides.dim; begin += block) {
        const int64_t size = smaller(block, sides.dim - begin);
        for (int64_t i = 0; i < panel; ++i) {
            if (i >= count) {
                for (int64_t k = 0; k < size; ++k) out[(begin + k) * panel + i] = 0.0f;
                continue;
            }
            double values[block] = {};
            sides.read(matrix, items ? items[i] : first + i, begin, size, values);
            const double* center = sides.filter.center + begin;
            for (int64_t k = 0; k < size; ++k) values[k] = (values[k] * inverse[i] - center[k]) * scale;
            for (int64_t k = 0; k < size; ++k) out[(begin + k) * panel + i] = static_cast<float>(values[k]);
            squares[i] += sum<Metric::cosine>(values, values, block);
        }
    }
    for (int64_t i = 0; i < count; ++i) {
        const double square = squares[i];
        const bool usable = square <= 2.0;  // false for NaN
        packed.squares[position + i] = usable ? static_cast<float>(square) : 0.0f;
        packed.lengths[position + i] = round_up(__builtin_sqrt(square));
        packed.errors[position + i] =
            usable ? round_up(sides.bound.sum * square + sides.bound.absolute / 2) : __builtin_inff();
        if (!usable) {
            packed.lengths[position + i] = 1.0f;
            for (int64_t k = 0; k < sides.dim; ++k) out[k * panel + i] = 0.0f;
        }
    }
}

// ---- counting one query in one tile ----

constexpr int64_t many_matches = 64;  // from here on a search per item is cheaper than a comparison per match

constexpr int32_t no_camera = 0;

struct Tile {
    Packed packed;
    int64_t* items;    // [tile_rows] rows of the gallery
    int32_t* pids;     // [tile_rows]
    int32_t* camids;   // [tile_rows]
    int64_t count;
};

// Each thread's own.
struct Scratch {
    float* product;      // [task_panels · panel_rows, tile_rows]
    float *low, *high;   // [tile_rows] lo and hi
    int32_t* bins;       // [tile_rows]
    int32_t* uncertain;  // [tile_rows] bit 0: for the counts, bit 1: for the histogram
    int32_t* listed;     // [tile_rows + 1] the items with a bit
    double* query_row;   // [padded]
    double* row;         // [padded]
    int64_t* histogram;  // [bins.count + 1]; the last takes what is not counted
};

int32_t float_bits(float value) {
    int32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

template <Metric metric>
double exact_distance(const Sides& sides, const Scratch& scratch, double query_norm, const Tile& tile, int64_t j) {
    const double total =
        sum_with_row<metric>(scratch.query_row, sides.gallery, sides.read, tile.items[j], scratch.row);
    return metric == Metric::cosine ? cosine_distance(total, query_norm, tile.packed.norms[j]) : total;
}

// lo and hi of the query's pairs with the tile; ∞ where the item has the query's own pid.
void enclose(const Sides& sides, const float* product, float square, float length, float error, int32_t pid,
             const Tile& tile, const Scratch& scratch) {
    const float factor = round_up(sides.bound.dot * length);
    const float *const squares = tile.packed.squares, *const lengths = tile.packed.lengths;
    const float* const errors = tile.packed.errors;
    const int32_t* const pids = tile.pids;
    float *const __restrict low = scratch.low, *const __restrict high = scratch.high;
    const int64_t count = tile.count;
    for (int64_t j = 0; j < count; ++j) {
        const float x = (square + squares[j]) - 2.0f * product[j];
        const float e = factor * lengths[j] + (error + errors[j]);
        const bool same = pids[j] == pid;
        low[j] = same ? __builtin_inff() : (x - e) + 0.0f;  // + 0: no −0, whose bits are out of order
        high[j] = same ? __builtin_inff() : x + e;
    }
}

struct Threshold {
    float below, above;  // enclose the true match's distance, scaled as x is
};

// Sets scratch.bins and the bits 1; returns how many there are.
int32_t find_bins(const Sides& sides, int32_t pid, int32_t camid, int32_t lowest, const Tile& tile, const Scratch& scratch) {
    const int32_t last = static_cast<int32_t>(sides.bins.count) - 1;
    const float *const lows = scratch.low, *const highs = scratch.high;
    const int32_t *const pids = tile.pids, *const camids = tile.camids;
    int32_t* const __restrict bins = scratch.bins;
    int32_t* const __restrict uncertain = scratch.uncertain;
    const int64_t count = tile.count;
    int32_t found = 0;
    for (int64_t j = 0; j < count; ++j) {
        int32_t low = ((float_bits(lows[j]) - 1) >> (23 - bin_bits)) - lowest;
        int32_t high = ((float_bits(highs[j]) - 1) >> (23 - bin_bits)) - lowest;
        low = low < 0 ? 0 : low > last ? last : low;
        high = high < 0 ? 0 : high > last ? last : high;
        const int32_t counted = (pids[j] != pid) & (camids[j] != camid);
        const int32_t certain = low == high;
        bins[j] = counted & certain ? low : last + 1;
        uncertain[j] = (counted & ~certain) << 1;
        found += counted & ~certain;
    }
    return found;
}

// Counts the pairs of one query with a tile.
template <Metric metric>
struct Counter {
    const Sides& sides;
    const Tile& tile;
    const Scratch& scratch;
    const Packed& queries;  // of this block
    double unit;            // x = unit · distance
    int32_t lowest;         // key of the lowest bin for x

    void operator()(int64_t query, int64_t position, const float* product) const {
        const int32_t pid = sides.labels.query_pids[query];
        if (pid == -1) return;
        enclose(sides, product, queries.squares[position], queries.lengths[position], queries.errors[position], pid, tile,
                scratch);
        const int32_t camid = sides.labels.query_camids == nullptr ? ~no_camera : sides.labels.query_camids[query];
        int64_t uncertain = find_bins(sides, pid, camid, lowest, tile, scratch);
        for (int64_t j = 0; j < tile.count; ++j) ++scratch.histogram[scratch.bins[j]];

        const int64_t begin = sides.matches.offsets[query], num_matches = sides.matches.offsets[query + 1] - begin;
        const double* distances = sides.matches.distances + begin;
        const int64_t* indices = sides.matches.indices + begin;
        int64_t* counts = sides.matches.counts + begin;
        if (num_matches <= many_matches) {
            Threshold thresholds[many_matches];
            for (int64_t m = 0; m < num_matches; ++m) {
                const double t = distances[m] * unit, margin = (t < 0 ? -t : t) * 0x1p-22 + 0x1p-126;
                thresholds[m] = {static_cast<float>(t - margin), static_cast<float>(t + margin)};
                uncertain += compare(thresholds[m], counts[m]);
            }
            if (uncertain == 0) return;
            for_uncertain(query, position, [&](int64_t j, int64_t index, double distance) {
                for (int64_t m = 0; m < num_matches; ++m) {
                    if (scratch.low[j] > thresholds[m].above || scratch.high[j] < thresholds[m].below) continue;
                    counts[m] += distance < distances[m] || (distance == distances[m] && index < indices[m]);
                }
            });
        } else {
            uncertain += search(distances, num_matches, counts);
            if (uncertain == 0) return;
            for_uncertain(query, position, [&](int64_t, int64_t index, double distance) {
                const int64_t before = matches_before(distance, index, distances, indices, num_matches);
                if (before < num_matches) ++counts[before];
            });
        }
    }

    // Adds the items that are certainly before one match, and marks those that may be; returns how many.
    int32_t compare(Threshold threshold, int64_t& count) const {
        const float *const low = scratch.low, *const high = scratch.high;
        int32_t* const __restrict uncertain = scratch.uncertain;
        const int64_t size = tile.count;
        int32_t before = 0, possibly = 0;
        for (int64_t j = 0; j < size; ++j) {
            before += high[j] < threshold.below;
            possibly += low[j] <= threshold.above;
        }
        count += before;
        if (possibly != before) {
            for (int64_t j = 0; j < size; ++j) uncertain[j] |= (low[j] <= threshold.above) & !(high[j] < threshold.below);
        }
        return possibly - before;
    }

    // The same for all matches at once: counts[m] takes the items that come between matches m − 1 and m.
    int64_t search(const double* distances, int64_t num_matches, int64_t* counts) const {
        int64_t found = 0;
        const double last = distances[num_matches - 1] * unit;
        for (int64_t j = 0; j < tile.count; ++j) {
            if (scratch.low[j] > last) continue;
            const double low = scratch.low[j], high = scratch.high[j];
            int64_t first = 0;  // the first match that is not certainly before the item
            for (int64_t left = num_matches; left > 0;) {
                const int64_t half = left / 2;
                const bool before = distances[first + half] * unit < low;
                first = before ? first + half + 1 : first;
                left = before ? left - half - 1 : half;
            }
            if (first == num_matches || distances[first] * unit > high) {
                if (first < num_matches) ++counts[first];
            } else {
                scratch.uncertain[j] |= 1;
                ++found;
            }
        }
        return found;
    }

    // Computes the marked pairs exactly; each goes to its bin, and to `count` where its place among the matches is open.
    template <typename Count>
    void for_uncertain(int64_t query, int64_t position, const Count& count) const {
        load_row(sides.query, sides.read, query, scratch.query_row);
        const double query_norm = metric == Metric::cosine ? queries.norms[position] : 1.0;
        int64_t num_listed = 0;
        for (int64_t j = 0; j < tile.count; ++j) {
            scratch.listed[num_listed] = static_cast<int32_t>(j);
            num_listed += scratch.uncertain[j] != 0;
        }
        for (int64_t i = 0; i < num_listed; ++i) {
            const int64_t j = scratch.listed[i];
            const double distance = exact_distance<metric>(sides, scratch, query_norm, tile, j);
            if (scratch.uncertain[j] & 2) ++scratch.histogram[bin_of(distance, sides.bins)];
            if (scratch.uncertain[j] & 1) count(j, sides.labels.first + tile.items[j], distance);
        }
    }
};

// ---- the workspace ----

// Hands out parts of one piece of memory; with null it only measures.
struct Arena {
    char* base;
    int64_t used = 0;

    template <typename T>
    T* take(int64_t count) {
        char* start = base + used;
        used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        return reinterpret_cast<T*>(start);
    }
};

constexpr int64_t task_panels = 4;  // query panels that a thread takes at a time

int64_t round_to(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

Packed take_packed(Arena& arena, int64_t rows, int64_t dim) {
    Packed packed;
    packed.panels = arena.take<float>(rows * dim);
    packed.squares = arena.take<float>(rows);
    packed.lengths = arena.take<float>(rows);
    packed.errors = arena.take<float>(rows);
    packed.norms = arena.take<double>(rows);
    return packed;
}

Tile take_tile(Arena& arena, int64_t tile_rows, int64_t dim) {
    Tile tile;
    tile.packed = take_packed(arena, tile_rows, dim);
    tile.items = arena.take<int64_t>(tile_rows);
    tile.pids = arena.take<int32_t>(tile_rows);
    tile.camids = arena.take<int32_t>(tile_rows);
    tile.count = 0;
    return tile;
}

Scratch take_scratch(Arena& arena, int64_t tile_rows, int64_t dim, int64_t num_bins) {
    Scratch scratch;
    scratch.product = arena.take<float>(task_panels * panel_rows * tile_rows);
    scratch.low = arena.take<float>(tile_rows);
    scratch.high = arena.take<float>(tile_rows);
    scratch.bins = arena.take<int32_t>(tile_rows);
    scratch.uncertain = arena.take<int32_t>(tile_rows);
    scratch.listed = arena.take<int32_t>(tile_rows + 1);
    scratch.query_row = arena.take<double>(padded_dim(dim));
    scratch.row = arena.take<double>(padded_dim(dim));
    scratch.histogram = arena.take<int64_t>(num_bins + 1);
    return scratch;
}

// ---- all of it ----

// The next gallery items that are not junk; advances `item`.
void fill_tile(const Sides& sides, int64_t tile_rows, int64_t& item, Tile& tile) {
    tile.count = 0;
    for (; item < sides.gallery.rows && tile.count < tile_rows; ++item) {
        if (sides.labels.gallery_pids[item] == -1) continue;
        tile.items[tile.count] = item;
        tile.pids[tile.count] = sides.labels.gallery_pids[item];
        tile.camids[tile.count] = sides.labels.gallery_camids == nullptr ? no_camera : sides.labels.gallery_camids[item];
        ++tile.count;
    }
}

template <Metric metric>
void count_all(const Sides& sides) {
    const Filter& filter = sides.filter;
    const int64_t block_rows = round_to(smaller(filter.block_rows, sides.query.rows), panel_rows);
    const int64_t tile_rows = round_to(filter.tile_rows, tile_columns);
    const int exponent = scaled_exponent(metric, filter.scale);
    const double unit = __builtin_ldexp(1.0, exponent);
    const int32_t lowest = lowest_float_bin(sides.bins, exponent);
    Arena arena{filter.workspace};
    const Packed queries = take_packed(arena, block_rows, sides.dim);
    Tile tile = take_tile(arena, tile_rows, sides.dim);
    char* const own = arena.base + arena.used;
    Arena measure{nullptr};
    take_scratch(measure, tile_rows, sides.dim, sides.bins.count);
    int64_t item = 0;

#pragma omp parallel num_threads(filter.threads)
    {
        Arena mine{own + omp_get_thread_num() * measure.used};
        const Scratch scratch = take_scratch(mine, tile_rows, sides.dim, sides.bins.count);
        for (int64_t bin = 0; bin <= sides.bins.count; ++bin) scratch.histogram[bin] = 0;

        for (int64_t first_query = 0; first_query < sides.query.rows; first_query += block_rows) {
            const int64_t num_queries = smaller(block_rows, sides.query.rows - first_query);
            const int64_t panels = (num_queries + panel_rows - 1) / panel_rows;
#pragma omp for schedule(dynamic)
            for (int64_t panel = 0; panel < panels; ++panel) {
                const int64_t position = panel * panel_rows, count = smaller(panel_rows, num_queries - position);
                pack_panel<metric>(sides, sides.query, nullptr, first_query + position, count, panel_rows, position, queries,
                                   scratch.row);
            }
#pragma omp single
            item = 0;
            for (;;) {
#pragma omp single
                fill_tile(sides, tile_rows, item, tile);
                if (tile.count == 0) break;
                const int64_t tile_panels = (tile.count + tile_columns - 1) / tile_columns;
#pragma omp for schedule(dynamic)
                for (int64_t panel = 0; panel < tile_panels; ++panel) {
                    const int64_t position = panel * tile_columns, count = smaller(tile_columns, tile.count - position);
                    pack_panel<metric>(sides, sides.gallery, tile.items + position, 0, count, tile_columns, position,
                                       tile.packed, scratch.row);
                }
                const Counter<metric> counter{sides, tile, scratch, queries, unit, lowest};
#pragma omp for schedule(dynamic)
                for (int64_t task = 0; task < (panels + task_panels - 1) / task_panels; ++task) {
                    const int64_t first_panel = task * task_panels, last_panel = smaller(first_panel + task_panels, panels);
                    for (int64_t column = 0; column < tile_panels; ++column) {
                        for (int64_t panel = first_panel; panel < last_panel; ++panel) {
                            const float* rows = queries.panels + panel * panel_rows * sides.dim;
                            const float* columns = tile.packed.panels + column * tile_columns * sides.dim;
                            float* product = scratch.product + (panel - first_panel) * panel_rows * tile_rows;
                            for (int64_t k = 0; k < sides.dim; k += chunk) {
                                multiply_panels<true>(rows + k * panel_rows, columns + k * tile_columns,
                                                      smaller(chunk, sides.dim - k), product + column * tile_columns,
                                                      tile_rows, k > 0);
                            }
                        }
                    }
                    const int64_t first = first_panel * panel_rows, last = smaller(last_panel * panel_rows, num_queries);
                    for (int64_t i = first; i < last; ++i) {
                        counter(first_query + i, i, scratch.product + (i - first) * tile_rows);
                    }
                }
            }
        }
#pragma omp critical
        for (int64_t bin = 0; bin < sides.bins.count; ++bin) sides.bins.counts[bin] += scratch.histogram[bin];
    }
}

}  // namespace

int64_t count_workspace(int64_t dim, int64_t block_rows, int64_t tile_rows, int64_t num_bins, int threads) {
    Arena shared{nullptr}, own{nullptr};
    take_packed(shared, round_to(block_rows, panel_rows), dim);
    take_tile(shared, round_to(tile_rows, tile_columns), dim);
    take_scratch(own, round_to(tile_rows, tile_columns), dim, num_bins);
    return shared.used + threads * own.used;
}

int count_nonmatches(const Matrix& query, const Matrix& gallery, const Labels& labels, const Matches& matches,
                     Metric metric, const Bins& bins, const Filter& filter) {
    ReadRow* read = row_reader(query.dtype);
    if (read == nullptr) return unsupported_dtype;
    const Sides sides = {query, gallery, labels, matches, bins, filter,
                         Bound(query.columns, metric, filter.scale, product_error(query.columns)), read,
                         query.columns, padded_dim(query.columns)};
    for (int64_t bin = 0; bin < bins.count; ++bin) bins.counts[bin] = 0;
    for (int64_t m = 0; m < matches.offsets[query.rows]; ++m) matches.counts[m] = 0;
    if (metric == Metric::cosine) {
        count_all<Metric::cosine>(sides);
    } else {
        count_all<Metric::squared_euclidean>(sides);
    }
    for (int64_t q = 0; q < query.rows; ++q) {
        const int64_t begin = matches.offsets[q], end = matches.offsets[q + 1];
        if (end - begin <= many_matches) continue;
        for (int64_t m = begin + 1; m < end; ++m) matches.counts[m] += matches.counts[m - 1];
    }
    return ok;
}

}  // namespace SABMN_ISA
}  // namespace sabmn
