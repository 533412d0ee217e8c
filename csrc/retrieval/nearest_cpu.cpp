// Most entries of a tile are above what their row keeps: they are read once and compared, a vector at a time. The others are
// put behind those kept; a list that is full is cut down to the smallest, and its limit is then the largest of these.

#include "retrieval/nearest.h"

#include <omp.h>

#include "retrieval/exact.h"

namespace sabmn {
namespace SABMN_ISA {
namespace {

constexpr std::int64_t run = 16;             // entries compared at once
constexpr std::int64_t most_columns = 256;  // of a tile, that one thread takes at a time
constexpr std::int64_t most_queries = 128, tile_bytes = 1 << 19;  // whose pairs are computed together

// Bit j: sign · entries[j] ≤ limits[j] − offset.
std::uint32_t not_above(const float* entries, const float* limits, float offset, float sign) {
#if defined(__AVX512F__)
    const __m512 limit = _mm512_sub_ps(_mm512_loadu_ps(limits), _mm512_set1_ps(offset));
    return _mm512_cmp_ps_mask(_mm512_mul_ps(_mm512_loadu_ps(entries), _mm512_set1_ps(sign)), limit, _CMP_LE_OQ);
#elif defined(__AVX2__)
    std::uint32_t bits = 0;
    for (int half = 0; half < 2; ++half) {
        const __m256 limit = _mm256_sub_ps(_mm256_loadu_ps(limits + 8 * half), _mm256_set1_ps(offset));
        const __m256 entry = _mm256_mul_ps(_mm256_loadu_ps(entries + 8 * half), _mm256_set1_ps(sign));
        bits |= static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(entry, limit, _CMP_LE_OQ))) << (8 * half);
    }
    return bits;
#else
    std::uint32_t bits = 0;
    for (std::int64_t j = 0; j < run; ++j) {
        bits |= static_cast<std::uint32_t>(sign * entries[j] <= limits[j] - offset) << j;
    }
    return bits;
#endif
}

double magnitude(double x) { return x < 0 ? -x : x; }

// Floats with which not_above misses nothing: their difference, as computed, is not below limit − offset.
float raised(double limit) { return static_cast<float>(limit + magnitude(limit) * 0x1p-21 + 0x1p-120); }
float lowered(double offset) { return static_cast<float>(offset - magnitude(offset) * 0x1p-21 - 0x1p-120); }

// Values and their items, ordered by (value, item), or by the value alone.
template <bool by_item>
struct Pairs {
    double* values;
    std::int64_t* items;

    bool before(std::int64_t i, double value, std::int64_t item) const {
        return values[i] < value || (by_item && values[i] == value && items[i] < item);
    }
    bool after(std::int64_t i, double value, std::int64_t item) const {
        return value < values[i] || (by_item && value == values[i] && item < items[i]);
    }

    // Parts low … high around its middle pair: then low … j are not after i … high, and what is between is in its place.
    void part(std::int64_t low, std::int64_t high, std::int64_t& i, std::int64_t& j) const {
        const double pivot = values[low + (high - low) / 2];
        const std::int64_t item = items[low + (high - low) / 2];
        for (i = low, j = high; i <= j;) {
            while (before(i, pivot, item)) ++i;
            while (after(j, pivot, item)) --j;
            if (i > j) break;
            put(i++, j--);
        }
    }

    void put(std::int64_t i, std::int64_t j) const {
        const double value = values[i];
        const std::int64_t item = items[i];
        values[i] = values[j], items[i] = items[j];
        values[j] = value, items[j] = item;
    }

    // The first `count` of `size` come first, the last of them in its place.
    void select(std::int64_t count, std::int64_t size) const {
        const std::int64_t last = count - 1;
        for (std::int64_t low = 0, high = size - 1, i, j; low < high;) {
            part(low, high, i, j);
            if (last <= j) {
                high = j;
            } else if (last >= i) {
                low = i;
            } else {
                break;
            }
        }
    }

    void sort(std::int64_t low, std::int64_t high) const {
        while (high - low > 16) {
            std::int64_t i, j;
            part(low, high, i, j);
            if (j - low < high - i) {  // the shorter part first: the depth is a logarithm
                sort(low, j);
                low = i;
            } else {
                sort(i, high);
                high = j;
            }
        }
        for (std::int64_t i = low + 1; i <= high; ++i) {
            const double value = values[i];
            const std::int64_t item = items[i];
            std::int64_t place = i;
            for (; place > low && after(place - 1, value, item); --place) {
                values[place] = values[place - 1], items[place] = items[place - 1];
            }
            values[place] = value, items[place] = item;
        }
    }
};

struct List {
    double* values;
    std::int64_t* items;
    double& limit;
    std::int64_t& filled;
    std::int64_t count, room;

    void settle() {
        Pairs<false>{values, items}.select(count, filled);
        filled = count;
        limit = values[count - 1];
    }

    // Whether the limit is another one now.
    bool add(double value, std::int64_t item) {
        if (value >= limit) return false;
        values[filled] = value, items[filled] = item;
        if (++filled < room) return false;
        settle();
        return true;
    }
};

List list_of(const Kept& kept, std::int64_t row) {
    const std::int64_t at = row * kept.room;
    return {kept.values + at, kept.items + at, kept.limits[row], kept.filled[row], kept.count, kept.room};
}

}  // namespace

