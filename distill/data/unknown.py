"""Honest answers: what a picture does not show, what is not in it, and things that were never taught.

Three kinds of samples, each beside the others so that neither "I can't tell" nor a name is always right:
* a scene of shapes with questions it cannot answer ("Who drew this?") or that ask for what is not there ("What color is
  the star?"), among questions it can answer;
* an icon of a thing that is never taught, with an answer that stays general ("It is some kind of animal.");
* a photo of a class that is never taught, likewise; a small part of a photo, too little to tell what it shows; and
  photos of taught classes with questions they cannot answer.

Which things are never taught, and which of them only evaluation shows: see `distill.data.unseen`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from distill.data.groups import absent_group
from distill.data.icon_questions import NAME_QUESTIONS, ask_is_group
from distill.data.icon_scene import Icon, make_scene, read_icons
from distill.data.photos import LABEL_QUESTIONS, Photo, augment, read_photos, squash
from distill.data.sample import QA, Sample, Split, casual, check_split, rng_for, sentence
from distill.data.scene import Scene, draw_scene, random_scene
from distill.data.shapes import QUESTIONS
from distill.data.unseen import part_of

_SIZE_PX = 224
_SCRAP_SIDE = (0.12, 0.25)  # of a photo's shorter side
NOT_SURE = "I am not sure what this is."

# Asked of any picture, and answered by none. The answers say what is missing.
_OF_ANY = (
    (
        ("Who made this picture?", "Who drew this?", "Who is the author of this?"),
        "The picture does not say who made it.",
    ),
    (("When was this made?", "What year is this from?", "How old is this picture?"), "I can't tell when it was made."),
    (("Where was this made?", "In which city is this?", "Which place is this?"), "I can't tell where this is."),
    (("What is behind the camera?", "What is next to the picture?"), "I can't see what is outside of the picture."),
    (("What happened before this?", "What happens next?"), "A single picture does not show that."),
    (
        ("What time is it?", "What time of day is it?", "What day is it today?"),
        "I can't tell the time from this picture.",
    ),
    (("How much does this cost?", "What is the price?"), "The picture does not show a price."),
    (("Who owns this?", "What is the name of the owner?", "Whose is this?"), "I can't tell who owns it."),
    (("What does it smell like?", "How does it taste?"), "A picture has no smell or taste."),
    (("What sound does this make here?", "What can be heard?"), "I can't hear anything in a picture."),
    (("How heavy is it?", "What does this weigh?"), "I can't tell the weight from a picture."),
    (("What is on the other side?", "What does the back look like?"), "The picture does not show the other side."),
    (("What am I thinking?", "What is my name?", "Who am I?"), "I can't know that from a picture."),
    (("How warm is it there?", "What is the temperature?"), "I can't tell the temperature from this picture."),
)

# Of what is not there: {} is a name without an article.
_OF_ABSENT = (
    "What color is the {}?",
    "Where is the {}?",
    "How big is the {}?",
    "What is to the left of the {}?",
    "What is above the {}?",
    "Is the {} on the left or on the right?",
    "What is next to the {}?",
    "Which shape is below the {}?",
)

# What the classes of photos are some kind of, for an answer that stays general; others have none.
_PHOTO_GROUPS = {
    "animal": """
        ant, bass fish, beaver, brontosaurus dinosaur, butterfly, cougar, crab, crayfish, crocodile, dalmatian
        dog, dolphin, dragonfly, elephant, emu, flamingo, gerenuk antelope, hawksbill sea turtle, hedgehog, ibis
        bird, kangaroo, leopard, llama, lobster, mayfly, nautilus, octopus, okapi, panda, pigeon, platypus,
        rhino, rooster, scorpion, seahorse, starfish, stegosaurus dinosaur, tick, wild cat""",
    "plant": "bonsai tree, joshua tree, lotus flower, sunflower, water lily",
    "vehicle": "airplane, car, ferry, helicopter, motorbike, sailing boat, sailing ship",
    "musical instrument": "accordion, electric guitar, euphonium, grand piano, mandolin, saxophone",
    "building": "minaret, pagoda, pyramid",
}
# Broader names that are right as well, where the last word of the name does not say them.
_ALSO = {
    "binoculars": ("optical instrument",),
    "crayfish": ("crustacean", "shellfish"),
    "ferry": ("ship", "boat"),
    "menorah": ("candlestick", "candelabra"),
    "milk": ("milk carton", "carton of milk", "carton", "drink", "food"),
    "seahorse": ("fish", "sea animal"),
}
_GROUP_OF_CLASS = {
    name.strip(): group for group, names in _PHOTO_GROUPS.items() for name in names.replace("\n", " ").split(",")
}


class Unknown:
    """Pictures with questions that an honest answer does not fully answer. A `Source`.

    Args:
        icons: the file of `icons_pack`, or None for no icons.
        photos: where the photos lie, or None for no photos.
    Raises: ValueError as `read_icons` and `read_photos`.
    """

    name = "unknown"

    def __init__(
        self, split: Split = "train", *, icons: str | Path | None = None, photos: str | Path | None = None
    ) -> None:
        self.split = check_split(split)
        self.icons = unseen_icons(Path(icons), split) if icons is not None else []
        self.photos: list[Photo] = []
        self.taught_photos: list[Photo] = []
        if photos is not None:
            known = read_photos(Path(photos), split)
            self.taught_photos = [photo for photo in known if _is_mute(photo)]
            self.photos = unseen_photos(Path(photos), split, known)

    def sample(self, seed: int, index: int, attempt: int = 0) -> Sample:
        rng = rng_for(self.name, self.split, seed, index, attempt)
        makes = [self._of_shapes, self._of_icon, self._of_photo, self._of_scrap, self._of_taught_photo]
        taught = bool(self.taught_photos)
        weights = (3.0, 3.5 * bool(self.icons), 7.0 * bool(self.photos), 1.5 * taught, 1.0 * taught)
        return rng.choices(makes, weights)[0](rng)

    def _of_shapes(self, rng: random.Random) -> Sample:
        scene = random_scene(rng, self.split)
        turns = [ask_unanswerable(rng) if rng.random() < 0.4 else ask_absent(scene, rng)]
        for _ in range(rng.randint(1, 3)):
            turn = rng.choice(list(QUESTIONS.values()))(scene, rng) if rng.random() < 0.7 else ask_absent(scene, rng)
            if turn is not None and turn[1] not in [answer for _, answer in turns]:
                turns.append(turn)
        rng.shuffle(turns)
        return self._sample(draw_scene(scene, _SIZE_PX), turns, rng)

    def _of_icon(self, rng: random.Random) -> Sample:
        icon = rng.choice(self.icons)
        scene, image = make_scene([icon], rng)
        turns = [unseen_icon_turn(icon, rng)]
        # As with known things, so that it is the picture that tells, not what is asked.
        if rng.random() < 0.5 and (turn := ask_is_group(scene, rng)) is not None:
            turns.insert(0, turn)
        return self._sample(image, turns, rng)

    def _of_photo(self, rng: random.Random) -> Sample:
        photo = rng.choice(self.photos)
        return self._sample(self._draw(photo, rng), [unseen_photo_turn(photo, rng)], rng)

    def _of_scrap(self, rng: random.Random) -> Sample:
        """Classes that are never taught can be learned by heart; of what is too little to tell there is no end."""
        image = rng.choice(self.taught_photos).open()
        side = max(8, round(rng.uniform(*_SCRAP_SIDE) * min(image.size)))
        left, top = (rng.randint(0, length - side) for length in image.size)
        scrap = squash(image.crop((left, top, left + side, top + side)), _SIZE_PX)
        return self._sample(scrap, [(rng.choice(LABEL_QUESTIONS), NOT_SURE)], rng)

    def _of_taught_photo(self, rng: random.Random) -> Sample:
        photo = rng.choice(self.taught_photos)
        turns = [ask_unanswerable(rng), (rng.choice(LABEL_QUESTIONS), sentence(photo.name))]
        rng.shuffle(turns)
        return self._sample(self._draw(photo, rng), turns, rng)

    def _draw(self, photo: Photo, rng: random.Random) -> Image.Image:
        image = photo.open()
        return squash(augment(image, rng, _SIZE_PX, mirror=False) if self.split == "train" else image, _SIZE_PX)

    def _sample(self, image: Image.Image, turns: list[QA], rng: random.Random) -> Sample:
        return Sample(image, tuple((casual(rng, question), answer) for question, answer in turns), self.name)


def _is_mute(photo: Photo) -> bool:
    """A photo of something taught on which no price, time or place can be read."""
    readable = ("wristwatch", "dollar bill", "stop sign")
    return (
        bool(photo.class_name)
        and not photo.kind
        and photo.class_name not in readable
        and part_of(photo.class_name) == "taught"
    )


def unseen_icons(path: Path, split: Split) -> list[Icon]:
    """Icons of things that are never taught and that this split asks about.

    For evaluation in all styles, since no training sample shows such a thing; for training in the styles of training.
    """
    icons = read_icons(path, None if split == "val" else split)
    return [icon for icon in icons if part_of(icon.thing.name, taught=icon.thing.taught) == split]


def unseen_photos(path: Path, split: Split, known: Sequence[Photo] | None = None) -> list[Photo]:
    """Photos of classes that are never taught and that this split asks about.

    For evaluation from all shards, since no training sample shows such a photo either way; for training from "train".

    Args:
        known: all photos of split "train", if they were read already.
    """
    photos = known if known is not None and split == "train" else read_photos(path, None if split == "val" else split)
    return [photo for photo in photos if part_of(photo.class_name) == split]


# -- questions ---------------------------------------------------------------------------------------------------------


def ask_unanswerable(rng: random.Random) -> QA:
    """What no picture here answers."""
    questions, answer = rng.choice(_OF_ANY)
    return rng.choice(questions), answer


def ask_absent(scene: Scene, rng: random.Random) -> QA:
    """Something about a shape that is not there."""
    name = absent_group(scene, rng).singular
    return rng.choice(_OF_ABSENT).format(name), f"There is no {name} in the picture."


def unseen_icon_turn(icon: Icon, rng: random.Random) -> QA:
    """What is this?  Answered by the broadest sure group, or not at all."""
    groups = icon.thing.groups
    return rng.choice(NAME_QUESTIONS), general_answer(groups[-1] if groups else "")


def unseen_photo_turn(photo: Photo, rng: random.Random) -> QA:
    return rng.choice(LABEL_QUESTIONS), general_answer(photo_group(photo))


def photo_group(photo: Photo) -> str:
    """The broad label of the record, or the group of its class, or ""."""
    return photo.kind or _GROUP_OF_CLASS.get(photo.class_name, "")


def general_answer(group: str) -> str:
    if group == "person":
        return "It is a person."
    return f"It is some kind of {group.removeprefix('piece of ')}." if group else NOT_SURE


def accepted_of_icon(icon: Icon) -> list[str]:
    """Every honest answer, the best first; what a hedge looks like, `distill.tasks` knows."""
    thing = icon.thing
    head = thing.name.split()[-1]  # a black bird is a bird
    names = [general_answer(g) for g in (*thing.groups[::-1], *thing.maybe)]
    return list(
        dict.fromkeys((*(names[:1] if thing.groups else [NOT_SURE]), *names, NOT_SURE, thing.name, head, icon.label))
    )


def accepted_of_photo(photo: Photo) -> list[str]:
    """As `accepted_of_icon`; the last word of a name is right too: a "Windsor chair" is a chair."""
    best = general_answer(photo_group(photo))
    also = _ALSO.get(photo.class_name, ())
    heads = [name.split(",")[0].split()[-1] for name in photo.accepted if name]
    return list(dict.fromkeys((best, NOT_SURE, *photo.accepted, *heads, *also)))


def unknown_shapes_question(seed: int, index: int) -> Sample:
    """One question about a held-out scene that it does not answer."""
    rng = rng_for("unknown_shapes", seed, index)
    scene = random_scene(rng, "val")
    question, answer = ask_unanswerable(rng) if rng.random() < 0.4 else ask_absent(scene, rng)
    return Sample(draw_scene(scene, _SIZE_PX), ((casual(rng, question), answer),), "unknown_shapes")


def unknown_photo_questions(photos: list[Photo], count: int, seed: int) -> list[tuple[Sample, list[str]]]:
    """What is this?  Of at most `count` photos that nothing in training looks like by name, each asked once."""
    rng = rng_for("unknown_photos", seed)
    asked = []
    for photo in rng.sample(photos, min(count, len(photos))):
        question, answer = unseen_photo_turn(photo, rng)
        image = squash(photo.open(), _SIZE_PX)
        asked.append((Sample(image, ((casual(rng, question), answer),), "unknown_photos"), accepted_of_photo(photo)))
    return asked


def unknown_icon_questions(icons: list[Icon], count: int, seed: int) -> list[tuple[Sample, list[str]]]:
    """The same of icons, with one drawing of each thing first."""
    rng = rng_for("unknown_icons", seed)
    asked = []
    for icon in rng.sample(icons, min(count, len(icons))):
        _, image = make_scene([icon], rng)
        question, answer = unseen_icon_turn(icon, rng)
        asked.append((Sample(image, ((casual(rng, question), answer),), "unknown_icons"), accepted_of_icon(icon)))
    return asked
