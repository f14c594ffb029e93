// The selective scan on a CPU, forward and backward. Called from cpu.py.
//
// Lanes are channels: one vector holds W neighbouring channels, and N of them the states of a block of channels. Time
// is walked in chunks of STEPS, within a chunk block after block: rows of memory are read in order, and B and C, which
// all channels share, stay in the nearest cache. The forward pass keeps each chunk's first state; the backward pass
// starts from these and recomputes the rest, chunk by chunk, from the last to the first.

#include "vec.h"

using namespace etmamba;

namespace {

constexpr int64_t STEPS = 32;  // time steps in a chunk

struct Args {  // must match cpu.py
    // A row is one direction of one sequence, the first direction's first. The directions' outputs are added.
    int64_t directions, batch, width, length, state, reverse_from, groups, threads, softplus;  // reverse_from: a row
    Strided u, delta, z, out;               // z.data may be null; out has one direction
    Strided B, C;                           // in the type of sums, their channels (the states) next to each other
    void *A, *D, *delta_bias;               // [D, N]; [D] or null; [D] or null
    void *last_state, *chunk_states;        // [rows, D, N]; [rows, chunks, blocks, N, W] or null
    Strided dout, du, ddelta, dz;           // backward only, like the rest; dout has one direction
    void *dA, *dB, *dC, *dD, *ddelta_bias;  // [rows, D, N]; [rows, groups, L, N] twice; [rows, D] twice
};

struct Range { int64_t first, last; };

inline Range blocks_of(const Args& a, int64_t group, int64_t blocks) {
    return {blocks * group / a.groups, blocks * (group + 1) / a.groups};
}

struct Walk {  // over the steps of a row, in scan order
    int64_t g, b, row, length;
    bool reverse;
    Walk(const Args& a, int64_t g, int64_t b)
        : g(g), b(b), row(g * a.batch + b), length(a.length), reverse(row >= a.reverse_from) {}
    int64_t t(int64_t i) const { return reverse ? length - 1 - i : i; }
    template <typename S> const S* states(const Strided& x, int64_t i) const { return x.at<S>(g, b, 0, t(i)); }
};

template <typename S, int FIXED> struct Sizes {
    static constexpr int W = Lanes<S>::W;
    int64_t N, blocks, chunks;
    explicit Sizes(const Args& a)
        : N(FIXED ? FIXED : a.state), blocks((a.width + W - 1) / W), chunks((a.length + STEPS - 1) / STEPS) {}
    Vec<S>* chunk_state(const Args& a, int64_t row, int64_t chunk, int64_t block) const {
        return (Vec<S>*)a.chunk_states + ((row * chunks + chunk) * blocks + block) * N;
    }
};

// What a chunk's recurrence needs at each step. The steps are independent, so it is computed for all at once.
template <typename T, typename S> struct Steps {
    Vec<S> raw[STEPS], dt[STEPS], x[STEPS];
    // Prefetches the next chunk, `ahead` steps away: a block's rows are too far apart for the processor to do so by
    // itself.
    void read(const Args& a, const Walk& walk, int64_t begin, int64_t end, int64_t ahead, int64_t d, int count) {
        const Vec<S> bias = lanes_of<S>(a.delta_bias, d, 1, count);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t j = i - begin, t = walk.t(i), g = walk.g, b = walk.b;
            raw[j] = load<T, S>(a.delta.at<T>(g, b, d, t), a.delta.channel, count) + bias;
            dt[j] = a.softplus ? softplus<rough<T>>(raw[j]) : raw[j];
            x[j] = load<T, S>(a.u.at<T>(g, b, d, t), a.u.channel, count);
            const int64_t next = walk.t(std::max<int64_t>(0, std::min(i + ahead, a.length - 1)));
            for (const Strided* from : {&a.delta, &a.u, &a.z})
                if (from->data) __builtin_prefetch(from->at<T>(g, b, d, next), 0, 2);
            const Strided& other = a.dout.data ? a.dout : a.out;
            __builtin_prefetch(other.at<T>(0, b, d, next), 0, 2);
        }
    }
};

// A log2 e of the blocks in the range, [blocks, N], for exp2.
template <typename S, int FIXED> std::vector<Vec<S>> decay_rates(const Args& a, const Range& range) {
    const int64_t N = FIXED ? FIXED : a.state, W = Lanes<S>::W;
    std::vector<Vec<S>> A((range.last - range.first) * N);
    for (int64_t k = range.first; k < range.last; ++k)
        for (int64_t n = 0; n < N; ++n)
            A[(k - range.first) * N + n] =
                lanes_of<S>((S*)a.A + n, k * W, N, (int)std::min(W, a.width - k * W)) * (S)LOG2E;
    return A;
}

