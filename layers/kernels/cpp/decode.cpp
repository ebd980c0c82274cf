// One step of decoding on a CPU: a few new tokens through all layers, bound by the reading of weights.
//
// In torch a step is some hundred small operations a layer, each with its dispatch, its threads and its temporaries,
// and a matrix-vector product that reads memory at a fraction of its speed. Here a step is one call. It follows
// layers/*.py operation by operation, rounds to the model's dtype where they do (R), and reads all weights in place.
//
// Threads: work comes in phases of many small items. A thread takes items until none is left and goes on when all are
// done, so nobody waits for a thread that the system has put aside before it took any. (OpenMP's regions do: beside other
// busy processes they took a third of a step.)
//
// Letters: n = b * t new tokens, row r = i * t + j of sequence i; real = the arithmetic, float or double.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <sched.h>
#include <thread>
#include <type_traits>
#include <vector>

#include "kernels.h"

enum Dtype : int64_t { F32, BF16, F64, I8 };

struct Mat { const void* p; int64_t dtype; };  // contiguous; p is null where the model has none

struct Part {  // neighbouring places of keys and values, (b, kv_heads, n, head_dim), and scales where they are int8
    void *k, *v, *k_scale, *v_scale;
    int64_t n, row, head, scale_row, scale_head;  // strides in elements
};

struct DeltaNet { Mat in_qkv, in_z, in_b, in_a, conv, a_log, dt_bias, out_norm, out; };
struct Attention { Mat q, q_bias, k, k_bias, v, v_bias, gate, gate_bias, o, o_bias, q_norm, k_norm; int64_t gate_rows; };
struct FeedForward { Mat router, experts_in, experts_out, shared_gate, shared_up, shared_down, shared_weight; };
struct RecurrentState {
    const void* conv_before; void* conv_after; const void* before; void* after; int64_t dtype;
    void *log_inputs, *log_keys, *log_deltas, *log_decay;
};
struct KeysAndValues { const Part* parts; int64_t count, dtype; };
struct Layer {
    int64_t softmax, sparse;
    Mat norm_in, norm_post;
    DeltaNet delta_net; Attention attention; FeedForward feed_forward; RecurrentState recurrent; KeysAndValues kv;
};

struct Sizes {
    int64_t layers, b, t, width, dtype;
    int64_t heads, kv_heads, head_dim, rotary, zero_centred;
    int64_t key_heads, value_heads, key_dim, value_dim, taps;
    int64_t experts, top_k, inner, shared_inner, dense_inner, renormalise;
    double eps;
};

struct EmbeddingAndHead {  // what stands before the first layer and after the last
    Mat embedding, norm, head;
    const int64_t* ids;     // (b, t)
    void *hidden, *logits;  // (b, t, width), (b, vocab)
    int64_t vocab;
};

