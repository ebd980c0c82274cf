// Products of experts: each multiplies its own run of rows with its own weights, forward and backward.
//
// All three products are C = A B with vectors along the columns of C. A is read as it lies, a number (bf16: a pair) at a
// time. B is copied into panels of a few vectors, padded with zeros, which stay in the caches. So no weight is
// rearranged on the way forward: there the weights are A and the rows, of which an expert has few, are B.
#include <algorithm>
#include <optional>

#include "decode_groups.h"
#include "kernels.h"

namespace {

constexpr int PANEL = 3 * LANES;  // columns of a panel of B; fewer in the last ones
constexpr int TALL = 16;          // rows of C that are computed before they are stored: a cache line of the result

// The type of products of numbers In: bf16 where the processor multiplies in it.
template <class In>
using Multiplied = std::conditional_t<std::is_same_v<In, float>, float, low>;

// c (MR, NV vectors) = a b. a: rows with distance `row`, padded to pairs; b: a panel of NV vectors.
template <class T, int MR, int NV>
void tile(float* c, const T* a, int64_t row, const T* b, int64_t depth) {
    vec sum[MR][NV] = {};
    for (int64_t p = 0; p < depth; p += PAIR<T>, b += NV * LANES * PAIR<T>)
        UNROLL for (int r = 0; r < MR; r++) UNROLL for (int w = 0; w < NV; w++)
            sum[r][w] = multiply_add(sum[r][w], a + r * row + p, b + w * LANES * PAIR<T>);
    UNROLL for (int r = 0; r < MR; r++) UNROLL for (int w = 0; w < NV; w++) *(vec*)(c + r * PANEL + w * LANES) = sum[r][w];
}
// Rows of a tile of NV vectors: as many sums as registers hold.
template <int NV>
constexpr int TILE_ROWS = LANES == 16 ? 8 : NV == 3 ? 4 : NV == 2 ? 6 : 8;
template <class T, int NV, int MR = TILE_ROWS<NV>>
void tile_of_rows(int rows, float* c, const T* a, int64_t row, const T* b, int64_t depth) {
    if constexpr (MR > 1)
        if (rows < MR) return tile_of_rows<T, NV, MR - 1>(rows, c, a, row, b, depth);
    tile<T, MR, NV>(c, a, row, b, depth);
}
// c (rows, PANEL) = a b for up to TALL rows and a panel of NV vectors.
template <class T, int NV>
void block_of(int rows, float* c, const T* a, int64_t row, const T* b, int64_t depth) {
    for (int r = 0; r < rows; r += TILE_ROWS<NV>)
        tile_of_rows<T, NV>(std::min(TILE_ROWS<NV>, rows - r), c + r * PANEL, a + r * row, row, b, depth);
}
template <class T>
void block(int rows, int vectors, float* c, const T* a, int64_t row, const T* b, int64_t depth) {
    if (vectors == 3) block_of<T, 3>(rows, c, a, row, b, depth);
    else if (vectors == 2) block_of<T, 2>(rows, c, a, row, b, depth);
    else block_of<T, 1>(rows, c, a, row, b, depth);
}

// How `count` columns are divided into panels: evenly, in vectors.
struct Panels {
    int64_t count, vectors, panels;
    explicit Panels(int64_t columns)
        : count(columns), vectors((columns + LANES - 1) / LANES), panels((vectors + 2) / 3) {}
    int64_t begin(int64_t p) const { return vectors * p / panels * LANES; }  // the first column
    int width(int64_t p) const { return int(begin(p + 1) - begin(p)); }      // padded
    int filled(int64_t p) const { return int(std::min(begin(p + 1), count) - begin(p)); }
};

inline int64_t paired(int64_t depth) { return (depth + 1) / 2 * 2; }

#if defined(__AVX512F__)
// 16 rows of 16 words, transposed.
inline void transpose16(const word* from, int64_t from_row, word* to, int64_t to_row) {
    __m512 r[16], t[16];
    UNROLL for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps((const float*)(from + i * from_row));
    UNROLL for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) UNROLL for (int j = 0; j < 2; j++) {
        r[i + 2 * j] = _mm512_shuffle_ps(t[i + j], t[i + 2 + j], 0x44);
        r[i + 2 * j + 1] = _mm512_shuffle_ps(t[i + j], t[i + 2 + j], 0xee);
    }
    UNROLL for (int i = 0; i < 16; i += 8) UNROLL for (int j = 0; j < 4; j++) {
        t[i + j] = _mm512_shuffle_f32x4(r[i + j], r[i + 4 + j], 0x88);
        t[i + 4 + j] = _mm512_shuffle_f32x4(r[i + j], r[i + 4 + j], 0xdd);
    }
    UNROLL for (int j = 0; j < 8; j++) {
        _mm512_storeu_ps((float*)(to + j * to_row), _mm512_shuffle_f32x4(t[j], t[8 + j], 0x88));
        _mm512_storeu_ps((float*)(to + (j + 8) * to_row), _mm512_shuffle_f32x4(t[j], t[8 + j], 0xdd));
    }
}
#elif defined(__AVX2__)
// 8 rows of 8 words, transposed.
inline void transpose8(const word* from, int64_t from_row, word* to, int64_t to_row) {
    __m256 r[8], t[8];
    UNROLL for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps((const float*)(from + i * from_row));
    UNROLL for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 8; i += 4) UNROLL for (int j = 0; j < 2; j++) {
        r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0x44);
        r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0xee);
    }
    UNROLL for (int j = 0; j < 4; j++) {
        _mm256_storeu_ps((float*)(to + j * to_row), _mm256_permute2f128_ps(r[j], r[4 + j], 0x20));
        _mm256_storeu_ps((float*)(to + (j + 4) * to_row), _mm256_permute2f128_ps(r[j], r[4 + j], 0x31));
    }
}
#endif

