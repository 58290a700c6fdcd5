"""All updates at once: a few Gauss–Newton steps on the target's prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...core.lowrank import LowRank
from ..recording.translation import Read
from .curvature import JointCurvature, Weights
from .linearisation import MAX_MOMENTUM, Linearisation, ProbeBatch, TargetFunction
from .low_rank import cut_to_rank

CUT_DAMPING = 0.01
"""Of both factors of the curvature at the cut to low rank, relative to their mean diagonal."""

_REFRESH = 4  # steps between two estimates of the curvature
_ROUNDING = 1e-6  # of the wanted change
_FIRST = 1e-3  # of the weights' norm, the length of the first trial step


@dataclass(frozen=True)
class JointProblem:
    """min over D of Σ ‖f(W + D) − wanted‖², W the weights of some modules of the target.

    Attributes:
        target: the model; its weights stay as they are.
        names: its linear modules that get an update.
        read: return value of the target -> its prediction.
        draw: gives the probes of the next step.
        steps: Gauss–Newton steps.
        damping: of the curvature, relative to its mean diagonal.
    """

    target: nn.Module
    names: Sequence[str]
    read: Read
    draw: Callable[[], Sequence[ProbeBatch]]
    steps: int
    damping: float


@dataclass(frozen=True)
class JointFit:
    """The result of a joint fit.

    Attributes:
        updates: module -> D [m, n], of full rank.
        curvature: for the cut to low rank.
        history: share of the wanted change reached, before every step, on that step's probes.
    """

    updates: Weights
    curvature: JointCurvature
    history: list[float]


def fit_jointly(
    problem: JointProblem,
    initial: Mapping[str, LowRank] | None = None,
    on_step: Callable[[int], None] = lambda _: None,
    store: StateStore | None = None,
) -> JointFit:
    """Minimises Σ ‖f(W + D) − wanted‖² over D by Gauss–Newton steps on fresh probes.

    Each step linearises the target at W + D, takes the direction d = (JᵀJ)⁻¹Jᵀ·missing with a
    Kronecker-factored JᵀJ, and goes αd + βs, s the step before: α and β solve the least-squares
    problem min ‖missing − αJd − βJs‖² exactly. Jd and Js are differences of predictions, taken at
    the lengths of the last step, so that they include the curvature of f over that length. A step
    costs one forward and backward pass and two forward passes; nothing is tuned by hand.

    Args:
        problem: what is minimised.
        initial: updates to start from, of some of the modules.
        on_step: called with the number of steps done, before each step.
        store: keeps the state between steps, so that an interrupted fit goes on, bit for bit.
    """
    function = TargetFunction(problem.target, problem.names, problem.read, problem.damping)
    state = _FitState({name: torch.zeros_like(w) for name, w in function.start.items()})
    for name, update in (initial or {}).items():
        state.updates[name] += update.dense().to(state.updates[name])
    kept = store.recall() if store else None
    if kept is not None:
        state.restore(kept, function)
    first = state.step
    for step in range(problem.steps):
        probes = problem.draw()
        if step < first:
            continue  # drawn all the same: the same probes come to the same steps
        on_step(step)
        _take_step(function, state, probes)
        state.step += 1
        if store and store.due():
            store.store(*state.pack(function))
    return JointFit(state.updates, function.curvature, state.history)


def _take_step(function: TargetFunction, state: _FitState, probes: Sequence[ProbeBatch]) -> None:
    """One Gauss–Newton step; none where these probes miss nothing, or no length helps them.

    Neither says anything about the probes of the next step. Where no length helps, the next one
    takes its differences over half the way.
    """
    renew = state.step < 2 or state.step % _REFRESH == 0
    at = {name: function.start[name] + update for name, update in state.updates.items()}
    point = function.linearise(probes, at, renew)
    state.history.append(point.reached)
    if 1 - point.reached < _ROUNDING:
        return  # the rest is rounding of float32
    direction = function.curvature.solve(point.gradient)
    lines = [direction]
    if state.last_step is None:
        state.lengths[0] = _first_length(function, point, direction)
        if not state.lengths[0]:
            return
    else:
        lines.append(state.last_step)
    lengths = function.solve_lengths(point, lines, state.lengths)
    if not any(lengths):
        state.lengths[0] /= 2
        return
    taken = {n: _weighted_sum(lengths, [line[n] for line in lines]) for n in function.names}
    state.last_step = taken
    state.lengths[0] = max(lengths[0], 0.1 * state.lengths[0])
    state.updates = {name: update + taken[name] for name, update in state.updates.items()}


def _first_length(function: TargetFunction, point: Linearisation, direction: Weights) -> float:
    """A length for the first differences: the best one over a very short trial step."""
    trial = float(_FIRST * _weights_norm(point.weights) / _weights_norm(direction).clamp_min(1e-30))
    return function.solve_lengths(point, [direction], [trial])[0]


KeptState = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, and facts ready for JSON."""


