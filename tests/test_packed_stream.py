"""Pictures cut into tiles and text, packed into one stream: from the recipe to the rows, and on after a checkpoint."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from distill import trainer
from distill.__main__ import main
from distill.config import Recipe
from distill.data.batches import Rows, pixel_values
from distill.data.packed_stream import PackedBatches, PackedStream, Position, position_of
from distill.data.packing import PackedBatch, PackerState, Piece, RowShape
from distill.data.sample import Sample
from distill.distributed import Processes
from distill.inputs import prepare
from distill.nano import nano_config
from distill.streams import Data, places
from mmmamba.checkpoint import BUNDLED_DIR
from mmmamba.config import ModelConfig
from mmmamba.image import tile_image
from mmmamba.tokenizer import Tokenizer, load_tokenizer
from tests.launching import free_port, in_two_processes
from tests.reading import write_tar
from tests.training import piece, save_tiny_teacher, tiny_config

SIZES = ((56, 56), (120, 60), (60, 200), (300, 290), (90, 31))
STAGE = {"steps": 4, "lr": 1e-3, "image_batch": 1, "text_batch": 0, "save_steps": 1}
TINY_RECIPE = {
    "image_seqlen": 192,
    "text_seqlen": 120,
    "max_tiles": 4,
    "packed": True,
    "packed_tiles": 12,
    "image_sources": {"own": 1.0},
    "text_sources": {"self": 0.2},
    "stages": dict.fromkeys(("stage1", "stage2", "stage3"), STAGE),
}
SHAPE = RowShape(seqlen=96, rows=1, tiles=None, tokens_per_tile=4, image_token_id=153, pad_id=7, side=56)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(BUNDLED_DIR)


@pytest.fixture(scope="module")
def meta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set in InternVL's format: lines with one picture, with two, and without."""
    folder = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    lines = []
    for number in range(60):
        names: list[str] = [[f"{number % 5}.png"], [f"{number % 5}.png", f"{(number + 2) % 5}.png"], []][number % 3]
        asked = "<image>\n" * len(names) + f"Question {number}?"
        talk = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"Answer {number}."}]
        lines.append(json.dumps({"conversations": talk} | ({"image": names} if names else {})))
    (folder / "own.jsonl").write_text("\n".join(lines))
    (folder / "meta.json").write_text(json.dumps({"own": {"root": "", "annotation": "own.jsonl"}}))
    return folder / "meta.json"


def tiny_recipe(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY_RECIPE | changes))
    return path


def data_of(
    recipe: Recipe,
    meta: Path,
    tokenizer: Tokenizer,
    config: ModelConfig,
    *,
    workers: int = 0,
    rank: int = 0,
    of: int = 1,
) -> Data:
    source = next(iter(recipe.image_sources))
    where = places([f"{source}=internvl-all:{meta}"])
    return Data(recipe, where, tokenizer, config, workers=workers, processes=Processes())


def packed_stream(data: Data, kept: Sequence[dict[str, Any]] = ()) -> PackedStream:
    stream = data.batches("image", "stage1", kept=kept)
    assert isinstance(stream, PackedStream)
    return stream


# --- rows ---


@pytest.mark.parametrize("max_tiles", [1, 4, 12])
def test_pictures_are_cut_as_the_model_cuts_them(max_tiles: int, tokenizer: Tokenizer) -> None:
    config = tiny_config()
    rng = np.random.default_rng(1)
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in (*SIZES, (500, 80))]
    rows = Rows(tokenizer, config, seqlen=800, num_images=None, max_tiles=max_tiles)
    row = rows.row(Sample(images[0], (("What?", "That."),), "own", tuple(images[1:])))
    assert row is not None
    assert row.pixels is not None
    assert row.pixels.dtype == np.uint8
    wanted = torch.cat([tile_image(image, config, max_tiles=max_tiles) for image in images])
    assert len(wanted) == len(images) if max_tiles == 1 else len(wanted) > 2 * len(images)
    torch.testing.assert_close(pixel_values(torch.from_numpy(row.pixels)), wanted, rtol=0, atol=1e-6)
    image_tokens = int((row.input_ids == config.embedding.img_context_token_id).sum())
    assert image_tokens == len(wanted) * config.tokens_per_tile


