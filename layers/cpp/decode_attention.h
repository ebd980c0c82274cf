// A softmax attention layer of a step: layers/gated_attention.py for a few tokens over all keys and values of a cache.
#pragma once
#include <tuple>
#include <utility>

#include "decode_step.h"

namespace {

constexpr int64_t GROUP = 4;  // queries that read a value together

// out[g][column] = the rows' sum, each times its weight for query g, which sees the first seen[g] of them.
template <int group, int vectors, class real, class W>
void sum_columns(const W* rows, const int64_t* seen, int64_t d, const real* weights, real* out) {
    constexpr int64_t L = WIDTH<real>;
    Wide<real> sums[group][vectors] = {};
    for (int64_t place = 0; place < seen[0]; place++)
        UNROLL for (int i = 0; i < vectors; i++) {
            const Wide<real> part = widen<real>(rows + place * d + i * L);
            UNROLL for (int g = 0; g < group; g++)
                sums[g][i] = multiply_add<real>(part, Wide<real>{} + weights[g * KEYS + place], sums[g][i]);
        }
    for (int g = 0; g < group; g++) {
        for (int64_t place = seen[0]; place < seen[g]; place++)  // of later tokens, which earlier ones must not touch
            for (int i = 0; i < vectors; i++)
                sums[g][i] = multiply_add<real>(widen<real>(rows + place * d + i * L),
                                                Wide<real>{} + weights[g * KEYS + place], sums[g][i]);
        memcpy(out + g * (d + 2), sums[g], sizeof sums[g]);
    }
}

template <int group, class real, class W>
void weighted_sum(const W* rows, const int64_t* seen, int64_t d, const real* weights, real* out) {
    constexpr int64_t L = WIDTH<real>;
    int64_t c = 0;
    for (; c + 4 * L <= d; c += 4 * L) sum_columns<group, 4>(rows + c, seen, d, weights, out + c);
    for (; c + L <= d; c += L) sum_columns<group, 1>(rows + c, seen, d, weights, out + c);
    for (; c < d; c++)
        for (int g = 0; g < group; g++) {
            real sum = 0;
            for (int64_t place = 0; place < seen[g]; place++)
                sum = multiply_add_one(real(to_float(rows[place * d + c])), weights[g * KEYS + place], sum);
            out[g * (d + 2) + c] = sum;
        }
}

// Scores of one query, scaled by `root`, to exp(score - max) in place. Returns their sum and max.
template <class real>
std::pair<real, real> softmax_parts(real* score, int64_t count, real root) {
    constexpr int64_t L = WIDTH<real>;
    const int64_t padded = (count + L - 1) / L * L;
    real max = -INFINITY;
    std::fill(score + count, score + padded, -INFINITY);
    Wide<real> highest = Wide<real>{} - INFINITY, sum = {};
    for (int64_t place = 0; place < padded; place += L) {
        Wide<real> part = widen<real>(score + place) * root;
        memcpy(score + place, &part, sizeof part);
        highest = part > highest ? part : highest;
    }
    for (int64_t lane = 0; lane < L; lane++) max = std::max(max, real(highest[lane]));
    for (int64_t place = 0; place < padded; place++) score[place] = exponential_of(score[place] - max);
    for (int64_t place = 0; place < padded; place += L) sum += widen<real>(score + place);
    return {sum_of<real>(sum), max};
}

template <class T>
struct AttentionStep {
    typedef Real<T> real;
    Worker<T>& worker;
    Step<T>& step;
    const Sizes& s;
    const Attention& w;
    const KeysAndValues* caches;
    const int64_t d, share;  // `share`: query heads that read one key head

    AttentionStep(Worker<T>& thread, const Layer& layer)
        : worker(thread), step(thread.step), s(thread.s), w(layer.attention), caches(layer.kv), d(s.head_dim),
          share(s.heads / s.kv_heads) {}

    static real rounded(real v) { return Step<T>::rounded(v); }
    static int orders(const Attention& w) { return orders_of(w.q, w.k, w.v, w.gate); }

    void run() {
        const Linear in[] = {{w.q, w.q_bias, s.heads * d}, {w.k, w.k_bias, s.kv_heads * d},
                             {w.v, w.v_bias, s.kv_heads * d}, {w.gate, w.gate_bias, s.heads * w.gate_rows}};
        real* to[] = {step.q.data(), step.k.data(), step.v.data(), step.gate.data()};
        worker.products(in, s.width, worker.stream.all(), [&](int m, int64_t r, int64_t row, int64_t n, real* v) {
            std::copy_n(v, n, to[m] + r * in[m].rows + row);
        });
        const int64_t heads = s.heads + s.kv_heads, key_heads = s.kv_heads;
        worker.for_each_small(step.n * heads, [&](int64_t item) { norm_and_rotate(item / heads, item % heads); });
        worker.operands.read(step.q.data(), step.n * s.heads, d);
        worker.for_each(int64_t(step.blocks.size()) * key_heads, [&](int64_t item) {
            attend_block(step.blocks[item / key_heads], item % key_heads);
        });
        worker.for_each_small(step.n * s.heads, [&](int64_t item) { join_and_gate(item / s.heads, item % s.heads); });
        worker.operands.read(step.mixed.data(), step.n, s.heads * d, orders_of(w.o));
        const Linear out[] = {{w.o, w.o_bias, s.width}};
        worker.products(out, s.heads * d, worker.operands.all(), [&](int, int64_t r, int64_t row, int64_t n, real* v) {
            step.add_to_stream(r, row, n, v);
        });
    }

