// The scan's forward pass on a GPU. scan.h says how the work is laid out.

#include "scan.h"

constexpr int TILE = KEEP;
constexpr int PER_LANE = 2;                             // channels a lane
constexpr int MAIN = CHANNELS * LANES / PER_LANE;       // threads that run the recurrence
constexpr int HELPERS = 64, THREADS = MAIN + HELPERS;   // helpers prepare the next tile meanwhile, and finish the last
constexpr int QUADS = TILE * CHANNELS / 4 / HELPERS;    // of a helper, a tile: inputs,
constexpr int STATE_QUADS = TILE * 8 / HELPERS;         // and B and C
static_assert(QUADS * HELPERS == TILE * CHANNELS / 4 && STATE_QUADS * HELPERS == TILE * 8 && TILE % 8 == 0, "no rest");

struct Shared {
    Quad raw[3][3][QUADS][HELPERS];     // u, Δ and z of three tiles
    Quad raw_states[2][STATE_QUADS][HELPERS];
    float2 inputs[2][TILE][CHANNELS];   // Δ, Δ u
    float4 states[2][TILE][8];          // B, C
    float y[2][TILE][CHANNELS + 8];
    float D[CHANNELS], bias[CHANNELS];
    const T *u, *delta, *z, *B, *C;
    T* out;
};

CONFIG(scan_segments, SEGMENT_THREADS, (int)sizeof(SegmentShared<false>), CHANNELS)
CONFIG(scan, THREADS, (int)sizeof(Shared), CHANNELS)

KERNEL(scan_segments, SEGMENT_THREADS, blocks_at_once(8, sizeof(SegmentShared<false>))) {
    SHARED(SegmentShared<false>, s);
    scan_segment_alone<false>(a, s);
}

struct Helper {
    const Args& a;
    Shared& s;
    int thread, quad, count, first, tiles;
    bool reverse;

    FN Helper(const Args& a, Shared& s, const Place& place, int first, int tiles)
        : a(a), s(s), first(first), tiles(tiles), reverse(place.reverse) {
        thread = (int)threadIdx.x - MAIN;
        quad = (unsigned)thread % (CHANNELS / 4) * 4;
        count = (int)a.width - place.channel - quad;
    }
    FN int row(int n) const { return (thread + n * HELPERS) / (CHANNELS / 4); }

    FN void load(int i) const {
        if (i < tiles) {
            const int last = (int)a.length - 1;
#pragma unroll
            for (int n = 0; n < QUADS; ++n) {
                const int t = first + i * TILE + row(n), in = min(t, last);
                Quad(*slots)[QUADS][HELPERS] = s.raw[i % 3];
                fetch(&slots[0][n][thread], s.u + offset(a, reverse, in, a.u.time) + quad, count, t <= last);
                fetch(&slots[1][n][thread], s.delta + offset(a, reverse, in, a.delta.time) + quad, count, t <= last);
                if (a.z.data) fetch(&slots[2][n][thread], s.z + offset(a, reverse, in, a.z.time) + quad, count, t <= last);
            }
#pragma unroll
            for (int n = 0; n < STATE_QUADS; ++n) {
                const int k = thread + n * HELPERS, q = k % 8;
                fetch_states(a, &s.raw_states[i & 1][n][thread], q < 4 ? s.B : s.C, q < 4 ? a.B.time : a.C.time, reverse,
                             first + i * TILE + k / 8, q % 4 * 4);
            }
        }
        commit_copies();
    }

