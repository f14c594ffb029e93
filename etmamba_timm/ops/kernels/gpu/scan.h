// What the kernels of the scan share. Called from ops/scan/gpu.py.
//
// h_t = exp(Δ_t A) h_{t-1} + Δ_t u_t B_t and y_t = C_t·h_t, for up to 16 states a channel; then D, the gate and the sums.
//
// A block has 32 channels of a row (one direction of one sequence) and one segment of its time steps. Four lanes share a
// channel, four states each. Time goes in tiles that are staged in shared memory. What surrounds the recurrence (softplus,
// gates, outputs) is worked out in quads, four channels of one step: a thread copies, prepares and finishes the same quads,
// so that its raw inputs wait in slots of its own and need no barrier.
//
// Where blocks are few, segments run side by side: a first kernel finds what each would end with from zeros, and the main
// kernel puts the segments before its own together to know where its own starts.
//
// KEEP is the number of steps between the states that the forward pass keeps for the backward pass.
#pragma once

#include "kernel.h"

constexpr int STATES = 16;    // of a channel; fewer are filled up with zeros
constexpr int LANES = 4;      // that share a channel
constexpr int CHANNELS = 32;  // of a block
constexpr int STEPS = KEEP > 16 ? KEEP : 16;  // those of a segment are a multiple

struct Args {  // must match gpu.py
    i64 batch, width, length, states, reverse_from, segments, steps, softplus;  // steps: of a segment, a multiple of STEPS
    i64 A_log, A_dtype, D_dtype, bias_dtype;  // A_log: whether `A` has log(-A); dtypes are numbered as DTYPE
    Strided u, delta, z, B, C, out;    // channels next to each other; z may be missing
    const void *A, *D, *bias;          // [width, states]; [width] or null; [width] or null
    float *last_state;                 // [rows, width, states]
    float *kept;                       // [rows, blocks of channels, chunks, CHANNELS, STATES] or null
    float *ends, *sums;                // of segments alone: [segments, rows, blocks, CHANNELS, STATES]; without STATES
    Strided dout, du, ddelta, dz;      // backward only, like the rest; dout is the same for all directions
    float *dA, *dB, *dC, *dD, *dbias;  // added to: [blocks, CHANNELS, STATES]; [rows, length, STATES]; [blocks, CHANNELS]
};

// The shared memory of a multiprocessor in KiB.
#if __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200
constexpr int PROCESSOR_MEMORY = 100;
#elif __CUDA_ARCH__ < 900
constexpr int PROCESSOR_MEMORY = 164;
#else
constexpr int PROCESSOR_MEMORY = 228;
#endif
// How many blocks a multiprocessor should hold at once: `most`, or as many as its shared memory has room for.
constexpr int blocks_at_once(int most, int bytes) {
    return most * (bytes + 1024) <= PROCESSOR_MEMORY * 1024 ? most : PROCESSOR_MEMORY * 1024 / (bytes + 1024);
}

#if DTYPE != 0  // where it isn't a Quad
FN void unpack(float4 q, float* x) { x[0] = q.x, x[1] = q.y, x[2] = q.z, x[3] = q.w; }
#endif
FN float4 pack4(const float* x) { return make_float4(x[0], x[1], x[2], x[3]); }
FN void load4(const float* from, float* x) { unpack(*(const float4*)from, x); }
FN void store4(float* to, const float* x) { *(float4*)to = pack4(x); }

// ---- Where a block works. The grid is (rows × blocks of channels, segments).

struct Place {
    int channel, row;  // channel: the block's first
    bool reverse;
    FN explicit Place(const Args& a) {
        const int blocks = ceil_div((int)a.width, CHANNELS);
        channel = (int)blockIdx.x % blocks * CHANNELS, row = (int)blockIdx.x / blocks;
        reverse = row >= a.reverse_from;
    }
    // A tensor's row, from a channel on. These addresses wait in shared memory: no registers hold them meanwhile.
    FN T* start(const Args& a, const Strided& x, int channel) const {
        return (T*)x.data + row / a.batch * x.direction + row % a.batch * x.batch + channel;
    }
};

// The index of a channel of this block in `ends` and `sums`, or (of `kept`) at the start of a chunk.
FN i64 segment_slot(i64 segment, int channel) { return (segment * gridDim.x + blockIdx.x) * CHANNELS + channel; }
FN i64 kept_slot(i64 chunks, i64 chunk, int channel) { return (blockIdx.x * chunks + chunk) * CHANNELS + channel; }

// A step's place in memory: `t` counts in the order of the scan.
FN i64 offset(const Args& a, bool reverse, int t, i64 stride) {
    return (i64)(reverse ? (int)a.length - 1 - t : t) * (int)stride;
}

// ---- Copies and parameters

