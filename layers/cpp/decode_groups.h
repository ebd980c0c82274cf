// Rows of a matrix in groups (layers/quantised/group_weight.py) times several vectors: a code is never written back as
// a float.
//
// Codes are read as words of 32 bits, as many as a vector has floats: a block. A word holds EACH neighbouring codes, so
// each float of a sum belongs to EACH neighbours of one group, and a block is scaled by one vector product. The vectors
// are put into the order of the words once (`arrange`): plane j has the number j of every word.
#pragma once
#include <vector>

#include "vectors.h"

#define INLINE __attribute__((always_inline)) inline

namespace {

// A model's dtype T, and the dtype of its arithmetic.
template <class T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

// bf16 times bf16 by an instruction for pairs.
#if defined(__AVX512BF16__)
template <class T>
constexpr bool PAIRS = std::is_same_v<T, bf16>;
#else
template <class T>
constexpr bool PAIRS = false;
#endif

constexpr int64_t LANE = WIDTH<float>;  // floats of a vector, and words of a block
template <int bits>
constexpr int64_t EACH = 32 / bits;
template <int bits>
constexpr int64_t BLOCK = LANE * EACH<bits>;  // codes
template <int bits>
constexpr int64_t blocks_of(int64_t n) {
    return (n + BLOCK<bits> - 1) / BLOCK<bits>;
}

// Numbers of a vector of n in the order of the words, and behind them, in each block, the sums over each word. Where
// bf16 pairs are multiplied, a word is two neighbours of 16 bits, each with half the planes.
template <class X>
using Element = std::conditional_t<sizeof(X) == 2, uint16_t, X>;
template <int bits, class X>
constexpr int64_t arranged_size(int64_t n) {  // in floats
    return blocks_of<bits>(n) * (BLOCK<bits> * sizeof(X) / sizeof(float) + LANE);
}
template <int bits, class X>
const float* sums_behind(const X* arranged, int64_t n) {
    return (const float*)(arranged + blocks_of<bits>(n) * BLOCK<bits>);
}
template <int bits, class X>
void arrange(const X* x, int64_t n, X* to) {
    constexpr int64_t halves = sizeof(float) / sizeof(X), each = EACH<bits> / halves, lanes = LANE * halves;
    const int64_t blocks = blocks_of<bits>(n);
    float* sums = (float*)sums_behind<bits>(to, n);
    for (int64_t b = 0; b < blocks; b++, to += BLOCK<bits>, sums += LANE) {
        const int64_t begin = b * BLOCK<bits>, size = std::min(BLOCK<bits>, n - begin);
        X block[BLOCK<bits>] = {};
        std::copy_n(x + begin, size, block);
        for (int64_t j = 0; j < each; j++)
            for (int64_t lane = 0; lane < lanes; lane++) to[j * lanes + lane] = block[lane * each + j];
        for (int64_t lane = 0; lane < LANE; lane++) {
            float sum = 0;
            for (int64_t j = 0; j < EACH<bits>; j++) sum += to_float(block[lane * EACH<bits> + j]);
            sums[lane] = sum;
        }
    }
}

inline float from_half(uint16_t h) {  // fp16, subnormal numbers included
    uint32_t bits = uint32_t(h & 0x7fff) << 13;
    float x;
    memcpy(&x, &bits, 4);
    x *= 0x1p112f;  // the exponent's offset is 127 there and 15 here
    memcpy(&bits, &x, 4);
    bits |= (h & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
    bits |= uint32_t(h & 0x8000) << 16;
    memcpy(&x, &bits, 4);
    return x;
}

struct half {
    uint16_t bits;
};
inline float to_float(half x) { return from_half(x.bits); }

// LANE neighbours as floats.
template <class W>
INLINE Wide<float> floats_at(const W* p) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<W, half>) return (Wide<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    if constexpr (std::is_same_v<W, half>) return (Wide<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#endif
    if constexpr (std::is_same_v<W, half>) {
        Wide<float> found;
        for (int64_t i = 0; i < LANE; i++) found[i] = to_float(p[i]);
        return found;
    } else {
        return widen<float>(p);
    }
}
// The same from place `at` on, with zeros from `end` on, where nothing is read.
template <class W>
INLINE Wide<float> floats_before(const W* p, int64_t at, int64_t end) {
    if (at + LANE <= end) return floats_at(p + at);
    W some[LANE] = {};
    std::copy_n(p + at, end - at, some);
    return floats_at(some);
}
INLINE Wide<float> scales_before(const void* p, int64_t dtype, int64_t at, int64_t end) {
    if (dtype == F16) return floats_before((const half*)p, at, end);
    if (dtype == BF16) return floats_before((const bf16*)p, at, end);
    return floats_before((const float*)p, at, end);
}

// `count` scales as floats.
inline void load_scales(const void* p, int64_t dtype, int64_t at, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += LANE) {
        const Wide<float> some = scales_before(p, dtype, at + i, at + count);
        memcpy(to + i, &some, std::min(LANE, count - i) * sizeof(float));
    }
}

// The numbers of a block's groups, one a float of a sum.
typedef typename Vector<int32_t, WIDE_BYTES>::type Places;
INLINE Wide<float> spread(Wide<float> from, Places which) {
#if defined(__AVX512F__)
    return (Wide<float>)_mm512_permutexvar_ps((__m512i)which, (__m512)from);
#elif defined(__AVX2__)
    return (Wide<float>)_mm256_permutevar8x32_ps((__m256)from, (__m256i)which);
#else
    Wide<float> found;
    for (int64_t i = 0; i < LANE; i++) found[i] = from[which[i]];
    return found;
#endif
}

// sums[v] = the products of one block's codes, from w on, and of vector v, from x[v] + at on. Codes of 4 bits are less 8
// if CENTRED, else as they are stored.
template <class X>
constexpr bool CENTRED = sizeof(X) == 2;

template <int bits, int V>
INLINE void block_dots(const uint8_t* w, const float* const* x, int64_t at, Wide<float>* sums) {
    typedef typename Vector<uint32_t, WIDE_BYTES>::type Words;
    Words words;
    memcpy(&words, w, sizeof words);  // rows begin at any byte
    UNROLL for (int v = 0; v < V; v++) sums[v] = Wide<float>{};
    UNROLL for (int64_t j = 0; j < EACH<bits>; j++, words >>= bits) {
        Wide<float> codes;
        if constexpr (bits == 4) codes = __builtin_convertvector((Places)(words & 15), Wide<float>);
        else codes = __builtin_convertvector((Places)(words << 24) >> 24, Wide<float>);
        UNROLL for (int v = 0; v < V; v++)
            sums[v] = multiply_add<float>(codes, widen<float>(x[v] + at + j * LANE), sums[v]);
    }
}

#if defined(__AVX512BF16__)
// bf16 has all whole numbers up to 256. Those of half a byte come from a table: the instruction reads 5 bits of its
// index, so the table has each twice. A code of 8 bits is 16 · its high half + its low half, and each half a table's.
struct Table {
    uint16_t values[32];
    constexpr Table(int first, int step, int wrap) : values() {
        for (int i = 0; i < 32; i++) {
            int number = (first + step * (i % 16));
            if (i % 16 >= wrap) number -= 16 * step;
            values[i] = bits_of(number);
        }
    }
    static constexpr uint16_t bits_of(int number) {
        const int size = number < 0 ? -number : number;
        int power = 0;
        while (size >> (power + 1)) power++;
        const int fraction = ((size << 7) >> power) & 127;
        return uint16_t(size == 0 ? 0 : (number < 0 ? 0x8000 : 0) | (127 + power) << 7 | fraction);
    }
};
alignas(64) constexpr Table CENTRED_HALF(-8, 1, 16), LOW_HALF(0, 1, 16), HIGH_HALF(0, 16, 8);

template <int bits, int V>
INLINE void block_dots(const uint8_t* w, const bf16* const* x, int64_t at, Wide<float>* sums) {
    __m512i words = _mm512_loadu_si512(w);
    __m512 sum[V] = {};
    UNROLL for (int j = 0; j < 4; j++) {
        const Table& table = bits == 4 ? CENTRED_HALF : j % 2 ? HIGH_HALF : LOW_HALF;
        const __m512bh codes = (__m512bh)_mm512_permutexvar_epi16(words, _mm512_load_si512(table.values));
        const int64_t plane = at + 32 * (bits == 4 ? j : j / 2);
        words = _mm512_srli_epi16(words, 4);
        UNROLL for (int v = 0; v < V; v++)
            sum[v] = _mm512_dpbf16_ps(sum[v], codes, (__m512bh)_mm512_loadu_si512(x[v] + plane));
    }
    UNROLL for (int v = 0; v < V; v++) sums[v] = (Wide<float>)sum[v];
}
#endif

// Rows of a matrix in groups.
struct GroupRows {
    const uint8_t* codes;
    const void* scale;
    const int8_t* zero;
    int64_t scale_dtype, group, groups, n, bytes;  // `bytes` of a row's codes

