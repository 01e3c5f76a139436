// A decoding step on a CPU at the speed of memory.
//
// kernels/cpu.py describes a call as an operation and an array of 8-byte words; all tensors are contiguous. Activations
// are bfloat16, sums are float32. Two promises beside speed: row i of many is bit for bit that row alone, on any number
// of threads (every row has accumulators of its own and a fixed order of additions), and a position's attention does not
// depend on the cache after it.
//
//     vectors.h    bfloat16, float32 vectors, exponential and logarithm
//     phases.h     operations, their tasks, and the threads that run them
//     linear.h     products with stored weights (weight.h): linear_avx512_bf16.h, or linear_any_cpu.h
//     attention.h  attention; sampler.h  sampling; below: the small operations between products
#include "attention.h"
#include "linear.h"
#include "sampler.h"

// ---- Operations between products. `other` is the embedding table, or the weight of a norm.
struct Elementwise : RowOp {
    const bf16 *other;
    double eps;
    bf16 *y;

    // x: token ids, int64.
    void embed(long row) const { memcpy(y + row * out, other + ((const int64_t *)x)[row] * out, out * sizeof(bf16)); }

    void norm(long row) const {
        const bf16 *from = x + row * in;
        Floats squares = {};
        long i = 0;
        for (; i + LANES <= in; i += LANES) {
            const Floats v = to_floats(load<Halves>(from + i));
            squares += v * v;
        }
        float sum = sum_of(squares);
        for (; i < in; i++) sum += to_float(from[i]) * to_float(from[i]);
        const float factor = 1 / std::sqrt(sum / in + float(eps));
        for (i = 0; i < in; i++) y[row * in + i] = to_bf16(to_float(from[i]) * factor * to_float(other[i]));
    }

    static Floats silu(Floats x) {
        const Floats e = exponential(x < 0 ? x : -x);
        return (x < 0 ? x * e : x) / (1 + e);
    }

    // silu of the first half of a row, rounded, times the second half.
    void gate(long row) const {
        const bf16 *gates = x + row * in, *ups = gates + out;
        float rounded[LANES];
        for (long i = 0; i < out; i += LANES) {
            const long count = std::min(LANES, out - i);
            Halves part = {};
            memcpy(&part, gates + i, count * sizeof(bf16));
            store(rounded, silu(to_floats(part)));
            for (long l = 0; l < count; l++) y[row * out + i + l] = to_bf16(to_float(to_bf16(rounded[l])) * to_float(ups[i + l]));
        }
    }
};
extern "C" const Phase embedding[] = {phase<Elementwise, &Elementwise::each_row, &Elementwise::embed>(), {}};
extern "C" const Phase rms_norm[] = {phase<Elementwise, &Elementwise::each_row, &Elementwise::norm>(), {}};
extern "C" const Phase swiglu[] = {phase<Elementwise, &Elementwise::each_row, &Elementwise::gate>(), {}};
