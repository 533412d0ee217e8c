// Self-attention on the CPU, backward (attention.h has the formulas, attention_forward_cpu.cpp explains the tiles).
//
// With context = w_outᵀ grad_y, p̂ = p·total (the exponentials before division by their sum), f_j = gamma / total_j:
//   grad value_i = Σ_j p̂_ij f_j context_j,      grad key_i = Σ_j s_ij query_j,      grad query_j = Σ_i s_ij key_i,
//   s_ij = p̂_ij (value_i · f_j context_j − D_j),      D_j = f_j context_j · out_j.
// Where bfloat16 is multiplied in pairs, f·context, p̂, s and the gradients of query, key and value are rounded for it; D
// has f·context rounded, and p̂ in s is not.
//   1 per tile of queries: f·context, D, and what the tile adds to gamma's gradient
//   2 per part of an image's keys: the map's blocks again, [queries of a chunk][64 keys]; from them the gradients of
//     query, key and value; then the sum over the parts
//   3 per tile: the gradient of x; out, turned          4 per 64 channels: gradients of the weights; then of gamma and the biases
// The gradients of a position's query, key and value lie side by side, [B, N, columns], and so does its out: they are the
// right operands of the weights' gradients, whose left operand is the image as it stands.

#include "attention/factors.h"
#include "attention/tiles.h"
#include "attention/workspace.h"
#include "common/product.h"
#include "common/subnormals.h"

namespace sabmn {
namespace SABMN_ISA {
namespace {

template <typename T>
struct Backward {
    using F = Wide<T>;
    using P = Factor<T>;
    static constexpr int64_t terms = FactorOf<T>::terms;
    const AttentionInputs& in;
    const AttentionGradients& g;
    const int64_t B, C, N, dk, dv;
    const AttentionParts parts;
    const int64_t columns, per_thread, of_context;
    int64_t at_key, at_value;  // columns of a position's row; its query gradient starts at 0
    F gamma;
    const AttentionChunks cut;
    F *scratch, *row_term, *gamma_term, *gradients, *query_parts;
    P *w_in, *w_out, *queries, *context;

    Backward(const AttentionInputs& inputs, const AttentionGradients& wanted)
        : in(inputs), g(wanted), B(in.sizes.batch), C(in.sizes.channels), N(in.sizes.positions()),
          dk(in.sizes.key_width), dv(in.sizes.value_width), parts(attention_parts(in.sizes, in.threads)),
          columns(attention_gradient_columns(in.sizes)), per_thread(attention_thread_workspace(in.sizes)),
          of_context(attention_context_elements(in.sizes)), cut(in.sizes) {
        at_key = attention_padded(dk), at_value = 2 * at_key;
        gamma = *static_cast<const F*>(in.gamma);
        scratch = static_cast<F*>(in.workspace);
        Arena<F> shared{scratch + in.threads * per_thread};
        w_in = take_factors<T>(shared, C * (2 * dk + dv));  // [C, 2 dk + dv], the transpose of the three
        w_out = take_factors<T>(shared, C * dv);            // [dv, C], transposed
        queries = take_factors<T>(shared, cut.elements(B, dk));
        context = take_factors<T>(shared, B * of_context);  // f·context in chunks; then out, [N, padded dv]
        row_term = shared.take(B * N);
        gamma_term = shared.take(B * N);
        gradients = shared.take(B * N * columns);
        query_parts = shared.take(parts.parts > 1 ? parts.images * parts.parts * N * at_key : 0);
    }

    // Weights [rows, row_length], one under the other and transposed: a left operand with their rows as the depth.
    struct Weight {
        const void* data;
        int64_t rows;
    };
    template <int count>
    void transpose_weights(const Weight (&weights)[count], int64_t row_length, P* factors) {
        int64_t depth = 0;
        for (const Weight& weight : weights) depth += weight.rows;
        Term<T>* to = reinterpret_cast<Term<T>*>(factors);
        const int64_t to_row = terms * steps<T>(depth);
        if (to_row > depth)
            for (int64_t column = 0; column < row_length; ++column) to[column * to_row + depth] = {};
        for (const Weight& weight : weights) {
            transpose_weight(weight.data, weight.rows, row_length, to, to_row);
            to += weight.rows;
        }
    }

