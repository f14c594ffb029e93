// One stage of STFP on a GPU: depthwise 3×3×3 convolution (or none), pointwise convolution, layer norm over the channels,
// ReLU, residual; forward and backward. Called from conv_norm_relu.py.
//
// CHANNELS is the number of channels, DEPTHWISE whether there is the 3×3×3 convolution. ALIGNED: whether the width is a
// multiple of 4 and all addresses are aligned to four elements.
//
// A block has a tile of the picture and walks along the frames. Asynchronous copies bring planes of the tile, with a
// margin, into a ring in shared memory, some frames ahead. A thread has four neighbouring pixels of ROWS rows. It reads
// each plane once, and adds what the plane gives to the convolution's output at the frame before, its own and the next.

#include "kernel.h"

constexpr int C = CHANNELS;
constexpr int REACH = DEPTHWISE;  // frames before and after that an output depends on

// Registers are scarce: with many channels, or wide elements, a thread has fewer rows. With many, its sums are in shared
// memory.
constexpr bool FEW = C <= 3;
constexpr int THREADS = FEW ? 192 : 64, ACROSS = FEW ? 64 : 16;  // ACROSS: most quads across a tile
constexpr int most_quads(int rows) { return (ACROSS + 2) * (THREADS / ACROSS * rows + 2); }  // in a tile and its margin

// The forward kernel, and the first of the backward: a thread has all channels.
constexpr int ROWS = FEW && DTYPE && ALIGNED ? 2 : 1, TILE = most_quads(ROWS), BLOCKS = FEW ? 2 : 4;
constexpr int SUMS = C * (C + 3);  // parameters but for the depthwise convolution's
#if DEPTHWISE
constexpr int STAGES = 3;  // frames in the ring
// The second kernel of the backward: a block has one channel.
constexpr int TAP_ROWS = 2, TAP_TILE = most_quads(TAP_ROWS), TAP_STAGES = 4, TAP_BLOCKS = 384 / THREADS;
#endif

struct Args {  // must match conv_norm_relu.py
    i64 frames, height, width;
    i64 across, down, stretch;  // a block's quads across, threads down and frames
    void* parameters;           // float32: depthwise [C, 27] and [C], if any; pointwise [C, C] and [C]; norm [C] and [C]
    void *x, *residual, *out;   // [B, C, T, H, W], contiguous; residual or null
    void *dout, *dv, *dx;       // dv: gradient of the depthwise convolution's output; null if nobody needs it, as dx
    float* sums;                // parameters' gradients: [blocks, all but the taps], or [blocks / C, C, 27] for the taps
    float eps;
};

// The part of the tensors that a block and a thread have.
struct Place {
    int frames, height, width;
    int first, last;  // frames
    int top, left, across, down;  // the tile: its first row and quad, quads across, threads down
    int volume;       // the clip, or the channel of a clip: in one number
    int part, parts;  // which of the volume's blocks this is, and of how many
    int row, column;  // the thread's first row and pixel
    int in_tile;      // where the pixel before it is in a tile with a margin, without the row above
    bool active;
    i64 plane;
    FN Place(const Args& a, int rows)
        : frames((int)a.frames), height((int)a.height), width((int)a.width), across((int)a.across), down((int)a.down) {
        plane = a.height * a.width;
        const int wide = ceil_div(ceil_div(width, 4), across), high = ceil_div(height, rows * down);
        parts = wide * high * ceil_div(frames, (int)a.stretch);
        part = blockIdx.x % parts, volume = blockIdx.x / parts;
        int n = part;
        left = n % wide * across, n /= wide;
        top = n % high * down * rows, n /= high;
        first = n * (int)a.stretch, last = min(first + (int)a.stretch, frames);
        active = (int)threadIdx.x < across * down;
        const int i = active ? threadIdx.x % across : 0, j = active ? threadIdx.x / across : 0;
        row = top + j * rows, column = 4 * (left + i);
        in_tile = 4 * (j * rows * (across + 2) + i + 1);
    }
    FN bool inside(int r) const { return active && row + r < height && column < width; }
    // Where the thread's first pixel is in a frame of the first of n channels, and how far another row or channel is.
    FN i64 at(int n, int t) const { return ((i64)volume * n * frames + t) * plane + (i64)row * width + column; }
    FN i64 from(int channel, int r) const { return channel * (frames * plane) + (i64)r * width; }
    FN void store(void* x, i64 at, const float* values) const { store_quad((T*)x + at, 1, 0, width - column, values); }
};

