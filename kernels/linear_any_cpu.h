// Products on any CPU, in vectors as wide as it has them.
//
// Lanes of weights are unpacked where they are: a mask or a shift gives one channel of each lane, and the activations are
// arranged in that order. Weights of 16 and 8 bits are multiplied as float32. Levels of 4 bits are multiplied as 16-bit
// integers, two products and their sum in one instruction, because to convert each to float32 takes longer than to read
// it. The 8 neighbouring activations that meet in a lane become integers, too, times one power of two: exactly if they are
// within a factor of 128 of the largest of the 8; the others move by at most 2^-15 of it. A block's 8 products per lane are
// added from zero, so that blocks overlap in the pipeline and the order of additions is the same for any number of rows.
#pragma once
#include "weight.h"

static constexpr long BLOCK = 8 * LANES;      // channels; activations are padded with zeros to whole blocks
static constexpr long PASS = 4;               // rows that one pass over the weights serves
static constexpr long PREFETCH_BYTES = 8192;  // distance of a prefetch from the weight that is read
static Buffer<float> activations;             // [rows][padded]; for 4 bits, its blocks are shorter
static Buffer<float> group_sums;              // for 4 bits [rows][groups]: a minimum is multiplied by nothing else

static long padded_channels(const Weight &w) {
    return (w.in + BLOCK - 1) / BLOCK * BLOCK;
}

static long rows_per_pass(const Weight &) {
    return PASS;
}

// Each lane of the sum gets two products of 16-bit integers.
static inline Ints add_products(Ints sum, Shorts a, Shorts b) {
#if defined(__AVX512BW__)
    return sum + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && !defined(__AVX__)
    return sum + (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return sum + ((Ints)a << 16 >> 16) * ((Ints)b << 16 >> 16) + ((Ints)a >> 16) * ((Ints)b >> 16);
#endif
}

// Vector j of a block of weights; of 8 bits, 2^24 times too large.
template <int BITS> static inline auto unpack(const uint8_t *p, int j) {
    if constexpr (BITS == 4) return (Shorts)(load<Words>(p) >> 4 * j & 0x000F000F);
    const Words words = load<Words>(p + j * BITS / 32 * sizeof(Words));
    if constexpr (BITS == 16) return (Floats)(j % 2 ? words & 0xFFFF0000 : words << 16);
    if constexpr (BITS == 8) return __builtin_convertvector((Ints)(words << (24 - 8 * (j % 4)) & 0xFF000000), Floats);
}

// Vectors of weights in a block, and the floats of a row's activations that they meet: as many vectors, and for integers
// the scales of the lanes.
template <int BITS> static constexpr int VECTORS = BITS == 4 ? 4 : 8;
template <int BITS> static constexpr long BLOCK_FLOATS = BITS == 4 ? 5 * LANES : 8 * LANES;

// Lane i of a block for 4 bits: its 8 activations as integers, two in each of 4 vectors, and their scale.
static void arrange_lane(const bf16 *values, long i, int16_t *integers, float *scales) {
    bf16 largest = 0;
    for (long j = 0; j < 8; j++) largest = std::max<bf16>(largest, values[j] & 0x7FFF);
    const uint32_t exponent = std::max(largest >> 7, 15);  // biased by 127; 255 is infinite or NaN
    scales[i] = exponent < 255 ? __builtin_bit_cast(float, (exponent - 14) << 23) : NAN;
    const float factor = __builtin_bit_cast(float, (268 - exponent) << 23);  // brings the largest to 2^14 or more
    for (long j = 0; j < 8; j++) {
        const float rounded = to_float(values[j]) * factor + 12582912.0f;  // 1.5 * 2^23: an integer in the lower bits
        integers[j % 4 * 2 * LANES + 2 * i + j / 4] = __builtin_bit_cast(uint32_t, rounded);
    }
}

// Bring a row of activations, padded with zeros, into the order in which `multiply` reads it.
static void arrange(const Weight &w, const bf16 *row, long m) {
    float *to = &activations[m * padded_channels(w)];
    const long per_lane = 32 / w.bits;  // channels in a lane
    for (long k = 0; k < padded_channels(w); k += BLOCK) {
        for (long i = 0; w.bits == 4 && i < LANES; i++) arrange_lane(row + k + 8 * i, i, (int16_t *)to, to + 4 * LANES);
        for (long j = 0; w.bits > 4 && j < 8; j++)
            for (long i = 0; i < LANES; i++)
                to[j * LANES + i] = to_float(row[k + j / per_lane * per_lane * LANES + i * per_lane + j % per_lane]);
        to += w.bits == 4 ? BLOCK_FLOATS<4> : BLOCK;
    }
}

// The scale of each lane in a block, from the scales of its groups, which are 1, 2 or 4.
struct LaneScales {
    long count;     // groups in a block
    Words shift;    // moves a lane's scale from a pair of bfloat16 to the upper half of a word
    Words is_high;  // all bits, if the lane's scale is in the second pair

    explicit LaneScales(const Weight &w) : count(w.bits == 4 ? std::max(1l, BLOCK / w.groupsize) : 1) {
        for (long i = 0; i < LANES; i++) {
            const long group = count * i / LANES;
            shift[i] = group % 2 ? 0 : 16;
            is_high[i] = group / 2 ? ~0u : 0;
        }
    }

    Floats load_from(const bf16 *scales) const {
        uint64_t pairs = *scales;
        if (count == 2) pairs = load<uint32_t>(scales);
        if (LANES > 8 && count == 4) pairs = load<uint64_t>(scales);
        Words words = Words{} + uint32_t(pairs);
        if constexpr (LANES > 8) words = (words & ~is_high) | ((Words{} + uint32_t(pairs >> 32)) & is_high);
        return (Floats)(words << shift & 0xFFFF0000);
    }
};

// R output channels from n on, times M rows from `first` on: every weight is unpacked once for the M rows.
template <int BITS, int M, int R> struct Tile {
    static constexpr long BYTES = BLOCK * BITS / 8;  // of a block
    Floats sum[R][M] = {};

    // Add a block of each channel, whose weights and scales are at `p` and `s`, times the activations at `x`.
    void add(const uint8_t *const *p, const bf16 *const *s, const float *x, long stride, const LaneScales &scales)
        __attribute__((always_inline)) {
        using Vector = decltype(unpack<BITS>(p[0], 0));
        std::conditional_t<BITS == 4, Ints, Floats> d[R][M];
        UNROLLED for (int j = 0; j < VECTORS<BITS>; j++) {
            Vector q[R];
            UNROLLED for (int r = 0; r < R; r++) q[r] = unpack<BITS>(p[r], j);
            UNROLLED for (int m = 0; m < M; m++) {
                const Vector a = load<Vector>(x + m * stride + j * LANES);
                UNROLLED for (int r = 0; r < R; r++) {
                    if constexpr (BITS == 4) d[r][m] = add_products(j == 0 ? Ints{} : d[r][m], q[r], a);
                    if constexpr (BITS > 4) d[r][m] = j == 0 ? q[r] * a : d[r][m] + q[r] * a;
                }
            }
        }
        UNROLLED for (int r = 0; r < R; r++) {
            const Floats scale = BITS == 4 ? scales.load_from(s[r]) : Floats{};
            UNROLLED for (int m = 0; m < M; m++) {
                const Floats x_scale = load<Floats>(x + m * stride + 4 * LANES);
                if constexpr (BITS == 4) sum[r][m] += __builtin_convertvector(d[r][m], Floats) * x_scale * scale;
                if constexpr (BITS > 4) sum[r][m] += d[r][m];
            }
        }
    }

    // Add the last channels, which fill a part of a block.
    void add_rest(const Weight &w, long n, long k, const float *x, long stride, const LaneScales &scales) {
        uint8_t rest[R][BYTES] = {};
        bf16 rest_scales[R][4] = {};
        const uint8_t *p[R];
        const bf16 *s[R];
        for (int r = 0; r < R; r++) {
            std::copy_n(w.row(n + r) + k * BITS / 8, (w.in - k) * BITS / 8, rest[r]);
            if (BITS == 4) std::copy(w.group_scales(n + r) + k / w.groupsize, w.group_scales(n + r + 1), rest_scales[r]);
            p[r] = rest[r];
            s[r] = rest_scales[r];
        }
        add(p, s, x, stride, scales);
    }

    void write(const Weight &w, long first, long n) {
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++) {
                float total = sum_of(sum[r][m]), minima = 0;
                const bf16 *minimum = BITS == 4 ? w.group_minima(n + r) : nullptr;
                const float *sums = group_sums.data() + (first + m) * w.groups();
#pragma omp simd reduction(+ : minima)
                for (long g = 0; g < w.groups(); g++) minima += to_float(minimum[g]) * sums[g];
                if (BITS == 8) total *= 0x1p-24f * w.row_scale(n + r);
                w.write(first + m, n + r, total + minima);
            }
    }
};

