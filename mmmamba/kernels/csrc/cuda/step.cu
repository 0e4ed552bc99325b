// One token through all layers of a linear model in one launch, for up to ROWS conversations at once.
//
// One block a multiprocessor. A warp of it does nothing but ask for weights: they are constants, so it runs ahead of
// the computation as far as a ring in shared memory has room, and the memory never rests. The other warps multiply what
// has come (tensor cores; bf16 as it is, 4 bits as the mantissa of a bf16 number between 128 and 144, 8 bits as two of
// them) and exchange activations through global memory:
//
//   in_proj   norm, V K Q G dt, convolution, SiLU, softplus      -> u
//   state     h <- exp(dt A) h + (dt v) k^T, y = h q             -> y, and y * gate * norm
//   out_proj  norm of the heads, sum into the residual stream    -> x
//   gate, up  norm, SiLU(gate) * up                              -> h
//   down      sum into the residual stream                       -> x
//
// Blocks do not meet at barriers. Every 8 bytes that go from one to another carry 4 of data and 4 of the number of the
// product that they come from (NCCL's LL protocol): who needs them reads until all carry the number that is due, which
// takes one trip to L2 where a barrier takes three. A place is written again only when everybody has read it: each
// product waits for all of the one before, so who writes knows that its last readers have answered.
//
// Floor: bytes of weights and states over the bandwidth of the memory.

#ifndef DEVICE  // tests bring their own, for a CPU
#include "device.h"
#endif

// Kinds of weights, as `mmmamba.kernels.weights` has them.
#define BF16 0
#define INT8_ROWS 1    // a scale and an offset a row
#define INT8_GROUPS 2  // a group of 64
#define INT4_GROUPS 3

#ifndef ROWS
#define ROWS 1
#endif
#ifndef LAYER_KIND
#define LAYER_KIND BF16
#endif
#ifndef HEAD_KIND
#define HEAD_KIND BF16
#endif
#ifndef WARPS
#define WARPS 8
#endif
#ifndef PIECE
#define PIECE 1024  // bytes of a row of weights that are copied at once
#endif
#ifndef PATIENCE
#define PATIENCE 4000000000ll  // cycles of a launch after which waiting is given up: two seconds
#endif

constexpr int THREADS = 32 * WARPS;  // that compute; 32 more ask for weights
constexpr int TILE = 16;             // rows of weights multiplied at once
constexpr int GROUP = 64;
constexpr int MOST_TILES = ROWS > 2 ? 4 : 8;
// That are summed at once, a thread for each pair of rows: no more than there are threads for.
constexpr int TILES = MOST_TILES * 8 * ROWS <= THREADS ? MOST_TILES : THREADS / (8 * ROWS);
static_assert(TILES >= 2, "gate and up are two");

struct Matrix {
    const u8* data;
    const u16 *scales, *zeros;  // float16
};

struct Layer {
    Matrix in_proj, out_proj, gate, up, down;
    const u16 *norm, *mlp_norm;           // (hidden)
    const u16 *conv_weight, *conv_bias;   // (conv_dim, 2), (conv_dim)
    const float *dt_bias, *A;             // (heads)
    const u16* gate_norm;                 // (head_dim)
    float eps, mlp_eps, gate_eps;
    int unit;  // rows of x are scaled to length 1 before this layer
};

struct Step {
    const Layer* layers;
    Matrix head;
    const u16 *norm, *x;  // x (ROWS, hidden): embedded tokens
    u16* logits;          // (ROWS, vocab)
    const long long* tables;  // a layer two rows of `table_stride`: addresses of conv_state and of ssm_state
    const int* alive;         // (ROWS)
    u64* mail;                // what blocks tell each other, see `Mail`
    u32* epoch;               // number of the last product of the token before
    u32* tickets;             // blocks that have ended
    u32* fault;               // not 0 once somebody waited in vain, see `Watch`: no launch does anything after that
    u32* report;              // the same where the host reads it
    float eps;
    int num_layers, head_unit, table_stride;
    int hidden, heads, kv_heads, inner, vocab;
    int slots;
};

// --- waiting, and its end ---

// What is waited for.
constexpr u32 FOR_ROOM = 1, FOR_WEIGHTS = 2, FOR_X = 3, FOR_U = 4, FOR_Y = 5, FOR_H = 6;
constexpr u32 LAST_PRODUCT = 4095;

struct Watch {
    long long until;  // of the multiprocessor's clock
    u32 product;      // of this token, that is worked on
    u32 fault;        // 0, or: LAST_PRODUCT less the product in 12 bits, the block in 12, what it waited for in 8

    // Whether a wait that was in vain so far is to be given up.
    DEVICE bool over(u32 what) {
        if (!fault && now() > until) fault = (LAST_PRODUCT - product) << 20 | (block_index() & 0xFFF) << 8 | what;
        return fault != 0;
    }
};

// The wait for the earliest product is kept: others follow from it.
DEVICE void tell(const Step& step, const Watch& watch) {
    if (watch.fault && atomic_max(step.fault, watch.fault) < watch.fault) *(volatile u32*)step.report = watch.fault;
}

// --- kinds of weights ---

