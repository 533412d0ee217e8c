// Self-attention on the CPU, forward and backward (attention.h has the formulas).
//
// Everything is computed in tiles of 64 positions: a tile is [rows][64 lanes], its rows are channels (of x, query, out, …) or
// the other positions (of a block of the map), so that one product routine, A·tile, serves every step and all of softmax
// works on whole vectors. A position that does not exist is a lane of zeros. Rows are walked in chunks of 128.
//   forward   1 per tile: query, key, value          2 per tile of queries: online softmax over the keys, out, y
//   backward  1 per tile of queries: context, row term, gradient of query
//             2 per tile of keys: gradients of key and value, then of x; the map's block is computed again
//             3 per 64 channels: gradients of the weights; then of gamma
// A job writes what is its own in an order that does not depend on the number of threads: results are deterministic.

#include "attention/attention.h"

#include <omp.h>

namespace sabmn {
namespace SABMN_ISA {
namespace {

constexpr int64_t lanes = attention_lanes, chunk = attention_chunk;

// A block of the product is block_rows × 2 vectors of sums in registers: 16 of 32 with AVX-512, 8 of 16 otherwise.
#if defined(__AVX512F__)
constexpr int vector_bytes = 64, block_rows = 8;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32, block_rows = 4;
#else
constexpr int vector_bytes = 16, block_rows = 4;
#endif

template <typename T>
struct Simd;
template <>
struct Simd<float> {
    typedef float Vector __attribute__((vector_size(vector_bytes), aligned(4)));
    typedef int32_t Bits __attribute__((vector_size(vector_bytes), aligned(4)));
    static constexpr float rounder = 12582912.0f, lowest = -87.0f;  // 1.5 · 2^23; below `lowest` exp is 0
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    static constexpr int terms = 7, bias = 127, mantissa = 23;
};
template <>
struct Simd<double> {
    typedef double Vector __attribute__((vector_size(vector_bytes), aligned(8)));
    typedef int64_t Bits __attribute__((vector_size(vector_bytes), aligned(8)));
    static constexpr double rounder = 6755399441055744.0, lowest = -708.0;  // 1.5 · 2^52
    static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
    static constexpr int terms = 13, bias = 1023, mantissa = 52;
};

template <typename T>
using Vector = typename Simd<T>::Vector;
template <typename T>
constexpr int vector_lanes = vector_bytes / static_cast<int>(sizeof(T));

template <typename T>
inline Vector<T>& vector_at(T* address) {
    return *reinterpret_cast<Vector<T>*>(address);
}
template <typename T>
inline Vector<T> vector_at(const T* address) {
    return *reinterpret_cast<const Vector<T>*>(address);
}

constexpr double inverse_factorial[] = {
    1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800,
    1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};

// exp(x) for x ≤ 88 (708 in double): x = n·ln2 + r, |r| ≤ ln2/2, Taylor's series of e^r (its error is under 1e-8, in double 1e-17)
// times 2^n through the exponent's bits. 0 below `lowest`; NaN stays NaN.
template <typename T>
inline Vector<T> exponential(Vector<T> x) {
    using S = Simd<T>;
    using Bits = typename S::Bits;
    const Vector<T> shifted = x * static_cast<T>(1.4426950408889634) + S::rounder;
    const Vector<T> n = shifted - S::rounder;
    const Vector<T> r = x - n * S::ln2_high - n * S::ln2_low;
    Vector<T> sum = r * static_cast<T>(inverse_factorial[S::terms]) + static_cast<T>(inverse_factorial[S::terms - 1]);
#pragma GCC unroll 16
    for (int k = S::terms - 2; k >= 0; --k) sum = sum * r + static_cast<T>(inverse_factorial[k]);
    const Bits exponent = ((Bits)shifted - (Bits)(x * 0 + S::rounder) + S::bias) << S::mantissa;
    return (Vector<T>)((Bits)(sum * (Vector<T>)exponent) & ~(x < S::lowest));
}

// ---- the product ----

// c[rows][2 vectors] (+)= a[rows][depth] · b[depth][2 vectors]; summed from 0, so that a large c costs one rounding only.
template <int rows, typename T>
inline void product_block(int64_t depth, const T* a, int64_t a_row, int64_t a_step, const T* b, T* c, bool add) {
    constexpr int width = vector_lanes<T>;
    Vector<T> sums[rows][2] = {};
    for (int64_t k = 0; k < depth; ++k, a += a_step, b += lanes) {
        const Vector<T> left = vector_at(b), right = vector_at(b + width);
#pragma GCC unroll 8
        for (int row = 0; row < rows; ++row) {
            const T factor = a[row * a_row];
            sums[row][0] += factor * left;
            sums[row][1] += factor * right;
        }
    }
    for (int row = 0; row < rows; ++row, c += lanes) {
        vector_at(c) = add ? vector_at(c) + sums[row][0] : sums[row][0];
        vector_at(c + width) = add ? vector_at(c + width) + sums[row][1] : sums[row][1];
    }
}

// c[rows][lanes] (+)= a · b[depth][lanes], where a(row, k) = a[row·a_row + k·a_step]. b and c are tiles.
template <typename T>
void product(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_step, const T* b, T* c, bool add) {
    for (int64_t k = 0; k < depth; k += chunk, add = true) {
        const int64_t part = depth - k < chunk ? depth - k : chunk;
        for (int64_t lane = 0; lane < lanes; lane += 2 * vector_lanes<T>) {
            const T* from = a + k * a_step;
            const T* tile = b + k * lanes + lane;
            int64_t row = 0;
            for (; row + block_rows <= rows; row += block_rows)
                product_block<block_rows>(part, from + row * a_row, a_row, a_step, tile, c + row * lanes + lane, add);
            for (; row < rows; ++row)
                product_block<1>(part, from + row * a_row, a_row, a_step, tile, c + row * lanes + lane, add);
        }
    }
}

// sums[lane] = Σ over rows of a·b, added up exactly as product() does it: where a row of the map is one-hot, its gradient
// of the map less this sum is then 0, not rounding noise times a large logit's gradient.
template <typename T>
void row_terms(int64_t rows, const T* a, const T* b, T* sums) {
    for (int64_t lane = 0; lane < lanes; lane += vector_lanes<T>) {
        Vector<T> total = {};
        for (int64_t row = 0; row < rows; row += chunk) {
            Vector<T> sum = {};
            for (int64_t k = row; k < rows && k < row + chunk; ++k)
                sum += vector_at(a + k * lanes + lane) * vector_at(b + k * lanes + lane);
            total = row ? total + sum : sum;
        }
        vector_at(sums + lane) = total;
    }
}

// ---- tiles ----

// Calls f(vector of lanes' address offset) for each row of a tile.
template <typename T, typename F>
inline void each_vector(int64_t rows, F f) {
    for (int64_t at = 0; at < rows * lanes; at += vector_lanes<T>) f(at);
}

// tile[row][lane] = matrix[row][first + lane] of a matrix [rows, N], and back.
template <typename T>
void load_tile(const void* matrix, int64_t rows, int64_t row_length, int64_t offset, int64_t count, T* tile) {
    const T* from = static_cast<const T*>(matrix) + offset;
    for (int64_t row = 0; row < rows; ++row, from += row_length, tile += lanes) {
        for (int64_t lane = 0; lane < count; ++lane) tile[lane] = from[lane];
        for (int64_t lane = count; lane < lanes; ++lane) tile[lane] = 0;
    }
}
template <typename T>
void store_tile(void* matrix, int64_t rows, int64_t row_length, int64_t offset, int64_t count, const T* tile) {
    T* to = static_cast<T*>(matrix) + offset;
    for (int64_t row = 0; row < rows; ++row, to += row_length, tile += lanes)
        for (int64_t lane = 0; lane < count; ++lane) to[lane] = tile[lane];
}

// Up to `chunk` consecutive positions of one image.
template <typename T>
struct Window {
    T* base;
    int64_t channel_stride, count, offset[chunk];
    bool contiguous = true;