// Four neighbouring pixels, as they came from memory until they are needed.
struct Held {
    Quad raw;
    FN void load(const Place& place, const void* x, i64 at, bool some) {
        raw = Quad{};
        if (!some) return;
#if ALIGNED
        raw = *(const Quad*)((const T*)x + at);
#else
        float values[4];
        load_quad((const T*)x + at, 1, 0, place.width - place.column, values);
        raw = pack(values);  // exact: they are T's
#endif
    }
    FN void get(float* values) const { unpack(raw, values); }
};

// Rows FROM to TO of all channels.
template <int FROM, int TO>
FN void load_rows(const Place& place, const void* x, i64 here, bool some, Held (*rows)[C]) {
#pragma unroll
    for (int r = FROM; r < TO; ++r)
#pragma unroll
        for (int c = 0; c < C; ++c) rows[r][c].load(place, x, here + place.from(c, r), some && place.inside(r));
}

// The planes of a tile and its margin, of N channels, one frame after the other; zeros outside the picture.
template <int N, int SIZE, int DEPTH> struct Planes {
    typedef T Ring[DEPTH][N][4 * SIZE];
    static constexpr int ITEMS = ceil_div(SIZE, THREADS);
    Ring& ring;
    const T* next;  // frame to copy
    i64 volume, plane;
    int left, now = 0;  // frames to copy; where in the ring the current frame is, and the next copy will be
    int size, from[ITEMS];          // the quads that this thread copies: where they start in a frame, -1 outside it
    int some[ALIGNED ? 1 : ITEMS];  // and how many of their pixels are inside
    FN Planes(const Place& place, int rows, const void* x, Ring& memory) : ring(memory), plane(place.plane) {
        const int begin = max(place.first - 1, 0);
        volume = place.from(1, 0);
        next = (const T*)x + place.volume * N * volume + begin * plane;
        left = min(place.last + 1, place.frames) - begin;
        size = (place.across + 2) * (place.down * rows + 2);
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
            const int i = threadIdx.x + k * THREADS;
            const int h = place.top - 1 + i / (place.across + 2), w = 4 * (place.left - 1 + i % (place.across + 2));
            const bool inside = h >= 0 && h < place.height && w >= 0 && w < place.width;
            from[k] = inside ? h * place.width + w : -1;
            if (!ALIGNED) some[k] = min(place.width - w, 4);
        }
#pragma unroll
        for (int k = 0; k < DEPTH - 1; ++k) copy();
    }
    FN void copy() {
        if (left > 0) {
#pragma unroll
            for (int c = 0; c < N; ++c)
#pragma unroll
                for (int k = 0; k < ITEMS; ++k) {
                    const int i = threadIdx.x + k * THREADS;
                    const int pixels = from[k] < 0 ? 0 : ALIGNED ? 4 : some[k];
                    if (i < size) copy_quad(ring[now][c] + 4 * i, next + c * volume + max(from[k], 0), pixels);
                }
            next += plane, --left;
        }
        commit_copies();
        now = now + 1 == DEPTH ? 0 : now + 1;
    }
    FN static void copy_quad(T* to, const T* from, int some) {
#if ALIGNED
        copy_async<sizeof(Quad)>(to, from, some);
#else
#pragma unroll
        for (int j = 0; j < 4; ++j) to[j] = j < some ? from[j] : T(0);
#endif
    }
    // Goes on to the next frame. To be called by all threads.
    FN void advance() {
        wait_for_copies<DEPTH - 2>();
        __syncthreads();  // others' copies are there, and nobody reads the frame that the next copy replaces
        copy();
    }
    FN const T* channel(int c) const { return ring[now][c]; }
};