int keep_smallest_of_rows(const Kept& kept, const Tile& tile, int threads) {
    const float sign = static_cast<float>(tile.sign);
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads)
    for (std::int64_t row = 0; row < kept.rows; ++row) {
        List list = list_of(kept, row);
        const float* entries = tile.entries + row * tile.columns;
        const double offset = tile.offsets[row];
        float limits[run];
        const auto set_limits = [&] {
            for (float& limit : limits) limit = raised(list.limit) - lowered(offset);
        };
        const auto add = [&](std::int64_t column) {
            const double value = static_cast<double>(sign * entries[column]) + offset;
            if (list.add(value, tile.first_item + column)) set_limits();
        };
        set_limits();
        std::int64_t column = 0;
        for (; column + run <= tile.columns; column += run) {
            for (std::uint32_t bits = not_above(entries + column, limits, 0.0f, sign); bits != 0; bits &= bits - 1) {
                add(column + __builtin_ctz(bits));
            }
        }
        for (; column < tile.columns; ++column) add(column);
    }
    return ok;
}

int keep_smallest_of_columns(const Kept& kept, const Tile& tile, int threads) {
    const float sign = static_cast<float>(tile.sign);
    const std::int64_t share = (tile.columns / (2 * threads) + run) / run * run;
    const std::int64_t strip = share < most_columns ? share : most_columns;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (std::int64_t first = 0; first < tile.columns; first += strip) {
        const std::int64_t count = first + strip <= tile.columns ? strip : tile.columns - first;
        float limits[most_columns];
        for (std::int64_t j = 0; j < count; ++j) limits[j] = raised(kept.limits[first + j]);
        for (std::int64_t row = 0; row < tile.rows; ++row) {
            const float* entries = tile.entries + row * tile.columns + first;
            const double offset = tile.offsets[row];
            const float low_offset = lowered(offset);
            const auto add = [&](std::int64_t j) {
                List list = list_of(kept, first + j);
                const double value = static_cast<double>(sign * entries[j]) + offset;
                if (list.add(value, tile.first_item + row)) limits[j] = raised(list.limit);
            };
            std::int64_t column = 0;
            for (; column + run <= count; column += run) {
                std::uint32_t bits = not_above(entries + column, limits + column, low_offset, sign);
                for (; bits != 0; bits &= bits - 1) add(column + __builtin_ctz(bits));
            }
            for (; column < count; ++column) add(column);
        }
    }
    return ok;
}

int settle_smallest(const Kept& kept, int threads) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads)
    for (std::int64_t row = 0; row < kept.rows; ++row) {
        if (kept.filled[row] > kept.count) list_of(kept, row).settle();
    }
    return ok;
}

int rank_kept(const Kept& kept, const Matrix& query, const Matrix& gallery, Metric metric, double sign, double slack,
              std::int64_t k, double* distances, std::int64_t* items, double* workspace, int threads) {
    if (row_reader(query.dtype) == nullptr) return unsupported_dtype;
    const auto pairs_of = [&](std::int64_t row) {
        return Pairs<true>{kept.values + row * kept.room, kept.items + row * kept.room};
    };
    // Some queries and some rows of the gallery in the second-level cache: the pairs of one with the other are taken together.
    const std::int64_t share = (kept.rows + threads - 1) / threads, chunk = share < most_queries ? share : most_queries;
    const std::int64_t row_bytes = padded_dim(query.columns) * static_cast<std::int64_t>(sizeof(float));
    const std::int64_t tile_rows = tile_bytes / row_bytes + 1;
#pragma omp parallel num_threads(threads)
    {
        double* const rows = workspace + omp_get_thread_num() * 2 * padded_dim(query.columns);
        ExactDistances exact{query, gallery, metric, rows};
#pragma omp for schedule(dynamic)
        for (std::int64_t first = 0; first < kept.rows; first += chunk) {
            const std::int64_t last = first + chunk < kept.rows ? first + chunk : kept.rows;
            std::int64_t counts[most_queries], done[most_queries];
            for (std::int64_t row = first; row < last; ++row) {
                const Pairs<true> pairs = pairs_of(row);
                pairs.select(k, kept.filled[row]);
                const double limit = pairs.values[k - 1] + slack;
                std::int64_t count = 0;
                for (std::int64_t i = 0; i < kept.filled[row]; ++i) {
                    if (pairs.values[i] > limit) continue;
                    pairs.items[count++] = pairs.items[i];
                }
                for (std::int64_t i = 0; i < count; ++i) pairs.values[i] = 0.0;
                pairs.sort(0, count - 1);  // by item
                counts[row - first] = count, done[row - first] = 0;
            }
            for (std::int64_t tile_end = tile_rows; tile_end < gallery.rows + tile_rows; tile_end += tile_rows) {
                for (std::int64_t row = first; row < last; ++row) {
                    const Pairs<true> pairs = pairs_of(row);
                    const std::int64_t count = counts[row - first];
                    std::int64_t& i = done[row - first];
                    if (i == count || pairs.items[i] >= tile_end) continue;
                    exact.load_query(row);
                    for (; i < count && pairs.items[i] < tile_end; ++i) pairs.values[i] = sign * exact(pairs.items[i]);
                }
            }
            for (std::int64_t row = first; row < last; ++row) {
                const Pairs<true> pairs = pairs_of(row);
                pairs.select(k, counts[row - first]);
                pairs.sort(0, k - 1);
                for (std::int64_t i = 0; i < k; ++i) {
                    distances[row * k + i] = pairs.values[i], items[row * k + i] = pairs.items[i];
                }
            }
        }
    }
    return ok;
}

}  // namespace SABMN_ISA
}  // namespace sabmn
