"""The second optimiser of a joint fit: AdamW on the factors of a LoRA, as trainers run it.

OneTrainer's draft of a "delta transfer" (pull request 1353) teaches a LoRA so. It is what every
table of fits is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...core.lowrank import LowRank
from ..updates import Factors, place_factors
from .joint_fit import JointFit, JointProblem, StateStore, start_factors
from .linearisation import ProbeBatch, recompute_blocks

STEPS = 2
"""Steps that take about as many predictions as one Gauss–Newton step: a forward and a backward pass
each, where that takes two forward passes more."""
RATES = {"zero": 3e-3, "copy": 1e-3}
"""Of the first step; it falls linearly to 0."""


def fit_by_adamw(
    problem: JointProblem,
    initial: Mapping[str, LowRank] | None = None,
    on_step: Callable[[int], None] = lambda _: None,
    store: StateStore | None = None,
) -> JointFit:
    """`fit_jointly` by STEPS steps of AdamW for every Gauss–Newton step; arguments as there."""
    factors = start_factors(problem, initial or {})
    leaves = {n: (up.requires_grad_(), down.requires_grad_()) for n, (up, down) in factors.items()}
    values = [factor for pair in leaves.values() for factor in pair]
    steps, rate = STEPS * problem.steps, RATES["copy" if initial else "zero"]
    optimiser = torch.optim.AdamW(values, weight_decay=0.0)
    history: list[float] = []
    kept = store.recall() if store else None
    if kept is not None:
        _restore(optimiser, values, kept[0])
        history = kept[1]["history"]
    first = len(history)
    for step in range(steps):
        probes = problem.draw()
        if step < first:
            continue  # drawn all the same: the same probes come to the same steps
        on_step(step // STEPS)
        optimiser.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimiser.zero_grad()
        wanted = sum(float((p.wanted - p.plain).double().square().sum()) for p in probes)
        left = _add_gradients(problem, leaves, probes, wanted)
        history.append(1 - left / wanted if wanted else float(not left))
        if wanted:
            optimiser.step()
        if store and store.due():
            store.store(_pack(optimiser, values), {"history": history})
    updates = {
        name: LowRank(up.detach(), down.detach())
        for name, (up, down) in leaves.items()
        if up.grad is not None or up in optimiser.state
    }
    return JointFit(updates, None, history)


def _add_gradients(
    problem: JointProblem, leaves: Factors, probes: Sequence[ProbeBatch], wanted: float
) -> float:
    """Adds the gradients of the missing share of the wanted change; what is missing of it."""
    left = 0.0
    with torch.enable_grad(), recompute_blocks(problem.target):
        for probe in probes:
            with place_factors(problem.target, leaves):  # also when blocks run again
                prediction = problem.read(problem.target(*probe.call.args, **probe.call.kwargs))
                missing = (probe.wanted - prediction).square().sum()
                (missing / max(wanted, 1e-30)).backward()
            left += float(missing.detach())
    return left


def _pack(optimiser: torch.optim.Optimizer, values: Sequence[Tensor]) -> dict[str, Tensor]:
    """The factors and their moments, by position."""
    tensors = {f"{i}/factor": value.detach() for i, value in enumerate(values)}
    for i, moments in optimiser.state_dict()["state"].items():
        tensors |= {f"{i}/{name}": moment for name, moment in moments.items()}
    return tensors


def _restore(
    optimiser: torch.optim.Optimizer, values: Sequence[Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Sets the factors and their moments."""
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        place, name = key.split("/")
        if name == "factor":
            with torch.no_grad():
                values[int(place)].copy_(tensor)
        else:
            moments.setdefault(int(place), {})[name] = tensor
    optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
