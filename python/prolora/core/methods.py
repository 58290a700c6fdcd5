"""What each method is: what it needs, what becomes of the rank, and how it moves an update.

`project` and `transfer` read this table, and compare no names of methods. A new method is a row
here and its name in the two types below; `split` is what it does, if it acts on subspaces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .ops.project_pair import project_pair

MethodName = Literal["prolora", "subspace", "lora-x", "copy", "blocks", "damped"]
"""The methods of the table."""

MethodChoice = Literal["auto", MethodName]
"""What `project` and `transfer` take as their method; "auto" chooses one of `METHODS`."""

Parts = tuple[Tensor, ...]


class Needs(Enum):
    """What a method looks at, besides the update."""

    NOTHING = "nothing"
    """The update alone."""
    WEIGHTS = "weights"
    """Both weights as they are, without an SVD."""
    BASES = "bases"
    """The leading singular subspaces of both weights."""


class _SplitRows(torch.autograd.Function):
    """`project_pair` with derivatives in both directions; it is linear in the rows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(source: Tensor, target: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return project_pair(source, target, x)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]
    ) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        """Projectors are symmetric: P_s(g₁ + P_t g₃) + P_s⊥(g₂ + P_t⊥ g₄)."""
        source, target = ctx.saved_tensors
        (inside, outside), (within, without) = (g.chunk(2, -2) for g in grads)
        inside = inside + within @ target @ target.mT
        outside = outside + without - without @ target @ target.mT
        return None, None, outside + (inside - outside) @ source @ source.mT

    @staticmethod
    def jvp(ctx: Any, _source: None, _target: None, tangent: Tensor) -> tuple[Tensor, Tensor]:
        source, target = ctx.saved_tensors
        return project_pair(source, target, tangent)


@dataclass(frozen=True)
class Side:
    """One factor as rows x [..., r, m], split by two bases.

    Attributes:
        x: the rows.
        inside, outside: their parts in the range of the source's basis and in its complement.
        within: the part of `inside` in the range of the target's basis.
        without: the part of `outside` in the complement of the target's basis.
    """

    x: Tensor
    inside: Tensor
    outside: Tensor
    within: Tensor
    without: Tensor

    @classmethod
    def of(cls, x: Tensor, source: Tensor, target: Tensor) -> Side:
        """Splits rows x [..., r, m] by U_s [..., m, k] and U_t [..., m, k'].

        Rows of several updates of a weight, [..., l, r, m], are split as one.
        """
        several = x.ndim > source.ndim
        rows = x.flatten(-3, -2) if several else x
        split, moved = _SplitRows.apply(source, target, rows)  # type: ignore[no-untyped-call]
        parts = (*split.chunk(2, -2), *moved.chunk(2, -2))
        if several:
            parts = tuple(part.unflatten(-2, x.shape[-3:-1]) for part in parts)
        return cls(x, *parts)


@dataclass(frozen=True)
class Method:
    """One way to move an update ΔW_s of rank r to another weight.

    Attributes:
        name: as `project` and `transfer` take it.
        needs: what it looks at.
        keeps_rank: ΔW_t has at most rank r; at most 2r where False.
        drops_mixed: it drops the mixed blocks, from the source's range to the complement and back.
        summary: what it does, for tables and help, without a full stop.
        origin: where it comes from.
        outcome: what a report's row says of a module that was moved by it.
        split: the parts of one side's rows that make ΔW_t = Σ_i L_iᵀ R_i, for methods that
            factor over the two sides; None for the others. The parts of a side are mutually
            orthogonal (range and complement of one target basis).
    """

    name: MethodName
    needs: Needs
    keeps_rank: bool
    drops_mixed: bool
    summary: str
    origin: str
    outcome: str
    split: Callable[[Side], Parts] | None = None

    @property
    def rank_factor(self) -> int:
        """ΔW_t has at most this many times the rank of ΔW_s: 1 or 2."""
        return 1 if self.keeps_rank else 2


_ROWS = (
    Method(
        name="prolora",
        needs=Needs.BASES,
        keeps_rank=False,
        drops_mixed=True,
        summary="maps range to range and complement to complement",
        origin="the paper, arXiv 2506.04244",
        outcome="projected (prolora)",
        split=lambda side: (side.within, side.without),
    ),
    Method(
        name="subspace",
        needs=Needs.BASES,
        keeps_rank=True,
        drops_mixed=True,
        summary="prolora without the complement",
        origin="the paper's ablation",
        outcome="projected (subspace)",
        split=lambda side: (side.within,),
    ),
    Method(
        name="lora-x",
        needs=Needs.BASES,
        keeps_rank=True,
        drops_mixed=False,
        summary="keeps what lies in the target's range",
        origin="LoRA-X, eq. 3",
        outcome="projected (lora-x)",
        # Of what was inside the source's range and of what was outside.
        split=lambda side: (side.within + (side.outside - side.without),),
    ),
    Method(
        name="copy",
        needs=Needs.NOTHING,
        keeps_rank=True,
        drops_mixed=False,
        summary="leaves the update as it is",
        origin="the baseline",
        outcome="copied",
        split=lambda side: (side.x,),
    ),
    Method(
        name="blocks",
        needs=Needs.BASES,
        keeps_rank=True,
        drops_mixed=False,
        summary="prolora with the mixed blocks mapped as well",
        origin="our extension",
        outcome="projected (blocks)",
        # The four blocks factor: Σ_ab (P_t^a P_s^a) ΔW (Q_s^b Q_t^b) = L ΔW R.
        split=lambda side: (side.within + side.without,),
    ),
    Method(
        name="damped",
        needs=Needs.WEIGHTS,
        keeps_rank=True,
        drops_mixed=False,
        summary="weakens the update along the drift of the weights",
        origin="our extension",
        outcome="damped",
    ),
)

METHODS: Mapping[MethodName, Method] = MappingProxyType({method.name: method for method in _ROWS})
"""Every method by its name."""


_OF_FILES = {"best": "transfer_file", "fit": "fit_file"}
"""What people ask for here that takes two models, and the function that does it."""


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: there is none; the message lists the names.
    """
    for method in METHODS.values():
        if method.name == name:
            return method
    names = ", ".join(get_args(MethodChoice))
    door = _OF_FILES.get(name)
    other = f"; {name!r} moves whole LoRAs: `{door}()` does that" if door else ""
    raise ValueError(f"unknown method {name!r}: choose from {names}{other}")
