// Decoding on a CPU at the speed of memory: few-row products, few-row attention, dequantization.
//
// Plain C functions over raw pointers, called through ctypes by kernels/cpu.py; all tensors are contiguous. Weight-only:
// activations are bfloat16 and stay it, sums are float32. Two promises beside speed: row i of many is bit for bit that row
// alone, on any number of threads (every row has accumulators of its own and a fixed order of additions), and a position's
// attention does not depend on what lies behind it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(PORTABLE)
#include <immintrin.h>
#define FAST
#endif

using bf16 = uint16_t;
static constexpr long STRIP = 8;     // output channels that a thread takes at a time
static constexpr long ROWS = 8;      // rows that one pass over a strip's weights serves
static constexpr long CHUNK = 256;   // positions of the cache that are one task of attention
static constexpr long AHEAD = 8192;  // bytes of weights that are asked of memory before they are needed
static constexpr long BLOCK = 128;   // activations are padded with zeros to whole blocks of so many channels

static inline float to_float(bf16 x) { return __builtin_bit_cast(float, uint32_t(x) << 16); }

static inline bf16 to_bf16(float x) {  // to nearest, ties to even
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    return bf16(x != x ? 0x7FC0 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// A stored weight [out, in]: bits 16 is bfloat16, 8 is int8 times a float32 scale per output channel, 4 is two neighbours
// in a byte (even channel in the low nibble) times a scale plus a minimum, both bfloat16 [out, in / groupsize].
struct Weight {
    const uint8_t *data;
    const void *scale;
    const bf16 *minimum;
    long bits, groupsize, in, out;
    const uint8_t *row(long n) const { return data + n * in * bits / 8; }
};

// 32 channels of output channel n from channel k on, dequantized.
static inline void decode(const Weight &w, long n, long k, float *out) {
    const uint8_t *p = w.row(n) + k * w.bits / 8;
    if (w.bits == 16) {
        for (long i = 0; i < 32; i++) out[i] = to_float(((const bf16 *)p)[i]);
    } else if (w.bits == 8) {
        float scale = ((const float *)w.scale)[n];
        for (long i = 0; i < 32; i++) out[i] = float(((const int8_t *)p)[i]) * scale;
    } else {
        long group = n * (w.in / w.groupsize) + k / w.groupsize;
        float scale = to_float(((const bf16 *)w.scale)[group]), minimum = to_float(w.minimum[group]);
#ifdef FAST
        const __m128i pairs = *(const __m128i_u *)p, mask = _mm_set1_epi8(15), even = pairs & mask, odd = _mm_srli_epi16(pairs, 4) & mask;
        _mm512_storeu_ps(out, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(even, odd))) * scale + minimum);
        _mm512_storeu_ps(out + 16, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpackhi_epi8(even, odd))) * scale + minimum);
#else
        for (long i = 0; i < 32; i++) out[i] = minimum + scale * float(p[i / 2] >> 4 * (i & 1) & 15);
#endif
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
// A 4-bit level becomes bfloat16 by a table look-up: vpermw takes the low 5 bits of each 16-bit word as index, and with the
// 16 levels stored twice it ignores bit 4, so nothing has to be masked. With word w of a 64-byte block holding the channels
// 4w to 4w + 3, look-up p (after a shift by 4p) gives the channels 4w + p: `arrange` brings the activations into that order,
// once a call. Each float lane of a sum then covers 8 neighbouring channels, so a block's scales are one vector of lanes.
static void arrange(const bf16 *x, bf16 *out) {
    alignas(64) static const auto index = [] {
        std::vector<uint16_t> words(4 * 32);
        for (int p = 0; p < 4; p++)
            for (int w = 0; w < 32; w++) words[p * 32 + w] = uint16_t((4 * w + p) & 63);
        return words;
    }();
    __m512i a = _mm512_loadu_si512(x), b = _mm512_loadu_si512(x + 32);
    __m512i c = _mm512_loadu_si512(x + 64), d = _mm512_loadu_si512(x + 96);
    for (int p = 0; p < 4; p++) {
        __m512i order = _mm512_loadu_si512(index.data() + p * 32);
        __m512i low = _mm512_permutex2var_epi16(a, order, b), high = _mm512_permutex2var_epi16(c, order, d);
        _mm512_storeu_si512(out + p * 32, _mm512_mask_mov_epi16(low, 0xFFFF0000, high));
    }
}

