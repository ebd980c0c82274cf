// Forward of the gated delta rule, one recurrent state at a time; intermediate results stay in a core's caches.
#include "delta_rule.h"

#include <omp.h>

namespace {

// `kept`: the state before every PIECE-th chunk, (b, h, pieces, k, v), or null.
template <class T, class V>
void delta_rule(const Shape& s, const Inputs<V>& in, const float* before, V* out, float* after, float* kept) {
    // A task has all value heads of a key head, to multiply their keys once, unless threads would be idle.
    const bool together = s.batch * s.key_heads >= omp_get_max_threads();
    const int64_t share = together ? s.heads / s.key_heads : 1, tasks = s.heads / share;
    const int64_t size = s.key_width * s.value_width, pieces = (s.tokens + PIECE * CHUNK - 1) / (PIECE * CHUNK);
#pragma omp parallel
    {
        Chunk<T, V> c(s, in);
        Buffer<float> memories(share * c.state), answer(c.by_v);
        Buffer<T> pattern(c.square), fresh_packed(c.by_v);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < s.batch * tasks; task++) {
            const int64_t b = task / tasks, first = task % tasks * share;
            for (int64_t h = 0; h < share; h++)
                c.load_state(memories + h * c.state, before + (b * s.heads + first + h) * size);
            for (int64_t t = 0; t < s.tokens; t += CHUNK) {
                const int64_t token = b * s.tokens + t;
                c.load_keys(token, first * s.key_heads / s.heads, int(std::min<int64_t>(CHUNK, s.tokens - t)));
                for (int64_t h = 0; h < share; h++) {
                    const int64_t head = first + h;
                    float* memory = memories + h * c.state;
                    if (kept && t % (PIECE * CHUNK) == 0)
                        c.save_state(kept + ((b * s.heads + head) * pieces + t / (PIECE * CHUNK)) * size, memory);
                    c.solve(token, head);
                    for (int i = 0; i < CHUNK; i++)
                        for (int j = 0; j < up_to(i); j++)
                            store(pattern[i * CHUNK + j], c.decay[i * CHUNK + j] * c.qk[i * CHUNK + j]);
                    pack(c.state_packed, memory, c.k_width, c.v_width);
                    product<T>(answer, c.q, c.state_packed, CHUNK, c.v_width, c.k_width, false);
                    for (int i = 0; i < CHUNK; i++)
                        for (int j = 0; j < c.v_width; j++) answer[i * c.v_width + j] *= c.gamma[i];
                    c.write(token, head);
                    pack(fresh_packed, c.fresh, CHUNK, c.v_width);
                    product<T>(answer, pattern, fresh_packed, CHUNK, c.v_width, CHUNK, true, true);
                    V* to = out + (token * s.heads + head) * s.value_width;
                    for (int i = 0; i < c.count; i++, to += s.heads * s.value_width)
                        for (int j = 0; j < s.value_width; j++) store(to[j], answer[i * c.v_width + j]);
                    c.advance(memory);
                }
            }
            for (int64_t h = 0; h < share; h++)
                c.save_state(after + (b * s.heads + first + h) * size, memories + h * c.state);
        }
    }
}

}  // namespace

extern "C" void delta_rule_fp32(const Shape* s, const float* q, const float* k, const float* v, const float* log_decay,
                                const float* beta, const uint8_t* starts, const float* before, float* out, float* after,
                                float* kept) {
    delta_rule<float, float>(*s, {q, k, v, log_decay, beta, starts}, before, out, after, kept);
}
extern "C" void delta_rule_bf16(const Shape* s, const float* q, const float* k, const bf16* v, const float* log_decay,
                                const float* beta, const uint8_t* starts, const float* before, bf16* out, float* after,
                                float* kept) {
    delta_rule<low, bf16>(*s, {q, k, v, log_decay, beta, starts}, before, out, after, kept);
}
