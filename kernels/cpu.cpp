// Decoding on a CPU at the speed of memory: few-row products, few-row attention, dequantization.
//
// Plain C functions over raw pointers, called through ctypes by kernels/cpu.py; all tensors are contiguous. Activations
// are bfloat16 and stay it, sums are float32. Two promises beside speed: row i of many is bit for bit that row alone, on
// any number of threads (every row has accumulators of its own and a fixed order of additions), and a position's
// attention does not depend on what lies behind it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(PORTABLE)
#include <immintrin.h>
#define FAST
#endif

using bf16 = uint16_t;
#define UNROLLED _Pragma("GCC unroll 16")  // so that what an array holds stays in registers
static constexpr long STRIP = 8;           // output channels that a thread takes at a time
static constexpr long ROWS = 8;            // rows that one pass over a strip's weights serves
static constexpr long CHUNK = 256;         // positions of the cache that are one task of attention
static constexpr long AHEAD = 8192;        // bytes of weights that are asked of memory before they are needed
static constexpr long BLOCK = 128;         // activations are padded with zeros to whole blocks of so many channels
static constexpr long MAX_HEAD_DIM = 1024;  // as kernels/cpu.py has it

static inline float to_float(bf16 x) {
    return __builtin_bit_cast(float, uint32_t(x) << 16);
}

// To the nearest, ties to even; NaN stays NaN.
static inline bf16 to_bf16(float x) {
    if (x != x) return 0x7FC0;
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    const uint32_t odd = (bits >> 16) & 1;
    return bf16((bits + 0x7FFF + odd) >> 16);
}

// A stored weight [out, in]. bits 16: bfloat16. 8: int8 times a float32 scale per output channel. 4: two neighbours in
// a byte (even channel in the low nibble) times a scale plus a minimum, both bfloat16 [out, in / groupsize].
struct Weight {
    const uint8_t *data;
    const void *scale;
    const bf16 *minimum;
    long bits, groupsize, in, out;

    const uint8_t *row(long n) const { return data + n * in * bits / 8; }
    float row_scale(long n) const { return ((const float *)scale)[n]; }  // of 8 bits
    const bf16 *group_scales() const { return (const bf16 *)scale; }     // of 4 bits
};

// ---- Vectors of the compiler: N numbers of 32, 16 and 8 bits, as many as AVX-512 or AVX2 hold of 32 bits. Elsewhere
// the compiler splits them.
static constexpr int N = __BIGGEST_ALIGNMENT__ >= 64 ? 16 : 8;
typedef float Lanes __attribute__((vector_size(4 * N)));
typedef int32_t Words __attribute__((vector_size(4 * N)));
typedef int16_t Halves __attribute__((vector_size(2 * N)));
typedef int8_t Levels __attribute__((vector_size(N), aligned(1), may_alias));
typedef uint8_t Pairs __attribute__((vector_size(N), aligned(1), may_alias));

// Small integers to floats, in steps each of which is an instruction.
template <class Bytes> static inline Lanes widen(Bytes x) {
    const Halves halves = __builtin_convertvector(x, Halves);
    const Words words = __builtin_convertvector(halves, Words);
    return __builtin_convertvector(words, Lanes);
}

// N numbers from x on; unless WHOLE, zeros behind the first `count`.
template <bool WHOLE = true> static inline Lanes load(const bf16 *x, long count = N) {
    Halves half = {};
    if (WHOLE || count >= N)
        memcpy(&half, x, 2 * N);
    else
        memcpy(&half, x, count * sizeof(bf16));
    Words words;
    for (int i = 0; i < N; i++) words[i] = half[i] << 16;  // GCC makes more of this loop than of a conversion
    return (Lanes)words;
}

