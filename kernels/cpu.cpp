// A decoding step on a CPU at the speed of memory: its operations, and the threads that repeat them.
//
// kernels/cpu.py describes a call as an operation and an array of 8-byte words; all tensors are contiguous. Activations
// are bfloat16, sums are float32. Two promises beside speed: row i of many is bit for bit that row alone, on any number
// of threads (every row has accumulators of its own and a fixed order of additions), and a position's attention does not
// depend on the cache after it.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <numeric>
#include <pthread.h>
#include <vector>
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(PORTABLE)
#include <immintrin.h>
#define FAST
#endif

using bf16 = uint16_t;
#define UNROLLED _Pragma("GCC unroll 16")  // so that what an array holds stays in registers
static constexpr long STRIP = 8;                // output channels that a product computes at a time
static constexpr long TASK_BYTES = 16384;       // weights of a task, in whole strips, but at least one strip
static constexpr long ROWS = 8;                 // rows that one pass over a strip's weights serves
static constexpr long PREFETCH_BYTES = 4096;    // distance of a prefetch from the weight that is read
static constexpr long SPINS = 50000;            // polls of the other threads, some 50 us, before a thread sleeps
static constexpr long BLOCK = 128;              // activations are padded with zeros to whole blocks of channels
static constexpr long MAX_HEAD_DIM = 1024;      // as in kernels/cpu.py
static constexpr long MAX_THREADS = 256;

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

// ---- An operation is a struct of its arguments, 8 bytes each, in the order of kernels/cpu.py. It runs in phases, and a
// phase in tasks, which any threads run in any order; a phase starts when all tasks of the one before it are done.
struct Phase {
    long (*tasks)(const void *operation);  // the number of tasks; also allocates the buffers that later phases read
    void (*run)(const void *operation, long task);
};

template <class O, auto TASKS, auto RUN> static constexpr Phase phase() {
    return {[](const void *operation) { return (((const O *)operation)->*TASKS)(); },
            [](const void *operation, long task) { (((const O *)operation)->*RUN)(task); }};
}

// The first arguments of every operation: x [rows, in], from which y [rows, out] is computed.
struct RowOp {
    const bf16 *x;
    long rows, in, out;

    long each_row() const { return rows; }
};

// A stored weight [out, in]; `in` is a multiple of 32. bits 16: bfloat16. 8: int8 times a float32 scale per output
// channel. 4: two neighbours in a byte (even channel in the low nibble) times a scale plus a minimum, both bfloat16
// [out, in / groupsize].
struct Weight : RowOp {
    const uint8_t *data;
    const void *scale;
    const bf16 *minimum;
    long bits, groupsize;
    bf16 *y;

    const uint8_t *row(long n) const { return data + n * in * bits / 8; }
    float row_scale(long n) const { return ((const float *)scale)[n]; }  // of 8 bits
    const bf16 *group_scales() const { return (const bf16 *)scale; }     // of 4 bits
    long groups() const { return bits == 4 ? in / groupsize : 0; }
    long padded() const { return (in + BLOCK - 1) / BLOCK * BLOCK; }
};

// 32 channels of output channel n from channel k on, dequantized.
static inline void dequantize32(const Weight &w, long n, long k, float *values) {
    const uint8_t *p = w.row(n) + k * w.bits / 8;
    if (w.bits == 16) {
        for (int i = 0; i < 32; i++) values[i] = to_float(((const bf16 *)p)[i]);
    } else if (w.bits == 8) {
        for (int i = 0; i < 32; i++) values[i] = int8_t(p[i]) * w.row_scale(n);
    } else {
        const long group = n * w.groups() + k / w.groupsize;
        const float scale = to_float(w.group_scales()[group]), minimum = to_float(w.minimum[group]);
        uint16_t pairs[16];  // each with a level in either byte
        for (int i = 0; i < 16; i++) pairs[i] = (p[i] & 15) | p[i] >> 4 << 8;
        for (int i = 0; i < 32; i++) values[i] = ((const uint8_t *)pairs)[i] * scale + minimum;
    }
}

// Activations as a product reads them: [rows][padded] and, for 4 bits, the sum of each group [rows][groups], because the
// minimum of a group is multiplied by nothing else. One operation runs at a time, so they are there once.
static std::vector<bf16> activations;
static std::vector<float> group_sums;