// A thread's four pixels of a row in a tile, and one to either side.
FN void read_six(const T* x, float* values) {
    values[0] = to_float(x[-1]), values[5] = to_float(x[4]);
    unpack(*(const Quad*)x, values + 1);
}

struct Parameters {
    alignas(16) float taps[C][28];  // a place is left free: they are read in fours
    float bias[C], mix[C][C], mix_bias[C], gain[C], shift[C];
    // The pointwise convolution's are taken off their mean over its outputs, so that these have no mean either.
    FN void load(const float* from) {
        const int thread = threadIdx.x;
        if (DEPTHWISE) {
            for (int i = thread; i < C * 27; i += THREADS) taps[i / 27][i % 27] = from[i];
            from += C * 27;
            if (thread < C) bias[thread] = from[thread];
            from += C;
        }
        if (thread < C * C) mix[thread / C][thread % C] = from[thread] - mean(from + thread % C, C);
        from += C * C;
        if (thread < C) {
            mix_bias[thread] = from[thread] - mean(from, 1);
            gain[thread] = from[C + thread], shift[thread] = from[2 * C + thread];
        }
        __syncthreads();
    }
    FN static float mean(const float* from, int stride) {
        float sum = 0.f;
        for (int k = 0; k < C; ++k) sum += from[k * stride];
        return sum / C;
    }
};

struct Shared {
    Parameters parameters;
    float sums[THREADS / 32][SUMS];
    float threads_sums[FEW ? 1 : SUMS][THREADS];
#if DEPTHWISE
    alignas(16) Planes<C, TILE, STAGES>::Ring ring;
#endif
};

// The depthwise convolution's output, frame by frame.
#if DEPTHWISE
struct Convolution {
    const Parameters& p;
    Planes<C, TILE, STAGES> planes;
    float sums[3][C][ROWS][4] = {};  // of three frames
    FN Convolution(const Args& a, const Place& place, Shared& shared)
        : p(shared.parameters), planes(place, ROWS, a.x, shared.ring) {
        shared.parameters.load((const float*)a.parameters);  // while the first planes are on their way
    }
    // Adds what frame t gives. After it, the frame before is complete.
    FN void add(const Place& place, int t) {
#pragma unroll
        for (int i = 0; i < C * ROWS * 4; ++i) sums[2][i / (ROWS * 4)][i / 4 % ROWS][i % 4] = p.bias[i / (ROWS * 4)];
        if (t < 0 || t >= place.frames) return;
        planes.advance();
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
            for (int r = 0; r < ROWS + 2; ++r) {
                float values[6];
                read_six(planes.channel(c) + place.in_tile + r * 4 * (place.across + 2), values);
#pragma unroll
                for (int k = 0; k < 27; ++k) {
                    const int kt = k / 9, out = r - k / 3 % 3, kw = k % 3;
                    if (out < 0 || out >= ROWS) continue;
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        sums[2 - kt][c][out][j] = fmaf(p.taps[c][k], values[j + kw], sums[2 - kt][c][out][j]);
                }
            }
    }
    FN float value(int c, int r, int j) const { return sums[0][c][r][j]; }
    FN void next() {
#pragma unroll
        for (int i = 0; i < C * ROWS * 4; ++i) {
            const int c = i / (ROWS * 4), r = i / 4 % ROWS, j = i % 4;
            sums[0][c][r][j] = sums[1][c][r][j], sums[1][c][r][j] = sums[2][c][r][j];
        }
    }
};
#else
struct Convolution {  // none: the values themselves
    const void* x;
    float values[C][ROWS][4];
    FN Convolution(const Args& a, const Place&, Shared& shared) : x(a.x) {
        shared.parameters.load((const float*)a.parameters);
    }
    FN void add(const Place& place, int t) {
        Held held[ROWS][C];
        load_rows<0, ROWS>(place, x, place.at(C, t), true, held);
#pragma unroll
        for (int i = 0; i < C * ROWS; ++i) held[i / C][i % C].get(values[i % C][i / C]);
    }
    FN float value(int c, int r, int j) const { return values[c][r][j]; }
    FN void next() {}
};
#endif

