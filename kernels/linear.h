// Products of rows with stored weights: each weight is read from memory once for all rows, unpacked in registers,
// and never written back. How a row of activations is arranged, and multiplied, depends on the CPU.
#pragma once
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(PORTABLE)
#include "linear_avx512_bf16.h"
#else
#include "linear_any_cpu.h"
#endif

static constexpr long STRIP = 8;           // output channels that a product computes at a time
static constexpr long TASK_BYTES = 16384;  // weights of a task, in whole strips, but at least one strip

// y = x times the weight's transpose, plus the residual.
struct Linear : Weight {
    long begin() const {
        activations.resize(rows * padded_channels(*this));
        group_sums.resize(rows * groups());
        return rows;
    }

    // Arrange row m of the activations, and sum its groups.
    void prepare(long m) const {
        static thread_local std::vector<bf16> row;
        row.assign(padded_channels(*this), 0);
        std::copy_n(x + m * in, in, row.data());
        arrange(*this, row.data(), m);
        for (long g = 0; g < groups(); g++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (long k = g * groupsize; k < (g + 1) * groupsize; k++) sum += to_float(row[k]);
            group_sums[m * groups() + g] = sum;
        }
    }

    long channels() const { return STRIP * std::max(1l, TASK_BYTES * 8 / (STRIP * in * bits)); }  // of a task
    long tasks() const { return (out + channels() - 1) / channels(); }
    void run(long task) const {
        const long pass = rows_per_pass(*this);
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

