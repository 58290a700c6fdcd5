"""Which eigensolver takes a stack of symmetric matrices on a GPU, tried out before it is trusted.

cuSOLVER's XsyevBatched where torch's cuSOLVER has it, else torch's loop over the matrices.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .cusolver import Cusolver, SolverUnavailable, open_library

logger = logging.getLogger(__name__)

Solve = Callable[[Tensor, bool], tuple[Tensor, Tensor, Tensor]]
"""(lower triangles [b, d, d], with vectors) -> ascending values, vectors as columns, int32 [b].

The input is contiguous and may be overwritten; the integers are 0 where the algorithm converged.
"""

LOOP = "torch.linalg.eigh, matrix by matrix"
# Sizes to try: libraries take other algorithms above 32.
TRIAL_SIZES = (5, 40)


@dataclass(frozen=True)
class StackSolver:
    """What solves a stack of eigenproblems on a device.

    Attributes:
        name: to print.
        solve: None where it is torch's loop.
        why: why the solvers before this one do not.
    """

    name: str
    solve: Solve | None
    why: str = ""


def open_cusolver() -> Solve:
    """XsyevBatched of torch's cuSOLVER.

    Raises:
        SolverUnavailable: there is none.
    """
    if torch.version.hip:
        raise SolverUnavailable("this is ROCm")
    return Cusolver(open_library()).solve


CANDIDATES: dict[str, Callable[[], Solve]] = {
    "cuSOLVER's XsyevBatched": open_cusolver,
}


@functools.cache
def stack_solver(device: torch.device, dtype: torch.dtype) -> StackSolver:
    """What solves stacks of a dtype on a device: tried once, and logged."""
    if device.type != "cuda":
        return StackSolver(LOOP, None)
    chosen = choose_solver(device, dtype)
    level = logging.WARNING if chosen.solve is None else logging.INFO
    why = f" ({chosen.why})" if chosen.why else ""
    logger.log(level, "%s, %s: eigenproblems by %s%s", device, dtype, chosen.name, why)
    return chosen


def choose_solver(device: torch.device, dtype: torch.dtype) -> StackSolver:
    """The first candidate that solves a small random problem as torch.linalg.eigh does."""
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
    """What solves stacks of float32 eigenproblems on the first GPU, to print."""
    if not torch.cuda.is_available():
        return "none (no GPU)"
    chosen = stack_solver(torch.device("cuda", 0), torch.float32)
    return f"{chosen.name} ({chosen.why})" if chosen.why else chosen.name


def _make_trial(d: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random symmetric matrices [3, d, d] and their eigenvalues, one by one."""
    generator = torch.Generator("cpu").manual_seed(d)
    random = torch.randn(3, d, d, generator=generator, dtype=torch.float64, device="cpu")
    symmetric = (random + random.mT).to(device, dtype)
    return symmetric, torch.stack([torch.linalg.eigvalsh(one) for one in symmetric])


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