namespace {

constexpr int64_t GROUP = 4;      // queries that read a key or value together
constexpr int64_t KEYS = 512;      // of a context that one item of attention looks at
// Of weights that one item of a product reads, at most: less, and threads disturb each other's reading ahead.
constexpr int64_t BYTES = 1 << 18;

inline float as_float(uint16_t x) { uint32_t u = uint32_t(x) << 16; float y; memcpy(&y, &u, 4); return y; }
inline float as_number(uint16_t bf16) { return as_float(bf16); }
inline float as_number(float x) { return x; }
inline double as_number(double x) { return x; }
inline uint16_t as_bf16(float x) {  // to nearest, ties to even, as torch does
    uint32_t u; memcpy(&u, &x, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

struct Phase { std::atomic<int64_t> next{0}, done{0}; };

inline void pause(int& turns) {
    if (++turns > 4000) sched_yield();
#if defined(__x86_64__)
    else __builtin_ia32_pause();
#endif
}

// Helpers that join in a job where they can and leave before it ends; the one who gives the job does what they do not.
class Pool {
    std::atomic<uint32_t> number{0};      // of the latest job; changes wake the helpers
    std::atomic<int64_t> inside{0};
    std::atomic<const std::function<void()>*> job{nullptr};
    std::mutex one_at_a_time;
    int64_t helpers = 0;

    void help() {
        for (uint32_t seen = 0;;) {
            uint32_t now = number.load();
            for (int turns = 0; now == seen && turns < 20000; now = number.load()) pause(turns);  // a step follows soon
            if (now == seen) number.wait(seen);
            seen = number.load();
            inside.fetch_add(1);
            if (auto* work = job.load()) (*work)();
            inside.fetch_sub(1);
        }
    }

public:
    void run(int64_t threads, const std::function<void()>& work) {
        std::lock_guard<std::mutex> lock(one_at_a_time);
        for (; helpers < threads - 1; helpers++) std::thread([this] { help(); }).detach();
        if (threads > 1) {
            job.store(&work);
            number.fetch_add(1);
            number.notify_all();
        }
        work();
        job.store(nullptr);
        for (int turns = 0; inside.load() > 0;) pause(turns);
    }
};
Pool& pool() { static Pool* one = new Pool; return *one; }  // never destroyed: its threads end with the process

template <class real> real load(const void* p, int64_t dtype, int64_t i) {
    switch (dtype) {
        case F32: return ((const float*)p)[i];
        case BF16: return as_float(((const uint16_t*)p)[i]);
        case F64: return real(((const double*)p)[i]);
        default: return ((const int8_t*)p)[i];
    }
}
template <class real> void store(void* p, int64_t dtype, int64_t i, real x) {
    switch (dtype) {
        case F32: ((float*)p)[i] = float(x); break;
        case BF16: ((uint16_t*)p)[i] = as_bf16(float(x)); break;
        default: ((double*)p)[i] = x;
    }
}

// Neighbours at a time: the choice of a type stands outside the loop.
template <class real> void load_all(const void* p, int64_t dtype, int64_t at, int64_t n, real* __restrict to) {
    if (dtype == BF16) { const uint16_t* v = (const uint16_t*)p + at; for (int64_t i = 0; i < n; i++) to[i] = as_float(v[i]); }
    else if (dtype == F32) { const float* v = (const float*)p + at; for (int64_t i = 0; i < n; i++) to[i] = v[i]; }
    else { const double* v = (const double*)p + at; for (int64_t i = 0; i < n; i++) to[i] = real(v[i]); }
}
template <class real> void store_all(void* p, int64_t dtype, int64_t at, int64_t n, const real* __restrict from) {
    if (dtype == BF16) { uint16_t* v = (uint16_t*)p + at; for (int64_t i = 0; i < n; i++) v[i] = as_bf16(float(from[i])); }
    else if (dtype == F32) { float* v = (float*)p + at; for (int64_t i = 0; i < n; i++) v[i] = float(from[i]); }
    else { double* v = (double*)p + at; for (int64_t i = 0; i < n; i++) v[i] = from[i]; }
}

// 64 bytes of `real` at a time, in the compiler's own vectors: on any machine, and as fast as memory is read.
template <class T, int bytes> struct Vector { typedef T type __attribute__((vector_size(bytes), aligned(alignof(T)))); };
template <class real> using Wide = typename Vector<real, 64>::type;
template <class real> constexpr int64_t LANES = 64 / sizeof(real);

template <class real, class W> Wide<real> widen(const W* p) {
    if constexpr (std::is_same_v<W, uint16_t>) {  // bf16 is the upper half of a float
        typedef typename Vector<uint16_t, 2 * LANES<real>>::type Half;
        typedef typename Vector<uint32_t, 4 * LANES<real>>::type Bits;
        typedef typename Vector<float, 4 * LANES<real>>::type Floats;
        Bits bits = __builtin_convertvector(*(const Half*)p, Bits) << 16;
        Floats floats;
        memcpy(&floats, &bits, sizeof floats);
        return __builtin_convertvector(floats, Wide<real>);
    } else if constexpr (std::is_same_v<W, real>) {
        return *(const Wide<real>*)p;
    } else {
        typedef typename Vector<W, LANES<real> * sizeof(W)>::type Same;
        return __builtin_convertvector(*(const Same*)p, Wide<real>);
    }
}
template <class real> real sum_of(Wide<real> v) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<real, float>) return _mm512_reduce_add_ps((__m512)v);  // the halves as below
#endif
    real x[LANES<real>];
    memcpy(x, &v, sizeof v);
    for (int64_t half = LANES<real> / 2; half; half /= 2)
        for (int64_t i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}
template <class real, class W> real dot(const W* __restrict w, const real* __restrict x, int64_t n) {
    Wide<real> a = {}, b = {};
    int64_t i = 0;
    for (constexpr int64_t L = LANES<real>; i + 2 * L <= n; i += 2 * L) {
        a += widen<real>(w + i) * widen<real>(x + i);
        b += widen<real>(w + i + L) * widen<real>(x + i + L);
    }
    real s = sum_of<real>(a + b);
    for (; i < n; i++) s += real(as_number(w[i])) * x[i];
    return s;
}

template <class real> real sigmoid(real x) { return 1 / (1 + std::exp(-x)); }
template <class real> real silu(real x) { return x / (1 + std::exp(-x)); }
// Rounded once, here and in `replay`, so that both make the same bits.
template <class real> real written(real s, real key, real u) { return std::fma(key, u, s); }
template <class real> real softplus(real x) { return x > 20 ? x : std::log1p(std::exp(x)); }

template <class real> struct Step {
    const Sizes& s; std::vector<Phase>& phases;
    Step(const Sizes& sizes, std::vector<Phase>& all) : s(sizes), phases(all) {}
    Layer* layers; const int64_t* past;
    const void *const *cos, *const *sin;  // of each token's position: (rotary,) in the model's dtype
    real* x;  // (n, width) the residual stream
    // Shared by all threads.
    std::vector<real> qkv, z, b_logit, a, q, gate, mixed, logits, hidden, shared_weight, partial;
    std::vector<real> k_new, v_new;
    int64_t n, bf16, threads;

    // To the model's dtype and back, where torch would store a tensor.
    real R(real v) const { return bf16 ? real(as_float(as_bf16(float(v)))) : v; }

    // Items of one phase, shared out among the threads; returns when all are done.
    template <class Do> void run(int64_t& phase, int64_t items, Do&& item) {
        Phase& p = phases[phase++];
        for (int64_t i; (i = p.next.fetch_add(1, std::memory_order_relaxed)) < items;) {
            item(i);
            p.done.fetch_add(1, std::memory_order_release);
        }
        for (int turns = 0; p.done.load(std::memory_order_acquire) < items;) pause(turns);
    }

    // Rows of several matrices times all of `in` (n, columns): give(matrix, row, token, value), biases added. Where a
    // matrix has a partner, `up`, the value is silu(its) * the partner's. A router kept in fp32 is not rounded.
    struct Linear { Mat w, bias; int64_t rows; Mat up = {}; };
    template <int count, class Give>
    void products(int64_t& phase, const Linear (&w)[count], int64_t columns, const std::vector<real>& in, Give&& give) {
        products(phase, w, columns, in, n, give);
    }
    template <int count, class Give>
    void products(int64_t& phase, const Linear (&w)[count], int64_t columns, const std::vector<real>& in, int64_t vectors, Give&& give) {
        int64_t begin[count + 1] = {0}, size[count];
        for (int m = 0; m < count; m++) {
            size[m] = share_of(w[m].w, w[m].rows, columns * (w[m].up.p ? 2 : 1));
            begin[m + 1] = begin[m] + (w[m].rows + size[m] - 1) / size[m];
        }
        run(phase, begin[count], [&](int64_t item) {
            int m = 0;
            while (item >= begin[m + 1]) m++;
            int64_t first = (item - begin[m]) * size[m], last = std::min(first + size[m], w[m].rows);
            auto add = [&](int64_t row) { return w[m].bias.p ? load<real>(w[m].bias.p, w[m].bias.dtype, row) : 0; };
            for (int64_t r = 0; r < vectors; r++)
                if (w[m].up.p) swiglu(w[m].w, first, w[m].up, first, last - first, columns, &in[r * columns], [&](int64_t i, real v) { give(m, first + i, r, v); });
                else rows(w[m].w, first, last, columns, in.data() + r * columns, [&](int64_t row, real v) { give(m, row, r, w[m].w.dtype == s.dtype ? R(v + add(row)) : v + add(row)); });
        });
    }

    // Rows that one item takes of `rows` in all, so that each thread gets four, but for small matrices.
    int64_t share_of(Mat w, int64_t rows, int64_t columns) const {
        int64_t bytes = columns * (w.dtype == BF16 ? 2 : w.dtype == F64 ? 8 : 4), wanted = rows * bytes / (4 * threads);
        return std::max<int64_t>(1, std::clamp<int64_t>(wanted, 1 << 13, BYTES) / bytes);
    }
    // silu(gate) * up for `count` rows of each.
    template <class Give>
    void swiglu(Mat gate, int64_t gate_first, Mat up, int64_t up_first, int64_t count, int64_t columns, const real* in, Give&& give) const {
        real g[64];
        for (int64_t begin = 0; begin < count; begin += 64) {
            int64_t size = std::min<int64_t>(64, count - begin), from = gate_first + begin, up_from = up_first + begin;
            rows(gate, from, from + size, columns, in, [&](int64_t row, real v) { g[row - from] = R(silu(R(v))); });
            rows(up, up_from, up_from + size, columns, in, [&](int64_t row, real v) { give(begin + row - up_from, R(g[row - up_from] * R(v))); });
        }
    }
    // Rows `first` up to `last` of a matrix times one vector.
    template <class Give> static void rows(Mat w, int64_t first, int64_t last, int64_t columns, const real* in, Give&& give) {
        switch (w.dtype) {
            case F32: return rows_of((const float*)w.p, first, last, columns, in, give);
            case BF16: return rows_of((const uint16_t*)w.p, first, last, columns, in, give);
            default: return rows_of((const double*)w.p, first, last, columns, in, give);
        }
    }
    template <class W, class Give>
    static void rows_of(const W* w, int64_t first, int64_t last, int64_t columns, const real* in, Give&& give) {
        for (int64_t row = first; row < last; row++) give(row, dot(w + row * columns, in, columns));
    }

    // RMSNorm of one vector, in the order of layers/norm.py.
    void rms_norm(const real* in, real* out, int64_t size, Mat w, bool zero_centred) const {
        real sum = 0;
        for (int64_t i = 0; i < size; i++) sum += in[i] * in[i];
        real scale = 1 / std::sqrt(sum / size + real(s.eps));
        for (int64_t i = 0; i < size; i++) {
            real weight = load<real>(w.p, w.dtype, i);
            out[i] = zero_centred ? R(in[i] * scale * (1 + weight)) : R(weight * R(in[i] * scale));
        }
    }
    // The normed stream is made by each thread for itself: cheaper than waiting for one that makes it.
    void normed(std::vector<real>& out, Mat w) const {
        out.resize(n * s.width);
        for (int64_t r = 0; r < n; r++) rms_norm(x + r * s.width, &out[r * s.width], s.width, w, s.zero_centred);
    }

    void delta_net(int64_t& phase, const Layer& l, std::vector<real>& y, std::vector<real>& scratch) {
        int64_t keys = s.key_heads * s.key_dim, values = s.value_heads * s.value_dim, channels = 2 * keys + values;
        normed(y, l.norm_in);
        const Linear in[] = {{l.delta_net.in_qkv, {}, channels}, {l.delta_net.in_z, {}, values}, {l.delta_net.in_b, {}, s.value_heads}, {l.delta_net.in_a, {}, s.value_heads}};
        real* to[] = {qkv.data(), z.data(), b_logit.data(), a.data()};
        int64_t width[] = {channels, values, s.value_heads, s.value_heads};
        products(phase, in, s.width, y, [&](int m, int64_t row, int64_t r, real v) {
            to[m][r * width[m] + row] = v;
            if (m == 0 && l.recurrent.log_inputs) store(l.recurrent.log_inputs, s.dtype, r * channels + row, v);
        });
        run(phase, s.b * s.value_heads, [&](int64_t item) { delta_head(l, item / s.value_heads, item % s.value_heads, keys, channels, scratch); });
        const Linear out[] = {{l.delta_net.out, {}, s.width}};
        products(phase, out, values, mixed, [&](int, int64_t row, int64_t r, real v) { real& to = x[r * s.width + row]; to = R(to + v); });
    }

    // One value head of one sequence: convolution of its q, k and v, the delta rule, the gated norm.
    void delta_head(const Layer& l, int64_t i, int64_t h, int64_t keys, int64_t channels, std::vector<real>& scratch) {
        int64_t share = s.value_heads / s.key_heads, kh = h / share, dk = s.key_dim, dv = s.value_dim, t = s.t;
        scratch.resize(t * (2 * dk + dv) + 2 * dv + dk * dv);
        real *qs = scratch.data(), *ks = qs + t * dk, *vs = ks + t * dk, *u = vs + t * dv, *o = u + dv, *S = o + dv;
        convolve(l, i, kh * dk, dk, channels, qs, h % share == 0);
        convolve(l, i, keys + kh * dk, dk, channels, ks, h % share == 0);
        convolve(l, i, 2 * keys + h * dv, dv, channels, vs, true);
        int64_t at = (i * s.value_heads + h) * dk * dv;
        load_all(l.recurrent.before, l.recurrent.dtype, at, dk * dv, S);
        real rate = std::exp(load<real>(l.delta_net.a_log.p, l.delta_net.a_log.dtype, h)), bias = load<real>(l.delta_net.dt_bias.p, l.delta_net.dt_bias.dtype, h);
        for (int64_t j = 0; j < t; j++) {
            int64_t r = i * t + j;
            real *q = qs + j * dk, *k = ks + j * dk, *v = vs + j * dv;
            l2_normalise(q, dk, 1 / std::sqrt(real(dk)));
            l2_normalise(k, dk, 1);
            real decay = std::exp(-rate * softplus(a[r * s.value_heads + h] + bias));
            real beta = sigmoid(b_logit[r * s.value_heads + h]);
            std::fill(u, u + dv, real(0));
            for (int64_t e = 0; e < dk; e++) {
                real key = k[e];
#pragma omp simd
                for (int64_t c = 0; c < dv; c++) { S[e * dv + c] *= decay; u[c] += key * S[e * dv + c]; }
            }
            for (int64_t c = 0; c < dv; c++) u[c] = beta * (v[c] - u[c]);
            std::fill(o, o + dv, real(0));
            for (int64_t e = 0; e < dk; e++) {
                real key = k[e], query = q[e];
#pragma omp simd
                for (int64_t c = 0; c < dv; c++) { S[e * dv + c] = written(S[e * dv + c], key, u[c]); o[c] += query * S[e * dv + c]; }
            }
            if (l.recurrent.log_deltas) {
                memcpy((real*)l.recurrent.log_deltas + (r * s.value_heads + h) * dv, u, dv * sizeof(real));
                ((real*)l.recurrent.log_decay)[r * s.value_heads + h] = decay;
                if (h % share == 0) memcpy((real*)l.recurrent.log_keys + (r * s.key_heads + kh) * dk, k, dk * sizeof(real));
            }
            real sum = 0;
            for (int64_t c = 0; c < dv; c++) { o[c] = R(o[c]); sum += o[c] * o[c]; }
            real scale = 1 / std::sqrt(sum / dv + real(s.eps));
            int64_t to = r * s.value_heads * dv + h * dv;
            for (int64_t c = 0; c < dv; c++)
                mixed[to + c] = R(R(load<real>(l.delta_net.out_norm.p, l.delta_net.out_norm.dtype, c) * R(o[c] * scale)) * silu(z[to + c]));
        }
        store_all(l.recurrent.after, l.recurrent.dtype, at, dk * dv, S);
    }

    // silu of the filter's sum over neighbouring channels, and, if `keep`, the inputs that the next step needs.
    void convolve(const Layer& l, int64_t i, int64_t first, int64_t count, int64_t channels, real* out, bool keep) {
        int64_t carried = s.taps - 1, rows = carried + s.t;
        std::vector<real>& in = window;  // (carried + t, count)
        in.resize(rows * count + count * s.taps);
        real* filter = &in[rows * count];
        for (int64_t j = 0; j < carried; j++) load_all(l.recurrent.conv_before, s.dtype, (i * carried + j) * channels + first, count, &in[j * count]);
        for (int64_t j = 0; j < s.t; j++) memcpy(&in[(carried + j) * count], &qkv[(i * s.t + j) * channels + first], count * sizeof(real));
        load_all(l.delta_net.conv.p, l.delta_net.conv.dtype, first * s.taps, count * s.taps, filter);
        for (int64_t j = 0; j < s.t; j++)
            for (int64_t c = 0; c < count; c++) {
                real sum = 0;
                for (int64_t tap = 0; tap < s.taps; tap++) {
                    real product = in[(j + tap) * count + c] * R(filter[c * s.taps + tap]);
                    sum += s.t == 1 ? R(product) : product;  // several tokens are convolved in fp32
                }
                out[j * count + c] = R(silu(R(sum)));
            }
        for (int64_t j = 0; keep && j < carried; j++)
            store_all(l.recurrent.conv_after, s.dtype, (i * carried + j) * channels + first, count, &in[(s.t + j) * count]);
    }
    static thread_local std::vector<real> window;

    static void l2_normalise(real* v, int64_t size, real factor) {
        real sum = 0;
        for (int64_t i = 0; i < size; i++) sum += v[i] * v[i];
        real scale = 1 / std::sqrt(sum + real(1e-6));
        for (int64_t i = 0; i < size; i++) v[i] = v[i] * scale * factor;
    }

    void attention(int64_t& phase, const Layer& l, std::vector<real>& y, std::vector<real>& scratch) {
        int64_t d = s.head_dim, share = s.heads / s.kv_heads;
        normed(y, l.norm_in);
        const Linear in[] = {{l.attention.q, l.attention.q_bias, s.heads * d}, {l.attention.k, l.attention.k_bias, s.kv_heads * d}, {l.attention.v, l.attention.v_bias, s.kv_heads * d},
                             {l.attention.gate, l.attention.gate_bias, s.heads * l.attention.gate_rows}};
        real* to[] = {q.data(), k_new.data(), v_new.data(), gate.data()};
        products(phase, in, s.width, y, [&](int m, int64_t row, int64_t r, real v) { to[m][r * in[m].rows + row] = v; });
        // Norm and rotation of each head; keys and values to their places.
        run(phase, n * (s.heads + s.kv_heads), [&](int64_t item) {
            int64_t r = item / (s.heads + s.kv_heads), h = item % (s.heads + s.kv_heads), position = past[r / s.t] + r % s.t;
            bool key = h >= s.heads;
            h -= key ? s.heads : 0;
            real* v = key ? &k_new[(r * s.kv_heads + h) * d] : &q[(r * s.heads + h) * d];
            Mat w = key ? l.attention.k_norm : l.attention.q_norm;
            if (w.p) rms_norm(v, v, d, w, s.zero_centred);
            rotate(v, r);
            if (key) keep(l, r / s.t, h, position, v, &v_new[(r * s.kv_heads + h) * d]);
        });
        // Each piece of the context gives a sum of values, its weight and its largest score, for all queries that share it.
        int64_t longest = 0;
        for (int64_t i = 0; i < s.b; i++) longest = std::max(longest, past[i] + s.t);
        int64_t pieces = (longest + KEYS - 1) / KEYS, each = s.t * share * (d + 2);
        run(phase, s.b * s.kv_heads * pieces, [&](int64_t item) {
            int64_t i = item / (s.kv_heads * pieces), h = item / pieces % s.kv_heads;
            look(l, i, h, item % pieces * KEYS, &partial[item * each], scratch);
        });
        run(phase, n * s.heads, [&](int64_t item) {
            int64_t r = item / s.heads, h = item % s.heads, i = r / s.t, j = r % s.t;
            const real* from = &partial[((i * s.kv_heads + h / share) * pieces) * each + (j * share + h % share) * (d + 2)];
            join(from, each, (past[i] + j) / KEYS + 1, &mixed[item * d]);
            for (int64_t c = 0; c < d && l.attention.gate_rows; c++)
                mixed[item * d + c] = R(mixed[item * d + c] * R(sigmoid(gate[item * l.attention.gate_rows + (l.attention.gate_rows > 1 ? c : 0)])));
        });
        const Linear out[] = {{l.attention.o, l.attention.o_bias, s.width}};
        products(phase, out, s.heads * d, mixed, [&](int, int64_t row, int64_t r, real v) { real& to = x[r * s.width + row]; to = R(to + v); });
    }

    void rotate(real* v, int64_t r) const {
        int64_t half = s.rotary / 2;
        for (int64_t c = 0; c < half; c++) {
            real cos_c = load<real>(cos[r], s.dtype, c), sin_c = load<real>(sin[r], s.dtype, c);
            real first = v[c], second = v[c + half];
            v[c] = R(R(first * cos_c) + R(-second * sin_c));
            v[c + half] = R(R(second * cos_c) + R(first * sin_c));
        }
    }

    // The part that holds a place; `place` becomes its number there.
    static const Part& find(const Layer& l, int64_t& place) {
        const Part* part = l.kv.parts;
        while (place >= part->n) place -= part++->n;
        return *part;
    }
    void keep(const Layer& l, int64_t i, int64_t h, int64_t place, const real* k, const real* v) const {
        const Part& part = find(l, place);
        int64_t d = s.head_dim, at = i * part.row + h * part.head + place * d;
        if (l.kv.dtype != I8) {
            for (int64_t c = 0; c < d; c++) { store(part.k, l.kv.dtype, at + c, k[c]); store(part.v, l.kv.dtype, at + c, v[c]); }
            return;
        }
        quantise(k, (int8_t*)part.k + at, (float*)part.k_scale + i * part.scale_row + h * part.scale_head + place);
        quantise(v, (int8_t*)part.v + at, (float*)part.v_scale + i * part.scale_row + h * part.scale_head + place);
    }
    void quantise(const real* v, int8_t* to, float* scale) const {
        float most = 0;
        for (int64_t c = 0; c < s.head_dim; c++) most = std::max(most, std::fabs(float(v[c])));
        *scale = most / 127;
        for (int64_t c = 0; c < s.head_dim; c++) to[c] = int8_t(std::nearbyint(float(v[c]) / std::max(*scale, 1e-30f)));
    }

    // Queries of one key head over the places from `first` on: (sum of weighed values, weights, largest score) a query.
    void look(const Layer& l, int64_t i, int64_t h, int64_t first, real* out, std::vector<real>& scratch) {
        int64_t d = s.head_dim, share = s.heads / s.kv_heads, queries = s.t * share;
        int64_t all = std::min(first + KEYS, past[i] + s.t) - first;
        scratch.resize(KEYS * (d + queries));
        real *wide = scratch.data(), *scores = wide + KEYS * d, root = 1 / std::sqrt(real(d));
        auto seen = [&](int64_t j) { return std::clamp<int64_t>(past[i] + j / share + 1 - first, 0, all); };
        const real* query[GROUP];
        with_rows(l, i, h, first, all, true, wide, [&](const auto* keys) {
            for (int64_t from = 0; from < queries; from += GROUP) {
                int64_t size = std::min(GROUP, queries - from);
                for (int64_t g = 0; g < size; g++) {
                    int64_t j = from + g;
                    query[g] = &q[((i * s.t + j / share) * s.heads + h * share + j % share) * d];
                }
                grouped(size, [&](auto g) {
                    constexpr int group = g.value;
                    if (!dots_in_bf16<group>(keys, seen(from + size - 1), d, query, scores + from * KEYS))
                        dots<group>(keys, seen(from + size - 1), d, query, scores + from * KEYS);
                });
            }
        });
        for (int64_t j = 0; j < queries; j++) {
            real *score = scores + j * KEYS, most = -INFINITY;
            int64_t count = seen(j), padded = (count + LANES<real> - 1) / LANES<real> * LANES<real>;
            std::fill(score + count, score + KEYS, -INFINITY);
            Wide<real> highest = Wide<real>{} - INFINITY, sum = {};
            for (int64_t place = 0; place < padded; place += LANES<real>) {
                Wide<real> part = widen<real>(score + place) * root;
                memcpy(score + place, &part, sizeof part);
                highest = part > highest ? part : highest;
            }
            for (int64_t lane = 0; lane < LANES<real>; lane++) most = std::max(most, highest[lane]);
            for (int64_t place = 0; place < padded; place++) score[place] = raised(score[place] - most);
            std::fill(score + padded, score + KEYS, real(0));
            for (int64_t place = 0; place < padded; place += LANES<real>) sum += widen<real>(score + place);
            out[j * (d + 2) + d] = sum_of<real>(sum), out[j * (d + 2) + d + 1] = most;
        }
        with_rows(l, i, h, first, all, false, wide, [&](const auto* values) {
            for (int64_t from = 0; from < queries; from += GROUP) {
                int64_t size = std::min(GROUP, queries - from);
                grouped(size, [&](auto g) { weigh<g.value>(values, seen(from + size - 1), d, scores + from * KEYS, out + from * (d + 2)); });
            }
        });
    }
    // Calls `use` with the number of queries, at most GROUP, as a constant.
    template <class Use> static void grouped(int64_t size, Use&& use) {
        switch (size) {
            case 1: return use(std::integral_constant<int, 1>());
            case 2: return use(std::integral_constant<int, 2>());
            case 3: return use(std::integral_constant<int, 3>());
            default: return use(std::integral_constant<int, 4>());
        }
    }
    static float raised(float x) { return ::exponential(x); }
    static double raised(double x) { return std::exp(x); }

    // out[j][place] = row `place` · x[j] for the queries of a group, for which a row is read and widened once.
    template <int group, class W>
    static void dots(const W* rows, int64_t count, int64_t d, const real* const* x, real* out) {
        constexpr int64_t L = LANES<real>;
        Wide<real> sums[group][L];
        for (int64_t begin = 0, whole = d / L * L; begin < count; begin += L) {
            int64_t size = std::min(L, count - begin);
            for (int64_t place = 0; place < size; place++) {
                const W* row = rows + (begin + place) * d;
                Wide<real> sum[group] = {};
                for (int64_t c = 0; c < whole; c += L) {
                    Wide<real> part = widen<real>(row + c);
                    UNROLL for (int g = 0; g < group; g++) sum[g] += part * widen<real>(x[g] + c);
                }
                for (int64_t c = whole; c < d; c++)
                    for (int g = 0; g < group; g++) sum[g][0] += real(as_number(row[c])) * x[g][c];
                UNROLL for (int g = 0; g < group; g++) sums[g][place] = sum[g];
            }
            for (int g = 0; g < group; g++) each_sum(sums[g], size, out + g * KEYS + begin);
        }
    }
    // The same by an instruction for pairs of bf16, where there is one and queries are bf16 as keys are.
    template <int group, class W>
    bool dots_in_bf16(const W* rows, int64_t count, int64_t d, const real* const* x, real* out) const {
#if defined(__AVX512BF16__)
        if constexpr (std::is_same_v<W, uint16_t> && std::is_same_v<real, float>) {
            constexpr int64_t MOST = 512;
            if (!bf16 || d % 32 || d > MOST) return false;
            alignas(64) uint16_t low[group][MOST];
            for (int g = 0; g < group; g++)
                for (int64_t c = 0; c < d; c++) low[g][c] = as_bf16(x[g][c]);
            Wide<real> sums[group][16];
            for (int64_t begin = 0; begin < count; begin += 16) {
                int64_t size = std::min<int64_t>(16, count - begin);
                for (int64_t place = 0; place < size; place++) {
                    const uint16_t* row = rows + (begin + place) * d;
                    __m512 sum[group] = {};
                    for (int64_t c = 0; c < d; c += 32) {
                        __m512bh part = (__m512bh)_mm512_loadu_si512(row + c);
                        UNROLL for (int g = 0; g < group; g++) sum[g] = _mm512_dpbf16_ps(sum[g], part, (__m512bh)_mm512_load_si512(low[g] + c));
                    }
                    UNROLL for (int g = 0; g < group; g++) sums[g][place] = (Wide<real>)sum[g];
                }
                for (int g = 0; g < group; g++) each_sum(sums[g], size, out + g * KEYS + begin);
            }
            return true;
        }
#endif
        return false;
    }
    // out[j] = the rows' sum, each times its weight for query j.
    template <int group, class W>
    static void weigh(const W* rows, int64_t count, int64_t d, const real* weights, real* out) {
        constexpr int64_t L = LANES<real>, V = 4;  // vectors of columns that stay in registers
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
                for (int64_t place = 0; place < count; place++) sum += real(as_number(rows[place * d + c])) * weights[g * KEYS + place];
                out[g * (d + 2) + c] = sum;
            }
    }
    // The sum of each of `count` vectors, at most as many as a vector has numbers.
    static void each_sum(const Wide<real>* v, int64_t count, real* out) {
#if defined(__AVX512F__)
        if constexpr (std::is_same_v<real, float>) {
            if (count == 16) {  // transposed and added, halves at a time
                __m512 four[4], eight[2];
                UNROLL for (int k = 0; k < 4; k++) {
                    __m512 a = (__m512)v[4 * k], b = (__m512)v[4 * k + 1], c = (__m512)v[4 * k + 2], e = (__m512)v[4 * k + 3];
                    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                    __m512 ce = _mm512_add_ps(_mm512_unpacklo_ps(c, e), _mm512_unpackhi_ps(c, e));
                    four[k] = _mm512_add_ps(_mm512_shuffle_ps(ab, ce, 0x44), _mm512_shuffle_ps(ab, ce, 0xee));
                }
                UNROLL for (int k = 0; k < 2; k++)
                    eight[k] = _mm512_add_ps(_mm512_shuffle_f32x4(four[2 * k], four[2 * k + 1], 0x88), _mm512_shuffle_f32x4(four[2 * k], four[2 * k + 1], 0xdd));
                __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(eight[0], eight[1], 0x88), _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd));
                memcpy(out, &all, sizeof all);
                return;
            }
        }
#endif
        for (int64_t r = 0; r < count; r++) out[r] = sum_of<real>(v[r]);
    }

    // Gives `use` keys or values of `count` places, a row a place: where they lie, if they lie in a piece, else in `to`.
    template <class Use>
    void with_rows(const Layer& l, int64_t i, int64_t h, int64_t first, int64_t count, bool key, real* to, Use&& use) const {
        int64_t d = s.head_dim, place = first;
        const Part& part = find(l, place);
        if (part.n - place >= count) {
            int64_t at = i * part.row + h * part.head + place * d;
            const void* from = key ? part.k : part.v;
            if (l.kv.dtype == BF16 && std::is_same_v<real, float>) return use((const uint16_t*)from + at);
            if (l.kv.dtype == (std::is_same_v<real, float> ? F32 : F64) && !bf16) return use((const real*)from + at);
        }
        for (int64_t done = 0; done < count;) {
            int64_t place = first + done;
            const Part& part = find(l, place);
            int64_t n = std::min(count - done, part.n - place), at = i * part.row + h * part.head + place * d;
            const void* from = key ? part.k : part.v;
            real* rows = to + done * d;
            if (l.kv.dtype == I8) {
                const int8_t* v = (const int8_t*)from + at;
                const float* scale = (const float*)(key ? part.k_scale : part.v_scale) + i * part.scale_row + h * part.scale_head + place;
                for (int64_t r = 0; r < n; r++)
                    for (int64_t c = 0; c < d; c++) rows[r * d + c] = R(v[r * d + c] * scale[r]);
            } else {
                load_all(from, l.kv.dtype, at, n * d, rows);
                for (int64_t c = 0; c < n * d && bf16 && l.kv.dtype != BF16; c++) rows[c] = R(rows[c]);
            }
            done += n;
        }
        use((const real*)to);
    }
    void join(const real* from, int64_t stride, int64_t pieces, real* out) const {
        int64_t d = s.head_dim;
        real most = -INFINITY, total = 0;
        for (int64_t p = 0; p < pieces; p++) most = std::max(most, from[p * stride + d + 1]);
        std::fill(out, out + d, real(0));
        for (int64_t p = 0; p < pieces; p++) {
            real weight = std::exp(from[p * stride + d + 1] - most);
            total += weight * from[p * stride + d];
            for (int64_t c = 0; c < d; c++) out[c] += weight * from[p * stride + c];
        }
        for (int64_t c = 0; c < d; c++) out[c] = R(out[c] / total);
    }

    struct Choice { int64_t expert; real weight; };

    void feed_forward(int64_t& phase, const Layer& l, std::vector<real>& y, std::vector<real>& scratch, std::vector<Choice>& chosen) {
        int64_t shared = l.sparse ? s.shared_inner : s.dense_inner, inner = s.inner, k = s.top_k;
        normed(y, l.norm_post);
        int64_t columns = l.sparse ? k * inner + shared : shared;  // of `hidden`: the chosen experts', then the shared one's
        const Linear in[] = {{l.feed_forward.router, {}, l.sparse ? s.experts : 0}, {l.feed_forward.shared_weight, {}, l.sparse ? 1 : 0}, {l.feed_forward.shared_gate, {}, shared, l.feed_forward.shared_up}};
        products(phase, in, s.width, y, [&](int m, int64_t row, int64_t r, real v) {
            (m == 0 ? logits[r * s.experts + row] : m == 1 ? shared_weight[r] : hidden[(r + 1) * columns - shared + row]) = v;
        });
        if (l.sparse) {
            choose(chosen);
            int64_t size = share_of(l.feed_forward.experts_in, n * k * inner, 2 * s.width), pieces = (inner + size - 1) / size;
            run(phase, n * k * pieces, [&](int64_t item) {
                int64_t c = item / pieces, r = c / k, first = item % pieces * size, last = std::min(first + size, inner);
                int64_t base = chosen[c].expert * 2 * inner + first;
                real* to = &hidden[r * columns + c % k * inner + first];
                swiglu(l.feed_forward.experts_in, base, l.feed_forward.experts_in, base + inner, last - first, s.width, &y[r * s.width], [&](int64_t i, real v) { to[i] = v; });
            });
        }
        int64_t size = share_of(l.feed_forward.shared_down, s.width, columns);
        run(phase, (s.width + size - 1) / size, [&](int64_t item) {
            int64_t first = item * size, last = std::min(first + size, s.width);
            std::vector<real>& sums = scratch;
            sums.resize(2 * size);
            for (int64_t r = 0; r < n; r++) {
                const real* own = &hidden[r * columns];
                std::fill(sums.begin(), sums.begin() + size, real(0));
                for (int64_t c = r * k; l.sparse && c < r * k + k; c++, own += inner) {
                    int64_t base = chosen[c].expert * s.width;
                    rows(l.feed_forward.experts_out, base + first, base + last, inner, own, [&](int64_t row, real v) {
                        real& sum = sums[row - base - first];
                        sum = R(sum + R(v) * chosen[c].weight);
                    });
                }
                real weight = l.sparse ? R(sigmoid(shared_weight[r])) : 1;
                rows(l.feed_forward.shared_down, first, last, shared, own, [&](int64_t row, real v) {
                    real out = l.sparse ? R(sums[row - first] + R(weight * R(v))) : R(v);
                    real& to = x[r * s.width + row];
                    to = R(to + out);
                });
            }
        });
    }

    // Softmax over all experts, the top_k of them, renormalised, then rounded: by each thread for itself. Of equal logits
    // the lower number comes first, as in layers/moe.py; one that is no number comes before all.
    void choose(std::vector<Choice>& chosen) const {
        chosen.resize(n * s.top_k);
        std::vector<std::pair<real, int64_t>> all(s.experts);
        for (int64_t r = 0; r < n; r++) {
            const real* logit = &logits[r * s.experts];
            real most = -INFINITY, total = 0, kept = 0;
            for (int64_t e = 0; e < s.experts; e++) most = std::max(most, logit[e]);
            for (int64_t e = 0; e < s.experts; e++) {
                total += std::exp(logit[e] - most);
                all[e] = {logit[e] == logit[e] ? -logit[e] : -INFINITY, e};
            }
            std::partial_sort(all.begin(), all.begin() + s.top_k, all.end());
            auto probability = [&](int64_t c) { return std::exp(logit[all[c].second] - most) / total; };
            for (int64_t c = 0; c < s.top_k; c++) kept += probability(c);
            for (int64_t c = 0; c < s.top_k; c++)
                chosen[r * s.top_k + c] = {all[c].second, R(probability(c) / (s.renormalise ? kept : 1))};
        }
    }

    void all_layers(const EmbeddingAndHead& ends) {
        std::vector<real> y, scratch;
        std::vector<Choice> chosen;
        int64_t phase = 0;
        for (int64_t i = 0; i < s.layers; i++) {
            layers[i].softmax ? attention(phase, layers[i], y, scratch) : delta_net(phase, layers[i], y, scratch);
            feed_forward(phase, layers[i], y, scratch, chosen);
        }
        // The final norm of all tokens, and the head for each sequence's last one.
        normed(y, ends.norm);
        std::vector<real>& last = scratch;
        last.resize(s.b * s.width);
        for (int64_t i = 0; i < s.b; i++) memcpy(&last[i * s.width], &y[((i + 1) * s.t - 1) * s.width], s.width * sizeof(real));
        const Linear head[] = {{ends.head, {}, ends.vocab}};
        products(phase, head, s.width, last, s.b, [&](int, int64_t row, int64_t i, real v) {
            store(ends.logits, s.dtype, i * ends.vocab + row, v);
            if (row == 0 && i == 0) store_all(ends.hidden, s.dtype, 0, n * s.width, y.data());
        });
    }
};