// to[j][i] = from[i][j]; words of 4 bytes.
inline void transpose(const word* from, int64_t from_row, int64_t rows, int64_t columns, word* to, int64_t to_row) {
    for (int64_t i = 0; i < rows; i += LANES)
        for (int64_t j = 0; j < columns; j += LANES) {
            const word* at = from + i * from_row + j;
            if (i + LANES <= rows && j + LANES <= columns) {
#if defined(__AVX512F__)
                transpose16(at, from_row, to + j * to_row + i, to_row);
                continue;
#elif defined(__AVX2__)
                transpose8(at, from_row, to + j * to_row + i, to_row);
                continue;
#endif
            }
            for (int64_t s = 0; s < std::min<int64_t>(LANES, columns - j); s++)
                for (int64_t r = 0; r < std::min<int64_t>(LANES, rows - i); r++)
                    to[(j + s) * to_row + i + r] = at[r * from_row + s];
        }
}

// The same for floats that are stored as bf16.
inline void transpose(const bf16* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t to_row) {
    float wide[LANES * LANES];
    for (int64_t i = 0; i < rows; i += LANES)
        for (int64_t j = 0; j < columns; j += LANES) {
            const int64_t high = std::min<int64_t>(LANES, rows - i), across = std::min<int64_t>(LANES, columns - j);
            for (int64_t r = 0; r < high; r++)
                for (int64_t s = 0; s < across; s++) wide[r * LANES + s] = to_float(from[(i + r) * from_row + j + s]);
            transpose((const word*)wide, LANES, high, across, (word*)(to + j * to_row + i), to_row);
        }
}

