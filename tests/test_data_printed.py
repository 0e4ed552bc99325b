"""Printed text: answers follow from what was printed, nothing held out is trained on, all of it lies in the picture."""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from distill.data.batches import Rows
from distill.data.errors import character_error_rate, edit_distance
from distill.data.fonts import KINDS, Fonts, builtin_font, open_fonts
from distill.data.fonts_pack import FAMILIES, pack_fonts
from distill.data.fonts_pack import main as pack_main
from distill.data.page import Page, Press
from distill.data.pages import MAKERS, random_page
from distill.data.printed import MIN_PX, LargePrint, Printed
from distill.data.printed_questions import READABLE, ask_there
from distill.data.sample import Spelled, held_out, rng_for
from distill.data.shapes import NUMBERS
from distill.data.sheet import ink_on, luma, room
from distill.data.words import HELD_OUT_PERCENT, Words, listed_words, may_print, ordinary_words
from distill.nano import nano_config
from distill.reading import printed_error_rate, reading_questions, reads_right
from mmmamba.checkpoint import BUNDLED_DIR
from mmmamba.tokenizer import load_tokenizer
from tests.reading import write_fonts, write_whole_font


def pages(font_pack: Path, split: str = "train", number: int = 300) -> list[tuple[Page, tuple[tuple[str, str], ...]]]:
    source = Printed(split, fonts=font_pack)
    return [source.page(3, i) for i in range(number)]


# -- words -------------------------------------------------------------------------------------------------------------


def test_words_are_many_and_divided_for_ever() -> None:
    train, val = Words("train"), Words("val")
    assert len(train.plain) > 3000
    assert 200 < len(val.plain) < 0.15 * len(train.plain)
    for name in ("plain", "first_names", "last_names", "cities", "goods", "jobs", "signs"):
        kept, trained = set(getattr(val, name)), set(getattr(train, name))
        assert trained
        assert not kept & trained
        assert all(may_print(word, "val") for word in kept)
    assert not set(listed_words()["unfit"]) & set(train.plain)
    assert all(word.isalpha() and word.islower() for word in ordinary_words())
    # A case or a comma makes no other word of it.
    assert may_print("Rose,", "train") == may_print("rose", "train")


@pytest.mark.parametrize("kind", ["number", "price", "date", "time", "phone", "code"])
def test_numbers_and_dates_are_held_out_whole(kind: str) -> None:
    drawn = {}
    for split in ("train", "val"):
        words = Words(split)
        drawn[split] = {getattr(words, kind)(rng_for(kind, i)) for i in range(400)}
    assert not drawn["train"] & drawn["val"]
    assert all(held_out(text.lower(), HELD_OUT_PERCENT) for text in drawn["val"])


# -- fonts -------------------------------------------------------------------------------------------------------------


def test_letters_are_about_as_tall_in_every_font() -> None:
    font = builtin_font()
    left, top, right, bottom = font.at(40).getbbox("x")
    assert 18 <= bottom - top <= 24
    low = type(font)("Low", "hand", False, False, 0.25, font.data)
    assert low.at(20).size == 40  # as if its x were half as tall: twice the size
    tall = type(font)("Tall", "hand", False, False, 0.75, font.data)
    assert tall.at(20).size == 20  # never below the size that was asked for
    assert right > left


def test_packs_divide_their_families(font_pack: Path, tmp_path: Path) -> None:
    fonts = Fonts(font_pack)
    assert {face.family for face in fonts.of("train")} == {"Plain", "Pen"}
    assert {face.family for face in fonts.of("val")} == {"Kept", "Kept Pen"}
    assert [face.family for face in open_fonts(fonts, "train", ("hand",))] == ["Pen"]
    assert len(open_fonts(font_pack, "train", ("serif",))) == 2, "a pack without serifs gives what it has"
    assert open_fonts(None, "val") == [builtin_font()]
    whole = write_fonts(tmp_path / "whole.tar.gz", held_out=False)
    with pytest.raises(ValueError, match='no fonts for split "val"'):
        Printed("val", fonts=whole)


def test_what_is_no_pack(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"distill\.data\.fonts_pack"):
        Printed(fonts=None)
    broken = tmp_path / "broken.tar.gz"
    with pytest.raises(ValueError, match="no pack of fonts"):
        Fonts(broken)
    broken.write_bytes(b"\x1f\x8bno gzip")
    with pytest.raises(ValueError, match="no pack of fonts"):
        Fonts(broken)


def test_families_hold_every_kind_on_both_sides() -> None:
    assert {family.kind for family in FAMILIES if not family.held_out} == set(KINDS)
    assert {family.kind for family in FAMILIES if family.held_out} == set(KINDS)
    assert len({family.name for family in FAMILIES}) == len(FAMILIES) >= 40


