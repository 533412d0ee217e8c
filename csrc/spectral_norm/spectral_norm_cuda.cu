// Spectral normalisation on the GPU: how weights are cut into blocks and groups, and the launches: for each group of
// weights two per power iteration and one forward, two backward.

#include "spectral_norm/spectral_norm_cuda.h"

#include <algorithm>

#include "spectral_norm/spectral_norm_kernels.cuh"

namespace sabmn {
namespace {

using std::int64_t;

// Of W in a block of rows. Three blocks on an SM then have 192 KB of it to read again, much of it from L1 and all of it
// from the L2 of an A100 or H100. Rows that are longer than 8 KB take twice that: with fewer than 8 rows a block the
// partial sums, 1/rows of W's size, would cost more.
constexpr int64_t row_block_bytes = 64 << 10;

int rows_per_block(int64_t columns, int64_t element_bytes) {
    const int64_t row_bytes = std::max<int64_t>(columns, 1) * element_bytes;
    const int64_t rounds = (row_block_bytes / warps + row_bytes / 2) / row_bytes;  // of one row per warp
    return warps * static_cast<int>(std::clamp<int64_t>(rounds, 1, max_rows_per_block / warps));
}

int64_t element_bytes(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// A weight without elements has a block too: it writes its σ.
int blocks_of(int64_t size, int64_t per_block) {
    return static_cast<int>(std::max<int64_t>((size + per_block - 1) / per_block, 1));
}

// Hands out the workspace piece by piece. It begins at 0 where only the size is asked for.
struct Workspace {
    std::uintptr_t next;

    template <typename T = void>
    T* take(int64_t bytes) {
        const std::uintptr_t piece = next;
        next += (bytes + 255) / 256 * 256;
        return reinterpret_cast<T*>(piece);
    }
};

template <typename... Pointers>
bool aligned(int64_t columns, int64_t element_bytes, Pointers... pointers) {
    return columns * element_bytes % vector_bytes == 0 &&
           (... && (reinterpret_cast<std::uintptr_t>(pointers) % vector_bytes == 0));
}

void add(ForwardGroup& group, const SpectralNormForwardMatrix& matrix, DType dtype, Workspace& workspace) {
    const int64_t rows = matrix.rows, columns = matrix.columns, bytes = element_bytes(dtype),
                  wide = std::max<int64_t>(bytes, 4);
    ForwardWeight& weight = group.weights[group.count];
    weight.matrix = matrix;
    weight.rows_per_block = rows_per_block(columns, bytes);
    weight.vectors = aligned(columns, bytes, matrix.weight, matrix.normalized);
    const int row_blocks = blocks_of(rows, weight.rows_per_block),
              column_blocks = blocks_of(columns, columns_per_block);
    weight.row_sums = workspace.take<double>(row_blocks * sizeof(double));
    weight.powers = workspace.take<double>(row_blocks * sizeof(double));
    weight.column_sums = workspace.take<double>(column_blocks * sizeof(double));
    weight.r = workspace.take(rows * wide);
    weight.t = workspace.take(columns * wide);
    weight.partials = workspace.take(row_blocks * columns * wide);

    const int i = group.count++;
    group.rows.first[i + 1] = group.rows.first[i] + row_blocks;
    group.columns.first[i + 1] = group.columns.first[i] + column_blocks;
    group.values.first[i + 1] = group.values.first[i] + blocks_of(rows * columns, values_bytes / bytes);
}

void add(BackwardGroup& group, const SpectralNormBackwardMatrix& matrix, DType dtype, Workspace& workspace) {
    const int64_t bytes = element_bytes(dtype);
    BackwardWeight& weight = group.weights[group.count];
    weight.matrix = matrix;
    weight.rows_per_block = rows_per_block(matrix.columns, bytes);
    weight.vectors = aligned(matrix.columns, bytes, matrix.weight, matrix.gradient, matrix.weight_gradient);
    const int value_blocks = blocks_of(matrix.rows * matrix.columns, values_bytes / bytes);
    weight.dots = workspace.take<double>(value_blocks * sizeof(double));

    const int i = group.count++;
    group.rows.first[i + 1] = group.rows.first[i] + blocks_of(matrix.rows, weight.rows_per_block);
    group.values.first[i + 1] = group.values.first[i] + value_blocks;
}

// Calls work(group) for the weights, as many at a time as fit into a launch's parameters, until one fails.
template <typename Group, typename Matrix, typename Work>
int for_groups(const Matrix* matrices, int64_t count, DType dtype, void* memory, const Work& work) {
    Workspace workspace{reinterpret_cast<std::uintptr_t>(memory)};
    for (int64_t begin = 0; begin < count; begin += group_capacity) {
        Group group{};
        for (int64_t i = begin; i < std::min<int64_t>(begin + group_capacity, count); ++i) {
            if (std::max(matrices[i].rows, matrices[i].columns) > INT32_MAX) return unsupported_size;
            add(group, matrices[i], dtype, workspace);
        }
        if (const cudaError_t status = work(group); status != cudaSuccess) return cuda_error + static_cast<int>(status);
    }
    return ok;
}

// Calls work with a value of each of the two types.
template <typename Work>
int with_types(DType dtype, DType normalized_dtype, const Work& work) {
    const auto both = [&](DType first, DType second) { return dtype == first && normalized_dtype == second; };
    if (both(DType::float32, DType::float32)) return work(float(), float());
    if (both(DType::float32, DType::bfloat16)) return work(float(), bf16());
    if (both(DType::float32, DType::float16)) return work(float(), f16());
    if (both(DType::float64, DType::float64)) return work(double(), double());
    if (both(DType::bfloat16, DType::bfloat16)) return work(bf16(), bf16());
    if (both(DType::float16, DType::float16)) return work(f16(), f16());
    return unsupported_dtype;
}

template <typename T, typename O>
cudaError_t launch_forward(const ForwardGroup& group, void* sigma, int iterations, double eps, cudaStream_t stream) {
    const int count = group.count;
    cudaError_t status = cudaSuccess;
    for (int i = 0; i < std::max(iterations, 1) && status == cudaSuccess; ++i) {
        status = launch(spectral_norm_forward_rows_kernel<T>, group.rows.first[count], threads, 0, stream, group,
                        iterations, i == 0, eps);
        if (iterations == 0 || status != cudaSuccess) break;
        status =
            launch(spectral_norm_forward_columns_kernel<T>, group.columns.first[count], threads, 0, stream, group, eps);
    }
    if (status != cudaSuccess) return status;
    return launch(spectral_norm_forward_scale_kernel<T, O>, group.values.first[count], threads, 0, stream, group, sigma,
                  iterations, eps);
}

template <typename T, typename O>
cudaError_t launch_backward(const BackwardGroup& group, const void* sigma, cudaStream_t stream) {
    const int count = group.count;
    const cudaError_t status =
        launch(spectral_norm_backward_dot_kernel<T, O>, group.values.first[count], threads, 0, stream, group);
    if (status != cudaSuccess) return status;
    return launch(spectral_norm_backward_rows_kernel<T, O>, group.rows.first[count], threads, 0, stream, group, sigma);
}

}  // namespace

SpectralNormCudaBytes spectral_norm_cuda_workspace(const int64_t* rows, const int64_t* columns, int64_t count,
                                                   DType dtype) {
    Workspace forward{0}, backward{0};
    for (int64_t i = 0; i < count; ++i) {
        ForwardGroup forward_group{};
        BackwardGroup backward_group{};
        SpectralNormForwardMatrix forward_matrix{};
        SpectralNormBackwardMatrix backward_matrix{};
        forward_matrix.rows = backward_matrix.rows = rows[i];
        forward_matrix.columns = backward_matrix.columns = columns[i];
        add(forward_group, forward_matrix, dtype, forward);
        add(backward_group, backward_matrix, dtype, backward);
    }
    return {static_cast<int64_t>(forward.next), static_cast<int64_t>(backward.next)};
}

int spectral_norm_forward_cuda(const SpectralNormForwardMatrix* matrices, int64_t count, void* sigma, int iterations,
                               double eps, DType dtype, DType normalized_dtype, void* workspace, void* stream) {
    return with_types(dtype, normalized_dtype, [&](auto weight, auto normalized) {
        return for_groups<ForwardGroup>(matrices, count, dtype, workspace, [&](const ForwardGroup& group) {
            return launch_forward<decltype(weight), decltype(normalized)>(group, sigma, iterations, eps,
                                                                          static_cast<cudaStream_t>(stream));
        });
    });
}

int spectral_norm_backward_cuda(const SpectralNormBackwardMatrix* matrices, int64_t count, const void* sigma,
                                DType dtype, DType normalized_dtype, void* workspace, void* stream) {
    return with_types(dtype, normalized_dtype, [&](auto weight, auto normalized) {
        return for_groups<BackwardGroup>(matrices, count, dtype, workspace, [&](const BackwardGroup& group) {
            return launch_backward<decltype(weight), decltype(normalized)>(group, sigma,
                                                                           static_cast<cudaStream_t>(stream));
        });
    });
}

}  // namespace sabmn
