"""All updates at once: a few Gauss–Newton steps on the target's prediction."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..core.lowrank import LowRank
from .block_fit import rank_for
from .trajectories import Call, weight_of

Weights = dict[str, Tensor]
Read = Callable[[Any], Tensor]

MAX_FACTOR = 4096
"""Sides wider than this get a diagonal factor: a full one would cost more than the model."""

_MOMENTUM = 0.9  # at most: the last direction was found on other probes
_KEPT = 0.9  # of the factors, when new probes are added: the weights move
_REFRESH = 4  # steps between two estimates of the curvature
_ROUNDING = 1e-6  # of the wanted change
_FIRST = 1e-3  # of the weights' norm, the length of the first trial step


@dataclass(frozen=True)
class ProbeBatch:
    """One batch.

    Attributes:
        call: inputs of the target.
        plain: what it predicts there without updates.
        wanted: what it should predict.
    """

    call: Call
    plain: Tensor
    wanted: Tensor


class Curvature:
    """JᵀJ of every module as a Kronecker product, estimated on the probes.

    For y = W·x inside the model, JᵀJ ≈ (Σ g gᵀ) ⊗ (Σ x xᵀ) / tokens: x what the module reads, g
    the back-projection of random numbers at the prediction onto y. Both are damped by
    √damping · (mean diagonal) before they are inverted.
    """

    def __init__(self, damping: float) -> None:
        """Starts with no probes; `damping` is relative to the mean diagonal."""
        self.damping = damping
        self.reads: Weights = {}
        self.writes: Weights = {}
        self.tokens: dict[str, float] = {}
        self.inverse: dict[str, tuple[Tensor, Tensor]] = {}

    def fade(self) -> None:
        """Lets what was added so far count less."""
        for sums in (self.reads, self.writes):
            for name in sums:
                sums[name] *= _KEPT
        self.tokens = {name: _KEPT * count for name, count in self.tokens.items()}

    def add(self, sums: Weights, name: str, rows: Tensor) -> None:
        """Adds Σ r rᵀ over the rows [..., n], or its diagonal where n is large."""
        flat = rows.detach().flatten(0, -2).float()
        full = flat.shape[1] <= MAX_FACTOR
        found = flat.mT @ flat if full else flat.square().sum(0)
        sums[name] = sums[name] + found if name in sums else found

    def invert(self) -> None:
        """Takes the factors as they are now."""
        for name in self.writes:  # not of what never reaches the prediction
            self.inverse[name] = (self._inverse(self.writes[name]), self._inverse(self.reads[name]))

    def _inverse(self, factor: Tensor) -> Tensor:
        """(F + √damping·mean(diag F)·I)⁻¹ of a factor [n, n] or of a diagonal [n]."""
        diagonal = factor if factor.dim() == 1 else factor.diagonal()
        shift = (self.damping**0.5 * diagonal.mean()).clamp_min(1e-30)
        if factor.dim() == 1:
            return torch.reciprocal(factor + shift)
        shifted = factor + shift * torch.eye(len(factor), device=factor.device)
        return torch.cholesky_inverse(torch.linalg.cholesky(shifted))

    def direction(self, gradient: Weights) -> Weights:
        """(JᵀJ)⁻¹ gradient, module by module [m, n]; 0 for what never reaches the prediction."""
        return {
            name: _multiply_factors(self.inverse[name][0], g, self.inverse[name][1])
            * self.tokens[name]
            if name in self.inverse
            else torch.zeros_like(g)
            for name, g in gradient.items()
        }


def _multiply_factors(left: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
    """left·matrix·right, each side full or a diagonal."""
    half = left @ matrix if left.dim() == 2 else left[:, None] * matrix
    return half @ right if right.dim() == 2 else half * right


@dataclass(frozen=True)
class JointFit:
    """What was found.

    Attributes:
        updates: module -> D [m, n], of full rank.
        curvature: for the cut to low rank.
        history: share of the wanted change reached, before every step, on that step's probes.
    """

    updates: Weights
    curvature: Curvature
    history: list[float]


def fit_jointly(
    target: nn.Module,
    names: Sequence[str],
    draw: Callable[[], Sequence[ProbeBatch]],
    read: Read,
    steps: int,
    damping: float,
    initial: Mapping[str, LowRank] | None = None,
    told: Callable[[int], None] = lambda _: None,
    halfway: FitState | None = None,
) -> JointFit:
    """Minimises Σ ‖f(W + D) − wanted‖² over D by Gauss–Newton steps on fresh probes.

    Each step linearises the target at W + D, takes the direction d = (JᵀJ)⁻¹Jᵀ·missing with a
    Kronecker-factored JᵀJ, and goes αd + βs, s the step before: α and β solve the least-squares
    problem min ‖missing − αJd − βJs‖² exactly. Jd and Js are differences of predictions, taken at
    the lengths of the last step, so that they include the bend of f on the way there. A step
    costs one forward and backward pass and two forward passes; nothing is tuned by hand.

    Args:
        target: the model; its weights stay as they are.
        names: its linear modules that get an update.
        draw: the probes of the next step.
        read: return value of the target -> its prediction.
        steps: how many.
        damping: of the curvature, relative to the mean diagonal.
        initial: updates to start from, of some of the modules.
        told: called with the number of steps done.
        halfway: keeps the state between steps, so that an interrupted fit goes on, bit for bit.
    """
    problem = _JointProblem(target, names, read)
    updates = {name: torch.zeros_like(weight) for name, weight in problem.start.items()}
    for name, update in (initial or {}).items():
        updates[name] += update.dense().to(updates[name])
    curvature = Curvature(damping)
    before: Weights | None = None
    lengths = [0.0, _MOMENTUM]
    history: list[float] = []
    begin = 0
    found_state = halfway.recall() if halfway else None
    if found_state is not None:
        begin, updates, before, lengths, history = _restore_state(found_state, problem, curvature)
    for step in range(steps):
        if step < begin:
            draw()  # the same probes come to the same steps
            continue
        told(step)
        renew = step < 2 or step % _REFRESH == 0
        at = {name: problem.start[name] + update for name, update in updates.items()}
        point = problem.linearised(draw(), at, curvature if renew else None)
        history.append(point.reached)
        if 1 - point.reached < _ROUNDING:
            break  # what is missing is what float32 cannot tell
        direction = curvature.direction(point.gradient)
        lines = [direction] if before is None else [direction, before]
        if before is None:
            lengths[0] = float(
                _FIRST * _weights_norm(at) / _weights_norm(direction).clamp_min(1e-30)
            )
            lengths[0] = problem.solved(point, lines, lengths)[0]
        found = problem.solved(point, lines, lengths)
        if not any(found):
            break  # nothing is missing, or no step helps
        before = {n: _weighted_sum(found, [line[n] for line in lines]) for n in names}
        lengths[0] = max(found[0], 0.1 * lengths[0])
        updates = {name: update + before[name] for name, update in updates.items()}
        if halfway and halfway.due():
            facts = {"step": step + 1, "lengths": lengths, "history": history}
            halfway.store(*_pack_state(updates, before, curvature, problem, facts))
    return JointFit(updates, curvature, history)


State = tuple[dict[str, Tensor], dict[str, Any]]


class FitState(Protocol):
    """Where the state of a fit is kept."""

    def due(self) -> bool:
        """Whether it is time to keep it."""

    def store(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Keeps it."""

    def recall(self) -> State | None:
        """What was kept last, if anything."""


