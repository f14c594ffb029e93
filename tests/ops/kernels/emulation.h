// Runs a CUDA kernel on a CPU, for tests. A block is a set of fibers, and one block runs at a time.
//
// The environment variable EMULATION_ORDER chooses the order of threads: 0 in turn, 1 in reverse, 2 random, with whole
// warps held back at random. Asynchronous copies happen when they are waited for; in order 2 some happen at once. Shared
// memory holds NaNs when a block starts, so that nothing is left over from another block. A barrier that isn't reached by
// all threads ends the process with a message.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#define __device__
#define __restrict__
#define FN inline

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
using std::max;
using std::min;

struct Index { int x, y, z; };
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

[[noreturn]] inline void fail(const char* why) {
    std::fprintf(stderr, "emulation: %s, thread %d of block (%d, %d, %d)\n", why, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z);
    std::abort();
}

struct Copy { void* to; const void* from; int bytes; };
struct Fiber {
    jmp_buf place;  // where it goes on
    bool started, done;
    std::vector<std::vector<Copy>> copies;  // in groups, the last of which is open
};
struct Barrier { int waiting, opened; };

constexpr size_t STACK = 1 << 17;
static std::vector<Fiber> fibers;
static std::vector<std::vector<char>> stacks;
static jmp_buf scheduler;
static ucontext_t scheduler_context;
static int current, order;
static bool progress;
static std::function<void()> body;
static std::vector<float> exchanged;  // by shuffles
static Barrier block_barrier;
static std::vector<Barrier> warp_barriers;
static std::mt19937 chance(1);

struct Memory { void* data; size_t bytes; };
static std::vector<Memory> shared_memory;

inline void* shared(void* data, size_t bytes) {  // filled with NaNs, once here and before each further block
    for (const Memory& known : shared_memory)
        if (known.data == data) return data;
    shared_memory.push_back({data, bytes});
    return std::memset(data, 0xff, bytes);
}

inline void yield() {
    if (!_setjmp(fibers[current].place)) _longjmp(scheduler, 1);
}

inline void entry() {
    body();
    fibers[current].done = progress = true;
    _longjmp(scheduler, 1);
}

inline void resume(int i) {
    current = i;
    threadIdx = {i, 0, 0};
    if (_setjmp(scheduler)) return;
    if (fibers[i].started) _longjmp(fibers[i].place, 1);
    fibers[i].started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks[i].data();
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, (void (*)())entry, 0);
    setcontext(&context);
}

inline void wait_at(Barrier& barrier, int threads) {
    const int opened = barrier.opened;
    progress = true;
    if (++barrier.waiting == threads) {
        barrier.waiting = 0;
        ++barrier.opened;
    }
    while (barrier.opened == opened) yield();
}

inline void run_block() {
    const int threads = blockDim.x;
    for (const Memory& memory : shared_memory) std::memset(memory.data, 0xff, memory.bytes);
    fibers.assign(threads, {});
    for (Fiber& fiber : fibers) fiber.copies.resize(1);
    exchanged.assign(threads, NAN);
    block_barrier = {};
    warp_barriers.assign((threads + 31) / 32, {});
    std::vector<int> turn(threads);
    for (int i = 0; i < threads; ++i) turn[i] = order == 1 ? threads - 1 - i : i;
    for (int left = threads; left;) {
        unsigned held = 0;
        if (order == 2) {
            std::shuffle(turn.begin(), turn.end(), chance);
            held = chance() & chance();
        }
        progress = held != 0;
        left = 0;
        for (int i : turn) {
            if (!fibers[i].done && !(held >> (i / 32) & 1)) resume(i);
            left += !fibers[i].done;
        }
        if (left && !progress) fail("not all threads reach a barrier");
    }
}

