"""What the stages of one student leave in its folder, and what they go on from.

OUT/                        the student, once it is exported
OUT/stages/convert.safetensors, stage1.safetensors, ...    the mixers after each finished stage
OUT/stages/stage1/step-*.pt                                checkpoints of one under way
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from distill.checkpoints import Checkpoints, differences, write_whole
from distill.config import STUDENT_STAGES
from distill.sharding import like, whole
from mmmamba.model import MMMamba

CONVERT = "convert"
ORDER = (CONVERT, *STUDENT_STAGES)
_FACTS = "facts"


class Kept:
    """The stages of a student.

    Args:
        out: the student's folder.
        facts: what all its stages have in common, in plain values: compared with what a file says of itself.
    """

    def __init__(self, out: Path, facts: dict[str, Any]) -> None:
        self.folder = out / "stages"
        self.facts = facts

    def path(self, stage: str) -> Path:
        return self.folder / f"{stage}.safetensors"

    def is_finished(self, stage: str) -> bool:
        return self.path(stage).is_file()

    def last(self) -> str | None:
        """The last finished stage, "convert" among them."""
        return next((stage for stage in reversed(ORDER) if self.is_finished(stage)), None)

    def checkpoints(self, stage: str, facts: dict[str, Any]) -> Checkpoints:
        """Those of a stage under way; `facts` are its own, beside the common ones."""
        return Checkpoints(self.folder / stage, self.facts | {"stage": stage} | facts)

    def write(self, stage: str, tensors: dict[str, Tensor]) -> None:
        """Keep what a stage made.  Raises: OSError if it cannot be written."""
        content = save(tensors, metadata={"format": "pt", _FACTS: json.dumps(self.facts)})
        write_whole(self.path(stage), lambda file: file.write(content))

    def load_(self, stage: str, student: MMMamba) -> None:
        """Put what a stage made into the student.

        Raises: ValueError if the file is damaged, of another recipe, or of other tensors.
        """
        path = self.path(stage)
        facts, tensors = _read(path, stage)
        if differ := differences(facts, self.facts):
            raise ValueError(
                f"{path} was made by another recipe: {', '.join(differ)}; put the recipe back, take another --out, or "
                f"delete {self.folder} to begin anew"
            )
        mine = mixers(student)
        now, then = ({n: tuple(t.shape) for n, t in given.items()} for given in (mine, tensors))
        if differ := differences(then, now):
            raise ValueError(f"{path} is of another student: {', '.join(differ[:4])}; take another --out")
        for name, tensor in mine.items():
            tensor.copy_(like(tensors[name], tensor))

    def adopt(self, stage: str, other: Path, student: MMMamba) -> None:
        """Keep what another student of the same teacher made of this one's mixers in a layer by layer stage.

        Args: other: the other student's folder; all of this one's mixers must be among its own.
        Raises: ValueError if the file is missing, damaged, of another teacher, or lacks a mixer.
        """
        path = Kept(other, {}).path(stage)
        facts, tensors = _read(path, stage)
        if differ := differences({"teacher": facts.get("teacher")}, {"teacher": self.facts.get("teacher")}):
            raise ValueError(f"{path} is of another student's teacher: {', '.join(differ)}; take one of the same")
        mine = mixers(student)
        if missing := sorted(mine.keys() - tensors.keys()):
            raise ValueError(
                f"{path} has no {missing[0]} and {len(missing) - 1} more; take a student with these mixers"
            )
        self.write(stage, {name: tensors[name] for name in mine})


def _read(path: Path, stage: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The facts and tensors of a file.  Raises: ValueError if it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            return json.loads(metadata.get(_FACTS, "{}")), {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it to run {stage} again") from error


def mixers(student: MMMamba) -> dict[str, Tensor]:
    """What a student has of its own: all tensors of its mixers but the output projection, which is the teacher's."""
    attention = {
        f"{name}.layers.{i}.mixer."
        for name, stack in zip(("embedding", "language"), student.config.stacks, strict=True)
        for i, kind in enumerate(stack.layer_types)
        if kind == "mha"
    }
    return {
        name: tensor
        for name, tensor in student.state_dict().items()
        if ".mixer." in name and "out_proj" not in name and name.partition(".mixer.")[0] + ".mixer." not in attention
    }


def whole_mixers(student: MMMamba) -> dict[str, Tensor]:
    """`mixers` on the CPU, put together where they are spread; all processes must call it."""
    return {name: tensor.contiguous() for name, tensor in whole(mixers(student)).items()}
