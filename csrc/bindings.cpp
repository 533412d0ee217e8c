// The Python module `_sabmn_ext`: raw pointers in, a status out. The only file that knows pybind11.
//
// Pointers arrive as integers (tensor.data_ptr()), 0 for an absent tensor. Every call names its number of threads: torch's
// setting, since a fresh Python thread does not inherit OpenMP's. The GIL is released while a kernel runs.

#include <pthread.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "attention/attention.h"
#include "attention/attention_cuda.h"
#include "attention/workspace.h"
#include "batch_norm/batch_norm.h"
#include "common/device.h"
#include "common/dtype.h"
#include "common/isa.h"
#include "products/products.h"
#include "retrieval/nearest.h"
#include "retrieval/rerank.h"
#include "retrieval/retrieval.h"
#include "retrieval/retrieval_cuda.h"
#include "spectral_norm/spectral_norm.h"
#include "spectral_norm/spectral_norm_cuda.h"
#include "winograd/winograd.h"

namespace py = pybind11;

namespace sabmn {
namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// ---- instruction set ----

enum class Isa { baseline, avx2, avx512, avx512_bf16 };

Isa detect_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
    if (avx512) return Isa::avx512;
    if (avx2) return Isa::avx2;
#endif
    return Isa::baseline;
}

// Multiplying bfloat16 in pairs pays where vdpbf16ps runs at twice the rate of float32: measured on AMD's Zen 5. An Intel
// Xeon was measured at half the rate of float32. The vendor decides, so that results do not depend on a timing.
Isa default_isa(Isa widest) {
#if defined(__x86_64__)
    if (widest == Isa::avx512_bf16 && !__builtin_cpu_is("amd")) return Isa::avx512;
#endif
    return widest;
}

const Isa detected_isa = detect_isa();
Isa chosen_isa = default_isa(detected_isa);
const char* const isa_names[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

void set_isa(const std::string& name) {
    for (int isa = 0; isa <= static_cast<int>(detected_isa); ++isa) {
        if (name == isa_names[isa]) {
            chosen_isa = static_cast<Isa>(isa);
            return;
        }
    }
    throw py::value_error("instruction set '" + name + "' is not available here; the widest is '" +
                          isa_names[static_cast<int>(detected_isa)] + "'");
}

// for_isa(SABMN_VARIANTS(function)) is the variant of `function` for the chosen instruction set. SABMN_BF16_VARIANTS: of
// one that has a variant for AVX512-BF16 (isa.h).
#if defined(__x86_64__)
#define SABMN_VARIANTS(function) {baseline::function, avx2::function, avx512::function, avx512::function}
#define SABMN_BF16_VARIANTS(function) {baseline::function, avx2::function, avx512::function, avx512_bf16::function}
#else
#define SABMN_VARIANTS(function) {baseline::function, baseline::function, baseline::function, baseline::function}
#define SABMN_BF16_VARIANTS(function) SABMN_VARIANTS(function)
#endif

template <typename Function>
Function* for_isa(Function* const (&variants)[4]) {
    return variants[static_cast<int>(chosen_isa)];
}

// ---- threads ----

// A forked child (a data-loader worker) has none of its parent's OpenMP threads, and waiting for them hangs.
bool forked = false;

int usable_threads(int threads) { return forked ? 1 : threads; }

// ---- spectral normalisation ----

using Addresses = std::vector<std::uintptr_t>;
using Sizes = std::vector<std::int64_t>;

std::int64_t spectral_norm_workspace(const Sizes& rows, const Sizes& columns, int dtype) {
    return for_isa(SABMN_VARIANTS(spectral_norm_workspace))(rows.data(), columns.data(),
                                                            static_cast<std::int64_t>(rows.size()), static_cast<DType>(dtype));
}

// Indices of the weights, the longest first.
std::vector<std::size_t> longest_first(const Sizes& rows, const Sizes& columns) {
    std::vector<std::size_t> order(rows.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return rows[a] * columns[a] > rows[b] * columns[b]; });
    return order;
}

std::vector<SpectralNormForwardMatrix> forward_matrices(const Addresses& weights, const Addresses& u,
                                                        const Addresses& v, const Addresses& normalized,
                                                        const Addresses& u_new, const Addresses& v_new,
                                                        const Sizes& rows, const Sizes& columns, const Sizes& inner) {
    std::vector<SpectralNormForwardMatrix> matrices;
    for (const std::size_t i : longest_first(rows, columns)) {
        matrices.push_back({pointer<const void>(weights[i]), pointer<const void>(u[i]), pointer<const void>(v[i]),
                            pointer<void>(normalized[i]), pointer<void>(u_new[i]), pointer<void>(v_new[i]), rows[i],
                            columns[i], inner[i], static_cast<std::int64_t>(i)});
    }
    return matrices;
}

