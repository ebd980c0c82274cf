// One step of decoding on a CPU: a few new tokens of one or of many sequences through all layers.
//
// In torch a step is some hundred small operations a layer, each with its dispatch, its threads and its temporaries,
// and a matrix-vector product that reads memory at a fraction of its speed. Here a step is one call. It follows
// layers/*.py operation by operation, rounds to the model's dtype where they store a tensor, and reads all weights in
// place, once for all tokens. What a token's numbers are depends on its own sequence alone: on no other row, on no
// later token, and not on how many of them a call brings. Its files: decode_arguments.h (what Python passes),
// threads.h, vectors.h, decode_products.h (where all products are made), decode_step.h (what layers share), and one for
// each kind of layer.

#include "decode_attention.h"
#include "decode_deltanet.h"
#include "decode_feed_forward.h"
#include "decode_replay.h"

namespace {

constexpr int64_t TOKENS = 64;  // that go through the layers together, but that a row is not divided

template <class T>
void embed(Step<T>& step, const EmbeddingAndHead& ends) {
    const int64_t width = step.s.width;
    for (int64_t r = 0; r < step.n; r++)
        load_all(ends.embedding.p, ends.embedding.dtype, step.call.ids[step.first + r] * width, width,
                 &step.x[r * width]);
}

// The final norm of all tokens, and the head for those whose logits are wanted.
template <class T>
void predict(Worker<T>& worker, const EmbeddingAndHead& ends) {
    const Step<T>& step = worker.step;
    const Call& call = step.call;
    const int64_t width = worker.s.width, dtype = worker.s.dtype;
    worker.norm_stream(ends.norm, orders_of(ends.head));
    worker.for_each(1, [&](int64_t) {
        save_all(call.hidden, dtype, step.first * width, step.n * width, worker.normed.data());
    });
    const int64_t* begin = std::lower_bound(call.wanted, call.wanted + call.wanted_count, step.first);
    const int64_t* end = std::lower_bound(begin, call.wanted + call.wanted_count, step.first + step.n);
    std::vector<int64_t> tokens(begin, end);
    for (int64_t& token : tokens) token -= step.first;
    const Linear head[] = {{ends.head, {}, tokens.empty() ? 0 : ends.vocab}};
    const Vectors<T> x = worker.stream.pick(tokens.data(), int64_t(tokens.size()));
    worker.products(head, width, x, [&](int, int64_t i, int64_t row, int64_t n, Real<T>* values) {
        save_all(call.logits, dtype, (begin - call.wanted + i) * ends.vocab + row, n, values);
    });
}

// Call `use` with the first row and the end of each group of rows that go through the layers together.
template <class Use>
void each_group(const Call& call, Use&& use) {
    for (int64_t begin = 0, end; begin < call.row_count; begin = end) {
        int64_t tokens = call.rows[begin].count;
        for (end = begin + 1; end < call.row_count && tokens + call.rows[end].count <= TOKENS; end++)
            tokens += call.rows[end].count;
        use(begin, end);
    }
}

template <class T>
int mixer_orders(const Layer& layer) {
    return layer.softmax ? AttentionStep<T>::orders(layer.attention) : DeltaNetStep<T>::orders(layer.delta_net);
}

template <class T>
void all_layers(Worker<T>& worker, const Layer* layers, const EmbeddingAndHead& ends) {
    for (int64_t i = 0; i < worker.s.layers; i++) {
        worker.norm_stream(layers[i].norm_in, mixer_orders<T>(layers[i]));
        if (layers[i].softmax) AttentionStep<T>(worker, layers[i]).run();
        else DeltaNetStep<T>(worker, layers[i]).run();
        worker.norm_stream(layers[i].norm_post, FeedForwardStep<T>::orders(layers[i].feed_forward));
        FeedForwardStep<T>(worker, layers[i]).run();
    }
    predict(worker, ends);
}

template <class T>
void decode(const Sizes& s, const Layer* layers, const EmbeddingAndHead& ends, const Call& call, int64_t threads) {
    each_group(call, [&](int64_t begin, int64_t end) {
        Step<T> step(s, call, begin, end, threads);
        embed(step, ends);
        pool().run(threads, [&] {
            Worker<T> worker(step);
            all_layers(worker, layers, ends);
        });
    });
}

template <class T>
void multiply(const Mat& w, int64_t rows, int64_t columns, int64_t n, const void* in, void* out, int64_t dtype,
              int64_t threads) {
    Numbers<Real<T>> x(n * columns);
    load_all(in, dtype, 0, n * columns, x.data());
    Sizes s{};
    s.dtype = dtype;
    const Row all_of_it{0, 0, 0, n, 0};
    Call call{};
    call.rows = &all_of_it, call.row_count = 1;
    Step<T> step(s, call, 0, 1, threads);
    const Linear all[] = {{w, {}, rows}};
    pool().run(threads, [&] {
        Worker<T> worker(step);
        worker.operands.read(x.data(), n, columns, orders_of(w));
        worker.products(all, columns, worker.operands.all(), [&](int, int64_t r, int64_t row, int64_t count, auto* v) {
            save_all(out, dtype, r * rows + row, count, v);
        });
    });
}

}  // namespace

