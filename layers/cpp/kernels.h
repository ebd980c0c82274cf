// Shared by the kernels: two dtypes, a vectorisable exponential, and a small matrix product.
//
// It needs a compiler that vectorises plain loops and supports vector_size (GCC, Clang). All matrices must fit into a
// core's caches, have a multiple of 16 columns, and be padded with zeros.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define UNROLL _Pragma("GCC unroll 16")

typedef uint32_t word __attribute__((may_alias));  // a pair of bf16

struct bf16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline void store(float& to, float x) { to = x; }
inline void store(bf16& to, float x) {  // round to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to.bits = uint16_t(x == x ? rounded : 0x7fc0);
}
template <class T>
inline float rounded(float x) {  // x rounded to T
    T y;
    store(y, x);
    return to_float(y);
}

// p · 2^n for an integer n from -126 to 127. exp (relative error 1e-7) and powers of two (2e-7) use it with p = 2^r,
// |r| <= 0.5; they return 0 if the result is below the normal fp32 numbers. The polynomials are minimax fits.
inline float scaled(float p, float n) {
    int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}
inline float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }  // fp32 has no fractions at 1.5 · 2^23
inline float exponential(float x) {
    float from = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = nearest(from * 1.44269504f);
    float r = std::fma(n, -0.69140625f, from);  // ln 2 in two parts: n times the first part is exact
    r = std::fma(n, -1.740930560e-03f, r);
    float p = std::fma(1.381459176e-03f, r, 8.368717592e-03f);
    p = std::fma(p, r, 4.166838819e-02f);
    p = std::fma(p, r, 1.666652062e-01f);
    p = std::fma(p, r, 4.999999345e-01f);
    p = std::fma(p * r, r, r) + 1.0f;
    return x < -87.0f ? 0.0f : scaled(p, n);
}
inline float power_of_two(float x) {
    float from = x < -126.0f ? -126.0f : x > 127.0f ? 127.0f : x;
    float n = nearest(from), r = from - n;
    float p = std::fma(1.326470793e-03f, r, 9.671513994e-03f);
    p = std::fma(p, r, 5.550733807e-02f);
    p = std::fma(p, r, 2.402224206e-01f);
    p = std::fma(p, r, 6.931469776e-01f);
    p = std::fma(p, r, 1.0f);
    return x < -126.0f ? 0.0f : scaled(p, n);
}
inline float silu(float x) { return x / (1.0f + exponential(-x)); }

// The input dtype of products: bf16 if the processor multiplies in it, else fp32.
#if defined(__AVX512BF16__)
using low = bf16;
#else
using low = float;
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8, WIDE = 2;
#else
constexpr int LANES = 8, ROWS = 6, WIDE = 2;
#endif
typedef float vec __attribute__((vector_size(LANES * 4), aligned(4)));

// Layout of a product's B. bf16: rows of pairs, with element (k, n) at (k / 2) · 2 columns + 2 n + k % 2, so that one
// instruction processes two k. fp32: row-major.
template <class T>
constexpr int PAIR = 4 / sizeof(T);

// n zeros, aligned to a cache line.
template <class T>
struct Buffer {
    struct Free {
        void operator()(T* p) const { std::free(p); }
    };
    std::unique_ptr<T, Free> memory;
    explicit Buffer(size_t n) : memory((T*)std::aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64)) {
        std::memset((void*)memory.get(), 0, n * sizeof(T));
    }
    operator T*() const { return memory.get(); }
};

inline vec multiply_add(vec sum, const float* a, const float* b) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps(_mm512_set1_ps(*a), _mm512_loadu_ps(b), (__m512)sum);
#elif defined(__FMA__)
    return (vec)_mm256_fmadd_ps(_mm256_set1_ps(*a), _mm256_loadu_ps(b), (__m256)sum);
#else
    return sum + *a * *(const vec*)b;
#endif
}
#if defined(__AVX512BF16__)
inline vec multiply_add(vec sum, const bf16* a, const bf16* b) {
    int pair;
    std::memcpy(&pair, a, 4);
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_loadu_si512(b));
}
#endif

