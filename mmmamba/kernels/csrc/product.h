/* Products of one row of activations with rows of weights, in the forms that weights are stored in.

Weights stay as they are stored: float32, bfloat16, or unsigned integers of 4 or 8 bits with a scale and an offset
(float16) for each group of neighbours in a row, weight = scale * q + zero (mmmamba/packing.py). Activations are rounded
to 16 bits with a scale a group: products of 16-bit integers are summed exactly in 32 bits, and what rounding adds (3e-5
of an activation) is a hundredth of what bfloat16 would.

Layout of 4 bits: byte j of a row holds weights 2j (low half) and 2j + 1. A lane of 16 bits then holds weights 4m ..
4m + 3, which a mask and three shifts bring to their place; activations are put in the order of the lanes once. */
#pragma once

#include "numbers.h"

enum { FLOAT32, BFLOAT16, BITS4, BITS8 };
enum { UNIT = 64, MAX_COLS = 1 << 15 };

/* Weights are read once from one end to the other. The processor's own prefetching begins anew at every page of 4 KiB and
is not far enough ahead: asking for what lies two pages on doubled what one thread got from memory with 4 bits, and gave
half as much again with 8 and 16 (a Xeon of 2023). Behind the end it does nothing. */
enum { AHEAD = 8192 };
#define FETCH(address) __builtin_prefetch((const char *)(address) + AHEAD)

typedef struct {
    int32_t kind, rows, cols, group;
    const void *weight;
    const uint16_t *scales, *zeros; /* (rows, cols / group), float16 */
} Linear;

/* An activation as a product wants it. For integers: q in the order of the lanes, scale and sum (of rounded values) of
every block; a block is a group of weights, or UNIT neighbours where a row is one group. */
typedef struct {
    const float *x;
    int16_t *q;
    float *scale, *sum;
    int32_t block;
} Activation;

static int block_of(const Linear *m) { return m->group == m->cols ? UNIT : m->group; }

#if USE_AVX512
#include "avx512.h"
#else
/* Largest magnitude of n floats, n a multiple of 32. */
static inline float largest(const float *x, int n) {
    float top[8] = {0}, most = 0;
    for (int i = 0; i < n; i += 8)
        for (int j = 0; j < 8; j++) {
            float v = fabsf(x[i + j]);
            top[j] = v > top[j] ? v : top[j];
        }
    for (int j = 0; j < 8; j++) most = top[j] > most ? top[j] : most;
    return most;
}

/* Rounds x times `inverse`, n floats from column `at` on, into `q`, where the row's begin; returns their sum. */
static inline int32_t round_block(const Linear *m, const float *x, float inverse, int at, int n, int16_t *q) {
    int32_t rounded[32], sum = 0;
    for (int end = at + n; at < end; at += 32, x += 32) {
        for (int i = 0; i < 32; i++) {
            float r = x[i] * inverse + 12582912.f;
            int32_t bits;
            memcpy(&bits, &r, 4);
            rounded[i] = bits - 0x4b400000;
            sum += rounded[i];
        }
        if (m->kind == BITS4) {
            int16_t *to = q + at / UNIT * UNIT + at % UNIT / 4;
            for (int k = 0; k < 4; k++)
                for (int i = 0; i < 8; i++) to[16 * k + i] = (int16_t)rounded[4 * i + k];
        } else {
            for (int i = 0; i < 32; i++) q[at + i] = (int16_t)rounded[i];
        }
    }
    return sum;
}
#endif

static void prepare(Activation *a, const Linear *m, const float *x) {
    a->x = x;
    if (m->kind < BITS4) return;
    a->block = block_of(m);
    for (int b = 0; b * a->block < m->cols; b++) { /* 32 divides blocks, half a unit */
        const float *xb = x + b * a->block;
        float most = largest(xb, a->block), inverse = most > 0 ? 32767.f / most : 0.f;
        a->scale[b] = most / 32767.f;
        a->sum[b] = a->scale[b] * (float)round_block(m, xb, inverse, b * a->block, a->block, a->q);
    }
}