    // to[column][row] = from[row][column], for rows < `rows` of a weight [rows, row_length].
    void transpose_weight(const void* weight, int64_t rows, int64_t row_length, Term<T>* to, int64_t to_row) {
        const T* const from = static_cast<const T*>(weight);
#pragma omp parallel for num_threads(in.threads)
        for (int64_t row = 0; row < rows; row += lanes) {
            F block[lanes * lanes];
            const int64_t count = smaller(lanes, rows - row);
            for (int64_t column = 0; column < row_length; column += lanes) {
                const int64_t part = smaller(lanes, row_length - column);
                load_tile<T>(from + row * row_length + column, count, row_length, part, block);
                const auto block_row = [&](int64_t i) { return block + i * lanes; };
                Term<T>* const corner = to + column * to_row + row;
                if constexpr (in_pairs<T>) {
                    F turned[lanes * lanes];
                    transpose<F>(count, part, block_row, turned, lanes);
                    store_tile<T>(turned, part, to_row, count, corner);
                } else {
                    transpose<F>(count, part, block_row, corner, to_row);
                }
            }
        }
    }

    // Chunks of the queries or of f·context, with their rows as the depth, and with the positions: the same place, but
    // for pairs.
    struct Chunk {
        P *of_rows, *of_positions;
        int64_t row, position_row;
    };
    Chunk chunk_at(P* matrix, int64_t rows, int64_t position) const {
        P* const again = in_pairs<T> ? matrix + cut.chunks * steps<T>(rows) * cut.positions : matrix;
        return {matrix + cut.at(0, steps<T>(rows), position), again + steps<T>(cut.at(0, rows, position)),
                cut.positions, steps<T>(cut.positions)};
    }
    Chunk context_at(int64_t image, int64_t first) const { return chunk_at(context + image * of_context, dv, first); }
    Chunk query_at(int64_t image, int64_t first) const {
        return chunk_at(queries + image * cut.elements(1, dk), dk, first);
    }