template <int KIND> struct Format {
    static constexpr int BITS = KIND == BF16 ? 16 : KIND == INT4_GROUPS ? 4 : 8;
    static constexpr bool GROUPED = KIND >= INT8_GROUPS;
    static constexpr int BLOCK = KIND == BF16 ? 32 : 64;  // columns that a warp multiplies at once
    static constexpr int BYTES = BLOCK * BITS / 8;        // of them in a row
    // So that eight rows' shares of a block lie in different banks.
    static constexpr int STRIDE = PIECE + BYTES;
    static constexpr int BLOCKS = PIECE / BYTES;
    static_assert(!GROUPED || (BLOCKS % 8 == 0 && BLOCKS % (2 * WARPS) == 0), "scales are copied and read in words");
    static constexpr int SCALES = GROUPED ? TILE * BLOCKS * 2 : 0;  // bytes of a piece's scales, and of its zeros
    static constexpr int SLOT = TILE * STRIDE + 2 * SCALES;
    static constexpr float OFFSET = KIND == INT4_GROUPS ? 128.f : 128.f + 16.f * 128.f;  // times the sum of x
};

DEVICE constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int SLOT_BYTES = larger(Format<LAYER_KIND>::SLOT, Format<HEAD_KIND>::SLOT);

// --- shared memory ---

struct Shared {
    u64 *full, *empty;  // of the ring's slots
    u32* start;         // (4) epoch and fault as they were
    Layer* layers;
    float* parts;    // (2, TILES, ROWS, TILE, WARPS) sums of each warp
    float* squares;  // (2, ROWS, WARPS) of x; one is written while the other is read, as they take turns
    float* sums;     // (2, ROWS, WARPS) of x, normed; likewise
    float* groups;   // (ROWS, columns / GROUP) sums of x, normed
    float* own;      // (tiles of x that are this block's, ROWS, TILE): the residual stream
    u8* x;           // (ROWS, x_stride) what is multiplied, bf16
    u8* ring;
    int x_stride;
};

DEVICE int rounded_up(int n, int to) { return (n + to - 1) / to * to; }

// As `decoder.one_launch` counts.
DEVICE Shared shared_of(const Step& step) {
    Shared s;
    const int columns = step.hidden > step.inner ? step.hidden : step.inner;
    u8* at = shared_memory();
    s.ring = at;
    at += (long long)step.slots * rounded_up(SLOT_BYTES, 128);
    s.x = at;
    s.x_stride = columns * 2 + 16;
    at += ROWS * s.x_stride;
    s.full = (u64*)at;
    s.empty = s.full + step.slots;
    at += 2 * rounded_up(step.slots, 2) * sizeof(u64);
    s.start = (u32*)at;
    at += 4 * sizeof(u32);
    s.layers = (Layer*)at;
    at += step.num_layers * sizeof(Layer);
    s.parts = (float*)at;
    s.squares = s.parts + 2 * TILES * ROWS * TILE * WARPS;
    s.sums = s.squares + 2 * ROWS * WARPS;
    s.groups = s.sums + 2 * ROWS * WARPS;
    s.own = s.groups + ROWS * (columns / GROUP);
    return s;
}

// --- the ring ---

struct Place {
    int slot = 0;
    u32 parity = 0;
    DEVICE void next(int slots) {
        if (++slot == slots) {
            slot = 0;
            parity ^= 1;
        }
    }
};

DEVICE void wait_for(u64* barrier, u32 parity, u32 what, Watch& watch) {
    while (!watch.fault && !barrier_passed(barrier, parity)) watch.over(what);
}

// Asks for all pieces of a tile, by one warp.
template <int KIND>
DEVICE void ask_for(const Step& step, const Shared& s, Place& place, const Matrix& m, int rows, int columns, int tile,
                    u64 policy, Watch& watch) {
    typedef Format<KIND> F;
    const int lane = thread_index() & 31;
    const int row_bytes = columns * F::BITS / 8, groups = columns / GROUP;
    const int first = tile * TILE;
    const int count = rows - first < TILE ? rows - first : TILE;
    for (int at = 0; at < row_bytes; at += PIECE) {
        const int bytes = row_bytes - at < PIECE ? row_bytes - at : PIECE;
        const int scale_bytes = F::GROUPED ? bytes / F::BYTES * 2 : 0;
        u64* full = s.full + place.slot;
        if (lane == 0) {
            wait_for(s.empty + place.slot, place.parity ^ 1, FOR_ROOM, watch);
            if (!watch.fault) barrier_expect(full, count * (bytes + 2 * scale_bytes));
        }
        if (any_of_warp(watch.fault)) return;
        sync_warp();
        u8* slot = s.ring + (long long)place.slot * rounded_up(SLOT_BYTES, 128);
        if (lane < count) {
            const long long row = first + lane;
            copy_async(slot + lane * F::STRIDE, m.data + row * row_bytes + at, bytes, full, policy);
            // Of rows that are one piece all scales lie side by side: fewer copies to ask for.
            const bool together = bytes == row_bytes;
            if (F::GROUPED && (lane == 0 || !together)) {
                u8* scales = slot + TILE * F::STRIDE + lane * scale_bytes;
                const long long group = row * groups + at / F::BYTES;
                const u32 size = together ? count * scale_bytes : scale_bytes;
                copy_async(scales, (const u8*)(m.scales + group), size, full, policy);
                copy_async(scales + F::SCALES, (const u8*)(m.zeros + group), size, full, policy);
            }
        }
        place.next(step.slots);
    }
}