// 32 channels of output channel n from channel k on, dequantized.
static inline void decode(const Weight &w, long n, long k, Lanes *out) {
    const uint8_t *p = w.row(n) + k * w.bits / 8;
    if (w.bits == 16) {
        UNROLLED for (int i = 0; i < 32 / N; i++) out[i] = load((const bf16 *)p + N * i);
    } else if (w.bits == 8) {
        UNROLLED for (int i = 0; i < 32 / N; i++) out[i] = widen(((const Levels *)p)[i]) * w.row_scale(n);
    } else {
        const long group = n * (w.in / w.groupsize) + k / w.groupsize;
        const float scale = to_float(w.group_scales()[group]);
        const float minimum = to_float(w.minimum[group]);
        UNROLLED for (int i = 0; i < 16 / N; i++) {
            const Halves pair = __builtin_convertvector(((const Pairs *)p)[i], Halves);
            const Halves two = (pair & 15) | (pair >> 4 << 8);  // the low nibble's level, then the high one's, in bytes
            const Levels *levels = (const Levels *)&two;
            UNROLLED for (int h = 0; h < 2; h++) out[2 * i + h] = widen(levels[h]) * scale + minimum;
        }
    }
}

// Activations as the product reads them: [rows][padded] and, for 4 bits, the sum of each group [rows][groups], because
// the minimum of a group is multiplied by nothing else.
struct Rows {
    std::vector<bf16> x;
    std::vector<float> sums;
    long padded, groups;
};

#ifdef FAST
// ---- Products with AVX512_BF16.
//
// A 4-bit level becomes bfloat16 by a table look-up: vpermw takes the low 5 bits of each 16-bit word as index, and with
// the 16 levels stored twice it ignores bit 4, so nothing has to be masked. With word w of a 64-byte block holding the
// channels 4w to 4w + 3, look-up p (after a shift by 4p) gives the channels 4w + p: `arrange` brings the activations
// into that order, once a call. Each float lane of a sum then covers 8 neighbouring channels, so a block's scales are one
// vector of lanes.
static void arrange(const bf16 *x, bf16 *out) {
    const Words lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const __m512i a = _mm512_loadu_si512(x);
    const __m512i b = _mm512_loadu_si512(x + 32);
    const __m512i c = _mm512_loadu_si512(x + 64);
    const __m512i d = _mm512_loadu_si512(x + 96);
    for (int p = 0; p < 4; p++) {
        const __m512i order = (__m512i)(lane * 0x80008 + 0x40000 + p * 0x10001);  // words 4w + p, of which 6 bits count
        const __m512i low = _mm512_permutex2var_epi16(a, order, b);
        const __m512i high = _mm512_permutex2var_epi16(c, order, d);
        _mm512_storeu_si512(out + p * 32, _mm512_mask_mov_epi16(low, 0xFFFF0000, high));
    }
}

static inline __m512 int8_to_floats(__m128i x) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x));
}

// Bits of a 64-byte block of weights to V vectors of 32 bfloat16: V is 1, 2, 4 for 16, 8, 4 bits. Exact in each case.
template <int V> static inline void unpack(__m512i v, __m512i levels, __m512bh *q) {
    if constexpr (V == 1) q[0] = (__m512bh)v;
    if constexpr (V == 2)
        for (int i = 0; i < 2; i++) {
            const __m256i half = i ? _mm512_extracti64x4_epi64(v, 1) : _mm512_castsi512_si256(v);
            const __m512 low = int8_to_floats(_mm256_castsi256_si128(half));
            const __m512 high = int8_to_floats(_mm256_extracti128_si256(half, 1));
            q[i] = _mm512_cvtne2ps_pbh(high, low);
        }
    if constexpr (V == 4)
        UNROLLED for (int i = 0; i < 4; i++) {
            const __m512i shifted = (__m512i)((__v32hu)v >> 4 * i);
            q[i] = (__m512bh)_mm512_permutexvar_epi16(shifted, levels);
        }
}

