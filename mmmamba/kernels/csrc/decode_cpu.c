/* One token through a stack of Mamba-2 layers on the CPU; built by mmmamba/kernels/native.py, which is where to read on.

Weights stay as they are stored: float32, bfloat16, or unsigned integers of 4 or 8 bits with a scale and an offset
(float16) for each group of neighbours in a row, weight = scale * q + zero (mmmamba/packing.py). A token reads each of
them once, so the time is that of memory as long as unpacking keeps up. To that end activations are rounded to 16 bits
with a scale a group: products of 16-bit integers are summed exactly in 32 bits, and what rounding adds (3e-5 of an
activation) is a hundredth of what bfloat16 would.

Layout of 4 bits: byte j of a row holds weights 2j (low half) and 2j + 1. A lane of 16 bits then holds weights 4m ..
4m + 3, which a mask and three shifts bring to their place; activations are put in the order of the lanes once.

Threads: a team that lives on between tokens. In a token every thread owns the same rows of every product, so that what
follows a product row by row (convolution, SiLU, residual) needs no waiting: five barriers a layer. What is small
(norms, rounding of activations) every thread does for itself instead of waiting for another. */

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(MMMAMBA_PORTABLE)
#include <immintrin.h>
#define USE_AVX2 1
#else
#define USE_AVX2 0
#endif
#if defined(__x86_64__) || defined(__i386__)
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE() ((void)0)
#endif

enum { FLOAT32, BFLOAT16, BITS4, BITS8 };
enum { UNIT = 64, MAX_THREADS = 64, MAX_COLS = 1 << 15, GATE_NORM_EPS_INV = 100000 };

typedef struct {
    int32_t kind, rows, cols, group;
    const void *weight;
    const uint16_t *scales, *zeros; /* (rows, cols / group), float16 */
} Linear;

typedef struct {
    Linear in_proj, out_proj, w1, w3, w2;
    const float *mixer_norm, *mlp_norm, *gate_norm;
    const float *conv_weight, *conv_bias; /* (conv_dim, 2), (conv_dim) */
    const float *a_log, *dt_bias;         /* (num_heads) */
    float norm_eps;
    int32_t num_heads, num_kv_heads, head_dim;
} Layer;

typedef struct {
    const Layer *layers;
    int32_t num_layers, hidden_size, max_cols, max_rows;
    int32_t normalize_after; /* x / |x| after this many layers; 0: nowhere */
    float final_eps;
    const float *final_norm;
    Linear head;
} Model;

/* --- small functions; plain loops that compilers turn into vectors --- */

static inline float half_to_float(uint16_t h) {
#if USE_AVX2
    return _cvtsh_ss(h);
#else
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 0x3ff, bits;
    float f;
    if (exponent == 0) {
        f = (float)fraction * 0x1p-24f;
        memcpy(&bits, &f, 4);
        bits |= sign;
    } else {
        bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    }
    memcpy(&f, &bits, 4);
    return f;
#endif
}

static inline float bf16_to_float(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline uint16_t float_to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64); /* stays a NaN */
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* exp to about one unit in the last place (Cephes' polynomial), without branches. */
static inline float exp_(float x) {
    x = x < -87.f ? -87.f : x > 88.f ? 88.f : x;
    float n = x * 1.44269504f + 12582912.f; /* the sum rounds to an integer */
    int32_t bits;
    memcpy(&bits, &n, 4);
    n -= 12582912.f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    int32_t power = (bits - 0x4b400000 + 127) << 23;
    float scale;
    memcpy(&scale, &power, 4);
    return p * scale;
}

static inline float silu(float x) { return x / (1.f + exp_(-x)); }

static float sum_of_squares(const float *x, int n) {
    float part[16] = {0}, total = 0;
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) part[j] += x[i + j] * x[i + j];
    for (; i < n; i++) total += x[i] * x[i];
    for (int j = 0; j < 16; j++) total += part[j];
    return total;
}

