// The attention's gradients. With context = w_outᵀ grad_y, and of every query j the row term
// r_j = Σ_c context_cj out_cj:
//
//   p_ji = exp(query_j · key_i - lse_j)     e_ji = p_ji (context_j · value_i - r_j)
//   grad_query_j = γ Σ_i e_ji key_i         grad_key_i = γ Σ_j e_ji query_j
//   grad_value_i = γ Σ_j p_ji context_j
//
// γ's own gradient is Σ_j r_j; nothing is ever divided by γ. Every sum has one owner and a fixed order: no atomics.
#pragma once

#include "attention/attention_tiles.cuh"

namespace sabmn {
namespace {

struct BackwardArguments {
    int positions, key_width, value_width;
    const void *query, *key, *value, *context;
    const float *lse, *row_term, *gamma;
    void *grad_query, *grad_key, *grad_value;
    bool vectors;  // rows of the tensors read may be copied 16 bytes at a time
    bool pairs;    // and those of the gradients stored in pairs of neighbours
};

// ---- row terms ----

constexpr int row_positions = warp_size, row_warps = 8;

struct RowArguments {
    int channels, positions, value_width;
    const void *context, *out;  // [B, value width, N]; of 16 bits what rounding left of out lies out_part further
    std::int64_t out_part;
    const void* b_out;          // [C] or null: then γ's gradient has Σ grad_y · b_out too
    const void* grad_y;
    std::int64_t batch_stride, channel_stride, position_stride;
    float *row_term, *sums;  // [B, N], and of every block the sum
};

// 32 positions, a lane each; the warps share out the channels. Σ_i e_ji vanishes where r has context as it is multiplied
// with values: rounded to TF32. γ's gradient has it as it is.
template <typename T>
__global__ void __launch_bounds__(row_warps* warp_size)
    attention_row_term_kernel(SABMN_GRID_CONSTANT(RowArguments) arguments) {
    __shared__ float terms[2][row_warps][warp_size];
    const int positions = arguments.positions, tiles = ceil_div(positions, row_positions);
    const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size,
              n = blockIdx.x % tiles * row_positions + lane;
    const std::int64_t image = blockIdx.x / tiles, offset = image * arguments.value_width * positions + n;
    const T* const context = static_cast<const T*>(arguments.context) + offset;
    const T* const out = static_cast<const T*>(arguments.out) + offset;
    float term = 0, rest = 0;  // r, and what else γ's gradient has
    if (n < positions) {
#pragma unroll 4
        for (int c = warp; c < arguments.value_width; c += row_warps) {
            const std::int64_t at = static_cast<std::int64_t>(c) * positions;
            float exact = static_cast<float>(out[at]);
            if constexpr (sizeof(T) == 2) exact += static_cast<float>(out[at + arguments.out_part]);
            float given = static_cast<float>(context[at]);
            if constexpr (std::is_same_v<T, tf32>) {
                const float rounded = __uint_as_float(tf32_bits(given));
                rest += (given - rounded) * exact;
                given = rounded;
            }
            term += given * exact;
        }
        if (arguments.b_out) {
            const T* const grad_y = static_cast<const T*>(arguments.grad_y) + image * arguments.batch_stride;
            for (int c = warp; c < arguments.channels; c += row_warps) {
                rest += static_cast<float>(grad_y[c * arguments.channel_stride + n * arguments.position_stride]) *
                        static_cast<float>(static_cast<const T*>(arguments.b_out)[c]);
            }
        }
    }
    terms[0][warp][lane] = term;
    terms[1][warp][lane] = rest;
    __syncthreads();
    if (warp) return;
    for (int other = 1; other < row_warps; ++other) {
        term += terms[0][other][lane];
        rest += terms[1][other][lane];
    }
    if (n < positions) arguments.row_term[image * positions + n] = term;
    float sum = term + rest;
    for (int mask = warp_size / 2; mask; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane == 0) arguments.sums[blockIdx.x] = sum;
}

// ---- gradients of query, key and value ----

constexpr int backward_side = 64, backward_threads = 128;
template <typename T>
constexpr int backward_blocks_per_sm = sizeof(T) == 2 ? 3 : 2;  // as registers allow
constexpr int backward_stages = 3, backward_panel_bytes = 8 << 10;
template <typename T>
constexpr int backward_panel = backward_panel_bytes / sizeof(T) / backward_side;  // channels
constexpr int backward_own_panels = 4;  // that are kept in shared memory; wider ones are fetched for every tile

// Where shared memory has what, in panels of 8 KB.
struct BackwardPlan {
    int a_panels, b_panels;
    bool keeps_own;