    FN void prepare(int i) const {
        float bias[4];
        load4(s.bias + quad, bias);
#pragma unroll
        for (int n = 0; n < QUADS; ++n) {
            const int r = row(n), t = first + i * TILE + r;
            float delta[4], x[4];
            unpack(s.raw[i % 3][1][n][thread], delta), unpack(s.raw[i % 3][0][n][thread], x);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float slope;
                delta[j] = t < a.length ? step_size(a, delta[j] + bias[j], slope) : 0.f;
                x[j] *= delta[j];
            }
            *(float4*)&s.inputs[i & 1][r][quad] = make_float4(delta[0], x[0], delta[1], x[1]);
            *(float4*)&s.inputs[i & 1][r][quad + 2] = make_float4(delta[2], x[2], delta[3], x[3]);
        }
#pragma unroll
        for (int n = 0; n < STATE_QUADS; ++n) {
            const int k = thread + n * HELPERS;
            float states[4];
            unpack(s.raw_states[i & 1][n][thread], states);
            s.states[i & 1][k / 8][k % 8] = pack4(states);
        }
    }

    FN void finish(int i) const {
        float D[4];
        load4(s.D + quad, D);
#pragma unroll
        for (int n = 0; n < QUADS; ++n) {
            const int r = row(n), t = first + i * TILE + r;
            float x[4], y[4], z[4];
            unpack(s.raw[i % 3][0][n][thread], x), load4(&s.y[i & 1][r][quad], y);
            if (a.z.data) unpack(s.raw[i % 3][2][n][thread], z);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                y[j] = fmaf(D[j], x[j], y[j]);
                if (a.z.data) y[j] *= silu(z[j]);
            }
            if (t < a.length && count > 0)
                store_quad(s.out + offset(a, reverse, t, a.out.time) + quad, 1, 0, count, y);
        }
    }
};

struct Recurrence {
    const Args& a;
    Shared& s;
    int sub, channel;  // channels channel and channel + 8
    float rates[PER_LANE][4], h[PER_LANE][4];

    FN Recurrence(const Args& a, Shared& s) : a(a), s(s) {
        sub = threadIdx.x % LANES;
        channel = threadIdx.x / 32 * 8 * PER_LANE + threadIdx.x % 32 / LANES;
    }

    FN void start(const Place& place, int segment) {
#pragma unroll
        for (int c = 0; c < PER_LANE; ++c) {
            load_rates(a, place.channel + channel + c * 8, sub * 4, rates[c]);
            h[c][0] = h[c][1] = h[c][2] = h[c][3] = 0.f;
#pragma unroll 4
            for (int before = 0; before < segment; ++before)
                carry_over(a, segment_slot(before, channel + c * 8), sub * 4, rates[c], h[c]);
        }
    }

    FN void run(int i, int t) {  // tile i, which starts at step t
        if (a.kept) {
            const i64 chunks = (a.length + KEEP - 1) / KEEP;
#pragma unroll
            for (int c = 0; c < PER_LANE; ++c)
                store4(a.kept + kept_slot(chunks, t / KEEP, channel + c * 8) * STATES + sub * 4, h[c]);
        }
        const int p = i & 1;
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

KERNEL(scan, THREADS, blocks_at_once(5, sizeof(Shared))) {
    SHARED(Shared, s);
    const Place place(a);
    const int segment = blockIdx.y, first = segment * (int)a.steps;
    const int tiles = ceil_div((int)smaller(a.steps, a.length - first), TILE);
    const bool helps = threadIdx.x >= MAIN;
    const Helper helper(a, s, place, first, tiles);
    Recurrence recurrence(a, s);
    if (!helps) recurrence.start(place, segment);
    if (threadIdx.x == 0) {
        s.u = place.start(a, a.u, place.channel);
        s.delta = place.start(a, a.delta, place.channel);
        s.z = place.start(a, a.z, place.channel);
        s.B = place.start(a, a.B, 0);
        s.C = place.start(a, a.C, 0);
        s.out = place.start(a, a.out, place.channel);
    }
    stage(s.D, a.D, a, place.channel);
    stage(s.bias, a.bias, a, place.channel);
    __syncthreads();
    if (helps) {
        helper.load(0), helper.load(1);
        wait_for_copies<1>();
        helper.prepare(0);
    }
    __syncthreads();
    for (int i = 0; i < tiles; ++i) {
        if (helps) {
            if (i) helper.finish(i - 1);
            helper.load(i + 2);
            wait_for_copies<1>();
            if (i + 1 < tiles) helper.prepare(i + 1);
        } else {
            recurrence.run(i, first + i * TILE);
        }
        __syncthreads();
    }
    if (helps) helper.finish(tiles - 1);
    else if (segment == a.segments - 1) recurrence.store_last_state(place);
}