static void rms_norm(const float *x, const float *weight, float eps, int n, float *out) {
    float scale = 1.f / sqrtf(sum_of_squares(x, n) / (float)n + eps);
    for (int i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

/* --- products of one row of activations with rows of weights --- */

/* An activation as a product wants it. For integers: q in the order of the lanes, scale and sum (of rounded values) of
every block; a block is a group of weights, or UNIT neighbours where a row is one group. */
typedef struct {
    const float *x;
    int16_t *q;
    float *scale, *sum;
    int32_t block;
} Activation;

static int block_of(const Linear *m) { return m->group == m->cols ? UNIT : m->group; }

static void prepare(Activation *a, const Linear *m, const float *x) {
    a->x = x;
    if (m->kind < BITS4) return;
    int32_t rounded[UNIT];
    a->block = block_of(m);
    for (int b = 0; b * a->block < m->cols; b++) {
        const float *xb = x + b * a->block;
        float top[8] = {0}, most = 0;
        for (int i = 0; i < a->block; i += 8)
            for (int j = 0; j < 8; j++) {
                float v = fabsf(xb[i + j]);
                top[j] = v > top[j] ? v : top[j];
            }
        for (int j = 0; j < 8; j++) most = top[j] > most ? top[j] : most;
        float scale = most / 32767.f, inverse = most > 0 ? 32767.f / most : 0.f;
        int32_t sum = 0;
        for (int start = 0; start < a->block; start += 32) { /* 32 divides blocks, half a unit */
            for (int i = 0; i < 32; i++) {
                float r = xb[start + i] * inverse + 12582912.f;
                int32_t bits;
                memcpy(&bits, &r, 4);
                rounded[i] = bits - 0x4b400000;
                sum += rounded[i];
            }
            int at = b * a->block + start;
            if (m->kind == BITS4) {
                int16_t *q = a->q + at / UNIT * UNIT + at % UNIT / 4;
                for (int k = 0; k < 4; k++)
                    for (int i = 0; i < 8; i++) q[16 * k + i] = (int16_t)rounded[4 * i + k];
            } else {
                for (int i = 0; i < 32; i++) a->q[at + i] = (int16_t)rounded[i];
            }
        }
        a->scale[b] = scale;
        a->sum[b] = scale * (float)sum;
    }
}

#if USE_AVX2
static inline float add_lanes(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

static inline __m256i unit4(const uint8_t *w, const int16_t *q) {
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
            for (; i + 32 <= cols; i += 32)
                for (int j = 0; j < 32; j++) part[j] += w[i + j] * a->x[i + j];
            for (; i < cols; i++) total += w[i] * a->x[i];
        } else {
            const uint16_t *w = (const uint16_t *)m->weight + (size_t)r * cols;
            for (; i + 32 <= cols; i += 32)
                for (int j = 0; j < 32; j++) part[j] += bf16_to_float(w[i + j]) * a->x[i + j];
            for (; i < cols; i++) total += bf16_to_float(w[i]) * a->x[i];
        }
        for (int j = 0; j < 32; j++) total += part[j];
        y[r] = total;
    }
}

/* --- threads --- */

typedef struct {
    atomic_int waiting;
    atomic_int turn;
} Barrier;

typedef struct Job {
    void (*run)(struct Job *, int thread);
    int threads;
    Barrier barrier;
} Job;

static struct {
    pthread_mutex_t caller, lock; /* caller: one job at a time */
    pthread_cond_t wake;
    Job *job;
    atomic_uint turn; /* jobs so far times 2 MAX_THREADS, plus the threads of the last: both must be seen at once */
    atomic_int done;
    unsigned birth;
    int started;
    pid_t process; /* after a fork the threads are gone */
} team;

__attribute__((constructor)) static void new_team(void) {
    memset(&team, 0, sizeof team);
    pthread_mutex_init(&team.caller, NULL);
    pthread_mutex_init(&team.lock, NULL);
    pthread_cond_init(&team.wake, NULL);
    team.process = getpid();
}

/* Spin: the others are a microsecond behind. But where threads are more than cores, make room for them. */
#define WAIT_WHILE(condition)                   \
    for (int spins = 0; condition; spins++) {   \
        if (spins < 4000) PAUSE();              \
        else sched_yield();                     \
    }

static void meet(Job *job) {
    if (job->threads == 1) return;
    int turn = atomic_load_explicit(&job->barrier.turn, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&job->barrier.waiting, 1, memory_order_acq_rel) == job->threads - 1) {
        atomic_store_explicit(&job->barrier.waiting, 0, memory_order_relaxed);
        atomic_store_explicit(&job->barrier.turn, turn + 1, memory_order_release);
    } else {
        WAIT_WHILE(atomic_load_explicit(&job->barrier.turn, memory_order_acquire) == turn)
    }
}

