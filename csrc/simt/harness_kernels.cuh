// Kernels for the harness's own tests. Each is right where Fault is `none`; any other value plants one fault, which the
// tests (harness_simt.cpp) expect to be caught.
#pragma once

#include "common/cuda.h"

namespace {

using namespace sabmn;

enum Fault {
    none,
    missing_barrier,
    missing_guard,      // threads beyond the matrix write
    shared_overrun,     // one element past the shared memory
    missing_wait,       // cp.async data used before it has landed
    divergent_barrier,  // some threads return, the others wait
    two_barriers,       // some threads wait at one barrier, the others at another
    partial_mask,
    missing_fence,      // results of other blocks read without an order
    shared_output,      // two blocks write the same element
};

constexpr int tile = 32, tile_rows = 8;

// out = inᵀ; a block of 32 x 8 threads moves a tile of 32 x 32 through shared memory.
template <typename T, Fault fault>
__global__ void transpose_kernel(const T* in, T* out, int rows, int columns) {  // in: [rows, columns]
    __shared__ T values[tile][tile + 1];
    const int row0 = blockIdx.y * tile, column0 = blockIdx.x * tile, x = threadIdx.x;
    for (int y = threadIdx.y; y < tile; y += tile_rows) {
        if (row0 + y < rows && column0 + x < columns) values[y][x] = in[(row0 + y) * columns + column0 + x];
    }
    if (fault == shared_overrun && x == 0) (&values[0][0])[tile * (tile + 1) + threadIdx.y] = in[0];
    if (fault == divergent_barrier && threadIdx.y == 3) return;
    if (fault == two_barriers && threadIdx.y == 3) {
        __syncthreads();
    } else if (fault != missing_barrier) {
        __syncthreads();
    }
    for (int y = threadIdx.y; y < tile; y += tile_rows) {
        if ((column0 + y < columns || fault == missing_guard) && row0 + x < rows) {
            out[(column0 + y) * rows + row0 + x] = values[x][y];
        }
    }
}

// sums[b] = the sum of block b's part of x, and *total their sum, made by the block that finishes last.
template <Fault fault>
__global__ void sum_kernel(const float* x, float* sums, float* total, unsigned* finished, int size) {
    SABMN_DYNAMIC_SHARED(float, partial);  // one for each warp
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, warps = blockDim.x / 32;
    const int i = blockIdx.x * blockDim.x + thread;
    float sum = i < size ? x[i] : 0.0f;
    const unsigned mask = fault == partial_mask ? 0xffffu : 0xffffffffu;
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(mask, sum, distance);
    if (lane == 0) partial[warp + (fault == shared_overrun)] = sum;
    __syncthreads();
    if (warp > 0) return;
    sum = lane < warps ? partial[lane] : 0.0f;
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane > 0) return;
    sums[fault == shared_output ? 0 : blockIdx.x] = sum;
    if (fault != missing_fence) __threadfence();
    if (atomicAdd(finished, 1u) + 1 < gridDim.x) return;
    sum = 0;
    for (int block = 0; block < static_cast<int>(gridDim.x); ++block) sum += sums[block];
    *total = sum;
}

constexpr int mma_m = 32, mma_n = 32, mma_k = 16;

// c = a b; two warps make a tile of 32 x 32, each 16 rows. Slices of 16 columns of a and rows of b come by cp.async
// into two buffers, one slice ahead; what lies beyond the matrices is filled with zeros.
template <typename T, Fault fault>
__global__ void __launch_bounds__(64) matmul_kernel(const T* __restrict__ a,  // [m, lda]  lda, ldb: multiples of 8
                                                    const T* __restrict__ b,  // [k, ldb]
                                                    float* __restrict__ c,    // [m, n]
                                                    int m, int n, int k, int lda, int ldb) {
    SABMN_DYNAMIC_SHARED(T, shared);
    constexpr int a_size = mma_m * mma_k, slice_size = a_size + mma_k * mma_n;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int row0 = blockIdx.y * mma_m, column0 = blockIdx.x * mma_n;
    const auto bytes_within = [](int column, int columns) { return 2 * max(0, min(8, columns - column)); };
    const auto fetch = [&](int slice) {
        T* const a_slice = shared + slice % 2 * slice_size;
        T* const b_slice = a_slice + a_size;
        const int a_row = thread / 2, a_column = thread % 2 * 8, b_row = thread / 4, b_column = thread % 4 * 8;
        const int row = row0 + a_row, inner_column = slice * mma_k + a_column;
        const int a_bytes = row < m ? bytes_within(inner_column, k) : 0;
        cp_async_16(a_slice + a_row * mma_k + a_column, a_bytes ? a + row * lda + inner_column : a, a_bytes);
        const int inner_row = slice * mma_k + b_row, column = column0 + b_column;
        const int b_bytes = inner_row < k ? bytes_within(column, n) : 0;
        cp_async_16(b_slice + b_row * mma_n + b_column, b_bytes ? b + inner_row * ldb + column : b, b_bytes);
        cp_async_commit();
    };
    float sums[4][4] = {};
    const int slices = (k + mma_k - 1) / mma_k;
    fetch(0);
    for (int slice = 0; slice < slices; ++slice) {
        if (slice + 1 < slices) fetch(slice + 1);
        else cp_async_commit();
        if (fault != missing_wait) cp_async_wait<1>();
        __syncthreads();
        const T* const a_slice = shared + slice % 2 * slice_size;
        const T* const b_slice = a_slice + a_size;
        std::uint32_t a_part[4];
        ldmatrix_x4(a_part, a_slice + (16 * warp + lane % 16) * mma_k + lane / 16 * 8);
        for (int half = 0; half < 2; ++half) {
            std::uint32_t b_part[4];
            ldmatrix_x4_trans(b_part, b_slice + lane % 16 * mma_n + 16 * half + lane / 16 * 8);
            mma_m16n8k16<T>(sums[2 * half], a_part, {b_part[0], b_part[1]});
            mma_m16n8k16<T>(sums[2 * half + 1], a_part, {b_part[2], b_part[3]});
        }
        if (fault != missing_barrier) __syncthreads();  // before the next fetch overwrites this slice
    }
    for (int part = 0; part < 4; ++part) {
        for (int i = 0; i < 4; ++i) {
            const int row = row0 + 16 * warp + lane / 4 + i / 2 * 8, column = column0 + 8 * part + lane % 4 * 2 + i % 2;
            if (row < m && column < n) c[row * n + column] = sums[part][i];
        }
    }
}

constexpr std::size_t matmul_shared_bytes = 2 * 2 * (mma_m * mma_k + mma_k * mma_n);

}  // namespace