std::vector<SpectralNormBackwardMatrix> backward_matrices(const Addresses& gradients, const Addresses& weights,
                                                          const Addresses& u, const Addresses& v,
                                                          const Addresses& weight_gradients, const Sizes& rows,
                                                          const Sizes& columns, const Sizes& inner) {
    std::vector<SpectralNormBackwardMatrix> matrices;
    for (const std::size_t i : longest_first(rows, columns)) {
        matrices.push_back({pointer<const void>(gradients[i]), pointer<const void>(weights[i]),
                            pointer<const void>(u[i]), pointer<const void>(v[i]), pointer<void>(weight_gradients[i]),
                            rows[i], columns[i], inner[i], static_cast<std::int64_t>(i)});
    }
    return matrices;
}

int spectral_norm_forward(const Addresses& weights, const Addresses& u, const Addresses& v, const Addresses& normalized,
                          const Addresses& u_new, const Addresses& v_new, const Sizes& rows, const Sizes& columns,
                          const Sizes& inner, std::uintptr_t sigma, int iterations, double eps, int dtype,
                          int normalized_dtype, std::uintptr_t workspace, int threads) {
    const auto matrices = forward_matrices(weights, u, v, normalized, u_new, v_new, rows, columns, inner);
    py::gil_scoped_release release;
    return for_isa(SABMN_VARIANTS(spectral_norm_forward))(
        matrices.data(), static_cast<std::int64_t>(matrices.size()), pointer<void>(sigma), iterations, eps,
        static_cast<DType>(dtype), static_cast<DType>(normalized_dtype), pointer<void>(workspace),
        usable_threads(threads));
}

int spectral_norm_backward(const Addresses& gradients, const Addresses& weights, const Addresses& u, const Addresses& v,
                           const Addresses& weight_gradients, const Sizes& rows, const Sizes& columns,
                           const Sizes& inner, std::uintptr_t sigma, int dtype, int normalized_dtype,
                           std::uintptr_t workspace, int threads) {
    const auto matrices = backward_matrices(gradients, weights, u, v, weight_gradients, rows, columns, inner);
    py::gil_scoped_release release;
    return for_isa(SABMN_VARIANTS(spectral_norm_backward))(
        matrices.data(), static_cast<std::int64_t>(matrices.size()), pointer<void>(sigma), static_cast<DType>(dtype),
        static_cast<DType>(normalized_dtype), pointer<void>(workspace), usable_threads(threads));
}

#ifdef SABMN_CUDA_TARGETS
// (forward, backward)
std::pair<std::int64_t, std::int64_t> spectral_norm_launch_workspace(const Sizes& rows, const Sizes& columns,
                                                                     int dtype) {
    const SpectralNormCudaBytes bytes = spectral_norm_cuda_workspace(
        rows.data(), columns.data(), static_cast<std::int64_t>(rows.size()), static_cast<DType>(dtype));
    return {bytes.forward, bytes.backward};
}

int spectral_norm_forward_launch(const Addresses& weights, const Addresses& u, const Addresses& v,
                                 const Addresses& normalized, const Addresses& u_new, const Addresses& v_new,
                                 const Sizes& rows, const Sizes& columns, const Sizes& inner, std::uintptr_t sigma,
                                 int iterations, double eps, int dtype, int normalized_dtype, std::uintptr_t workspace,
                                 std::uintptr_t stream) {
    const auto matrices = forward_matrices(weights, u, v, normalized, u_new, v_new, rows, columns, inner);
    py::gil_scoped_release release;
    return spectral_norm_forward_cuda(matrices.data(), static_cast<std::int64_t>(matrices.size()), pointer<void>(sigma),
                                      iterations, eps, static_cast<DType>(dtype), static_cast<DType>(normalized_dtype),
                                      pointer<void>(workspace), pointer<void>(stream));
}

int spectral_norm_backward_launch(const Addresses& gradients, const Addresses& weights, const Addresses& u,
                                  const Addresses& v, const Addresses& weight_gradients, const Sizes& rows,
                                  const Sizes& columns, const Sizes& inner, std::uintptr_t sigma, int dtype,
                                  int normalized_dtype, std::uintptr_t workspace, std::uintptr_t stream) {
    const auto matrices = backward_matrices(gradients, weights, u, v, weight_gradients, rows, columns, inner);
    py::gil_scoped_release release;
    return spectral_norm_backward_cuda(
        matrices.data(), static_cast<std::int64_t>(matrices.size()), pointer<void>(sigma), static_cast<DType>(dtype),
        static_cast<DType>(normalized_dtype), pointer<void>(workspace), pointer<void>(stream));
}

void define_spectral_norm_cuda(py::module_& m) {
    m.def("cuda_error", cuda_error_text);
    m.def("spectral_norm_cuda_workspace", spectral_norm_launch_workspace);
    m.def("spectral_norm_forward_cuda", spectral_norm_forward_launch);
    m.def("spectral_norm_backward_cuda", spectral_norm_backward_launch);
}

