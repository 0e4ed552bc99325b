"""Pictures of one to four icons, such as emoji, with questions about what they show; and the held-out styles."""

from __future__ import annotations

import random
from pathlib import Path

from distill.data.icon_questions import ASKS, ask_list, ask_name
from distill.data.icon_scene import MAX_ICONS, Icon, IconScene, make_scene, read_icons
from distill.data.sample import QA, Sample, Split, casual, check_split, rng_for, sentence
from distill.data.things import Thing
from distill.data.unseen import part_of

_WEIGHTS = (1.5, 1.0, 1.2, 1.2)  # of `ASKS`
_LAST_SHARE = 0.8  # of the pictures whose last question is for everything in them


class Icons:
    """Endless pictures of icons with one to five questions each. A `Source`.

    Split "train" is drawn in the styles that are trained on, changed at random, "val" in styles that are not. Neither
    shows a thing that is never taught (`distill.data.unseen`).
    """

    name = "icons"

    def __init__(self, path: str | Path, split: Split = "train") -> None:
        """Reads the file that `icons_pack` makes into memory; raises as `read_icons`."""
        self.split = check_split(split)
        self.by_thing: dict[Thing, list[Icon]] = {}
        for icon in read_icons(Path(path), split):
            if part_of(icon.thing.name, taught=icon.thing.taught) == "taught":
                self.by_thing.setdefault(icon.thing, []).append(icon)
        if not self.by_thing:
            raise ValueError(f'{path} holds no icon of split "{split}" that is taught; make it with icons_pack')
        self.things = list(self.by_thing)
        self._countable = [thing for thing in self.things if thing.plural]

    def scene(self, seed: int, index: int, attempt: int = 0) -> tuple[IconScene, Sample]:
        """What `sample` shows, and the sample."""
        rng = rng_for(self.name, self.split, seed, index, attempt)
        scene, image = make_scene(self._choose(rng), rng, restyled=self.split == "train")
        num_turns = rng.choice((0, 1, 2, 3, 4))
        last = not num_turns or rng.random() < _LAST_SHARE
        turns: list[QA] = []
        for _ in range(3 * num_turns):  # not every scene allows every question
            if len(turns) == num_turns:
                break
            turn = rng.choices(ASKS, _WEIGHTS)[0](scene, self.things, rng)
            if turn is not None and turn not in turns:
                turns.append(turn)
        # Names give all away, so they come last: what is learned from them serves every other question.
        if last or not turns:
            named = ask_name(scene, self.things, rng) or ask_list(scene, self.things, rng)
            assert named is not None, "what is in a picture can always be listed"
            turns.append(named)
        asked = tuple((casual(rng, question), answer) for question, answer in turns)
        return scene, Sample(image, asked, self.name)

    def sample(self, seed: int, index: int, attempt: int = 0) -> Sample:
        return self.scene(seed, index, attempt)[1]

    def _choose(self, rng: random.Random) -> list[Icon]:
        """Icons of one to four things, in a third of the pictures with equal ones among them."""
        number = rng.choices(range(1, MAX_ICONS + 1), (4, 3, 2, 2))[0]
        things: list[Thing] = []
        if number > 1 and self._countable and rng.random() < 0.35:
            things += [rng.choice(self._countable)] * rng.randint(2, number)
        if rng.random() < 0.3:  # of one family, which makes the others hard to tell from them
            kin = rng.choice(self.things).kin
            pool = [thing for thing in self.things if thing.kin == kin and thing not in things]
            things += rng.sample(pool, min(len(pool), number - len(things)))
        if len(things) < number:
            pool = [thing for thing in self.things if thing not in things]
            things += rng.sample(pool, min(len(pool), number - len(things)))
        rng.shuffle(things)
        return [rng.choice(self.by_thing[thing]) for thing in things]


def style_question(icons: Icons, seed: int, index: int) -> tuple[Sample, list[str]]:
    """What is this?  Of one icon, with every accepted answer, the best first."""
    rng = rng_for("icons_style", icons.split, seed, index)
    thing = icons.things[index % len(icons.things)]
    icon = rng.choice(icons.by_thing[thing])
    scene, image = make_scene([icon], rng)
    turn = ask_name(scene, icons.things, rng)
    assert turn is not None, "one icon has a name"
    accepted = dict.fromkeys((turn[1], sentence(thing.name), sentence(icon.label)))
    return Sample(image, ((casual(rng, turn[0]), turn[1]),), "icons_style"), list(accepted)