class StateStore(Protocol):
    """Where the state of a fit is kept."""

    def due(self) -> bool:
        """Whether it is time to keep it."""

    def store(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Keeps it."""

    def recall(self) -> KeptState | None:
        """What was kept last, if anything."""


@dataclass
class _FitState:
    """Everything that the steps to come depend on, besides the curvature and its generator.

    Attributes:
        updates: module -> D [m, n].
        last_step: what the last step added to them.
        lengths: over which the directions are differenced in the next step.
        history: share of the wanted change reached, before every step.
        step: steps done, those that changed nothing included.
    """

    updates: Weights
    last_step: Weights | None = None
    lengths: list[float] = field(default_factory=lambda: [0.0, MAX_MOMENTUM])
    history: list[float] = field(default_factory=list)
    step: int = 0

    def pack(self, function: TargetFunction) -> KeptState:
        """The state, with the curvature and the generator of the function."""
        curvature = function.curvature
        groups = {
            "update": self.updates,
            "before": self.last_step or {},
            "reads": curvature.reads,
            "writes": curvature.writes,
        }
        tensors = {f"{group}/{n}": t for group, part in groups.items() for n, t in part.items()}
        tensors["generator"] = function.generator.get_state()
        facts = {
            "step": self.step,
            "lengths": self.lengths,
            "history": self.history,
            "tokens": curvature.tokens,
        }
        return tensors, facts

    def restore(self, kept: KeptState, function: TargetFunction) -> None:
        """Sets the state, and the curvature and the generator of the function."""
        tensors, facts = kept
        groups: dict[str, Weights] = {"update": {}, "before": {}, "reads": {}, "writes": {}}
        for key, tensor in tensors.items():
            group, _, name = key.partition("/")
            if group in groups:
                groups[group][name] = tensor.to(function.start[name].device)
        curvature = function.curvature
        curvature.reads, curvature.writes = groups["reads"], groups["writes"]
        curvature.tokens = dict(facts["tokens"])
        curvature.invert()
        function.generator.set_state(tensors["generator"])
        self.updates, self.last_step = groups["update"], groups["before"] or None
        self.lengths, self.history, self.step = facts["lengths"], facts["history"], facts["step"]


def cut_updates(fit: JointFit, rank: float) -> dict[str, LowRank]:
    """Every update at low rank, cut in the metric of the curvature; see `cut_to_rank`.

    A module that never reaches the prediction is left out.
    """
    curvature = fit.curvature
    return {
        name: cut_to_rank(update, curvature.writes[name], curvature.reads[name], rank, CUT_DAMPING)
        for name, update in fit.updates.items()
        if name in curvature.writes
    }


def _weights_norm(weights: Weights) -> Tensor:
    return torch.stack([w.double().square().sum() for w in weights.values()]).sum().sqrt()


def _weighted_sum(factors: list[float], parts: list[Tensor]) -> Tensor:
    return sum((f * p for f, p in zip(factors, parts, strict=True)), torch.zeros(()).to(parts[0]))
