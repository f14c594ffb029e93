// The short convolution with SiLU on a GPU, forward and backward. Called from short_conv.py.
//
// A thread walks along a stretch of time steps with a few neighbouring channels. The steps that the taps reach stay in
// registers, and the next chunk of steps is on its way while it works on one. TAPS is the convolution's width.
//
// ALIGNED: 1 if 16 bytes of the sequences, and four elements of the parameters, can be read at once; see kernel.h.

#include "kernel.h"

constexpr int BEFORE = TAPS - 1;
constexpr int larger(int a, int b) { return a > b ? a : b; }
// Channels (in quads) and steps of a thread's chunk, and blocks at once on a multiprocessor, which bound its registers.
constexpr int FORWARD_QUADS = DTYPE && ALIGNED ? 2 : 1, CHUNK = 4, BLOCKS = 4;
constexpr int BACK_CHUNK = larger(4, BEFORE), BACK_BLOCKS = ALIGNED ? 3 : 2;  // of a quad
constexpr int THREADS = 128;
constexpr int LANES = 16, WALKS = THREADS / LANES;  // backward: threads side by side, and stretches of a block

struct Args {  // must match short_conv.py
    i64 directions, batch, width, length, reverse;
    i64 steps, blocks;  // of a stretch, a multiple of the chunk; that share a channel (backward)
    Strided x, out, dout, dx;
    void *weight, *bias, *dweight, *dbias;  // [E, TAPS], [E] or null; their gradients
    i64 weight_dtype, bias_dtype;
    float* sums;  // [blocks, TAPS + 1, E rounded up to 4]: parts of the gradients, the last row for the bias
};

struct Shared { float4 sums[WALKS][TAPS + 1][LANES]; };

CONFIG(short_conv, THREADS, 0, BLOCKS, CHUNK, 4 * FORWARD_QUADS)
CONFIG(short_conv_backward, THREADS, sizeof(Shared), BACK_BLOCKS, BACK_CHUNK, 4, LANES)
CONFIG(short_conv_sum, SUMMED * SUMMERS, sizeof(ColumnSums), SUMMED)

template <int QUADS> struct Channels {
    static constexpr int COUNT = 4 * QUADS;
    int first, width;
    float weight[COUNT][TAPS], bias[COUNT] = {};
    FN Channels(const Args& a, int first) : first(first), width((int)a.width) {
#if ALIGNED
        element_quads<QUADS * TAPS>(a.weight, (int)a.weight_dtype, (i64)first * TAPS, weight[0]);
        if (a.bias) element_quads<QUADS>(a.bias, (int)a.bias_dtype, first, bias);
#else
        elements<COUNT * TAPS>(a.weight, (int)a.weight_dtype, (i64)first * TAPS, 1, a.width * TAPS, weight[0]);
        if (a.bias) elements<COUNT>(a.bias, (int)a.bias_dtype, first, 1, a.width, bias);
#endif
    }
    FN void convolve(const float (*x)[COUNT], float* y) const {  // x: TAPS steps
#pragma unroll
        for (int j = 0; j < COUNT; ++j) {
            y[j] = bias[j];
#pragma unroll
            for (int k = 0; k < TAPS; ++k) y[j] = fmaf(weight[j][k], x[k][j], y[j]);
        }
    }
};

// The channels of a step, as they came from memory until they are needed.
template <int QUADS> struct alignas(QUADS * sizeof(Quad)) Held {
    Quad quads[QUADS];
    FN void get(float* values) const {
#pragma unroll
        for (int q = 0; q < QUADS; ++q) unpack(quads[q], values + 4 * q);
    }
};

// A thread's channels of a row of a tensor, in the order of the row's direction.
template <int QUADS> struct Walk {
    T* now;
    i64 step, channel;
    int left;  // channels
    FN Walk(const Args& a, const Strided& x, int row, int at, int first) : channel(x.channel), left((int)a.width - first) {
        const int direction = row / (int)a.batch;
        const bool reverse = a.directions == 2 ? direction == 1 : a.reverse;
        now = (T*)x.data + direction * x.direction + row % (int)a.batch * x.batch + first * x.channel;
        now += (reverse ? a.length - 1 - at : at) * x.time;
        step = reverse ? -x.time : x.time;
    }
    FN Held<QUADS> load(bool some) {  // and go on
        Held<QUADS> held = {};
#if ALIGNED
        if (some) held = *(const Held<QUADS>*)now;
#else
        if (some)
#pragma unroll
            for (int q = 0; q < QUADS; ++q) {
                float values[4];
                load_quad(now + 4 * q * channel, channel, 0, left - 4 * q, values);
                held.quads[q] = pack(values);  // exact: they are T's
            }
#endif
        now += step;
        return held;
    }
    FN void store(const float* values, bool some) {  // and go on
#if ALIGNED
        Held<QUADS> held;
#pragma unroll
        for (int q = 0; q < QUADS; ++q) held.quads[q] = pack(values + 4 * q);
        if (some) *(Held<QUADS>*)now = held;
#else
        if (some)
#pragma unroll
            for (int q = 0; q < QUADS; ++q) store_quad(now + 4 * q * channel, channel, 0, left - 4 * q, values + 4 * q);
#endif
        now += step;
    }
};