// The pointwise convolution and the norm at a pixel, before gain and shift.
struct Norm {
    float normed[C], scale;
    FN Norm(const Parameters& p, const float* v, float eps) {
        float square = 0.f;
#pragma unroll
        for (int o = 0; o < C; ++o) {
            normed[o] = p.mix_bias[o];
#pragma unroll
            for (int c = 0; c < C; ++c) normed[o] = fmaf(p.mix[o][c], v[c], normed[o]);
            square = fmaf(normed[o], normed[o], square);
        }
        scale = reciprocal_root(fmaf(square, 1.f / C, eps));
#pragma unroll
        for (int o = 0; o < C; ++o) normed[o] *= scale;
    }
};

CONFIG(conv_norm_relu, THREADS, sizeof(Shared), BLOCKS, ROWS, ACROSS, TILE)
KERNEL(conv_norm_relu, THREADS, BLOCKS) {
    SHARED(Shared, shared);
    const Parameters& p = shared.parameters;
    const Place place(a, ROWS);
    i64 here = place.at(C, place.first - 2 * REACH);
    Convolution convolution(a, place, shared);
    for (int t = place.first - 2 * REACH; t < place.last; ++t, here += place.plane, convolution.next()) {
        Held residual[ROWS][C];  // asked for now, and needed after the convolution
        load_rows<0, ROWS>(place, a.residual, here, a.residual && t >= place.first, residual);
        convolution.add(place, t + REACH);
        if (t < place.first) continue;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (!place.inside(r)) continue;
            float y[C][4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float v[C];
#pragma unroll
                for (int c = 0; c < C; ++c) v[c] = convolution.value(c, r, j);
                const Norm norm(p, v, a.eps);
#pragma unroll
                for (int c = 0; c < C; ++c) y[c][j] = relu(fmaf(norm.normed[c], p.gain[c], p.shift[c]));
            }
#pragma unroll
            for (int c = 0; c < C; ++c) {
                if (a.residual) {
                    float add[4];
                    residual[r][c].get(add);
#pragma unroll
                    for (int j = 0; j < 4; ++j) y[c][j] += add[j];
                }
                place.store(a.out, here + place.from(c, r), y[c]);
            }
        }
    }
}

// The sums over each warp's threads, to be called by all threads; and then one of them over the block.
template <int N> FN void sum_over_warps(float* sums, float (*shared)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
        for (int mask = 16; mask; mask /= 2) sums[i] += shuffle_xor(sums[i], mask);
        if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32][i] = sums[i];
    }
    __syncthreads();
}
template <int N> FN float sum_of_warps(const float (*shared)[N], int i) {
    float sum = 0.f;
    for (int warp = 0; warp < THREADS / 32; ++warp) sum += shared[warp][i];
    return sum;
}

// A thread's gradients of the parameters but for the depthwise convolution's, as these are laid out in memory.
struct Sums {
    static constexpr int MIX_BIAS = C * C, GAIN = MIX_BIAS + C, SHIFT = GAIN + C;
    float few[FEW ? SUMS : 1], *many;
    FN explicit Sums(Shared& shared) : many(&shared.threads_sums[0][threadIdx.x]) {
#pragma unroll
        for (int i = 0; i < SUMS; ++i) at(i) = 0.f;
    }
    FN float& at(int i) { return FEW ? few[i] : many[i * THREADS]; }
    FN void add(int i, float x, float y) { at(i) = fmaf(x, y, at(i)); }
    // The norm takes the mean off, so gradients before it add up to 0: the last output's are minus the others'.
    FN void finish(float* all) {
#pragma unroll
        for (int i = 0; i < SUMS; ++i) all[i] = at(i);
#pragma unroll
        for (int o = 0; o < C - 1; ++o) {
            all[MIX_BIAS + C - 1] -= all[MIX_BIAS + o];
#pragma unroll
            for (int c = 0; c < C; ++c) all[(C - 1) * C + c] -= all[o * C + c];
        }
    }
};

