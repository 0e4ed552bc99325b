"""All data from its public sources at one command: here with sources of a few files, and tools without a network."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distill.data import build, fonts_pack, origins, photo_origins
from distill.data.build import Builder, main
from distill.data.fonts import Fonts
from distill.data.fonts_pack import FAMILIES
from distill.data.photo_origins import missing_photos, record_of, shard_keys, shrink
from distill.data.photos import Photos, read_records
from distill.data.text_origins import lines
from tests import drawings
from tests.reading import write_whole_font

OWN = [next(family for family in FAMILIES if family.name == name) for name in ("Lato", "Lobster")]
KEYS = {
    "train-0000": ["caltech101_anchor_0007", "grocery_granny-smith_train_003"],
    "val-0000": ["trashnet_glass12", "coco_val2017_000000000042"],
}
PUBLISHED = {
    "caltech101_anchor_0007": "101_ObjectCategories/anchor/image_0007.jpg",
    "grocery_granny-smith_train_003": "grocery/dataset/train/Fruit/Apple/Granny-Smith/Granny-Smith_003.jpg",
    "trashnet_glass12": "dataset-resized/glass/glass12.jpg",
    "coco_val2017_000000000042": "coco/val2017/000000000042.jpg",
}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# As published: the first of each, a few fields left out that nobody reads.
GSM8K = {"question": "What is 2 and 3?", "answer": "It is 2+3 = $<<2+3=5>>5.\n#### 5"}
NLVR = {
    "sentence": "There is a box.",
    "label": "true",
    "identifier": "7-0",
    "evals": {},
    "structured_rep": [[], [], []],
}
SGD = [
    {"dialogue_id": "1_00000", "services": ["Banks_1"], "turns": [{"utterance": "Hi"}, {"utterance": "Yes?"}]},
    {"dialogue_id": "2_00000", "services": [], "turns": [{"utterance": "No"}, {"utterance": "Oh."}]},
]
TOPICAL = {
    "t_ab": {"content": [{"message": " Hi  there "}, {"message": "Hey"}], "conversation_rating": {"agent_1": "Good"}}
}
TEXTS = {
    "gsm8k_train": '{"id": "gsm8k_0", "messages": [{"role": "user", "content": "What is 2 and 3?"}, '
    '{"role": "assistant", "content": "It is 2+3 = $5."}]}\n',
    "nlvr_dev": '{"id": "nlvr_dev_7-0", "sentence": "There is a box.", "label": "true", "boxes": [[], [], []]}\n',
    "sgd_train": '{"id": "sgd_train_1_00000", "messages": [{"role": "user", "content": "Hi"}, '
    '{"role": "assistant", "content": "Yes?"}], "services": ["Banks_1"]}\n',
    "topical_chat": "".join(
        f'{{"id": "topical_{part}_ab", "messages": [{{"role": "user", "content": "Hi there"}}, '
        '{"role": "assistant", "content": "Hey"}], "rating": {"agent_1": "Good"}}\n'
        for part in ("valid_freq", "valid_rare", "test_freq", "test_rare")
    ),
}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources of a few files each, as the authors publish them, pinned; tools that fetch packages from `shelf`."""
    shelf = tmp_path / "shelf"
    drawings.write_packages(shelf / "npm")
    lobster = shelf / "npm/@fontsource/lobster"
    (lobster / "files").mkdir(parents=True)
    (lobster / "package.json").write_text("{}")
    (lobster / "LICENSE").write_text("free")
    write_whole_font(lobster / "files/lobster-latin-400-normal.woff")
    lato = shelf / "debian/fonts-lato/usr/share"
    for name in OWN[0].files:
        (lato / "fonts").mkdir(parents=True, exist_ok=True)
        write_whole_font(lato / "fonts" / name)
    (lato / "doc/fonts-lato").mkdir(parents=True)
    (lato / "doc/fonts-lato/copyright").write_text("also free")

    published = tmp_path / "published"
    for path in PUBLISHED.values():
        (published / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (300, 400), "green").save(published / path)
    for path, content in {
        "data/train.jsonl": json.dumps(GSM8K),
        "nlvr/dev/dev.json": json.dumps(NLVR),
        "sgd/train/dialogues_001.json": json.dumps(SGD),
        **{
            f"conversations/{part}_{how}.json": json.dumps(TOPICAL)
            for part in ("valid", "test")
            for how in ("freq", "rare")
        },
    }.items():
        (published / path).parent.mkdir(parents=True, exist_ok=True)
        (published / path).write_text(content)

    faces = {name: sha256((lato / "fonts" / name).read_bytes()) for name in OWN[0].files}
    faces[OWN[1].files[0]] = sha256((lobster / "files" / OWN[1].files[0]).read_bytes())
    names = [package.name for package in origins.icon_packages()]
    pins = {
        "npm": {name: ["1.2.3", origins.tree_sha256(shelf / "npm" / name)] for name in [*names, "@fontsource/lobster"]},
        "faces": faces,
        "shards": {f"{name}.tar": "" for name in KEYS},
        "texts": {
            name: {"sha256": sha256(text.encode()), "lines": text.count("\n"), "licence": "free", "origin": "them"}
            | ({"left_out": ["2_"]} if name == "sgd_train" else {})
            for name, text in TEXTS.items()
        },
    }
    listed = {
        "shards": KEYS,
        "records": {
            photo_origins._class_of(key): {"captions": [f"This is {key}."], "labels": ["it"], "source": "us"}
            | {"license": "free", "caption_type": "template"}
            | ({"attribution": "Jo | photo 42"} if key.startswith("coco") else {})
            for keys in KEYS.values()
            for key in keys
        },
    }
    monkeypatch.setattr(origins, "_pins", lambda: pins)
    monkeypatch.setattr(photo_origins, "_listed", lambda: listed)
    for module in (origins, build, fonts_pack):
        monkeypatch.setattr(module, "FAMILIES", OWN)
    tools(tmp_path / "bin", shelf)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def tools(folder: Path, shelf: Path) -> None:
    """npm, apt-get and dpkg-deb as far as they are used, with packages from a shelf; each call is noted."""
    folder.mkdir()
    script = f"""#!{sys.executable}
import shutil, sys, tarfile
from pathlib import Path
name, shelf = Path(sys.argv[0]).name, Path({str(shelf)!r})
with (shelf / "calls").open("a") as calls:
    print(name, *sys.argv[1:3], file=calls)
if name == "npm":
    package, _, version = sys.argv[2].rpartition("@")
    if version != "1.2.3" or not (shelf / "npm" / package).is_dir():
        sys.exit(f"npm error 404 {{package}} not found")
    with tarfile.open(Path(sys.argv[4]) / "one-1.2.3.tgz", "w:gz") as tar:
        tar.add(shelf / "npm" / package, "package")
elif name == "apt-get":
    if not (shelf / "debian" / sys.argv[2]).is_dir():
        sys.exit("E: Unable to locate package")
    Path(f"{{sys.argv[2]}}_1_all.deb").write_text(sys.argv[2])
else:
    shutil.copytree(shelf / "debian" / Path(sys.argv[2]).read_text(), sys.argv[3], dirs_exist_ok=True)
"""
    for name in ("npm", "apt-get", "dpkg-deb"):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)