template <typename T, typename S, int FIXED> void forward(const Args& a) {
    using V = Vec<S>;
    const Sizes<S, FIXED> size(a);
    run_tasks(a.batch * a.groups, a.threads, [&](int64_t task) {
        const int64_t N = FIXED ? FIXED : a.state, b = task / a.groups;
        const Range range = blocks_of(a, task % a.groups, size.blocks);
        const std::vector<V> A = decay_rates<S, FIXED>(a, range);
        std::vector<V> state(A.size());
        Steps<T, S> steps;
        V y[STEPS];
        for (int64_t g = 0; g < a.directions; ++g) {
            const Walk walk(a, g, b);
            std::memset((void*)state.data(), 0, state.size() * sizeof(V));
            for (int64_t chunk = 0; chunk < size.chunks; ++chunk) {
                const int64_t begin = chunk * STEPS, end = std::min(begin + STEPS, a.length);
                for (int64_t k = range.first; k < range.last; ++k) {
                    const int64_t d = k * size.W;
                    const int count = (int)std::min<int64_t>(size.W, a.width - d);
                    V* kept = &state[(k - range.first) * N];
                    if (a.chunk_states) std::memcpy((void*)size.chunk_state(a, walk.row, chunk, k), kept, N * sizeof(V));
                    const V* A_k = &A[(k - range.first) * N];
                    steps.read(a, walk, begin, end, STEPS, d, count);

                    V registers[FIXED ? FIXED : 1], *h = FIXED ? registers : kept;
                    if (FIXED) std::memcpy((void*)h, kept, N * sizeof(V));
                    for (int64_t j = 0; j < end - begin; ++j) {
                        const S *B = walk.states<S>(a.B, begin + j), *C = walk.states<S>(a.C, begin + j);
                        const V dt = steps.dt[j], dx = dt * steps.x[j];
                        V even = {}, odd = {};  // two sums, so that additions don't wait for each other
#pragma GCC unroll 16
                        for (int64_t n = 0; n < N; ++n) {
                            h[n] = vexp2<rough<T>>(dt * A_k[n]) * h[n] + dx * B[n];
                            (n % 2 ? odd : even) += h[n] * C[n];
                        }
                        y[j] = even + odd;
                    }
                    if (FIXED) std::memcpy((void*)kept, h, N * sizeof(V));

                    const V D = lanes_of<S>(a.D, d, 1, count);
                    for (int64_t i = begin; i < end; ++i) {
                        const int64_t t = walk.t(i), j = i - begin;
                        V out = y[j] + D * steps.x[j];
                        if (a.z.data) {
                            const V z = load<T, S>(a.z.at<T>(g, b, d, t), a.z.channel, count);
                            out *= z * sigmoid<rough<T>>(z);
                        }
                        T* to = a.out.at<T>(0, b, d, t);
                        if (g) out += load<T, S>(to, a.out.channel, count);
                        store<T, S>(to, a.out.channel, count, out);
                    }
                }
            }
            for (int64_t k = range.first; k < range.last; ++k)
                for (int64_t n = 0; n < N; ++n) {
                    const int count = (int)std::min<int64_t>(size.W, a.width - k * size.W);
                    S* last = (S*)a.last_state + walk.row * a.width * N + n;
                    put_lanes<S>(last, k * size.W, N, count, state[(k - range.first) * N + n]);
                }
        }
    });
}

