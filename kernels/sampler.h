// From logits to token ids, as sampling.py has it.
#pragma once
#include "phases.h"

// A bijection of 32-bit integers: see sampling.py.
static inline uint32_t hash32(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7FEB352D;
    x = (x ^ (x >> 15)) * 0x846CA68B;
    return x ^ (x >> 16);
}

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

