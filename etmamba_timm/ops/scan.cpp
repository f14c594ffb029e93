// The selective scan on a CPU, forward and backward. Compiled where it runs; see build.py and cpu.py.
//
// Lanes are channels: one vector holds W neighbouring channels, and N of them the states of a block of channels. Time
// is walked in chunks of STEPS, within a chunk block after block: rows of memory are read in order, and B and C, which
// all channels share, stay in the nearest cache. The forward pass keeps each chunk's first state; the backward pass
// starts from these and recomputes the rest, chunk by chunk, from the last to the first.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#endif
#ifndef _OPENMP
#include <atomic>
#include <thread>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64;       // of a vector
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int64_t STEPS = 32;   // time steps in a chunk

struct Strided {                // [batch, channel, time], strides in elements
    char* data;
    int64_t batch, channel, time;
};

struct Args {                   // must match cpu.py
    int64_t batch, width, length, state, reverse_from, groups, threads, softplus;
    Strided u, delta, z, out;                     // z.data may be null
    void *A, *B, *C, *D, *delta_bias;             // A [D, N]; B, C [batch, L, N]; D, delta_bias [D] or null
    void *last_state, *chunk_states;              // [batch, D, N]; [batch, chunks, blocks, N, W] or null
    Strided dout, du, ddelta, dz;                 // backward only, like the rest
    void *dA, *dB, *dC, *dD, *ddelta_bias;        // [batch, D, N]; [batch, groups, L, N] twice; [batch, D] twice
};

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };  // not every compiler has one of its own

template <typename S> struct Lanes;
template <> struct Lanes<float> {
    static constexpr int W = BYTES / 4;
    typedef float vec __attribute__((vector_size(BYTES)));
    typedef int32_t ivec __attribute__((vector_size(BYTES)));
};
template <> struct Lanes<double> {
    static constexpr int W = BYTES / 8;
    typedef double vec __attribute__((vector_size(BYTES)));
    typedef int64_t ivec __attribute__((vector_size(BYTES)));
};
template <typename S> using Vec = typename Lanes<S>::vec;

// ---- elementary functions

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

inline Vec<float> vexp2(Vec<float> x) {  // to 2 units in the last place within the range of normal numbers
    using I = Lanes<float>::ivec;
    const Vec<float> magic = Vec<float>{} + 12583039.f;  // 1.5·2^23 + 127: the exponent's bits land in the lowest
    x = vmin(Vec<float>{} + 127.f, vmax(Vec<float>{} - 126.f, x));
    const Vec<float> shifted = x + magic, r = x - (shifted - magic);
    Vec<float> p = r * 1.535336188e-4f + 1.339887440e-3f;
    p = p * r + 9.618437358e-3f;
    p = p * r + 5.550332471e-2f;
    p = p * r + 2.402264791e-1f;
    p = p * r + 6.931472029e-1f;
    p = p * r + 1.f;
    return p * (Vec<float>)((I)shifted << 23);
}

inline Vec<double> vexp2(Vec<double> x) {
    for (int w = 0; w < Lanes<double>::W; ++w) x[w] = std::exp2(x[w]);
    return x;
}

constexpr double LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;

inline Vec<float> vexp(Vec<float> x) { return vexp2(x * (float)LOG2E); }  // relative error about |x|·1e-7

inline Vec<double> vexp(Vec<double> x) {
    for (int w = 0; w < Lanes<double>::W; ++w) x[w] = std::exp(x[w]);
    return x;
}

inline Vec<float> vlog(Vec<float> x) {  // x >= 1
    using I = Lanes<float>::ivec;
    I bits = (I)x;
    I exponent = (bits >> 23) - 127;
    Vec<float> m = (Vec<float>)((bits & 0x7fffff) | 0x3f800000);  // [1, 2)
    I big = m > 1.41421356f;
    m = big ? m * 0.5f : m;
    exponent = exponent - big;                                     // big is -1 or 0
    Vec<float> e = __builtin_convertvector(exponent, Vec<float>);
    Vec<float> r = m - 1.f;
    Vec<float> p = r * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * r + 1.1676998740e-1f;
    p = p * r - 1.2420140846e-1f;
    p = p * r + 1.4249322787e-1f;
    p = p * r - 1.6668057665e-1f;
    p = p * r + 2.0000714765e-1f;
    p = p * r - 2.4999993993e-1f;
    p = p * r + 3.3333331174e-1f;
    Vec<float> r2 = r * r;
    return (p * r * r2 + e * -2.12194440e-4f - r2 * 0.5f) + r + e * 0.693359375f;
}

