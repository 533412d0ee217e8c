// The 16-bit element types, and their conversion to and from float: rounded to nearest even, infinities kept, NaN stays NaN.
// No branches, so that loops over them are vectorised; `static`, since a copy for another instruction set must not replace it.
#pragma once

#include <cstdint>

namespace sabmn {

struct BFloat16 {
    std::uint16_t bits;
};

struct Float16 {
    std::uint16_t bits;
};

static inline std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(std::uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

// What sums are taken in: float for the 16-bit types, else the type itself.
template <typename T>
struct WideOf {
    typedef float Type;
};
template <>
struct WideOf<double> {
    typedef double Type;
};
template <typename T>
using Wide = typename WideOf<T>::Type;

static inline float widen(float value) { return value; }
static inline double widen(double value) { return value; }
static inline float widen(BFloat16 value) { return float_of(static_cast<std::uint32_t>(value.bits) << 16); }
static inline float widen(Float16 value) {
    const std::uint32_t magnitude = value.bits & 0x7fffu;
    // As a float's exponent and mantissa the bits are 2¹¹² too small. A subnormal number's, put under the exponent of
    // 2⁻¹⁴, are 2⁻¹⁴ too much; no step makes a subnormal float of them (subnormals.h).
    const std::uint32_t normal = (magnitude << 13) + 0x38000000u;
    const std::uint32_t subnormal = bits_of(float_of((magnitude << 13) + 0x38800000u) - 0x1p-14f);
    const std::uint32_t finite = magnitude < 0x400u ? subnormal : normal;
    const std::uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
    return float_of(finite | special | (static_cast<std::uint32_t>(value.bits & 0x8000u) << 16));
}

static inline void narrow(float value, float& out) { out = value; }
static inline void narrow(double value, double& out) { out = value; }
static inline void narrow(float value, BFloat16& out) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out.bits = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
static inline void narrow(float value, Float16& out) {
    const std::uint32_t sign = bits_of(value) & 0x80000000u, magnitude = bits_of(value) ^ sign;
    const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding ½ shifts a subnormal number's bits to the lowest ten, and rounds them.
    const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    const std::uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const std::uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    out.bits = static_cast<std::uint16_t>((magnitude >= 0x47800000u ? special : finite) | (sign >> 16));
}

}  // namespace sabmn
