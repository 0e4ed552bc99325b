"""Icons and flags: styles and things that are held out stay out, and every answer is what the picture shows."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from distill.data.flag_names import color_name, color_names, countries
from distill.data.flags import Flag, Flags, ask_colors
from distill.data.icon_questions import ASKS
from distill.data.icon_scene import Icon, make_scene, read_icons
from distill.data.icons import Icons
from distill.data.icons_pack import main as pack_main
from distill.data.icons_pack import pack_icons
from distill.data.mixture import open_sources
from distill.data.photos_pack import write_packed
from distill.data.restyle import bend, restyle
from distill.data.sample import held_out as hashed_out
from distill.data.sample import rng_for
from distill.data.scene import COLORS
from distill.data.shapes import NUMBERS
from distill.data.things import EVERYDAY, GROUPS, alike, plural, things, with_article
from distill.data.unseen import UNNAMED_PHOTOS, part_of
from distill.tasks import held_out, is_right
from tests import drawings


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return drawings.write_icons(tmp_path_factory.mktemp("icons") / "icons.tar.gz")


# -- things ------------------------------------------------------------------------------------------------------------


def test_the_table_names_things_once_and_groups_that_exist():
    known = things()
    by_name: dict[str, set[int]] = {}
    for thing in known.values():
        by_name.setdefault(thing.name, set()).add(thing.kin)
        assert {*thing.groups, *thing.maybe} <= set(GROUPS)
        assert not set(thing.groups) & set(thing.maybe)
        assert not re.search(r"[=;:?*]", thing.name)
    assert all(len(kins) == 1 for kins in by_name.values()), "a name stands in two families"
    assert sum(thing.taught for thing in {t.name: t for t in known.values()}.values()) > 500
    assert known["dog face"] is known["dog"]
    assert known["lady beetle"].noun == "a ladybug"
    assert known["parrot"].groups == ("bird", "animal")
    assert known["tomato"].maybe == ("fruit", "vegetable")
    assert (known["bread"].noun, known["bread"].plural) == ("bread", "")
    assert not known["moai"].taught


@pytest.mark.parametrize(
    ("name", "article", "many"),
    [
        ("apple", "an apple", "apples"),
        ("umbrella", "an umbrella", "umbrellas"),
        ("unicorn", "a unicorn", "unicorns"),
        ("hourglass", "an hourglass", "hourglasses"),
        ("SUV", "an SUV", "SUVs"),
        ("cup of coffee", "a cup of coffee", "cups of coffee"),
        ("box", "a box", "boxes"),
        ("candy", "a candy", "candies"),
        ("key", "a key", "keys"),
        ("mouse", "a mouse", "mice"),
        ("toothbrush", "a toothbrush", "toothbrushes"),
        ("wolf", "a wolf", "wolves"),
    ],
)
def test_articles_and_plurals(name, article, many):
    assert with_article(name) == article
    assert plural(name) == many


def test_what_looks_alike_is_not_denied():
    known = things()

    def same(a: str, b: str) -> bool:
        return alike(known[a], known[b])

    assert same("red apple", "green apple")  # a word
    assert same("bird", "parrot")  # a broader name
    assert same("rat", "hamster")  # listed
    assert same("hamster", "rat")
    assert not same("dog", "automobile")
    assert not same("rat", "banana")


def test_never_taught_is_a_fixed_share_without_everyday_things():
    names = [thing.name for thing in {t.name: t for t in things().values()}.values() if thing.taught]
    parts = Counter(map(part_of, names))
    assert 0.06 < (parts["train"] + parts["val"]) / len(names) < 0.16
    assert min(parts["train"], parts["val"]) > 20
    assert {part_of(name) for name in ("dog", "Heart", "car", "SUNFLOWER", "")} == {"taught"}
    assert part_of("moai", taught=False) != "taught"
    assert {part_of(name) for name in UNNAMED_PHOTOS} == {"train"}
    assert all(hashed_out(f"unnamed photo: {name}", 30) for name in UNNAMED_PHOTOS)
    assert not UNNAMED_PHOTOS & EVERYDAY
    others = [part_of(f"name {i}") for i in range(2000)]
    assert 0.12 < 1 - others.count("taught") / 2000 < 0.18
    assert abs(others.count("train") - others.count("val")) < 80


# -- icons -------------------------------------------------------------------------------------------------------------


def test_same_seed_and_index_give_the_same_sample(packed):
    a, b, other = Icons(packed).sample(1, 5), Icons(packed).sample(1, 5), Icons(packed).sample(1, 6)
    assert a.turns == b.turns
    assert a.image.size == (224, 224)
    assert np.array_equal(np.asarray(a.image), np.asarray(b.image))
    assert not np.array_equal(np.asarray(a.image), np.asarray(other.image))
    assert not np.array_equal(np.asarray(a.image), np.asarray(Icons(packed).sample(1, 5, attempt=1).image))


def test_styles_and_things_are_held_out(packed):
    train, val = Icons(packed), Icons(packed, "val")
    styles = [{icon.key.split("-")[0] for of in source.by_thing.values() for icon in of} for source in (train, val)]
    assert styles == [{"round", "flat"}, {"strange"}]
    parts = drawings.some_things()
    taught = {thing.name for thing in parts["taught"]}
    assert {thing.name for thing in train.things} == {thing.name for thing in val.things} == taught
    never = [thing.noun for part in ("train", "val") for thing in parts[part]]
    said = " ".join(text for i in range(300) for turn in train.sample(0, i).turns for text in turn)
    assert not [noun for noun in never if re.search(rf"\b{re.escape(noun)}\b", said)]


def test_icons_lie_within_the_picture_apart_and_where_the_scene_says(packed, monkeypatch):
    monkeypatch.setattr("distill.data.icon_scene.restyle", lambda picture, rng: picture)
    source = Icons(packed)
    numbers: Counter[int] = Counter()
    for i in range(200):
        scene, sample = source.scene(0, i)
        numbers[len(scene.placed)] += 1
        assert [p.x for p in scene.placed] == sorted(p.x for p in scene.placed)
        pixels = np.asarray(sample.image, int)
        for p in scene.placed:
            assert p.width / 2 - 0.01 <= p.x <= 1.01 - p.width / 2
            found = pixels[int(p.y * 224), int(p.x * 224)]
            assert np.abs(found - drawings.color_of(p.icon.thing.name)).max() < 12, "another thing is drawn here"
            assert np.abs(found - np.array(scene.look.background)).sum() > 60, "hardly to be seen"
        for a in scene.placed:
            for b in scene.placed:
                apart = max(abs(a.x - b.x) - (a.width + b.width) / 2, abs(a.y - b.y) - (a.height + b.height) / 2)
                assert a is b or apart > -0.001
    assert set(numbers) == {1, 2, 3, 4}


def asked(packed: Path, number: int = 1500):
    """Scenes of taught things with a question of each sort, in lower case without the mark."""
    source = Icons(packed)
    for i in range(number):
        rng = rng_for("asked", i)
        scene, _ = make_scene(source._choose(rng), rng)
        for ask in ASKS:
            turn = ask(scene, source.things, rng)
            if turn is not None:
                yield ask.__name__, scene, turn[0].lower().rstrip("?."), turn[1]


def test_answers_are_what_the_scene_holds(packed):
    """Read back from the words with the table, not by the code that wrote them."""
    by_noun = {thing.noun.lower(): thing for thing in things().values()}
    by_plural = {thing.plural.lower(): thing for thing in things().values() if thing.plural}
    groups = {noun: group for group in GROUPS for noun in (with_article(group), group)}
    group_plurals = {many: group for group, many in GROUPS.items()}
    seen: Counter[str] = Counter()
    counts: Counter[str] = Counter()

    def longest(names):
        words = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in sorted(names, key=len, reverse=True)))
        return lambda text: found[0] if (found := words.search(text)) else None

    noun_in, group_in = longest(by_noun), longest(groups)
    plural_in = longest([*by_plural, *group_plurals, "things", "objects", "icons", "items"])
    for kind, scene, question, answer in asked(packed, 700):
        present = scene.things
        if kind == "ask_exist":
            thing = by_noun[noun_in(question)]
            assert (answer == "Yes.") == (thing.name in [t.name for t in present]), question
            seen[answer] += 1
        elif kind == "ask_count":
            name = plural_in(question)
            if name in by_plural and name not in group_plurals:
                number = sum(t.name == by_plural[name].name for t in present)
            else:
                number = sum(name not in group_plurals or group_plurals[name] in t.groups for t in present)
            assert answer == NUMBERS[number].capitalize() + ".", (question, [t.name for t in present])
            seen["count"] += 1
            counts[answer] += 1
        elif kind == "ask_group" and answer in ("Yes.", "No."):
            group = groups[group_in(question)]
            assert (answer == "Yes.") == any(group in t.groups for t in present), question
            assert not any(group in t.maybe for t in present)
            seen[f"group {answer}"] += 1
        elif kind == "ask_group" and (group := group_in(question)):
            (thing,) = [t for t in present if groups[group] in t.groups]
            assert answer.lower() == thing.noun.lower() + "."
            seen["which"] += 1
        elif kind == "ask_group":
            assert answer.lower().removesuffix(".").removeprefix("an ").removeprefix("a ") == present[0].groups[0]
            seen["kind"] += 1
    assert min(seen[key] for key in ("Yes.", "No.", "count", "group Yes.", "group No.", "which", "kind")) > 10, seen
    assert abs(seen["Yes."] - seen["No."]) < 0.15 * (seen["Yes."] + seen["No."])
    assert abs(seen["group Yes."] - seen["group No."]) < 0.25 * (seen["group Yes."] + seen["group No."])
    assert set(counts) == {"None.", "One.", "Two.", "Three.", "Four."}
    assert counts["One."] < 0.55 * seen["count"], "half of them, of 434 counts"


def test_sides_are_right(packed):
    by_noun = {thing.noun.lower(): thing.name for thing in things().values()}
    ends = {
        "left": (0, -1),
        "right": (0, 1),
        "top": (1, -1),
        "upper": (1, -1),
        "highest": (1, -1),
        "bottom": (1, 1),
        "lower": (1, 1),
        "lowest": (1, 1),
        "above": (1, -1),
        "higher": (1, -1),
        "below": (1, 1),
    }
    seen: Counter[str] = Counter()
    for kind, scene, question, answer in asked(packed):
        if kind != "ask_side":
            continue
        if answer in ("Yes.", "No."):
            match = re.match(
                r"is the (.+?) (?:to the |on the )?(left|right|above|below|higher|lower)\b.*? the (.+)$", question
            )
            name_a, word, name_b = match.groups()
            name_b = name_b.removeprefix("side of the ").removeprefix("left of the ").removeprefix("right of the ")
            (a,) = [p for p in scene.placed if p.icon.thing.name.lower() == name_a]
            (b,) = [p for p in scene.placed if p.icon.thing.name.lower() == name_b]
            axis, sign = ends[word]
            distance = ((a.x, a.y)[axis] - (b.x, b.y)[axis]) * sign
            assert abs(distance) > 0.16
            assert (answer == "Yes.") == (distance > 0), (question, a, b)
            seen[answer] += 1
        else:
            axis, sign = next(end for word, end in ends.items() if word in question)
            far = max(scene.placed, key=lambda p: (p.x, p.y)[axis] * sign)
            assert far.icon.thing.name == by_noun[answer.lower().rstrip(".")], question
            seen["end"] += 1
    assert min(seen[key] for key in ("Yes.", "No.", "end")) > 50, seen
    assert abs(seen["Yes."] - seen["No."]) < 0.2 * (seen["Yes."] + seen["No."])


def test_the_last_question_names_everything(packed):
    source = Icons(packed)
    by_name = {thing.name: thing for thing in source.things}
    wordings = set()
    checked = 0
    for i in range(300):
        scene, sample = source.scene(2, i)
        wordings |= {question for question, _ in sample.turns}
        assert 1 <= len(sample.turns) <= 5
        assert len(set(sample.turns)) == len(sample.turns)
        said: Counter[str] = Counter()
        for part in re.split(", | and ", sample.turns[-1][1].rstrip(".")):
            number, _, rest = part.partition(" ")
            for thing in by_name.values():
                if part.lower() == thing.noun.lower():
                    said[thing.name] += 1
                elif rest and rest == thing.plural and number.lower() in NUMBERS:
                    said[thing.name] += NUMBERS.index(number.lower())
        if len(scene.placed) > 1 and sum(said.values()) == len(scene.placed):
            assert said == Counter(thing.name for thing in scene.things)
            checked += 1
    assert checked > 100
    assert len(wordings) > 250


def test_damaged_icons_are_named(tmp_path, packed):
    with pytest.raises(ValueError, match="neither a folder"):
        Icons(tmp_path / "nowhere.tar.gz")
    path = tmp_path / "icons.tar"
    thing = drawings.some_things()["taught"][0]
    record = drawings.icon_record(thing, "round")
    write_packed(path, [("train/x", b"no picture", record)], max_mib=None, what="icons")
    with pytest.raises(ValueError, match="drawing x cannot be decoded"):
        Icons(path).sample(0, 0)
    with pytest.raises(ValueError, match='kind "flag" and split "train"'):
        Flags(path)
    del record["kin"]
    write_packed(path, [("train/x", b"no picture", record)], max_mib=None, what="icons")
    with pytest.raises(ValueError, match=r"record of x .* \(KeyError\('kin'\)\)"):
        read_icons(path, "train")
    unseen = drawings.some_things()["val"][0]
    picture = drawings.webp(drawings.disc("x"))
    write_packed(path, [("train/x", picture, drawings.icon_record(unseen, "round"))], max_mib=None, what="icons")
    with pytest.raises(ValueError, match=r'no icon of split "train" that is taught'):
        Icons(path)


def test_invisible_icons_get_another_background():
    """A black thing is never drawn on black."""
    thing = things()["ant"]
    image = Image.new("RGBA", (30, 30), (5, 5, 5, 255))
    for i in range(60):
        scene, _ = make_scene([Icon("ant", drawings.webp(image), thing, "ant")], rng_for("dark", i))
        assert sum(scene.look.background) > 80


# -- flags -------------------------------------------------------------------------------------------------------------


def test_flags_answer_what_they_are(packed):
    source = Flags(packed)
    pictures = {flag.country: flag for flag in source.flags}
    answers: Counter[str] = Counter()
    for i in range(400):
        sample = source.sample(0, i)
        assert sample.image.size == (224, 224)
        (whose,) = [
            answer
            for _, answer in sample.turns
            if answer.rstrip(".").removeprefix("The flag of ").lower() in {name.lower() for name in pictures}
        ]
        country = next(n for n in pictures if n.lower() == whose.rstrip(".").removeprefix("The flag of ").lower())
        for question, answer in sample.turns:
            named = [name for name in pictures if name in question]
            if named:
                assert (answer == "Yes.") == (named == [country]), question
                answers[answer] += 1
            elif answer in ("Yes.", "No."):
                color = next(c for c in COLORS if re.search(rf"\b{c}\b", question))
                assert (answer == "Yes.") == (color in drawings.FLAGS[country])
            elif answer != whose:
                assert set(re.findall(r"\w+", answer.lower())) - {"and"} == set(drawings.FLAGS[country])
    assert min(answers.values()) > 50
    assert abs(answers["Yes."] - answers["No."]) < 50


def test_drawings_are_changed_in_training_alone_and_stay_what_they_are(packed):
    apple = Image.new("RGBA", (60, 40))
    ImageDraw.Draw(apple).ellipse((10, 5, 50, 35), fill=(200, 30, 30, 255))
    looks = [restyle(apple.copy(), rng_for("look", i)) for i in range(40)]
    assert len({look.tobytes() for look in looks}) > 25
    for look in looks:
        red, green, blue, alpha = np.asarray(look, int)[look.height // 2, look.width // 2]
        assert alpha == 255
        assert red > max(green, blue) + 20, "still a red thing"
        assert look.getpixel((0, 0))[3] == 0
    bent = bend(apple, rng_for("bent"))
    assert bent.width == apple.width
    assert bent.height > apple.height
    assert np.asarray(bent)[..., 3].sum() == np.asarray(apple)[..., 3].sum(), "no pixel is lost"
    cloth = Image.new("RGBA", (120, 60), (200, 30, 30, 255))
    ends = [np.asarray(bend(cloth, rng_for("folds", i)))[..., 3].argmax(0).astype(int) for i in range(60)]
    turns = [int((np.diff(np.sign(steps[steps != 0])) != 0).sum()) for steps in map(np.diff, ends)]
    assert min(turns) == 0
    assert 10 < sum(number > 1 for number in turns) < 50, turns
    assert Icons(packed, "val").sample(0, 0).image.tobytes() == Icons(packed, "val").sample(0, 0).image.tobytes()


def test_train_and_val_show_flags_differently(packed, monkeypatch):
    monkeypatch.setattr("distill.data.flags.restyle", lambda picture, rng: picture)
    train, val = Flags(packed), Flags(packed, "val")
    assert not {flag.key for flag in train.flags} & {flag.key for flag in val.flags}
    assert train.countries == val.countries

    def waves(image: Image.Image) -> bool:
        """Whether the red half's lower end goes up and down again, or down and up, within the flag."""
        pixels = np.asarray(image, int)
        red = (pixels[..., 0] > 1.6 * pixels[..., 1]) & (pixels[..., 0] > 1.6 * pixels[..., 2])
        ends = 223 - red[::-1].argmax(0)[red.sum(0) > 8]
        middle = ends[len(ends) // 12 : -(len(ends) // 12) or None]
        rises = np.sign(np.diff(middle[:: max(1, len(middle) // 16)]))
        return int((np.diff(rises[rises != 0]) != 0).sum()) >= 2

    poland = next(flag for flag in train.flags if flag.country == "Poland")
    flat = [train.draw(poland, rng_for("flat", i)) for i in range(20)]
    waving = [val.draw(poland, rng_for("waving", i)) for i in range(20)]
    assert sum(map(waves, flat)) <= 2, "some hang in folds, few like the waves of val"
    assert sum(map(waves, waving)) > 14


def test_colors_of_flags_are_certain_or_not_said():
    assert color_names(drawings.flag("France")) == ["red", "blue", "white"]
    assert color_names(drawings.flag("Poland")) == ["red", "white"]
    emblem = drawings.flag("Poland")
    ImageDraw.Draw(emblem).rectangle((10, 10, 14, 14), fill=(0, 0, 0))  # 1.4 % black
    assert color_names(emblem) == []
    assert color_names(Image.new("RGB", (40, 30), (120, 90, 60))) == []
    assert [color_name(*rgb) for rgb in ((206, 17, 38), (0, 146, 70), (255, 205, 0), (230, 80, 20))] == [
        "red",
        "green",
        "yellow",
        "",
    ]
    flag = Flag("x", b"", "France", ("red", "blue", "white"))
    assert "Red, blue and white." in {ask_colors(flag, rng_for(i))[1] for i in range(20)}


def test_countries_have_flags_of_their_own(tmp_path):
    rows = [
        {"code": "fr", "name": "France", "iso": True},
        {"code": "gp", "name": "Guadeloupe", "iso": True},
        {"code": "td", "name": "Chad", "iso": True},
        {"code": "eu", "name": "Europe", "iso": False},
        {"code": "nl", "name": "Netherlands", "iso": True},
    ]
    (tmp_path / "country.json").write_text(json.dumps(rows))
    assert countries(tmp_path / "country.json") == {"fr": "France", "nl": "the Netherlands"}


# -- packing -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def packages(tmp_path) -> Path:
    return drawings.write_packages(tmp_path / "node_modules")


def test_packing_draws_each_style_into_its_split(packages, tmp_path):
    pytest.importorskip("resvg_py", reason="draws SVG; pip install -r requirements-distill.txt")
    out = tmp_path / "icons.tar"
    assert pack_icons(packages, out, size_px=32) == 7 + 4
    icons = {split: {icon.key: icon for icon in read_icons(out, split)} for split in ("train", "val")}
    assert {key.rsplit("-", 2)[0] for key in icons["train"]} == {
        "twemoji", "noto", "fluent-flat", "fluent-3d", "openmoji"
    }  # fmt: skip
    assert {key.rsplit("-", 2)[0] for key in icons["val"]} == {"fxemoji", "streamline"}
    assert {icon.thing.name for of in icons.values() for icon in of.values()} == {"dog"}
    drawn = icons["train"]["twemoji-1f415-0"].open()
    assert max(drawn.size) == 32, "cut to what is drawn"
    assert np.abs(np.array(drawn.getpixel((16, 16))) - (204, 0, 0, 255)).max() < 12
    assert [flag.country for flag in Flags(out).flags] == ["Japan", "Japan"]
    assert {flag.key for flag in Flags(out, "val").flags} == {"fluent-3d-flag-jp", "openmoji-flag-jp"}
    again = tmp_path / "again.tar"
    pack_icons(packages, again, size_px=32)
    assert again.read_bytes() == out.read_bytes()


def test_packing_says_what_is_missing(packages, tmp_path, capsys):
    (packages / "emojibase-data/en/data.json").write_text("[]")
    assert pack_main([str(packages), str(tmp_path / "out.tar")]) == 1
    assert "emojibase-data has no emoji dog face" in capsys.readouterr().err
    assert pack_main([str(tmp_path), str(tmp_path / "out.tar")]) == 1
    assert "lacks the package @iconify-json/twemoji" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


# -- mixing and evaluation ---------------------------------------------------------------------------------------------


def test_sources_are_opened_by_name(packed):
    sources = open_sources({"icons": 2, "flags": 1, "shapes": 0}, icons=packed)
    assert [(type(source), weight) for source, weight in sources] == [(Icons, 2), (Flags, 1)]
    with pytest.raises(ValueError, match='the weights name "flags"; say with icons='):
        open_sources({"flags": 1})


@pytest.mark.parametrize("task", ["icons_style", "flags", "unknown_icons"])
def test_held_out_questions_repeat_and_accept_their_own_answer(task, packed):
    questions, again = (held_out(task, 3, seed=1, icons=packed) for _ in range(2))
    assert len(questions) == 3
    for a, b in zip(questions, again, strict=True):
        assert (a.question, a.answer) == (b.question, b.answer)
        assert np.array_equal(np.asarray(a.image), np.asarray(b.image))
        assert all(is_right(task, answer, a.answer) for answer in a.answer.split("|"))
        assert not is_right(task, "", a.answer)
        assert not is_right(task, "Something else.", a.answer)
    with pytest.raises(ValueError, match=f"task {task} needs icons"):
        held_out(task, 1)


def test_held_out_icons_are_taught_things_and_the_unknown_are_not(packed):
    parts = {part: {thing.name for thing in of} for part, of in drawings.some_things().items()}
    known = {
        re.sub("^an? |[.]$", "", question.answer.split("|")[0].lower())
        for question in held_out("icons_style", 60, icons=packed)
    }
    assert known == {name.lower() for name in parts["taught"]}
    unknown = [question.answer.split("|") for question in held_out("unknown_icons", 60, icons=packed)]
    assert len(unknown) == 3 * len(parts["val"]), "every style, each icon once"
    assert all(set(answers) & parts["val"] for answers in unknown)


@pytest.mark.parametrize(
    ("task", "predicted", "answer", "right"),
    [
        ("icons_style", "a ladybug", "A ladybug.|Ladybug.|Lady beetle.", True),
        ("icons_style", "Lady beetle", "A ladybug.|Ladybug.|Lady beetle.", True),
        ("icons_style", "A beetle.", "A ladybug.|Ladybug.|Lady beetle.", False),
        ("flags", "Japan", "Japan.", True),
        ("flags", "This is the flag of Japan.", "Japan.", True),
        ("flags", "Netherlands", "The Netherlands.", True),
        ("flags", "The flag of South Korea.", "Japan.", False),
    ],
)
def test_scoring(task, predicted, answer, right):
    assert is_right(task, predicted, answer) is right