// (address, batch stride, channel stride, position stride)
using MapFields = std::array<std::int64_t, 4>;

AttentionMap attention_map(const MapFields& fields) {
    return {pointer<void>(fields[0]), fields[1], fields[2], fields[3]};
}

// sizes: B, C, N, key width, value width. parameters: w_query, w_key, w_value, w_out, gamma, b_query, b_key, b_value,
// b_out. saved: query, key, value, out, lse.
AttentionCuda attention_arguments(int dtype, bool tf32, const std::array<std::int64_t, 5>& sizes, const MapFields& x,
                                  const std::array<std::uintptr_t, 9>& parameters,
                                  const std::array<std::uintptr_t, 5>& saved) {
    return {static_cast<DType>(dtype),     tf32,
            sizes[0],                      sizes[1],
            sizes[2],                      sizes[3],
            sizes[4],
            attention_map(x),              pointer<void>(parameters[0]),
            pointer<void>(parameters[1]),  pointer<void>(parameters[2]),
            pointer<void>(parameters[3]),  pointer<float>(parameters[4]),
            pointer<void>(parameters[5]),  pointer<void>(parameters[6]),
            pointer<void>(parameters[7]),  pointer<void>(parameters[8]),
            pointer<void>(saved[0]),       pointer<void>(saved[1]),
            pointer<void>(saved[2]),       pointer<void>(saved[3]),
            pointer<float>(saved[4])};
}

int attention_forward_launch(int dtype, bool tf32, const std::array<std::int64_t, 5>& sizes, const MapFields& x,
                             const std::array<std::uintptr_t, 9>& parameters,
                             const std::array<std::uintptr_t, 5>& saved, const MapFields& y, std::uintptr_t stream) {
    return attention_forward_cuda(attention_arguments(dtype, tf32, sizes, x, parameters, saved), attention_map(y),
                                  pointer<void>(stream));
}

// gradients: of w_query, w_key, w_value, w_out, gamma; inner: context, then the gradients of query, key, value.
int attention_backward_launch(int dtype, bool tf32, const std::array<std::int64_t, 5>& sizes, const MapFields& x,
                              const std::array<std::uintptr_t, 9>& parameters,
                              const std::array<std::uintptr_t, 5>& saved, const MapFields& grad_y,
                              const MapFields& grad_x, const std::array<std::uintptr_t, 5>& gradients,
                              const std::array<std::uintptr_t, 4>& inner, std::uintptr_t workspace,
                              std::uintptr_t stream) {
    const AttentionCudaGradients g = {attention_map(grad_y),        attention_map(grad_x),
                                      pointer<void>(gradients[0]),  pointer<void>(gradients[1]),
                                      pointer<void>(gradients[2]),  pointer<void>(gradients[3]),
                                      pointer<float>(gradients[4]), pointer<void>(inner[0]),
                                      pointer<void>(inner[1]),      pointer<void>(inner[2]),
                                      pointer<void>(inner[3])};
    return attention_backward_cuda(attention_arguments(dtype, tf32, sizes, x, parameters, saved), g, pointer<void>(workspace),
                                   pointer<void>(stream));
}

void define_attention_cuda(py::module_& m) {
    using namespace py::literals;
    m.def("attention_backward_cuda_workspace", attention_backward_cuda_workspace, "batch"_a, "channels"_a,
          "positions"_a, "key_width"_a, "value_width"_a, "w_out"_a);
    m.def("attention_forward_cuda", attention_forward_launch, py::call_guard<py::gil_scoped_release>(), "dtype"_a,
          "tf32"_a, "sizes"_a, "x"_a, "parameters"_a, "saved"_a, "y"_a, "stream"_a);
    m.def("attention_backward_cuda", attention_backward_launch, py::call_guard<py::gil_scoped_release>(), "dtype"_a,
          "tf32"_a, "sizes"_a, "x"_a, "parameters"_a, "saved"_a, "grad_y"_a, "grad_x"_a, "gradients"_a, "inner"_a, "workspace"_a,
          "stream"_a);
}
#endif

// ---- retrieval ----

// (address, rows, columns, row stride, column stride)
using MatrixFields = std::array<std::int64_t, 5>;

Matrix matrix_of(const MatrixFields& fields, int dtype) {
    return {pointer<void>(fields[0]), fields[1], fields[2], fields[3], fields[4], static_cast<DType>(dtype)};
}

// The members of the structs, in their order; the index of the first gallery item comes last among the labels.
using LabelFields = std::array<std::int64_t, 5>;
using MatchFields = std::array<std::int64_t, 4>;
using BinFields = std::array<std::int64_t, 4>;

Labels labels_of(const LabelFields& fields) {
    return {pointer<std::int32_t>(fields[0]), pointer<std::int32_t>(fields[1]), pointer<std::int32_t>(fields[2]),
            pointer<std::int32_t>(fields[3]), fields[4]};
}

