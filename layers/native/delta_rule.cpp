// The gated delta rule in chunks, one memory at a time, everything but inputs and outputs in a core's caches.
//
// The algebra is `_chunked` of layers/delta_rule.py with one difference: V* = T diag(β) (V − diag(γ) K S), which needs no
// product of T and K. Decays, the triangular solve, sums and the memory are fp32.
#include <algorithm>
#include <omp.h>

#include "kernels.h"

constexpr int CHUNK = 64;

namespace {

int padded(int64_t n) { return int((n + 15) / 16 * 16); }
int up_to(int i) { return padded(i + 1); }  // columns of row i of a lower triangle, in whole vectors

// (I + tril(a, −1))⁻¹ by rows: row i is e_i minus the rows above it, weighed by a.
void unit_lower_inverse(float* inverse, const float* a) {
    for (int i = 0; i < CHUNK; i++) {
        float row[CHUNK] = {};
        for (int s = 0; s < i; s++)
            for (int j = 0; j < CHUNK; j++) row[j] -= a[i * CHUNK + s] * inverse[s * CHUNK + j];
        row[i] = 1.0f;
        std::memcpy(inverse + i * CHUNK, row, sizeof row);
    }
}

struct Shape {
    int64_t batch, tokens, key_heads, heads, key_width, value_width;
    int64_t v_row;  // elements from one token's values to the next's
};

// Chunks of one key head and `share` memories, from token 0 on. T is the dtype of products.
template <class T, class V>
struct Worker {
    const Shape& s;
    const int share, k_width, v_width;
    const size_t square = CHUNK * CHUNK, by_k = size_t(CHUNK) * k_width, by_v = size_t(CHUNK) * v_width;
    Buffer<float> memory{size_t(share * k_width * v_width)}, kk{square}, qk{square}, system{square}, solved{square};
    Buffer<float> by_memory{by_v}, answer{by_v}, values{by_v}, fresh{by_v};
    Buffer<T> q{by_k}, k{by_k}, k_rows{by_k}, k_packed{by_k}, by_beta{square}, pattern{square};
    Buffer<T> memory_packed{size_t(k_width * v_width)}, values_packed{by_v}, fresh_packed{by_v};

    Worker(const Shape& shape, int share)
        : s(shape), share(share), k_width(padded(shape.key_width)), v_width(padded(shape.value_width)) {}

    void load_rows(T* to, const float* from, int count) {
        for (int i = 0; i < count; i++, from += s.key_heads * s.key_width)
            for (int j = 0; j < s.key_width; j++) store(to[i * k_width + j], from[j]);
        std::memset((void*)(to + count * k_width), 0, (CHUNK - count) * k_width * sizeof(T));
    }

    void run(int64_t b, int64_t key_head, int64_t first, const float* q_in, const float* k_in, const V* v_in,
             const float* log_decay, const float* beta_in, const uint8_t* starts, const float* before, V* out,
             float* after) {
        const int64_t keys = s.key_heads * s.key_width, row = s.heads * s.value_width;
        const int64_t state = int64_t(s.key_width) * s.value_width;
        for (int h = 0; h < share; h++)
            for (int i = 0; i < s.key_width; i++)
                std::copy_n(before + (b * s.heads + first + h) * state + i * s.value_width, s.value_width,
                            memory + (h * k_width + i) * v_width);
        for (int64_t t = 0; t < s.tokens; t += CHUNK) {
            const int count = int(std::min<int64_t>(CHUNK, s.tokens - t));
            const int64_t token = b * s.tokens + t;
            load_rows(q, q_in + token * keys + key_head * s.key_width, count);
            load_rows(k, k_in + token * keys + key_head * s.key_width, count);
            pack_transposed(k_packed, k_rows, k, CHUNK, k_width);
            product<T>(kk, k, k_packed, CHUNK, CHUNK, k_width, false, false, true);
            product<T>(qk, q, k_packed, CHUNK, CHUNK, k_width, false, false, true);
            int number[CHUNK] = {};  // of sequences that began in this chunk so far
            for (int i = 0; starts && i < CHUNK; i++)
                number[i] = (i ? number[i - 1] : 0) + (i < count && starts[token + i]);
            for (int h = 0; h < share; h++)
                chunk(memory + h * k_width * v_width, count, number, v_in + token * s.v_row + (first + h) * s.value_width,
                      log_decay + token * s.heads + first + h, beta_in + token * s.heads + first + h,
                      out + token * row + (first + h) * s.value_width);
        }
        for (int h = 0; h < share; h++)
            for (int i = 0; i < s.key_width; i++)
                std::copy_n(memory + (h * k_width + i) * v_width, s.value_width,
                            after + (b * s.heads + first + h) * state + i * s.value_width);
    }

