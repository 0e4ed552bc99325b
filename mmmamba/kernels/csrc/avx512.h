/* What product.h does with integers, for processors with AVX-512 and its dot products (VNNI): the same numbers in half the
instructions. On its own a core waits for memory with either; what is saved counts where two threads share one.

With 4 bits a vector holds a pair of units: 128 weights, of which lane m holds 4m .. 4m + 3. Activations lie in four runs
of 32, one for each place in a lane; those of a last single unit lie as product.h has them. */
#pragma once

#include "numbers.h"

static inline float largest(const float *x, int n) {
    __m512 most = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 16) most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
    return _mm512_reduce_max_ps(most);
}

static inline __m512i round32(const float *x, float inverse, __m512i *sum) {
    const __m512 times = _mm512_set1_ps(inverse);
    __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), times));
    __m512i high = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16), times));
    *sum = _mm512_add_epi32(*sum, _mm512_add_epi32(low, high));
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(low)), _mm512_cvtepi32_epi16(high), 1);
}

static inline int32_t round_block(const Linear *m, const float *x, float inverse, int at, int n, int16_t *q) {
    const __m512i places = _mm512_set_epi16(31, 27, 23, 19, 15, 11, 7, 3, 30, 26, 22, 18, 14, 10, 6, 2, 29, 25, 21, 17,
                                            13, 9, 5, 1, 28, 24, 20, 16, 12, 8, 4, 0);
    __m512i sum = _mm512_setzero_si512();
    for (int end = at + n; at < end; at += 32, x += 32) {
        __m512i rounded = round32(x, inverse, &sum);
        if (m->kind == BITS4) {
            int wide = at / (2 * UNIT) * (2 * UNIT) + 2 * UNIT <= m->cols ? 2 * UNIT : UNIT;
            int16_t *to = q + at / wide * wide + at % wide / 4;
            rounded = _mm512_permutexvar_epi16(places, rounded);
            _mm_storeu_si128((__m128i *)to, _mm512_castsi512_si128(rounded));
            _mm_storeu_si128((__m128i *)(to + wide / 4), _mm512_extracti32x4_epi32(rounded, 1));
            _mm_storeu_si128((__m128i *)(to + wide / 2), _mm512_extracti32x4_epi32(rounded, 2));
            _mm_storeu_si128((__m128i *)(to + 3 * wide / 4), _mm512_extracti32x4_epi32(rounded, 3));
        } else {
            _mm512_storeu_si512(q + at, rounded);
        }
    }
    return _mm512_reduce_add_epi32(sum);
}

/* Lanes 0 to 3 sum weights 0 to 31 times activations, lanes 4 to 7 the next 32, and so on. */
static inline __m512i pair4(const uint8_t *w, const int16_t *q) {
    FETCH(w);
    const __m512i mask = _mm512_set1_epi16(15), zero = _mm512_setzero_si512(), v = _mm512_loadu_si512(w);
    __m512i a = _mm512_dpwssd_epi32(zero, _mm512_and_si512(v, mask), _mm512_loadu_si512(q));
    __m512i b = _mm512_dpwssd_epi32(zero, _mm512_and_si512(_mm512_srli_epi16(v, 4), mask), _mm512_loadu_si512(q + 32));
    a = _mm512_dpwssd_epi32(a, _mm512_and_si512(_mm512_srli_epi16(v, 8), mask), _mm512_loadu_si512(q + 64));
    b = _mm512_dpwssd_epi32(b, _mm512_srli_epi16(v, 12), _mm512_loadu_si512(q + 96));
    return _mm512_add_epi32(a, b);
}

/* The same of a single unit, in the lower lanes. */
static inline __m512i single4(const uint8_t *w, const int16_t *q) {
    FETCH(w);
    const __m256i mask = _mm256_set1_epi16(15), v = _mm256_loadu_si256((const __m256i *)w);
    const __m256i *x = (const __m256i *)q;
    __m256i a = _mm256_dpwssd_epi32(_mm256_setzero_si256(), _mm256_and_si256(v, mask), _mm256_loadu_si256(x));
    a = _mm256_dpwssd_epi32(a, _mm256_and_si256(_mm256_srli_epi16(v, 4), mask), _mm256_loadu_si256(x + 1));
    a = _mm256_dpwssd_epi32(a, _mm256_and_si256(_mm256_srli_epi16(v, 8), mask), _mm256_loadu_si256(x + 2));
    return _mm512_zextsi256_si512(_mm256_dpwssd_epi32(a, _mm256_srli_epi16(v, 12), _mm256_loadu_si256(x + 3)));
}

/* 32 weights of 8 bits. */
static inline __m512i half8(const uint8_t *w, const int16_t *q, __m512i sum) {
    __m512i v = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)w));
    return _mm512_dpwssd_epi32(sum, v, _mm512_loadu_si512(q));
}

/* The scales of `halves` times 32 neighbours, four lanes each. */
static inline __m512 scales_of(const float *scale, const uint16_t *at, int halves) {
    __m512 s = _mm512_set1_ps(scale[at[0]]);
    s = _mm512_mask_broadcastss_ps(s, 0x00f0, _mm_load_ss(scale + at[1]));
    if (halves == 2) return s;
    s = _mm512_mask_broadcastss_ps(s, 0x0f00, _mm_load_ss(scale + at[2]));
    return _mm512_mask_broadcastss_ps(s, 0xf000, _mm_load_ss(scale + at[3]));
}

static inline __m512 add_scaled(__m512 total, __m512i sum, __m512 scale) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, total);
}

static inline float integer_row(int kind, const uint8_t *w, const int16_t *q, const float *scale, const uint16_t *at,
                                int units, int group) {
    __m512 total = _mm512_setzero_ps();
    const __m512i zero = _mm512_setzero_si512();
    int u = 0;
    if (kind == BITS4) {
        for (; u + 2 <= units; u += 2) {
            __m512 s = group == UNIT ? _mm512_mask_broadcastss_ps(_mm512_set1_ps(scale[u]), 0xff00, _mm_load_ss(scale + u + 1))
                                     : scales_of(scale, at + 2 * u, 4);
            total = add_scaled(total, pair4(w + u * (UNIT / 2), q + u * UNIT), s);
        }
        if (u < units)
            total = add_scaled(total, single4(w + u * (UNIT / 2), q + u * UNIT), scales_of(scale, at + 2 * u, 2));
    } else {
        for (; u < units; u++) {
            FETCH(w + u * UNIT);
            __m512i first = half8(w + u * UNIT, q + u * UNIT, zero);
            if (group == UNIT) {
                first = half8(w + u * UNIT + 32, q + u * UNIT + 32, first);
            } else {
                __m512i second = half8(w + u * UNIT + 32, q + u * UNIT + 32, zero);
                total = add_scaled(total, second, _mm512_set1_ps(scale[at[2 * u + 1]]));
            }
            total = add_scaled(total, first, _mm512_set1_ps(scale[at[2 * u]]));
        }
    }
    return _mm512_reduce_add_ps(total);
}
