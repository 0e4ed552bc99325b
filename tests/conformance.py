"""Largest differences to the golden fixtures: `python -m tests.conformance` prints the table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from mmmamba.generate import ModelInputs, decode_one_token, prefill
from tests.helpers import FOLDERS, KINDS, golden_cases, golden_expected, golden_model

LIMIT = 1e-4  # absolute, on every logit


class Difference(NamedTuple):
    folder: str
    kind: str
    case: str
    float32: float  # largest absolute difference to the stored logits
    float64: float
    greedy_equal: bool | None  # None where no continuation is stored


def differences() -> Iterator[Difference]:
    for folder in FOLDERS:
        for kind in KINDS:
            for case in golden_cases(folder):
                yield Difference(
                    folder,
                    kind,
                    case,
                    largest_difference(folder, kind, case, torch.float32),
                    largest_difference(folder, kind, case, torch.float64),
                    greedy_equal(folder, kind, case),
                )


@torch.no_grad()
def largest_difference(folder: str, kind: str, case: str, dtype: torch.dtype) -> float:
    tensors = golden_cases(folder)[case]
    logits = golden_model(folder, kind, dtype)(tensors["input_ids"], tensors.get("pixel_values"))[0]
    assert logits.shape == tensors[f"{kind}.logits"].shape
    assert logits.dtype == dtype
    return float((logits.double() - tensors[f"{kind}.logits"].double()).abs().max())


def greedy_equal(folder: str, kind: str, case: str) -> bool | None:
    wanted = golden_expected(folder)[case].get(f"greedy_{kind}")
    if wanted is None:
        return None
    return greedy(folder, kind, case, len(wanted)) == wanted


def greedy(folder: str, kind: str, case: str, num_tokens: int) -> list[int]:
    """Arg-max over ids below vocab - 12, from the recurrent state."""
    model, tensors = golden_model(folder, kind), golden_cases(folder)[case]
    state = model.new_state()
    logits = prefill(model, ModelInputs(tensors["input_ids"], tensors.get("pixel_values")), state)
    said: list[int] = []
    while True:
        token = logits[:, :-12].argmax(dim=-1)
        said.append(int(token))
        if len(said) == num_tokens:
            return said
        logits = decode_one_token(model, token, state)


def main() -> None:
    rows = list(differences())
    print(f"{'fixture':<16} {'case':<12} {'float32':>9} {'float64':>9}  greedy")
    for row in rows:
        greedy_word = {None: "-", True: "equal", False: "DIFFERS"}[row.greedy_equal]
        print(f"{row.folder + '/' + row.kind:<16} {row.case:<12} {row.float32:9.2e} {row.float64:9.2e}  {greedy_word}")
    for folder in FOLDERS:
        worst = max(row.float32 for row in rows if row.folder == folder)
        print(f"{folder}: largest difference {worst:.2e} in float32, allowed {LIMIT:.0e}")


if __name__ == "__main__":
    main()