inline Vec<float> softplus(Vec<float> x) {  // log(1 + e^x), also where e^x is small; x itself above 20, as PyTorch has it
    Vec<float> e = vexp(x), y = e + 1.f;
    Vec<float> s = vlog(y) - ((y - 1.f) - e) / y;
    return x > 20.f ? x : s;
}

inline Vec<double> softplus(Vec<double> x) {
    for (int w = 0; w < Lanes<double>::W; ++w) x[w] = x[w] > 20 ? x[w] : std::log1p(std::exp(x[w]));
    return x;
}

template <typename V> inline V sigmoid(V x) { return 1 / (1 + vexp(-x)); }

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

template <typename T, typename S> inline Vec<S> load(const Strided& s, int64_t b, int64_t channel, int64_t t, int count) {
    const T* p = (const T*)s.data + b * s.batch + channel * s.channel + t * s.time;
    Vec<S> v = {};
    if (s.channel == 1 && count == Lanes<S>::W) {
        T row[Lanes<S>::W];
        std::memcpy(row, p, sizeof(row));
        for (int w = 0; w < Lanes<S>::W; ++w) v[w] = (S)to_float(row[w]);
    } else {
        for (int w = 0; w < count; ++w) v[w] = (S)to_float(p[w * s.channel]);
    }
    return v;
}

template <typename T, typename S> inline void store(const Strided& s, int64_t b, int64_t channel, int64_t t, int count, Vec<S> v) {
    T* p = (T*)s.data + b * s.batch + channel * s.channel + t * s.time;
    if (s.channel == 1 && count == Lanes<S>::W) {
        T row[Lanes<S>::W];
        for (int w = 0; w < Lanes<S>::W; ++w) row[w] = from_float<T>(v[w]);
        std::memcpy(p, row, sizeof(row));
    } else {
        for (int w = 0; w < count; ++w) p[w * s.channel] = from_float<T>(v[w]);
    }
}

template <typename S> inline Vec<S> lanes_of(const void* base, int64_t channel, int64_t step, int count) {
    Vec<S> v = {};
    if (base) for (int w = 0; w < count; ++w) v[w] = ((const S*)base)[(channel + w) * step];
    return v;
}

template <typename S> inline void put_lanes(void* base, int64_t channel, int64_t step, int count, Vec<S> v) {
    for (int w = 0; w < count; ++w) ((S*)base)[(channel + w) * step] = v[w];
}

// ---- the walk that both passes share

struct Range { int64_t first, last; };

inline Range blocks_of(const Args& a, int64_t group, int64_t blocks) {
    return {blocks * group / a.groups, blocks * (group + 1) / a.groups};
}

template <typename Task> void run_tasks(const Args& a, Task task) {
    const int64_t tasks = a.batch * a.groups;
#ifdef _OPENMP  // PyTorch's own pool of threads, where it is GNU's
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)a.threads)
    for (int64_t i = 0; i < tasks; ++i) task(i / a.groups, i % a.groups);
#else
    std::atomic<int64_t> next{0};
    const auto work = [&] { for (int64_t i; (i = next++) < tasks;) task(i / a.groups, i % a.groups); };
    std::vector<std::thread> helpers;
    for (int64_t i = 1; i < std::min(a.threads, tasks); ++i) helpers.emplace_back(work);
    work();
    for (auto& helper : helpers) helper.join();
#endif
}

template <typename S, int FIXED> struct Sizes {
    static constexpr int W = Lanes<S>::W;
    int64_t N, blocks, chunks;
    explicit Sizes(const Args& a)
        : N(FIXED ? FIXED : a.state), blocks((a.width + W - 1) / W), chunks((a.length + STEPS - 1) / STEPS) {}
    Vec<S>* chunk_state(const Args& a, int64_t b, int64_t chunk, int64_t block) const {
        return (Vec<S>*)a.chunk_states + ((b * chunks + chunk) * blocks + block) * N;
    }
};

// Step size and input of one time step.
template <typename T, typename S> struct Step {
    Vec<S> raw, dt, x;
    Step(const Args& a, int64_t b, int64_t d, int64_t t, int count, Vec<S> bias) {
        raw = load<T, S>(a.delta, b, d, t, count) + bias;
        dt = a.softplus ? softplus(raw) : raw;
        x = load<T, S>(a.u, b, d, t, count);
    }
};

