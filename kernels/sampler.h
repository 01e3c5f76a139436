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

    // The sum of e to the score - top, for all scores.
    static double sum_of_exponentials(const std::vector<float> &scores, float top) {
        double sum = 0;
        size_t i = 0;
        for (; i + LANES <= scores.size(); i += LANES) {
            const Floats terms = exponential(load<Floats>(&scores[i]) - top);
            for (long l = 0; l < LANES; l++) sum += terms[l];
        }
        for (; i < scores.size(); i++) sum += exponential(scores[i] - top);
        return sum;
    }

    // Keep the largest scores, of equal ones the first: at most `count`, until they have `probability` of all. The others
    // become minus infinity. Only those within a margin of the largest are ordered; if they do not suffice, it grows.
    void filter(std::vector<float> &scores, long count, double probability) const {
        static thread_local std::vector<std::pair<float, long>> heap;  // of equal scores, the larger -i comes first
        const float top = *std::max_element(scores.begin(), scores.end());
        const bool by_probability = std::isfinite(probability);
        const double needed = by_probability ? probability * sum_of_exponentials(scores, top) : INFINITY;
        float margin = 1;
        double sum = 0;
        heap.clear();
        while (long(heap.size()) < std::min(count, in) && sum < needed) {
            heap.clear();
            sum = 0;
            for (long i = 0; i < in; i++) {
                if (scores[i] < top - margin) continue;  // never, if both are infinite
                heap.emplace_back(scores[i], -i);
                if (by_probability) sum += exponential(scores[i] - top);
            }
            margin = margin < 64 ? 2 * margin : INFINITY;
        }
        std::make_heap(heap.begin(), heap.end());
        auto rest = heap.end();
        sum = 0;
        while (rest > heap.begin() && heap.end() - rest < count && sum < needed) {
            std::pop_heap(heap.begin(), rest);
            rest--;
            sum += exponential(rest->first - top);
        }
        scores.assign(in, -INFINITY);
        for (; rest < heap.end(); rest++) scores[-rest->second] = rest->first;
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

