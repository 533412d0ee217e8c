// The ranking on the GPU against its definition, bit for bit: distances in float64 in a fixed order, counts by
// comparing them. Every type, odd sizes, strides; features that are hard to rank.

#include <array>
#include <string>

#include "retrieval/order.h"
#include "retrieval/retrieval_cuda.h"
#include "simt/test.h"

namespace {

using namespace sabmn;
using simt::Buffer;
using simt::expect;
using simt::random_int;
using std::int64_t;

#define EVERY_TYPE float, double, bf16, f16

template <typename T>
constexpr DType dtype = std::is_same_v<T, double>  ? DType::float64
                        : std::is_same_v<T, float> ? DType::float32
                        : std::is_same_v<T, bf16>  ? DType::bfloat16
                                                   : DType::float16;

// ---- the definition ----

template <typename T>
struct Features {
    Buffer<T> data;
    Matrix matrix;

    // Rows may be apart, and so may columns.
    Features(int64_t rows, int64_t columns, int64_t row_gap = 0, int64_t column_stride = 1)
        : data(std::max<int64_t>(rows * (columns * column_stride + row_gap), 1)),
          matrix{data.data(), rows, columns, columns * column_stride + row_gap, column_stride, dtype<T>} {
        for (T& x : data) x = static_cast<T>(std::numeric_limits<float>::quiet_NaN());
    }
    T& at(int64_t row, int64_t column) const { return data[row * matrix.row_stride + column * matrix.column_stride]; }
    double operator()(int64_t row, int64_t column) const { return static_cast<double>(at(row, column)); }
    template <typename Draw>
    Features fill(const Draw& draw) && {
        for (int64_t row = 0; row < matrix.rows; ++row)
            for (int64_t column = 0; column < matrix.columns; ++column)
                at(row, column) = static_cast<T>(draw(row, column));
        return std::move(*this);
    }
};

double normal() { return std::normal_distribution<double>()(simt::values()); }

template <typename T>
double sum(const Features<T>& query, int64_t q, const Features<T>& gallery, int64_t g, bool dot) {
    double lanes[num_lanes] = {};
    for (int64_t k = 0; k < query.matrix.columns; ++k) {
        const double difference = query(q, k) - gallery(g, k);
        lanes[k % num_lanes] = __dadd_rn(
            lanes[k % num_lanes], dot ? __dmul_rn(query(q, k), gallery(g, k)) : __dmul_rn(difference, difference));
    }
    for (int half = num_lanes / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    return lanes[0];
}

template <typename T>
double distance(const Features<T>& query, int64_t q, const Features<T>& gallery, int64_t g, bool cosine) {
    const double total = sum(query, q, gallery, g, cosine);
    if (!cosine) return total;
    return 1.0 - total / (std::sqrt(sum(query, q, query, q, true)) * std::sqrt(sum(gallery, g, gallery, g, true)));
}

template <typename T>
void expect_equal(const std::string& what, const Buffer<T>& ours, const std::vector<T>& expected) {
    expect(ours.size() == expected.size(), what + ": size");
    for (std::size_t i = 0; i < ours.size(); ++i) {
        if (std::memcmp(&ours[i], &expected[i], sizeof(T)) == 0) continue;
        expect(false, what + "[" + std::to_string(i) + "] is " + std::to_string(ours[i]) + ", not " +
                          std::to_string(expected[i]));
    }
}

void succeeds(int status) { expect(status == ok, "status " + std::to_string(status)); }

template <typename T>
Buffer<double> norms_of(const Features<T>& features) {
    Buffer<double> norms(features.matrix.rows);
    succeeds(squared_norms_cuda(features.matrix, norms.data(), nullptr));
    return norms;
}

// ---- exact distances ----

SIMT_TEST(retrieval_distances, EVERY_TYPE) {
    for (const int dim : {1, 7, 16, 131}) {
        const int num_queries = 3, num_items = random_int(1, 9), num_pairs = random_int(1, 40);
        const auto draw = [](int64_t, int64_t) { return normal(); };
        const Features<T> query = Features<T>(num_queries, dim, 3).fill(draw),
                          gallery = Features<T>(num_items, dim, 0, 2).fill(draw);
        Buffer<int64_t> query_indices(num_pairs), gallery_indices(num_pairs);
        for (int64_t& i : query_indices) i = random_int(0, num_queries - 1);
        for (int64_t& i : gallery_indices) i = random_int(0, num_items - 1);

        const Buffer<double> query_norms = norms_of(query), gallery_norms = norms_of(gallery);
        std::vector<double> expected;
        for (int64_t g = 0; g < num_items; ++g) expected.push_back(sum(gallery, g, gallery, g, true));
        expect_equal("norms", gallery_norms, expected);
        for (const bool cosine : {false, true}) {
            const SquaredNorms norms = {cosine ? query_norms.data() : nullptr, cosine ? gallery_norms.data() : nullptr};
            const auto distances = simt::empty<double>(num_pairs);
            succeeds(pair_distances_cuda(query.matrix, gallery.matrix, norms, query_indices.data(),
                                         gallery_indices.data(), num_pairs, distances.data(), nullptr));
            expected.clear();
            for (int i = 0; i < num_pairs; ++i)
                expected.push_back(distance(query, query_indices[i], gallery, gallery_indices[i], cosine));
            expect_equal("distances", distances, expected);
        }
    }
}

// ---- labels, matches, and what is counted ----

struct Codes {
    Buffer<std::int32_t> query_pids, gallery_pids, query_camids, gallery_camids;
    Labels labels;

    Codes(int num_queries, int num_items, int pids, bool cameras)
        : query_pids(num_queries), gallery_pids(num_items), query_camids(num_queries), gallery_camids(num_items) {
        for (auto& pid : query_pids) pid = random_int(0, pids - 1) - (random_int(0, 9) == 0);
        for (auto& pid : gallery_pids) pid = random_int(0, pids - 1) - (random_int(0, 9) == 0);
        for (auto& camid : query_camids) camid = random_int(0, 2);
        for (auto& camid : gallery_camids) camid = random_int(0, 2);
        labels = {query_pids.data(), gallery_pids.data(), cameras ? query_camids.data() : nullptr,
                  cameras ? gallery_camids.data() : nullptr, random_int(0, 100)};
    }
};

// A query's matches: every other item with its pid.
struct Counted {
    Buffer<int64_t> offsets, indices, counts, histogram;
    Buffer<double> thresholds;
    std::vector<int64_t> expected_counts, expected_histogram;
    Matches matches;
    Bins bins;

    template <typename Distance>
    Counted(const Codes& codes, const Bins& limits, const Distance& distance)
        : offsets(codes.query_pids.size() + 1), indices(0), counts(0), histogram(limits.count), thresholds(0) {
        const int64_t num_queries = codes.query_pids.size(), num_items = codes.gallery_pids.size();
        std::vector<std::pair<double, int64_t>> all;
        offsets[0] = 0;
        for (int64_t q = 0; q < num_queries; ++q) {
            std::vector<std::pair<double, int64_t>> own;
            bool taken = false;
            for (int64_t g = 0; g < num_items; ++g) {
                if (codes.query_pids[q] == -1 || codes.gallery_pids[g] != codes.query_pids[q]) continue;
                if ((taken = !taken)) own.emplace_back(distance(q, g), codes.labels.first + g);
            }
            std::sort(own.begin(), own.end());
            all.insert(all.end(), own.begin(), own.end());
            offsets[q + 1] = all.size();
        }
        indices = Buffer<int64_t>(all.size()), counts = Buffer<int64_t>(all.size()),
        thresholds = Buffer<double>(all.size());
        for (std::size_t m = 0; m < all.size(); ++m)
            thresholds[m] = all[m].first, indices[m] = all[m].second, counts[m] = 0;
        for (int64_t& count : histogram) count = 0;
        matches = {offsets.data(), thresholds.data(), indices.data(), counts.data()};
        bins = limits;
        bins.counts = histogram.data();

        expected_counts.assign(all.size(), 0), expected_histogram.assign(limits.count, 0);
        for (int64_t q = 0; q < num_queries; ++q) {
            for (int64_t g = 0; g < num_items; ++g) {
                const std::int32_t pid = codes.query_pids[q], other = codes.gallery_pids[g];
                if (pid == -1 || other == -1 || pid == other) continue;
                const std::pair<double, int64_t> item = {distance(q, g), codes.labels.first + g};
                for (int64_t m = offsets[q]; m < offsets[q + 1]; ++m) expected_counts[m] += item < all[m];
                if (!codes.labels.query_camids || codes.query_camids[q] != codes.gallery_camids[g])
                    ++expected_histogram[bin_of(item.first, bins)];
            }
        }
    }

    void check(const std::string& what) const {
        for (std::size_t q = 0; q + 1 < offsets.size(); ++q)
            for (int64_t m = offsets[q] + 1; m < offsets[q + 1]; ++m) counts[m] += counts[m - 1];
        expect_equal(what + ": counts", counts, expected_counts);
        expect_equal(what + ": histogram", histogram, expected_histogram);
    }
};

SIMT_TEST(retrieval_rows, EVERY_TYPE) {
    for (const bool cameras : {false, true}) {
        const int num_queries = random_int(1, 5), num_items = random_int(250, 600);
        const Features<T> rows = Features<T>(num_queries, num_items, 2, 1 + cameras).fill([](int64_t, int64_t column) {
            if (column < 4) return std::array{0.0, -0.0, HUGE_VAL, -HUGE_VAL}[column];
            return column % 2 ? std::round(normal()) : normal();
        });
        const Codes codes(num_queries, num_items, 4, cameras);
        const Counted counted(codes, {(1023 - 3) << bin_bits, 6 << bin_bits, 12 << bin_bits, nullptr}, rows);
        succeeds(count_nonmatches_in_rows_cuda(rows.matrix, codes.labels, counted.matches, counted.bins, nullptr));
        counted.check("rows");
    }
}

// ---- filter and refine ----

int64_t padded(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

struct Side {
    Buffer<float> panels, values;
    PackedSide packed;

    Side(int64_t rows, int64_t dim)
        : panels(padded(rows, packed_rows) * padded(dim, packed_depth)), values(3 * padded(rows, packed_rows)) {
        packed = {panels.data(), values.data(), padded(rows, packed_rows)};
    }
};

// No distance is above 2^exponent: ops/retrieval.py.
template <typename T>
int exponent_of(const Features<T>& query, const Features<T>& gallery, bool cosine) {
    if (cosine) return 4;
    double largest = 0;
    for (const auto* side : {&query, &gallery})
        for (int64_t i = 0; i < side->matrix.rows; ++i) largest = std::max(largest, sum(*side, i, *side, i, true));
    int power = 0;
    std::frexp(largest, &power);
    return 2 * std::max((power + (power > 0)) / 2, -400) + 5;
}

template <typename T>
std::vector<double> center_of(const Features<T>& query, bool cosine) {
    std::vector<double> center(query.matrix.columns, 0.0);
    for (int64_t q = 0; q < query.matrix.rows; ++q) {
        const double length = cosine ? std::sqrt(sum(query, q, query, q, true)) : 1.0;
        for (int64_t k = 0; k < query.matrix.columns; ++k) center[k] += query(q, k) / length / query.matrix.rows;
    }
    return center;
}

// Counts a gallery in tiles; returns the share of the pairs that were listed.
template <typename T>
double count(const std::string& what, const Features<T>& query, const Features<T>& gallery, const Codes& codes,
             bool cosine, int64_t tile_rows = INT32_MAX, int too_small = 0) {
    const int64_t num_queries = query.matrix.rows, dim = query.matrix.columns;
    const int exponent = exponent_of(query, gallery, cosine) - too_small;
    const int scale =
        static_cast<int>(std::floor((3 - exponent - cosine) / 2.0));  // rows less the centre: at most 1 long
    const Counted counted(codes, {static_cast<int64_t>(1023 + exponent - 64) << bin_bits, 0, 64 << bin_bits, nullptr},
                          [&](int64_t q, int64_t g) { return distance(query, q, gallery, g, cosine); });

    const std::vector<double> center = center_of(query, cosine);
    const Buffer<double> query_norms = norms_of(query), gallery_norms = norms_of(gallery);
    const SquaredNorms norms = {cosine ? query_norms.data() : nullptr, cosine ? gallery_norms.data() : nullptr};
    const int64_t num_matches = counted.thresholds.size();
    Buffer<float> below(num_matches), above(num_matches);
    for (int64_t m = 0; m < num_matches; ++m) {
        const double x = std::ldexp(counted.thresholds[m], 2 * scale + cosine),
                     margin = std::abs(x) * 0x1p-22 + 0x1p-126;
        below[m] = static_cast<float>(x - margin), above[m] = static_cast<float>(x + margin);
    }
    std::vector<int64_t> kept;
    for (int64_t g = 0; g < gallery.matrix.rows; ++g)
        if (codes.gallery_pids[g] != -1) kept.push_back(g);

    const Side queries(num_queries, dim);
    succeeds(pack_features_cuda(query.matrix, nullptr, num_queries, norms.query, center.data(), scale, true,
                                queries.packed, nullptr));
    int64_t listed = 0;
    for (int64_t first = 0; first < static_cast<int64_t>(kept.size()); first += tile_rows) {
        const int64_t size = std::min<int64_t>(tile_rows, kept.size() - first);
        Buffer<int64_t> items(size);
        std::copy_n(kept.begin() + first, size, items.begin());
        const Side side(size, dim);
        succeeds(pack_features_cuda(gallery.matrix, items.data(), size, norms.gallery, center.data(), scale, false,
                                    side.packed, nullptr));
        const Buffer<std::uint32_t> pairs(num_queries * size), num_listed(1);
        num_listed[0] = 0;
        const RankingTile tile = {queries.packed, side.packed,  items.data(), size,
                                  below.data(),   above.data(), pairs.data(), num_listed.data()};
        succeeds(count_nonmatches_cuda(query.matrix, gallery.matrix, norms, codes.labels, counted.matches, counted.bins,
                                       scale, tile, nullptr));
        listed += num_listed[0];
    }
    counted.check(what);
    return static_cast<double>(listed) / (num_queries * std::max<int64_t>(kept.size(), 1));
}

template <typename T>
struct Draw {
    std::string name;
    std::function<double(int64_t, int64_t)> value;

    // The draws of python_tests/retrieval_cases.py: plain ones, raw features of little spread and far from 0, small
    // integers, distances that differ in the last bit, a collapsed model, rows of very different length.
    static std::vector<Draw> all() {
        const double epsilon = simt::epsilon<T>(), reach = std::is_same_v<T, f16>      ? 3
                                                           : std::is_same_v<T, double> ? 300
                                                                                       : 30;
        std::vector<double> base(256);
        for (double& x : base) x = 30 * normal();
        return {{"plain", [](int64_t, int64_t) { return normal(); }},
                {"near duplicates", [=](int64_t, int64_t k) { return base[k % 256] + 1e-3 * normal(); }},
                {"small integers", [](int64_t, int64_t k) { return random_int(-2, 2) + 5.0 * (k == 0); }},
                {"near ties",
                 [=](int64_t, int64_t) {
                     return (random_int(0, 1) * 2 - 1) * (1 + epsilon * (random_int(0, 9) - 1 == 0));
                 }},
                {"one point", [](int64_t, int64_t k) { return 0.1 + 0.003 * k; }},
                {"huge and tiny",
                 [=](int64_t row, int64_t) { return std::ldexp(normal(), (row * 7 % 13 - 6) * reach / 6); }}};
    }
};

struct Size {
    int num_queries, num_items, dim;
};

// Every draw with one metric, or both.
template <typename T>
void count_draws(std::initializer_list<Size> sizes, bool both) {
    bool cosine = static_cast<int>(dtype<T>) % 2;
    for (const auto& draw : Draw<T>::all()) {
        for (const auto& [num_queries, num_items, dim] : sizes) {
            for (int metrics = 0; metrics <= both; ++metrics, cosine = !cosine) {
                const auto value = [&](int64_t row, int64_t k) {
                    const double x = draw.value(row, k);
                    return cosine && x == 0 ? 1.0 : x;  // no row of zeros
                };
                const Features<T> query = Features<T>(num_queries, dim, 3).fill(value);
                const Features<T> gallery = Features<T>(num_items, dim, 0, 2).fill(value);
                for (int64_t k = 0; k < dim; ++k) gallery.at(num_items / 2, k) = query.at(num_queries / 2, k);
                count(draw.name, query, gallery, Codes(num_queries, num_items, 6, num_items % 2), cosine);
            }
        }
        cosine = !cosine;
    }
}

SIMT_TEST(retrieval_count, EVERY_TYPE) { count_draws<T>({{7, 61, 17}}, false); }

SIMT_TEST(retrieval_count_one) { count_draws<float>({{1, 1, 1}}, false); }

SIMT_TEST(retrieval_count_in_blocks_heavy) {
    count_draws<float>({{129, 127, 7}, {127, 260, 129}, {1, 129, 257}}, true);
}

SIMT_TEST(retrieval_count_tiles) {
    const auto draw = [](int64_t, int64_t) { return normal(); };
    const Features<float> query = Features<float>(130, 40).fill(draw), gallery = Features<float>(150, 40).fill(draw);
    const Codes codes(130, 150, 5, true);
    const double share = count("tiles", query, gallery, codes, false, 133);
    expect(0 < share && share < 0.2, "the filter leaves " + std::to_string(share) + " of the pairs open");
}

// An exponent that is too small: some rows, or all, are too long for the filter, which must not be sure of them.
SIMT_TEST(retrieval_count_long_rows) {
    const Draw<float> draw = Draw<float>::all()[5];
    const Features<float> query = Features<float>(9, 33).fill(draw.value),
                          gallery = Features<float>(50, 33).fill(draw.value);
    for (const int too_small : {5, 40, 200})
        count("long rows", query, gallery, Codes(9, 50, 5, true), false, 50, too_small);
}

// More matches than a block has counters for, and distances over more bins than that.
SIMT_TEST(retrieval_count_beyond_the_counters) {
    const auto draw = [](int64_t row, int64_t) { return std::ldexp(normal(), row % 16); };
    const Features<float> query = Features<float>(64, 3).fill(draw), gallery = Features<float>(260, 3).fill(draw);
    const Codes codes(64, 260, 2, true);
    count("counters", query, gallery, codes, false);
}

// ---- the bound of the product ----

float cut_to(double x, int exponent) {  // 24 bits below 2^exponent
    return static_cast<float>(std::ldexp(std::trunc(std::ldexp(x, 24 - exponent)), exponent - 24));
}

// The least exact tensor core that is known: four products and the accumulator are cut at the largest, and so is their
// sum.
float cut_mma(float accumulator, const float (&a)[8], const float (&b)[8]) {
    for (int first = 0; first < 8; first += 4) {
        int largest = INT32_MIN, exponent;
        const auto see = [&](double x) {
            std::frexp(x, &exponent);
            if (x != 0) largest = std::max(largest, exponent);
        };
        see(accumulator);
        for (int k = first; k < first + 4; ++k) see(static_cast<double>(a[k]) * b[k]);
        if (largest == INT32_MIN) continue;
        double total = cut_to(accumulator, largest);
        for (int k = first; k < first + 4; ++k) total += cut_to(static_cast<double>(a[k]) * b[k], largest);
        std::frexp(total, &exponent);
        accumulator = cut_to(total, exponent);
    }
    return accumulator;
}

float tf32_of(float x) { return __uint_as_float(tf32_bits(x)); }

SIMT_TEST(retrieval_product_error) {
    double worst = 0;
    for (int trial = 0; trial < 300; ++trial) {
        const int dim = 8 * random_int(1, 300);
        const float one = simt::random<float>(1, 1, 2)[0];  // whose products are always cut in the same direction
        double exact = 0, magnitude = 0;
        float total = 0, part = 0;
        for (int first = 0; first < dim; first += 8) {
            float a[8], b[8], a_low[8], b_low[8];
            for (int k = 0; k < 8; ++k) {
                const float x = trial % 2 ? one : static_cast<float>(normal()),
                            y = trial % 2 ? one : static_cast<float>(normal());
                exact += static_cast<double>(x) * y, magnitude += std::abs(static_cast<double>(x) * y);
                a[k] = tf32_of(x), a_low[k] = tf32_of(x - a[k]), b[k] = tf32_of(y), b_low[k] = tf32_of(y - b[k]);
            }
            part += cut_mma(cut_mma(cut_mma(0, a_low, b), a, b_low), a, b);
            if (first % 64 == 56 || first + 8 == dim) total += part, part = 0;
        }
        const double share = std::abs(total - exact) / (tensor_product_error(dim) * magnitude);
        expect(share <= 1, "the product of " + std::to_string(dim) + " features is off by " + std::to_string(share) +
                               " times its bound");
        worst = std::max(worst, share);
    }
    expect(worst > 0.02, "the bound is " + std::to_string(1 / worst) + " times the largest error");
}

}  // namespace