def test_text_of_a_row_can_be_bounded(tokenizer: Tokenizer) -> None:
    """So that the blank tiles of a packed row always find room."""
    config = tiny_config()
    turns = tuple((f"Question {i}?", f"Answer {i}.") for i in range(20))
    for image in (None, Image.new("RGB", (200, 56))):
        kind: Any = "text" if image is None else "image"
        rows = Rows(tokenizer, config, kind, seqlen=500, num_images=None, max_tiles=4, text_tokens=70)
        row = rows.row(Sample(image, turns, "own"))
        assert row is not None
        length = int(row.loss_mask.nonzero()[0].max()) + 1
        text = length - (0 if row.pixels is None else len(row.pixels) * config.tokens_per_tile)
        assert 50 < text <= 70
    with pytest.raises(ValueError, match="seqlen=500 and text_tokens=5 holds no turn; the shortest image row takes"):
        Rows(tokenizer, config, seqlen=500, text_tokens=5)
    with pytest.raises(ValueError, match="max_tiles=65; use 1 to 64"):
        Rows(tokenizer, config, max_tiles=65)


@pytest.mark.parametrize("kind", ["internvl-all", "webdataset"])
def test_pictures_to_be_cut_are_decoded_in_full(kind: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A JPEG for one tile may come smaller; one that is cut would lose what its tiles are for."""
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1000, 2000, 3), dtype=np.uint8))
    large.save(tmp_path / "0.jpg")
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Noise."}]
    if kind == "webdataset":
        files = {"a.jpg": (tmp_path / "0.jpg").read_bytes(), "a.json": json.dumps({"conversations": talk}).encode()}
        write_tar(tmp_path / "0.tar", files)
        place = f"{kind}:{tmp_path / '0.tar'}"
    else:
        (tmp_path / "own.jsonl").write_text(json.dumps({"image": "0.jpg", "conversations": talk}))
        (tmp_path / "meta.json").write_text(json.dumps({"own": {"root": "", "annotation": "own.jsonl"}}))
        place = f"{kind}:{tmp_path / 'meta.json'}"
    recipe = Recipe.load(str(tiny_recipe(tmp_path)))
    for max_tiles, size in ((4, (2000, 1000)), (1, (1000, 500))):
        cut = replace(recipe, max_tiles=max_tiles)
        data = Data(cut, places([f"own={place}"]), tokenizer, tiny_config(), workers=0, processes=Processes())
        image = data.sources["image"][0][0].sample(0, 0).image
        assert image is not None
        assert image.size == size


# --- streams ---


def test_a_packed_recipe_mixes_pictures_and_text(tmp_path: Path, meta: Path, tokenizer: Tokenizer) -> None:
    config = tiny_config()
    recipe = Recipe.load(str(tiny_recipe(tmp_path, stages={"stage1": STAGE | {"image_batch": 2}})))
    data = data_of(recipe, meta, tokenizer, config)
    assert data.batches("text", "stage1") is None
    context = config.embedding.img_context_token_id
    seen = []
    first = None
    for batch in itertools.islice(packed_stream(data), 8):
        assert batch.input_ids.shape == (2, 192)
        assert batch.pixels is not None
        assert batch.pixels.shape == (24, 56, 56, 3)
        assert ((batch.input_ids == context).sum(dim=1) == 12 * 4).all()
        inputs = prepare(batch, config, all_tokens=True)
        first = first or inputs
        first.copy_(inputs)  # raises where a shape differs
        for row in range(2):
            for number in batch.segment_ids[row][batch.is_real[row]].unique().tolist():
                ids = batch.input_ids[row, batch.segment_ids[row] == number].tolist()
                seen.append((ids.count(context) // 4, tokenizer.decode([i for i in ids if i != context])))
    tiles = [number for number, _ in seen]
    assert 0 in tiles
    assert 1 in tiles
    assert max(tiles) > 5, "no sample with two pictures of several tiles"
    assert all(text.startswith("user\n") for _, text in seen)
    assert any("Answer" not in text for _, text in seen), "the recipe's other source is missing"


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stream_goes_on_where_it_stood(workers: int, tmp_path: Path, meta: Path, tokenizer: Tokenizer) -> None:
    recipe = Recipe.load(str(tiny_recipe(tmp_path)))
    stream = packed_stream(data_of(recipe, meta, tokenizer, tiny_config(), workers=workers))
    for _ in range(5):  # an odd number: it is the second worker's turn
        next(stream)
    kept = json.loads(json.dumps(stream.position.plain()))
    assert kept["given"] == 5
    again = packed_stream(data_of(recipe, meta, tokenizer, tiny_config(), workers=workers), [kept])
    for _ in range(5):
        one, two = next(stream), next(again)
        assert torch.equal(one.input_ids, two.input_ids)
        assert one.pixels is not None
        assert two.pixels is not None
        assert torch.equal(one.pixels, two.pixels)
        assert again.position == stream.position


def fetch(index: int) -> Piece:
    """A text that names its number and is longer than the number is even."""
    sample = piece(index, [3 + 5 * (index % 4) + 9 * (index % 2)])
    sample.input_ids[0] = 1000 + index
    return sample


def numbers(batches: Iterator[PackedBatch], count: int) -> list[list[int]]:
    return [(b.input_ids[b.input_ids >= 1000] - 1000).tolist() for b in itertools.islice(batches, count)]


def stream_of(workers: int, rank: int, world_size: int, at: Position) -> PackedStream:
    dataset = PackedBatches(fetch, SHAPE, patience=2, rank=rank, world_size=world_size, at=at)
    return PackedStream(iter(DataLoader(dataset, batch_size=None, num_workers=workers)), at)


def test_workers_and_processes_share_no_sample() -> None:
    seen = []
    for rank in range(2):
        loaded = numbers(stream_of(2, rank, 2, Position.start(2)), 4)
        assert loaded == numbers(stream_of(2, rank, 2, Position.start(2)), 4), "not repeatable"
        # Part p of 4 packs the samples p, p + 4, ...; the loader takes its two workers in turn.
        assert [[n % 4 for n in batch] for batch in loaded] == [
            [2 * rank + turn % 2] * len(loaded[turn]) for turn in range(4)
        ]
        seen += [number for batch in loaded for number in batch]
    assert len(set(seen)) == len(seen) > 40
    with pytest.raises(ValueError, match="made by 2 workers and is to go on with 1; use as many"):
        next(stream_of(0, 0, 1, Position.start(2)))
    with pytest.raises(ValueError, match="rank=2 must be from 0 to below world_size=2"):
        PackedBatches(fetch, SHAPE, rank=2, world_size=2)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_with_others_nothing_comes_twice(world_size: int, workers: int) -> None:
    """A run goes on with another number of processes or workers."""
    seen, kept = [], []
    for rank in range(2):
        stream = stream_of(2, rank, 2, Position.start(2))
        seen += [number for batch in numbers(stream, 3) for number in batch]
        kept.append(stream.position.plain())
    for rank in range(world_size):
        at = position_of(kept, rank=rank, world_size=world_size, parts=workers)
        seen += [number for batch in numbers(stream_of(workers, rank, world_size, at), 3) for number in batch]
    assert len(set(seen)) == len(seen)


def test_the_same_processes_find_their_own_positions() -> None:
    positions = [Position(5, (PackerState(9, (7, 8)), PackerState(4))), Position(5, (PackerState(8), PackerState(6)))]
    kept = [position.plain() for position in positions]
    for rank in range(2):
        assert position_of(kept, rank=rank, world_size=2, parts=2) == positions[rank]
    assert position_of([], rank=0, world_size=1, parts=3) == Position.start(3)


# --- the recipes of HoVLE-2.6B ---


@pytest.mark.parametrize("kind", ["linear", "hybrid"])
def test_the_recipes_of_2_6b_build_their_streams(kind: str, meta: Path, tokenizer: Tokenizer) -> None:
    """Rows of the published length and tile size, with nano's tokenizer."""
    config = nano_config()
    config = replace(config, embedding=replace(config.embedding, image_size=448), max_dynamic_patch=12)
    assert config.tokens_per_tile == 256
    recipe = Recipe.load(f"hovle-2.6b-{kind}")
    for name in recipe.stages:
        stream = data_of(recipe, meta, tokenizer, config).batches("image", name)
        assert stream is not None
        batch = next(stream)
        assert isinstance(batch, PackedBatch)
        assert batch.input_ids.shape == (1, 8192)
        assert batch.pixels is not None
        assert batch.pixels.shape == (24, 448, 448, 3)
        assert int((batch.input_ids == config.embedding.img_context_token_id).sum()) == 24 * 256
        shown = batch.input_ids[batch.is_real] == config.embedding.img_context_token_id
        assert 256 < int(shown.sum()) <= 24 * 256
        assert batch.fill.num_samples > 3


# --- the commands ---


class Killed(Exception):
    """Stands for a run that ends without a word."""


class KilledAfter:
    """Ends a run when it has taken `left` more steps (below 0: never)."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.left = -1
        self._next = trainer._next
        patch.setattr(trainer, "_next", self)

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self.left == 0:
            raise Killed
        self.left -= 1
        return self._next(*args, **options)


def run(folder: Path, out: str, meta: Path, workers: int, *, eval_count: int = 0) -> None:
    """Everything that the recipe in the folder names, from the teacher in the folder."""
    main(
        [
            *["run", "--recipe", str(folder / "tiny.yaml"), "--teacher", str(folder / "teacher")],
            *["--tokenizer", str(BUNDLED_DIR), "--out", str(folder / out), "--data", f"own=internvl-all:{meta}"],
            *["--log-file", str(folder / f"{out}.jsonl"), "--workers", str(workers), "--eval-count", str(eval_count)],
            *["--no-compile", "--device", "cpu"],
        ]
    )


def check_same(folder: Path) -> None:
    """The unbroken run and the killed one left the same."""
    files = sorted(path.name for path in (folder / "unbroken" / "stages").glob("*.safetensors"))
    assert "stage1.safetensors" in files
    for name in files:
        one, two = (load_file(folder / out / "stages" / name) for out in ("unbroken", "killed"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[tensor], two[tensor]) for tensor in one), name


@pytest.mark.parametrize("workers", [0, 2])
def test_a_packed_run_goes_on_as_if_it_had_not_been_killed(
    workers: int, tmp_path: Path, meta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill = KilledAfter(monkeypatch)
    save_tiny_teacher(tmp_path / "teacher")
    tiny_recipe(tmp_path)
    run(tmp_path, "unbroken", meta, workers, eval_count=1)
    assert kill.left == -1 - 12
    # In stage 1 after 3 steps of 4, in stage 2 after 2 and then 1 more, in stage 3 after 1.
    for kill.left in (3, 3, 1, 2):
        with pytest.raises(Killed):
            run(tmp_path, "killed", meta, workers)
    kill.left = -1
    run(tmp_path, "killed", meta, workers)
    check_same(tmp_path)


def work(rank: int, folder: Path, meta: Path, ports: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill = KilledAfter(patch)
        run(folder, "unbroken", meta, 1)
        # Each run meets at a port of its own: whoever is first in the next must not find the store of the one before.
        os.environ["MASTER_PORT"], kill.left = str(ports[0]), 2
        with pytest.raises(Killed):
            run(folder, "killed", meta, 1)
        os.environ["MASTER_PORT"], kill.left = str(ports[1]), -1
        run(folder, "killed", meta, 1)


def test_two_processes_go_on_each_with_rows_of_its_own(tmp_path: Path, meta: Path) -> None:
    save_tiny_teacher(tmp_path / "teacher")
    tiny_recipe(tmp_path, stages={"stage1": STAGE})
    in_two_processes(work, tmp_path, meta, [free_port() for _ in range(2)])
    check_same(tmp_path)
