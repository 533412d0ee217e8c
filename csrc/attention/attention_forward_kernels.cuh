// Attention, output projection and residual in one kernel: out and y of attention_cuda.h.
//
// A warp owns 16 queries, a block `queries` of one image. Everything else passes through shared memory as a sequence of
// panels of at most 16 KB, two under way while one is used: for every 128 keys, or 64, the panels of the keys (64 channels
// each, 32 of 32 bits) and then those of the values; after the last key the panels of w_out, 64 output channels each, or
// 32.
// Logits, probabilities and out live in registers; out is stored for the backward pass, and used from where it is. Up
// to as many keys the softmax is exact at once; beyond, it is corrected whenever a row's maximum grows (Milakov and
// Gimelshein, 2018).
//
// `width` is how many value channels a block has registers for, 64, 128 or 256; what is not needed of them is skipped,
// 32 channels at a time. Wider values are done in slices by different blocks, which compute the logits again and leave
// w_out to attention_product_kernel. The width of queries and keys is free.
#pragma once

#include "attention/attention_tiles.cuh"

namespace sabmn {
namespace {

constexpr int forward_stages = 3;

// 8 warps and 128 keys at a time where registers allow: the more queries share a panel the less often it is read.
template <typename T, int width>
struct ForwardPlan {
    static constexpr bool narrow = sizeof(T) == 2 && width <= 64;
    static constexpr int keys = narrow || width == 256 || std::is_same_v<T, fp32> ? 64 : 128;
    static constexpr int panel = 128 / sizeof(T);  // channels
    static constexpr int panel_bytes = keys * panel * sizeof(T);
    static constexpr int warps = narrow ? 8 : 4;
    static constexpr int threads = warps * warp_size, queries = 16 * warps;
    static constexpr int blocks_per_sm = 2;
    // Panels of queries that are kept for all keys; wider ones are fetched again. It all fits the 99 KB of a block on
    // sm_120.
    static constexpr int query_slots = warps == 8 ? 3 : 4;

