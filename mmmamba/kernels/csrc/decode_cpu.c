/* One token through a stack of Mamba-2 layers on the CPU; built by mmmamba/kernels/native.py, which is where to read on.

A token reads every weight once (product.h), so the time is that of memory as long as unpacking keeps up. Threads (team.h)
take pieces of a product's rows, and what follows row by row (convolution, SiLU, residual) with them: five phases a layer.
What is small (norms, rounding of activations) every thread does for itself instead of waiting for another. */

#include <stdlib.h>

#include "product.h"
#include "team.h"

typedef struct {
    Linear in_proj, out_proj, w1, w3, w2;
    const float *mixer_norm, *mlp_norm, *gate_norm;
    const float *conv_weight, *conv_bias; /* (conv_dim, 2), (conv_dim) */
    const float *a_log, *dt_bias;         /* (num_heads) */
    float norm_eps, gate_eps;
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

typedef struct {
    Job job;
    const Model *model;
    float *x; /* (hidden_size): input, then the residual stream */
    void *const *conv_states;
    float *const *ssm_states;
    int32_t conv_bf16; /* conv states are bfloat16, else float32 */
    float *logits;
    float *wide, *y; /* (max_rows) each: what one product leaves for the next */
    float *scratch;  /* (threads, scratch_size): what a thread has for itself */
    size_t scratch_size;
} Step;

/* What a thread has for itself. */
typedef struct {
    Activation a;
    float *normed; /* (2, max_cols): a product of floats must not write over what it reads */
} Own;

/* Places for the scales of an activation, and room for a vector to read past them. */
static inline size_t max_blocks(int cols) { return (size_t)cols / 32 + 8; }

/* Floats that an activation takes besides x: scale, sum, q. In whole cache lines: no two threads write to one. */
static inline size_t activation_size(int cols) { return (2 * max_blocks(cols) + ((size_t)cols + 1) / 2 + 15) & ~(size_t)15; }

static void place_activation(Activation *a, float *memory, int cols) {
    a->scale = memory;
    a->sum = memory + max_blocks(cols);
    a->q = (int16_t *)(memory + 2 * max_blocks(cols));
}

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

static void run_layer(Step *s, const Layer *m, int index, Own *own, Phase *p) {
    int hidden = s->model->hidden_size, dim = m->head_dim, width = m->num_heads * dim, first, last;
    float *x = s->x;
    if (begin(p, m->in_proj.rows)) {
        rms_norm(x, m->mixer_norm, m->norm_eps, hidden, own->normed);
        prepare(&own->a, &m->in_proj, own->normed);
        for (; take(p, &first, &last); finish(p)) project_in(s, m, own, s->conv_states[index], first, last);
    }
    meet(p);
    begin(p, width);
    for (; take(p, &first, &last); finish(p)) advance_state(s, m, s->ssm_states[index], first, last);
    meet(p);
    /* Products of integers take a rounded copy of what was normed; only those of floats must not write over it. */
    float *out = own->normed + s->model->max_cols;
    if (begin(p, hidden)) {
        const float *gate = s->wide + width + 2 * m->num_kv_heads * dim;
        for (int head = 0; head < m->num_heads; head++) {
            int at = head * dim;
            rms_norm(s->y + at, m->gate_norm, m->gate_eps, dim, own->normed + at);
            for (int i = 0; i < dim; i++) own->normed[at + i] *= gate[at + i];
        }
        prepare(&own->a, &m->out_proj, own->normed);
        for (; take(p, &first, &last); finish(p)) {
            product(&m->out_proj, &own->a, first, last, out);
            for (int r = first; r < last; r++) x[r] += out[r];
        }
    }
    meet(p);

    if (begin(p, m->w1.rows)) {
        int alike = m->w3.kind == m->w1.kind && m->w3.group == m->w1.group;
        rms_norm(x, m->mlp_norm, m->norm_eps, hidden, own->normed);
        prepare(&own->a, &m->w1, own->normed);
        for (; take(p, &first, &last); finish(p)) {
            product(&m->w1, &own->a, first, last, s->wide);
            if (!alike) prepare(&own->a, &m->w3, own->normed);
            product(&m->w3, &own->a, first, last, s->y);
            if (!alike) prepare(&own->a, &m->w1, own->normed);
            for (int r = first; r < last; r++) s->wide[r] = silu(s->wide[r]) * s->y[r];
        }
    }
    meet(p);
    if (begin(p, hidden)) {
        prepare(&own->a, &m->w2, s->wide);
        for (; take(p, &first, &last); finish(p)) {
            product(&m->w2, &own->a, first, last, out);
            for (int r = first; r < last; r++) x[r] += out[r];
        }
    }
    meet(p);
}

static void run_step(Job *job, int t) {
    Step *s = (Step *)job;
    const Model *m = s->model;
    Phase phase = {.job = job}, *p = &phase;
    int first, last;
    Own own;
    place_activation(&own.a, s->scratch + t * s->scratch_size, m->max_cols);
    own.normed = s->scratch + t * s->scratch_size + activation_size(m->max_cols);
    for (int i = 0; i < m->num_layers; i++) {
        if (i && i == m->normalize_after) {
            begin(p, 1); /* one piece: x is read in full before it is written */
            for (; take(p, &first, &last); finish(p)) {
                float inverse = 1.f / sqrtf(sum_of_squares(s->x, m->hidden_size));
                for (int r = 0; r < m->hidden_size; r++) s->x[r] *= inverse;
            }
            meet(p);
        }
        run_layer(s, m->layers + i, i, &own, p);
    }
    if (begin(p, m->head.rows)) {
        rms_norm(s->x, m->final_norm, m->final_eps, m->hidden_size, own.normed);
        prepare(&own.a, &m->head, own.normed);
        for (; take(p, &first, &last); finish(p)) product(&m->head, &own.a, first, last, s->logits);
    }
    meet(p);
}

/* Feed one token: x (hidden_size) is its embedding and is overwritten; states advance in place; logits (vocab_size).
Returns 1 if there is no memory for its buffers, before anything is changed. */
int mmmamba_step(const Model *model, float *x, void *const *conv_states, float *const *ssm_states, int conv_bf16,
                 float *logits, int threads) {
    Step step = {.job = {.run = run_step, .threads = allowed_threads(threads)},
                 .model = model,
                 .x = x,
                 .conv_states = conv_states,
                 .ssm_states = ssm_states,
                 .conv_bf16 = conv_bf16,
                 .logits = logits};
    step.scratch_size = activation_size(model->max_cols) + ((2 * (size_t)model->max_cols + 15) & ~(size_t)15);
    step.wide = calloc(2 * (size_t)model->max_rows + step.job.threads * step.scratch_size, sizeof(float));
    if (!step.wide) return 1;
    step.y = step.wide + model->max_rows;
    step.scratch = step.y + model->max_rows;
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
    float *scratch; /* (threads, activation_size) */
} Product;

static void run_product(Job *job, int t) {
    Product *p = (Product *)job;
    int cols = p->m->cols;
    Phase phase = {.job = job};
    int first, last;
    Activation a;
    place_activation(&a, p->scratch + t * activation_size(cols), cols);
    for (int i = 0; i < p->num_rows; i++)
        if (begin(&phase, p->m->rows)) {
            prepare(&a, p->m, p->x + (size_t)i * cols);
            for (; take(&phase, &first, &last); finish(&phase)) product(p->m, &a, first, last, p->y + (size_t)i * p->m->rows);
        }
    meet(&phase);
}

/* y (num_rows, rows) = x (num_rows, cols) times the weight; for few rows, the weight is read once for each.
Returns 1 if there is no memory for its buffers. */
int mmmamba_product(const Linear *m, const float *x, int num_rows, float *y, int threads) {
    Product p = {.job = {.run = run_product, .threads = allowed_threads(threads)}, .m = m, .x = x, .y = y, .num_rows = num_rows};
    p.scratch = calloc(p.job.threads * activation_size(m->cols), sizeof(float));
    if (!p.scratch) return 1;
    run_job(&p.job);
    free(p.scratch);
    return 0;
}

static void unpack_group(const Linear *m, size_t index, float *y) {
    size_t at = index * m->group;
    float scale = half_to_float(m->scales[index]), zero = half_to_float(m->zeros[index]), *out = y + at;
    const uint8_t *w = (const uint8_t *)m->weight + (m->kind == BITS4 ? at / 2 : at);
    if (m->kind == BITS4)
        for (int i = 0; i < m->group / 2; i++) {
            out[2 * i] = zero + scale * (float)(w[i] & 15);
            out[2 * i + 1] = zero + scale * (float)(w[i] >> 4);
        }
    else
        for (int i = 0; i < m->group; i++) out[i] = zero + scale * (float)w[i];
}

static void run_unpack(Job *job, int t) {
    Product *p = (Product *)job;
    const Linear *m = p->m;
    int groups = m->cols / m->group, first, last;
    Phase phase = {.job = job};
    (void)t;
    begin(&phase, m->rows);
    for (; take(&phase, &first, &last); finish(&phase))
        for (size_t i = (size_t)first * groups; i < (size_t)last * groups; i++) unpack_group(m, i, p->y);
    meet(&phase);
}

/* The weight in float32, (rows, cols). */
void mmmamba_unpack(const Linear *m, float *out, int threads) {
    Product p = {.job = {.run = run_unpack, .threads = allowed_threads(threads)}, .m = m, .y = out};
    run_job(&p.job);
}
