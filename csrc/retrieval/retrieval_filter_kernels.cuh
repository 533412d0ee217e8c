// The filter of the ranking: a float32 product on the tensor cores and, in its epilogue, the counts of all pairs of
// which the product is sure; the others are listed. Plan and error bound: retrieval_cuda.cu and count_cpu.cpp.
//
// Both sides are packed once as the tensor cores take them: 16 rows × 8 features are 512 bytes, 16 for each lane. So
// they pass through shared memory as they are, and every access is a lane's own 16 bytes.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/cuda.h"
#include "retrieval/bound.h"
#include "retrieval/retrieval_cuda.h"
#include "retrieval/retrieval_exact_kernels.cuh"

namespace sabmn {
namespace {

constexpr int panel_rows = 16, panel_depth = 8, panel_floats = panel_rows * panel_depth;

// ---- packing ----

// A block packs a panel's 16 rows, a warp the rows g and g + 8. Of 8 features a lane has t and t + 4 of both rows:
// {a[g][t], a[g+8][t], a[g][t+4], a[g+8][t+4]}, which is mma_m16n8k8_tf32's a.
constexpr int pack_threads = panel_rows / 2 * warp_size;

struct PackArguments {
    Matrix features;
    const int64_t* items;
    int64_t count;
    const double *squared_norms, *center;
    double scale, length_factor, error_factor, error_term;  // a row's part of e: error_factor · square + error_term
    PackedSide packed;
    int steps;  // of 8 features
};

__global__ void __launch_bounds__(pack_threads) retrieval_pack_kernel(SABMN_GRID_CONSTANT(PackArguments) in) {
    const int lane = threadIdx.x % warp_size, t = lane % 4;
    const int64_t first = blockIdx.x * static_cast<int64_t>(panel_rows) + threadIdx.x / warp_size;
    float4* const panel =
        reinterpret_cast<float4*>(in.packed.panels) + blockIdx.x * static_cast<int64_t>(in.steps) * warp_size;
    const int place = threadIdx.x / warp_size * 4 + t;

    int64_t rows[2];
    double inverse[2], squares[2] = {};
    for (int h = 0; h < 2; ++h) {
        const int64_t row = first + 8 * h;
        rows[h] = row < in.count ? (in.items ? in.items[row] : row) : -1;
        inverse[h] = in.squared_norms && rows[h] >= 0 ? 1.0 / sqrt(in.squared_norms[rows[h]]) : 1.0;
    }
    with_elements(in.features.dtype, [&](auto element) {
        using T = decltype(element);
        for (int step = lane / 4; step < in.steps; step += warp_size / 4) {
            float values[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int h = i % 2, k = step * panel_depth + i / 2 * 4 + t;
                double value = 0.0;
                if (rows[h] >= 0 && k < in.features.columns) {
                    const double x =
                        static_cast<double>(row_of<T>(in.features, rows[h])[k * in.features.column_stride]);
                    value = (x * inverse[h] - in.center[k]) * in.scale;
                }
                squares[h] += value * value;
                values[i] = static_cast<float>(value);
            }
            panel[step * warp_size + place] = make_float4(values[0], values[1], values[2], values[3]);
        }
    });
    bool usable[2];
    for (int h = 0; h < 2; ++h) {
        for (int mask = warp_size / 2; mask > 0; mask /= 2) squares[h] += shuffle_xor(squares[h], mask);
        usable[h] = squares[h] <= 2.0;  // false for NaN: nothing is certain about such a row
        const double square = usable[h] ? squares[h] : 1.0;
        if (lane == 0) {
            float* const out = in.packed.values + first + 8 * h;
            out[0] = usable[h] ? static_cast<float>(square) : 0.0f;
            out[in.packed.rows] = round_up(in.length_factor * round_up(sqrt(square)));
            out[2 * in.packed.rows] = usable[h] ? round_up(in.error_factor * square + in.error_term) : INFINITY;
        }
    }
    if (usable[0] && usable[1]) return;
    for (int step = lane / 4; step < in.steps; step += warp_size / 4) {
        float4& values = panel[step * warp_size + place];
        values = make_float4(usable[0] ? values.x : 0.0f, usable[1] ? values.y : 0.0f, usable[0] ? values.z : 0.0f,
                             usable[1] ? values.w : 0.0f);
    }
}

// ---- the product ----

// A block has 16 warps and 128 × 128 pairs, a warp 32 × 32 of them. 32 features of both sides are in shared memory at a
// time, and the next two such slices on their way.
constexpr int filter_side = packed_rows, filter_depth = packed_depth, filter_threads = 512, filter_stages = 3;
constexpr int filter_steps = filter_depth / panel_depth;    // of a slice
constexpr int slice_floats = filter_side * filter_depth;    // of one side
constexpr int filter_chunk = 2;                             // slices that are summed before they are added up
constexpr int product_stride = filter_side + 8;             // what half a warp stores lies in all banks
constexpr int counted_bins = 4096, counted_matches = 3072;  // counters of a block
constexpr int filter_shared_bytes = filter_stages * 2 * slice_floats * sizeof(float);
static_assert(filter_shared_bytes >=
                  static_cast<int>((filter_side * product_stride + counted_bins + counted_matches) * 4),
              "products and counters take the slices' place");

// Two TF32 numbers whose sum is a float32's, but for 2^-22 of it.
struct Split {
    std::uint32_t high[4], low[4];