// dv, in place of dout, at a pixel.
FN void differentiate(const Parameters& p, const float* v, float eps, float* d, Sums& sums) {
    const Norm norm(p, v, eps);
    float mean = 0.f, along = 0.f, dmixed[C];
#pragma unroll
    for (int o = 0; o < C; ++o) {
        const float dy = fmaf(norm.normed[o], p.gain[o], p.shift[o]) > 0.f ? d[o] : 0.f;
        sums.add(Sums::GAIN + o, dy, norm.normed[o]), sums.at(Sums::SHIFT + o) += dy;
        dmixed[o] = dy * p.gain[o];
        mean += dmixed[o], along = fmaf(dmixed[o], norm.normed[o], along);
        d[o] = 0.f;
    }
    mean *= 1.f / C, along *= 1.f / C;
    const Parameters& again = (&p)[FEW ? 0 : opaque(0)];
#pragma unroll
    for (int o = 0; o < C; ++o) {
        dmixed[o] = (dmixed[o] - mean - norm.normed[o] * along) * norm.scale;
        if (o < C - 1) sums.at(Sums::MIX_BIAS + o) += dmixed[o];
#pragma unroll
        for (int c = 0; c < C; ++c) {
            if (o < C - 1) sums.add(o * C + c, dmixed[o], v[c]);
            d[c] = fmaf(dmixed[o], again.mix[o][c], d[c]);
        }
    }
}

CONFIG(conv_norm_relu_backward, THREADS, sizeof(Shared), BLOCKS, ROWS, ACROSS, TILE)
KERNEL(conv_norm_relu_backward, THREADS, BLOCKS) {
    SHARED(Shared, shared);
    const Place place(a, ROWS);
    i64 here = place.at(C, place.first - 2 * REACH);
    Convolution convolution(a, place, shared);
    Sums sums(shared);
    for (int t = place.first - 2 * REACH; t < place.last; ++t, here += place.plane, convolution.next()) {
        Held dout[ROWS][C];
        constexpr int EARLY = FEW;  // rows that there are registers for during the convolution
        load_rows<0, EARLY>(place, a.dout, here, t >= place.first, dout);
        convolution.add(place, t + REACH);
        if (t < place.first) continue;
        load_rows<EARLY, ROWS>(place, a.dout, here, true, dout);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (!place.inside(r)) continue;
            int zero = opaque(0);  // parameters aren't kept in registers for the next row; with many channels, or pixel
            float d[C][4];
#pragma unroll
            for (int c = 0; c < C; ++c) dout[r][c].get(d[c]);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float v[C], pixel[C];
#pragma unroll
                for (int c = 0; c < C; ++c) v[c] = convolution.value(c, r, j), pixel[c] = d[c][j];
                if (!FEW) zero = opaque(0), sums.many += zero;
                differentiate((&shared.parameters)[zero], v, a.eps, pixel, sums);
#pragma unroll
                for (int c = 0; c < C; ++c) d[c][j] = pixel[c];
            }
            if (!a.dv) continue;
#pragma unroll
            for (int c = 0; c < C; ++c) place.store(a.dv, here + place.from(c, r), d[c]);
        }
    }
    float values[SUMS];
    sums.finish(values);
    sum_over_warps(values, shared.sums);
    constexpr int BIASES = DEPTHWISE ? C : 0;
    float* to = a.sums + (i64)blockIdx.x * (BIASES + SUMS);
    for (int i = threadIdx.x; i < SUMS; i += THREADS) to[BIASES + i] = sum_of_warps<SUMS>(shared.sums, i);
    // The depthwise biases' gradients are sums of dv, and these follow from the sums of what dv is made from.
    for (int c = threadIdx.x; c < BIASES; c += THREADS) {
        to[c] = 0.f;
        for (int o = 0; o < C; ++o)
            to[c] += shared.parameters.mix[o][c] * sum_of_warps<SUMS>(shared.sums, Sums::MIX_BIAS + o);
    }
}

