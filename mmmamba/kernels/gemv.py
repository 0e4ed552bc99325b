"""Matrix-vector products of decoding with what comes before and after them, for up to a handful of rows.

    prologue  RMS norm of x (optional)
    product   W x, W dense, int8 or int4 (`weights.py`), dequantized in registers
    epilogue  "plain"     store
              "residual"  add to what is in `out`
              "swiglu"    SiLU(W x) * (W2 x)
              "mixer"     rows V, K, Q pass the convolution and SiLU, G passes SiLU, dt its bias and softplus;
                          the convolution's state moves on

One program owns BLOCK_N rows of W over the whole of K: it starts the loads of all its weights at once (BLOCK_N * K
numbers, 16 to 32 KB, 16 bytes a load), only then waits for the kernel before it, reads x (from L2 for the first program
of a multiprocessor, from L1 for the others), and ends in one reduction over its threads. No sum crosses programs, so
results do not depend on the order in which they run, and each row of x is a computation of its own.
Bytes to move: W once, `Weight.nbytes`; x, norm and out are small beside it.

Sums are in float32. Dequantization costs no conversion instruction: a shift and a mask put the bits into the mantissa
of a float32 between 128 and 256 (2048 and 4096), and the offset is taken out once a word by means of the sum of x.
"""

from __future__ import annotations

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: SIM108 (a conditional expression of Triton evaluates both sides)
# Triton reads the annotations of a kernel as marks of compile-time constants, so its pointers and numbers have none.
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mmmamba.kernels.launch import GemvShape, gemv_shape
from mmmamba.kernels.weights import Weight

BITS = {"dense": 16, "int8": 8, "int4": 4}

# Bits of 128.0.
MAGIC = 0x43000000