def calls(world: Path) -> list[str]:
    path = world / "shelf/calls"
    return path.read_text().splitlines() if path.is_file() else []


def test_everything_at_one_command(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("resvg_py", reason="draws SVG; pip install -r requirements-distill.txt")
    pytest.importorskip("fontTools")
    out = world / "data"
    assert main([str(out), "--from", str(world / "published")]) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert "fetching npm packages: @iconify-json/twemoji@1.2.3 " in said.out
    assert "fetching packages of fonts: fonts-lato @fontsource/lobster@1.2.3" in said.out
    assert {"npm pack openmoji@1.2.3", "apt-get download fonts-lato"} <= set(calls(world))

    # What is there can be read by those that train.
    assert {face.family for face in Fonts(out / "fonts.tar.gz").faces} == {"Lato", "Lobster"}
    photos = Photos(out / "photos", "val")
    assert [photo.name for photo in photos.photos] == ["trashnet_glass12", "coco_val2017_000000000042"]
    assert {key for split, key, _, _ in read_records(out / "photos") if split == "train"} == set(KEYS["train-0000"])
    for name, text in TEXTS.items():
        assert gzip.decompress((out / f"text/{name}.jsonl.gz").read_bytes()).decode() == text
    page = (out / "ATTRIBUTION.md").read_text()
    assert "| Lobster | OFL-1.1 |" in page
    assert "| openmoji | 2 | CC BY-SA 4.0 | OpenMoji, HfG Schwäbisch Gmünd and contributors |" in page
    assert "| us | 4 | free |" in page
    assert "- Jo | photo 42" in page
    assert "| `sgd_train` | 1 | free | them |" in page

    # A second time nothing is fetched, and nothing changes.
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (world / "shelf/calls").unlink()
    assert main([str(out), "--from", str(world / "published"), "--offline"]) == 0
    assert not calls(world)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_given_folders_come_before_the_network(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shards, lines and packages that somebody has already, wherever they lie."""
    pytest.importorskip("fontTools")
    out, given = world / "data", world / "given"
    assert main([str(out), "--only", "photos", "text", "--from", str(world / "published")]) == 0
    given.mkdir()
    (out / "photos").rename(given / "photos")
    (out / "text").rename(given / "text")
    pins: Any = origins._pins()
    for name in pins["shards"]:
        pins["shards"][name] = origins.file_sha256(given / "photos" / name)
    from_all = ["--from", str(given), str(world / "shelf/npm"), str(world / "shelf/debian")]
    assert main([str(out), "--only", "photos", "text", "fonts", *from_all]) == 0
    assert not calls(world)
    assert "2 shards of photos" in capsys.readouterr().out
    for path in given.rglob("*.*"):
        assert (out / path.relative_to(given)).read_bytes() == path.read_bytes()

    (given / "photos/val-0000.tar").write_bytes(b"other")
    assert main([str(out), "--only", "photos", *from_all]) == 1
    assert "val-0000.tar is not the shard that nano was made from; get that one, or take this with --any-version" in (
        capsys.readouterr().err
    )


def test_what_is_missing_is_named_with_the_way_to_get_it(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it, not the first alone; what can be built is."""
    out = world / "data"
    (world / "published/dataset-resized/glass/glass12.jpg").unlink()
    (world / "published/data/train.jsonl").unlink()
    assert main([str(out), "--offline", "--from", str(world / "published")]) == 1
    said = capsys.readouterr().err
    assert "icons: missing npm packages: @iconify-json/twemoji@1.2.3 " in said
    assert "fonts: missing packages of fonts: fonts-lato @fontsource/lobster@1.2.3; leave out --offline" in said
    assert "photos: missing photos: 1 of TrashNet (dataset-resized/CLASS/CLASSN.jpg" in said
    assert "text: missing texts: gsm8k_train, from them: data/train.jsonl; get them from their authors" in said
    assert sorted(path.name for path in (out / "text").iterdir()) == [
        "nlvr_dev.jsonl.gz", "sgd_train.jsonl.gz", "topical_chat.jsonl.gz"
    ]  # fmt: skip
    assert not (out / "icons.tar.gz").exists()


def test_other_versions_are_refused_or_noted(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fontTools")
    out, given = world / "data", ["--from", str(world / "published")]
    (world / "shelf/npm/openmoji/more.txt").write_text("of a later version")
    assert main([str(out), "--only", "icons"]) == 1
    assert "openmoji is not openmoji@1.2.3 as nano was made from it; get that one" in capsys.readouterr().err
    with (world / "published/data/train.jsonl").open("a") as file:
        file.write("\n" + json.dumps(GSM8K))
    assert main([str(out), "--only", "text", *given]) == 1
    assert "gsm8k_train has 2 lines and is not the text of 1 that nano read" in capsys.readouterr().err
    assert main([str(out), "--only", "text", "--any-version", *given]) == 0
    assert "note: gsm8k_train has 2 lines" in capsys.readouterr().out
    face = next((world / "shelf/debian").rglob("Lato-Regular.ttf"))
    face.write_bytes(face.read_bytes() + b"\0")
    assert main([str(out), "--only", "fonts"]) == 1
    assert "Lato-Regular.ttf is not the version that nano was made from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "spoil", "says"),
    [
        (
            "icons",
            lambda w: (w / "bin/npm").unlink(),
            "npm is not installed, which fetches @iconify-json/twemoji@1.2.3",
        ),
        ("icons", lambda w: shutil.rmtree(w / "shelf/npm/openmoji"), "npm pack openmoji@1.2.3 failed (npm error 404"),
        ("fonts", lambda w: (w / "bin/dpkg-deb").unlink(), "dpkg-deb is not installed, which fetches fonts-lato"),
        ("fonts", lambda w: shutil.rmtree(w / "shelf/debian/fonts-lato"), "E: Unable to locate package)"),
        ("text", lambda w: (w / "published/data/train.jsonl").write_text("{}"), "train.jsonl: not as published"),
        ("photos", lambda w: (w / "published" / PUBLISHED["trashnet_glass12"]).write_text("?"), "cannot be read"),
    ],
)
def test_what_goes_wrong_is_a_sentence(
    part: str, spoil: Callable[[Path], Any], says: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(world)
    assert main([str(world / "data"), "--only", part, "--from", str(world / "published")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"{part}: ")
    assert says in said
    assert not list((world / "data").rglob("*.partial"))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--from .*nowhere is no folder"):
        Builder(tmp_path, [tmp_path / "nowhere"])


# --- what is pinned in the project itself ---


def test_pins_are_of_every_source() -> None:
    packages = [*origins.icon_packages(), *origins.font_packages()]
    assert len({package.spec for package in packages}) == len(packages) > 30
    assert {name for family in FAMILIES for name in family.files} == origins.faces().keys()
    assert all(package.startswith("fonts-") for package in origins.debian_packages())
    hashes = [*(p.sha256 for p in packages), *origins.faces().values(), *origins.shards().values()]
    hashes += [text.sha256 for text in origins.texts()]
    assert all(len(one) == 64 for one in hashes)
    assert len(set(hashes)) == len(hashes)
    assert sum(text.lines for text in origins.texts()) == 12_174 + 2_156 + 7_473 + 2_964


def test_the_list_of_photos() -> None:
    keys = [key for of_one in shard_keys().values() for key in of_one]
    assert len(set(keys)) == len(keys) == 6_844 + 286
    assert {f"{name}.tar" for name in shard_keys()} == origins.shards().keys()
    records = [record_of(key) for key in keys]
    assert {record["source"] for record in records} == {name for name, _ in photo_origins.SETS.values()}
    assert all(record["attribution"] for record in records if record["source"] == "COCO 2017")
    assert missing_photos({}) == {"caltech101": 5_245, "grocery": 1_113, "trashnet": 720, "coco": 52}
    assert record_of("caltech101_anchor_0001")["labels"] == ["anchor"]


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((512, 400), (256, 256)), ((100, 130), (100, 100)), ((800, 200), (256, 64)), ((90, 200), (90, 200))],
)
def test_photos_are_made_smaller_only(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert shrink(Image.new("L", size)).size == wanted
    turned = Image.new("RGB", size)
    turned.getexif()[0x0112] = 6
    buffer = io.BytesIO()
    turned.save(buffer, "JPEG", exif=turned.getexif())
    with Image.open(buffer) as image:
        assert shrink(image).size == wanted[::-1]


def test_texts_are_made_of_what_is_published(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(GSM8K | {"answer": "So 1/2 = <<1/2=.5>>.5 and <<2*.5=1>>1 more.\n#### 1"}))
    (line,) = lines("gsm8k_train", [path]).decode().splitlines()
    assert json.loads(line)["messages"][1]["content"] == "So 1/2 = .5 and 1 more."
    with pytest.raises(ValueError, match=r"train.jsonl: not as published .*; get nlvr_dev again"):
        lines("nlvr_dev", [path])


def test_packages_hash_the_same_wherever_they_lie(tmp_path: Path) -> None:
    for name in ("a", "b/c"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub/file").write_text("x")
    assert origins.tree_sha256(tmp_path / "a") == origins.tree_sha256(tmp_path / "b/c")
    (tmp_path / "a/node_modules").mkdir()
    (tmp_path / "a/node_modules/other").write_text("of another package")
    assert origins.tree_sha256(tmp_path / "a") == origins.tree_sha256(tmp_path / "b/c")
    (tmp_path / "a/sub/file").rename(tmp_path / "a/sub/moved")
    assert origins.tree_sha256(tmp_path / "a") != origins.tree_sha256(tmp_path / "b/c")
