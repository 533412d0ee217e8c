// Self-attention on the CPU, backward (attention.h has the formulas, attention_forward_cpu.cpp explains the tiles).
//
// With context = w_outᵀ grad_y, p̂ = p·total (the exponentials before division by their sum), f_j = gamma / total_j:
//   grad value_i = Σ_j p̂_ij f_j context_j,      grad key_i = Σ_j s_ij query_j,      grad query_j = Σ_i s_ij key_i,
//   s_ij = p̂_ij (value_i · f_j context_j − D_j),      D_j = f_j context_j · out_j.
//   1 per tile of queries: f·context, D, and what the tile adds to gamma's gradient
//   2 per part of an image's keys: the map's blocks again, [queries of a chunk][64 keys]; from them the gradients of
//     query, key and value; then the sum over the parts
//   3 per tile: the gradient of x; out, turned          4 per 64 channels: gradients of the weights; then of gamma and the biases
// The gradients of a position's query, key and value lie side by side, [B, N, columns], and so does its out: they are the
// right operands of the weights' gradients, whose left operand is the image as it stands.

#include "attention/exponential.h"
#include "attention/product.h"
#include "attention/tiles.h"
#include "attention/workspace.h"

namespace sabmn {
namespace SABMN_ISA {
namespace {

template <typename T>
struct Backward {
    using F = Wide<T>;
    const AttentionInputs& in;
    const AttentionGradients& g;
    const int64_t B, C, N, dk, dv;
    const AttentionParts parts;
    const int64_t columns, per_thread, of_context;
    int64_t at_key, at_value;  // columns of a position's row; its query gradient starts at 0
    F gamma;
    const AttentionChunks cut;
    F *scratch, *w_in, *w_out, *queries, *context, *row_term, *gamma_term, *gradients, *query_parts;

    Backward(const AttentionInputs& inputs, const AttentionGradients& wanted)
        : in(inputs), g(wanted), B(in.sizes.batch), C(in.sizes.channels), N(in.sizes.positions()),
          dk(in.sizes.key_width), dv(in.sizes.value_width), parts(attention_parts(in.sizes, in.threads)),
          columns(attention_gradient_columns(in.sizes)), per_thread(attention_thread_workspace(in.sizes)),
          of_context(attention_context_elements(in.sizes)), cut(in.sizes) {
        at_key = attention_padded(dk), at_value = 2 * at_key;
        gamma = *static_cast<const F*>(in.gamma);
        scratch = static_cast<F*>(in.workspace);
        Arena<F> shared{scratch + in.threads * per_thread};
        w_in = shared.take(C * (2 * dk + dv));  // [C, 2 dk + dv], the transpose of the three
        w_out = shared.take(C * dv);            // [dv, C], transposed
        queries = shared.take(cut.elements(B, dk));
        context = shared.take(B * of_context);  // f·context in chunks; then out, [N, padded dv]
        row_term = shared.take(B * N);
        gamma_term = shared.take(B * N);
        gradients = shared.take(B * N * columns);
        query_parts = shared.take(parts.parts > 1 ? parts.images * parts.parts * N * at_key : 0);
    }

    // to[column][row] = from[row][column], for rows < `rows` of a weight [rows, row_length].
    void transpose_weight(const void* weight, int64_t rows, int64_t row_length, F* to, int64_t to_row) {
        const T* const from = static_cast<const T*>(weight);
#pragma omp parallel for num_threads(in.threads)
        for (int64_t row = 0; row < rows; row += lanes) {
            F block[lanes * lanes];
            const int64_t count = smaller(lanes, rows - row);
            for (int64_t column = 0; column < row_length; column += lanes) {
                const int64_t part = smaller(lanes, row_length - column);
                load_tile<T>(from + row * row_length + column, count, row_length, part, block);
                const auto block_row = [&](int64_t i) { return block + i * lanes; };
                transpose<F>(count, part, block_row, to + column * to_row + row, to_row);
            }
        }
    }

    F* context_at(int64_t image, int64_t first) { return context + image * of_context + cut.at(0, dv, first); }

    // Phase 1, of up to two tiles: f·context, D, gamma's part, and the queries in chunks.
    void context_of_tiles(int64_t image, int64_t first, int64_t count, Arena<F> arena) {
        F* const tile = arena.take(chunk * lanes);
        F* const out = arena.take(dv * lanes);
        F* const sums = arena.take(tiles_together * dv * lanes);
        const Windows<T> grad_y(g.grad_y, in.sizes.width, image, first, count);
        F bias_terms[tiles_together * lanes] = {};
        for (int64_t c = 0; c < C; c += chunk) {
            const int64_t channels = smaller(chunk, C - c);
            each_tile(first, count, [&](int64_t t, int64_t, int64_t positions) {
                F* const sum = sums + t * dv * lanes;
                F* const to = in.w_out ? tile : sum + c * lanes;
                grad_y[t].load(c, channels, to);
                if (in.w_out)
                    product(dv, positions, channels, Left<F>{w_out + c, C, 1}, tile, lanes, sum, lanes, c > 0);
                if (const T* const bias = static_cast<const T*>(in.b_out))
                    each_vector<F>(channels, positions, [&](int64_t row, int64_t lane, int64_t at) {
                        vector_at(bias_terms + t * lanes + lane) += vector_at(to + at) * widen(bias[c + row]);
                    });
            });
        }
        each_tile(first, count, [&](int64_t t, int64_t begin, int64_t positions) {
            keep_context(image, begin, positions, sums + t * dv * lanes, bias_terms + t * lanes, out);
        });
    }