    // Phase 1, of up to two tiles: f·context, D, gamma's part, and the queries in chunks.
    void context_of_tiles(int64_t image, int64_t first, int64_t count, Arena<F> arena) {
        constexpr int64_t depth = chunk * terms;  // of a product
        F* const tile = arena.take(depth * lanes);
        P* const factors = take_factors_of<T>(arena, tile, chunk * lanes);
        F* const out = arena.take(dv * lanes);
        P* const out_factors = take_factors_of<T>(arena, out, steps<T>(dv) * lanes);
        F* const sums = arena.take(tiles_together * dv * lanes);
        const Windows<T> grad_y(g.grad_y, in.sizes.width, image, first, count);
        F bias_terms[tiles_together * lanes] = {};
        for (int64_t c = 0; c < C; c += depth) {
            const int64_t channels = smaller(depth, C - c);
            each_tile(first, count, [&](int64_t t, int64_t, int64_t positions) {
                F* const sum = sums + t * dv * lanes;
                F* const to = in.w_out ? tile : sum + c * lanes;
                if (!in_pairs<T> || !in.w_out || in.b_out) grad_y[t].load(c, channels, to);
                if (in.w_out) {
                    if (in_pairs<T>) load_factors(grad_y[t], c, channels, factors);
                    const Left<P> left{w_out + steps<T>(c), steps<T>(C), 1};
                    product(dv, positions, steps<T>(channels), left, factors, lanes, sum, lanes, c > 0,
                            grad_y.fetch_next(t, c, channels, C));
                }
                if (const T* const bias = static_cast<const T*>(in.b_out))
                    each_vector<F>(channels, positions, [&](int64_t row, int64_t lane, int64_t at) {
                        vector_at(bias_terms + t * lanes + lane) += vector_at(to + at) * widen(bias[c + row]);
                    });
            });
        }
        each_tile(first, count, [&](int64_t t, int64_t begin, int64_t positions) {
            keep_context(image, begin, positions, sums + t * dv * lanes, bias_terms + t * lanes, out, out_factors);
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

    void keep_context(int64_t image, int64_t first, int64_t count, F* sums, const F* bias_terms, F* out,
                      P* out_factors) {
        F rows[lanes], factors[lanes] = {};
        load_out(image, first, count, out);
        row_dots(dv, count, sums, lanes, out, lanes, rows);
        const int64_t position = image * N + first;
        for (int64_t lane = 0; lane < count; ++lane) gamma_term[position + lane] = rows[lane] + bias_terms[lane];

        const F* const log_total = static_cast<const F*>(in.lse) + image * 2 * N + N + first;
        for (int64_t lane = 0; lane < count; ++lane)
            factors[lane] = gamma * static_cast<F>(__builtin_exp(-log_total[lane]));
        each_vector<F>(dv, count, [&](int64_t, int64_t lane, int64_t at) {
            vector_at(sums + at) *= vector_at(factors + lane);
        });
        const Chunk to = context_at(image, first), query = query_at(image, first);
        const T* const own_query = static_cast<const T*>(in.query) + image * dk * N + first;
        if constexpr (in_pairs<T>) {
            T* const rounded = reinterpret_cast<T*>(to.of_positions);
            store_tile<T>(sums, dv, cut.positions, count, rounded);
            for (int64_t row = 0; count % 2 && row < dv; ++row) rounded[row * cut.positions + count] = {};
            load_tile<T>(rounded, dv, cut.positions, count, to.of_rows, to.row, count);
            F rest[lanes], *const with_parts[] = {rows, rest};
            const T* from = static_cast<const T*>(in.out) + image * dv * N + first;
            for (F* const dots : with_parts) {  // of out
                load_tile<T>(from, dv, N, count, out_factors);
                row_dots(steps<T>(dv), count, to.of_rows, to.row, out_factors, lanes, dots);
                from += B * dv * N;
            }
            for (int64_t lane = 0; lane < count; ++lane) rows[lane] += rest[lane];
            load_rows<T>(own_query, dk, N, count, query.of_positions, query.position_row);
        } else {
            row_dots(dv, count, sums, lanes, out, lanes, rows);
            store_tile<F>(sums, dv, to.row, count, to.of_rows);
        }
        store_tile<F>(rows, 1, 0, count, row_term + position);
        load_tile<T>(own_query, dk, N, count, query.of_rows, query.row, count);
    }

    // Logits become powers p̂, and their gradients s: in place, but for pairs.
    void softmax_gradient(int64_t rows, int64_t count, const F* maximum, const F* term, F* map, F* map_gradient,
                          P* powers, P* slopes, P* slope_rows) const {
        const auto vectors = [&](int64_t row, int64_t at, Vector<F>& power, Vector<F>& slope) {
            power = exponential<F, Powers<T>>(vector_at(map + at) - maximum[row]);
            slope = power * (vector_at(map_gradient + at) - term[row]);
        };
        for (int64_t row = 0; row < rows; row += terms)
            for (int64_t lane = 0; lane < count; lane += vector_lanes<F>) {
                const int64_t at = row * lanes + lane, to = row / terms * lanes + lane;
                if constexpr (in_pairs<T>) {
                    Vector<F> power, slope, next_power = {}, next_slope = {};
                    vectors(row, at, power, slope);
                    if (row + 1 < rows) vectors(row + 1, at + lanes, next_power, next_slope);
                    vector_at(powers + to) = pairs_of(power, next_power);
                    const auto both = rounded(slope, next_slope);
                    vector_at(slopes + to) = pairs_of(both);
                    T row_terms[2][vector_lanes<F>];
                    __builtin_memcpy(row_terms, &both, sizeof both);
                    if (count % 2 && lane + vector_lanes<F> > count)  // the last key's neighbour does not exist
                        row_terms[0][count - lane] = row_terms[1][count - lane] = {};
                    T* const to_rows = reinterpret_cast<T*>(slope_rows) + at;
                    __builtin_memcpy(to_rows, row_terms[0], sizeof row_terms[0]);
                    __builtin_memcpy(to_rows + lanes, row_terms[1], sizeof row_terms[1]);
                } else {
                    Vector<F> slope;
                    vectors(row, at, vector_at(map + at), slope);
                    vector_at(map_gradient + at) = slope;
                }
            }
    }

    // Phase 2: the gradients of key and value of a part's keys, and what they add to those of the queries.
    void attention_of_part(int64_t image, int64_t part, F* query_sums, int64_t query_row, Arena<F> arena) {
        const SubnormalsAreZero fast;
        F* const map = arena.take(chunk * lanes);  // [queries of a chunk][keys of a tile]
        F* const map_gradient = arena.take(chunk * lanes);
        P* const powers = take_factors_of<T>(arena, map, chunk / terms * lanes);
        P* const slopes = take_factors_of<T>(arena, map_gradient, chunk / terms * lanes);
        P* const slope_rows = take_factors_of<T>(arena, map_gradient, chunk * lanes / terms);  // the keys are the depth
        P* const key = take_factors<T>(arena, dk * lanes);
        P* const key_rows = take_factors<T>(arena, lanes * at_key);  // the same, [keys][dk]
        P* const value = take_factors<T>(arena, dv * lanes);
        F* const key_gradient = arena.take(dk * lanes);
        F* const value_gradient = arena.take(dv * lanes);
        const int64_t end = smaller(N, (part + 1) * parts.keys), tile_row = lanes / terms;
        const F* const maximum = static_cast<const F*>(in.lse) + image * 2 * N;
        const F* const term = row_term + image * N;
        for (int64_t first = part * parts.keys; first < end; first += lanes) {
            const int64_t count = smaller(lanes, N - first);
            const T* const own_key = static_cast<const T*>(in.key) + image * dk * N + first;
            if constexpr (in_pairs<T>) load_rows<T>(own_key, dk, N, count, key, tile_row);
            else load_tile<T>(own_key, dk, N, count, key);
            transpose<P>(dk, steps<T>(count), [&](int64_t row) { return key + row * tile_row; }, key_rows, at_key);
            if constexpr (in_pairs<T>) load_tile<T>(own_key, dk, N, count, key);
            load_tile<T>(static_cast<const T*>(in.value) + image * dv * N + first, dv, N, count, value);
            for (int64_t j = 0; j < N; j += chunk) {
                const int64_t rows = smaller(chunk, N - j);
                const Chunk query = query_at(image, j), other = context_at(image, j);
                product(rows, count, steps<T>(dk), Left<P>{query.of_rows, 1, query.row}, key, lanes, map, lanes, false);
                product(rows, count, steps<T>(dv), Left<P>{other.of_rows, 1, other.row}, value, lanes, map_gradient,
                        lanes, false);
                softmax_gradient(rows, count, maximum + j, term + j, map, map_gradient, powers, slopes, slope_rows);
                const Left<P> contexts{other.of_positions, other.position_row, 1};
                const Left<P> own_queries{query.of_positions, query.position_row, 1};
                product(dv, count, steps<T>(rows), contexts, powers, lanes, value_gradient, lanes, j > 0);
                product(dk, count, steps<T>(rows), own_queries, slopes, lanes, key_gradient, lanes, j > 0);
                product(rows, dk, steps<T>(count), Left<P>{slope_rows, tile_row, 1}, key_rows, at_key,
                        query_sums + j * query_row, query_row, first > part * parts.keys);
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
        const int64_t row = attention_padded(dv);
        P* const to = context + image * of_context + first * row;
        if constexpr (in_pairs<T>) {
            P* const out = take_factors<T>(arena, dv * lanes / terms);
            load_rows<T>(static_cast<const T*>(in.out) + image * dv * N + first, dv, N, count, out, lanes / terms);
            transpose<P>(dv, steps<T>(count), [&](int64_t e) { return out + e * (lanes / terms); }, to, terms * row);
        } else {
            F* const out = arena.take(dv * lanes);
            load_out(image, first, count, out);
            transpose<F>(dv, count, [&](int64_t e) { return out + e * lanes; }, to, row);
        }
    }

    // The gradients become factors with the positions as the depth, a pair in the place of the first of its two rows.
    void round_gradients(int64_t image, int64_t first, int64_t count) {
        if constexpr (in_pairs<T>)
            for (int64_t lane = 0; lane < count; lane += 2) {
                F* const row = gradients + (image * N + first + lane) * columns;
                for (int64_t k = 0; k < columns; k += vector_lanes<F>) {
                    const Vector<F> second = lane + 1 < count ? vector_at(row + columns + k) : Vector<F>{};
                    vector_at(reinterpret_cast<P*>(row + k)) = pairs_of(vector_at(row + k), second);
                }
            }
    }

    void image_gradient_of_tiles(int64_t image, int64_t first, int64_t count, Arena<F> arena) {
        const int64_t depth = 2 * dk + dv;
        F* const tile = arena.take(chunk * lanes);
        F* const sums = arena.take(tiles_together * depth * lanes);  // of query, key, value
        P* const rounded = take_factors_of<T>(arena, sums, tiles_together * steps<T>(depth) * lanes);
        const P* factors[tiles_together];
        each_tile(first, count, [&](int64_t t, int64_t begin, int64_t positions) {
            const F* const rows = gradients + (image * N + begin) * columns;
            F* const sum = sums + t * depth * lanes;
            const auto turn = [&](int64_t from, int64_t width, F* to) {
                transpose<F>(positions, width, [=](int64_t lane) { return rows + lane * columns + from; }, to, lanes);
            };
            turn(0, dk, sum);
            turn(at_key, dk, sum + dk * lanes);
            turn(at_value, dv, sum + 2 * dk * lanes);
            factors[t] = tile_factors<T>(depth, positions, sum, rounded + t * steps<T>(depth) * lanes);
        });
        const Windows<T> grad_y(g.grad_y, in.sizes.width, image, first, count);
        const Windows<T> grad_x(g.grad_x, in.sizes.width, image, first, count);
        for (int64_t c = 0; c < C; c += chunk) {
            const int64_t channels = smaller(chunk, C - c);
            each_tile(first, count, [&](int64_t t, int64_t, int64_t positions) {
                grad_y[t].load(c, channels, tile);
                const Left<P> left{w_in + c * steps<T>(depth), steps<T>(depth), 1};
                product(channels, positions, steps<T>(depth), left, factors[t], lanes, tile, lanes, true,
                        grad_x[t].fetch(c, channels));
                grad_x[t].store(c, channels, tile);
            });
        }
    }

    // Phase 4: sums[channel][column] = Σ over all positions of source[channel] · rows[column], for 64 channels; rows are
    // of a length `row`, those of an image begin image_step after those of the one before.
    void sum_over_positions(const Image& source, int64_t c, int64_t channels, const P* rows, int64_t row,
                            int64_t image_step, int64_t width, F* sums, P* tile) {
        const int64_t chunks = blocks_of(N, chunk), all = B * chunks;
        const auto window_at = [&](int64_t at) {
            const int64_t first = at % chunks * chunk;
            return Window<T>(source, in.sizes.width, at / chunks, first, smaller(chunk, N - first));
        };
        for (int64_t at = 0; at < all; ++at) {
            const Window<T> window = window_at(at);
            const Left<P> left = left_factors(window, c, channels, tile);
            const P* const right = rows + at / chunks * image_step + at % chunks * chunk * row;
            // Of an image in several chunks the rows lie far apart, in few sets of the cache: they would be in the way.
            Fetch next = chunks == 1 && at + 1 < all ? window_at(at + 1).fetch(c, channels) : Fetch{};
            product(channels, width, steps<T>(window.count), left, right, terms * row, sums, width, at > 0, next);
        }
        if (!all) for (int64_t i = 0; i < channels * width; ++i) sums[i] = 0;  // no image, no sum
    }

    void weight_gradients() {
        const bool inputs = g.w_query || g.w_key || g.w_value, outputs = g.w_out;
        const int64_t groups = blocks_of(C, lanes);
        each_job(in, scratch, per_thread, (inputs + outputs) * groups, [&](int64_t job, Arena<F> arena) {
            const bool of_out = !inputs || job >= groups;
            const int64_t c = job % groups * lanes, channels = smaller(lanes, C - c);
            const int64_t width = of_out ? attention_padded(dv) : columns;
            F* const sums = arena.take(lanes * width);
            P* const tile = take_factors<T>(arena, lanes * chunk);
            if (!of_out) {
                const P* const rows = reinterpret_cast<const P*>(gradients);
                sum_over_positions(in.x, c, channels, rows, columns, N * columns, width, sums, tile);
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

    F gradient_at(int64_t position, int64_t column) const {
        if constexpr (in_pairs<T>) {
            const int64_t second = position % N % 2;
            const P pair = reinterpret_cast<const P*>(gradients)[(position - second) * columns + column];
            return widen(second ? pair.second : pair.first);
        } else {
            return gradients[position * columns + column];
        }
    }

    // Sums over all positions, in double: of columns of the gradients.
    void bias_gradient(void* gradient, int64_t column, int64_t width) {
        if (!gradient) return;
#pragma omp parallel for num_threads(in.threads)
        for (int64_t k = 0; k < width; ++k) {
            double sum = 0;
            for (int64_t position = 0; position < B * N; ++position) sum += gradient_at(position, column + k);
            narrow(static_cast<F>(sum), static_cast<T*>(gradient)[k]);
        }
    }

    void run() {
        const bool of_map = g.grad_x.data || g.w_query || g.w_key || g.w_value || g.b_query || g.b_value;
        if (in.w_out) transpose_weights({{in.w_out, C}}, dv, w_out);
        if (g.grad_x.data) transpose_weights({{in.w_query, dk}, {in.w_key, dk}, {in.w_value, dv}}, C, w_in);
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
            if (of_map) round_gradients(image, first, count);
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

#if defined(__AVX512BF16__)

Status attention_backward(const AttentionInputs& inputs, const AttentionGradients& gradients) {
    if (inputs.dtype != DType::bfloat16) return avx512::attention_backward(inputs, gradients);
    Backward<BFloat16>(inputs, gradients).run();
    return ok;
}

#else

Status attention_backward(const AttentionInputs& inputs, const AttentionGradients& gradients) {
    switch (inputs.dtype) {
        case DType::float32: Backward<float>(inputs, gradients).run(); return ok;
        case DType::float64: Backward<double>(inputs, gradients).run(); return ok;
        case DType::bfloat16: Backward<BFloat16>(inputs, gradients).run(); return ok;
        case DType::float16: Backward<Float16>(inputs, gradients).run(); return ok;
    }
    return unsupported_dtype;
}

#endif

}  // namespace SABMN_ISA
}  // namespace sabmn
