// The gradients of query, key and value where an image has at most 128 positions, in bf16 and f16: one block makes all
// three, and finds p and e of attention_backward_kernels.cuh once.
//
// First the logits and the slopes, a warp 32 queries × 64 keys of both, which stay in its registers. Then e goes to
// shared memory, where it is an operand for grad_query as it stands and for grad_key transposed; and after these, in
// its place, p for grad_value. A warp makes 32 positions × 32 channels of a gradient at a time.
//
// Queries, keys, values and context come as panels of 64 channels, two at a time, while the two before are multiplied:
// for each 64 channels query and key; context and value; query and key again; context again.
#pragma once

#include "attention/attention_backward_kernels.cuh"

namespace sabmn {
namespace {

constexpr int block_positions = 128, block_panel = 64, block_threads = 256;
constexpr int block_panel_elements = block_panel * block_positions;
// p or e, and two times two panels; the 99 KB of a block on sm_120 are enough.
constexpr int block_shared_bytes = 2 * (block_positions * block_positions + 4 * block_panel_elements);

template <typename T>
__global__ void __launch_bounds__(block_threads, 1)
    attention_backward_block_kernel(SABMN_GRID_CONSTANT(BackwardArguments) arguments) {
    constexpr int length = block_positions, panel = block_panel, size = block_panel_elements;
    SABMN_DYNAMIC_SHARED(T, shared);
    T *const weights = shared, *const ring = shared + length * length;  // [query][key]; [2][2 panels]
    const int positions = arguments.positions;
    const std::int64_t image = blockIdx.x;
    const int a_panels = ceil_div(arguments.key_width, panel), b_panels = ceil_div(arguments.value_width, panel);
    const int phase_steps = a_panels + b_panels, steps = 2 * phase_steps;

    const auto fetch_panel = [&](T* to, const void* from, int width, int p) {
        const int left = width - p * panel;
        const Panel<T> rows = {static_cast<const T*>(from) + (image * width + p * panel) * positions,
                               positions,
                               min(ceil_div(left, 32) * 32, panel),
                               left,
                               positions,
                               arguments.vectors};
        rows.template copy_to<length, block_threads>(to);
    };
    const auto fetch = [&](int step) {
        if (step < steps) {
            const bool second = step >= phase_steps;
            const int in_phase = step - (second ? phase_steps : 0);
            const bool is_b = in_phase >= a_panels;
            const int p = in_phase - (is_b ? a_panels : 0), width = is_b ? arguments.value_width : arguments.key_width;
            T* const to = ring + step % 2 * 2 * size;
            fetch_panel(to, is_b ? arguments.context : arguments.query, width, p);
            if (!second || !is_b) fetch_panel(to + size, is_b ? arguments.value : arguments.key, width, p);
        }
        cp_async_commit();
    };
    int step = 0;
    const auto next_panels = [&]() -> const T* {
        cp_async_wait<0>();
        __syncthreads();
        fetch(step + 1);
        return ring + step++ % 2 * 2 * size;
    };
    fetch(0);

    const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
    const int first_query = warp / 2 * 32, first_key = warp % 2 * 64;
    const bool idle = first_query >= positions || first_key >= positions;
    // d[query, key] += Σ over the channels
    const auto product = [&](Block(&d)[2][4], int panels, int width) {
        for (int p = 0; p < panels; ++p) {
            const T* const both = next_panels();
            const int depth = idle ? 0 : min(width - p * panel, panel);
#pragma unroll 1
            for (int k = 0; k < depth; k += 16) {
                Operand<T> left[2];
                Right<T> right;
                load_operand<length, true>(left[0], both, first_query, k);
                load_operand<length, true>(left[1], both, first_query + 16, k);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    load_right<length, true>(right, both + size, first_key + 16 * j, k);
                    multiply<T>(d[0][j], left[0], right);
                    multiply<T>(d[1][j], left[1], right);
                }
            }
        }
    };
    Operand<T> p_rounded[2][4];
    // All of a warp's blocks, also those beyond the last position, where p and e are 0: a gradient reads 32 rows at a time.
    const auto for_blocks = [&](const auto& work) {
        if (idle) return;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) work(i, j);
        }
    };
    const auto keep = [&](const Operand<T>& block, int i, int j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int row = first_query + 16 * i + e % 2 * 8 + lane / 4, column = first_key + 16 * j + e / 2 * 8;
            T* const to = weights + chunk_place<T>(length / chunk_size<T>, row, column / chunk_size<T>) + lane % 4 * 2;
            *reinterpret_cast<Pair<T>*>(to) = pair_of<T>(block, e);
        }
    };
    {
        Block p[2][4] = {}, e[2][4] = {};
        product(p, a_panels, arguments.key_width);
        product(e, b_panels, arguments.value_width);
        const float* const lse = arguments.lse + image * 2 * positions;
        LogSum<T> log_sum[2][2];
        float term[2][2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int j = first_query + 16 * (i / 2) + 8 * (i % 2) + lane / 4;
            log_sum[i / 2][i % 2] =
                j < positions ? LogSum<T>::of(lse[j], lse[positions + j]) : LogSum<T>::of(INFINITY);
            term[i / 2][i % 2] = j < positions ? arguments.row_term[image * positions + j] : 0.0f;
        }
        for_blocks([&](int i, int j) {
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const int half = n / 4, lower = n / 2 % 2;
                const int column = first_key + 16 * j + 8 * half + lane % 4 * 2 + n % 2;
                float& power = p[i][j][half][n % 4];
                float& slope = e[i][j][half][n % 4];
                power = column < positions ? log_sum[i][lower].power(power) : 0.0f;
                slope = power * (slope - term[i][lower]);
            }
            round_block<T>(p_rounded[i][j], p[i][j], 1, 1);
            Operand<T> e_rounded;
            round_block<T>(e_rounded, e[i][j], 1, 1);
            keep(e_rounded, i, j);
        });
    }

    const float gamma = *arguments.gamma, gamma_of_logits = positions > 1 ? gamma : 0;  // one key has all the attention
    const int first_row = warp / 2 * 32, first_channel = warp % 2 * 32;  // of a gradient
    // One panel of a gradient: gamma · the weights, or their transpose, times a panel.
    const auto gradient = [&](auto transposed, const T* from, void* to, int width, int p, float scale) {
        const int channels = width - p * panel;
        if (first_row >= positions || first_channel >= channels) return;
        Block sums[2][2] = {};
#pragma unroll 1
        for (int k = 0; k < positions; k += 16) {
            Operand<T> left[2];
            Right<T> right;
            load_operand<length, transposed.value>(left[0], weights, first_row, k);
            load_operand<length, transposed.value>(left[1], weights, first_row + 16, k);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                load_right<length, false>(right, from, first_channel + 16 * j, k);
                multiply<T>(sums[0][j], left[0], right);
                multiply<T>(sums[1][j], left[1], right);
            }
        }
        T* const data = static_cast<T*>(to) + (image * width + p * panel) * positions;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                Operand<T> rounded;
                Pairs<T> turned;
                round_block<T>(rounded, sums[i][j], scale, scale);
                store_turned(data, channels, positions, first_channel + 16 * j, first_row + 16 * i, arguments.pairs,
                             rounded, turned);
            }
        }
    };
    const std::true_type transposed;
    const std::false_type as_it_stands;
    for (int p = 0; p < a_panels; ++p) {
        const T* const both = next_panels();
        gradient(as_it_stands, both + size, arguments.grad_query, arguments.key_width, p, gamma_of_logits);
        gradient(transposed, both, arguments.grad_key, arguments.key_width, p, gamma_of_logits);
    }
    __syncthreads();  // e is no longer needed
    for_blocks([&](int i, int j) { keep(p_rounded[i][j], i, j); });
    for (int p = 0; p < b_panels; ++p) {
        gradient(transposed, next_panels(), arguments.grad_value, arguments.value_width, p, gamma);
    }
}

}  // namespace
}  // namespace sabmn