    void load_out(int64_t image, int64_t first, int64_t count, F* out) const {
        const T* const from = static_cast<const T*>(in.out) + image * dv * N + first;
        load_tile<T>(from, dv, N, count, out);
        if constexpr (attention_out_parts<T> == 2) {
            const T* const rest = from + B * dv * N;
            for (int64_t row = 0; row < dv; ++row)
                for (int64_t lane = 0; lane < count; ++lane) out[row * lanes + lane] += widen(rest[row * N + lane]);
        }
    }

    void keep_context(int64_t image, int64_t first, int64_t count, F* sums, const F* bias_terms, F* out) {
        F rows[lanes], factors[lanes] = {};
        load_out(image, first, count, out);
        row_dots(dv, count, sums, out, lanes, rows);
        const int64_t position = image * N + first;
        for (int64_t lane = 0; lane < count; ++lane) gamma_term[position + lane] = rows[lane] + bias_terms[lane];

        const F* const log_total = static_cast<const F*>(in.lse) + image * 2 * N + N + first;
        for (int64_t lane = 0; lane < count; ++lane)
            factors[lane] = gamma * static_cast<F>(__builtin_exp(-log_total[lane]));
        each_vector<F>(dv, count, [&](int64_t, int64_t lane, int64_t at) {
            vector_at(sums + at) *= vector_at(factors + lane);
        });
        row_dots(dv, count, sums, out, lanes, rows);
        store_tile<F>(rows, 1, 0, count, row_term + position);
        store_tile<F>(sums, dv, cut.positions, count, context_at(image, first));
        load_tile<T>(static_cast<const T*>(in.query) + image * dk * N + first, dk, N, count,
                     queries + cut.at(image, dk, first), cut.positions, count);
    }

    // Phase 2: the gradients of key and value of a part's keys, and what they add to those of the queries.
    void attention_of_part(int64_t image, int64_t part, F* query_sums, int64_t query_row, Arena<F> arena) {
        F* const map = arena.take(chunk * lanes);  // [queries of a chunk][keys of a tile]
        F* const map_gradient = arena.take(chunk * lanes);
        F* const key = arena.take(dk * lanes);
        F* const key_rows = arena.take(lanes * at_key);  // the same, [keys][dk]
        F* const value = arena.take(dv * lanes);
        F* const key_gradient = arena.take(dk * lanes);
        F* const value_gradient = arena.take(dv * lanes);
        const int64_t end = smaller(N, (part + 1) * parts.keys);
        const F* const maximum = static_cast<const F*>(in.lse) + image * 2 * N;
        const F* const term = row_term + image * N;
        for (int64_t first = part * parts.keys; first < end; first += lanes) {
            const int64_t count = smaller(lanes, N - first);
            load_tile<T>(static_cast<const T*>(in.key) + image * dk * N + first, dk, N, count, key);
            load_tile<T>(static_cast<const T*>(in.value) + image * dv * N + first, dv, N, count, value);
            transpose<F>(dk, count, [&](int64_t row) { return key + row * lanes; }, key_rows, at_key);
            for (int64_t j = 0; j < N; j += chunk) {
                const int64_t rows = smaller(chunk, N - j), step = cut.positions;
                const F* const query = queries + cut.at(image, dk, j);      // [dk][queries of the chunk]
                const F* const other = context_at(image, j);                // [dv][queries of the chunk]
                product(rows, count, dk, Left<F>{query, 1, step}, key, lanes, map, lanes, false);
                product(rows, count, dv, Left<F>{other, 1, step}, value, lanes, map_gradient, lanes, false);
                for (int64_t row = 0; row < rows; ++row) {
                    const F most = maximum[j + row], subtracted = term[j + row];
                    for (int64_t at = row * lanes; at < row * lanes + count; at += vector_lanes<F>) {
                        const Vector<F> power = exponential<F>(vector_at(map + at) - most);
                        vector_at(map + at) = power;
                        vector_at(map_gradient + at) = power * (vector_at(map_gradient + at) - subtracted);
                    }
                }
                product(dv, count, rows, Left<F>{other, step, 1}, map, lanes, value_gradient, lanes, j > 0);
                product(dk, count, rows, Left<F>{query, step, 1}, map_gradient, lanes, key_gradient, lanes, j > 0);
                product(rows, dk, count, Left<F>{map_gradient, lanes, 1}, key_rows, at_key, query_sums + j * query_row,
                        query_row, first > part * parts.keys);
            }
            F* const row = gradients + (image * N + first) * columns;
            transpose<F>(dk, count, [&](int64_t k) { return key_gradient + k * lanes; }, row + at_key, columns);
            transpose<F>(dv, count, [&](int64_t k) { return value_gradient + k * lanes; }, row + at_value, columns);
        }
    }