static void *worker(void *argument) {
    int thread = (int)(intptr_t)argument;
    unsigned seen = team.birth;
    for (;;) {
        /* The next token comes soon: sleeping and waking would cost more than a short wait. */
        for (int i = 0; i < 3000 && atomic_load_explicit(&team.turn, memory_order_acquire) == seen; i++) PAUSE();
        if (atomic_load_explicit(&team.turn, memory_order_acquire) == seen) {
            pthread_mutex_lock(&team.lock);
            while (atomic_load(&team.turn) == seen) pthread_cond_wait(&team.wake, &team.lock);
            pthread_mutex_unlock(&team.lock);
        }
        seen = atomic_load_explicit(&team.turn, memory_order_acquire);
        if (thread < (int)(seen % (2 * MAX_THREADS))) { /* the caller waits for these: `job` is still there */
            team.job->run(team.job, thread);
            atomic_fetch_add_explicit(&team.done, 1, memory_order_release);
        }
    }
    return NULL;
}

static void run_job(Job *job) {
    if (team.process != getpid()) new_team();
    pthread_mutex_lock(&team.caller);
    if (job->threads > MAX_THREADS) job->threads = MAX_THREADS;
    team.birth = atomic_load(&team.turn);
    while (team.started < job->threads - 1) {
        pthread_t id;
        if (pthread_create(&id, NULL, worker, (void *)(intptr_t)(team.started + 1))) {
            job->threads = team.started + 1;
            break;
        }
        pthread_detach(id);
        team.started++;
    }
    if (job->threads > 1) {
        team.job = job;
        atomic_store(&team.done, 0);
        unsigned jobs = atomic_load(&team.turn) / (2 * MAX_THREADS) + 1;
        pthread_mutex_lock(&team.lock);
        atomic_store(&team.turn, jobs * (2 * MAX_THREADS) + (unsigned)job->threads);
        pthread_cond_broadcast(&team.wake);
        pthread_mutex_unlock(&team.lock);
    }
    job->run(job, 0);
    WAIT_WHILE(atomic_load_explicit(&team.done, memory_order_acquire) < job->threads - 1 && job->threads > 1)
    pthread_mutex_unlock(&team.caller);
}

/* Rows of thread `t`. Cuts lie at multiples of 16: no two threads write to one cache line. */
static inline int cut(int rows, int t, int threads) {
    if (t == threads) return rows;
    return (int)((int64_t)rows * t / threads) & ~15;
}

/* --- a token --- */

typedef struct {
    Job job;
    const Model *model;
    float *x; /* (hidden_size): input, then the residual stream */
    void *const *conv_states;
    float *const *ssm_states;
    int32_t conv_bf16; /* conv states are bfloat16, else float32 */
    float *logits;
    float *wide, *y; /* (max_rows) each: what one product leaves for the next */
} Step;

typedef struct {
    Activation a;
    float *normed; /* (max_cols) */
} Own;

/* Rows of in_proj, and what follows row by row: V, K, Q pass convolution and SiLU, the gate SiLU, dt softplus. */
static void project_in(const Step *s, const Layer *m, const Own *own, void *conv_state, int first, int last) {
    float *z = s->wide;
    int hidden = m->num_heads * m->head_dim, conv = hidden + 2 * m->num_kv_heads * m->head_dim;
    product(&m->in_proj, &own->a, first, last, z);
    int end = last < conv ? last : conv;
    if (s->conv_bf16) {
        uint16_t *before = conv_state;
        for (int r = first; r < end; r++) {
            float u = z[r];
            z[r] = silu(m->conv_bias[r] + bf16_to_float(before[r]) * m->conv_weight[2 * r] + u * m->conv_weight[2 * r + 1]);
            before[r] = float_to_bf16(u);
        }
    } else {
        float *before = conv_state;
        for (int r = first; r < end; r++) {
            float u = z[r];
            z[r] = silu(m->conv_bias[r] + before[r] * m->conv_weight[2 * r] + u * m->conv_weight[2 * r + 1]);
            before[r] = u;
        }
    }
    end = last < conv + hidden ? last : conv + hidden;
    for (int r = first > conv ? first : conv; r < end; r++) z[r] = silu(z[r]);
    for (int r = first > conv + hidden ? first : conv + hidden; r < last; r++) {
        float dt = z[r] + m->dt_bias[r - conv - hidden];
        z[r] = dt > 20.f ? dt : log1pf(expf(dt));
    }
}

