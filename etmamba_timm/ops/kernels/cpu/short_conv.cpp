// Mamba's causal depthwise convolution along the time steps, then SiLU, forward and backward. Called from short_conv.py.
//
// Lanes are channels. A task is a segment of the time steps of one row (a direction of a sequence), walked step after
// step, all channels of a step at once, so that memory is read in order.

#include "vec.h"

using namespace etmamba;

namespace {

constexpr int64_t STEPS = 64;  // time steps in a segment

struct Args {  // must match short_conv.py
    int64_t directions, batch, width, length, taps, reverse, threads;  // reverse: whether the only direction is backwards
    Strided x, out, dout, dx;
    void *weight, *bias, *dweight;  // [taps, E], the last on the step itself; [E]; [rows, segments, taps + 1, E], bias last
};

struct Segment {  // in scan order: step i of it is time step t(i)
    int64_t row, g, b, begin, end, length;
    bool reverse;
    Segment(const Args& a, int64_t task, int64_t segments)
        : row(task / segments), g(row / a.batch), b(row % a.batch), begin(task % segments * STEPS),
          end(std::min(begin + STEPS, a.length)), length(a.length), reverse(a.directions == 2 ? g == 1 : a.reverse) {}
    int64_t t(int64_t i) const { return reverse ? length - 1 - i : i; }
};

// The convolution's output at step i, before SiLU.
template <typename T, typename S>
inline Vec<S> convolve(const Args& a, const Segment& s, int64_t i, int64_t d, int count) {
    Vec<S> y = lanes_of<S>(a.bias, d, 1, count);
    for (int64_t k = std::max<int64_t>(0, a.taps - 1 - i); k < a.taps; ++k) {
        const Vec<S> x = load<T, S>(a.x.at<T>(s.g, s.b, d, s.t(i - (a.taps - 1 - k))), a.x.channel, count);
        y += x * load<S, S>((S*)a.weight + k * a.width + d, 1, count);
    }
    return y;
}

// The same for the models' four taps, whole vectors of neighbouring channels, and steps i to i + 3, of which the first
// has three before it: each vector of x and of the weights is read once.
template <typename T, typename S> int64_t forward_four(const Args& a, const Segment& s, int64_t i) {
    constexpr int64_t W = Lanes<S>::W;
    const T *x[7], *next[4];
    T* out[4];
    for (int64_t k = 0; k < 7; ++k) x[k] = a.x.at<T>(s.g, s.b, 0, s.t(i + k - 3));
    for (int64_t k = 0; k < 4; ++k) {
        out[k] = a.out.at<T>(s.g, s.b, 0, s.t(i + k));
        next[k] = a.x.at<T>(s.g, s.b, 0, s.t(std::min(i + 4 + k, a.length - 1)));
    }
    const S *weight = (S*)a.weight, *bias = (S*)a.bias;
    int64_t d = 0;
    for (; d + W <= a.width; d += W) {
        Vec<S> v[7], w[4];
        for (int64_t k = 0; k < 7; ++k) v[k] = load_row<T, S>(x[k] + d);
        for (int64_t k = 0; k < 4; ++k) w[k] = load_row<S, S>(weight + k * a.width + d);
        for (int64_t k = 0; k < 4; ++k) __builtin_prefetch(next[k] + d, 0, 2);  // rows are too far apart for the processor
        const Vec<S> b = load_row<S, S>(bias + d);
        for (int64_t k = 0; k < 4; ++k) {
            const Vec<S> y = b + v[k] * w[0] + v[k + 1] * w[1] + v[k + 2] * w[2] + v[k + 3] * w[3];
            store_row<T, S>(out[k] + d, y * sigmoid<rough<T>>(y));
        }
    }
    return d;
}

template <typename T, typename S> void forward(const Args& a) {
    const bool by_four = a.taps == 4 && a.x.channel == 1 && a.out.channel == 1;
    const int64_t segments = (a.length + STEPS - 1) / STEPS;
    run_tasks(a.directions * a.batch * segments, a.threads, [&](int64_t task) {
        const Segment s(a, task, segments);
        for (int64_t i = s.begin; i < s.end;) {
            const bool four = by_four && i >= 3 && i + 4 <= s.end;
            const int64_t done = four ? forward_four<T, S>(a, s, i) : 0;
            for (const int64_t end = i + (four ? 4 : 1); i < end; ++i)
                for (int64_t d = done; d < a.width; d += Lanes<S>::W) {
                    const int count = (int)std::min<int64_t>(Lanes<S>::W, a.width - d);
                    const Vec<S> y = convolve<T, S>(a, s, i, d, count);
                    store<T, S>(a.out.at<T>(s.g, s.b, d, s.t(i)), a.out.channel, count, y * sigmoid<rough<T>>(y));
                }
        }
    });
}

template <typename T, typename S> void backward(const Args& a) {
    using V = Vec<S>;
    const int64_t segments = (a.length + STEPS - 1) / STEPS, reach = a.taps - 1;
    run_tasks(a.directions * a.batch * segments, a.threads, [&](int64_t task) {
        const Segment s(a, task, segments);
        std::vector<V> dy(STEPS + reach), dweight(a.taps + 1);
        for (int64_t d = 0; d < a.width; d += Lanes<S>::W) {
            const int count = (int)std::min<int64_t>(Lanes<S>::W, a.width - d);
            const int64_t known = std::min(s.end + reach, a.length) - s.begin;  // steps after the segment need its x
            for (int64_t j = 0; j < known; ++j) {
                const V y = convolve<T, S>(a, s, s.begin + j, d, count), gate = sigmoid<rough<T>>(y);
                const V dout = load<T, S>(a.dout.at<T>(s.g, s.b, d, s.t(s.begin + j)), a.dout.channel, count);
                dy[j] = dout * gate * (1 + y * (1 - gate));
            }
            std::memset((void*)dweight.data(), 0, dweight.size() * sizeof(V));
            for (int64_t i = s.begin; i < s.end; ++i) {
                const V x = load<T, S>(a.x.at<T>(s.g, s.b, d, s.t(i)), a.x.channel, count);
                const int64_t j = i - s.begin;
                V dx = {};
                for (int64_t k = std::max<int64_t>(0, j + a.taps - known); k < a.taps; ++k) {
                    const V dy_k = dy[j + reach - k];
                    dx += dy_k * load<S, S>((S*)a.weight + k * a.width + d, 1, count);
                    dweight[k] += dy_k * x;
                }
                dweight[a.taps] += dy[j];
                store<T, S>(a.dx.at<T>(s.g, s.b, d, s.t(i)), a.dx.channel, count, dx);
            }
            for (int64_t k = 0; k <= a.taps; ++k)
                put_lanes<S>((S*)a.dweight + (task * (a.taps + 1) + k) * a.width, d, 1, count, dweight[k]);
        }
    });
}

}  // namespace

// Returns whether the dtype is known.
extern "C" bool etmamba_short_conv(const Args* a, int dtype, bool is_backward) {
    return with_dtype(dtype, [&](auto t, auto s) {
        is_backward ? backward<decltype(t), decltype(s)>(*a) : forward<decltype(t), decltype(s)>(*a);
    });
}

extern "C" int64_t etmamba_short_conv_segments(int64_t length) { return (length + STEPS - 1) / STEPS; }
