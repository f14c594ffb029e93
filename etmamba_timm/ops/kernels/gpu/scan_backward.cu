// The scan's backward pass on a GPU. scan.h says how the work is laid out.
//
// A segment is taken in chunks of KEEP steps, the last first. From the state that the forward pass kept, the states are run
// through again. A chunk has tiles, whose inputs are staged, and a tile has groups of steps, whose states and decays stay in
// registers while the gradients go back through them.

#include "scan.h"

constexpr int TILE = 8, GROUP = 4;                 // steps
constexpr int PER_LANE = 2;                        // channels a lane
constexpr int THREADS = CHANNELS * LANES / PER_LANE, WARPS = THREADS / 32;
constexpr int TILES = KEEP / TILE, GROUPS = TILE / GROUP;
constexpr int SPREAD = CHANNELS / 4 + 2;           // see slot_of
#if __CUDA_ARCH__ >= 1000
constexpr int BLOCKS = 6;  // of a multiprocessor: 168 registers a thread; with 128 some are spilled there
#else
constexpr int BLOCKS = 8;
#endif
static_assert(TILE * CHANNELS / 4 == THREADS && TILE * 8 == THREADS && KEEP % TILE == 0, "a quad a thread");

struct Shared {
    Quad raw[2][4][THREADS];                       // u, Δ, z and dout of two tiles
    Quad raw_states[2][THREADS];
    float4 inputs[TILE][CHANNELS + 8];             // Δ, Δ u, dy, and dΔ/d(raw Δ); see slot_of
    float4 states[TILE][8];                        // B, C
    float4 sums[WARPS][TILE][8];                   // dB, dC of a warp's channels
    float4 before[TILES * GROUPS][PER_LANE][THREADS];  // the states before each group
    float4 dD[THREADS], dbias[THREADS];
    float y[TILE][CHANNELS + 8], dx[TILE][CHANNELS + 8], drate[TILE][CHANNELS + 8];  // into Δ u, and into Δ by the decay
    float D[CHANNELS], bias[CHANNELS];
    const T *u, *delta, *z, *dout, *B, *C;
    T *du, *ddelta, *dz;
    float *dB, *dC;
    const float* kept;
    int channels;  // of the block and those after it
    bool reverse;
};

CONFIG(scan_backward_segments, SEGMENT_THREADS, (int)sizeof(SegmentShared<true>), CHANNELS)
CONFIG(scan_backward, THREADS, (int)sizeof(Shared), CHANNELS)

KERNEL(scan_backward_segments, SEGMENT_THREADS, blocks_at_once(8, sizeof(SegmentShared<true>))) {
    SHARED(SegmentShared<true>, s);
    scan_segment_alone<true>(a, s);
}

// Where a channel's inputs are: an order that spares those who write quads, and those who read channels, bank conflicts.
FN int slot_of(int channel) { return channel % 4 * SPREAD + channel / 4; }

// Eight values of each of the 8 lanes of a warp that have the same states. The lane with bits (2, 3, 4) gets the sum of
// value 4 * bit 2 + 2 * bit 3 + bit 4.
FN float sum_over_channels(float* x, int lane) {
    bool upper = lane & 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float send = upper ? x[i] : x[i + 4], keep = upper ? x[i + 4] : x[i];
        x[i] = keep + shuffle_xor(send, 4);
    }
    upper = lane & 8;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float send = upper ? x[i] : x[i + 2], keep = upper ? x[i + 2] : x[i];
        x[i] = keep + shuffle_xor(send, 8);
    }
    upper = lane & 16;
    return (upper ? x[1] : x[0]) + shuffle_xor(upper ? x[0] : x[1], 16);
}

// A thread's quad of a tile. The thread's number is made opaque, so that addresses aren't kept in registers between tiles.
struct Quads {
    const Args& a;
    Shared& s;

    FN Quads(const Args& a, Shared& s) : a(a), s(s) {}
    FN int count(int quad) const { return s.channels - quad; }

    FN void load(int p, int first, bool all) const {  // all: z and dout too
        const int thread = opaque(threadIdx.x), quad = thread % (CHANNELS / 4) * 4, n = count(quad);
        const int last = (int)a.length - 1, t = first + thread / (CHANNELS / 4), in = min(t, last);
        fetch(&s.raw[p][0][thread], s.u + offset(a, s.reverse, in, a.u.time) + quad, n, t <= last);
        fetch(&s.raw[p][1][thread], s.delta + offset(a, s.reverse, in, a.delta.time) + quad, n, t <= last);
        if (all) {
            if (a.z.data) fetch(&s.raw[p][2][thread], s.z + offset(a, s.reverse, in, a.z.time) + quad, n, t <= last);
            fetch(&s.raw[p][3][thread], s.dout + offset(a, s.reverse, in, a.dout.time) + quad, n, t <= last);
        }
        const int q = thread % 8;
        fetch_states(a, &s.raw_states[p][thread], q < 4 ? s.B : s.C, q < 4 ? a.B.time : a.C.time, s.reverse, first + thread / 8,
                     q % 4 * 4);
        commit_copies();
    }