// Starts to copy four neighbours into a slot that this thread alone reads: the first `count` of them, or none if not
// `some`; the others become 0.
FN void fetch(Quad* slot, const T* from, int count, bool some) {
#if ALIGNED
    copy_async<sizeof(Quad)>(slot, from, some && count > 0);
#else
    T x[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = some && j < count ? from[j] : (T)0;
#if DTYPE == 0
    *slot = make_float4(x[0], x[1], x[2], x[3]);
#else
    *slot = make_uint2(x[0] | (unsigned)x[1] << 16, x[2] | (unsigned)x[3] << 16);
#endif
#endif
}

// B or C of a step: the states from `state` on.
FN void fetch_states(const Args& a, Quad* slot, const T* row, i64 stride, bool reverse, int t, int state) {
    const int last = (int)a.length - 1;
    fetch(slot, row + offset(a, reverse, min(t, last), stride) + state, (int)a.states - state, t <= last);
}

// D or the bias of the block's channels; 0 where there is none.
FN void stage(float* to, const void* from, i64 dtype, const Args& a, int channel) {
    for (int i = threadIdx.x; i < CHANNELS; i += blockDim.x)
        to[i] = from && channel + i < a.width ? element(from, channel + i, (int)dtype) : 0.f;
}

// A log2 e of four states of a channel: decays are powers of 2.
FN void load_rates(const Args& a, int channel, int state, float* rates) {
    const i64 begin = channel * a.states, end = channel < a.width ? begin + a.states : 0;
    elements<4>(a.A, (int)a.A_dtype, begin + state, 1, end, rates);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        if (a.A_log) rates[n] = begin + state + n < end ? -exp_fast(rates[n]) : 0.f;
        rates[n] *= LOG2E;
    }
}

// From the end of one segment to the end of the next: decays over `sum`, the next segment's steps together. A growth too
// large for float32 stays finite, as 0 times infinity would be NaN.
FN void carry_over(const Args& a, i64 slot, int state, const float* rates, float* h) {
    const float sum = a.sums[slot];
    float end[4];
    load4(a.ends + slot * STATES + state, end);
#pragma unroll
    for (int n = 0; n < 4; ++n) h[n] = fmaf(h[n], exp2_fast(fminf(sum * rates[n], 126.f)), end[n]);
}

// ---- Elementary functions

// Δ before softplus -> Δ, and its derivative.
FN float step_size(const Args& a, float raw, float& slope) {
    const float e = exp_fast(raw), one_and_e = 1.f + e;
    float size = log2_fast(one_and_e) * LN2;
    // 1 + e loses the digits of a small e; only float32 inputs have them.
    if (DTYPE == 0) size = e < 1.f / 32 ? e * fmaf(-e, fmaf(-e, fmaf(-e, 0.25f, 1.f / 3), 0.5f), 1.f) : size;
    const bool linear = !a.softplus || raw > 20.f;
    slope = linear ? 1.f : e * reciprocal(one_and_e);
    return linear ? raw : size;
}

// Four values of each of a channel's lanes: lane i gets the sum over the lanes of the i-th.
FN float sum_over_lanes(const float* x, int lane) {
    const bool odd = lane & 1, upper = lane & 2;
    float keep0 = odd ? x[1] : x[0], keep1 = odd ? x[3] : x[2];
    keep0 += shuffle_xor(odd ? x[0] : x[1], 1);
    keep1 += shuffle_xor(odd ? x[2] : x[3], 1);
    return (upper ? keep1 : keep0) + shuffle_xor(upper ? keep0 : keep1, 2);
}

// ---- Segments alone: from zeros, the state after a segment's last step; or (ADJOINT) its gradient before the first, from
// zeros after the last. And the sum of its step sizes. The last segment's (ADJOINT: the first's) isn't needed.

constexpr int SEGMENT_TILE = 16, SEGMENT_THREADS = CHANNELS * LANES;
static_assert(STEPS % SEGMENT_TILE == 0 && STEPS % KEEP == 0 && SEGMENT_TILE * CHANNELS / 4 == SEGMENT_THREADS, "a quad a thread");

template <bool ADJOINT> struct SegmentShared {
    Quad raw[2][ADJOINT ? 3 : 2][SEGMENT_THREADS];  // Δ; u, or dout and z
    Quad raw_states[2][SEGMENT_TILE * 4];
    float2 inputs[2][SEGMENT_TILE][CHANNELS];       // Δ, and what goes into the states: Δ u, or dy
    float4 states[2][SEGMENT_TILE][4];              // B, or C
    float bias[CHANNELS];
    const T *delta, *input, *z, *coefficients;
};