@triton.jit
def phase_index(k, LENGTH: tl.constexpr, PHASES: tl.constexpr):
    """Where element k of an activation of LENGTH numbers lies when it is kept in phases (`weights.to_phases`)."""
    if PHASES == 1:
        return k
    else:
        return (k % PHASES) * (LENGTH // PHASES) + k // PHASES


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    # As torch: the identity above 20, where float32 cannot tell the two apart. log(1 + e) loses the digits of a small
    # e, so below -5 its series (off by e^3 / 3) is used.
    e = tl.exp(tl.minimum(x, 20.0))
    return tl.where(x > 20.0, x, tl.where(x < -5.0, e - 0.5 * e * e, tl.log(1.0 + e)))


@triton.jit
def _as_float(word, magic, J: tl.constexpr, BITS: tl.constexpr):
    """Weight J of each packed word as the mantissa of a float32, scaled and shifted; `_dot` takes both out again.

    `magic` is `MAGIC`, an argument of the kernel: as a constant it would cost an instruction more for each weight.
    """
    if BITS == 8:
        if J <= 1:
            moved = word << (15 - 8 * J)
        else:
            moved = word >> (8 * J - 15)
        # Bits 15 to 22, the top of the mantissa: 128 + q / 2.
        bits = (moved & 0x7F8000) | magic
    else:
        # A pair of nibbles shares a shift, the even one ends at bits 12 to 15 (2048 + q in units of 1/16), the odd one
        # at 16 to 19 (128 + q).
        if J // 2 <= 1:
            moved = word << (12 - 8 * (J // 2))
        else:
            moved = word >> (8 * (J // 2) - 12)
        bits = (moved & (0xF000 if J % 2 == 0 else 0xF0000)) | magic
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _words(base, n_index, m_index, n_ok, m_ok, WORDS: tl.constexpr):
    """A tile of W, (BLOCK_N, BLOCK_W) words; read once, so first to leave the caches."""
    mask = n_ok[:, None] & m_ok[None, :]
    return tl.load(base + n_index[:, None] * WORDS + m_index[None, :], mask, other=0, eviction_policy="evict_first")


@triton.jit
def _of_groups(
    table, n_index, n_ok,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Scales or zeros of a tile: (BLOCK_N,) of whole rows, (BLOCK_N, groups a row) else; of dense weights a zero."""
    if BITS == 16:
        return 0.0
    elif GROUP == K:
        return tl.load(table + n_index, n_ok, other=0.0)
    else:
        g_index = tl.arange(0, BLOCK_W * (K // WORDS) // GROUP)
        place = n_index[:, None] * (K // GROUP) + g_index[None, :]
        return tl.load(table + place, n_ok[:, None] & (g_index < K // GROUP)[None, :], other=0.0)


@triton.jit
def _dot(
    words, scale, zero, magic, x_base, norm, m_index, m_ok,
    K: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, X_PHASES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Products of a tile with one row of x: sums (BLOCK_N,) before the norm's 1 / rms, and the sum of squares of x.
    `scale` and `zero` are as `_of_groups` reads them."""
    PHASES: tl.constexpr = K // WORDS
    acc = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    squares = tl.zeros([BLOCK_W], tl.float32)
    x_sum = tl.zeros([BLOCK_W], tl.float32)  # of the x that a word meets, for zero points
    x_base_sum = tl.zeros([BLOCK_W], tl.float32)  # the same times the offset inside `_as_float`
    for j in tl.static_range(PHASES):
        if X_PHASES == PHASES:
            at = j * WORDS + m_index
        else:
            at = phase_index(m_index * PHASES + j, K, X_PHASES)
        x = tl.load(x_base + at, m_ok, other=0.0).to(tl.float32)
        if norm is not None:
            squares += x * x
            x *= tl.load(norm + at, m_ok, other=0.0).to(tl.float32)
        if BITS == 16:
            acc += words.to(tl.float32) * x[None, :]
        else:
            x_sum += x
            # What a step of q is worth in the mantissa, undone.
            unit = x * (2.0 if BITS == 8 else 16.0 if j % 2 == 0 else 1.0)
            x_base_sum += unit * 128.0
            acc += _as_float(words, magic, j, BITS) * unit[None, :]
    if BITS == 16:
        y = tl.sum(acc, axis=1)
    elif GROUP == K:
        y = tl.sum(acc - x_base_sum[None, :], axis=1) * scale.to(tl.float32)
        y += tl.sum(x_sum, axis=0) * zero.to(tl.float32)
    else:
        GROUP_WORDS: tl.constexpr = GROUP // PHASES
        BLOCK_G: tl.constexpr = BLOCK_W // GROUP_WORDS
        sums = tl.sum(tl.reshape(acc - x_base_sum[None, :], [BLOCK_N, BLOCK_G, GROUP_WORDS]), axis=2)
        x_sums = tl.sum(tl.reshape(x_sum, [BLOCK_G, GROUP_WORDS]), axis=1)
        y = tl.sum(scale.to(tl.float32) * sums + zero.to(tl.float32) * x_sums[None, :], axis=1)
    return y, tl.sum(squares, axis=0)


@triton.jit
def mixer_numbers(n, conv_weight, conv_bias, dt_bias, n_ok, CONV: tl.constexpr, GATE: tl.constexpr):
    """What `mixer_rows` needs for the rows `n`: two taps, the bias, and that of the step size."""
    is_conv = n_ok & (n < CONV)
    tap0 = tl.load(conv_weight + 2 * n, is_conv, other=0.0).to(tl.float32)
    tap1 = tl.load(conv_weight + 2 * n + 1, is_conv, other=0.0).to(tl.float32)
    bias = tl.load(conv_bias + n, is_conv, other=0.0).to(tl.float32)
    step_bias = tl.load(dt_bias + (n - CONV - GATE), n_ok & (n >= CONV + GATE), other=0.0).to(tl.float32)
    return tap0, tap1, bias, step_bias


@triton.jit
def mixer_rows(u, prev, n, tap0, tap1, bias, step_bias, CONV: tl.constexpr, GATE: tl.constexpr):
    """What the rows `n` of the mixer's projection become: u and prev (the convolution's state) are float32 holding
    numbers of the model's dtype."""
    mixed = tl.where(n < CONV, bias + prev * tap0 + u * tap1, u)
    return tl.where(n >= CONV + GATE, softplus(u + step_bias), silu(mixed))


@triton.jit
def gemv(
    x, norm, w, scales, zeros, w2, scales2, zeros2, out,
    conv_weight, conv_bias, dt_bias, conv_table, alive,
    N, eps, magic,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    X_PHASES: tl.constexpr, OUT_LENGTH: tl.constexpr, OUT_PHASES: tl.constexpr,
    EPILOGUE: tl.constexpr, CONV: tl.constexpr, GATE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (ROWS, N) from x (ROWS, K); see the module. `conv_table` holds addresses of the rows' convolution states."""
    if PDL:
        # The next kernel may take the places that this one leaves free: it does as we do here, and loads weights.
        gdc_launch_dependents()
    PHASES: tl.constexpr = 1 if BITS == 16 else 32 // BITS
    WORDS: tl.constexpr = K // PHASES
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_W)
    n_ok = n < N
    m_ok = m < WORDS
    n_wide = n.to(tl.int64)  # a large vocabulary times K passes 2^31
    words = _words(w, n_wide, m, n_ok, m_ok, WORDS)
    if EPILOGUE == "swiglu":
        words2 = _words(w2, n_wide, m, n_ok, m_ok, WORDS)
    # What no kernel writes is read before the wait: behind it every read is most of a microsecond in which the memory
    # rests.
    scale = _of_groups(scales, n_wide, n_ok, K, BITS, GROUP, WORDS, BLOCK_W)
    zero = _of_groups(zeros, n_wide, n_ok, K, BITS, GROUP, WORDS, BLOCK_W)
    if EPILOGUE == "swiglu":
        scale2 = _of_groups(scales2, n_wide, n_ok, K, BITS, GROUP, WORDS, BLOCK_W)
        zero2 = _of_groups(zeros2, n_wide, n_ok, K, BITS, GROUP, WORDS, BLOCK_W)
    if EPILOGUE == "mixer":
        tap0, tap1, bias, step_bias = mixer_numbers(n, conv_weight, conv_bias, dt_bias, n_ok, CONV, GATE)
    if PDL:
        gdc_wait()
    for row in tl.static_range(ROWS):
        at = out + row * OUT_LENGTH + phase_index(n, OUT_LENGTH, OUT_PHASES)
        # With the first reads of x, not behind the sums.
        if EPILOGUE == "residual":
            before = tl.load(at, n_ok, other=0.0).to(tl.float32)
        if EPILOGUE == "mixer":
            state = tl.load(conv_table + row).to(tl.pointer_type(conv_bias.dtype.element_ty))
            prev = tl.load(state + n, n_ok & (n < CONV), other=0.0).to(tl.float32)
            going = tl.load(alive + row) != 0
        y, squares = _dot(
            words, scale, zero, magic, x + row * K, norm, m, m_ok, K, WORDS, BITS, GROUP, X_PHASES, BLOCK_N, BLOCK_W
        )
        if norm is not None:
            rms = tl.rsqrt(squares / K + eps)
            y *= rms
        if EPILOGUE == "swiglu":
            y2, _ = _dot(
                words2, scale2, zero2, magic, x + row * K, norm, m, m_ok,
                K, WORDS, BITS, GROUP, X_PHASES, BLOCK_N, BLOCK_W,
            )  # fmt: skip
            if norm is not None:
                y2 *= rms
            y = silu(y) * y2
        if EPILOGUE == "residual":
            y += before
        if EPILOGUE == "mixer":
            y = y.to(conv_bias.dtype.element_ty).to(tl.float32)  # as the state keeps it
            tl.store(state + n, y.to(conv_bias.dtype.element_ty), n_ok & (n < CONV) & going)
            y = mixer_rows(y, prev, n, tap0, tap1, bias, step_bias, CONV, GATE)
        tl.store(at, y.to(out.dtype.element_ty), n_ok)


@dataclass(frozen=True)
class MixerRows:
    """What the epilogue "mixer" needs besides u: taps (conv_dim, 2), their bias (conv_dim,), dt_bias (num_heads,)."""

    conv_weight: Tensor
    conv_bias: Tensor
    dt_bias: Tensor
    hidden_size: int


def project(
    x: Tensor,
    weight: Weight,
    out: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: Weight | None = None,
    residual: bool = False,
    mixer: MixerRows | None = None,
    conv_table: Tensor | None = None,
    alive: Tensor | None = None,
    x_phases: int = 1,
    out_phases: int = 1,
    shape: GemvShape | None = None,
    pdl: bool = False,
) -> None:
    """Write W x, with prologue and epilogue as the module says, into `out`.

    Args:
        x: (rows, in_features), in `x_phases` (see `weights.to_phases`), as `norm` (in_features,) is too.
        out: (rows, out_features), in `out_phases`; with `residual` added to.
        gated: the up projection beside `weight` as gate.
        mixer, conv_table, alive: the mixer's epilogue; `conv_table` (rows or more,) int64 addresses of convolution
            states (conv_dim, 1), moved on where `alive` (rows,) int32 is not 0.
        pdl: start before the kernel ahead has ended, and let the next one do so.
    Changes: `out`, and the states at `conv_table`.
    """
    rows, columns = weight.shape
    if x.shape[1] != columns or out.shape != (x.shape[0], rows):
        raise ValueError(f"x {tuple(x.shape)} and out {tuple(out.shape)} do not fit a weight of shape {weight.shape}")
    shape = shape or gemv_shape(weight, x.device, tiles=2 if gated else 1)
    epilogue = "swiglu" if gated else "residual" if residual else "mixer" if mixer else "plain"
    second = gated or weight
    gemv[(-(-rows // shape.block_n),)](
        x,
        norm,
        words_of(weight),
        weight.scales,
        weight.zeros,
        words_of(second) if gated else None,
        second.scales if gated else None,
        second.zeros if gated else None,
        out,
        mixer.conv_weight if mixer else None,
        mixer.conv_bias if mixer else None,
        mixer.dt_bias if mixer else None,
        conv_table,
        alive,
        rows,
        eps,
        MAGIC,
        K=columns,
        BITS=BITS[weight.kind],
        GROUP=weight.group_size,
        ROWS=x.shape[0],
        X_PHASES=x_phases,
        OUT_LENGTH=rows,
        OUT_PHASES=out_phases,
        EPILOGUE=epilogue,
        CONV=mixer.conv_bias.shape[0] if mixer else 0,
        GATE=mixer.hidden_size if mixer else 0,
        BLOCK_N=shape.block_n,
        BLOCK_W=shape.block_w,
        PDL=pdl,
        num_warps=shape.num_warps,
        launch_pdl=pdl,
    )


def words_of(weight: Weight) -> Tensor:
    """The weight's data as the kernel reads it: packed kinds in words of 32 bits."""
    return weight.data if weight.kind == "dense" else weight.data.view(torch.int32)
