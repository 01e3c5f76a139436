// Flash decoding: attention of the new rows to the KV cache. A key or value is read once for all heads that share it.
//
// A task is a KV head and a chunk of positions. LANES keys are converted to float32 once and multiplied with every query;
// the softmax of a chunk is relative to its own maximum, and the last phase joins the chunks of a row in their order. So
// the result depends on nothing but the position: not on the number of rows or threads, nor on the cache after it.
#pragma once
#include "phases.h"

static constexpr long CHUNK = 256;          // positions
static constexpr long MAX_HEAD_DIM = 1024;  // as in kernels/cpu.py

// x: queries [n_head], keys and values [n_kv_head] of each row, at the consecutive positions `input_pos`; y [n_head];
// caches [n_kv_head, positions], to which the rows' keys and values are written; all of them times head_dim. `rope` has
// cosines and sines [head_dim / 2] for each position.
struct Attention : RowOp {
    const float *rope;
    const int64_t *input_pos;
    long n_kv_head, positions, head_dim;
    bf16 *k_cache, *v_cache, *y;

    static inline Buffer<float> queries;  // after RoPE, rounded to bfloat16: [rows][n_head][padded()]
    static inline Buffer<float> partials;  // [n_kv_head][chunks()][rows * group()]: maximum, sum, weighted values

    long n_head() const { return out / head_dim; }
    long group() const { return n_head() / n_kv_head; }  // query heads of a KV head
    long padded() const { return (head_dim + LANES - 1) / LANES * LANES; }
    long chunks() const { return input_pos[rows - 1] / CHUNK + 1; }
    float *query(long row, long head) const { return &queries[(row * n_head() + head) * padded()]; }
    float *partial(long h, long chunk, long i) const {
        return &partials[((h * chunks() + chunk) * rows * group() + i) * (2 + padded())];
    }

    long begin() const {
        queries.resize(rows * n_head() * padded());
        partials.resize(n_kv_head * chunks() * rows * group() * (2 + padded()));
        return rows;
    }

    // Apply RoPE to a row's queries and keys, and write its keys and values to the caches.
    void update_cache(long row) const {
        const long half = head_dim / 2, position = input_pos[row];
        const float *cos = rope + position * head_dim, *sin = cos + half;
        const bf16 *from = x + row * in;
        bf16 rotated[MAX_HEAD_DIM];
        for (long h = 0; h < n_head() + n_kv_head; h++, from += head_dim) {
            for (long i = 0; i < half; i++) {
                const float a = to_float(from[i]), b = to_float(from[i + half]);
                rotated[i] = to_bf16(a * cos[i] - b * sin[i]);
                rotated[i + half] = to_bf16(b * cos[i] + a * sin[i]);
            }
            if (h < n_head())
                for (long i = 0; i < padded(); i++) query(row, h)[i] = i < head_dim ? to_float(rotated[i]) : 0;
            else
                memcpy(k_cache + ((h - n_head()) * positions + position) * head_dim, rotated, head_dim * sizeof(bf16));
        }
        for (long h = 0; h < n_kv_head; h++, from += head_dim)
            memcpy(v_cache + (h * positions + position) * head_dim, from, head_dim * sizeof(bf16));
    }

    long tasks() const { return n_kv_head * chunks(); }
    void attend(long task) const {
        static thread_local Buffer<float> scores;  // [rows * group()][CHUNK]
        const long h = task / chunks(), chunk = task % chunks();
        scores.resize(rows * group() * CHUNK);
        if (head_dim == 64) multiply_keys<64>(h, chunk, scores.data());
        else if (head_dim == 128) multiply_keys<128>(h, chunk, scores.data());
        else multiply_keys<0>(h, chunk, scores.data());
        const bf16 *values = v_cache + (h * positions + chunk * CHUNK) * head_dim;
        const int together = group() % 4 == 0 ? 4 : group() % 2 == 0 ? 2 : 1;  // queries of one row
        for (long i = 0; i < rows * group(); i += together) {
            const long seen = positions_seen(chunk, i / group());
            for (long n = i; n < i + together; n++) softmax(&scores[n * CHUNK], seen, partial(h, chunk, n));
            if (seen == 0) continue;
            if (together == 4) multiply_values<4>(values, seen, &scores[i * CHUNK], partial(h, chunk, i) + 2);
            if (together == 2) multiply_values<2>(values, seen, &scores[i * CHUNK], partial(h, chunk, i) + 2);
            if (together == 1) multiply_values<1>(values, seen, &scores[i * CHUNK], partial(h, chunk, i) + 2);
        }
    }

    // Positions of a chunk up to a row's own.
    long positions_seen(long chunk, long row) const {
        return std::clamp(input_pos[row] + 1 - chunk * CHUNK, int64_t(0), int64_t(CHUNK));
    }

    // Convert a key or value to float32.
    static void convert(const bf16 *from, long size, float *to) {
        long c = 0;
        for (; c + LANES <= size; c += LANES) store(to + c, to_floats(load<Halves>(from + c)));
        for (; c < size; c++) to[c] = to_float(from[c]);
    }

