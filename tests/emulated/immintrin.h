// The intrinsics of AVX512 and AVX512_BF16 that products use, in GCC's vector types, so that check_kernels.cpp can be
// compiled and run on a CPU without them. Semantics: Intel's Intrinsics Guide.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

typedef float __m512 __attribute__((vector_size(64)));
typedef int64_t __m512i __attribute__((vector_size(64)));
typedef int16_t __m512bh __attribute__((vector_size(64)));
typedef int64_t __m256i __attribute__((vector_size(32)));
typedef int64_t __m128i __attribute__((vector_size(16)));
typedef uint16_t __v32hu __attribute__((vector_size(64)));
typedef int32_t __v16si __attribute__((vector_size(64)));
typedef uint64_t __mmask64;
typedef uint16_t __mmask16;
typedef uint8_t __mmask8;
typedef uint16_t EmulatedHalves __attribute__((vector_size(32)));
typedef int8_t EmulatedBytes __attribute__((vector_size(16)));
#define _MM_HINT_T0 3
#define _mm_prefetch(address, hint) ((void)(address))

// A load that reads only the elements in the mask; the others are zero.
template <class Vector, class Element> static inline Vector emulated_load(uint64_t mask, const void *p) {
    Element elements[sizeof(Vector) / sizeof(Element)] = {};
    for (unsigned i = 0; i < sizeof(Vector) / sizeof(Element); i++)
        if (mask >> i & 1) memcpy(&elements[i], (const Element *)p + i, sizeof(Element));
    Vector v;
    memcpy(&v, elements, sizeof v);
    return v;
}
#define _mm512_maskz_loadu_epi8(mask, p) emulated_load<__m512i, uint8_t>(mask, p)
#define _mm512_maskz_loadu_ps(mask, p) emulated_load<__m512, float>(mask, p)
#define _mm256_maskz_loadu_epi16(mask, p) emulated_load<__m256i, uint16_t>(mask, p)
#define _mm_maskz_loadu_epi16(mask, p) emulated_load<__m128i, uint16_t>(mask, p)
#define _mm512_loadu_si512(p) emulated_load<__m512i, uint8_t>(~0ull, p)
#define _mm512_setzero_ps() (__m512{})
#define _mm512_cvtepi32_ps(x) __builtin_convertvector((__v16si)(x), __m512)
#define _mm512_cvtepi8_epi32(x) ((__m512i)__builtin_convertvector((EmulatedBytes)(x), __v16si))
#define _mm512_cvtepu16_epi32(x) ((__m512i)__builtin_convertvector((EmulatedHalves)(x), __v16si))
#define _mm512_slli_epi32(x, count) ((__m512i)((__v16si)(x) << (count)))
#define _mm512_castsi128_si512(x) (__m512i{(x)[0], (x)[1]})

static inline __m512i _mm512_set_epi32(int e15, int e14, int e13, int e12, int e11, int e10, int e9, int e8, int e7,
                                       int e6, int e5, int e4, int e3, int e2, int e1, int e0) {
    return (__m512i)__v16si{e0, e1, e2, e3, e4, e5, e6, e7, e8, e9, e10, e11, e12, e13, e14, e15};
}

static inline __m512i _mm512_maskz_permutexvar_epi16(uint32_t mask, __m512i index, __m512i words) {
    __v32hu result = {};
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) result[i] = ((__v32hu)words)[((__v32hu)index)[i] & 31];
    return (__m512i)result;
}
#define _mm512_permutexvar_epi16(index, words) _mm512_maskz_permutexvar_epi16(~0u, index, words)

static inline __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
    __v16si result = {};
    for (int i = 0; i < 32; i++) result[i / 2] += ((__m512bh)a)[i] * ((__m512bh)b)[i];
    return (__m512i)result;
}

// `low` becomes the first 16 words; to the nearest, ties to even.
static inline __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
    __m512bh result = {};
    for (int i = 0; i < 32; i++) {
        const uint32_t bits = __builtin_bit_cast(uint32_t, float(i < 16 ? low[i] : high[i - 16]));
        result[i] = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    }
    return result;
}

static inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
    auto to_float32 = [](int16_t x) { return __builtin_bit_cast(float, uint32_t(uint16_t(x)) << 16); };
    for (int i = 0; i < 32; i++) sum[i / 2] += to_float32(a[i]) * to_float32(b[i]);
    return sum;
}

static inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    for (int i = 0; i < 16; i++) c[i] = std::fma(a[i], b[i], c[i]);
    return c;
}

static inline float _mm512_reduce_add_ps(__m512 x) {
    float sum = 0;
    for (int i = 0; i < 16; i++) sum += x[i];
    return sum;
}