    __host__ __device__ BackwardPlan(int key_width, int value_width, int panel)
        : a_panels(ceil_div(key_width, panel)),
          b_panels(ceil_div(value_width, panel)),
          keeps_own(a_panels + b_panels <= backward_own_panels) {}
    __host__ __device__ int own() const { return keeps_own ? a_panels + b_panels : backward_stages; }
    __host__ __device__ int ring() const { return a_panels + b_panels > 2 ? backward_stages : 0; }
    __host__ __device__ int slices() const { return a_panels > b_panels ? a_panels : b_panels; }
    __host__ __device__ int bytes() const {
        return (4 + own() + ring()) * backward_panel_bytes +
               2 * 3 * backward_side * static_cast<int>(sizeof(float));
    }
};

// A block owns 64 positions, a warp 16 of them, and walks over all others, 64 at a time. Blocks of queries make
// grad_query, blocks of keys grad_key and grad_value, each 64 channels of them, or 32 of 32 bits (the slice
// blockIdx.y), and p and e anew.
// With own = query and other = key, or the reverse, and likewise for context and value, both do the same:
//   logits = own_a · other_a    e = p (own_b · other_b - r)    grad_a += e other_a    and of keys grad_b += p other_b
// The other side passes through shared memory in panels of a slice's channels × 64 positions. The two that the slice
// needs again for the gradients are kept until the tile is done.
template <typename T>
__global__ void __launch_bounds__(backward_threads, backward_blocks_per_sm<T>)
    attention_backward_kernel(SABMN_GRID_CONSTANT(BackwardArguments) arguments) {
    constexpr int side = backward_side, panel = backward_panel<T>, size = side * panel;
    SABMN_DYNAMIC_SHARED(T, shared);
    const int positions = arguments.positions, tiles = ceil_div(positions, side), slice = blockIdx.y;
    const BackwardPlan plan(arguments.key_width, arguments.value_width, panel);
    const int of_image = blockIdx.x % (2 * tiles);
    const std::int64_t image = blockIdx.x / (2 * tiles);
    const bool own_keys = of_image >= tiles;
    const bool has_a = slice < plan.a_panels, has_b = own_keys && slice < plan.b_panels;
    if (!has_a && !has_b) return;
    const int first_own = (of_image - (own_keys ? tiles : 0)) * side;

    T* const kept = shared;          // [2 tiles][a, b]
    T* const own = kept + 4 * size;  // [a panels + b panels], or a ring
    T* const ring = own + plan.own() * size;
    // [2 tiles][log-sum: shift, rest; r][64]
    float* const statistics = reinterpret_cast<float*>(ring + plan.ring() * size);
    const float* const lse = arguments.lse + image * 2 * positions;
    const float* const row_term = arguments.row_term + image * positions;

    const int tile_steps = plan.a_panels + plan.b_panels, steps = tiles * tile_steps;
    const auto other_place = [&](int step, int tile, int p) {
        const bool is_b = p >= plan.a_panels;
        const bool keep = (is_b ? p - plan.a_panels : p) == slice;
        return keep ? kept + (tile % 2 * 2 + is_b) * size : ring + step % backward_stages * size;
    };
    const auto own_place = [&](int step, int p) { return own + (plan.keeps_own ? p : step % backward_stages) * size; };
    int fetched_tile = 0, fetched_panel = 0;  // the next to fetch
    const auto fetch = [&](int step) {
        if (step < steps) {
            const int tile = fetched_tile, p = fetched_panel;
            if (++fetched_panel == tile_steps) fetched_panel = 0, ++fetched_tile;
            const bool is_b = p >= plan.a_panels;
            const int width = is_b ? arguments.value_width : arguments.key_width;
            const int first = (is_b ? p - plan.a_panels : p) * panel, left = width - first;
            const int rows = min(ceil_div(left, 32) * 32, panel);
            const std::int64_t offset = (image * width + first) * positions;
            // of queries: query and context; of keys: key and value
            const T* const of_queries = static_cast<const T*>(is_b ? arguments.context : arguments.query) + offset;
            const T* const of_keys = static_cast<const T*>(is_b ? arguments.value : arguments.key) + offset;
            Panel<T> from = {(own_keys ? of_queries : of_keys) + tile * side,
                             positions,
                             rows,
                             left,
                             positions - tile * side,
                             arguments.vectors};
            from.template copy_to<side, backward_threads>(other_place(step, tile, p));
            if (tile == 0 || !plan.keeps_own) {
                from.data = (own_keys ? of_keys : of_queries) + first_own;
                from.size = positions - first_own;
                from.template copy_to<side, backward_threads>(own_place(step, p));
            }
            if (p == 0 && own_keys && threadIdx.x < side) {  // p is 0 where there is no query
                const int j = tile * side + threadIdx.x;
                float* const to = statistics + tile % 2 * 3 * side + threadIdx.x;
                const auto of_query =
                    j < positions ? LogSum<T>::of(lse[j], lse[positions + j]) : LogSum<T>::of(INFINITY);
                to[0] = of_query.shift, to[side] = of_query.rest;
                to[2 * side] = j < positions ? row_term[j] : 0.0f;
            }
        }
        cp_async_commit();
    };

    const int lane = threadIdx.x % warp_size, warp_own = threadIdx.x / warp_size * 16;
    const bool idle = first_own + warp_own >= positions;
    LogSum<T> own_log_sum[2] = {};  // of own queries g and g + 8
    float r[2] = {};
    if (!own_keys) {
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
            const int j = first_own + warp_own + lane / 4 + 8 * lower;
            if (j >= positions) continue;
            own_log_sum[lower] = LogSum<T>::of(lse[j], lse[positions + j]), r[lower] = row_term[j];
        }
    }