Matches matches_of(const MatchFields& fields) {
    return {pointer<std::int64_t>(fields[0]), pointer<double>(fields[1]), pointer<std::int64_t>(fields[2]),
            pointer<std::int64_t>(fields[3])};
}

Bins bins_of(const BinFields& fields) {
    return {fields[0], fields[1], fields[2], pointer<std::int64_t>(fields[3])};
}

int squared_norms(const MatrixFields& features, std::uintptr_t norms, std::uintptr_t workspace, int dtype, int threads) {
    py::gil_scoped_release release;
    return for_isa(SABMN_VARIANTS(squared_norms))(matrix_of(features, dtype), pointer<double>(norms),
                                                  pointer<double>(workspace), usable_threads(threads));
}

int pair_distances(const MatrixFields& query, const MatrixFields& gallery, std::uintptr_t query_indices,
                   std::uintptr_t gallery_indices, std::int64_t num_pairs, int metric, std::uintptr_t distances,
                   std::uintptr_t workspace, int dtype, int threads) {
    py::gil_scoped_release release;
    return for_isa(SABMN_VARIANTS(pair_distances))(
        matrix_of(query, dtype), matrix_of(gallery, dtype), pointer<std::int64_t>(query_indices),
        pointer<std::int64_t>(gallery_indices), num_pairs, static_cast<Metric>(metric), pointer<double>(distances),
        pointer<double>(workspace), usable_threads(threads));
}

std::int64_t count_workspace(std::int64_t dim, std::int64_t block_rows, std::int64_t tile_rows, std::int64_t num_bins,
                             int threads) {
    return for_isa(SABMN_VARIANTS(count_workspace))(dim, block_rows, tile_rows, num_bins, threads);
}

int count_nonmatches(const MatrixFields& query, const MatrixFields& gallery, const LabelFields& labels,
                     const MatchFields& matches, const BinFields& bins, int metric, std::uintptr_t center, int scale,
                     std::int64_t block_rows, std::int64_t tile_rows, std::uintptr_t workspace, int dtype, int threads) {
    py::gil_scoped_release release;
    const Filter filter = {pointer<double>(center), scale, block_rows, tile_rows, pointer<char>(workspace),
                           usable_threads(threads)};
    return for_isa(SABMN_VARIANTS(count_nonmatches))(matrix_of(query, dtype), matrix_of(gallery, dtype),
                                                     labels_of(labels), matches_of(matches),
                                                     static_cast<Metric>(metric), bins_of(bins), filter);
}

int count_nonmatches_in_rows(const MatrixFields& rows, const LabelFields& labels, const MatchFields& matches,
                             const BinFields& bins, std::uintptr_t workspace, int dtype, int threads) {
    py::gil_scoped_release release;
    return for_isa(SABMN_VARIANTS(count_nonmatches_in_rows))(matrix_of(rows, dtype), labels_of(labels),
                                                             matches_of(matches), bins_of(bins),
                                                             pointer<std::int64_t>(workspace), usable_threads(threads));
}

#ifdef SABMN_CUDA_TARGETS
// Panels, values, rows.
using PackedFields = std::array<std::int64_t, 3>;
// Of queries and gallery, 0 unless the metric is the cosine.
using NormFields = std::array<std::uintptr_t, 2>;

PackedSide packed_side_of(const PackedFields& fields) {
    return {pointer<float>(fields[0]), pointer<float>(fields[1]), fields[2]};
}

SquaredNorms squared_norms_of(const NormFields& fields) {
    return {pointer<double>(fields[0]), pointer<double>(fields[1])};
}

int squared_norms_launch(const MatrixFields& features, std::uintptr_t norms, int dtype, std::uintptr_t stream) {
    return squared_norms_cuda(matrix_of(features, dtype), pointer<double>(norms), pointer<void>(stream));
}

int pair_distances_launch(const MatrixFields& query, const MatrixFields& gallery, const NormFields& norms,
                          std::uintptr_t query_indices, std::uintptr_t gallery_indices, std::int64_t num_pairs,
                          std::uintptr_t distances, int dtype, std::uintptr_t stream) {
    return pair_distances_cuda(matrix_of(query, dtype), matrix_of(gallery, dtype), squared_norms_of(norms),
                               pointer<std::int64_t>(query_indices), pointer<std::int64_t>(gallery_indices), num_pairs,
                               pointer<double>(distances), pointer<void>(stream));
}

int count_nonmatches_in_rows_launch(const MatrixFields& rows, const LabelFields& labels, const MatchFields& matches,
                                    const BinFields& bins, int dtype, std::uintptr_t stream) {
    return count_nonmatches_in_rows_cuda(matrix_of(rows, dtype), labels_of(labels), matches_of(matches), bins_of(bins),
                                         pointer<void>(stream));
}