// A panel of B whose columns are `rows` rows of `depth` numbers: B[p][i] = from[i][p].
template <class T, class In>
void pack_rows(T* to, const In* from, int64_t from_row, int64_t rows, int64_t depth, int width) {
    if (rows < width || depth % 2) std::memset((void*)to, 0, paired(depth) * width * sizeof(T));
    if constexpr (std::is_same_v<T, In> && PAIR<T> == 1) {
        transpose((const word*)from, from_row, rows, depth, (word*)to, width);
    } else if constexpr (std::is_same_v<T, In>) {
        if (depth % 2 == 0 && from_row % 2 == 0)  // pairs lie side by side
            return transpose((const word*)from, from_row / 2, rows, depth / 2, (word*)to, width);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t p = 0; p < depth; p++) to[p / 2 * 2 * width + 2 * i + p % 2] = from[i * from_row + p];
    } else {
        transpose(from, from_row, rows, depth, to, width);
    }
}

// A panel of B that is `filled` columns of `depth` rows.
template <class T, class In>
void pack_columns(T* to, const In* from, int64_t from_row, int64_t depth, int filled, int width) {
    if (filled < width || depth % PAIR<T>) std::memset((void*)to, 0, paired(depth) * width * sizeof(T));
    if constexpr (PAIR<T> == 1) {
        for (int64_t p = 0; p < depth; p++)
            for (int j = 0; j < filled; j++) to[p * width + j] = to_float(from[p * from_row + j]);
    } else {
        for (int64_t p = 0; p < depth; p += 2) {
            const In *even = from + p * from_row, *odd = p + 1 < depth ? even + from_row : nullptr;
            word* pairs = (word*)(to + p * width);
            for (int j = 0; j < filled; j++)
                pairs[j] = word(even[j].bits) | (odd ? word(odd[j].bits) << 16 : 0);
        }
    }
}

// Rows of A as they lie, or a copy in T that is padded to pairs.
template <class T, class In>
struct Rows {
    static constexpr bool SAME = std::is_same_v<T, In>;
    const int64_t depth;
    const bool copied;
    Buffer<T> copy;
    explicit Rows(int64_t n)
        : depth(n), copied(!SAME || n % PAIR<T> != 0), copy(copied ? TALL * paired(n) : 0) {}

    int64_t distance() const { return copied ? paired(depth) : depth; }
    const T* operator()(const In* from, int rows) {
        if (!copied) return (const T*)from;
        for (int r = 0; r < rows; r++)
            for (int64_t p = 0; p < depth; p++) {
                if constexpr (SAME) copy[r * paired(depth) + p] = from[r * depth + p];
                else copy[r * paired(depth) + p] = to_float(from[r * depth + p]);
            }
        return copy;
    }
};

// Rows of a weight (rows, depth) as A, a few at a time: its numbers of type In, or those that its codes stand for.
template <class T, class In>
struct WeightRows {
    const Mat& weight;
    const bool coded;
    Rows<T, In> numbers;
    std::optional<Dequantised> codes;
    Buffer<In> dequantised;
    WeightRows(const Mat& w, int64_t depth)
        : weight(w), coded(w.scale), numbers(depth), dequantised(coded ? TALL * depth : 0) {
        if (coded) codes.emplace(w, depth);
    }

    int64_t distance() const { return numbers.distance(); }
    const T* operator()(int64_t first, int rows) {
        if (!coded) return numbers((const In*)weight.p + first * numbers.depth, rows);
        codes->read(first, first + rows, (In*)dequantised);
        return numbers(dequantised, rows);
    }
};

template <class Out>
void store_rows(Out* to, int64_t to_row, const float* from, int rows, int columns) {
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < columns; j++) store(to[r * to_row + j], from[r * PANEL + j]);
}

// c (rows, columns), transposed: a row of `to` for each of the first `filled` columns.
template <class Out>
void store_turned(Out* to, int64_t to_row, const float* c, float* turned, int rows, int columns, int filled) {
    transpose((const word*)c, PANEL, rows, columns, (word*)turned, TALL);
    for (int i = 0; i < filled; i++)
        for (int r = 0; r < rows; r++) store(to[i * to_row + r], turned[i * TALL + r]);
}

