// What the kernels share: vectors, elementary functions, tensors in memory, threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#endif
#ifndef _OPENMP
#include <atomic>
#include <thread>
#endif

namespace etmamba {

#if defined(__AVX512F__)
constexpr int BYTES = 64;       // of a vector
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };  // not every compiler has this type

template <typename S> struct Lanes;
template <> struct Lanes<float> {
    static constexpr int W = BYTES / 4;
    typedef float vec __attribute__((vector_size(BYTES)));
    typedef int32_t ivec __attribute__((vector_size(BYTES)));
    typedef uint32_t uvec __attribute__((vector_size(BYTES)));
    typedef uint16_t half __attribute__((vector_size(BYTES / 2)));
};
template <> struct Lanes<double> {
    static constexpr int W = BYTES / 8;
    typedef double vec __attribute__((vector_size(BYTES)));
    typedef int64_t ivec __attribute__((vector_size(BYTES)));
};
template <typename S> using Vec = typename Lanes<S>::vec;

// ---- elementary functions

// Results that are rounded to 16 bits don't need float's accuracy: ROUGH functions have shorter polynomials.
template <typename T> constexpr bool rough = sizeof(T) == 2;

#if defined(__AVX512F__)
inline Vec<float> vmax(Vec<float> a, Vec<float> b) { return _mm512_max_ps(a, b); }
inline Vec<float> vmin(Vec<float> a, Vec<float> b) { return _mm512_min_ps(a, b); }
#elif defined(__AVX__)
inline Vec<float> vmax(Vec<float> a, Vec<float> b) { return _mm256_max_ps(a, b); }  // b where either is not a number
inline Vec<float> vmin(Vec<float> a, Vec<float> b) { return _mm256_min_ps(a, b); }
#else
inline Vec<float> vmax(Vec<float> a, Vec<float> b) { return a > b ? a : b; }
inline Vec<float> vmin(Vec<float> a, Vec<float> b) { return a < b ? a : b; }
#endif

// Exactly 1 at 0, with a relative error of 2e-7 within the range of normal numbers. ROUGH: of 2e-4, and within ±0.5 one
// of 5e-4 in 2^x - 1, which is what decays the states of a scan.
template <bool ROUGH = false> inline Vec<float> vexp2(Vec<float> x) {
#if defined(__AVX512F__)
    const Vec<float> nearest = _mm512_roundscale_ps(x, 0), r = x - nearest;
#else
    const Vec<float> magic = Vec<float>{} + 12582912.f;  // 1.5·2^23: x's nearest integer lands in the lowest bits
    x = vmin(Vec<float>{} + 127.f, vmax(Vec<float>{} - 126.f, x));
    const Vec<float> shifted = x + magic, r = x - (shifted - magic);
#endif
    Vec<float> p;  // minimax for 2^r within ±0.5; ROUGH: for (2^r - 1) / r
    if constexpr (ROUGH) {
        p = r * 5.550396e-2f + 2.4202886e-1f;
        p = p * r + 6.931783e-1f;
    } else {
        p = r * 1.3264727e-3f + 9.6715126e-3f;
        p = p * r + 5.5507337e-2f;
        p = p * r + 2.4022242e-1f;
        p = p * r + 6.9314698e-1f;
    }
    p = p * r + 1.f;
#if defined(__AVX512F__)
    return _mm512_scalef_ps(p, nearest);
#else
    return (Vec<float>)((Lanes<float>::ivec)p + ((Lanes<float>::ivec)shifted << 23));  // the integer added to the exponent
#endif
}

template <bool ROUGH = false> inline Vec<double> vexp2(Vec<double> x) {
    for (int w = 0; w < Lanes<double>::W; ++w) x[w] = std::exp2(x[w]);
    return x;
}

constexpr double LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;

template <bool ROUGH = false> inline Vec<float> vexp(Vec<float> x) {  // relative error about |x|·1e-7; ROUGH: 2e-4
    return vexp2<ROUGH>(x * (float)LOG2E);
}

