// Stored weights, as model.py's dequantize has them.
#pragma once
#include "phases.h"

// A stored weight [out, in]; `in` is a multiple of 32. bits 16: bfloat16. 8: int8 times a float32 scale per output
// channel. 4: two neighbours in a byte (even channel in the low nibble) times a scale plus a minimum, both bfloat16
// [out, in / groupsize].
struct Weight : RowOp {
    const uint8_t *data;
    const void *scale;
    const bf16 *minimum;
    long bits, groupsize;
    const bf16 *residual;  // [rows, out], or null
    bf16 *y;

    const uint8_t *row(long n) const { return data + n * in * bits / 8; }
    float row_scale(long n) const { return ((const float *)scale)[n]; }  // of 8 bits
    long groups() const { return bits == 4 ? in / groupsize : 0; }
    const bf16 *group_scales(long n) const { return (const bf16 *)scale + n * groups(); }  // of 4 bits
    const bf16 *group_minima(long n) const { return minimum + n * groups(); }

    // Write the product of row m and output channel n, rounded, plus the residual.
    void write(long m, long n, float product) const {
        const long i = m * out + n;
        y[i] = to_bf16(product);
        if (residual) y[i] = to_bf16(to_float(residual[i]) + to_float(y[i]));
    }
};

// 32 channels of output channel n from channel k on, dequantized.
static inline void dequantize32(const Weight &w, long n, long k, float *values) {
    const uint8_t *p = w.row(n) + k * w.bits / 8;
    if (w.bits == 16) {
        for (int i = 0; i < 32; i++) values[i] = to_float(((const bf16 *)p)[i]);
    } else if (w.bits == 8) {
        for (int i = 0; i < 32; i++) values[i] = int8_t(p[i]) * w.row_scale(n);
    } else {
        const long group = k / w.groupsize;
        const float scale = to_float(w.group_scales(n)[group]), minimum = to_float(w.group_minima(n)[group]);
        uint16_t pairs[16];  // each with a level in either byte
        for (int i = 0; i < 16; i++) pairs[i] = (p[i] & 15) | p[i] >> 4 << 8;
        for (int i = 0; i < 32; i++) values[i] = ((const uint8_t *)pairs)[i] * scale + minimum;
    }
}

