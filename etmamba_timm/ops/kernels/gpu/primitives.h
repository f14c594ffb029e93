// What CUDA C++ has no portable name for, or has only in headers that come with the toolkit: one instruction each.
// tests/ops/kernels/emulation.h has the same functions for a CPU.
#pragma once

#define FN __device__ __forceinline__
// All kernels take one argument, `a`, of the type Args of their file.
#define KERNEL(name, threads, blocks) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Args a)
// What the caller must know of a kernel: threads, bytes of shared memory, and what else it asks for.
#define CONFIG(name, ...) extern "C" __device__ int name##_config[] = {__VA_ARGS__};
// A block's shared memory, of a type that CONFIG tells the size of.
#define SHARED(Type, name)                                     \
    extern __shared__ __align__(16) unsigned char shared_bytes[]; \
    Type& name = *(Type*)shared_bytes

FN float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
FN float log2_fast(float x) { float y; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
FN float reciprocal_root(float x) { float y; asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
FN float reciprocal(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
FN float relu(float x) { float y; asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x)); return y; }  // keeps NaN

FN float half_to_float(unsigned short x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
FN unsigned pack_half(float low, float high) {
    unsigned d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
FN unsigned pack_bfloat(float low, float high) {
    unsigned d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

// Copies 8 or 16 bytes into shared memory behind the thread's back, or zeros if not `some`; both addresses aligned.
template <int BYTES> FN void copy_async(void* to, const void* from, bool some) {
    const unsigned address = (unsigned)__cvta_generic_to_shared(to);
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(BYTES), "r"(some ? BYTES : 0)
                 : "memory");
}
FN void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all of the thread's groups of copies but the N latest.
template <int N> FN void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Has the line of an address on its way into the L2 cache.
FN void prefetch(const void* x) { asm volatile("prefetch.global.L2 [%0];" ::"l"(x)); }

FN void add_to(float* to, float x) { atomicAdd(to, x); }
FN void add_to(float* to, float4 x) {  // aligned to 16 bytes
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
#else
    atomicAdd(to, x.x), atomicAdd(to + 1, x.y), atomicAdd(to + 2, x.z), atomicAdd(to + 3, x.w);
#endif
}

FN float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
// The same number, as the compiler can't know it: nothing worked out from it is kept in registers for later.
FN int opaque(int x) { asm volatile("" : "+r"(x)); return x; }
// The place that a warp has in its multiprocessor, which balances work; it may change.
