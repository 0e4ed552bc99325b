"""Training data: repeatable, never shared between splits or workers, every answer what the picture or record says."""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.data.batches import Rows, pixel_values
from distill.data.mixture import Mixture, loader, open_sources
from distill.data.photos import Photo, Photos, read_photos
from distill.data.photos_pack import main as pack_main
from distill.data.photos_pack import pack_photos
from distill.data.sample import Sample, held_out, rng_for
from distill.data.scene import COLORS, HELD_OUT_PERCENT, KINDS, MAX_SHAPES, draw_scene, random_scene
from distill.data.shapes import NUMBERS, QUESTIONS, Shapes, question_for
from distill.data.text import Conversations
from distill.nano import nano_config
from distill.reading import READING_TASKS
from distill.tasks import held_out as held_out_questions
from distill.tasks import is_right
from mmmamba.image import tile_image
from mmmamba.tokenizer import load_tokenizer

CONFIG = nano_config()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(Path(__file__).parent.parent / "checkpoints" / "nano")


def photo_record(label: str, kind: str | None = None, **more) -> dict:
    captions = [f"{label} in a grocery store."] if kind else [f"A picture of a {label}.", f"This is a {label}."]
    labels = [label, label.split()[-1].lower(), kind] if kind else [label]
    return {
        "captions": captions,
        "labels": labels,
        "source": "made",
        "license": "MIT",
        "caption_type": "template",
    } | more


RECORDS = {
    "train": {
        "one": photo_record("sunflower"),
        "two": photo_record("revolver", attribution="someone"),
        "three": photo_record("Granny Smith apple", "fruit"),
        "four": photo_record("street", caption_type="human", captions=["A STREET  WITH TWO CARS", "cars"]),
    },
    "val": {"five": photo_record("sunflower"), "six": photo_record("Leek", "vegetable")},
}


def write_shard(path: Path, records: dict[str, dict | bytes]) -> None:
    """Pictures of 96 x 64 px, each of one colour with a stripe."""
    with tarfile.open(path, "w") as tar:
        for number, (key, record) in enumerate(records.items()):
            image = Image.new("RGB", (96, 64), (40 * number, 120, 200))
            image.paste((250, 40, 40), (0, 0, 30, 64))
            buffer = io.BytesIO()
            image.save(buffer, "JPEG")
            text = record if isinstance(record, bytes) else json.dumps(record).encode()
            for suffix, data in (("jpg", buffer.getvalue()), ("json", text)):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for split, records in RECORDS.items():
        write_shard(folder / f"{split}-0000.tar", records)
    return folder


# -- shapes ------------------------------------------------------------------------------------------------------------


def test_same_seed_and_index_give_the_same_sample():
    source = Shapes()
    a, b, other = source.sample(1, 5), Shapes().sample(1, 5), source.sample(1, 6)
    assert a.turns == b.turns
    assert np.array_equal(np.asarray(a.image), np.asarray(b.image))
    assert not np.array_equal(np.asarray(a.image), np.asarray(other.image))
    assert source.sample(1, 5, attempt=1).turns != a.turns or source.sample(2, 5).turns != a.turns


def test_held_out_scenes_are_never_trained_on():
    train = {random_scene(rng_for("t", i), "train").content for i in range(4000)}
    val = {random_scene(rng_for("v", i), "val").content for i in range(300)}
    assert len(val) > 150
    assert not train & val
    assert not any(held_out(content, HELD_OUT_PERCENT) for content in train)
    # The rule takes the promised share of all scenes: of 4000 draws 10 % +- 4 standard deviations.
    share = np.mean([held_out(str(i), HELD_OUT_PERCENT) for i in range(4000)])
    assert 0.08 < share < 0.12


