"""Tokenizers without remote code: `tokenizer.json` (byte-level BPE) and InternLM2's sentencepiece `tokenizer.model`.

Both give one promise: `encode` reads text only as text. A control token (`<|im_end|>`, `<img>`, ...) enters a prompt
by its id, taken with `token_id`, never because someone typed its name.
"""

from __future__ import annotations

import codecs
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import pre_tokenizers

JSON_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"


class TokenizerError(ValueError):
    """Tokenizer files that are missing or cannot be read, or a control token that they do not have."""


class Tokenizer(ABC):
    """Text to ids and back. `control_tokens` maps the name of every control token to its id."""

    control_tokens: dict[str, int]
    vocab_size: int  # ids run below it; the model's embedding may have more rows, as padding
    strips_leading_space: bool = False  # the encoder puts a space before the text, so decoding takes one away

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without a BOS and never with a control token, whatever the text holds."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """What a token stands for, in UTF-8; often a part of a character. Empty for control and unknown ids."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; control tokens give nothing, bytes that are no UTF-8 give U+FFFD."""
        decoder = StreamDecoder(self)
        return "".join([decoder.push(token) for token in ids]) + decoder.flush()

    def token_id(self, name: str) -> int:
        """Id of the control token `name`.  Raises: TokenizerError, naming the known ones."""
        try:
            return self.control_tokens[name]
        except KeyError:
            known = ", ".join(sorted(self.control_tokens)[:40]) or "none"
            raise TokenizerError(f'the tokenizer has no control token "{name}"; it has: {known}') from None


class StreamDecoder:
    """Turns ids into text as they come, holding back the bytes of a character until it is whole.

    The cost of a token does not depend on how many came before it: at most three bytes are kept. What the pushes
    and `flush` return, put together, equals `Tokenizer.decode` of the same ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = tokenizer.strips_leading_space

    def push(self, token: int) -> str:
        """New text after this token; empty while a character is incomplete and for control tokens."""
        return self._strip(self._utf8.decode(self._tokenizer.token_bytes(token)))

    def flush(self) -> str:
        """The rest at the end of a reply: U+FFFD if it broke off inside a character, else nothing."""
        rest = self._strip(self._utf8.decode(b"", final=True))
        self._utf8.reset()
        return rest

    def _strip(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ")
        return text


class JsonTokenizer(Tokenizer):
    """Byte-level BPE from a `tokenizer.json`. Every added token counts as a control token."""

    def __init__(self, path: Path) -> None:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            for token in data["added_tokens"]:
                token["special"] = True  # only special tokens are left alone in text (see encode_special_tokens)
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
        except Exception as error:  # the tokenizers library raises bare Exception
            raise TokenizerError(
                f"{path} is not a tokenizer.json that can be read ({error}); fetch it again"
            ) from error
        if (data.get("decoder") or {}).get("type") != "ByteLevel":
            raise TokenizerError(f"{path} is not a byte-level tokenizer; only a ByteLevel decoder is supported")
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.control_tokens = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items()}
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._control_ids = frozenset(self.control_tokens.values())
        self._byte_of = _byte_alphabet()

    def encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(_valid_unicode(text), add_special_tokens=False).ids
        # A vocabulary's unknown token can be a control token too (it is in GPT-2's family): leave it out.
        return [i for i in ids if i not in self._control_ids]

    def token_bytes(self, token: int) -> bytes:
        piece = None if token < 0 or token in self._control_ids else self._tokenizer.id_to_token(token)
        return bytes(self._byte_of[char] for char in piece) if piece else b""


class SentencePieceTokenizer(Tokenizer):
    """InternLM2's tokenizer: a sentencepiece model and the tokens that JSON files beside it add.

    Sentencepiece reads *user-defined* pieces out of the text, and InternLM2's control tokens are such pieces
    (`<|im_start|>` is the piece `[UNUSED_TOKEN_146]`). So before the model is loaded they become sentencepiece's
    *control* pieces, which text never gives; user-defined runs of spaces, digits or signs stay as they are.
    """

    def __init__(self, path: Path) -> None:
        try:
            model = path.read_bytes()
            pieces = _read_pieces(model)
            names = _added_tokens(path.parent)
            names |= {piece: i for i, (piece, kind) in enumerate(pieces) if _is_control(piece, kind)}
            special = _special_names(path.parent)
            names |= {piece: i for i, (piece, _) in enumerate(pieces) if piece in special and piece not in names}
            processor = sentencepiece.SentencePieceProcessor()
            unknown = {i for i, (_, kind) in enumerate(pieces) if kind == _UNKNOWN}  # sentencepiece needs this type
            processor.LoadFromSerializedProto(_as_control(model, set(names.values()) - unknown))
        except (OSError, RuntimeError, IndexError, UnicodeDecodeError, TypeError) as error:
            raise TokenizerError(
                f"{path} is not a sentencepiece model that can be read ({error}); fetch it again"
            ) from error
        self._processor = processor
        self._unknown_id = processor.unk_id()
        self.control_tokens = dict(sorted(names.items(), key=lambda item: item[1]))
        self._control_ids = frozenset(names.values()) - {self._unknown_id}
        self.vocab_size = max(len(pieces), *(i + 1 for i in names.values()), 0)
        self.strips_leading_space = processor.EncodeAsPieces("a")[0].startswith("▁")

    def encode(self, text: str) -> list[int]:
        # The unknown token stays: it says that something was there, and steers nothing.
        return [i for i in self._processor.EncodeAsIds(_valid_unicode(text)) if i not in self._control_ids]

    def token_bytes(self, token: int) -> bytes:
        if not 0 <= token < self._processor.GetPieceSize() or token in self._control_ids:
            return b""
        if token == self._unknown_id:
            return "\ufffd".encode()
        piece = self._processor.IdToPiece(token)
        if self._processor.IsByte(token):
            return bytes([int(piece[3:-1], 16)])  # "<0xE7>"
        return piece.replace("▁", " ").encode()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
        path: the checkpoint's directory (or one below it: the bundled models share one tokenizer), or the file.
            `tokenizer.model` is taken before `tokenizer.json`.
    Raises: TokenizerError if neither is there or the file cannot be read.
    """
    path = Path(path)
    folders = [path, path.parent] if path.is_dir() else []
    candidates = [folder / name for folder in folders for name in (SENTENCEPIECE_FILE, JSON_FILE)] or [path]
    for file in candidates:
        if file.is_file():
            return JsonTokenizer(file) if file.suffix == ".json" else SentencePieceTokenizer(file)
    raise TokenizerError(
        f"{path} holds no {SENTENCEPIECE_FILE} and no {JSON_FILE}; copy the tokenizer files of the checkpoint there"
    )


