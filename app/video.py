"""Short videos as pictures: frames at equal distances, written as files. PyAV is imported when a video comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from app.errors import EngineError
from app.scratch import scratch_folder

EXTENSIONS = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v")
MOST_SECONDS = 120
MOST_SIDE_PX = 896


@dataclass(frozen=True)
class Frames:
    """`files` are the sampled frames in order, of a video of so many seconds."""

    name: str
    files: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        return f"{self.name}: {len(self.files)} frames of {self.seconds:.1f} s"


def is_video(path: str | Path) -> bool:
    return Path(path).suffix.lower() in EXTENSIONS


def pictures(files: Sequence[str], frames: int) -> tuple[list[str], list[Frames]]:
    """Files with every video replaced by `frames` of its pictures, and what was sampled.

    Raises: EngineError for a video that cannot be read or is too long; its `image` is the file's index.
    """
    out: list[str] = []
    sampled = []
    for i, file in enumerate(files):
        if is_video(file):
            sampled.append(sample_frames(file, frames, index=i))
            out += sampled[-1].files
        else:
            out.append(file)
    return out, sampled


def sample_frames(path: str | Path, count: int, index: int | None = None) -> Frames:
    """`count` frames at the middles of as many equal parts of the video, as PNG files."""
    name = Path(path).name
    if count < 1:
        raise EngineError(f"{count} frames of a video are none; use 1 or more.", image=index)
    try:
        import av
    except ImportError as error:
        raise EngineError(f"{name} is a video; install the package av to read it, or send pictures.") from error
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            seconds = _seconds(container, stream)
            if seconds > MOST_SECONDS:
                raise EngineError(
                    f"{name} is {seconds:.0f} s long; {MOST_SECONDS} s fit. Cut it, or send pictures of it.",
                    image=index,
                )
            wanted = [seconds * (i + 0.5) / count for i in range(count)]
            images = []
            last = None
            for frame in container.decode(stream):
                last = frame
                if wanted and (frame.time or 0.0) >= wanted[0] - 1e-6:
                    images.append(frame.to_image())
                    wanted.pop(0)
                if not wanted:
                    break
            if wanted and last is not None and len(images) < count:
                images.append(last.to_image())  # the length was a guess: what there is at the end
    except EngineError:
        raise
    except Exception as error:  # PyAV raises many kinds, most of them its own
        raise EngineError(f"{name} cannot be read as a video; send it as MP4 or WebM.", image=index) from error
    if not images:
        raise EngineError(f"{name} has no pictures in it.", image=index)
    folder = scratch_folder("frames")
    files = []
    for i, image in enumerate(images):
        image.thumbnail((MOST_SIDE_PX, MOST_SIDE_PX))
        file = folder / f"{Path(path).stem}-{i + 1}.png"
        image.save(file)
        files.append(str(file))
    return Frames(name, tuple(files), seconds)


def _seconds(container: object, stream: object) -> float:
    """Length of a video, by its stream or else its container (in microseconds)."""
    if stream.duration and stream.time_base:  # type: ignore[attr-defined]
        return float(stream.duration * stream.time_base)  # type: ignore[attr-defined]
    return (container.duration or 0) / 1e6  # type: ignore[attr-defined]
