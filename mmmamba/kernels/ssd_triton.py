"""Triton kernels of the training scan: the decay matrices of a chunk live in registers and are never written.

In a chunk y_t = sum_{s <= t} exp(cum_t - cum_s) dt_s (C_t . B_s) x_s, tile by tile like flash attention without its
softmax (state-space duality, arXiv:2405.21060); between chunks a state of head_dim x d_state numbers a head. The
backward pass makes the tiles again from x, B, C and the log decays. Tensor cores multiply in the inputs' dtype and add
in float32; log decays, steps and states are float32.

Layout: x, B, their gradients (batch, seqlen, num_kv_heads, dim), C, y, theirs (batch, seqlen, num_heads, dim), any
strides but the last; `cum`, `dt` and their gradients (batch, num_heads, padded), whole chunks in a row; `states`
(batch, num_chunks + 1, num_heads, head_dim, d_state): slot c is what chunk c starts from. `ssd_op` launches them.
"""

from __future__ import annotations

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Triton reads the annotations of a kernel as marks of compile-time constants, so its pointers and numbers have none.
import triton
import triton.language as tl


@triton.jit
def _rows_of(base, offsets, ok, stride, dims, dim: tl.constexpr):
    """A tile (rows, dim) of a matrix whose rows stand `stride` apart; zeros outside."""
    place = base + offsets[:, None].to(tl.int64) * stride + dims[None, :]
    return tl.load(place, mask=ok[:, None] & (dims < dim)[None, :], other=0.0)


@triton.jit
def _decay(later, earlier, cum_later, cum_earlier, seg_later, seg_earlier, SEGMENTS: tl.constexpr):
    """exp(cum_later - cum_earlier) where the one position may look back at the other, else exactly 0. Broadcasts."""
    seen = later >= earlier
    if SEGMENTS:
        seen = seen & (seg_later == seg_earlier)
    return tl.where(seen, tl.exp(tl.minimum(cum_later - cum_earlier, 0.0)), 0.0)


@triton.jit
def _segment_before(seg, chunk, chunk_len):
    """Segment of the state that a chunk starts from: that of the token before it, or of the first token of all."""
    return tl.load(seg + tl.maximum(chunk * chunk_len - 1, 0))


