// Numbers of any dtype as `real`, float or double, and sums over them at the speed of memory.
#pragma once
#include <cmath>
#include <cstring>
#include <type_traits>

#include "decode_arguments.h"
#include "kernels.h"

namespace {

inline double to_float(double x) { return x; }
using ::to_float;

// One number.
template <class real>
real load(const void* p, int64_t dtype, int64_t i) {
    switch (dtype) {
        case F32: return ((const float*)p)[i];
        case BF16: return to_float(((const bf16*)p)[i]);
        case F64: return real(((const double*)p)[i]);
        default: return ((const int8_t*)p)[i];
    }
}
template <class real>
real load(const Mat& w, int64_t i) {
    return load<real>(w.p, w.dtype, i);
}
template <class real>
void save(void* p, int64_t dtype, int64_t i, real x) {
    switch (dtype) {
        case F32: ((float*)p)[i] = float(x); break;
        case BF16: store(((bf16*)p)[i], float(x)); break;
        default: ((double*)p)[i] = x;
    }
}

// Neighbours at a time: the choice of a type stands outside the loop.
template <class real, class T>
void convert_all(const T* from, int64_t n, real* __restrict to) {
    for (int64_t i = 0; i < n; i++) to[i] = real(to_float(from[i]));
}
template <class real>
void load_all(const void* p, int64_t dtype, int64_t at, int64_t n, real* __restrict to) {
    if (dtype == BF16) convert_all((const bf16*)p + at, n, to);
    else if (dtype == F32) convert_all((const float*)p + at, n, to);
    else convert_all((const double*)p + at, n, to);
}
template <class real>
void save_all(void* p, int64_t dtype, int64_t at, int64_t n, const real* __restrict from) {
    if (dtype == BF16) {
        for (int64_t i = 0; i < n; i++) store(((bf16*)p + at)[i], float(from[i]));
    } else if (dtype == F32) {
        for (int64_t i = 0; i < n; i++) ((float*)p + at)[i] = float(from[i]);
    } else {
        for (int64_t i = 0; i < n; i++) ((double*)p + at)[i] = from[i];
    }
}

// 64 bytes of `real` at a time, in the compiler's own vectors: on any machine, and as fast as memory is read.
template <class T, int bytes>
struct Vector {
    typedef T type __attribute__((vector_size(bytes), aligned(alignof(T)), may_alias));
};
template <class real>
using Wide = typename Vector<real, 64>::type;
template <class real>
constexpr int64_t WIDTH = 64 / sizeof(real);

template <class real, class W>
Wide<real> widen(const W* p) {
    if constexpr (std::is_same_v<W, bf16>) {  // bf16 is the upper half of a float
        typedef typename Vector<uint16_t, 2 * WIDTH<real>>::type Half;
        typedef typename Vector<uint32_t, 4 * WIDTH<real>>::type Bits;
        typedef typename Vector<float, 4 * WIDTH<real>>::type Floats;
        Bits bits = __builtin_convertvector(*(const Half*)p, Bits) << 16;
        Floats floats;
        memcpy(&floats, &bits, sizeof floats);
        return __builtin_convertvector(floats, Wide<real>);
    } else if constexpr (std::is_same_v<W, real>) {
        return *(const Wide<real>*)p;
    } else {
        typedef typename Vector<W, WIDTH<real> * sizeof(W)>::type Same;
        return __builtin_convertvector(*(const Same*)p, Wide<real>);
    }
}

template <class real>
real sum_of(Wide<real> v) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<real, float>) return _mm512_reduce_add_ps((__m512)v);  // the halves as below
#endif
    real x[WIDTH<real>];
    memcpy(x, &v, sizeof v);
    for (int64_t half = WIDTH<real> / 2; half; half /= 2)
        for (int64_t i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}

#if defined(__AVX512F__)
// The sum of each of 16 vectors: transposed and added, halves at a time, in the order of `sum_of`.
inline __m512 sums_of_16(const Wide<float>* v) {
    __m512 four[4], eight[2];
    UNROLL for (int k = 0; k < 4; k++) {
        __m512 a = (__m512)v[4 * k], b = (__m512)v[4 * k + 1], c = (__m512)v[4 * k + 2], e = (__m512)v[4 * k + 3];
        __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        __m512 ce = _mm512_add_ps(_mm512_unpacklo_ps(c, e), _mm512_unpackhi_ps(c, e));
        four[k] = _mm512_add_ps(_mm512_shuffle_ps(ab, ce, 0x44), _mm512_shuffle_ps(ab, ce, 0xee));
    }
    UNROLL for (int k = 0; k < 2; k++) {
        __m512 low = _mm512_shuffle_f32x4(four[2 * k], four[2 * k + 1], 0x88);
        eight[k] = _mm512_add_ps(low, _mm512_shuffle_f32x4(four[2 * k], four[2 * k + 1], 0xdd));
    }
    __m512 low = _mm512_shuffle_f32x4(eight[0], eight[1], 0x88);
    return _mm512_add_ps(low, _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd));
}
#endif

// The sum of each of `count` vectors, at most as many as a vector has numbers.
template <class real>
void each_sum(const Wide<real>* v, int64_t count, real* out) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<real, float>) {
        if (count == 16) {
            __m512 all = sums_of_16(v);
            memcpy(out, &all, sizeof all);
            return;
        }
    }
#endif
    for (int64_t r = 0; r < count; r++) out[r] = sum_of<real>(v[r]);
}

template <class real, class W>
real dot(const W* __restrict w, const real* __restrict x, int64_t n) {
    Wide<real> a = {}, b = {};
    int64_t i = 0;
    for (constexpr int64_t L = WIDTH<real>; i + 2 * L <= n; i += 2 * L) {
        a += widen<real>(w + i) * widen<real>(x + i);
        b += widen<real>(w + i + L) * widen<real>(x + i + L);
    }
    real s = sum_of<real>(a + b);
    for (; i < n; i++) s += real(to_float(w[i])) * x[i];
    return s;
}

// By the C library's exp, as torch's own of one number; kernels.h has `exponential` for many at a time.
template <class real>
real sigmoid(real x) {
    return 1 / (1 + std::exp(-x));
}
template <class real>
real exact_silu(real x) {
    return x / (1 + std::exp(-x));
}
template <class real>
real softplus(real x) {
    return x > 20 ? x : std::log1p(std::exp(x));
}

}  // namespace
