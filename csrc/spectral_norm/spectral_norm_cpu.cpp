// Spectral normalisation on the CPU. A weight is cut into blocks of rows, by its shape alone, and the work on it into stages:
//   forward   one stage per iteration: r = W_b v and s_b = W_bᵀ r, the second from cache; the sums of all blocks, in a fixed
//             order, give u, v and σ. Last stage: W/σ.
//   backward  ⟨G, W⟩ of each block; then dW.
// Threads take blocks in one fixed order, so that a weight is in cache for its next stage; what comes out does not depend on
// which thread took what. Norms are summed in double, and r carries a power of two of its block's own: in float, Wᵀ(Wv)
// overflows near |W| = 1e15 and vanishes near 1e-15, where u ← Wv/‖Wv‖, v ← Wᵀu/‖Wᵀu‖ does not.

#include "spectral_norm/spectral_norm.h"

#include <sched.h>

#include <type_traits>

#include "common/half.h"
#include "common/stream.h"

namespace sabmn {
namespace SABMN_ISA {
namespace {

using std::int64_t;

// A block is to be in the second-level cache still when it is read again.
constexpr int64_t block_bytes = 256 << 10;
// Outputs of more than this are written past the caches, which could not keep them until they are read.
constexpr int64_t streaming_bytes = 16 << 20;
// Weights of so many blocks in all are worked on together; more would push one another out of the last-level cache.
constexpr int64_t blocks_together = 16;
constexpr int row_group = 4;  // rows that share one reading of a vector

int64_t rows_per_block(int64_t columns, int64_t element_bytes) {
    const int64_t rows = block_bytes / (columns * element_bytes) / row_group * row_group;
    return rows > row_group ? rows : row_group;
}

int64_t blocks_of(int64_t rows, int64_t columns, int64_t element_bytes) {
    const int64_t size = rows_per_block(columns, element_bytes);
    return (rows + size - 1) / size;
}

// ---- threads ----

struct alignas(64) Progress {
    int64_t done = 0;   // blocks of the stage that is under way
    int64_t stage = 0;  // the stage that may begin
};

// work(weight, stage, block) for every block, and finish(weight, stage) after the last block of a stage, which all blocks of the
// weight's next stage wait for. With several threads short weights take turns, so that hardly ever one has to wait.
template <typename Blocks, typename Work, typename Finish>
void run_stages(int64_t count, int stages, Progress* progress, int threads, const Blocks& blocks, const Work& work,
                const Finish& finish) {
    const int64_t most_together = threads > 1 ? blocks_together : 1;
    int64_t taken = 0;
    for (int64_t i = 0; i < count; ++i) progress[i] = Progress();
#pragma omp parallel num_threads(threads)
    {
        int64_t first = 0;  // of the blocks of (weight, stage), in the order of all
        int64_t mine = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);
        for (int64_t begin = 0, end = 0; begin < count; begin = end) {
            int64_t together = 0;
            do together += blocks(end++);
            while (end < count && together + blocks(end) <= most_together);
            for (int stage = 0; stage < stages; ++stage) {
                for (int64_t weight = begin; weight < end; ++weight) {
                    const int64_t size = blocks(weight);
                    Progress& state = progress[weight];
                    for (; mine < first + size; mine = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED)) {
                        // The block waited for was taken before this one, by a thread that is at work on it.
                        for (int spins = 0; __atomic_load_n(&state.stage, __ATOMIC_ACQUIRE) < stage; ++spins) {
                            if (spins > 1000) sched_yield();
                        }
                        // Every second stage goes backwards: what was read last is in the nearest cache.
                        const int64_t position = mine - first;
                        work(weight, stage, stage % 2 ? size - 1 - position : position);
                        if (__atomic_add_fetch(&state.done, 1, __ATOMIC_ACQ_REL) == size) {
                            finish(weight, stage);
                            state.done = 0;
                            __atomic_store_n(&state.stage, stage + 1, __ATOMIC_RELEASE);
                        }
                    }
                    first += size;
                }
            }
        }
    }
}

// ---- memory ----

// What one weight needs beside its tensors.
template <typename S>
struct Workspace {
    double* sum;            // [columns]           Wᵀr
    double* squared_norms;  // [blocks]            of r; in the backward pass ⟨G, W⟩
    int64_t* exponents;     // [blocks]            of 2 in r's scale
    S* v;                   // [columns]           in the order of memory
    S* r;                   // [rows]
    S* partial;             // [blocks, columns]   W_bᵀ r