template <typename T, typename S, int FIXED> void forward(const Args& a) {
    using V = Vec<S>;
    const Sizes<S, FIXED> size(a);
    const int64_t N = size.N;
    run_tasks(a, [&](int64_t b, int64_t group) {
        const Range range = blocks_of(a, group, size.blocks);
        const bool reverse = b >= a.reverse_from;
        std::vector<V> state((range.last - range.first) * N), A(state.size());  // A times log2 e, for exp2
        for (int64_t k = range.first; k < range.last; ++k)
            for (int64_t n = 0; n < N; ++n) {
                const int count = (int)std::min<int64_t>(size.W, a.width - k * size.W);
                A[(k - range.first) * N + n] = lanes_of<S>((S*)a.A + n, k * size.W, N, count) * (S)LOG2E;
                state[(k - range.first) * N + n] = V{};
            }
        for (int64_t chunk = 0; chunk < size.chunks; ++chunk) {
            const int64_t begin = chunk * STEPS, end = std::min(begin + STEPS, a.length);
            for (int64_t k = range.first; k < range.last; ++k) {
                const int64_t d = k * size.W;
                const int count = (int)std::min<int64_t>(size.W, a.width - d);
                V* h = &state[(k - range.first) * N];
                const V* A_k = &A[(k - range.first) * N];
                const V D = lanes_of<S>(a.D, d, 1, count), bias = lanes_of<S>(a.delta_bias, d, 1, count);
                if (a.chunk_states) std::memcpy(size.chunk_state(a, b, chunk, k), h, N * sizeof(V));
                for (int64_t i = begin; i < end; ++i) {
                    const int64_t t = reverse ? a.length - 1 - i : i;
                    const S *B = (S*)a.B + (b * a.length + t) * N, *C = (S*)a.C + (b * a.length + t) * N;
                    const Step<T, S> s(a, b, d, t, count, bias);
                    const V dx = s.dt * s.x;
                    V y = D * s.x;
                    for (int64_t n = 0; n < N; ++n) {
                        h[n] = vexp2(s.dt * A_k[n]) * h[n] + dx * B[n];
                        y += h[n] * C[n];
                    }
                    if (a.z.data) {
                        const V z = load<T, S>(a.z, b, d, t, count);
                        y *= z * sigmoid(z);
                    }
                    store<T, S>(a.out, b, d, t, count, y);
                }
            }
        }
        for (int64_t k = range.first; k < range.last; ++k)
            for (int64_t n = 0; n < N; ++n) {
                const int count = (int)std::min<int64_t>(size.W, a.width - k * size.W);
                put_lanes<S>((S*)a.last_state + b * a.width * N + n, k * size.W, N, count, state[(k - range.first) * N + n]);
            }
    });
}

