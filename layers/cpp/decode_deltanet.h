// A Gated DeltaNet layer of a step: layers/gated_deltanet.py for a few tokens.
#pragma once
#include "decode_step.h"

namespace {

// S decay + key deltaᵀ, rounded twice, here and in `replay`, so that both make the same bits.
template <class real>
real updated(real s, real decay, real key, real delta) {
    return multiply_add_one(key, delta, s * decay);
}
template <class real>
Wide<real> updated_wide(Wide<real> s, real decay, real key, Wide<real> delta) {
    return multiply_add<real>(Wide<real>{} + key, delta, s * decay);
}

// Call `use` with a place and a number of vectors as a constant for `count` columns; returns those that are left.
template <class real, class Use>
int64_t each_columns(int64_t count, Use&& use) {
    constexpr int64_t L = WIDTH<real>;
    int64_t c = 0;
    for (; c + 8 * L <= count; c += 8 * L) use(c, std::integral_constant<int, 8>());
    for (; c + L <= count; c += L) use(c, std::integral_constant<int, 1>());
    return c;
}

// delta = beta (v - (S decay)ᵀ k) for one recurrent state S (dk, dv).
template <class real>
void recall(const real* S, int64_t dk, int64_t dv, real decay, real beta, const real* k, const real* v, real* delta) {
    constexpr int64_t L = WIDTH<real>;
    const int64_t rest = each_columns<real>(dv, [&](int64_t c, auto count) {
        Wide<real> sum[count.value] = {};
        for (int64_t e = 0; e < dk; e++)
            UNROLL for (int i = 0; i < count.value; i++)
                sum[i] = multiply_add<real>(Wide<real>{} + k[e], widen<real>(S + e * dv + c + i * L) * decay, sum[i]);
        memcpy(delta + c, sum, sizeof sum);
    });
    for (int64_t c = rest; c < dv; c++) {
        real sum = 0;
        for (int64_t e = 0; e < dk; e++) sum = multiply_add_one(k[e], S[e * dv + c] * decay, sum);
        delta[c] = sum;
    }
    for (int64_t c = 0; c < dv; c++) delta[c] = beta * (v[c] - delta[c]);
}

// to = S decay + k deltaᵀ, which may be S itself; out = toᵀ q. `past`: `to` is not read again soon.
template <bool past, class real>
void write_and_read(const real* S, real* to, int64_t dk, int64_t dv, real decay, const real* q, const real* k,
                    const real* delta, real* out) {
    constexpr int64_t L = WIDTH<real>;
    const int64_t rest = each_columns<real>(dv, [&](int64_t c, auto count) {
        Wide<real> sum[count.value] = {}, own[count.value];
        memcpy(own, delta + c, sizeof own);
        for (int64_t e = 0; e < dk; e++)
            UNROLL for (int i = 0; i < count.value; i++) {
                const int64_t at = e * dv + c + i * L;
                const Wide<real> s = updated_wide<real>(widen<real>(S + at), decay, k[e], own[i]);
                if constexpr (past) put_past(to + at, s);
                else memcpy(to + at, &s, sizeof s);
                sum[i] = multiply_add<real>(Wide<real>{} + q[e], s, sum[i]);
            }
        memcpy(out + c, sum, sizeof sum);
    });
    for (int64_t c = rest; c < dv; c++) {
        real sum = 0;
        for (int64_t e = 0; e < dk; e++) {
            const int64_t at = e * dv + c;
            to[at] = updated(S[at], decay, k[e], delta[c]);
            sum = multiply_add_one(q[e], to[at], sum);
        }
        out[c] = sum;
    }
    if constexpr (past) finish_puts();
}

template <class real>
void l2_normalise(real* v, int64_t size, real factor) {
    const real scale = 1 / std::sqrt(sum_of_squares(v, size) + real(1e-6));
    for (int64_t i = 0; i < size; i++) v[i] = v[i] * scale * factor;
}

template <class T>
struct DeltaNetStep {
    typedef Real<T> real;
    Worker<T>& worker;
    Step<T>& step;
    const Sizes& s;
    const DeltaNet& w;
    const RecurrentState* states;                // one a cache
    const int64_t keys, values, channels, share;  // `share`: value heads that read one key head

    DeltaNetStep(Worker<T>& thread, const Layer& layer)
        : worker(thread), step(thread.step), s(thread.s), w(layer.delta_net), states(layer.recurrent),
          keys(s.key_heads * s.key_dim), values(s.value_heads * s.value_dim), channels(2 * keys + values),
          share(s.value_heads / s.key_heads) {}

    static real rounded(real v) { return Step<T>::rounded(v); }
    static int orders(const DeltaNet& w) { return orders_of(w.in_qkv, w.in_z, w.in_b, w.in_a); }

    void run() {
        project();
        const int64_t heads = s.value_heads;
        worker.for_each(step.row_count * heads, [&](int64_t item) { head(step.rows[item / heads], item % heads); });
        worker.operands.read(step.mixed.data(), step.n, values, orders_of(w.out));
        const Linear out[] = {{w.out, {}, s.width}};
        worker.products(out, values, worker.operands.all(), [&](int, int64_t r, int64_t row, int64_t n, real* v) {
            step.add_to_stream(r, row, n, v);
        });
    }

    void project() {
        const Linear in[] = {{w.in_qkv, {}, channels}, {w.in_z, {}, values}, {w.in_b, {}, s.value_heads},
                             {w.in_a, {}, s.value_heads}};
        real* to[] = {step.qkv.data(), step.z.data(), step.beta_logit.data(), step.decay_logit.data()};
        worker.products(in, s.width, worker.stream.all(), [&](int m, int64_t r, int64_t row, int64_t n, real* v) {
            std::copy_n(v, n, to[m] + r * in[m].rows + row);
            const RecurrentState& state = states[step.row(r).cache];
            if (m == 0 && state.log_inputs) save_all(state.log_inputs, s.dtype, step.logged(r) * channels + row, n, v);
        });
    }

