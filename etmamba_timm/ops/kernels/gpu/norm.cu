// Layer norm and RMS norm over rows of any floating-point type, with an output of another, on a GPU, forward and backward.
// Called from norm.py.
//
// A warp takes a row at a time. Rows are short: after the first of several passes they are in the nearest cache.

#include "kernel.h"

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int COLUMNS = 64, STRIDE = THREADS / COLUMNS;  // row_norm_parameters: columns of a block, threads of a column

struct Args {  // must match norm.py
    i64 rows, width, row_blocks;  // row_blocks: blocks that share a column's sums (row_norm_parameters)
    i64 x_dtype, weight_dtype, bias_dtype;
    float eps;
    void *x, *weight, *bias;  // [rows, D], [D], [D] or null, which makes it an RMS norm
    T *out, *dout;            // [rows, D]
    float *mean, *scale;      // [rows]; the mean is 0 for an RMS norm; scale is 1 / deviation
    void* dx;                 // as x
    float* dparameters;       // [2, D], for weight and bias; added to
};

CONFIG(row_norm, THREADS, 0, WARPS)
CONFIG(row_norm_backward, THREADS, 0, WARPS)
CONFIG(row_norm_parameters, THREADS, sizeof(float) * 2 * THREADS, COLUMNS)

constexpr int STEP = ALIGNED ? 4 : 1;  // elements that a lane takes at once

// STEP elements of an array of either type.
FN void load(const void* x, i64 at, i64 dtype, float* values) {
#if ALIGNED
    if (dtype == 0) {
        const float4 v = *(const float4*)((const float*)x + at);
        values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
        return;
    }
    const uint2 v = *(const uint2*)((const unsigned short*)x + at);
    const unsigned bits[2] = {v.x, v.y};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const unsigned short half = (unsigned short)(bits[j / 2] >> (j % 2 * 16));
        values[j] = dtype == 1 ? bfloat_to_float(half) : half_to_float(half);
    }
#else
    values[0] = element(x, at, (int)dtype);
#endif
}

FN void store(T* to, const float* values) {
#if ALIGNED
    *(Quad*)to = pack(values);
#else
    *to = from_float(values[0]);
#endif
}

FN void store_float(float* to, const float* values) {
#if ALIGNED
    *(float4*)to = make_float4(values[0], values[1], values[2], values[3]);
#else
    *to = values[0];
#endif
}

FN float warp_sum(float x) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

KERNEL(row_norm, THREADS, 4) {
    const i64 row = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= a.rows) return;  // a whole warp
    const int first = threadIdx.x % 32 * STEP, width = (int)a.width;
    const i64 start = row * width;
    float mean = 0.f, squares = 0.f, x[STEP], weight[STEP], bias[STEP];
    if (a.bias) {
#pragma unroll 4
        for (int i = first; i < width; i += 32 * STEP) {
            load(a.x, start + i, a.x_dtype, x);
            for (int j = 0; j < STEP; ++j) mean += x[j];
        }
        mean = warp_sum(mean) / (float)width;
    }
#pragma unroll 4
    for (int i = first; i < width; i += 32 * STEP) {
        load(a.x, start + i, a.x_dtype, x);
        for (int j = 0; j < STEP; ++j) squares += (x[j] - mean) * (x[j] - mean);
    }
    const float scale = rsqrtf(warp_sum(squares) / (float)width + a.eps);
#pragma unroll 4
    for (int i = first; i < width; i += 32 * STEP) {
        load(a.x, start + i, a.x_dtype, x);
        load(a.weight, i, a.weight_dtype, weight);
        if (a.bias) load(a.bias, i, a.bias_dtype, bias);
        for (int j = 0; j < STEP; ++j) x[j] = fmaf((x[j] - mean) * scale, weight[j], a.bias ? bias[j] : 0.f);
        store(a.out + start + i, x);
    }
    if (threadIdx.x % 32 == 0) a.mean[row] = mean, a.scale[row] = scale;
}

// dx = scale · (dy·w - mean(dy·w) - x̂ · mean(dy·w·x̂)) for x̂ = (x - mean) · scale; without the first mean for an RMS norm.
KERNEL(row_norm_backward, THREADS, 4) {
    const i64 row = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= a.rows) return;  // a whole warp
    const int first = threadIdx.x % 32 * STEP, width = (int)a.width;
    const i64 start = row * width;
    const float mean = a.mean[row], scale = a.scale[row];
    float plain = 0.f, along = 0.f, x[STEP], dy[STEP], weight[STEP];
#pragma unroll 4
    for (int i = first; i < width; i += 32 * STEP) {
        load(a.x, start + i, a.x_dtype, x);
        load(a.dout, start + i, DTYPE, dy);
        load(a.weight, i, a.weight_dtype, weight);
        for (int j = 0; j < STEP; ++j) {
            plain += dy[j] * weight[j];
            along += dy[j] * weight[j] * (x[j] - mean) * scale;
        }
    }
    plain = a.bias ? warp_sum(plain) / (float)width : 0.f;
    along = warp_sum(along) / (float)width;
#pragma unroll 4
    for (int i = first; i < width; i += 32 * STEP) {
        load(a.x, start + i, a.x_dtype, x);
        load(a.dout, start + i, DTYPE, dy);
        load(a.weight, i, a.weight_dtype, weight);
        for (int j = 0; j < STEP; ++j) x[j] = scale * (dy[j] * weight[j] - plain - (x[j] - mean) * scale * along);
        if (a.x_dtype == 0) store_float((float*)a.dx + start + i, x);
        else store((T*)a.dx + start + i, x);  // x is of T as well
    }
}

struct Sums {
    float weight[STRIDE][COLUMNS], bias[STRIDE][COLUMNS];
};

// A thread takes one column of every STRIDE-th of its block's rows.
KERNEL(row_norm_parameters, THREADS, 4) {
    SHARED(Sums, sums);
    const int column = threadIdx.x % COLUMNS, lane = threadIdx.x / COLUMNS;
    const i64 at = (i64)blockIdx.x * COLUMNS + column;
    float weight = 0.f, bias = 0.f;
    if (at < a.width) {
#pragma unroll 4
        for (i64 row = (i64)blockIdx.y * STRIDE + lane; row < a.rows; row += a.row_blocks * STRIDE) {
            const float dy = to_float(a.dout[row * a.width + at]);
            weight += dy * (element(a.x, row * a.width + at, (int)a.x_dtype) - a.mean[row]) * a.scale[row];
            bias += dy;
        }
    }
    sums.weight[lane][column] = weight, sums.bias[lane][column] = bias;
    __syncthreads();
    if (lane == 0 && at < a.width) {
        for (int i = 1; i < STRIDE; ++i) weight += sums.weight[i][column], bias += sums.bias[i][column];
        add_to(a.dparameters + at, weight);
        add_to(a.dparameters + a.width + at, bias);
    }
}
