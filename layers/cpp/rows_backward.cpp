// Gradients of rows.cpp. Sums over rows are kept per thread and added in thread order, to make results reproducible.
#include <omp.h>

#include <algorithm>
#include <vector>

#include "kernels.h"

constexpr int64_t SMALL = 1 << 14;  // elements below which one thread is faster

namespace {

// d silu(x) / dx
inline float silu_slope(float x) {
    const float s = 1.0f / (1.0f + exponential(-x));
    return s * (1.0f + x * (1.0f - s));
}

// Rows as in `normalise`: y = x / √(Σx² / count + eps) · weight (· silu(gate)). to_weight (width) in fp32, or null.
template <class In, class Out>
void normalise(const In* x, const float* weight, const In* gate, const Out* to_y, In* to_x, float* to_weight, In* to_gate,
               int64_t rows, int64_t heads, int64_t stride, int width, float count, float eps) {
    const int threads = rows * width > SMALL ? omp_get_max_threads() : 1;
    Buffer<float> sums(size_t(threads) * width);
#pragma omp parallel num_threads(threads)
    {
        float* own = sums + omp_get_thread_num() * width;
        Buffer<float> normed(width), to_normed(width);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            const In* from = x + r / heads * stride + r % heads * width;
            const Out* to = to_y + r * width;
            float *n = normed, *to_n = to_normed, square = 0.0f, along = 0.0f;
#pragma omp simd reduction(+ : square)
            for (int j = 0; j < width; j++) square += to_float(from[j]) * to_float(from[j]);
            const float scale = 1.0f / std::sqrt(square / count + eps);
            for (int j = 0; j < width; j++) n[j] = to_float(from[j]) * scale;
            for (int j = 0; j < width; j++) to_n[j] = to_float(to[j]);
            if (gate) {
                const In* z = gate + r * width;
                for (int j = 0; j < width; j++) {
                    const float to_z = to_n[j] * n[j] * weight[j] * silu_slope(to_float(z[j]));
                    to_n[j] *= silu(to_float(z[j]));
                    store(to_gate[r * width + j], to_z);
                }
            }
            for (int j = 0; j < width; j++) own[j] += to_n[j] * n[j];
            for (int j = 0; j < width; j++) to_n[j] *= weight[j];
#pragma omp simd reduction(+ : along)
            for (int j = 0; j < width; j++) along += to_n[j] * n[j];
            for (int j = 0; j < width; j++) store(to_x[r * width + j], scale * (to_n[j] - n[j] * along / count));
        }
    }
    if (to_weight)
        for (int j = 0; j < width; j++) {
            float sum = 0.0f;
            for (int t = 0; t < threads; t++) sum += sums[t * width + j];
            to_weight[j] = sum;
        }
}

// Backward of `convolve`, in reverse time order: input t contributes to outputs t to t + taps − 1.
template <class T>
void convolve(const T* x, const float* weight, const T* state, const T* to_y, T* to_x, float* to_weight, T* to_state,
              int64_t batch, int64_t tokens, int64_t d, int taps) {
    constexpr int64_t CHANNELS = 256;
    const int64_t carried = taps - 1;
#pragma omp parallel for schedule(static)
    for (int64_t begin = 0; begin < d; begin += CHANNELS) {
        const int64_t n = std::min(CHANNELS, d - begin);
        std::vector<float> recent(taps * CHANNELS), sums(taps * CHANNELS);  // gradients of sums and of weights
        std::vector<const T*> inputs(taps);
        for (int64_t b = 0; b < batch; b++) {
            std::fill(recent.begin(), recent.end(), 0.0f);
            for (int64_t t = tokens - 1; t >= -carried; t--) {
                float* now = &recent[(t + taps) % taps * CHANNELS];
                if (t >= 0) {
                    for (int64_t j = 0; j < taps; j++) {
                        const int64_t at = t + j - carried;
                        inputs[j] = begin + (at < 0 ? state + (b * carried + at + carried) * d : x + (b * tokens + at) * d);
                    }
                    const T* to = to_y + (b * tokens + t) * d + begin;
                    std::fill_n(now, n, 0.0f);
                    for (int64_t j = 0; j < taps; j++)
                        for (int64_t c = 0; c < n; c++) now[c] += to_float(inputs[j][c]) * weight[j * d + begin + c];
                    for (int64_t c = 0; c < n; c++) now[c] = to_float(to[c]) * silu_slope(rounded<T>(now[c]));
                    for (int64_t j = 0; j < taps; j++)
                        for (int64_t c = 0; c < n; c++) sums[j * CHANNELS + c] += now[c] * to_float(inputs[j][c]);
                } else {
                    std::fill_n(now, n, 0.0f);
                }
                float total[CHANNELS] = {};
                for (int64_t i = 0; i < taps; i++) {
                    const float *later = &recent[(t + i + taps) % taps * CHANNELS], *w = weight + (carried - i) * d + begin;
                    for (int64_t c = 0; c < n; c++) total[c] += later[c] * w[c];
                }
                T* to = t < 0 ? to_state + (b * carried + t + carried) * d + begin : to_x + (b * tokens + t) * d + begin;
                for (int64_t c = 0; c < n; c++) store(to[c], total[c]);
            }
        }
        for (int64_t j = 0; j < taps; j++) std::copy_n(&sums[j * CHANNELS], n, to_weight + j * d + begin);
    }
}