    __device__ explicit Split(const float4& values) {
        const float x[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            high[i] = tf32_bits(x[i]);
            low[i] = tf32_bits(x[i] - __uint_as_float(high[i]));
        }
    }
};

// sums += a bᵀ, 16 × 16: [column half], as mma has it. A tensor core adds up no more than 8 features: it may cut what
// it adds to 24 bits, and the sum of a long row would lose too much.
__device__ inline void multiply(float (*sums)[4], const Split& a, const Split& b) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float product[4] = {};
        mma_m16n8k8_tf32(product, a.low, {b.high[half], b.high[half + 2]});
        mma_m16n8k8_tf32(product, a.high, {b.low[half], b.low[half + 2]});
        mma_m16n8k8_tf32(product, a.high, {b.high[half], b.high[half + 2]});
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[half][e] += product[e];
    }
}

using WarpSums = float[8][4];  // 2 × 2 times 16 × 16 pairs

// The sums of the warp's 32 × 32 pairs, from (panel_row, panel_column) of the block's 8 × 8 panels on.
__device__ inline void sum_product(WarpSums& total, const float* a, const float* b, int steps, float* shared,
                                   int panel_row, int panel_column, bool busy) {
    const int lane = threadIdx.x % warp_size, slices = steps / filter_steps;
    // A thread's share of a slice: 16 bytes of a panel, and the same of the panel four further on, of both sides.
    constexpr int chunks = filter_steps * panel_floats / 4, panels_apart = filter_threads / chunks, share = 2;
    static_assert(share * filter_threads * 4 == slice_floats, "the threads share a slice");
    const int64_t panel_stride = static_cast<int64_t>(steps) * panel_floats;
    const int64_t own = threadIdx.x / chunks * panel_stride + threadIdx.x % chunks * 4;
    a += own, b += own;
    int fetched = 0;
    const auto fetch = [&] {
        if (fetched < slices) {
            float* const tile = shared + fetched % filter_stages * 2 * slice_floats + threadIdx.x * 4;
#pragma unroll
            for (int i = 0; i < share; ++i) {
                cp_async_16(tile + i * filter_threads * 4, a + i * panels_apart * panel_stride);
                cp_async_16(tile + slice_floats + i * filter_threads * 4, b + i * panels_apart * panel_stride);
            }
            a += filter_steps * panel_floats, b += filter_steps * panel_floats;
            ++fetched;
        }
        cp_async_commit();
    };

    for (int slice = 0; slice < filter_stages - 1; ++slice) fetch();
    WarpSums part = {};
    for (int slice = 0; slice < slices; ++slice) {
        cp_async_wait<filter_stages - 2>();
        __syncthreads();
        fetch();
        if (!busy) continue;
        const float* const tile = shared + slice % filter_stages * 2 * slice_floats + lane * 4;
#pragma unroll
        for (int step = 0; step < filter_steps; ++step) {
            const auto load = [&](const float* side, int panel) {
                return Split(*reinterpret_cast<const float4*>(side + (panel * filter_steps + step) * panel_floats));
            };
            const Split rows[2] = {load(tile, panel_row), load(tile, panel_row + 1)};
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const Split columns = load(tile + slice_floats, panel_column + j);
                multiply(part + 2 * j, rows[0], columns);
                multiply(part + 4 + 2 * j, rows[1], columns);
            }
        }
        if (slice % filter_chunk == filter_chunk - 1 || slice == slices - 1) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
#pragma unroll
                for (int e = 0; e < 4; ++e) total[i][e] += part[i][e], part[i][e] = 0.0f;
            }
        }
    }
}

