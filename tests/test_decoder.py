"""The fused decoder against the plain path on tiny models: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmmamba.generate import ModelInputs, prefill
from mmmamba.model import MMMamba
from mmmamba.sampling import SamplingParams, sample
from mmmamba.state import KV_BLOCK, DecodeState
from tests.helpers import assert_same_state, random_ids, random_model, random_tiles, tiny_raw
from tests.interpreter import require_triton

DEVICE = require_triton()

from mmmamba.decoder.fused import FusedDecoder  # noqa: E402
from mmmamba.decoder.layers import Unsupported  # noqa: E402
from mmmamba.decoder.workspace import TURNS_CAPACITY, Workspace, bucket_of  # noqa: E402
from mmmamba.kernels.weights import from_packed, round_to_nearest  # noqa: E402
from mmmamba.packing import PackedSpec, pack  # noqa: E402

CLOSE = 5e-4  # float32 rounding: a head whose values nearly cancel makes it ten times what one operation gives
GREEDY = SamplingParams(greedy=True)
LINEAR = {
    "embedding": {"layers_block_type": ["mamba2"] * 3},
    "language": {"layers_block_type": ["mamba2"] * 2},
}
DYNAMIC = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 4}
SCALED = {"rope_scaling": {"type": "linear", "factor": 3.0}}
KINDS: dict[str, dict[str, Any]] = {
    "linear": LINEAR,
    "hybrid": {},
    "teacher": {"teacher": True},
    "dynamic": {"embedding": DYNAMIC, "language": DYNAMIC},
    "scaled": {"teacher": True, "embedding": SCALED, "language": SCALED},
    "unit": {"normalize_encoder_output": True},
    "tied": {"language": {"tie_word_embeddings": True}},
}


def make(kind: str = "hybrid", **changes: Any) -> MMMamba:
    return random_model(tiny_raw(**(KINDS[kind] | changes)), dtype=torch.float32).to(DEVICE)


def read(model: MMMamba, length: int, batch: int = 1, seed: int = 0) -> tuple[DecodeState, Tensor]:
    """A state that has read so many random tokens, and the logits of the last."""
    ids = torch.randint(0, 40, (batch, length), generator=torch.Generator().manual_seed(seed))
    state = model.new_state(batch)
    return state, prefill(model, ModelInputs(ids.to(DEVICE)), state)


def banned(model: MMMamba) -> Tensor:
    """The image token, which would ask for pixels."""
    ids = torch.arange(model.config.language.vocab_size, device=DEVICE)
    return ids == model.config.embedding.img_context_token_id


@torch.inference_mode()
def plain(model: MMMamba, token: Tensor, state: DecodeState) -> Tensor:
    return model(token[:, None], None, state)[:, -1]


@torch.inference_mode()
def plain_reply(model: MMMamba, state: DecodeState, logits: Tensor, num_tokens: int) -> list[list[int]]:
    """Greedy tokens, a list a step; `state` has been fed all of them."""
    reply = []
    for _ in range(num_tokens):
        token = sample(logits.masked_fill(banned(model), float("-inf")), GREEDY)
        reply.append(token.tolist())
        logits = plain(model, token, state)
    return reply


@pytest.mark.parametrize(("kind", "batch"), [*((kind, 1) for kind in KINDS), ("hybrid", 3), ("dynamic", 3)])
def test_tokens_one_by_one(kind: str, batch: int) -> None:
    """Logits and states, from an empty state on and across the length where dynamic scaling begins."""
    model = make(kind)
    decoder = FusedDecoder(model)
    mine, want = model.new_state(batch), model.new_state(batch)
    length = 6 if kind == "dynamic" else 3  # enough to pass its 4 positions
    tokens = torch.randint(0, 40, (length, batch), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    for token in tokens:
        expected = plain(model, token, want)
        assert decoder.fits(token, mine)
        error = (decoder.decode_one_token(token, mine) - expected).norm() / expected.norm()
        assert error <= CLOSE
    assert_same_state(mine, want, CLOSE)


def test_after_an_image() -> None:
    """`post` pixel shuffle: the two stacks have seen different numbers of positions."""
    raw = tiny_raw()
    model = make()
    ids = random_ids(raw, [3, -4, 2]).to(DEVICE)
    states = [model.new_state() for _ in range(2)]
    for state in states:
        logits = prefill(model, ModelInputs(ids, random_tiles(1).to(DEVICE)), state)
    token = logits[:, :40].argmax(dim=1)
    expected = plain(model, token, states[1])
    got = FusedDecoder(model).decode_one_token(token, states[0])
    assert (got - expected).norm() / expected.norm() <= CLOSE
    assert_same_state(states[0], states[1], CLOSE)


def test_sessions_of_different_lengths() -> None:
    """Rows of one session each go on as if alone; greedy replies and states equal those of the plain path."""
    model = make()
    decoder = FusedDecoder(model)
    lengths = (1, 9, 30)
    read_states = [read(model, n, seed=n) for n in lengths]
    expected, wanted = [], []
    for state, logits in read_states:
        wanted.append(state.clone())
        expected.append([t for (t,) in plain_reply(model, wanted[-1], logits, 6)])
    states = [state for state, _ in read_states]
    session = decoder.open(states, [GREEDY] * 3, banned=banned(model))
    session.begin(torch.cat([logits for _, logits in read_states]))
    taken = []
    for _ in range(6):
        session.advance()
        taken.append(session.take())
    session.close()
    assert [list(row) for row in zip(*taken, strict=True)] == expected
    for state, want in zip(states, wanted, strict=True):
        assert_same_state(state, want, CLOSE)


def test_a_stop_token_leaves_its_row_alone() -> None:
    """The row that stops is not fed its stop token, whatever the others do."""
    model = make()
    decoder = FusedDecoder(model)
    pairs = [read(model, n, seed=n) for n in (5, 7)]
    replies = [[t for (t,) in plain_reply(model, state.clone(), logits, 6)] for state, logits in pairs]
    stop = next(t for t in replies[0] if t not in replies[1])
    at = replies[0].index(stop)
    wanted = [pairs[0][0].clone(), pairs[1][0].clone()]
    plain_reply(model, wanted[0], pairs[0][1], at)
    plain_reply(model, wanted[1], pairs[1][1], 6)
    session = decoder.open([s for s, _ in pairs], [GREEDY] * 2, stop_token_ids=[stop], banned=banned(model))
    session.begin(torch.cat([logits for _, logits in pairs]))
    for _ in range(6):
        session.advance()
        session.take()
    session.close()
    assert not session.done
    for (state, _), want in zip(pairs, wanted, strict=True):
        assert_same_state(state, want, CLOSE)


def test_a_session_closed_early_has_fed_what_was_launched() -> None:
    model = make("teacher")
    state, logits = read(model, 4)
    want = state.clone()
    plain_reply(model, want, logits, 3)
    session = FusedDecoder(model).open([state], [GREEDY], banned=banned(model))
    session.begin(logits)
    for _ in range(3):
        session.advance()
    session.close()
    session.close()  # twice is once
    assert_same_state(state, want, CLOSE)


def test_a_cache_grows_in_a_session_and_leaves_forks_alone() -> None:
    model = make("dynamic" if TURNS_CAPACITY <= KV_BLOCK else "teacher")
    state, logits = read(model, KV_BLOCK - 2)
    fork = state.fork()
    before = fork.clone()
    want = state.clone()
    reply = plain_reply(model, want, logits, 4)
    decoder = FusedDecoder(model)
    for other in (state, fork):  # what the one writes behind the other's end is none of its business
        session = decoder.open([other], [GREEDY], banned=banned(model))
        session.begin(logits)
        taken = []
        for _ in range(4):
            session.advance()
            taken.append(session.take())
        session.close()
        assert taken == reply
        assert_same_state(other, want, CLOSE)
    assert before.seqlen == KV_BLOCK - 2


def test_rotary_tables_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmmamba.decoder.workspace.TURNS_CAPACITY", 8)
    model = make("dynamic")
    decoder = FusedDecoder(model)
    mine, want = model.new_state(), model.new_state()
    for i in range(10):
        token = torch.tensor([i], device=DEVICE)
        expected = plain(model, token, want)
        assert (decoder.decode_one_token(token, mine) - expected).norm() / expected.norm() <= CLOSE


def test_workspaces_are_used_again_and_interleaved_sessions_do_not_mix() -> None:
    model = make("linear")
    decoder = FusedDecoder(model)
    pairs = [read(model, n, seed=n) for n in (3, 8)]
    expected = [[t for (t,) in plain_reply(model, state.clone(), logits, 4)] for state, logits in pairs]
    sessions = [decoder.open([state], [GREEDY], banned=banned(model)) for state, _ in pairs]
    for session, (_, logits) in zip(sessions, pairs, strict=True):
        session.begin(logits)
    taken: list[list[int]] = [[], []]
    for _ in range(4):
        for session, own in zip(sessions, taken, strict=True):
            session.advance()
            own += session.take()
    for session in sessions:
        session.close()
    assert taken == expected
    spaces = {id(space) for space in decoder._free[1]}
    assert len(spaces) == 2
    for _ in range(3):
        state, logits = read(model, 2)
        session = decoder.open([state], [GREEDY])
        session.begin(logits)
        session.close()
    assert {id(space) for space in decoder._free[1]} == spaces


def test_many_rows() -> None:
    """Above `FEW_ROWS` products go to tensor cores; a batch of one state."""
    model = make("hybrid")
    decoder = FusedDecoder(model)
    mine, logits = read(model, 5, batch=6)
    want = mine.clone()
    reply = plain_reply(model, want, logits, 3)
    session = decoder.open([mine], [GREEDY], banned=banned(model))
    session.begin(logits)
    taken = []
    for _ in range(3):
        session.advance()
        taken.append(session.take())
    session.close()
    assert taken == reply
    assert_same_state(mine, want, CLOSE)


class Packed(nn.Module):
    """What `quantize` puts in the place of a linear layer, as far as decoding looks at it."""

    def __init__(self, dense: Tensor, bits: int, group_size: int) -> None:
        super().__init__()
        self.spec = PackedSpec(bits, group_size, tuple(dense.shape))
        self.qweight, self.scales, self.zeros = pack(dense, self.spec)

    def packed_weight(self) -> Any:
        return self


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (8, 32), (4, 32)])
def test_packed_weights(bits: int, group_size: int | None, batch: int) -> None:
    """Every linear layer, the output head and the embedding table; the plain path on the same numbers, unpacked."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    raw = tiny_raw(embedding=shape | {"llm_hidden_size": 64}, language=shape)
    model = random_model(raw, dtype=torch.float32).to(DEVICE)
    reference = random_model(raw, dtype=torch.float32).to(DEVICE)
    for name, module in list(model.named_modules()):
        if name == "embedding.text" or (isinstance(module, nn.Linear) and "shuffle_proj" not in name):
            group = group_size or module.weight.shape[1]
            packed = Packed(module.weight.data, bits, group)
            parent, _, attribute = name.rpartition(".")
            reference.get_submodule(name).weight.data = from_packed(packed).dequantize().contiguous()
            model.get_submodule(parent)._modules[attribute] = packed
    decoder = FusedDecoder(model)
    mine, want = reference.new_state(batch), reference.new_state(batch)
    for i in range(3):
        token = torch.arange(i, i + batch, device=DEVICE)
        expected = plain(reference, token, want)
        got = decoder.decode_one_token(token, mine)
        assert (got - expected).norm() / expected.norm() <= 3e-3
    assert_same_state(mine, want, 3e-3)