    GroupRows(const Mat& w, int64_t columns)
        : codes((const uint8_t*)w.p), scale(w.scale), zero((const int8_t*)w.zero), scale_dtype(w.scale_dtype),
          group(w.group), groups(columns / w.group), n(columns), bytes(w.dtype == I4 ? columns / 2 : columns) {}
};

// The scales and zero points of rows up to `last`. LANE groups, a chunk, are in a vector at a time.
template <int bits, class X>
struct GroupScales {
    static constexpr int64_t B = BLOCK<bits>;
    static constexpr bool UNCENTRED = bits == 4 && !CENTRED<X>;
    const GroupRows& w;
    const int64_t end;          // of all rows' groups
    const bool fine;            // a block has several groups
    const int64_t per_block;    // the first group of block b is b * per_block >> shift
    const int shift;
    const int64_t blocks, chunk;  // of a row; of a vector of groups
    Places which = {};

    GroupScales(const GroupRows& rows, int64_t last)
        : w(rows), end(last * rows.groups), fine(w.groups > 1 && w.group < B), per_block(fine ? B / w.group : 1),
          shift(fine ? 0 : w.groups == 1 ? 31 : __builtin_ctzll(w.group / B)), blocks(blocks_of<bits>(w.n)),
          chunk(fine ? LANE / per_block : w.groups == 1 ? blocks : LANE << shift) {
        for (int64_t lane = 0; fine && lane < LANE; lane++) which[lane] = int32_t(lane * EACH<bits> / w.group);
    }

