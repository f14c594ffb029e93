// The local branch of STCM on a GPU: dilated depthwise convolutions at three scales within each frame, SiLU, and the
// residual, forward and backward. Called from local_conv.py.
//
// A thread takes two neighbouring channels of a line: a row of a picture or, of rows wider than 16, a part. For each
// row of taps it reads a line of x into registers at once, which serves all columns and all taps. A block takes LINES
// lines of the same CHANNELS channels.
//
// WIDTH is that of the pictures: taps outside of them cost nothing. DENSE is C, a multiple of 4, if all tensors are
// contiguous and aligned to 16 bytes: a column's address costs nothing either. It is 0 for any C and any strides.

#include "kernel.h"

constexpr int SCALES = 3;  // kernels of 3, 5 and 7 taps a side, dilated by 1, 2 and 3
constexpr int side(int scale) { return 3 + 2 * scale; }
constexpr int first_tap(int scale) { return scale == 0 ? 0 : scale == 1 ? 9 : 34; }
constexpr int TAPS = 9 + 25 + 49;

constexpr int PARTS = ceil_div(WIDTH, 16), COLUMNS = ceil_div(WIDTH, PARTS);  // lines of a row, columns of a line
constexpr int PAIRS = 24, CHANNELS = 2 * PAIRS, LINES = 8, THREADS = PAIRS * LINES;
// Blocks at once on a multiprocessor: they bound a thread's registers, of which long lines need many.
constexpr int FEW = PARTS > 1 || COLUMNS > 14 ? 2 : 0, FITTING = COLUMNS <= 10 ? 3 : 2;
constexpr int BLOCKS = FEW ? FEW : DENSE ? 4 : FITTING;
constexpr int BACK_BLOCKS = FEW ? FEW : DTYPE && DENSE ? 4 : FITTING;
constexpr int PITCH = CHANNELS + 2;  // in shared memory: neighbouring taps of a channel lie in different banks

struct Parameter { void* data; i64 dtype; };  // contiguous

struct Args {  // must match local_conv.py
    i64 frames_each, height, channels, lines, stretches;  // frames_each: in a sequence; stretches: see the last kernels
    // Tokens [1, B, C, 1 + t·h·w], class token first. residual, out and dout: float32, 4C channels; the others in T.
    // dconv: gradients of the convolutions' outputs, with 3C channels; nothing in place of the class token.
    Strided x, residual, out, dout, dx, dconv;
    Parameter parameters[2 * SCALES], gradients[2 * SCALES];  // three of [C, 1, k, k], three of [C]
    float* sums;  // [stretches, TAPS + SCALES, C]: parts of the parameters' gradients
};

struct Shared { float weight[TAPS][PITCH], bias[SCALES][PITCH]; };

CONFIG(local_conv, THREADS, sizeof(Shared), CHANNELS, LINES, PARTS)
CONFIG(local_conv_dconv, THREADS, sizeof(Shared), CHANNELS, LINES, PARTS)
CONFIG(local_conv_backward, THREADS, sizeof(Shared), CHANNELS, LINES, PARTS)
CONFIG(local_conv_sum, SUMMED * SUMMERS, sizeof(ColumnSums), SUMMED, TAPS + SCALES)

// Two channels, `channel` elements apart; the second is 0 where there is none.
FN float2 load_pair(const float* at, i64 channel, bool second) {
#if DENSE
    return *(const float2*)at;
#else
    return make_float2(at[0], second ? at[channel] : 0.f);
#endif
}
FN void store_pair(float* at, i64 channel, bool second, float2 x) {
#if DENSE
    *(float2*)at = x;
#else
    at[0] = x.x;
    if (second) at[channel] = x.y;
#endif
}
#if DTYPE != 0
FN float2 load_pair(const T* at, i64 channel, bool second) {
#if DENSE
    float x[2];
    unpack2(*(const unsigned*)at, x);
    return make_float2(x[0], x[1]);
#else
    return make_float2(to_float(at[0]), second ? to_float(at[channel]) : 0.f);
#endif
}
FN void store_pair(T* at, i64 channel, bool second, float2 x) {
#if DENSE
    *(unsigned*)at = pack2(x.x, x.y);
#else
    at[0] = from_float(x.x);
    if (second) at[channel] = from_float(x.y);
#endif
}
#endif

