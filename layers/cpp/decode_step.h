// What all layers of a step use: the buffers that the threads share, and a thread's work on products and norms.
//
// Letters: n = b * t new tokens, row r = i * t + j of sequence i; real = the arithmetic, float or double.
#pragma once
#include <algorithm>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace {

constexpr int64_t KEYS = 512;  // positions of a context that one item of attention reads
// Of weights that one item of a product reads, at most: with less, threads disturb each other's reading ahead.
constexpr int64_t BYTES = 1 << 18;

template <class real>
using Numbers = std::vector<real>;

// Shared by all threads.
template <class real>
struct Step {
    const Sizes& s;
    const int64_t* past;              // tokens before, of each sequence
    const void *const *cos, *const *sin;  // of each token's position: (rotary,) in the model's dtype
    const int64_t n, threads, longest;    // `longest`: tokens of the longest context, the new ones included
    std::vector<Phase> phases;
    Numbers<real> x;                                       // (n, width) the residual stream
    Numbers<real> qkv, z, beta_logit, decay_logit;         // Gated DeltaNet, a row a token
    Numbers<real> q, k, v, gate, partial;                  // softmax attention
    Numbers<real> mixed;                                   // what the mixer's output projection reads
    Numbers<real> router_logits, hidden, shared_weight;    // feed-forward

    Step(const Sizes& sizes, const int64_t* before, const void* const* cosines, const void* const* sines,
         int64_t thread_count)
        : s(sizes), past(before), cos(cosines), sin(sines), n(s.b * s.t), threads(thread_count),
          longest(longest_context()), phases(s.layers * 8 + 1), x(n * s.width) {
        const int64_t keys = s.key_heads * s.key_dim, values = s.value_heads * s.value_dim;
        const int64_t query = s.heads * s.head_dim;
        qkv.resize(n * (2 * keys + values)), z.resize(n * values);
        beta_logit.resize(n * s.value_heads), decay_logit.resize(n * s.value_heads);
        q.resize(n * query), gate.resize(n * query), mixed.resize(n * std::max(values, query));
        k.resize(n * s.kv_heads * s.head_dim), v.resize(n * s.kv_heads * s.head_dim);
        partial.resize(n * s.heads * pieces() * (s.head_dim + 2));
        router_logits.resize(n * s.experts), shared_weight.resize(n);
        hidden.resize(n * (s.top_k * s.inner + std::max(s.shared_intermediate_size, s.dense_inner)));
    }

    int64_t longest_context() const {
        int64_t longest = 0;
        for (int64_t i = 0; i < s.b; i++) longest = std::max(longest, past[i] + s.t);
        return longest;
    }
    int64_t pieces() const { return (longest + KEYS - 1) / KEYS; }  // of the longest context

    // To the model's dtype and back, where torch would store a tensor.
    real rounded(real v) const { return s.dtype == BF16 ? real(::rounded<bf16>(float(v))) : v; }

    void add_to_stream(int64_t r, int64_t column, real v) {
        real& to = x[r * s.width + column];
        to = rounded(to + v);
    }
};

// Several rows of a matrix. Where it has a partner, `up`, a row's value is silu(its product) * the partner's.
struct Linear {
    Mat w, bias;
    int64_t rows;
    Mat up = {};
};

// One thread of a step. All threads call the same phases in the same order.
template <class real>
struct Worker {
    Step<real>& step;
    const Sizes& s;
    int64_t phase = 0;
    Numbers<real> normed;   // (n, width) the normed stream: cheaper made by each thread than waited for
    Numbers<real> scratch;  // of one item
    Numbers<real> window;   // of the convolution in it

    explicit Worker(Step<real>& shared) : step(shared), s(shared.s) {}

    real rounded(real v) const { return step.rounded(v); }

    template <class Item>
    void for_each(int64_t items, Item&& item) {
        step.phases[phase++].run(items, item);
    }

    // Rows that one item takes of `rows` in all: so that each thread gets four items, but for small matrices.
    int64_t share_of(Mat w, int64_t rows, int64_t columns) const {
        const int64_t bytes = columns * (w.dtype == BF16 ? 2 : w.dtype == F64 ? 8 : 4);
        const int64_t wanted = rows * bytes / (4 * step.threads);
        return std::max<int64_t>(1, std::clamp<int64_t>(wanted, 1 << 13, BYTES) / bytes);
    }