DEVICE void ask_for_everything(const Step& step, const Shared& s, Watch& watch) {
    Place place;
    const u64 policy = read_once_policy();
    const int mixer = 2 * (step.hidden / step.heads) * step.kv_heads + 2 * step.hidden + step.heads;
    for (int l = 0; l < step.num_layers; l++) {
        const Layer& layer = s.layers[l];
        watch.product = 2 + 5 * l;
        for (int t = block_index(); t * TILE < mixer; t += num_blocks())
            ask_for<LAYER_KIND>(step, s, place, layer.in_proj, mixer, step.hidden, t, policy, watch);
        for (int t = block_index(); t * TILE < step.hidden; t += num_blocks())
            ask_for<LAYER_KIND>(step, s, place, layer.out_proj, step.hidden, step.hidden, t, policy, watch);
        for (int t = block_index(); t * TILE < step.inner; t += num_blocks()) {
            ask_for<LAYER_KIND>(step, s, place, layer.gate, step.inner, step.hidden, t, policy, watch);
            ask_for<LAYER_KIND>(step, s, place, layer.up, step.inner, step.hidden, t, policy, watch);
        }
        for (int t = block_index(); t * TILE < step.hidden; t += num_blocks())
            ask_for<LAYER_KIND>(step, s, place, layer.down, step.hidden, step.inner, t, policy, watch);
    }
    for (int t = block_index(); t * TILE < step.vocab; t += num_blocks())
        ask_for<HEAD_KIND>(step, s, place, step.head, step.vocab, step.hidden, t, policy, watch);
}

// --- products ---

// Where the columns of a block lie in a thread's words of x: those that one word of weights meets in one `mma` side by
// side. `v` are eight neighbouring columns.
template <int KIND> DEVICE Words4 in_order(const float (&v)[8]) {
    Words4 w;
    if (KIND == BF16) {
        w.x = bf16_pair(v[0], v[1]), w.y = bf16_pair(v[2], v[3]), w.z = bf16_pair(v[4], v[5]), w.w = bf16_pair(v[6], v[7]);
    } else if (KIND == INT4_GROUPS) {
        w.x = bf16_pair(v[0], v[4]), w.y = bf16_pair(v[1], v[5]), w.z = bf16_pair(v[2], v[6]), w.w = bf16_pair(v[3], v[7]);
    } else {
        w.x = bf16_pair(v[0], v[2]), w.y = bf16_pair(v[1], v[3]), w.z = bf16_pair(v[4], v[6]), w.w = bf16_pair(v[5], v[7]);
    }
    return w;
}

// Four-bit numbers 0 and 4, 1 and 5, 2 and 6, 3 and 7 of a word as pairs of bf16, plus 128.
template <int WHICH> DEVICE u32 nibbles(u32 word) { return (word >> (4 * WHICH) & 0x000F000Fu) | 0x43004300u; }

// A block of 16 rows times x: into `acc`, grouped kinds with their scales. `weights` is row lane / 4's share.
template <int KIND>
DEVICE void multiply(const u8* weights, const u8* x, bool has_x, float (&acc)[4], float (&high)[4]) {
    typedef Format<KIND> F;
    const Words4 none = {0, 0, 0, 0};
    if (KIND == BF16) {
        const Words4 a = *(const Words4*)weights, b = *(const Words4*)(weights + 8 * F::STRIDE);
        const Words4 v = has_x ? *(const Words4*)x : none;
        mma(acc, a.x, b.x, a.y, b.y, v.x, v.y);
        mma(acc, a.z, b.z, a.w, b.w, v.z, v.w);
        return;
    }
    const Words4 v0 = has_x ? *(const Words4*)x : none, v1 = has_x ? *(const Words4*)(x + 16) : none;
    if (KIND == INT4_GROUPS) {
        const Words2 a = *(const Words2*)weights, b = *(const Words2*)(weights + 8 * F::STRIDE);
        mma(acc, nibbles<0>(a.x), nibbles<0>(b.x), nibbles<1>(a.x), nibbles<1>(b.x), v0.x, v0.y);
        mma(acc, nibbles<2>(a.x), nibbles<2>(b.x), nibbles<3>(a.x), nibbles<3>(b.x), v0.z, v0.w);
        mma(acc, nibbles<0>(a.y), nibbles<0>(b.y), nibbles<1>(a.y), nibbles<1>(b.y), v1.x, v1.y);
        mma(acc, nibbles<2>(a.y), nibbles<2>(b.y), nibbles<3>(a.y), nibbles<3>(b.y), v1.z, v1.w);
        return;
    }
    const Words4 a = *(const Words4*)weights, b = *(const Words4*)(weights + 8 * F::STRIDE);
    const u32 as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
    const u32 xs[8] = {v0.x, v0.y, v0.z, v0.w, v1.x, v1.y, v1.z, v1.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        mma(acc, nibbles<0>(as[i]), nibbles<0>(bs[i]), nibbles<2>(as[i]), nibbles<2>(bs[i]), xs[2 * i], xs[2 * i + 1]);
        mma(high, nibbles<1>(as[i]), nibbles<1>(bs[i]), nibbles<3>(as[i]), nibbles<3>(bs[i]), xs[2 * i], xs[2 * i + 1]);
    }
}