    // Keys and values alone, which is all that later tokens need of these.
    void remember() {
        const Linear in[] = {{w.k, w.k_bias, s.kv_heads * d}, {w.v, w.v_bias, s.kv_heads * d}};
        real* to[] = {step.k.data(), step.v.data()};
        worker.products(in, s.width, worker.stream.all(), [&](int m, int64_t r, int64_t row, int64_t n, real* v) {
            std::copy_n(v, n, to[m] + r * in[m].rows + row);
        });
        worker.for_each_small(step.n * s.kv_heads, [&](int64_t item) {
            norm_and_rotate(item / s.kv_heads, s.heads + item % s.kv_heads);
        });
    }

    // One head of token r, the query heads first; keys and values go to their positions in the cache.
    void norm_and_rotate(int64_t r, int64_t h) const {
        const bool key = h >= s.heads;
        h -= key ? s.heads : 0;
        real* v = key ? &step.k[(r * s.kv_heads + h) * d] : &step.q[(r * s.heads + h) * d];
        const Mat norm = key ? w.k_norm : w.q_norm;
        if (norm.p) worker.rms_norm(v, v, 1, d, norm);
        rotate(v, step.first + r);
        if (key) keep(step.row(r), h, step.row(r).past + step.place(r), v, &step.v[(r * s.kv_heads + h) * d]);
    }

    void rotate(real* v, int64_t token) const {
        const int64_t half = s.rotary / 2;
        const void *cos = step.call.cos[token], *sin = step.call.sin[token];
        for (int64_t c = 0; c < half; c++) {
            const real cos_c = load<real>(cos, s.dtype, c), sin_c = load<real>(sin, s.dtype, c);
            const real first = v[c], second = v[c + half];
            v[c] = rounded(rounded(first * cos_c) + rounded(-second * sin_c));
            v[c + half] = rounded(rounded(second * cos_c) + rounded(first * sin_c));
        }
    }

    // The part that holds a position; `place` becomes its number there.
    static const Part& find(const KeysAndValues& kv, int64_t& place) {
        const Part* part = kv.parts;
        while (place >= part->n) place -= part++->n;
        return *part;
    }

    void keep(const Row& row, int64_t h, int64_t place, const real* k, const real* v) const {
        const KeysAndValues& kv = caches[row.cache];
        const Part& part = find(kv, place);
        const int64_t at = row.index * part.row + h * part.head + place * d;
        if (kv.dtype == I8) {
            const int64_t scale = row.index * part.scale_row + h * part.scale_head + place;
            quantise(k, (int8_t*)part.k + at, (float*)part.k_scale + scale);
            quantise(v, (int8_t*)part.v + at, (float*)part.v_scale + scale);
            return;
        }
        save_all(part.k, kv.dtype, at, d, k);
        save_all(part.v, kv.dtype, at, d, v);
    }

    void quantise(const real* v, int8_t* to, float* scale) const {
        float max = 0;
        for (int64_t c = 0; c < d; c++) max = std::max(max, std::fabs(float(v[c])));
        *scale = max / 127;
        for (int64_t c = 0; c < d; c++) to[c] = int8_t(std::nearbyint(float(v[c]) / std::max(*scale, 1e-30f)));
    }

    // Where a block's results for key head h and query j lie: the weighted sum of values, the sum of weights and the
    // largest score.
    real* result(const Block& block, int64_t h, int64_t j) const {
        return &step.partial[(block.at * s.heads + step.rows[block.row].count * share * h + j) * (d + 2)];
    }