FN void add_product(float2& sum, float2 a, float2 b) { sum.x = fmaf(a.x, b.x, sum.x), sum.y = fmaf(a.y, b.y, sum.y); }

// A tensor of tokens with MULTIPLE·C channels.
template <typename E, int MULTIPLE> struct Tokens {
    E* data;
    i64 batch, channel_step, token_step;
    FN Tokens(const Strided& x)
        : data((E*)x.data), batch(x.batch), channel_step(DENSE ? 1 : x.channel),
          token_step(DENSE ? DENSE * MULTIPLE : x.time) {}
};

// A line and a pair of channels.
struct Place {
    i64 batch, token, channel;      // token: that of the row's first column
    int row, column, height, pair;  // column: the line's first
    bool second;                    // whether the pair's second channel exists

    FN Place(const Args& a, i64 line, i64 tile) : height((int)a.height), pair(threadIdx.x % PAIRS) {
        const int rows_each = (int)a.frames_each * height, row_of_all = (int)line / PARTS;
        batch = row_of_all / rows_each;
        token = 1 + row_of_all % rows_each * WIDTH;
        row = row_of_all % rows_each % height;
        column = (int)(line % PARTS) * COLUMNS;
        channel = tile * CHANNELS + 2 * pair;
        second = channel + 1 < a.channels;
    }
    FN void next(const Args& a) {  // the next line
        column += COLUMNS;
        if (column < PARTS * COLUMNS) return;
        column = 0, token += WIDTH, row = row + 1 == height ? 0 : row + 1;
        if (token == 1 + a.frames_each * a.height * WIDTH) token = 1, ++batch;
    }
    // Whether the picture has column `o` of the line. Known at compile time if a line is a row.
    FN bool has(int o) const { return PARTS == 1 || (column + o >= 0 && column + o < WIDTH); }
    FN bool has_row(int away) const { return row + away >= 0 && row + away < height; }
    // The pair in the line's first column, some rows away, of the channels from `scale`·C on.
    template <typename X> FN auto at(const X& x, const Args& a, int scale, int away = 0) const {
        return class_token(x, a, scale) + (token + (i64)away * WIDTH + column) * x.token_step;
    }
    // The first line of a sequence does the class token's work.
    FN bool first_of_sequence() const { return token == 1 && column == 0; }
    template <typename X> FN auto class_token(const X& x, const Args& a, int scale) const {
        return x.data + batch * x.batch + (channel + scale * a.channels) * x.channel_step;
    }
};

// The line's columns, some rows away, and HALO more on either side; 0 outside the picture.
template <int HALO, typename X>
FN void load_line(const X& x, const Args& a, const Place& p, int scale, int away, float2* values) {
    const auto* from = p.at(x, a, scale, away) - HALO * x.token_step;
#pragma unroll
    for (int o = 0; o < COLUMNS + 2 * HALO; ++o, from += x.token_step)
        values[o] = p.has(o - HALO) ? load_pair(from, x.channel_step, p.second) : make_float2(0.f, 0.f);
}
template <typename X> FN void prefetch_line(const X& x, const Args& a, const Place& p, int scale) {
    const auto* from = p.at(x, a, scale);
#pragma unroll
    for (int o = 0; o < COLUMNS; ++o, from += x.token_step)
        if (p.has(o)) prefetch(from);
}
template <typename X> FN void store_line(const X& x, const Args& a, const Place& p, int scale, const float2* values) {
    auto* to = p.at(x, a, scale);
#pragma unroll
    for (int o = 0; o < COLUMNS; ++o, to += x.token_step)
        if (p.has(o)) store_pair(to, x.channel_step, p.second, values[o]);
}