// Bits of a 64-byte block of weights to V vectors of 32 bfloat16: V is 1, 2, 4 for 16, 8, 4 bits. Exact in each case.
template <int V> static inline void unpack(__m512i v, __m512i levels, __m512bh *q) {
    if constexpr (V == 1) q[0] = (__m512bh)v;
    if constexpr (V == 2)
        for (int i = 0; i < 2; i++) {
            __m256i half = i ? _mm512_extracti64x4_epi64(v, 1) : _mm512_castsi512_si256(v);
            __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(half)));
            q[i] = _mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(half, 1))), low);
        }
    if constexpr (V == 4) {
        q[0] = (__m512bh)_mm512_permutexvar_epi16(v, levels);
        q[1] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(v, 4), levels);
        q[2] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(v, 8), levels);
        q[3] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(v, 12), levels);
    }
}

// R output channels from n on, times M rows from `first` on: every weight is decoded once for the M rows. The unrolling
// pragmas are what keeps the sums in registers; the prefetches double the speed, for a row of weights is too short for the
// hardware to learn where the next one begins, and it does not look across the end of a page.
template <int V, int M, int R> static void block(const Weight &w, const Rows &rows, long first, long n, bf16 *y) {
    const long bytes = w.in * w.bits / 8, padded = rows.padded, groups = rows.groups;
    const bf16 *x = rows.x.data() + first * padded;
    const __m512i levels = (__m512i)_mm512_cvtne2ps_pbh(  // 0 to 15, twice
        _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
        _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    const int shift = V == 4 ? __builtin_ctzl(w.groupsize) : 0;
    // The group of each lane within a block, as the word index that puts a bfloat16 scale into the upper half of the lane.
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i group = _mm512_slli_epi32(_mm512_srl_epi32(_mm512_slli_epi32(lane, 3), _mm_cvtsi32_si128(shift)), 16);
    const uint8_t *p[R];
    const bf16 *scales[R], *minima[R];
    __m512 sum[R][M];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        p[r] = w.row(n + r);
        scales[r] = (const bf16 *)w.scale + (n + r) * groups;
        minima[r] = w.minimum + (n + r) * groups;
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) sum[r][m] = _mm512_setzero_ps();
    }
    auto step = [&](long b, __mmask64 inside, __mmask8 few) __attribute__((always_inline)) {
        __m512bh q[R][V];
        __m512 scale[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            _mm_prefetch((const char *)p[r] + b + AHEAD, _MM_HINT_T0);
            unpack<V>(_mm512_maskz_loadu_epi8(inside, p[r] + b), levels, q[r]);
            if constexpr (V == 4) {
                const long g = 2 * b >> shift;
                _mm_prefetch((const char *)(scales[r] + g) + AHEAD / 8, _MM_HINT_T0);
                _mm_prefetch((const char *)(minima[r] + g) + AHEAD / 8, _MM_HINT_T0);
                __m512i words = _mm512_castsi128_si512(_mm_maskz_loadu_epi16(few, scales[r] + g));
                scale[r] = (__m512)_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, group, words);
            }
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                __m512 d = V == 4 ? _mm512_setzero_ps() : sum[r][m];
#pragma GCC unroll 8
                for (int v = 0; v < V; v++)
                    d = _mm512_dpbf16_ps(d, q[r][v], (__m512bh)_mm512_loadu_si512(x + m * padded + b / 2 * V + 32 * v));
                sum[r][m] = V == 4 ? _mm512_fmadd_ps(d, scale[r], sum[r][m]) : d;
            }
    };
    const long whole = bytes & ~63l, rest = bytes - whole;
    const __mmask8 some = (1 << std::max(1, 128 >> shift)) - 1, last = (1 << (((2 * rest - 1) >> shift) + 1)) - 1;
    for (long b = 0; b < whole; b += 64) step(b, ~0ull, some);
    if (rest) step(whole, (1ull << rest) - 1, last);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const float *sums = rows.sums.data() + (first + m) * groups;
            for (long g = 0; V == 4 && g < groups; g += 16) {
                const __mmask16 inside = groups - g >= 16 ? 0xFFFF : __mmask16((1 << (groups - g)) - 1);
                __m512i minimum = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, minima[r] + g));
                __m512 x = _mm512_maskz_loadu_ps(inside, sums + g);
                sum[r][m] = _mm512_fmadd_ps((__m512)_mm512_slli_epi32(minimum, 16), x, sum[r][m]);
            }
            const float scale = V == 2 ? ((const float *)w.scale)[n + r] : 1.0f;
            y[(first + m) * w.out + n + r] = to_bf16(_mm512_reduce_add_ps(sum[r][m]) * scale);
        }
}

template <int V, int M> static void channels(const Weight &w, const Rows &rows, long first, long n, long end, bf16 *y) {
    // One row reads memory as one stream; more share each activation between two channels, where that is worth a second one.
    constexpr int R = M == 1 || (V == 1 && M < 4) ? 1 : 2;
    for (; n + R <= end; n += R) block<V, M, R>(w, rows, first, n, y);
    for (; n < end; n++) block<V, M, 1>(w, rows, first, n, y);
}

