"""Choice of an eigensolver for stacks of symmetric matrices on a GPU.

A candidate is tried out before it is trusted. It is cuSOLVER's XsyevBatched where torch's cuSOLVER
has it, unless torch.linalg.eigh is clearly faster at the size at hand, as it may be where it takes
whole stacks itself; else torch.linalg.eigh.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..ops.trial import take_time
from .cusolver import Cusolver, SolverUnavailable, open_library

logger = logging.getLogger(__name__)

Solve = Callable[[Tensor, bool], tuple[Tensor, Tensor, Tensor]]
"""(lower triangles [b, d, d], with vectors) -> ascending values, vectors as columns, int32 [b].

The input is contiguous and may be overwritten; the integers are 0 where the algorithm converged.
"""

LOOP = "torch.linalg.eigh"
# Sizes to try: libraries take other algorithms above 32.
TRIAL_SIZES = (5, 40)
# Matrices of a trial by time, and the largest of them.
TIMED_STACK = 4
LARGEST_TIMED = 2048
# torch's solver takes over at this share of the other's time or less: so far apart that no trial
# comes out otherwise in the next process, which would give other bits.
CLEARLY_FASTER = 0.5


@dataclass(frozen=True)
class StackSolver:
    """What solves a stack of eigenproblems on a device."""

    name: str  # to print
    solve: Solve | None  # None where it is torch.linalg.eigh
    why: str = ""  # why the solvers before this one do not


def open_cusolver() -> Solve:
    """Opens XsyevBatched of torch's cuSOLVER; raises SolverUnavailable if that lacks it."""
    if torch.version.hip:
        raise SolverUnavailable("this is ROCm")
    return Cusolver(open_library()).solve


CANDIDATES: dict[str, Callable[[], Solve]] = {
    "cuSOLVER's XsyevBatched": open_cusolver,
}


@functools.cache
def stack_solver(device: torch.device, dtype: torch.dtype) -> StackSolver:
    """Returns what solves stacks of a dtype on a device: tried once, and logged."""
    if device.type != "cuda":
        return StackSolver(LOOP, None)
    chosen = choose_solver(device, dtype)
    level = logging.WARNING if chosen.solve is None else logging.INFO
    why = f" ({chosen.why})" if chosen.why else ""
    logger.log(level, "%s, %s: eigenproblems by %s%s", device, dtype, chosen.name, why)
    return chosen


def solver_at(device: torch.device, dtype: torch.dtype, d: int) -> StackSolver:
    """Returns what solves stacks of a dtype and about this size on a device."""
    chosen = stack_solver(device, dtype)
    if chosen.solve is None:
        return chosen
    return choose_by_time(chosen, device, dtype, min(LARGEST_TIMED, 1 << (d - 1).bit_length()))


@functools.cache
def choose_by_time(
    solver: StackSolver, device: torch.device, dtype: torch.dtype, size: int
) -> StackSolver:
    """Returns the solver, or torch's if that is clearly faster or the solver fails: tried once."""
    lower = _make_symmetric(TIMED_STACK, size, device, dtype).tril()
    if solver.solve is None or not lower.numel():
        return solver
    try:
        values, _, info = solver.solve(lower.clone(), True)
        if bool((info != 0).any() | ~values.isfinite().all()):
            raise SolverUnavailable("it does not converge on a random matrix")
        mine, torchs = partial(solver.solve, lower.clone(), True), partial(torch.linalg.eigh, lower)
        ours = min(take_time(mine, device) for _ in range(2))
        torch.linalg.eigh(lower[:1])
        theirs = take_time(torchs, device)
        if theirs <= CLEARLY_FASTER * ours:
            theirs = max(theirs, take_time(torchs, device))
        if theirs > CLEARLY_FASTER * ours:
            return solver
        why = f"at size {size} {theirs:.1e} s against {ours:.1e} s of {solver.name}"
    except SolverUnavailable as error:
        why = f"{solver.name} fails at size {size}: {error}"
    logger.warning("%s, %s: eigenproblems by %s (%s)", device, dtype, LOOP, why)
    return StackSolver(LOOP, None, why)


def choose_solver(device: torch.device, dtype: torch.dtype) -> StackSolver:
    """Returns the first candidate that solves a small random problem as torch.linalg.eigh does."""
    # First, because it makes torch load its cuSOLVER.
    trials = [_make_trial(d, device, dtype) for d in TRIAL_SIZES]
    failures = []
    for name, open_solver in CANDIDATES.items():
        try:
            solve = open_solver()
            for symmetric, expected in trials:
                _try_out(solve, symmetric, expected)
        except SolverUnavailable as error:
            failures.append(str(error))
        else:
            return StackSolver(name, solve, "; ".join(failures))
    return StackSolver(LOOP, None, "; ".join(failures))


def describe_solver() -> str:
    """Describes what solves stacks of float32 eigenproblems on the first GPU."""
    if not torch.cuda.is_available():
        return "none (no GPU)"
    chosen = stack_solver(torch.device("cuda", 0), torch.float32)
    return f"{chosen.name} ({chosen.why})" if chosen.why else chosen.name


def _make_trial(d: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Makes random symmetric matrices [3, d, d] and their eigenvalues, one by one."""
    symmetric = _make_symmetric(3, d, device, dtype)
    return symmetric, torch.stack([torch.linalg.eigvalsh(one) for one in symmetric])


def _make_symmetric(b: int, d: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Makes random symmetric matrices [b, d, d]."""
    generator = torch.Generator("cpu").manual_seed(d)
    random = torch.randn(b, d, d, generator=generator, dtype=torch.float64, device="cpu")
    return (random + random.mT).to(device, dtype)


def _try_out(solve: Solve, symmetric: Tensor, expected: Tensor) -> None:
    """Raises SolverUnavailable unless `solve` gives the expected values, and vectors to match."""
    lower = symmetric.tril()
    values, vectors, info = solve(lower.clone(), True)
    only, _, info_only = solve(lower.clone(), False)
    eye = torch.eye(symmetric.shape[-1], dtype=symmetric.dtype, device=symmetric.device)
    pairs = [
        ("the values", values, expected),
        ("the values alone", only, expected),
        ("VᵀV", vectors.mT @ vectors, eye.expand_as(symmetric)),
        ("VΛVᵀ", (vectors * values[:, None]) @ vectors.mT, symmetric),
    ]
    if bool((info != 0).any() | (info_only != 0).any()):
        raise SolverUnavailable("it does not converge on a random matrix")
    scale = float(torch.linalg.vector_norm(expected, dim=-1).max())
    tolerance = 1e3 * torch.finfo(symmetric.dtype).eps * scale
    for name, computed, wanted in pairs:
        if not float((computed - wanted).abs().max()) <= tolerance:
            raise SolverUnavailable(f"{name} of a random matrix differ from torch's")