// The columns beyond a line's ends that a row of taps needs. No halo if a line is a row: there they are 0.
template <int SCALE> constexpr int HALO = PARTS == 1 ? 0 : side(SCALE) / 2 * (SCALE + 1);
// For column `o`, where the c-th tap of a row of taps is among the values of load_line; outside them it is 0.
template <int SCALE> constexpr int place_of(int o, int c) {
    return HALO<SCALE> + o + (c - side(SCALE) / 2) * (SCALE + 1);
}
template <int SCALE> constexpr bool within(int place) { return place >= 0 && place < COLUMNS + 2 * HALO<SCALE>; }

// Adds the convolution of a line with the weights of a scale; if TRANSPOSED, of the scale's part of dconv.
template <int SCALE, bool TRANSPOSED, typename X>
FN void convolve(const Args& a, const X& x, const Place& p, const Shared& shared, float2* sums) {
    constexpr int K = side(SCALE);
#pragma unroll 1
    for (int r = 0; r < K; ++r) {
        const int away = (r - K / 2) * (SCALE + 1);
        if (!p.has_row(away)) continue;
        float2 values[COLUMNS + 2 * HALO<SCALE>];
        load_line<HALO<SCALE>>(x, a, p, TRANSPOSED ? SCALE : 0, away, values);
        const float* weights = &shared.weight[first_tap(SCALE) + (TRANSPOSED ? K - 1 - r : r) * K][2 * p.pair];
#pragma unroll
        for (int c = 0; c < K; ++c) {
            const float2 weight = *(const float2*)(weights + (TRANSPOSED ? K - 1 - c : c) * PITCH);
#pragma unroll
            for (int o = 0; o < COLUMNS; ++o) {
                const int place = place_of<SCALE>(o, c);
                if (within<SCALE>(place)) add_product(sums[o], weight, values[place]);
            }
        }
    }
}

// Puts the weights and biases of a scale into shared memory. A barrier must follow.
template <int SCALE> FN void gather(const Args& a, i64 tile, Shared& shared) {
    constexpr int K2 = side(SCALE) * side(SCALE);
    const Parameter weight = a.parameters[SCALE], bias = a.parameters[SCALES + SCALE];
    const i64 first = tile * CHANNELS;
    constexpr int EACH = ceil_div(CHANNELS * K2, THREADS);
    float values[EACH];
    elements<EACH>(weight.data, (int)weight.dtype, first * K2 + threadIdx.x, THREADS, a.channels * K2, values);
#pragma unroll
    for (int n = 0; n < EACH; ++n) {
        const int i = threadIdx.x + n * THREADS;
        if (i < CHANNELS * K2) shared.weight[first_tap(SCALE) + i % K2][i / K2] = values[n];
    }
    static_assert(CHANNELS <= THREADS, "a thread for each bias");
    if (threadIdx.x < CHANNELS)
        elements<1>(bias.data, (int)bias.dtype, first + threadIdx.x, 1, a.channels, &shared.bias[SCALE][threadIdx.x]);
}