// This warp's part of the products of a tile with all rows of x: a lane's rows lane / 4 and 8 more, and of the rows of x
// those of 2 * (lane % 4) and the next.
template <int KIND>
DEVICE void multiply_tile(const Step& step, const Shared& s, Place& place, int columns, float (&acc)[4], Watch& watch) {
    typedef Format<KIND> F;
    const int lane = thread_index() & 31, warp = thread_index() >> 5;
    const int g = lane >> 2, t = lane & 3;
    const int row_bytes = columns * F::BITS / 8;
    const bool has_x = g < ROWS;
    const u8* x = s.x + (has_x ? g : 0) * s.x_stride + t * (F::BLOCK / 4 * 2);
    float high[4] = {0, 0, 0, 0};
    acc[0] = acc[1] = acc[2] = acc[3] = 0;
    for (int at = 0; at < row_bytes; at += PIECE) {
        const int bytes = row_bytes - at < PIECE ? row_bytes - at : PIECE;
        const int blocks = bytes / F::BYTES, share = (blocks + WARPS - 1) / WARPS;
        const u8* slot = s.ring + (long long)place.slot * rounded_up(SLOT_BYTES, 128);
        const u8* weights = slot + g * F::STRIDE + t * (F::BYTES / 4);
        wait_for(s.full + place.slot, place.parity, FOR_WEIGHTS, watch);
        if constexpr (F::GROUPED) {
            // Rows are whole numbers of pieces.
            constexpr int SHARE = F::BLOCKS / WARPS;
            const u8* scales = slot + TILE * F::STRIDE + g * (F::BLOCKS * 2) + warp * SHARE * 2;
            u32 scale[2][SHARE / 2], zero[2][SHARE / 2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int i = 0; i < SHARE / 2; i++) {
                    const u8* word = scales + half * 8 * F::BLOCKS * 2 + 4 * i;
                    scale[half][i] = *(const u32*)word;
                    zero[half][i] = *(const u32*)(word + F::SCALES);
                }
            }
#pragma unroll
            for (int i = 0; i < SHARE; i++) {
                const int b = warp * SHARE + i, block = at / F::BYTES + b;
                float part[4] = {0, 0, 0, 0}, part_high[4] = {0, 0, 0, 0};
                multiply<KIND>(weights + b * F::BYTES, x + block * F::BLOCK * 2, has_x, part, part_high);
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const int row = 2 * t + c;
                    const float sum = row < ROWS ? s.groups[row * (columns / GROUP) + block] : 0.f;
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const float scale_of = half_to_float(scale[half][i / 2] >> (i % 2 * 16) & 0xFFFF);
                        const float zero_of = half_to_float(zero[half][i / 2] >> (i % 2 * 16) & 0xFFFF);
                        const float q = part[2 * half + c] + (F::BITS == 8 ? 16.f * part_high[2 * half + c] : 0.f);
                        acc[2 * half + c] += scale_of * (q - F::OFFSET * sum) + zero_of * sum;
                    }
                }
            }
        } else {
            const int first = warp * share, end = first + share < blocks ? first + share : blocks;
            for (int b = first; b < end; b++)
                multiply<KIND>(weights + b * F::BYTES, x + (at / F::BYTES + b) * F::BLOCK * 2, has_x, acc, high);
        }
        sync_warp();
        if (lane == 0) barrier_arrive(s.empty + place.slot);
        place.next(step.slots);
    }
    if (KIND == INT8_ROWS) {
#pragma unroll
        for (int i = 0; i < 4; i++) acc[i] += 16.f * high[i];
    }
}

// --- mail ---

struct Mail {
    u64 *x, *u, *y, *h;  // (ROWS, hidden / 2), (ROWS, mixer, an even number), (ROWS, hidden), (ROWS, inner / 2)
};

DEVICE u64 letter(u32 data, u32 number) { return (u64)number << 32 | data; }

// Reads 2 * N letters until all carry the number; their data.
template <int N> DEVICE void receive(const u64* from, u32 number, u32 (&data)[2 * N], u32 what, Watch& watch) {
    u64 got[2 * N];
    u32 other;
    do {
        other = 0;
#pragma unroll
        for (int i = 0; i < N; i++) load_pair(from + 2 * i, got[2 * i], got[2 * i + 1]);
#pragma unroll
        for (int i = 0; i < 2 * N; i++) other |= (u32)(got[i] >> 32) ^ number;
    } while (other && !watch.over(what));
#pragma unroll
    for (int i = 0; i < 2 * N; i++) data[i] = (u32)got[i];
}

DEVICE u32 receive_one(const u64* from, u32 number, u32 what, Watch& watch) {
    u64 got;
    do {
        got = load_one(from);
    } while ((u32)(got >> 32) != number && !watch.over(what));
    return (u32)got;
}

DEVICE float low_of(u32 pair) { return as_float(pair << 16); }
DEVICE float high_of(u32 pair) { return as_float(pair & 0xFFFF0000u); }
DEVICE float bf16_of(u16 bits) { return as_float((u32)bits << 16); }
DEVICE float rounded(float x) { return low_of(bf16_pair(x, 0.f)); }

DEVICE float sum_of_warp(float x) {
#pragma unroll
    for (int mask = 16; mask; mask >>= 1) x += shuffle_xor(x, mask);
    return x;
}

// What is multiplied next: eight columns of this thread, and their sums where packed weights need them.
template <int KIND>
DEVICE void lay_down(const Shared& s, int row, int column, int columns, const float (&v)[8], float& sum) {
    *(Words4*)(s.x + row * s.x_stride + column * 2) = in_order<KIND>(v);
    if (KIND == BF16) return;
    float part = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) part += rounded(v[i]);
    sum += part;
    if (Format<KIND>::GROUPED) {
#pragma unroll
        for (int mask = 1; mask < GROUP / 8; mask <<= 1) part += shuffle_xor(part, mask);
        if ((column & (GROUP - 1)) == 0) s.groups[row * (columns / GROUP) + column / GROUP] = part;
    }
}

template <int KIND> DEVICE void keep_sum(const Shared& s, int turn, int row, float sum) {
    if (KIND != INT8_ROWS) return;
    sum = sum_of_warp(sum);
    if ((thread_index() & 31) == 0) s.sums[(turn * ROWS + row) * WARPS + (thread_index() >> 5)] = sum;
}