def test_what_is_refused() -> None:
    model = make("hybrid")
    decoder = FusedDecoder(model)
    with pytest.raises(Unsupported, match="another model"):
        decoder.open([make("linear").new_state()], [GREEDY])
    with pytest.raises(Unsupported, match="65 rows"):
        decoder.open([model.new_state(65)], [GREEDY])
    with pytest.raises(Unsupported, match="17 stop tokens"):
        decoder.open([model.new_state()], [GREEDY], stop_token_ids=range(17))
    with pytest.raises(Unsupported, match="cannot stop one by one"):
        decoder.open([model.new_state(2)], [GREEDY], stop_token_ids=[1])
    waiting = model.new_state()
    waiting.pending = waiting.pending.new_zeros(1, 3, 24)
    with pytest.raises(Unsupported, match="rest of an image"):
        decoder.open([waiting], [GREEDY])
    image = torch.tensor([model.config.embedding.img_context_token_id])
    assert not decoder.fits(image, model.new_state())
    with pytest.raises(Unsupported, match=r"float64"):
        FusedDecoder(random_model(tiny_raw()).to(DEVICE))
    model.language.layers[0].mlp.w1 = nn.Linear(24, 32)
    with pytest.raises(Unsupported, match="without a bias"):
        FusedDecoder(model)


def test_buckets() -> None:
    assert [bucket_of(n) for n in (1, 2, 3, 5, 64, 65)] == [1, 2, 4, 8, 64, None]
    assert isinstance(FusedDecoder(make("linear"))._take(3), Workspace)
    assert round_to_nearest(torch.ones(2, 64), "int8").nbytes == 2 * 64 + 2 * 2 * 2
