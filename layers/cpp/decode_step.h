// What all layers of a step use: the buffers that the threads share, and a thread's work on products and norms.
//
// Letters: n new tokens, r one of them, T the model's dtype, real that of the arithmetic (float or double).
#pragma once
#include <algorithm>
#include <vector>

#include "decode_products.h"
#include "threads.h"

namespace {

constexpr int64_t KEYS = 512;  // positions of a context that one item of attention reads
// Of weights that one item of a product reads, at most: with less, threads disturb each other's reading ahead.
constexpr int64_t BYTES = 1 << 18;
constexpr int64_t SPAN = 64;  // rows of a matrix whose products are made before they are used

template <class real>
using Numbers = std::vector<real>;

struct Block {  // what one item of attention reads, for each key head: KEYS positions of a row, or fewer
    int64_t row, first;
    int64_t at;  // the tokens of all blocks before
};

// Shared by all threads: some rows of a call on their way through all layers.
template <class T>
struct Step {
    typedef Real<T> real;
    const Sizes& s;
    const Call& call;
    const Row* rows;
    const int64_t row_count, first, n, threads;  // `first`: its first token in the call
    std::vector<int64_t> row_of;       // (n,) the row of each token
    std::vector<Block> blocks;         // row by row
    std::vector<int64_t> block_begin;  // of each row, and the end
    std::vector<Phase> phases;
    Numbers<real> x;                                // (n, width) the residual stream
    Numbers<real> qkv, z, beta_logit, decay_logit;  // Gated DeltaNet, a row a token
    Numbers<real> q, k, v, gate, partial;           // softmax attention
    Numbers<real> mixed;                            // what the mixer's output projection reads
    Numbers<real> router_logits, hidden, shared_hidden, shared_weight;  // feed-forward

    Step(const Sizes& sizes, const Call& whole, int64_t begin, int64_t end, int64_t thread_count)
        : s(sizes), call(whole), rows(whole.rows + begin), row_count(end - begin), first(rows->first),
          n(rows[row_count - 1].first + rows[row_count - 1].count - first), threads(thread_count),
          phases(s.layers * 8 + 3), x(n * s.width) {
        for (int64_t i = 0; i < row_count; i++) row_of.insert(row_of.end(), rows[i].count, i);
        const int64_t tokens = divide(), keys = s.key_heads * s.key_dim, values = s.value_heads * s.value_dim;
        const int64_t query = s.heads * s.head_dim;
        qkv.resize(n * (2 * keys + values)), z.resize(n * values);
        beta_logit.resize(n * s.value_heads), decay_logit.resize(n * s.value_heads);
        q.resize(n * query), gate.resize(n * query), mixed.resize(n * std::max(values, query));
        k.resize(n * s.kv_heads * s.head_dim), v.resize(n * s.kv_heads * s.head_dim);
        partial.resize(tokens * s.heads * (s.head_dim + 2));
        router_logits.resize(n * s.experts), shared_weight.resize(n);
        hidden.resize(n * s.top_k * s.inner);
        shared_hidden.resize(n * std::max(s.shared_intermediate_size, s.dense_inner));
    }

    // Divide the rows' contexts into blocks. Returns the tokens of all blocks.
    int64_t divide() {
        int64_t tokens = 0;
        for (int64_t i = 0; i < row_count; i++) {
            block_begin.push_back(int64_t(blocks.size()));
            for (int64_t place = 0; place < rows[i].past + rows[i].count; place += KEYS, tokens += rows[i].count)
                blocks.push_back({i, place, tokens});
        }
        block_begin.push_back(int64_t(blocks.size()));
        return tokens;
    }

    const Row& row(int64_t r) const { return rows[row_of[r]]; }
    int64_t place(int64_t r) const { return first + r - row(r).first; }           // among its row's new tokens
    int64_t logged(int64_t r) const { return row(r).index * row(r).count + place(r); }  // in its cache's update log

    // To the model's dtype and back, where torch would store a tensor.
    static real rounded(real v) {
        if constexpr (std::is_same_v<T, bf16>) return ::rounded<bf16>(v);
        else return v;
    }

    void add_to_stream(int64_t r, int64_t column, int64_t count, const real* values) {
        real* to = &x[r * s.width + column];
        for (int64_t i = 0; i < count; i++) to[i] = rounded(to[i] + values[i]);
    }
};

// Several rows of a matrix. Where it has a partner, `up`, a row's value is silu(its product) * the partner's.
struct Linear {
    Mat w, bias;
    int64_t rows;
    Mat up = {};
};

// One thread of a step. All threads call the same phases in the same order.
template <class T>
struct Worker {
    typedef Real<T> real;
    Step<T>& step;
    const Sizes& s;
    int64_t phase = 0;
    Numbers<real> normed;   // (n, width) the normed stream: cheaper made by each thread than waited for
    Numbers<real> weights;  // of a norm
    Numbers<real> scratch;  // of one item
    Numbers<real> window;   // of the convolution in it
    Numbers<real> out, up;  // (vectors, SPAN) products
    Operands<T> stream;     // the normed stream
    Operands<T> operands, others;  // what other products read

    explicit Worker(Step<T>& shared) : step(shared), s(shared.s) {}

    static real rounded(real v) { return Step<T>::rounded(v); }