KERNEL(short_conv, THREADS, BLOCKS) {
    typedef Channels<FORWARD_QUADS> Mine;
    constexpr int COUNT = Mine::COUNT;
    const int groups = ceil_div((int)a.width, COUNT), parts = ceil_div((int)a.length, (int)a.steps);
    const int i = blockIdx.x * THREADS + threadIdx.x, row = i / groups / parts;
    if (row >= a.directions * a.batch) return;
    const int first = i % groups * COUNT;
    int at = i / groups % parts * (int)a.steps;
    const int end = min(at + (int)a.steps, (int)a.length);
    Walk<FORWARD_QUADS> in(a, a.x, row, at - BEFORE, first), out(a, a.out, row, at, first);
    Held<FORWARD_QUADS> before[BEFORE + 1], next[CHUNK];
#pragma unroll
    for (int k = 0; k < BEFORE; ++k) before[k] = in.load(at - BEFORE + k >= 0);
#pragma unroll
    for (int k = 0; k < CHUNK; ++k) next[k] = in.load(at + k < end);
    const Mine c(a, first);
    float x[BEFORE + CHUNK][COUNT];
#pragma unroll
    for (int k = 0; k < BEFORE; ++k) before[k].get(x[k]);
#pragma unroll 1
    for (; at < end; at += CHUNK) {
#pragma unroll
        for (int k = 0; k < CHUNK; ++k) next[k].get(x[BEFORE + k]);
#pragma unroll
        for (int k = 0; k < CHUNK; ++k) next[k] = in.load(at + CHUNK + k < end);
#pragma unroll
        for (int k = 0; k < CHUNK; ++k) {
            float y[COUNT];
            c.convolve(x + k, y);
#pragma unroll
            for (int j = 0; j < COUNT; ++j) y[j] = silu(y[j]);
            out.store(y, at + k < end);
        }
#pragma unroll
        for (int k = 0; k < BEFORE * COUNT; ++k) x[k / COUNT][k % COUNT] = x[k / COUNT + CHUNK][k % COUNT];
    }
}

// What a thread of the backward kernel keeps: `dy` is the gradient of the convolution's output.
struct Backward {
    const Channels<1> c;
    Walk<1> dx;
    float x[BEFORE + 1][4] = {}, dy[BEFORE + 1][4] = {};  // of the latest steps
    float sums[TAPS + 1][4] = {};
    FN Backward(const Args& a, const Walk<1>& dx, int first) : c(a, first), dx(dx) {}
    FN void shift(float (*values)[4], const float* latest) {
#pragma unroll
        for (int i = 0; i < BEFORE * 4; ++i) values[i / 4][i % 4] = values[i / 4 + 1][i % 4];
#pragma unroll
        for (int j = 0; j < 4; ++j) values[BEFORE][j] = latest[j];
    }
    // Goes on by a step, and stores the gradient of the step BEFORE steps before, whose gradients are all there now.
    FN void step(const float* latest, const float* dout, bool own, bool some) {
        float y[4];
        shift(x, latest);
        c.convolve(x, y);
#pragma unroll
        for (int j = 0; j < 4; ++j) y[j] = dout[j] * silu_slope(y[j]);
        shift(dy, y);
        float values[4] = {};
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int n = 0; n < TAPS; ++n) values[j] = fmaf(c.weight[j][BEFORE - n], dy[n][j], values[j]);
        dx.store(values, some);
        if (!own) return;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            sums[TAPS][j] += y[j];
#pragma unroll
            for (int n = 0; n < TAPS; ++n) sums[n][j] = fmaf(y[j], x[n][j], sums[n][j]);
        }
    }
};