template <int V> static constexpr decltype(&channels<V, 1>) KERNELS[ROWS] = {
    channels<V, 1>, channels<V, 2>, channels<V, 3>, channels<V, 4>, channels<V, 5>, channels<V, 6>, channels<V, 7>, channels<V, 8>};

static void strip(const Weight &w, const Rows &rows, long first, long count, long n, long end, bf16 *y) {
    (w.bits == 4 ? KERNELS<4> : w.bits == 8 ? KERNELS<2> : KERNELS<1>)[count - 1](w, rows, first, n, end, y);
}
#else
// For any CPU: 32 sums a row, which the compiler makes vectors.
static void strip(const Weight &w, const Rows &rows, long first, long count, long n, long end, bf16 *y) {
    for (; n < end; n++) {
        float sums[ROWS][32] = {}, weight[32];
        for (long k = 0; k < w.in; k += 32) {
            decode(w, n, k, weight);
            for (long m = 0; m < count; m++)
                for (long i = 0; i < 32; i++) sums[m][i] += weight[i] * to_float(rows.x[(first + m) * rows.padded + k + i]);
        }
        for (long m = 0; m < count; m++) {
            float sum = 0;
            for (long i = 0; i < 32; i++) sum += sums[m][i];
            y[(first + m) * w.out + n] = to_bf16(sum);
        }
    }
}
#endif

static void prepare(const Weight &w, const bf16 *x, long count, Rows &rows) {
    rows.padded = (w.in + BLOCK - 1) / BLOCK * BLOCK;
    rows.groups = w.bits == 4 ? w.in / w.groupsize : 0;
    rows.x.assign(count * rows.padded, 0);
    rows.sums.assign(count * rows.groups, 0.0f);
    for (long m = 0; m < count; m++) {
        bf16 *row = rows.x.data() + m * rows.padded;
        memcpy(row, x + m * w.in, w.in * sizeof(bf16));
        for (long g = 0; g < rows.groups; g++) {
            float lanes[32] = {}, sum = 0;
            for (long k = g * w.groupsize; k < (g + 1) * w.groupsize; k += 32)
                for (long i = 0; i < 32; i++) lanes[i] += to_float(row[k + i]);
            for (long i = 0; i < 32; i++) sum += lanes[i];
            rows.sums[m * rows.groups + g] = sum;
        }
#ifdef FAST
        if (w.bits == 4)
            for (long k = 0; k < rows.padded; k += BLOCK) arrange(row + k, row + k);
#endif
    }
}

// y [rows, out] = x [rows, in] times the weight's transpose; `in` a multiple of 32.
extern "C" void linear(const bf16 *x, long count, const uint8_t *data, const void *scale, const bf16 *minimum, long bits,
                       long groupsize, long in, long out, bf16 *y) {
    thread_local Rows rows;
    const Weight w = {data, scale, minimum, bits, groupsize, in, out};
    prepare(w, x, count, rows);
    const Rows &shared = rows;
    const long pass = bits == 4 ? ROWS / 2 : ROWS;  // as many as registers hold beside the levels of two channels
#pragma omp parallel for schedule(static)
    for (long n = 0; n < out; n += STRIP)
        for (long first = 0; first < count; first += pass)
            strip(w, shared, first, std::min(pass, count - first), n, std::min(n + STRIP, out), y);
}

// The weight [out, in], in bfloat16 or, where `wide`, in float32; `in` a multiple of 32.
extern "C" void dequantize(const uint8_t *data, const void *scale, const bf16 *minimum, long bits, long groupsize, long in,
                           long out, bool wide, void *y) {
    const Weight w = {data, scale, minimum, bits, groupsize, in, out};
#pragma omp parallel for schedule(static)
    for (long n = 0; n < out; n++)
        for (long k = 0; k < in; k += 32) {
            float values[32];
            decode(w, n, k, values);
            bf16 *narrow = (bf16 *)y + n * in + k;
            if (wide) memcpy((float *)y + n * in + k, values, sizeof values);
#ifdef FAST
            else _mm512_storeu_si512(narrow, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(values + 16), _mm512_loadu_ps(values)));
#else
            else for (long i = 0; i < 32; i++) narrow[i] = to_bf16(values[i]);
#endif
        }
}

// e to the x <= 0 within 2 ulp, in operations that vectorize: 2 to the integer part times a polynomial of the rest.
static inline float exponential(float x) {
    x = std::max(x, -87.0f);
    float n = std::nearbyint(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1 + r * (1 + r * (0.5f + r * (1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f + r * (1 / 720.0f))))));
    return p * __builtin_bit_cast(float, (int32_t(n) + 127) << 23);
}

