// Numbers and vectors: bfloat16, float32 vectors as wide as the CPU has them, and functions of them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

using bf16 = uint16_t;
#define UNROLLED _Pragma("GCC unroll 16")  // so that the elements of an array stay in registers
#if defined(__AVX512F__)
static constexpr long LANES = 16;  // float32 in a vector
#elif defined(__AVX__)
static constexpr long LANES = 8;
#else
static constexpr long LANES = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

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

template <class T> static inline T load(const void *p) {
    T v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void store(float *p, Floats v) {
    memcpy(p, &v, sizeof v);
}

static inline Floats to_floats(Halves x) {
    return (Floats)(__builtin_convertvector(x, Words) << 16);
}

// Lanes of `a`, and of `b` from index LANES on.
static inline Floats shuffle(Floats a, Floats b, Ints index) {
#ifdef __clang__
    Floats result;
    for (long i = 0; i < LANES; i++) result[i] = index[i] < LANES ? a[index[i]] : b[index[i] - LANES];
    return result;
#else
    return __builtin_shuffle(a, b, index);
#endif
}

// From two vectors with sums in segments of 2N lanes, one vector in which the first N lanes of a segment are sums of a,
// and the others sums of b.
template <long N> static inline Floats add_halves(Floats a, Floats b) {
    Ints index;
    UNROLLED for (long i = 0; i < LANES; i++) index[i] = i / (2 * N) * 2 * N + i % N + (i / N % 2 ? LANES : 0);
    return shuffle(a, b, index) + shuffle(a, b, index + int(N));
}

// Lane l of the result is the sum of all lanes of v[l]; v is overwritten.
template <long N = LANES / 2> static inline Floats sums_of(Floats *v) {
    UNROLLED for (long l = 0; l < N; l++) v[l] = add_halves<N>(v[l], v[l + N]);
    if constexpr (N > 1) return sums_of<N / 2>(v);
    return v[0];
}

// The sum of the lanes, in a fixed order.
static inline float sum_of(Floats v) {
    float lanes[LANES];
    store(lanes, v);
    for (long half = LANES / 2; half > 0; half /= 2)
        for (long i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

// Memory that starts at a cache line, because a load that crosses two lines costs two.
template <class T> struct AlignedAllocator {
    using value_type = T;
    AlignedAllocator() = default;
    template <class U> AlignedAllocator(const AlignedAllocator<U> &) {}
    T *allocate(size_t n) { return (T *)aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64); }
    void deallocate(T *p, size_t) { free(p); }
    bool operator==(const AlignedAllocator &) const { return true; }
};
template <class T> using Buffer = std::vector<T, AlignedAllocator<T>>;

// e to the x <= 0 within 3 ulp (from -87 on): 2 to the integer part of x / ln 2, times the Taylor polynomial of the rest,
// from which ln 2 is subtracted in two parts so that no bit is lost. Adding and subtracting 1.5 * 2^23 rounds.
static inline Floats exponential(Floats x) {
    x = x < -87.0f ? Floats{} - 87.0f : x;
    const Floats n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    const Floats p = 1 + r * (1 + r * (0.5f + r * (1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f + r * (1 / 720.0f))))));
    return p * (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
}

static inline float exponential(float x) {
    return exponential(Floats{} + x)[0];
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