    void chunk(float* memory, int count, const int* number, const V* v, const float* log_decay, const float* beta_in,
               V* out) {
        const int64_t row = s.heads * s.value_width;
        float since_start[CHUNK], beta[CHUNK], gamma[CHUNK], to_end[CHUNK];
        float sum = 0.0f;
        for (int i = 0; i < CHUNK; i++) {
            since_start[i] = sum += i < count ? log_decay[i * s.heads] : 0.0f;
            beta[i] = i < count ? beta_in[i * s.heads] : 0.0f;
        }
        for (int i = 0; i < CHUNK; i++) {
            gamma[i] = number[i] ? 0.0f : exponential(since_start[i]);
            to_end[i] = number[i] != number[CHUNK - 1] ? 0.0f : exponential(sum - since_start[i]);
        }
        for (int i = 0; i < CHUNK; i++)
            for (int j = 0; j < up_to(i); j++) {
                // Above the diagonal the exponent is positive, and exp might overflow.
                float apart = since_start[i] - since_start[j], decay = exponential(apart < 0.0f ? apart : 0.0f);
                decay = (j <= i) & (number[i] == number[j]) ? decay : 0.0f;
                system[i * CHUNK + j] = beta[i] * decay * kk[i * CHUNK + j];
                store(pattern[i * CHUNK + j], decay * qk[i * CHUNK + j]);
            }
        unit_lower_inverse(solved, system);
        for (int i = 0; i < CHUNK; i++)
            for (int j = 0; j < up_to(i); j++) store(by_beta[i * CHUNK + j], solved[i * CHUNK + j] * beta[j]);

        pack(memory_packed, memory, k_width, v_width);
        product<T>(by_memory, k, memory_packed, CHUNK, v_width, k_width, false);
        product<T>(answer, q, memory_packed, CHUNK, v_width, k_width, false);
        std::memset(values + count * v_width, 0, (CHUNK - count) * v_width * sizeof(float));
        for (int i = 0; i < count; i++)
            for (int j = 0; j < s.value_width; j++) {
                values[i * v_width + j] = to_float(v[i * s.v_row + j]) - gamma[i] * by_memory[i * v_width + j];
                answer[i * v_width + j] *= gamma[i];
            }
        pack(values_packed, values, CHUNK, v_width);
        product<T>(fresh, by_beta, values_packed, CHUNK, v_width, CHUNK, false, true);
        pack(fresh_packed, fresh, CHUNK, v_width);
        product<T>(answer, pattern, fresh_packed, CHUNK, v_width, CHUNK, true, true);
        for (int i = 0; i < count; i++)
            for (int j = 0; j < s.value_width; j++) store(out[i * row + j], answer[i * v_width + j]);

        for (int i = 0; i < CHUNK; i++)
            for (int j = 0; j < v_width; j++) fresh[i * v_width + j] *= to_end[i];
        pack(fresh_packed, fresh, CHUNK, v_width);
        for (int i = 0; i < k_width * v_width; i++) memory[i] *= gamma[CHUNK - 1];
        product<T>(memory, k_rows, fresh_packed, k_width, v_width, CHUNK, true);
    }
};

template <class T, class V>
void delta_rule(const Shape& s, const float* q, const float* k, const V* v, const float* log_decay, const float* beta,
                const uint8_t* starts, const float* before, V* out, float* after) {
    // The memories that share a key head go together, so that their keys are multiplied once, unless threads would idle.
    const bool together = s.batch * s.key_heads >= omp_get_max_threads();
    const int64_t share = together ? s.heads / s.key_heads : 1, tasks = s.heads / share;
#pragma omp parallel
    {
        Worker<T, V> worker(s, int(share));
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < s.batch * tasks; task++) {
            const int64_t first = task % tasks * share;
            worker.run(task / tasks, first * s.key_heads / s.heads, first, q, k, v, log_decay, beta, starts, before, out,
                       after);
        }
    }
}

}  // namespace

extern "C" void delta_rule_fp32(const Shape* s, const float* q, const float* k, const float* v, const float* log_decay,
                                const float* beta, const uint8_t* starts, const float* before, float* out, float* after) {
    delta_rule<float, float>(*s, q, k, v, log_decay, beta, starts, before, out, after);
}
extern "C" void delta_rule_bf16(const Shape* s, const float* q, const float* k, const bf16* v, const float* log_decay,
                                const float* beta, const uint8_t* starts, const float* before, bf16* out, float* after) {
    delta_rule<low, bf16>(*s, q, k, v, log_decay, beta, starts, before, out, after);
}
