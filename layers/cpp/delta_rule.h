// Shared by forward and backward of the gated delta rule: a chunk's keys, decays and inverse triangular matrix.
//
// The algebra is that of `chunked` in layers/delta_rule.py with one difference: V* = T diag(β) (V − diag(γ) K S)
// avoids the product of T and K. Decays, the triangular solve, sums and the recurrent state are fp32. The template
// parameter T is the dtype of products.
#pragma once
#include <algorithm>

#include "kernels.h"

constexpr int CHUNK = 64;
constexpr int PIECE = 4;  // chunks between two kept states

inline int padded(int64_t n) { return int((n + 15) / 16 * 16); }
inline int up_to(int i) { return padded(i + 1); }  // columns of row i of a lower triangle, rounded up to whole vectors

struct Shape {
    int64_t batch, tokens, key_heads, heads, key_width, value_width;
    int64_t v_row;  // stride between the values of consecutive tokens, in elements
};

template <class V>
struct Inputs {
    const float *q, *k;                // (b t kh k)
    const V* v;                        // (b t h v)
    const float *log_decay, *beta;     // (b t h)
    const uint8_t* starts;             // (b t), or null
};

// A chunk of one key head, starting at token `token` of the flattened batch, with the states of the value heads that
// share it.
template <class T, class V>
struct Chunk {
    const Shape& s;
    const Inputs<V>& in;
    const int k_width = padded(s.key_width), v_width = padded(s.value_width);
    const size_t square = CHUNK * CHUNK, by_k = size_t(CHUNK) * k_width, by_v = size_t(CHUNK) * v_width;
    const size_t state = size_t(k_width) * v_width;
    int count = 0, number[CHUNK];  // number: sequences that started in this chunk, up to each token
    // Cumulative log decays in two fp32 parts, together 48 bits: 24 bits would lose weak decays next to strong ones.
    float since_start[CHUNK], rest[CHUNK];
    float beta[CHUNK], gamma[CHUNK], to_end[CHUNK];
    Buffer<T> q{by_k}, k{by_k}, k_rows{by_k}, k_packed{by_k}, by_beta{square}, state_packed{state}, values_packed{by_v};
    Buffer<float> kk{square}, qk{square}, decay{square}, system{square}, solved{square};
    Buffer<float> recalled{by_v}, values{by_v}, fresh{by_v};

    Chunk(const Shape& shape, const Inputs<V>& inputs) : s(shape), in(inputs) {}

    void load_rows(T* to, const float* from) {
        for (int i = 0; i < count; i++, from += s.key_heads * s.key_width)
            for (int j = 0; j < s.key_width; j++) store(to[i * k_width + j], from[j]);
        std::memset((void*)(to + count * k_width), 0, (CHUNK - count) * k_width * sizeof(T));
    }

    // Load and multiply the keys and queries that all states of a key head share.
    void load_keys(int64_t token, int64_t key_head, int tokens) {
        count = tokens;
        const int64_t at = (token * s.key_heads + key_head) * s.key_width;
        load_rows(q, in.q + at);
        load_rows(k, in.k + at);
        pack_transposed(k_packed, k_rows, (const T*)k, CHUNK, k_width);
        product<T>(kk, k, k_packed, CHUNK, CHUNK, k_width, false, false, true);
        product<T>(qk, q, k_packed, CHUNK, CHUNK, k_width, false, false, true);
        for (int i = 0; i < CHUNK; i++)
            number[i] = (i ? number[i - 1] : 0) + (in.starts && i < count && in.starts[token + i]);
    }

    // Log decay from token j to token i.
    float between(int i, int j) const { return (since_start[i] - since_start[j]) + (rest[i] - rest[j]); }

    // Compute one head's decays, T and T diag(β).
    void solve(int64_t token, int64_t head) {
        const float *g = in.log_decay + token * s.heads + head, *b = in.beta + token * s.heads + head;
        double sum = 0.0;
        for (int i = 0; i < CHUNK; i++) {
            sum += i < count ? g[i * s.heads] : 0.0f;
            since_start[i] = float(sum), rest[i] = float(sum - since_start[i]);
            beta[i] = i < count ? b[i * s.heads] : 0.0f;
        }
        for (int i = 0; i < CHUNK; i++) {
            gamma[i] = number[i] ? 0.0f : exponential(since_start[i]);
            to_end[i] = number[i] != number[CHUNK - 1] ? 0.0f : exponential(between(CHUNK - 1, i));
        }
        for (int i = 0; i < CHUNK; i++)
            for (int j = 0; j < up_to(i); j++) {
                // Above the diagonal the exponent is positive, and exp might overflow.
                float apart = between(i, j), kept = exponential(apart < 0.0f ? apart : 0.0f);
                decay[i * CHUNK + j] = kept = (j <= i) & (number[i] == number[j]) ? kept : 0.0f;
                system[i * CHUNK + j] = beta[i] * kept * kk[i * CHUNK + j];
            }
        for (int i = 0; i < CHUNK; i++) {  // (I + tril(system, −1))⁻¹: row i is e_i minus the weighted rows above
            float row[CHUNK] = {};
            for (int r = 0; r < i; r++)
                for (int j = 0; j < CHUNK; j++) row[j] -= system[i * CHUNK + r] * solved[r * CHUNK + j];
            row[i] = 1.0f;
            std::memcpy(solved + i * CHUNK, row, sizeof row);
            for (int j = 0; j < up_to(i); j++) store(by_beta[i * CHUNK + j], row[j] * beta[j]);
        }
    }

    // Compute K S, V − diag(γ) K S and the update V*. `state_packed` is S.
    void write(int64_t token, int64_t head) {
        product<T>(recalled, k, state_packed, CHUNK, v_width, k_width, false);
        const V* v = in.v + token * s.v_row + head * s.value_width;
        std::memset(values + count * v_width, 0, (CHUNK - count) * v_width * sizeof(float));
        for (int i = 0; i < count; i++)
            for (int j = 0; j < s.value_width; j++)
                values[i * v_width + j] = to_float(v[i * s.v_row + j]) - gamma[i] * recalled[i * v_width + j];
        pack(values_packed, values, CHUNK, v_width);
        product<T>(fresh, by_beta, values_packed, CHUNK, v_width, CHUNK, false, true);
    }

    // S ← γ_C S + (diag(γ_C / γ) K)ᵀ V*
    void advance(float* memory) {
        for (int i = 0; i < CHUNK; i++)
            for (int j = 0; j < v_width; j++) values[i * v_width + j] = to_end[i] * fresh[i * v_width + j];
        pack(values_packed, values, CHUNK, v_width);
        for (size_t i = 0; i < state; i++) memory[i] *= gamma[CHUNK - 1];
        product<T>(memory, k_rows, values_packed, k_width, v_width, CHUNK, true);
    }

    // Copy a state (k v) between a tensor and a buffer whose rows are padded to whole vectors.
    void load_state(float* to, const float* from) {
        for (int i = 0; i < s.key_width; i++) std::copy_n(from + i * s.value_width, s.value_width, to + i * v_width);
    }
    void save_state(float* to, const float* from) {
        for (int i = 0; i < s.key_width; i++) std::copy_n(from + i * v_width, s.value_width, to + i * s.value_width);
    }
};
