"""Chat templates: turns of text and images to ids, piece by piece.

A recurrent model carries its state from turn to turn, so a prompt is built in the pieces that the state has not seen:
the first turn (with the system block), then for each further turn what closes the previous reply and opens the next.
The pieces, with the replies between them, equal the whole conversation (`conversation_ids`).

Control tokens enter by id; everything that a person typed goes through `Tokenizer.encode`, which reads it as text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mmmamba.config import ModelConfig
from mmmamba.tokenizer import Tokenizer

IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"


class PromptError(ValueError):
    """A turn that fits no template or model, with what came and what fits."""


@dataclass(frozen=True)
class Template:
    """A chat format of the ChatML family: `<|im_start|>role`, newline, text, `<|im_end|>`, `separator`.

    `bos` is the control token that opens a conversation, if any; `default_system` the system message of a chat that
    brings none ("" leaves the block out); `stop_tokens` end a reply. `system_block`: a system message is a block of its
    own; else it stands before the first question.
    """

    name: str
    default_system: str
    bos: str | None
    separator: str
    stop_tokens: tuple[str, ...]
    system_block: bool = True


TEMPLATES = {
    template.name: template
    for template in (
        # HoVLE and mmMamba: InternVL's conversation.py (github.com/OpenGVLab/InternVL), whose default system message
        # this is. It says: you are a multimodal model by Shanghai AI Laboratory and SenseTime, named InternVL.
        Template(
            name="internlm2-chat",
            default_system=(
                "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
                "是一个有用无害的人工智能助手。"
            ),
            bos="<s>",
            separator="",
            stop_tokens=(TURN_END, TURN_START, "</s>"),
        ),
        # SmolLM2's format, trained without a system block in nano, whose linear student is lost behind one.
        Template(
            name="chatml",
            default_system="",
            bos=None,
            separator="\n",
            stop_tokens=(TURN_END, TURN_START, "<|endoftext|>"),
            system_block=False,
        ),
    )
}


@dataclass(frozen=True)
class Turn:
    """One question and its answer. `image_tiles`: the tiles of every new image, thumbnail included, in order.
    `image_places`: where they stand, see `encode_user_turn`. `spelled`: the reply is written in single characters."""

    text: str
    reply: str | None = None
    image_tiles: tuple[int, ...] = ()
    image_places: tuple[int, ...] | None = None
    spelled: bool = False


def get_template(name: str) -> Template:
    """The template of `config.template`.  Raises: PromptError, naming the known ones."""
    try:
        return TEMPLATES[name]
    except KeyError:
        known = ", ".join(f'"{known}"' for known in TEMPLATES)
        raise PromptError(f'template "{name}" is not known; config.json may name {known}') from None


def stop_token_ids(tokenizer: Tokenizer, config: ModelConfig) -> tuple[int, ...]:
    """Ids that end a reply; the first is `<|im_end|>`.  Raises: TokenizerError if the tokenizer lacks that one."""
    _, *others = get_template(config.template).stop_tokens
    known = [tokenizer.token_id(name) for name in others if name in tokenizer.control_tokens]
    return tokenizer.token_id(TURN_END), *known


def encode_user_turn(
    tokenizer: Tokenizer,
    config: ModelConfig,
    text: str,
    image_tiles: Sequence[int] = (),
    *,
    first: bool,
    system: str | None = None,
    images_before: int = 0,
    image_places: Sequence[int] | None = None,
) -> list[int]:
    """Ids that ask a question, up to where the model's reply begins.

    Args:
        text: what the user typed; read as text, control tokens in it too.
        image_tiles: number of tiles (thumbnail included) of every new image, in order; the images stand before the
            text. A chat's only image is unnumbered, several are "Image-1: ", "Image-2: ", ... as in InternVL.
        first: the conversation begins here: BOS and system block come first. Otherwise what closes the previous
            reply does (`<|im_end|>`), for a state that has seen that reply and no more.
        system: system message of a first turn; None takes the template's, "" leaves the block out.
        images_before: images of earlier turns, so that numbers go on.
        image_places: for each image the character of the text before which it stands, in order, as InternVL's training
            data places its "<image>"; such images get neither number nor line break. None: before the text, as above.
    Raises: PromptError for a tile count below 1, places that do not fit, or a tokenizer that does not fit `config`;
        TokenizerError if the tokenizer lacks a control token.
    """
    template = get_template(config.template)
    if system is not None and not first:
        raise PromptError("a system message can only stand in the first turn; pass system=None or first=True")
    parts: list[str | int] = []
    start, end = tokenizer.token_id(TURN_START), tokenizer.token_id(TURN_END)
    if first:
        if template.bos is not None:
            parts.append(tokenizer.token_id(template.bos))
        system = template.default_system if system is None else system
        if system and template.system_block:
            parts += [start, f"system\n{system}", end, template.separator]
        elif system:
            said = f"{system}\n\n"
            text = said + text
            image_places = None if image_places is None else [place + len(said) for place in image_places]
    else:
        parts += [end, template.separator]
    if image_places is None:
        asked = [*_image_parts(tokenizer, config, image_tiles, images_before), text]
    else:
        asked = _placed_parts(tokenizer, config, text, image_tiles, image_places)
    parts += [start, "user\n", *asked, end]
    parts += [template.separator, start, _OPENER]
    return _encode(tokenizer, parts)


def encode_reply(tokenizer: Tokenizer, reply: str) -> list[int]:
    """Ids of a given reply as they follow `encode_user_turn`, without the closing `<|im_end|>`.

    A tokenizer that puts a space before its text would put one before the reply; encoding the opener along with it
    avoids that, as the published training did.
    """
    opener, joint = tokenizer.encode(_OPENER), tokenizer.encode(_OPENER + reply)
    return joint[len(opener) :] if joint[: len(opener)] == opener else tokenizer.encode(reply)


def conversation_ids(
    tokenizer: Tokenizer, config: ModelConfig, turns: Sequence[Turn], *, system: str | None = None
) -> tuple[list[int], list[bool]]:
    """A whole conversation, for training or for starting anew with its history.

    Args:
        turns: at least one; only the last may lack its reply, and the ids then end where the reply begins.
    Returns: ids, and for each id whether it is the assistant's to say (the reply and its closing `<|im_end|>`).
    Raises: PromptError, TokenizerError as `encode_user_turn`.
    """
    if not turns:
        raise PromptError("a conversation needs at least one turn; none was given")
    ids: list[int] = []
    mask: list[bool] = []
    images = 0
    for i, turn in enumerate(turns):
        first = i == 0
        asked = encode_user_turn(
            tokenizer,
            config,
            turn.text,
            turn.image_tiles,
            first=first,
            system=system if first else None,
            images_before=images,
            image_places=turn.image_places,
        )
        ids += asked
        mask += [not first, *[False] * (len(asked) - 1)]  # the id that closes the previous reply comes first
        images += len(turn.image_tiles)
        if turn.reply is None:
            if i < len(turns) - 1:
                raise PromptError(f"turn {i + 1} of {len(turns)} has no reply; only the last turn may lack it")
            return ids, mask
        pieces = turn.reply if turn.spelled else (turn.reply,)
        said = [id for piece in pieces for id in encode_reply(tokenizer, piece)]
        ids += said
        mask += [True] * len(said)
    closing = _encode(tokenizer, [tokenizer.token_id(TURN_END), get_template(config.template).separator])
    return ids + closing, mask + [True] + [False] * (len(closing) - 1)


_OPENER = "assistant\n"


def _image_parts(
    tokenizer: Tokenizer, config: ModelConfig, image_tiles: Sequence[int], images_before: int
) -> list[str | int]:
    parts: list[str | int] = []
    numbered = images_before + len(image_tiles) > 1
    for number, num_tiles in enumerate(image_tiles, start=images_before + 1):
        label = f"Image-{number}: " if numbered else ""
        parts += [label, *_image_ids(tokenizer, config, num_tiles, number), "\n"]
    return parts


def _placed_parts(
    tokenizer: Tokenizer, config: ModelConfig, text: str, image_tiles: Sequence[int], image_places: Sequence[int]
) -> list[str | int]:
    bounds = [0, *image_places, len(text)]
    if len(image_places) != len(image_tiles) or bounds != sorted(bounds):
        raise PromptError(
            f"image_places={list(image_places)} for {len(image_tiles)} images in {len(text)} characters; give one "
            "place an image, in order"
        )
    parts: list[str | int] = [text[: bounds[1]]]
    for number, num_tiles in enumerate(image_tiles, start=1):
        parts += [*_image_ids(tokenizer, config, num_tiles, number), text[bounds[number] : bounds[number + 1]]]
    return parts


def _image_ids(tokenizer: Tokenizer, config: ModelConfig, num_tiles: int, number: int) -> list[int]:
    start, end, context = (tokenizer.token_id(name) for name in (IMAGE_START, IMAGE_END, IMAGE_CONTEXT))
    if context != config.embedding.img_context_token_id:
        raise PromptError(
            f"{IMAGE_CONTEXT} is id {context} in the tokenizer and {config.embedding.img_context_token_id} in the "
            "model's config (img_context_token_id); take the tokenizer files of the same checkpoint"
        )
    if num_tiles < 1:
        raise PromptError(f"image {number} has {num_tiles} tiles; an image has at least 1")
    return [start, *[context] * (num_tiles * config.tokens_per_tile), end]


def _encode(tokenizer: Tokenizer, parts: Iterable[str | int]) -> list[int]:
    """Ids of control tokens (given as ids) and texts; neighbouring texts are encoded as one, as the trained-on
    tokenizers do between two control tokens."""
    ids: list[int] = []
    text = ""
    for part in (*parts, None):
        if isinstance(part, str):
            text += part
            continue
        if text:
            ids += tokenizer.encode(text)
            text = ""
        if part is not None:
            ids.append(part)
    return ids
