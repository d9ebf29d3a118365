/* Matrices in four formats times a few rows, and the vectors of 16 floats they are made with.

GCC's and clang's vector types, so that any processor is served; where they translate badly for x86
with AVX-512 the instruction is named. */

#ifndef LASCAUX_MATRIX_H
#define LASCAUX_MATRIX_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))
enum { LANES = 16, STEP = 32, TILE_ROWS = 8, AHEAD_BYTES = 16384 };
enum Format { FP32, BF16, INT8, INT4 };

typedef float vec __attribute__((vector_size(64)));
typedef float eight __attribute__((vector_size(32)));
typedef float four __attribute__((vector_size(16)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
typedef int16_t shorts __attribute__((vector_size(32)));
typedef int8_t bytes __attribute__((vector_size(16)));
typedef uint8_t nibbles __attribute__((vector_size(16)));

/* scale: INT8 a float for each row; INT4 for each 32 columns a factor and a smallest value, bf16 */
typedef struct {
    const void *data, *scale;
    const float *bias;
    int64_t rows, columns, format;
} Matrix;

INLINE int64_t padded(int64_t n) { return (n + STEP - 1) / STEP * STEP; }

INLINE vec load_vec(const float *p) { vec v; memcpy(&v, p, sizeof v); return v; }

/* Compilers widen vectors well by a factor of two only; for x86 the instruction is named. */
INLINE vec load_bf16(const uint16_t *p) {
    halves h;
    memcpy(&h, p, sizeof h);
#if defined(__AVX512F__)
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#else
    return (vec)(__builtin_convertvector(h, words) << 16);
#endif
}

INLINE vec widen(bytes b) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)b));
#else
    ints wide = __builtin_convertvector(__builtin_convertvector(b, shorts), ints);
    return __builtin_convertvector(wide, vec);
#endif
}