    // The queries of key head h over one block. Query j is that of the row's token j / share and head j % share.
    void attend_block(const Block& block, int64_t h) {
        const Row& row = step.rows[block.row];
        const int64_t queries = row.count * share, count = std::min(block.first + KEYS, row.past + row.count) - block.first;
        worker.scratch.resize(KEYS * (d + queries));
        std::vector<int64_t> seen(queries), which(queries);  // positions of the block that a query sees
        real *wide = worker.scratch.data(), *scores = wide + KEYS * d, *out = result(block, h, 0);
        const real root = 1 / std::sqrt(real(d));
        for (int64_t j = 0; j < queries; j++) {
            seen[j] = std::clamp<int64_t>(row.past + j / share + 1 - block.first, 0, count);
            which[j] = (row.first - step.first + j / share) * s.heads + h * share + j % share;
        }
        const Vectors<T> x = worker.operands.pick(which.data(), queries);
        with_rows(row, h, block.first, count, true, wide, [&](const auto* keys) {
            if constexpr (PAIRS<T> && std::is_same_v<decltype(keys), const bf16*>)
                dot_rows(keys, count, d, x.low, queries, scores, KEYS);
            else dot_rows(keys, count, d, x.x, queries, scores, KEYS);
        });
        for (int64_t j = 0; j < queries; j++)
            std::tie(out[j * (d + 2) + d], out[j * (d + 2) + d + 1]) = softmax_parts(scores + j * KEYS, seen[j], root);
        with_rows(row, h, block.first, count, false, wide, [&](const auto* values) {
            for (int64_t j = 0; j < queries; j += GROUP)
                as_constant<GROUP>(std::min(GROUP, queries - j), [&](auto group) {
                    weighted_sum<group.value>(values, &seen[j], d, scores + j * KEYS, out + j * (d + 2));
                });
        });
    }

    // Give `use` the keys or values of `count` positions, a row each, in the dtype in which they are stored if
    // arithmetic takes it, else as `real`. Where one part has them all they are read in place, else copied into `to`:
    // the numbers are the same, however the past is shared.
    template <class Use>
    void with_rows(const Row& row, int64_t h, int64_t first, int64_t count, bool key, real* to, Use&& use) const {
        const KeysAndValues& kv = caches[row.cache];
        const bool own = kv.dtype == (sizeof(real) == 8 ? F64 : F32) && !std::is_same_v<T, bf16>;
        if (sizeof(real) == 4 && kv.dtype == BF16) return use(stored_rows(row, h, first, count, key, (bf16*)to));
        if (own) return use((const real*)stored_rows(row, h, first, count, key, to));
        each_part(row, h, first, count, key, [&](const Part& part, const void* from, int64_t at, int64_t n, int64_t to_row) {
            const float* scale = (const float*)(key ? part.k_scale : part.v_scale);
            if (kv.dtype == I8) {
                scale += row.index * part.scale_row + h * part.scale_head + (at - row.index * part.row - h * part.head) / d;
                for (int64_t i = 0; i < n * d; i++)
                    to[to_row * d + i] = rounded(((const int8_t*)from)[at + i] * scale[i / d]);
                return;
            }
            load_all(from, kv.dtype, at, n * d, to + to_row * d);
            for (int64_t i = 0; i < n * d; i++) to[to_row * d + i] = rounded(to[to_row * d + i]);
        });
        use((const real*)to);
    }

    // `count` rows as they are stored, in place or in `to`.
    template <class W>
    const W* stored_rows(const Row& row, int64_t h, int64_t first, int64_t count, bool key, W* to) const {
        const W* in_place = nullptr;
        each_part(row, h, first, count, key, [&](const Part&, const void* from, int64_t at, int64_t n, int64_t to_row) {
            if (n == count) in_place = (const W*)from + at;
            else std::copy_n((const W*)from + at, n * d, to + to_row * d);
        });
        return in_place ? in_place : to;
    }

    // use(part, its memory, place of the first number there, positions, those before) for each part of `count` positions.
    template <class Use>
    void each_part(const Row& row, int64_t h, int64_t first, int64_t count, bool key, Use&& use) const {
        for (int64_t done = 0, n; done < count; done += n) {
            int64_t place = first + done;
            const Part& part = find(caches[row.cache], place);
            n = std::min(count - done, part.n - place);
            use(part, key ? part.k : part.v, row.index * part.row + h * part.head + place * d, n, done);
        }
    }

    // One head's answer for token r from its blocks, then the gate.
    void join_and_gate(int64_t r, int64_t h) const {
        const int64_t i = step.row_of[r], j = step.place(r), item = r * s.heads + h;
        real* out = &step.mixed[item * d];
        join(i, h / share, j * share + h % share, (step.rows[i].past + j) / KEYS + 1, out);
        for (int64_t c = 0; c < d && w.gate_rows; c++) {
            const real gate = step.gate[item * w.gate_rows + (w.gate_rows > 1 ? c : 0)];
            out[c] = rounded(out[c] * rounded(sigmoid(gate)));
        }
    }

    // Query j of row i and key head h over its first `count` blocks.
    void join(int64_t i, int64_t h, int64_t j, int64_t count, real* out) const {
        const Block* blocks = &step.blocks[step.block_begin[i]];
        real max = -INFINITY, total = 0;
        for (int64_t b = 0; b < count; b++) max = std::max(max, result(blocks[b], h, j)[d + 1]);
        std::fill(out, out + d, real(0));
        for (int64_t b = 0; b < count; b++) {
            const real *from = result(blocks[b], h, j), weight = std::exp(from[d + 1] - max);
            total += weight * from[d];
            for (int64_t c = 0; c < d; c++) out[c] += weight * from[c];
        }
        for (int64_t c = 0; c < d; c++) out[c] = rounded(out[c] / total);
    }
};

}  // namespace
