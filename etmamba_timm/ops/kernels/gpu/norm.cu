// Layer norm and RMS norm over rows of any floating-point type, with an output of another, on a GPU, forward and backward.
// Called from norm.py.
//
// A warp takes a row at a time, and keeps it in registers: every element is read once. Blocks are as many as run at once,
// so the parameters are read, and their gradients added up, once for many rows.
//
// PER_LANE: how many times STEP elements of a row each lane has. X_FLOAT: whether x is float32, not T.

#include "kernel.h"

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int STEP = ALIGNED ? 4 : 1, ACROSS = 32 * STEP;  // elements of a lane, and of a warp, at once
constexpr int ELEMENTS = PER_LANE * STEP;                   // of a lane
constexpr int BLOCKS = ELEMENTS <= (ALIGNED ? 20 : 16) ? 4 : 2;  // on a multiprocessor, so that registers suffice

struct Args {  // must match norm.py
    i64 rows, width, blocks;
    i64 weight_dtype, bias_dtype;
    float eps;
    void *x, *weight, *bias;  // [rows, D], [D], [D] or null, which makes it an RMS norm
    T *out, *dout;            // [rows, D]
    float *mean, *scale;      // [rows]; the mean is 0 for an RMS norm; scale is 1 / deviation
    void* dx;                 // as x
    float* dparameters;       // [2, D], for weight and bias; added to
};

struct Sums {  // of each warp
    float weight[WARPS][PER_LANE * ACROSS], bias[WARPS][PER_LANE * ACROSS];
};

CONFIG(row_norm, THREADS, 0, WARPS, BLOCKS)
CONFIG(row_norm_backward, THREADS, sizeof(Sums), WARPS, BLOCKS)

// STEP elements of an array of T.
FN void load(const T* x, i64 at, float* values) {
#if ALIGNED
    unpack(*(const Quad*)(x + at), values);
#else
    values[0] = to_float(x[at]);
#endif
}
FN void store(T* to, i64 at, const float* values) {
#if ALIGNED
    *(Quad*)(to + at) = pack(values);
#else
    to[at] = from_float(values[0]);
#endif
}

FN void load_x(const void* x, i64 at, float* values) {
#if !X_FLOAT
    load((const T*)x, at, values);
#elif ALIGNED
    const float4 v = *(const float4*)((const float*)x + at);
    values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
#else
    values[0] = ((const float*)x)[at];
#endif
}
FN void store_dx(void* to, i64 at, const float* values) {
#if !X_FLOAT
    store((T*)to, at, values);
#elif ALIGNED
    *(float4*)((float*)to + at) = make_float4(values[0], values[1], values[2], values[3]);
#else
    ((float*)to)[at] = values[0];
#endif
}

// A lane's elements of a parameter; those beyond the last are 0.
FN void load_parameter(const void* parameter, i64 dtype, int first, int width, float (*values)[STEP]) {
#pragma unroll
    for (int k = 0; k < PER_LANE; ++k)
#pragma unroll
        for (int j = 0; j < STEP; ++j) {
            const int i = first + k * ACROSS + j;
            values[k][j] = parameter && i < width ? element(parameter, i, (int)dtype) : 0.f;
        }
}

FN float warp_sum(float x) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

// The next statement, for each of a lane's groups of elements that a row has.
#define FOR_ELEMENTS(k)                     \
    _Pragma("unroll")                       \
    for (int k = 0; k < PER_LANE; ++k)      \
        if (first + k * ACROSS < width)

