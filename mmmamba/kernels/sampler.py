"""Drawing the next token on the device, so that nobody waits for the host: as `sampling.sample`, a row at a time.

    scan      per block of the vocabulary the best token (penalty, banned ids)         row's likeliest, or
    narrow    16 candidate thresholds a round, 4 bits of the logit's bits each:         (top_k, top_p)
              tokens above each (top_k), or their mass (top_p); 4 rounds settle a bf16 logit, 8 a float32 one
    scan      with Gumbel noise on what is left: its best token is a draw from the softmax
    pick      best over the blocks; stop tokens end the row; counters move on

There is no sort: a filter is a threshold, found digit by digit, so tokens of equal logits stay or go together (a sort
keeps an arbitrary part of those at the edge). No sum crosses programs but in a fixed order, so a draw depends on the
row's logits, seed and count alone.
Bytes to move: the logits of a row once a launch, from L2; 0.2 MB at 92,553 bf16 logits.
"""

from __future__ import annotations

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Triton reads the annotations of a kernel as marks of compile-time constants, so its pointers and numbers have none.
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mmmamba.kernels.launch import next_power_of_2

BLOCK = 1024
MAX_STOPS = 16
CANDIDATES = 16
COLUMNS = 32  # candidates, then the mass of everything that is left
TEMPERATURE, TOP_P, MIN_P, PENALTY = range(4)  # columns of `Draws.numbers`


@dataclass(frozen=True)
class Draws:
    """What the sampler keeps for `rows` rows; all on the device, at fixed addresses.

    `numbers` (rows, 4) float32: temperature (0 is greedy), top_p, min_p, penalty. `top_k`, `count` (tokens drawn)
    (rows,) int32; `seed`, `token` (rows,) int64. `alive` (rows,) int32: 0 once a stop token was drawn, or for a row
    that is not in use. `seqlens` (2, rows) int32: positions that the two stacks have seen. `stops` (MAX_STOPS,) int64,
    unused ones -1; `banned` (vocab_size,) uint8; `seen` (rows, vocab_size) uint8: tokens that the penalty applies to.
    """

    numbers: Tensor
    top_k: Tensor
    count: Tensor
    seed: Tensor
    token: Tensor
    alive: Tensor
    seqlens: Tensor
    stops: Tensor
    banned: Tensor
    seen: Tensor
    best: Tensor  # (rows, blocks) float32, likeliest of each block
    best_drawn: Tensor  # the same with noise
    best_at: Tensor  # (rows, blocks) int32
    sums: Tensor  # (2, rows, blocks, COLUMNS) float32, of the last round and the one before
    prefix: Tensor  # (2, 2, rows) int64: after even and odd rounds; keys found so far for top_k and for top_p
    mass: Tensor  # (rows,) float32: what top_k and min_p leave

    @classmethod
    def allocate(cls, rows: int, vocab_size: int, device: torch.device) -> Draws:
        blocks = -(-vocab_size // BLOCK)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        i32, i64, f32, u8 = torch.int32, torch.int64, torch.float32, torch.uint8
        return cls(
            numbers=zeros(rows, 4, dtype=f32),
            top_k=zeros(rows, dtype=i32),
            count=zeros(rows, dtype=i32),
            seed=zeros(rows, dtype=i64),
            token=zeros(rows, dtype=i64),
            alive=zeros(rows, dtype=i32),
            seqlens=zeros(2, rows, dtype=i32),
            stops=torch.full((MAX_STOPS,), -1, dtype=i64, device=device),
            banned=zeros(vocab_size, dtype=u8),
            seen=zeros(rows, vocab_size, dtype=u8),
            best=zeros(rows, blocks, dtype=f32),
            best_drawn=zeros(rows, blocks, dtype=f32),
            best_at=zeros(rows, blocks, dtype=i32),
            sums=zeros(2, rows, blocks, COLUMNS, dtype=f32),
            prefix=zeros(2, 2, rows, dtype=i64),
            mass=zeros(rows, dtype=f32),
        )


@dataclass(frozen=True)
class DrawKind:
    """Which launches a step needs: what no row of a batch asks for is left out of its graph."""

    greedy: bool = True
    penalty: bool = False
    top_k: bool = False
    top_p: bool = False


@triton.jit
def _scores(logits, banned, seen, numbers, row, at, ok, VOCAB: tl.constexpr, PENALTY: tl.constexpr):
    """Logits of a block in float32 after the penalty; -inf for ids that are not to be drawn."""
    score = tl.load(logits + row.to(tl.int64) * VOCAB + at, ok, other=float("-inf")).to(tl.float32)
    if PENALTY:
        factor = tl.load(numbers + row * 4 + 3)
        was_seen = tl.load(seen + row.to(tl.int64) * VOCAB + at, ok, other=0) != 0
        score = tl.where(was_seen, tl.where(score > 0, score / factor, score * factor), score)
    return tl.where(tl.load(banned + at, ok, other=1) != 0, float("-inf"), score)


@triton.jit
def _key(score, KEY_BITS: tl.constexpr):
    """Bits of a float32 in the order of its values, the upper KEY_BITS of them, as int64."""
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)
    return (ordered >> (32 - KEY_BITS)).to(tl.int64)