template <bool ROUGH = false> inline Vec<double> vexp(Vec<double> x) {
    for (int w = 0; w < Lanes<double>::W; ++w) x[w] = std::exp(x[w]);
    return x;
}

// log(1 + e^x); the relative error is small even where e^x is
template <bool ROUGH = false> inline Vec<float> softplus(Vec<float> x) {
    const Vec<float> zero = {}, w = vexp<ROUGH>(x > 0 ? -x : x);  // max(x, 0) + log(1 + w)
    Vec<float> p;  // minimax for log(1 + w) / w within [0, 1]
    if constexpr (ROUGH) {
        p = w * 4.13473e-2f - 1.5742721e-1f;
        p = p * w + 3.0630093e-1f;
        p = p * w - 4.9697781e-1f;
        p = p * w + 9.9994328e-1f;
    } else {
        p = w * 5.36482505e-03f - 3.00657952e-02f;
        p = p * w + 7.92045402e-02f;
        p = p * w - 1.37538027e-01f;
        p = p * w + 1.91536551e-01f;
        p = p * w - 2.48571637e-01f;
        p = p * w + 3.33213226e-01f;
        p = p * w - 4.99996480e-01f;
        p = p * w + 1.f;
    }
    return vmax(x, zero) + w * p;
}

template <bool ROUGH = false> inline Vec<double> softplus(Vec<double> x) {
    for (int w = 0; w < Lanes<double>::W; ++w) x[w] = x[w] > 20 ? x[w] : std::log1p(std::exp(x[w]));
    return x;
}

inline Vec<float> reciprocal(Vec<float> x) {  // of normal numbers up to 2^126
#if defined(__AVX512F__)
    const Vec<float> y = _mm512_rcp14_ps(x);  // a division takes as long as all the rest of a sigmoid
    return y + y * (1 - x * y);
#else
    return 1 / x;
#endif
}

template <bool ROUGH = false> inline Vec<double> sigmoid(Vec<double> x) { return 1 / (1 + vexp(-x)); }

template <bool ROUGH = false> inline Vec<float> sigmoid(Vec<float> x) {  // at least 2^-126
    const Vec<float> most = Vec<float>{} + 126.f;  // e^-x is infinite below -88, and the reciprocal not a number
    return reciprocal(1 + vexp2<ROUGH>(vmin(most, x * -(float)LOG2E)));
}

