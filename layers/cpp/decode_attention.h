// A softmax attention layer of a step: layers/gated_attention.py for a few tokens over all keys and values of a cache.
#pragma once
#include "decode_step.h"

namespace {

constexpr int64_t GROUP = 4;  // queries that read a key or value together

inline float exp_of_score(float x) { return exponential(x); }
inline double exp_of_score(double x) { return std::exp(x); }

// Call `use` with the number of queries, at most GROUP, as a constant.
template <class Use>
void grouped(int64_t size, Use&& use) {
    switch (size) {
        case 1: return use(std::integral_constant<int, 1>());
        case 2: return use(std::integral_constant<int, 2>());
        case 3: return use(std::integral_constant<int, 3>());
        default: return use(std::integral_constant<int, 4>());
    }
}

// out[g][position] = row `position` · x[g] for the queries of a group, for which a row is read and widened once.
template <int group, class real, class W>
void dots(const W* rows, int64_t count, int64_t d, const real* const* x, real* out) {
    constexpr int64_t L = WIDTH<real>;
    Wide<real> sums[group][L];
    for (int64_t begin = 0, whole = d / L * L; begin < count; begin += L) {
        const int64_t size = std::min(L, count - begin);
        for (int64_t place = 0; place < size; place++) {
            const W* row = rows + (begin + place) * d;
            Wide<real> sum[group] = {};
            for (int64_t c = 0; c < whole; c += L) {
                Wide<real> part = widen<real>(row + c);
                UNROLL for (int g = 0; g < group; g++) sum[g] += part * widen<real>(x[g] + c);
            }
            for (int64_t c = whole; c < d; c++)
                for (int g = 0; g < group; g++) sum[g][0] += real(to_float(row[c])) * x[g][c];
            UNROLL for (int g = 0; g < group; g++) sums[g][place] = sum[g];
        }
        for (int g = 0; g < group; g++) each_sum<real>(sums[g], size, out + g * KEYS + begin);
    }
}

#if defined(__AVX512BF16__)
constexpr int64_t BF16_MOST = 512;  // of head_dim, for `dots_of_pairs`

// The same by an instruction for pairs of bf16, where queries are bf16 as keys are and d is a multiple of 32.
template <int group>
void dots_of_pairs(const bf16* rows, int64_t count, int64_t d, const float* const* x, float* out) {
    alignas(64) bf16 low[group][BF16_MOST];
    for (int g = 0; g < group; g++) convert(low[g], x[g], d);
    Wide<float> sums[group][16];
    for (int64_t begin = 0; begin < count; begin += 16) {
        const int64_t size = std::min<int64_t>(16, count - begin);
        for (int64_t place = 0; place < size; place++) {
            const bf16* row = rows + (begin + place) * d;
            __m512 sum[group] = {};
            for (int64_t c = 0; c < d; c += 32) {
                __m512bh part = (__m512bh)_mm512_loadu_si512(row + c);
                UNROLL for (int g = 0; g < group; g++)
                    sum[g] = _mm512_dpbf16_ps(sum[g], part, (__m512bh)_mm512_load_si512(low[g] + c));
            }
            UNROLL for (int g = 0; g < group; g++) sums[g][place] = (Wide<float>)sum[g];
        }
        for (int g = 0; g < group; g++) each_sum<float>(sums[g], size, out + g * KEYS + begin);
    }
}
#endif

// `dots` by the fastest instructions that keep what is rounded. `queries_are_bf16`: the model's dtype is bf16.
template <int group, class real, class W>
void scores_of(const W* keys, int64_t count, int64_t d, const real* const* x, real* out, bool queries_are_bf16) {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<W, bf16> && std::is_same_v<real, float>) {
        if (queries_are_bf16 && d % 32 == 0 && d <= BF16_MOST) return dots_of_pairs<group>(keys, count, d, x, out);
    }
#endif
    dots<group>(keys, count, d, x, out);
}