DEVICE float over_warps(const float* parts) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += parts[w];
    return sum;
}

// x * norm; the factor of the norm itself is left to who has the sums.
template <int KIND>
DEVICE void take_stream(const Step& step, const Shared& s, int turn, const u64* mail, const u16* norm, u32 number,
                        Watch& watch) {
    const int hidden = step.hidden;
    for (int row = 0; row < ROWS; row++) {
        float squares = 0, sum = 0;
        // Whole warps go round together: they exchange sums.
        for (int column = thread_index() * 8; (column & ~255) < hidden; column += THREADS * 8) {
            float v[8] = {0, 0, 0, 0, 0, 0, 0, 0};
            if (column < hidden) {
                const Words4 weight = load_words4(norm + column);
                const u32 w[4] = {weight.x, weight.y, weight.z, weight.w};
                u32 pairs[4];
                receive<2>(mail + (row * hidden + column) / 2, number, pairs, FOR_X, watch);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float a = low_of(pairs[i]), b = high_of(pairs[i]);
                    squares += a * a + b * b;
                    v[2 * i] = a * low_of(w[i]);
                    v[2 * i + 1] = b * high_of(w[i]);
                }
            }
            if (column < hidden) lay_down<KIND>(s, row, column, hidden, v, sum);
        }
        squares = sum_of_warp(squares);
        if ((thread_index() & 31) == 0) s.squares[(turn * ROWS + row) * WARPS + (thread_index() >> 5)] = squares;
        keep_sum<KIND>(s, turn, row, sum);
    }
    sync_some<THREADS>();
}

// y of all heads, normed: letters carry y and y * gate * weight as a pair.
template <int KIND>
DEVICE void take_heads(const Step& step, const Shared& s, int turn, const u64* mail, float eps, u32 number,
                       Watch& watch) {
    const int hidden = step.hidden, dim = hidden / step.heads;
    for (int row = 0; row < ROWS; row++) {
        float sum = 0;
        for (int column = thread_index() * 8; (column & ~255) < hidden; column += THREADS * 8) {
            float v[8] = {0, 0, 0, 0, 0, 0, 0, 0};
            float squares = 0;
            if (column < hidden) {
                u32 pairs[8];
                receive<4>(mail + row * hidden + column, number, pairs, FOR_Y, watch);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    squares += low_of(pairs[i]) * low_of(pairs[i]);
                    v[i] = high_of(pairs[i]);
                }
            }
            for (int mask = 1; mask < dim / 8; mask <<= 1) squares += shuffle_xor(squares, mask);
            const float factor = rsqrt_of(squares / dim + eps);
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] *= factor;
            if (column < hidden) lay_down<KIND>(s, row, column, hidden, v, sum);
        }
        keep_sum<KIND>(s, turn, row, sum);
    }
    sync_some<THREADS>();
}

template <int KIND>
DEVICE void take_inner(const Step& step, const Shared& s, int turn, const u64* mail, u32 number, Watch& watch) {
    const int inner = step.inner;
    for (int row = 0; row < ROWS; row++) {
        float sum = 0;
#pragma unroll 4
        for (int column = thread_index() * 8; column < inner; column += THREADS * 8) {
            u32 pairs[4];
            receive<2>(mail + (row * inner + column) / 2, number, pairs, FOR_H, watch);
            float v[8];
#pragma unroll
            for (int i = 0; i < 4; i++) v[2 * i] = low_of(pairs[i]), v[2 * i + 1] = high_of(pairs[i]);
            lay_down<KIND>(s, row, column, inner, v, sum);
        }
        keep_sum<KIND>(s, turn, row, sum);
    }
    sync_some<THREADS>();
}

// --- sums of a tile over the warps, and what becomes of them ---

struct Pair {
    float a, b;
};

// The factors of two neighbouring rows of weights.
struct Scales {
    Pair scale, zero;
};

template <int KIND> DEVICE Scales scales_of(const Matrix& m, int row) {
    Scales r = {{1, 1}, {0, 0}};
    if (KIND == INT8_ROWS) {
        const u32 scale = load_word(m.scales + row), zero = load_word(m.zeros + row);
        r.scale.a = half_to_float(scale & 0xFFFF), r.scale.b = half_to_float(scale >> 16);
        r.zero.a = half_to_float(zero & 0xFFFF), r.zero.b = half_to_float(zero >> 16);
    }
    return r;
}

// Of the rows 2 * pair and the next of a tile.
template <int KIND>
DEVICE Pair result(const Shared& s, int turn, int half, int tile, int row_of_x, int pair, const Scales& scales, float factor) {
    const float* parts = s.parts + (((half * TILES + tile) * ROWS + row_of_x) * TILE + 2 * pair) * WARPS;
    Pair y = {over_warps(parts), over_warps(parts + WARPS)};
    if (KIND == INT8_ROWS) {
        const float sum = over_warps(s.sums + (turn * ROWS + row_of_x) * WARPS);
        y.a = scales.scale.a * (y.a - Format<KIND>::OFFSET * sum) + scales.zero.a * sum;
        y.b = scales.scale.b * (y.b - Format<KIND>::OFFSET * sum) + scales.zero.b * sum;
    }
    y.a *= factor;
    y.b *= factor;
    return y;
}

