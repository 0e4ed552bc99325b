"""Nano's `tokenizer.json`, made from the metadata of a SmolLM2 GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# Appended to SmolLM2's vocabulary, so they take the ids right after it: 49152, 49153, 49154.
IMAGE_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>")


def build_tokenizer(gguf_path: str | Path, out_path: str | Path) -> Tokenizer:
    """Write SmolLM2's byte-level BPE with the image tokens added as a `tokenizer.json`.

    The vocabulary, merges and control tokens come from the GGUF file; the pre-tokenizer (digits one by one, then
    GPT-2's split) is not stored there beyond its name, `smollm`.

    Args:
        gguf_path: SmolLM2 in GGUF.     out_path: the file to write; its folder is made.
    Returns: the tokenizer.
    Raises: ValueError if the file holds another kind of tokenizer.
    """
    reader = GGUFReader(gguf_path)
    kind, split = _metadata(reader, "tokenizer.ggml.model"), _metadata(reader, "tokenizer.ggml.pre")
    if (kind, split) != ("gpt2", "smollm"):
        raise ValueError(f'{gguf_path} holds a "{kind}" tokenizer split by "{split}"; take a GGUF file of SmolLM2')
    tokens: list[str] = _metadata(reader, "tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in _metadata(reader, "tokenizer.ggml.merges")]
    types = _metadata(reader, "tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL]

    # No `unk_token`: SmolLM2's would be <|endoftext|>, a control token that a stray byte of user text would then give.
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(token, normalized=False, special=True) for token in (*control, *IMAGE_TOKENS)]
    tokenizer.add_special_tokens(added)
    Path(out_path).parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out_path), pretty=False)
    return tokenizer


def _metadata(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"the GGUF file misses {key}; take a file that holds its tokenizer")
    return field.contents()
