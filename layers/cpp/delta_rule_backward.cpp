// Backward of the gated delta rule: chunks in reverse order, each recomputed from the state before it.
//
// R = V − diag(γ) K S, V* = T diag(β) R, O = diag(γ) Q S + P V*, S' = γ_C S + Kᵀ diag(τ) V*, τ = γ_C / γ. A name `to_x`
// is the gradient of the loss with respect to x.
#include "delta_rule.h"

namespace {

template <class T, class V>
struct Gradients {
    Chunk<T, V>& c;
    const int k_width = c.k_width, v_width = c.v_width;
    Buffer<T> rows_v{c.by_v}, packed_v{c.by_v}, other_v{c.by_v}, rows_square{c.square}, packed_square{c.square};
    Buffer<T> q_rows{c.by_k}, q_packed{c.by_k}, k_by_token{c.by_k}, turned{c.state}, to_state_packed{c.state};
    Buffer<T> rows_state{c.state};
    Buffer<float> to_out{c.by_v}, to_fresh{c.by_v}, through_k{c.by_v}, to_values{c.by_v}, answered{c.by_v};
    Buffer<float> to_by_beta{c.square}, to_pattern{c.square}, work{c.square}, solved_t{c.square}, solved_packed{c.square};
    Buffer<float> to_q{c.by_k}, to_k{c.by_k};

    explicit Gradients(Chunk<T, V>& chunk) : c(chunk) {}

    // Convert a transposed fp32 matrix into the layout of a product's B.
    void turn(T* b, T* scratch, const float* from, int n, int k) {
        convert(scratch, from, size_t(n) * k);
        pack_transposed(b, (T*)nullptr, (const T*)scratch, n, k);
    }

    // Row sums of a ⊙ b.
    static void dot(float* sums, const float* a, const float* b, int width, float sign) {
        for (int i = 0; i < CHUNK; i++) {
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int j = 0; j < width; j++) sum += a[i * width + j] * b[i * width + j];
            sums[i] += sign * sum;
        }
    }

    // Prepare what all states of the key head share, after `load_keys`.
    void begin() {
        pack_transposed(q_packed, q_rows, (const T*)c.q, CHUNK, k_width);
        pack(q_packed, (const T*)c.q, CHUNK, k_width);
        pack(k_by_token, (const T*)c.k, CHUNK, k_width);
        std::memset(to_q, 0, c.by_k * sizeof(float));
        std::memset(to_k, 0, c.by_k * sizeof(float));
    }