    // Scores of all queries of KV head h with the keys of a chunk. SIZE is head_dim if the compiler may know it, or 0.
    template <long SIZE> void multiply_keys(long h, long chunk, float *scores) const {
        const long size = SIZE ? SIZE : head_dim, width = SIZE ? SIZE : padded();
        const long count = positions_seen(chunk, rows - 1);
        const bf16 *keys = k_cache + (h * positions + chunk * CHUNK) * size;
        const float scale = 1 / std::sqrt(float(size));
        alignas(64) float block[LANES][SIZE ? SIZE : MAX_HEAD_DIM];
        for (long l = 0; l < LANES; l++) std::fill_n(block[l], width, 0);
        for (long j = 0; j < count; j += LANES) {
            for (long l = 0; l < std::min(LANES, count - j); l++) {
                for (long c = 0; c < size; c += 32) __builtin_prefetch(keys + (j + l + 2 * LANES) * size + c, 0, 2);
                convert(keys + (j + l) * size, size, block[l]);
            }
            for (long i = 0; i < rows * group(); i++) {
                const float *q = query(i / group(), h * group() + i % group());
                Floats sum[LANES] = {};
                for (long c = 0; c < width; c += LANES) {
                    const Floats part = load<Floats>(q + c);
                    UNROLLED for (long l = 0; l < LANES; l++) sum[l] += part * load<Floats>(block[l] + c);
                }
                store(scores + i * CHUNK + j, sums_of(sum) * scale);
            }
        }
    }

    // Turn the `seen` first scores of a query into weights; their maximum and sum go to `partial`.
    static void softmax(float *scores, long seen, float *partial) {
        for (long j = seen; j % LANES; j++) scores[j] = -INFINITY;
        Floats maxima = Floats{} - INFINITY, sums = {};
        for (long j = 0; j < seen; j += LANES) {
            const Floats s = load<Floats>(scores + j);
            maxima = maxima < s ? s : maxima;
        }
        float maximum = -INFINITY;
        for (long l = 0; l < LANES; l++) maximum = std::max(maximum, maxima[l]);
        for (long j = 0; j < seen; j += LANES) {
            const Floats weights = exponential(load<Floats>(scores + j) - maximum);
            store(scores + j, weights);
            sums += weights;
        }
        partial[0] = maximum;
        partial[1] = sum_of(sums);
    }

    // Sums of `count` values, weighted for T queries of one row.
    template <int T> void multiply_values(const bf16 *values, long count, const float *weights, float *to) const {
        constexpr int W = (LANES == 16 ? 16 : 8) / T;  // vectors of channels whose sums stay in registers
        long c = 0;
        for (; c + W * LANES <= head_dim; c += W * LANES) add_values<T, W>(values + c, count, weights, to + c);
        for (; c + LANES <= head_dim; c += LANES) add_values<T, 1>(values + c, count, weights, to + c);
        for (; c < head_dim; c++)
            for (int t = 0; t < T; t++) {
                float sum = 0;
                for (long j = 0; j < count; j++) sum += weights[t * CHUNK + j] * to_float(values[j * head_dim + c]);
                to[t * (2 + padded()) + c] = sum;
            }
    }

    template <int T, int W> void add_values(const bf16 *values, long count, const float *weights, float *to) const {
        Floats sum[T][W] = {};
        for (long j = 0; j < count; j++) {
            Floats v[W];
            UNROLLED for (int i = 0; i < W; i++) v[i] = to_floats(load<Halves>(values + j * head_dim + i * LANES));
            UNROLLED for (int t = 0; t < T; t++)
                UNROLLED for (int i = 0; i < W; i++) sum[t][i] += weights[t * CHUNK + j] * v[i];
        }
        for (int t = 0; t < T; t++)
            for (int i = 0; i < W; i++) store(to + t * (2 + padded()) + i * LANES, sum[t][i]);
    }

    // Join the chunks of a row.
    void join(long row) const {
        const long count = input_pos[row] / CHUNK + 1;
        for (long head = 0; head < n_head(); head++) {
            const long h = head / group(), i = row * group() + head % group();
            float maximum = -INFINITY, total = 0, sum[MAX_HEAD_DIM] = {};
            for (long chunk = 0; chunk < count; chunk++) maximum = std::max(maximum, partial(h, chunk, i)[0]);
            for (long chunk = 0; chunk < count; chunk++) {
                const float *from = partial(h, chunk, i), weight = exponential(from[0] - maximum);
                total += weight * from[1];
                for (long c = 0; c < head_dim; c++) sum[c] += weight * from[2 + c];
            }
            for (long c = 0; c < head_dim; c++) y[row * out + head * head_dim + c] = to_bf16(sum[c] / total);
        }
    }
};
extern "C" const Phase attention[] = {phase<Attention, &Attention::begin, &Attention::update_cache>(),
                                      phase<Attention, &Attention::tasks, &Attention::attend>(),
                                      phase<Attention, &Attention::each_row, &Attention::join>(), {}};
