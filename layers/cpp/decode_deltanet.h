// A Gated DeltaNet layer of a step: layers/gated_deltanet.py for a few tokens.
#pragma once
#include "decode_step.h"

namespace {

// S + key deltaᵀ, rounded once, here and in `replay`, so that both make the same bits.
template <class real>
real add_outer(real s, real key, real delta) {
    return std::fma(key, delta, s);
}

template <class real>
void l2_normalise(real* v, int64_t size, real factor) {
    real sum = 0;
    for (int64_t i = 0; i < size; i++) sum += v[i] * v[i];
    const real scale = 1 / std::sqrt(sum + real(1e-6));
    for (int64_t i = 0; i < size; i++) v[i] = v[i] * scale * factor;
}

template <class real>
struct DeltaNetStep {
    Worker<real>& worker;
    Step<real>& step;
    const Sizes& s;
    const DeltaNet& w;
    const RecurrentState& state;
    const int64_t keys, values, channels, share;  // `share`: value heads that read one key head

    DeltaNetStep(Worker<real>& thread, const Layer& layer)
        : worker(thread), step(thread.step), s(thread.s), w(layer.delta_net), state(layer.recurrent),
          keys(s.key_heads * s.key_dim), values(s.value_heads * s.value_dim), channels(2 * keys + values),
          share(s.value_heads / s.key_heads) {}

    real rounded(real v) const { return step.rounded(v); }

    void run() {
        project();
        worker.for_each(s.b * s.value_heads, [&](int64_t item) { head(item / s.value_heads, item % s.value_heads); });
        const Linear out[] = {{w.out, {}, s.width}};
        worker.products(out, values, step.mixed, step.n, [&](int, int64_t row, int64_t r, real v) {
            step.add_to_stream(r, row, v);
        });
    }

    void project() {
        const Linear in[] = {{w.in_qkv, {}, channels}, {w.in_z, {}, values}, {w.in_b, {}, s.value_heads},
                             {w.in_a, {}, s.value_heads}};
        real* to[] = {step.qkv.data(), step.z.data(), step.beta_logit.data(), step.decay_logit.data()};
        worker.products(in, s.width, worker.normed, step.n, [&](int m, int64_t row, int64_t r, real v) {
            to[m][r * in[m].rows + row] = v;
            if (m == 0 && state.log_inputs) save(state.log_inputs, s.dtype, r * channels + row, v);
        });
    }

    // One value head of one sequence: convolution of its q, k and v, the delta rule, the gated norm.
    void head(int64_t i, int64_t h) {
        const int64_t kh = h / share, dk = s.key_dim, dv = s.value_dim, t = s.t;
        const bool first = h % share == 0;  // of those that share the key head: keeps what is the key head's
        worker.scratch.resize(t * (2 * dk + dv) + 2 * dv + dk * dv);
        real *q = worker.scratch.data(), *k = q + t * dk, *v = k + t * dk;  // a row a token
        real *delta = v + t * dv, *out = delta + dv, *S = out + dv;
        convolve(i, kh * dk, dk, q, first);
        convolve(i, keys + kh * dk, dk, k, first);
        convolve(i, 2 * keys + h * dv, dv, v, true);
        const int64_t at = (i * s.value_heads + h) * dk * dv;
        load_all(state.before, state.dtype, at, dk * dv, S);
        const real rate = std::exp(load<real>(w.a_log, h)), bias = load<real>(w.dt_bias, h);
        for (int64_t j = 0; j < t; j++, q += dk, k += dk, v += dv) {
            const int64_t r = i * t + j, gate = r * s.value_heads + h;
            l2_normalise(q, dk, 1 / std::sqrt(real(dk)));
            l2_normalise(k, dk, real(1));
            const real decay = std::exp(-rate * softplus(step.decay_logit[gate] + bias));
            update(S, decay, sigmoid(step.beta_logit[gate]), q, k, v, delta, out);
            if (state.log_deltas) log(r, h, k, delta, decay);
            norm_and_gate(out, gate * dv);
        }
        save_all(state.after, state.dtype, at, dk * dv, S);
    }