#ifdef FAST
// ---- Products with AVX512_BF16.
//
// A 4-bit level becomes bfloat16 by a table look-up: vpermw takes the low 5 bits of each 16-bit word as index, and with
// the 16 levels stored twice it ignores bit 4, so nothing has to be masked. With word w of a 64-byte block holding the
// channels 4w to 4w + 3, look-up p (after a shift by 4p) gives the channels 4w + p: Linear::prepare brings the
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

// R output channels from n on, times M rows from `first` on: every weight is decoded once for the M rows. The unrolling
// pragmas are what keeps the sums in registers. A row of packed weights is too short for the hardware to learn where the
// next one begins, and it does not look across the end of a page; with few rows of bfloat16 it does better alone.
template <int V, int M, int R> static void block(const Weight &w, long first, long n) {
    const long bytes = w.in * w.bits / 8, padded = w.padded(), groups = w.groups();
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
    // 64 bytes of each channel from byte b on, of which `count` are there.
    auto step = [&](long b, long count) __attribute__((always_inline)) {
        const __mmask64 inside = ~0ull >> (64 - count);
        const __mmask8 groups_inside = (2 << ((2 * count - 1) >> shift)) - 1;
        __m512bh q[R][V];
        __m512 scale[R];
        UNROLLED for (int r = 0; r < R; r++) {
            if (V > 1 || M > 2) _mm_prefetch((const char *)p[r] + b + PREFETCH_BYTES, _MM_HINT_T0);
            unpack<V>(_mm512_maskz_loadu_epi8(inside, p[r] + b), levels, q[r]);
            if constexpr (V == 4) {
                const long g = (n + r) * groups + (2 * b >> shift);
                _mm_prefetch((const char *)(w.group_scales() + g) + PREFETCH_BYTES / 8, _MM_HINT_T0);
                _mm_prefetch((const char *)(w.minimum + g) + PREFETCH_BYTES / 8, _MM_HINT_T0);
                const __m128i words = _mm_maskz_loadu_epi16(groups_inside, w.group_scales() + g);
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
                const __m256i minima = _mm256_maskz_loadu_epi16(inside, w.minimum + (n + r) * groups + g);
                const __m512 wide = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(minima), 16);
                sum[r][m] = _mm512_fmadd_ps(wide, _mm512_maskz_loadu_ps(inside, sums + g), sum[r][m]);
            }
            const float scale = V == 2 ? w.row_scale(n + r) : 1.0f;
            w.y[(first + m) * w.out + n + r] = to_bf16(_mm512_reduce_add_ps(sum[r][m]) * scale);
        }
}

// The output channels n to `end`, times `count` rows from `first` on, which are at most M.
template <int V, int M> static void channels(const Weight &w, long first, long count, long n, long end) {
    if constexpr (M > 1)
        if (count < M) return channels<V, M - 1>(w, first, count, n, end);
    // One row reads memory as one stream; more share each activation between channels, where that is worth the streams.
    constexpr int R = M == 1 || (V == 1 && M < 4) ? 1 : V == 1 && M == 4 ? 4 : 2;
    for (; n + R <= end; n += R) block<V, M, R>(w, first, n);
    for (; n < end; n++) block<V, M, 1>(w, first, n);
}

static void multiply(const Weight &w, long first, long count, long n, long end) {
    const auto times = w.bits == 4 ? channels<4, ROWS> : w.bits == 8 ? channels<2, ROWS> : channels<1, ROWS>;
    times(w, first, count, n, end);
}
#else
// ---- Products on any other CPU: 32 sums a row.
static void multiply(const Weight &w, long first, long count, long n, long end) {
    for (; n < end; n++) {
        float sum[ROWS][32] = {}, weight[32];
        for (long k = 0; k < w.in; k += 32) {
            dequantize32(w, n, k, weight);
            for (long m = 0; m < count; m++) {
                const bf16 *x = &activations[(first + m) * w.padded() + k];
                UNROLLED for (int i = 0; i < 32; i++) sum[m][i] += weight[i] * to_float(x[i]);
            }
        }
        for (long m = 0; m < count; m++) {
            float total = 0;
            for (int i = 0; i < 32; i++) total += sum[m][i];
            w.y[(first + m) * w.out + n] = to_bf16(total);
        }
    }
}
#endif

