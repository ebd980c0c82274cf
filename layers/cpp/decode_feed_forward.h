// The feed-forward of a step: layers/moe.py and layers/mlp.py for a few tokens.
#pragma once
#include <utility>

#include "decode_step.h"

namespace {

template <class real>
struct Choice {
    int64_t expert;
    real weight;
};

template <class real>
struct FeedForwardStep {
    Worker<real>& worker;
    Step<real>& step;
    const Sizes& s;
    const FeedForward& w;
    const bool sparse;
    const int64_t shared, inner, top_k;  // widths of the shared (or only) feed-forward and of an expert
    const int64_t columns;               // of step.hidden: the chosen experts', then the shared one's
    std::vector<Choice<real>> chosen;    // (n, top_k)

    FeedForwardStep(Worker<real>& thread, const Layer& layer)
        : worker(thread), step(thread.step), s(thread.s), w(layer.feed_forward), sparse(layer.sparse),
          shared(sparse ? s.shared_intermediate_size : s.dense_inner), inner(s.inner), top_k(sparse ? s.top_k : 0),
          columns(top_k * inner + shared) {}

    real rounded(real v) const { return step.rounded(v); }

    void run() {
        project();
        if (sparse) {
            choose();
            run_experts();
        }
        const int64_t size = worker.share_of(w.shared_down, s.width, columns);
        worker.for_each((s.width + size - 1) / size, [&](int64_t item) {
            add_outputs(item * size, std::min(item * size + size, s.width));
        });
    }

    // The router, the shared expert's gate, and the inner activations of the shared or only feed-forward.
    void project() {
        const Linear in[] = {{w.router, {}, sparse ? s.experts : 0}, {w.shared_weight, {}, sparse ? 1 : 0},
                             {w.shared_gate, {}, shared, w.shared_up}};
        worker.products(in, s.width, worker.normed, step.n, [&](int m, int64_t row, int64_t r, real v) {
            if (m == 0) step.router_logits[r * s.experts + row] = v;
            else if (m == 1) step.shared_weight[r] = v;
            else step.hidden[(r + 1) * columns - shared + row] = v;
        });
    }

    // Softmax over all experts, the top_k of them, renormalised, then rounded: by each thread for itself. Of equal
    // logits the lower number comes first, as in layers/moe.py; NaN comes before all.
    void choose() {
        chosen.resize(step.n * top_k);
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
            auto probability = [&](int64_t c) { return std::exp(logit[all[c].second] - max) / total; };
            for (int64_t c = 0; c < top_k; c++) kept += probability(c);
            for (int64_t c = 0; c < top_k; c++)
                chosen[r * top_k + c] = {all[c].second, rounded(probability(c) / (s.norm_topk_prob ? kept : 1))};
        }
    }

    // The inner activations of the chosen experts.
    void run_experts() {
        const int64_t choices = step.n * top_k, size = worker.share_of(w.experts_in, choices * inner, 2 * s.width);
        const int64_t pieces = (inner + size - 1) / size;
        worker.for_each(choices * pieces, [&](int64_t item) {
            const int64_t c = item / pieces, r = c / top_k, first = item % pieces * size;
            const int64_t last = std::min(first + size, inner), base = chosen[c].expert * 2 * inner + first;
            real* to = &step.hidden[r * columns + c % top_k * inner + first];
            const real* in = &worker.normed[r * s.width];
            worker.swiglu(w.experts_in, base, w.experts_in, base + inner, last - first, s.width, in,
                          [&](int64_t i, real v) { to[i] = v; });
        });
    }

    // Columns `first` up to `last` of the residual stream: the experts' outputs, weighed, and the shared one's.
    void add_outputs(int64_t first, int64_t last) {
        Numbers<real>& sums = worker.scratch;
        sums.resize(last - first);
        for (int64_t r = 0; r < step.n; r++) {
            const real* own = &step.hidden[r * columns];
            std::fill(sums.begin(), sums.end(), real(0));
            for (int64_t c = r * top_k; c < r * top_k + top_k; c++, own += inner) {
                const int64_t base = chosen[c].expert * s.width;
                worker.rows(w.experts_out, base + first, base + last, inner, own, [&](int64_t row, real v) {
                    real& sum = sums[row - base - first];
                    sum = rounded(sum + rounded(v) * chosen[c].weight);
                });
            }
            const real weight = sparse ? rounded(sigmoid(step.shared_weight[r])) : 1;
            worker.rows(w.shared_down, first, last, shared, own, [&](int64_t row, real v) {
                const real out = sparse ? rounded(sums[row - first] + rounded(weight * rounded(v))) : rounded(v);
                step.add_to_stream(r, row, out);
            });
        }
    }
};

}  // namespace