def test_scenes_have_all_kinds_colors_and_counts_apart_from_each_other():
    scenes = [random_scene(rng_for(i), "train") for i in range(400)]
    assert {len(s.shapes) for s in scenes} == set(range(1, MAX_SHAPES + 1))
    assert {s.kind for scene in scenes for s in scene.shapes} == set(KINDS)
    assert {s.color for scene in scenes for s in scene.shapes} == set(COLORS)
    for scene in scenes:
        for a, b in itertools.combinations(scene.shapes, 2):
            assert (a.x - b.x) ** 2 + (a.y - b.y) ** 2 > (a.radius + b.radius) ** 2, "two shapes overlap"
        assert all(s.radius <= s.x <= 1 - s.radius and s.radius <= s.y <= 1 - s.radius for s in scene.shapes)


def test_the_picture_shows_what_the_scene_says():
    """Every shape's own colour is found at its centre, and no other name is nearer to it."""
    for i in range(60):
        scene = random_scene(rng_for("picture", i), "train")
        if scene.look.style == "hollow":
            continue
        pixels = np.asarray(draw_scene(scene)).astype(int)
        for shape in scene.shapes:
            found = pixels[int(shape.y * 224), int(shape.x * 224)]
            nearest = min(COLORS, key=lambda name: np.abs(found - COLORS[name]).sum())
            assert nearest == shape.color
            assert np.abs(found - shape.rgb).max() <= 1


PLURALS = {"crosses": "cross"} | {f"{kind}s": kind for kind in KINDS if kind != "cross"}


def parse_group(text: str):
    """(kind, color) of "red circles", "shapes", "a star": read back from the words, not by the code that wrote them."""
    words = [PLURALS.get(word, word) for word in re.findall(r"\w+", text.lower())]
    return next((k for k in KINDS if k in words), None), next((c for c in COLORS if c in words), None)


def count(scene, text: str) -> int:
    kind, color = parse_group(text)
    return sum((kind is None or s.kind == kind) and (color is None or s.color == color) for s in scene.shapes)


def find(scene, text: str):
    """The one shape that a name means."""
    kind, color = parse_group(text)
    found = [s for s in scene.shapes if (kind is None or s.kind == kind) and (color is None or s.color == color)]
    assert len(found) == 1, f'"{text}" names {len(found)} shapes of {scene.content}'
    return found[0]


def questions(task: str, number: int = 400):
    return [question_for(task, 3, i, "train") for i in range(number)]


def test_counts_are_right():
    seen = Counter()
    for scene, (question, answer) in questions("shapes_count"):
        about = re.sub(r"\b(?:picture|image|shapes?|of the)\b", " ", question.rstrip("?."))
        expected = count(scene, about)
        assert answer.lower() == NUMBERS[expected] + ".", (scene.content, question)
        seen[expected] += 1
    assert set(seen) == set(range(MAX_SHAPES + 1))


ENDS = {
    "leftmost": lambda s: s.x,
    "rightmost": lambda s: -s.x,
    "topmost": lambda s: s.y,
    "highest": lambda s: s.y,
    "uppermost": lambda s: s.y,
    "lowest": lambda s: -s.y,
    "bottommost": lambda s: -s.y,
}


def end_of(scene, question: str):
    """The shape at the end that the question names, or None; it must be so by a clear distance."""
    for word, key in ENDS.items():
        if word in question.lower():
            first, second = sorted(scene.shapes, key=key)[:2]
            assert key(second) - key(first) >= 0.08
            return first
    return None


def test_colors_and_kinds_are_right():
    for scene, (question, answer) in questions("shapes_color"):
        shape = end_of(scene, question)
        kind, _ = parse_group(question.rstrip("?."))
        colors = {shape.color} if shape else {s.color for s in scene.shapes if kind in (None, s.kind)}
        assert {answer.lower().rstrip(".")} == colors, (scene.content, question)
    for scene, (question, answer) in questions("shapes_shape"):
        shape = end_of(scene, question) or find(scene, question.rstrip("?."))
        assert answer in (f"A {shape.kind}.", f"An {shape.kind}."), (scene.content, question)


def test_yes_and_no_are_right_and_equally_often():
    answers = Counter()
    for scene, (question, answer) in questions("shapes_exist", 1000):
        assert (answer == "Yes.") == (count(scene, question.rstrip("?.")) > 0), (scene.content, question)
        answers[answer] += 1
    assert 430 < answers["Yes."] < 570
    assert sum(answers.values()) == answers["Yes."] + answers["No."]