KERNEL(row_norm, THREADS, BLOCKS) {
    const int first = threadIdx.x % 32 * STEP, width = (int)a.width;
    float weight[PER_LANE][STEP], bias[PER_LANE][STEP];
    load_parameter(a.weight, a.weight_dtype, first, width, weight);
    load_parameter(a.bias, a.bias_dtype, first, width, bias);
    for (i64 row = (i64)blockIdx.x * WARPS + threadIdx.x / 32; row < a.rows; row += a.blocks * WARPS) {
        const i64 start = row * width + first;
        float x[PER_LANE][STEP], mean = 0.f, squares = 0.f;
        FOR_ELEMENTS(k) load_x(a.x, start + k * ACROSS, x[k]);
        if (a.bias) {
            FOR_ELEMENTS(k)
                for (int j = 0; j < STEP; ++j) mean += x[k][j];
            mean = warp_sum(mean) / (float)width;
        }
        FOR_ELEMENTS(k)
            for (int j = 0; j < STEP; ++j) squares += (x[k][j] - mean) * (x[k][j] - mean);
        const float scale = rsqrtf(warp_sum(squares) / (float)width + a.eps);
        FOR_ELEMENTS(k) {
            for (int j = 0; j < STEP; ++j) x[k][j] = fmaf((x[k][j] - mean) * scale, weight[k][j], bias[k][j]);
            store(a.out, start + k * ACROSS, x[k]);
        }
        if (first == 0) a.mean[row] = mean, a.scale[row] = scale;
    }
}

// dx = scale · (dy·w - mean(dy·w) - x̂ · mean(dy·w·x̂)) for x̂ = (x - mean) · scale; without the first mean for an RMS norm.
KERNEL(row_norm_backward, THREADS, BLOCKS) {
    SHARED(Sums, sums);
    const int first = threadIdx.x % 32 * STEP, width = (int)a.width;
    float weight[PER_LANE][STEP], dweight[PER_LANE][STEP], dbias[PER_LANE][STEP];
    load_parameter(a.weight, a.weight_dtype, first, width, weight);
#pragma unroll
    for (int k = 0; k < PER_LANE; ++k)
        for (int j = 0; j < STEP; ++j) dweight[k][j] = dbias[k][j] = 0.f;
    for (i64 row = (i64)blockIdx.x * WARPS + threadIdx.x / 32; row < a.rows; row += a.blocks * WARPS) {
        const i64 start = row * width + first;
        const float mean = a.mean[row], scale = a.scale[row];
        float x[PER_LANE][STEP], dy[PER_LANE][STEP], plain = 0.f, along = 0.f;
        FOR_ELEMENTS(k) {
            load_x(a.x, start + k * ACROSS, x[k]);
            load(a.dout, start + k * ACROSS, dy[k]);
        }
        FOR_ELEMENTS(k)
            for (int j = 0; j < STEP; ++j) {
                x[k][j] = (x[k][j] - mean) * scale;
                dweight[k][j] += dy[k][j] * x[k][j], dbias[k][j] += dy[k][j];
                dy[k][j] *= weight[k][j];
                plain += dy[k][j], along += dy[k][j] * x[k][j];
            }
        plain = a.bias ? warp_sum(plain) / (float)width : 0.f;
        along = warp_sum(along) / (float)width;
        FOR_ELEMENTS(k) {
            for (int j = 0; j < STEP; ++j) x[k][j] = scale * (dy[k][j] - plain - x[k][j] * along);
            store_dx(a.dx, start + k * ACROSS, x[k]);
        }
    }
#pragma unroll
    for (int k = 0; k < PER_LANE; ++k)
        for (int j = 0; j < STEP; ++j) {
            sums.weight[threadIdx.x / 32][first + k * ACROSS + j] = dweight[k][j];
            sums.bias[threadIdx.x / 32][first + k * ACROSS + j] = dbias[k][j];
        }
    __syncthreads();
    for (int i = threadIdx.x; i < width; i += THREADS) {
        float of_weight = 0.f, of_bias = 0.f;
        for (int warp = 0; warp < WARPS; ++warp) of_weight += sums.weight[warp][i], of_bias += sums.bias[warp][i];
        add_to(a.dparameters + i, of_weight);
        if (a.bias) add_to(a.dparameters + width + i, of_bias);
    }
}
