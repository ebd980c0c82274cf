// Row-wise operations between the matrix products: norms, the convolution, gates and expert routing, each in one pass
// over memory. Sums are fp32; values are rounded to the model's dtype where the definitions in torch round them.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels.h"

constexpr int WIDEST = 1024;  // columns per block
constexpr int64_t SMALL = 1 << 14;  // elements below which one thread is faster

namespace {

// x / √(Σx² / count + eps) · weight, for rows of `width` elements with distance `stride` in groups of `heads`.
// `before`, `after`: round to dtype In before and after the weight. With a gate, multiplies by silu(gate) at the end.
template <class In, class Out>
void normalise(const In* x, const float* weight, const In* gate, Out* y, int64_t rows, int64_t heads, int64_t stride,
               int width, float count, float eps, bool before, bool after) {
#pragma omp parallel for if (rows * width > SMALL)
    for (int64_t r = 0; r < rows; r++) {
        const In* from = x + r / heads * stride + r % heads * width;
        Out* to = y + r * width;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int j = 0; j < width; j++) sum += to_float(from[j]) * to_float(from[j]);
        const float scale = 1.0f / std::sqrt(sum / count + eps);
        float normed[WIDEST];
        for (int begin = 0; begin < width; begin += WIDEST) {
            const int n = std::min(WIDEST, width - begin);
            for (int j = 0; j < n; j++) normed[j] = to_float(from[begin + j]) * scale;
            if (before)
                for (int j = 0; j < n; j++) normed[j] = rounded<In>(normed[j]);
            for (int j = 0; j < n; j++) normed[j] *= weight[begin + j];
            if (after)
                for (int j = 0; j < n; j++) normed[j] = rounded<In>(normed[j]);
            if (gate)
                for (int j = 0; j < n; j++) normed[j] *= silu(to_float(gate[r * width + begin + j]));
            for (int j = 0; j < n; j++) store(to[begin + j], normed[j]);
        }
    }
}

// silu(Σ_j weight[j] x[t + j − carried]) for one token's channels; sums the current input first, then from the oldest.
template <class T, class Count>
void filter(const T* const* inputs, const float* weight, T* to, int64_t n, int64_t d, Count taps) {
    for (int64_t c = 0; c < n; c++) {
        float sum = to_float(inputs[taps - 1][c]) * weight[(taps - 1) * d + c];
        for (int j = 0; j < taps - 1; j++) sum += to_float(inputs[j][c]) * weight[j * d + c];
        store(to[c], silu(rounded<T>(sum)));
    }
}

// Causal convolution along time; `state` (b, taps − 1, d) has the inputs before token 0.
template <class T>
void convolve(const T* x, const float* weight, const T* state, T* y, int64_t batch, int64_t tokens, int64_t d, int taps) {
    constexpr int64_t CHANNELS = 512, TOKENS = 32;  // a block whose weights and inputs fit into the L1 cache
    const int64_t carried = taps - 1, blocks = (tokens + TOKENS - 1) / TOKENS;
#pragma omp parallel for if (batch * tokens * d > SMALL)
    for (int64_t task = 0; task < batch * blocks; task++) {
        const int64_t b = task / blocks, first = task % blocks * TOKENS, last = std::min(first + TOKENS, tokens);
        std::vector<const T*> inputs(taps);
        for (int64_t begin = 0; begin < d; begin += CHANNELS) {
            const int64_t n = std::min(CHANNELS, d - begin);
            for (int64_t t = first; t < last; t++) {
                for (int64_t j = 0; j < taps; j++) {
                    const int64_t at = t + j - carried;
                    inputs[j] = begin + (at < 0 ? state + (b * carried + at + carried) * d : x + (b * tokens + at) * d);
                }
                T* to = y + (b * tokens + t) * d + begin;
                if (taps == 4)  // a compile-time constant, so that the sum stays in registers
                    filter(inputs.data(), weight + begin, to, n, d, std::integral_constant<int, 4>());
                else
                    filter(inputs.data(), weight + begin, to, n, d, taps);
            }
        }
    }
}

template <class In, class Out>
void silu_rows(const In* x, Out* y, int64_t n) {
#pragma omp parallel for simd if (n > SMALL)
    for (int64_t i = 0; i < n; i++) store(y[i], silu(to_float(x[i])));
}

// silu(gate) · up, each with its own row stride.
template <class T>
void swiglu(const T* gate, const T* up, T* y, int64_t rows, int64_t width, int64_t gate_stride, int64_t up_stride) {
#pragma omp parallel for if (rows * width > SMALL)
    for (int64_t r = 0; r < rows; r++) {
        const T *g = gate + r * gate_stride, *u = up + r * up_stride;
        T* to = y + r * width;
        for (int64_t j = 0; j < width; j++) store(to[j], rounded<T>(silu(to_float(g[j]))) * to_float(u[j]));
    }
}

