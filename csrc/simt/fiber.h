// One CUDA thread's stack, and the switch between it and the scheduler. The sanitizers are told of every switch.
#pragma once

namespace simt {

class Fiber {
  public:
    Fiber();
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    // The next resume() begins entry(); a fiber whose entry returned can start again. To ThreadSanitizer a fiber is one
    // thread from its construction on, with the name "thread (x, y, z)" from here on.
    void start(void (*entry)(), unsigned x, unsigned y, unsigned z);
    // Runs the fiber until it suspends or its entry returns.
    void resume();
    // Within the running fiber: back to resume().
    static void suspend();

  private:
    static void run();

    char* stack_;  // never freed: a thread that met an error stays where it is
    void* stack_pointer_;
    void (*entry_)() = nullptr;
    void* sanitizer_ = nullptr;  // ThreadSanitizer's fiber, or AddressSanitizer's fake stack
};

}  // namespace simt