    // Takes its arrays from `memory`, and returns the end of them.
    char* place(char* memory, int64_t rows, int64_t columns, int64_t blocks) {
        const auto take = [&memory](auto*& array, int64_t size) {
            array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(memory);
            memory += (size * static_cast<int64_t>(sizeof *array) + 63) / 64 * 64;
        };
        take(sum, columns);
        take(squared_norms, blocks);
        take(exponents, blocks);
        take(v, columns);
        take(r, rows);
        take(partial, blocks * columns);
        return memory;
    }
};

// ---- loops over one block ----

template <typename T>
double squared_norm(const T* a, int64_t n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(a[i]);
    return sum;
}

template <typename S>
S largest_magnitude(const S* a, int64_t n) {
    S largest = 0;
    for (int64_t i = 0; i < n; ++i) {
        const S magnitude = a[i] < 0 ? -a[i] : a[i];
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

// out = W v
template <typename T, typename S>
void times_vector(const T* w, const S* v, S* out, int64_t rows, int64_t columns) {
    int64_t row = 0;
    for (; row + row_group <= rows; row += row_group) {
        const T *w0 = w + row * columns, *w1 = w0 + columns, *w2 = w1 + columns, *w3 = w2 + columns;
        S a0 = 0, a1 = 0, a2 = 0, a3 = 0;
#pragma omp simd reduction(+ : a0, a1, a2, a3)
        for (int64_t i = 0; i < columns; ++i) {
            a0 += widen(w0[i]) * v[i], a1 += widen(w1[i]) * v[i], a2 += widen(w2[i]) * v[i], a3 += widen(w3[i]) * v[i];
        }
        out[row] = a0, out[row + 1] = a1, out[row + 2] = a2, out[row + 3] = a3;
    }
    for (; row < rows; ++row) {
        const T* w0 = w + row * columns;
        S a0 = 0;
#pragma omp simd reduction(+ : a0)
        for (int64_t i = 0; i < columns; ++i) a0 += widen(w0[i]) * v[i];
        out[row] = a0;
    }
}

// out = scale · Wᵀ r
template <typename T, typename S>
void transposed_times_vector(const T* w, const S* r, S scale, S* out, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < columns; ++i) out[i] = 0;
    int64_t row = 0;
    for (; row + row_group <= rows; row += row_group) {
        const T *w0 = w + row * columns, *w1 = w0 + columns, *w2 = w1 + columns, *w3 = w2 + columns;
        const S r0 = scale * r[row], r1 = scale * r[row + 1], r2 = scale * r[row + 2], r3 = scale * r[row + 3];
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) {
            out[i] += (r0 * widen(w0[i]) + r1 * widen(w1[i])) + (r2 * widen(w2[i]) + r3 * widen(w3[i]));
        }
    }
    for (; row < rows; ++row) {
        const T* w0 = w + row * columns;
        const S r0 = scale * r[row];
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) out[i] += r0 * widen(w0[i]);
    }
}

// ⟨a, b⟩, summed in double from row to row
template <typename O, typename T>
double inner_product(const O* a, const T* b, int64_t rows, int64_t columns) {
    double sum = 0;
    for (int64_t row = 0; row < rows; ++row, a += columns, b += columns) {
        Wide<T> partial = 0;
#pragma omp simd reduction(+ : partial)
        for (int64_t i = 0; i < columns; ++i) partial += widen(a[i]) * widen(b[i]);
        sum += static_cast<double>(partial);
    }
    return sum;
}

// out[i] = value(i), past the caches where it is asked for
template <typename O, typename Value>
void write(O* out, int64_t n, bool streaming, const Value& value) {
    if (!streaming) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) narrow(value(i), out[i]);
        return;
    }
    constexpr int64_t tile = 1024;
    alignas(64) O buffer[tile];
    for (int64_t first = 0; first < n; first += tile) {
        const int64_t size = first + tile < n ? tile : n - first;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) narrow(value(first + i), buffer[i]);
        stream(out + first, buffer, size * static_cast<int64_t>(sizeof(O)));
    }
}

template <typename Matrix>
bool is_streaming(const Matrix* matrices, int64_t count, int64_t element_bytes) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < count; ++i) bytes += matrices[i].rows * matrices[i].columns * element_bytes;
    return bytes > streaming_bytes;
}

