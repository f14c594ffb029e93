// Layer norm and RMS norm over rows of one floating-point type, with an output of another. Called from norm.py.

#include "vec.h"

using namespace etmamba;

namespace {

constexpr int64_t ROWS = 32;  // in a task

struct Args {  // must match norm.py
    int64_t rows, width, threads;
    double eps;
    void *x, *weight, *bias, *out;  // [rows, D]; [D] in the type of sums; [D] or null, which makes it an RMS norm; [rows, D]
    void *mean, *scale;             // [rows] in the type of sums; scale is 1 / deviation
};

template <typename S> inline S sum_of(Vec<S> v) {
    S parts[Lanes<S>::W];
    std::memcpy(parts, &v, sizeof(v));
#pragma GCC unroll 4
    for (int half = Lanes<S>::W / 2; half; half /= 2)
#pragma GCC unroll 8
        for (int w = 0; w < half; ++w) parts[w] += parts[w + half];
    return parts[0];
}

// The sum of f(row's elements, W at a time) over the whole vectors of a row. Four sums, so that additions don't wait for
// each other.
template <typename X, typename S, typename F> inline S sum_over(const X* x, int64_t whole, F f) {
    constexpr int W = Lanes<S>::W;
    Vec<S> sum[4] = {};
    int64_t d = 0;
    for (; d + 4 * W <= whole; d += 4 * W)
        for (int k = 0; k < 4; ++k) sum[k] += f(load_row<X, S>(x + d + k * W));
    for (; d < whole; d += W) sum[0] += f(load_row<X, S>(x + d));
    return sum_of<S>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// X: the input's type, T: the output's, S: the type of sums.
template <typename X, typename T, typename S> void run(const Args& a) {
    constexpr int W = Lanes<S>::W;
    const int64_t D = a.width, whole = D / W * W;
    run_tasks((a.rows + ROWS - 1) / ROWS, a.threads, [&](int64_t task) {
        for (int64_t row = task * ROWS; row < std::min((task + 1) * ROWS, a.rows); ++row) {
            const X* x = (const X*)a.x + row * D;
            T* out = (T*)a.out + row * D;
            const int64_t ahead = std::min<int64_t>(4, a.rows - 1 - row) * D;
            for (int64_t d = 0; d < D; d += 64 / sizeof(X)) __builtin_prefetch(x + ahead + d, 0, 2);
            for (int64_t d = 0; d < D; d += 64 / sizeof(T)) __builtin_prefetch(out + ahead + d, 1, 2);
            S mean = 0;
            if (a.bias) {
                mean = sum_over<X, S>(x, whole, [](Vec<S> v) { return v; });
                for (int64_t d = whole; d < D; ++d) mean += (S)to_float(x[d]);
                mean /= (S)D;
            }
            S squares = sum_over<X, S>(x, whole, [=](Vec<S> v) { return (v - mean) * (v - mean); });
            for (int64_t d = whole; d < D; ++d) {
                const S centred = (S)to_float(x[d]) - mean;
                squares += centred * centred;
            }
            const S scale = 1 / std::sqrt(squares / (S)D + (S)a.eps);
            const S* weight = (S*)a.weight;
            const S* bias = (S*)a.bias;
            for (int64_t d = 0; d < whole; d += W) {
                Vec<S> y = (load_row<X, S>(x + d) - mean) * scale * load_row<S, S>(weight + d);
                if (bias) y += load_row<S, S>(bias + d);
                store_row<T, S>(out + d, y);
            }
            if (whole < D) {
                const int64_t d = whole;
                const int count = (int)(D - d);
                Vec<S> y = (load<X, S>(x + d, 1, count) - mean) * scale * load<S, S>(weight + d, 1, count);
                if (bias) y += load<S, S>(bias + d, 1, count);
                store<T, S>(out + d, 1, count, y);
            }
            ((S*)a.mean)[row] = mean, ((S*)a.scale)[row] = scale;
        }
    });
}

}  // namespace

// Returns whether the dtypes are known.
extern "C" bool etmamba_norm(const Args* a, int x_dtype, int out_dtype) {
    return with_dtype(x_dtype, [&](auto x, auto s) {
        with_dtype(out_dtype, [&](auto t, auto) {
            if constexpr (std::is_same_v<decltype(s), double> == std::is_same_v<decltype(t), double>)
                run<decltype(x), decltype(t), decltype(s)>(*a);
        });
    });
}