/* h <- exp(dt A) h + (dt x) B^T and y = h C for rows first .. last - 1 of (num_heads * head_dim). */
static void advance_state(const Step *s, const Layer *m, float *state, int first, int last) {
    const float *v = s->wide, *k = v + m->num_kv_heads * m->head_dim, *q = k + m->num_kv_heads * m->head_dim;
    const float *dt = q + 2 * m->num_heads * m->head_dim;
    int dim = m->head_dim, rep = m->num_heads / m->num_kv_heads;
    float decay = 0;
    for (int row = first; row < last; row++) {
        int head = row / dim, kv = head / rep;
        if (row == first || row % dim == 0) decay = expf(-dt[head] * expf(m->a_log[head]));
        float in = dt[head] * v[kv * dim + row % dim];
        float *h = state + (size_t)row * dim;
        const float *b = k + kv * dim, *c = q + head * dim;
        float part[8] = {0}, y = 0;
        int i = 0;
        for (; i + 8 <= dim; i += 8)
            for (int j = 0; j < 8; j++) {
                float value = decay * h[i + j] + in * b[i + j];
                h[i + j] = value;
                part[j] += value * c[i + j];
            }
        for (; i < dim; i++) {
            h[i] = decay * h[i] + in * b[i];
            y += h[i] * c[i];
        }
        for (int j = 0; j < 8; j++) y += part[j];
        s->y[row] = y;
    }
}

static void run_layer(Step *s, const Layer *m, int index, Own *own, int t, int threads) {
    int hidden = s->model->hidden_size, dim = m->head_dim;
    float *x = s->x;
    rms_norm(x, m->mixer_norm, m->norm_eps, hidden, own->normed);
    prepare(&own->a, &m->in_proj, own->normed);
    project_in(s, m, own, s->conv_states[index], cut(m->in_proj.rows, t, threads), cut(m->in_proj.rows, t + 1, threads));
    meet(&s->job);
    int width = m->num_heads * dim;
    advance_state(s, m, s->ssm_states[index], cut(width, t, threads), cut(width, t + 1, threads));
    meet(&s->job);
    const float *gate = s->wide + width + 2 * m->num_kv_heads * dim;
    for (int head = 0; head < m->num_heads; head++) {
        int at = head * dim;
        rms_norm(s->y + at, m->gate_norm, 1.f / GATE_NORM_EPS_INV, dim, own->normed + at);
        for (int i = 0; i < dim; i++) own->normed[at + i] *= gate[at + i];
    }
    prepare(&own->a, &m->out_proj, own->normed);
    int first = cut(hidden, t, threads), last = cut(hidden, t + 1, threads);
    float *out = own->normed; /* read no more: its rounded copy is what the product takes, unless weights are floats */
    if (m->out_proj.kind < BITS4) out = own->normed + s->model->max_cols;
    product(&m->out_proj, &own->a, first, last, out);
    for (int r = first; r < last; r++) x[r] += out[r];
    meet(&s->job);

    rms_norm(x, m->mlp_norm, m->norm_eps, hidden, own->normed);
    prepare(&own->a, &m->w1, own->normed);
    int rows = m->w1.rows, one = cut(rows, t, threads), end = cut(rows, t + 1, threads);
    product(&m->w1, &own->a, one, end, s->wide);
    if (m->w3.kind != m->w1.kind || m->w3.group != m->w1.group) prepare(&own->a, &m->w3, own->normed);
    product(&m->w3, &own->a, one, end, s->y);
    for (int r = one; r < end; r++) s->wide[r] = silu(s->wide[r]) * s->y[r];
    meet(&s->job);
    prepare(&own->a, &m->w2, s->wide);
    product(&m->w2, &own->a, first, last, out);
    for (int r = first; r < last; r++) x[r] += out[r];
    meet(&s->job);
}