// ---- forward ----

// a ← source in the order of memory
template <typename T, typename S>
void gather(const T* source, S* a, int64_t columns, int64_t inner) {
    const int64_t outer = columns / inner;
    for (int64_t k = 0; k < outer; ++k) {
        for (int64_t c = 0; c < inner; ++c) a[k * inner + c] = widen(source[c * outer + k]);
    }
}

template <typename T, typename O>
struct Forward {
    using S = Wide<T>;
    const SpectralNormForwardMatrix* matrices;
    const Workspace<S>* workspaces;
    S* sigma;
    int iterations;
    double eps;
    bool streaming;

    void power_iteration(int64_t index, int64_t block) const {
        const SpectralNormForwardMatrix& m = matrices[index];
        const Workspace<S>& own = workspaces[index];
        const int64_t size = rows_per_block(m.columns, sizeof(T)), first = block * size;
        const int64_t rows = first + size < m.rows ? size : m.rows - first;
        const T* w = static_cast<const T*>(m.weight) + first * m.columns;
        S* r = own.r + first;
        times_vector(w, own.v, r, rows, m.columns);
        if (iterations == 0) return;
        own.squared_norms[block] = squared_norm(r, rows);
        constexpr int largest_exponent = sizeof(S) == 8 ? 1000 : 120;
        int exponent = 0;
        const S largest = largest_magnitude(r, rows);
        if (largest < __builtin_huge_val()) __builtin_frexp(largest, &exponent);
        exponent = exponent < -largest_exponent ? -largest_exponent : exponent;
        exponent = exponent > largest_exponent ? largest_exponent : exponent;
        own.exponents[block] = exponent;
        transposed_times_vector(w, r, static_cast<S>(__builtin_ldexp(1, -exponent)), own.partial + block * m.columns, rows,
                                m.columns);
    }

    // σ without an update: uᵀ(Wv)
    void keep_vectors(int64_t index) const {
        const SpectralNormForwardMatrix& m = matrices[index];
        const T *u = static_cast<const T*>(m.u), *v = static_cast<const T*>(m.v);
        double sum = 0;
        for (int64_t i = 0; i < m.rows; ++i) sum += static_cast<double>(widen(u[i])) * static_cast<double>(workspaces[index].r[i]);
        sigma[m.index] = static_cast<S>(sum);
        for (int64_t i = 0; i < m.rows; ++i) static_cast<T*>(m.u_new)[i] = u[i];
        for (int64_t i = 0; i < m.columns; ++i) static_cast<T*>(m.v_new)[i] = v[i];
    }

    void update_vectors(int64_t index, bool last) const {
        const SpectralNormForwardMatrix& m = matrices[index];
        const Workspace<S>& own = workspaces[index];
        const int64_t blocks = blocks_of(m.rows, m.columns, sizeof(T));
        double squared = 0;
        for (int64_t i = 0; i < m.columns; ++i) own.sum[i] = 0;
        for (int64_t block = 0; block < blocks; ++block) {
            squared += own.squared_norms[block];
            const double scale = __builtin_ldexp(1, static_cast<int>(own.exponents[block]));
            const S* partial = own.partial + block * m.columns;
#pragma omp simd
            for (int64_t i = 0; i < m.columns; ++i) own.sum[i] += scale * static_cast<double>(partial[i]);
        }
        const double length = __builtin_sqrt(squared), u_scale = 1 / (length > eps ? length : eps);
        const double t_length = u_scale * __builtin_sqrt(squared_norm(own.sum, m.columns));  // ‖Wᵀu‖
        const double clamped = t_length > eps ? t_length : eps, v_scale = u_scale / clamped;
        for (int64_t i = 0; i < m.columns; ++i) own.v[i] = static_cast<S>(own.sum[i] * v_scale);
        if (!last) return;
        // σ = uᵀWv = (Wᵀu)·v: no third product.
        sigma[m.index] = static_cast<S>(t_length * (t_length / clamped));
        T *u = static_cast<T*>(m.u_new), *v = static_cast<T*>(m.v_new);
        for (int64_t i = 0; i < m.rows; ++i) narrow(static_cast<S>(own.r[i] * u_scale), u[i]);
        const int64_t outer = m.columns / m.inner;
        for (int64_t k = 0; k < outer; ++k) {
            for (int64_t c = 0; c < m.inner; ++c) narrow(own.v[k * m.inner + c], v[c * outer + k]);
        }
    }