// MR rows of `product`, from row i on.
template <class T, int MR>
inline void product_rows(float* c, const T* a, const T* b, int i, int n, int k, bool add, bool lower, bool below) {
    constexpr int pair = PAIR<T>;
    const int depth = lower && i + MR < k ? (i + MR + 1) / 2 * 2 : k;
    const int width = below && i + MR < n ? i + MR : n;
    for (int j = 0; j < width; j += LANES * WIDE) {
        vec sum[MR][WIDE];
        const int columns = j + LANES < n ? WIDE : 1;
        UNROLL for (int r = 0; r < MR; r++) UNROLL for (int w = 0; w < WIDE; w++)
            sum[r][w] = add && w < columns ? *(const vec*)(c + (i + r) * n + j + w * LANES) : vec{};
        if (columns == WIDE) {
            for (int p = 0; p < depth; p += pair)
                UNROLL for (int r = 0; r < MR; r++) UNROLL for (int w = 0; w < WIDE; w++)
                    sum[r][w] = multiply_add(sum[r][w], a + (i + r) * k + p, b + p * n + (j + w * LANES) * pair);
        } else {
            for (int p = 0; p < depth; p += pair)
                UNROLL for (int r = 0; r < MR; r++)
                    sum[r][0] = multiply_add(sum[r][0], a + (i + r) * k + p, b + p * n + j * pair);
        }
        UNROLL for (int r = 0; r < MR; r++) UNROLL for (int w = 0; w < WIDE; w++)
            if (w < columns) *(vec*)(c + (i + r) * n + j + w * LANES) = sum[r][w];
    }
}
// c (m n) = a (m k) b (k n), or += if `add`. `lower`: a is zero above its diagonal. `below`: only entries on and below
// the diagonal of c are needed. m, n, k: multiples of 16.
template <class T>
void product(float* c, const T* a, const T* b, int m, int n, int k, bool add, bool lower = false, bool below = false) {
    int i = 0;
    for (; i + ROWS <= m; i += ROWS) product_rows<T, ROWS>(c, a, b, i, n, k, add, lower, below);
    if constexpr (16 % ROWS)
        for (; i < m; i += 2) product_rows<T, 2>(c, a, b, i, n, k, add, lower, below);
}

inline void convert(float* to, const float* from, size_t n) { std::memcpy(to, from, n * sizeof(float)); }
inline void convert(bf16* to, const float* from, size_t n) {
    for (size_t i = 0; i < n; i++) store(to[i], from[i]);
}

// Copy rows (k n) into the layout of a product's B.
inline void pack(float* to, const float* from, int k, int n) { std::memcpy(to, from, sizeof(float) * k * n); }
template <class From>
void pack_pairs(bf16* to, const From* from, int k, int n) {
    for (int p = 0; p < k; p += 2)
        for (int j = 0; j < n; j++) {
            bf16 even, odd;
            store(even, to_float(from[p * n + j]));
            store(odd, to_float(from[(p + 1) * n + j]));
            ((word*)(to + p * n))[j] = even.bits | uint32_t(odd.bits) << 16;
        }
}
inline void pack(bf16* to, const float* from, int k, int n) { pack_pairs(to, from, k, n); }
inline void pack(bf16* to, const bf16* from, int k, int n) { pack_pairs(to, from, k, n); }

// Transpose rows (n k) into the layout of a product's B (k n), and also into rows (k n) if `rows` is not null.
inline void pack_transposed(float* b, float* rows, const float* from, int n, int k) {
    for (int p = 0; p < k; p++)
        for (int j = 0; j < n; j++) b[p * n + j] = from[j * k + p];
    if (rows) std::memcpy(rows, b, sizeof(float) * n * k);
}
inline void pack_transposed(bf16* b, bf16* rows, const bf16* from, int n, int k) {
    const word* pairs = (const word*)from;
    for (int p = 0; p < k / 2; p++) {
        word* to = (word*)b + p * n;
        for (int j = 0; j < n; j++) to[j] = pairs[j * (k / 2) + p];
        if (rows)
            for (int j = 0; j < n; j++) {
                rows[2 * p * n + j].bits = uint16_t(to[j]);
                rows[(2 * p + 1) * n + j].bits = uint16_t(to[j] >> 16);
            }
    }
}