// The parts of every expert's work: more than one where there are few experts for the threads.
inline int64_t parts_of(int64_t experts, int64_t most, int64_t threads) {
    return std::max<int64_t>(1, std::min(most, (2 * threads + experts - 1) / experts));
}

// y[run] = x[run] weightᵀ: x (rows, k), weight (e, n, k), y (rows, n). Computed as yᵀ = weight xᵀ.
template <class In>
void products(const In* x, const In* weight, const int32_t* ends, In* y, int64_t experts, int64_t n, int64_t k,
              int64_t threads) {
    using T = Multiplied<In>;
    constexpr int64_t MOST = 256;  // rows at a time: their panels stay in a core's second cache
    const int64_t blocks = (n + TALL - 1) / TALL, parts = parts_of(experts, blocks, threads);
#pragma omp parallel num_threads(int(threads))
    {
        Buffer<T> panels((MOST + PANEL) * paired(k));
        Buffer<float> c(TALL * PANEL), turned(TALL * PANEL);
        Rows<T, In> a(k);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < experts * parts; task++) {
            const int64_t e = task / parts, part = task % parts;
            const int64_t begin = e ? ends[e - 1] : 0, end = ends[e];
            for (int64_t at = begin; at < end; at += MOST) {
                const Panels cut(std::min(MOST, end - at));
                for (int64_t p = 0; p < cut.panels; p++)
                    pack_rows(panels + cut.begin(p) * paired(k), x + (at + cut.begin(p)) * k, k, cut.filled(p), k,
                              cut.width(p));
                for (int64_t j = blocks * part / parts; j < blocks * (part + 1) / parts; j++) {
                    const int rows = int(std::min<int64_t>(TALL, n - j * TALL));
                    const T* from = a(weight + (e * n + j * TALL) * k, rows);
                    for (int64_t p = 0; p < cut.panels; p++) {
                        block<T>(rows, cut.width(p) / LANES, c, from, a.distance(), panels + cut.begin(p) * paired(k), k);
                        store_turned(y + (at + cut.begin(p)) * n + j * TALL, n, c, turned, rows, cut.width(p),
                                     cut.filled(p));
                    }
                }
            }
        }
    }
}

// to_x[run] = grad[run] weight: grad (rows, n), weight (e, n, k), to_x (rows, k).
template <class In>
void products_to_x(const In* grad, const In* weight, const int32_t* ends, In* to_x, int64_t experts, int64_t n,
                   int64_t k, int64_t threads) {
    using T = Multiplied<In>;
    const Panels cut(k);
    const int64_t parts = parts_of(experts, cut.panels, threads);
#pragma omp parallel num_threads(int(threads))
    {
        Buffer<T> panel(PANEL * paired(n));
        Buffer<float> c(TALL * PANEL);
        Rows<T, In> a(n);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < experts * parts; task++) {
            const int64_t e = task / parts, part = task % parts;
            const int64_t begin = e ? ends[e - 1] : 0, end = ends[e];
            if (begin == end) continue;
            for (int64_t p = cut.panels * part / parts; p < cut.panels * (part + 1) / parts; p++) {
                pack_columns<T>(panel, weight + e * n * k + cut.begin(p), k, n, cut.filled(p), cut.width(p));
                for (int64_t i = begin; i < end; i += TALL) {
                    const int rows = int(std::min<int64_t>(TALL, end - i));
                    block<T>(rows, cut.width(p) / LANES, c, a(grad + i * n, rows), a.distance(), panel, n);
                    store_rows(to_x + i * k + cut.begin(p), k, c, rows, cut.filled(p));
                }
            }
        }
    }
}