#if DEPTHWISE
struct TapShared {
    float sums[THREADS / 32][27];
    alignas(16) Planes<1, TAP_TILE, TAP_STAGES>::Ring ring;
};

// The depthwise convolution's own backward pass: dx and the taps' gradients, from dv and x.
// A plane of dv gives to dx at three frames, and to the taps by x at the same three: both take the same values of dv.
CONFIG(depthwise_backward, THREADS, sizeof(TapShared), TAP_BLOCKS, TAP_ROWS, ACROSS, TAP_TILE)
KERNEL(depthwise_backward, THREADS, TAP_BLOCKS) {
    SHARED(TapShared, shared);
    const Place place(a, TAP_ROWS);
    const int c = place.volume % C;
    float taps[27], sums[27] = {};
#pragma unroll
    for (int k = 0; k < 27; ++k) taps[k] = ((const float*)a.parameters)[c * 27 + k];
    Planes<1, TAP_TILE, TAP_STAGES> planes(place, TAP_ROWS, a.dv, shared.ring);
    float x[3][TAP_ROWS][4] = {}, dx[3][TAP_ROWS][4] = {};  // at the frames before, of and after the plane
    Held next[TAP_ROWS];
    i64 here = place.at(1, place.first - 1);
#pragma unroll
    for (int r = 0; r < TAP_ROWS; ++r) next[r].load(place, a.x, here + place.plane + place.from(0, r), place.inside(r));
    for (int t = place.first - 1; t <= place.last; ++t, here += place.plane) {
#pragma unroll
        for (int r = 0; r < TAP_ROWS; ++r) {
            next[r].get(x[2][r]);
            const bool some = t + 2 < place.last && place.inside(r);
            next[r].load(place, a.x, here + 2 * place.plane + place.from(0, r), some);
        }
        if (t >= 0 && t < place.frames) {
            planes.advance();
            const T* dv = planes.channel(0) + place.in_tile;
#pragma unroll
            for (int r = 0; r < TAP_ROWS + 2; ++r) {
                float d[6];
                read_six(dv + r * 4 * (place.across + 2), d);
#pragma unroll
                for (int k = 0; k < 27; ++k) {
                    const int kt = k / 9, row = r - 2 + k / 3 % 3, kw = k % 3;
                    if (row < 0 || row >= TAP_ROWS) continue;
#pragma unroll
                    for (int j = 0; j < 4; ++j) sums[k] = fmaf(x[kt][row][j], d[j + 2 - kw], sums[k]);
                }
                if (!a.dx) continue;
#pragma unroll
                for (int k = 0; k < 27; ++k) {
                    const int kt = k / 9, row = r - 2 + k / 3 % 3, kw = k % 3;
                    if (row < 0 || row >= TAP_ROWS) continue;
#pragma unroll
                    for (int j = 0; j < 4; ++j) dx[kt][row][j] = fmaf(taps[k], d[j + 2 - kw], dx[kt][row][j]);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < TAP_ROWS; ++r) {
            if (a.dx && t > place.first && place.inside(r))
                place.store(a.dx, here - place.plane + place.from(0, r), dx[0][r]);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                x[0][r][j] = x[1][r][j], x[1][r][j] = x[2][r][j];
                dx[0][r][j] = dx[1][r][j], dx[1][r][j] = dx[2][r][j], dx[2][r][j] = 0.f;
            }
        }
    }
    sum_over_warps(sums, shared.sums);
    float* to = a.sums + (((i64)(place.volume / C) * place.parts + place.part) * C + c) * 27;
    if (threadIdx.x < 27) to[threadIdx.x] = sum_of_warps<27>(shared.sums, threadIdx.x);
}
#endif