    Block grad_a[panel / 16] = {}, grad_b[panel / 16] = {};
#pragma unroll 1
    for (int first = 0; first < backward_stages - 1; ++first) fetch(first);
    int step = 0;
    // d[own, other] += Σ over the channels of a panel
    const auto product = [&](Block(&d)[side / 16], const T* own_panel, const T* other_panel, int depth) {
#pragma unroll 1
        for (int k = 0; k < depth; k += 16) {
            Operand<T> a;
            Right<T> b;
            load_operand<side, true>(a, own_panel, warp_own, k);
#pragma unroll
            for (int j = 0; j < side / 16; ++j) {
                load_right<side, true>(b, other_panel, 16 * j, k);
                multiply<T>(d[j], a, b);
            }
        }
    };
    // grad[own, channel] += Σ over the positions of the tile
    const auto accumulate = [&](Block(&grad)[panel / 16], const Operand<T>(&weights)[side / 16], const T* from,
                                int channels) {
#pragma unroll
        for (int i = 0; i < panel / 16; i += 2) {
            if (16 * i >= channels) break;
#pragma unroll
            for (int j = 0; j < side / 16; ++j) {
#pragma unroll
                for (int n = i; n < i + 2; ++n) {
                    Right<T> b;
                    load_right<side, false>(b, from, 16 * n, 16 * j);
                    multiply<T>(grad[n], weights[j], b);
                }
            }
        }
    };