#if USE_AVX2
static inline float add_lanes(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
#endif

#if USE_AVX512
/* in avx512.h */
#elif USE_AVX2
static inline __m256i unit4(const uint8_t *w, const int16_t *q) {
    FETCH(w);
    const __m256i mask = _mm256_set1_epi16(15), v = _mm256_loadu_si256((const __m256i *)w);
    const __m256i *x = (const __m256i *)q;
    __m256i a = _mm256_madd_epi16(_mm256_and_si256(v, mask), _mm256_loadu_si256(x));
    __m256i b = _mm256_madd_epi16(_mm256_and_si256(_mm256_srli_epi16(v, 4), mask), _mm256_loadu_si256(x + 1));
    __m256i c = _mm256_madd_epi16(_mm256_and_si256(_mm256_srli_epi16(v, 8), mask), _mm256_loadu_si256(x + 2));
    __m256i d = _mm256_madd_epi16(_mm256_srli_epi16(v, 12), _mm256_loadu_si256(x + 3));
    return _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
}

/* Lanes 0 to 3 hold weights 0 to 31, lanes 4 to 7 the others, as in `unit4`. */
static inline __m256i unit8(const uint8_t *w, const int16_t *q) {
    const __m256i *x = (const __m256i *)q;
    __m256i part[4];
    FETCH(w);
    for (int i = 0; i < 4; i++) {
        __m256i v = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(w + 16 * i)));
        part[i] = _mm256_madd_epi16(v, _mm256_loadu_si256(x + i));
    }
    __m256i first = _mm256_add_epi32(part[0], part[1]), second = _mm256_add_epi32(part[2], part[3]);
    /* sum halves of each: 32 weights in 4 lanes */
    __m256i low = _mm256_permute2x128_si256(first, second, 0x20), high = _mm256_permute2x128_si256(first, second, 0x31);
    return _mm256_add_epi32(low, high);
}

#define UNITS_OF_ROW(unit, bytes)                                                                       \
    if (group % UNIT == 0) {                                                                            \
        for (int g = 0, u = 0; u < units; g++) {                                                        \
            __m256i sum = unit(w + u * bytes, q + u * UNIT);                                            \
            u++;                                                                                        \
            for (int more = group / UNIT - 1; more > 0; more--, u++)                                    \
                sum = _mm256_add_epi32(sum, unit(w + u * bytes, q + u * UNIT));                         \
            total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(scale[g]), total);          \
        }                                                                                               \
    } else {                                                                                            \
        for (int u = 0; u < units; u++) {                                                               \
            __m256 s = _mm256_set_m128(_mm_set1_ps(scale[at[2 * u + 1]]), _mm_set1_ps(scale[at[2 * u]])); \
            total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(unit(w + u * bytes, q + u * UNIT)), s, total);   \
        }                                                                                               \
    }

/* Rounded weights of a row times activations; `at`: the group that each 32 neighbours belong to. */
static inline float integer_row(int kind, const uint8_t *w, const int16_t *q, const float *scale, const uint16_t *at,
                                int units, int group) {
    __m256 total = _mm256_setzero_ps();
    if (kind == BITS4) {
        UNITS_OF_ROW(unit4, (UNIT / 2))
    } else {
        UNITS_OF_ROW(unit8, UNIT)
    }
    return add_lanes(total);
}
#else
static inline float integer_row(int kind, const uint8_t *w, const int16_t *q, const float *scale, const uint16_t *at,
                                int units, int group) {
    float total = 0;
    (void)group;
    for (int half = 0; half < 2 * units; half++) { /* 32 weights belong to one group */
        int32_t sum = 0;
        if (kind == BITS4) {
            const uint8_t *v = w + 16 * half;
            const int16_t *x = q + half / 2 * UNIT + half % 2 * 8;
            for (int i = 0; i < 8; i++)
                sum += (v[2 * i] & 15) * x[i] + (v[2 * i] >> 4) * x[16 + i] + (v[2 * i + 1] & 15) * x[32 + i] +
                       (v[2 * i + 1] >> 4) * x[48 + i];
        } else {
            for (int i = 0; i < 32; i++) sum += w[32 * half + i] * q[32 * half + i];
        }
        total += (float)sum * scale[at[half]];
    }
    return total;
}
#endif