// Blocks [LANES quads of channels, WALKS stretches of all rows'].
KERNEL(short_conv_backward, THREADS, BACK_BLOCKS) {
    SHARED(Shared, shared);
    const int lane = threadIdx.x % LANES, quad = blockIdx.x * LANES + lane, quads = ceil_div((int)a.width, 4);
    const int parts = ceil_div((int)a.length, (int)a.steps), i = blockIdx.y * WALKS + threadIdx.x / LANES;
    const int row = i / parts, first = quad * 4;
    float sums[TAPS + 1][4] = {};
    if (quad < quads && row < a.directions * a.batch) {
        const int begin = i % parts * (int)a.steps, length = (int)a.length;
        const int end = begin + (int)a.steps, stop = min(end + BEFORE, length), last = min(end, length);
        Walk<1> x(a, a.x, row, begin - BEFORE, first), dout(a, a.dout, row, begin, first);
        Held<1> before[BEFORE + 1], next_x[BACK_CHUNK], next_dout[BACK_CHUNK];
#pragma unroll
        for (int k = 0; k < BEFORE; ++k) before[k] = x.load(begin - BEFORE + k >= 0);
#pragma unroll
        for (int k = 0; k < BACK_CHUNK; ++k)
            next_x[k] = x.load(begin + k < stop), next_dout[k] = dout.load(begin + k < stop);
        Backward b(a, Walk<1>(a, a.dx, row, begin - BEFORE, first), first);
#pragma unroll
        for (int k = 0; k < BEFORE; ++k) before[k].get(b.x[k + 1]);
#pragma unroll 1
        for (int at = begin; at < end; at += BACK_CHUNK) {
            float now[BACK_CHUNK][4], gradient[BACK_CHUNK][4];
#pragma unroll
            for (int k = 0; k < BACK_CHUNK; ++k) next_x[k].get(now[k]), next_dout[k].get(gradient[k]);
#pragma unroll
            for (int k = 0; k < BACK_CHUNK; ++k) {
                const bool some = at + BACK_CHUNK + k < stop;
                next_x[k] = x.load(some), next_dout[k] = dout.load(some);
            }
#pragma unroll
            for (int k = 0; k < BACK_CHUNK; ++k) {
                const int to = at + k - BEFORE;
                b.step(now[k], gradient[k], true, to >= begin && to < last);
            }
        }
#pragma unroll
        for (int k = 0; k < BEFORE; ++k) {  // the steps after it, of which it needs the gradients
            float now[4], gradient[4];
            next_x[k].get(now), next_dout[k].get(gradient);
            b.step(now, gradient, false, end + k - BEFORE < last);
        }
#pragma unroll
        for (int k = 0; k < (TAPS + 1) * 4; ++k) sums[k / 4][k % 4] = b.sums[k / 4][k % 4];
    }
#pragma unroll
    for (int k = 0; k <= TAPS; ++k)
        shared.sums[threadIdx.x / LANES][k][lane] = make_float4(sums[k][0], sums[k][1], sums[k][2], sums[k][3]);
    __syncthreads();
    for (int n = threadIdx.x; n < (TAPS + 1) * LANES; n += THREADS) {
        if (blockIdx.x * LANES + n % LANES >= quads) continue;
        float4 sum = shared.sums[0][n / LANES][n % LANES];
#pragma unroll
        for (int k = 1; k < WALKS; ++k) {
            const float4 add = shared.sums[k][n / LANES][n % LANES];
            sum.x += add.x, sum.y += add.y, sum.z += add.z, sum.w += add.w;
        }
        float* to = a.sums + ((i64)blockIdx.y * (TAPS + 1) + n / LANES) * quads * 4;
        ((float4*)to)[blockIdx.x * LANES + n % LANES] = sum;
    }
}

// The last step: the blocks' sums. Blocks [SUMMED channels, taps and, if there is one, bias].
KERNEL(short_conv_sum, SUMMED * SUMMERS, 1) {
    SHARED(ColumnSums, shared);
    const int row = blockIdx.y, channel = blockIdx.x * SUMMED + threadIdx.x % SUMMED;
    const i64 pitch = ceil_div((int)a.width, 4) * 4;
    const bool some = channel < a.width;
    const float sum = column_sum(a.sums + row * pitch + channel, a.blocks, (TAPS + 1) * pitch, some, shared);
    if (threadIdx.x >= SUMMED || !some) return;
    if (row < TAPS) set_element(a.dweight, (i64)channel * TAPS + row, (int)a.weight_dtype, sum);
    else set_element(a.dbias, channel, (int)a.bias_dtype, sum);
}
