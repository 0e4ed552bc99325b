"""What trains in a stage, in groups: printed before the first step, and held against what the stage declares."""

from __future__ import annotations

from collections import defaultdict

from torch import nn

from distill.stages import Stage


def check_trained(name: str, stage: Stage) -> dict[str, nn.Parameter]:
    """The parameters of a stage, by name.

    Raises: ValueError if nothing trains; AssertionError if anything trains that the stage does not declare, or does not
        train though it does.
    """
    parameters = stage.parameters()
    if not parameters:
        raise ValueError(f"{name} trains nothing; check the layer types of the recipe")
    kinds = {stage.kind(n) for n in parameters}
    if stage.trains is not None:
        there = {stage.kind(n) for network in stage.networks() for n, _ in network.named_parameters()} | kinds
        wrong = sorted(kinds ^ (stage.trains & there))
        assert not wrong, f"{name} declares {sorted(stage.trains)}, and trains {sorted(kinds)}: they differ in {wrong}"
    known = {id(p) for p in parameters.values()}
    unnoticed = [
        n
        for network in stage.networks()
        for n, p in network.named_parameters()
        if p.requires_grad and id(p) not in known
    ]
    assert not unnoticed, f"{name}: {', '.join(unnoticed[:5])} would get gradients and are not among what trains"
    frozen = [n for n, p in parameters.items() if not p.requires_grad]
    assert not frozen, f"{name}: {', '.join(frozen[:5])} should train and are frozen"
    return parameters


def trained_table(name: str, stage: Stage, parameters: dict[str, nn.Parameter]) -> str:
    """Lines with the groups of a stage's parameters, tensors and numbers in each, and the sum above them."""
    groups: dict[str, list[nn.Parameter]] = defaultdict(list)
    for parameter_name, parameter in parameters.items():
        groups[stage.kind(parameter_name)].append(parameter)
    total = sum(p.numel() for p in parameters.values())
    frozen = {id(p): p.numel() for network in stage.networks() for p in network.parameters() if not p.requires_grad}
    lines = [f"{name}: {total:,} parameters in {len(parameters)} tensors train, {sum(frozen.values()):,} are frozen"]
    wide = max(len(kind) for kind in groups)
    for kind, members in sorted(groups.items()):
        lines.append(f"  {kind:{wide}}  {len(members):4} tensors  {sum(p.numel() for p in members):>13,}")
    return "\n".join(lines)