INLINE float one_bf16(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE uint16_t to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

INLINE float sum_vec(vec v) {
    union { vec whole; eight half[2]; } a = {v};
    union { eight whole; four half[2]; } b = {a.half[0] + a.half[1]};
    four c = b.half[0] + b.half[1];
    return (c[0] + c[2]) + (c[1] + c[3]);
}

INLINE vec choose(ints where, vec yes, vec no) {
    return (vec)(((ints)yes & where) | ((ints)no & ~where));
}

/* e^x by 2^n and a polynomial, to about 2e-7 of itself */
INLINE vec exp_vec(vec x) {
    const vec zero = {0}, rounding = zero + 12582912.0f; /* 1.5 * 2^23 */
    x = choose(x < zero - 87.0f, zero - 87.0f, x);
    x = choose(x > zero + 88.0f, zero + 88.0f, x);
    vec whole = (x * 1.44269504f + rounding) - rounding;
    ints n = __builtin_convertvector(whole, ints);
    vec f = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    vec p = f * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    return p * (vec)((n + 127) << 23);
}

/* a group of 32 weights: its factor and smallest value, each the upper half of a float */
INLINE void load_nibbles(const uint8_t *p, const uint16_t *group, vec *a, vec *b) {
    nibbles n;
    memcpy(&n, p, sizeof n);
#if defined(__AVX512F__)
    /* the 16 values there are, picked by the low four bits of each lane */
    const __m512 count = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int32_t both;
    memcpy(&both, group, sizeof both);
    __m512i pair = _mm512_set1_epi32(both);
    __m512 factor = (__m512)_mm512_slli_epi32(pair, 16);
    __m512 smallest = (__m512)_mm512_and_si512(pair, _mm512_set1_epi32((int)0xFFFF0000));
    __m512 values = _mm512_fmadd_ps(count, factor, smallest);
    __m512i picks = _mm512_cvtepu8_epi32((__m128i)n);
    *a = (vec)_mm512_permutexvar_ps(picks, values);
    *b = (vec)_mm512_permutexvar_ps(_mm512_srli_epi32(picks, 4), values);
#else
    float factor = one_bf16(group[0]), smallest = one_bf16(group[1]);
    *a = widen((bytes)(n & 15)) * factor + smallest;
    *b = widen((bytes)(n >> 4)) * factor + smallest;
#endif
}

/* 32 weights of a row from column k */
INLINE void load_weights(int format, const void *row, const uint16_t *groups, int64_t k, vec *a,
                         vec *b) {
    if (format == FP32) {
        *a = load_vec((const float *)row + k);
        *b = load_vec((const float *)row + k + LANES);
    } else if (format == BF16) {
        *a = load_bf16((const uint16_t *)row + k);
        *b = load_bf16((const uint16_t *)row + k + LANES);
    } else if (format == INT8) {
        bytes low, high;
        memcpy(&low, (const int8_t *)row + k, sizeof low);
        memcpy(&high, (const int8_t *)row + k + LANES, sizeof high);
        *a = widen(low);
        *b = widen(high);
    } else {
        load_nibbles((const uint8_t *)row + k / 2, groups + k / STEP * 2, a, b);
    }
}

INLINE int64_t bytes_of(int format, int64_t columns) {
    return format == FP32 ? columns * 4 : format == BF16 ? columns * 2
           : format == INT8 ? columns : columns / 2;
}

/* I rows of a matrix, from `first`, times R rows x; each sum in the order of the columns. Memory is
asked for ahead of its use, up to `end`: the processor itself follows one stream, not I. */
INLINE void tile(int format, int I, int R, const Matrix *m, int64_t first, int64_t last,
                 const char *end, const float *const *x, float *const *out) {
    int64_t columns = m->columns, row_bytes = bytes_of(format, columns), k = 0;
    const char *row[8];
    const uint16_t *groups[8];
    vec sums[8 * TILE_ROWS];
    UNROLL for (int i = 0; i < I; i++) {
        int64_t at = first + i < last ? first + i : last - 1;
        row[i] = (const char *)m->data + at * row_bytes;
        groups[i] = format == INT4 ? (const uint16_t *)m->scale + at * (columns / STEP) * 2 : NULL;
        UNROLL for (int r = 0; r < R; r++) sums[i * R + r] = (vec){0};
    }
    const int64_t step_bytes = I * bytes_of(format, STEP);
    const char *ahead = row[0] + (I * row_bytes > AHEAD_BYTES ? I * row_bytes : AHEAD_BYTES);
    for (; k + STEP <= columns; k += STEP) {
        if (ahead < end)
            for (int64_t p = 0; p < step_bytes; p += 64) __builtin_prefetch(ahead + p, 0, 2);
        ahead += step_bytes;
        UNROLL for (int i = 0; i < I; i++) {
            vec a, b;
            load_weights(format, row[i], groups[i], k, &a, &b);
            UNROLL for (int r = 0; r < R; r++) {
                sums[i * R + r] += a * load_vec(x[r] + k);
                sums[i * R + r] += b * load_vec(x[r] + k + LANES);
            }
        }
    }
    if (k < columns)
        for (int i = 0; i < I; i++) { /* the last columns, with zeros after them */
            char rest[STEP * sizeof(float)] = {0};
            vec a, b;
            memcpy(rest, row[i] + bytes_of(format, k), (size_t)bytes_of(format, columns - k));
            load_weights(format, rest, groups[i], 0, &a, &b);
            for (int r = 0; r < R; r++) { /* not what lies behind: zero times NaN is NaN */
                float own[STEP] = {0};
                memcpy(own, x[r] + k, sizeof(float) * (size_t)(columns - k));
                sums[i * R + r] += a * load_vec(own);
                sums[i * R + r] += b * load_vec(own + LANES);
            }
        }
    UNROLL for (int i = 0; i < I; i++)
        UNROLL for (int r = 0; r < R; r++) {
            float y = sum_vec(sums[i * R + r]);
            if (first + i >= last) continue;
            out[r][first + i] = format == INT8 ? y * ((const float *)m->scale)[first + i] : y;
        }
}

/* fewer matrix rows at a time beside more x: sums and loads stay in registers */
#define TILES(FORMAT, R, I)                                                                       \
    case R:                                                                                       \
        for (int64_t i = first; i < last; i += I) tile(FORMAT, I, R, m, i, last, end, x, out);    \
        break;
#define TILES_OF(FORMAT)                                                                          \
    case FORMAT:                                                                                  \
        switch (rows) {                                                                           \
            TILES(FORMAT, 1, 8) TILES(FORMAT, 2, 4) TILES(FORMAT, 3, 4) TILES(FORMAT, 4, 4)       \
            TILES(FORMAT, 5, 2) TILES(FORMAT, 6, 2) TILES(FORMAT, 7, 2) TILES(FORMAT, 8, 2)       \
        }                                                                                         \
        break;

static void multiply(const Matrix *m, int64_t first, int64_t last, const char *end, int rows,
                     const float *const *x, float *const *out) {
    switch (m->format) { TILES_OF(FP32) TILES_OF(BF16) TILES_OF(INT8) TILES_OF(INT4) }
}

/* rows first..last-1 of a matrix times all x, bias added; outputs begin at those of `base` */
static void multiply_all(const Matrix *m, int64_t base, int64_t first, int64_t last,
                         int64_t reader_last, int rows, const float *const *x, float *const *out) {
    const char *end = (const char *)m->data + (base + reader_last) * bytes_of(m->format, m->columns);
    float *shifted[TILE_ROWS];
    for (int r = 0; r < rows; r += TILE_ROWS) {
        int some = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
        for (int j = 0; j < some; j++) shifted[j] = out[r + j] - base;
        multiply(m, base + first, base + last, end, some, x + r, shifted);
        if (m->bias)
            for (int j = 0; j < some; j++)
                for (int64_t i = base + first; i < base + last; i++) shifted[j][i] += m->bias[i];
    }
}

#endif
