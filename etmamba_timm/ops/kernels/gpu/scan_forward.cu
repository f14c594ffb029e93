// The scan's forward pass on a GPU. scan.h says how the work is laid out.

#include "scan.h"

// Best of those measured on one H200. Channels of a lane; threads that prepare the next tile meanwhile, and finish the last;
// blocks of a multiprocessor.
constexpr int TILE = 16, PER_LANE = 2, HELPERS = 64, BLOCKS = 5;
constexpr int MAIN = CHANNELS * LANES / PER_LANE, THREADS = MAIN + HELPERS;  // MAIN threads run the recurrence
constexpr int ROWS = HELPERS / (CHANNELS / 4);          // steps of which the helpers have a quad each
constexpr int QUADS = TILE / ROWS;                      // of a helper, a tile: inputs,
constexpr int STATE_QUADS = TILE * 8 / HELPERS;         // and B and C
static_assert(QUADS * ROWS == TILE && STATE_QUADS * HELPERS == TILE * 8 && HELPERS % 32 == 0, "no rest");
static_assert(STEPS % TILE == 0 && KEEP % TILE == 0 && TILE % 4 == 0, "whole tiles");

struct Shared {
    Quad raw[3][3][QUADS][HELPERS];     // u, Δ and z of three tiles
    Quad raw_states[2][STATE_QUADS][HELPERS];
    float2 inputs[2][TILE][CHANNELS];   // Δ, Δ u
    float4 states[2][TILE][8];          // B, C
    float y[2][TILE][CHANNELS + 8];
    float D[CHANNELS], bias[CHANNELS];
};

CONFIG(scan_segments, SEGMENT_THREADS, (int)sizeof(SegmentShared<false>), CHANNELS)
CONFIG(scan, THREADS, (int)sizeof(Shared), CHANNELS)

KERNEL(scan_segments, SEGMENT_THREADS, blocks_at_once(8, sizeof(SegmentShared<false>))) {
    SHARED(SegmentShared<false>, s);
    scan_segment_alone<false>(a, s);
}

// Its pointers are at the tile that is loaded next, or (out) finished next.
struct Helper {
    const Args& a;
    Shared& s;
    int thread, quad, row, count, loaded, finished;  // the first steps of these tiles
    int way;                                         // 1, or -1: backwards
    const T *u, *delta, *z, *states;
    T* out;
    i64 states_stride;
    float D[4], bias[4];

    FN Helper(const Args& a, Shared& s, const Place& place, int thread, int first)
        : a(a), s(s), thread(thread), loaded(first), finished(first), way(place.reverse ? -1 : 1) {
        quad = thread % (CHANNELS / 4) * 4, row = thread / (CHANNELS / 4);
        count = (int)a.width - place.channel - quad;
        const int t = first + row, q = thread % 8;
        u = place.start(a, a.u, place.channel) + offset(a, place.reverse, t, a.u.time) + quad;
        delta = place.start(a, a.delta, place.channel) + offset(a, place.reverse, t, a.delta.time) + quad;
        z = place.start(a, a.z, place.channel) + offset(a, place.reverse, t, a.z.time) + quad;
        out = place.start(a, a.out, place.channel) + offset(a, place.reverse, t, a.out.time) + quad;
        states_stride = q < 4 ? a.B.time : a.C.time;
        states = place.start(a, q < 4 ? a.B : a.C, 0) + offset(a, place.reverse, first + thread / 8, states_stride) + q % 4 * 4;
        load4(s.D + quad, D), load4(s.bias + quad, bias);
    }
    FN i64 ahead(int steps, i64 stride) const { return (i64)(way * steps) * (int)stride; }

    FN void load(int end, int p, int parity) {
        if (loaded < end) {
            Quad(*slots)[QUADS][HELPERS] = s.raw[p];
#pragma unroll
            for (int n = 0; n < QUADS; ++n) {
                const bool some = loaded + row + n * ROWS < a.length;
                fetch(&slots[0][n][thread], u + ahead(n * ROWS, a.u.time), count, some);
                fetch(&slots[1][n][thread], delta + ahead(n * ROWS, a.delta.time), count, some);
                if (a.z.data) fetch(&slots[2][n][thread], z + ahead(n * ROWS, a.z.time), count, some);
            }
#pragma unroll
            for (int n = 0; n < STATE_QUADS; ++n)
                fetch(&s.raw_states[parity][n][thread], states + ahead(n * (HELPERS / 8), states_stride),
                      (int)a.states - thread % 4 * 4, loaded + thread / 8 + n * (HELPERS / 8) < a.length);
            u += ahead(TILE, a.u.time), delta += ahead(TILE, a.delta.time), z += ahead(TILE, a.z.time);
            states += ahead(TILE, states_stride);
            loaded += TILE;
        }
        commit_copies();
    }