template <typename T, typename S, int FIXED> void backward(const Args& a) {
    using V = Vec<S>;
    const Sizes<S, FIXED> size(a);
    const int64_t N = size.N;
    run_tasks(a, [&](int64_t b, int64_t group) {
        const Range range = blocks_of(a, group, size.blocks);
        const bool reverse = b >= a.reverse_from;
        const int64_t own = range.last - range.first;
        std::vector<V> grad(own * N), A(own * N), dA(own * N), dD(own), dbias(own);  // grad: of the state
        std::vector<V> h((STEPS + 1) * N), decay(STEPS * N), dB(STEPS * N), dC(STEPS * N), inner(STEPS);
        std::memset((void*)grad.data(), 0, grad.size() * sizeof(V));
        std::memset((void*)dA.data(), 0, dA.size() * sizeof(V));
        std::memset((void*)dD.data(), 0, dD.size() * sizeof(V));
        std::memset((void*)dbias.data(), 0, dbias.size() * sizeof(V));
        for (int64_t k = range.first; k < range.last; ++k)
            for (int64_t n = 0; n < N; ++n) {
                const int count = (int)std::min<int64_t>(size.W, a.width - k * size.W);
                A[(k - range.first) * N + n] = lanes_of<S>((S*)a.A + n, k * size.W, N, count) * (S)LOG2E;
            }
        for (int64_t chunk = size.chunks - 1; chunk >= 0; --chunk) {
            const int64_t begin = chunk * STEPS, end = std::min(begin + STEPS, a.length);
            std::memset((void*)dB.data(), 0, dB.size() * sizeof(V));
            std::memset((void*)dC.data(), 0, dC.size() * sizeof(V));
            for (int64_t k = range.first; k < range.last; ++k) {
                const int64_t d = k * size.W, o = k - range.first;
                const int count = (int)std::min<int64_t>(size.W, a.width - d);
                const V* A_k = &A[o * N];
                const V D = lanes_of<S>(a.D, d, 1, count), bias = lanes_of<S>(a.delta_bias, d, 1, count);
                std::memcpy((void*)h.data(), size.chunk_state(a, b, chunk, k), N * sizeof(V));
                for (int64_t i = begin; i < end; ++i) {  // once more forwards, keeping states and decays
                    const int64_t t = reverse ? a.length - 1 - i : i, j = i - begin;
                    const S *B = (S*)a.B + (b * a.length + t) * N, *C = (S*)a.C + (b * a.length + t) * N;
                    const Step<T, S> s(a, b, d, t, count, bias);
                    const V dx = s.dt * s.x;
                    V y = D * s.x;
                    for (int64_t n = 0; n < N; ++n) {
                        decay[j * N + n] = vexp2(s.dt * A_k[n]);
                        h[(j + 1) * N + n] = decay[j * N + n] * h[j * N + n] + dx * B[n];
                        y += h[(j + 1) * N + n] * C[n];
                    }
                    inner[j] = y;
                }
                V *g = &grad[o * N], *dA_k = &dA[o * N];
                for (int64_t i = end - 1; i >= begin; --i) {
                    const int64_t t = reverse ? a.length - 1 - i : i, j = i - begin;
                    const S *B = (S*)a.B + (b * a.length + t) * N, *C = (S*)a.C + (b * a.length + t) * N;
                    const Step<T, S> s(a, b, d, t, count, bias);
                    V dy = load<T, S>(a.dout, b, d, t, count);
                    if (a.z.data) {
                        const V z = load<T, S>(a.z, b, d, t, count), gate = sigmoid(z);
                        store<T, S>(a.dz, b, d, t, count, dy * inner[j] * gate * (1 + z * (1 - gate)));
                        dy *= z * gate;
                    }
                    const V dx = s.dt * s.x;
                    V into_x = {}, ddt = {};
                    for (int64_t n = 0; n < N; ++n) {
                        const V a_n = decay[j * N + n];
                        const V g_n = g[n] + dy * C[n];
                        const V through = g_n * h[j * N + n] * a_n;
                        dC[j * N + n] += dy * h[(j + 1) * N + n];
                        dB[j * N + n] += g_n * dx;
                        dA_k[n] += through * s.dt;
                        ddt += through * A_k[n];
                        into_x += g_n * B[n];
                        g[n] = g_n * a_n;
                    }
                    ddt = ddt * (S)LN2 + into_x * s.x;
                    if (a.softplus) ddt = s.raw > 20 ? ddt : ddt * sigmoid(s.raw);
                    dD[o] += dy * s.x;
                    dbias[o] += ddt;
                    store<T, S>(a.du, b, d, t, count, D * dy + into_x * s.dt);
                    store<T, S>(a.ddelta, b, d, t, count, ddt);
                }
            }
            for (int64_t i = begin; i < end; ++i) {  // over the lanes at last; those beyond the width hold zeros
                const int64_t t = reverse ? a.length - 1 - i : i, j = i - begin;
                S* to_B = (S*)a.dB + ((b * a.groups + group) * a.length + t) * N;
                S* to_C = (S*)a.dC + ((b * a.groups + group) * a.length + t) * N;
                for (int64_t n = 0; n < N; ++n) {
                    S sum_B = 0, sum_C = 0;
                    for (int w = 0; w < size.W; ++w) sum_B += dB[j * N + n][w], sum_C += dC[j * N + n][w];
                    to_B[n] = sum_B, to_C[n] = sum_C;
                }
            }
        }
        for (int64_t k = range.first; k < range.last; ++k) {
            const int64_t d = k * size.W, o = k - range.first;
            const int count = (int)std::min<int64_t>(size.W, a.width - d);
            for (int64_t n = 0; n < N; ++n)
                put_lanes<S>((S*)a.dA + b * a.width * N + n, d, N, count, dA[o * N + n]);
            put_lanes<S>((S*)a.dD + b * a.width, d, 1, count, dD[o]);
            put_lanes<S>((S*)a.ddelta_bias + b * a.width, d, 1, count, dbias[o]);
        }
    });
}

template <typename T, typename S> void run(const Args& a, bool is_backward) {
    if (a.state == 16) is_backward ? backward<T, S, 16>(a) : forward<T, S, 16>(a);
    else is_backward ? backward<T, S, 0>(a) : forward<T, S, 0>(a);
}

}  // namespace

extern "C" {

// Returns 0, or 1 for a dtype that isn't known. dtype: 0 float32, 1 bfloat16, 2 float16, 3 float64.
int etmamba_scan(const Args* a, int dtype, int is_backward) {
    switch (dtype) {
        case 0: run<float, float>(*a, is_backward); return 0;
        case 1: run<bfloat16, float>(*a, is_backward); return 0;
        case 2: run<float16, float>(*a, is_backward); return 0;
        case 3: run<double, double>(*a, is_backward); return 0;
    }
    return 1;
}

int etmamba_scan_bytes() { return BYTES; }
int etmamba_scan_steps() { return (int)STEPS; }
}
