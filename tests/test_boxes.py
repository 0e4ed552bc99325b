"""Places in answers, and videos as pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.boxes import COLOURS, Place, draw_places, find_places, without_marks
from app.errors import EngineError
from app.video import is_video, pictures, sample_frames

ANSWER = (
    "There is <ref>a cat</ref><box>[[100, 200, 500, 600]]</box> and "
    "<ref>two dogs</ref><box>[[0,0,10,10],[20,20,30,30]]</box>."
)


def test_places_are_found_with_their_names() -> None:
    assert find_places(ANSWER) == [
        Place("a cat", (100, 200, 500, 600)),
        Place("two dogs", (0, 0, 10, 10)),
        Place("two dogs", (20, 20, 30, 30)),
    ]


@pytest.mark.parametrize("box", ["[[1,2,3]]", "[[500,0,100,10]]", "[[0,0,2000,10]]", "[]", ""])
def test_what_is_no_box_is_left_out(box: str) -> None:
    assert find_places(f"<ref>x</ref><box>{box}</box>") == []


def test_people_read_names_not_marks_where_nothing_is_bold() -> None:
    assert without_marks("<ref> a cat </ref><box>[[1, 2, 3, 4]]</box> and **more**", bold="") == "a cat and **more**"


def test_people_read_names_not_marks() -> None:
    assert without_marks(ANSWER) == "There is **a cat** and **two dogs**."
    assert without_marks("plain *words* and a < b") == "plain *words* and a < b"


def test_a_mark_being_written_is_held_back() -> None:
    for cut in ("Here: <ref>a c", "Here: <ref>a cat</ref>", "Here: <ref>a cat</ref><box>[[1,"):
        assert without_marks(cut).strip() in ("Here:",)


def test_boxes_are_drawn_where_they_are() -> None:
    image = Image.new("RGB", (200, 100), "white")
    drawn = np.asarray(draw_places(image, [Place("", (250, 100, 750, 900))]))
    colour = tuple(int(COLOURS[0][i : i + 2], 16) for i in (1, 3, 5))
    assert tuple(drawn[50, 50]) == colour, "left edge at a quarter of 200"
    assert tuple(drawn[10, 100]) == colour, "top edge at a tenth of 100"
    assert tuple(drawn[50, 100]) == (255, 255, 255)
    assert np.asarray(image).min() == 255, "the picture itself was changed"


# Video


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds: red, then blue."""
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(20):
            image = Image.new("RGB", (64, 48), "red" if i < 10 else "blue")
            for packet in stream.encode(av.VideoFrame.from_image(image)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def test_frames_come_from_equal_parts_in_order(video: Path) -> None:
    frames = sample_frames(video, 4)
    assert str(frames) == "clip.mp4: 4 frames of 2.0 s"
    reds = [Image.open(file).getpixel((30, 20))[0] > 128 for file in frames.files]
    assert reds == [True, True, False, False]


def test_videos_among_pictures_are_replaced(video: Path, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"")
    files, sampled = pictures([str(picture), str(video)], 2)
    assert files[0] == str(picture)
    assert len(files) == 3
    assert [f.name for f in sampled] == ["clip.mp4"]


def test_a_broken_video_is_named(tmp_path: Path) -> None:
    pytest.importorskip("av")
    path = tmp_path / "holiday.mp4"
    path.write_bytes(b"no video")
    with pytest.raises(EngineError, match=r"holiday\.mp4 cannot be read as a video") as caught:
        pictures(["a.png", str(path)], 2)
    assert caught.value.image == 1


def test_a_long_video_is_refused(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.video.MOST_SECONDS", 1)
    with pytest.raises(EngineError, match="2 s long; 1 s fit"):
        sample_frames(video, 2)


def test_what_a_video_is() -> None:
    assert is_video("/tmp/A.MP4")
    assert not is_video("a.png")
