// Products with the instruction vdpbf16ps of AVX512_BF16, which multiplies bfloat16 and adds in float32.
#pragma once
#include "weight.h"

static constexpr long BLOCK = 128;            // activations are padded with zeros to whole blocks of channels
static constexpr long ROWS = 8;               // rows that one pass over a strip's weights serves
static constexpr long PREFETCH_BYTES = 4096;  // distance of a prefetch from the weight that is read
static Buffer<bf16> activations;              // [rows][padded]
static Buffer<float> group_sums;              // for 4 bits [rows][groups]: a minimum is multiplied by nothing else

static long padded_channels(const Weight &w) {
    return (w.in + BLOCK - 1) / BLOCK * BLOCK;
}

// A 4-bit level becomes bfloat16 by a table look-up: vpermw takes the low 5 bits of each 16-bit word as index, and with
// the 16 levels stored twice it ignores bit 4, so nothing has to be masked. With word w of a 64-byte block holding the
// channels 4w to 4w + 3, look-up p (after a shift by 4p) gives the channels 4w + p: `arrange` brings the
// activations into that order, once a call. Each float lane of a sum then covers 8 neighbouring channels, so a block's
// scales are one vector of lanes.
static inline __m512 int8_to_floats(__m128i x) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x));
}

// Bits of a 64-byte block of weights to V vectors of 32 bfloat16: V is 1, 2, 4 for 16, 8, 4 bits. Exact in each case.
template <int V> static inline void unpack(__m512i v, __m512i levels, __m512bh *q) {
    if constexpr (V == 1) q[0] = (__m512bh)v;
    if constexpr (V == 2) {
        const __m128i *quarter = (const __m128i *)&v;
        q[0] = _mm512_cvtne2ps_pbh(int8_to_floats(quarter[1]), int8_to_floats(quarter[0]));
        q[1] = _mm512_cvtne2ps_pbh(int8_to_floats(quarter[3]), int8_to_floats(quarter[2]));
    }
    if constexpr (V == 4)
        UNROLLED for (int i = 0; i < 4; i++) {
            const __m512i shifted = (__m512i)((__v32hu)v >> 4 * i);
            q[i] = (__m512bh)_mm512_permutexvar_epi16(shifted, levels);
        }
}

// R output channels from n on, times M rows from `first` on: every weight is unpacked once for the M rows. The unrolling
// pragmas keep the sums in registers. Packed weights are prefetched, because a row is too short for the hardware
// prefetcher, which also stops at the end of a page; with few rows of bfloat16 the hardware does better alone.
template <int V, int M, int R> static void block(const Weight &w, long first, long n) {
    const long bytes = w.in * w.bits / 8, padded = padded_channels(w), groups = w.groups();
    const bf16 *x = activations.data() + first * padded;
    const int shift = V == 4 ? __builtin_ctzl(w.groupsize) : 7;
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 numbers = _mm512_cvtepi32_ps(lane);
    const __m512i levels = (__m512i)_mm512_cvtne2ps_pbh(numbers, numbers);  // 0 to 15, twice
    // The group of each lane within a block, as the word index that puts a bfloat16 scale into the lane's upper half.
    const __m512i group = (__m512i)((__v16si)lane * 8 >> shift << 16);
    const uint8_t *p[R];
    __m512 sum[R][M];
    UNROLLED for (int r = 0; r < R; r++) {
        p[r] = w.row(n + r);
        UNROLLED for (int m = 0; m < M; m++) sum[r][m] = _mm512_setzero_ps();
    }
    // Add 64 bytes of each channel from byte b on; `count` of them exist.
    auto step = [&](long b, long count) __attribute__((always_inline)) {
        const __mmask64 inside = ~0ull >> (64 - count);
        const __mmask8 groups_inside = (2 << ((2 * count - 1) >> shift)) - 1;
        __m512bh q[R][V];
        __m512 scale[R];
        UNROLLED for (int r = 0; r < R; r++) {
            if (V > 1 || M > 2) _mm_prefetch((const char *)p[r] + b + PREFETCH_BYTES, _MM_HINT_T0);
            unpack<V>(_mm512_maskz_loadu_epi8(inside, p[r] + b), levels, q[r]);
            if constexpr (V == 4) {
                const long g = 2 * b >> shift;
                _mm_prefetch((const char *)(w.group_scales(n + r) + g) + PREFETCH_BYTES / 8, _MM_HINT_T0);
                _mm_prefetch((const char *)(w.group_minima(n + r) + g) + PREFETCH_BYTES / 8, _MM_HINT_T0);
                const __m128i words = _mm_maskz_loadu_epi16(groups_inside, w.group_scales(n + r) + g);
                scale[r] = (__m512)_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, group, _mm512_castsi128_si512(words));
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
    const long whole = bytes & ~63l;
    for (long b = 0; b < whole; b += 64) step(b, 64);
    if (whole < bytes) step(whole, bytes - whole);
    UNROLLED for (int r = 0; r < R; r++)
        UNROLLED for (int m = 0; m < M; m++) {
            const float *sums = group_sums.data() + (first + m) * groups;
            for (long g = 0; V == 4 && g < groups; g += 16) {  // the minima, times the sums of their groups
                const __mmask16 inside = groups - g >= 16 ? 0xFFFF : (1 << (groups - g)) - 1;
                const __m256i minima = _mm256_maskz_loadu_epi16(inside, w.group_minima(n + r) + g);
                const __m512 wide = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(minima), 16);
                sum[r][m] = _mm512_fmadd_ps(wide, _mm512_maskz_loadu_ps(inside, sums + g), sum[r][m]);
            }
            const float scale = V == 2 ? w.row_scale(n + r) : 1.0f;
            w.write(first + m, n + r, _mm512_reduce_add_ps(sum[r][m]) * scale);
        }
}

// The output channels n to `end`, times `count` rows from `first` on, which are at most M.
template <int V, int M> static void channels(const Weight &w, long first, long count, long n, long end) {
    if constexpr (M > 1)
        if (count < M) return channels<V, M - 1>(w, first, count, n, end);
    // One row reads memory as one stream. More rows share each activation between channels, if that is worth the streams.
    constexpr int R = M == 1 || (V == 1 && M < 4) ? 1 : V == 1 && M == 4 ? 4 : 2;
    for (; n + R <= end; n += R) block<V, M, R>(w, first, n);
    for (; n < end; n++) block<V, M, 1>(w, first, n);
}

static void multiply(const Weight &w, long first, long count, long n, long end) {
    const auto times = w.bits == 4 ? channels<4, ROWS> : w.bits == 8 ? channels<2, ROWS> : channels<1, ROWS>;
    times(w, first, count, n, end);
}

// Rows per pass: as many as registers hold beside the levels of two channels, and the first cache beside the weights.
static long rows_per_pass(const Weight &w) {
    return w.bits == 4 || w.in > 3072 ? ROWS / 2 : ROWS;
}

// Bring a row of activations, padded with zeros, into the order in which `multiply` reads it.
static void arrange(const Weight &w, const bf16 *row, long m) {
    bf16 *to = &activations[m * padded_channels(w)];
    std::copy_n(row, padded_channels(w), to);
    for (long k = 0; w.bits == 4 && k < padded_channels(w); k += BLOCK, to += BLOCK)
        for (int p = 0; p < 4; p++)
            for (int i = 0; i < 32; i++) to[32 * p + i] = row[k + 4 * i + p];
}