// R output channels from n on, times M rows from `first` on: every weight is decoded once for the M rows. The unrolling
// pragmas are what keeps the sums in registers; the prefetches double the speed, for a row of weights is too short for
// the hardware to learn where the next one begins, and it does not look across the end of a page.
template <int V, int M, int R> static void block(const Weight &w, const Rows &rows, long first, long n, bf16 *y) {
    const long bytes = w.in * w.bits / 8, padded = rows.padded, groups = rows.groups;
    const bf16 *x = rows.x.data() + first * padded;
    const int shift = V == 4 ? __builtin_ctzl(w.groupsize) : 7;
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 numbers = _mm512_cvtepi32_ps(lane);
    const __m512i levels = (__m512i)_mm512_cvtne2ps_pbh(numbers, numbers);  // 0 to 15, twice
    // The group of each lane within a block, as the word index that puts a bfloat16 scale into the lane's upper half.
    const __m512i channel = _mm512_slli_epi32(lane, 3);
    const __m512i group = _mm512_slli_epi32(_mm512_srl_epi32(channel, _mm_cvtsi32_si128(shift)), 16);
    const uint8_t *p[R];
    const bf16 *scales[R], *minima[R];
    __m512 sum[R][M];
    UNROLLED for (int r = 0; r < R; r++) {
        p[r] = w.row(n + r);
        scales[r] = w.group_scales() + (n + r) * groups;
        minima[r] = w.minimum + (n + r) * groups;
        UNROLLED for (int m = 0; m < M; m++) sum[r][m] = _mm512_setzero_ps();
    }
    // 64 bytes of each channel from byte b on, of which those `inside` count; `few` masks the block's scales.
    auto step = [&](long b, __mmask64 inside, __mmask8 few) __attribute__((always_inline)) {
        __m512bh q[R][V];
        __m512 scale[R];
        UNROLLED for (int r = 0; r < R; r++) {
            _mm_prefetch((const char *)p[r] + b + AHEAD, _MM_HINT_T0);
            unpack<V>(_mm512_maskz_loadu_epi8(inside, p[r] + b), levels, q[r]);
            if constexpr (V == 4) {
                const long g = 2 * b >> shift;
                _mm_prefetch((const char *)(scales[r] + g) + AHEAD / 8, _MM_HINT_T0);
                _mm_prefetch((const char *)(minima[r] + g) + AHEAD / 8, _MM_HINT_T0);
                const __m512i words = _mm512_castsi128_si512(_mm_maskz_loadu_epi16(few, scales[r] + g));
                scale[r] = (__m512)_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, group, words);
            }
        }
        UNROLLED for (int m = 0; m < M; m++)
            UNROLLED for (int r = 0; r < R; r++) {
                __m512 d = V == 4 ? _mm512_setzero_ps() : sum[r][m];
                UNROLLED for (int v = 0; v < V; v++) {
                    const bf16 *activations = x + m * padded + b / 2 * V + 32 * v;
                    d = _mm512_dpbf16_ps(d, q[r][v], (__m512bh)_mm512_loadu_si512(activations));
                }
                sum[r][m] = V == 4 ? _mm512_fmadd_ps(d, scale[r], sum[r][m]) : d;
            }
    };
    const long whole = bytes & ~63l, rest = bytes - whole;
    const __mmask8 some = (1 << std::max(1, 128 >> shift)) - 1;
    for (long b = 0; b < whole; b += 64) step(b, ~0ull, some);
    if (rest) {
        const __mmask8 last = (1 << (((2 * rest - 1) >> shift) + 1)) - 1;
        step(whole, (1ull << rest) - 1, last);
    }
    UNROLLED for (int r = 0; r < R; r++)
        UNROLLED for (int m = 0; m < M; m++) {
            const float *sums = rows.sums.data() + (first + m) * groups;
            for (long g = 0; V == 4 && g < groups; g += 16) {  // the minima, times the sums of their groups
                const __mmask16 inside = groups - g >= 16 ? 0xFFFF : __mmask16((1 << (groups - g)) - 1);
                const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, minima[r] + g));
                const __m512 minimum = (__m512)_mm512_slli_epi32(words, 16);
                sum[r][m] = _mm512_fmadd_ps(minimum, _mm512_maskz_loadu_ps(inside, sums + g), sum[r][m]);
            }
            const float scale = V == 2 ? w.row_scale(n + r) : 1.0f;
            y[(first + m) * w.out + n + r] = to_bf16(_mm512_reduce_add_ps(sum[r][m]) * scale);
        }
}