int pack_features_launch(const MatrixFields& features, std::uintptr_t items, std::int64_t count,
                         std::uintptr_t squared_norms, std::uintptr_t center, int scale, bool query,
                         const PackedFields& packed, int dtype, std::uintptr_t stream) {
    return pack_features_cuda(matrix_of(features, dtype), pointer<std::int64_t>(items), count,
                              pointer<double>(squared_norms), pointer<double>(center), scale, query,
                              packed_side_of(packed), pointer<void>(stream));
}

// sides: query, gallery; tile: items, below, above, listed, num_listed.
int count_nonmatches_launch(const MatrixFields& query, const MatrixFields& gallery, const NormFields& norms,
                            const LabelFields& labels, const MatchFields& matches, const BinFields& bins, int scale,
                            const std::array<PackedFields, 2>& sides, std::int64_t count,
                            const std::array<std::uintptr_t, 5>& tile, int dtype, std::uintptr_t stream) {
    const RankingTile ranking = {packed_side_of(sides[0]),       packed_side_of(sides[1]),
                                 pointer<std::int64_t>(tile[0]), count,
                                 pointer<float>(tile[1]),        pointer<float>(tile[2]),
                                 pointer<std::uint32_t>(tile[3]), pointer<std::uint32_t>(tile[4])};
    return count_nonmatches_cuda(matrix_of(query, dtype), matrix_of(gallery, dtype), squared_norms_of(norms),
                                 labels_of(labels), matches_of(matches), bins_of(bins), scale, ranking,
                                 pointer<void>(stream));
}

void define_retrieval_cuda(py::module_& m) {
    using released = py::call_guard<py::gil_scoped_release>;
    m.attr("PACKED_ROWS") = packed_rows;
    m.attr("PACKED_DEPTH") = packed_depth;
    m.def("tensor_product_error", tensor_product_error);
    m.def("squared_norms_cuda", squared_norms_launch, released());
    m.def("pair_distances_cuda", pair_distances_launch, released());
    m.def("count_nonmatches_in_rows_cuda", count_nonmatches_in_rows_launch, released());
    m.def("pack_features_cuda", pack_features_launch, released());
    m.def("count_nonmatches_cuda", count_nonmatches_launch, released());
}
#endif

// ---- search ----

// The members of the structs, in their order; the sign comes apart.
using KeptFields = std::array<std::int64_t, 7>;
using TileFields = std::array<std::int64_t, 5>;

Kept kept_of(const KeptFields& fields) {
    return {pointer<double>(fields[0]), pointer<std::int64_t>(fields[1]), pointer<double>(fields[2]),
            pointer<std::int64_t>(fields[3]), fields[4], fields[5], fields[6]};
}

Tile tile_of(const TileFields& fields, double sign) {
    return {pointer<float>(fields[0]), pointer<double>(fields[1]), fields[2], fields[3], fields[4], sign};
}

int keep_smallest_of_rows(const KeptFields& kept, const TileFields& tile, double sign, int threads) {
    return for_isa(SABMN_VARIANTS(keep_smallest_of_rows))(kept_of(kept), tile_of(tile, sign), usable_threads(threads));
}

int keep_smallest_of_columns(const KeptFields& kept, const TileFields& tile, double sign, int threads) {
    return for_isa(SABMN_VARIANTS(keep_smallest_of_columns))(kept_of(kept), tile_of(tile, sign), usable_threads(threads));
}

int settle_smallest(const KeptFields& kept, int threads) {
    return for_isa(SABMN_VARIANTS(settle_smallest))(kept_of(kept), usable_threads(threads));
}

int rank_kept(const KeptFields& kept, const MatrixFields& query, const MatrixFields& gallery, int metric, double sign,
              double slack, std::int64_t k, std::uintptr_t distances, std::uintptr_t items, std::uintptr_t workspace, int dtype,
              int threads) {
    return for_isa(SABMN_VARIANTS(rank_kept))(kept_of(kept), matrix_of(query, dtype), matrix_of(gallery, dtype),
                                              static_cast<Metric>(metric), sign, slack, k,
                                              pointer<double>(distances), pointer<std::int64_t>(items),
                                              pointer<double>(workspace), usable_threads(threads));
}

void define_search(py::module_& m) {
    using released = py::call_guard<py::gil_scoped_release>;
    m.def("keep_smallest_of_rows", keep_smallest_of_rows, released());
    m.def("keep_smallest_of_columns", keep_smallest_of_columns, released());
    m.def("settle_smallest", settle_smallest, released());
    m.def("rank_kept", rank_kept, released());
}

// ---- re-ranking ----

// The members of the structs, in their order.
using NeighborFields = std::array<std::int64_t, 3>;
using SparseFields = std::array<std::int64_t, 3>;
using SparseOutputFields = std::array<std::int64_t, 4>;

