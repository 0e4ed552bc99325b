"""Several pictures a conversation: samples joined, and the rows made of them."""

from __future__ import annotations

import random

import pytest
from PIL import Image

from distill.data.batches import Rows
from distill.data.mixture import Mixture
from distill.data.sample import Sample
from distill.data.shapes import Shapes
from distill.data.together import join
from distill.nano import nano_config
from mmmamba.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("checkpoints/nano")


def picture(color: str, turns: int = 3) -> Sample:
    asked = tuple((f"What is {color} number {i}?", f"It is {color}, {i}.") for i in range(turns))
    return Sample(Image.new("RGB", (224, 224), color), asked, color)


def test_every_picture_comes_before_what_is_asked_of_it() -> None:
    at_once = 0
    for seed in range(60):
        joined = join([picture("red"), picture("blue")], random.Random(seed), chars=400)
        assert [image.getpixel((0, 0)) for image in joined.images] == [(255, 0, 0), (0, 0, 255)]
        assert joined.new_images is not None
        assert sum(joined.new_images) == 2
        at_once += joined.new_images[0] == 2
        shown = 0
        for (question, answer), new in zip(joined.turns, joined.new_images, strict=True):
            shown += new
            about = 1 if "red" in answer else 2
            assert about <= shown
            # A picture that is not the last one shown, or one of two shown at once, is named.
            if about < shown or joined.new_images[0] == 2:
                assert ("first", "second")[about - 1] in question.lower() or f"Image-{about}" in question
    assert 5 < at_once < 40


def test_turns_are_kept_as_far_as_they_fit() -> None:
    joined = join([picture("red", 9), picture("blue", 9)], random.Random(0), chars=150)
    assert len(joined.turns) == 4
    assert len(join([picture("red", 9), picture("blue", 9)], random.Random(0), chars=0).turns) == 2


@pytest.mark.parametrize(
    "sample",
    [
        Sample(Image.new("RGB", (9, 9)), (("a", "b"),), "two", (Image.new("RGB", (9, 9)),)),
        Sample(Image.new("RGB", (9, 9)), (("<image> a", "b"),), "placed", placed=True),
        Sample(Image.new("RGB", (9, 9)), (("a", "b"),), "system", system="Be brief."),
    ],
)
def test_samples_that_cannot_be_joined_are_refused(sample: Sample) -> None:
    with pytest.raises(ValueError, match=f"a sample of {sample.task} .*pictures: 1"):
        join([picture("red"), sample], random.Random(0), chars=100)


def test_new_images_must_add_up() -> None:
    with pytest.raises(ValueError, match="add up"):
        Sample(Image.new("RGB", (9, 9)), (("a", "b"), ("c", "d")), "odd", new_images=(0, 2))


def test_rows_hold_both_pictures_and_a_stream_goes_on_where_it_stopped(tokenizer: Tokenizer) -> None:
    config = nano_config()
    rows = Rows(tokenizer, config, "image", seqlen=304, num_images=2)
    whole = Mixture([(Shapes("train"), 1.0)], rows, batch_size=3, joined=True)
    batch = whole.batch(2)
    assert batch.pixels is not None
    assert batch.pixels.shape == (6, 224, 224, 3)
    image_tokens = (batch.input_ids == config.embedding.img_context_token_id).sum(dim=1)
    assert image_tokens.tolist() == [2 * config.tokens_per_tile] * 3
    labels = [
        tokenizer.decode([i for i in row if i != config.embedding.img_context_token_id]) for row in batch.input_ids
    ]
    assert all("Image-2: " in label for label in labels)
    later = Mixture([(Shapes("train"), 1.0)], rows, batch_size=3, joined=True, start=2)
    assert next(iter(later)).input_ids.equal(batch.input_ids)


def test_a_name_keeps_its_capital_where_the_picture_is_named_first() -> None:
    chart = Sample(Image.new("RGB", (9, 9)), (("Sat?", "4."), ("Is it Sat?", "No.")), "chart")
    asked = [q for seed in range(60) for q, _ in join([chart, chart], random.Random(seed), chars=400).turns]
    assert any(q.endswith("picture: is it Sat?") for q in asked)
    assert not any("sat?" in q for q in asked)