def test_comparisons_are_right():
    answers = Counter()
    for scene, (question, answer) in questions("shapes_compare", 1000):
        groups = rf"(?:(?:{'|'.join(COLORS)}) )?(?:shapes|{'|'.join(PLURALS)})"
        a, b = re.findall(groups, question.lower())
        number_a, number_b = count(scene, a), count(scene, b)
        if answer in ("Yes.", "No."):
            truth = number_a < number_b if "fewer" in question.lower() else number_a > number_b
            assert (answer == "Yes.") == truth, (scene.content, question)
            answers[answer] += 1
        elif answer == "The same number.":
            assert number_a == number_b > 0
        else:
            assert number_a != number_b
            assert answer.lower() == (a if number_a > number_b else b) + ".", (scene.content, question)
    assert abs(answers["Yes."] - answers["No."]) < 100


SIDES = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "higher": (1, -1), "over": (1, -1)}
SIDES |= {"below": (1, 1), "lower": (1, 1), "under": (1, 1)}
ANSWER_SIDES = {"To the left.": (0, -1), "To the right.": (0, 1), "Above.": (1, -1), "Below.": (1, 1)}


def test_relations_are_right():
    seen = Counter()
    for scene, (question, answer) in questions("shapes_relation", 1000):
        shape = end_of(scene, question)
        if shape is not None:
            assert is_right("shapes_relation", f"{shape.color} {shape.kind}", answer)
            seen["end"] += 1
            continue
        names = re.findall(r"the ((?:\w+ )?(?:shape|" + "|".join(KINDS) + r"))", question, re.I)
        shapes = [find(scene, name) for name in names]
        if answer in ("Yes.", "No."):
            axis, sign = next(side for word, side in SIDES.items() if word in question.lower())
            a, b = ((s.x, s.y)[axis] for s in shapes)
            assert abs(a - b) >= 0.08
            assert (answer == "Yes.") == ((a - b) * sign > 0), (question, shapes)
            seen[answer] += 1
        elif answer in ANSWER_SIDES:
            axis, sign = ANSWER_SIDES[answer]
            a, b = reversed(shapes) if "On which side" in question or "on which side" in question else shapes
            along = ((a.x - b.x, a.y - b.y)[axis]) * sign
            assert along >= 2 * abs((a.x - b.x, a.y - b.y)[1 - axis])
            assert along > 0.08
            seen["side"] += 1
        else:
            (shape,) = shapes
            assert ("left" in answer, "right" in answer) == (shape.x < 0.3, shape.x > 0.7), (question, answer, shape)
            assert ("top" in answer, "bottom" in answer) == (shape.y < 0.3, shape.y > 0.7), (question, answer, shape)
            seen["place"] += 1
    assert min(seen[key] for key in ("end", "Yes.", "No.", "side", "place")) > 50


def test_descriptions_name_everything():
    for scene, (_, answer) in questions("shapes_describe", 300):
        said = Counter()
        for part in re.split(", | and ", answer.rstrip(".").lower()):
            number = part.split()[0]
            said[parse_group(part)] += 1 if number in ("a", "an") else NUMBERS.index(number)
        assert said == Counter((s.kind, s.color) for s in scene.shapes), answer


def test_samples_ask_different_questions_and_describe_last():
    samples = [Shapes().scene(0, i)[1] for i in range(300)]
    assert {len(turns) for turns in samples} == {1, 2, 3, 4, 5, 6}
    assert all(len(set(turns)) == len(turns) for turns in samples)
    wordings = {question for turns in samples for question, _ in turns}
    assert len(wordings) > 350


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match='split "test" is not known'):
        Shapes("test")
    with pytest.raises(ValueError, match="shapes_count"):
        question_for("shapes_size", 0, 0)
    with pytest.raises(ValueError, match="photos_label"):
        held_out_questions("photos", 1)


# -- photos ------------------------------------------------------------------------------------------------------------