// to_weight[e] = grad[run]ᵀ x[run], zeros for an expert without rows.
template <class In, class Out>
void products_to_weight(const In* x, const In* grad, const int32_t* ends, Out* to_weight, int64_t experts, int64_t n,
                        int64_t k, int64_t threads) {
    using T = Multiplied<In>;
    const Panels cut(k);
    const int64_t blocks = (n + TALL - 1) / TALL, parts = parts_of(experts, blocks, threads);
    int64_t most = 0;
    for (int64_t e = 0; e < experts; e++) most = std::max<int64_t>(most, ends[e] - (e ? ends[e - 1] : 0));
    most = paired(most);
#pragma omp parallel num_threads(int(threads))
    {
        Buffer<T> panel(PANEL * most), turned((blocks / parts + 1) * TALL * most);
        Buffer<float> c(TALL * PANEL);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < experts * parts; task++) {
            const int64_t e = task / parts, part = task % parts;
            const int64_t begin = e ? ends[e - 1] : 0, depth = ends[e] - begin, even = paired(depth);
            const int64_t first = blocks * part / parts * TALL, last = std::min(n, blocks * (part + 1) / parts * TALL);
            if (!depth) {
                std::memset((void*)(to_weight + (e * n + first) * k), 0, (last - first) * k * sizeof(Out));
                continue;
            }
            const In* from = grad + begin * n + first;
            if (even > depth)
                for (int64_t j = 0; j < last - first; j++) std::memset((void*)(turned + j * even + depth), 0, sizeof(T));
            if constexpr (std::is_same_v<In, float>) {
                transpose((const word*)from, n, depth, last - first, (word*)(T*)turned, even);
            } else if constexpr (std::is_same_v<T, float>) {
                transpose(from, n, depth, last - first, (float*)turned, even);
            } else {
                for (int64_t i = 0; i < depth; i++)
                    for (int64_t j = 0; j < last - first; j++) turned[j * even + i] = from[i * n + j];
            }
            for (int64_t p = 0; p < cut.panels; p++) {
                pack_columns<T>(panel, x + begin * k + cut.begin(p), k, depth, cut.filled(p), cut.width(p));
                for (int64_t j = first; j < last; j += TALL) {
                    const int rows = int(std::min<int64_t>(TALL, last - j));
                    block<T>(rows, cut.width(p) / LANES, c, turned + (j - first) * even, even, panel, depth);
                    store_rows(to_weight + (e * n + j) * k + cut.begin(p), k, c, rows, cut.filled(p));
                }
            }
        }
    }
}