    void normalize(int64_t index, int64_t block) const {
        const SpectralNormForwardMatrix& m = matrices[index];
        const int64_t size = rows_per_block(m.columns, sizeof(T)), first = block * size;
        const int64_t rows = first + size < m.rows ? size : m.rows - first;
        const T* w = static_cast<const T*>(m.weight) + first * m.columns;
        O* out = static_cast<O*>(m.normalized) + first * m.columns;
        const S factor = 1 / sigma[m.index];
        write(out, rows * m.columns, streaming, [=](int64_t i) { return widen(w[i]) * factor; });
        stream_fence();
    }
};

// ---- backward ----

template <typename T, typename O>
struct Backward {
    using S = Wide<T>;
    const SpectralNormBackwardMatrix* matrices;
    const Workspace<S>* workspaces;
    const S* sigma;
    bool streaming;

    void inner(int64_t index, int64_t block) const {
        const SpectralNormBackwardMatrix& m = matrices[index];
        const int64_t size = rows_per_block(m.columns, sizeof(T)), first = block * size;
        const int64_t rows = first + size < m.rows ? size : m.rows - first;
        workspaces[index].squared_norms[block] =
            inner_product(static_cast<const O*>(m.gradient) + first * m.columns,
                          static_cast<const T*>(m.weight) + first * m.columns, rows, m.columns);
    }

    void add_up(int64_t index) const {
        const SpectralNormBackwardMatrix& m = matrices[index];
        double sum = 0;
        for (int64_t block = 0; block < blocks_of(m.rows, m.columns, sizeof(T)); ++block) {
            sum += workspaces[index].squared_norms[block];
        }
        workspaces[index].sum[0] = sum / static_cast<double>(sigma[m.index]);
    }

    void subtract(int64_t index, int64_t block) const {
        const SpectralNormBackwardMatrix& m = matrices[index];
        const int64_t size = rows_per_block(m.columns, sizeof(T)), first = block * size;
        const int64_t rows = first + size < m.rows ? size : m.rows - first;
        const S inverse = 1 / sigma[m.index];
        const S* v = workspaces[index].v;
        for (int64_t row = first; row < first + rows; ++row) {
            const O* g = static_cast<const O*>(m.gradient) + row * m.columns;
            T* out = static_cast<T*>(m.weight_gradient) + row * m.columns;
            const S factor = static_cast<S>(workspaces[index].sum[0] * static_cast<double>(widen(static_cast<const T*>(m.u)[row])));
            // What was read is in the cache: written over, it does not go past it.
            const bool past_caches = streaming && static_cast<const void*>(out) != static_cast<const void*>(g);
            write(out, m.columns, past_caches, [=](int64_t i) { return (widen(g[i]) - factor * v[i]) * inverse; });
        }
        stream_fence();
    }
};

// ---- all weights ----

// Lays out the workspace: the progress of every weight, their Workspace structs, their arrays. v is gathered.
template <typename T, typename Matrix>
struct Layout {
    Progress* progress;
    Workspace<Wide<T>>* workspaces;

    Layout(const Matrix* matrices, int64_t count, char* memory, int threads) {
        progress = reinterpret_cast<Progress*>(memory);
        memory += count * static_cast<int64_t>(sizeof(Progress));
        workspaces = reinterpret_cast<Workspace<Wide<T>>*>(memory);
        memory += (count * static_cast<int64_t>(sizeof *workspaces) + 63) / 64 * 64;
        for (int64_t i = 0; i < count; ++i) {
            const Matrix& m = matrices[i];
            memory = workspaces[i].place(memory, m.rows, m.columns, blocks_of(m.rows, m.columns, sizeof(T)));
        }
#pragma omp parallel for num_threads(threads)
        for (int64_t i = 0; i < count; ++i) {
            gather(static_cast<const T*>(matrices[i].v), workspaces[i].v, matrices[i].columns, matrices[i].inner);
        }
    }
};