    template <class Item>
    void for_each(int64_t items, Item&& item) {
        step.phases[phase++].run(items, item);
    }

    // The same where an item is very little work: several at a time.
    template <class Item>
    void for_each_small(int64_t items, Item&& item) {
        const int64_t size = std::max<int64_t>(1, items / (8 * step.threads));
        for_each((items + size - 1) / size, [&](int64_t run) {
            for (int64_t i = run * size; i < std::min(items, run * size + size); i++) item(i);
        });
    }

    // Rows that one item takes of `rows` in all: so that each thread gets four items, but for small matrices.
    int64_t share_of(Mat w, int64_t rows, int64_t columns) const {
        const int64_t half = w.dtype == I4 ? 1 : w.dtype == I8 ? 2 : w.dtype == BF16 ? 4 : w.dtype == F64 ? 16 : 8;
        const int64_t bytes = columns * half / 2;
        const int64_t wanted = rows * bytes / (4 * step.threads);
        return std::max<int64_t>(1, std::clamp<int64_t>(wanted, 1 << 13, BYTES) / std::max<int64_t>(1, bytes));
    }

    // Rows of several matrices times all of x: use(matrix, vector, row, count, values) for `count` rows from `row` on,
    // biases added. A matrix of another dtype than the model's (a router in fp32) gives values that are not rounded.
    template <int count, class Use>
    void products(const Linear (&w)[count], int64_t columns, const Vectors<T>& x, Use&& use) {
        int64_t begin[count + 1] = {0}, size[count];
        for (int m = 0; m < count; m++) {
            size[m] = share_of(w[m].w, w[m].rows, columns * (w[m].up.p ? 2 : 1));
            begin[m + 1] = begin[m] + (w[m].rows + size[m] - 1) / size[m];
        }
        for_each(begin[count], [&](int64_t item) {
            int m = 0;
            while (item >= begin[m + 1]) m++;
            const int64_t first = (item - begin[m]) * size[m], last = std::min(first + size[m], w[m].rows);
            auto part = [&](int64_t v, int64_t row, int64_t n, real* values) { use(m, v, row, n, values); };
            if (w[m].up.p) swiglu(w[m].w, 0, w[m].up, 0, first, last, columns, x, part);
            else product(w[m], first, last, columns, x, part);
        });
    }

    // Rows `first` up to `last` of one matrix.
    template <class Use>
    void product(const Linear& w, int64_t first, int64_t last, int64_t columns, const Vectors<T>& x, Use&& use) {
        out.resize(SPAN * x.count);
        for (int64_t row = first; row < last; row += SPAN) {
            const int64_t n = std::min(SPAN, last - row);
            multiply_rows<T>(w.w, row, row + n, columns, x, out.data(), SPAN);
            for (int64_t v = 0; v < x.count; v++) {
                real* values = &out[v * SPAN];
                for (int64_t i = 0; i < n && w.bias.p; i++) values[i] += load<real>(w.bias, row + i);
                if (w.w.dtype == s.dtype || w.w.group)
                    for (int64_t i = 0; i < n; i++) values[i] = rounded(values[i]);
                use(v, row, n, values);
            }
        }
    }

    // silu(gate) * up for rows `first` up to `last` of each, which begin at row `gate_base` and `up_base`.
    template <class Use>
    void swiglu(Mat gate, int64_t gate_base, Mat above, int64_t up_base, int64_t first, int64_t last, int64_t columns,
                const Vectors<T>& x, Use&& use) {
        out.resize(SPAN * x.count), up.resize(SPAN * x.count);
        for (int64_t row = first; row < last; row += SPAN) {
            const int64_t n = std::min(SPAN, last - row);
            multiply_rows<T>(gate, gate_base + row, gate_base + row + n, columns, x, out.data(), SPAN);
            multiply_rows<T>(above, up_base + row, up_base + row + n, columns, x, up.data(), SPAN);
            for (int64_t v = 0; v < x.count; v++) {
                real *values = &out[v * SPAN], *factors = &up[v * SPAN];
                for (int64_t i = 0; i < n; i++)
                    values[i] = rounded(rounded(silu_of(rounded(values[i]))) * rounded(factors[i]));
                use(v, row, n, values);
            }
        }
    }

    // RMSNorm of `count` vectors, in the order of layers/norm.py.
    void rms_norm(const real* in, real* to, int64_t count, int64_t size, Mat w) {
        weights.resize(size);
        load_all(w.p, w.dtype, 0, size, weights.data());
        for (int64_t v = 0; v < count; v++, in += size, to += size) {
            const real scale = 1 / std::sqrt(sum_of_squares(in, size) / size + real(s.eps));
            if (s.zero_centred)
                for (int64_t i = 0; i < size; i++) to[i] = rounded(in[i] * scale * (1 + weights[i]));
            else
                for (int64_t i = 0; i < size; i++) to[i] = rounded(weights[i] * rounded(in[i] * scale));
        }
    }
    // Orders: those of the matrices that multiply it.
    void norm_stream(Mat w, int orders) {
        normed.resize(step.n * s.width);
        rms_norm(step.x.data(), normed.data(), step.n, s.width, w);
        stream.read(normed.data(), step.n, s.width, orders);
    }
};

}  // namespace