template <class real> thread_local std::vector<real> Step<real>::window;

template <class real> void step(const Sizes& s, Layer* layers, const EmbeddingAndHead& ends, const int64_t* past, const void* const* cos, const void* const* sin, int64_t threads) {
    int64_t n = s.b * s.t, keys = s.key_heads * s.key_dim, values = s.value_heads * s.value_dim, longest = 0;
    for (int64_t i = 0; i < s.b; i++) longest = std::max(longest, past[i] + s.t);
    std::vector<Phase> phases(s.layers * 8 + 1);
    std::vector<real> x(n * s.width);
    for (int64_t r = 0; r < n; r++) load_all(ends.embedding.p, ends.embedding.dtype, ends.ids[r] * s.width, s.width, &x[r * s.width]);
    Step<real> all(s, phases);
    all.layers = layers, all.past = past, all.cos = cos, all.sin = sin, all.x = x.data(), all.n = n, all.bf16 = s.dtype == BF16, all.threads = threads;
    all.qkv.resize(n * (2 * keys + values)), all.z.resize(n * values), all.b_logit.resize(n * s.value_heads), all.a.resize(n * s.value_heads);
    all.q.resize(n * s.heads * s.head_dim), all.gate.resize(n * s.heads * s.head_dim), all.mixed.resize(n * std::max(values, s.heads * s.head_dim));
    all.k_new.resize(n * s.kv_heads * s.head_dim), all.v_new.resize(n * s.kv_heads * s.head_dim);
    all.logits.resize(n * s.experts);
    all.hidden.resize(n * (s.top_k * s.inner + std::max(s.shared_inner, s.dense_inner))), all.shared_weight.resize(n);
    all.partial.resize(n * s.heads * ((longest + KEYS - 1) / KEYS) * (s.head_dim + 2));
    pool().run(threads, [&] { all.all_layers(ends); });
}