// y = x times the weight's transpose.
struct Linear : Weight {
    long begin() const {
        activations.resize(rows * padded());
        group_sums.resize(rows * groups());
        return rows;
    }

    // Bring row m into the form in which `multiply` reads it.
    void prepare(long m) const {
        std::vector<bf16> row(padded());
        std::copy_n(x + m * in, in, row.data());
        for (long g = 0; g < groups(); g++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (long k = g * groupsize; k < (g + 1) * groupsize; k++) sum += to_float(row[k]);
            group_sums[m * groups() + g] = sum;
        }
        bf16 *to = &activations[m * padded()];
        std::copy(row.begin(), row.end(), to);
#ifdef FAST
        for (long k = 0; bits == 4 && k < padded(); k += BLOCK, to += BLOCK)
            for (int p = 0; p < 4; p++)
                for (int w = 0; w < 32; w++) to[32 * p + w] = row[k + 4 * w + p];
#endif
    }

    long channels() const { return STRIP * std::max(1l, TASK_BYTES * 8 / (STRIP * in * bits)); }  // of a task
    long tasks() const { return (out + channels() - 1) / channels(); }
    void run(long task) const {
        // As many rows as registers hold beside the levels of two channels, and the first cache besides the weights.
        const long pass = bits == 4 || in > 3072 ? ROWS / 2 : ROWS;
        const long last = std::min((task + 1) * channels(), out);
        for (long n = task * channels(); n < last; n += STRIP)
            for (long first = 0; first < rows; first += pass)
                multiply(*this, first, std::min(pass, rows - first), n, std::min(n + STRIP, last));
    }
};
extern "C" const Phase linear[] = {
    phase<Linear, &Linear::begin, &Linear::prepare>(), phase<Linear, &Linear::tasks, &Linear::run>(), {}};

// The weight itself: y [rows, in] in bfloat16 or, where `wide`, in float32. There is no x, and rows are output channels.
struct Dequantize : Weight {
    long wide;

    void run(long n) const {
        float values[32];
        for (long k = 0; k < in; k += 32) {
            dequantize32(*this, n, k, values);
            if (wide)
                memcpy((float *)y + n * in + k, values, sizeof values);
            else
                for (int i = 0; i < 32; i++) y[n * in + k + i] = to_bf16(values[i]);
        }
    }
};
extern "C" const Phase dequantize[] = {phase<Dequantize, &Dequantize::each_row, &Dequantize::run>(), {}};

// ---- Functions that the operations share.

// The sum of the products of `count` numbers.
static inline float dot(const bf16 *a, const bf16 *b, long count) {
#ifdef FAST
    __m512 sums = _mm512_setzero_ps();
    for (long c = 0; c < count; c += 32) {
        const __mmask32 inside = count - c >= 32 ? ~0u : (1u << (count - c)) - 1;
        const __m512bh left = (__m512bh)_mm512_maskz_loadu_epi16(inside, a + c);
        sums = _mm512_dpbf16_ps(sums, left, (__m512bh)_mm512_maskz_loadu_epi16(inside, b + c));
    }
    return _mm512_reduce_add_ps(sums);
#else
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long c = 0; c < count; c++) sum += to_float(a[c]) * to_float(b[c]);
    return sum;
#endif
}

// e to the x <= 0 within 3 ulp (from -87 on), in operations that vectorize: 2 to the integer part of x / ln 2, times
// the Taylor polynomial of the rest, from which ln 2 is taken in two parts so that nothing of it is lost.
static inline float exponential(float x) {
    x = std::max(x, -87.0f);
    const float n = std::nearbyint(x * 1.44269504f);
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    const float p = 1 + r * (1 + r * (0.5f + r * (1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f + r * (1 / 720.0f))))));
    return p * __builtin_bit_cast(float, (int32_t(n) + 127) << 23);
}