// 1 / RMS of x, scaled to length 1 before that or not; and the factor that x itself has to be scaled with.
DEVICE float norm_factor(const Step& step, const Shared& s, int turn, int row, float eps, bool unit, float* own) {
    const float squares = over_warps(s.squares + (turn * ROWS + row) * WARPS);
    const float scale = unit ? rsqrt_of(squares) : 1.f;
    *own = scale;
    return scale * rsqrt_of(scale * scale * squares / step.hidden + eps);
}

template <int KIND>
DEVICE void keep_parts(const Shared& s, int half, int tile, const float (&acc)[4]) {
    const int lane = thread_index() & 31, warp = thread_index() >> 5;
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int c = 0; c < 2; c++) {
        const int row = 2 * t + c;
        if (row < ROWS) {
            float* parts = s.parts + (((half * TILES + tile) * ROWS + row) * TILE + g) * WARPS + warp;
            parts[0] = acc[c];
            parts[8 * WARPS] = acc[2 + c];
        }
    }
}

// This thread's share of a batch of tiles that are summed together: a pair of rows of one of them.
struct Item {
    int tile, row_of_x, pair;  // `tile` among those of the batch
    int row;                   // of the matrix
    bool is_there;
};

DEVICE Item item_of(int first, int count, int rows) {
    Item r;
    r.pair = thread_index() % 8;
    r.row_of_x = thread_index() / 8 % ROWS;
    r.tile = thread_index() / (8 * ROWS);
    r.row = (first + r.tile * num_blocks()) * TILE + 2 * r.pair;
    r.is_there = r.tile < count && r.row < rows;
    return r;
}

// Tiles of this block from `first` on that are summed together.
DEVICE int batch_of(int first, int rows, int most) {
    const int left = ((rows + TILE - 1) / TILE - first + num_blocks() - 1) / num_blocks();
    return left < most ? left : most;
}

DEVICE float silu(float x) { return x / (1.f + exp_of(-x)); }

// As torch: the identity above 20. log(1 + e) loses the digits of a small e: below -5 its series is used.
DEVICE float softplus(float x) {
    if (x > 20.f) return x;
    const float e = exp_of(x);
    return x < -5.f ? e - 0.5f * e * e : log_of(1.f + e);
}

struct Consumer {
    const Step& step;
    const Shared& s;
    const Mail mail;
    Place place;
    int half;  // of the parts: one is written while the other is summed
    int turn;  // of the sums and squares
    u32 number;
    Watch& watch;

    DEVICE u64* conv_state(int layer, int row) const {
        return (u64*)step.tables[(long long)(2 * layer) * step.table_stride + row];
    }
    DEVICE float* ssm_state(int layer, int row) const {
        return (float*)step.tables[(long long)(2 * layer + 1) * step.table_stride + row];
    }

    // The number that letters carry which are due before this product.
    DEVICE u32 next() {
        watch.product++;
        return number++;
    }

    // The residual stream of this block's tiles begins with the embedded tokens.
    DEVICE void begin() {
        next();
        for (int first = block_index(), j = 0; first * TILE < step.hidden; first += num_blocks(), j++) {
            for (int i = thread_index(); i < ROWS * 8; i += THREADS) {
                const int row = i / 8, column = first * TILE + i % 8 * 2;
                const u32 pair = load_word(step.x + row * step.hidden + column);
                float* own = s.own + (j * ROWS + row) * TILE + i % 8 * 2;
                own[0] = low_of(pair), own[1] = high_of(pair);
                store_one(mail.x + (row * step.hidden + column) / 2, letter(pair, number));
            }
        }
    }

    DEVICE void in_proj(int l) {
        const Layer& layer = s.layers[l];
        const int dim = step.hidden / step.heads, conv = 2 * dim * step.kv_heads + step.hidden;
        const int rows = conv + step.hidden + step.heads;
        const u32 due = next();
        if (block_index() * TILE >= rows) return;
        take_stream<LAYER_KIND>(step, s, turn ^= 1, mail.x, layer.norm, due, watch);
        for (int first = block_index(); first * TILE < rows; first += TILES * num_blocks()) {
            const int count = batch_of(first, rows, TILES);
            const Item item = item_of(first, count, rows);
            const bool is_conv = item.row < conv, is_step = item.row >= conv + step.hidden;
            // Asked for before the products, and used after them.
            Scales scales = {};
            Words2 taps = {0, 0};
            u32 bias = 0, before = 0, *state = nullptr;
            float step_bias[2] = {0, 0};
            bool going = false;
            if (item.is_there) {
                scales = scales_of<LAYER_KIND>(layer.in_proj, item.row);
                if (is_conv) {
                    taps.x = load_word(layer.conv_weight + 2 * item.row);
                    taps.y = load_word(layer.conv_weight + 2 * item.row + 2);
                    bias = load_word(layer.conv_bias + item.row);
                    state = (u32*)conv_state(l, item.row_of_x) + item.row / 2;
                    before = *state;
                    going = step.alive[item.row_of_x] != 0;
                } else if (is_step) {
                    const float* of = layer.dt_bias + (item.row - conv - step.hidden);
                    step_bias[0] = of[0];
                    if (item.row + 1 < rows) step_bias[1] = of[1];
                }
            }
            for (int j = 0; j < count; j++) {
                float acc[4];
                multiply_tile<LAYER_KIND>(step, s, place, step.hidden, acc, watch);
                keep_parts<LAYER_KIND>(s, half, j, acc);
            }
            sync_some<THREADS>();
            if (item.is_there) {
                float own;
                const float factor = norm_factor(step, s, turn, item.row_of_x, layer.eps, layer.unit, &own);
                Pair y = result<LAYER_KIND>(s, turn, half, item.tile, item.row_of_x, item.pair, scales, factor);
                if (is_conv) {
                    const u32 now = bf16_pair(y.a, y.b);  // as the state keeps it
                    if (going) *state = now;
                    y.a = silu(low_of(bias) + low_of(before) * low_of(taps.x) + low_of(now) * high_of(taps.x));
                    y.b = silu(high_of(bias) + high_of(before) * low_of(taps.y) + high_of(now) * high_of(taps.y));
                } else {
                    y.a = rounded(y.a), y.b = rounded(y.b);
                    y.a = is_step ? softplus(y.a + step_bias[0]) : silu(y.a);
                    y.b = is_step ? softplus(y.b + step_bias[1]) : silu(y.b);
                }
                store_pair(mail.u + item.row_of_x * rounded_up(rows, 2) + item.row, letter(as_bits(y.a), number),
                           letter(as_bits(y.b), number));
            }
            half ^= 1;
        }
        if (layer.unit) scale_own();
    }

