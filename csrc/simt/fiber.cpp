// A switch saves the registers that a function must preserve, and exchanges stack pointers: 2 ns, where swapcontext
// makes two system calls. This file is compiled without sanitizers: code that runs between two stacks cannot be
// instrumented.

#include "simt/fiber.h"

#include <sys/mman.h>

#include <cstddef>
#include <cstdio>
#include <stdexcept>

#include "simt/sanitizer.h"

extern "C" void simt_switch(void** save, void* load);

#if defined(__x86_64__)
asm(R"(
    .text
    .type simt_switch, @function
simt_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
    .size simt_switch, . - simt_switch
)");
constexpr int saved_words = 8, entry_word = 6;  // rbp rbx r12-r15, the entry, and the entry's (absent) return address
#elif defined(__aarch64__)
asm(R"(
    .text
    .type simt_switch, @function
simt_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size simt_switch, . - simt_switch
)");
constexpr int saved_words = 20, entry_word = 11;  // x19-x30, d8-d15
#else
#error "csrc/simt/fiber.cpp knows x86-64 and aarch64"
#endif

namespace simt {
namespace {

constexpr std::size_t page = 65536;  // a multiple of every page size in use
constexpr std::size_t stack_bytes = 2 * page;

void* scheduler_pointer;  // where the scheduler was left
Fiber* running;

#if SIMT_ASAN
const void* scheduler_stack;
std::size_t scheduler_stack_bytes;
#elif SIMT_TSAN
void* const scheduler_fiber = __tsan_get_current_fiber();
#endif

}  // namespace

Fiber::Fiber() {
    void* memory = mmap(nullptr, page + stack_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
        throw std::runtime_error("no memory for a thread's stack");
    }
    stack_ = static_cast<char*>(memory) + page;  // an overflow meets the page below
    void** frame = reinterpret_cast<void**>(stack_ + stack_bytes) - saved_words;
    frame[entry_word] = reinterpret_cast<void*>(&Fiber::run);
    stack_pointer_ = frame;
#if SIMT_TSAN
    sanitizer_ = __tsan_create_fiber(0);
#endif
}

void Fiber::start(void (*entry)(), [[maybe_unused]] unsigned x, [[maybe_unused]] unsigned y,
                  [[maybe_unused]] unsigned z) {
    entry_ = entry;
#if SIMT_TSAN
    char name[48];
    std::snprintf(name, sizeof name, "thread (%u, %u, %u)", x, y, z);
    __tsan_set_fiber_name(sanitizer_, name);
#endif
}

void Fiber::resume() {
    running = this;
#if SIMT_ASAN
    void* fake_stack;
    __sanitizer_start_switch_fiber(&fake_stack, stack_, stack_bytes);
#elif SIMT_TSAN
    __tsan_switch_to_fiber(sanitizer_, __tsan_switch_to_fiber_no_sync);
#endif
    simt_switch(&scheduler_pointer, stack_pointer_);
#if SIMT_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void Fiber::suspend() {
    Fiber* self = running;
#if SIMT_ASAN
    __sanitizer_start_switch_fiber(&self->sanitizer_, scheduler_stack, scheduler_stack_bytes);
#elif SIMT_TSAN
    __tsan_switch_to_fiber(scheduler_fiber, __tsan_switch_to_fiber_no_sync);
#endif
    simt_switch(&self->stack_pointer_, scheduler_pointer);
#if SIMT_ASAN
    __sanitizer_finish_switch_fiber(self->sanitizer_, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

void Fiber::run() {
#if SIMT_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
    for (;;) {
        running->entry_();
        suspend();
    }
}

}  // namespace simt