// out[g] = the rows' sum, each times its weight for query g.
template <int group, class real, class W>
void weighted_sum(const W* rows, int64_t count, int64_t d, const real* weights, real* out) {
    constexpr int64_t L = WIDTH<real>, V = 4;  // vectors of columns that stay in registers
    int64_t c = 0;
    for (; c + V * L <= d; c += V * L) {
        Wide<real> sums[group][V] = {};
        for (int64_t place = 0; place < count; place++)
            UNROLL for (int r = 0; r < V; r++) {
                Wide<real> part = widen<real>(rows + place * d + c + r * L);
                UNROLL for (int g = 0; g < group; g++) sums[g][r] += part * weights[g * KEYS + place];
            }
        for (int g = 0; g < group; g++) memcpy(out + g * (d + 2) + c, sums[g], sizeof sums[g]);
    }
    for (; c < d; c++)
        for (int g = 0; g < group; g++) {
            real sum = 0;
            for (int64_t place = 0; place < count; place++)
                sum += real(to_float(rows[place * d + c])) * weights[g * KEYS + place];
            out[g * (d + 2) + c] = sum;
        }
}

// Scores of one query, scaled by `root`, to exp(score - max) in place, 0 behind `count`. Returns their sum and max.
template <class real>
std::pair<real, real> softmax_parts(real* score, int64_t count, real root) {
    constexpr int64_t L = WIDTH<real>;
    const int64_t padded = (count + L - 1) / L * L;
    real max = -INFINITY;
    std::fill(score + count, score + KEYS, -INFINITY);
    Wide<real> highest = Wide<real>{} - INFINITY, sum = {};
    for (int64_t place = 0; place < padded; place += L) {
        Wide<real> part = widen<real>(score + place) * root;
        memcpy(score + place, &part, sizeof part);
        highest = part > highest ? part : highest;
    }
    for (int64_t lane = 0; lane < L; lane++) max = std::max(max, real(highest[lane]));
    for (int64_t place = 0; place < padded; place++) score[place] = exp_of_score(score[place] - max);
    std::fill(score + padded, score + KEYS, real(0));
    for (int64_t place = 0; place < padded; place += L) sum += widen<real>(score + place);
    return {sum_of<real>(sum), max};
}

template <class real>
struct AttentionStep {
    Worker<real>& worker;
    Step<real>& step;
    const Sizes& s;
    const Attention& w;
    const KeysAndValues& kv;
    const int64_t d, share;  // `share`: query heads that read one key head
    const int64_t each;      // numbers of one item in step.partial

    AttentionStep(Worker<real>& thread, const Layer& layer)
        : worker(thread), step(thread.step), s(thread.s), w(layer.attention), kv(layer.kv), d(s.head_dim),
          share(s.heads / s.kv_heads), each(s.t * share * (d + 2)) {}

    real rounded(real v) const { return step.rounded(v); }

    void run() {
        const Linear in[] = {{w.q, w.q_bias, s.heads * d}, {w.k, w.k_bias, s.kv_heads * d},
                             {w.v, w.v_bias, s.kv_heads * d}, {w.gate, w.gate_bias, s.heads * w.gate_rows}};
        real* to[] = {step.q.data(), step.k.data(), step.v.data(), step.gate.data()};
        worker.products(in, s.width, worker.normed, step.n, [&](int m, int64_t row, int64_t r, real v) {
            to[m][r * in[m].rows + row] = v;
        });
        const int64_t heads = s.heads + s.kv_heads, pieces = step.pieces();
        worker.for_each(step.n * heads, [&](int64_t item) { norm_and_rotate(item / heads, item % heads); });
        worker.for_each(s.b * s.kv_heads * pieces, [&](int64_t item) {
            attend_block(item / (s.kv_heads * pieces), item / pieces % s.kv_heads, item % pieces * KEYS,
                         &step.partial[item * each]);
        });
        worker.for_each(step.n * s.heads, [&](int64_t item) { join_and_gate(item / s.heads, item % s.heads); });
        const Linear out[] = {{w.o, w.o_bias, s.width}};
        worker.products(out, s.heads * d, step.mixed, step.n, [&](int, int64_t row, int64_t r, real v) {
            step.add_to_stream(r, row, v);
        });
    }