    FN void prepare(int p, int first, bool all) const {
        const int thread = opaque(threadIdx.x), quad = thread % (CHANNELS / 4) * 4, r = thread / (CHANNELS / 4);
        float delta[4], x[4], dy[4] = {}, slope[4], bias[4], states[4];
        unpack(s.raw[p][1][thread], delta), unpack(s.raw[p][0][thread], x), load4(s.bias + quad, bias);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float size = step_size(a, delta[j] + bias[j], slope[j]);
            delta[j] = first + r < a.length ? size : 0.f;
            x[j] *= delta[j];
        }
        if (all) {
            unpack(s.raw[p][3][thread], dy);
            if (a.z.data) {
                float z[4];
                unpack(s.raw[p][2][thread], z);
#pragma unroll
                for (int j = 0; j < 4; ++j) dy[j] *= silu(z[j]);
            }
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) s.inputs[r][slot_of(j) + quad / 4] = make_float4(delta[j], x[j], dy[j], slope[j]);
        unpack(s.raw_states[p][thread], states);
        s.states[thread / 8][thread % 8] = pack4(states);
    }

    FN void finish(int p, int first) const {
        const int thread = opaque(threadIdx.x);
        add_coefficients(thread, first + thread / 8);
        const int quad = thread % (CHANNELS / 4) * 4, r = thread / (CHANNELS / 4), t = first + r;
        float u[4], z[4], dout[4], y[4], dx[4], drate[4], D[4], dD[4], dbias[4];
        unpack(s.raw[p][0][thread], u), unpack(s.raw[p][3][thread], dout);
        if (a.z.data) unpack(s.raw[p][2][thread], z);
        load4(&s.y[r][quad], y), load4(&s.dx[r][quad], dx), load4(&s.drate[r][quad], drate), load4(s.D + quad, D);
        unpack(s.dD[thread], dD), unpack(s.dbias[thread], dbias);
#pragma unroll
        for (int j = 0; j < 4; ++j) {  // past the end all gradients are 0
            const float4 in = s.inputs[r][slot_of(j) + quad / 4];
            const float ddelta = fmaf(dx[j], u[j], drate[j] * LN2) * in.w;
            if (a.z.data) z[j] = dout[j] * fmaf(D[j], u[j], y[j]) * silu_slope(z[j]);
            dD[j] = fmaf(in.z, u[j], dD[j]);
            dbias[j] += ddelta;
            drate[j] = ddelta;
            dx[j] = fmaf(D[j], in.z, in.x * dx[j]);
        }
        const int n = count(quad);
        if (t < a.length && n > 0) {
            store_quad(s.du + offset(a, s.reverse, t, a.du.time) + quad, 1, 0, n, dx);
            store_quad(s.ddelta + offset(a, s.reverse, t, a.ddelta.time) + quad, 1, 0, n, drate);
            if (a.z.data) store_quad(s.dz + offset(a, s.reverse, t, a.dz.time) + quad, 1, 0, n, z);
        }
        s.dD[thread] = pack4(dD), s.dbias[thread] = pack4(dbias);
    }

    FN void add_coefficients(int thread, int t) const {  // of dB and dC: the block's channels together
        const int q = thread % 8;
        float4 sum = s.sums[0][thread / 8][q];
#pragma unroll
        for (int w = 1; w < WARPS; ++w) {
            const float4 x = s.sums[w][thread / 8][q];
            sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
        }
        if (t < a.length && q % 4 * 4 < a.states) add_to((q < 4 ? s.dB : s.dC) + offset(a, s.reverse, t, STATES) + q % 4 * 4, sum);
    }
};

struct Gradients {
    Shared& s;
    int lane, sub, channel;  // channels channel and channel + 8
    int slots[PER_LANE];
    float rates[PER_LANE][4], g[PER_LANE][4], dA[PER_LANE][4];  // g: of the state that the next steps start from