    // The delta rule for one token: S decays, recalls for k, takes up the difference to v, and answers q.
    void update(real* S, real decay, real beta, const real* q, const real* k, const real* v, real* delta,
                real* out) const {
        const int64_t dk = s.key_dim, dv = s.value_dim;
        std::fill(delta, delta + dv, real(0));
        for (int64_t e = 0; e < dk; e++) {
            const real key = k[e];
#pragma omp simd
            for (int64_t c = 0; c < dv; c++) {
                S[e * dv + c] *= decay;
                delta[c] += key * S[e * dv + c];
            }
        }
        for (int64_t c = 0; c < dv; c++) delta[c] = beta * (v[c] - delta[c]);
        std::fill(out, out + dv, real(0));
        for (int64_t e = 0; e < dk; e++) {
            const real key = k[e], query = q[e];
#pragma omp simd
            for (int64_t c = 0; c < dv; c++) {
                S[e * dv + c] = add_outer(S[e * dv + c], key, delta[c]);
                out[c] += query * S[e * dv + c];
            }
        }
    }

    // What the update log takes, from which `replay` makes the state again.
    void log(int64_t r, int64_t h, const real* k, const real* delta, real decay) const {
        const int64_t dk = s.key_dim, dv = s.value_dim;
        memcpy((real*)state.log_deltas + (r * s.value_heads + h) * dv, delta, dv * sizeof(real));
        ((real*)state.log_decay)[r * s.value_heads + h] = decay;
        if (h % share == 0) memcpy((real*)state.log_keys + (r * s.key_heads + h / share) * dk, k, dk * sizeof(real));
    }

    void norm_and_gate(real* out, int64_t at) const {
        const int64_t dv = s.value_dim;
        real sum = 0;
        for (int64_t c = 0; c < dv; c++) {
            out[c] = rounded(out[c]);
            sum += out[c] * out[c];
        }
        const real scale = 1 / std::sqrt(sum / dv + real(s.eps));
        for (int64_t c = 0; c < dv; c++) {
            const real normed = rounded(load<real>(w.out_norm, c) * rounded(out[c] * scale));
            step.mixed[at + c] = rounded(normed * exact_silu(step.z[at + c]));
        }
    }

    // silu of the filter's sum over neighbouring channels, and, if `keep`, the inputs that the next step needs.
    void convolve(int64_t i, int64_t first, int64_t count, real* out, bool keep) {
        const int64_t carried = s.kernel_size - 1, rows = carried + s.t;
        Numbers<real>& in = worker.window;  // (carried + t, count), then the filter
        in.resize(rows * count + count * s.kernel_size);
        real* filter = &in[rows * count];
        for (int64_t j = 0; j < carried; j++)
            load_all(state.conv_before, s.dtype, (i * carried + j) * channels + first, count, &in[j * count]);
        for (int64_t j = 0; j < s.t; j++)
            memcpy(&in[(carried + j) * count], &step.qkv[(i * s.t + j) * channels + first], count * sizeof(real));
        load_all(w.conv.p, w.conv.dtype, first * s.kernel_size, count * s.kernel_size, filter);
        for (int64_t j = 0; j < s.t; j++)
            for (int64_t c = 0; c < count; c++) {
                real sum = 0;
                for (int64_t tap = 0; tap < s.kernel_size; tap++) {
                    const real product = in[(j + tap) * count + c] * rounded(filter[c * s.kernel_size + tap]);
                    sum += s.t == 1 ? rounded(product) : product;  // several tokens are convolved in fp32
                }
                out[j * count + c] = rounded(exact_silu(rounded(sum)));
            }
        for (int64_t j = 0; keep && j < carried; j++)
            save_all(state.conv_after, s.dtype, (i * carried + j) * channels + first, count, &in[(s.t + j) * count]);
    }
};

}  // namespace