    // The residual stream that this block keeps, as long as `take_stream` has just seen it.
    DEVICE void scale_own() {
        for (int first = block_index(), j = 0; first * TILE < step.hidden; first += num_blocks(), j++) {
            for (int i = thread_index(); i < ROWS * TILE; i += THREADS) {
                float own;
                norm_factor(step, s, turn, i / TILE, 0.f, true, &own);
                s.own[j * ROWS * TILE + i] = rounded(s.own[j * ROWS * TILE + i] * own);
            }
        }
    }

    // A block owns TILE_V of a head's values: their rows of the head's state, (head_dim, head_dim).
    DEVICE void state(int l) {
        const Layer& layer = s.layers[l];
        const int dim = step.hidden / step.heads, lanes = dim / 8, values = THREADS / lanes;
        const int slices = dim / values, units = ROWS * step.heads * slices;
        const int kv_dim = dim * step.kv_heads, mixer = rounded_up(2 * kv_dim + 2 * step.hidden + step.heads, 2);
        const u32 due = next();
        const int value = thread_index() / lanes, column = thread_index() % lanes * 8;
        for (int unit = block_index(); unit < units; unit += num_blocks()) {
            const int row = unit / (step.heads * slices), head = unit / slices % step.heads;
            const int i = unit % slices * values + value, kv = head / (step.heads / step.kv_heads);
            float* h = ssm_state(l, row) + ((long long)head * dim + i) * dim + column;
            float old[8];
#pragma unroll
            for (int j = 0; j < 8; j += 4) {
                const Words4 w = *(const Words4*)(h + j);
                old[j] = as_float(w.x), old[j + 1] = as_float(w.y), old[j + 2] = as_float(w.z), old[j + 3] = as_float(w.w);
            }
            const float decay = layer.A[head], weight = bf16_of(layer.gate_norm[i]);
            const bool going = step.alive[row] != 0;
            const u64* u = mail.u + (long long)row * mixer;
            u32 k[8], q[8];
            receive<4>(u + kv_dim + kv * dim + column, due, k, FOR_U, watch);
            receive<4>(u + 2 * kv_dim + head * dim + column, due, q, FOR_U, watch);
            const u32 v = receive_one(u + kv * dim + i, due, FOR_U, watch);
            const u32 gate = receive_one(u + 2 * kv_dim + step.hidden + head * dim + i, due, FOR_U, watch);
            const u32 dt = receive_one(u + 2 * kv_dim + 2 * step.hidden + head, due, FOR_U, watch);
            const float keep = exp_of(as_float(dt) * decay), add = as_float(dt) * as_float(v);
            float y = 0;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                old[j] = old[j] * keep + add * as_float(k[j]);
                y += old[j] * as_float(q[j]);
            }
            if (going) {
#pragma unroll
                for (int j = 0; j < 8; j += 4) {
                    const Words4 w = {as_bits(old[j]), as_bits(old[j + 1]), as_bits(old[j + 2]), as_bits(old[j + 3])};
                    *(Words4*)(h + j) = w;
                }
            }
            for (int mask = 1; mask < lanes; mask <<= 1) y += shuffle_xor(y, mask);
            if (thread_index() % lanes == 0) {
                const u32 pair = bf16_pair(y, y * as_float(gate) * weight);
                store_one(mail.y + (long long)row * step.hidden + head * dim + i, letter(pair, number));
            }
        }
    }

    // W times what was laid down, into the residual stream.
    DEVICE void add(const Matrix& m, int columns) {
        for (int first = block_index(), begun = 0; first * TILE < step.hidden;
             first += TILES * num_blocks(), begun += TILES) {
            const int count = batch_of(first, step.hidden, TILES);
            const Item item = item_of(first, count, step.hidden);
            Scales scales = {};
            if (item.is_there) scales = scales_of<LAYER_KIND>(m, item.row);
            for (int j = 0; j < count; j++) {
                float acc[4];
                multiply_tile<LAYER_KIND>(step, s, place, columns, acc, watch);
                keep_parts<LAYER_KIND>(s, half, j, acc);
            }
            sync_some<THREADS>();
            if (item.is_there) {
                const Pair y = result<LAYER_KIND>(s, turn, half, item.tile, item.row_of_x, item.pair, scales, 1.f);
                float* own = s.own + ((begun + item.tile) * ROWS + item.row_of_x) * TILE + 2 * item.pair;
                const u32 pair = bf16_pair(own[0] + y.a, own[1] + y.b);
                own[0] = low_of(pair), own[1] = high_of(pair);
                store_one(mail.x + (item.row_of_x * step.hidden + item.row) / 2, letter(pair, number));
            }
            half ^= 1;
        }
    }

    DEVICE void out_proj(int l) {
        const u32 due = next();
        if (block_index() * TILE >= step.hidden) return;
        take_heads<LAYER_KIND>(step, s, turn ^= 1, mail.y, s.layers[l].gate_eps, due, watch);
        add(s.layers[l].out_proj, step.hidden);
    }

    DEVICE void down(int l) {
        const u32 due = next();
        if (block_index() * TILE >= step.hidden) return;
        take_inner<LAYER_KIND>(step, s, turn ^= 1, mail.h, due, watch);
        add(s.layers[l].down, step.inner);
    }

    DEVICE void gate_up(int l) {
        const Layer& layer = s.layers[l];
        const u32 due = next();
        if (block_index() * TILE >= step.inner) return;
        take_stream<LAYER_KIND>(step, s, turn ^= 1, mail.x, layer.mlp_norm, due, watch);
        for (int first = block_index(); first * TILE < step.inner; first += TILES / 2 * num_blocks()) {
            const int count = batch_of(first, step.inner, TILES / 2);
            const Item item = item_of(first, count, step.inner);
            Scales gate_scales = {}, up_scales = {};
            if (item.is_there) {
                gate_scales = scales_of<LAYER_KIND>(layer.gate, item.row);
                up_scales = scales_of<LAYER_KIND>(layer.up, item.row);
            }
            for (int j = 0; j < 2 * count; j++) {
                float acc[4];
                multiply_tile<LAYER_KIND>(step, s, place, step.hidden, acc, watch);
                keep_parts<LAYER_KIND>(s, half, j, acc);
            }
            sync_some<THREADS>();
            if (item.is_there) {
                float own;
                const float factor = norm_factor(step, s, turn, item.row_of_x, layer.mlp_eps, false, &own);
                const int row = item.row_of_x;
                const Pair gate = result<LAYER_KIND>(s, turn, half, 2 * item.tile, row, item.pair, gate_scales, factor);
                const Pair up = result<LAYER_KIND>(s, turn, half, 2 * item.tile + 1, row, item.pair, up_scales, factor);
                const u32 pair = bf16_pair(silu(gate.a) * up.a, silu(gate.b) * up.b);
                store_one(mail.h + (row * step.inner + item.row) / 2, letter(pair, number));
            }
            half ^= 1;
        }
    }

    DEVICE void head() {
        watch.product++;
        if (block_index() * TILE >= step.vocab) return;
        take_stream<HEAD_KIND>(step, s, turn ^= 1, mail.x, step.norm, number, watch);
        for (int first = block_index(); first * TILE < step.vocab; first += TILES * num_blocks()) {
            const int count = batch_of(first, step.vocab, TILES);
            const Item item = item_of(first, count, step.vocab);
            Scales scales = {};
            if (item.is_there) scales = scales_of<HEAD_KIND>(step.head, item.row);
            for (int j = 0; j < count; j++) {
                float acc[4];
                multiply_tile<HEAD_KIND>(step, s, place, step.hidden, acc, watch);
                keep_parts<HEAD_KIND>(s, half, j, acc);
            }
            sync_some<THREADS>();
            if (item.is_there) {
                float own;
                const float factor = norm_factor(step, s, turn, item.row_of_x, step.eps, step.head_unit, &own);
                const Pair y = result<HEAD_KIND>(s, turn, half, item.tile, item.row_of_x, item.pair, scales, factor);
                const u32 pair = bf16_pair(y.a, y.b);
                u16* logits = step.logits + (long long)item.row_of_x * step.vocab + item.row;
                logits[0] = (u16)pair;
                if (item.row + 1 < step.vocab) logits[1] = (u16)(pair >> 16);
            }
            half ^= 1;
        }
    }
};