    // Backward for one state, after `solve` and `write`; to_state is the gradient of S' and is replaced by that of S.
    void run(const float* memory, float* to_state, const V* to_o, int64_t row, V* to_v, float* to_g, float* to_b) {
        float to_gamma[CHUNK] = {}, to_tau[CHUNK] = {}, to_beta[CHUNK] = {};
        double to_since[CHUNK] = {};  // fp64, because decays across a token are added and subtracted again
        std::memset(to_out, 0, c.by_v * sizeof(float));
        for (int i = 0; i < c.count; i++)
            for (int j = 0; j < c.s.value_width; j++) to_out[i * v_width + j] = to_float(to_o[i * row + j]);

        // V*: Pᵀ to_O + diag(τ) K to_S'
        for (int i = 0; i < CHUNK; i++)
            for (int j = 0; j < CHUNK; j++) {
                float p = j >= i ? c.decay[j * CHUNK + i] * c.qk[j * CHUNK + i] : 0.0f;
                store(rows_square[i * CHUNK + j], p);
            }
        pack(packed_v, to_out, CHUNK, v_width);
        product<T>(to_fresh, rows_square, packed_v, CHUNK, v_width, CHUNK, false);
        pack(to_state_packed, to_state, k_width, v_width);
        product<T>(through_k, c.k, to_state_packed, CHUNK, v_width, k_width, false);
        dot(to_tau, c.fresh, through_k, v_width, 1.0f);
        for (int i = 0; i < CHUNK; i++)
            for (int j = 0; j < v_width; j++) to_fresh[i * v_width + j] += c.to_end[i] * through_k[i * v_width + j];

        // P: to_O V*ᵀ; T diag(β): to_V* Rᵀ; R: (T diag(β))ᵀ to_V*
        convert(rows_v, to_out, c.by_v);
        turn(packed_v, other_v, c.fresh, CHUNK, v_width);
        product<T>(to_pattern, rows_v, packed_v, CHUNK, CHUNK, v_width, false, false, true);
        convert(rows_v, to_fresh, c.by_v);
        turn(packed_v, other_v, c.values, CHUNK, v_width);
        product<T>(to_by_beta, rows_v, packed_v, CHUNK, CHUNK, v_width, false, false, true);
        for (int i = 0; i < CHUNK; i++)
            for (int j = 0; j < CHUNK; j++) rows_square[i * CHUNK + j] = j >= i ? c.by_beta[j * CHUNK + i] : T{};
        pack(packed_v, to_fresh, CHUNK, v_width);
        product<T>(to_values, rows_square, packed_v, CHUNK, v_width, CHUNK, false);
        for (int i = 0; i < c.count; i++)
            for (int j = 0; j < c.s.value_width; j++) store(to_v[i * row + j], to_values[i * v_width + j]);

        // Gradients through K S, Q S and the update Kᵀ diag(τ) V*: to_K and to_Q by Sᵀ and to_S'ᵀ, then to_S.
        dot(to_gamma, to_values, c.recalled, v_width, -1.0f);
        product<T>(answered, c.q, c.state_packed, CHUNK, v_width, k_width, false);
        dot(to_gamma, to_out, answered, v_width, 1.0f);
        for (int i = 0; i < CHUNK; i++)
            for (int j = 0; j < v_width; j++) {
                to_values[i * v_width + j] *= -c.gamma[i];
                to_out[i * v_width + j] *= c.gamma[i];
                c.fresh[i * v_width + j] *= c.to_end[i];
            }
        turn(turned, rows_state, memory, k_width, v_width);
        convert(rows_v, to_values, c.by_v);
        product<T>(to_k, rows_v, turned, CHUNK, k_width, v_width, true);
        convert(rows_v, to_out, c.by_v);
        product<T>(to_q, rows_v, turned, CHUNK, k_width, v_width, true);
        turn(turned, rows_state, to_state, k_width, v_width);
        convert(rows_v, c.fresh, c.by_v);
        product<T>(to_k, rows_v, turned, CHUNK, k_width, v_width, true);
        float kept = 0.0f;
#pragma omp simd reduction(+ : kept)
        for (size_t i = 0; i < c.state; i++) kept += memory[i] * to_state[i];
        to_gamma[CHUNK - 1] += kept;
        for (size_t i = 0; i < c.state; i++) to_state[i] *= c.gamma[CHUNK - 1];
        pack(packed_v, to_values, CHUNK, v_width);
        product<T>(to_state, c.k_rows, packed_v, k_width, v_width, CHUNK, true);
        pack(packed_v, to_out, CHUNK, v_width);
        product<T>(to_state, q_rows, packed_v, k_width, v_width, CHUNK, true);

        triangle(to_since, to_beta);
        for (int i = 0; i < CHUNK; i++) {
            const double to_end = to_tau[i] * c.to_end[i];
            to_since[i] += to_gamma[i] * c.gamma[i] - to_end;
            to_since[CHUNK - 1] += to_end;
        }
        double sum = 0.0;
        for (int i = CHUNK - 1; i >= 0; i--) {
            sum += to_since[i];
            if (i < c.count) to_g[i * c.s.heads] = float(sum), to_b[i * c.s.heads] = to_beta[i];
        }
    }

    // Gradients of the C x C matrices: of the solve, −tril(Tᵀ to_T Tᵀ, −1), then of key products and decays.
    void triangle(double* to_since, float* to_beta) {
        for (int i = 0; i < CHUNK; i++)
            for (int j = 0; j < CHUNK; j++) {
                const float to = j <= i ? to_by_beta[i * CHUNK + j] : 0.0f;
                to_beta[j] += to * c.solved[i * CHUNK + j];
                work[i * CHUNK + j] = to * c.beta[j];
                solved_t[i * CHUNK + j] = c.solved[j * CHUNK + i];
            }
        product<float>(to_by_beta, solved_t, work, CHUNK, CHUNK, CHUNK, false);
        product<float>(work, to_by_beta, solved_t, CHUNK, CHUNK, CHUNK, false, false, true);
        for (int i = 0; i < CHUNK; i++) {
            float to = 0.0f;
            double along = 0.0;
            for (int j = 0; j < CHUNK; j++) {
                const int at = i * CHUNK + j;
                const float to_system = j < i ? -work[at] * c.decay[at] : 0.0f;
                const float to_qk = j <= i ? to_pattern[at] * c.decay[at] : 0.0f;
                const float kk = j < i ? c.kk[at] : 0.0f, qk = j <= i ? c.qk[at] : 0.0f;
                const float moved = to_system * c.beta[i] * kk + to_qk * qk;  // gradient of the decay's exponent
                to += to_system * kk;
                along += moved;
                to_since[j] -= moved;
                work[at] = to_system * c.beta[i];
                to_pattern[at] = to_qk;
            }
            to_beta[i] += to;
            to_since[i] += along;
        }
        for (int i = 0; i < CHUNK; i++)
            for (int j = 0; j < CHUNK; j++) store(rows_square[i * CHUNK + j], work[i * CHUNK + j] + work[j * CHUNK + i]);
        product<T>(to_k, rows_square, k_by_token, CHUNK, k_width, CHUNK, true);
        for (int i = 0; i < CHUNK; i++)
            for (int j = 0; j < CHUNK; j++) store(rows_square[i * CHUNK + j], to_pattern[j * CHUNK + i]);
        product<T>(to_k, rows_square, q_packed, CHUNK, k_width, CHUNK, true);
        convert(rows_square, to_pattern, c.square);
        product<T>(to_q, rows_square, k_by_token, CHUNK, k_width, CHUNK, true, true);
    }
};

