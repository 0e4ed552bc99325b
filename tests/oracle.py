"""The network once more, written plainly from golden/README.md: numpy in float64, published names, loops over positions
and heads, one sequence, no state. Slow and independent of the package, so that both can hardly be wrong alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray


def logits(w: Mapping[str, Array], config: dict[str, Any], input_ids: list[int], tiles: Array | None = None) -> Array:
    """(seqlen, vocab_size) of one sequence. `w` and `config` as in a published checkpoint; tiles (n, 3, side, side)."""
    w = {name: np.asarray(t, np.float64) for name, t in w.items()}
    x = holistic_embedding(w, config, input_ids, tiles)
    x = stack(x, w, "language_model.model.layers.", config["llm_config"])
    x = rms_norm(x, w["language_model.model.norm.weight"], config["llm_config"]["rms_norm_eps"])
    tied = config["llm_config"].get("tie_word_embeddings", False)
    head = w["embedding_model.llm_text_embeddings.weight" if tied else "language_model.output.weight"]
    return x @ head.T


def holistic_embedding(
    w: Mapping[str, Array], config: dict[str, Any], input_ids: list[int], tiles: Array | None
) -> Array:
    """Inputs of the language model, (seqlen, hidden_size)."""
    e = config["embedding_config"]
    post = e["pixel_shuffle_loc"] == "post"
    rows: list[Array] = []  # of the embedding stack
    image_rows: list[Array] = []
    if tiles is not None:
        for tile in np.asarray(tiles, np.float64):
            patches = stem(tile, w, e)
            image_rows += list(patches if post else shuffled(patches, w))
    owner: list[int] = []  # for every row the token that it belongs to
    coming = iter(image_rows)
    for i, token in enumerate(input_ids):
        if token == e["img_context_token_id"]:
            new = [next(coming) for _ in range(4 if post else 1)]
        elif token >= e["llm_vocab_size"]:
            new = [w["embedding_model.special_text_embeddings.weight"][token - e["llm_vocab_size"]]]
        else:
            new = [w["embedding_model.llm_text_embeddings.weight"][token]]
        rows += new
        owner += [i] * len(new)
    x = stack(np.stack(rows), w, "embedding_model.encoder.", e)

    out = np.zeros((len(input_ids), x.shape[1]))
    for row, i in zip(x, owner, strict=True):
        out[i] = row
    if post and tiles is not None:
        is_image = [token == e["img_context_token_id"] for token in input_ids]
        of_images = np.stack([row for row, i in zip(x, owner, strict=True) if is_image[i]])
        out[is_image] = np.concatenate([shuffled(tile, w) for tile in np.split(of_images, len(tiles))])
    if config.get("normalize_encoder_output", False):
        out /= np.sqrt((out**2).sum(axis=1, keepdims=True))
    return out


def stem(tile: Array, w: Mapping[str, Array], e: dict[str, Any]) -> Array:
    """(3, side, side) to (patches, hidden_size), row by row."""
    name, size = "embedding_model.vision_embeddings.", e["patch_size"]
    kernel, bias = w[name + "patch_embedding.weight"], w[name + "patch_embedding.bias"]
    grid = tile.shape[1] // size
    trained = e["image_size"] // size
    positions = w[name + "position_embedding"][0, 1:].reshape(trained, trained, -1)
    if grid != trained:
        weights = bicubic_weights(trained, grid)
        positions = np.einsum("ri,cj,ijd->rcd", weights, weights, positions)
    out = []
    for r in range(grid):
        for c in range(grid):
            patch = tile[:, r * size : (r + 1) * size, c * size : (c + 1) * size]
            out.append((kernel * patch).sum(axis=(1, 2, 3)) + bias + positions[r, c])
    return np.stack(out)


def bicubic_weights(old: int, new: int) -> Array:
    """(new, old): cubic convolution with a = -0.75 at pixel centres, borders repeated."""
    a = -0.75
    weights = np.zeros((new, old))
    for i in range(new):
        at = (i + 0.5) * old / new - 0.5
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            d = abs(at - j)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            weights[i, min(max(j, 0), old - 1)] += near if d <= 1 else far
    return weights


def shuffled(patches: Array, w: Mapping[str, Array]) -> Array:
    """Pixel shuffle and its projection: (patches, dim) of one tile to (patches / 4, dim)."""
    side = math.isqrt(len(patches))
    grid = patches.reshape(side, side, -1)
    x = np.stack(
        [
            np.concatenate(
                [grid[2 * q, 2 * p], grid[2 * q, 2 * p + 1], grid[2 * q + 1, 2 * p], grid[2 * q + 1, 2 * p + 1]]
            )
            for q in range(side // 2)
            for p in range(side // 2)
        ]
    )
    name = "embedding_model.pixel_shuffle_proj."
    x = x @ w[name + "0.weight"].T + w[name + "0.bias"]
    x = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return x @ w[name + "2.weight"].T + w[name + "2.bias"]


def stack(x: Array, w: Mapping[str, Array], prefix: str, c: dict[str, Any]) -> Array:
    for i in range(c["num_hidden_layers"]):
        layer = {name.removeprefix(f"{prefix}{i}."): t for name, t in w.items() if name.startswith(f"{prefix}{i}.")}
        mixer = attention if c.get("layers_block_type", ["mha"] * (i + 1))[i] == "mha" else mamba2
        x = x + mixer(rms_norm(x, layer["attention_norm.weight"], c["rms_norm_eps"]), layer, c)
        h = rms_norm(x, layer["ffn_norm.weight"], c["rms_norm_eps"])
        gate = silu(h @ layer["feed_forward.w1.weight"].T)
        x = x + (gate * (h @ layer["feed_forward.w3.weight"].T)) @ layer["feed_forward.w2.weight"].T
    return x


def attention(x: Array, layer: Mapping[str, Array], c: dict[str, Any]) -> Array:
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    d, group = c["hidden_size"] // heads, heads // kv_heads
    grouped = (x @ layer["attention.wqkv.weight"].T).reshape(len(x), kv_heads, group + 2, d)
    out = []
    for head in range(heads):
        block = grouped[:, head // group]
        q, k, v = rotated(block[:, head % group], c), rotated(block[:, group], c), block[:, group + 1]
        y = np.zeros_like(v)
        for t in range(len(x)):
            scores = k[: t + 1] @ q[t] / math.sqrt(d)
            p = np.exp(scores - scores.max())
            y[t] = (p / p.sum()) @ v[: t + 1]
        out.append(y)
    return np.concatenate(out, axis=1) @ layer["attention.wo.weight"].T


def rotated(x: Array, c: dict[str, Any]) -> Array:
    """Rotary positions for (seqlen, head_dim): the two halves of a head turn against each other."""
    length, d = x.shape
    base, scaling, limit = c["rope_theta"], c.get("rope_scaling") or {}, c["max_position_embeddings"]
    positions = np.arange(length, dtype=np.float64)
    if scaling.get("type") == "linear":
        positions /= scaling["factor"]
    if scaling.get("type") == "dynamic" and length > limit:
        base = base * (scaling["factor"] * length / limit - (scaling["factor"] - 1)) ** (d / (d - 2))
    out = np.zeros_like(x)
    for i in range(d // 2):
        angle = positions / base ** (2 * i / d)
        a, b = x[:, i], x[:, i + d // 2]
        out[:, i] = a * np.cos(angle) - b * np.sin(angle)
        out[:, i + d // 2] = b * np.cos(angle) + a * np.sin(angle)
    return out


def mamba2(x: Array, layer: Mapping[str, Array], c: dict[str, Any]) -> Array:
    heads, kv_heads, hidden = c["num_attention_heads"], c["num_key_value_heads"], c["hidden_size"]
    d = hidden // heads
    kv = kv_heads * d
    projected = x @ layer["attention.wvkqgdt.weight"].T
    vkq, gate, dt = np.split(projected, [2 * kv + hidden, 2 * kv + 2 * hidden], axis=1)
    taps = layer["attention.conv1d.weight"][:, 0]
    before = np.concatenate([np.zeros_like(vkq[:1]), vkq[:-1]])
    vkq = silu(before * taps[:, 0] + vkq * taps[:, 1] + layer["attention.conv1d.bias"])
    v, k, q = np.split(vkq, [kv, 2 * kv], axis=1)
    dt = np.log1p(np.exp(dt + layer["attention.dt_bias"]))
    out = []
    for head in range(heads):
        own, shared = (
            slice(head * d, (head + 1) * d),
            slice(head // (heads // kv_heads) * d, (head // (heads // kv_heads) + 1) * d),
        )
        y = recurrence(
            v[:, shared], dt[:, head], -math.exp(layer["attention.A_log_bias"][head]), k[:, shared], q[:, own]
        )[0]
        y = rms_norm(y, layer["attention.g_norm_swish_gate.weight"], 1e-5)
        out.append(y * silu(gate[:, own]))
    return np.concatenate(out, axis=1) @ layer["attention.o_proj.weight"].T


def recurrence(x: Array, dt: Array, A: float, B: Array, C: Array, state: Array | None = None) -> tuple[Array, Array]:
    """One head: h <- exp(dt A) h + dt x B^T, y = h C. x (seqlen, p), dt (seqlen,), B, C (seqlen, n), state (p, n)."""
    h = np.zeros((x.shape[1], B.shape[1])) if state is None else np.array(state, np.float64)
    ys = []
    for t in range(len(x)):
        h = math.exp(dt[t] * A) * h + dt[t] * np.outer(x[t], B[t])
        ys.append(h @ C[t])
    return np.stack(ys), h


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return weight * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))
