"""A whole fit in factors: Gauss–Newton steps, which know no scale, then Adam's, which need one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core.lowrank import LowRank
from ..updates import Factors
from .joint_fit import ROUNDING, JointFit, JointProblem, fit_jointly
from .linearisation import Linearisation, TargetFunction

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