def test_packing_cuts_fonts_and_takes_licences_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fontTools")
    source = tmp_path / "fonts"
    (source / "fonts-lato").mkdir(parents=True)
    out = tmp_path / "fonts.tar.gz"
    assert pack_main([str(out), str(source)]) == 1
    assert "none of the known fonts" in capsys.readouterr().err
    write_whole_font(source / "Lato-Regular.ttf")
    assert pack_main([str(out), str(source)]) == 1, "a font without its licence must stay out"
    (source / "fonts-lato" / "copyright").write_text("free as in made up")
    packed, missing = pack_fonts(out, [source])
    assert packed == ["Lato"]
    assert len(missing) == len(FAMILIES) - 1
    with tarfile.open(out) as tar:
        assert tar.extractfile("licences/lato.txt").read() == b"free as in made up"
        (record,) = json.load(tar.extractfile("fonts.json"))["fonts"]
    assert (record["family"], record["licence"]) == ("Lato", "OFL-1.1")
    (face,) = Fonts(out).faces
    before = Image.new("L", (200, 40))
    after = before.copy()
    ImageDraw.Draw(before).text((2, 2), "Read me", fill=255, font=builtin_font().at(24))
    ImageDraw.Draw(after).text((2, 2), "Read me", fill=255, font=face.at(24))
    assert np.abs(np.asarray(before, int) - np.asarray(after, int)).mean() < 8
    first = out.read_bytes()
    pack_fonts(out, [source])
    assert out.read_bytes() == first
    assert pack_main([str(out), str(source), "--max-mib", "0.001"]) == 1
    assert "more than 0.001" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is no folder"):
        pack_fonts(out, [tmp_path / "nowhere"])


# -- pages -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_pages_fit_and_say_what_their_fields_say(kind: str, split: str, font_pack: Path) -> None:
    press = Press(Words(split), Fonts(font_pack).of(split), MIN_PX[split])
    known = {*ordinary_words(), *(word.lower() for words in listed_words().values() for word in words)}
    for i in range(25):
        page = random_page(rng_for(kind, i), press, kind)
        assert page.image.size == (224, 224)
        assert page.image.mode == "RGB"
        printed = " ".join(text for text, _ in page.boxes)
        for text, (left, top, right, bottom) in page.boxes:
            assert 0 <= left <= right <= 224, text
            assert 0 <= top <= bottom <= 224, text
        for name, value in page.fields:
            assert value in printed or kind == "name tag"
            assert name in printed or kind == "name tag"
        assert Counter(page.text.split()) == Counter(printed.split())
        assert page.total in printed
        if kind == "receipt":
            assert sum(Decimal(price.lstrip("$£€")) for _, price in page.fields) == Decimal(page.total.lstrip("$£€"))
        if kind in READABLE:
            words = {word.lower() for word in page.text.split()} & known
            assert all(may_print(word, split) for word in words if not _is_month(word)), page.text


def _is_month(word: str) -> bool:
    return word[:3] in ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec", "am", "pm")


def test_ink_is_where_the_boxes_are(font_pack: Path) -> None:
    """Outside the boxes of a page of words there is background only, inside there is a clear contrast."""
    source = Printed(fonts=font_pack)
    for i in range(60):
        page = random_page(rng_for("ink", i), source.press, "words")
        grey = np.asarray(page.image.convert("L")).astype(int)
        covered = np.zeros_like(grey, bool)
        for _, (left, top, right, bottom) in page.boxes:
            inside = grey[int(top) : int(bottom) + 1, int(left) : int(right) + 1]
            assert inside.max() - inside.min() > 60, page.text
            covered[max(0, int(top) - 2) : int(bottom) + 3, max(0, int(left) - 2) : int(right) + 3] = True
        assert (~covered).any()
        spread = np.percentile(grey[~covered], 99) - np.percentile(grey[~covered], 1)
        assert spread <= 75, "something was drawn outside the boxes"


def test_letters_are_never_smaller_than_promised(font_pack: Path) -> None:
    for split, height in (("train", 12), ("val", 16)):
        heights = [
            bottom - top
            for page, _ in pages(font_pack, split, 60)
            for text, (_, top, _, bottom) in page.boxes
            if re.search("[A-Z]", text)
        ]
        assert min(heights) >= 0.6 * height  # capitals are 0.7 em tall


def test_ink_stands_out() -> None:
    for i in range(200):
        rng = rng_for("contrast", i)
        background = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        assert abs(luma(ink_on(background, rng)) - luma(background)) >= 100