    FN Gradients(const Args& a, Shared& s, const Place& place, int segment) : s(s) {
        lane = threadIdx.x % 32, sub = lane % LANES;
        channel = threadIdx.x / 32 * 8 * PER_LANE + lane / LANES;
#pragma unroll
        for (int c = 0; c < PER_LANE; ++c) {
            slots[c] = slot_of(channel + c * 8);
            load_rates(a, place.channel + channel + c * 8, sub * 4, rates[c]);
#pragma unroll
            for (int n = 0; n < 4; ++n) g[c][n] = dA[c][n] = 0.f;
#pragma unroll 4
            for (int after = (int)a.segments - 1; after > segment; --after)
                carry_over(a, segment_slot(after, channel + c * 8), sub * 4, rates[c], g[c]);
        }
    }

    FN void load_state(int chunk, float (*h)[4]) const {
#pragma unroll
        for (int c = 0; c < PER_LANE; ++c)
            load4(s.kept + ((i64)chunk * CHANNELS + channel + c * 8) * STATES + sub * 4, h[c]);
    }

    // Notes the states before each group of tile j, and runs them through it; but not through the chunk's last group.
    FN void forward(int j, bool last, float (*h)[4]) const {
#pragma unroll 1
        for (int b = 0; b < GROUPS; ++b) {
#pragma unroll
            for (int c = 0; c < PER_LANE; ++c) s.before[j * GROUPS + b][c][threadIdx.x] = pack4(h[c]);
            if (last && b == GROUPS - 1) break;
#pragma unroll
            for (int r = 0; r < GROUP; ++r) {
                float B[4];
                unpack(s.states[b * GROUP + r][sub], B);
#pragma unroll
                for (int c = 0; c < PER_LANE; ++c) {
                    const float2 in = *(const float2*)&s.inputs[b * GROUP + r][slots[c]];
#pragma unroll
                    for (int n = 0; n < 4; ++n) h[c][n] = fmaf(h[c][n], exp2_fast(in.x * rates[c][n]), in.y * B[n]);
                }
            }
        }
    }

    // Back through group b of tile j.
    FN void backward(int j, int b) {
        float h[GROUP + 1][PER_LANE][4], decays[GROUP][PER_LANE][4];  // h[r]: before step r
#pragma unroll
        for (int c = 0; c < PER_LANE; ++c) unpack(s.before[j * GROUPS + b][c][threadIdx.x], h[0][c]);
#pragma unroll
        for (int r = 0; r < GROUP; ++r) {
            float B[4];
            unpack(s.states[b * GROUP + r][sub], B);
#pragma unroll
            for (int c = 0; c < PER_LANE; ++c) {
                const float2 in = *(const float2*)&s.inputs[b * GROUP + r][slots[c]];
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    const float decay = exp2_fast(in.x * rates[c][n]);
                    h[r + 1][c][n] = fmaf(h[r][c][n], decay, in.y * B[n]);
                    decays[r][c][n] = decay;
                }
            }
        }
        float y[PER_LANE][4], dx[PER_LANE][4], drate[PER_LANE][4];
#pragma unroll
        for (int r = GROUP - 1; r >= 0; --r) {
            float B[4], C[4], sums[8];  // of dB and dC
            unpack(s.states[b * GROUP + r][sub], B), unpack(s.states[b * GROUP + r][4 + sub], C);
#pragma unroll
            for (int c = 0; c < PER_LANE; ++c) {
                const float4 in = s.inputs[b * GROUP + r][slots[c]];
                y[c][r] = dx[c][r] = drate[c][r] = 0.f;
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    g[c][n] = fmaf(in.z, C[n], g[c][n]);  // now of the state after this step
                    sums[n] = c ? fmaf(g[c][n], in.y, sums[n]) : g[c][n] * in.y;
                    sums[4 + n] = c ? fmaf(in.z, h[r + 1][c][n], sums[4 + n]) : in.z * h[r + 1][c][n];
                    y[c][r] = fmaf(C[n], h[r + 1][c][n], y[c][r]);
                    dx[c][r] = fmaf(g[c][n], B[n], dx[c][r]);
                    g[c][n] *= decays[r][c][n];
                    const float through = g[c][n] * h[r][c][n];  // of Δ A
                    drate[c][r] = fmaf(through, rates[c][n], drate[c][r]);
                    dA[c][n] = fmaf(through, in.x, dA[c][n]);
                }
            }
            float* to = (float*)s.sums[threadIdx.x / 32][b * GROUP + r];
            to[(lane >> 2 & 1) * STATES + sub * 4 + (lane >> 3 & 1) * 2 + (lane >> 4 & 1)] = sum_over_channels(sums, lane);
        }
