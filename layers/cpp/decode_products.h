// Rows of a matrix times several vectors at once: a row is read and widened once for all of them.
//
// Every product of a step is made here, and each number of it in the same order, whatever the number of vectors and
// rows: two sums over alternate vectors of columns, their sum, then `each_sum`. So a token's numbers do not depend on
// the tokens beside it.
#pragma once
#include <vector>

#include "decode_groups.h"

namespace {

// Vectors whose sums stay in registers while a row is read.
#if defined(__AVX512F__)
constexpr int AT_ONCE = 8;
#else
constexpr int AT_ONCE = 4;
#endif
constexpr int64_t NEAREST = 1 << 14;  // bytes of rows that stay in the nearest cache for further vectors
constexpr int64_t AHEAD = 1 << 12;    // bytes that are fetched ahead, where the processor's own guess comes too late

// sums[v] = the products of row `w` and vector x[v], to be added up.
template <int V, class real, class W>
inline void dots(const W* w, int64_t n, const real* const* x, Wide<real>* sums) {
    constexpr int64_t L = WIDTH<real>;
    Wide<real> a[V] = {}, b[V] = {};
    int64_t c = 0;
    for (; c + 2 * L <= n; c += 2 * L) {
        if constexpr (V > 1)
            for (size_t byte = 0; byte < 2 * L * sizeof(W); byte += 64)
                __builtin_prefetch((const char*)(w + c) + AHEAD + byte);
        const Wide<real> first = widen<real>(w + c), second = widen<real>(w + c + L);
        UNROLL for (int v = 0; v < V; v++) a[v] = multiply_add<real>(first, widen<real>(x[v] + c), a[v]);
        UNROLL for (int v = 0; v < V; v++) b[v] = multiply_add<real>(second, widen<real>(x[v] + c + L), b[v]);
    }
    if (c < n) {
        const int64_t some = std::min(L, n - c), more = n - c - some;
        const Wide<real> first = widen_some<real>(w + c, some), second = widen_some<real>(w + c + some, more);
        UNROLL for (int v = 0; v < V; v++) {
            a[v] = multiply_add<real>(first, widen_some<real>(x[v] + c, some), a[v]);
            b[v] = multiply_add<real>(second, widen_some<real>(x[v] + c + some, more), b[v]);
        }
    }
    UNROLL for (int v = 0; v < V; v++) sums[v] = a[v] + b[v];
}

#if defined(__AVX512BF16__)
template <int V, class real, class W>
inline void dots(const bf16* w, int64_t n, const bf16* const* x, Wide<float>* sums) {
    auto pairs = [](const bf16* p, __mmask32 which) { return (__m512bh)_mm512_maskz_loadu_epi16(which, p); };
    auto all = [](const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); };
    __m512 a[V] = {}, b[V] = {};
    int64_t c = 0;
    for (; c + 64 <= n; c += 64) {
        if constexpr (V > 1) {
            __builtin_prefetch((const char*)(w + c) + AHEAD);
            __builtin_prefetch((const char*)(w + c) + AHEAD + 64);
        }
        const __m512bh first = all(w + c), second = all(w + c + 32);
        UNROLL for (int v = 0; v < V; v++) a[v] = _mm512_dpbf16_ps(a[v], first, all(x[v] + c));
        UNROLL for (int v = 0; v < V; v++) b[v] = _mm512_dpbf16_ps(b[v], second, all(x[v] + c + 32));
    }
    if (c < n) {
        const __mmask32 some = n - c < 32 ? (1u << (n - c)) - 1 : ~0u, more = n - c <= 32 ? 0 : (1u << (n - c - 32)) - 1;
        const __m512bh first = pairs(w + c, some), second = pairs(w + c + 32, more);
        UNROLL for (int v = 0; v < V; v++) {
            a[v] = _mm512_dpbf16_ps(a[v], first, pairs(x[v] + c, some));
            b[v] = _mm512_dpbf16_ps(b[v], second, pairs(x[v] + c + 32, more));
        }
    }
    UNROLL for (int v = 0; v < V; v++) sums[v] = (Wide<float>)_mm512_add_ps(a[v], b[v]);
}
#endif

