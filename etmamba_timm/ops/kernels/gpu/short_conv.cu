// The short convolution with SiLU on a GPU, forward and backward. Called from short_conv.py.
//
// A thread takes four channels through a stretch of time steps. TAPS is the convolution's width.

#include "kernel.h"

// Steps in a stretch: many, as each reads the steps around it again, but no more than registers can hold (128 and 168).
constexpr int STEPS = 12, BACKWARD_STEPS = 8;
constexpr int THREADS = 128, BEFORE = TAPS - 1;

struct Args {  // must match short_conv.py
    i64 directions, batch, width, length, reverse, parts;  // parts: threads for four channels (backward)
    Strided x, out, dout, dx;
    void *weight, *bias;  // [E, TAPS], [E] or null
    i64 weight_dtype, bias_dtype;
    float* dweight;       // [TAPS + 1, E rounded up to 4], the last row for the bias; added to
};

CONFIG(short_conv, THREADS, 0, STEPS)
CONFIG(short_conv_backward, THREADS, 0, BACKWARD_STEPS)

struct Channels {
    int first, count, width;
    float weight[TAPS][4], bias[4];
    FN Channels(const Args& a, i64 quad) : first((int)quad * 4), width((int)a.width) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const i64 channel = first + j;
            const bool inside = ALIGNED || channel < a.width;
            bias[j] = inside && a.bias ? element(a.bias, channel, (int)a.bias_dtype) : 0.f;
#pragma unroll
            for (int k = 0; k < TAPS; ++k)
                weight[k][j] = inside ? element(a.weight, channel * TAPS + k, (int)a.weight_dtype) : 0.f;
        }
    }
};

// The steps of a row in the order of its direction.
struct Walk {
    i64 direction, batch, length;
    bool reverse;
    FN Walk(const Args& a, i64 row) : direction(row / a.batch), batch(row % a.batch), length(a.length) {
        reverse = a.directions == 2 ? direction == 1 : a.reverse;
    }
    FN T* at(const Strided& x, i64 i) const {
        return (T*)x.data + direction * x.direction + batch * x.batch + (reverse ? length - 1 - i : i) * x.time;
    }
    FN void load(const Strided& x, i64 i, const Channels& c, float* values) const {
        if (i >= 0 && i < length) load_quad(at(x, i), x.channel, c.first, c.width, values);
        else values[0] = values[1] = values[2] = values[3] = 0.f;
    }
};

FN void convolve(const Channels& c, const float (*x)[4], float* y) {  // x: TAPS steps
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        y[j] = c.bias[j];
#pragma unroll
        for (int k = 0; k < TAPS; ++k) y[j] = fmaf(c.weight[k][j], x[k][j], y[j]);
    }
}

KERNEL(short_conv, THREADS, 4) {
    const i64 quads = (a.width + 3) / 4, segments = (a.length + STEPS - 1) / STEPS;
    const i64 i = (i64)blockIdx.x * THREADS + threadIdx.x, row = i / quads / segments;
    if (row >= a.directions * a.batch) return;
    const Channels c(a, i % quads);
    const Walk walk(a, row);
    const i64 first = i / quads % segments * STEPS;
    float x[STEPS + BEFORE][4];
#pragma unroll
    for (int k = 0; k < STEPS + BEFORE; ++k) walk.load(a.x, first + k - BEFORE, c, x[k]);
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
        float y[4];
        convolve(c, x + k, y);
#pragma unroll
        for (int j = 0; j < 4; ++j) y[j] = silu(y[j]);
        if (first + k < walk.length) store_quad(walk.at(a.out, first + k), a.out.channel, c.first, c.width, y);
    }
}

// A thread takes every `parts`-th stretch. For it, it also needs the gradients of the next BEFORE outputs.
KERNEL(short_conv_backward, THREADS, 3) {
    const i64 quads = (a.width + 3) / 4, segments = (a.length + BACKWARD_STEPS - 1) / BACKWARD_STEPS;
    const i64 i = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (i >= quads * a.parts) return;
    const Channels c(a, i % quads);
    float sums[TAPS + 1][4] = {};
    for (i64 segment = i / quads; segment < a.directions * a.batch * segments; segment += a.parts) {
        const Walk walk(a, segment / segments);
        const i64 first = segment % segments * BACKWARD_STEPS;
        float x[BACKWARD_STEPS + 2 * BEFORE][4], dy[BACKWARD_STEPS + BEFORE][4];  // dy: of the convolution's output
#pragma unroll
        for (int k = 0; k < BEFORE; ++k) walk.load(a.x, first + k - BEFORE, c, x[k]);
#pragma unroll
        for (int k = 0; k < BACKWARD_STEPS + BEFORE; ++k) {
            walk.load(a.x, first + k, c, x[k + BEFORE]);
            walk.load(a.dout, first + k, c, dy[k]);
            float y[4];
            convolve(c, x + k, y);
#pragma unroll
            for (int j = 0; j < 4; ++j) dy[k][j] *= silu_slope(y[j]);
            if (k >= BEFORE) {  // all gradients that step k - BEFORE needs are there
                float dx[4] = {};
#pragma unroll
                for (int j = 0; j < 4; ++j)
#pragma unroll
                    for (int n = 0; n < TAPS; ++n) dx[j] = fmaf(c.weight[BEFORE - n][j], dy[k - BEFORE + n][j], dx[j]);
                const i64 at = first + k - BEFORE;
                if (at < walk.length) store_quad(walk.at(a.dx, at), a.dx.channel, c.first, c.width, dx);
            }
            if (k < BACKWARD_STEPS) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    sums[TAPS][j] += dy[k][j];
#pragma unroll
                    for (int n = 0; n < TAPS; ++n) sums[n][j] = fmaf(dy[k][j], x[k + n][j], sums[n][j]);
                }
            }
        }
    }
#pragma unroll
    for (int k = 0; k <= TAPS; ++k)
        add_to(a.dweight + k * quads * 4 + c.first, make_float4(sums[k][0], sums[k][1], sums[k][2], sums[k][3]));
}
