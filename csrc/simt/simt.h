// Runs CUDA kernels on a CPU, one thread of a block at a time, in an order that a seed decides. README.md says what it
// catches. A kernel sees CUDA's names (builtins.h), the meeting points below and the instructions of ptx.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <set>
#include <string>
#include <tuple>
#include <utility>

#include "simt/builtins.h"

namespace simt {

// Where a kernel called; as a default argument it is the caller's place.
struct Site {
    const char* file;
    int line;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

constexpr std::size_t shared_limit = 163 * 1024;  // of a block on sm_80, the smallest of the architectures served

// Stops the launch with an error that names kernel, block, thread and site.
[[noreturn]] void fail(const std::string& text, Site site);

// Waits for the other 31 lanes at the same `what` and site, and returns every lane's `mine`: [32][32 bytes].
const char (*meet(const char* what, unsigned mask, const void* mine, std::size_t bytes, Site site))[32];
int lane();

template <typename T>
const T& of_lane(const char (*all)[32], int lane) {
    return *reinterpret_cast<const T*>(all[lane]);
}

template <typename T>
T shuffled(const char* what, unsigned mask, T value, int source, Site site) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
    return of_lane<T>(meet(what, mask, &value, sizeof value, site), source >= 0 && source < 32 ? source : lane());
}

// cp.async: a copy that has left global memory and will reach shared memory when its thread waits for its group.
struct Copy {
    std::uint32_t* shared;
    std::uint32_t data[4];
};
void check_copy(const void* shared, const void* global, int bytes, Site site);
void start_copy(const Copy& copy);
void commit_copies();
bool land_copy(int groups_in_flight, Copy* copy);  // takes the next copy to land; false where there is none

// Makes memory as good as new: every float in it is NaN, and no earlier access can race with a later one.
void fill_with_nan(void* memory, std::size_t bytes);

void* dynamic_shared();
void order_fence();
void order_atomic();

// Of this process: the kernels launched so far, and the seed of the orders to come.
const std::set<std::string>& kernels_launched();
void set_seed(std::uint64_t seed);

// Calls thread(arguments) as each thread of each block.
cudaError_t run(const void* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, void (*thread)(const void*),
                const void* arguments);

template <typename... Parameters>
struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> arguments;

    static void thread(const void* call) {
        run(*static_cast<const Call*>(call), std::index_sequence_for<Parameters...>());
    }
    template <std::size_t... I>
    static void run(const Call& call, std::index_sequence<I...>) {
        call.kernel(std::get<I>(call.arguments)...);
    }
};

}  // namespace simt

void __syncthreads(simt::Site site = simt::Site::here());
void __syncwarp(unsigned mask = 0xffffffffu, simt::Site site = simt::Site::here());

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, simt::Site site = simt::Site::here()) {
    return simt::shuffled("__shfl_sync", mask, value, source & 31, site);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, simt::Site site = simt::Site::here()) {
    return simt::shuffled("__shfl_xor_sync", mask, value, simt::lane() ^ lane_mask, site);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, simt::Site site = simt::Site::here()) {
    return simt::shuffled("__shfl_down_sync", mask, value, simt::lane() + static_cast<int>(delta), site);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, simt::Site site = simt::Site::here()) {
    return simt::shuffled("__shfl_up_sync", mask, value, simt::lane() - static_cast<int>(delta), site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Site site = simt::Site::here()) {
    const auto all = simt::meet("__ballot_sync", mask, &predicate, sizeof predicate, site);
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= (simt::of_lane<int>(all, lane) != 0 ? 1u : 0u) << lane;
    return votes;
}

// What a thread wrote before its __threadfence is seen by who finds its later atomic operation done.
inline void __threadfence() { simt::order_fence(); }

// Integer atomics: in float the order of the sums, and with it the result, would change from run to run.
template <typename T, typename V>
T atomicAdd(T* address, V value) {
    static_assert(std::is_integral_v<T>, "only integers are added atomically");
    const T old = __atomic_fetch_add(address, static_cast<T>(value), __ATOMIC_RELAXED);
    simt::order_atomic();
    return old;
}

template <typename T, typename Change>
T atomic_change(T* address, Change change) {
    static_assert(std::is_integral_v<T>, "atomics are for integers");
    T old = __atomic_load_n(address, __ATOMIC_RELAXED);
    __atomic_store_n(address, change(old), __ATOMIC_RELAXED);  // no other thread runs in between
    simt::order_atomic();
    return old;
}

template <typename T, typename V>
T atomicMin(T* address, V value) {
    return atomic_change(address, [&](T old) { return min(old, static_cast<T>(value)); });
}

template <typename T, typename V>
T atomicMax(T* address, V value) {
    return atomic_change(address, [&](T old) { return max(old, static_cast<T>(value)); });
}

template <typename T, typename V>
T atomicExch(T* address, V value) {
    return atomic_change(address, [&](T) { return static_cast<T>(value); });
}

template <typename T, typename V>
T atomicCAS(T* address, V expected, V value) {
    return atomic_change(address, [&](T old) { return old == static_cast<T>(expected) ? static_cast<T>(value) : old; });
}

inline unsigned atomicInc(unsigned* address, unsigned limit) {
    return atomic_change(address, [&](unsigned old) { return old >= limit ? 0u : old + 1; });
}

// As in common/cuda.h under nvcc. A reference spares each thread its copy, which would take most of ThreadSanitizer's
// time.
#define SABMN_GRID_CONSTANT(T) const T&
#define SABMN_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(simt::dynamic_shared())

namespace sabmn {

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t,
                   Arguments&&... arguments) {
    using Call = simt::Call<Parameters...>;
    const Call call = {kernel, {std::forward<Arguments>(arguments)...}};
    return simt::run(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, Call::thread, &call);
}

}  // namespace sabmn

#include "simt/ptx.h"
