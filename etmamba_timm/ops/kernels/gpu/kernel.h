// What the kernels share: element types, groups of elements, tensors in memory, elementary functions.
//
// DTYPE is the sequences' type: 0 float32, 1 bfloat16, 2 float16 (load_gpu.py). Sums are float32.
#pragma once

#ifdef EMULATED
#include "emulation.h"
#else
#include "primitives.h"
#endif

typedef long long i64;

// A tensor [directions, batch, channels, time]; strides in elements. Must match load_cpu.py.
struct Strided {
    void* data;
    i64 direction, batch, channel, time;
};

FN float bfloat_to_float(unsigned short x) { return __uint_as_float((unsigned)x << 16); }

#if DTYPE == 0
typedef float T;
typedef float4 Quad;  // four neighbouring elements
FN float to_float(T x) { return x; }
FN T from_float(float x) { return x; }
FN void unpack(Quad q, float* x) { x[0] = q.x, x[1] = q.y, x[2] = q.z, x[3] = q.w; }
FN Quad pack(const float* x) { return make_float4(x[0], x[1], x[2], x[3]); }
#else
typedef unsigned short T;  // the bits
typedef uint2 Quad;
#if DTYPE == 1
FN float to_float(T x) { return bfloat_to_float(x); }
FN unsigned pack2(float low, float high) { return pack_bfloat(low, high); }
FN void unpack2(unsigned q, float* x) { x[0] = __uint_as_float(q << 16), x[1] = __uint_as_float(q & 0xffff0000u); }
#else
FN float to_float(T x) { return half_to_float(x); }
FN unsigned pack2(float low, float high) { return pack_half(low, high); }
FN void unpack2(unsigned q, float* x) { x[0] = half_to_float((T)q), x[1] = half_to_float((T)(q >> 16)); }
#endif
FN T from_float(float x) { return (T)pack2(x, 0.f); }
FN void unpack(Quad q, float* x) { unpack2(q.x, x), unpack2(q.y, x + 2); }
FN Quad pack(const float* x) { return make_uint2(pack2(x[0], x[1]), pack2(x[2], x[3])); }
#endif

// An element of an array whose type (numbered as DTYPE) is only known at run time.
FN float element(const void* x, i64 i, int dtype) {
    if (dtype == 0) return ((const float*)x)[i];
    const unsigned short bits = ((const unsigned short*)x)[i];
    return dtype == 1 ? bfloat_to_float(bits) : half_to_float(bits);
}
FN void set_element(void* x, i64 i, int dtype, float value) {
    if (dtype == 0) ((float*)x)[i] = value;
    else ((unsigned short*)x)[i] = (unsigned short)(dtype == 1 ? pack_bfloat(value, 0.f) : pack_half(value, 0.f));
}
// Elements `begin`, `begin + step` and so on, 0 from `end` on. All are asked for before the first is needed: a type that is
// looked up for each of them would have each wait for the one before.
template <int N> FN void elements(const void* x, int dtype, i64 begin, int step, i64 end, float* values) {
    if (dtype == 0) {
#pragma unroll
        for (int n = 0; n < N; ++n) values[n] = begin + n * step < end ? ((const float*)x)[begin + n * step] : 0.f;
        return;
    }
    unsigned short bits[N];
#pragma unroll
    for (int n = 0; n < N; ++n) bits[n] = begin + n * step < end ? ((const unsigned short*)x)[begin + n * step] : 0;
#pragma unroll
    for (int n = 0; n < N; ++n) values[n] = dtype == 1 ? bfloat_to_float(bits[n]) : half_to_float(bits[n]);
}
// 4N neighbouring elements from an address that is aligned to four.
template <int N> FN void element_quads(const void* x, int dtype, i64 begin, float* values) {
    if (dtype == 0) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const float4 v = ((const float4*)((const float*)x + begin))[n];
            values[4 * n] = v.x, values[4 * n + 1] = v.y, values[4 * n + 2] = v.z, values[4 * n + 3] = v.w;
        }
        return;
    }
    uint2 pairs[N];
#pragma unroll
    for (int n = 0; n < N; ++n) pairs[n] = ((const uint2*)((const unsigned short*)x + begin))[n];
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) {
        const unsigned bits = (i % 4 < 2 ? pairs[i / 4].x : pairs[i / 4].y) >> (i % 2 * 16);
        values[i] = dtype == 1 ? bfloat_to_float((unsigned short)bits) : half_to_float((unsigned short)bits);
    }
}

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
FN float exp_fast(float x) { return exp2_fast(x * LOG2E); }
FN float sigmoid(float x) { return reciprocal(1.f + exp_fast(-x)); }
FN float silu(float x) { return x * sigmoid(x); }
// Its derivative.
FN float silu_slope(float x) { const float s = sigmoid(x); return s * (1.f + x * (1.f - s)); }

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
FN i64 smaller(i64 a, i64 b) { return a < b ? a : b; }

// Sums of a matrix's columns: a block takes SUMMED of them, and a thread every SUMMERS-th row. The total of the column
// of threads 0 to SUMMED - 1 is returned to these.
constexpr int SUMMED = 32, SUMMERS = 8;
typedef float ColumnSums[SUMMERS][SUMMED];
FN float column_sum(const float* from, i64 rows, i64 pitch, bool some, ColumnSums& shared) {
    const int lane = threadIdx.x % SUMMED, summer = threadIdx.x / SUMMED;
    float sum = 0.f;
#pragma unroll 8
    for (int i = summer; i < (some ? (int)rows : 0); i += SUMMERS) sum += from[i * pitch];
    shared[summer][lane] = sum;
    __syncthreads();
    if (summer == 0)
#pragma unroll
        for (int i = 1; i < SUMMERS; ++i) sum += shared[i][lane];
    return sum;
}

// ALIGNED: 1 if quads of the sequences can be read at once: channels are next to each other, their number and all other
// strides are multiples of 4, and so are addresses. 0 for any strides and any number of channels.
#ifdef ALIGNED
// Channels `channel` to `channel + 3` of a row of a tensor; 0 beyond the last.
FN void load_quad(const T* row, i64 stride, int channel, int channels, float* x) {
#if ALIGNED
    unpack(*(const Quad*)(row + channel), x);
#else
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = channel + j < channels ? to_float(row[(channel + j) * stride]) : 0.f;
#endif
}
FN void store_quad(T* row, i64 stride, int channel, int channels, const float* x) {
#if ALIGNED
    *(Quad*)(row + channel) = pack(x);
#else
#pragma unroll
    for (int j = 0; j < 4; ++j)
        if (channel + j < channels) row[(channel + j) * stride] = from_float(x[j]);
#endif
}
#endif