def test_photos_are_read_by_split(shards):
    assert [p.key for p in read_photos(shards, "train")] == ["one", "two", "three", "four"]
    assert [p.key for p in read_photos(shards, "val")] == ["five", "six"]
    names = [p.name for p in read_photos(shards, "train")]
    assert names == ["a sunflower", "a revolver", "Granny Smith apple", ""]


def test_photo_answers_follow_from_the_record(shards):
    source = Photos(shards, size_px=64)
    by_name = {photo.name: photo for photo in source.photos if photo.name}
    answers = Counter()
    for i in range(400):
        sample = source.sample(0, i)
        assert sample.image.size == (64, 64)
        said = " ".join(a for _, a in sample.turns).lower()
        photo = next((p for name, p in by_name.items() if name.removeprefix("a ").lower() in said), None)
        if photo is None:
            assert [a for _, a in sample.turns] in (["A street with two cars."], ["Cars."])
            continue
        for question, answer in sample.turns:
            if answer in ("Yes.", "No."):
                asked = next(name for name in by_name if name.lower() in question.lower())
                assert (answer == "Yes.") == (asked == photo.name)
                answers[answer] += 1
            elif answer == "A fruit.":
                assert photo.kind == "fruit"
            else:
                assert answer in ("A " + photo.labels[0] + ".", photo.labels[0] + ".", photo.captions[0]), (
                    question,
                    answer,
                )
    assert abs(answers["Yes."] - answers["No."]) < 50


def test_training_photos_change_and_held_out_ones_do_not(shards):
    train, val = Photos(shards), Photos(shards, "val")
    of_one = {np.asarray(train.sample(0, i).image).tobytes() for i in range(40)}
    assert len(of_one) == 40
    assert len({np.asarray(val.sample(0, i).image).tobytes() for i in range(40)}) == 2
    assert np.array_equal(np.asarray(train.sample(3, 4).image), np.asarray(Photos(shards).sample(3, 4).image))


@pytest.mark.parametrize("name", ["packed.tar", "packed.tar.gz"])
def test_packing_keeps_records_and_pictures(shards, tmp_path, name):
    assert pack_photos(shards, tmp_path / name, size_px=64, quality=90) == 6
    for split in ("train", "val"):
        before, after = read_photos(shards, split), read_photos(tmp_path / name, split)
        assert [(p.key, p.labels, p.captions) for p in after] == [(p.key, p.labels, p.captions) for p in before]
        for a, b in zip(before, after, strict=True):
            assert b.open().size == (64, 64)
            difference = np.asarray(a.open().resize((64, 64)), int) - np.asarray(b.open(), int)
            assert np.abs(difference).mean() < 6
    with tarfile.open(tmp_path / name) as tar:
        record = json.load(tar.extractfile("train/two.json"))
    assert record == RECORDS["train"]["two"], "licence and attribution must travel along"
    again = tmp_path / f"again-{name}"
    pack_photos(shards, again, size_px=64, quality=90)
    assert again.read_bytes() == (tmp_path / name).read_bytes()


def test_packing_over_the_limit_leaves_nothing(shards, tmp_path, capsys):
    out = tmp_path / "packed.tar"
    assert pack_main([str(shards), str(out), "--max-mib", "0.001"]) == 1
    assert "more than 0.001; use a lower quality" in capsys.readouterr().err
    assert not list(tmp_path.glob("packed*"))
    assert pack_main([str(shards), str(out), "--size", "32"]) == 0
    assert "6 photos" in capsys.readouterr().out


def test_damaged_photos_are_named(shards, tmp_path):
    with pytest.raises(ValueError, match="neither a folder"):
        read_photos(tmp_path / "nowhere", "train")
    shard = shards / "train-0000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:700])
    with pytest.raises(ValueError, match=r"train-0000\.tar"):
        read_photos(shards, "train")
    shard.write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match=r"train-0000\.tar is not a tar file"):
        read_photos(shards, "train")
    write_shard(shard, {"one": b"{}"})
    with pytest.raises(ValueError, match="record of photo one"):
        read_photos(shards, "train")
    with pytest.raises(ValueError, match="photo broken cannot be decoded"):
        Photo("broken", b"no picture", ("x",), (), False).open()