template <typename T, typename S, int FIXED> void backward(const Args& a) {
    using V = Vec<S>;
    const Sizes<S, FIXED> size(a);
    run_tasks(a.directions * a.batch * a.groups, a.threads, [&](int64_t task) {
        const int64_t N = FIXED ? FIXED : a.state, group = task % a.groups;
        const Walk walk(a, task / a.groups / a.batch, task / a.groups % a.batch);
        const int64_t g = walk.g, b = walk.b;
        const Range range = blocks_of(a, group, size.blocks);
        const int64_t own = range.last - range.first;
        const std::vector<V> A = decay_rates<S, FIXED>(a, range);
        std::vector<V> grad(own * N), dA(own * N), dD(own), dbias(own);  // grad: of the state
        std::vector<V> h((STEPS + 1) * N), decay(STEPS * N), dB(STEPS * N), dC(STEPS * N);
        for (auto* zeros : {&grad, &dA, &dD, &dbias})
            std::memset((void*)zeros->data(), 0, zeros->size() * sizeof(V));
        Steps<T, S> steps;
        V y[STEPS], dy[STEPS], into_dt[STEPS], into_x[STEPS];
        for (int64_t chunk = size.chunks - 1; chunk >= 0; --chunk) {
            const int64_t begin = chunk * STEPS, end = std::min(begin + STEPS, a.length);
            std::memset((void*)dB.data(), 0, dB.size() * sizeof(V));
            std::memset((void*)dC.data(), 0, dC.size() * sizeof(V));
            for (int64_t k = range.first; k < range.last; ++k) {
                const int64_t d = k * size.W, o = k - range.first;
                const int count = (int)std::min<int64_t>(size.W, a.width - d);
                const V* A_k = &A[o * N];
                const V D = lanes_of<S>(a.D, d, 1, count);
                steps.read(a, walk, begin, end, -STEPS, d, count);

                // Forwards again, keeping states and decays.
                std::memcpy((void*)h.data(), size.chunk_state(a, walk.row, chunk, k), N * sizeof(V));
                for (int64_t j = 0; j < end - begin; ++j) {
                    const S *B = walk.states<S>(a.B, begin + j), *C = walk.states<S>(a.C, begin + j);
                    const V dt = steps.dt[j], dx = dt * steps.x[j];
                    y[j] = D * steps.x[j];
#pragma GCC unroll 4
                    for (int64_t n = 0; n < N; ++n) {
                        decay[j * N + n] = vexp2<rough<T>>(dt * A_k[n]);
                        h[(j + 1) * N + n] = decay[j * N + n] * h[j * N + n] + dx * B[n];
                        y[j] += h[(j + 1) * N + n] * C[n];
                    }
                }

                for (int64_t i = begin; i < end; ++i) {  // through the gate
                    const int64_t t = walk.t(i), j = i - begin;
                    dy[j] = load<T, S>(a.dout.at<T>(0, b, d, t), a.dout.channel, count);
                    if (!a.z.data) continue;
                    const V z = load<T, S>(a.z.at<T>(g, b, d, t), a.z.channel, count), gate = sigmoid<rough<T>>(z);
                    store<T, S>(a.dz.at<T>(g, b, d, t), a.dz.channel, count, dy[j] * y[j] * gate * (1 + z * (1 - gate)));
                    dy[j] *= z * gate;
                }

                V *dh = &grad[o * N], *dA_k = &dA[o * N];
                for (int64_t j = end - begin - 1; j >= 0; --j) {  // backwards through the recurrence
                    const S *B = walk.states<S>(a.B, begin + j), *C = walk.states<S>(a.C, begin + j);
                    const V dt = steps.dt[j], dx = dt * steps.x[j], dy_j = dy[j];
                    V to_dt = {}, to_x = {};
#pragma GCC unroll 4
                    for (int64_t n = 0; n < N; ++n) {
                        const V dh_n = dh[n] + dy_j * C[n], carried = dh_n * decay[j * N + n];
                        const V through = carried * h[j * N + n];
                        dC[j * N + n] += dy_j * h[(j + 1) * N + n];
                        dB[j * N + n] += dh_n * dx;
                        dA_k[n] += through * dt;
                        to_dt += through * A_k[n];
                        to_x += dh_n * B[n];
                        dh[n] = carried;
                    }
                    into_dt[j] = to_dt, into_x[j] = to_x;
                }

                for (int64_t i = begin; i < end; ++i) {
                    const int64_t t = walk.t(i), j = i - begin;
                    const V x = steps.x[j];
                    V ddt = into_dt[j] * (S)LN2 + into_x[j] * x;
                    if (a.softplus) ddt *= sigmoid<rough<T>>(steps.raw[j]);
                    dD[o] += dy[j] * x;
                    dbias[o] += ddt;
                    store<T, S>(a.du.at<T>(g, b, d, t), a.du.channel, count, D * dy[j] + into_x[j] * steps.dt[j]);
                    store<T, S>(a.ddelta.at<T>(g, b, d, t), a.ddelta.channel, count, ddt);
                }
            }
            for (int64_t i = begin; i < end; ++i) {  // sum over the lanes; those beyond the width hold zeros
                const int64_t at = ((walk.row * a.groups + group) * a.length + walk.t(i)) * N, j = i - begin;
                for (int64_t n = 0; n < N; ++n) {
                    S sum_B = 0, sum_C = 0;
                    for (int w = 0; w < size.W; ++w) sum_B += dB[j * N + n][w], sum_C += dC[j * N + n][w];
                    ((S*)a.dB)[at + n] = sum_B, ((S*)a.dC)[at + n] = sum_C;
                }
            }
        }
        for (int64_t k = range.first; k < range.last; ++k) {
            const int64_t d = k * size.W, o = k - range.first;
            const int count = (int)std::min<int64_t>(size.W, a.width - d);
            for (int64_t n = 0; n < N; ++n)
                put_lanes<S>((S*)a.dA + walk.row * a.width * N + n, d, N, count, dA[o * N + n]);
            put_lanes<S>((S*)a.dD + walk.row * a.width, d, 1, count, dD[o]);
            put_lanes<S>((S*)a.ddelta_bias + walk.row * a.width, d, 1, count, dbias[o]);
        }
    });
}

template <typename T, typename S> void run(const Args& a, bool is_backward) {
    if (a.state == 16) is_backward ? backward<T, S, 16>(a) : forward<T, S, 16>(a);
    else is_backward ? backward<T, S, 0>(a) : forward<T, S, 0>(a);
}

}  // namespace

extern "C" {

// Returns whether the dtype is known.
bool etmamba_scan(const Args* a, int dtype, bool is_backward) {
    return with_dtype(dtype, [&](auto t, auto s) { run<decltype(t), decltype(s)>(*a, is_backward); });
}

int etmamba_scan_bytes() { return BYTES; }
int etmamba_scan_steps() { return (int)STEPS; }
}