    // Rows of several matrices times `vectors` rows of `in`: give(matrix, row, vector, value), biases added. A matrix
    // of another dtype than the model's (a router in fp32) gives values that are not rounded.
    template <int count, class Give>
    void products(const Linear (&w)[count], int64_t columns, const Numbers<real>& in, int64_t vectors, Give&& give) {
        int64_t begin[count + 1] = {0}, size[count];
        for (int m = 0; m < count; m++) {
            size[m] = share_of(w[m].w, w[m].rows, columns * (w[m].up.p ? 2 : 1));
            begin[m + 1] = begin[m] + (w[m].rows + size[m] - 1) / size[m];
        }
        for_each(begin[count], [&](int64_t item) {
            int m = 0;
            while (item >= begin[m + 1]) m++;
            const int64_t first = (item - begin[m]) * size[m], last = std::min(first + size[m], w[m].rows);
            for (int64_t r = 0; r < vectors; r++)
                product(w[m], first, last, columns, &in[r * columns], [&](int64_t row, real v) { give(m, row, r, v); });
        });
    }

    // Rows `first` up to `last` of one matrix times one vector.
    template <class Give>
    void product(const Linear& w, int64_t first, int64_t last, int64_t columns, const real* in, Give&& give) const {
        if (w.up.p) {
            swiglu(w.w, first, w.up, first, last - first, columns, in, [&](int64_t i, real v) { give(first + i, v); });
            return;
        }
        rows(w.w, first, last, columns, in, [&](int64_t row, real v) {
            real sum = v + (w.bias.p ? load<real>(w.bias, row) : 0);
            give(row, w.w.dtype == s.dtype ? rounded(sum) : sum);
        });
    }

    // silu(gate) * up for `count` rows of each.
    template <class Give>
    void swiglu(Mat gate, int64_t gate_first, Mat up, int64_t up_first, int64_t count, int64_t columns, const real* in,
                Give&& give) const {
        real g[64];
        for (int64_t begin = 0; begin < count; begin += 64) {
            const int64_t size = std::min<int64_t>(64, count - begin);
            const int64_t from = gate_first + begin, up_from = up_first + begin;
            rows(gate, from, from + size, columns, in, [&](int64_t row, real v) {
                g[row - from] = rounded(exact_silu(rounded(v)));
            });
            rows(up, up_from, up_from + size, columns, in, [&](int64_t row, real v) {
                give(begin + row - up_from, rounded(g[row - up_from] * rounded(v)));
            });
        }
    }

    // Rows `first` up to `last` of a matrix times one vector, neither rounded nor with a bias.
    template <class Give>
    static void rows(Mat w, int64_t first, int64_t last, int64_t columns, const real* in, Give&& give) {
        switch (w.dtype) {
            case F32: return rows_of((const float*)w.p, first, last, columns, in, give);
            case BF16: return rows_of((const bf16*)w.p, first, last, columns, in, give);
            default: return rows_of((const double*)w.p, first, last, columns, in, give);
        }
    }
    template <class W, class Give>
    static void rows_of(const W* w, int64_t first, int64_t last, int64_t columns, const real* in, Give&& give) {
        for (int64_t row = first; row < last; row++) give(row, dot(w + row * columns, in, columns));
    }

    // RMSNorm of one vector, in the order of layers/norm.py.
    void rms_norm(const real* in, real* out, int64_t size, Mat w) const {
        real sum = 0;
        for (int64_t i = 0; i < size; i++) sum += in[i] * in[i];
        const real scale = 1 / std::sqrt(sum / size + real(s.eps));
        for (int64_t i = 0; i < size; i++) {
            const real weight = load<real>(w, i);
            out[i] = s.zero_centred ? rounded(in[i] * scale * (1 + weight)) : rounded(weight * rounded(in[i] * scale));
        }
    }
    void norm_stream(Mat w) {
        normed.resize(step.n * s.width);
        for (int64_t r = 0; r < step.n; r++) rms_norm(&step.x[r * s.width], &normed[r * s.width], s.width, w);
    }
};

}  // namespace