template <class T>
void swiglu(const T* gate, const T* up, const T* to_y, T* to_gate, T* to_up, int64_t rows, int64_t width,
            int64_t gate_stride, int64_t up_stride) {
#pragma omp parallel for if (rows * width > SMALL)
    for (int64_t r = 0; r < rows; r++) {
        const T *g = gate + r * gate_stride, *u = up + r * up_stride, *to = to_y + r * width;
        T *to_g = to_gate + r * gate_stride, *to_u = to_up + r * up_stride;
        for (int64_t j = 0; j < width; j++) {
            store(to_g[j], to_float(to[j]) * to_float(u[j]) * silu_slope(to_float(g[j])));
            store(to_u[j], to_float(to[j]) * rounded<T>(silu(to_float(g[j]))));
        }
    }
}

// Backward of `combine`. Row: its weight times its token's gradient. Weight: the dot product of the two rows.
template <class T, class Y>
void combine_backward(const T* out, const float* weights, const int64_t* inverse, const Y* to_y, T* to_out, float* to_weights,
            int64_t tokens, int64_t choices, int64_t width) {
#pragma omp parallel for if (tokens * width > SMALL)
    for (int64_t i = 0; i < tokens * choices; i++) {
        const Y* to = to_y + i / choices * width;
        const T* row = out + inverse[i] * width;
        T* to_row = to_out + inverse[i] * width;
        const float w = weights[i];
        float sum = 0.0f;
        for (int64_t j = 0; j < width; j++) store(to_row[j], to_float(to[j]) * w);
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < width; j++) sum += to_float(to[j]) * to_float(row[j]);
        to_weights[i] = sum;
    }
}

}  // namespace

#define FOR_DTYPE(name, T)                                                                                              \
    extern "C" void normalise_backward_##name(const T* x, const float* w, const T* gate, const T* to_y, T* to_x,        \
                                              float* to_w, T* to_gate, int64_t rows, int64_t heads, int64_t stride,     \
                                              int64_t width, float count, float eps) {                                  \
        normalise<T, T>(x, w, gate, to_y, to_x, to_w, to_gate, rows, heads, stride, int(width), count, eps);            \
    }                                                                                                                   \
    extern "C" void convolve_backward_##name(const T* x, const float* w, const T* state, const T* to_y, T* to_x,        \
                                             float* to_w, T* to_state, int64_t batch, int64_t tokens, int64_t d,        \
                                             int64_t taps) {                                                            \
        convolve<T>(x, w, state, to_y, to_x, to_w, to_state, batch, tokens, d, int(taps));                              \
    }                                                                                                                   \
    extern "C" void swiglu_backward_##name(const T* gate, const T* up, const T* to_y, T* to_gate, T* to_up,             \
                                           int64_t rows, int64_t width, int64_t gate_stride, int64_t up_stride) {       \
        swiglu<T>(gate, up, to_y, to_gate, to_up, rows, width, gate_stride, up_stride);                                 \
    }                                                                                                                   \
    extern "C" void combine_backward_##name(const T* out, const float* weights, const int64_t* inverse, const T* to_y, T* to_out,  \
                                  float* to_weights, int64_t tokens, int64_t choices, int64_t width) {                  \
        combine_backward<T, T>(out, weights, inverse, to_y, to_out, to_weights, tokens, choices, width);                           \
    }
FOR_DTYPE(fp32, float)
FOR_DTYPE(bf16, bf16)

// Variants for bf16 inputs and fp32 outputs.
extern "C" void combine_backward_bf16_fp32(const bf16* out, const float* weights, const int64_t* inverse, const float* to_y,
                                 bf16* to_out, float* to_weights, int64_t tokens, int64_t choices, int64_t width) {
    combine_backward<bf16, float>(out, weights, inverse, to_y, to_out, to_weights, tokens, choices, width);
}
extern "C" void normalise_backward_bf16_fp32(const bf16* x, const float* w, const bf16* gate, const float* to_y, bf16* to_x,
                                             float* to_w, bf16* to_gate, int64_t rows, int64_t heads, int64_t stride,
                                             int64_t width, float count, float eps) {
    normalise<bf16, float>(x, w, gate, to_y, to_x, to_w, to_gate, rows, heads, stride, int(width), count, eps);
}
