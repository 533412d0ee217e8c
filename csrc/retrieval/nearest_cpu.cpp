// Most entries of a tile are above what their row keeps: they are read once, a cache line at a time, and compared.

#include "retrieval/nearest.h"

namespace sabmn {
namespace SABMN_ISA {
namespace {

constexpr std::int64_t run = 64;  // entries compared at once

// A row's heap, the largest value first.
struct Heap {
    double* values;
    std::int64_t* items;
    std::int64_t count;

    void sink(std::int64_t place, double value, std::int64_t item) {
        for (std::int64_t child; (child = 2 * place + 1) < count; place = child) {
            if (child + 1 < count && values[child + 1] > values[child]) ++child;
            if (values[child] <= value) break;
            values[place] = values[child], items[place] = items[child];
        }
        values[place] = value, items[place] = item;
    }

    void build() {
        for (std::int64_t place = count / 2 - 1; place >= 0; --place) sink(place, values[place], items[place]);
    }
};

// The least float that is not below x.
float at_least(double x) {
    const float nearest = static_cast<float>(x);
    return nearest < x ? __builtin_nextafterf(nearest, __builtin_inff()) : nearest;
}

void keep_row(Heap heap, std::int64_t filled, const float* entries, double offset, const Tile& tile) {
    const float sign = static_cast<float>(tile.sign);
    std::int64_t column = 0;
    for (; filled < heap.count && column < tile.columns; ++filled, ++column) {
        heap.values[filled] = static_cast<double>(sign * entries[column]) + offset;
        heap.items[filled] = tile.first_item + column;
        if (filled + 1 == heap.count) heap.build();
    }
    // What is above this is above the heap's largest, the offset added.
    float limit = at_least(heap.values[0] - offset);
    for (; column < tile.columns; column += run) {
        const std::int64_t last = column + run < tile.columns ? column + run : tile.columns;
        int below = 0;
        for (std::int64_t j = column; j < last; ++j) below |= sign * entries[j] <= limit;
        if (!below) continue;
        for (std::int64_t j = column; j < last; ++j) {
            if (!(sign * entries[j] <= limit)) continue;
            const double value = static_cast<double>(sign * entries[j]) + offset;
            if (value >= heap.values[0]) continue;
            heap.sink(0, value, tile.first_item + j);
            limit = at_least(heap.values[0] - offset);
        }
    }
}

}  // namespace

int keep_smallest(const Kept& kept, const Tile& tile, int threads) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads)
    for (std::int64_t row = 0; row < kept.rows; ++row) {
        const std::int64_t at = row * kept.count;
        keep_row({kept.values + at, kept.items + at, kept.count}, kept.filled, tile.entries + row * tile.columns,
                 tile.offsets[row], tile);
    }
    return ok;
}

}  // namespace SABMN_ISA
}  // namespace sabmn