    static int shared_bytes(int key_width) {
        const int panels = ceil_div(key_width, panel), slots = panels < query_slots ? panels : query_slots;
        return slots * panel * queries * static_cast<int>(sizeof(T)) + forward_stages * panel_bytes;
    }
};

struct ForwardArguments {
    int channels, positions, key_width, value_width;
    const void *query, *key, *value, *w_out;
    void* out;
    std::int64_t out_part;  // of 16 bits what rounding left of out lies that much further (attention_cuda.h)
    float* lse;
    bool vectors;    // rows of query, key and value may be copied 16 bytes at a time
    bool w_vectors;  // and those of w_out
    bool out_pairs;  // out may be stored in pairs of neighbours
    bool y_is_channels_last, writes_y;
    int channels_per_block;  // of y: where there are few blocks, several share them out, and all find the same out
    ProductResult y;  // with rows and columns in the order of y_is_channels_last
};

template <typename T, int width>
__global__ void __launch_bounds__(ForwardPlan<T, width>::threads, ForwardPlan<T, width>::blocks_per_sm)
    attention_forward_kernel(SABMN_GRID_CONSTANT(ForwardArguments) arguments) {
    using Plan = ForwardPlan<T, width>;
    constexpr int query_slots = Plan::query_slots, queries = Plan::queries, keys = Plan::keys, panel = Plan::panel;
    constexpr int value_panels = width / panel, panel_elements = panel * keys;
    constexpr int w_rows = sizeof(T) == 2 && width > 64 ? 64 : 32;  // output channels of a panel of w_out
    constexpr int max_depth = panel_elements / w_rows, w_depth = width < max_depth ? width : max_depth,
                  w_panels = width / w_depth;
    SABMN_DYNAMIC_SHARED(T, shared);

    const int positions = arguments.positions, key_width = arguments.key_width, channels = arguments.channels;
    const int query_tiles = ceil_div(positions, queries);
    const std::int64_t image = blockIdx.x / query_tiles;
    const int first_query = blockIdx.x % query_tiles * queries;
    const int first_value = blockIdx.y * width;  // channel, of this slice
    const int values = min(arguments.value_width - first_value, width);
    const T* const query = static_cast<const T*>(arguments.query) + image * key_width * positions;
    const T* const key = static_cast<const T*>(arguments.key) + image * key_width * positions;
    const std::int64_t value_offset = (image * arguments.value_width + first_value) * positions;
    const T* const value = static_cast<const T*>(arguments.value) + value_offset;
    const T* const w_out = static_cast<const T*>(arguments.w_out);
    const int first_channel = blockIdx.z * arguments.channels_per_block,
              last_channel = min(first_channel + arguments.channels_per_block, channels);
    const bool writes_out = blockIdx.z == 0;

    const int key_panels = ceil_div(key_width, panel), tile_steps = key_panels + value_panels;
    const int tiles = ceil_div(positions, keys), attention_steps = tiles * tile_steps;
    const int steps = attention_steps + (w_out ? ceil_div(last_channel - first_channel, w_rows) * w_panels : 0);
    const int slots = min(key_panels, query_slots);
    const bool keeps_queries = key_panels <= query_slots;
    T* const ring = shared + slots * panel * queries;

    const auto query_slot = [&](int tile, int p) {
        return shared + (keeps_queries ? p : (tile * key_panels + p) % query_slots) * panel * queries;
    };
    int fetched_tile = 0, fetched_panel = 0;  // the next to fetch
    const auto fetch = [&](int step) {
        T* const to = ring + step % forward_stages * panel_elements;
        if (step < attention_steps) {
            const int tile = fetched_tile, p = fetched_panel;
            if (++fetched_panel == tile_steps) fetched_panel = 0, ++fetched_tile;
            const bool is_key = p < key_panels;
            const int first = (is_key ? p : p - key_panels) * panel, left = (is_key ? key_width : values) - first;
            const int rows = min(ceil_div(max(left, 0), 32) * 32, panel);
            const std::int64_t offset = static_cast<std::int64_t>(first) * positions;
            Panel<T> from = {(is_key ? key : value) + offset + tile * keys,
                             positions,
                             rows,
                             left,
                             positions - tile * keys,
                             arguments.vectors};
            from.template copy_to<keys, Plan::threads>(to);
            if (is_key && (tile == 0 || !keeps_queries)) {
                from.data = query + offset + first_query;
                from.size = positions - first_query;
                from.template copy_to<queries, Plan::threads>(query_slot(tile, p));
            }
        } else if (step < steps) {
            const int p = step - attention_steps, first = p % w_panels * w_depth;
            const int channel = first_channel + p / w_panels * w_rows;
            const Panel<T> from = {w_out + static_cast<std::int64_t>(channel) * values + first,
                                   values,
                                   w_rows,
                                   last_channel - channel,
                                   values - first,
                                   arguments.w_vectors};
            from.template copy_to<w_depth, Plan::threads>(to);
        }
        cp_async_commit();
    };
    int step = 0;
    const auto next_panel = [&]() -> const T* {
        cp_async_wait<forward_stages - 2>();
        __syncthreads();
        fetch(step + forward_stages - 1);
        return ring + step++ % forward_stages * panel_elements;
    };
#pragma unroll 1
    for (int first = 0; first < forward_stages - 1; ++first) fetch(first);

    const int lane = threadIdx.x % warp_size, warp_query = threadIdx.x / warp_size * 16;
    Block out[width / 16] = {};
    float maximum[2] = {minus_infinity, minus_infinity}, total[2] = {0, 0};  // of rows g and g + 8
    for (int tile = 0; tile < tiles; ++tile) {
        Block logits[keys / 16] = {};
        for (int p = 0; p < key_panels; ++p) {
            const T *const key_panel = next_panel(), *const query_panel = query_slot(tile, p);
            const int depth = min(key_width - p * panel, panel);
#pragma unroll 1  // or the operands fetched ahead take too many registers
            for (int k = 0; k < depth; k += 16) {
                Operand<T> a;
                Right<T> b;
                load_operand<queries, true>(a, query_panel, warp_query, k);
#pragma unroll
                for (int j = 0; j < keys / 16; ++j) {
                    load_right<keys, true>(b, key_panel, 16 * j, k);
                    multiply<T>(logits[j], a, b);
                }
            }
        }
        const int left = positions - tile * keys;
        if (left < keys) {
#pragma unroll
            for (int j = 0; j < keys / 16; ++j) {
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    if (16 * j + e / 4 * 8 + lane % 4 * 2 + e % 2 >= left) logits[j][e / 4][e % 4] = minus_infinity;
                }
            }
        }

        Operand<T> powers[keys / 16];
        float correction[2];
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
            float largest = maximum[lower];
#pragma unroll
            for (int j = 0; j < keys / 16; ++j) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    largest = fmaxf(largest, fmaxf(logits[j][half][2 * lower], logits[j][half][2 * lower + 1]));
                }
            }
            largest = fmaxf(largest, shuffle_xor(largest, 1));
            largest = fmaxf(largest, shuffle_xor(largest, 2));
            const auto held_against = LogSum<T>::of(largest);
            correction[lower] = exp2_approx((maximum[lower] - largest) * log2_e);
            maximum[lower] = largest;
            float sum = 0;
#pragma unroll
            for (int j = 0; j < keys / 16; ++j) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float& x = logits[j][half][2 * lower];
                    float& y = logits[j][half][2 * lower + 1];
                    x = held_against.power(x);
                    y = held_against.power(y);
                    sum += x + y;
                    set_pair<T>(powers[j], 2 * half + lower, x, y);
                }
            }
            total[lower] = total[lower] * correction[lower] + sum;
        }
#pragma unroll
        for (int j = 0; j < keys / 16; ++j) prepare<T>(powers[j]);
        if (tile) {
#pragma unroll
            for (int i = 0; i < width / 16; ++i) {
#pragma unroll
                for (int e = 0; e < 8; ++e) out[i][e / 4][e % 4] *= correction[e / 2 % 2];
            }
        }