    // One head of token r, the query heads first; keys and values go to their positions in the cache.
    void norm_and_rotate(int64_t r, int64_t h) const {
        const bool key = h >= s.heads;
        h -= key ? s.heads : 0;
        real* v = key ? &step.k[(r * s.kv_heads + h) * d] : &step.q[(r * s.heads + h) * d];
        const Mat norm = key ? w.k_norm : w.q_norm;
        if (norm.p) worker.rms_norm(v, v, d, norm);
        rotate(v, r);
        if (key) keep(r / s.t, h, step.past[r / s.t] + r % s.t, v, &step.v[(r * s.kv_heads + h) * d]);
    }

    void rotate(real* v, int64_t r) const {
        const int64_t half = s.rotary / 2;
        for (int64_t c = 0; c < half; c++) {
            const real cos_c = load<real>(step.cos[r], s.dtype, c), sin_c = load<real>(step.sin[r], s.dtype, c);
            const real first = v[c], second = v[c + half];
            v[c] = rounded(rounded(first * cos_c) + rounded(-second * sin_c));
            v[c + half] = rounded(rounded(second * cos_c) + rounded(first * sin_c));
        }
    }

    // The part that holds a position; `place` becomes its number there.
    const Part& find(int64_t& place) const {
        const Part* part = kv.parts;
        while (place >= part->n) place -= part++->n;
        return *part;
    }

    void keep(int64_t i, int64_t h, int64_t place, const real* k, const real* v) const {
        const Part& part = find(place);
        const int64_t at = i * part.row + h * part.head + place * d;
        if (kv.dtype == I8) {
            const int64_t scale = i * part.scale_row + h * part.scale_head + place;
            quantise(k, (int8_t*)part.k + at, (float*)part.k_scale + scale);
            quantise(v, (int8_t*)part.v + at, (float*)part.v_scale + scale);
            return;
        }
        for (int64_t c = 0; c < d; c++) {
            save(part.k, kv.dtype, at + c, k[c]);
            save(part.v, kv.dtype, at + c, v[c]);
        }
    }

    void quantise(const real* v, int8_t* to, float* scale) const {
        float max = 0;
        for (int64_t c = 0; c < d; c++) max = std::max(max, std::fabs(float(v[c])));
        *scale = max / 127;
        for (int64_t c = 0; c < d; c++) to[c] = int8_t(std::nearbyint(float(v[c]) / std::max(*scale, 1e-30f)));
    }

    // The queries of one key head over at most KEYS positions from `first` on: for each query the weighted sum of
    // values, the sum of weights and the largest score.
    void attend_block(int64_t i, int64_t h, int64_t first, real* out) {
        const int64_t queries = s.t * share, count = std::min(first + KEYS, step.past[i] + s.t) - first;
        worker.scratch.resize(KEYS * (d + queries));
        real *wide = worker.scratch.data(), *scores = wide + KEYS * d;
        const real root = 1 / std::sqrt(real(d));
        // Positions of the block that query j may see.
        auto seen = [&](int64_t j) { return std::clamp<int64_t>(step.past[i] + j / share + 1 - first, 0, count); };
        with_rows(i, h, first, count, true, wide, [&](const auto* keys) {
            for (int64_t from = 0; from < queries; from += GROUP) {
                const int64_t size = std::min(GROUP, queries - from), visible = seen(from + size - 1);
                const real* query[GROUP];
                for (int64_t g = 0; g < size; g++) query[g] = query_of(i, h, from + g);
                grouped(size, [&](auto group) {
                    scores_of<group.value>(keys, visible, d, query, scores + from * KEYS, s.dtype == BF16);
                });
            }
        });
        for (int64_t j = 0; j < queries; j++) {
            auto [sum, max] = softmax_parts(scores + j * KEYS, seen(j), root);
            out[j * (d + 2) + d] = sum, out[j * (d + 2) + d + 1] = max;
        }
        with_rows(i, h, first, count, false, wide, [&](const auto* values) {
            for (int64_t from = 0; from < queries; from += GROUP) {
                const int64_t size = std::min(GROUP, queries - from), visible = seen(from + size - 1);
                grouped(size, [&](auto group) {
                    weighted_sum<group.value>(values, visible, d, scores + from * KEYS, out + from * (d + 2));
                });
            }
        });
    }