# -- text --------------------------------------------------------------------------------------------------------------


def write_conversations(path: Path, number: int) -> Path:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"Question {i}?"},
                {"role": "assistant", "content": f"Answer {i}."},
                {"role": "user", "content": f"And {i}?"},
                {"role": "user", "content": "Well?"},
                {"role": "assistant", "content": f"More {i}."},
                {"role": "user", "content": "Left without an answer."},
            ]
        }
        for i in range(number)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_conversations_are_read_as_turns(tmp_path):
    path = write_conversations(tmp_path / "talk.jsonl", 300)
    train, val = Conversations(path), Conversations(path, "val")
    assert train.name == "talk"
    assert len(train) + len(val) == 300
    assert 0 < len(val) < 20
    turns = train.turns(0)
    assert turns[1] == (turns[0][0].replace("Question", "And") + "\nWell?", turns[0][1].replace("Answer", "More"))
    trained, held = ({s.turns(i)[0] for i in range(len(s))} for s in (train, val))
    assert not trained & held
    assert train.sample(0, 1) == Conversations(path).sample(0, 1)
    assert {len(Conversations(path, any_start=True).sample(0, i).turns) for i in range(30)} == {1, 2}


def test_conversations_that_cannot_be_used(tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text('{"messages": [{"role": "system", "content": "x"}]}\n{"messages": []}\n')
    with pytest.raises(ValueError, match=r"no conversation .*\(2 could not be used\)"):
        Conversations(path)
    path.write_text('{"messages": []}\n{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"talk\.jsonl, line 2"):
        Conversations(path)
    path.write_text('{"messages": [{"role": "robot", "content": "x"}]}\n')
    with pytest.raises(ValueError, match='role "robot"'):
        Conversations(path)
    with pytest.raises(ValueError, match="cannot be read"):
        Conversations(tmp_path / "nowhere.jsonl.gz")


# -- rows and batches --------------------------------------------------------------------------------------------------


def test_mask_covers_exactly_the_answers(tokenizer):
    sample = Shapes().sample(0, 2)
    turns = (("How many?", "Three."), ("Is <|im_end|> text?", "Yes, <img> too."), *sample.turns[:1])
    row = Rows(tokenizer, CONFIG, seqlen=200).row(Sample(sample.image, turns, "test"))
    end = tokenizer.token_id("<|im_end|>")
    learned = row.input_ids[row.loss_mask].tolist()
    assert learned == [i for _, answer in turns for i in (*tokenizer.encode(answer), end)]
    context = CONFIG.embedding.img_context_token_id
    assert (row.input_ids == context).sum() == CONFIG.tokens_per_tile
    text = tokenizer.decode(row.input_ids.tolist())
    assert (
        text
        == "".join(f"user\n{chr(10) if n == 0 else ''}{q}\nassistant\n{a}\n" for n, (q, a) in enumerate(turns))[:-1]
    )


def test_rows_are_cut_at_whole_turns(tokenizer):
    turns = (("One?", "First."), ("Two?", "Second."), ("Three?", "Third."))
    longest = Rows(tokenizer, CONFIG, "text", seqlen=200).row(Sample(None, turns, "test"))
    ends = np.flatnonzero(longest.loss_mask & ~np.append(longest.loss_mask[1:], False)) + 1
    assert len(ends) == 3
    for seqlen in range(int(ends[0]), int(ends[-1]) + 2):
        row = Rows(tokenizer, CONFIG, "text", seqlen=seqlen).row(Sample(None, turns, "test"))
        kept = int(ends[ends <= seqlen][-1])
        assert row.input_ids.shape == row.loss_mask.shape == (seqlen,)
        assert np.array_equal(row.input_ids[:kept], longest.input_ids[:kept])
        assert np.array_equal(row.loss_mask[:kept], longest.loss_mask[:kept])
        assert not row.loss_mask[kept:].any()
        assert (row.input_ids[kept:] == tokenizer.token_id("<|im_end|>")).all()
    assert Rows(tokenizer, CONFIG, "text", seqlen=20).row(Sample(None, (("word " * 30, "x"),), "test")) is None


def test_rows_refuse_what_does_not_fit(tokenizer):
    with pytest.raises(ValueError, match="seqlen=64 holds no turn"):
        Rows(tokenizer, CONFIG, seqlen=64)
    with pytest.raises(ValueError, match="has no image"):
        Rows(tokenizer, CONFIG).row(Sample(None, (("a", "b"),), "test"))
    with pytest.raises(ValueError, match="has an image"):
        Rows(tokenizer, CONFIG, "text").row(Shapes().sample(0, 0))


def test_pixels_are_what_the_tiling_gives(tokenizer):
    samples = [Shapes().sample(0, i) for i in range(3)]
    rows = [Rows(tokenizer, CONFIG).row(s) for s in samples]
    values = pixel_values(torch.from_numpy(np.concatenate([r.pixels for r in rows])))
    expected = torch.cat([tile_image(s.image, CONFIG) for s in samples])
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)


@pytest.fixture
def mixture(tokenizer, shards):
    def make(**more):
        sources = open_sources({"shapes": 3, "photos": 1}, photos=shards)
        return Mixture(sources, Rows(tokenizer, CONFIG), **{"batch_size": 4} | more)

    return make


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


def test_batches_have_fixed_shapes_and_repeat(mixture):
    first, second = mixture().batch(0), mixture().batch(1)
    assert first.input_ids.shape == first.loss_mask.shape == (4, 160)
    assert first.pixels.shape == (4, 224, 224, 3)
    assert (first.input_ids.dtype, first.loss_mask.dtype, first.pixels.dtype) == (torch.int64, torch.bool, torch.uint8)
    assert same(first, mixture().batch(0))
    assert not same(first, second)
    assert not same(first, mixture(seed=1).batch(0))


def test_workers_share_the_stream_without_duplicates(mixture):
    def take(workers, start=0, number=6):
        return list(itertools.islice(loader(mixture(start=start), num_workers=workers, prefetch=2), number))

    alone, together = take(0), take(2)
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))
    assert all(same(a, b) for a, b in zip(alone[4:], take(2, start=4, number=2), strict=True)), (
        "a resumed stream differs"
    )
    pictures = [p.numpy().tobytes() for batch in together for p in batch.pixels]
    assert len(set(pictures)) == len(pictures)


def test_ranks_take_turns(mixture):
    whole = [mixture().batch(i) for i in range(4)]
    parts = [mixture(rank=r, world_size=2).batch(i) for i in range(2) for r in range(2)]
    assert all(same(a, b) for a, b in zip(whole, parts, strict=True))


def test_weights_are_kept(mixture):
    tasks = Counter(mixture().sample(i).task for i in range(400))
    assert 260 < tasks["shapes"] < 340
    assert tasks["photos"] == 400 - tasks["shapes"]


def test_text_batches_pass_over_what_is_too_long(tokenizer, tmp_path):
    path = tmp_path / "mixed.jsonl"
    short = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(40)
    ]
    long = [
        {"messages": [{"role": "user", "content": f"word{i} " * 99}, {"role": "assistant", "content": "a"}]}
        for i in range(40)
    ]
    path.write_text("\n".join(map(json.dumps, short + long)))
    rows = Rows(tokenizer, CONFIG, "text", seqlen=64)
    batch = Mixture(open_sources({"mixed": 1}, text=[tmp_path]), rows, batch_size=32).batch(0)
    assert batch.pixels is None
    assert batch.input_ids.shape == (32, 64)
    assert 10 < batch.num_skipped < 100
    assert all(batch.loss_mask.any(1))
    path.write_text("\n".join(map(json.dumps, long)))
    with pytest.raises(ValueError, match="samples of mixed do not fit seqlen=64"):
        Mixture(open_sources({"mixed": 1}, text=[tmp_path]), rows, batch_size=1).batch(0)