    INLINE bool has_zero() const { return UNCENTRED || w.zero; }
    // Of a chunk, from group `at` on.
    INLINE Wide<float> scales(int64_t at) const { return scales_before(w.scale, w.scale_dtype, at, end); }
    INLINE Wide<float> zeros(int64_t at) const {
        constexpr float base = bits == 4 && !UNCENTRED ? 8 : 0;
        return w.zero ? floats_before(w.zero, at, end) - base : Wide<float>{} + (UNCENTRED ? 8.0f : 0.0f);
    }
};

constexpr int64_t CODES_AHEAD = 1 << 11;  // bytes that are fetched ahead

// sums[v] = the products of a row and vector x[v], to be added up.
template <int V, int bits, class X>
INLINE void group_dots(const GroupScales<bits, X>& s, int64_t row, const X* const* x, Wide<float>* sums) {
    constexpr int64_t B = BLOCK<bits>, bytes = B * bits / 8;
    const GroupRows& w = s.w;
    const int64_t whole = w.n / B;
    const uint8_t* codes = w.codes + row * w.bytes;
    Wide<float> total[V] = {};
    for (int64_t b = 0; b < s.blocks;) {
        const int64_t at = row * w.groups + (b * s.per_block >> s.shift), limit = b + s.chunk;
        const Wide<float> scales = s.scales(at), zeros = s.has_zero() ? -s.zeros(at) : Wide<float>{};
        Places place = s.which;  // of the block's groups among those of the chunk, before the shift
        auto add = [&](const uint8_t* from) __attribute__((always_inline)) {
            Wide<float> part[V];
            block_dots<bits, V>(from, x, b * B, part);
            if (s.has_zero()) {
                const Wide<float> zero = spread(zeros, place >> s.shift);
                UNROLL for (int v = 0; v < V; v++)
                    part[v] = multiply_add<float>(zero, widen<float>(sums_behind<bits>(x[v], w.n) + b * LANE), part[v]);
            }
            const Wide<float> scale = spread(scales, place >> s.shift);
            UNROLL for (int v = 0; v < V; v++) total[v] = multiply_add<float>(part[v], scale, total[v]);
            place += int32_t(s.per_block), b++;
        };
        for (const int64_t end = std::min(limit, whole); b < end; codes += bytes) {
            __builtin_prefetch(codes + CODES_AHEAD);
            add(codes);
        }
        if (b == whole && b < std::min(limit, s.blocks)) {
            uint8_t rest[bytes] = {};
            memcpy(rest, codes, w.bytes - whole * bytes);
            add(rest);
        }
    }
    UNROLL for (int v = 0; v < V; v++) sums[v] = total[v];
}

// out[v * stride + i] = row `first + i` · x[v], for V vectors.
template <int V, int bits, class X>
__attribute__((noinline)) void group_block(const GroupScales<bits, X>& s, int64_t first, int64_t rows, const X* const* x,
                                           float* out, int64_t stride) {
    constexpr int64_t TOGETHER = SUMS / V;
    Wide<float> sums[SUMS] = {};
    float found[SUMS];
    for (int64_t begin = 0; begin < rows; begin += TOGETHER) {
        const int64_t size = std::min(TOGETHER, rows - begin);
        for (int64_t i = 0; i < size; i++) group_dots<V>(s, first + begin + i, x, sums + i * V);
        each_sum<float>(sums, found);
        for (int v = 0; v < V; v++)
            for (int64_t i = 0; i < size; i++) out[v * stride + begin + i] = found[i * V + v];
    }
}

#if defined(__AVX512BW__)
// A group of n codes of 4 bits, a multiple of 32, in bf16: each is looked up among the group's 16 values. A byte goes into
// both halves of a word, shifted by 4 bits in the upper one; the instruction reads 5 bits, so the table has each twice.
inline void look_up(const uint8_t* from, int64_t n, float zero, float scale, bf16* to) {
    const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 values = _mm512_mul_ps(_mm512_sub_ps(codes, _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
    const __m512i bits = _mm512_castps_si512(values);  // rounded as `store` does
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q),
                                    _mm512_set1_epi32(0x7fc0));
    const __m256i table = _mm512_cvtepi32_epi16(rounded);
    const __m512i all = _mm512_inserti64x4(_mm512_castsi256_si512(table), table, 1);
    for (int64_t i = 0; i < n; i += 32) {
        const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(from + i / 2)));
        const __m512i which = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
        _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(which, all));
    }
}
#endif