def test_room_is_what_fits() -> None:
    font = builtin_font()
    size = room(font, ["hello world", "x"], 120, 200)
    assert font.at(size).getlength("hello world") <= 120
    assert font.at(size + 3).getlength("hello world") > 120
    assert room(font, ["hello " * 200], 120, 200) < 12


# -- questions ---------------------------------------------------------------------------------------------------------


def test_same_seed_and_index_give_the_same_sample(font_pack: Path) -> None:
    a, b = Printed(fonts=font_pack).sample(1, 5), Printed(fonts=font_pack).sample(1, 5)
    assert a.turns == b.turns
    assert np.array_equal(np.asarray(a.image), np.asarray(b.image))
    assert Printed(fonts=font_pack).sample(1, 6).turns != a.turns
    assert Printed(fonts=font_pack).sample(1, 5, 1).turns != a.turns


def test_answers_follow_from_the_page(font_pack: Path) -> None:
    seen: Counter[str] = Counter()
    for page, turns in pages(font_pack, number=700):
        assert turns
        for question, answer in turns:
            seen[_check(page, question.rstrip("?."), answer)] += 1
    assert min(seen[k] for k in ("read", "place", "there", "count", "letter", "price", "cell", "field", "about")) > 15
    assert seen["other"] < 0.1 * seen.total(), seen


def _check(page: Page, question: str, answer: str) -> str:
    """Which kind of question it was; asserts that the answer is right, read anew from question and page."""
    asked, bare, words = question.lower(), answer.rstrip("."), page.text.split()
    if answer in ("Yes.", "No."):
        printed = {word.lower() for word in words}
        there = [word for word in re.findall(r"[a-z]+", asked) if word in printed]
        quoted = re.findall(r'"([^"]+)"|word (\w+)|it say (\w+)', asked)
        (word,) = ["".join(groups) for groups in quoted]
        assert (answer == "Yes.") == (word in printed), (question, page.text, there)
        return "there"
    if bare.lower() in NUMBERS and re.search("how many|count|number of", asked) and page.kind != "table":
        number = NUMBERS.index(bare.lower())
        if "word" in asked:
            assert number == len(words)
        elif "line" in asked:
            assert number == len(page.lines)
        else:
            assert number == len(page.fields), question
        return "count"
    if page.kind in READABLE and answer == page.text:
        return "read"
    place = re.search(r"\b(first|second|third|fourth|fifth|last|top)\b", asked)
    if page.kind in READABLE and "letter" in asked and place:
        assert answer == page.text[0 if place[1] == "first" else -1].upper()
        return "letter"
    if page.kind in READABLE and place:
        parts = page.lines if "line" in asked else words
        index = {"first": 0, "top": 0, "second": 1, "third": 2, "fourth": 3, "fifth": 4, "last": -1}[place[1]]
        assert answer == parts[index], (question, page.lines)
        return "place"
    if "-" in answer and "spell" in asked:
        assert answer.replace("-", "") == page.text.upper()
        return "letter"
    if page.kind == "receipt":
        prices = {item.lower(): price for item, price in page.fields}
        named = [item for item in prices if re.search(rf"\b{item}\b", asked)]
        if len(named) == 1 and bare in prices.values():
            assert bare == prices[named[0]], question
            return "price"
        if bare == page.total:
            assert re.search("total|pay|together|sum", asked)
            return "price"
    if page.kind == "table":
        header, *rows = page.table
        row = [r for r in rows if re.search(rf"\b{re.escape(r[0].lower())}\b", asked)]
        column = [i for i, name in enumerate(header) if i and re.search(rf"\b{name.lower()}\b", asked)]
        if len(row) == 1 and len(column) == 1 and not place:
            assert bare.lower() == row[0][column[0]].lower(), (question, page.table)
            return "cell"
    if page.kind == "form" and "fields" not in asked:
        named_fields = [value for label, value in page.fields if re.search(rf"\b{label.lower()}\b", asked)]
        if len(named_fields) == 1:
            value = named_fields[0]
            assert answer == "It is left blank." if not value else bare.lower() == value.lower(), (
                question,
                page.fields,
            )
            return "field"
    if page.kind == "name tag" and bare.lower() == page.fields[0][1].lower():
        return "field"
    if page.kind in ("sign", "lines", "words") and '"' in answer:
        assert f'"{page.text}"' in answer
        return "about"
    lists = {
        "receipt": [[item for item, _ in page.fields]],
        "table": [list(page.table[0]), [row[0] for row in page.table[1:]]] if page.table else [],
        "form": [[label for label, _ in page.fields]],
    }.get(page.kind, [])
    said = re.split(", | and ", re.sub("^A .* with the (?:columns|fields) ", "", bare))
    if said in lists:
        return "list"
    if page.kind == "receipt" and answer.startswith("A receipt"):
        number = NUMBERS[len(page.fields)]
        assert answer == f"A receipt from {page.title} with {number} items and a total of {page.total}."
        return "about"
    if page.kind == "receipt" and re.search("shop|store|where", asked):
        assert bare == page.title
        return "title"
    if page.kind == "name tag" and answer.startswith("A name tag of "):
        assert page.fields[0][1] in answer
        return "about"
    return "other"