/* Scales of a row times those of the activation; returns what the offsets add. `slack`: 16 bytes behind may be read. */
static inline float group_scales(const uint16_t *scales, const uint16_t *zeros, const Activation *a, int groups, int slack,
                                 float *out) {
    (void)slack;
    int g = 0;
    float offset = 0;
#if USE_AVX2
    __m256 total = _mm256_setzero_ps();
    for (; g + 8 <= groups || (slack && g < groups); g += 8) {
        __m256 s = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(scales + g)));
        __m256 z = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(zeros + g)));
        _mm256_storeu_ps(out + g, _mm256_mul_ps(s, _mm256_loadu_ps(a->scale + g)));
        __m256 term = _mm256_mul_ps(z, _mm256_loadu_ps(a->sum + g));
        if (g + 8 > groups) { /* what lies behind is another row's and may be infinite: blend, not multiply */
            __m256 index = _mm256_set_ps(7, 6, 5, 4, 3, 2, 1, 0);
            term = _mm256_and_ps(term, _mm256_cmp_ps(index, _mm256_set1_ps((float)(groups - g)), _CMP_LT_OQ));
        }
        total = _mm256_add_ps(total, term);
    }
    offset = add_lanes(total);
#endif
    for (; g < groups; g++) {
        out[g] = half_to_float(scales[g]) * a->scale[g];
        offset += half_to_float(zeros[g]) * a->sum[g];
    }
    return offset;
}

static void product(const Linear *m, const Activation *a, int first, int last, float *y) {
    int cols = m->cols;
    if (m->kind >= BITS4) {
        int groups = cols / m->group, units = cols / UNIT;
        int per_row = m->group == cols && m->group != UNIT;
        size_t stride = m->kind == BITS4 ? cols / 2 : cols;
        float scale[MAX_COLS / 32 + 8];
        float all = 0;
        uint16_t at[MAX_COLS / 32];
        for (int i = 0; i < 2 * units; i++) at[i] = (uint16_t)(32 * i / (per_row ? UNIT : m->group));
        if (per_row)
            for (int b = 0; b < units; b++) all += a->sum[b];
        for (int r = first; r < last; r++) {
            const uint8_t *w = (const uint8_t *)m->weight + r * stride;
            if (per_row) {
                float sum = integer_row(m->kind, w, a->q, a->scale, at, units, UNIT);
                y[r] = half_to_float(m->scales[r]) * sum + half_to_float(m->zeros[r]) * all;
            } else {
                size_t row = (size_t)r * groups;
                float offset =
                    group_scales(m->scales + row, m->zeros + row, a, groups, (m->rows - 1 - r) * groups >= 8, scale);
                y[r] = offset + integer_row(m->kind, w, a->q, scale, at, units, m->group);
            }
        }
        return;
    }
    for (int r = first; r < last; r++) {
        float part[32] = {0}, total = 0;
        int i = 0;
        if (m->kind == FLOAT32) {
            const float *w = (const float *)m->weight + (size_t)r * cols;
            for (; i + 32 <= cols; i += 32) {
                FETCH(w + i);
                FETCH(w + i + 16);
                for (int j = 0; j < 32; j++) part[j] += w[i + j] * a->x[i + j];
            }
            for (; i < cols; i++) total += w[i] * a->x[i];
        } else {
            const uint16_t *w = (const uint16_t *)m->weight + (size_t)r * cols;
            for (; i + 32 <= cols; i += 32) {
                FETCH(w + i);
                for (int j = 0; j < 32; j++) part[j] += bf16_to_float(w[i + j]) * a->x[i + j];
            }
            for (; i < cols; i++) total += bf16_to_float(w[i]) * a->x[i];
        }
        for (int j = 0; j < 32; j++) total += part[j];
        y[r] = total;
    }
}