    // Query j of those that share a key head: token j / share, head j % share.
    const real* query_of(int64_t i, int64_t h, int64_t j) const {
        return &step.q[((i * s.t + j / share) * s.heads + h * share + j % share) * d];
    }

    // Give `use` the keys or values of `count` positions, a row each: in place where one part has them all in a dtype
    // that arithmetic takes, else converted into `to`.
    template <class Use>
    void with_rows(int64_t i, int64_t h, int64_t first, int64_t count, bool key, real* to, Use&& use) const {
        constexpr bool single = std::is_same_v<real, float>;
        int64_t place = first;
        const Part& part = find(place);
        if (part.n - place >= count) {
            const int64_t at = i * part.row + h * part.head + place * d;
            const void* from = key ? part.k : part.v;
            if (kv.dtype == BF16 && single) return use((const bf16*)from + at);
            if (kv.dtype == (single ? F32 : F64) && s.dtype != BF16) return use((const real*)from + at);
        }
        for (int64_t done = 0; done < count;)
            done += convert_rows(i, h, first + done, count - done, key, to + done * d);
        use((const real*)to);
    }

    // Convert at most `count` rows of the part that holds `place`; returns how many.
    int64_t convert_rows(int64_t i, int64_t h, int64_t place, int64_t count, bool key, real* to) const {
        const Part& part = find(place);
        const int64_t n = std::min(count, part.n - place), at = i * part.row + h * part.head + place * d;
        const void* from = key ? part.k : part.v;
        if (kv.dtype == I8) {
            const int8_t* v = (const int8_t*)from + at;
            const int64_t scales = i * part.scale_row + h * part.scale_head + place;
            const float* scale = (const float*)(key ? part.k_scale : part.v_scale) + scales;
            for (int64_t r = 0; r < n; r++)
                for (int64_t c = 0; c < d; c++) to[r * d + c] = rounded(v[r * d + c] * scale[r]);
            return n;
        }
        load_all(from, kv.dtype, at, n * d, to);
        if (s.dtype == BF16 && kv.dtype != BF16)
            for (int64_t c = 0; c < n * d; c++) to[c] = rounded(to[c]);
        return n;
    }

    // One head's answer for token r from its blocks, then the gate.
    void join_and_gate(int64_t r, int64_t h) const {
        const int64_t i = r / s.t, j = r % s.t, item = r * s.heads + h;
        const real* from = &step.partial[(i * s.kv_heads + h / share) * step.pieces() * each];
        real* out = &step.mixed[item * d];
        join(from + (j * share + h % share) * (d + 2), (step.past[i] + j) / KEYS + 1, out);
        for (int64_t c = 0; c < d && w.gate_rows; c++) {
            const real gate = step.gate[item * w.gate_rows + (w.gate_rows > 1 ? c : 0)];
            out[c] = rounded(out[c] * rounded(sigmoid(gate)));
        }
    }

    void join(const real* from, int64_t blocks, real* out) const {
        real max = -INFINITY, total = 0;
        for (int64_t p = 0; p < blocks; p++) max = std::max(max, from[p * each + d + 1]);
        std::fill(out, out + d, real(0));
        for (int64_t p = 0; p < blocks; p++) {
            const real weight = std::exp(from[p * each + d + 1] - max);
            total += weight * from[p * each + d];
            for (int64_t c = 0; c < d; c++) out[c] += weight * from[p * each + c];
        }
        for (int64_t c = 0; c < d; c++) out[c] = rounded(out[c] / total);
    }
};

}  // namespace