// Softmax-weighted sum of `count` values for one query: out = sum of exp(score - maximum) * v, then that maximum, then
// the sum of the exponentials.
static void attend(const float *q, const bf16 *k, const bf16 *v, long count, long head_dim, float *out) {
    float scores[CHUNK + 3], top = -INFINITY, total = 0;
    for (long j = 0; j < count; j++) {
        float score = 0;
#pragma omp simd reduction(+ : score)
        for (long i = 0; i < head_dim; i++) score += q[i] * to_float(k[j * head_dim + i]);
        scores[j] = score;
        top = std::max(top, score);
    }
    for (long j = 0; j < count; j++) scores[j] = exponential(scores[j] - top);
    for (long j = 0; j < count; j++) total += scores[j];
    std::fill(out, out + head_dim, 0.0f);
    for (long j = 0; j < count; j += 4) {  // four positions at a time: a fourth of the traffic on `out`
        const long n = std::min(4l, count - j);
        const bf16 *a = v + j * head_dim, *b = a + (n > 1) * head_dim, *c = a + (n > 2) * 2 * head_dim, *d = a + (n > 3) * 3 * head_dim;
        const float s = scores[j], t = n > 1 ? scores[j + 1] : 0, u = n > 2 ? scores[j + 2] : 0, w = n > 3 ? scores[j + 3] : 0;
#pragma omp simd
        for (long i = 0; i < head_dim; i++)
            out[i] += (s * to_float(a[i]) + t * to_float(b[i])) + (u * to_float(c[i]) + w * to_float(d[i]));
    }
    out[head_dim] = top;
    out[head_dim + 1] = total;
}

// qkv [rows, (n_head + 2 n_kv_head) * head_dim] at the positions from `start` on; rope [rows, head_dim], cosines then sines;
// caches [n_kv_head, positions, head_dim], which get the rows' keys and values; y [rows, n_head * head_dim].
extern "C" void attention(const bf16 *qkv, const float *rope, long start, long rows, long n_head, long n_kv_head, long head_dim,
                          long positions, bf16 *k_cache, bf16 *v_cache, bf16 *y) {
    const long group = n_head / n_kv_head, half = head_dim / 2, chunks = (start + rows + CHUNK - 1) / CHUNK, size = head_dim + 2;
    const float scale = 1.0f / std::sqrt(float(head_dim));
    thread_local std::vector<float> queries, partial;
    queries.resize(rows * n_head * head_dim);
    partial.resize(chunks * rows * n_head * size);
    float *q = queries.data(), *parts = partial.data();
    for (long s = 0; s < rows; s++) {
        const bf16 *x = qkv + s * (n_head + 2 * n_kv_head) * head_dim;
        const float *cos = rope + s * head_dim, *sin = cos + half;
        for (long h = 0; h < n_head + n_kv_head; h++, x += head_dim)
            for (long i = 0; i < half; i++) {
                const float a = to_float(x[i]), b = to_float(x[i + half]);
                const bf16 turned[2] = {to_bf16(a * cos[i] - b * sin[i]), to_bf16(b * cos[i] + a * sin[i])};
                bf16 *key = k_cache + ((h - n_head) * positions + start + s) * head_dim + i;
                float *query = q + (s * n_head + h) * head_dim + i;
                for (int part = 0; part < 2; part++)
                    if (h < n_head) query[part * half] = to_float(turned[part]) * scale;
                    else key[part * half] = turned[part];
            }
        for (long h = 0; h < n_kv_head; h++, x += head_dim)
            memcpy(v_cache + (h * positions + start + s) * head_dim, x, head_dim * sizeof(bf16));
    }
#pragma omp parallel for collapse(2) schedule(static)
    for (long h = 0; h < n_kv_head; h++)
        for (long c = 0; c < chunks; c++) {
            const long offset = (h * positions + c * CHUNK) * head_dim;
            for (long s = 0; s < rows; s++)
                for (long head = h * group; head < (h + 1) * group && c * CHUNK <= start + s; head++)
                    attend(q + (s * n_head + head) * head_dim, k_cache + offset, v_cache + offset,
                           std::min(CHUNK, start + s + 1 - c * CHUNK), head_dim, parts + ((s * n_head + head) * chunks + c) * size);
        }
#pragma omp parallel for schedule(static)
    for (long i = 0; i < rows * n_head; i++) {  // the chunks of a row and head, up to its own position, in their order
        const long count = (start + i / n_head) / CHUNK + 1;
        const float *part = parts + i * chunks * size;
        float top = -INFINITY, total = 0, sum[1024] = {};
        for (long c = 0; c < count; c++) top = std::max(top, part[c * size + head_dim]);
        for (long c = 0; c < count; c++) {
            const float weight = exponential(part[c * size + head_dim] - top);
            total += weight * part[c * size + head_dim + 1];
            for (long j = 0; j < head_dim; j++) sum[j] += weight * part[c * size + j];
        }
        for (long j = 0; j < head_dim; j++) y[i * head_dim + j] = to_bf16(sum[j] / total);
    }
}