// Rows of a matrix in groups as numbers: (code − zero) · scale, rounded once, as the definition does.
struct Dequantised {
    const GroupRows w;
    const bool four;
    std::vector<float> scales, zeros, numbers;
    std::vector<uint8_t> codes;

    Dequantised(const Mat& mat, int64_t columns)
        : w(mat, columns), four(mat.dtype == I4), scales(w.groups), zeros(w.groups, four ? 8.0f : 0.0f),
          numbers(columns), codes(four ? columns : 0) {}

    // Rows `first` up to `last` as type To.
    template <class To>
    void read(int64_t first, int64_t last, To* to) {
        for (int64_t row = first; row < last; row++, to += w.n) {
            load_scales(w.scale, w.scale_dtype, row * w.groups, w.groups, scales.data());
            if (w.zero)
                for (int64_t g = 0; g < w.groups; g++) zeros[g] = w.zero[row * w.groups + g];
            const uint8_t* from = w.codes + row * w.bytes;
#if defined(__AVX512BW__)
            if constexpr (std::is_same_v<To, bf16>)
                if (four && w.group % 32 == 0) {
                    for (int64_t g = 0; g < w.groups; g++)
                        look_up(from + g * w.group / 2, w.group, zeros[g], scales[g], to + g * w.group);
                    continue;
                }
#endif
            if (four) {
                unpack(from);
                scale_all(codes.data());
            } else {
                scale_all((const int8_t*)from);
            }
            convert(to, numbers.data(), w.n);
        }
    }

    void unpack(const uint8_t* __restrict from) {
        uint8_t* __restrict to = codes.data();
        for (int64_t i = 0; i < w.bytes; i++) to[2 * i] = from[i] & 15, to[2 * i + 1] = from[i] >> 4;
    }
    template <class Code>
    void scale_all(const Code* __restrict from) {
        float* __restrict to = numbers.data();
        for (int64_t g = 0; g < w.groups; g++, from += w.group, to += w.group) {
            const float zero = zeros[g], scale = scales[g];
            for (int64_t i = 0; i < w.group; i++) to[i] = (float(from[i]) - zero) * scale;
        }
    }
};

}  // namespace
