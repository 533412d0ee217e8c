// Tests of kernels: a name, the element types, buffers of exact size with seeded random values, the host function that
// launches the kernel as it is, and a comparison with float64. README.md has a complete example.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <typeinfo>
#include <utility>
#include <vector>

#include "common/cuda.h"

namespace simt {

// Device memory of exactly `size` elements at a multiple of 256 bytes, as cudaMalloc gives it, filled with NaN bytes.
template <typename T>
class Buffer {
  public:
    explicit Buffer(std::size_t size) : size_(size), memory_(allocate(size), std::free) {}
    T* data() const { return memory_.get(); }
    std::size_t size() const { return size_; }
    T* begin() const { return data(); }
    T* end() const { return data() + size_; }
    T& operator[](std::size_t i) const { return memory_.get()[i]; }

  private:
    static T* allocate(std::size_t size) {
        void* memory = nullptr;
        if (posix_memalign(&memory, 256, size * sizeof(T)) != 0) throw std::bad_alloc();
        fill_with_nan(memory, size * sizeof(T));
        return static_cast<T*>(memory);
    }
    std::size_t size_;
    std::unique_ptr<T, decltype(&std::free)> memory_;
};

template <typename T>
Buffer<T> empty(std::size_t size) {
    return Buffer<T>(size);
}

std::mt19937_64& values();  // the generator of this run's values

template <typename T>
Buffer<T> random(std::size_t size, double low = -1, double high = 1) {
    Buffer<T> buffer(size);
    std::uniform_real_distribution<double> distribution(low, high);
    for (T& x : buffer) x = static_cast<T>(distribution(values()));
    return buffer;
}

inline int random_int(int low, int high) { return std::uniform_int_distribution<int>(low, high)(values()); }

inline void expect(bool condition, const std::string& what) {
    if (!condition) throw std::runtime_error(what);
}

inline void succeeds(cudaError_t status) { expect(status == cudaSuccess, cudaGetErrorString(status)); }

template <typename T>
double epsilon() {
    if constexpr (std::is_same_v<T, sabmn::bf16>) return 0x1p-7;
    else if constexpr (std::is_same_v<T, sabmn::f16>) return 0x1p-10;
    else return std::numeric_limits<T>::epsilon();
}

// What one rounding does to the result of a formula that was computed in float.
void compare_by_rule(const std::string& what, const std::vector<double>& ours, const std::vector<double>& plain,
                     const std::vector<double>& reference, double epsilon, bool is_double);

// `formula(out)` fills out, a std::vector<S>&, computing in S: in double it is the reference, in float (rounded to T)
// the plain result. Ours may be as far from the reference as the plain one and little more, by
// python_tests/float64_rule.py.
template <typename T, typename Formula>
void compare(const std::string& what, const Buffer<T>& ours, Formula formula) {
    std::vector<double> reference(ours.size());
    formula(reference);
    std::vector<std::conditional_t<std::is_same_v<T, double>, double, float>> computed(ours.size());
    formula(computed);
    std::vector<double> plain;
    for (const auto x : computed) plain.push_back(static_cast<double>(static_cast<T>(x)));
    compare_by_rule(what, std::vector<double>(ours.begin(), ours.end()), plain, reference, epsilon<T>(),
                    std::is_same_v<T, double>);
}

struct Test {
    std::string name;
    std::function<void()> body;
};
std::vector<Test>& tests();

template <typename T>
struct Type {
    using type = T;
};

template <typename... T, typename Body>
bool add_test(const std::string& name, Body body) {
    if constexpr (sizeof...(T) == 0) tests().push_back({name, [=] { body(Type<void>()); }});
    else tests().push_back({name, [=] { (body(Type<T>()), ...); }});
    return true;
}

}  // namespace simt

// SIMT_TEST(name, types...) { body } runs the body once for each of the types, as T; without types once.
#define SIMT_TEST(name, ...)                                                                                     \
    template <typename T>                                                                                        \
    static void name##_test();                                                                                   \
    [[maybe_unused]] static const bool name##_added =                                                            \
        simt::add_test<__VA_ARGS__>(#name, [](auto type) { name##_test<typename decltype(type)::type>(); });     \
    template <typename T>                                                                                        \
    static void name##_test()
