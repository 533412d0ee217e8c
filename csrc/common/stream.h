// Copies to memory past the caches: for outputs too long to be there still when they are read, a plain store would first
// fetch every line that it overwrites.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sabmn {

#if defined(__AVX512F__)
typedef __m512i StreamVector;
static inline void stream_vector(void* out, const void* in) {
    _mm512_stream_si512(static_cast<__m512i*>(out), _mm512_loadu_si512(in));
}
#elif defined(__AVX2__)
typedef __m256i StreamVector;
static inline void stream_vector(void* out, const void* in) {
    _mm256_stream_si256(static_cast<__m256i*>(out), _mm256_loadu_si256(static_cast<const __m256i*>(in)));
}
#elif defined(__x86_64__)
typedef __m128i StreamVector;
static inline void stream_vector(void* out, const void* in) {
    _mm_stream_si128(static_cast<__m128i*>(out), _mm_loadu_si128(static_cast<const __m128i*>(in)));
}
#endif

// Other threads see the copies after stream_fence().
static inline void stream(void* out, const void* in, std::int64_t bytes) {
    char* to = static_cast<char*>(out);
    const char* from = static_cast<const char*>(in);
#if defined(__x86_64__)
    constexpr std::int64_t size = sizeof(StreamVector);
    std::int64_t head = -reinterpret_cast<std::intptr_t>(to) & (size - 1);
    head = head < bytes ? head : bytes;
    __builtin_memcpy(to, from, head);
    std::int64_t done = head;
    for (; done + size <= bytes; done += size) stream_vector(to + done, from + done);
    to += done, from += done, bytes -= done;
#endif
    __builtin_memcpy(to, from, bytes);
}

static inline void stream_fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

}  // namespace sabmn
