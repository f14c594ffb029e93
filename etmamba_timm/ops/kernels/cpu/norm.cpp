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
    S sum = 0;
    for (int w = 0; w < Lanes<S>::W; ++w) sum += v[w];
    return sum;
}

// X: the input's type, T: the output's, S: the type of sums.
template <typename X, typename T, typename S> void run(const Args& a) {
    constexpr int W = Lanes<S>::W;
    const int64_t D = a.width, whole = D / W * W;
    run_tasks((a.rows + ROWS - 1) / ROWS, a.threads, [&](int64_t task) {
        for (int64_t row = task * ROWS; row < std::min((task + 1) * ROWS, a.rows); ++row) {
            const X* x = (const X*)a.x + row * D;
            S mean = 0;
            if (a.bias) {
                Vec<S> sum = {};
                for (int64_t d = 0; d < whole; d += W) sum += load_row<X, S>(x + d);
                mean = sum_of<S>(sum);
                for (int64_t d = whole; d < D; ++d) mean += (S)to_float(x[d]);
                mean /= (S)D;
            }
            Vec<S> sum = {};
            for (int64_t d = 0; d < whole; d += W) {
                const Vec<S> centred = load_row<X, S>(x + d) - mean;
                sum += centred * centred;
            }
            S squares = sum_of<S>(sum);
            for (int64_t d = whole; d < D; ++d) {
                const S centred = (S)to_float(x[d]) - mean;
                squares += centred * centred;
            }
            const S scale = 1 / std::sqrt(squares / (S)D + (S)a.eps);
            T* out = (T*)a.out + row * D;
            for (int64_t d = 0; d < D; d += W) {
                const int count = (int)std::min<int64_t>(W, D - d);
                Vec<S> y = (load<X, S>(x + d, 1, count) - mean) * scale * load<S, S>((S*)a.weight + d, 1, count);
                if (a.bias) y += load<S, S>((S*)a.bias + d, 1, count);
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
