// Self-attention on the CPU, forward (attention.h has the formulas).
//
// Everything is computed in tiles of 64 positions: a tile is [rows][64 lanes], its rows are channels (of x, query, …)
// or the other positions (of a block of the map), so that one product routine, A·tile, serves every step and all of
// softmax works on whole vectors. Rows are walked in chunks of 128.
//   1 per tile: query, key, value          2 per tile of queries: online softmax over the keys, out, y
// A job writes what is its own in an order that does not depend on the number of threads: results are deterministic.

#include <limits>

#include "attention/factors.h"
#include "attention/tiles.h"
#include "attention/workspace.h"
#include "common/product.h"
#include "common/subnormals.h"

namespace sabmn {
namespace SABMN_ISA {
namespace {

template <typename T>
struct Projection {
    const Factor<T>* weight;  // [rows, C]
    const void* bias;         // [rows] or null
    void* result;             // [B, rows, N]
    int64_t rows;
    Factor<T>* chunks;        // the same as the products read it (workspace.h), or null
    bool along_positions;     // these are the depth of the product that reads it, else the rows
};

// The sums of a tile's query, key and value get their biases and go where they belong.
template <typename T>
void keep_projections(const AttentionInputs& in, const Projection<T> (&parts)[3], int64_t image, int64_t first,
                      int64_t count, Wide<T>* from) {
    using F = Wide<T>;
    const int64_t N = in.sizes.positions();
    for (const auto& part : parts) {
        if (const T* const bias = static_cast<const T*>(part.bias))
            each_vector<F>(part.rows, count, [=](int64_t row, int64_t, int64_t at) {
                vector_at(from + at) += widen(bias[row]);
            });
        T* const result = static_cast<T*>(part.result) + image * part.rows * N + first;
        store_tile<T>(from, part.rows, N, count, result);
        if (part.chunks) {  // read back, rounded to T as the backward pass will find it
            const AttentionChunks cut(in.sizes);
            if (part.along_positions)
                load_rows<T>(result, part.rows, N, count, part.chunks + steps<T>(cut.at(image, part.rows, first)),
                             steps<T>(cut.positions));
            else
                load_tile<T>(result, part.rows, N, count, part.chunks + cut.at(image, steps<T>(part.rows), first),
                             cut.positions, count);
        }
        from += part.rows * lanes;
    }
}

// query, key and value of up to two tiles.
template <typename T>
void project(const AttentionInputs& in, const Projection<T> (&parts)[3], int64_t image, int64_t first,
             int64_t count, Arena<Wide<T>> arena) {
    using F = Wide<T>;
    const int64_t C = in.sizes.channels;
    constexpr int64_t depth = chunk * FactorOf<T>::terms;  // of a product
    Factor<T>* const tile = take_factors<T>(arena, chunk * lanes);
    const int64_t rows = parts[0].rows + parts[1].rows + parts[2].rows;
    F* const sums = arena.take(tiles_together * rows * lanes);
    const Windows<T> x(in.x, in.sizes.width, image, first, count);
    for (int64_t c = 0; c < C; c += depth) {
        const int64_t channels = smaller(depth, C - c);
        each_tile(first, count, [&](int64_t t, int64_t, int64_t positions) {
            load_factors(x[t], c, channels, tile);
            Fetch next = x.fetch_next(t, c, channels, C);
            F* to = sums + t * rows * lanes;
            for (const auto& part : parts) {
                const Left<Factor<T>> weight{part.weight + steps<T>(c), steps<T>(C), 1};
                product(part.rows, positions, steps<T>(channels), weight, tile, lanes, to, lanes, c > 0, next);
                to += part.rows * lanes;
            }
        });
    }
    each_tile(first, count, [&](int64_t t, int64_t begin, int64_t positions) {
        keep_projections<T>(in, parts, image, begin, positions, sums + t * rows * lanes);
    });
}

// The running softmax of a tile of queries.
template <typename F>
struct Softmax {
    F maximum[lanes], total[lanes];
};

// map[key][query]: the logits become the exponentials of their distance to the maximum so far, in place, as factors; out,
// if there is one already, is corrected for a maximum that has grown. What is summed are the powers as they are
// multiplied, rounded: out stays a mean of the values, and where a row is nearly one-hot, what sets it apart from one of
// them is as exact as the other powers.
template <typename T>
void online_softmax(int64_t keys, int64_t count, Wide<T>* map, Softmax<Wide<T>>& softmax, int64_t rows, Wide<T>* out,
                    bool first) {
    using F = Wide<T>;
    constexpr int group = 4;  // vectors at a time: one chain of maxima would wait for itself
    constexpr int64_t width = vector_lanes<F>;
    Factor<T>* const powers = reinterpret_cast<Factor<T>*>(map);
    for (int64_t lane = 0; lane < count; lane += group * width) {
        Vector<F> before[group], most[group], sum[group] = {};
        // The lowest start is finite: a row that begins with logits of −∞ is as good as any other.
        for (int i = 0; i < group; ++i)
            most[i] = before[i] = first ? Vector<F>{} + std::numeric_limits<F>::lowest() / 2
                                        : vector_at(softmax.maximum + lane + i * width);
        for (int64_t row = 0; row < keys; ++row)
            for (int i = 0; i < group; ++i) {
                const Vector<F> logit = vector_at(map + row * lanes + lane + i * width);
                most[i] = greater<F>(logit, most[i]);
            }
        const auto power = [&](int64_t row, int i) {
            return exponential<F, Powers<T>>(vector_at(map + row * lanes + lane + i * width) - most[i]);
        };
        for (int64_t row = 0; row < keys; row += FactorOf<T>::terms)
            for (int i = 0; i < group; ++i) {
                Vector<Factor<T>>& entry =
                    vector_at(powers + row / FactorOf<T>::terms * lanes + lane + i * width);
                if constexpr (in_pairs<T>) {
                    entry = pairs_of(power(row, i), row + 1 < keys ? power(row + 1, i) : Vector<F>{});
                    add_product(sum[i], Pair{{0x3f80}, {0x3f80}}, entry);  // 1, 1
                } else {
                    entry = power(row, i);
                    sum[i] += entry;
                }
            }
        for (int i = 0; i < group; ++i) {
            const int64_t at = lane + i * width;
            if (!first) {
                const Vector<F> correction = exponential<F>(before[i] - most[i]);
                sum[i] += vector_at(softmax.total + at) * correction;
                for (int64_t row = 0; row < rows; ++row) vector_at(out + row * lanes + at) *= correction;
            }
            vector_at(softmax.maximum + at) = most[i];
            vector_at(softmax.total + at) = sum[i];
        }
    }
}

template <typename T>
void store_out(const AttentionInputs& in, int64_t image, int64_t first, int64_t count, const Wide<T>* out) {
    const int64_t N = in.sizes.positions(), dv = in.sizes.value_width;
    T* const to = static_cast<T*>(in.out) + image * dv * N + first;
    store_tile<T>(out, dv, N, count, to);
    if constexpr (attention_out_parts<T> == 2) {
        T* const rest = to + in.sizes.batch * dv * N;
        for (int64_t row = 0; row < dv; ++row)
            for (int64_t lane = 0; lane < count; ++lane)
                narrow(out[row * lanes + lane] - widen(to[row * N + lane]), rest[row * N + lane]);
    }
}

// out and lse of a tile of queries; leaves gamma · out.
template <typename T>
void attend(const AttentionInputs& in, const Factor<T>* keys, const Factor<T>* values, int64_t image, int64_t first,
            int64_t count, Wide<T>* map, Factor<T>* query, Wide<T>* out) {
    using F = Wide<T>;
    const int64_t N = in.sizes.positions(), dk = in.sizes.key_width, dv = in.sizes.value_width;
    const AttentionChunks cut(in.sizes);
    const SubnormalsAreZero fast;
    Softmax<F> softmax;
    load_tile<T>(static_cast<const T*>(in.query) + image * dk * N + first, dk, N, count, query);
    for (int64_t i = 0; i < N; i += chunk) {
        const int64_t part = smaller(chunk, N - i);
        const Left<Factor<T>> key{keys + cut.at(image, steps<T>(dk), i), 1, cut.positions};
        const Left<Factor<T>> value{values + steps<T>(cut.at(image, dv, i)), steps<T>(cut.positions), 1};
        product(part, count, steps<T>(dk), key, query, lanes, map, lanes, false);
        online_softmax<T>(part, count, map, softmax, dv, out, i == 0);
        const Factor<T>* const powers = reinterpret_cast<const Factor<T>*>(map);
        product(dv, count, steps<T>(part), value, powers, lanes, out, lanes, i > 0);
    }
    each_vector<F>(dv, count, [&](int64_t, int64_t lane, int64_t at) {
        vector_at(out + at) /= vector_at(softmax.total + lane);
    });
    store_out<T>(in, image, first, count, out);
    F* const lse = static_cast<F*>(in.lse) + image * 2 * N + first;
    for (int64_t lane = 0; lane < count; ++lane) {
        lse[lane] = softmax.maximum[lane];
        lse[N + lane] = static_cast<F>(__builtin_log(softmax.total[lane]));
    }
    const F gamma = *static_cast<const F*>(in.gamma);
    each_vector<F>(dv, count, [=](int64_t, int64_t, int64_t at) { vector_at(out + at) *= gamma; });
}

// out, lse and y of up to two tiles of queries.
template <typename T>
void attend_and_project(const AttentionInputs& in, const Factor<T>* w_out, const Factor<T>* keys,
                        const Factor<T>* values, const Image& y, int64_t image, int64_t first, int64_t count,
                        Arena<Wide<T>> arena) {
    using F = Wide<T>;
    const int64_t C = in.sizes.channels, dk = in.sizes.key_width, dv = in.sizes.value_width;
    F* const map = arena.take(chunk * lanes);  // [keys of a chunk][queries], then y
    Factor<T>* const query = take_factors<T>(arena, dk * lanes);
    F* const outs = arena.take(tiles_together * dv * lanes);
    Factor<T>* const rounded = take_factors_of<T>(arena, outs, tiles_together * dv * lanes);
    const Factor<T>* factors[tiles_together];  // the outs as w_out's product reads them
    each_tile(first, count, [&](int64_t t, int64_t begin, int64_t positions) {
        F* const out = outs + t * dv * lanes;
        attend<T>(in, keys, values, image, begin, positions, map, query, out);
        if (w_out) factors[t] = tile_factors<T>(dv, positions, out, rounded + t * dv * lanes);
    });
    const F gamma = *static_cast<const F*>(in.gamma);
    const Windows<T> x(in.x, in.sizes.width, image, first, count), to(y, in.sizes.width, image, first, count);
    for (int64_t c = 0; c < C; c += chunk) {
        const int64_t channels = smaller(chunk, C - c);
        each_tile(first, count, [&](int64_t t, int64_t, int64_t positions) {
            F* const tile = map;
            x[t].load(c, channels, tile);
            const int64_t depth = steps<T>(dv);
            if (w_out)
                product(channels, positions, depth, Left<Factor<T>>{w_out + c * depth, depth, 1}, factors[t], lanes,
                        tile, lanes, true, to[t].fetch(c, channels));
            else
                each_vector<F>(channels, positions, [&, out = outs + t * dv * lanes](int64_t, int64_t, int64_t at) {
                    vector_at(tile + at) += vector_at(out + c * lanes + at);
                });
            if (const T* const bias = static_cast<const T*>(in.b_out))
                each_vector<F>(channels, positions, [=](int64_t row, int64_t, int64_t at) {
                    vector_at(tile + at) += gamma * widen(bias[c + row]);
                });
            to[t].store(c, channels, tile);
        });
    }
}

template <typename T>
Status forward(const AttentionInputs& in, const Image& y) {
    using F = Wide<T>;
    const AttentionSizes& sizes = in.sizes;
    const int64_t C = sizes.channels, dk = sizes.key_width, dv = sizes.value_width;
    const int64_t per_thread = attention_thread_workspace(sizes);
    F* const scratch = static_cast<F*>(in.workspace);
    Arena<F> shared{scratch + in.threads * per_thread};
    const AttentionChunks cut(sizes);
    Factor<T>* const keys = take_factors<T>(shared, cut.elements(sizes.batch, dk));
    Factor<T>* const values = take_factors<T>(shared, cut.elements(sizes.batch, dv));
    const Projection<T> parts[] = {
        {weight_factors<T>(in, in.w_query, dk, C, shared), in.b_query, in.query, dk, nullptr, false},
        {weight_factors<T>(in, in.w_key, dk, C, shared), in.b_key, in.key, dk, keys, false},
        {weight_factors<T>(in, in.w_value, dv, C, shared), in.b_value, in.value, dv, values, true}};
    const Factor<T>* const w_out = weight_factors<T>(in, in.w_out, C, dv, shared);
    const auto projection = [&](int64_t image, int64_t first, int64_t count, Arena<F> arena) {
        project<T>(in, parts, image, first, count, arena);
    };
    const auto attention = [&](int64_t image, int64_t first, int64_t count, Arena<F> arena) {
        attend_and_project<T>(in, w_out, keys, values, y, image, first, count, arena);
    };
    each_image(in, scratch, per_thread, tile_by_tile(in, projection), tile_by_tile(in, attention));
    return ok;
}

}  // namespace

#if defined(__AVX512BF16__)

Status attention_forward(const AttentionInputs& inputs, const Image& y) {
    return inputs.dtype == DType::bfloat16 ? forward<BFloat16>(inputs, y) : avx512::attention_forward(inputs, y);
}

#else

Status attention_forward(const AttentionInputs& inputs, const Image& y) {
    switch (inputs.dtype) {
        case DType::float32: return forward<float>(inputs, y);
        case DType::float64: return forward<double>(inputs, y);
        case DType::bfloat16: return forward<BFloat16>(inputs, y);
        case DType::float16: return forward<Float16>(inputs, y);
    }
    return unsupported_dtype;
}

namespace {

template <typename F, typename E = Exponential<F>>
Status exponentials(const void* x, void* result, int64_t count) {
    F from[64] = {}, to[64];
    for (int64_t i = 0; i < count; i += 64) {
        const int64_t part = smaller(64, count - i);
        __builtin_memcpy(from, static_cast<const F*>(x) + i, part * sizeof(F));
        for (int64_t at = 0; at < 64; at += vector_lanes<F>)
            vector_at(to + at) = exponential<F, E>(vector_at(from + at));
        __builtin_memcpy(static_cast<F*>(result) + i, to, part * sizeof(F));
    }
    return ok;
}

}  // namespace

Status attention_exponential(DType dtype, const void* x, void* result, int64_t count) {
    if (dtype == DType::float32) return exponentials<float>(x, result, count);
    if (dtype == DType::float64) return exponentials<double>(x, result, count);
    if (dtype == DType::bfloat16) return exponentials<float, RoughExponential>(x, result, count);
    return unsupported_dtype;
}

#endif

}  // namespace SABMN_ISA
}  // namespace sabmn
