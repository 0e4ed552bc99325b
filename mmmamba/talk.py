"""A conversation to fill a context with: questions and answers of everyday length, written for this project."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import cycle

from torch import Tensor

from mmmamba.config import ModelConfig
from mmmamba.prompt import encode_reply, encode_user_turn
from mmmamba.tokenizer import Tokenizer

TALK = (
    ("Good morning! How are you today?", "Good morning! I am well, thank you. What would you like to talk about?"),
    ("I want to cook something simple for six people.", "A vegetable curry works well: it takes one large pot and "
     "forty minutes. You need onions, garlic, ginger, two tins of tomatoes, chickpeas, spinach and rice."),
    ("How much rice do I need?", "About 75 grams of dry rice for each person, so 450 grams for six."),
    ("And if two of them are children?", "Then 350 to 400 grams are enough. What is left over keeps for a day in the "
     "fridge; cool it quickly and heat it through before you eat it."),
    ("What can I plant in April?", "In April you can sow carrots, radishes, lettuce and peas outside. Tomatoes and "
     "peppers still want to stay indoors, on a bright windowsill, until the last frost has passed."),
    ("My tomatoes always get brown spots.", "That is often blight. Give the plants more room, water the soil and not "
     "the leaves, take off the lowest leaves, and put a roof over them if your summers are wet."),
    ("Explain why the sky is blue.", "Sunlight holds all colours. The air scatters blue light more than red light, so "
     "blue reaches your eyes from every part of the sky. At sunset the light has a longer way and loses its blue."),
    ("Then why is it not violet?", "Violet is scattered even more, but there is less of it in sunlight, some is taken "
     "up high in the air, and our eyes see blue better than violet."),
    ("Write a short note to my neighbour about the noise.", "Dear neighbour, the music yesterday evening was rather "
     "loud in our bedroom. Could you turn it down a little after ten? Thank you, and have a good week."),
    ("Make it friendlier.", "Hello! We hope you had a lovely party yesterday. The music carried quite far, and our "
     "little one wakes easily: would you mind turning it down after ten? Come over for coffee some time!"),
    ("What is 15 percent of 240?", "It is 36. Ten percent are 24, five percent are half of that, 12."),
    ("Which is heavier, a litre of water or a litre of oil?", "A litre of water. Oil is lighter, about 0.92 kilograms "
     "a litre, which is why it floats."),
    ("I have three days in a city I do not know. How do I plan?", "Choose one thing a day that you really want to "
     "see, and book it. Leave the afternoons open, walk one quarter at a time, and eat where people wait in line."),
    ("Is it better to go by train or by car?", "For one or two people and a city in the middle, by train: you arrive "
     "rested and need no parking. With children and luggage for the country, a car is easier."),
    ("Tell me about whales.", "Whales are mammals: they breathe air, are warm-blooded and feed their young with milk. "
     "The blue whale is the largest animal that ever lived. Some, such as the sperm whale, dive for an hour."),
    ("How do they sleep?", "They rest half of the brain at a time, so that the other half can think of breathing. "
     "Sperm whales sleep upright in the water, for ten minutes or so."),
    ("My bicycle chain jumps.", "Either the chain is worn and stretched, or the gears are out of adjustment. Measure "
     "the chain with a gauge first; if it is long, change it together with the cassette."),
    ("How often should I oil it?", "After every ride in the rain, and otherwise about every 200 kilometres. Wipe it "
     "dry first, one drop on each link, and wipe off what is too much: oil that stays outside collects dirt."),
    ("Suggest a name for a grey cat.", "Ash, Misty, Pebble, Smoke, or, if she is proud, Duchess."),
    ("She is small and very fast.", "Then Comet, Flick, or Minnow."),
    ("What is a fair way to share a cake among three?", "One cuts it into three, then the other two choose before "
     "the one who cut. Whoever cuts will make the pieces as equal as can be."),
    ("I cannot sleep before exams.", "Stop studying an hour before bed, write down what still worries you, and keep "
     "the phone out of the room. If you lie awake, get up and read something dull until you are tired."),
    ("What should I eat in the morning?", "Something with protein and not too much sugar: eggs, yoghurt with oats and "
     "fruit, or bread with cheese. Drink water with it; a little coffee is fine if you are used to it."),
    ("How does a fridge make things cold?", "It moves heat from inside to outside. A liquid boils in thin pipes at "
     "the back of the box and takes up heat; a pump presses the vapour together, and outside it gives the heat away."),
    ("So the kitchen gets warmer?", "Yes, by what is taken from the food and by what the pump uses. Leaving the door "
     "open therefore warms the room."),
    ("Give me three words that rhyme with light.", "Night, bright, and kite."),
    ("Use them in two lines.", "We flew a paper kite one summer night, and all the harbour lamps were small and "
     "bright."),
    ("What are good questions for a first meeting?", "Ask what they are working on that they enjoy, what they wish "
     "were easier, and what a good result would look like in half a year. Then listen longer than you speak."),
    ("How do I remember names better?", "Say the name once aloud when you hear it, picture something with it, and "
     "use it again when you say goodbye. Write it down the same evening."),
    ("Thank you, that helped.", "You are welcome! Come back whenever you like."),
)  # fmt: skip


def talk() -> Iterator[tuple[str, str]]:
    """Questions and answers without end."""
    return cycle(TALK)


class TalkIds:
    """The conversation that fills the context, as ids without end, cut where the reader wants."""

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig, pixel_values: Tensor | None) -> None:
        self.tokenizer, self.config, self.pixel_values = tokenizer, config, pixel_values
        self.images = 0
        self._talk = talk()
        self._rest: list[int] = []
        self._first = True
        pixels = b"" if pixel_values is None else pixel_values.numpy().tobytes()
        sample = str(self._turn("?", "!", False)).encode()
        self.digest = hashlib.sha256(repr(next(talk())).encode() + sample + pixels).hexdigest()

    def take(self, count: int) -> tuple[list[int], Tensor | None]:
        """The next `count` ids, and the tiles of the pictures that begin among them."""
        images = 0
        while len(self._rest) < count:
            question, answer = next(self._talk)
            # A picture's tokens must not be cut: it comes only where the whole turn fits.
            with_image = self._turn(question, answer, True) if self.pixel_values is not None else None
            if with_image is not None and len(self._rest) + len(with_image) <= count:
                self._rest += with_image
                images += 1
                self.images += 1
            else:
                self._rest += self._turn(question, answer, False)
            self._first = False
        ids, self._rest = self._rest[:count], self._rest[count:]
        tiles = None if not images or self.pixel_values is None else self.pixel_values.repeat(images, 1, 1, 1)
        return ids, tiles

    def skip(self, count: int, piece: int) -> None:
        """Go on as if `count` ids had been taken in pieces."""
        while count:
            self.take(min(piece, count))
            count -= min(piece, count)

    def _turn(self, question: str, answer: str, with_image: bool) -> list[int]:
        tiles = [len(self.pixel_values)] if with_image and self.pixel_values is not None else []
        asked = encode_user_turn(
            self.tokenizer, self.config, question, tiles, first=self._first, images_before=self.images
        )
        return asked + encode_reply(self.tokenizer, answer)
