// The feed-forward of a step: layers/moe.py and layers/mlp.py for a few tokens.
#pragma once
#include <utility>

#include "decode_step.h"

namespace {

// A choice c = token * top_k + k of an expert. Each expert's choices come together, so that its weights are read once.
template <class T>
struct FeedForwardStep {
    typedef Real<T> real;
    Worker<T>& worker;
    Step<T>& step;
    const Sizes& s;
    const FeedForward& w;
    const bool sparse;
    const int64_t shared, inner, top_k;      // intermediate size of the shared (or only) feed-forward, of an expert
    std::vector<int64_t> expert;             // of each choice
    Numbers<real> weight;
    std::vector<int64_t> order, token, place;  // choices by expert, their tokens; place[order[i]] == i
    std::vector<int64_t> begin;                // in `order`, of each expert that was chosen, and the end

    FeedForwardStep(Worker<T>& thread, const Layer& layer)
        : worker(thread), step(thread.step), s(thread.s), w(layer.feed_forward), sparse(layer.sparse),
          shared(sparse ? s.shared_intermediate_size : s.dense_inner), inner(s.inner), top_k(sparse ? s.top_k : 0) {}

    static real rounded(real v) { return Step<T>::rounded(v); }
    static int orders(const FeedForward& w) {
        return orders_of(w.router, w.experts_in, w.shared_gate, w.shared_up, w.shared_weight);
    }

    void run() {
        project();
        if (sparse) {
            choose();
            sort();
            run_experts();
        }
        worker.operands.read(step.hidden.data(), step.n * top_k, inner, orders_of(w.experts_out));
        worker.others.read(step.shared_hidden.data(), step.n, shared, orders_of(w.shared_down));
        const int64_t few = std::max<int64_t>(16, (1 << 16) / (step.n * (top_k + 1)));  // answers stay in a near cache
        const int64_t size = std::min(few, worker.share_of(w.shared_down, s.width, top_k * inner + shared));
        worker.for_each((s.width + size - 1) / size, [&](int64_t item) {
            add_outputs(item * size, std::min(size, s.width - item * size));
        });
    }

    // The router, the shared expert's gate, and the inner activations of the shared or only feed-forward.
    void project() {
        const Linear in[] = {{w.router, {}, sparse ? s.experts : 0}, {w.shared_weight, {}, sparse ? 1 : 0},
                             {w.shared_gate, {}, shared, w.shared_up}};
        worker.products(in, s.width, worker.stream.all(), [&](int m, int64_t r, int64_t row, int64_t n, real* values) {
            if (m == 0) std::copy_n(values, n, &step.router_logits[r * s.experts + row]);
            else if (m == 1) step.shared_weight[r] = *values;
            else std::copy_n(values, n, &step.shared_hidden[r * shared + row]);
        });
    }

    // Softmax over all experts, the top_k of them, renormalised, then rounded: by each thread for itself. Of equal
    // logits the lower number comes first, as in layers/moe.py; NaN comes before all.
    void choose() {
        expert.resize(step.n * top_k), weight.resize(step.n * top_k);
        std::vector<std::pair<real, int64_t>> all(s.experts);
        for (int64_t r = 0; r < step.n; r++) {
            const real* logit = &step.router_logits[r * s.experts];
            real max = -INFINITY, total = 0, kept = 0;
            for (int64_t e = 0; e < s.experts; e++) max = std::max(max, logit[e]);
            for (int64_t e = 0; e < s.experts; e++) {
                total += std::exp(logit[e] - max);
                all[e] = {logit[e] == logit[e] ? -logit[e] : -INFINITY, e};
            }
            std::partial_sort(all.begin(), all.begin() + top_k, all.end());
            auto probability = [&](int64_t k) { return std::exp(logit[all[k].second] - max) / total; };
            for (int64_t k = 0; k < top_k; k++) kept += probability(k);
            for (int64_t k = 0; k < top_k; k++) {
                expert[r * top_k + k] = all[k].second;
                weight[r * top_k + k] = rounded(probability(k) / (s.norm_topk_prob ? kept : 1));
            }
        }
    }

    // Choices by expert, in the order of tokens.
    void sort() {
        const int64_t choices = step.n * top_k;
        std::vector<int64_t> first(s.experts + 1);
        for (int64_t c = 0; c < choices; c++) first[expert[c] + 1]++;
        begin.clear();
        for (int64_t e = 0; e < s.experts; e++) {
            if (first[e + 1]) begin.push_back(first[e]);
            first[e + 1] += first[e];
        }
        begin.push_back(choices);
        order.resize(choices), token.resize(choices), place.resize(choices);
        for (int64_t c = 0; c < choices; c++) {
            const int64_t to = first[expert[c]]++;
            order[to] = c, token[to] = c / top_k, place[c] = to;
        }
    }

    int64_t groups() const { return int64_t(begin.size()) - 1; }

    // The inner activations of the chosen experts. The number of items must not depend on which these are: a thread
    // that joins late sees the logits of a later layer, and would wait for items that nobody has.
    void run_experts() {
        const int64_t most = std::min(s.experts, step.n * top_k);
        const int64_t size = worker.share_of(w.experts_in, most * inner, 2 * s.width);
        const int64_t pieces = (inner + size - 1) / size;
        worker.for_each(most * pieces, [&](int64_t item) {
            if (item / pieces >= groups()) return;
            const int64_t at = begin[item / pieces], count = begin[item / pieces + 1] - at;
            const int64_t first = item % pieces * size, last = std::min(first + size, inner);
            const int64_t base = expert[order[at]] * 2 * inner;
            auto use = [&](int64_t v, int64_t row, int64_t n, real* values) {
                std::copy_n(values, n, &step.hidden[order[at + v] * inner + row]);
            };
            const Vectors<T> x = worker.stream.pick(&token[at], count);
            worker.swiglu(w.experts_in, base, w.experts_in, base + inner, first, last, s.width, x, use);
        });
    }

    // `count` columns of the residual stream: the experts' outputs, weighed, and the shared one's.
    void add_outputs(int64_t first, int64_t count) {
        const int64_t choices = step.n * top_k;
        Numbers<real>& out = worker.scratch;  // (choices by expert, count), (n, count), (count,)
        out.resize((choices + step.n + 1) * count);
        for (int64_t g = 0; sparse && g < groups(); g++) {
            const int64_t at = begin[g], base = expert[order[at]] * s.width + first;
            const Vectors<T> x = worker.operands.pick(&order[at], begin[g + 1] - at);
            multiply_rows<T>(w.experts_out, base, base + count, inner, x, &out[at * count], count);
        }
        real *own = &out[choices * count], *sums = own + step.n * count;
        multiply_rows<T>(w.shared_down, first, first + count, shared, worker.others.all(), own, count);
        for (int64_t r = 0; r < step.n; r++, own += count) {
            std::fill(sums, sums + count, real(0));
            for (int64_t c = r * top_k; c < r * top_k + top_k; c++) {
                const real* values = &out[place[c] * count];
                for (int64_t i = 0; i < count; i++) sums[i] = rounded(sums[i] + rounded(values[i]) * weight[c]);
            }
            const real own_weight = sparse ? rounded(sigmoid(step.shared_weight[r])) : 1;
            for (int64_t i = 0; i < count; i++)
                sums[i] = sparse ? rounded(sums[i] + rounded(own_weight * rounded(own[i]))) : rounded(own[i]);
            step.add_to_stream(r, first, count, sums);
        }
    }
};

}  // namespace