template <typename T, typename O>
void forward(const SpectralNormForwardMatrix* matrices, int64_t count, void* sigma, int iterations, double eps,
             void* workspace, int threads) {
    const Layout<T, SpectralNormForwardMatrix> layout(matrices, count, static_cast<char*>(workspace), threads);
    const Forward<T, O> pass = {matrices, layout.workspaces, static_cast<Wide<T>*>(sigma), iterations, eps,
                                is_streaming(matrices, count, sizeof(O))};
    const int last = iterations > 0 ? iterations : 1;
    run_stages(
        count, last + 1, layout.progress, threads,
        [=](int64_t index) { return blocks_of(matrices[index].rows, matrices[index].columns, sizeof(T)); },
        [=](int64_t index, int stage, int64_t block) {
            if (stage < last) {
                pass.power_iteration(index, block);
            } else {
                pass.normalize(index, block);
            }
        },
        [=](int64_t index, int stage) {
            if (iterations == 0 && stage == 0) pass.keep_vectors(index);
            if (stage < iterations) pass.update_vectors(index, stage + 1 == iterations);
        });
}

template <typename T, typename O>
void backward(const SpectralNormBackwardMatrix* matrices, int64_t count, const void* sigma, void* workspace, int threads) {
    const Layout<T, SpectralNormBackwardMatrix> layout(matrices, count, static_cast<char*>(workspace), threads);
    const Backward<T, O> pass = {matrices, layout.workspaces, static_cast<const Wide<T>*>(sigma),
                                 is_streaming(matrices, count, sizeof(T))};
    run_stages(
        count, 2, layout.progress, threads,
        [=](int64_t index) { return blocks_of(matrices[index].rows, matrices[index].columns, sizeof(T)); },
        [=](int64_t index, int stage, int64_t block) {
            if (stage == 0) {
                pass.inner(index, block);
            } else {
                pass.subtract(index, block);
            }
        },
        [=](int64_t index, int stage) {
            if (stage == 0) pass.add_up(index);
        });
}

template <typename T>
int64_t workspace_bytes(const int64_t* rows, const int64_t* columns, int64_t count) {
    int64_t bytes = count * static_cast<int64_t>(sizeof(Progress) + sizeof(Workspace<Wide<T>>)) + 63;
    for (int64_t i = 0; i < count; ++i) {
        char* const none = nullptr;
        bytes += Workspace<Wide<T>>().place(none, rows[i], columns[i], blocks_of(rows[i], columns[i], sizeof(T))) - none;
    }
    return bytes;
}

// call(element type, type of the normalised weight), for the pairs that there are
template <typename Call>
int for_types(DType dtype, DType normalized_dtype, const Call& call) {
    if (dtype == DType::float32 && normalized_dtype == DType::float32) return call(float(), float());
    if (dtype == DType::float32 && normalized_dtype == DType::bfloat16) return call(float(), BFloat16());
    if (dtype == DType::float32 && normalized_dtype == DType::float16) return call(float(), Float16());
    if (dtype == DType::float64 && normalized_dtype == DType::float64) return call(double(), double());
    if (dtype == DType::bfloat16 && normalized_dtype == DType::bfloat16) return call(BFloat16(), BFloat16());
    if (dtype == DType::float16 && normalized_dtype == DType::float16) return call(Float16(), Float16());
    return unsupported_dtype;
}

}  // namespace

int64_t spectral_norm_workspace(const int64_t* rows, const int64_t* columns, int64_t count, DType dtype) {
    if (dtype == DType::float64) return workspace_bytes<double>(rows, columns, count);
    if (dtype == DType::float32) return workspace_bytes<float>(rows, columns, count);
    return workspace_bytes<BFloat16>(rows, columns, count);  // Float16 is as long
}

int spectral_norm_forward(const SpectralNormForwardMatrix* matrices, int64_t count, void* sigma, int iterations, double eps,
                          DType dtype, DType normalized_dtype, void* workspace, int threads) {
    return for_types(dtype, normalized_dtype, [=](auto t, auto o) {
        forward<decltype(t), decltype(o)>(matrices, count, sigma, iterations, eps, workspace, threads);
        return ok;
    });
}

int spectral_norm_backward(const SpectralNormBackwardMatrix* matrices, int64_t count, const void* sigma, DType dtype,
                           DType normalized_dtype, void* workspace, int threads) {
    return for_types(dtype, normalized_dtype, [=](auto t, auto o) {
        backward<decltype(t), decltype(o)>(matrices, count, sigma, workspace, threads);
        return ok;
    });
}

}  // namespace SABMN_ISA
}  // namespace sabmn