template <class T, class V>
void backward(const Shape& s, const Inputs<V>& in, const float* kept, const V* to_o, const float* to_after, float* to_q,
              float* to_k, V* to_v, float* to_g, float* to_beta, float* to_before) {
    const int64_t share = s.heads / s.key_heads, size = s.key_width * s.value_width, row = s.heads * s.value_width;
    const int64_t pieces = (s.tokens + PIECE * CHUNK - 1) / (PIECE * CHUNK), keys = s.key_heads * s.key_width;
#pragma omp parallel
    {
        Chunk<T, V> c(s, in);
        Gradients<T, V> g(c);
        Buffer<float> memories(PIECE * share * c.state), to_states(share * c.state);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < s.batch * s.key_heads; task++) {
            const int64_t b = task / s.key_heads, key_head = task % s.key_heads, first = key_head * share;
            for (int64_t h = 0; h < share; h++)
                c.load_state(to_states + h * c.state, to_after + (b * s.heads + first + h) * size);
            for (int64_t piece = pieces - 1; piece >= 0; piece--) {
                const int64_t begin = piece * PIECE * CHUNK;
                const int chunks = int(std::min<int64_t>(PIECE, (s.tokens - begin + CHUNK - 1) / CHUNK));
                for (int n = 0; n + 1 < chunks; n++) {  // recompute the states inside the piece
                    const int64_t token = b * s.tokens + begin + n * CHUNK;
                    c.load_keys(token, key_head, CHUNK);
                    for (int64_t h = 0; h < share; h++) {
                        float *memory = memories + (n * share + h) * c.state, *next = memory + share * c.state;
                        if (n == 0) c.load_state(memory, kept + ((b * s.heads + first + h) * pieces + piece) * size);
                        std::copy_n(memory, c.state, next);
                        c.solve(token, first + h);
                        pack(c.state_packed, memory, c.k_width, c.v_width);
                        c.write(token, first + h);
                        c.advance(next);
                    }
                }
                for (int n = chunks - 1; n >= 0; n--) {
                    const int64_t t = begin + n * CHUNK, token = b * s.tokens + t;
                    c.load_keys(token, key_head, int(std::min<int64_t>(CHUNK, s.tokens - t)));
                    g.begin();
                    for (int64_t h = 0; h < share; h++) {
                        const int64_t head = first + h, at = token * row + head * s.value_width;
                        float* memory = memories + (n * share + h) * c.state;
                        if (n == 0 && chunks == 1)
                            c.load_state(memory, kept + ((b * s.heads + head) * pieces + piece) * size);
                        c.solve(token, head);
                        pack(c.state_packed, memory, c.k_width, c.v_width);
                        c.write(token, head);
                        g.run(memory, to_states + h * c.state, to_o + at, row, to_v + at, to_g + token * s.heads + head,
                              to_beta + token * s.heads + head);
                    }
                    for (int i = 0; i < c.count; i++)
                        for (int j = 0; j < s.key_width; j++) {
                            to_q[(token + i) * keys + key_head * s.key_width + j] = g.to_q[i * c.k_width + j];
                            to_k[(token + i) * keys + key_head * s.key_width + j] = g.to_k[i * c.k_width + j];
                        }
                }
            }
            for (int64_t h = 0; h < share; h++)
                c.save_state(to_before + (b * s.heads + first + h) * size, to_states + h * c.state);
        }
    }
}

}  // namespace

extern "C" void delta_rule_backward_fp32(const Shape* s, const float* q, const float* k, const float* v, const float* g,
                                         const float* beta, const uint8_t* starts, const float* kept, const float* to_o,
                                         const float* to_after, float* to_q, float* to_k, float* to_v, float* to_g,
                                         float* to_beta, float* to_before) {
    backward<float, float>(*s, {q, k, v, g, beta, starts}, kept, to_o, to_after, to_q, to_k, to_v, to_g, to_beta, to_before);
}
extern "C" void delta_rule_backward_bf16(const Shape* s, const float* q, const float* k, const bf16* v, const float* g,
                                         const float* beta, const uint8_t* starts, const float* kept, const bf16* to_o,
                                         const float* to_after, float* to_q, float* to_k, bf16* to_v, float* to_g,
                                         float* to_beta, float* to_before) {
    backward<low, bf16>(*s, {q, k, v, g, beta, starts}, kept, to_o, to_after, to_q, to_k, to_v, to_g, to_beta, to_before);
}