// ---- counting ----

// Counters first … first + size − 1 of `all`, which the block meets most, are added up in shared memory before they go
// to global memory; others go there at once.
struct Window {
    int* counts;
    int size;
    int64_t first;
    int64_t* all;

    __device__ void clear() const {
        for (int i = threadIdx.x; i < size; i += blockDim.x) counts[i] = 0;
    }
    __device__ void add_one(int64_t counter) const {
        const int64_t place = counter - first;
        if (place >= 0 && place < size) atomicAdd(counts + place, 1);
        else add(all + counter);
    }
    __device__ void flush() const {
        for (int i = threadIdx.x; i < size; i += blockDim.x) {
            if (counts[i]) add(all + first + i, counts[i]);
        }
    }
};

struct FilterArguments {
    PackedSide query, gallery;
    Labels labels;
    Counters counters;
    const int64_t* items;
    const float *below, *above;
    std::uint32_t *listed, *num_listed;
    int num_queries, num_items, steps;
    int lowest;  // key of the lowest bin for the filter's x

    // Upper edges belong to their bins; what is negative, −0 too, goes to the first.
    __device__ int bin(float x) const {
        const int key = (max(__float_as_int(x), 0) - 1) >> (23 - bin_bits);
        return min(max(key - lowest, 0), static_cast<int>(counters.bins.count) - 1);
    }
};

// A gallery item of the block.
struct Column {
    float square, length, error;
    std::int32_t pid, camid;
    bool there;

    __device__ Column(const FilterArguments& in, int column) : there(column < in.num_items) {
        const float* const values = in.gallery.values + column;
        square = values[0], length = values[in.gallery.rows], error = values[2 * in.gallery.rows];
        const int64_t item = there ? in.items[column] : 0;
        pid = there ? in.labels.gallery_pids[item] : -1;
        camid = there && in.labels.gallery_camids ? in.labels.gallery_camids[item] : 0;
    }
};

constexpr int lane_columns = filter_side / warp_size, warp_rows = filter_side / (filter_threads / warp_size);
static_assert(lane_columns * warp_rows == 32, "a lane's pairs are the bits of a word");

// A lane's pairs whose place among the matches is not certain, or whose bin; a bit each.
struct Opened {
    std::uint32_t ranks, bins;
};

// Counts a query's pairs with the block's items; returns the open ones, a bit for each of the lane's columns.
__device__ inline Opened count_row(const FilterArguments& in, int query, const float* products,
                                   const Column (&columns)[lane_columns], const Window& bins, const Window& matches) {
    Opened opened = {};
    const std::int32_t pid = in.labels.query_pids[query];
    if (pid == -1) return opened;
    const std::int32_t camid = in.labels.query_camids ? in.labels.query_camids[query] : 1;
    const float* const values = in.query.values + query;
    const float square = values[0], factor = values[in.query.rows], error = values[2 * in.query.rows];
    const int64_t begin = in.counters.matches.offsets[query];
    const int count = static_cast<int>(in.counters.matches.offsets[query + 1] - begin);
    const float *const below = in.below + begin, *const above = in.above + begin;
    const float farthest = count ? above[count - 1] : -INFINITY;

    float low[lane_columns], high[lane_columns];
    int first[lane_columns], left[lane_columns];  // of the matches: the first that is not certainly before the item
#pragma unroll
    for (int j = 0; j < lane_columns; ++j) {
        const Column& column = columns[j];
        const float x = (square + column.square) - 2.0f * products[j * warp_size];
        const float e = factor * column.length + (error + column.error);
        low[j] = x - e, high[j] = x + e;
        const bool valid = column.there && column.pid != pid;
        if (valid && column.camid != camid) {
            const int bin = in.bin(low[j]);
            if (bin == in.bin(high[j])) bins.add_one(bin);
            else opened.bins |= 1u << j;
        }
        const bool reached = valid && low[j] <= farthest;
        first[j] = reached ? 0 : count, left[j] = reached ? count : 0;
    }
    for (int most = count; most > 0; most /= 2) {
#pragma unroll
        for (int j = 0; j < lane_columns; ++j) {
            const int half = left[j] / 2;
            const bool before = left[j] > 0 && above[first[j] + half] < low[j];
            first[j] = before ? first[j] + half + 1 : first[j];
            left[j] = before ? left[j] - half - 1 : half;
        }
    }
#pragma unroll
    for (int j = 0; j < lane_columns; ++j) {
        if (first[j] == count) continue;
        if (below[first[j]] > high[j]) matches.add_one(begin + first[j]);
        else opened.ranks |= 1u << j;
    }
    return opened;
}

