"""Shared by all tests: exact float32, markers that need hardware, a tiny model with a tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest
import torch

from app.scratch import use_own_uploads
from tests.bundles import write_bundle
from tests.reading import write_fonts, write_nlvr

if TYPE_CHECKING:
    from playwright.sync_api import Browser

GOLDEN = Path(__file__).parent / "golden"
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

use_own_uploads()  # as app.py does; pages of another run are not to delete what ours are given
# Golden values are float32: a TensorFloat-32 product would differ in the third digit.
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False
torch.set_num_threads(1)  # the models are tiny: threads cost more than they bring, most of all beside other processes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU; torch sees none here")
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Tiny models with the outputs of the reference implementation; see golden/README.md."""
    return GOLDEN


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete checkpoint directory: the golden `post` student with a tokenizer made up for its 160 ids."""
    return tiny_checkpoint(tmp_path_factory, "linear")


@pytest.fixture(scope="session")
def tiny_teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_dir`, with softmax attention in every layer."""
    return tiny_checkpoint(tmp_path_factory, "hovle")


@pytest.fixture(scope="session")
def bundle_dir(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """A folder with a tiny linear, a hybrid and a teacher, stored in 4 bits as nano is."""
    return write_bundle(tmp_path_factory.mktemp("bundle"), tiny_dir)


def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, kind: str) -> Path:
    path = tmp_path_factory.mktemp("tiny") / kind
    shutil.copytree(GOLDEN / "post" / kind, path)
    config = json.loads((path / "config.json").read_text())
    config["template"] = "chatml"
    (path / "config.json").write_text(json.dumps(config))
    control = {
        "<|endoftext|>": 0,
        "<|im_start|>": 1,
        "<|im_end|>": 2,
        "<img>": 151,
        "</img>": 152,
        "<IMG_CONTEXT>": 153,
    }
    free = (i for i in range(160) if i not in control.values())
    letters = ["Ġ", "Ċ", *map(chr, range(33, 127))]  # space, newline, printable ASCII
    vocab = control | dict(zip(letters, free, strict=False))
    vocab |= {f"<unused{i}>": i for i in free}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": name, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for name, i in control.items()
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


@pytest.fixture(scope="session")
def font_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of fonts as `distill.data.fonts_pack` makes it."""
    return write_fonts(tmp_path_factory.mktemp("fonts") / "fonts.tar.gz")


@pytest.fixture(scope="session")
def nlvr_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three files of NLVR, ten statements each."""
    return write_nlvr(tmp_path_factory.mktemp("nlvr"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium, for tests marked `browser`."""
    found = next((path for name in CHROMIUMS if (path := shutil.which(name))), None)
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError as error:
        no_browser(str(error))
    with sync_playwright() as playwright:
        try:
            launched = playwright.chromium.launch(
                executable_path=found, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
            )
        except Error as error:
            no_browser(str(error).splitlines()[0])
        yield launched
        launched.close()


def no_browser(why: str) -> NoReturn:
    """Skip on a developer's machine; under CI the tests of the page must not be left out unnoticed."""
    reason = f"no Chromium that starts; `make test` installs one ({why})"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