// SCALE 0 to 2: a convolution; 3: x itself. Then SiLU and the residual; or, if GRADIENT, that of what goes into SiLU.
template <int SCALE, bool GRADIENT> FN void scale_of_line(const Args& a, int block, Shared& shared) {
    const i64 line = (i64)block * LINES + threadIdx.x / PAIRS;
    const Place p(a, line, blockIdx.y);
    const bool inside = line < a.lines && p.channel < a.channels;
    const Tokens<const float, 4> other(GRADIENT ? a.dout : a.residual);
    float2 others[COLUMNS], y[COLUMNS] = {};
    constexpr bool AT_ONCE = SCALE == SCALES;  // else they come through the second cache, and fewer registers are needed
    if (inside) AT_ONCE ? load_line<0>(other, a, p, SCALE, 0, others) : prefetch_line(other, a, p, SCALE);  // arrives meanwhile
    if constexpr (SCALE < SCALES) {
        gather<SCALE>(a, blockIdx.y, shared);
        __syncthreads();
        if (!inside) return;
        const float2 bias = *(const float2*)&shared.bias[SCALE][2 * p.pair];
#pragma unroll
        for (int o = 0; o < COLUMNS; ++o) y[o] = bias;
        convolve<SCALE, false>(a, Tokens<const T, 1>(a.x), p, shared, y);
    } else {
        if (!inside) return;
        load_line<0>(Tokens<const T, 1>(a.x), a, p, 0, 0, y);
    }
    if (!AT_ONCE) load_line<0>(other, a, p, SCALE, 0, others);
    if constexpr (GRADIENT) {
#pragma unroll
        for (int o = 0; o < COLUMNS; ++o) others[o].x *= silu_slope(y[o].x), others[o].y *= silu_slope(y[o].y);
        store_line(Tokens<T, 3>(a.dconv), a, p, SCALE, others);
    } else {
        const Tokens<float, 4> out(a.out);
#pragma unroll
        for (int o = 0; o < COLUMNS; ++o) others[o].x += silu(y[o].x), others[o].y += silu(y[o].y);
        store_line(out, a, p, SCALE, others);
        if (p.first_of_sequence()) {
            const float2 kept = load_pair(p.class_token(other, a, SCALE), other.channel_step, p.second);
            store_pair(p.class_token(out, a, SCALE), out.channel_step, p.second, kept);
        }
    }
}

// Blocks [lines and their scales, channels]: some scales take long to compute, and others to read.
KERNEL(local_conv, THREADS, BLOCKS) {
    SHARED(Shared, shared);
    const int scale = blockIdx.x % 4, block = blockIdx.x / 4;
    if (scale == 0) scale_of_line<2, false>(a, block, shared);
    else if (scale == 1) scale_of_line<1, false>(a, block, shared);
    else if (scale == 2) scale_of_line<0, false>(a, block, shared);
    else scale_of_line<3, false>(a, block, shared);
}

// The first step backward: the gradients of the convolutions' outputs. Blocks as above, without scale 3.
KERNEL(local_conv_dconv, THREADS, BLOCKS) {
    SHARED(Shared, shared);
    const int scale = blockIdx.x % 3, block = blockIdx.x / 3;
    if (scale == 0) scale_of_line<2, true>(a, block, shared);
    else if (scale == 1) scale_of_line<1, true>(a, block, shared);
    else scale_of_line<0, true>(a, block, shared);
}

FN void gradient_of_x(const Args& a, int block, int tile, Shared& shared) {
    gather<0>(a, tile, shared), gather<1>(a, tile, shared), gather<2>(a, tile, shared);
    __syncthreads();
    const i64 line = (i64)block * LINES + threadIdx.x / PAIRS;
    const Place p(a, line, tile);
    if (line >= a.lines || p.channel >= a.channels) return;
    const Tokens<const T, 3> dconv(a.dconv);
    const Tokens<T, 1> to(a.dx);
    float2 dx[COLUMNS] = {}, x[COLUMNS], dout[COLUMNS];
    convolve<0, true>(a, dconv, p, shared, dx);
    convolve<1, true>(a, dconv, p, shared, dx);
    convolve<2, true>(a, dconv, p, shared, dx);
    load_line<0>(Tokens<const T, 1>(a.x), a, p, 0, 0, x);
    load_line<0>(Tokens<const float, 4>(a.dout), a, p, SCALES, 0, dout);
#pragma unroll
    for (int o = 0; o < COLUMNS; ++o) add_product(dx[o], dout[o], make_float2(silu_slope(x[o].x), silu_slope(x[o].y)));
    store_line(to, a, p, 0, dx);
    if (p.first_of_sequence()) store_pair(p.class_token(to, a, 0), to.channel_step, p.second, make_float2(0.f, 0.f));
}