template <int BITS, int M, int R> static void tile(const Weight &w, long first, long n) {
    constexpr long BYTES = BLOCK * BITS / 8;
    const LaneScales scales(w);
    const long stride = padded_channels(w);
    const float *x = activations.data() + first * stride;
    const uint8_t *p[R];
    const bf16 *s[R];
    UNROLLED for (int r = 0; r < R; r++) {
        p[r] = w.row(n + r);
        s[r] = BITS == 4 ? w.group_scales(n + r) : nullptr;
    }
    Tile<BITS, M, R> tile;
    long k = 0, at = 0;  // the channel, and its block of activations
    for (long group_end = w.groupsize; k + BLOCK <= w.in; k += BLOCK) {
        UNROLLED for (int r = 0; r < R; r++)
            for (long i = 0; i < BYTES; i += 64) __builtin_prefetch(p[r] + PREFETCH_BYTES + i, 0, 2);
        tile.add(p, s, x + at, stride, scales);
        at += BLOCK_FLOATS<BITS>;
        const bool is_next = BITS == 4 && k + BLOCK >= group_end;  // the next block is in other groups
        if (is_next) group_end += std::max(w.groupsize, BLOCK);
        UNROLLED for (int r = 0; r < R; r++) {
            p[r] += BYTES;
            if (is_next) s[r] += scales.count;
        }
    }
    if (k < w.in) tile.add_rest(w, n, k, x + at, stride, scales);
    tile.write(w, first, n);
}

// The output channels n to `end`, times `count` rows from `first` on, which are at most M.
template <int BITS, int M> static void channels(const Weight &w, long first, long count, long n, long end) {
    if constexpr (M > 1)
        if (count < M) return channels<BITS, M - 1>(w, first, count, n, end);
    constexpr int R = M > 1 && LANES == 16 ? 4 : BITS == 16 || (BITS == 8 && M > 1) ? 2 : 1;
    for (; n + R <= end; n += R) tile<BITS, M, R>(w, first, n);
    for (; n < end; n++) tile<BITS, M, 1>(w, first, n);
}

static void multiply(const Weight &w, long first, long count, long n, long end) {
    const auto times = w.bits == 4 ? channels<4, PASS> : w.bits == 8 ? channels<8, PASS> : channels<16, PASS>;
    times(w, first, count, n, end);
}