inline void launch(const int* grid, int threads, std::function<void()> kernel) {
    const char* chosen = std::getenv("EMULATION_ORDER");
    order = chosen ? std::atoi(chosen) : 0;
    body = kernel;
    blockDim = {threads, 1, 1}, gridDim = {grid[0], grid[1], grid[2]};
    while ((int)stacks.size() < threads) stacks.emplace_back(STACK);
    for (int z = 0; z < grid[2]; ++z)
        for (int y = 0; y < grid[1]; ++y)
            for (int x = 0; x < grid[0]; ++x) {
                blockIdx = {x, y, z};
                run_block();
            }
}

template <typename P> P* aligned(P* p, int bytes) {
    if ((uintptr_t)p % bytes) fail("an address isn't aligned");
    return p;
}

}  // namespace emulation

// The caller launches a kernel by calling the function of its name.
#define KERNEL(name, threads, blocks)                                            \
    static void name##_block(const Args& a);                                     \
    extern "C" void name(const Args* args, const int* grid) {                    \
        emulation::launch(grid, threads, [args] { name##_block(*args); });       \
    }                                                                            \
    static void name##_block(const Args& a)
#define CONFIG(name, ...)                                                        \
    extern "C" {                                                                 \
    int name##_config[] = {__VA_ARGS__};                                         \
    int name##_config_size = sizeof(name##_config) / sizeof(int);                \
    }
#define SHARED(Type, name) alignas(16) static Type name; emulation::shared(&name, sizeof(name))

inline void __syncthreads() { emulation::wait_at(emulation::block_barrier, blockDim.x); }
inline void __syncwarp() {
    const int warp = emulation::current / 32;
    emulation::wait_at(emulation::warp_barriers[warp], min(32, blockDim.x - 32 * warp));
}
inline float shuffle_xor(float x, int mask) {
    const int me = emulation::current;
    emulation::exchanged[me] = x;
    __syncwarp();
    const float other = emulation::exchanged[me ^ mask];
    __syncwarp();
    return other;
}

inline float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
template <typename P> P __ldg(const P* p) { return *p; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline float reciprocal(float x) { return 1 / x; }
inline float reciprocal_root(float x) { return 1 / std::sqrt(x); }
inline float relu(float x) { return x < 0 ? 0 : x; }
inline float half_to_float(unsigned short bits) { _Float16 x; std::memcpy(&x, &bits, 2); return x; }
inline unsigned round_half(float x) { _Float16 y = (_Float16)x; unsigned short bits; std::memcpy(&bits, &y, 2); return bits; }
inline unsigned round_bfloat(float x) {
    const unsigned bits = __float_as_uint(x);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline unsigned pack_half(float low, float high) { return round_half(low) | round_half(high) << 16; }
inline unsigned pack_bfloat(float low, float high) { return round_bfloat(low) | round_bfloat(high) << 16; }

template <int BYTES> void copy_async(void* to, const void* from, bool some) {
    static const char zeros[BYTES] = {};
    emulation::aligned(to, BYTES), emulation::aligned(from, BYTES);
    const emulation::Copy copy{to, some ? from : zeros, BYTES};
    if (emulation::order == 2 && emulation::chance() % 2) std::memcpy(copy.to, copy.from, BYTES);
    else emulation::fibers[emulation::current].copies.back().push_back(copy);
}
inline void commit_copies() { emulation::fibers[emulation::current].copies.emplace_back(); }
template <int N> void wait_for_copies() {
    auto& groups = emulation::fibers[emulation::current].copies;
    for (; (int)groups.size() > N + 1; groups.erase(groups.begin()))
        for (const emulation::Copy& copy : groups[0]) std::memcpy(copy.to, copy.from, copy.bytes);
}

inline void prefetch(const void*) {}
inline void add_to(float* to, float x) { *to += x; }
inline void add_to(float* to, float4 x) {
    emulation::aligned(to, 16);
    to[0] += x.x, to[1] += x.y, to[2] += x.z, to[3] += x.w;
}
inline int opaque(int x) { return x; }
