// Arithmetic without subnormal numbers.
#pragma once

#include "common/isa.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace sabmn {
namespace SABMN_ISA {

// While one lives, this thread's arithmetic takes numbers below the smallest normal one for zero, as GPUs' fast
// arithmetic does. On Intel's processors an instruction with such a number takes some hundred cycles, and a softmax is
// full of them once its logits differ by 80 and more, as those of trained networks do. Elsewhere they cost little.
class SubnormalsAreZero {
public:
#if defined(__x86_64__)
    SubnormalsAreZero() : before(_mm_getcsr()) { _mm_setcsr(before | flush_to_zero | denormals_are_zero); }
    ~SubnormalsAreZero() { _mm_setcsr(before); }

private:
    static constexpr unsigned flush_to_zero = 0x8000, denormals_are_zero = 0x40;
    const unsigned before;
#else
    SubnormalsAreZero() {}
    ~SubnormalsAreZero() {}
#endif
    SubnormalsAreZero(const SubnormalsAreZero&) = delete;
    SubnormalsAreZero& operator=(const SubnormalsAreZero&) = delete;
};

}  // namespace SABMN_ISA
}  // namespace sabmn
