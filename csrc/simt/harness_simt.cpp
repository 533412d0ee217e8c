// The harness's own tests: right kernels pass, and a planted fault (the tests named planted_...) ends the program with
// a message that python_tests/simt/test_harness.py expects.

#include "simt/harness_kernels.cuh"
#include "simt/test.h"

namespace {

using simt::Buffer;

template <typename T, Fault fault>
void transpose() {
    const int rows = simt::random_int(33, 63), columns = simt::random_int(65, 95);  // never multiples of the tile
    const Buffer<T> in = simt::random<T>(rows * columns), out = simt::empty<T>(rows * columns);
    const dim3 grid((columns + tile - 1) / tile, (rows + tile - 1) / tile);
    simt::succeeds(launch(transpose_kernel<T, fault>, grid, dim3(tile, tile_rows), 0, nullptr, in.data(), out.data(),
                          rows, columns));
    simt::compare("out", out, [&](auto& expected) {
        for (int i = 0; i < rows * columns; ++i) expected[i] = in[i % rows * columns + i / rows];
    });
}

template <Fault fault>
void sum() {
    const int blocks = simt::random_int(2, 6), threads = 32 * simt::random_int(2, 5);
    const int size = (blocks - 1) * threads + simt::random_int(1, threads - 1);
    const Buffer<float> x = simt::random<float>(size), sums = simt::empty<float>(blocks), total = simt::empty<float>(1);
    const Buffer<unsigned> finished = simt::empty<unsigned>(1);
    finished[0] = 0;
    simt::succeeds(launch(sum_kernel<fault>, blocks, threads, threads / 32 * sizeof(float), nullptr, x.data(),
                          sums.data(), total.data(), finished.data(), size));
    simt::compare("total", total, [&](auto& expected) {
        expected[0] = 0;
        for (const float value : x) expected[0] += value;
    });
}

template <typename T, Fault fault>
void matmul() {
    const int m = simt::random_int(33, 63), n = simt::random_int(33, 63), k = simt::random_int(49, 63);
    const int lda = (k + 7) / 8 * 8, ldb = (n + 7) / 8 * 8;
    const Buffer<T> a = simt::random<T>(m * lda), b = simt::random<T>(k * ldb);
    const Buffer<float> c = simt::empty<float>(m * n);
    const dim3 grid((n + mma_n - 1) / mma_n, (m + mma_m - 1) / mma_m);
    const std::size_t shared_bytes = matmul_shared_bytes - (fault == shared_overrun ? 2 : 0);
    simt::succeeds(launch(matmul_kernel<T, fault>, grid, 64, shared_bytes, nullptr, a.data(), b.data(), c.data(), m, n,
                          k, lda, ldb));
    simt::compare("c", c, [&](auto& expected) {
        for (int i = 0; i < m * n; ++i) {
            expected[i] = 0;
            for (int j = 0; j < k; ++j) {
                expected[i] += static_cast<decltype(expected[i] + 0)>(a[i / n * lda + j]) * b[j * ldb + i % n];
            }
        }
    });
}

}  // namespace

SIMT_TEST(transpose, float, double, bf16, f16) { transpose<T, none>(); }
SIMT_TEST(sum) { sum<none>(); }
SIMT_TEST(matmul, bf16, f16) { matmul<T, none>(); }

SIMT_TEST(tensor_cores_cut_off) {
    simt::expect(tensor_core_sum({1.0, 0x1p-24, 0x1p-24}) == 1.0f, "terms below the last bit count");
    simt::expect(tensor_core_sum({1.0, -0x1.8p-23}) == 1.0f - 0x1p-23f, "a term is rounded");
    simt::expect(tensor_core_sum({1.5, 1.5, 0x1p-23}) == 3.0f, "the sum is rounded");
}

SIMT_TEST(planted_missing_barrier) { transpose<float, missing_barrier>(); }
SIMT_TEST(planted_missing_guard) { transpose<float, missing_guard>(); }
SIMT_TEST(planted_static_overrun) { transpose<float, shared_overrun>(); }
SIMT_TEST(planted_divergent_barrier) { transpose<float, divergent_barrier>(); }
SIMT_TEST(planted_two_barriers) { transpose<float, two_barriers>(); }
SIMT_TEST(planted_dynamic_overrun) { sum<shared_overrun>(); }
SIMT_TEST(planted_partial_mask) { sum<partial_mask>(); }
SIMT_TEST(planted_missing_fence) { sum<missing_fence>(); }
SIMT_TEST(planted_shared_output) { sum<shared_output>(); }
SIMT_TEST(planted_missing_wait) { matmul<bf16, missing_wait>(); }
SIMT_TEST(planted_missing_second_barrier) { matmul<bf16, missing_barrier>(); }