    // Phase 2 where an image has several parts.
    void attention_in_parts() {
        for (int64_t begin = 0; begin < B; begin += parts.images) {
            const int64_t images = smaller(parts.images, B - begin);
            each_job(in, scratch, per_thread, images * parts.parts, [&](int64_t job, Arena<F> arena) {
                const int64_t image = begin + job / parts.parts;
                attention_of_part(image, job % parts.parts, query_parts + job * N * at_key, at_key, arena);
            });
#pragma omp parallel for num_threads(in.threads)
            for (int64_t position = 0; position < images * N; ++position) {
                F* const to = gradients + (begin * N + position) * columns;
                const F* from = query_parts + (position / N * parts.parts * N + position % N) * at_key;
                for (int64_t part = 0; part < parts.parts; ++part, from += N * at_key)
                    for (int64_t k = 0; k < at_key; k += vector_lanes<F>)
                        vector_at(to + k) = part ? vector_at(to + k) + vector_at(from + k) : vector_at(from + k);
            }
        }
    }

    // Phase 3.
    void out_of_tile(int64_t image, int64_t first, int64_t count, Arena<F> arena) {
        F* const out = arena.take(dv * lanes);
        const int64_t row = attention_padded(dv);
        load_out(image, first, count, out);
        transpose<F>(dv, count, [&](int64_t e) { return out + e * lanes; },
                     context + image * of_context + first * row, row);
    }

    void image_gradient_of_tiles(int64_t image, int64_t first, int64_t count, Arena<F> arena) {
        const int64_t depth = 2 * dk + dv;
        F* const tile = arena.take(chunk * lanes);
        F* const sums = arena.take(tiles_together * depth * lanes);  // of query, key, value
        each_tile(first, count, [&](int64_t t, int64_t begin, int64_t positions) {
            const F* const rows = gradients + (image * N + begin) * columns;
            F* const sum = sums + t * depth * lanes;
            const auto turn = [&](int64_t from, int64_t width, F* to) {
                transpose<F>(positions, width, [=](int64_t lane) { return rows + lane * columns + from; }, to, lanes);
            };
            turn(0, dk, sum);
            turn(at_key, dk, sum + dk * lanes);
            turn(at_value, dv, sum + 2 * dk * lanes);
        });
        const Windows<T> grad_y(g.grad_y, in.sizes.width, image, first, count);
        const Windows<T> grad_x(g.grad_x, in.sizes.width, image, first, count);
        for (int64_t c = 0; c < C; c += chunk) {
            const int64_t channels = smaller(chunk, C - c);
            each_tile(first, count, [&](int64_t t, int64_t, int64_t positions) {
                const F* const sum = sums + t * depth * lanes;
                grad_y[t].load(c, channels, tile);
                product(channels, positions, depth, Left<F>{w_in + c * depth, depth, 1}, sum, lanes, tile, lanes, true);
                grad_x[t].store(c, channels, tile);
            });
        }
    }

    // Phase 4: sums[channel][column] = Σ over all positions of source[channel] · rows[column], for 64 channels; rows are
    // of a length `row`, those of an image begin image_step after those of the one before.
    void sum_over_positions(const Image& source, int64_t c, int64_t channels, const F* rows, int64_t row,
                            int64_t image_step, int64_t width, F* sums, F* tile) {
        bool add = false;
        for (int64_t image = 0; image < B; ++image)
            for (int64_t first = 0; first < N; first += chunk, add = true) {
                const int64_t count = smaller(chunk, N - first);
                const Window<T> window(source, in.sizes.width, image, first, count);
                Left<F> left{tile, chunk, 1};
                bool in_place = false;
                if constexpr (sizeof(T) == sizeof(F)) {
                    in_place = window.uniform;
                    const F* const start = window.base + c * window.channel_stride + window.offset[0];
                    if (in_place) left = {start, window.channel_stride, window.step()};
                }
                if (!in_place) window.load(c, channels, tile, chunk);
                const F* const right = rows + image * image_step + first * row;
                product(channels, width, count, left, right, row, sums, width, add);
            }
        if (!add) for (int64_t i = 0; i < channels * width; ++i) sums[i] = 0;  // no image, no sum
    }