    // One value head of one row: convolution of its q, k and v, the delta rule, the gated norm.
    void head(const Row& row, int64_t h) {
        const int64_t kh = h / share, dk = s.key_dim, dv = s.value_dim, t = row.count;
        const bool first = h % share == 0;  // of those that share the key head: keeps what is the key head's
        const RecurrentState& state = states[row.cache];
        worker.scratch.resize(t * (2 * dk + dv) + 3 * dv + dk * dv);
        real *q = worker.scratch.data(), *k = q + t * dk, *v = k + t * dk;  // a row a token
        real *delta = v + t * dv, *out = delta + dv, *weights = out + dv;
        convolve(row, kh * dk, dk, q, first);
        convolve(row, keys + kh * dk, dk, k, first);
        convolve(row, 2 * keys + h * dv, dv, v, true);
        load_all(w.out_norm.p, w.out_norm.dtype, 0, dv, weights);
        // In the dtype of the arithmetic, the state before is read and the one after written in place.
        const int64_t at = (row.index * s.value_heads + h) * dk * dv;
        const bool exact = state.dtype == (sizeof(real) == 8 ? F64 : F32);
        real* S = exact ? (real*)state.after + at : weights + dv;
        const real* before = exact ? (const real*)state.before + at : S;
        if (!exact) load_all(state.before, state.dtype, at, dk * dv, S);
        const real rate = std::exp(load<real>(w.a_log, h)), bias = load<real>(w.dt_bias, h);
        for (int64_t j = 0; j < t; j++, q += dk, k += dk, v += dv, before = S) {
            const int64_t r = row.first - step.first + j, gate = r * s.value_heads + h;
            l2_normalise(q, dk, 1 / std::sqrt(real(dk)));
            l2_normalise(k, dk, real(1));
            const real decay = std::exp(-rate * softplus(step.decay_logit[gate] + bias));
            recall(before, dk, dv, decay, sigmoid(step.beta_logit[gate]), k, v, delta);
            const bool past = exact && j + 1 == t && before != S && whole_lines(S, dv);
            const auto write = past ? write_and_read<true, real> : write_and_read<false, real>;
            write(before, S, dk, dv, decay, q, k, delta, out);
            if (state.log_deltas) log(state, step.logged(r), h, k, delta, decay);
            norm_and_gate(out, weights, gate * dv);
        }
        if (!exact) save_all(state.after, state.dtype, at, dk * dv, S);
    }

    // What the update log takes, from which `replay` makes the state again.
    void log(const RecurrentState& state, int64_t r, int64_t h, const real* k, const real* delta, real decay) const {
        const int64_t dk = s.key_dim, dv = s.value_dim;
        memcpy((real*)state.log_deltas + (r * s.value_heads + h) * dv, delta, dv * sizeof(real));
        ((real*)state.log_decay)[r * s.value_heads + h] = decay;
        if (h % share == 0) memcpy((real*)state.log_keys + (r * s.key_heads + h / share) * dk, k, dk * sizeof(real));
    }

    void norm_and_gate(real* out, const real* weights, int64_t at) const {
        const int64_t dv = s.value_dim;
        for (int64_t c = 0; c < dv; c++) out[c] = rounded(out[c]);
        const real scale = 1 / std::sqrt(sum_of_squares(out, dv) / dv + real(s.eps));
        for (int64_t c = 0; c < dv; c++) {
            const real normed = rounded(weights[c] * rounded(out[c] * scale));
            step.mixed[at + c] = rounded(normed * silu_of(step.z[at + c]));
        }
    }

    // silu of the filter's sum over neighbouring channels, and, if `keep`, the inputs that the next step needs.
    void convolve(const Row& row, int64_t first, int64_t count, real* out, bool keep) {
        const RecurrentState& state = states[row.cache];
        const int64_t carried = s.kernel_size - 1, taps = s.kernel_size, t = row.count, base = row.index * carried;
        Numbers<real>& in = worker.window;  // (carried + t, count), then the filter as it is and (taps, count)
        in.resize((carried + t + 2 * taps) * count);
        real *stored = &in[(carried + t) * count], *filter = stored + taps * count;
        for (int64_t j = 0; j < carried; j++)
            load_all(state.conv_before, s.dtype, (base + j) * channels + first, count, &in[j * count]);
        for (int64_t j = 0; j < t; j++)
            std::copy_n(&step.qkv[(row.first - step.first + j) * channels + first], count, &in[(carried + j) * count]);
        load_all(w.conv.p, w.conv.dtype, first * taps, count * taps, stored);
        for (int64_t tap = 0; tap < taps; tap++)
            for (int64_t c = 0; c < count; c++) filter[tap * count + c] = stored[c * taps + tap];
        for (int64_t j = 0; j < t; j++, out += count) {
            for (int64_t c = 0; c < count; c++) out[c] = in[j * count + c] * filter[c];
            for (int64_t tap = 1; tap < taps; tap++)
                for (int64_t c = 0; c < count; c++) out[c] += in[(j + tap) * count + c] * filter[tap * count + c];
            for (int64_t c = 0; c < count; c++) out[c] = rounded(silu_of(rounded(out[c])));
        }
        for (int64_t j = 0; keep && j < carried; j++)
            save_all(state.conv_after, s.dtype, (base + j) * channels + first, count, &in[(t + j) * count]);
    }
};

}  // namespace
