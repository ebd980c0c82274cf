// Numbers of any dtype as `real`, float or double, and sums over them at the speed of memory.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "decode_arguments.h"
#include "kernels.h"

namespace {

inline double to_float(double x) { return x; }
using ::multiply_add, ::to_float;

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

// As many `real` at a time as the processor takes, in the compiler's own vectors: on any machine.
#if defined(__AVX512F__)
constexpr int WIDE_BYTES = 64;
#else
constexpr int WIDE_BYTES = 32;
#endif
template <class T, int bytes>
struct Vector {
    typedef T type __attribute__((vector_size(bytes), aligned(alignof(T)), may_alias));
};
template <class real>
using Wide = typename Vector<real, WIDE_BYTES>::type;
template <class real>
constexpr int64_t WIDTH = WIDE_BYTES / sizeof(real);

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

// The first `count` numbers, then zeros.
template <class real, class W>
Wide<real> widen_some(const W* p, int64_t count) {
    W some[WIDTH<real>] = {};
    std::copy_n(p, count, some);
    return widen<real>(some);
}

// a · b + c. Rounded once where processors do so, and everywhere alike: the compiler itself contracts nothing.
template <class real>
Wide<real> multiply_add(Wide<real> a, Wide<real> b, Wide<real> c) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<real, float>) return (Wide<real>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
    else return (Wide<real>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
    if constexpr (std::is_same_v<real, float>) return (Wide<real>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
    else return (Wide<real>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
    return a * b + c;
#endif
}
template <class real>
real multiply_add_one(real a, real b, real c) {
#if defined(__FMA__) || defined(__aarch64__)
    return std::fma(a, b, c);
#else
    return a * b + c;
#endif
}

// Whether `put_past` may write rows of n numbers from `to` on.
template <class real>
bool whole_lines(const real* to, int64_t n) {
    return reinterpret_cast<uintptr_t>(to) % 64 == 0 && n * sizeof(real) % 64 == 0;
}
// Write past the caches, which then need not read first what is overwritten. `finish_puts` before others read it.
template <class real>
void put_past(real* to, Wide<real> v) {
#if defined(__AVX512F__)
    _mm512_stream_ps((float*)to, (__m512)v);
#elif defined(__AVX2__)
    _mm256_stream_ps((float*)to, (__m256)v);
#else
    memcpy(to, &v, sizeof v);
#endif
}
inline void finish_puts() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// The sum of a vector's numbers: its halves are added until one is left.
template <class real, int bytes>
real sum_of_halves(typename Vector<real, bytes>::type v) {
    if constexpr (bytes == sizeof(real)) return v[0];
    else {
        typename Vector<real, bytes / 2>::type low, high;
        memcpy(&low, &v, bytes / 2);
        memcpy(&high, (const char*)&v + bytes / 2, bytes / 2);
        return sum_of_halves<real, bytes / 2>(low + high);
    }
}

#if defined(__AVX512F__)
// The sum of each of 16 vectors: transposed and added.
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

// The sums of SUMS vectors, each in an order that does not depend on the others.
constexpr int SUMS = 16;
template <class real>
void each_sum(const Wide<real>* v, real* out) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<real, float>) {
        __m512 all = sums_of_16(v);
        memcpy(out, &all, sizeof all);
        return;
    }
#endif
    for (int r = 0; r < SUMS; r++) out[r] = sum_of_halves<real, WIDE_BYTES>(v[r]);
}
template <class real>
real sum_of(Wide<real> v) {
    return sum_of_halves<real, WIDE_BYTES>(v);
}

// The sum of squares of n numbers.
template <class real>
real sum_of_squares(const real* x, int64_t n) {
    constexpr int64_t L = WIDTH<real>;
    Wide<real> sum = {};
    int64_t i = 0;
    for (; i + L <= n; i += L) sum = multiply_add<real>(widen<real>(x + i), widen<real>(x + i), sum);
    const Wide<real> rest = widen_some<real>(x + i, n - i);
    return sum_of<real>(multiply_add<real>(rest, rest, sum));
}

inline float exponential_of(float x) { return exponential(x); }
inline double exponential_of(double x) { return std::exp(x); }
template <class real>
real silu_of(real x) {
    return x / (1 + exponential_of(-x));
}

// By the C library's exp, for one number.
template <class real>
real sigmoid(real x) {
    return 1 / (1 + std::exp(-x));
}
template <class real>
real softplus(real x) {
    return x > 20 ? x : std::log1p(std::exp(x));
}

}  // namespace
