// One stage of STFP: depthwise 3×3×3 convolution (or none), pointwise convolution, layer norm over the channels, ReLU,
// residual; forward and backward. Called from conv_norm_relu.py.
//
// Lanes are neighbouring positions of a row of pixels, since channels are few. A task takes some of a frame's rows; for
// each it copies the rows around it, padded with zeros, into the nearest cache.

#include "vec.h"

using namespace etmamba;

namespace {

constexpr int64_t ROWS = 16;  // of pixels in a task

struct Args {  // must match conv_norm_relu.py
    int64_t batch, channels, frames, height, width, depthwise, threads;  // depthwise: 3 taps a side, or 1 for none
    double eps;
    void *x, *residual, *out;  // [B, C, T, H, W], contiguous; residual or null
    void *parameters;          // depthwise [C, 27] and [C] (if any), pointwise [C, C] and [C], norm [C] and [C]
    void *dout, *dv, *dparameters;  // dv: gradient of the depthwise convolution's output; [tasks, parameters]
};

template <typename S> struct Parameters {  // S: the parameters; Vec<S>: their gradients, one for each lane
    S *taps, *taps_bias, *mix, *mix_bias, *gain, *shift;
    Parameters(const Args& a, S* base) {
        const int64_t C = a.channels, K = a.depthwise == 3 ? 27 : 0;
        taps = base, taps_bias = taps + C * K, mix = taps_bias + (K ? C : 0), mix_bias = mix + C * C;
        gain = mix_bias + C, shift = gain + C;
    }
    static int64_t count(const Args& a) { return a.channels * ((a.depthwise == 3 ? 28 : 0) + a.channels + 3); }
};

template <typename T> T* row_of(const Args& a, void* base, int64_t b, int64_t c, int64_t t, int64_t h) {
    return (T*)base + (((b * a.channels + c) * a.frames + t) * a.height + h) * a.width;
}

// The rows around one row of each channel, [C, 9, stride], with zeros outside the clip and one column to either side.
template <typename T, typename S> struct Around {
    int64_t stride;
    std::vector<S> values;
    explicit Around(const Args& a)
        : stride(a.width + 2 + Lanes<S>::W), values(a.channels * (a.depthwise == 3 ? 9 : 1) * stride) {}
    void read(const Args& a, void* base, int64_t b, int64_t t, int64_t h) {
        const int64_t reach = a.depthwise == 3;
        S* to = values.data() + 1;
        for (int64_t c = 0; c < a.channels; ++c)
            for (int64_t dt = -reach; dt <= reach; ++dt)
                for (int64_t dh = -reach; dh <= reach; ++dh, to += stride) {
                    const bool inside = t + dt >= 0 && t + dt < a.frames && h + dh >= 0 && h + dh < a.height;
                    if (!inside) {
                        std::fill(to, to + a.width, S(0));
                        continue;
                    }
                    const T* from = row_of<T>(a, base, b, c, t + dt, h + dh);
                    int64_t w = 0;
                    for (; w + Lanes<S>::W <= a.width; w += Lanes<S>::W) {
                        const Vec<S> v = load_row<T, S>(from + w);
                        std::memcpy(to + w, &v, sizeof(v));
                    }
                    for (; w < a.width; ++w) to[w] = (S)to_float(from[w]);
                }
    }
    Vec<S> at(int64_t c, int64_t tap, int64_t w) const {  // of 27
        return load_row<S, S>(&values[(c * 9 + tap / 3) * stride + w + tap % 3]);
    }
};

// The depthwise convolution of channel c at W positions from w.
template <typename T, typename S>
Vec<S> depthwise(const Args& a, const Around<T, S>& x, const S* taps, int64_t c, int64_t w) {
    if (a.depthwise != 3) return load_row<S, S>(&x.values[c * x.stride + w + 1]);
    Vec<S> even = {}, odd = {};
    for (int64_t k = 0; k < 27; ++k) (k % 2 ? odd : even) += x.at(c, k, w) * taps[c * 27 + k];
    return even + odd;
}

// The stage's inner values at W positions, of all channels.
template <typename T, typename S> struct Stage {
    std::vector<Vec<S>> v, normed;
    Vec<S> scale;
    explicit Stage(const Args& a) : v(a.channels), normed(a.channels) {}
    void compute(const Args& a, const Around<T, S>& x, const Parameters<const S>& p, int64_t w) {
        const int64_t C = a.channels;
        for (int64_t c = 0; c < C; ++c) {
            v[c] = depthwise(a, x, p.taps, c, w);
            if (a.depthwise == 3) v[c] += p.taps_bias[c];
        }
        Vec<S> mean = {}, square = {};
        for (int64_t o = 0; o < C; ++o) {
            normed[o] = Vec<S>{} + p.mix_bias[o];
            for (int64_t c = 0; c < C; ++c) normed[o] += v[c] * p.mix[o * C + c];
            mean += normed[o];
        }
        mean *= S(1) / C;
        for (int64_t o = 0; o < C; ++o) normed[o] -= mean, square += normed[o] * normed[o];
        scale = square * (S(1) / C) + (S)a.eps;
        for (int l = 0; l < Lanes<S>::W; ++l) scale[l] = 1 / std::sqrt(scale[l]);
        for (int64_t o = 0; o < C; ++o) normed[o] *= scale;
    }
};

struct Rows {  // of a task
    int64_t b, t, first, last;
    Rows(const Args& a, int64_t task) {
        const int64_t parts = (a.height + ROWS - 1) / ROWS;
        first = task % parts * ROWS, last = std::min(first + ROWS, a.height);
        b = task / parts / a.frames, t = task / parts % a.frames;
    }
    static int64_t tasks(const Args& a) { return a.batch * a.frames * ((a.height + ROWS - 1) / ROWS); }
};

template <typename T, typename S> void forward(const Args& a) {
    const Parameters<const S> p(a, (const S*)a.parameters);
    run_tasks(Rows::tasks(a), a.threads, [&](int64_t task) {
        const Rows rows(a, task);
        Around<T, S> x(a);
        Stage<T, S> stage(a);
        for (int64_t h = rows.first; h < rows.last; ++h) {
            x.read(a, a.x, rows.b, rows.t, h);
            for (int64_t w = 0; w < a.width; w += Lanes<S>::W) {
                const int count = (int)std::min<int64_t>(Lanes<S>::W, a.width - w);
                stage.compute(a, x, p, w);
                for (int64_t c = 0; c < a.channels; ++c) {
                    Vec<S> y = stage.normed[c] * p.gain[c] + p.shift[c];
                    y = y > 0 ? y : y * 0;  // keeps NaN
                    if (a.residual) y += load<T, S>(row_of<T>(a, a.residual, rows.b, c, rows.t, h) + w, 1, count);
                    store<T, S>(row_of<T>(a, a.out, rows.b, c, rows.t, h) + w, 1, count, y);
                }
            }
        }
    });
}

template <typename T, typename S> void backward(const Args& a) {
    using V = Vec<S>;
    const int64_t C = a.channels, parameters = Parameters<S>::count(a);
    const Parameters<const S> p(a, (const S*)a.parameters);
    run_tasks(Rows::tasks(a), a.threads, [&](int64_t task) {
        const Rows rows(a, task);
        Around<T, S> x(a);
        Stage<T, S> stage(a);
        std::vector<V> sums(parameters), dn(C), dv(C);
        std::memset((void*)sums.data(), 0, sums.size() * sizeof(V));
        const Parameters<V> d(a, sums.data());
        for (int64_t h = rows.first; h < rows.last; ++h) {
            x.read(a, a.x, rows.b, rows.t, h);
            for (int64_t w = 0; w < a.width; w += Lanes<S>::W) {
                const int count = (int)std::min<int64_t>(Lanes<S>::W, a.width - w);
                stage.compute(a, x, p, w);
                V mean = {}, along = {};
                for (int64_t c = 0; c < C; ++c) {
                    V dy = load<T, S>(row_of<T>(a, a.dout, rows.b, c, rows.t, h) + w, 1, count);
                    dy = stage.normed[c] * p.gain[c] + p.shift[c] > 0 ? dy : dy * 0;
                    d.gain[c] += dy * stage.normed[c], d.shift[c] += dy;
                    dn[c] = dy * p.gain[c];
                    mean += dn[c], along += dn[c] * stage.normed[c];
                }
                mean *= S(1) / C, along *= S(1) / C;
                for (int64_t c = 0; c < C; ++c) dv[c] = V{};
                for (int64_t o = 0; o < C; ++o) {
                    const V dmixed = (dn[o] - mean - stage.normed[o] * along) * stage.scale;
                    d.mix_bias[o] += dmixed;
                    for (int64_t c = 0; c < C; ++c) {
                        d.mix[o * C + c] += dmixed * stage.v[c];
                        dv[c] += dmixed * p.mix[o * C + c];
                    }
                }
                for (int64_t c = 0; c < C; ++c) {
                    store<T, S>(row_of<T>(a, a.dv, rows.b, c, rows.t, h) + w, 1, count, dv[c]);
                    if (a.depthwise != 3) continue;
                    d.taps_bias[c] += dv[c];
                    for (int64_t k = 0; k < 27; ++k) d.taps[c * 27 + k] += dv[c] * x.at(c, k, w);
                }
            }
        }
        for (int64_t i = 0; i < parameters; ++i) {
            S sum = 0;
            for (int l = 0; l < Lanes<S>::W; ++l) sum += sums[i][l];
            ((S*)a.dparameters)[task * parameters + i] = sum;
        }
    });
}

// out = the depthwise convolution alone, without its bias.
template <typename T, typename S> void convolve(const Args& a) {
    run_tasks(Rows::tasks(a), a.threads, [&](int64_t task) {
        const Rows rows(a, task);
        Around<T, S> x(a);
        for (int64_t h = rows.first; h < rows.last; ++h) {
            x.read(a, a.x, rows.b, rows.t, h);
            for (int64_t c = 0; c < a.channels; ++c)
                for (int64_t w = 0; w < a.width; w += Lanes<S>::W) {
                    const int count = (int)std::min<int64_t>(Lanes<S>::W, a.width - w);
                    const Vec<S> y = depthwise(a, x, (const S*)a.parameters, c, w);
                    store<T, S>(row_of<T>(a, a.out, rows.b, c, rows.t, h) + w, 1, count, y);
                }
        }
    });
}

}  // namespace

// what: 0 forward, 1 backward, 2 the depthwise convolution alone. Returns whether the dtype is known.
extern "C" bool etmamba_conv_norm_relu(const Args* a, int dtype, int what) {
    return with_dtype(dtype, [&](auto t, auto s) {
        using T = decltype(t);
        using S = decltype(s);
        what == 0 ? forward<T, S>(*a) : what == 1 ? backward<T, S>(*a) : convolve<T, S>(*a);
    });
}

extern "C" int etmamba_conv_norm_relu_rows() { return (int)ROWS; }