// y[token] = Σ weight · out[place] over a token's choices, in the order of their inverse, with one rounding.
template <class T, class Y>
void combine(const T* out, const float* weights, const int64_t* inverse, Y* y, int64_t tokens, int64_t choices,
             int64_t width) {
#pragma omp parallel if (tokens * width > SMALL)
    {
        Buffer<float> sums(width);
#pragma omp for
        for (int64_t t = 0; t < tokens; t++) {
            std::memset(sums, 0, width * sizeof(float));
            for (int64_t done = 0, last = -1; done < choices; done++) {
                int64_t next = -1;
                for (int64_t c = 0; c < choices; c++) {
                    const int64_t place = inverse[t * choices + c];
                    if (place > last && (next < 0 || place < inverse[t * choices + next])) next = c;
                }
                last = inverse[t * choices + next];
                const T* from = out + last * width;
                const float w = weights[t * choices + next];
                float* sum = sums;
                for (int64_t j = 0; j < width; j++) sum[j] += to_float(from[j]) * w;
            }
            for (int64_t j = 0; j < width; j++) store(y[t * width + j], sums[j]);
        }
    }
}

}  // namespace

extern "C" {

// Returns 1 if `count` inverse are a permutation of the rows, else 0.
int64_t each_once(const int64_t* inverse, int64_t count, int64_t rows) {
    if (count != rows) return 0;
    std::vector<char> seen(rows);
    for (int64_t i = 0; i < count; i++) {
        if (inverse[i] < 0 || inverse[i] >= rows || seen[inverse[i]]) return 0;
        seen[inverse[i]] = 1;
    }
    return 1;
}

// Stable counting sort of (token, expert) pairs: each place's token, each pair's place, each expert's end.
// Returns 1, or 0 without writing anything if an index is not an expert.
int64_t permute(const int64_t* indices, int64_t* token, int64_t* place, int32_t* ends, int64_t pairs, int64_t choices,
              int64_t experts) {
    for (int64_t i = 0; i < pairs; i++)
        if (indices[i] < 0 || indices[i] >= experts) return 0;
    std::fill(ends, ends + experts, 0);
    for (int64_t i = 0; i < pairs; i++) ends[indices[i]]++;
    for (int64_t e = 0, begin = 0; e < experts; e++) {
        const int64_t count = ends[e];
        ends[e] = int32_t(begin);
        begin += count;
    }
    for (int64_t i = 0; i < pairs; i++) {
        place[i] = ends[indices[i]]++;  // afterwards `ends` has each expert's end
        token[place[i]] = i / choices;
    }
    return 1;
}

#define FOR_DTYPE(name, T)                                                                                              \
    void normalise_##name(const T* x, const float* w, const T* gate, T* y, int64_t rows, int64_t heads, int64_t stride, \
                          int64_t width, float count, float eps, int64_t before, int64_t after) {                       \
        normalise<T, T>(x, w, gate, y, rows, heads, stride, int(width), count, eps, before, after);                       \
    }                                                                                                                   \
    void convolve_##name(const T* x, const float* w, const T* state, T* y, int64_t batch, int64_t tokens, int64_t d,    \
                         int64_t taps) {                                                                                \
        convolve<T>(x, w, state, y, batch, tokens, d, int(taps));                                                       \
    }                                                                                                                   \
    void silu_##name(const T* x, float* y, int64_t n) { silu_rows<T, float>(x, y, n); }                                 \
    void swiglu_##name(const T* gate, const T* up, T* y, int64_t rows, int64_t width, int64_t gate_stride,              \
                       int64_t up_stride) {                                                                             \
        swiglu<T>(gate, up, y, rows, width, gate_stride, up_stride);                                                    \
    }                                                                                                                   \
    void combine_##name(const T* out, const float* weights, const int64_t* inverse, T* y, int64_t tokens,                \
                        int64_t choices, int64_t width) {                                                               \
        combine<T, T>(out, weights, inverse, y, tokens, choices, width);                                                 \
    }
FOR_DTYPE(fp32, float)
FOR_DTYPE(bf16, bf16)

// Variants with bf16 inputs and fp32 outputs.
void combine_bf16_fp32(const bf16* out, const float* weights, const int64_t* inverse, float* y, int64_t tokens,
                       int64_t choices, int64_t width) {
    combine<bf16, float>(out, weights, inverse, y, tokens, choices, width);
}
void normalise_bf16_fp32(const bf16* x, const float* w, const bf16* gate, float* y, int64_t rows, int64_t heads,
                         int64_t stride, int64_t width, float count, float eps, int64_t before, int64_t after) {
    normalise<bf16, float>(x, w, gate, y, rows, heads, stride, int(width), count, eps, before, after);
}
}