// The output channels n to `end`, times M rows.
template <int V, int M> static void channels(const Weight &w, const Rows &rows, long first, long n, long end, bf16 *y) {
    // One row reads memory as one stream; more share each activation between channels, where that is worth the streams.
    constexpr int R = M == 1 || (V == 1 && M < 4) ? 1 : V == 1 && M == 4 ? 4 : 2;
    for (; n + R <= end; n += R) block<V, M, R>(w, rows, first, n, y);
    for (; n < end; n++) block<V, M, 1>(w, rows, first, n, y);
}

template <int V> static constexpr decltype(&channels<V, 1>) KERNELS[] = {
    channels<V, 1>, channels<V, 2>, channels<V, 3>, channels<V, 4>,
    channels<V, 5>, channels<V, 6>, channels<V, 7>, channels<V, 8>,
};

// The output channels n to `end`, times `count` rows from `first` on.
static void strip(const Weight &w, const Rows &rows, long first, long count, long n, long end, bf16 *y) {
    const auto *kernels = w.bits == 4 ? KERNELS<4> : w.bits == 8 ? KERNELS<2> : KERNELS<1>;
    kernels[count - 1](w, rows, first, n, end, y);
}
#else
// ---- Products on any other CPU: 32 sums a row.
static void strip(const Weight &w, const Rows &rows, long first, long count, long n, long end, bf16 *y) {
    for (; n < end; n++) {
        Lanes sum[ROWS][32 / N] = {}, weight[32 / N];
        for (long k = 0; k < w.in; k += 32) {
            decode(w, n, k, weight);
            for (long m = 0; m < count; m++) {
                const bf16 *x = &rows.x[(first + m) * rows.padded + k];
                UNROLLED for (int i = 0; i < 32 / N; i++) sum[m][i] += weight[i] * load(x + N * i);
            }
        }
        for (long m = 0; m < count; m++) {
            float total = 0;
            for (int i = 0; i < 32; i++) total += sum[m][i / N][i % N];
            y[(first + m) * w.out + n] = to_bf16(total);
        }
    }
}
#endif

// Bring `count` activations x [count, in] into the form in which the product reads them.
static void prepare(const Weight &w, const bf16 *x, long count, Rows &rows) {
    rows.padded = (w.in + BLOCK - 1) / BLOCK * BLOCK;
    rows.groups = w.bits == 4 ? w.in / w.groupsize : 0;
    rows.x.assign(count * rows.padded, 0);
    rows.sums.assign(count * rows.groups, 0.0f);
    for (long m = 0; m < count; m++) {
        bf16 *row = rows.x.data() + m * rows.padded;
        memcpy(row, x + m * w.in, w.in * sizeof(bf16));
        for (long g = 0; g < rows.groups; g++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (long k = g * w.groupsize; k < (g + 1) * w.groupsize; k++) sum += to_float(row[k]);
            rows.sums[m * rows.groups + g] = sum;
        }
#ifdef FAST
        if (w.bits == 4)
            for (long k = 0; k < rows.padded; k += BLOCK) arrange(row + k, row + k);
#endif
    }
}

// y [rows, out] = x [rows, in] times the weight's transpose; `in` a multiple of 32.
extern "C" void linear(const bf16 *x, long count, const uint8_t *data, const void *scale, const bf16 *minimum,
                       long bits, long groupsize, long in, long out, bf16 *y) {
    thread_local Rows rows;  // kept: fresh memory is slow
    const Weight w = {data, scale, minimum, bits, groupsize, in, out};
    prepare(w, x, count, rows);
    const Rows &shared = rows;
    // As many rows as registers hold beside the levels of two channels, and the first cache besides the weights.
    const long pass = bits == 4 || in > 3072 ? ROWS / 2 : ROWS;
#pragma omp parallel for schedule(static)
    for (long n = 0; n < out; n += STRIP) {
        const long end = std::min(n + STRIP, out);
        for (long first = 0; first < count; first += pass)
            strip(w, shared, first, std::min(pass, count - first), n, end, y);
    }
}

// 32 numbers, rounded to bfloat16.
static inline void store(bf16 *to, const Lanes *values) {
#ifdef FAST
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(values[1], values[0]));
#else
    for (int i = 0; i < 32; i++) to[i] = to_bf16(values[i / N][i % N]);