Neighbors neighbors_of(const NeighborFields& fields) {
    return {pointer<std::int64_t>(fields[0]), fields[1], fields[2]};
}

SparseRows sparse_rows_of(const SparseFields& fields) {
    return {pointer<std::int64_t>(fields[0]), pointer<std::int64_t>(fields[1]), pointer<double>(fields[2])};
}

SparseOutput sparse_output_of(const SparseOutputFields& fields) {
    return {pointer<std::int64_t>(fields[0]), pointer<std::int64_t>(fields[1]), pointer<std::int64_t>(fields[2]),
            pointer<double>(fields[3])};
}

int reciprocal_neighbors(const NeighborFields& neighbors, std::int64_t k_width, std::int64_t half_width,
                         const SparseOutputFields& output, std::uintptr_t workspace, int threads) {
    return for_isa(SABMN_VARIANTS(reciprocal_neighbors))(neighbors_of(neighbors), k_width, half_width,
                                                         sparse_output_of(output), pointer<std::int64_t>(workspace),
                                                         usable_threads(threads));
}

int mean_of_rows(const SparseFields& rows, const NeighborFields& neighbors, std::int64_t k,
                 const SparseOutputFields& output, std::uintptr_t workspace, int threads) {
    return for_isa(SABMN_VARIANTS(mean_of_rows))(sparse_rows_of(rows), neighbors_of(neighbors), k,
                                                 sparse_output_of(output), pointer<double>(workspace),
                                                 usable_threads(threads));
}

std::int64_t reranked_workspace(std::int64_t dim, std::int64_t query_rows, int threads) {
    return for_isa(SABMN_VARIANTS(reranked_workspace))(dim, query_rows, threads);
}

int reranked_distances(const MatrixFields& query, const MatrixFields& gallery, int metric, std::uintptr_t center,
                       std::uintptr_t largest, const SparseFields& query_rows, const SparseFields& columns, double lambda,
                       std::uintptr_t distances, std::uintptr_t workspace, int dtype, int threads) {
    return for_isa(SABMN_VARIANTS(reranked_distances))(
        matrix_of(query, dtype), matrix_of(gallery, dtype), static_cast<Metric>(metric), pointer<double>(center),
        pointer<double>(largest), sparse_rows_of(query_rows), sparse_rows_of(columns), lambda, pointer<double>(distances),
        pointer<double>(workspace), usable_threads(threads));
}

void define_rerank(py::module_& m) {
    using released = py::call_guard<py::gil_scoped_release>;
    m.def("reciprocal_neighbors", reciprocal_neighbors, released());
    m.def("mean_of_rows", mean_of_rows, released());
    m.def("reranked_workspace", reranked_workspace);
    m.def("reranked_distances", reranked_distances, released());
}

// ---- what was compiled ----

py::dict build_info() {
    py::dict info;
    info["compiler"] = __VERSION__;
    info["isas"] = py::make_tuple(
#ifdef SABMN_BASELINE
        "baseline"
#endif
#ifdef SABMN_AVX2
        , "avx2"
#endif
#ifdef SABMN_AVX512
        , "avx512"
#endif
#ifdef SABMN_AVX512_BF16
        , "avx512_bf16"
#endif
    );
#ifdef SABMN_CUDA_TARGETS
    info["cuda_targets"] = py::str(SABMN_CUDA_TARGETS).attr("split")();
    info["cuda_missing"] = py::none();
#else
    info["cuda_targets"] = py::list();
    info["cuda_missing"] = SABMN_CUDA_MISSING;
#endif
    return info;
}

#ifdef SABMN_CUDA_TARGETS
py::dict cuda_info() {
    const CudaReport report = cuda_report();
    py::list devices;
    for (const DeviceReport& device : report.devices) {
        py::dict entry;
        entry["name"] = device.name;
        entry["capability"] = py::make_tuple(device.major, device.minor);
        entry["problem"] = device.problem;
        devices.append(entry);
    }
    py::dict info;
    info["runtime_version"] = report.runtime_version;
    info["driver_version"] = report.driver_version;
    info["problem"] = report.problem;
    info["devices"] = devices;
    return info;
}
#endif

// ---- attention ----

using Address = std::uintptr_t;
using Strides = std::array<std::int64_t, 4>;

Image image(Address data, const Strides& strides) {
    return {pointer<void>(data), strides[0], strides[1], strides[2], strides[3]};
}

// B, C, H, W, key width, value width
using SizeFields = std::array<std::int64_t, 6>;

AttentionSizes sizes_of(const SizeFields& fields) {
    return {fields[0], fields[1], fields[2], fields[3], fields[4], fields[5]};
}