// The natural logarithm of a normal x > 0 within 3 ulp: x is 2 to the n times m, with m between the square roots of 1/2
// and 2, and ln m = 2 artanh(s), s = (m - 1) / (m + 1), of which five terms of the series are enough.
static inline float logarithm(float x) {
    const int32_t bits = __builtin_bit_cast(int32_t, x);
    const int32_t n = (bits - 0x3F3504F3) >> 23;
    const float m = __builtin_bit_cast(float, bits - n * 0x800000);
    const float s = (m - 1) / (m + 1), z = s * s;
    const float series = 2 * s * (1 + z * (1 / 3.0f + z * (1 / 5.0f + z * (1 / 7.0f + z / 9))));
    return n * 0.693359375f + (series - n * 2.12194440e-4f);
}

// A bijection of 32-bit integers: see sampling.py.
static inline uint32_t hash32(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7FEB352D;
    x = (x ^ (x >> 15)) * 0x846CA68B;
    return x ^ (x >> 16);
}

// ---- Operations between products. `other` is the embedding table, the second addend, or the weight of a norm.
struct Elementwise : RowOp {
    const bf16 *other;
    double eps;
    bf16 *y;

    // x: token ids, int64.
    void embed(long row) const { memcpy(y + row * out, other + ((const int64_t *)x)[row] * out, out * sizeof(bf16)); }

    void sum(long row) const {
        for (long i = row * in; i < (row + 1) * in; i++) y[i] = to_bf16(to_float(x[i]) + to_float(other[i]));
    }

    void norm(long row) const {
        const bf16 *from = x + row * in;
        const float factor = 1 / std::sqrt(dot(from, from, in) / in + float(eps));
        for (long i = 0; i < in; i++) y[row * in + i] = to_bf16(to_float(from[i]) * factor * to_float(other[i]));
    }

    // silu of the first half of a row, rounded, times the second half.
    void gate(long row) const {
        for (long i = 0; i < out; i++) {
            const float gate = to_float(x[row * in + i]), up = to_float(x[row * in + out + i]);
            const float e = exponential(-std::abs(gate));
            const float silu = (gate < 0 ? gate * e : gate) / (1 + e);
            y[row * out + i] = to_bf16(to_float(to_bf16(silu)) * up);
        }
    }
};
extern "C" const Phase embedding[] = {phase<Elementwise, &Elementwise::each_row, &Elementwise::embed>(), {}};
extern "C" const Phase add[] = {phase<Elementwise, &Elementwise::each_row, &Elementwise::sum>(), {}};
extern "C" const Phase rms_norm[] = {phase<Elementwise, &Elementwise::each_row, &Elementwise::norm>(), {}};
extern "C" const Phase swiglu[] = {phase<Elementwise, &Elementwise::each_row, &Elementwise::gate>(), {}};

// ---- Attention.

// x: queries [n_head], keys and values [n_kv_head] of each row, at the consecutive positions `input_pos`; y [n_head];
// caches [n_kv_head, positions], to which the rows' keys and values are written; all of them times head_dim. `rope` has
// cosines and sines [head_dim / 2] for each position.
struct Attention : RowOp {
    const float *rope;
    const int64_t *input_pos;
    long n_kv_head, positions, head_dim;
    bf16 *k_cache, *v_cache, *y;

    static inline std::vector<bf16> queries;  // after RoPE
    long n_head() const { return out / head_dim; }
    long begin() const {
        queries.resize(rows * out);
        return rows;
    }

    // Apply RoPE to a row's queries and keys, and write its keys and values to the caches.
    void update_cache(long row) const {
        const long half = head_dim / 2, position = input_pos[row];
        const float *cos = rope + position * head_dim, *sin = cos + half;
        const bf16 *from = x + row * in;
        for (long h = 0; h < n_head() + n_kv_head; h++, from += head_dim) {
            bf16 *key = k_cache + ((h - n_head()) * positions + position) * head_dim;
            bf16 *to = h < n_head() ? &queries[row * out + h * head_dim] : key;
            for (long i = 0; i < half; i++) {
                const float a = to_float(from[i]), b = to_float(from[i + half]);
                to[i] = to_bf16(a * cos[i] - b * sin[i]);
                to[i + half] = to_bf16(b * cos[i] + a * sin[i]);
            }
        }
        for (long h = 0; h < n_kv_head; h++, from += head_dim)
            memcpy(v_cache + (h * positions + position) * head_dim, from, head_dim * sizeof(bf16));
    }

