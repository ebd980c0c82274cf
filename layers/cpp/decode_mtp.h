// The MTP layer: qwen3next/mtp.py for the pair of a hidden state and the token after it, one pair a token.
//
// A pair enters as fc([norm(embedding); norm(hidden state)]) and goes through one block. What it leaves in the layer's
// cache and what it predicts depend, as in a step, on its own sequence alone.
#pragma once

namespace {

// The residual stream of all pairs.
template <class T>
void pair_up(Worker<T>& worker, const EmbeddingAndHead& ends, const void* hidden) {
    typedef Real<T> real;
    Step<T>& step = worker.step;
    const int64_t width = worker.s.width;
    Numbers<real> pairs(step.n * 2 * width);  // made by each thread for itself, as the normed stream
    for (int64_t r = 0; r < step.n; r++) {
        real *embedding = &pairs[r * 2 * width], *before = embedding + width;
        load_all(ends.embedding.p, ends.embedding.dtype, step.call.ids[step.first + r] * width, width, embedding);
        load_all(hidden, worker.s.dtype, (step.first + r) * width, width, before);
        worker.rms_norm(embedding, embedding, 1, width, ends.norm_embedding);
        worker.rms_norm(before, before, 1, width, ends.norm_hidden);
    }
    worker.operands.read(pairs.data(), step.n, 2 * width, orders_of(ends.fc));
    const Linear fc[] = {{ends.fc, ends.fc_bias, width}};
    worker.products(fc, 2 * width, worker.operands.all(), [&](int, int64_t r, int64_t row, int64_t n, real* v) {
        std::copy_n(v, n, &step.x[r * width + row]);
    });
}

template <class T>
void remember_pairs_of(const Sizes& s, const Layer& layer, const EmbeddingAndHead& ends, const Call& call,
                       const void* hidden, int64_t threads) {
    each_group(call, [&](int64_t begin, int64_t end) {
        Step<T> step(s, call, begin, end, threads);
        pool().run(threads, [&] {
            Worker<T> worker(step);
            pair_up(worker, ends, hidden);
            worker.norm_stream(layer.norm_in, orders_of(layer.attention.k, layer.attention.v));
            AttentionStep<T>(worker, layer).remember();
        });
    });
}

// The place of the largest of n numbers, the first of equal ones; NaN is the largest, as in torch.
template <class T>
int64_t largest(const T* x, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 0; i < n; i++) {
        const auto v = to_float(x[i]), most = to_float(x[best]);
        if (v != v) return i;
        if (v > most) best = i;
    }
    return best;
}

// Draft j of a row is the pair of its draft j - 1 and of the layer's own hidden state behind that.
template <class T>
void draft_of(const Sizes& s, const Layer& layer, const EmbeddingAndHead& ends, Call call, const void* hidden,
              int64_t count, int64_t* drafts, int64_t threads) {
    const int64_t n = call.row_count;
    std::vector<Row> rows(call.rows, call.rows + n);
    std::vector<int64_t> ids(call.ids, call.ids + n);
    call.rows = rows.data(), call.ids = ids.data();
    for (int64_t j = 0; j < count; j++, call.cos += n, call.sin += n, hidden = call.hidden) {
        each_group(call, [&](int64_t begin, int64_t end) {
            Step<T> step(s, call, begin, end, threads);
            pool().run(threads, [&] {
                Worker<T> worker(step);
                pair_up(worker, ends, hidden);
                all_layers(worker, &layer, ends);
            });
        });
        for (int64_t r = 0; r < n; r++) {
            ids[r] = drafts[r * count + j] = largest((const T*)call.logits + r * ends.vocab, ends.vocab);
            rows[r].past++;
        }
    }
}

}  // namespace
