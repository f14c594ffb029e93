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

constexpr int64_t BLOCK = 7;                      // neighbouring positions whose sums are in registers at once
constexpr int64_t MARGIN = 9;                     // reach of the widest kernel

template <typename S> struct Frame {  // one block of channels, [h, w], with zeros to both sides of each row
    int64_t height, width, stride;
    std::vector<Vec<S>> values;
    Frame(const Args& a)
        : height(a.height), width(a.width), stride((width + BLOCK - 1) / BLOCK * BLOCK + 2 * MARGIN), values(height * stride) {
        std::memset((void*)values.data(), 0, values.size() * sizeof(Vec<S>));
    }
    Vec<S>* row(int64_t i) { return &values[i * stride + MARGIN]; }
    const Vec<S>* row(int64_t i) const { return &values[i * stride + MARGIN]; }

    // Adds the convolution at (i, j) to (i, j + BLOCK - 1) with weights [TAPS]; FLIPPED is its transpose.
    template <int SCALE, bool FLIPPED> void convolve(const Vec<S>* weight, int64_t i, int64_t j, Vec<S>* sums) const {
        constexpr int64_t k = side(SCALE), dilation = SCALE + 1, radius = k / 2;
        Vec<S> sum[BLOCK];
#pragma GCC unroll 7
        for (int64_t u = 0; u < BLOCK; ++u) sum[u] = sums[u];
        for (int64_t r = 0; r < k; ++r) {
            const int64_t from = i + (r - radius) * dilation;
            if (from < 0 || from >= height) continue;
            const Vec<S>* x = row(from) + j - radius * dilation;
            const Vec<S>* w = weight + first_tap(SCALE) + (FLIPPED ? (k - 1 - r) * k : r * k);
            for (int64_t c = 0; c < k; ++c) {
                const Vec<S> w_c = w[FLIPPED ? k - 1 - c : c];
#pragma GCC unroll 7
                for (int64_t u = 0; u < BLOCK; ++u) sum[u] += x[c * dilation + u] * w_c;
            }
        }
#pragma GCC unroll 7
        for (int64_t u = 0; u < BLOCK; ++u) sums[u] = sum[u];
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
        x.row(p / a.width)[p % a.width] = load<T, S>(a.x.at<T>(0, frame / a.frames_each, d, first + p), a.x.channel, count);
}

// Calls work(frame, d, count) for the task's block of channels and each of its frames.
template <typename S, typename Work> void for_frames(const Args& a, int64_t task, Work work) {
    const int64_t group = task % a.groups, d = task / a.groups * Lanes<S>::W;
    const int count = (int)std::min<int64_t>(Lanes<S>::W, a.channels - d);
    for (int64_t frame = a.frames * group / a.groups; frame < a.frames * (group + 1) / a.groups; ++frame)
        work(frame, d, count);
}

template <typename S> int64_t tasks(const Args& a) { return a.groups * ((a.channels + Lanes<S>::W - 1) / Lanes<S>::W); }

// The inputs of SiLU at (i, j) to (i, j + BLOCK - 1): the three convolutions and x itself.
template <typename S> struct Local {
    Vec<S> y[SCALES + 1][BLOCK];
    Local(const Frame<S>& x, const Weights<S>& w, int64_t i, int64_t j) {
        for (int64_t u = 0; u < BLOCK; ++u) {
            for (int s = 0; s < SCALES; ++s) y[s][u] = w.bias[s];
            y[SCALES][u] = x.row(i)[j + u];
        }
        x.template convolve<0, false>(w.weight, i, j, y[0]);
        x.template convolve<1, false>(w.weight, i, j, y[1]);
        x.template convolve<2, false>(w.weight, i, j, y[2]);
    }
};

// Calls work(i, j, positions) for each block of neighbouring positions.
template <typename Work> void for_blocks(const Args& a, Work work) {
    for (int64_t i = 0; i < a.height; ++i)
        for (int64_t j = 0; j < a.width; j += BLOCK) work(i, j, std::min(BLOCK, a.width - j));
}

template <typename T, typename S> void forward(const Args& a) {
    run_tasks(tasks<S>(a), a.threads, [&](int64_t task) {
        const int64_t begin = task / a.groups * Lanes<S>::W;
        const Weights<S> w(a, begin, (int)std::min<int64_t>(Lanes<S>::W, a.channels - begin));
        Frame<S> x(a);
        for_frames<S>(a, task, [&](int64_t frame, int64_t d, int count) {
            read<T>(a, x, frame, d, count);
            const int64_t b = frame / a.frames_each, first = 1 + frame % a.frames_each * a.height * a.width;
            for_blocks(a, [&](int64_t i, int64_t j, int64_t positions) {
                for (int64_t u = 0; u < positions; ++u)  // needed after the convolutions; too far apart for the processor
                    for (int s = 0; s <= SCALES; ++s) {
                        const int64_t channel = s * a.channels + d, p = first + i * a.width + j + u;
                        __builtin_prefetch(a.residual.at<S>(0, b, channel, p), 0, 2);
                        __builtin_prefetch(a.out.at<S>(0, b, channel, p), 1, 2);
                    }
                const Local<S> local(x, w, i, j);
                for (int64_t u = 0; u < positions; ++u)
                    for (int s = 0; s <= SCALES; ++s) {
                        const Vec<S> y = local.y[s][u];
                        const int64_t channel = s * a.channels + d, p = first + i * a.width + j + u;
                        const S* from = a.residual.at<S>(0, b, channel, p);
                        const Vec<S> out = y * sigmoid(y) + load<S, S>(from, a.residual.channel, count);
                        store<S, S>(a.out.at<S>(0, b, channel, p), a.out.channel, count, out);
                    }
            });
        });
    });
}

// Adds to dweight what a frame contributes: for each tap, the sum over the positions that it is used at.
template <int SCALE, typename S> void add_weight_gradients(const Frame<S>& x, const Frame<S>& dy, Vec<S>* dweight) {
    constexpr int64_t k = side(SCALE), dilation = SCALE + 1, radius = k / 2;
    for (int64_t i = 0; i < x.height; ++i)
        for (int64_t r = 0; r < k; ++r) {
            const int64_t from = i + (r - radius) * dilation;
            if (from < 0 || from >= x.height) continue;
            const Vec<S>*x_row = x.row(from) - radius * dilation, *dy_row = dy.row(i);
            Vec<S> sum[k] = {};
            for (int64_t j = 0; j < x.width; ++j)
                for (int64_t c = 0; c < k; ++c) sum[c] += dy_row[j] * x_row[j + c * dilation];
            for (int64_t c = 0; c < k; ++c) dweight[first_tap(SCALE) + r * k + c] += sum[c];
        }
    for (int64_t i = 0; i < x.height; ++i)
        for (int64_t j = 0; j < x.width; ++j) dweight[TAPS + SCALE] += dy.row(i)[j];
}

template <typename T, typename S> void backward(const Args& a) {
    using V = Vec<S>;
    run_tasks(tasks<S>(a), a.threads, [&](int64_t task) {
        const int64_t begin = task / a.groups * Lanes<S>::W;
        const int own = (int)std::min<int64_t>(Lanes<S>::W, a.channels - begin);
        const Weights<S> w(a, begin, own);
        V dweight[TAPS + SCALES] = {};
        Frame<S> x(a);
        Frame<S> dy[SCALES + 1] = {Frame<S>(a), Frame<S>(a), Frame<S>(a), Frame<S>(a)};
        for_frames<S>(a, task, [&](int64_t frame, int64_t d, int count) {
            read<T>(a, x, frame, d, count);
            const int64_t b = frame / a.frames_each, first = 1 + frame % a.frames_each * a.height * a.width;
            for_blocks(a, [&](int64_t i, int64_t j, int64_t positions) {  // through SiLU
                const Local<S> local(x, w, i, j);
                for (int64_t u = 0; u < positions; ++u)
                    for (int s = 0; s <= SCALES; ++s) {
                        const V y = local.y[s][u], gate = sigmoid(y);
                        const S* from = a.dout.at<S>(0, b, s * a.channels + d, first + i * a.width + j + u);
                        dy[s].row(i)[j + u] = load<S, S>(from, a.dout.channel, count) * gate * (1 + y * (1 - gate));
                    }
            });
            add_weight_gradients<0>(x, dy[0], dweight);
            add_weight_gradients<1>(x, dy[1], dweight);
            add_weight_gradients<2>(x, dy[2], dweight);
            for_blocks(a, [&](int64_t i, int64_t j, int64_t positions) {
                V sums[BLOCK];
                for (int64_t u = 0; u < BLOCK; ++u) sums[u] = dy[SCALES].row(i)[j + u];
                dy[0].template convolve<0, true>(w.weight, i, j, sums);
                dy[1].template convolve<1, true>(w.weight, i, j, sums);
                dy[2].template convolve<2, true>(w.weight, i, j, sums);
                for (int64_t u = 0; u < positions; ++u)
                    store<T, S>(a.dx.at<T>(0, b, d, first + i * a.width + j + u), a.dx.channel, count, sums[u]);
            });
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
