// Blockwise softmax attention, which also returns each query's logsumexp and never stores all scores. Sums and softmax
// are fp32; for bf16 queries, probabilities are rounded to bf16 before their product with the values.
#include <algorithm>

#include "kernels.h"

constexpr int QUERIES = 64, KEYS = 64;

namespace {

struct Shape {
    int64_t batch, heads, kv_heads, queries, keys, width;
    int64_t q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token;  // strides, in elements
    int64_t causal;  // nonzero: query i attends to keys up to keys − queries + i; zero: to all keys
};

// A block of queries with its running output, maximum score and sum of exponentials. P: dtype of products.
template <class P>
struct Worker {
    const int width;
    const float scale;
    Buffer<P> q, pattern{QUERIES * KEYS};
    Buffer<float> scores{QUERIES * KEYS}, answer;
    float most[QUERIES], sum[QUERIES];

    Worker(int width, float scale) : width(width), scale(scale), q(QUERIES * width), answer(QUERIES * width) {}

    // Add a block of keys (width, KEYS) and values (KEYS, width), both in the layout of a product's B; query i of the
    // block attends to the first `seen(i)` keys.
    template <class Seen>
    void add(const P* k, const P* v, Seen seen) {
        product<P>(scores, q, k, QUERIES, KEYS, width, false);
        for (int i = 0; i < QUERIES; i++) {
            float* row = scores + i * KEYS;
            P* to = pattern + i * KEYS;
            const int count = seen(i);
            if (count <= 0) {
                std::memset((void*)to, 0, KEYS * sizeof(P));
                continue;
            }
            for (int j = count; j < KEYS; j++) row[j] = -INFINITY;
            float top = most[i], total = 0.0f;
#pragma omp simd reduction(max : top)
            for (int j = 0; j < KEYS; j++) top = row[j] > top ? row[j] : top;
            if (top > most[i]) {
                const float less = power_of_two((most[i] - top) * scale);
                for (int j = 0; j < width; j++) answer[i * width + j] *= less;
                sum[i] *= less;
                most[i] = top;
            }
#pragma omp simd reduction(+ : total)
            for (int j = 0; j < KEYS; j++) {
                const float p = power_of_two((row[j] - top) * scale);
                total += p;
                store(to[j], p);
            }
            sum[i] += total;
        }
        product<P>(answer, pattern, v, QUERIES, width, KEYS, true);
    }
};

template <class P, class T>
void attend(const Shape& s, const T* q, const T* k, const T* v, T* out, float* logsumexp) {
    const int width = int((s.width + 15) / 16 * 16);
    const int64_t key_blocks = (s.keys + KEYS - 1) / KEYS, query_blocks = (s.queries + QUERIES - 1) / QUERIES;
    const int64_t share = s.heads / s.kv_heads, size = int64_t(KEYS) * width;
    const float scale = 1.44269504f / std::sqrt(float(s.width));  // scale of scores, for base-2 exponentials
    Buffer<P> k_packed(size_t(s.batch * s.kv_heads * key_blocks * size)), v_packed(size_t(s.batch * s.kv_heads * key_blocks * size));
#pragma omp parallel
    {
        Buffer<P> k_rows(size);
        Buffer<float> v_rows(size);
#pragma omp for
        for (int64_t task = 0; task < s.batch * s.kv_heads * key_blocks; task++) {
            const int64_t block = task % key_blocks, head = task / key_blocks % s.kv_heads, b = task / key_blocks / s.kv_heads;
            const int count = int(std::min<int64_t>(KEYS, s.keys - block * KEYS));
            std::memset((void*)(P*)k_rows, 0, size * sizeof(P));
            std::memset((void*)(float*)v_rows, 0, size * sizeof(float));
            for (int i = 0; i < count; i++) {
                const int64_t at = block * KEYS + i;
                const T* k_from = k + b * s.k_batch + head * s.k_head + at * s.k_token;
                const T* v_from = v + b * s.v_batch + head * s.v_head + at * s.v_token;
                for (int64_t j = 0; j < s.width; j++) store(k_rows[i * width + j], to_float(k_from[j]));
                for (int64_t j = 0; j < s.width; j++) v_rows[i * width + j] = to_float(v_from[j]);
            }
            pack_transposed(k_packed + task * size, (P*)nullptr, k_rows, KEYS, width);
            pack(v_packed + task * size, v_rows, KEYS, width);
        }
        Worker<P> worker(width, scale);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < s.batch * s.heads * query_blocks; task++) {
            const int64_t block = task % query_blocks, head = task / query_blocks % s.heads, b = task / query_blocks / s.heads;
            const int count = int(std::min<int64_t>(QUERIES, s.queries - block * QUERIES));
            std::fill_n(worker.most, QUERIES, -INFINITY);
            std::fill_n(worker.sum, QUERIES, 0.0f);
            std::memset((void*)(P*)worker.q, 0, QUERIES * width * sizeof(P));
            std::memset((void*)(float*)worker.answer, 0, QUERIES * width * sizeof(float));
            for (int i = 0; i < count; i++) {
                const T* from = q + b * s.q_batch + head * s.q_head + (block * QUERIES + i) * s.q_token;
                for (int64_t j = 0; j < s.width; j++) store(worker.q[i * width + j], to_float(from[j]));
            }
            const int64_t before = s.causal ? s.keys - s.queries + block * QUERIES + 1 : s.keys;  // keys seen by query 0
            for (int64_t i = 0; i < key_blocks && i * KEYS < before + (s.causal ? count - 1 : 0); i++) {
                const int64_t at = ((b * s.kv_heads + head / share) * key_blocks + i) * size;
                worker.add(k_packed + at, v_packed + at, [&](int row) {
                    return int(std::min<int64_t>({KEYS, s.keys - i * KEYS, before + (s.causal ? row : 0) - i * KEYS}));
                });
            }
            for (int i = 0; i < count; i++) {
                const int64_t at = (b * s.heads + head) * s.queries + block * QUERIES + i;
                const float less = 1.0f / worker.sum[i];
                for (int64_t j = 0; j < s.width; j++) store(out[at * s.width + j], worker.answer[i * width + j] * less);
                logsumexp[at] = worker.most[i] * scale * 0.69314718f + std::log(worker.sum[i]);
            }
        }
    }
}

}  // namespace

extern "C" void attend_bf16(const Shape* s, const bf16* q, const bf16* k, const bf16* v, bf16* out, float* logsumexp) {
    attend<low>(*s, q, k, v, out, logsumexp);
}
extern "C" void attend_fp32(const Shape* s, const float* q, const float* k, const float* v, float* out, float* logsumexp) {
    attend<float>(*s, q, k, v, out, logsumexp);
}