template <bool ADJOINT> struct SegmentAlone {
    const Args& a;
    SegmentShared<ADJOINT>& s;
    const Strided &input, &coefficients;
    int thread, quad, count, first, tiles;
    bool reverse;

    FN SegmentAlone(const Args& a, SegmentShared<ADJOINT>& s, const Place& place, int segment)
        : a(a), s(s), input(ADJOINT ? a.dout : a.u), coefficients(ADJOINT ? a.C : a.B), reverse(place.reverse) {
        thread = threadIdx.x, quad = thread % (CHANNELS / 4) * 4;
        count = (int)a.width - place.channel - quad;
        first = segment * (int)a.steps;
        tiles = ceil_div((int)smaller(a.steps, a.length - first), SEGMENT_TILE);
    }
    // The first step of a tile. The adjoint walks from the last to the first.
    FN int start(int i) const { return first + (ADJOINT ? tiles - 1 - i : i) * SEGMENT_TILE; }

    FN void load(int i) const {
        if (i < tiles) {
            const int p = i & 1, last = (int)a.length - 1, t = start(i) + thread / (CHANNELS / 4), in = min(t, last);
            fetch(&s.raw[p][0][thread], s.delta + offset(a, reverse, in, a.delta.time) + quad, count, t <= last);
            fetch(&s.raw[p][1][thread], s.input + offset(a, reverse, in, input.time) + quad, count, t <= last);
            if (ADJOINT && a.z.data)
                fetch(&s.raw[p][ADJOINT ? 2 : 0][thread], s.z + offset(a, reverse, in, a.z.time) + quad, count, t <= last);
            if (thread < SEGMENT_TILE * 4)
                fetch_states(a, &s.raw_states[p][thread], s.coefficients, coefficients.time, reverse, start(i) + thread / 4,
                             thread % 4 * 4);
        }
        commit_copies();
    }

    FN void prepare(int i) const {
        const int p = i & 1, r = thread / (CHANNELS / 4);
        float delta[4], x[4], bias[4], z[4];
        unpack(s.raw[p][0][thread], delta), unpack(s.raw[p][1][thread], x), load4(s.bias + quad, bias);
        if (ADJOINT && a.z.data) unpack(s.raw[p][ADJOINT ? 2 : 0][thread], z);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float slope;
            delta[j] = start(i) + r < a.length ? step_size(a, delta[j] + bias[j], slope) : 0.f;
            if (!ADJOINT) x[j] *= delta[j];
            else if (a.z.data) x[j] *= silu(z[j]);
        }
        *(float4*)&s.inputs[p][r][quad] = make_float4(delta[0], x[0], delta[1], x[1]);
        *(float4*)&s.inputs[p][r][quad + 2] = make_float4(delta[2], x[2], delta[3], x[3]);
        if (thread < SEGMENT_TILE * 4) {
            float states[4];
            unpack(s.raw_states[p][thread], states);
            s.states[p][thread / 4][thread % 4] = pack4(states);
        }
    }
};

template <bool ADJOINT> FN void scan_segment_alone(const Args& a, SegmentShared<ADJOINT>& s) {
    const Place place(a);
    const int segment = blockIdx.y + ADJOINT, sub = threadIdx.x % LANES, channel = threadIdx.x / LANES;
    const SegmentAlone<ADJOINT> work(a, s, place, segment);
    float rates[4], h[4] = {}, sum = 0.f;
    load_rates(a, place.channel + channel, sub * 4, rates);
    if (threadIdx.x == 0) {
        s.delta = place.start(a, a.delta, place.channel);
        s.input = place.start(a, work.input, place.channel);
        s.z = place.start(a, a.z, place.channel);
        s.coefficients = place.start(a, work.coefficients, 0);
    }
    stage(s.bias, a.bias, a.bias_dtype, a, place.channel);
    __syncthreads();
    work.load(0), work.load(1);
    wait_for_copies<1>();
    work.prepare(0);
    __syncthreads();
    for (int i = 0; i < work.tiles; ++i) {
        // The next tile's copies lie in slots of their own until they are prepared; only then the next but one's may come.
        wait_for_copies<0>();
        if (i + 1 < work.tiles) work.prepare(i + 1);
        work.load(i + 2);
#pragma unroll 8
        for (int k = 0; k < SEGMENT_TILE; ++k) {
            const int r = ADJOINT ? SEGMENT_TILE - 1 - k : k;
            const float2 in = s.inputs[i & 1][r][channel];
            float w[4];
            unpack(s.states[i & 1][r][sub], w);
            sum += in.x;
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const float decay = exp2_fast(in.x * rates[n]);
                h[n] = ADJOINT ? fmaf(in.y, w[n], h[n]) * decay : fmaf(h[n], decay, in.y * w[n]);
            }
        }
        __syncthreads();
    }
    const i64 slot = segment_slot(segment, channel);
    store4(a.ends + slot * STATES + sub * 4, h);
    if (sub == 0) a.sums[slot] = sum;
}
