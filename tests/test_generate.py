"""Prefill and streams: what ends them, what they show, and the state that they leave."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmmamba.generate import (
    CPU_PIECE,
    ModelInputs,
    PrefillCancelled,
    SamplingParams,
    StreamEvent,
    decode_one_token,
    prefill,
    stream,
)
from mmmamba.model import MMMamba
from mmmamba.state import DecodeState
from tests.helpers import (
    FIXTURES,
    IMAGE_ID,
    TOLERANCE,
    PieceTokenizer,
    ScriptedModel,
    assert_near,
    assert_same_state,
    golden_cases,
    golden_model,
    random_model,
    random_tiles,
    tiny_raw,
)

# --- phases ---


def test_prefill_refuses_a_piece_size_below_one() -> None:
    model = golden_model("post", "linear")
    with pytest.raises(ValueError, match="piece_size=0 must be 1 or more"):
        prefill(model, ModelInputs(torch.tensor([[1]])), model.new_state(), piece_size=0)


def test_prefill_refuses_what_the_model_refuses_whatever_the_pieces() -> None:
    ids = torch.tensor([[1, *[IMAGE_ID] * 8, 2, 3]])
    for piece_size in (2, 1024):
        for num_tiles in (0, 1, 3):
            model = golden_model("post", "linear")
            tiles = random_tiles(num_tiles) if num_tiles else None
            with pytest.raises(ValueError, match=r"image tokens|tiles"):
                prefill(model, ModelInputs(ids, tiles), model.new_state(), piece_size=piece_size)
        model = golden_model("post", "linear")
        with pytest.raises(ValueError, match=r"pixel_values has shape \(\d, 3, 14, 14\)"):
            prefill(model, ModelInputs(ids, random_tiles(2, 14)), model.new_state(), piece_size=piece_size)
    model = golden_model("post", "linear")
    with pytest.raises(ValueError, match="3 tiles do not divide among 2 rows"):
        prefill(model, ModelInputs(ids.expand(2, -1), random_tiles(3)), model.new_state(2))
    with pytest.raises(ValueError, match="at least one token"):
        prefill(model, ModelInputs(ids[:, :0]), model.new_state())


@pytest.mark.parametrize(("folder", "kind"), FIXTURES)
def test_batched_prefill_in_pieces(folder: str, kind: str) -> None:
    """Tiles come row by row, but a piece needs those of all rows."""
    model = golden_model(folder, kind, torch.float64)
    ids = golden_cases(folder)["tiles"]["input_ids"].repeat(2, 1)
    ids[1, -3:] = 7
    inputs = ModelInputs(ids, random_tiles(6))
    state, whole = model.new_state(2), model.new_state(2)
    wanted = prefill(model, inputs, whole)
    for row in range(2):
        alone = model.new_state()
        one = ModelInputs(ids[row : row + 1], random_tiles(6)[3 * row : 3 * row + 3])
        assert_near(f"row {row}", prefill(model, one, alone), wanted[row : row + 1], TOLERANCE[torch.float64])
    logits = prefill(model, inputs, state, piece_size=3)
    assert (state.num_image_tokens, state.num_text_tokens) == (12, 12)  # a row
    assert_near("logits", logits, wanted, TOLERANCE[torch.float64])
    assert_same_state(state, whole, TOLERANCE[torch.float64])


def test_prefill_that_begins_inside_a_tile_knows_its_lengths() -> None:
    """Past the trained positions the base depends on the length: tokens embedded with the last call count once."""
    raw = tiny_raw(
        teacher=True,
        embedding={"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
    )
    model = random_model(raw)
    ids = torch.tensor([[3, 4, 5, 44, 44, 44, 44, 6, 7]])
    seen: list[int] = []
    stack = model.embedding
    tables = stack.rotary.tables

    def spy(*args: Any, total_seqlen: int, **kwargs: Any) -> Any:
        seen.append(total_seqlen)
        return tables(*args, total_seqlen=total_seqlen, **kwargs)

    stack.rotary.tables = spy  # type: ignore[method-assign]
    state = model.new_state()
    prefill(model, ModelInputs(ids[:, :5], random_tiles(1)), state)
    prefill(model, ModelInputs(ids[:, 5:]), state)
    # Three tokens and a whole tile of 16 patches; then two more tokens.
    assert seen == [19, 21]
    assert state.embedding.seqlen == 21


# --- streams ---


def run(script: list[bytes], stops: tuple[int, ...] = (), **options: Any) -> tuple[list[StreamEvent], ScriptedModel]:
    """Stream a reply of the given pieces; every piece is a token."""
    pieces = list(dict.fromkeys([*script, b"?"]))
    model: Any = ScriptedModel([pieces.index(piece) for piece in script])
    params = options.pop("params", SamplingParams(greedy=True, max_new_tokens=len(script)))
    inputs = ModelInputs(torch.tensor([[1, 2, 3]]))
    events = list(
        stream(model, PieceTokenizer(pieces), inputs, model.new_state(), params, stop_token_ids=stops, **options)
    )
    return events, model


def check_events(events: list[StreamEvent]) -> str:
    """What holds for every stream; returns the reply."""
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish_reason is not None
    shown = ""
    for event in events:
        shown += event.text
        assert event.reply == shown, "reply is not the texts put together"
    counts = [event.num_tokens for event in events]
    assert counts == [*range(1, len(events)), len(events) - 1]
    elapsed = [event.elapsed_ms for event in events]
    assert elapsed == sorted(elapsed)
    for event in events:
        if event.num_tokens:
            assert event.ttft_ms is not None
            assert 0 < event.ttft_ms <= event.elapsed_ms
            assert event.ttft_ms == events[0].ttft_ms
        if event.num_tokens > 1:
            assert event.tok_per_sec is not None
            assert event.tok_per_sec > 0
        else:
            assert event.tok_per_sec is None
    return shown


def test_length_ends_a_stream() -> None:
    events, model = run([b"Hel", b"lo ", b"you", b" there"], params=SamplingParams(greedy=True, max_new_tokens=3))
    assert check_events(events) == "Hello you"
    assert [event.text for event in events] == ["Hel", "lo ", "you", ""]
    assert events[-1].finish_reason == "length"
    assert model.read == [1, 2, 3, 0, 1, 2]


def test_a_stop_token_ends_a_stream_unread_and_unseen() -> None:
    events, model = run([b"a", b"b", b"<end>", b"c"], stops=(77, 2))
    assert check_events(events) == "ab"
    assert events[-1].finish_reason == "stop"
    assert model.read == [1, 2, 3, 0, 1], "the stop token is the next turn's to read"


def test_a_stop_token_at_once_gives_an_empty_reply() -> None:
    events, model = run([b"<end>"], stops=(0,))
    assert len(events) == 1
    event = events[0]
    assert (event.text, event.reply, event.num_tokens, event.ttft_ms, event.tok_per_sec) == ("", "", 0, None, None)
    assert event.finish_reason == "stop"
    assert model.read == [1, 2, 3]


@pytest.mark.parametrize(
    ("script", "stop_strings", "texts", "reason"),
    [
        ([b"a", b"STOP", b"b"], ("STOP",), ["a", "", ""], "stop"),
        ([b"a", b"S", b"T", b"O", b"P", b"b"], ("STOP",), ["a", "", "", "", "", ""], "stop"),
        ([b"aS", b"TO", b"Pb"], ("STOP",), ["a", "", "", ""], "stop"),
        ([b"aS", b"TO", b"x"], ("STOP",), ["a", "", "STOx", ""], "length"),
        ([b"aS", b"TO"], ("STOP",), ["a", "", "STO"], "length"),  # the held text comes with the end
        ([b"SSST", b"OP"], ("STOP",), ["SS", "", ""], "stop"),
        ([b"ab", b"cd"], ("d", "bc"), ["a", "", ""], "stop"),  # the first in the text, not in the list
        ([b"a", b"\n", b"\n", b"b"], ("\n\n",), ["a", "", "", ""], "stop"),
        ([b"a\xe4", b"\xb8", b"\xad", b"\xe6\x96\x87b"], ("中文",), ["a", "", "", "", ""], "stop"),
        ([b"ab"], ("",), ["ab", ""], "length"),  # an empty stop string stops nothing
        ([b"xSTO", b"STOP"], ("STOP",), ["x", "STO", ""], "stop"),
    ],
)
def test_stop_strings(script: list[bytes], stop_strings: tuple[str, ...], texts: list[str], reason: str) -> None:
    events, model = run(script, stop_strings=stop_strings)
    check_events(events)
    assert [event.text for event in events] == texts
    assert events[-1].finish_reason == reason
    # The state has seen every token that was drawn, those of the stop string too.
    assert len(model.read) == 3 + events[-1].num_tokens


def test_no_stop_string_is_ever_shown_however_it_is_cut() -> None:
    text = "aab aabaab aabaac tail"
    for stop in ("aabaac", "aabaab", "b a", "tail"):
        for cuts in itertools.combinations(range(1, len(text)), 2):
            edges = [0, *cuts, len(text)]
            script = [text[a:b].encode() for a, b in itertools.pairwise(edges)]
            events, _ = run(script, stop_strings=(stop,))
            assert events[-1].reply == text[: text.index(stop)], (stop, script)
            assert events[-1].finish_reason == "stop"


@pytest.mark.parametrize("text", ["é中文 😀!", "a👩‍👩‍👧b", "\U0001f1e9\U0001f1ea"])
def test_half_a_character_is_never_shown(text: str) -> None:
    script = [bytes([byte]) for byte in text.encode()]
    events, _ = run(script)
    assert check_events(events) == text
    assert all("\ufffd" not in event.text for event in events)
    assert [event.text for event in events if event.text] == list(text)


def test_a_reply_that_breaks_off_inside_a_character() -> None:
    events, _ = run([b"ok", b"\xf0\x9f", b"\x98"])
    assert check_events(events) == "ok\ufffd"
    assert [event.text for event in events] == ["ok", "", "", "\ufffd"]
    # A text that goes on has the broken bytes at their place.
    events, _ = run([b"ok", b"\xf0\x9f", b"!"])
    assert check_events(events) == "ok\ufffd!"


def test_rows_that_stand_for_no_token_are_never_drawn() -> None:
    class Padded(ScriptedModel):
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            logits = super().__call__(*args, **kwargs)
            logits[..., 3:] = 99.0  # padding of the vocabulary, which training never touched
            return logits

    model: Any = Padded([0, 1, 0])
    for params in (SamplingParams(greedy=True, max_new_tokens=3), SamplingParams(temperature=10, max_new_tokens=50)):
        events = list(
            stream(
                model,
                PieceTokenizer([b"a", b"b", b"c"]),
                ModelInputs(torch.tensor([[1]])),
                model.new_state(),
                params,
                stop_token_ids=(),
            )
        )
        assert events[-1].num_tokens == params.max_new_tokens
        assert set(events[-1].reply) <= set("abc")


def test_a_repetition_penalty_applies_to_the_reply() -> None:
    """To what was said in it, not to the prompt: each token falls below the next one once it is said."""

    class Flat(ScriptedModel):
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            logits = super().__call__(*args, **kwargs)
            logits[0, 0, :5] = torch.tensor([1.4, 1.3, 1.2, 1.1, 1.0])
            return logits

    pieces = PieceTokenizer([b"a", b"b", b"c", b"d", b"e"])
    replies = []
    for penalty in (1.0, 2.0):
        model: Any = Flat([0])
        params = SamplingParams(greedy=True, max_new_tokens=5, repetition_penalty=penalty)
        inputs = ModelInputs(torch.tensor([[0, 1]]))  # a penalty on the prompt would begin with c
        events = list(stream(model, pieces, inputs, model.new_state(), params, stop_token_ids=()))
        replies.append(events[-1].reply)
    assert replies == ["aaaaa", "abcde"]


def real_stream(model: MMMamba, state: DecodeState, params: SamplingParams, **options: Any) -> tuple[Any, ModelInputs]:
    """A stream of a golden model; its ids stand for letters."""
    tensors = golden_cases("post")["image"]
    tokenizer = PieceTokenizer([bytes([65 + i % 58]) for i in range(148)])  # 12 rows of the head are padding
    inputs = ModelInputs(tensors["input_ids"], tensors["pixel_values"])
    return stream(model, tokenizer, inputs, state, params, stop_token_ids=options.pop("stops", ()), **options), inputs


@pytest.mark.parametrize("kind", ["hovle", "linear", "hybrid"])
@pytest.mark.parametrize("how", ["length", "close", "cancel", "stop", "drop"])
def test_the_state_has_seen_the_prompt_and_what_was_shown(kind: str, how: str) -> None:
    """However a stream ends, the state equals that of a fresh reading of the prompt and the visible reply."""
    model = golden_model("post", kind, torch.float64)
    greedy = SamplingParams(greedy=True, max_new_tokens=6 if how == "length" else 40)
    cancel = threading.Event()
    said = continuation(model, 8)
    state = model.new_state()
    events, inputs = real_stream(model, state, greedy, cancel=cancel, stops=(said[5],) if how == "stop" else ())
    seen: list[StreamEvent] = []
    for event in events:
        seen.append(event)
        if event.num_tokens == 4 and how == "close":
            events.close()
            break
        if event.num_tokens == 4 and how == "drop":
            del events
            break
        if event.num_tokens == 4 and how == "cancel":
            cancel.set()
    shown = seen[-1].num_tokens
    first_stop = said.index(said[5])
    assert shown == {"length": 6, "stop": first_stop}.get(how, 4)
    assert seen[-1].finish_reason == {"length": "length", "cancel": "cancel", "stop": "stop"}.get(how)
    fresh = model.new_state()
    prefill(model, inputs, fresh)
    for token in said[:shown]:
        decode_one_token(model, torch.tensor([token]), fresh)
    assert_same_state(state, fresh, TOLERANCE[torch.float64])


def continuation(model: MMMamba, length: int) -> list[int]:
    """Greedy tokens below 148 of the golden image prompt."""
    tensors = golden_cases("post")["image"]
    state = model.new_state()
    logits = prefill(model, ModelInputs(tensors["input_ids"], tensors["pixel_values"]), state)
    said = []
    for _ in range(length):
        token = logits[:, :148].argmax(dim=-1)
        said.append(int(token))
        logits = decode_one_token(model, token, state)
    return said


def test_a_cancel_before_the_first_token() -> None:
    cancel = threading.Event()
    cancel.set()
    events, model = run([b"a", b"b"], cancel=cancel)
    assert [(event.text, event.finish_reason, event.num_tokens) for event in events] == [("", "cancel", 0)]
    assert model.read == []


@pytest.mark.parametrize("kind", ["linear", "hovle"])
def test_a_cancel_while_the_prompt_is_read(kind: str) -> None:
    """The flag is looked at between pieces; what was read of the prompt by then is in the state."""

    class SecondLook(threading.Event):
        looks = 0

        def is_set(self) -> bool:
            self.looks += 1
            return self.looks > 1

    model = golden_model("post", kind)
    ids = golden_cases("post")["long_text"]["input_ids"].repeat(1, 3)
    assert ids.shape[1] > 2 * CPU_PIECE
    state, fresh = model.new_state(), model.new_state()
    tokenizer = PieceTokenizer([b"a"] * 160)
    events = list(
        stream(model, tokenizer, ModelInputs(ids), state, SamplingParams(), stop_token_ids=(), cancel=SecondLook())
    )
    assert [(e.text, e.reply, e.num_tokens, e.ttft_ms, e.finish_reason) for e in events] == [
        ("", "", 0, None, "cancel")
    ]
    prefill(model, ModelInputs(ids[:, :CPU_PIECE]), fresh)
    assert_same_state(state, fresh)
    with pytest.raises(PrefillCancelled):
        prefill(model, ModelInputs(ids), model.new_state(), piece_size=100, cancel=SecondLook())


def test_an_image_token_is_never_drawn() -> None:
    """It would stand for pixels that nobody has."""
    model: Any = ScriptedModel([1, 44, 1])
    tokenizer = PieceTokenizer([bytes([65 + i]) for i in range(48)])
    params = SamplingParams(greedy=True, max_new_tokens=3)
    events = list(
        stream(model, tokenizer, ModelInputs(torch.tensor([[1]])), model.new_state(), params, stop_token_ids=())
    )
    assert events[-1].reply == "BAB"


def test_seeds() -> None:
    model = golden_model("post", "linear")
    hot = SamplingParams(temperature=2.0, top_p=1.0, max_new_tokens=20)

    def reply(**changes: Any) -> str:
        events, _ = real_stream(model, model.new_state(), replace(hot, **changes))
        return list(events)[-1].reply

    assert reply(seed=5) == reply(seed=5)
    assert reply(seed=5) != reply(seed=6)
    assert reply() != reply(), "two streams without a seed are the same"
    torch.manual_seed(0)
    before = torch.get_rng_state()
    reply(seed=5)
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    greedy = {reply(greedy=True, seed=seed) for seed in (None, 1, 2)} | {reply(temperature=0.0, seed=3)}
    assert len(greedy) == 1


def test_a_token_is_shown_before_it_is_fed_back() -> None:
    """Nobody waits for a forward pass to see a token that is known; a closed stream still feeds it."""
    model: Any = ScriptedModel([0, 1, 0])
    params = SamplingParams(greedy=True, max_new_tokens=3)
    inputs = ModelInputs(torch.tensor([[1]]))
    events = stream(model, PieceTokenizer([b"a", b"b"]), inputs, model.new_state(), params, stop_token_ids=())
    assert next(events).reply == "a"
    assert model.read == [1]
    assert next(events).reply == "ab"
    assert model.read == [1, 0]
    events.close()
    assert model.read == [1, 0, 1]


def test_time_between_events_is_the_consumers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by hand: 100 ms to read, 10 ms a token, 5 s that the consumer dawdles after every event."""
    now = [0.0]
    monkeypatch.setattr("mmmamba.generate.time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Timed(ScriptedModel):
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            now[0] += 0.01 if self.said else 0.1
            return super().__call__(*args, **kwargs)

    model: Any = Timed([0, 1, 0, 1])
    params = SamplingParams(greedy=True, max_new_tokens=4)
    inputs = ModelInputs(torch.tensor([[1]]))
    seen = []
    for event in stream(model, PieceTokenizer([b"a", b"b"]), inputs, model.new_state(), params, stop_token_ids=()):
        seen.append(event)
        now[0] += 5.0
    assert [event.ttft_ms for event in seen] == [pytest.approx(100.0)] * 5
    assert seen[0].tok_per_sec is None
    assert [event.tok_per_sec for event in seen[1:]] == [pytest.approx(100.0)] * 4
    assert seen[-1].elapsed_ms == pytest.approx(100 + 4 * 5000 + 4 * 10)


def test_a_batch_is_refused_before_anything_is_read() -> None:
    model = golden_model("post", "linear")
    state = model.new_state(2)
    inputs = ModelInputs(torch.tensor([[1, 2], [3, 4]]))
    with pytest.raises(ValueError, match="stream takes one conversation, input_ids holds 2 rows"):
        next(stream(model, PieceTokenizer([b"a"]), inputs, state, SamplingParams(), stop_token_ids=()))
    assert state.seqlen == 0


def test_a_second_turn_goes_on_from_the_first() -> None:
    """Reply and next prompt read from the carried state equal one reading of everything."""
    for kind in ("hovle", "linear", "hybrid"):
        model = golden_model("post", kind, torch.float64)
        state = model.new_state()
        events, inputs = real_stream(model, state, SamplingParams(greedy=True, max_new_tokens=5))
        list(events)
        said = torch.tensor([continuation(model, 5)])
        turn = golden_cases("post")["two_images"]
        logits = prefill(model, ModelInputs(turn["input_ids"], turn["pixel_values"]), state)
        everything = torch.cat([inputs.input_ids, said, turn["input_ids"]], dim=1)
        assert inputs.pixel_values is not None
        tiles = torch.cat([inputs.pixel_values, turn["pixel_values"]])
        fresh = model.new_state()
        wanted = prefill(model, ModelInputs(everything, tiles), fresh)
        assert_near("logits", logits, wanted, TOLERANCE[torch.float64])
        assert_same_state(state, fresh, TOLERANCE[torch.float64])