static void run_step(Job *job, int t) {
    Step *s = (Step *)job;
    const Model *m = s->model;
    int threads = job->threads;
    Own own;
    /* Twice: products must not write over what they read. */
    own.normed = malloc(sizeof(float) * (2 * (size_t)m->max_cols + 2 * (m->max_cols / 32 + 8)) + sizeof(int16_t) * m->max_cols);
    own.a.scale = own.normed + 2 * m->max_cols;
    own.a.sum = own.a.scale + m->max_cols / 32 + 8;
    own.a.q = (int16_t *)(own.a.sum + m->max_cols / 32 + 8);
    memset(own.a.scale, 0, sizeof(float) * 2 * (m->max_cols / 32 + 8));
    for (int i = 0; i < m->num_layers; i++) {
        if (i && i == m->normalize_after) {
            float inverse = 1.f / sqrtf(sum_of_squares(s->x, m->hidden_size));
            meet(job); /* everybody has the sum before anybody writes */
            for (int r = cut(m->hidden_size, t, threads); r < cut(m->hidden_size, t + 1, threads); r++) s->x[r] *= inverse;
            meet(job);
        }
        run_layer(s, m->layers + i, i, &own, t, threads);
    }
    rms_norm(s->x, m->final_norm, m->final_eps, m->hidden_size, own.normed);
    prepare(&own.a, &m->head, own.normed);
    product(&m->head, &own.a, cut(m->head.rows, t, threads), cut(m->head.rows, t + 1, threads), s->logits);
    free(own.normed);
}

/* Feed one token: x (hidden_size) is its embedding and is overwritten; states advance in place; logits (vocab_size). */
int mmmamba_step(const Model *model, float *x, void *const *conv_states, float *const *ssm_states, int conv_bf16,
                 float *logits, int threads) {
    Step step = {.job = {.run = run_step, .threads = threads < 1 ? 1 : threads},
                 .model = model,
                 .x = x,
                 .conv_states = conv_states,
                 .ssm_states = ssm_states,
                 .conv_bf16 = conv_bf16,
                 .logits = logits};
    step.wide = malloc(2 * sizeof(float) * model->max_rows);
    if (!step.wide) return 1;
    step.y = step.wide + model->max_rows;
    run_job(&step.job);
    free(step.wide);
    return 0;
}

/* --- one product, and whole weights --- */

typedef struct {
    Job job;
    const Linear *m;
    const float *x;
    float *y;
    int32_t num_rows;
} Product;

static void run_product(Job *job, int t) {
    Product *p = (Product *)job;
    int cols = p->m->cols;
    Activation a;
    a.scale = calloc(2 * (cols / 32 + 8), sizeof(float));
    a.q = malloc(sizeof(int16_t) * cols);
    a.sum = a.scale + cols / 32 + 8;
    for (int i = 0; i < p->num_rows; i++) {
        prepare(&a, p->m, p->x + (size_t)i * cols);
        product(p->m, &a, cut(p->m->rows, t, job->threads), cut(p->m->rows, t + 1, job->threads), p->y + (size_t)i * p->m->rows);
    }
    free(a.scale);
    free(a.q);
}

/* y (num_rows, rows) = x (num_rows, cols) times the weight; for few rows, the weight is read once for each. */
void mmmamba_product(const Linear *m, const float *x, int num_rows, float *y, int threads) {
    Product p = {.job = {.run = run_product, .threads = threads < 1 ? 1 : threads}, .m = m, .x = x, .y = y, .num_rows = num_rows};
    run_job(&p.job);
}

static void run_unpack(Job *job, int t) {
    Product *p = (Product *)job;
    const Linear *m = p->m;
    int groups = m->cols / m->group;
    for (int r = cut(m->rows, t, job->threads); r < cut(m->rows, t + 1, job->threads); r++)
        for (int g = 0; g < groups; g++) {
            size_t at = (size_t)r * m->cols + (size_t)g * m->group;
            float scale = half_to_float(m->scales[(size_t)r * groups + g]);
            float zero = half_to_float(m->zeros[(size_t)r * groups + g]), *out = p->y + at;
            const uint8_t *w = (const uint8_t *)m->weight + (m->kind == BITS4 ? at / 2 : at);
            if (m->kind == BITS4)
                for (int i = 0; i < m->group / 2; i++) {
                    out[2 * i] = zero + scale * (float)(w[i] & 15);
                    out[2 * i + 1] = zero + scale * (float)(w[i] >> 4);
                }
            else
                for (int i = 0; i < m->group; i++) out[i] = zero + scale * (float)w[i];
        }
}

/* The weight in float32, (rows, cols). */
void mmmamba_unpack(const Linear *m, float *out, int threads) {
    Product p = {.job = {.run = run_unpack, .threads = threads < 1 ? 1 : threads}, .m = m, .y = out};
    run_job(&p.job);
}