def test_yes_and_no_come_equally_often(font_pack: Path) -> None:
    words = Words("train")
    press = Press(words, Fonts(font_pack).of("train"), 12)
    answers: Counter[str] = Counter()
    for i in range(400):
        page = random_page(rng_for("yes", i), press, "lines")
        turn = ask_there(page, rng_for("ask", i), words)
        if turn is not None:
            answers[turn[1]] += 1
    assert abs(answers["Yes."] - answers["No."]) < 80


def test_questions_are_worded_in_many_ways(font_pack: Path) -> None:
    wordings = {question for _, turns in pages(font_pack, number=400) for question, _ in turns}
    assert len(wordings) > 350


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_held_out_text_is_never_trained_on(font_pack: Path) -> None:
    asked = list(reading_questions("printed_text", 40, fonts=font_pack))
    known = set(Words("train").plain)
    words = [word.lower() for _, _, answer in asked for word in answer.split()]
    assert not [word for word in words if word in known and not _is_month(word)]  # months: dates are held out whole
    assert len({answer for _, _, answer in asked}) > 35
    assert max(len(answer.split()) for _, _, answer in asked) == 4
    long = [answer for _, _, answer in reading_questions("printed_long", 20, fonts=font_pack)]
    assert min(len(answer.split()) for answer in long) >= 5


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("abc", "abc", 0), ("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_edit_distance_agrees_with_the_recursive_definition() -> None:
    def slow(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    for i in range(60):
        rng = rng_for("edit", i)
        a, b = ("".join(rng.choice("abc") for _ in range(rng.randint(0, 5))) for _ in range(2))
        assert edit_distance(a, b) == slow(a, b), (a, b)


def test_character_error_rate() -> None:
    assert character_error_rate([("open  daily\n", "open daily"), ("x", "x")]) == 0
    assert character_error_rate([("open", "Open")]) == 0.25
    assert character_error_rate([("", "abcd"), ("abcd", "abcd")]) == 0.5
    assert character_error_rate([("abcdefgh", "ab")]) == 3
    with pytest.raises(ValueError, match="no characters"):
        character_error_rate([("a", " ")])


def test_error_rate_of_a_model_counts_its_replies(font_pack: Path) -> None:
    """A model that reads everything but the last letter errs by one letter a text."""
    texts = [answer for _, _, answer in reading_questions("printed_text", 6, fonts=font_pack)]
    rate = printed_error_rate((f'"{text[:-1]}"', text) for text in texts)
    assert rate == pytest.approx(6 / sum(map(len, texts)))


def test_reading_is_scored_to_the_letter() -> None:
    assert reads_right("printed_text", ' "Open  daily" ', "Open daily")
    assert not reads_right("printed_text", "open daily", "Open daily")
    assert not reads_right("printed_text", "Open dail", "Open daily")


def test_large_print_is_read_and_nothing_else(font_pack: Path) -> None:
    source = LargePrint(fonts=font_pack)
    for i in range(30):
        page, ((_, answer),) = source.page(0, i)
        assert answer == page.text
        assert isinstance(answer, Spelled)
        assert page.kind in ("words", "sign")


def test_what_is_read_is_learned_in_single_characters(font_pack: Path) -> None:
    """The reply is the same text, and a word that was never trained on consists of tokens that were."""
    tokenizer, config = load_tokenizer(BUNDLED_DIR), nano_config()
    rows = Rows(tokenizer, config, "image", seqlen=500)
    spelled = 0
    for i in range(20):
        sample = Printed("val", fonts=font_pack).sample(0, i)
        row = rows.row(sample)
        assert row is not None
        learned = np.flatnonzero(row.loss_mask)
        said = [
            [int(row.input_ids[j]) for j in run] for run in np.split(learned, np.flatnonzero(np.diff(learned) > 1) + 1)
        ]
        for (_, answer), ids in zip(sample.turns, said, strict=True):
            assert tokenizer.decode(ids[:-1]) == answer
            if isinstance(answer, Spelled):
                spelled += 1
                assert len(ids) - 1 >= len(answer)
            else:
                assert ids[:-1] == tokenizer.encode(answer)
    assert spelled > 15