@triton.jit
def _row_max(best, row, BLOCKS: tl.constexpr, BLOCKS_UP: tl.constexpr):
    b = tl.arange(0, BLOCKS_UP)
    return tl.max(tl.load(best + row * BLOCKS + b, b < BLOCKS, other=float("-inf")), axis=0)


@triton.jit
def _next_digit(sums, target, row, BLOCKS: tl.constexpr, BLOCKS_UP: tl.constexpr):
    """The smallest of 16 candidates above which less than `target` lies."""
    b = tl.arange(0, BLOCKS_UP)
    d = tl.arange(0, 16)
    place = (row * BLOCKS + b)[:, None] * 32 + d[None, :]
    above = tl.sum(tl.load(sums + place, (b < BLOCKS)[:, None], other=0.0), axis=0)
    return tl.min(tl.where(above < target, d, 15), axis=0)


@triton.jit
def narrow(
    logits, banned, seen, numbers, top_k, best, sums_in, sums_out, prefixes, mass,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, BLOCKS_UP: tl.constexpr, ROWS: tl.constexpr,
    BY_MASS: tl.constexpr, AFTER_TOP_K: tl.constexpr, PENALTY: tl.constexpr, KEY_BITS: tl.constexpr,
    ROUND: tl.constexpr, ROUNDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One round: settles a digit from the sums of the round before (round 0 begins, round ROUNDS only ends), then sums
    what of its block lies above each candidate of the next. `prefixes` is
    `Draws.prefix`."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    block = tl.program_id(1)
    prefix = prefixes + (ROWS if BY_MASS else 0) + row
    found = tl.zeros([], tl.int64)
    if ROUND > 0:
        if BY_MASS:
            if ROUND == 1:
                b = tl.arange(0, BLOCKS_UP)
                left = tl.sum(tl.load(sums_in + (row * BLOCKS + b) * 32 + 16, b < BLOCKS, other=0.0), axis=0)
            else:
                left = tl.load(mass + row)
            top_p = tl.load(numbers + row * 4 + 1)
            target = tl.where(top_p >= 1.0, float("inf"), top_p * left)
            if ROUND == 1 and block == 0:
                tl.store(mass + row, left)
        else:
            k = tl.load(top_k + row)
            target = tl.where(k > 0, k.to(tl.float32), float("inf"))
        # Programs of this launch read what the launch before wrote; where this one writes, none of them reads.
        before = tl.load(prefix + ((ROUND - 1) % 2) * 2 * ROWS) if ROUND > 1 else tl.zeros([], tl.int64)
        found = before * 16 + _next_digit(sums_in, target, row, BLOCKS, BLOCKS_UP)
        if block == 0:
            tl.store(prefix + (ROUND % 2) * 2 * ROWS, found)
    if ROUND < ROUNDS:
        at = block * BLOCK + tl.arange(0, BLOCK)
        ok = at < VOCAB
        score = _scores(logits, banned, seen, numbers, row, at, ok, VOCAB, PENALTY)
        key = _key(score, KEY_BITS)
        weight = tl.where(score > float("-inf"), 1.0, 0.0)
        if BY_MASS:
            temperature = tl.load(numbers + row * 4)
            gap = (score - _row_max(best, row, BLOCKS, BLOCKS_UP)) / tl.where(temperature > 0, temperature, 1.0)
            weight = tl.where(gap >= tl.log(tl.load(numbers + row * 4 + 2)), tl.exp(gap), 0.0)
            if AFTER_TOP_K:
                weight = tl.where(key >= tl.load(prefixes + (ROUNDS % 2) * 2 * ROWS + row), weight, 0.0)
        d = tl.arange(0, 32)
        BELOW: tl.constexpr = KEY_BITS - 4 * (ROUND + 1)
        # The last key that begins with the digits found and this candidate; column 16 stands for all keys.
        edge = ((found * 16 + d + 1) << BELOW) - 1
        edge = tl.where(d == 16, -1, edge)
        above = tl.sum(tl.where(key[:, None] > edge[None, :], weight[:, None], 0.0), axis=0)
        tl.store(sums_out + (row * BLOCKS + block) * 32 + d, above)


@triton.jit
def scan(
    logits, banned, seen, numbers, seed, count, best_in, best, best_at, prefixes,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, BLOCKS_UP: tl.constexpr, ROWS: tl.constexpr,
    NOISE: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, PENALTY: tl.constexpr, KEY_BITS: tl.constexpr,
    ROUNDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The best score of each block and its id, the lowest of equal ones; with NOISE after the filters."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    block = tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    ok = at < VOCAB
    score = _scores(logits, banned, seen, numbers, row, at, ok, VOCAB, PENALTY)
    if NOISE:
        temperature = tl.load(numbers + row * 4)
        key = _key(score, KEY_BITS)
        greedy = temperature <= 0
        gap = (score - _row_max(best_in, row, BLOCKS, BLOCKS_UP)) / tl.where(greedy, 1.0, temperature)
        left = gap >= tl.log(tl.load(numbers + row * 4 + 2))
        if TOP_K:
            left = left & (key >= tl.load(prefixes + (ROUNDS % 2) * 2 * ROWS + row))
        if TOP_P:
            left = left & (key >= tl.load(prefixes + (ROUNDS % 2) * 2 * ROWS + ROWS + row))
        random = tl.randint(tl.load(seed + row) + tl.load(count + row).to(tl.int64) * 0x9E3779B97F4A7C, at)
        uniform = ((random.to(tl.uint32, bitcast=True) >> 8).to(tl.float32) + 0.5) * (2.0**-24)
        gumbel = -tl.log(-tl.log(uniform))
        score = tl.where(greedy, score, tl.where(left, gap + gumbel, float("-inf")))
    top = tl.max(score, axis=0)
    tl.store(best + row * BLOCKS + block, top)
    tl.store(best_at + row * BLOCKS + block, tl.min(tl.where(score == top, at, VOCAB), axis=0))


@triton.jit
def pick(
    best, best_at, token, alive, count, seqlens, stops, seen,
    VOCAB: tl.constexpr, BLOCKS: tl.constexpr, BLOCKS_UP: tl.constexpr, ROWS: tl.constexpr, FED: tl.constexpr,
    NUM_STOPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write the row's token unless the row is dead; FED says that a token was fed before, so lengths move on too."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    b = tl.arange(0, BLOCKS_UP)
    score = tl.load(best + row * BLOCKS + b, b < BLOCKS, other=float("-inf"))
    at = tl.load(best_at + row * BLOCKS + b, b < BLOCKS, other=VOCAB)
    top = tl.max(score, axis=0)
    # With logits of NaN nothing is the best: the last id, inside the tables whatever happened.
    drawn = tl.minimum(tl.min(tl.where(score == top, at, VOCAB), axis=0), VOCAB - 1).to(tl.int64)
    going = tl.load(alive + row)
    if FED:
        tl.store(seqlens + row, tl.load(seqlens + row) + going)
        tl.store(seqlens + ROWS + row, tl.load(seqlens + ROWS + row) + going)
    s = tl.arange(0, NUM_STOPS)
    stopped = tl.max((tl.load(stops + s) == drawn).to(tl.int32), axis=0)
    if going != 0:
        tl.store(token + row, drawn)
        tl.store(seen + row.to(tl.int64) * VOCAB + drawn, tl.full([], 1, tl.uint8))
        tl.store(count + row, tl.load(count + row) + 1)
        tl.store(alive + row, 1 - stopped)


def draw_tokens(logits: Tensor, draws: Draws, kind: DrawKind, *, fed: bool = True, pdl: bool = False) -> None:
    """Draw a token for each row of `logits` (rows, vocab_size) into `draws.token`, and move its counters on.

    Changes: `token`, `alive`, `count`, `seen` and, if a token was `fed`, `seqlens`; rows that are not alive stay.
    """
    rows, vocab = logits.shape
    blocks = -(-vocab // BLOCK)
    key_bits = 16 if logits.dtype == torch.bfloat16 else 32
    rounds = key_bits // 4
    sizes = {"VOCAB": vocab, "BLOCKS": blocks, "BLOCKS_UP": next_power_of_2(blocks), "ROWS": rows}
    common = sizes | {"BLOCK": BLOCK, "PENALTY": kind.penalty, "KEY_BITS": key_bits, "ROUNDS": rounds}
    d = draws
    ids = (logits, d.banned, d.seen, d.numbers)
    launch = {"PDL": pdl, "num_warps": 4, "launch_pdl": pdl}
    filters = {"TOP_K": kind.top_k and not kind.greedy, "TOP_P": kind.top_p and not kind.greedy}
    likeliest, drawn = d.best, d.best_drawn

    def scan_blocks(best: Tensor, *, noise: bool) -> None:
        given = (*ids, d.seed, d.count, likeliest, best, d.best_at, d.prefix)
        scan[(rows, blocks)](*given, NOISE=noise, **filters, **common, **launch)

    scan_blocks(likeliest, noise=False)
    if not kind.greedy:
        for by_mass, wanted in ((False, kind.top_k), (True, kind.top_p)):
            for i in range(rounds + 1) if wanted else ():
                given = (*ids, d.top_k, likeliest, d.sums[(i + 1) % 2], d.sums[i % 2], d.prefix, d.mass)
                search = {"BY_MASS": by_mass, "AFTER_TOP_K": kind.top_k, "ROUND": i}
                narrow[(rows, blocks if i < rounds else 1)](*given, **search, **common, **launch)
        scan_blocks(drawn, noise=True)
    pick[(rows,)](
        likeliest if kind.greedy else drawn,
        d.best_at,
        d.token,
        d.alive,
        d.count,
        d.seqlens,
        d.stops,
        d.seen,
        FED=fed,
        NUM_STOPS=MAX_STOPS,
        **sizes,
        **launch,
    )