// out[v * stride + row] = row `row` of w (rows, n) · x[v], for V vectors.
template <int V, class real, class W, class X>
__attribute__((noinline)) void dot_block(const W* w, int64_t rows, int64_t n, const X* const* x, real* out,
                                         int64_t stride) {
    constexpr int64_t TOGETHER = SUMS / V;  // rows whose sums are added up together
    Wide<real> sums[SUMS] = {};
    real found[SUMS];
    for (int64_t begin = 0; begin < rows; begin += TOGETHER) {
        const int64_t size = std::min(TOGETHER, rows - begin);
        for (int64_t i = 0; i < size; i++) dots<V, real, W>(w + (begin + i) * n, n, x, sums + i * V);
        each_sum<real>(sums, found);
        for (int v = 0; v < V; v++)
            for (int64_t i = 0; i < size; i++) out[v * stride + begin + i] = found[i * V + v];
    }
}

// Call `use` with a number from 1 to AT_ONCE as a constant.
template <int most = AT_ONCE, class Use>
void as_constant(int64_t number, Use&& use) {
    if constexpr (most > 1)
        if (number < most) return as_constant<most - 1>(number, use);
    use(std::integral_constant<int, most>());
}

// Divide any number of vectors, and rows of so many bytes, into blocks: block(number of vectors as a constant, first
// vector, first row, rows).
template <class Block>
void each_block(int64_t rows, int64_t row_bytes, int64_t vectors, Block&& block) {
    if (!vectors) return;
    const int64_t parts = (vectors + AT_ONCE - 1) / AT_ONCE, most = (vectors + parts - 1) / parts;
    const int64_t together = parts > 1 ? std::max<int64_t>(1, NEAREST / (row_bytes + 1)) : rows;
    for (int64_t begin = 0; begin < rows; begin += together)
        for (int64_t v = 0; v < vectors; v += most)
            as_constant(std::min(most, vectors - v),
                        [&](auto count) { block(count, v, begin, std::min(together, rows - begin)); });
}

// The same for any number of vectors.
template <class real, class W, class X>
void dot_rows(const W* w, int64_t rows, int64_t n, const X* const* x, int64_t vectors, real* out, int64_t stride) {
    each_block(rows, n * int64_t(sizeof(W)), vectors, [&](auto count, int64_t v, int64_t begin, int64_t size) {
        dot_block<count.value, real>(w + begin * n, size, n, x + v, out + v * stride + begin, stride);
    });
}

// The same for rows in groups, from row `first` on; x as `arrange` orders it.
template <int bits, class X>
void group_rows(const GroupRows& w, int64_t first, int64_t rows, const X* const* x, int64_t vectors, float* out,
                int64_t stride) {
    const GroupScales<bits, X> scales(w, first + rows);
    each_block(rows, w.bytes, vectors, [&](auto count, int64_t v, int64_t begin, int64_t size) {
        group_block<count.value, bits>(scales, first + begin, size, x + v, out + v * stride + begin, stride);
    });
}

// What multiplies weights in groups.
template <class T>
using Low = std::conditional_t<PAIRS<T>, bf16, float>;

// The orders of numbers that matrices want, to be joined by |.
enum Order : int { PLAIN = 0, FOURS = 1, EIGHTS = 2 };
template <class... Mats>
int orders_of(const Mats&... mats) {
    return ((mats.p == nullptr ? PLAIN : mats.dtype == I4 ? FOURS : mats.dtype == I8 ? EIGHTS : PLAIN) | ... | 0);
}

