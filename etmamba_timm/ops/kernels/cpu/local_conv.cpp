// The local branch of STCM: dilated depthwise convolutions at three scales within each frame, SiLU, and the residual,
// forward and backward. Called from local_conv.py.
//
// Lanes are channels. A task takes a block of channels through some of the frames: a frame of one block fits the nearest
// cache.

#include "vec.h"

using namespace etmamba;

namespace {

constexpr int SCALES = 3;  // kernels of 3, 5 and 7 taps a side, dilated by 1, 2 and 3
constexpr int TAPS = 9 + 25 + 49;

struct Args {  // must match local_conv.py
    int64_t frames_each, frames, height, width, channels, groups, threads;  // frames_each: in a sequence
    // Tokens [1, B, C, 1 + t·h·w], class token first; residual, out and dout with 4C channels, in the type of sums.
    Strided x, residual, out, dout, dx;
    void *weight, *bias, *dweight;  // [TAPS, C]; [SCALES, C]; [groups, TAPS + SCALES, C]
};

constexpr int side(int scale) { return 3 + 2 * scale; }
constexpr int first_tap(int scale) { return scale == 0 ? 0 : scale == 1 ? 9 : 34; }

// The taps k for which i + (k - radius) · dilation lies within [0, size).
struct Taps {
    int64_t first, last, at;  // at: where tap 0 lies
    Taps(int64_t i, int64_t size, int scale) {
        const int64_t dilation = scale + 1, radius = side(scale) / 2;
        at = i - radius * dilation;
        first = at < 0 ? (-at + dilation - 1) / dilation : 0;
        last = std::min<int64_t>(side(scale), (size - 1 - at) / dilation + 1);
    }
};

template <typename S> struct Frame {  // one block of channels, [h, w]
    int64_t height, width;
    std::vector<Vec<S>> values;
    Frame(const Args& a) : height(a.height), width(a.width), values(height * width) {}
    Vec<S>& operator[](int64_t p) { return values[p]; }

    // The convolution at (i, j) with weights [TAPS]; `flipped` is its transpose.
    Vec<S> convolve(const Vec<S>* weight, int scale, int64_t i, int64_t j, bool flipped) const {
        const Taps rows(i, height, scale), columns(j, width, scale);
        const int64_t k = side(scale), dilation = scale + 1;
        Vec<S> sum = {};
        for (int64_t r = rows.first; r < rows.last; ++r) {
            const Vec<S>* x = &values[(rows.at + r * dilation) * width + columns.at];
            const Vec<S>* w = weight + first_tap(scale) + (flipped ? (k - 1 - r) * k + k - 1 : r * k);
            const int64_t step = flipped ? -1 : 1;
            for (int64_t c = columns.first; c < columns.last; ++c) sum += x[c * dilation] * w[c * step];
        }
        return sum;
    }
};

template <typename S> struct Weights {  // of one block of channels
    Vec<S> weight[TAPS], bias[SCALES];
    Weights(const Args& a, int64_t d, int count) {
        for (int k = 0; k < TAPS; ++k) weight[k] = lanes_of<S>((S*)a.weight + k * a.channels, d, 1, count);
        for (int s = 0; s < SCALES; ++s) bias[s] = lanes_of<S>((S*)a.bias + s * a.channels, d, 1, count);
    }
};

template <typename T, typename S> void read(const Args& a, Frame<S>& x, int64_t frame, int64_t d, int count) {
    const int64_t size = a.height * a.width, first = 1 + frame % a.frames_each * size;
    for (int64_t p = 0; p < size; ++p)
        x[p] = load<T, S>(a.x.at<T>(0, frame / a.frames_each, d, first + p), a.x.channel, count);
}

// Calls work(frame, d, count) for the task's block of channels and each of its frames.
template <typename S, typename Work> void for_frames(const Args& a, int64_t task, Work work) {
    const int64_t group = task % a.groups, d = task / a.groups * Lanes<S>::W;
    const int count = (int)std::min<int64_t>(Lanes<S>::W, a.channels - d);
    for (int64_t frame = a.frames * group / a.groups; frame < a.frames * (group + 1) / a.groups; ++frame)
        work(frame, d, count);
}

template <typename S> int64_t tasks(const Args& a) { return a.groups * ((a.channels + Lanes<S>::W - 1) / Lanes<S>::W); }

template <typename T, typename S> void forward(const Args& a) {
    run_tasks(tasks<S>(a), a.threads, [&](int64_t task) {
        const int64_t begin = task / a.groups * Lanes<S>::W;
        const Weights<S> w(a, begin, (int)std::min<int64_t>(Lanes<S>::W, a.channels - begin));
        Frame<S> x(a);
        for_frames<S>(a, task, [&](int64_t frame, int64_t d, int count) {
            read<T>(a, x, frame, d, count);
            const int64_t b = frame / a.frames_each, first = 1 + frame % a.frames_each * a.height * a.width;
            for (int64_t i = 0; i < a.height; ++i)
                for (int64_t j = 0; j < a.width; ++j) {
                    const int64_t p = i * a.width + j;
                    for (int s = 0; s <= SCALES; ++s) {
                        const Vec<S> y = s < SCALES ? x.convolve(w.weight, s, i, j, false) + w.bias[s] : x[p];
                        const int64_t channel = s * a.channels + d;
                        const S* from = a.residual.at<S>(0, b, channel, first + p);
                        const Vec<S> out = y * sigmoid(y) + load<S, S>(from, a.residual.channel, count);
                        store<S, S>(a.out.at<S>(0, b, channel, first + p), a.out.channel, count, out);
                    }
                }
        });
    });
}

template <typename T, typename S> void backward(const Args& a) {
    using V = Vec<S>;
    run_tasks(tasks<S>(a), a.threads, [&](int64_t task) {
        const int64_t begin = task / a.groups * Lanes<S>::W;
        const int own = (int)std::min<int64_t>(Lanes<S>::W, a.channels - begin);
        const Weights<S> w(a, begin, own);
        V dweight[TAPS + SCALES] = {};
        Frame<S> x(a), dx(a);
        Frame<S> dy[SCALES] = {Frame<S>(a), Frame<S>(a), Frame<S>(a)};
        for_frames<S>(a, task, [&](int64_t frame, int64_t d, int count) {
            read<T>(a, x, frame, d, count);
            const int64_t b = frame / a.frames_each, first = 1 + frame % a.frames_each * a.height * a.width;
            for (int64_t i = 0; i < a.height; ++i)  // through SiLU
                for (int64_t j = 0; j < a.width; ++j) {
                    const int64_t p = i * a.width + j;
                    for (int s = 0; s <= SCALES; ++s) {
                        const V y = s < SCALES ? x.convolve(w.weight, s, i, j, false) + w.bias[s] : x[p];
                        const V gate = sigmoid(y);
                        const S* from = a.dout.at<S>(0, b, s * a.channels + d, first + p);
                        (s < SCALES ? dy[s] : dx)[p] = load<S, S>(from, a.dout.channel, count) * gate * (1 + y * (1 - gate));
                    }
                }
            for (int s = 0; s < SCALES; ++s) {  // gradients of the weights: each tap's sum over the positions it is used at
                const int64_t k = side(s), dilation = s + 1;
                for (int64_t i = 0; i < a.height; ++i) {
                    const Taps rows(i, a.height, s);
                    for (int64_t r = rows.first; r < rows.last; ++r)
                        for (int64_t c = 0; c < k; ++c) {
                            const int64_t shift = (c - k / 2) * dilation;
                            const V *from = &x[(rows.at + r * dilation) * a.width] + shift, *to = &dy[s][i * a.width];
                            V even = {}, odd = {};
                            const int64_t last = std::min(a.width, a.width - shift);
                            int64_t j = std::max<int64_t>(0, -shift);
                            for (; j + 1 < last; j += 2) even += to[j] * from[j], odd += to[j + 1] * from[j + 1];
                            if (j < last) even += to[j] * from[j];
                            dweight[first_tap(s) + r * k + c] += even + odd;
                        }
                }
                for (int64_t p = 0; p < a.height * a.width; ++p) dweight[TAPS + s] += dy[s][p];
            }
            for (int64_t i = 0; i < a.height; ++i)
                for (int64_t j = 0; j < a.width; ++j) {
                    const int64_t p = i * a.width + j;
                    V sum = dx[p];
                    for (int s = 0; s < SCALES; ++s) sum += dy[s].convolve(w.weight, s, i, j, true);
                    store<T, S>(a.dx.at<T>(0, b, d, first + p), a.dx.channel, count, sum);
                }
        });
        for (int k = 0; k < TAPS + SCALES; ++k)
            put_lanes<S>((S*)a.dweight + (task % a.groups * (TAPS + SCALES) + k) * a.channels, begin, 1, own, dweight[k]);
    });
}

}  // namespace

// Returns whether the dtype, that of x, is known.
extern "C" bool etmamba_local_conv(const Args* a, int dtype, bool is_backward) {
    return with_dtype(dtype, [&](auto t, auto s) {
        is_backward ? backward<decltype(t), decltype(s)>(*a) : forward<decltype(t), decltype(s)>(*a);
    });
}