#pragma unroll
        for (int c = 0; c < PER_LANE; ++c) {
            const int r = b * GROUP + sub, e = channel + c * 8;
            s.y[r][e] = sum_over_lanes(y[c], sub);
            s.dx[r][e] = sum_over_lanes(dx[c], sub);
            s.drate[r][e] = sum_over_lanes(drate[c], sub);
        }
    }
};
static_assert(GROUP == LANES, "a lane finishes one step of a group");

FN void start(const Args& a, Shared& s, const Place& place) {
    if (threadIdx.x == 0) {
        s.channels = (int)a.width - place.channel, s.reverse = place.reverse;
        s.u = place.start(a, a.u, place.channel);
        s.delta = place.start(a, a.delta, place.channel);
        s.z = place.start(a, a.z, place.channel);
        s.dout = place.start(a, a.dout, place.channel);
        s.B = place.start(a, a.B, 0);
        s.C = place.start(a, a.C, 0);
        s.du = place.start(a, a.du, place.channel);
        s.ddelta = place.start(a, a.ddelta, place.channel);
        s.dz = place.start(a, a.dz, place.channel);
        s.dB = a.dB + place.row * a.length * STATES;
        s.dC = a.dC + place.row * a.length * STATES;
        s.kept = a.kept + kept_slot((a.length + KEEP - 1) / KEEP, 0, 0) * STATES;
    }
    stage(s.D, a.D, a.D_dtype, a, place.channel);
    stage(s.bias, a.bias, a.bias_dtype, a, place.channel);
    s.dD[threadIdx.x] = s.dbias[threadIdx.x] = make_float4(0.f, 0.f, 0.f, 0.f);
    __syncthreads();
}

KERNEL(scan_backward, THREADS, blocks_at_once(BLOCKS, sizeof(Shared))) {
    SHARED(Shared, s);
    const Place place(a);
    const int length = (int)a.length, segment = blockIdx.y, first_chunk = segment * (int)(a.steps / KEEP);
    const int chunks = min(ceil_div(length, KEEP), first_chunk + (int)(a.steps / KEEP));
    const Quads quads(a, s);
    Gradients gradients(a, s, place, segment);
    start(a, s, place);
    int p = 0;  // which of the two sets of raw inputs is the current tile's
    const int last_start = (chunks - 1) * KEEP;
    quads.load(0, last_start, length - last_start <= TILE || TILES == 1);
    for (int chunk = chunks - 1; chunk >= first_chunk; --chunk) {
        const int t = chunk * KEEP, tiles = TILES == 1 ? 1 : ceil_div(min(KEEP, length - t), TILE);
        // What comes after tile j on the way back.
        auto load_next = [&](int j) {
            if (j > 0) quads.load(p ^ 1, t + (j - 1) * TILE, true);
            else if (chunk > first_chunk) quads.load(p ^ 1, t - KEEP, TILES == 1);
        };
        float h[PER_LANE][4];
        gradients.load_state(chunk, h);
#pragma unroll 1
        for (int j = 0; j < tiles; ++j) {
            const bool last = j == tiles - 1;
            wait_for_copies<0>();
            quads.prepare(p, t + j * TILE, last);
            __syncthreads();
            if (last) load_next(j);
            else quads.load(p ^ 1, t + (j + 1) * TILE, j + 1 == tiles - 1);
            gradients.forward(j, last, h);
            if (!last) {
                __syncthreads();
                p ^= 1;
            }
        }
#pragma unroll 1
        for (int j = tiles - 1; j >= 0; --j) {
            if (j < tiles - 1) {
                wait_for_copies<0>();
                quads.prepare(p, t + j * TILE, true);
                __syncthreads();
                load_next(j);
            }
#pragma unroll 1
            for (int b = GROUPS - 1; b >= 0; --b) gradients.backward(j, b);
            __syncthreads();
            quads.finish(p, t + j * TILE);
            p ^= 1;
        }
    }
    const i64 first_channel = a.width - s.channels;
#pragma unroll
    for (int c = 0; c < PER_LANE; ++c) {
        if (a.A_log)  // what `A` has changes A by a factor
#pragma unroll
            for (int n = 0; n < 4; ++n) gradients.dA[c][n] *= gradients.rates[c][n] * LN2;
        add_to(a.dA + (first_channel + gradients.channel + c * 8) * STATES + gradients.sub * 4, pack4(gradients.dA[c]));
    }
    const i64 quad = first_channel + threadIdx.x % (CHANNELS / 4) * 4;
    add_to(a.dD + quad, s.dD[threadIdx.x]);
    add_to(a.dbias + quad, s.dbias[threadIdx.x]);
}
