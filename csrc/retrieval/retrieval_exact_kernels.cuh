// Distances in float64, and what is counted by them. A sum has the order of exact.h: element k goes to lane k mod 16,
// and the lanes are added in a tree. Here a lane is a thread: half a warp computes a pair, and reads its rows side by
// side. Products and sums are rounded one by one, as on the CPU.
#pragma once

#include <cstdint>

#include "common/cuda.h"
#include "retrieval/order.h"

namespace sabmn {
namespace {

constexpr int warp_size = 32;
constexpr int exact_threads = 256, pairs_per_warp = warp_size / num_lanes;
constexpr int exact_pairs = exact_threads / num_lanes;  // of a block at a time

// work(T()) for the element type.
template <typename Work>
__device__ inline auto with_elements(DType dtype, const Work& work) {
    switch (dtype) {
        case DType::float64:
            return work(double());
        case DType::bfloat16:
            return work(bf16(0.0f));
        case DType::float16:
            return work(f16(0.0f));
        default:
            return work(float());
    }
}

template <typename T>
__device__ inline const T* row_of(const Matrix& matrix, int64_t row) {
    return static_cast<const T*>(matrix.data) + row * matrix.row_stride;
}

// ---- distances ----

template <bool dot, typename T>
__device__ inline double lane_sum(const T* query, int64_t query_stride, const T* gallery, int64_t gallery_stride,
                                  int dim) {
    double sum = 0.0;
#pragma unroll 4
    for (int k = threadIdx.x % num_lanes; k < dim; k += num_lanes) {
        const double q = static_cast<double>(query[k * query_stride]),
                     g = static_cast<double>(gallery[k * gallery_stride]);
        const double difference = __dsub_rn(q, g);
        sum = __dadd_rn(sum, dot ? __dmul_rn(q, g) : __dmul_rn(difference, difference));
    }
    return sum;
}

// The distance of a pair, for all lanes of its half of the warp; the other half computes another pair meanwhile.
struct ExactDistance {
    Matrix query, gallery;
    const double *query_norms, *gallery_norms;  // squared; null but for the cosine
    bool dot;

    __device__ double operator()(int64_t query_row, int64_t gallery_row) const {
        double sum = with_elements(query.dtype, [&](auto element) {
            using T = decltype(element);
            const T *const q = row_of<T>(query, query_row), *const g = row_of<T>(gallery, gallery_row);
            const int dim = static_cast<int>(query.columns);
            return dot ? lane_sum<true>(q, query.column_stride, g, gallery.column_stride, dim)
                       : lane_sum<false>(q, query.column_stride, g, gallery.column_stride, dim);
        });
#pragma unroll
        for (int half = num_lanes / 2; half > 0; half /= 2) sum = __dadd_rn(sum, shuffle_xor(sum, half));
        if (!query_norms) return sum;
        return 1.0 - sum / (sqrt(query_norms[query_row]) * sqrt(gallery_norms[gallery_row]));
    }
};

// Without indices a pair is a row of both sides.
__global__ void __launch_bounds__(exact_threads)
    retrieval_pairs_kernel(SABMN_GRID_CONSTANT(ExactDistance) distance, const int64_t* query_indices,
                           const int64_t* gallery_indices, int64_t num_pairs, double* distances) {
    const int64_t pair = blockIdx.x * static_cast<int64_t>(exact_pairs) + threadIdx.x / num_lanes;
    const int64_t there = min(pair, num_pairs - 1);
    const int64_t q = query_indices ? query_indices[there] : there,
                  g = gallery_indices ? gallery_indices[there] : there;
    const double found = distance(q, g);
    if (pair < num_pairs && threadIdx.x % num_lanes == 0) distances[pair] = found;
}

// ---- counting ----

__device__ inline void add(int64_t* counter, int64_t count = 1) {
    atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(count));
}

struct Counters {
    Matches matches;
    Bins bins;

    __device__ void add_bin(double distance) const { add(bins.counts + bin_of(distance, bins)); }

    // `index`: of the item, in the whole gallery.
    __device__ void add_rank(int64_t query, int64_t index, double distance) const {
        const int64_t begin = matches.offsets[query], count = matches.offsets[query + 1] - begin;
        const int64_t before =
            matches_before(distance, index, matches.distances + begin, matches.indices + begin, count);
        if (before < count) add(matches.counts + begin + before);
    }
};

constexpr std::uint32_t open_rank = 1,
                        open_bin = 2;  // of a pair: its place among the matches is not certain, or its bin

// A pair as the filter lists it.
__device__ inline std::uint32_t listed_pair(int64_t query, int items, int item, std::uint32_t open) {
    return static_cast<std::uint32_t>(query * items + item) << 2 | open;
}

// What the filter left open. The number of pairs is known on the GPU only: the blocks share them, however many there
// are.
__global__ void __launch_bounds__(exact_threads)
    retrieval_refine_kernel(SABMN_GRID_CONSTANT(ExactDistance) distance, SABMN_GRID_CONSTANT(Counters) counters,
                            const int64_t* items, int num_items, int64_t first, const std::uint32_t* listed,
                            const std::uint32_t* num_listed) {
    const std::uint32_t count = *num_listed;
    for (std::uint32_t begin = blockIdx.x * exact_pairs; begin < count; begin += gridDim.x * exact_pairs) {
        const std::uint32_t pair = begin + threadIdx.x / num_lanes, code = listed[min(pair, count - 1)],
                            number = code >> 2;
        const int64_t query = number / num_items, item = items[number % num_items];
        const double found = distance(query, item);
        if (pair >= count || threadIdx.x % num_lanes != 0) continue;
        if (code & open_bin) counters.add_bin(found);
        if (code & open_rank) counters.add_rank(query, first + item, found);
    }
}

// Given distances [Q, G]; a thread has a pair, a block part of a row.
__global__ void __launch_bounds__(exact_threads)
    retrieval_rows_kernel(SABMN_GRID_CONSTANT(Matrix) rows, SABMN_GRID_CONSTANT(Labels) labels,
                          SABMN_GRID_CONSTANT(Counters) counters, int blocks_per_row) {
    const int64_t query = blockIdx.x / blocks_per_row;
    const int64_t item = static_cast<int64_t>(blockIdx.x % blocks_per_row) * exact_threads + threadIdx.x;
    if (item >= rows.columns) return;
    const std::int32_t pid = labels.query_pids[query], other = labels.gallery_pids[item];
    if (pid == -1 || other == -1 || pid == other) return;
    const double distance = with_elements(rows.dtype, [&](auto element) {
        return static_cast<double>(row_of<decltype(element)>(rows, query)[item * rows.column_stride]);
    });
    if (!labels.query_camids || labels.query_camids[query] != labels.gallery_camids[item]) counters.add_bin(distance);
    counters.add_rank(query, labels.first + item, distance);
}

}  // namespace
}  // namespace sabmn