// out[run] = (silu(g) · u) downᵀ with g and u the halves of x[token[run]] gate_upᵀ: an expert's whole feed-forward, of
// which nothing leaves a core's caches but its result. x (tokens, d), gate_up (e, 2 width, d), down (e, d, width); weights
// are numbers like x's, or codes in groups.
template <class In>
void feed_forward(const In* x, const int64_t* token, const int32_t* ends, const Mat& gate_up, const Mat& down, In* out,
                  int64_t experts, int64_t width, int64_t d, int64_t threads) {
    using T = Multiplied<In>;
    constexpr int64_t MOST = 4 * PANEL;
    const int64_t parts = parts_of(experts, 1 << 20, threads);
#pragma omp parallel num_threads(int(threads))
    {
        Buffer<T> panels(MOST * paired(d)), hidden(MOST * paired(width));
        Buffer<In> gathered(PANEL * d);
        Buffer<float> gate(TALL * PANEL), up(TALL * PANEL), turned(TALL * PANEL);
        WeightRows<T, In> gate_rows(gate_up, d), up_rows(gate_up, d), down_rows(down, width);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < experts * parts; task++) {
            const int64_t e = task / parts, part = task % parts, first = e ? ends[e - 1] : 0, run = ends[e] - first;
            const int64_t end = first + run * (part + 1) / parts;
            for (int64_t at = first + run * part / parts; at < end; at += MOST) {
                const Panels cut(std::min(MOST, end - at));
                for (int64_t p = 0; p < cut.panels; p++) {
                    for (int i = 0; i < cut.filled(p); i++)
                        std::copy_n(x + token[at + cut.begin(p) + i] * d, d, gathered + i * d);
                    pack_rows<T, In>(panels + cut.begin(p) * paired(d), gathered, d, cut.filled(p), d, cut.width(p));
                    if (width % PAIR<T>) std::memset((void*)(hidden + cut.begin(p) * paired(width)), 0, cut.width(p) * paired(width) * sizeof(T));
                }
                for (int64_t j = 0; j < width; j += TALL) {
                    const int rows = int(std::min<int64_t>(TALL, width - j));
                    const T* gate_from = gate_rows(e * 2 * width + j, rows);
                    const T* up_from = up_rows((e * 2 + 1) * width + j, rows);
                    for (int64_t p = 0; p < cut.panels; p++) {
                        const T* b = panels + cut.begin(p) * paired(d);
                        const int columns = cut.width(p);
                        block<T>(rows, columns / LANES, gate, gate_from, gate_rows.distance(), b, d);
                        block<T>(rows, columns / LANES, up, up_from, up_rows.distance(), b, d);
                        T* to = hidden + cut.begin(p) * paired(width);
                        for (int r = 0; r < rows; r++) {
                            const float *g = gate + r * PANEL, *u = up + r * PANEL;
                            T* line = to + (j + r) / PAIR<T> * PAIR<T> * columns + (j + r) % PAIR<T>;
                            for (int i = 0; i < columns; i++)
                                store(line[i * PAIR<T>],
                                      rounded<In>(rounded<In>(silu(rounded<In>(g[i]))) * rounded<In>(u[i])));
                        }
                    }
                }
                for (int64_t j = 0; j < d; j += TALL) {
                    const int rows = int(std::min<int64_t>(TALL, d - j));
                    const T* from = down_rows(e * d + j, rows);
                    for (int64_t p = 0; p < cut.panels; p++) {
                        block<T>(rows, cut.width(p) / LANES, gate, from, down_rows.distance(),
                                 hidden + cut.begin(p) * paired(width), width);
                        store_turned(out + (at + cut.begin(p)) * d + j, d, gate, turned, rows, cut.width(p), cut.filled(p));
                    }
                }
            }
        }
    }
}

}  // namespace

#define OF(NAME, IN)                                                                                                  \
    extern "C" void products_##NAME(const IN* x, const IN* weight, const int32_t* ends, IN* y, int64_t experts,       \
                                    int64_t n, int64_t k, int64_t threads) {                                          \
        products(x, weight, ends, y, experts, n, k, threads);                                                         \
    }                                                                                                                 \
    extern "C" void products_to_x_##NAME(const IN* grad, const IN* weight, const int32_t* ends, IN* to_x,             \
                                         int64_t experts, int64_t n, int64_t k, int64_t threads) {                    \
        products_to_x(grad, weight, ends, to_x, experts, n, k, threads);                                              \
    }                                                                                                                 \
    extern "C" void feed_forward_##NAME(const IN* x, const int64_t* token, const int32_t* ends, const Mat* gate_up,   \
                                        const Mat* down, IN* out, int64_t experts, int64_t width, int64_t d,          \
                                        int64_t threads) {                                                            \
        feed_forward(x, token, ends, *gate_up, *down, out, experts, width, d, threads);                               \
    }
#define TO_WEIGHT(NAME, IN, OUT)                                                                                      \
    extern "C" void products_to_weight_##NAME(const IN* x, const IN* grad, const int32_t* ends, OUT* to_weight,       \
                                              int64_t experts, int64_t n, int64_t k, int64_t threads) {               \
        products_to_weight(x, grad, ends, to_weight, experts, n, k, threads);                                         \
    }
OF(fp32, float)
OF(bf16, bf16)
TO_WEIGHT(fp32, float, float)
TO_WEIGHT(bf16, bf16, bf16)
TO_WEIGHT(bf16_fp32, bf16, float)
