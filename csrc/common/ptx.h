// Warp shuffles, and the instructions that CUDA C++ has no name for: one thin function each, so that little can hide in
// them. csrc/simt/ptx.h holds the same functions in plain C++.
#pragma once

#include <cstdint>
#include <type_traits>

namespace sabmn {

struct bf16;
struct f16;

// Between float and the bits of a bfloat16 or float16; to the nearest, ties to even.
__device__ inline std::uint16_t bf16_bits(float x) {
    std::uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

__device__ inline std::uint16_t f16_bits(float x) {
    std::uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

__device__ inline float bf16_value(std::uint16_t bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }

__device__ inline float f16_value(std::uint16_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

// Two neighbours in one register, as mma_m16n8k16 takes them. T is bf16 or f16.
template <typename T>
__device__ inline std::uint32_t pack(float low, float high) {
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>, "pack makes bf16 or f16");
    std::uint32_t both;
    if constexpr (std::is_same_v<T, bf16>) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    }
    return both;
}

// The value of another lane, for a whole warp: of lane ^ lane_mask, of lane + delta (own value past the end), of
// `lane`.
template <typename T>
__device__ T shuffle_xor(T value, int lane_mask) {
    return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

template <typename T>
__device__ T shuffle_down(T value, unsigned delta) {
    return __shfl_down_sync(0xffffffffu, value, delta);
}

template <typename T>
__device__ T shuffle(T value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}

// 16 bytes to shared memory, at a multiple of 16. In C++ the compiler may split the store where some of the words are
// zero on one path, and the parts have bank conflicts.
__device__ inline void store_shared_16(void* shared, uint4 words) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words.x), "r"(words.y), "r"(words.z),
                 "r"(words.w)
                 : "memory");
}

// 16 bytes from global to shared memory, in flight until a cp_async_wait; both addresses are multiples of 16. Of
// `bytes` (0 to 16) only so many are read, the rest of the 16 becomes zero.
__device__ inline void cp_async_16(void* shared, const void* global, int bytes = 16) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}

// Closes the group of this thread's copies since the last commit.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the latest N groups of this thread have landed. Other threads see them after a __syncthreads.
template <int N>
__device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8x8 matrices of 16-bit elements from shared memory. Lane l names row l % 8 of matrix l / 8 (16 bytes, aligned);
// it receives, of each matrix, elements 2(l % 4) and 2(l % 4) + 1 of row l / 4 ...
__device__ inline void ldmatrix_x4(std::uint32_t (&matrices)[4], const void* row) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address)
                 : "memory");
}

// ... or, transposed, of column l / 4.
__device__ inline void ldmatrix_x4_trans(std::uint32_t (&matrices)[4], const void* row) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address)
                 : "memory");
}

// An 8x8 matrix of 16-bit elements, held as ldmatrix gives it, transposed.
__device__ inline std::uint32_t transpose_8x8(std::uint32_t matrix) {
    std::uint32_t transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(matrix));
    return transposed;
}

// d += a b for a [16, 16], b [16, 8], d [16, 8]; with g = lane / 4 and t = lane % 4 a lane holds
//   a: {a[g][2t..], a[g+8][2t..], a[g][2t+8..], a[g+8][2t+8..]} two elements a register, the left one in the low half
//   b: {b[2t..][g], b[2t+8..][g]}                               two elements a register, the upper one in the low half
//   d: {d[g][2t], d[g][2t+1], d[g+8][2t], d[g+8][2t+1]}
template <typename T>
__device__ inline void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>, "mma_m16n8k16 multiplies bf16 or f16");
    if constexpr (std::is_same_v<T, bf16>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

// The nearest TF32 number, of 10 bits after the point; ties away from zero.
__device__ inline std::uint32_t tf32_bits(float x) {
    std::uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

// d += a b for TF32 a [16, 8], b [8, 8], d [16, 8] as above; a lane holds
//   a: {a[g][t], a[g+8][t], a[g][t+4], a[g+8][t+4]}
//   b: {b[t][g], b[t+4][g]}
__device__ inline void mma_m16n8k8_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 2^x with an error of about 2 units in the last place; results below 2^-126 are 0.
__device__ inline float exp2_approx(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

}  // namespace sabmn