def _pack_state(
    updates: Weights,
    before: Weights,
    curvature: Curvature,
    problem: _JointProblem,
    facts: dict[str, Any],
) -> State:
    """All that the steps to come depend on."""
    groups = {
        "update": updates,
        "before": before,
        "reads": curvature.reads,
        "writes": curvature.writes,
    }
    tensors = {f"{group}/{n}": t for group, found in groups.items() for n, t in found.items()}
    tensors["generator"] = problem.generator.get_state()
    return tensors, facts | {"tokens": curvature.tokens}


def _restore_state(
    state: State, problem: _JointProblem, curvature: Curvature
) -> tuple[int, Weights, Weights, list[float], list[float]]:
    """Steps done, updates, last step, its lengths, history; generator and curvature are set."""
    tensors, facts = state
    groups: dict[str, Weights] = {"update": {}, "before": {}, "reads": {}, "writes": {}}
    for key, tensor in tensors.items():
        group, _, name = key.partition("/")
        if group in groups:
            groups[group][name] = tensor.to(problem.start[name].device)
    problem.generator.set_state(tensors["generator"])
    curvature.reads, curvature.writes = groups["reads"], groups["writes"]
    curvature.tokens = dict(facts["tokens"])
    curvature.invert()
    return facts["step"], groups["update"], groups["before"], facts["lengths"], facts["history"]


