"""Draw icons and flags from npm packages once, into one small file, to take them to a training machine.

    npm install --ignore-scripts openmoji @iconify-json/twemoji @iconify-json/noto @iconify-json/fluent-emoji-flat \\
        @iconify-json/fxemoji @iconify-json/streamline-emojis @lobehub/fluent-emoji-3d flag-icons emojibase-data
    python -m distill.data.icons_pack node_modules icons.tar.gz --max-mib 24

Drawing needs the package resvg-py; reading the file does not. Which style is held out is decided here, see `STYLES`.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from distill.data.flag_names import color_names, countries
from distill.data.photos_pack import write_packed
from distill.data.sample import Split
from distill.data.things import Thing, things

NAMES_PACKAGE = "emojibase-data"
_FLAG_PX = 176  # wider than icons: emblems are small
_REGIONAL_A = 0x1F1E6  # code point of the regional indicator A; two of them are a flag


class Style(NamedTuple):
    """A set of drawings. folder: of the npm package.  splits: of its icons and of its flags, or None for none used."""

    folder: str
    license: str
    attribution: str
    icons: Split | None
    flags: Split | None


# Whole styles are held out. Of flags too, since the same flag differs little from one package to the next.
STYLES = {
    "twemoji": Style("@iconify-json/twemoji", "CC BY 4.0", "Twemoji, Twitter and contributors", "train", "train"),
    "noto": Style("@iconify-json/noto", "Apache-2.0", "Noto Emoji, Google", "train", None),
    "fluent-flat": Style("@iconify-json/fluent-emoji-flat", "MIT", "Fluent Emoji, Microsoft", "train", None),
    "fluent-3d": Style("@lobehub/fluent-emoji-3d", "MIT", "Fluent Emoji, Microsoft", "train", "val"),
    "openmoji": Style("openmoji", "CC BY-SA 4.0", "OpenMoji, HfG Schwäbisch Gmünd and contributors", "train", "val"),
    "flag-icons": Style("flag-icons", "MIT", "flag-icons, Panayiotis Lipiridis", None, "train"),
    "fxemoji": Style("@iconify-json/fxemoji", "Apache-2.0", "FxEmojis, Mozilla", "val", None),
    "streamline": Style("@iconify-json/streamline-emojis", "CC BY 4.0", "Streamline Emojis, Streamline", "val", None),
}

# What two sets with names of their own call otherwise than Unicode does; "" for what they draw as another thing.
_OTHER_NAMES = {
    "fxemoji:angry": "angry face",
    "fxemoji:aubergine": "eggplant",
    "fxemoji:basketballandhoop": "basketball",
    "fxemoji:blackpushpin": "pushpin",
    "fxemoji:blackscissors": "scissors",
    "fxemoji:blacktelephone": "telephone",
    "fxemoji:boot": "woman’s boot",
    "fxemoji:bullhorn": "megaphone",
    "fxemoji:bunny": "rabbit face",
    "fxemoji:bunnyside": "rabbit",
    "fxemoji:cat": "cat face",
    "fxemoji:catside": "cat",
    "fxemoji:cellphone": "mobile phone",
    "fxemoji:chilipepper": "hot pepper",
    "fxemoji:construction": "",
    "fxemoji:cop": "police officer",
    "fxemoji:crying": "crying face",
    "fxemoji:desktopcomputer": "desktop computer",
    "fxemoji:directhit": "bullseye",
    "fxemoji:dog": "dog face",
    "fxemoji:dogside": "dog",
    "fxemoji:dragonhead": "dragon face",
    "fxemoji:dragonside": "dragon",
    "fxemoji:earofmaize": "ear of corn",
    "fxemoji:electrictorch": "flashlight",
    "fxemoji:europeancastle": "castle",
    "fxemoji:fatherchristmas": "Santa Claus",
    "fxemoji:fishingpoleandfish": "fishing pole",
    "fxemoji:forkknife": "fork and knife",
    "fxemoji:framewithpicture": "framed picture",
    "fxemoji:gamedie": "",
    "fxemoji:gem": "gem stone",
    "fxemoji:grintears": "face with tears of joy",
    "fxemoji:hampster": "hamster",
    "fxemoji:hearteyes": "smiling face with heart-eyes",
    "fxemoji:heels": "high-heeled shoe",
    "fxemoji:hocho": "kitchen knife",
    "fxemoji:housebuilding": "house",
    "fxemoji:icecream": "ice cream",
    "fxemoji:keyboard": "",
    "fxemoji:leopardside": "leopard",
    "fxemoji:lips": "mouth",
    "fxemoji:loudlycrying": "loudly crying face",
    "fxemoji:medicalmask": "face with medical mask",
    "fxemoji:mensshoe": "man’s shoe",
    "fxemoji:mouseside": "mouse",
    "fxemoji:moviecamera": "movie camera",
    "fxemoji:oldpersonalcomputer": "laptop",
    "fxemoji:pandaface": "panda",
    "fxemoji:personalcomputer": "desktop computer",
    "fxemoji:pigside": "pig",
    "fxemoji:pistol": "",
    "fxemoji:poo": "pile of poo",
    "fxemoji:racecar": "racing car",
    "fxemoji:redheart": "red heart",
    "fxemoji:rightspeaker3soundwaves": "speaker high volume",
    "fxemoji:schoolsatchel": "backpack",
    "fxemoji:sheep": "ewe",
    "fxemoji:sleeping": "sleeping face",
    "fxemoji:sliceofpizza": "pizza",
    "fxemoji:smileeyes": "smiling face with smiling eyes",
    "fxemoji:snowmountains": "snow-capped mountain",
    "fxemoji:spurtingwhale": "spouting whale",
    "fxemoji:steamlocomotive": "locomotive",
    "fxemoji:studiomic": "studio microphone",
    "fxemoji:sunglasses": "smiling face with sunglasses",
    "fxemoji:sunrays": "sun",
    "fxemoji:thumbsup": "thumbs up",
    "fxemoji:tie": "necktie",
    "fxemoji:tigerside": "tiger",
    "fxemoji:whitemediumstar": "star",
    "fxemoji:window": "",
    "fxemoji:winking": "winking face",
    "fxemoji:wiredkeyboard": "keyboard",
    "fxemoji:wolfface": "wolf",
    "fxemoji:womanshat": "woman’s hat",
    "fxemoji:womansshirt": "woman’s clothes",
    "streamline-emojis:direct-hit": "bullseye",
    "streamline-emojis:game-dice": "game die",
    "streamline-emojis:panda-face": "panda",
    "streamline-emojis:pistol": "",
    "streamline-emojis:red-wine-glass": "wine glass",
    "streamline-emojis:school-backpack": "backpack",
    "streamline-emojis:thumbs-up-1": "thumbs up",
    "streamline-emojis:thumbs-up-2": "thumbs up",
    "streamline-emojis:turkey": "",
    "streamline-emojis:wolf-face": "wolf",
    "streamline-emojis:womans-boot": "woman’s boot",
    "streamline-emojis:womans-hat": "woman’s hat",
}

Drawing = Callable[[], Image.Image]


def pack_icons(src: Path, out: Path, *, size_px: int = 144, quality: int = 70, max_mib: float | None = None) -> int:
    """Write every icon and flag that `distill.data.things` and `flag_names` know into one file for `read_icons`.

    Args:
        src: the folder node_modules, with the packages of `STYLES` and emojibase-data.
        size_px: longer side of an icon.
        quality: of WebP; the transparency is kept exactly enough for any background.
    Returns: number of pictures.
    Raises: ValueError for a package that is missing, or as `write_packed`.
    """
    for folder in (*(style.folder for style in STYLES.values()), NAMES_PACKAGE):
        if not (src / folder).is_dir():
            raise ValueError(f"{src} lacks the package {folder}; install what the head of icons_pack.py lists")

    def records() -> Iterator[tuple[str, bytes, dict[str, Any]]]:
        for split, key, drawing, record in _drawings(src):
            side_px = _FLAG_PX if record["kind"] == "flag" else size_px
            image = _crop(drawing(), side_px)
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=quality, alpha_quality=50, method=6)
            yield f"{split}/{key}", buffer.getvalue(), record

    return write_packed(out, records(), max_mib=max_mib, what=f"icons at quality {quality}")


def _drawings(src: Path) -> Iterator[tuple[Split, str, Drawing, dict[str, Any]]]:
    labels = {
        emoji["label"]: emoji["hexcode"]
        for emoji in json.loads((src / NAMES_PACKAGE / "en/data.json").read_text(encoding="utf-8"))
    }
    known = things()
    missing = [label for label in known if label not in labels]
    if missing:
        raise ValueError(f"emojibase-data has no emoji {', '.join(missing)}; mend distill/data/things.py")
    names = countries(src / "flag-icons/country.json")
    finders = [_flag_finder(src / style.folder) for style in STYLES.values() if style.flags == "train"]
    colors = {code: _agreed([find(code) for find in finders]) for code in names}
    for name, style in STYLES.items():
        about = {"style": name, "source": style.folder, "license": style.license, "attribution": style.attribution}
        if style.icons:
            find = _finder(src / style.folder, labels)
            for label, thing in known.items():
                for number, drawing in enumerate(find(label)):
                    key = f"{name}-{labels[label].lower()}-{number}"
                    yield style.icons, key, drawing, _icon_record(thing, label) | about
        if style.flags:
            find_flag = _flag_finder(src / style.folder)
            for code, country in names.items():
                found = find_flag(code)
                if found is not None:
                    record = {"kind": "flag", "name": country, "colors": colors[code]}
                    yield style.flags, f"{name}-flag-{code}", found, record | about


def _icon_record(thing: Thing, label: str) -> dict[str, Any]:
    return {
        "kind": "icon",
        "name": thing.name,
        "noun": thing.noun,
        "plural": thing.plural,
        "groups": thing.groups,
        "maybe": thing.maybe,
        "kin": thing.kin,
        "taught": thing.taught,
        "label": label,
    }


# -- where a drawing lies ----------------------------------------------------------------------------------------------


def _finder(package: Path, labels: dict[str, str]) -> Callable[[str], list[Drawing]]:
    """What gives the drawings of the emoji with a label, none if the package lacks it."""
    if (package / "icons.json").is_file():
        icons = json.loads((package / "icons.json").read_text(encoding="utf-8"))
        by_code = json.loads((package / "chars.json").read_text(encoding="utf-8"))
        by_label: dict[str, list[str]] = {}
        if by_code:  # the names of these sets follow code points
            for label, code in labels.items():
                name = by_code.get(code.lower()) or by_code.get(code.lower().replace("-fe0f", ""))
                if name:
                    by_label.setdefault(label, []).append(name)
        else:
            squashed = {_squashed(label): label for label in labels}
            squashed |= {_squashed(f"{label} face"): label for label in labels if f"{label} face" not in labels}
            for name in icons["icons"]:
                plain = _squashed(re.sub(r"-\d$", "", name))
                label = _OTHER_NAMES.get(f"{icons['prefix']}:{name}", squashed.get(plain, ""))
                by_label.setdefault(label, []).append(name)
        return lambda label: [_iconify(icons, name) for name in by_label.get(label, ())]

    def by_file(label: str) -> list[Drawing]:
        path = _file(package, labels[label])
        return [lambda: _open(path)] if path else []

    return by_file


def _flag_finder(package: Path) -> Callable[[str], Drawing | None]:
    """What gives the flag of a country by its two letters."""
    if (package / "flags").is_dir():
        return lambda code: lambda: _open(package / f"flags/4x3/{code}.svg")
    if (package / "icons.json").is_file():
        icons = json.loads((package / "icons.json").read_text(encoding="utf-8"))
        by_code = json.loads((package / "chars.json").read_text(encoding="utf-8"))

        def by_name(code: str) -> Drawing | None:
            name = by_code.get(_flag_code(code))
            return _iconify(icons, name) if name else None

        return by_name

    def by_file(code: str) -> Drawing | None:
        path = _file(package, _flag_code(code))
        return (lambda: _open(path)) if path else None

    return by_file


def _agreed(drawings: list[Drawing | None]) -> list[str]:
    """The colours of a flag if they are certain in every drawing and always the same, or none."""
    first, *others = [color_names(drawing()) if drawing else [] for drawing in drawings]
    return first if all(colors == first for colors in others) else []


def _file(package: Path, code: str) -> Path | None:
    """The file of a code point sequence, with or without the variation selector that asks for colour."""
    for spelled in dict.fromkeys((code, code.replace("-FE0F", ""), f"{code}-FE0F")):
        for path in (package / f"color/svg/{spelled.upper()}.svg", package / f"assets/{spelled.lower()}.webp"):
            if path.is_file():
                return path
    return None


def _flag_code(country: str) -> str:
    return "-".join(f"{_REGIONAL_A + ord(letter) - ord('a'):x}" for letter in country)


def _squashed(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


# -- drawing -----------------------------------------------------------------------------------------------------------


def _iconify(icons: dict[str, Any], name: str) -> Drawing:
    icon = icons["icons"][icons.get("aliases", {}).get(name, {}).get("parent", name)]
    box = [icon.get(key, icons.get(key, 0)) for key in ("left", "top", "width", "height")]
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'
    return lambda: _render(svg)


def _open(path: Path) -> Image.Image:
    return Image.open(path).convert("RGBA") if path.suffix == ".webp" else _render(path.read_text(encoding="utf-8"))


def _render(svg: str) -> Image.Image:
    try:
        import resvg_py
    except ImportError as error:
        raise ValueError("drawing SVG needs the package resvg-py; pip install -r requirements-distill.txt") from error
    png = resvg_py.svg_to_bytes(svg_string=svg, width=512, skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGBA")


def _crop(image: Image.Image, side_px: int) -> Image.Image:
    """Without the transparent border, so that its size is that of what is drawn; the longer side `side_px`."""
    box = image.getchannel("A").point(lambda v: 255 if v > 20 else 0).getbbox()
    if box is None:
        raise ValueError("a drawing is empty; leave its style or its label out")
    image = image.crop(box)
    scale = side_px / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m distill.data.icons_pack", description=__doc__.split("\n")[0])
    parser.add_argument("src", type=Path, metavar="SRC", help="folder node_modules with the packages")
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write, .tar or .tar.gz")
    parser.add_argument("--size", type=int, default=144, metavar="PX", help="longer side of an icon (default 144)")
    parser.add_argument("--quality", type=int, default=70, help="WebP quality, 1 to 100 (default 70)")
    parser.add_argument("--max-mib", type=float, help="fail if the file gets larger than this")
    args = parser.parse_args(argv)
    try:
        number = pack_icons(args.src, args.out, size_px=args.size, quality=args.quality, max_mib=args.max_mib)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{number} pictures, {args.out.stat().st_size / 2**20:.1f} MiB: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