    Window(const Image& image, int64_t width, int64_t batch, int64_t first, int64_t positions)
        : base(static_cast<T*>(image.data) + batch * image.batch_stride), channel_stride(image.channel_stride), count(positions) {
        for (int64_t lane = 0; lane < count; ++lane) {
            const int64_t row = (first + lane) / width, column = (first + lane) % width;
            offset[lane] = row * image.height_stride + column * image.width_stride;
            contiguous = contiguous && offset[lane] == offset[0] + lane;
        }
    }

    // Calls f(channel, lane, element) for `channels` channels, in the order in which they lie in memory.
    template <typename F>
    void each(int64_t first_channel, int64_t channels, F f) const {
        T* from = base + first_channel * channel_stride;
        if (channel_stride == 1) {
            for (int64_t lane = 0; lane < count; ++lane)
                for (int64_t channel = 0; channel < channels; ++channel) f(channel, lane, from[offset[lane] + channel]);
        } else {
            for (int64_t channel = 0; channel < channels; ++channel, from += channel_stride) {
                if (contiguous)
                    for (int64_t lane = 0; lane < count; ++lane) f(channel, lane, from[offset[0] + lane]);
                else
                    for (int64_t lane = 0; lane < count; ++lane) f(channel, lane, from[offset[lane]]);
            }
        }
    }
    void load(int64_t first_channel, int64_t channels, T* tile) const {
        if (count < lanes) each_vector<T>(channels, [&](int64_t at) { vector_at(tile + at) = Vector<T>{}; });
        each(first_channel, channels, [=](int64_t channel, int64_t lane, T& x) { tile[channel * lanes + lane] = x; });
    }
    void load_transposed(int64_t first_channel, int64_t channels, T* tile) const {
        if (channels < lanes) each_vector<T>(count, [&](int64_t at) { vector_at(tile + at) = Vector<T>{}; });
        each(first_channel, channels, [=](int64_t channel, int64_t lane, T& x) { tile[lane * lanes + channel] = x; });
    }
    void store(int64_t first_channel, int64_t channels, const T* tile) const {
        each(first_channel, channels, [=](int64_t channel, int64_t lane, T& x) { x = tile[channel * lanes + lane]; });
    }
};

// ---- jobs ----

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T>
T* scratch_of_thread(const AttentionInputs& in) {
    return static_cast<T*>(in.scratch) + omp_get_thread_num() * attention_scratch(in.key_width, in.value_width);
}

// Calls f(image, first position, positions, scratch) for every tile of positions, over the threads.
template <typename T, typename F>
void each_tile(const AttentionInputs& in, F f) {
    const int64_t positions = in.height * in.width, tiles = (positions + lanes - 1) / lanes;
#pragma omp parallel for num_threads(in.threads) schedule(dynamic)
    for (int64_t job = 0; job < in.batch * tiles; ++job) {
        const int64_t first = job % tiles * lanes;
        f(job / tiles, first, smaller(lanes, positions - first), scratch_of_thread<T>(in));
    }
}

template <typename T>
void forward(const AttentionInputs& in, const Image& y) {
    const int64_t N = in.height * in.width, C = in.channels, dk = in.key_width, dv = in.value_width;
    const T gamma = *static_cast<const T*>(in.gamma);

    each_tile<T>(in, [&](int64_t image, int64_t first, int64_t count, T* scratch) {
        T* const tile = scratch;
        T* sums = scratch + chunk * lanes;
        const Window<T> x(in.x, in.width, image, first, count);
        const struct { const void *weight, *bias; void* result; int64_t rows; } parts[] = {
            {in.w_query, in.b_query, in.query, dk}, {in.w_key, in.b_key, in.key, dk}, {in.w_value, in.b_value, in.value, dv}};
        for (int64_t c = 0; c < C; c += chunk) {
            const int64_t channels = smaller(chunk, C - c);
            x.load(c, channels, tile);
            T* to = sums;
            for (const auto& part : parts) {
                product(part.rows, channels, static_cast<const T*>(part.weight) + c, C, 1, tile, to, c > 0);
                to += part.rows * lanes;
            }
        }
        for (const auto& part : parts) {
            if (const T* bias = static_cast<const T*>(part.bias))
                each_vector<T>(part.rows, [=](int64_t at) { vector_at(sums + at) += bias[at / lanes]; });
            store_tile(part.result, part.rows, N, image * part.rows * N + first, count, sums);
            sums += part.rows * lanes;
        }
    });

    each_tile<T>(in, [&](int64_t image, int64_t first, int64_t count, T* scratch) {
        T* const map = scratch;  // [keys of a chunk][queries]
        T* const query = map + chunk * lanes;
        T* const out = query + dk * lanes;
        const T* key = static_cast<const T*>(in.key) + image * dk * N;
        const T* value = static_cast<const T*>(in.value) + image * dv * N;
        T maximum[lanes], total[lanes];
        load_tile(in.query, dk, N, image * dk * N + first, count, query);
        for (int64_t i = 0; i < N; i += chunk) {
            const int64_t keys = smaller(chunk, N - i);
            product(keys, dk, key + i, 1, N, query, map, false);
            for (int64_t lane = 0; lane < lanes; lane += vector_lanes<T>) {
                const Vector<T> before = i ? vector_at(maximum + lane) : Vector<T>{} - static_cast<T>(__builtin_inf());
                Vector<T> most = before, sum = {};
                for (int64_t row = 0; row < keys; ++row) {
                    const Vector<T> logit = vector_at(map + row * lanes + lane);
                    most = logit > most ? logit : most;
                }
                for (int64_t row = 0; row < keys; ++row) {
                    Vector<T>& entry = vector_at(map + row * lanes + lane);
                    entry = exponential<T>(entry - most);
                    sum += entry;
                }
                vector_at(maximum + lane) = most;
                if (i) {
                    const Vector<T> correction = exponential<T>(before - most);
                    sum += vector_at(total + lane) * correction;
                    for (int64_t row = 0; row < dv; ++row) vector_at(out + row * lanes + lane) *= correction;
                }
                vector_at(total + lane) = sum;
            }
            product(dv, keys, value + i, N, 1, map, out, i > 0);
        }
        each_vector<T>(dv, [&](int64_t at) { vector_at(out + at) /= vector_at(total + at % lanes); });
        store_tile(in.out, dv, N, image * dv * N + first, count, out);
        T* const lse = static_cast<T*>(in.lse) + image * 2 * N + first;
        for (int64_t lane = 0; lane < count; ++lane) {
            lse[lane] = maximum[lane];
            lse[N + lane] = static_cast<T>(__builtin_log(total[lane]));
        }

        const Window<T> x(in.x, in.width, image, first, count), to(y, in.width, image, first, count);
        T* const tile = map;
        each_vector<T>(dv, [=](int64_t at) { vector_at(out + at) *= gamma; });
        for (int64_t c = 0; c < C; c += chunk) {
            const int64_t channels = smaller(chunk, C - c);
            x.load(c, channels, tile);
            if (in.w_out)
                product(channels, dv, static_cast<const T*>(in.w_out) + c * dv, dv, 1, out, tile, true);
            else
                each_vector<T>(channels, [=](int64_t at) { vector_at(tile + at) += vector_at(out + c * lanes + at); });
            if (const T* bias = static_cast<const T*>(in.b_out))
                each_vector<T>(channels, [=](int64_t at) { vector_at(tile + at) += gamma * bias[c + at / lanes]; });
            to.store(c, channels, tile);
        }
    });
}

// One of the weights' gradients: gradient(row, c) = scale · Σ over images and positions of matrix[row] · source[c].
template <typename T>
struct WeightGradient {
    const void* matrix;  // [B, rows, N]
    int64_t rows;
    void* gradient;  // null: not wanted
    int64_t row_stride, channel_stride;
    T scale;
};

template <typename T, int parts>
void weight_gradients(const AttentionInputs& in, const Image& source, const WeightGradient<T> (&wanted)[parts]) {
    const int64_t N = in.height * in.width, C = in.channels;
#pragma omp parallel for num_threads(in.threads) schedule(dynamic)
    for (int64_t c = 0; c < C; c += lanes) {
        T* const tile = scratch_of_thread<T>(in);  // [positions][channels]
        T* const sums = tile + chunk * lanes;
        const int64_t channels = smaller(lanes, C - c);
        bool add = false;
        for (int64_t image = 0; image < in.batch; ++image)
            for (int64_t first = 0; first < N; first += chunk, add = true) {
                const int64_t count = smaller(chunk, N - first);
                Window<T>(source, in.width, image, first, count).load_transposed(c, channels, tile);
                T* to = sums;
                for (const auto& part : wanted) {
                    if (!part.gradient) continue;
                    const T* from = static_cast<const T*>(part.matrix) + image * part.rows * N + first;
                    product(part.rows, count, from, N, 1, tile, to, add);
                    to += part.rows * lanes;
                }
            }
        const T* from = sums;
        for (const auto& part : wanted) {
            if (!part.gradient) continue;
            T* to = static_cast<T*>(part.gradient) + c * part.channel_stride;
            for (int64_t row = 0; row < part.rows; ++row, from += lanes)
                for (int64_t channel = 0; channel < channels; ++channel)  // no image, no sum: 0
                    to[row * part.row_stride + channel * part.channel_stride] = add ? from[channel] * part.scale : T(0);
        }
    }
}

template <typename T>
void backward(const AttentionInputs& in, const AttentionGradients& g) {
    const int64_t N = in.height * in.width, C = in.channels, dk = in.key_width, dv = in.value_width;
    const T gamma = *static_cast<const T*>(in.gamma);
    T* const row_term = static_cast<T*>(g.row_term);        // Σ_e context·out, the softmax's row term over gamma
    T* const gamma_term = row_term + in.batch * N;          // what each position adds to the gradient of gamma

    each_tile<T>(in, [&](int64_t image, int64_t first, int64_t count, T* scratch) {
        T* const map = scratch;
        T* const map_gradient = map + chunk * lanes;
        T* const context = map_gradient + chunk * lanes;
        T* const query = context + dv * lanes;
        T* const query_gradient = query + dk * lanes;
        T* const out = query_gradient + dk * lanes;
        const Window<T> grad_y(g.grad_y, in.width, image, first, count);
        T rows[lanes], bias_terms[lanes] = {}, lse[2 * lanes];
        for (int64_t c = 0; c < C; c += chunk) {
            const int64_t channels = smaller(chunk, C - c);
            T* const tile = in.w_out ? map : context + c * lanes;
            grad_y.load(c, channels, tile);
            if (in.w_out) product(dv, channels, static_cast<const T*>(in.w_out) + c * dv, 1, dv, tile, context, c > 0);
            if (const T* bias = static_cast<const T*>(in.b_out))
                each_vector<T>(channels, [&](int64_t at) {
                    vector_at(bias_terms + at % lanes) += vector_at(tile + at) * bias[c + at / lanes];
                });
        }
        store_tile(g.context, dv, N, image * dv * N + first, count, context);
        load_tile(in.out, dv, N, image * dv * N + first, count, out);
        row_terms(dv, context, out, rows);
        for (int64_t lane = 0; lane < count; ++lane) {
            row_term[image * N + first + lane] = rows[lane];
            gamma_term[image * N + first + lane] = rows[lane] + bias_terms[lane];
        }
        if (!g.query) return;

        const T* key = static_cast<const T*>(in.key) + image * dk * N;
        const T* value = static_cast<const T*>(in.value) + image * dv * N;
        load_tile(in.query, dk, N, image * dk * N + first, count, query);
        load_tile(in.lse, 2, N, image * 2 * N + first, count, lse);
        for (int64_t i = 0; i < N; i += chunk) {
            const int64_t keys = smaller(chunk, N - i);
            product(keys, dk, key + i, 1, N, query, map, false);
            product(keys, dv, value + i, 1, N, context, map_gradient, false);
            each_vector<T>(keys, [&](int64_t at) {
                const T* const parts = lse + at % lanes;
                const Vector<T> p = exponential<T>(vector_at(map + at) - vector_at(parts) - vector_at(parts + lanes));
                vector_at(map + at) = p * gamma * (vector_at(map_gradient + at) - vector_at(rows + at % lanes));
            });
            product(dk, keys, key + i, N, 1, map, query_gradient, i > 0);
        }
        store_tile(g.query, dk, N, image * dk * N + first, count, query_gradient);
    });

    if (g.key) each_tile<T>(in, [&](int64_t image, int64_t first, int64_t count, T* scratch) {
        T* const map = scratch;  // [queries of a chunk][keys]: the transpose of above
        T* const map_gradient = map + chunk * lanes;
        T* const key = map_gradient + chunk * lanes;
        T* const value = key + dk * lanes;
        T* const key_gradient = value + dv * lanes;
        T* const value_gradient = key_gradient + dk * lanes;
        const T* query = static_cast<const T*>(in.query) + image * dk * N;
        const T* context = static_cast<const T*>(g.context) + image * dv * N;
        const T* lse = static_cast<const T*>(in.lse) + image * 2 * N;
        load_tile(in.key, dk, N, image * dk * N + first, count, key);
        load_tile(in.value, dv, N, image * dv * N + first, count, value);
        for (int64_t j = 0; j < N; j += chunk) {
            const int64_t queries = smaller(chunk, N - j);
            product(queries, dk, query + j, 1, N, key, map, false);
            product(queries, dv, context + j, 1, N, value, map_gradient, false);
            each_vector<T>(queries, [&](int64_t at) {
                const int64_t row = j + at / lanes;
                const Vector<T> p = exponential<T>(vector_at(map + at) - lse[row] - lse[N + row]) * gamma;
                vector_at(map + at) = p;
                vector_at(map_gradient + at) = p * (vector_at(map_gradient + at) - row_term[image * N + row]);
            });
            product(dv, queries, context + j, N, 1, map, value_gradient, j > 0);
            product(dk, queries, query + j, N, 1, map_gradient, key_gradient, j > 0);
        }
        store_tile(g.key, dk, N, image * dk * N + first, count, key_gradient);
        store_tile(g.value, dv, N, image * dv * N + first, count, value_gradient);
        if (!g.grad_x.data) return;

        T* const query_gradient = key;
        load_tile(g.query, dk, N, image * dk * N + first, count, query_gradient);
        const Window<T> grad_y(g.grad_y, in.width, image, first, count), grad_x(g.grad_x, in.width, image, first, count);
        for (int64_t c = 0; c < C; c += chunk) {
            const int64_t channels = smaller(chunk, C - c);
            grad_y.load(c, channels, map);
            product(channels, dk, static_cast<const T*>(in.w_query) + c, 1, C, query_gradient, map, true);
            product(channels, dk, static_cast<const T*>(in.w_key) + c, 1, C, key_gradient, map, true);
            product(channels, dv, static_cast<const T*>(in.w_value) + c, 1, C, value_gradient, map, true);
            grad_x.store(c, channels, map);
        }
    });

    if (g.w_query || g.w_key || g.w_value)
        weight_gradients<T>(in, in.x, {{g.query, dk, g.w_query, C, 1, 1}, {g.key, dk, g.w_key, C, 1, 1}, {g.value, dv, g.w_value, C, 1, 1}});
    if (g.w_out) weight_gradients<T>(in, g.grad_y, {{in.out, dv, g.w_out, 1, dv, gamma}});
    if (g.gamma) {
        double sum = 0;
        for (int64_t at = 0; at < in.batch * N; ++at) sum += gamma_term[at];
        *static_cast<T*>(g.gamma) = static_cast<T>(sum);
    }
}

}  // namespace

Status attention_forward(const AttentionInputs& inputs, const Image& y) {
    if (inputs.dtype == DType::float32) forward<float>(inputs, y);
    else if (inputs.dtype == DType::float64) forward<double>(inputs, y);
    else return unsupported_dtype;
    return ok;
}

Status attention_backward(const AttentionInputs& inputs, const AttentionGradients& gradients) {
    if (inputs.dtype == DType::float32) backward<float>(inputs, gradients);
    else if (inputs.dtype == DType::float64) backward<double>(inputs, gradients);
    else return unsupported_dtype;
    return ok;
}

}  // namespace SABMN_ISA
}  // namespace sabmn