@dataclass(frozen=True)
class _Linearisation:
    """The target linearised at some weights, on the probes of one step."""

    probes: Sequence[ProbeBatch]
    weights: Weights
    base: list[Tensor]
    gradient: Weights
    reached: float


class _JointProblem:
    """The target as a function of the weights of some modules."""

    def __init__(self, target: nn.Module, names: Sequence[str], read: Read) -> None:
        self.target, self.names, self.read = target, names, read
        self.start = {name: weight_of(target, name).detach().float() for name in names}
        self.generator = torch.Generator().manual_seed(0)

    def outputs(self, call: Call, weights: Weights) -> Tensor:
        """The prediction with other weights in place."""
        state = {f"{name}.weight": weight for name, weight in weights.items()}
        return self.read(functional_call(self.target, state, call.args, call.kwargs))

    def linearised(
        self, probes: Sequence[ProbeBatch], weights: Weights, curvature: Curvature | None
    ) -> _Linearisation:
        """Predictions and Jᵀ·missing; the probes are added to the curvature where one is given."""
        gradient = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        base, left, whole = [], 0.0, 0.0
        if curvature:
            curvature.fade()
        for probe in probes:
            leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
            values = list(leaves.values())
            with (
                torch.enable_grad(),
                _record_curvature(self.target, self.names, curvature) as watch,
            ):
                found = self.outputs(probe.call, leaves)
                if curvature:
                    noise = torch.randn(found.shape, generator=self.generator).to(found)
                    torch.autograd.grad(found, values, noise, retain_graph=True, allow_unused=True)
                    watch.clear()
            missing = (probe.wanted - found).detach()
            for name, part in zip(
                leaves, torch.autograd.grad(found, values, missing, allow_unused=True), strict=True
            ):
                if part is not None:
                    gradient[name] += part
            base.append(found.detach())
            left += float(missing.double().square().sum())
            whole += float((probe.wanted - probe.plain).double().square().sum())
        if curvature:
            curvature.invert()
        return _Linearisation(probes, weights, base, gradient, 1 - left / max(whole, 1e-30))

    @torch.no_grad()
    def solved(
        self, point: _Linearisation, lines: list[Weights], lengths: list[float]
    ) -> list[float]:
        """The c that minimises ‖missing − Σ cᵢ·J·lineᵢ‖, that of the last step within 0..0.9."""
        size = len(lines)
        right = torch.zeros(size, dtype=torch.float64)
        curved = torch.zeros(size, size, dtype=torch.float64)
        for probe, base in zip(point.probes, point.base, strict=True):
            slopes = []
            for line, length in zip(lines, lengths, strict=False):
                moved = {n: w + length * line[n] for n, w in point.weights.items()}
                slopes.append(((self.outputs(probe.call, moved) - base) / length).double())
            missing = (probe.wanted - base).double()
            for i in range(size):
                right[i] += (slopes[i] * missing).sum().cpu()
                for j in range(size):
                    curved[i, j] += (slopes[i] * slopes[j]).sum().cpu()
        diagonal = curved.diagonal().clamp_min(1e-30)
        if size == 1:
            return [max(float(right[0] / diagonal[0]), 0.0)]
        free = torch.linalg.lstsq(curved, right[:, None]).solution[:, 0]
        momentum = min(max(float(free[1]), 0.0), _MOMENTUM)
        rest = float((right[0] - curved[0, 1] * momentum) / diagonal[0])
        return [max(rest, 0.0), momentum]


