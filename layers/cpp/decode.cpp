// One step of decoding on a CPU: a few new tokens through all layers, bound by the reading of weights.
//
// In torch a step is some hundred small operations a layer, each with its dispatch, its threads and its temporaries,
// and a matrix-vector product that reads memory at a fraction of its speed. Here a step is one call. It follows
// layers/*.py operation by operation, rounds to the model's dtype where they store a tensor, and reads all weights in
// place. Its files: decode_arguments.h (what Python passes), threads.h, vectors.h, decode_step.h (what layers share),
// and one for each kind of layer.

#include "decode_attention.h"
#include "decode_deltanet.h"
#include "decode_feed_forward.h"

namespace {

template <class real>
void embed(Step<real>& step, const EmbeddingAndHead& ends) {
    const int64_t width = step.s.width;
    for (int64_t r = 0; r < step.n; r++)
        load_all(ends.embedding.p, ends.embedding.dtype, ends.ids[r] * width, width, &step.x[r * width]);
}

// The final norm of all tokens, and the head for each sequence's last one.
template <class real>
void predict(Worker<real>& worker, const EmbeddingAndHead& ends) {
    const Sizes& s = worker.s;
    worker.norm_stream(ends.norm);
    Numbers<real>& last = worker.scratch;
    last.resize(s.b * s.width);
    for (int64_t i = 0; i < s.b; i++)
        memcpy(&last[i * s.width], &worker.normed[((i + 1) * s.t - 1) * s.width], s.width * sizeof(real));
    const Linear head[] = {{ends.head, {}, ends.vocab}};
    worker.products(head, s.width, last, s.b, [&](int, int64_t row, int64_t i, real v) {
        save(ends.logits, s.dtype, i * ends.vocab + row, v);
        if (row == 0 && i == 0) save_all(ends.hidden, s.dtype, 0, worker.step.n * s.width, worker.normed.data());
    });
}

template <class real>
void all_layers(Step<real>& step, const Layer* layers, const EmbeddingAndHead& ends) {
    Worker<real> worker(step);
    for (int64_t i = 0; i < step.s.layers; i++) {
        worker.norm_stream(layers[i].norm_in);
        if (layers[i].softmax) AttentionStep<real>(worker, layers[i]).run();
        else DeltaNetStep<real>(worker, layers[i]).run();
        worker.norm_stream(layers[i].norm_post);
        FeedForwardStep<real>(worker, layers[i]).run();
    }
    predict(worker, ends);
}

template <class real>
void decode(const Sizes& s, const Layer* layers, const EmbeddingAndHead& ends, const int64_t* past,
            const void* const* cos, const void* const* sin, int64_t threads) {
    Step<real> step(s, past, cos, sin, threads);
    embed(step, ends);
    pool().run(threads, [&] { all_layers(step, layers, ends); });
}

template <class real>
void multiply(const Mat& w, int64_t rows, int64_t columns, int64_t n, const void* in, void* out, int64_t dtype,
              int64_t threads) {
    Numbers<real> x(n * columns);
    load_all(in, dtype, 0, n * columns, x.data());
    Sizes s{};
    s.dtype = dtype, s.layers = 1;  // for a phase
    Step<real> step(s, nullptr, nullptr, nullptr, threads);
    const Linear all[] = {{w, {}, rows}};
    pool().run(threads, [&] {
        Worker<real> worker(step);
        worker.products(all, columns, x, n, [&](int, int64_t row, int64_t r, real v) {
            save(out, dtype, r * rows + row, v);
        });
    });
}

// One memory (key_dim, value_dim) after n tokens, whose keys, deltas and decays lie some elements apart.
template <class real>
void replay_head(real* S, const Sizes& s, int64_t n, const real* keys, const real* deltas, const real* decay) {
    const int64_t dk = s.key_dim, dv = s.value_dim;
    for (int64_t t = 0; t < n; t++) {
        const real d = *decay;
        for (int64_t e = 0; e < dk; e++)
#pragma omp simd
            for (int64_t c = 0; c < dv; c++) S[e * dv + c] = add_outer(S[e * dv + c] * d, keys[e], deltas[c]);
        keys += s.key_heads * dk, deltas += s.value_heads * dv, decay += s.value_heads;
    }
}

template <class real>
void replay_all(const Sizes& s, real* memory, const real* keys, const real* deltas, const real* decay, int64_t n) {
    const int64_t dk = s.key_dim, dv = s.value_dim, share = s.value_heads / s.key_heads;
    for (int64_t i = 0; i < s.b; i++)
        for (int64_t h = 0; h < s.value_heads; h++) {
            const int64_t head = i * n * s.value_heads + h, key_head = i * n * s.key_heads + h / share;
            replay_head(memory + (i * s.value_heads + h) * dk * dv, s, n, keys + key_head * dk, deltas + head * dv,
                        decay + head);
        }
}

}  // namespace

extern "C" {

// Tokens to hidden states after the final norm, and to logits after each sequence's last one.
void decode_step(const Sizes* s, Layer* layers, const EmbeddingAndHead* ends, const int64_t* past,
                 const void* const* cos, const void* const* sin, int64_t threads) {
    if (s->dtype == F64) decode<double>(*s, layers, *ends, past, cos, sin, threads);
    else decode<float>(*s, layers, *ends, past, cos, sin, threads);
}

// out (n, rows) = in (n, columns) times wᵀ.
void linear(const Mat* w, int64_t rows, int64_t columns, int64_t n, const void* in, void* out, int64_t dtype,
            int64_t threads) {
    if (dtype == F64) multiply<double>(*w, rows, columns, n, in, out, dtype, threads);
    else multiply<float>(*w, rows, columns, n, in, out, dtype, threads);
}

// memory (b, value_heads, key_dim, value_dim) after n more tokens, in place, to the bits that `decode_step` makes:
// keys (b, n, key_heads, key_dim), deltas (b, n, value_heads, value_dim), decay (b, n, value_heads).
void replay(const Sizes* s, void* memory, const void* keys, const void* deltas, const void* decay, int64_t n) {
    auto all = [&](auto* m) {
        typedef std::remove_pointer_t<decltype(m)> real;
        replay_all<real>(*s, m, (const real*)keys, (const real*)deltas, (const real*)decay, n);
    };
    if (s->dtype == F64) all((double*)memory);
    else all((float*)memory);
}

// Bytes of a structure, in the order of STRUCTURES in step.py, which compares them with its own.
int64_t structure_size(int64_t which) {
    const int64_t sizes[] = {sizeof(Mat), sizeof(Part), sizeof(DeltaNet), sizeof(Attention), sizeof(FeedForward),
                             sizeof(RecurrentState), sizeof(KeysAndValues), sizeof(Layer), sizeof(EmbeddingAndHead),
                             sizeof(Sizes)};
    return which >= 0 && which < int64_t(sizeof sizes / sizeof *sizes) ? sizes[which] : 0;
}
}