    // The queries of all rows that share KV head h: each key and value comes from memory once. SIZE is head_dim where the
    // compiler is to know it, or 0.
    template <long SIZE> void attend_to(long h) const {
        const long size = SIZE ? SIZE : head_dim, group = n_head() / n_kv_head;
        const bf16 *keys = k_cache + h * positions * size, *values = v_cache + h * positions * size;
        static thread_local std::vector<float> scores;
        scores.resize(positions);
        for (long i = 0; i < rows * group; i++) {
            const long row = i / group, seen = input_pos[row] + 1;  // positions up to the row's own
            const long offset = row * out + (h * group + i % group) * size;
            for (long j = 0; j < seen; j++)
                scores[j] = dot(&queries[offset], keys + j * size, size) / std::sqrt(float(size));
            const float top = *std::max_element(scores.data(), scores.data() + seen);
            float total = 0, sum[SIZE ? SIZE : MAX_HEAD_DIM] = {};
#pragma omp simd reduction(+ : total)
            for (long j = 0; j < seen; j++) total += scores[j] = exponential(scores[j] - top);
            for (long j = 0; j < seen; j++) {
                const float weight = scores[j] / total;
                for (long c = 0; c < size; c++) sum[c] += weight * to_float(values[j * size + c]);
            }
            for (long c = 0; c < size; c++) y[offset + c] = to_bf16(sum[c]);
        }
    }

    long each_kv_head() const { return n_kv_head; }
    void attend(long h) const {
        head_dim == 64 ? attend_to<64>(h) : head_dim == 128 ? attend_to<128>(h) : attend_to<0>(h);
    }
};
extern "C" const Phase attention[] = {phase<Attention, &Attention::begin, &Attention::update_cache>(),
                                      phase<Attention, &Attention::each_kv_head, &Attention::attend>(), {}};

// ---- Token ids y [rows, 1] from logits, as sampling.py has it.
struct Sampler : RowOp {
    long stride;  // elements from one row of x to the next, of which `in` are logits
    const int64_t *input_pos;
    const int32_t *seed;
    const float *temperature;
    long top_k;
    double top_p, min_p;
    int64_t *y;

    // Keep the largest scores, of equal ones the first: at most `count`, until they have `probability` of all. The others
    // become minus infinity.
    void filter(std::vector<float> &scores, long count, double probability) const {
        static thread_local std::vector<std::pair<float, long>> heap;  // of equal scores, the larger -i comes first
        heap.resize(in);
        for (long i = 0; i < in; i++) heap[i] = {scores[i], -i};
        std::make_heap(heap.begin(), heap.end());
        const float top = heap[0].first;
        double total = 0, sum = 0;
        for (float score : scores) total += exponential(score - top);
        auto rest = heap.end();
        for (; rest > heap.begin() && heap.end() - rest < count && sum < probability * total; sum += exponential(rest->first - top))
            std::pop_heap(heap.begin(), rest--);
        while (rest > heap.begin()) scores[-(--rest)->second] = -INFINITY;
    }

    void run(long row) const {
        static thread_local std::vector<float> scores;
        scores.resize(in);
        float *score = scores.data(), *end = score + in;
        for (long i = 0; i < in; i++) score[i] = to_float(x[row * stride + i]);
        y[row] = -1;
        if (std::any_of(score, end, [](float each) { return std::isnan(each); })) return;
        if (top_k < in) filter(scores, top_k, INFINITY);
        if (top_p < 1) filter(scores, in, top_p);
        if (min_p > 0) {
            const float threshold = *std::max_element(score, end) + float(std::log(min_p));
            std::replace_if(score, end, [&](float each) { return each < threshold; }, -INFINITY);
        }
        const uint32_t key = hash32(hash32(hash32(*seed) + uint32_t(input_pos[row])));
        const float scale = *temperature;
        for (long i = 0; i < in; i++) {
            const int32_t bits = hash32(key ^ uint32_t(i) * 0x9E3779B9) & 0x7FFFFF;
            score[i] -= scale * logarithm(-logarithm((bits + 0.5f) * 0x1p-23f));
        }
        const float *largest = std::max_element(score, end);
        if (std::isfinite(*largest)) y[row] = largest - score;
    }
};
extern "C" const Phase sample[] = {phase<Sampler, &Sampler::each_row, &Sampler::run>(), {}};