@contextlib.contextmanager
def _record_curvature(
    target: nn.Module, names: Sequence[str], curvature: Curvature | None
) -> Iterator[_OutputHooks]:
    """Hooks that add what the modules read, and what reaches back to them, to the curvature.

    Yields:
        The hooks on the way back, to be cleared before another backward pass.
    """
    watch = _OutputHooks()
    if curvature is None:
        yield watch
        return

    def seen(name: str, x: Tensor, y: Tensor) -> None:
        curvature.add(curvature.reads, name, x)
        curvature.tokens[name] = curvature.tokens.get(name, 0.0) + x[..., 0].numel()
        hook = y.register_hook(lambda back: curvature.add(curvature.writes, name, back))
        watch.hooks.append(hook)

    hooks = [
        target.get_submodule(name).register_forward_hook(
            lambda _module, args, y, name=name: seen(name, args[0], y)
        )
        for name in names
    ]
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


class _OutputHooks:
    """The hooks on outputs of one forward pass."""

    def __init__(self) -> None:
        self.hooks: list[Any] = []

    def clear(self) -> None:
        """Removes them."""
        for hook in self.hooks:
            hook.remove()


def _weights_norm(weights: Weights) -> Tensor:
    return torch.stack([w.double().square().sum() for w in weights.values()]).sum().sqrt()


def _weighted_sum(factors: list[float], parts: list[Tensor]) -> Tensor:
    return sum((f * p for f, p in zip(factors, parts, strict=True)), torch.zeros(()).to(parts[0]))


def cut_by_factors(found: JointFit, rank: float) -> dict[str, LowRank]:
    """Every update at low rank: what the probes see of it is kept.

    With R = Σ x xᵀ of what the module reads and S = Σ g gᵀ of what it acts on, both slightly
    damped: the leading singular triplets of S^½·D·R^½, taken back by S^(−½) and R^(−½).
    """
    small = {}
    for name, update in found.updates.items():
        if name not in found.curvature.writes:
            continue  # whatever it does, the prediction is the same
        left, left_back = _factor_roots(found.curvature.writes[name])
        right, right_back = _factor_roots(found.curvature.reads[name])
        u, s, v = torch.linalg.svd(_multiply_factors(left, update, right), full_matrices=False)
        count = rank_for(s, rank)
        size = s[:count].sqrt()
        up = u[:, :count] * size
        down = size[:, None] * v[:count]
        up = left_back @ up if left_back.dim() == 2 else left_back[:, None] * up
        down = down @ right_back if right_back.dim() == 2 else down * right_back
        small[name] = LowRank(up.contiguous(), down.contiguous())
    return small


def _factor_roots(factor: Tensor) -> tuple[Tensor, Tensor]:
    """(F + 0.01·mean(diag F)·I)^(½) and its inverse, of a factor [n, n] or a diagonal [n]."""
    if factor.dim() == 1:
        root = (factor + 0.01 * factor.mean().clamp_min(1e-30)).sqrt()
        return root, 1 / root
    values, vectors = torch.linalg.eigh(factor)
    values = values.clamp_min(0)
    root = (values + 0.01 * values.mean().clamp_min(1e-30)).sqrt()
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT
