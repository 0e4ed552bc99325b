"""Data of one's own: InternVL's meta files and WebDataset shards, whole, damaged and with several images."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.data.batches import Rows, stack
from distill.data.internvl import InternVL, UnusableError, read_conversation
from distill.data.mixture import Mixture, open_sources
from distill.data.sample import Sample
from distill.data.webdataset import WebDataset
from distill.nano import nano_config
from mmmamba.tokenizer import load_tokenizer
from tests.reading import write_tar

CONFIG = nano_config()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(Path(__file__).parent.parent / "checkpoints" / "nano")


def picture(red: int, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (red, 90, 160)).save(buffer, form)
    return buffer.getvalue()


def talk(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    opening = [{"from": "system", "value": system}] if system else []
    return opening + [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def line(number: int, image: object = None, *texts: str) -> dict:
    record = {"id": number, "conversations": talk(*(texts or (f"<image>\nQuestion {number}?", f"Answer {number}.")))}
    return record if image is None else record | {"image": image}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for i in range(40):
        (tmp_path / "pictures" / f"{i}.jpg").write_bytes(picture(i * 6))
    return tmp_path


def write_meta(folder: Path, sets: dict[str, tuple[list, dict]]) -> Path:
    meta = {}
    for name, (lines, more) in sets.items():
        text = "\n".join(json.dumps(entry) if isinstance(entry, dict) else entry for entry in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        meta[name] = {
            "root": "pictures/",
            "annotation": f"{name}.jsonl",
            "data_augment": False,
            "repeat_time": 1,
        } | more
    path = folder / "meta.json"
    path.write_text(json.dumps(meta), encoding="utf-8")
    return path


def singles(first: int = 0, number: int = 40) -> list[dict]:
    return [line(i, f"{i % 40}.jpg") for i in range(first, first + number)]


def number_of(sample: Sample) -> int:
    return int("".join(c for c in sample.turns[-1][1] if c.isdigit()))


# -- InternVL ----------------------------------------------------------------------------------------------------------


def test_lines_become_samples_with_their_picture(folder: Path) -> None:
    source = InternVL(write_meta(folder, {"a": (singles(), {})}))
    assert source.name == "meta"
    for i in range(40):
        sample = source.sample(0, i)
        number = number_of(sample)
        assert sample.turns == ((f"<image>\nQuestion {number}?", f"Answer {number}."),)
        assert sample.image.size == (40, 30)
        assert abs(np.asarray(sample.image)[..., 0].mean() - 6 * number) < 8
    assert source.sample(3, 4).turns == InternVL(folder / "meta.json").sample(3, 4).turns
    assert not source.skipped


def test_pictures_are_in_one_split_only(folder: Path) -> None:
    meta = write_meta(folder, {"a": (singles(number=400), {})})
    for i in range(40, 400):
        (folder / "pictures" / f"{i}.jpg").write_bytes(picture(i % 250))
    lines = [line(i, f"{i // 2}.jpg") for i in range(800)]
    meta = write_meta(folder, {"a": (lines, {})})
    train, val = InternVL(meta), InternVL(meta, "val")
    assert len(train) + len(val) == 800
    assert 0 < len(val) < 50
    pictures = [{number_of(s.sample(0, i)) // 2 for i in range(300)} for s in (train, val)]
    assert not pictures[0] & pictures[1]


@pytest.mark.parametrize(("repeat", "share"), [(1, 1.0), (3, 3.0), (2.5, 2.5), (0.5, 0.5), (0.25, 0.25)])
def test_repeat_time_is_respected(folder: Path, repeat: float, share: float) -> None:
    meta = write_meta(folder, {"a": (singles(1000), {}), "b": (singles(2000), {"repeat_time": repeat})})
    source = InternVL(meta)
    numbers = Counter(number_of(source.sample(0, i)) for i in range(1500))
    from_b = sum(n for number, n in numbers.items() if number >= 2000)
    assert abs(from_b / 1500 - share / (1 + share)) < 0.05
    different = len([number for number in numbers if number >= 2000])
    assert abs(different - min(1, share) * len(source.sets[0].spans)) <= 1


def test_repeat_times_that_make_no_sense(folder: Path) -> None:
    assert len(InternVL(write_meta(folder, {"a": (singles(), {}), "b": (singles(), {"repeat_time": 0})})).sets) == 1
    for repeat in (-1, "twice", None):
        with pytest.raises(ValueError, match='repeat_time of "b"'):
            InternVL(write_meta(folder, {"a": (singles(), {}), "b": (singles(), {"repeat_time": repeat})}))


def test_what_cannot_be_used_is_passed_over_and_counted(folder: Path) -> None:
    (folder / "pictures" / "broken.jpg").write_bytes(b"no picture")
    (folder / "pictures" / "cut.jpg").write_bytes(picture(200)[:300])
    bad = [
        "no json",
        "[1, 2]",
        '{"image": "0.jpg"}',
        line(1, "0.jpg", "<image><image>", "two places, one image"),
        line(2, ["0.jpg", "1.jpg"], "<image> one place", "two images"),
        line(3, "0.jpg", "<image> no answer"),
        {"image": "0.jpg", "conversations": [{"from": "robot", "value": "x"}]},
        line(900, "missing.jpg"),
        line(901, "broken.jpg"),
        line(902, "cut.jpg"),
        line(903, None, "text alone", "yes"),
        "",
    ]
    source = InternVL(write_meta(folder, {"a": (singles() + bad, {})}))
    assert {number_of(source.sample(0, i)) for i in range(400)} <= set(range(40))
    assert source.skipped["line broken"] == 4
    assert source.skipped["number of images and of <image> differ"] == 2
    assert source.skipped["conversation without a whole turn"] == 1
    assert source.skipped["another number of images"] == 1
    assert source.skipped["image missing"] > 0
    assert source.skipped["image broken"] > 0


def test_a_missing_annotation_is_named_and_counted(folder: Path) -> None:
    meta = write_meta(folder, {"a": (singles(), {}), "b": (singles(), {"annotation": "gone.jsonl"})})
    with pytest.warns(UserWarning, match=r"gone\.jsonl cannot be read"):
        source = InternVL(meta)
    assert source.skipped["annotation missing"] == 1
    assert len(source.sets) == 1


def test_an_empty_mixture_says_so(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"empty mixture.*1 images \(line broken: 1\)"):
        InternVL(write_meta(folder, {"a": (["no json"], {})}))
    source = InternVL(write_meta(folder, {"a": ([line(i, f"gone{i}.jpg") for i in range(60)], {})}))
    with pytest.raises(ValueError, match=r"nothing of meta can be used \(image missing: 1000\)"):
        source.sample(0, 0)
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        InternVL(folder / "nowhere.json")
    (folder / "meta.json").write_text('{"a": {"root": "x"}}')
    with pytest.raises(ValueError, match="no meta file"):
        InternVL(folder / "meta.json")


def test_system_messages_and_broken_orders() -> None:
    system, turns = read_conversation(
        talk("<image>\nWhat?", "This.", "And?", "That.", "left over", system="Be kind."), 1
    )
    assert system == "Be kind."
    assert turns == (("<image>\nWhat?", "This."), ("And?", "That."))
    messages = [{"from": "gpt", "value": "Hello."}, *talk("a", "b"), {"from": "gpt", "value": "c"}]
    assert read_conversation(messages, 0) == (None, (("a", "b\nc"),))
    assert read_conversation(talk("What?", "This."), 2)[1] == (("<image>\n<image>\nWhat?", "This."),)
    with pytest.raises(UnusableError, match="differ"):
        read_conversation(talk("<image>", "x"), 0)


def test_images_stand_where_the_text_places_them(folder: Path, tokenizer) -> None:
    lines = [line(i, ["1.jpg", "40.png"], "Left: <image>, right: <image>. Same?", f"No {i}.") for i in range(30)]
    (folder / "pictures" / "40.png").write_bytes(picture(250, "PNG"))
    meta = write_meta(folder, {"a": (lines + singles(), {})})
    ((source, _),) = open_sources({f"internvl-2:{meta}": 1})
    sample = source.sample(0, 0)
    assert [round(np.asarray(image)[..., 0].mean()) for image in sample.images] == pytest.approx([6, 250], abs=3)
    assert sample.image is sample.images[0]
    row = Rows(tokenizer, CONFIG, seqlen=200, num_images=2).row(sample)
    context = CONFIG.embedding.img_context_token_id
    start, end = tokenizer.token_id("<img>"), tokenizer.token_id("</img>")
    image = [start, *[context] * CONFIG.tokens_per_tile, end]
    ids = row.input_ids.tolist()
    first = ids.index(start)
    after = first + len(image)
    second = ids.index(start, after)
    assert ids[first:after] == ids[second : second + len(image)] == image
    assert tokenizer.decode(ids[:first]).endswith("user\nLeft: ")
    assert tokenizer.decode(ids[after:second]) == ", right: "
    assert tokenizer.decode(ids[second + len(image) :]).startswith(". Same?")
    assert row.pixels.shape == (2, 224, 224, 3)
    batch = stack([row, row])
    assert batch.pixels.shape == (4, 224, 224, 3)
    assert batch.pixels[1, 0, 0, 0] > 240 > batch.pixels[2, 0, 0, 0]
    assert Rows(tokenizer, CONFIG).row(sample) is None, "rows of one image pass over samples of two"
    assert Rows(tokenizer, CONFIG, seqlen=200, num_images=2).row(source_of_one(folder)) is None


def source_of_one(folder: Path) -> Sample:
    return InternVL(folder / "meta.json").sample(0, 0)


def test_one_image_in_front_is_what_every_other_source_gives(folder: Path, tokenizer) -> None:
    source = InternVL(write_meta(folder, {"a": (singles(), {})}))
    sample = source.sample(0, 0)
    ((question, answer),) = sample.turns
    plain = Sample(sample.image, ((question.removeprefix("<image>\n"), answer),), "plain")
    rows = Rows(tokenizer, CONFIG)
    for a, b in zip(vars(rows.row(sample)).values(), vars(rows.row(plain)).values(), strict=True):
        assert np.array_equal(a, b)


def test_an_image_lost_with_its_turn_makes_no_row(tokenizer) -> None:
    image = Image.new("RGB", (8, 8))
    turns = (("One <image>", "First."), ("word " * 30 + "<image>", "Second."))
    sample = Sample(image, turns, "test", (image,), placed=True)
    assert Rows(tokenizer, CONFIG, seqlen=220, num_images=2).row(sample) is not None
    assert Rows(tokenizer, CONFIG, seqlen=180, num_images=2).row(sample) is None


def test_samples_hold_as_many_images_as_places() -> None:
    image = Image.new("RGB", (8, 8))
    assert Sample(image, (("<image> typed as text", "x"),), "test").images == (image,)
    with pytest.raises(ValueError, match="1 images and 2 places"):
        Sample(image, (("<image> <image>", "x"),), "test", placed=True)
    with pytest.raises(ValueError, match="more_images without"):
        Sample(None, (("a", "x"),), "test", (image,))
    with pytest.raises(ValueError, match='mode "L"'):
        Sample(image, (("a", "x"),), "test", (image.convert("L"),))


def test_text_alone_and_system_messages_make_text_rows(folder: Path, tokenizer) -> None:
    texts = [{"conversations": talk(f"Hello {i}?", f"Yes {i}.", system="Be brief.")} for i in range(80)]
    meta = write_meta(folder, {"a": (texts + singles(), {})})
    mixture = Mixture(open_sources({f"internvl-text:{meta}": 1}), Rows(tokenizer, CONFIG, "text"), batch_size=4)
    batch = mixture.batch(0)
    assert batch.pixels is None
    assert "user\nBe brief.\n\nHello" in tokenizer.decode(batch.input_ids[0].tolist())
    images = Mixture(open_sources({f"internvl:{meta}": 1, "shapes": 1}), Rows(tokenizer, CONFIG), batch_size=4)
    assert images.batch(0).pixels.shape == (4, 224, 224, 3)


# -- WebDataset --------------------------------------------------------------------------------------------------------


def records(first: int, number: int) -> dict[str, bytes]:
    """Of each kind of text in turn: conversations, a caption in JSON, captions in JSON, plain text."""
    members: dict[str, bytes] = {}
    for i in range(first, first + number):
        forms = (
            ("json", json.dumps({"conversations": talk(f"<image>\nQuestion {i}?", f"Answer {i}.")})),
            ("json", json.dumps({"caption": f"Caption {i}."})),
            ("json", json.dumps({"captions": [f"Caption {i}.", "other"], "labels": []})),
            ("txt", f"Caption {i}.\n"),
        )
        suffix, text = forms[i % 4]
        form = ("jpg", "png", "webp")[i % 3]
        members[f"part/{i:05d}.{form}"] = picture(i % 250, {"jpg": "JPEG"}.get(form, form.upper()))
        members[f"part/{i:05d}.{suffix}"] = text.encode()
    return members


def test_shards_become_samples(tmp_path: Path) -> None:
    for shard in range(3):
        write_tar(tmp_path / f"train-{shard:04d}.tar", records(100 * shard, 100))
    train, val = WebDataset(tmp_path), WebDataset(tmp_path, "val")
    assert len(train) + len(val) == 300
    assert 0 < len(val) < 20
    seen = set()
    for i in range(300):
        sample = train.sample(0, i)
        number = number_of(sample)
        seen.add(number)
        assert abs(np.asarray(sample.image)[..., 0].mean() - number % 250) < 8
        ((question, answer),) = sample.turns
        assert question.startswith("<image>\n")
        assert answer == (f"Answer {number}." if number % 4 == 0 else f"Caption {number}.")
    assert len(seen) > 150
    assert train.sample(2, 3).turns == WebDataset(tmp_path).sample(2, 3).turns
    assert not train.skipped
    assert not seen & {number_of(val.sample(0, i)) for i in range(50)}


def test_shards_are_found_by_file_and_pattern(tmp_path: Path) -> None:
    for shard in range(12):
        write_tar(tmp_path / f"s{shard:02d}.tar", records(100 * shard, 20))
    assert len(WebDataset(tmp_path / "s03.tar").shards) == 1
    assert len(WebDataset(tmp_path / "s0*.tar").shards) == 10
    assert [p.name for p in WebDataset(tmp_path / "s{08..20}.tar").shards] == [
        "s08.tar",
        "s09.tar",
        "s10.tar",
        "s11.tar",
    ]
    ((source, _),) = open_sources({f"webdataset:{tmp_path}": 1})
    assert source.sample(0, 0).task == f"webdataset:{tmp_path}"
    with pytest.raises(ValueError, match="names no tar files"):
        WebDataset(tmp_path / "t*.tar")


@pytest.mark.parametrize("damage", ["garbage", "cut", "middle", "empty", "gzipped"])
def test_a_damaged_shard_is_named_and_the_next_one_is_read(tmp_path: Path, damage: str) -> None:
    bad = write_tar(tmp_path / ("0.tar.gz" if damage == "gzipped" else "0.tar"), records(0, 60))
    whole = bad.read_bytes()
    if damage == "gzipped":
        bad.rename(tmp_path / "0.tar")
    elif damage == "cut":
        bad.write_bytes(whole[: len(whole) // 2 + 700])
    elif damage == "middle":
        bad.write_bytes(whole[: 512 * 60] + b"\x07" * 512 * 3 + whole[512 * 63 :])
    else:
        bad.write_bytes(b"no tar" * 1000 if damage == "garbage" else b"")
    write_tar(tmp_path / "1.tar", records(1000, 60))
    with pytest.warns(UserWarning, match=r"shard .*0\.tar is damaged"):
        source = WebDataset(tmp_path)
    assert source.skipped["shard damaged"] == 1
    numbers = {number_of(source.sample(0, i)) for i in range(300)}
    assert len([n for n in numbers if n >= 1000]) > 40
    before = [n for n in numbers if n < 1000]
    assert len(before) > 10 if damage in ("cut", "middle") else not before


def test_records_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    bad = {
        "alone.jpg": picture(1),
        "alone2.txt": b"no picture",
        "dark.jpg": b"no picture",
        "dark.txt": b"Caption 7777.",
        "odd.jpg": picture(1),
        "odd.json": b"{",
        "mute.png": picture(1, "PNG"),
        "mute.json": b"{}",
    }
    write_tar(tmp_path / "0.tar", bad | records(0, 40))
    source = WebDataset(tmp_path)
    assert 7777 not in {number_of(source.sample(0, i)) for i in range(300)}
    assert source.skipped["record without picture or text"] == 2
    for reason in ("image broken", "text broken", "record without a caption"):
        assert source.skipped[reason] > 0


def test_nothing_usable_says_so(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a.txt": b"x"})
    with pytest.raises(ValueError, match=r"empty mixture.*record without picture or text: 1"):
        WebDataset(tmp_path)
    write_tar(tmp_path / "0.tar", {f"{i}.{s}": b"x" for i in range(90) for s in ("jpg", "txt")})
    source = WebDataset(tmp_path)
    with pytest.raises(ValueError, match="can be used"):
        source.sample(0, 0)
    assert tarfile.is_tarfile(tmp_path / "0.tar")


def test_own_data_mixes_with_the_rest(tmp_path: Path, tokenizer) -> None:
    write_tar(tmp_path / "0.tar", records(0, 40))
    mixture = Mixture(open_sources({f"webdataset:{tmp_path}": 1, "digits": 1}), Rows(tokenizer, CONFIG), batch_size=8)
    assert mixture.batch(0).pixels.shape == (8, 224, 224, 3)
    assert {mixture.sample(i).task for i in range(20)} == {f"webdataset:{tmp_path}", "digits"}