#pragma unroll
        for (int p = 0; p < value_panels; ++p) {
            const T* const value_panel = next_panel();
#pragma unroll
            for (int i = 0; i < panel / 16; i += 2) {
                if (p * panel + 16 * i >= values) break;
#pragma unroll
                for (int j = 0; j < keys / 16; ++j) {
#pragma unroll
                    for (int n = i; n < i + 2; ++n) {
                        Right<T> b;
                        load_right<keys, false>(b, value_panel, 16 * n, 16 * j);
                        multiply<T>(out[p * (panel / 16) + n], powers[j], b);
                    }
                }
            }
        }
    }

    // out as an operand: rows are queries, the sum is over value channels.
    Operand<T> rounded[width / 16];
    float inverse[2];
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
        total[lower] += shuffle_xor(total[lower], 1);
        total[lower] += shuffle_xor(total[lower], 2);
        inverse[lower] = 1 / total[lower];
        const int q = first_query + warp_query + lane / 4 + 8 * lower;
        if (writes_out && blockIdx.y == 0 && lane % 4 == 0 && q < positions) {
            float* const lse = arguments.lse + image * 2 * positions + q;
            lse[0] = maximum[lower];
            lse[positions] = logf(total[lower]);
        }
    }
    T* const out_data = static_cast<T*>(arguments.out) + value_offset;
    const BlockResult<T> y{arguments.y, image, arguments.y_is_channels_last ? positions : channels,
                           arguments.y_is_channels_last ? channels : positions};
    const int row = first_query + warp_query;
#pragma unroll
    for (int i = 0; i < width / 16; ++i) {
        if (i % 2 == 0 && 16 * i >= values) break;  // what follows takes two at a time
        Pairs<T> turned;
        round_block<T>(rounded[i], out[i], inverse[0], inverse[1]);
        if (!writes_out) continue;
        if constexpr (sizeof(T) == 2) {
            Operand<T> rest;
            round_rest<T>(rest, out[i], inverse[0], inverse[1], rounded[i]);
            store_turned(out_data + arguments.out_part, values, positions, 16 * i, row, arguments.out_pairs, rest,
                         turned);
        }
        store_turned(out_data, values, positions, 16 * i, row, arguments.out_pairs, rounded[i], turned);
        if (!w_out && arguments.writes_y) {  // y = gamma out + x
            Pairs<T> residual;
            Block block;
            const int channel = first_value + 16 * i;
            const int y_row = arguments.y_is_channels_last ? row : channel,
                      y_column = arguments.y_is_channels_last ? channel : row;
            // Not in the form for whole blocks as well: there are up to 16 copies of this.
            y.load_pairs(std::false_type(), residual, y_row, y_column);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int lower = 0; lower < 2; ++lower) {
                    // turned holds {channels 0-7 × queries 0-7, 0-7 × 8-15, 8-15 × 0-7, 8-15 × 8-15}
                    const Pair<T> pair = arguments.y_is_channels_last ? pair_of<T>(rounded[i], 2 * half + lower)
                                                                      : turned[half + 2 * lower];
                    block[half][2 * lower] = left_of<T>(pair), block[half][2 * lower + 1] = right_of<T>(pair);
                }
            }
            y.store_pairs(std::false_type(), block, residual, y_row, y_column);
        }
    }
    if (!w_out) return;
#pragma unroll
    for (int i = 0; i < width / 16; ++i) prepare<T>(rounded[i]);

    const auto project = [&](auto last) {  // y is channels_last
        for (int channel = first_channel; channel < last_channel; channel += w_rows) {
            Block products[w_rows / 16] = {};
            Pairs<T> residual[w_rows / 16];
#pragma unroll
            for (int j = 0; j < w_rows / 16; ++j) {
                const int c = channel + 16 * j;
                y.load_residual(residual[j], last.value ? row : c, last.value ? c : row);
            }
#pragma unroll
            for (int p = 0; p < w_panels; ++p) {
                const T* const w_panel = next_panel();
#pragma unroll
                for (int i = 0; i < w_depth / 16; ++i) {
                    if (i % 2 == 0 && p * w_depth + 16 * i >= values) break;
                    const Operand<T>& o = rounded[p * (w_depth / 16) + i];
#pragma unroll
                    for (int j = 0; j < w_rows / 16; ++j) {
                        if constexpr (last.value) {
                            Right<T> w;
                            load_right<w_depth, false>(w, w_panel, 16 * j, 16 * i);
                            multiply<T>(products[j], o, w);
                        } else {
                            Operand<T> w;
                            load_operand<w_depth, false>(w, w_panel, 16 * j, 16 * i);
                            multiply<T>(products[j], w, Right<T>(o));
                        }
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < w_rows / 16; ++j) {
                const int c = channel + 16 * j;
                y.store(products[j], residual[j], last.value ? row : c, last.value ? c : row);
            }
        }
    };
    if (arguments.y_is_channels_last) project(std::true_type());
    else project(std::false_type());
}

}  // namespace
}  // namespace sabmn
