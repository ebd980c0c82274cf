// Recurrent states from the update log, to the bits that a step makes.
#pragma once
#include "decode_deltanet.h"

namespace {

// One memory (key_dim, value_dim) after n tokens, whose keys, deltas and decays lie some elements apart.
template <class real>
void replay_head(real* S, const Sizes& s, int64_t n, const real* keys, const real* deltas, const real* decay) {
    const int64_t dk = s.key_dim, dv = s.value_dim;
    for (int64_t t = 0; t < n; t++) {
        const real d = *decay;
        for (int64_t e = 0; e < dk; e++)
            for (int64_t c = 0; c < dv; c++) S[e * dv + c] = updated(S[e * dv + c], d, keys[e], deltas[c]);
        keys += s.key_heads * dk, deltas += s.value_heads * dv, decay += s.value_heads;
    }
}

template <class real>
void replay_all(const Sizes& s, int64_t b, real* memory, const real* keys, const real* deltas, const real* decay, int64_t n) {
    const int64_t dk = s.key_dim, dv = s.value_dim, share = s.value_heads / s.key_heads;
    for (int64_t i = 0; i < b; i++)
        for (int64_t h = 0; h < s.value_heads; h++) {
            const int64_t head = i * n * s.value_heads + h, key_head = i * n * s.key_heads + h / share;
            replay_head(memory + (i * s.value_heads + h) * dk * dv, s, n, keys + key_head * dk, deltas + head * dv,
                        decay + head);
        }
}

// `fold` for one head of one row of one layer: each row of its state goes through all tokens while it is near.
template <class T>
void fold_head(const Sizes& s, const RecurrentState& state, int64_t row, int64_t h, int64_t n, int64_t count) {
    typedef Real<T> real;
    const int64_t dk = s.key_dim, dv = s.value_dim, heads = s.value_heads, key_head = h / (heads / s.key_heads);
    const int64_t at = (row * heads + h) * dk * dv;
    const real *keys = (const real*)state.log_keys + (row * n * s.key_heads + key_head) * dk,
               *deltas = (const real*)state.log_deltas + (row * n * heads + h) * dv,
               *decay = (const real*)state.log_decay + row * n * heads + h;
    Numbers<real> part(dv);
    for (int64_t e = 0; e < dk; e++) {
        load_all(state.before, state.dtype, at + e * dv, dv, part.data());
        for (int64_t t = 0; t < count; t++) {
            const real key = keys[t * s.key_heads * dk + e], d = decay[t * heads], *delta = deltas + t * heads * dv;
            for (int64_t c = 0; c < dv; c++) part[c] = updated(part[c], d, key, delta[c]);
        }
        save_all(state.after, state.dtype, at + e * dv, dv, part.data());
    }
}

// The last inputs of the convolution of one row: of those before the call and the call's first `count`.
template <class T>
void fold_conv(const Sizes& s, const RecurrentState& state, int64_t row, int64_t n, int64_t count) {
    const int64_t channels = 2 * s.key_heads * s.key_dim + s.value_heads * s.value_dim, size = s.kernel_size - 1;
    const T *before = (const T*)state.conv_before + row * size * channels,
            *inputs = (const T*)state.log_inputs + row * n * channels;
    T* after = (T*)state.conv_after + row * size * channels;
    for (int64_t i = 0; i < size; i++) {
        const int64_t place = i + count;
        std::copy_n(place < size ? before + place * channels : inputs + (place - size) * channels, channels,
                    after + i * channels);
    }
}

template <class T>
void fold_all(const Sizes& s, const RecurrentState* states, int64_t layers, int64_t b, int64_t n,
              const int64_t* counts, int64_t threads) {
    const int64_t each = s.value_heads + 1;  // items of a row of a layer: its heads, and the convolution
    Phase phase;
    pool().run(threads, [&] {
        phase.run(layers * b * each, [&](int64_t item) {
            const RecurrentState& state = states[item / each / b];
            const int64_t row = item / each % b, h = item % each;
            if (h < s.value_heads) fold_head<T>(s, state, row, h, n, counts[row]);
            else fold_conv<T>(s, state, row, n, counts[row]);
        });
    });
}

}  // namespace