    FN void prepare(int t, int p, int parity) const {
#pragma unroll
        for (int n = 0; n < QUADS; ++n) {
            const int r = row + n * ROWS;
            float size[4], x[4];
            unpack(s.raw[p][1][n][thread], size), unpack(s.raw[p][0][n][thread], x);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float slope;
                size[j] = t + r < a.length ? step_size(a, size[j] + bias[j], slope) : 0.f;
                x[j] *= size[j];
            }
            *(float4*)&s.inputs[parity][r][quad] = make_float4(size[0], x[0], size[1], x[1]);
            *(float4*)&s.inputs[parity][r][quad + 2] = make_float4(size[2], x[2], size[3], x[3]);
        }
#pragma unroll
        for (int n = 0; n < STATE_QUADS; ++n) {
            float x[4];
            unpack(s.raw_states[parity][n][thread], x);
            s.states[parity][thread / 8 + n * (HELPERS / 8)][thread % 8] = pack4(x);
        }
    }

    FN void finish(int p, int parity) {
#pragma unroll
        for (int n = 0; n < QUADS; ++n) {
            const int r = row + n * ROWS;
            float x[4], y[4], gate[4];
            unpack(s.raw[p][0][n][thread], x), load4(&s.y[parity][r][quad], y);
            if (a.z.data) unpack(s.raw[p][2][n][thread], gate);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                y[j] = fmaf(D[j], x[j], y[j]);
                if (a.z.data) y[j] *= silu(gate[j]);
            }
            if (finished + r < a.length && count > 0) store_quad(out + ahead(n * ROWS, a.out.time), 1, 0, count, y);
        }
        out += ahead(TILE, a.out.time);
        finished += TILE;
    }
};

struct Recurrence {
    const Args& a;
    Shared& s;
    int sub, channel;  // channels channel and channel + 8
    float rates[PER_LANE][4], h[PER_LANE][4];

    FN Recurrence(const Args& a, Shared& s, const Place& place, int thread, int segment) : a(a), s(s) {
        sub = thread % LANES;
        channel = thread / 32 * 8 * PER_LANE + thread % 32 / LANES;
#pragma unroll
        for (int c = 0; c < PER_LANE; ++c) {
            load_rates(a, place.channel + channel + c * 8, sub * 4, rates[c]);
            h[c][0] = h[c][1] = h[c][2] = h[c][3] = 0.f;
#pragma unroll 4
            for (int before = 0; before < segment; ++before)
                carry_over(a, segment_slot(before, channel + c * 8), sub * 4, rates[c], h[c]);
        }
    }

    FN void run(int t, int p) {  // a tile, which starts at step t
        if (a.kept && t % KEEP == 0 && t < a.length) keep(t / KEEP);
#pragma unroll 2
        for (int r = 0; r < TILE; r += 4) {
            float y[PER_LANE][4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                float B[4], C[4];
                unpack(s.states[p][r + k][sub], B), unpack(s.states[p][r + k][4 + sub], C);
#pragma unroll
                for (int c = 0; c < PER_LANE; ++c) {
                    const float2 in = s.inputs[p][r + k][channel + c * 8];
#pragma unroll
                    for (int n = 0; n < 4; ++n) h[c][n] = fmaf(h[c][n], exp2_fast(in.x * rates[c][n]), in.y * B[n]);
                    y[c][k] = fmaf(h[c][0], C[0], h[c][1] * C[1]) + fmaf(h[c][2], C[2], h[c][3] * C[3]);
                }
            }
#pragma unroll
            for (int c = 0; c < PER_LANE; ++c) s.y[p][r + sub][channel + c * 8] = sum_over_lanes(y[c], sub);
        }
    }

    FN void keep(int chunk) const {
        const i64 chunks = (a.length + KEEP - 1) / KEEP;
#pragma unroll
        for (int c = 0; c < PER_LANE; ++c)
            store4(a.kept + kept_slot(chunks, chunk, channel + c * 8) * STATES + sub * 4, h[c]);
    }

    FN void store_last_state(const Place& place) const {  // steps past the last don't change it
#pragma unroll
        for (int c = 0; c < PER_LANE; ++c) {
            const i64 e = place.channel + channel + c * 8;
#pragma unroll
            for (int n = 0; n < 4; ++n)
                if (e < a.width && sub * 4 + n < a.states)
                    a.last_state[(place.row * a.width + e) * a.states + sub * 4 + n] = h[c][n];
        }
    }
};

// Barriers at which both roles meet.
FN void first_prepared() { __syncthreads(); }
FN void tile_done() { __syncthreads(); }

KERNEL(scan, THREADS, blocks_at_once(BLOCKS, sizeof(Shared))) {
    SHARED(Shared, s);
    const Place place(a);
    const int segment = blockIdx.y, first = segment * (int)a.steps;
    const int end = (int)smaller(first + a.steps, a.length);
    stage(s.D, a.D, a.D_dtype, a, place.channel);
    stage(s.bias, a.bias, a.bias_dtype, a, place.channel);
    __syncthreads();
    const int thread = threadIdx.x;
    if (thread < MAIN) {
        Recurrence recurrence(a, s, place, thread, segment);
        first_prepared();
        for (int t = first; t < end; t += TILE) {
            recurrence.run(t, t / TILE & 1);
            tile_done();
        }
        if (segment == a.segments - 1) recurrence.store_last_state(place);
    } else {
        Helper helper(a, s, place, thread - MAIN, first);
        const int parity = first / TILE & 1;
        helper.load(end, 0, parity), helper.load(end, 1, parity ^ 1);
        wait_for_copies<1>();
        helper.prepare(first, 0, parity);
        first_prepared();
        int p = 2;  // of the three sets of raw inputs: the last tile's, then the next but one's
        for (int t = first; t < end; t += TILE) {
            const int next = (t / TILE + 1) & 1;
            if (t > first) helper.finish(p, next);
            helper.load(end, p, next ^ 1);
            wait_for_copies<1>();
            const int q = p ? p - 1 : 2;  // the next tile's
            if (t + TILE < end) helper.prepare(t + TILE, q, next);
            p = p == 2 ? 0 : p + 1;
            tile_done();
        }
        helper.finish(p, (end - 1) / TILE & 1);
    }
}