    void weight_gradients() {
        const bool inputs = g.w_query || g.w_key || g.w_value, outputs = g.w_out;
        const int64_t groups = blocks_of(C, lanes);
        each_job(in, scratch, per_thread, (inputs + outputs) * groups, [&](int64_t job, Arena<F> arena) {
            const bool of_out = !inputs || job >= groups;
            const int64_t c = job % groups * lanes, channels = smaller(lanes, C - c);
            const int64_t width = of_out ? attention_padded(dv) : columns;
            F* const sums = arena.take(lanes * width);
            F* const tile = arena.take(lanes * chunk);
            if (!of_out) {
                sum_over_positions(in.x, c, channels, gradients, columns, N * columns, width, sums, tile);
            } else {
                sum_over_positions(g.grad_y, c, channels, context, width, of_context, width, sums, tile);
                for (int64_t channel = 0; channel < channels; ++channel)
                    for (int64_t e = 0; e < dv; ++e)
                        narrow(gamma * sums[channel * width + e], static_cast<T*>(g.w_out)[(c + channel) * dv + e]);
                return;
            }
            const struct { void* gradient; int64_t column, rows; } weights[] = {
                {g.w_query, 0, dk}, {g.w_key, at_key, dk}, {g.w_value, at_value, dv}};
            for (const auto& weight : weights)
                for (int64_t row = 0; weight.gradient && row < weight.rows; ++row) {
                    T* const to = static_cast<T*>(weight.gradient) + row * C + c;
                    for (int64_t channel = 0; channel < channels; ++channel)
                        narrow(sums[channel * width + weight.column + row], to[channel]);
                }
        });
    }

    // Sums over all positions, in double: of columns of the gradients.
    void bias_gradient(void* gradient, int64_t column, int64_t width) {
        if (!gradient) return;
#pragma omp parallel for num_threads(in.threads)
        for (int64_t k = 0; k < width; ++k) {
            double sum = 0;
            for (int64_t position = 0; position < B * N; ++position) sum += gradients[position * columns + column + k];
            narrow(static_cast<F>(sum), static_cast<T*>(gradient)[k]);
        }
    }

    void run() {
        const int64_t depth = 2 * dk + dv;
        const bool of_map = g.grad_x.data || g.w_query || g.w_key || g.w_value || g.b_query || g.b_value;
        if (in.w_out) transpose_weight(in.w_out, C, dv, w_out, C);
        if (g.grad_x.data) {
            transpose_weight(in.w_query, dk, C, w_in, depth);
            transpose_weight(in.w_key, dk, C, w_in + dk, depth);
            transpose_weight(in.w_value, dv, C, w_in + 2 * dk, depth);
        }
        const auto contexts = tile_by_tile(in, [&](int64_t image, int64_t first, int64_t count, Arena<F> arena) {
            context_of_tiles(image, first, count, arena);
        });
        const auto attention = [&](int64_t image, int64_t, Arena<F> arena) {
            attention_of_part(image, 0, gradients + image * N * columns, columns, arena);
        };
        const auto image_gradients = tile_by_tile(in, [&](int64_t image, int64_t first, int64_t count, Arena<F> arena) {
            if (g.w_out)
                each_tile(first, count, [&](int64_t, int64_t begin, int64_t positions) {
                    out_of_tile(image, begin, positions, arena);
                });
            if (g.grad_x.data) image_gradient_of_tiles(image, first, count, arena);
        });
        if (parts.parts == 1) {
            each_image(in, scratch, per_thread, contexts, Phase<decltype(attention)>{of_map, attention}, image_gradients);
        } else {
            each_image(in, scratch, per_thread, contexts);
            if (of_map) attention_in_parts();
            each_image(in, scratch, per_thread, image_gradients);
        }
        if (g.w_query || g.w_key || g.w_value || g.w_out) weight_gradients();
        bias_gradient(g.b_query, 0, dk);
        bias_gradient(g.b_value, at_value, dv);
        if (g.gamma) {
            double sum = 0;
            for (int64_t at = 0; at < B * N; ++at) sum += gamma_term[at];
            *static_cast<F*>(g.gamma) = static_cast<F>(sum);
        }
    }
};

}  // namespace

Status attention_backward(const AttentionInputs& inputs, const AttentionGradients& gradients) {
    switch (inputs.dtype) {
        case DType::float32: Backward<float>(inputs, gradients).run(); return ok;
        case DType::float64: Backward<double>(inputs, gradients).run(); return ok;
        case DType::bfloat16: Backward<BFloat16>(inputs, gradients).run(); return ok;
        case DType::float16: Backward<Float16>(inputs, gradients).run(); return ok;
    }
    return unsupported_dtype;
}

}  // namespace SABMN_ISA
}  // namespace sabmn