// weights: query, key, value, out, gamma; biases: query, key, value, out; saved: query, key, value, out, lse.
AttentionInputs attention_inputs(int dtype, int threads, const SizeFields& sizes, Address x, const Strides& x_strides,
                                 const std::array<Address, 5>& weights, const std::array<Address, 4>& biases,
                                 const std::array<Address, 5>& saved, Address workspace) {
    AttentionInputs in{};
    in.dtype = static_cast<DType>(dtype);
    in.threads = usable_threads(threads);
    in.sizes = sizes_of(sizes);
    in.x = image(x, x_strides);
    const void** const weight_fields[] = {&in.w_query, &in.w_key, &in.w_value, &in.w_out, &in.gamma};
    for (int i = 0; i < 5; ++i) *weight_fields[i] = pointer<void>(weights[i]);
    const void** const bias_fields[] = {&in.b_query, &in.b_key, &in.b_value, &in.b_out};
    for (int i = 0; i < 4; ++i) *bias_fields[i] = pointer<void>(biases[i]);
    void** const saved_fields[] = {&in.query, &in.key, &in.value, &in.out, &in.lse};
    for (int i = 0; i < 5; ++i) *saved_fields[i] = pointer<void>(saved[i]);
    in.workspace = pointer<void>(workspace);
    return in;
}

int attention_forward(int dtype, int threads, const SizeFields& sizes, Address x, const Strides& x_strides,
                      const std::array<Address, 5>& weights, const std::array<Address, 4>& biases,
                      const std::array<Address, 5>& saved, Address workspace, Address y, const Strides& y_strides) {
    const AttentionInputs in = attention_inputs(dtype, threads, sizes, x, x_strides, weights, biases, saved, workspace);
    return for_isa(SABMN_BF16_VARIANTS(attention_forward))(in, image(y, y_strides));
}

// gradients: of w_query, w_key, w_value, w_out, gamma, b_query, b_value.
int attention_backward(int dtype, int threads, const SizeFields& sizes, Address x, const Strides& x_strides,
                       const std::array<Address, 5>& weights, const std::array<Address, 4>& biases,
                       const std::array<Address, 5>& saved, Address workspace, Address grad_y,
                       const Strides& grad_y_strides, Address grad_x, const Strides& grad_x_strides,
                       const std::array<Address, 7>& gradients) {
    const AttentionInputs in = attention_inputs(dtype, threads, sizes, x, x_strides, weights, biases, saved, workspace);
    AttentionGradients g{};
    g.grad_y = image(grad_y, grad_y_strides);
    g.grad_x = image(grad_x, grad_x_strides);
    void** const fields[] = {&g.w_query, &g.w_key, &g.w_value, &g.w_out, &g.gamma, &g.b_query, &g.b_value};
    for (int i = 0; i < 7; ++i) *fields[i] = pointer<void>(gradients[i]);
    return for_isa(SABMN_BF16_VARIANTS(attention_backward))(in, g);
}

int attention_exponential(int dtype, Address x, Address result, std::int64_t count) {
    return for_isa(SABMN_VARIANTS(attention_exponential))(static_cast<DType>(dtype), pointer<void>(x),
                                                          pointer<void>(result), count);
}

void define_attention(py::module_& m) {
    using namespace py::literals;
    m.def(
        "attention_workspace",
        [](const SizeFields& sizes, int threads) {
            return attention_workspace(sizes_of(sizes), usable_threads(threads));
        },
        "sizes"_a, "threads"_a);
    m.def("attention_forward", attention_forward, py::call_guard<py::gil_scoped_release>(), "dtype"_a, "threads"_a,
          "sizes"_a, "x"_a, "x_strides"_a, "weights"_a, "biases"_a, "saved"_a, "workspace"_a, "y"_a, "y_strides"_a);
    m.def("attention_backward", attention_backward, py::call_guard<py::gil_scoped_release>(), "dtype"_a, "threads"_a,
          "sizes"_a, "x"_a, "x_strides"_a, "weights"_a, "biases"_a, "saved"_a, "workspace"_a, "grad_y"_a,
          "grad_y_strides"_a, "grad_x"_a, "grad_x_strides"_a, "gradients"_a);
    m.def("attention_exponential", attention_exponential, "dtype"_a, "x"_a, "result"_a, "count"_a);
}

// ---- batch normalisation ----

// dtype, batch, channels, positions, whether channels_last
using ImagesFields = std::array<std::int64_t, 5>;

BatchNormImages batch_norm_images(const ImagesFields& fields) {
    return {static_cast<DType>(fields[0]), fields[1], fields[2], fields[3], fields[4] != 0};
}

std::int64_t batch_norm_workspace(const ImagesFields& images) {
    return for_isa(SABMN_VARIANTS(batch_norm_workspace))(batch_norm_images(images));
}