DEVICE Mail mail_of(const Step& step) {
    Mail m;
    m.x = step.mail;
    m.h = m.x + ROWS * (step.hidden / 2);
    m.y = m.h + ROWS * (step.inner / 2);
    m.u = m.y + ROWS * step.hidden;
    return m;
}

KERNEL void __launch_bounds__(THREADS + 32, 1) decode_step(const __grid_constant__ Step step) {
    const Shared s = shared_of(step);
    Watch watch = {now() + PATIENCE, 0, 0};
    {
        const int words = step.num_layers * (int)(sizeof(Layer) / 16);
        for (int i = thread_index(); i < words; i += THREADS + 32)
            ((Words4*)s.layers)[i] = load_words4((const Words4*)step.layers + i);
        if (thread_index() == 0) {
            s.start[0] = *step.epoch, s.start[1] = *step.fault;
            for (int i = 0; i < step.slots; i++) {
                barrier_init(s.full + i, 1);
                barrier_init(s.empty + i, WARPS);
            }
            barriers_are_made();
        }
    }
    sync_block();
    if (s.start[1]) return;
    if (thread_index() >= THREADS) {
        ask_for_everything(step, s, watch);
        tell(step, watch);
        return;
    }
    Consumer c = {step, s, mail_of(step), Place(), 0, 0, s.start[0], watch};
    c.begin();
    for (int l = 0; l < step.num_layers; l++) {
        c.in_proj(l);
        c.state(l);
        c.out_proj(l);
        c.gate_up(l);
        c.down(l);
    }
    c.head();
    tell(step, watch);
    // Only when every block has begun, and knows the number that it began with, is it moved on.
    if (thread_index() == 0 && add_one(step.tickets) == (u32)num_blocks() - 1) *step.tickets = 0, *step.epoch = c.number;
}