// Vectors that are multiplied: as `real`, in bf16 where pairs of bf16 are multiplied, and in the orders of codes.
template <class T>
struct Vectors {
    const Real<T>* const* x;
    const bf16* const* low;
    const Low<T>* const* fours;
    const Low<T>* const* eights;
    int64_t count;
};

// Holds what `Vectors` points to.
template <class T>
class Operands {
    typedef Real<T> real;
    std::vector<bf16> low;
    std::vector<const real*> x;
    std::vector<const bf16*> low_x;
    std::vector<const real*> some;
    std::vector<const bf16*> low_some;
    std::vector<float> fours, eights;  // the numbers in these orders
    std::vector<const Low<T>*> fours_x, eights_x, fours_some, eights_some;

    template <int bits>
    void order(bool wanted, int64_t n, std::vector<float>& to, std::vector<const Low<T>*>& at) {
        at.assign(x.size(), nullptr);
        if constexpr (std::is_same_v<real, float>) {
            const int64_t size = arranged_size<bits, Low<T>>(n);
            if (wanted) to.resize(x.size() * size);
            for (size_t v = 0; wanted && v < x.size(); v++) {
                Low<T>* here = (Low<T>*)&to[v * size];
                if constexpr (PAIRS<T>) arrange<bits>(low_x[v], n, here);
                else arrange<bits>(x[v], n, here);
                at[v] = here;
            }
        }
    }

public:
    // `count` vectors of n numbers, one after the other, also in these orders.
    void read(const real* from, int64_t count, int64_t n, int orders = PLAIN) {
        x.resize(count), low_x.resize(count);
        if constexpr (PAIRS<T>) {
            low.resize(count * n);
            convert(low.data(), from, count * n);
        }
        for (int64_t v = 0; v < count; v++) x[v] = from + v * n, low_x[v] = low.data() + (PAIRS<T> ? v * n : 0);
        order<4>(orders & FOURS, n, fours, fours_x);
        order<8>(orders & EIGHTS, n, eights, eights_x);
    }

    Vectors<T> all() const { return {x.data(), low_x.data(), fours_x.data(), eights_x.data(), int64_t(x.size())}; }

    // Those numbered which[0], which[1], ...; until the next call.
    Vectors<T> pick(const int64_t* which, int64_t count) {
        some.resize(count), low_some.resize(count), fours_some.resize(count), eights_some.resize(count);
        for (int64_t v = 0; v < count; v++) some[v] = x[which[v]], low_some[v] = low_x[which[v]];
        for (int64_t v = 0; v < count; v++) fours_some[v] = fours_x[which[v]], eights_some[v] = eights_x[which[v]];
        return {some.data(), low_some.data(), fours_some.data(), eights_some.data(), count};
    }
};

// out[v * stride + row - first] = row `row` of w (…, n) · vector v, neither rounded nor with a bias.
template <class T>
void multiply_rows(Mat w, int64_t first, int64_t last, int64_t n, const Vectors<T>& x, Real<T>* out, int64_t stride) {
    auto rows_of = [&](auto* p) {
        typedef std::remove_cv_t<std::remove_pointer_t<decltype(p)>> W;
        p += first * n;
        if constexpr (PAIRS<T> && std::is_same_v<W, bf16>) dot_rows(p, last - first, n, x.low, x.count, out, stride);
        else dot_rows(p, last - first, n, x.x, x.count, out, stride);
    };
    if constexpr (std::is_same_v<Real<T>, float>) {  // Python refuses groups in a model of fp64
        if (w.dtype == I4) return group_rows<4>({w, n}, first, last - first, x.fours, x.count, out, stride);
        if (w.dtype == I8) return group_rows<8>({w, n}, first, last - first, x.eights, x.count, out, stride);
    }
    switch (w.dtype) {
        case F32: return rows_of((const float*)w.p);
        case BF16: return rows_of((const bf16*)w.p);
        default: return rows_of((const double*)w.p);
    }
}

}  // namespace