def _valid_unicode(text: str) -> str:
    """Surrogate pairs joined and lone ones replaced: neither library takes them, and JSON input can hold them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _byte_alphabet() -> dict[str, int]:
    """The byte behind each character of a byte-level vocabulary.

    Printable bytes of Latin-1 stand for themselves, the others follow in order from U+0100 on.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {char: ord(char) for char in alphabet if ord(char) < 256}
    others = [byte for byte in range(256) if byte not in own.values()]
    return own | dict(zip(alphabet[len(own) :], others, strict=True))


# --- sentencepiece models and the files beside them ---

# Types of a piece in sentencepiece_model.proto.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_PIECES, _PIECE_TEXT, _PIECE_TYPE = 1, 1, 3  # field numbers


def _is_control(piece: str, kind: int) -> bool:
    return kind in (_UNKNOWN, _CONTROL) or (kind == _USER_DEFINED and any(char.isalpha() for char in piece))


def _added_tokens(folder: Path) -> dict[str, int]:
    """Name -> id of the tokens in `added_tokens.json` and in `tokenizer_config.json`'s `added_tokens_decoder`."""
    decoder = _read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    names = {token["content"]: int(i) for i, token in decoder.items()}
    return names | {name: int(i) for name, i in _read_json(folder / "added_tokens.json").items()}


def _special_names(folder: Path) -> set[str]:
    """Names in `special_tokens_map.json`: strings, lists of strings, or objects with `content`."""
    names: set[str] = set()
    for value in _read_json(folder / "special_tokens_map.json").values():
        for token in value if isinstance(value, list) else [value]:
            names.add(token["content"] if isinstance(token, dict) else token)
    return names


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(data, dict):
        raise TokenizerError(f"{path} holds a {type(data).__name__}, not an object; fetch it again")
    return data


def _read_pieces(model: bytes) -> list[tuple[str, int]]:
    """Text and type of every piece, by id.

    Read by hand because sentencepiece does not tell which pieces are user-defined, and its schema for Python needs
    one exact major version of protobuf.
    """
    pieces = []
    for number, _, start, end in _fields(model):
        if number == _PIECES:
            text, kind = "", 1
            for inner, _, inner_start, inner_end in _fields(model, start, end):
                if inner == _PIECE_TEXT:
                    text = model[inner_start:inner_end].decode()
                elif inner == _PIECE_TYPE:
                    kind = model[inner_start]
            pieces.append((text, kind))
    return pieces


def _as_control(model: bytes, ids: set[int]) -> bytes:
    """`model` with the pieces `ids` made control pieces."""
    out = []
    piece = 0
    for number, head, start, end in _fields(model):
        body = model[start:end]
        if number == _PIECES:
            if piece in ids:
                # The last value of a field counts, so the new type only needs to come after the old one.
                body += bytes([_PIECE_TYPE << 3, _CONTROL])
            piece += 1
            out.append(bytes([_PIECES << 3 | 2]) + _varint(len(body)) + body)
        else:
            out.append(model[head:end])
    return b"".join(out)


def _fields(data: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int, int, int]]:
    """Fields of a protobuf message: number, where the field starts, and where its value starts and ends."""
    at, end = start, len(data) if end is None else end
    while at < end:
        head = at
        tag, at = _read_varint(data, at)
        kind = tag & 7
        if kind == 0:
            _, stop = _read_varint(data, at)
        elif kind == 2:
            length, at = _read_varint(data, at)
            stop = at + length
        elif kind in (1, 5):
            stop = at + (8 if kind == 1 else 4)
        else:
            raise IndexError(f"byte {head} starts no protobuf field")
        if stop > end:
            raise IndexError(f"a field at byte {head} runs past the end")
        yield tag >> 3, head, at, stop
        at = stop


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