// A row of taps of a pair of channels, over a stretch of the lines.
template <int SCALE> FN void gradients_of_taps(const Args& a, int stretch, int tile, int r) {
    constexpr int K = side(SCALE);
    const i64 begin = a.lines * stretch / a.stretches, end = a.lines * (stretch + 1) / a.stretches;
    const int away = (r - K / 2) * (SCALE + 1);
    float2 weight[K] = {}, bias = {};
    Place p(a, begin, tile);
    if (p.channel >= a.channels) return;
#pragma unroll 1
    for (i64 line = begin; line < end; ++line, p.next(a)) {
        if (!p.has_row(away)) continue;
        float2 dy[COLUMNS], x[COLUMNS + 2 * HALO<SCALE>];
        load_line<0>(Tokens<const T, 3>(a.dconv), a, p, SCALE, 0, dy);
        load_line<HALO<SCALE>>(Tokens<const T, 1>(a.x), a, p, 0, away, x);
        if (away == 0)
#pragma unroll
            for (int o = 0; o < COLUMNS; ++o) bias.x += dy[o].x, bias.y += dy[o].y;
#pragma unroll
        for (int o = 0; o < COLUMNS; ++o) {
#pragma unroll
            for (int c = 0; c < K; ++c) {
                const int place = place_of<SCALE>(o, c);
                if (within<SCALE>(place)) add_product(weight[c], dy[o], x[place]);
            }
        }
    }
    float* sums = a.sums + (i64)stretch * (TAPS + SCALES) * a.channels + p.channel;
#pragma unroll
    for (int c = 0; c < K; ++c) store_pair(sums + (first_tap(SCALE) + r * K + c) * a.channels, 1, p.second, weight[c]);
    if (away == 0) store_pair(sums + (TAPS + SCALE) * a.channels, 1, p.second, bias);  // no line is left out
}

// The second step: first the blocks for the parameters, [stretches, 7 or 5 + 3 rows of taps, channels], as they take longest,
// then those for x, [lines, channels]. Of the parameters' a thread takes a row of taps.
KERNEL(local_conv_backward, THREADS, BACK_BLOCKS) {
    SHARED(Shared, shared);
    static_assert(LINES >= side(0) + side(1), "a thread for each row of taps");
    const int tiles = ceil_div((int)a.channels, CHANNELS), tile = blockIdx.x % tiles, block = blockIdx.x / tiles;
    const int r = threadIdx.x / PAIRS, stretch = block / 2;
    if (stretch >= a.stretches) gradient_of_x(a, block - 2 * (int)a.stretches, tile, shared);
    else if (block % 2 == 0 && r < side(2)) gradients_of_taps<2>(a, stretch, tile, r);
    else if (block % 2 == 1 && r < side(1)) gradients_of_taps<1>(a, stretch, tile, r);
    else if (block % 2 == 1 && r < side(1) + side(0)) gradients_of_taps<0>(a, stretch, tile, r - side(1));
}

// The last step: sums of the parameters' gradients over the stretches, in their own layout and type.
// Blocks [channels, taps and biases].
KERNEL(local_conv_sum, SUMMED * SUMMERS, 1) {
    SHARED(ColumnSums, shared);
    const int row = blockIdx.y;
    const i64 channel = (i64)blockIdx.x * SUMMED + threadIdx.x % SUMMED, pitch = (TAPS + SCALES) * a.channels;
    const float sum = column_sum(a.sums + row * a.channels + channel, a.stretches, pitch, channel < a.channels, shared);
    if (threadIdx.x >= SUMMED || channel >= a.channels) return;
    const bool bias = row >= TAPS;
    const int scale = row < first_tap(1) ? 0 : row < first_tap(2) ? 1 : 2, taps = side(scale) * side(scale);
    const Parameter gradient = a.gradients[bias ? SCALES + row - TAPS : scale];
    set_element(gradient.data, bias ? channel : channel * taps + row - first_tap(scale), (int)gradient.dtype, sum);
}