template <class real>
void product(const Mat& w, int64_t rows, int64_t columns, int64_t n, const void* in, void* out, int64_t dtype, int threads) {
    std::vector<real> x(n * columns);
    for (int64_t i = 0; i < n * columns; i++) x[i] = load<real>(in, dtype, i);
    Sizes s{};
    std::vector<Phase> phases(1);
    Step<real> all(s, phases);
    all.n = n, all.bf16 = dtype == BF16, all.threads = threads;
    const typename Step<real>::Linear all_of[] = {{w, {}, rows}};
    pool().run(threads, [&] {
        int64_t phase = 0;
        all.products(phase, all_of, columns, x, [&](int, int64_t row, int64_t r, real v) { store(out, dtype, r * rows + row, v); });
    });
}

}  // namespace

// Tokens to hidden states after the final norm, and to logits after each sequence's last one.
extern "C" void decode_step(const Sizes* s, Layer* layers, const EmbeddingAndHead* ends, const int64_t* past, const void* const* cos,
                            const void* const* sin, int64_t threads) {
    s->dtype == F64 ? step<double>(*s, layers, *ends, past, cos, sin, threads) : step<float>(*s, layers, *ends, past, cos, sin, threads);
}

// out (n, rows) = in (n, columns) times wᵀ.
extern "C" void linear(const Mat* w, int64_t rows, int64_t columns, int64_t n, const void* in, void* out, int64_t dtype, int64_t threads) {
    dtype == F64 ? product<double>(*w, rows, columns, n, in, out, dtype, threads) : product<float>(*w, rows, columns, n, in, out, dtype, threads);
}