// Appends the warp's open pairs, those of a query side by side. Bit lane_columns · i + j is row i of the warp, column j
// of the lane.
__device__ inline void list_pairs(const FilterArguments& in, int first_row, int first_column, const Opened& opened) {
    const int lane = threadIdx.x % warp_size;
    const std::uint32_t open = opened.ranks | opened.bins;
    int count = __popc(open);
    for (int mask = warp_size / 2; mask > 0; mask /= 2) count += shuffle_xor(count, mask);
    if (count == 0) return;
    std::uint32_t next = 0;
    if (lane == 0) next = atomicAdd(in.num_listed, static_cast<std::uint32_t>(count));
    next = shuffle(next, 0);
    for (int bit = 0; bit < 32; ++bit) {
        const unsigned all = __ballot_sync(0xffffffffu, open >> bit & 1);
        if (open >> bit & 1) {
            const int64_t query = first_row + bit / lane_columns * (filter_threads / warp_size);
            const int column = first_column + bit % lane_columns * warp_size + lane;
            in.listed[next + __popc(all & ((1u << lane) - 1))] =
                listed_pair(query, in.num_items, column,
                            (opened.ranks >> bit & 1) * open_rank + (opened.bins >> bit & 1) * open_bin);
        }
        next += __popc(all);
    }
}

__global__ void __launch_bounds__(filter_threads, 1) retrieval_filter_kernel(SABMN_GRID_CONSTANT(FilterArguments) in) {
    SABMN_DYNAMIC_SHARED(float, shared);
    __shared__ int largest[2];  // squares of the block's queries and items, as bits: in the order of integers
    if (threadIdx.x < 2) largest[threadIdx.x] = 0;
    const int first_row = blockIdx.y * filter_side, first_column = blockIdx.x * filter_side;
    const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    const int row = warp / 4 * 32, column = warp % 4 * 32;  // of the warp's part of the product

    WarpSums sums = {};
    const bool busy = first_row + row < in.num_queries && first_column + column < in.num_items;
    const int64_t row_floats = static_cast<int64_t>(in.steps) * panel_depth;
    sum_product(sums, in.query.panels + first_row * row_floats, in.gallery.panels + first_column * row_floats, in.steps,
                shared, row / panel_rows, column / panel_rows, busy);
    __syncthreads();  // the slices are done with

    float* const products = shared;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
            const int r = row + i / 4 * 16 + lower * 8 + lane / 4, c = column + i % 4 * 8 + lane % 4 * 2;
            *reinterpret_cast<float2*>(products + r * product_stride + c) =
                make_float2(sums[i][2 * lower], sums[i][2 * lower + 1]);
        }
    }
    if (threadIdx.x < 2 * filter_side) {
        const int side = threadIdx.x / filter_side, at = threadIdx.x % filter_side;
        const float square = side ? in.gallery.values[first_column + at] : in.query.values[first_row + at];
        atomicMax(largest + side, __float_as_int(square));
    }
    int* const counts = reinterpret_cast<int*>(shared + filter_side * product_stride);
    Window bins = {counts, counted_bins, 0, in.counters.bins.counts};
    const Window matches = {counts + counted_bins, counted_matches, in.counters.matches.offsets[first_row],
                            in.counters.matches.counts};
    bins.clear();
    matches.clear();
    __syncthreads();

    // Most distances are below 2 (A + B), and few 4 binades below that.
    const int top = in.bin(2.0f * (__int_as_float(largest[0]) + __int_as_float(largest[1])));
    bins.first = max(top - counted_bins + 1, 0);
    const Column columns[lane_columns] = {{in, first_column + lane},
                                          {in, first_column + lane + 32},
                                          {in, first_column + lane + 64},
                                          {in, first_column + lane + 96}};
    Opened opened = {};
    for (int i = 0; i < warp_rows; ++i) {
        const int r = warp + i * (filter_threads / warp_size);
        if (first_row + r >= in.num_queries) break;
        const Opened of_row =
            count_row(in, first_row + r, products + r * product_stride + lane, columns, bins, matches);
        opened.ranks |= of_row.ranks << i * lane_columns;
        opened.bins |= of_row.bins << i * lane_columns;
    }
    list_pairs(in, first_row + warp, first_column, opened);
    __syncthreads();
    bins.flush();
    matches.flush();
}

}  // namespace
}  // namespace sabmn