#endif
}

// The weight [out, in], in bfloat16 or, where `wide`, in float32; `in` a multiple of 32.
extern "C" void dequantize(const uint8_t *data, const void *scale, const bf16 *minimum, long bits, long groupsize,
                           long in, long out, bool wide, void *y) {
    const Weight w = {data, scale, minimum, bits, groupsize, in, out};
#pragma omp parallel for schedule(static)
    for (long n = 0; n < out; n++)
        for (long k = 0; k < in; k += 32) {
            Lanes values[32 / N];
            decode(w, n, k, values);
            if (wide)
                memcpy((float *)y + n * in + k, values, sizeof values);
            else
                store((bf16 *)y + n * in + k, values);
        }
}

// ---- Attention.

// e to the x <= 0 within 3 ulp (from -87 on), in operations that vectorize: 2 to the integer part of x / ln 2, times
// the Taylor polynomial of the rest, from which ln 2 is taken in two parts so that nothing of it is lost.
static inline float exponential(float x) {
    x = std::max(x, -87.0f);
    const float n = std::nearbyint(x * 1.44269504f);
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    const float p = 1 + r * (1 + r * (0.5f + r * (1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f + r * (1 / 720.0f))))));
    return p * __builtin_bit_cast(float, (int32_t(n) + 127) << 23);
}

// Sums of neighbours: those of a, then those of b.
template <int... I> static inline Lanes fold(Lanes a, Lanes b, std::integer_sequence<int, I...>) {
    const Lanes even = Lanes{(2 * I < N ? a : b)[2 * I % N]...};
    const Lanes odd = Lanes{(2 * I < N ? a : b)[2 * I % N + 1]...};
    return even + odd;
}

// Lane i of the result is the sum of the lanes of x[i]; x has N vectors, and is overwritten.
static inline Lanes lane_sums(Lanes *x) {
    constexpr auto lanes = std::make_integer_sequence<int, N>();
    UNROLLED for (int count = N / 2; count; count /= 2)
        UNROLLED for (int i = 0; i < count; i++) x[i] = fold(x[2 * i], x[2 * i + 1], lanes);
    return x[0];
}

// Softmax-weighted sum of `count` values for one query: out = sum of exp(score - maximum) * v, then that maximum, then
// the sum of the exponentials. SIZE is head_dim where the compiler is to know it, or 0.
template <long SIZE> static void attend(const bf16 *q, const bf16 *k, const bf16 *v, long count, long any, float *out) {
    const long head_dim = SIZE ? SIZE : any;
    constexpr bool WHOLE = SIZE != 0;
    float scores[CHUNK], top = -INFINITY, total = 0;
    for (long j = 0; j < count; j += N) {  // N keys at a time
        Lanes dots[N] = {};
        UNROLLED for (long n = 0; n < N; n++) {
            const bf16 *key = k + std::min(j + n, count - 1) * head_dim;
            for (long i = 0; i < head_dim; i += N)
                dots[n] += load<WHOLE>(q + i, head_dim - i) * load<WHOLE>(key + i, head_dim - i);
        }
        const Lanes all = lane_sums(dots) / std::sqrt(float(head_dim));
        memcpy(scores + j, &all, sizeof all);
    }
    for (long j = 0; j < count; j++) top = std::max(top, scores[j]);
#pragma omp simd reduction(+ : total)
    for (long j = 0; j < count; j++) total += scores[j] = exponential(scores[j] - top);
    for (long i = 0; i < head_dim; i += 4 * N) {  // four sums at a time stay in registers
        Lanes sum[4] = {};
        for (long j = 0; j < count; j++)
            UNROLLED for (long n = 0; n < 4; n++) {
                const long at = i + N * n;
                if (at < head_dim) sum[n] += scores[j] * load<WHOLE>(v + j * head_dim + at, head_dim - at);
            }
        memcpy(out + i, sum, std::min(4l * N, head_dim - i) * sizeof(float));
    }
    out[head_dim] = top;
    out[head_dim + 1] = total;
}