// memory (b, value_heads, key_dim, value_dim) after n more tokens, in place, to the bits that `decode_step` makes:
// keys (b, n, key_heads, key_dim), writes (b, n, value_heads, value_dim), decay (b, n, value_heads).
extern "C" void replay(const Sizes* s, void* memory, const void* keys, const void* writes, const void* decay, int64_t n) {
    auto all = [&](auto* m) {
        typedef std::remove_pointer_t<decltype(m)> real;
        int64_t dk = s->key_dim, dv = s->value_dim, share = s->value_heads / s->key_heads;
        for (int64_t i = 0; i < s->b; i++)
            for (int64_t h = 0; h < s->value_heads; h++)
                for (int64_t t = 0; t < n; t++) {
                    int64_t r = i * n + t;
                    real* S = m + (i * s->value_heads + h) * dk * dv;
                    const real *key = (const real*)keys + (r * s->key_heads + h / share) * dk, *u = (const real*)writes + (r * s->value_heads + h) * dv;
                    real d = ((const real*)decay)[r * s->value_heads + h];
                    for (int64_t e = 0; e < dk; e++)
#pragma omp simd
                        for (int64_t c = 0; c < dv; c++) S[e * dv + c] = written(S[e * dv + c] * d, key[e], u[c]);
                }
    };
    s->dtype == F64 ? all((double*)memory) : all((float*)memory);
}

extern "C" int64_t structure_size(int64_t which) {
    const int64_t sizes[] = {sizeof(Mat), sizeof(Part), sizeof(DeltaNet), sizeof(Attention), sizeof(FeedForward),
                             sizeof(RecurrentState), sizeof(KeysAndValues), sizeof(Layer), sizeof(EmbeddingAndHead), sizeof(Sizes)};
    return sizes[which];
}