    for (int tile = 0; tile < tiles; ++tile) {
        Block logits[side / 16] = {}, e[side / 16] = {};
        for (int p = 0; p < tile_steps; ++p) {
            cp_async_wait<backward_stages - 2>();
            __syncthreads();
            fetch(step + backward_stages - 1);
            const T *const own_panel = own_place(step, p), *const other_panel = other_place(step, tile, p);
            ++step;
            if (idle) continue;
            if (p < plan.a_panels) product(logits, own_panel, other_panel, min(arguments.key_width - p * panel, panel));
            else product(e, own_panel, other_panel, min(arguments.value_width - (p - plan.a_panels) * panel, panel));
        }
        if (idle) continue;
        const int left = positions - tile * side;
        Operand<T> p_rounded[side / 16], e_rounded[side / 16];
        const auto round = [&](int j) {
            round_block<T>(p_rounded[j], logits[j], 1, 1);
            round_block<T>(e_rounded[j], e[j], 1, 1);
            prepare<T>(p_rounded[j]);
            prepare<T>(e_rounded[j]);
        };
        if (own_keys) {
            const float* const of_tile = statistics + tile % 2 * 3 * side + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < 2 * (side / 16); ++j) {
                float2 column[3];  // log-sum: shift and rest; r
#pragma unroll
                for (int n = 0; n < 3; ++n) column[n] = *reinterpret_cast<const float2*>(of_tile + n * side + 8 * j);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const auto log_sum =
                        i % 2 ? LogSum<T>{column[0].y, column[1].y} : LogSum<T>{column[0].x, column[1].x};
                    float& p = logits[j / 2][j % 2][i];
                    p = log_sum.power(p);  // 0 beyond the last query
                    e[j / 2][j % 2][i] = p * (e[j / 2][j % 2][i] - (i % 2 ? column[2].y : column[2].x));
                }
                if (j % 2) round(j / 2);
            }
        } else {
#pragma unroll
            for (int j = 0; j < side / 16; ++j) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    float& p = logits[j][i / 4][i % 4];
                    p = own_log_sum[i / 2 % 2].power(p);
                }
            }
            if (left < side) {
#pragma unroll
                for (int j = 0; j < side / 16; ++j) {
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        if (16 * j + i / 4 * 8 + lane % 4 * 2 + i % 2 >= left) logits[j][i / 4][i % 4] = 0;
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < side / 16; ++j) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    e[j][i / 4][i % 4] = logits[j][i / 4][i % 4] * (e[j][i / 4][i % 4] - r[i / 2 % 2]);
                }
                round(j);
            }
        }
        const T* const of_slice = kept + tile % 2 * 2 * size;
        if (has_a) accumulate(grad_a, e_rounded, of_slice, arguments.key_width - slice * panel);
        if (has_b) accumulate(grad_b, p_rounded, of_slice + size, arguments.value_width - slice * panel);
    }

    const float gamma = *arguments.gamma, gamma_of_logits = positions > 1 ? gamma : 0;  // one key has all the attention
    const auto store = [&](const Block(&grad)[panel / 16], void* to, int width, float scale) {
        const int channels = width - slice * panel;
        T* const data = static_cast<T*>(to) + (image * width + slice * panel) * positions;
#pragma unroll
        for (int i = 0; i < panel / 16; ++i) {
            if (idle || 16 * i >= channels) break;
            Operand<T> rounded;
            Pairs<T> turned;
            round_block<T>(rounded, grad[i], scale, scale);
            store_turned(data, channels, positions, 16 * i, first_own + warp_own, arguments.pairs, rounded, turned);
        }
    };
    if (has_a) {
        store(grad_a, own_keys ? arguments.grad_key : arguments.grad_query, arguments.key_width, gamma_of_logits);
    }
    if (has_b) store(grad_b, arguments.grad_value, arguments.value_width, gamma);
}

// ---- sums over blocks ----

constexpr int reduce_threads = 256;

// Up to four matrices, each the sum of `parts` partial ones that lie `stride` apart, times a scale; and γ's gradient.
struct ReduceArguments {
    struct Matrix {
        const float* partial;
        const float* scale;  // or null
        void* out;           // or null: not wanted
        std::int64_t size, stride;
    } matrices[4];
    int parts;
    const float* gamma_sums;
    float* grad_gamma;  // or null
    std::int64_t gamma_count;
};

template <typename T>
__global__ void __launch_bounds__(reduce_threads)
    attention_reduce_kernel(SABMN_GRID_CONSTANT(ReduceArguments) arguments) {
    std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * reduce_threads + threadIdx.x;
    for (const auto& matrix : arguments.matrices) {
        if (i < matrix.size && i >= 0 && matrix.out) {
            float sum = 0;
#pragma unroll 4
            for (int part = 0; part < arguments.parts; ++part) sum += matrix.partial[part * matrix.stride + i];
            static_cast<T*>(matrix.out)[i] = static_cast<T>(matrix.scale ? sum * *matrix.scale : sum);
        }
        i -= matrix.size;
    }
    if (blockIdx.x || !arguments.grad_gamma) return;
    __shared__ double sums[reduce_threads];
    double sum = 0;
    for (std::int64_t k = threadIdx.x; k < arguments.gamma_count; k += reduce_threads) sum += arguments.gamma_sums[k];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x) return;
    for (int other = 1; other < reduce_threads; ++other) sum += sums[other];
    *arguments.grad_gamma = static_cast<float>(sum);
}

}  // namespace
}  // namespace sabmn
