"""A fit in factors: Gauss–Newton steps on the prediction, then steps by slopes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ...core.lowrank import LowRank
from ..sides import Read
from ..swapping import compute_device
from ..updates import Factors, weight_of
from .linearisation import MAX_MOMENTUM, Linearisation, ProbeBatch, TargetFunction
from .spectra import JointCurvature

_REFRESH = 4  # steps between two estimates of the curvature
ROUNDING = 1e-6
"""Of the wanted change: probes that miss no more miss nothing."""
_FIRST, _LEAST = 0.1, 0.02
"""Lengths of the first trial and of any, in those at which all would be reached. Differences over
less are lost in the rounding of a model that computes in 16 bits."""


@dataclass(frozen=True)
class JointProblem:
    """The least squares of a fit: min over B, A of Σ ‖f(W + B·A) − wanted‖².

    W are the weights of some modules of the target.
    """

    target: nn.Module  # the model; its weights stay as they are
    names: Sequence[str]  # its modules that get an update
    read: Read  # return value of the target -> its prediction
    draw: Callable[[], Sequence[ProbeBatch]]  # gives the probes of the next step
    steps: int  # Gauss–Newton steps
    damping: float  # of the curvature, relative to its mean diagonal
    rank: int  # of the updates
    will_be_cut: bool = False  # the result will be cut to lower rank, which needs the curvature


@dataclass(frozen=True)
class JointFit:
    """The result of a fit."""

    updates: dict[str, LowRank]  # module -> B·A; without modules that never reach the prediction
    curvature: JointCurvature | None  # for a cut to lower rank; None where none will come
    # Share of the wanted change reached, before every step, on that step's probes
    history: list[float]


def fit_jointly(
    problem: JointProblem,  # what is minimised
    initial: Mapping[str, LowRank] | None = None,  # updates to start from, of some of the modules
    on_step: Callable[[int], None] = lambda _: None,
) -> JointFit:
    """Minimises Σ ‖f(W + B·A) − wanted‖² by Gauss–Newton steps on fresh probes.

    Each step linearises the target at B·A, takes the natural direction d within updates of the rank
    (`JointCurvature.solve`), and goes αd + βs, s the step before: α and β solve the least-squares
    problem min ‖missing − αJd − βJs‖². Jd and Js are differences of predictions, taken at the
    lengths of the last step, so that they include the curvature of f over that length. A step costs
    one forward and backward pass and two forward passes; nothing is tuned by hand. The LoRA runs
    beside the weights, and no tensor of a weight's size is made.
    """
    function = TargetFunction(problem.target, problem.read, problem.damping)
    state = _FitState(start_factors(problem, initial or {}))
    for step in range(problem.steps):
        on_step(step)
        _take_step(function, state, problem.draw(), step)
    reached = function.curvature.writes
    updates = {name: LowRank(*pair) for name, pair in state.factors.items() if name in reached}
    return JointFit(updates, function.curvature, state.history)


def start_factors(problem: JointProblem, initial: Mapping[str, LowRank]) -> Factors:
    """Cuts or pads the initial updates to the rank: B with zeros, A randomly.

    The rows of A are orthonormal, so that the padding's count as much as the others.
    """
    generator = torch.Generator().manual_seed(0)
    factors: Factors = {}
    for name in problem.names:
        weight = weight_of(problem.target, name)
        m, n = weight.flatten(1).shape
        rank = min(problem.rank, m, n)
        start = initial.get(name, LowRank(torch.zeros(m, 0), torch.zeros(0, n)))
        start = start.to("cpu").to(torch.float32)
        copied = start.truncate(rank) if start.rank > rank else start
        basis, mixed = torch.linalg.qr(copied.down.mT)
        random = torch.randn(n, rank - copied.rank, generator=generator)
        padding = torch.linalg.qr(random - basis @ (basis.mT @ random))[0]
        up = torch.cat([copied.up @ mixed.mT, torch.zeros(m, rank - copied.rank)], 1)
        down = torch.cat([basis, padding], 1).mT.contiguous()
        factors[name] = up.to(compute_device(weight)), down.to(compute_device(weight))
    return factors


def _take_step(
    function: TargetFunction, state: _FitState, probes: Sequence[ProbeBatch], step: int
) -> None:
    """Takes one Gauss–Newton step if these probes miss something and a length helps.

    Neither failure says anything about the probes of the next step. Where no length helps, the next
    one takes its differences over half the way.
    """
    renew = step < 2 or state.last_step is None or step % _REFRESH == 0
    point = function.linearise(probes, state.factors, renew)
    state.history.append(point.reached)
    if 1 - point.reached < ROUNDING:
        return  # the rest is rounding of float32
    direction = function.curvature.solve(state.factors, point.gradient)
    lines, longest = [direction], _longest(point, direction)
    if state.last_step is None:
        state.lengths[0] = function.solve_lengths(point, lines, [_FIRST * longest])[0]
    else:
        lines.append(state.last_step)
    state.lengths[0] = max(state.lengths[0], _LEAST * longest)
    if not state.lengths[0]:
        return
    lengths = function.solve_lengths(point, lines, state.lengths)
    if not any(lengths):
        state.lengths[0] /= 2
        return
    state.lengths[0] = max(lengths[0], 0.1 * state.lengths[0])
    kept = state.last_step = state.last_step or {}  # also one of the lines, and replaced on the way
    for name, change in direction.items():
        for i, part in enumerate(change):
            part.mul_(lengths[0])
            for length, line in zip(lengths[1:], lines[1:], strict=True):
                part.add_(length * line[name][i].float())
            state.factors[name][i].add_(part)
        kept[name] = change[0].bfloat16(), change[1].bfloat16()


def _longest(point: Linearisation, direction: Factors) -> float:
    """Returns the length ‖missing‖²/⟨Jd, missing⟩ of a direction d.

    It would reach all that is missing if Jd pointed there, and comes from the gradient alone; the
    best length is at most that.
    """
    slope = sum(
        float((step * slope).sum())
        for name, steps in direction.items()
        for step, slope in zip(steps, point.gradient[name], strict=True)
    )
    return point.missing / slope if slope > 0 else 0.0


@dataclass
class _FitState:
    """Everything that later steps depend on, beside curvature and generator."""

    factors: Factors  # module -> (B, A)
    # What the last step added to them, in 16 bits: the next one takes its differences along what is
    # kept, so that the rounding is no error of it.
    last_step: Factors | None = None
    # Over which the directions are differenced in the next step
    lengths: list[float] = field(default_factory=lambda: [0.0, MAX_MOMENTUM])
    # Share of the wanted change reached, before every step
    history: list[float] = field(default_factory=list)


def cut_updates(fit: JointFit, rank: float) -> dict[str, LowRank]:
    """Cuts every update to lower rank in the metric of the curvature.

    See `JointCurvature.cut`.
    """
    metric = fit.curvature
    assert metric is not None
    return {name: metric.cut(name, update, rank) for name, update in fit.updates.items()}


STEPS = 2
"""Steps that take about as many predictions as one Gauss–Newton step: a forward and a backward pass
each, where that takes two forward passes more."""
SHARE = 0.16
"""Length of the longest step in a row of B or column of A, relative to the mean one, where all
of the wanted change is missing; where a share m is missing, √m times that."""
_RISE = 1 / 8
"""Share of the steps in which their length rises; from there it falls linearly to 0."""
_MEAN, _SQUARE = 0.9, 0.999  # the past's share in the means of slopes and of their squares


def fit_in_factors(
    problem: JointProblem,
    initial: Mapping[str, LowRank] | None = None,
    on_step: Callable[[int], None] = lambda _: None,
) -> JointFit:
    """Runs the first half of the steps by `fit_jointly`, then Adam.

    Arguments as for `fit_jointly`; a rest of n steps is STEPS·n of Adam's. A fit that starts from a
    copy takes all of its steps by `fit_jointly`: Adam's lose more of what a copy does right away
    from the probes.
    """
    half = problem.steps if initial else (problem.steps + 1) // 2
    first = fit_jointly(replace(problem, steps=half), initial, on_step)
    if half == problem.steps:
        return first
    walk = _Walk.start(first)
    curvature, history = first.curvature if problem.will_be_cut else None, [*first.history]
    del first
    steps = STEPS * (problem.steps - half)
    function = TargetFunction(problem.target, problem.read, problem.damping)
    for step in range(steps):
        probes = problem.draw()
        if step % STEPS == 0:
            on_step(half + step // STEPS)
        point = function.linearise(probes, walk.factors, renew=False)
        history.append(point.reached)
        walk.take_step(point, _length_of_step(step, steps))
    updates = {name: LowRank(*pair) for name, pair in walk.factors.items()}
    return JointFit(updates, curvature, history)


def _length_of_step(step: int, steps: int) -> float:
    """Returns the length of an Adam step where all is missing, relative to the factors."""
    return SHARE * min((step + 1) / (_RISE * steps), 1) * (1 - step / steps)


@dataclass
class _Walk:
    """Adam's steps in factors whose A has orthogonal rows of one length.

    A row of B, and a column of A, is one variable: its slopes have one mean square. So with these
    factors the product moves in the same way however it was split before, and turned in any way
    within its rank. Lengths are relative to the size of each factor, so weights of another scale
    take the same steps in theirs, and to what is missing, so a start that reaches most of the
    wanted change is not lost. A product that is zero stays so: nothing tells its size.
    """

    factors: Factors  # module -> (B, A)
    # Module -> root mean square of the numbers of B and of A at the start
    sizes: dict[str, tuple[float, float]]
    means: Factors  # module -> means of slopes by B and A, in 16 bits
    squares: Factors  # module -> mean squares of slopes in every row of B and every column of A
    taken: int = 0  # steps that changed anything

    @classmethod
    def start(cls, first: JointFit) -> _Walk:
        """Starts where the Gauss–Newton steps arrived."""
        factors: Factors = {}
        for name, update in first.updates.items():
            basis, mixed = torch.linalg.qr(update.down.mT)
            factors[name] = (update.up @ mixed.mT, basis.mT.contiguous())
        sizes = {name: (_size(up), _size(down)) for name, (up, down) in factors.items()}
        means = {
            name: (_zeros(up, up.shape, torch.bfloat16), _zeros(down, down.shape, torch.bfloat16))
            for name, (up, down) in factors.items()
        }
        squares = {
            name: (_zeros(up, (len(up), 1)), _zeros(down, (1, down.shape[1])))
            for name, (up, down) in factors.items()
        }
        return cls(factors, sizes, means, squares)

    def take_step(self, point: Linearisation, length: float) -> None:
        """Takes one step if these probes miss something."""
        if 1 - point.reached < ROUNDING:
            return  # the rest is rounding of float32
        self.taken += 1
        length *= min(1 - point.reached, 1) ** 0.5
        wanted = point.missing / (1 - point.reached)
        for name, slopes in point.gradient.items():
            for i, slope in enumerate(slopes):
                slope = slope / wanted
                mean = self.means[name][i].float().lerp_(slope, 1 - _MEAN)
                self.means[name][i].copy_(mean)
                square = self.squares[name][i]
                square.lerp_(slope.square().mean(1 - i, keepdim=True), 1 - _SQUARE)
                mean /= 1 - _MEAN**self.taken
                usual = (square / (1 - _SQUARE**self.taken)).sqrt()
                usual[usual == 0] = torch.inf  # what nothing reaches does not move
                self.factors[name][i].add_(mean / usual, alpha=length * self.sizes[name][i])


def _size(factor: Tensor) -> float:
    return float(factor.square().mean().sqrt())


def _zeros(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    return torch.zeros(shape, dtype=dtype or like.dtype, device=like.device)