// ---- memory: tensors in T, arithmetic in S

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(float16 x) {
    uint32_t magnitude = (uint32_t)(x.bits & 0x7fff) << 13, bits;
    float y;
    std::memcpy(&y, &magnitude, 4);
    y *= 0x1p112f;  // from a bias of 15 to one of 127; exact, for subnormal numbers too
    std::memcpy(&bits, &y, 4);
    if (magnitude >= 0x0f800000u) bits = magnitude | 0x7f800000u;  // infinity, not a number
    bits |= (uint32_t)(x.bits & 0x8000) << 16;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline float to_float(bfloat16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
template <typename T> inline T from_float(double x) { return (T)x; }
template <> inline bfloat16 from_float<bfloat16>(double v) {
    float x = (float)v;
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest even
    return {(uint16_t)(x != x ? 0x7fc0 : rounded)};
}
template <> inline float16 from_float<float16>(double v) {  // to nearest even
    float x = (float)v, magnitude;
    uint32_t bits, subnormal;
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;  // whose last place is a subnormal half's: the addition rounds
    std::memcpy(&subnormal, &magnitude, 4);
    uint32_t half = bits < 0x38800000u ? subnormal - 0x3f000000u : (bits - 0x38000000u + 0xfffu + (bits >> 13 & 1)) >> 13;
    if (bits >= 0x47800000u) half = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return {(uint16_t)(sign | half)};
}

// W neighbouring elements.
template <typename T, typename S> inline Vec<S> load_row(const T* p) {
    Vec<S> v;
    if constexpr (std::is_same_v<T, S>) {
        std::memcpy(&v, p, sizeof(v));
    } else if constexpr (std::is_same_v<T, bfloat16>) {
        Lanes<float>::half half;
        std::memcpy(&half, p, sizeof(half));
        v = (Vec<float>)(__builtin_convertvector(half, Lanes<float>::uvec) << 16);
    } else {
        for (int w = 0; w < Lanes<S>::W; ++w) v[w] = to_float(p[w]);
    }
    return v;
}

template <typename T, typename S> inline void store_row(T* p, Vec<S> v) {
    if constexpr (std::is_same_v<T, S>) {
        std::memcpy(p, &v, sizeof(v));
#if defined(__AVX512BF16__)
    } else if constexpr (std::is_same_v<T, bfloat16>) {
        const __m256bh half = _mm512_cvtneps_pbh(v);  // to nearest even; subnormal numbers become 0
        std::memcpy(p, &half, sizeof(half));
#endif
    } else if constexpr (std::is_same_v<T, bfloat16>) {
        Lanes<float>::uvec bits = (Lanes<float>::uvec)v;
        bits = (v != v) ? Lanes<float>::uvec{} + 0x7fc00000u : bits + 0x7fff + (bits >> 16 & 1);  // to nearest even
        const auto half = __builtin_convertvector(bits >> 16, Lanes<float>::half);
        std::memcpy(p, &half, sizeof(half));
    } else {
        for (int w = 0; w < Lanes<S>::W; ++w) p[w] = from_float<T>(v[w]);
    }
}

// The first `count` elements, `step` apart; zeros in the other lanes.
template <typename T, typename S> inline Vec<S> load(const T* p, int64_t step, int count) {
    if (step == 1 && count == Lanes<S>::W) return load_row<T, S>(p);
    Vec<S> v = {};
    for (int w = 0; w < count; ++w) v[w] = (S)to_float(p[w * step]);
    return v;
}

template <typename T, typename S> inline void store(T* p, int64_t step, int count, Vec<S> v) {
    if (step == 1 && count == Lanes<S>::W) return store_row<T, S>(p, v);
    for (int w = 0; w < count; ++w) p[w * step] = from_float<T>(v[w]);
}

struct Strided {  // [directions, batch, channels, time], strides in elements; must match load_cpu.py
    char* data;
    int64_t direction, batch, channel, time;
    template <typename T> T* at(int64_t g, int64_t b, int64_t d, int64_t t) const {
        return (T*)data + g * direction + b * batch + d * channel + t * time;
    }
};

template <typename S> inline Vec<S> lanes_of(const void* base, int64_t channel, int64_t step, int count) {
    return base ? load<S, S>((const S*)base + channel * step, step, count) : Vec<S>{};
}

template <typename S> inline void put_lanes(void* base, int64_t channel, int64_t step, int count, Vec<S> v) {
    store<S, S>((S*)base + channel * step, step, count, v);
}

// ---- threads

template <typename Task> void run_tasks(int64_t tasks, int64_t threads, Task task) {  // task(i) for 0 <= i < tasks
#ifdef _OPENMP  // PyTorch's own pool of threads, where it is GNU's
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)threads)
    for (int64_t i = 0; i < tasks; ++i) task(i);
#else
    std::atomic<int64_t> next{0};
    const auto work = [&] { for (int64_t i; (i = next++) < tasks;) task(i); };
    std::vector<std::thread> helpers;
    for (int64_t i = 1; i < std::min(threads, tasks); ++i) helpers.emplace_back(work);
    work();
    for (auto& helper : helpers) helper.join();
#endif
}

// Calls f with a tensor's element type and the type to compute in, by load_cpu.py's code of the dtype. False if unknown.
template <typename F> bool with_dtype(int dtype, F f) {
    switch (dtype) {
        case 0: f(float{}, float{}); return true;
        case 1: f(bfloat16{}, float{}); return true;
        case 2: f(float16{}, float{}); return true;
        case 3: f(double{}, double{}); return true;
    }
    return false;
}

}  // namespace etmamba