#include "decode_mtp.h"

extern "C" {

// Tokens to hidden states after the final norm, and to logits after those of them whose logits are wanted.
void decode_step(const Sizes* s, const Layer* layers, const EmbeddingAndHead* ends, const Call* call,
                 int64_t threads) {
    if (s->dtype == F64) decode<double>(*s, layers, *ends, *call, threads);
    else if (s->dtype == BF16) decode<bf16>(*s, layers, *ends, *call, threads);
    else decode<float>(*s, layers, *ends, *call, threads);
}

// out (n, rows) = in (n, columns) times wᵀ.
void linear(const Mat* w, int64_t rows, int64_t columns, int64_t n, const void* in, void* out, int64_t dtype,
            int64_t threads) {
    if (dtype == F64) multiply<double>(*w, rows, columns, n, in, out, dtype, threads);
    else if (dtype == BF16) multiply<bf16>(*w, rows, columns, n, in, out, dtype, threads);
    else multiply<float>(*w, rows, columns, n, in, out, dtype, threads);
}

// All rows of a weight in groups, in fp32 or bf16.
void dequantise(const Mat* w, int64_t rows, int64_t columns, void* out, int64_t dtype) {
    constexpr int64_t TILE = 16;  // rows
#pragma omp parallel for
    for (int64_t tile = 0; tile < (rows + TILE - 1) / TILE; tile++) {
        const int64_t first = tile * TILE, last = std::min(rows, first + TILE);
        if (dtype == BF16) Dequantised(*w, columns).read(first, last, (bf16*)out + first * columns);
        else Dequantised(*w, columns).read(first, last, (float*)out + first * columns);
    }
}

// memory (b, value_heads, key_dim, value_dim) after n more tokens, in place, to the bits that `decode_step` makes:
// keys (b, n, key_heads, key_dim), deltas (b, n, value_heads, value_dim), decay (b, n, value_heads).
void replay(const Sizes* s, int64_t b, void* memory, const void* keys, const void* deltas, const void* decay,
            int64_t n) {
    auto all = [&](auto* m) {
        typedef std::remove_pointer_t<decltype(m)> real;
        replay_all<real>(*s, b, m, (const real*)keys, (const real*)deltas, (const real*)decay, n);
    };
    if (s->dtype == F64) all((double*)memory);
    else all((float*)memory);
}

// Keys and values of an MTP layer's pairs: tokens `call->ids` and, in `hidden`, the model's hidden states before them.
void remember_pairs(const Sizes* s, const Layer* layer, const EmbeddingAndHead* ends, const Call* call,
                    const void* hidden, int64_t threads) {
    if (s->dtype == F64) remember_pairs_of<double>(*s, *layer, *ends, *call, hidden, threads);
    else if (s->dtype == BF16) remember_pairs_of<bf16>(*s, *layer, *ends, *call, hidden, threads);
    else remember_pairs_of<float>(*s, *layer, *ends, *call, hidden, threads);
}

// The `count` most likely tokens (rows, count) behind a pair of each row; the call brings cos and sin of (count, rows)
// positions. Its hidden states and logits are then those of the last draft.
void draft(const Sizes* s, const Layer* layer, const EmbeddingAndHead* ends, const Call* call, const void* hidden,
           int64_t count, int64_t* drafts, int64_t threads) {
    if (s->dtype == F64) draft_of<double>(*s, *layer, *ends, *call, hidden, count, drafts, threads);
    else if (s->dtype == BF16) draft_of<bf16>(*s, *layer, *ends, *call, hidden, count, drafts, threads);
    else draft_of<float>(*s, *layer, *ends, *call, hidden, count, drafts, threads);
}

// States of `layers` Gated DeltaNet layers of a cache of b rows after the first counts[row] of a call's n tokens, from
// those before it and its update log, to the bits that `decode_step` makes.
void fold(const Sizes* s, const RecurrentState* states, int64_t layers, int64_t b, int64_t n, const int64_t* counts,
          int64_t threads) {
    if (s->dtype == F64) fold_all<double>(*s, states, layers, b, n, counts, threads);
    else if (s->dtype == BF16) fold_all<bf16>(*s, states, layers, b, n, counts, threads);
    else fold_all<float>(*s, states, layers, b, n, counts, threads);
}

// Bytes of a structure, in the order of STRUCTURES in step.py, which compares them with its own.
int64_t structure_size(int64_t which) {
    const int64_t sizes[] = {sizeof(Mat), sizeof(Part), sizeof(DeltaNet), sizeof(Attention), sizeof(FeedForward),
                             sizeof(RecurrentState), sizeof(KeysAndValues), sizeof(Layer), sizeof(EmbeddingAndHead),
                             sizeof(Row), sizeof(Call), sizeof(Sizes)};
    return which >= 0 && which < int64_t(sizeof sizes / sizeof *sizes) ? sizes[which] : 0;
}
}