// One row's RoPE and its part of the caches. x: queries, keys and values of the row; `queries` gets the turned queries,
// the caches get keys and values at `position`.
static void rotate_and_store(const bf16 *x, const float *rope, long position, long n_head, long n_kv_head,
                             long head_dim, long positions, bf16 *queries, bf16 *k_cache, bf16 *v_cache) {
    const long half = head_dim / 2;
    const float *cos = rope, *sin = rope + half;
    for (long h = 0; h < n_head + n_kv_head; h++, x += head_dim) {
        const long kv_head = h - n_head;
        bf16 *to = h < n_head ? queries + h * head_dim : k_cache + (kv_head * positions + position) * head_dim;
        for (long i = 0; i < half; i++) {
            const float a = to_float(x[i]), b = to_float(x[i + half]);
            to[i] = to_bf16(a * cos[i] - b * sin[i]);
            to[i + half] = to_bf16(b * cos[i] + a * sin[i]);
        }
    }
    for (long h = 0; h < n_kv_head; h++, x += head_dim)
        memcpy(v_cache + (h * positions + position) * head_dim, x, head_dim * sizeof(bf16));
}

// The softmax over all of a row's chunks, from what `attend` left of each, in their order: y [head_dim].
static void combine(const float *part, long chunks, long head_dim, bf16 *y) {
    const long size = head_dim + 2;
    float top = -INFINITY, total = 0, sum[MAX_HEAD_DIM] = {};
    for (long c = 0; c < chunks; c++) top = std::max(top, part[c * size + head_dim]);
    for (long c = 0; c < chunks; c++) {
        const float weight = exponential(part[c * size + head_dim] - top);
        total += weight * part[c * size + head_dim + 1];
        for (long j = 0; j < head_dim; j++) sum[j] += weight * part[c * size + j];
    }
    for (long j = 0; j < head_dim; j++) y[j] = to_bf16(sum[j] / total);
}

// qkv [rows, (n_head + 2 n_kv_head) * head_dim] at the positions from `start` on; rope [rows, head_dim], cosines then
// sines; caches [n_kv_head, positions, head_dim], which get the rows' keys and values; y [rows, n_head * head_dim].
extern "C" void attention(const bf16 *qkv, const float *rope, long start, long rows, long n_head, long n_kv_head,
                          long head_dim, long positions, bf16 *k_cache, bf16 *v_cache, bf16 *y) {
    const long group = n_head / n_kv_head, size = head_dim + 2;
    const long chunks = (start + rows + CHUNK - 1) / CHUNK;
    const auto attend_to = head_dim == 64 ? attend<64> : head_dim == 128 ? attend<128> : attend<0>;
    std::vector<bf16> queries(rows * n_head * head_dim);
    std::vector<float> partial(chunks * rows * n_head * size);
    for (long s = 0; s < rows; s++)
        rotate_and_store(qkv + s * (n_head + 2 * n_kv_head) * head_dim, rope + s * head_dim, start + s, n_head,
                         n_kv_head, head_dim, positions, &queries[s * n_head * head_dim], k_cache, v_cache);
    // A task is a chunk of the cache and all queries that see it: keys and values are read once.
#pragma omp parallel for collapse(2) schedule(static)
    for (long h = 0; h < n_kv_head; h++)
        for (long c = 0; c < chunks; c++) {
            const long offset = (h * positions + c * CHUNK) * head_dim;
            for (long s = 0; s < rows; s++) {
                const long count = std::min(CHUNK, start + s + 1 - c * CHUNK);  // up to the row's own position
                for (long head = h * group; head < (h + 1) * group && count > 0; head++) {
                    const long i = s * n_head + head;
                    attend_to(&queries[i * head_dim], k_cache + offset, v_cache + offset, count, head_dim,
                              &partial[(i * chunks + c) * size]);
                }
            }
        }
#pragma omp parallel for schedule(static)
    for (long i = 0; i < rows * n_head; i++) {
        const long seen = (start + i / n_head) / CHUNK + 1;
        combine(&partial[i * chunks * size], seen, head_dim, y + i * head_dim);
    }
}