// inputs: x, residual, weight, bias, running_mean, running_var; outputs: y, statistics.
int batch_norm_forward(const ImagesFields& images, const std::array<Address, 6>& inputs,
                       const std::array<Address, 2>& outputs, double momentum, double eps, bool relu, Address workspace,
                       int threads) {
    const BatchNormForward pass = {batch_norm_images(images),  pointer<void>(inputs[0]),   pointer<void>(inputs[1]),
                                   pointer<float>(inputs[2]),  pointer<float>(inputs[3]),  pointer<float>(inputs[4]),
                                   pointer<float>(inputs[5]),  momentum,                   eps,
                                   relu,                       pointer<void>(outputs[0]),  pointer<float>(outputs[1])};
    return for_isa(SABMN_VARIANTS(batch_norm_forward))(pass, pointer<void>(workspace), usable_threads(threads));
}

// inputs: grad_y, x, y, weight, bias, statistics; gradients: of x, residual, weight, bias.
int batch_norm_backward(const ImagesFields& images, const std::array<Address, 6>& inputs,
                        const std::array<Address, 4>& gradients, bool relu, Address workspace, int threads) {
    const BatchNormBackward pass = {batch_norm_images(images),    pointer<void>(inputs[0]),    pointer<void>(inputs[1]),
                                    pointer<void>(inputs[2]),     pointer<float>(inputs[3]),   pointer<float>(inputs[4]),
                                    pointer<float>(inputs[5]),    relu,                        pointer<void>(gradients[0]),
                                    pointer<void>(gradients[1]),  pointer<float>(gradients[2]), pointer<float>(gradients[3])};
    return for_isa(SABMN_VARIANTS(batch_norm_backward))(pass, pointer<void>(workspace), usable_threads(threads));
}

void define_batch_norm(py::module_& m) {
    using Release = py::call_guard<py::gil_scoped_release>;
    m.def("batch_norm_workspace", batch_norm_workspace);
    m.def("batch_norm_forward", batch_norm_forward, Release());
    m.def("batch_norm_backward", batch_norm_backward, Release());
}

// ---- Winograd's transforms ----

// shape: dtype, batch, height, width, channels
int winograd_transform(int transform, const std::array<std::int64_t, 5>& shape, Address images, Address planes, int threads) {
    const WinogradImages fields = {static_cast<DType>(shape[0]), shape[1], shape[2], shape[3], shape[4]};
    return for_isa(SABMN_VARIANTS(winograd))(static_cast<WinogradTransform>(transform), fields, pointer<void>(images),
                                             pointer<float>(planes), usable_threads(threads));
}

void define_winograd(py::module_& m) { m.def("winograd", winograd_transform, py::call_guard<py::gil_scoped_release>()); }

// ---- matrix products ----

// (address, batch stride, row stride, column stride)
using MatricesFields = std::array<std::int64_t, 4>;

Matrices matrices_of(const MatricesFields& fields) {
    return {pointer<float>(fields[0]), fields[1], fields[2], fields[3]};
}

// sizes: batch, rows, depth, columns
void multiply(const std::array<std::int64_t, 4>& sizes, const MatricesFields& left, const MatricesFields& right,
              const MatricesFields& result, bool add, int threads) {
    const Products fields = {sizes[0],          sizes[1],           sizes[2],            sizes[3],
                             matrices_of(left), matrices_of(right), matrices_of(result), add};
    for_isa(SABMN_VARIANTS(products))(fields, usable_threads(threads));
}

void define_products(py::module_& m) { m.def("products", multiply, py::call_guard<py::gil_scoped_release>()); }

}  // namespace
}  // namespace sabmn

PYBIND11_MODULE(_sabmn_ext, m) {
    using namespace sabmn;
    pthread_atfork(nullptr, nullptr, [] { forked = true; });

    m.attr("FINGERPRINT") = SABMN_FINGERPRINT;
    m.def("build_info", build_info);
#ifdef SABMN_CUDA_TARGETS
    m.def("cuda_info", cuda_info);
    define_spectral_norm_cuda(m);
    define_attention_cuda(m);
    define_retrieval_cuda(m);
#endif
    m.def("spectral_norm_workspace", spectral_norm_workspace);
    m.def("spectral_norm_forward", spectral_norm_forward);
    m.def("spectral_norm_backward", spectral_norm_backward);
    m.attr("BIN_BITS") = bin_bits;
    m.def("squared_norms", squared_norms);
    m.def("pair_distances", pair_distances);
    m.def("count_workspace", count_workspace);
    m.def("count_nonmatches", count_nonmatches);
    m.def("count_nonmatches_in_rows", count_nonmatches_in_rows);
    define_search(m);
    define_rerank(m);

    m.def("isa", [] { return isa_names[static_cast<int>(chosen_isa)]; });
    define_attention(m);
    define_batch_norm(m);
    define_winograd(m);
    define_products(m);
    m.def("set_isa", set_isa, "Use one of build_info()['isas'] from now on; for tests and for comparing.");
    if (const char* asked = std::getenv("SABMN_ISA")) set_isa(asked);
}
