// What the harness says to the sanitizers, and nothing in a plain build. The harness's own files are compiled without
// instrumentation, so the build names the sanitizer by SIMT_ASAN or SIMT_TSAN.
#pragma once

#include <cstddef>

#if SIMT_ASAN
#include <sanitizer/common_interface_defs.h>
#elif SIMT_TSAN
#include <sanitizer/common_interface_defs.h>
#include <sanitizer/tsan_interface.h>
// Of ThreadSanitizer's interface for Java: "this memory was newly allocated" and "it was freed", for any memory.
extern "C" void __tsan_java_alloc(const void* memory, std::size_t bytes);
extern "C" void __tsan_java_free(const void* memory, std::size_t bytes);
#endif

namespace simt {

// ThreadSanitizer's happens-before: everything before release(token) in one thread, and after acquire(token) in
// another.
inline void release([[maybe_unused]] void* token) {
#if SIMT_TSAN
    __tsan_release(token);
#endif
}

inline void acquire([[maybe_unused]] void* token) {
#if SIMT_TSAN
    __tsan_acquire(token);
#endif
}

// Accesses to this memory so far cannot race with later ones: it is given out anew.
inline void forget_history([[maybe_unused]] const void* memory, [[maybe_unused]] std::size_t bytes) {
#if SIMT_TSAN
    if (bytes == 0) return;
    __tsan_java_alloc(memory, bytes);
    __tsan_java_free(memory, bytes);
#endif
}

// Calls `last_words` when a sanitizer ends the program.
inline void call_at_death([[maybe_unused]] void (*last_words)()) {
#if SIMT_ASAN || SIMT_TSAN
    __sanitizer_set_death_callback(last_words);
#endif
}

}  // namespace simt
