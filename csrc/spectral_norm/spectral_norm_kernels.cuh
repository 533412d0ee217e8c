// The CUDA kernels of the batched spectral normalisation. Formulas and arguments: spectral_norm.h; launches:
// spectral_norm_cuda.cu.
//
//   forward   rows      every iteration: of a block of rows b, r_b = W_b v and s_b = W_bᵀ r_b
//             columns   every iteration: ‖r‖, u = r/‖r‖ and t = Wᵀu = Σ_b s_b/‖r‖
//             scale     σ from ‖t‖, W/σ and v = t/‖t‖
//   backward  dot       ⟨G, W⟩ of a run of values
//             rows      the sum of those, and a block of rows of dW
//
// One launch works on all weights of a group; a block finds its weight by its own number, in tables that arrive with
// the kernel's parameters. What has to be summed over blocks is written to the workspace by one launch and added up by
// the next, in a fixed order, and how a weight is cut depends on its shape alone. Norms are summed in double, and r_b
// carries a power of two of its own into s_b: in float, Wᵀ(Wv) overflows near |W| = 1e15 and vanishes near 1e-15.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/cuda.h"
#include "spectral_norm/spectral_norm.h"

namespace sabmn {
namespace {

// ---- sizes ----

// 8 warps: a warp takes a row of W at a time, or 1/8 of the sum over row blocks. Three blocks on an SM have up to 48 KB
// of loads in flight and leave 80 registers a thread; more blocks would read more of W before any of it is read again.
constexpr int warp_size = 32, warps = 8, threads = warps * warp_size;
constexpr int resident_blocks = 3;
constexpr int vector_bytes = 16;               // the widest access
constexpr int max_rows_per_block = warp_size;  // a lane holds an element of r_b
constexpr int columns_per_block = warp_size;   // of `columns`: a lane holds a column
constexpr int values_bytes = 64 * threads;     // of W in a block of `scale` and `dot`: 64 bytes in flight a thread
constexpr int staged_bytes = 18 << 10;         // of v in shared memory at a time: a ResNet's widest row, 4608 floats
constexpr int group_capacity = 64;             // of weights; a launch is sent the whole table, so it is kept short

// What is summed and stored between launches.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// ---- what a launch is told ----

struct ForwardWeight {
    SpectralNormForwardMatrix matrix;
    double* row_sums;     // [row blocks]     ‖r_b‖²; without iterations u_b · r_b
    double* powers;       // [row blocks]     s_b = powers[b] · partials[b]
    double* column_sums;  // [column blocks]  ‖t‖² of the block's columns
    void* r;              // [rows]           W v; this and the next two are Wide
    void* t;              // [columns]        Wᵀu, in the order of memory
    void* partials;       // [row blocks, columns]
    int rows_per_block;
    bool vectors;  // every row of every tensor begins at a multiple of 16 bytes
};

struct BackwardWeight {
    SpectralNormBackwardMatrix matrix;
    double* dots;  // [value blocks]
    int rows_per_block;
    bool vectors;
};

// How a launch cuts a group's weights: weight i has the blocks from first[i] up to first[i + 1].
struct Cut {
    std::int32_t first[group_capacity + 1];
};

struct ForwardGroup {
    int count;
    Cut rows, columns, values;
    ForwardWeight weights[group_capacity];
};

struct BackwardGroup {
    int count;
    Cut rows, values;
    BackwardWeight weights[group_capacity];
};

static_assert(sizeof(ForwardGroup) < 32000 && sizeof(BackwardGroup) < 32000,
              "a launch takes 32,764 bytes of parameters");

// A block's weight, its number within the weight, and how many blocks the weight has.
struct Place {
    int weight, block, blocks;
};

__device__ inline Place find(const Cut& cut, int count, int block) {
    int low = 0, high = count;  // first[low] <= block < first[high]
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (cut.first[middle] <= block ? low : high) = middle;
    }
    return {low, block - cut.first[low], cut.first[low + 1] - cut.first[low]};
}

struct RowBlock {
    std::int64_t first;
    int rows;
};

template <typename Weight>
__device__ RowBlock row_block(const Weight& weight, int block) {
    const std::int64_t first = std::int64_t(block) * weight.rows_per_block, left = weight.matrix.rows - first;
    return {first, left < weight.rows_per_block ? static_cast<int>(left) : weight.rows_per_block};
}

struct ValueBlock {
    std::int64_t first;
    int size;
};

template <typename T, typename Matrix>
__device__ ValueBlock value_block(const Matrix& matrix, int block) {
    constexpr int size = values_bytes / sizeof(T);
    const std::int64_t first = std::int64_t(block) * size, left = matrix.rows * matrix.columns - first;
    return {first, left < size ? static_cast<int>(left) : size};
}

// ---- pieces ----

template <int width, typename T>
struct alignas(width * sizeof(T)) Vector {
    T value[width];
};

template <int width, typename T>
__device__ Vector<width, T> load(const T* address) {
    return *reinterpret_cast<const Vector<width, T>*>(address);
}

template <int width, typename T>
__device__ void store(T* address, const Vector<width, T>& vector) {
    *reinterpret_cast<Vector<width, T>*>(address) = vector;
}

template <typename S>
__device__ S warp_sum(S value) {
    for (int mask = warp_size / 2; mask; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

// The sum over the block's threads, for all of them; once in a kernel, for nothing keeps a second call from overtaking.
__device__ inline double block_sum(double value) {
    __shared__ double sums[warps];
    value = warp_sum(value);
    if (threadIdx.x % warp_size == 0) sums[threadIdx.x / warp_size] = value;
    __syncthreads();
    value = 0;
    for (int warp = 0; warp < warps; ++warp) value += sums[warp];
    return value;
}

__device__ inline double sum_of(const double* values, int count) {
    double sum = 0;
    for (int i = threadIdx.x; i < count; i += threads) sum += values[i];
    return block_sum(sum);
}

// What a vector of this length is divided by. A length that is NaN stays so.
__device__ inline double divisor(double length, double eps) { return length < eps ? eps : length; }

// The column in memory of element e of v.
__device__ inline std::int64_t column_of(std::int64_t e, std::int64_t columns, std::int64_t inner) {
    if (inner == columns) return e;
    // 32 bits make the divisions cheap; the host refuses longer rows.
    const std::uint32_t element = e, outer = columns / inner;
    return element % outer * inner + element / outer;
}

// v: the caller's, or where that is null factor · t, in the order of memory (inner = columns).
template <typename T>
struct RightVector {
    const T* v;
    const Wide<T>* t;
    double factor;
    std::int64_t columns, inner;

    __device__ Wide<T> operator[](std::int64_t e) const { return v ? static_cast<Wide<T>>(v[e]) : t[e] * factor; }
};

// Calls work(begin, size) for one part of the columns in memory after the other, while `staged` holds that part of v. A
// warp reads neighbours of v; where its order is not that of memory, every part is picked from all of v.
template <typename T, typename Work>
__device__ void for_staged(const RightVector<T>& v, Wide<T>* staged, const Work& work) {
    constexpr int capacity = staged_bytes / sizeof(Wide<T>);
    const bool ordered = v.inner == v.columns;
    for (std::int64_t begin = 0; begin < v.columns; begin += capacity) {
        const int size = v.columns - begin < capacity ? v.columns - begin : capacity;
        const std::int64_t end = ordered ? begin + size : v.columns;
        if (begin) __syncthreads();  // nobody reads the part before any more
        for (std::int64_t e = (ordered ? begin : 0) + threadIdx.x; e < end; e += threads) {
            const std::int64_t k = column_of(e, v.columns, v.inner) - begin;
            if (k >= 0 && k < size) staged[k] = v[e];
        }
        __syncthreads();
        work(begin, size);
    }
}

// ---- forward ----

// r[row] = Σ w[row, k] v[k]. A warp takes a row at a time; v is staged once and serves all rows.
template <int width, typename T, typename S>
__device__ void times_vector(const T* w, int rows, const RightVector<T>& v, S* r, S* staged) {
    const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
    for_staged(v, staged, [&](std::int64_t begin, int size) {
        for (int row = warp; row < rows; row += warps) {
            const T* part = w + row * v.columns + begin;
            S sums[width] = {};
#pragma unroll 4
            for (int k = lane * width; k < size; k += warp_size * width) {
                const auto x = load<width>(part + k);
                const auto y = load<width>(staged + k);
#pragma unroll
                for (int i = 0; i < width; ++i) sums[i] += static_cast<S>(x.value[i]) * y.value[i];
            }
            S sum = 0;
#pragma unroll
            for (int i = 0; i < width; ++i) sum += sums[i];
            sum = warp_sum(sum);
            if (lane == 0) r[row] = begin ? r[row] + sum : sum;
        }
    });
}

// out[m] = Σ r[row] w[row, m]. A thread owns `width` columns; it begins with the rows that were read last.
template <int width, typename T, typename S>
__device__ void transposed_times_vector(const T* w, int rows, std::int64_t columns, const S* r, S* out) {
    for (std::int64_t m = threadIdx.x * width; m < columns; m += threads * width) {
        Vector<width, S> sums = {};
#pragma unroll 8
        for (int row = rows - 1; row >= 0; --row) {
            const auto x = load<width>(w + row * columns + m);
#pragma unroll
            for (int i = 0; i < width; ++i) sums.value[i] += r[row] * static_cast<S>(x.value[i]);
        }
        store<width>(out + m, sums);
    }
}

// A block of rows: the first product reads W from memory, and the second reads it again from L1 and L2, for a block has
// about 64 KB of it. `first`: v is the caller's, else it is t/‖t‖ of the iteration before.
template <typename T>
__global__ void __launch_bounds__(threads, resident_blocks)
    spectral_norm_forward_rows_kernel(const __grid_constant__ ForwardGroup group, int iterations, bool first,
                                      double eps) {
    using S = Wide<T>;
    constexpr int width = vector_bytes / sizeof(S);
    alignas(vector_bytes) __shared__ S staged[staged_bytes / sizeof(S)];
    __shared__ S r[max_rows_per_block];

    const Place place = find(group.rows, group.count, blockIdx.x);
    const ForwardWeight& weight = group.weights[place.weight];
    const SpectralNormForwardMatrix& matrix = weight.matrix;
    const std::int64_t columns = matrix.columns;
    const RowBlock block = row_block(weight, place.block);
    const T* const w = static_cast<const T*>(matrix.weight) + block.first * columns;

    RightVector<T> v = {static_cast<const T*>(matrix.v), nullptr, 1, columns, matrix.inner};
    if (!first) {
        const int blocks = group.columns.first[place.weight + 1] - group.columns.first[place.weight];
        const double length = sqrt(sum_of(weight.column_sums, blocks));
        v = {nullptr, static_cast<const S*>(weight.t), 1 / divisor(length, eps), columns, columns};
    }
    if (weight.vectors) {
        times_vector<width>(w, block.rows, v, r, staged);
    } else {
        times_vector<1>(w, block.rows, v, r, staged);
    }
    __syncthreads();

    const int lane = threadIdx.x;
    if (lane < warp_size) {
        const bool has_row = lane < block.rows;
        const double own = has_row ? r[lane] : 0;
        double left = own;  // without iterations σ = Σ u_b · r_b, else ‖r‖² = Σ r_b · r_b
        if (iterations == 0 && has_row) left = static_cast<S>(static_cast<const T*>(matrix.u)[block.first + lane]);
        const double sum = warp_sum(left * own);
        double greatest = fabs(own);
        for (int mask = warp_size / 2; mask; mask /= 2) greatest = fmax(greatest, shuffle_xor(greatest, mask));
        const int exponent = greatest > 0 && greatest < INFINITY ? ilogb(greatest) : 0;
        if (has_row) {
            static_cast<S*>(weight.r)[block.first + lane] = own;
            r[lane] = ldexp(own, -exponent);
        }
        if (lane == 0) {
            weight.row_sums[place.block] = sum;
            weight.powers[place.block] = ldexp(1.0, exponent);
        }
    }
    if (iterations == 0) return;
    __syncthreads();

    S* const partial = static_cast<S*>(weight.partials) + place.block * columns;
    if (weight.vectors) {
        transposed_times_vector<width>(w, block.rows, columns, r, partial);
    } else {
        transposed_times_vector<1>(w, block.rows, columns, r, partial);
    }
}

// 32 columns of t, a lane each: the warps share out the row blocks, so that one thread's chain of loads is short. The
// weight's blocks write u together.
template <typename T>
__global__ void __launch_bounds__(threads)
    spectral_norm_forward_columns_kernel(const __grid_constant__ ForwardGroup group, double eps) {
    using S = Wide<T>;
    __shared__ double sums[warps][columns_per_block];

    const Place place = find(group.columns, group.count, blockIdx.x);
    const ForwardWeight& weight = group.weights[place.weight];
    const SpectralNormForwardMatrix& matrix = weight.matrix;
    const int row_blocks = group.rows.first[place.weight + 1] - group.rows.first[place.weight];
    const double inverse = 1 / divisor(sqrt(sum_of(weight.row_sums, row_blocks)), eps);

    for (std::int64_t row = std::int64_t(place.block) * threads + threadIdx.x; row < matrix.rows;
         row += std::int64_t(place.blocks) * threads) {
        static_cast<T*>(matrix.u_new)[row] = static_cast<T>(static_cast<const S*>(weight.r)[row] * inverse);
    }

    const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
    const std::int64_t column = std::int64_t(place.block) * columns_per_block + lane;
    const bool has_column = column < matrix.columns;
    double sum = 0;
    if (has_column) {
        const S* const partials = static_cast<const S*>(weight.partials) + column;
#pragma unroll 4
        for (int b = warp; b < row_blocks; b += warps) sum += weight.powers[b] * partials[b * matrix.columns];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0) {
        for (int other = 1; other < warps; ++other) sum += sums[other][lane];
        const S t = sum * inverse;
        if (has_column) static_cast<S*>(weight.t)[column] = t;
        const double square = warp_sum(double(t) * t);
        if (lane == 0) weight.column_sums[place.block] = square;
    }
}

// out = w · scale(); the loads are under way while σ is summed.
template <int width, typename T, typename O, typename Scale>
__device__ void scale_values(const T* w, O* out, int size, const Scale& scale) {
    constexpr int steps = values_bytes / sizeof(T) / threads / width;
    Vector<width, T> x[steps];
#pragma unroll
    for (int step = 0; step < steps; ++step) {
        const int at = (step * threads + threadIdx.x) * width;
        if (at < size) x[step] = load<width>(w + at);
    }
    const Wide<T> factor = scale();
#pragma unroll
    for (int step = 0; step < steps; ++step) {
        const int at = (step * threads + threadIdx.x) * width;
        Vector<width, O> y;
#pragma unroll
        for (int i = 0; i < width; ++i) y.value[i] = static_cast<O>(static_cast<Wide<T>>(x[step].value[i]) * factor);
        if (at < size) store<width>(out + at, y);
    }
}

// A run of values of W/σ. The weight's blocks write v together, and without iterations u. The launch goes through the
// weights backwards: what the launches before it read last is still in L2.
template <typename T, typename O>
__global__ void __launch_bounds__(threads, resident_blocks)
    spectral_norm_forward_scale_kernel(const __grid_constant__ ForwardGroup group, void* sigmas, int iterations,
                                       double eps) {
    using S = Wide<T>;
    const Place place = find(group.values, group.count, gridDim.x - 1 - blockIdx.x);
    const ForwardWeight& weight = group.weights[place.weight];
    const SpectralNormForwardMatrix& matrix = weight.matrix;
    const ValueBlock block = value_block<T>(matrix, place.block);

    double inverse_length = 1;
    const auto scale = [&] {
        const Cut& cut = iterations ? group.columns : group.rows;
        const double sum = sum_of(iterations ? weight.column_sums : weight.row_sums,
                                  cut.first[place.weight + 1] - cut.first[place.weight]);
        double sigma = sum;  // Σ u_b · r_b
        if (iterations) {
            // uᵀWv = t · t/max(‖t‖, eps)
            inverse_length = 1 / divisor(sqrt(sum), eps);
            sigma = sqrt(sum) * inverse_length * sqrt(sum);
        }
        const S rounded = sigma;
        if (place.block == 0 && threadIdx.x == 0) static_cast<S*>(sigmas)[matrix.index] = rounded;
        return static_cast<S>(1 / double(rounded));
    };
    const T* const w = static_cast<const T*>(matrix.weight) + block.first;
    O* const out = static_cast<O*>(matrix.normalized) + block.first;
    if (weight.vectors) {
        scale_values<vector_bytes / sizeof(T)>(w, out, block.size, scale);
    } else {
        scale_values<1>(w, out, block.size, scale);
    }

    const std::int64_t begin = std::int64_t(place.block) * threads + threadIdx.x;
    const std::int64_t stride = std::int64_t(place.blocks) * threads;
    const T *const u = static_cast<const T*>(matrix.u), *const v = static_cast<const T*>(matrix.v);
    T *const u_new = static_cast<T*>(matrix.u_new), *const v_new = static_cast<T*>(matrix.v_new);
    if (iterations) {
        const S* const t = static_cast<const S*>(weight.t);
        for (std::int64_t e = begin; e < matrix.columns; e += stride) {
            v_new[e] = static_cast<T>(t[column_of(e, matrix.columns, matrix.inner)] * inverse_length);
        }
    } else {
        for (std::int64_t e = begin; e < matrix.rows; e += stride) u_new[e] = u[e];
        for (std::int64_t e = begin; e < matrix.columns; e += stride) v_new[e] = v[e];
    }
}

// ---- backward ----

template <int width, typename T, typename O>
__device__ Wide<T> dot_values(const O* g, const T* w, int size) {
    Wide<T> sums[width] = {}, sum = 0;
#pragma unroll 4
    for (int at = threadIdx.x * width; at < size; at += threads * width) {
        const auto x = load<width>(g + at);
        const auto y = load<width>(w + at);
#pragma unroll
        for (int i = 0; i < width; ++i) sums[i] += static_cast<Wide<T>>(x.value[i]) * static_cast<Wide<T>>(y.value[i]);
    }
#pragma unroll
    for (int i = 0; i < width; ++i) sum += sums[i];
    return sum;
}

template <typename T, typename O>
__global__ void __launch_bounds__(threads)
    spectral_norm_backward_dot_kernel(const __grid_constant__ BackwardGroup group) {
    const Place place = find(group.values, group.count, blockIdx.x);
    const BackwardWeight& weight = group.weights[place.weight];
    const ValueBlock block = value_block<T>(weight.matrix, place.block);
    const O* const g = static_cast<const O*>(weight.matrix.gradient) + block.first;
    const T* const w = static_cast<const T*>(weight.matrix.weight) + block.first;
    constexpr int width = vector_bytes / sizeof(T);
    const double sum =
        block_sum(weight.vectors ? dot_values<width>(g, w, block.size) : dot_values<1>(g, w, block.size));
    if (threadIdx.x == 0) weight.dots[place.block] = sum;
}

// out[row, k] = (g[row, k] − along·u[row] · v[k]) · inverse, a row of the block for a warp at a time. Its loads go
// ahead of its stores.
template <int width, typename T, typename O, typename S>
__device__ void write_rows(const O* g, T* out, int rows, const T* u, const RightVector<T>& v, double along, S inverse,
                           S* staged) {
    constexpr int batch = 4;
    const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
    for_staged(v, staged, [&](std::int64_t begin, int size) {
        for (int row = warp; row < rows; row += warps) {
            const S factor = along * static_cast<S>(u[row]);
            const O* const from = g + row * v.columns + begin;
            T* const to = out + row * v.columns + begin;
            for (int first = lane * width; first < size; first += batch * warp_size * width) {
                Vector<width, O> x[batch];
#pragma unroll
                for (int step = 0; step < batch; ++step) {
                    const int k = first + step * warp_size * width;
                    if (k < size) x[step] = load<width>(from + k);
                }
#pragma unroll
                for (int step = 0; step < batch; ++step) {
                    const int k = first + step * warp_size * width;
                    if (k >= size) break;
                    const auto y = load<width>(staged + k);
                    Vector<width, T> z;
#pragma unroll
                    for (int i = 0; i < width; ++i) {
                        z.value[i] = static_cast<T>((static_cast<S>(x[step].value[i]) - factor * y.value[i]) * inverse);
                    }
                    store<width>(to + k, z);
                }
            }
        }
    });
}

// A block of rows of dW. The launch goes through the weights backwards, as `scale` does.
template <typename T, typename O>
__global__ void __launch_bounds__(threads, resident_blocks)
    spectral_norm_backward_rows_kernel(const __grid_constant__ BackwardGroup group, const void* sigmas) {
    using S = Wide<T>;
    constexpr int width = vector_bytes / sizeof(S);
    alignas(vector_bytes) __shared__ S staged[staged_bytes / sizeof(S)];

    const Place place = find(group.rows, group.count, gridDim.x - 1 - blockIdx.x);
    const BackwardWeight& weight = group.weights[place.weight];
    const SpectralNormBackwardMatrix& matrix = weight.matrix;
    const std::int64_t columns = matrix.columns;
    const RowBlock block = row_block(weight, place.block);
    const int dots = group.values.first[place.weight + 1] - group.values.first[place.weight];
    const double inverse = 1 / double(static_cast<const S*>(sigmas)[matrix.index]);
    const double along = sum_of(weight.dots, dots) * inverse;

    const O* const g = static_cast<const O*>(matrix.gradient) + block.first * columns;
    T* const out = static_cast<T*>(matrix.weight_gradient) + block.first * columns;
    const T* const u = static_cast<const T*>(matrix.u) + block.first;
    const RightVector<T> v = {static_cast<const T*>(matrix.v), nullptr, 1, columns, matrix.inner};
    if (weight.vectors) {
        write_rows<width>(g, out, block.rows, u, v, along, static_cast<S>(inverse), staged);
    } else {
        write_rows<1>(g, out, block.rows, u, v, along, static_cast<S>(inverse), staged);
    }
}

}  // namespace
}  // namespace sabmn
