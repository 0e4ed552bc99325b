"""Packing of samples into rows: nothing lost, nothing twice, little waste, the same every time, resumable."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.data.batches import Batch, Row, RowKind, Rows
from distill.data.mixture import Mixture, open_sources
from distill.data.packing import PackedBatch, Packer, PackerState, Piece, Pieces, RowShape, pack
from distill.data.sample import Sample
from distill.inputs import Inputs, _slots, prepare
from distill.nano import nano_config
from mmmamba.config import ModelConfig
from mmmamba.tokenizer import load_tokenizer
from tests.helpers import IMAGE_ID, TILE_TOKENS, golden_config
from tests.training import batch, piece

CONFIG = ModelConfig.from_dict(golden_config("post", "hovle"))
PAD = 7


def shape(seqlen: int = 64, rows: int = 1, tiles: int | None = None) -> RowShape:
    return RowShape.of(CONFIG, seqlen=seqlen, rows=rows, tiles=tiles, pad_id=PAD)


def fetch(index: int) -> Piece | None:
    """Texts and pictures of different lengths, told apart by their first token; every 13th number is missing."""
    if index % 13 == 12:
        return None
    rng = random.Random(index)
    tiles = rng.choice([0, 0, 1, 1, 2, 3])
    sample = piece(index, [rng.randint(2, 9), *([-TILE_TOKENS * tiles] if tiles else []), rng.randint(4, 20)])
    sample.input_ids[0] = index % 140
    return sample


def samples_of(packed: PackedBatch) -> list[Piece]:
    """Taken out again, in order."""
    found, used = [], 0
    for row in range(len(packed.input_ids)):
        for segment in packed.segment_ids[row].unique_consecutive():
            at = packed.segment_ids[row] == segment
            if not packed.is_real[row, at].any():
                used += int((packed.input_ids[row, at] == IMAGE_ID).sum()) // TILE_TOKENS
                continue
            assert packed.is_real[row, at].all()
            ids = packed.input_ids[row, at].numpy()
            tiles = int((ids == IMAGE_ID).sum()) // TILE_TOKENS
            pixels = packed.pixels[used : used + tiles].numpy() if packed.pixels is not None and tiles else None
            used += tiles
            found.append(Piece(ids, packed.loss_mask[row, at].numpy(), pixels))
    assert used == (0 if packed.pixels is None else len(packed.pixels))
    return found


def same(one: Piece, two: Piece) -> bool:
    fields = zip((one.input_ids, one.loss_mask, one.pixels), (two.input_ids, two.loss_mask, two.pixels), strict=True)
    return all(np.array_equal(a, b) if a is not None and b is not None else a is b for a, b in fields)


@pytest.mark.parametrize(("rows", "tiles"), [(1, None), (1, 6), (3, 6)])
def test_every_sample_comes_once_and_whole(rows: int, tiles: int | None) -> None:
    packer = Packer(fetch, shape(96, rows, tiles), patience=4)
    found: list[Piece] = []
    wasted = []
    for _ in range(20):
        packed = packer.batch()
        assert packed.input_ids.shape == packed.segment_ids.shape == (rows, 96)
        found += samples_of(packed)
        assert packed.fill.num_samples == len(samples_of(packed))
        assert packed.fill.sample_tokens == int(packed.is_real.sum())
        assert packed.fill.sample_tokens + packed.fill.blank_tokens + packed.fill.padding_tokens == rows * 96
        assert not packed.loss_mask[~packed.is_real].any()
        wasted.append(packed.fill.waste)
        assert packed.state == packer.state
    state = packer.state
    wanted = [s for i in range(state.next_index) if i not in state.held and (s := fetch(i)) is not None]
    assert len(found) == len(wanted)
    assert all(any(same(one, two) for two in wanted) for one in found)
    assert len({s.input_ids.tobytes() for s in found}) == len(found), "a sample came twice"
    assert np.mean(wasted) < (0.08 if tiles is None else 0.25)


def test_fixed_tiles_make_fixed_shapes() -> None:
    packer = Packer(fetch, shape(96, 2, 6))
    first = prepare(packer.batch(), CONFIG, answer_tokens=20)
    for _ in range(5):
        packed = packer.batch()
        assert packed.pixels is not None
        assert packed.pixels.shape == (12, 56, 56, 3)
        assert ((packed.input_ids == IMAGE_ID).sum(dim=1) == 6 * TILE_TOKENS).all()
        first.copy_(prepare(packed, CONFIG, answer_tokens=20))  # raises where a shape differs


def test_few_slots_for_the_borders_where_no_step_is_captured() -> None:
    """The same segments in as many slots as the next power of two, and few numbers of them in a run."""
    packer = Packer(fetch, shape(96, 2, 6))
    for _ in range(5):
        packed = packer.batch()
        fixed, few = (prepare(packed, CONFIG, answer_tokens=20, fixed_shapes=flag) for flag in (True, False))
        assert fixed.segments is not None
        assert few.segments is not None
        for one, two in zip(fixed.segments, few.segments, strict=True):
            assert two.cu_seqlens.numel() == 33
            assert one.cu_seqlens.numel() == packed.max_segments + 1
            lengths = [s.cu_seqlens.diff() for s in (one, two)]
            assert [n for n in lengths[0].tolist() if n] == [n for n in lengths[1].tolist() if n]
            assert all(torch.equal(a, b) for a, b in zip(one[:3], two[:3], strict=True))
    assert [_slots(torch.arange(n)[None].repeat(2, 1)) for n in (1, 16, 17, 32, 33, 512)] == [32, 32, 64, 64, 128, 1024]


def test_first_fit_by_hand() -> None:
    lengths = [10, 9, 5, 6, 4, 11, 2]
    packer = Packer(lambda i: piece(i, [lengths[i]], learned=1) if i < 7 else None, shape(16, 1), patience=2)
    packed = packer.batch()  # 10, then 9 must wait, 5 fits, 6 must wait: done
    assert [len(s.input_ids) for s in samples_of(packed)] == [10, 5]
    assert packed.state == PackerState(4, (1, 3))
    assert packed.segment_ids[0].tolist() == [0] * 10 + [1] * 5 + [3]
    assert (packed.input_ids[0, 15], packed.is_real[0, 15]) == (PAD, False)
    assert [len(s.input_ids) for s in samples_of(packer.batch())] == [9, 6]  # what waited comes first; 4, 11 wait
    assert packer.state == PackerState(6, (4, 5))


def test_a_stream_goes_on_where_it_stopped() -> None:
    unbroken = Packer(fetch, shape(96), patience=4)
    before = [unbroken.batch() for _ in range(3)][-1].state
    assert before.held, "nothing waits, so nothing is tested"
    resumed = Packer(fetch, shape(96), patience=4, state=PackerState(*before))
    for _ in range(4):
        one, two = unbroken.batch(), resumed.batch()
        assert torch.equal(one.input_ids, two.input_ids)
        assert torch.equal(one.segment_ids, two.segment_ids)
        assert (one.state, one.fill) == (two.state, two.fill)


def test_pieces_of_padded_rows() -> None:
    ids, mask = np.arange(12), np.zeros(12, bool)
    mask[[4, 5, 8]] = True
    tile = np.zeros((1, 56, 56, 3), np.uint8)
    cut = Piece.of(Row(ids, mask, tile))
    assert cut.input_ids.tolist() == list(range(9))
    assert cut.loss_mask.sum() == 3
    assert cut.num_tiles == 1
    assert Piece.of(Row(ids, mask, np.concatenate([tile, tile]))).num_tiles == 2
    assert Piece.of(Row(ids, mask, None)).num_tiles == 0
    with pytest.raises(ValueError, match="a row without anything to learn cannot be packed"):
        Piece.of(Row(ids, np.zeros(12, bool), None))


def test_pictures_and_text_of_one_mixture(tmp_path: Path) -> None:
    """Through the sources and rows that training uses: shapes and conversations side by side."""
    tokenizer = load_tokenizer(Path(__file__).parent.parent / "checkpoints" / "nano")
    config = nano_config()
    lines = [
        json.dumps({"messages": [{"role": r, "content": f"{r} {i}"} for r in ("user", "assistant")]}) for i in range(40)
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    sources = open_sources({"shapes": 1.0, "chat": 1.0}, text=[tmp_path])
    rows: dict[RowKind, Rows] = {kind: Rows(tokenizer, config, kind) for kind in ("image", "text")}
    mixture = Mixture(sources, rows["image"], batch_size=1, seed=3)
    packed_rows = RowShape.of(config, seqlen=512, tiles=4, pad_id=rows["text"].pad_id)
    packed = Packer(Pieces(mixture.sample, rows), packed_rows).batch()
    inputs = prepare(packed, config)
    assert packed.pixels is not None
    assert packed.pixels.shape == (4, 224, 224, 3)
    assert inputs.segments is not None
    assert inputs.segments[0].ids.shape == (1, 512 + 3 * 4 * 64)
    for number in packed.segment_ids[packed.is_real].unique().tolist():
        ids = packed.input_ids[0, packed.segment_ids[0] == number].tolist()
        sample = mixture.sample(number)
        assert (config.embedding.img_context_token_id in ids) == (sample.image is not None)
    too_long = Rows(tokenizer, config, "text", seqlen=16)
    assert Pieces(lambda index, attempt: Sample(None, (("?" * 99, "!"),), "text"), {"text": too_long})(0) is None


def test_what_is_learned_stops_at_borders() -> None:
    """The last token of a sample predicts nothing of the next one, even if that begins with a learned token."""
    one, two = piece(1, [6]), piece(2, [6], learned=6)
    packed = pack([[one, two]], shape(16), PackerState())
    inputs = prepare(packed, CONFIG)
    assert inputs.positions.tolist() == [2, 3, 4, 6, 7, 8, 9, 10]
    assert inputs.targets.tolist() == packed.input_ids[0, inputs.positions + 1].tolist()
    every = prepare(packed, CONFIG, all_tokens=True)
    assert every.positions.tolist() == list(range(16))
    assert every.weights.tolist() == [1.0] * 12 + [0.0] * 4
    assert every.answers.nonzero().squeeze(1).tolist() == inputs.positions.tolist()
    assert torch.equal(every.targets[inputs.positions], inputs.targets)


def test_slots_of_all_tokens_without_packing() -> None:
    every = prepare(batch("image"), CONFIG, all_tokens=True)
    assert every.weights.view(3, 16).tolist() == [[1.0] * 14 + [0.0] * 2] * 3  # a row ends with its answer
    assert every.answers.view(3, 16).sum(dim=1).tolist() == [4.0] * 3
    assert every.segments is None


def test_inputs_move_whole() -> None:
    packed = prepare(Packer(fetch, shape(96)).batch(), CONFIG)
    assert packed.segments is not None
    moved = packed.to(torch.device("cpu"))
    assert isinstance(moved, Inputs)
    assert len(moved.tensors()) == len(packed.tensors()) == 5 + 1 + 4 + 2 * 4 + 2
    assert all(torch.equal(a, b) for a, b in zip(moved.tensors(), packed.tensors(), strict=True))
    # As the embedding stack counts: four positions for an image token.
    embedding, language = moved.segments or (None, None)
    assert embedding is not None
    assert language is not None
    assert [t.shape for t in moved.real or ()] == [embedding.ids.shape, language.ids.shape]
    images = int((packed.layout.stack_ids == IMAGE_ID).sum()) // 4
    assert embedding.ids.shape[1] == language.ids.shape[1] + 3 * images
    with pytest.raises(ValueError, match="keep to one kind of batch"):
        moved.copy_(prepare(batch("text"), CONFIG))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="rows=2 need equally many tiles each; say how many with tiles="):
        shape(64, 2)
    with pytest.raises(ValueError, match="tiles=17 of 4 tokens do not fit seqlen=64; use from 0 to 16"):
        shape(64, 1, 17)
    with pytest.raises(ValueError, match="rows of seqlen=0, rows=1; both must be 1 or more"):
        shape(0)
    with pytest.raises(ValueError, match=r"100 samples one after the other.*seqlen=16 and tiles=None"):
        Packer(lambda i: piece(i, [20]), shape(16)).batch()
    with pytest.raises(ValueError, match="patience=0 must be 1 or more"):
        Packer(fetch, shape(), patience=0)
    wrong = piece(1, [3, -4, 3])
    with pytest.raises(ValueError, match="a sample holds 4 image tokens, but its 0 tiles make 0"):
        pack([[Piece(wrong.input_ids, wrong.loss_mask, None)]], shape(), PackerState())
    with pytest.raises(ValueError, match="keep to one kind"):
        prepare(batch("image"), CONFIG).copy_(prepare(batch("text"), CONFIG))
    assert isinstance(batch("text"), Batch)