@triton.jit
def chunk_states(
    x, B, cum, dt, seg, states,
    seqlen, chunk_len, padded, num_heads, x_rep, B_rep,
    x_batch, x_row, x_head, B_batch, B_row, B_head,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
    REVERSE: tl.constexpr, SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk adds to the state after it: sum_s exp(total - cum_s) dt_s x_s B_s^T, into slot c + 1.

    REVERSE: to the gradient of the state before it, sum_t exp(cum_t) dy_t C_t^T (x is dy, B is C), into slot c.
    Grid (num_chunks * tiles of head_dim, num_heads, batch). Reads x and B of a chunk once a tile of head_dim.
    """
    p_tiles = tl.cdiv(P, BLOCK_P)
    chunk, tile = tl.program_id(0) // p_tiles, tl.program_id(0) % p_tiles
    num_chunks = tl.num_programs(0) // p_tiles
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    p, n = tile * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    x += batch * x_batch + (head // x_rep) * x_head
    B += batch * B_batch + (head // B_rep) * B_head
    cum += (batch * num_heads + head) * padded
    dt += (batch * num_heads + head) * padded
    seg += batch * seqlen
    start, end = chunk * chunk_len, tl.minimum((chunk + 1) * chunk_len, seqlen)
    total = tl.load(cum + start + chunk_len - 1)
    if SEGMENTS:
        wanted = _segment_before(seg, chunk, chunk_len) if REVERSE else tl.load(seg + end - 1)
    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for at in range(start, end, BLOCK):
        rows = at + tl.arange(0, BLOCK)
        ok = rows < end
        cum_s = tl.load(cum + rows, mask=ok, other=0.0)
        weights = tl.exp(cum_s) if REVERSE else tl.exp(total - cum_s) * tl.load(dt + rows, mask=ok, other=0.0)
        if SEGMENTS:
            weights = tl.where(tl.load(seg + rows, mask=ok, other=-1) == wanted, weights, 0.0)
        x_s = _rows_of(x, rows, ok, x_row, p, P)
        B_s = _rows_of(B, rows, ok, B_row, n, N)
        weighted = (x_s * weights[:, None]).to(B_s.dtype)
        acc += tl.dot(tl.trans(weighted), B_s, input_precision=PRECISION)
    slot = chunk if REVERSE else chunk + 1
    place = ((batch * (num_chunks + 1) + slot) * num_heads + head) * (P * N)
    inside = (p < P)[:, None] & (n < N)[None, :]
    tl.store(states + place + p[:, None] * N + n[None, :], acc, mask=inside)


@triton.jit
def pass_states(
    states, forward, products, cum, seg, seqlen, chunk_len, padded, num_heads, num_chunks,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Carry states from chunk to chunk, in place: slot c + 1 gets what decays of slot c through chunk c added; with
    REVERSE slot c gets what slot c + 1 sends back, and `products` (batch, num_heads, num_chunks, tiles) the sums over
    each tile of these gradients times the `forward` states of the same slots c + 1.

    Grid (tiles of head_dim * d_state, num_heads, batch). Reads and writes every state once, and with REVERSE reads the
    forward pass's once.
    """
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    tiles = tl.num_programs(0)
    inner = tile * BLOCK + tl.arange(0, BLOCK)
    ok = inner < SIZE
    stride = num_heads * SIZE  # from slot to slot
    of_head = (batch * (num_chunks + 1) * num_heads + head) * SIZE
    states += of_head
    cum += (batch * num_heads + head) * padded
    seg += batch * seqlen
    first = num_chunks if REVERSE else 0
    state = tl.load(states + first * stride + inner, mask=ok, other=0.0)
    for step in range(num_chunks):
        chunk = num_chunks - 1 - step if REVERSE else step
        if REVERSE:
            after = tl.load(forward + of_head + (chunk + 1) * stride + inner, mask=ok, other=0.0)
            of_chunk = (batch * num_heads + head) * num_chunks + chunk
            tl.store(products + of_chunk * tiles + tile, tl.sum(state * after, axis=0))
        through = tl.exp(tl.load(cum + (chunk + 1) * chunk_len - 1))
        if SEGMENTS:
            last = tl.load(seg + tl.minimum((chunk + 1) * chunk_len, seqlen) - 1)
            through = tl.where(_segment_before(seg, chunk, chunk_len) == last, through, 0.0)
        place = states + (chunk if REVERSE else chunk + 1) * stride + inner
        state = state * through + tl.load(place, mask=ok, other=0.0)
        tl.store(place, state, mask=ok)


@triton.jit
def scan_forward(
    x, B, C, cum, dt, seg, states, y,
    seqlen, chunk_len, padded, num_heads, num_chunks, rep,
    x_batch, x_row, x_head, B_batch, B_row, B_head, C_batch, C_row, C_head, y_batch, y_row, y_head,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
    STATES: tl.constexpr, SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of a tile of tokens of one head. Grid (num_chunks * tiles of a chunk, num_heads, batch)."""
    tiles = tl.cdiv(chunk_len, BLOCK)
    chunk, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    x += batch * x_batch + (head // rep) * x_head
    B += batch * B_batch + (head // rep) * B_head
    C += batch * C_batch + head * C_head
    y += batch * y_batch + head * y_head
    cum += (batch * num_heads + head) * padded
    dt += (batch * num_heads + head) * padded
    seg += batch * seqlen
    start, end = chunk * chunk_len, tl.minimum((chunk + 1) * chunk_len, seqlen)
    rows = start + tile * BLOCK + tl.arange(0, BLOCK)
    ok = rows < end
    C_t = _rows_of(C, rows, ok, C_row, n, N)
    cum_t = tl.load(cum + rows, mask=ok, other=0.0)
    seg_t = rows
    if SEGMENTS:
        seg_t = tl.load(seg + rows, mask=ok, other=-1)
    acc = tl.zeros((BLOCK, BLOCK_P), tl.float32)
    if STATES:
        place = states + ((batch * (num_chunks + 1) + chunk) * num_heads + head) * (P * N)
        inside = (n < N)[:, None] & (p < P)[None, :]
        state = tl.load(place + n[:, None] + p[None, :] * N, mask=inside, other=0.0)  # (d_state, head_dim)
        since_start = tl.exp(cum_t)
        if SEGMENTS:
            since_start = tl.where(seg_t == _segment_before(seg, chunk, chunk_len), since_start, 0.0)
        acc += tl.dot(C_t, state.to(C_t.dtype), input_precision=PRECISION) * since_start[:, None]
    for at in range(start, tl.minimum(start + (tile + 1) * BLOCK, end), BLOCK):
        cols = at + tl.arange(0, BLOCK)
        there = cols < end
        B_s = _rows_of(B, cols, there, B_row, n, N)
        x_s = _rows_of(x, cols, there, x_row, p, P)
        cum_s = tl.load(cum + cols, mask=there, other=0.0)
        dt_s = tl.load(dt + cols, mask=there, other=0.0)
        seg_s = cols
        if SEGMENTS:
            seg_s = tl.load(seg + cols, mask=there, other=-2)
        decay = _decay(
            rows[:, None], cols[None, :], cum_t[:, None], cum_s[None, :], seg_t[:, None], seg_s[None, :], SEGMENTS
        )
        scores = tl.dot(C_t, tl.trans(B_s), input_precision=PRECISION)
        acc += tl.dot((scores * decay * dt_s[None, :]).to(x_s.dtype), x_s, input_precision=PRECISION)
    tl.store(y + rows[:, None] * y_row + p[None, :], acc.to(y.dtype.element_ty), mask=ok[:, None] & (p < P)[None, :])


@triton.jit
def scan_backward_kv(
    x, B, C, dy, cum, dt, seg, grad_states, dx, dB, ddt, dcum,
    seqlen, chunk_len, padded, num_heads, num_chunks,
    x_batch, x_row, x_head, B_batch, B_row, B_head, C_batch, C_row, C_head, dy_batch, dy_row, dy_head,
    dx_batch, dx_row, dx_head, dB_batch, dB_row, dB_head,
    REP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr, STATES: tl.constexpr, SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx and dB of a tile of tokens of one kv head, summed over its query heads; per query head d(dt) without what
    comes through the decays, and minus the column sums of what each pair of tokens gives, the first half of d(cum).

    Grid (num_chunks * tiles of a chunk, num_kv_heads, batch). Column sums are B . dB: the row sums of
    `scan_backward_q` are C . dC from the same rounded products, so that what cancels in their difference does.
    """
    tiles = tl.cdiv(chunk_len, BLOCK)
    chunk, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    x += batch * x_batch + group * x_head
    B += batch * B_batch + group * B_head
    seg += batch * seqlen
    start, end = chunk * chunk_len, tl.minimum((chunk + 1) * chunk_len, seqlen)
    cols = start + tile * BLOCK + tl.arange(0, BLOCK)
    there = cols < end
    x_s = _rows_of(x, cols, there, x_row, p, P)
    B_s = _rows_of(B, cols, there, B_row, n, N)
    seg_s = cols
    if SEGMENTS:
        seg_s = tl.load(seg + cols, mask=there, other=-2)
    dx_acc = tl.zeros((BLOCK, BLOCK_P), tl.float32)
    dB_acc = tl.zeros((BLOCK, BLOCK_N), tl.float32)
    summed = tl.zeros((BLOCK,), tl.float32)  # B . dB over the heads so far
    for r in range(REP):
        head = group * REP + r
        C_head_ptr = C + batch * C_batch + head * C_head
        dy_head_ptr = dy + batch * dy_batch + head * dy_head
        of_head = (batch * num_heads + head) * padded
        cum_s = tl.load(cum + of_head + cols, mask=there, other=0.0)
        dt_s = tl.load(dt + of_head + cols, mask=there, other=0.0)
        ddt_s = tl.zeros((BLOCK,), tl.float32)
        if STATES:
            place = grad_states + ((batch * (num_chunks + 1) + chunk + 1) * num_heads + head) * (P * N)
            inside = (p < P)[:, None] & (n < N)[None, :]
            grad = tl.load(place + p[:, None] * N + n[None, :], mask=inside, other=0.0).to(x_s.dtype)
            total = tl.load(cum + of_head + start + chunk_len - 1)
            to_end = tl.where(there, tl.exp(total - cum_s), 0.0)
            if SEGMENTS:
                to_end = tl.where(seg_s == tl.load(seg + end - 1), to_end, 0.0)
            x_grad = tl.dot(x_s, grad, input_precision=PRECISION)  # (block, d_state)
            ddt_s += tl.sum(x_grad * B_s, axis=1) * to_end
            dB_acc += x_grad * (to_end * dt_s)[:, None]
            dx_acc += tl.dot(B_s, tl.trans(grad), input_precision=PRECISION) * (to_end * dt_s)[:, None]
        for at in range(start + tile * BLOCK, end, BLOCK):
            rows = at + tl.arange(0, BLOCK)
            ok = rows < end
            C_t = _rows_of(C_head_ptr, rows, ok, C_row, n, N)
            dy_t = _rows_of(dy_head_ptr, rows, ok, dy_row, p, P)
            cum_t = tl.load(cum + of_head + rows, mask=ok, other=0.0)
            seg_t = rows
            if SEGMENTS:
                seg_t = tl.load(seg + rows, mask=ok, other=-1)
            decay = _decay(
                rows[None, :], cols[:, None], cum_t[None, :], cum_s[:, None], seg_t[None, :], seg_s[:, None], SEGMENTS
            )
            scores = tl.dot(B_s, tl.trans(C_t), input_precision=PRECISION)
            products = tl.dot(x_s, tl.trans(dy_t), input_precision=PRECISION)
            ddt_s += tl.sum(scores * products * decay, axis=1)
            weights = decay * dt_s[:, None]
            dx_acc += tl.dot((scores * weights).to(x_s.dtype), dy_t, input_precision=PRECISION)
            dB_acc += tl.dot((products * weights).to(x_s.dtype), C_t, input_precision=PRECISION)
        before = summed
        summed = tl.sum(dB_acc * B_s, axis=1)
        # Rows behind the sequence get zeros: their x and dt are.
        whole = cols < start + chunk_len
        tl.store(ddt + of_head + cols, ddt_s, mask=whole)
        tl.store(dcum + of_head + cols, before - summed, mask=whole)
    dx += batch * dx_batch + group * dx_head
    dB += batch * dB_batch + group * dB_head
    dx_place, dB_place = dx + cols[:, None] * dx_row + p[None, :], dB + cols[:, None] * dB_row + n[None, :]
    tl.store(dx_place, dx_acc.to(dx.dtype.element_ty), mask=there[:, None] & (p < P)[None, :])
    tl.store(dB_place, dB_acc.to(dB.dtype.element_ty), mask=there[:, None] & (n < N)[None, :])


@triton.jit
def scan_backward_q(
    x, B, C, dy, cum, dt, seg, states, dC, dcum,
    seqlen, chunk_len, padded, num_heads, num_chunks, rep,
    x_batch, x_row, x_head, B_batch, B_row, B_head, C_batch, C_row, C_head, dy_batch, dy_row, dy_head,
    dC_batch, dC_row, dC_head,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
    STATES: tl.constexpr, SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dC of a tile of tokens of one head, and the row sums C . dC added to d(cum), which must hold its first half.

    Grid (num_chunks * tiles of a chunk, num_heads, batch).
    """
    tiles = tl.cdiv(chunk_len, BLOCK)
    chunk, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    x += batch * x_batch + (head // rep) * x_head
    B += batch * B_batch + (head // rep) * B_head
    C += batch * C_batch + head * C_head
    dy += batch * dy_batch + head * dy_head
    dC += batch * dC_batch + head * dC_head
    cum += (batch * num_heads + head) * padded
    dt += (batch * num_heads + head) * padded
    dcum += (batch * num_heads + head) * padded
    seg += batch * seqlen
    start, end = chunk * chunk_len, tl.minimum((chunk + 1) * chunk_len, seqlen)
    rows = start + tile * BLOCK + tl.arange(0, BLOCK)
    ok = rows < end
    C_t = _rows_of(C, rows, ok, C_row, n, N)
    dy_t = _rows_of(dy, rows, ok, dy_row, p, P)
    cum_t = tl.load(cum + rows, mask=ok, other=0.0)
    seg_t = rows
    if SEGMENTS:
        seg_t = tl.load(seg + rows, mask=ok, other=-1)
    acc = tl.zeros((BLOCK, BLOCK_N), tl.float32)
    if STATES:
        place = states + ((batch * (num_chunks + 1) + chunk) * num_heads + head) * (P * N)
        inside = (p < P)[:, None] & (n < N)[None, :]
        state = tl.load(place + p[:, None] * N + n[None, :], mask=inside, other=0.0)
        since_start = tl.exp(cum_t)
        if SEGMENTS:
            since_start = tl.where(seg_t == _segment_before(seg, chunk, chunk_len), since_start, 0.0)
        acc += tl.dot(dy_t, state.to(dy_t.dtype), input_precision=PRECISION) * since_start[:, None]
    for at in range(start, tl.minimum(start + (tile + 1) * BLOCK, end), BLOCK):
        cols = at + tl.arange(0, BLOCK)
        there = cols < end
        B_s = _rows_of(B, cols, there, B_row, n, N)
        x_s = _rows_of(x, cols, there, x_row, p, P)
        cum_s = tl.load(cum + cols, mask=there, other=0.0)
        dt_s = tl.load(dt + cols, mask=there, other=0.0)
        seg_s = cols
        if SEGMENTS:
            seg_s = tl.load(seg + cols, mask=there, other=-2)
        decay = _decay(
            rows[:, None], cols[None, :], cum_t[:, None], cum_s[None, :], seg_t[:, None], seg_s[None, :], SEGMENTS
        )
        products = tl.dot(dy_t, tl.trans(x_s), input_precision=PRECISION)
        acc += tl.dot((products * (decay * dt_s[None, :])).to(B_s.dtype), B_s, input_precision=PRECISION)
    whole = rows < start + chunk_len
    row_sums = tl.sum(acc * C_t, axis=1)
    tl.store(dcum + rows, tl.load(dcum + rows, mask=whole, other=0.0) + row_sums, mask=whole)
    dC_place = dC + rows[:, None] * dC_row + n[None, :]
    tl.store(dC_place, acc.to(dC.dtype.element_ty), mask=ok[:, None] & (n < N)[None, :])


@triton.jit
def step_gradients(
    dcum, ddt, dt, A, products, grad_dt, grad_A, seqlen, chunk_len, padded, num_heads, tiles,
    BLOCK: tl.constexpr, TILES: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """From the gradients of log decays and of the steps beside them to those of dt (batch, seqlen, num_heads) and, a
    chunk and head, of A: `grad_A` (batch, num_heads, num_chunks). Grid (num_chunks, num_heads, batch).

    A step of token t is in the log decays of t and of all tokens after it in its chunk; the state after the chunk
    scales with the last of them, which is what the sum of `products` is the gradient of.
    """
    chunk, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < chunk_len
    t = chunk * chunk_len + i
    of_head = batch * num_heads + head
    of_steps = of_head * padded + t
    grad = tl.load(dcum + of_steps, inside, other=0.0)
    of_chunk = of_head * tl.num_programs(0) + chunk
    if STATES:
        j = tl.arange(0, TILES)
        last = tl.sum(tl.load(products + of_chunk * tiles + j, j < tiles, other=0.0), axis=0)
        grad += tl.where(i == chunk_len - 1, last, 0.0)
    steps = tl.sum(grad, axis=0) - tl.cumsum(grad, axis=0) + grad
    steps = tl.where(inside, steps, 0.0)
    tl.store(grad_A + of_chunk, tl.sum(steps * tl.load(dt + of_steps, inside, other=0.0), axis=0))
    out = tl.load(ddt + of_steps, inside, other=0.0) + steps * tl.load(A + head)
    tl.store(grad_dt + (batch * seqlen + t) * num_heads + head, out, inside & (t < seqlen))