def test_mixtures_that_make_no_sense(tokenizer, shards):
    rows = Rows(tokenizer, CONFIG)
    with pytest.raises(ValueError, match="the mixture is empty"):
        Mixture([], rows, batch_size=1)
    with pytest.raises(ValueError, match="train and val"):
        Mixture([(Shapes(), 1), (Photos(shards, "val"), 1)], rows, batch_size=1)
    with pytest.raises(ValueError, match="none may be below 0"):
        Mixture([(Shapes(), -1)], rows, batch_size=1)
    with pytest.raises(ValueError, match="same name"):
        Mixture([(Shapes(), 1), (Shapes(), 1)], rows, batch_size=1)
    with pytest.raises(ValueError, match="rank=2, world_size=2"):
        Mixture([(Shapes(), 1)], rows, batch_size=1, rank=2, world_size=2)
    with pytest.raises(ValueError, match='"sums" is neither'):
        open_sources({"sums": 1}, text=[shards])
    with pytest.raises(ValueError, match="photos="):
        open_sources({"photos": 1})


# -- evaluation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [*QUESTIONS, "photos_label", *READING_TASKS])
def test_held_out_questions_repeat_and_accept_their_own_answer(task, shards, font_pack, nlvr_folder):
    asked = held_out_questions(task, 2, seed=1, photos=shards, fonts=font_pack, nlvr=nlvr_folder)
    again = held_out_questions(task, 2, seed=1, photos=shards, fonts=font_pack, nlvr=nlvr_folder)
    assert len(asked) == 2
    for a, b in zip(asked, again, strict=True):
        assert (a.question, a.answer) == (b.question, b.answer)
        assert np.array_equal(np.asarray(a.image), np.asarray(b.image))
        assert a.image.size == (224, 224)
        for answer in a.answer.split("|"):
            assert is_right(task, answer, a.answer)
        assert not is_right(task, "", a.answer)
        assert not is_right(task, "Something else.", a.answer)


def test_held_out_shapes_are_held_out_and_photos_are_val(shards):
    assert all(question_for(task, 0, i)[0].is_held_out for task in QUESTIONS for i in range(20))
    answers = {q.answer for q in held_out_questions("photos_label", 100, photos=shards)}
    assert answers == {"A sunflower.|sunflower", "Leek.|leek"}
    with pytest.raises(ValueError, match='"train", which is trained on'):
        held_out_questions("photos_label", 1, photos=Photos(shards))
    with pytest.raises(ValueError, match="pass photos="):
        held_out_questions("photos_label", 1)


@pytest.mark.parametrize(
    ("task", "predicted", "answer", "right"),
    [
        ("shapes_count", "three", "Three.", True),
        ("shapes_count", "3", "Three.", True),
        ("shapes_count", "0", "None.", True),
        ("shapes_count", "Three or four.", "Three.", False),
        ("shapes_exist", "yes", "Yes.", True),
        ("shapes_exist", "No.", "Yes.", False),
        ("shapes_shape", "circle", "A circle.", True),
        ("shapes_relation", "A red star", "A red star.", True),
        ("shapes_relation", "A blue star", "A red star.", False),
        ("shapes_describe", "Two blue squares and a red circle.", "A red circle and two blue squares.", True),
        ("shapes_describe", "One red circle, 2 blue squares", "A red circle and two blue squares.", True),
        ("shapes_describe", "A red circle and a blue square.", "A red circle and two blue squares.", False),
        ("shapes_describe", "A red circle.", "A red circle and two blue squares.", False),
        ("photos_label", "Euphonium.", "a euphonium, a brass instrument|euphonium", True),
        ("photos_label", "A cougar.", "a cougar's face|cougar", True),
        ("photos_label", "A cougar's face.", "a cougar|cougar", True),
        ("photos_label", "Scissors", "a pair of scissors|scissors", True),
        ("photos_label", "This is an apple.", "Granny Smith apple|apple", True),
        ("photos_label", "Golden Delicious apple.", "Granny Smith apple|apple", False),
        ("photos_label", "A Windsor chair.", "a chair|chair", False),
        ("photos_label", "A fruit.", "Granny Smith apple|apple", False),
    ],
)
def test_scoring(task, predicted, answer, right):
    assert is_right(task, predicted, answer) is right