// ---- Running calls.

struct Call {
    const Phase *phases;  // the last one is empty
    const void *operation;
};

static std::mutex mutex;  // because the buffers between phases exist once

// One call, on OpenMP's threads: PyTorch runs on them what comes before and after.
extern "C" void execute(const Call *call) {
    const std::lock_guard lock(mutex);
    for (const Phase *phase = call->phases; phase->tasks; phase++) {
        const long tasks = phase->tasks(call->operation);
#pragma omp parallel for schedule(static) if (tasks > 1)
        for (long i = 0; i < tasks; i++) phase->run(call->operation, i);
    }
}

// A program, on threads of our own. Each begins with its share of a phase's tasks, then takes from the ends of the
// others'. Whoever does the last task opens the next phase, so nobody waits for a thread that the system has put aside,
// unless it is within a task. A share is one word, its next task and its end: who changes it has the task, however late
// he comes. A fork has no workers; its one thread takes all shares.
static struct {
    struct alignas(64) Share { std::atomic<uint64_t> word; } shares[MAX_THREADS];
    std::atomic<uint32_t> turn;            // changes when a phase opens, and at the end
    std::atomic<long> threads, left;       // that take part; tasks of the phase that are not done
    std::atomic<bool> finished;
    const Phase *open, *next;  // phases
    const void *operation;     // of the open phase
    const Call *call, *end;    // that of the next phase, and the program's end

    // Take a task of a share: its owner the first, others the last. -1 where none is left.
    long claim(std::atomic<uint64_t> &share, bool own) {
        uint64_t word = share;
        while (word >> 32 < uint32_t(word))
            if (share.compare_exchange_weak(word, own ? word + (1ul << 32) : word - 1))
                return own ? word >> 32 : uint32_t(word) - 1;
        return -1;
    }

    // Open the next phase of several tasks; those of one are not worth a wait, and run here.
    void open_next_phase() {
        long tasks = 0;
        while (tasks <= 1 && call < end) {
            open = next++;
            operation = call->operation;
            if (!next->tasks && ++call < end) next = call->phases;
            tasks = open->tasks(operation);
            if (tasks == 1) open->run(operation, 0);
        }
        left = tasks;
        finished = tasks <= 1;
        for (long t = 0; t < threads && tasks > 1; t++) {
            const uint64_t first = t * tasks / threads, last = (t + 1) * tasks / threads;
            shares[t].word = first << 32 | last;
        }
        turn++;
        turn.notify_all();
    }

    // What thread t does: thread 0 until the program has ended, the others for ever.
    void worker_loop(long t) {
        // The turn first: `finished` is set before the turn changes, so whoever misses it does not sleep through it.
        for (uint32_t seen = turn; t > 0 || !finished; seen = turn) {
            long task, done = 0;
            for (long i = 0; i < threads && t < threads; i++)
                for (; (task = claim(shares[(t + i) % threads].word, i == 0)) >= 0; done++) open->run(operation, task);
            if (done > 0 && left.fetch_sub(done) == done) open_next_phase();
            for (long i = 0; i < SPINS && done == 0 && turn == seen; i++) {}
            if (done == 0) turn.wait(seen);
        }
    }
} pool;

extern "C" void replay(const Call *calls, long count, long threads) {
    static long workers = 0;
    const std::lock_guard lock(mutex);
    pool.threads = std::min(threads, MAX_THREADS);
    const auto work = [](void *t) -> void * { return pool.worker_loop(long(t)), nullptr; };
    for (pthread_t thread; workers < pool.threads - 1; workers++) {
        if (pthread_create(&thread, nullptr, work, (void *)(workers + 1)) != 0) break;  // the others do its share
        pthread_detach(thread);
    }
    pool.call = calls;
    pool.end = calls + count;
    pool.next = calls->phases;
    pool.open_next_phase();
    pool.worker_loop(0);
}
