// Products on any CPU, in float32 vectors as wide as it has them.
//
// 32-bit lanes of weights are unpacked where they are: a mask or a shift and a conversion give one channel of each lane.
// With lane i of 4 bits holding the channels 8i to 8i + 7, vector j of a block has the channels 8i + j, and the activations
// are arranged in that order. A level is not shifted down: it is 16^j times too large, and its activation is prepared as
// much smaller. Both are exact. A block's 8 products per lane are added from zero, so that blocks overlap in the pipeline
// and the order of additions is the same for any number of rows.
#pragma once
#include "weight.h"

static constexpr long BLOCK = 8 * LANES;      // channels; activations are padded with zeros to whole blocks
static constexpr long PASS = 4;               // rows that one pass over the weights serves
static constexpr long PREFETCH_BYTES = 4096;  // distance of a prefetch from the weight that is read
static Buffer<float> activations;             // [rows][padded]
static Buffer<float> group_sums;              // for 4 bits [rows][groups]: a minimum is multiplied by nothing else

static long padded_channels(const Weight &w) {
    return (w.in + BLOCK - 1) / BLOCK * BLOCK;
}

static long rows_per_pass(const Weight &) {
    return PASS;
}

// The channel, within its block, that `unpack` puts into lane i of vector j.
static long channel_of(long bits, long i, long j) {
    const long per_lane = 32 / bits;  // channels in a lane
    return j / per_lane * per_lane * LANES + i * per_lane + j % per_lane;
}

// Bring a row of activations, padded with zeros, into the order in which `multiply` reads it.
static void arrange(const Weight &w, const bf16 *row, long m) {
    float *to = &activations[m * padded_channels(w)];
    for (long k = 0; k < padded_channels(w); k += BLOCK)
        for (long j = 0; j < 8; j++) {
            const float factor = w.bits == 4 && j < 7 ? 1.0f / (1 << 4 * j) : 1.0f;  // level 7 is shifted down
            for (long i = 0; i < LANES; i++) *to++ = to_float(row[k + channel_of(w.bits, i, j)]) * factor;
        }
}

// Vector j of a block of weights; of 8 bits, 2^24 times too large.
template <int BITS> static inline Floats unpack(const uint8_t *p, int j) {
    const Words words = load<Words>(p + j * BITS / 32 * sizeof(Words));
    if constexpr (BITS == 16) return (Floats)(j % 2 ? words & 0xFFFF0000 : words << 16);
    if constexpr (BITS == 8) return __builtin_convertvector((Ints)(words << (24 - 8 * (j % 4)) & 0xFF000000), Floats);
    const Words level = j == 7 ? words >> 28 : words & (15u << 4 * j);
    return __builtin_convertvector((Ints)level, Floats);
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
        Floats d[R][M];
        UNROLLED for (int j = 0; j < 8; j++) {
            Floats q[R];
            UNROLLED for (int r = 0; r < R; r++) q[r] = unpack<BITS>(p[r], j);
            UNROLLED for (int m = 0; m < M; m++) {
                const Floats a = load<Floats>(x + m * stride + j * LANES);
                UNROLLED for (int r = 0; r < R; r++) d[r][m] = j == 0 ? q[r] * a : d[r][m] + q[r] * a;
            }
        }
        UNROLLED for (int r = 0; r < R; r++) {
            const Floats scale = BITS == 4 ? scales.load_from(s[r]) : Floats{};
            UNROLLED for (int m = 0; m < M; m++) sum[r][m] += BITS == 4 ? d[r][m] * scale : d[r][m];
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
    long k = 0;
    for (long group_end = w.groupsize; k + BLOCK <= w.in; k += BLOCK) {
        UNROLLED for (int r = 0; r < R; r++)
            for (long i = 0; i < BYTES; i += 64) __builtin_prefetch(p[r] + PREFETCH_BYTES + i, 0, 2);
        tile.add(p, s, x + k, stride, scales);
        const bool is_next = BITS == 4 && k + BLOCK >= group_end;  // the next block is in other groups
        if (is_next) group_end += std::max(w.groupsize, BLOCK);
        UNROLLED for (int r = 0; r < R; r++) {
            p[r] += BYTES;
            if (is_next) s[r] += scales.count;
        }
    }
    if (k < w.in) tile.add_rest(w, n, k, x + k, stride, scales);
    tile.write(w, first, n);
}

// The output channels n to `end`, times `count` rows from `first` on, which are at most M.
template <int BITS, int M> static void channels(const Weight &w, long first, long count, long n, long end) {
    if constexpr (M > 1)
        if (count < M) return channels<BITS, M - 1>(w, first, count, n, end);
    constexpr int R = M > 1 && LANES == 16 ? 4 : BITS == 8 && M == 1 ? 1 : 2;
    for (; n + R <= end; n += R) tile<BITS, M, R>(w, first, n);
    for (; n < end; n++) tile<BITS, M, 1>(w, first, n);
}

static void multiply(const Weight &w, long first, long count, long n, long end) {
    const auto times = w.bits == 4 ? channels<4, PASS> : w.bits == 8 ? channels<8, PASS> : channels<16, PASS>;
    times(w, first, count, n, end);
}
