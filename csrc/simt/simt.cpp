// The scheduler: blocks one after another, their threads as fibers that run until they wait. Compiled without
// sanitizers: what it reads and writes for the threads is no access of theirs.

#include "simt/simt.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "simt/fiber.h"
#include "simt/sanitizer.h"
#include "simt/symbols.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {
namespace {

struct Thread {
    enum State { running, at_warp, at_block, returned };
    Fiber fiber;
    uint3 index;
    int number, warp;
    State state = running;
    const char* what = nullptr;  // where it waits
    Site site = {};
    struct InFlight {
        Copy copy;
        int group;
    };
    std::vector<InFlight> copies;  // grows and shrinks in its own thread's time only
    std::size_t landed = 0;        // of the copies, the first so many
    int groups = 0;                // committed so far
};

// Threads that meet. The tokens carry ThreadSanitizer's happens-before; two of each, since a thread may reach the next
// meeting before another one has left this one.
struct Meeting {
    int arrived;
    unsigned generation;
    alignas(16) char tokens[32];
    char* token() { return tokens + generation % 2 * 16; }
    void begin() {
        arrived = 0;
        generation = 0;
        forget_history(tokens, sizeof tokens);
    }
};

struct Warp {
    std::vector<Thread*> lanes, ready;
    Meeting meeting;
    alignas(16) char values[2][32][32];
};

struct Block {
    std::vector<Thread*> threads;
    int warp_count;
    Warp warps[32];
    Meeting barrier;
    bool one_warp_at_a_time;
    int last_warp;
    int set;  // of fibers
};

struct Launch {
    std::string kernel;
    void (*thread)(const void*);
    const void* arguments;
    char* shared;
    std::size_t shared_bytes;
};

std::mt19937_64 generator;  // of the orders
std::uint64_t run_seed = 0;
std::set<std::string> launched;
Launch launch;  // the one that runs, its block and its thread
Block block;
Thread* self;
std::exception_ptr failure;
alignas(16) char launch_begins[16], launch_ends[16], fence[16];  // tokens

int draw(std::size_t count) { return static_cast<int>(generator() % count); }

std::string text(uint3 index) {
    return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

std::string text(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

std::string here() { return launch.kernel + ", block " + text(blockIdx); }

// No thread can run on: says where each of them is.
[[noreturn]] void fail_apart(const std::vector<Thread*>& threads) {
    std::map<std::string, std::vector<const Thread*>> places;
    for (const Thread* thread : threads) {
        const bool done = thread->state == Thread::returned;
        places[done ? "returned" : thread->what + (" at " + text(thread->site))].push_back(thread);
    }
    std::string message = here() + ": threads that must meet went apart:";
    for (const auto& [place, there] : places) {
        const std::string first = text(there[0]->index);
        message += "\n  " + std::to_string(there.size()) + " x " + place + ", the first is thread " + first;
    }
    throw std::runtime_error(message);
}

void wait(Thread::State state, const char* what, Site site) {
    self->state = state;
    self->what = what;
    self->site = site;
    Fiber::suspend();
}

// A sanitizer's last words.
void say_where() {
    if (!self) return;
    std::fprintf(stderr, "in %s, thread %s (--seed %llu)\n", here().c_str(), text(self->index).c_str(),
                 static_cast<unsigned long long>(run_seed));
}

void thread_main() {
    acquire(launch_begins);
    try {
        launch.thread(launch.arguments);
    } catch (...) {
        failure = std::current_exception();
    }
    release(launch_ends);
    self->state = Thread::returned;
}

// The fibers outlive a block, and ThreadSanitizer takes each for one thread that does first this, then that. So there
// are two sets, in turn, and the blocks run in any order: neighbours in time are unordered, as on a GPU.
std::deque<Thread> fibers[2];

// The next thread to run: any lane that is ready, of any warp or, in half of the blocks, of the last warp where it has
// one.
Thread* pick() {
    int warp = block.last_warp;
    if (!block.one_warp_at_a_time || block.warps[warp].ready.empty()) {
        warp = draw(block.warp_count);
        for (int tries = 0; block.warps[warp].ready.empty(); warp = (warp + 1) % block.warp_count) {
            if (++tries > block.warp_count) return nullptr;
        }
    }
    block.last_warp = warp;
    auto& ready = block.warps[warp].ready;
    std::swap(ready[draw(ready.size())], ready.back());
    Thread* thread = ready.back();
    ready.pop_back();
    return thread;
}

bool same(const Thread& a, const Thread& b) {
    return a.what == b.what && a.site.line == b.site.line && !std::strcmp(a.site.file, b.site.file);
}

// One more thread has arrived; where it was the last, all go on.
void arrive(Meeting& meeting, const std::vector<Thread*>& members) {
    if (++meeting.arrived < static_cast<int>(members.size())) return;
    for (const Thread* member : members) {
        if (!same(*member, *members[0])) fail_apart(members);
    }
    meeting.arrived = 0;
    ++meeting.generation;
    for (Thread* member : members) {
        member->state = Thread::running;
        block.warps[member->warp].ready.push_back(member);
    }
}

void run_block(dim3 size) {
    const std::size_t count = static_cast<std::size_t>(size.x) * size.y * size.z;
    block.threads.clear();
    block.warp_count = static_cast<int>((count + 31) / 32);
    block.barrier.begin();
    block.one_warp_at_a_time = draw(2);
    block.last_warp = 0;
    for (int i = 0; i < block.warp_count; ++i) {
        block.warps[i].lanes.clear();
        block.warps[i].ready.clear();
        block.warps[i].meeting.begin();
    }
    block.set = 1 - block.set;
    for (std::size_t i = 0; i < count; ++i) {
        Thread* thread = &fibers[block.set][i];
        const unsigned n = static_cast<unsigned>(i);
        thread->index = {n % size.x, n / size.x % size.y, n / size.x / size.y};
        thread->number = static_cast<int>(i);
        thread->warp = static_cast<int>(i / 32);
        thread->state = Thread::running;
        thread->copies.clear();
        thread->landed = 0;
        thread->groups = 0;
        thread->fiber.start(thread_main, thread->index.x, thread->index.y, thread->index.z);
        block.warps[thread->warp].lanes.push_back(thread);
        block.warps[thread->warp].ready.push_back(thread);
        block.threads.push_back(thread);
    }
    for (const StaticShared& variable : static_shared()) fill_with_nan(variable.memory, variable.bytes);
    fill_with_nan(launch.shared, launch.shared_bytes);
    while ((self = pick()) != nullptr) {
        threadIdx = self->index;
        self->fiber.resume();
        if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
        if (self->state == Thread::at_warp) arrive(block.warps[self->warp].meeting, block.warps[self->warp].lanes);
        if (self->state == Thread::at_block) arrive(block.barrier, block.threads);
    }
    for (const Thread* thread : block.threads) {
        if (thread->state != Thread::returned) fail_apart(block.threads);
    }
}

}  // namespace

void fill_with_nan(void* memory, std::size_t bytes) {
    forget_history(memory, bytes);
    for (std::size_t i = 0; i < bytes; ++i) static_cast<unsigned char*>(memory)[i] = 0xff;
}

void fail(const std::string& reason, Site site) {
    throw std::runtime_error(here() + ", thread " + text(self->index) + ", " + text(site) + ": " + reason);
}

int lane() { return self->number % 32; }

const char (*meet(const char* what, unsigned mask, const void* mine, std::size_t bytes, Site site))[32] {
    Warp& warp = block.warps[self->warp];
    if (mask != 0xffffffffu) fail(std::string(what) + ": only full warps meet here, mask 0xffffffff", site);
    if (warp.lanes.size() != 32) fail(std::string(what) + ": the block's last warp has fewer than 32 threads", site);
    auto& values = warp.values[warp.meeting.generation % 2];
    for (std::size_t i = 0; i < bytes; ++i) values[lane()][i] = static_cast<const char*>(mine)[i];
    wait(Thread::at_warp, what, site);
    return values;
}

void check_copy(const void* shared, const void* global, int bytes, Site site) {
    const char* begin = static_cast<const char*>(shared);
    const auto within = [&](const char* memory, std::size_t size) {
        return begin >= memory && begin + 16 <= memory + size;
    };
    bool inside = within(launch.shared, launch.shared_bytes);
    for (const StaticShared& variable : static_shared()) inside |= within(variable.memory, variable.bytes);
    if (!inside) fail("cp_async_16 writes outside shared memory", site);
    if (reinterpret_cast<std::uintptr_t>(shared) % 16 || reinterpret_cast<std::uintptr_t>(global) % 16) {
        fail("cp_async_16 needs addresses that are multiples of 16", site);
    }
    if (bytes < 0 || bytes > 16) fail("cp_async_16 copies 0 to 16 bytes, not " + std::to_string(bytes), site);
}

void start_copy(const Copy& copy) { self->copies.push_back({copy, self->groups}); }

void commit_copies() { ++self->groups; }

bool land_copy(int groups_in_flight, Copy* copy) {
    if (self->landed == self->copies.size()) return false;
    const Thread::InFlight& next = self->copies[self->landed];
    if (next.group >= self->groups - groups_in_flight) return false;
    *copy = next.copy;
    ++self->landed;
    return true;
}

void* dynamic_shared() { return launch.shared; }

void order_fence() { release(fence); }

void order_atomic() { acquire(fence); }

const std::set<std::string>& kernels_launched() { return launched; }

void set_seed(std::uint64_t seed) {
    run_seed = seed;
    generator.seed(seed);
}

cudaError_t run(const void* kernel, dim3 grid, dim3 size, std::size_t shared_bytes,
                void (*thread)(const void*), const void* arguments) {
    const std::size_t blocks = static_cast<std::size_t>(grid.x) * grid.y * grid.z;
    const std::size_t threads = static_cast<std::size_t>(size.x) * size.y * size.z;
    if (!blocks || !threads || threads > 1024 || size.z > 64 || grid.x >> 31 || grid.y > 65535 || grid.z > 65535) {
        return cudaErrorInvalidConfiguration;
    }
    if (shared_bytes > shared_limit) return cudaErrorInvalidValue;

    static const bool told = (call_at_death(say_where), true);
    (void)told;
    static std::map<const void*, std::string> names;
    if (!names.count(kernel)) names[kernel] = kernel_name(kernel);
    void* shared = nullptr;
    if (posix_memalign(&shared, 16, shared_bytes) != 0) throw std::bad_alloc();
    const std::unique_ptr<void, decltype(&std::free)> owner(shared, std::free);
    launch = {names[kernel], thread, arguments, static_cast<char*>(shared), shared_bytes};
    launched.insert(launch.kernel);
    gridDim = grid;
    blockDim = size;

    std::vector<std::size_t> order(blocks);
    for (std::size_t i = 0; i < blocks; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), generator);
    for (auto& set : fibers) {
        while (set.size() < threads) set.emplace_back();
    }
    release(launch_begins);
    for (const std::size_t number : order) {
        blockIdx = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                    static_cast<unsigned>(number / grid.x / grid.y)};
        run_block(size);
    }
    acquire(launch_ends);
    return cudaSuccess;
}

}  // namespace simt

// UndefinedBehaviorSanitizer calls this after a report.
extern "C" void __ubsan_on_report() { simt::say_where(); }

void __syncthreads(simt::Site site) {
    char* token = simt::block.barrier.token();
    simt::release(token);
    simt::wait(simt::Thread::at_block, "__syncthreads", site);
    simt::acquire(token);
}

void __syncwarp(unsigned mask, simt::Site site) {
    char* token = simt::block.warps[simt::self->warp].meeting.token();
    simt::release(token);
    simt::meet("__syncwarp", mask, nullptr, 0, site);
    simt::acquire(token);
}

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        default: return "invalid argument";
    }
}

cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
    *properties = {"the host's processor (csrc/simt)", 8, 0, 4, simt::shared_limit};
    return cudaSetDevice(device);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp device_has;
    cudaGetDeviceProperties(&device_has, device);
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = device_has.multiProcessorCount; break;
        case cudaDevAttrComputeCapabilityMajor: *value = device_has.major; break;
        case cudaDevAttrComputeCapabilityMinor: *value = device_has.minor; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = simt::shared_limit; break;
    }
    return cudaSetDevice(device);
}
