"""The methods that move an update by weights: what each needs, and how it moves the factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .lowrank import LowRank
from .ops.project_pair import project_pair
from .projectors import Projector

MethodName = Literal["prolora", "copy"]
"""The methods of the table."""

MethodChoice = Literal["auto", MethodName]
"""What `project` and `transfer` take as their method; "auto" copies, or refuses."""

Parts = tuple[Tensor, ...]

Rule = Callable[[LowRank, Any, Any], LowRank | tuple[Tensor, Tensor]]
"""A method of one's own: called with the update [m, n] of one module and both weights, it returns
the update of the target."""


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
    """One factor as rows x [..., r, m], split by two bases."""

    x: Tensor  # the rows
    inside: Tensor  # their part in the range of the source's basis
    outside: Tensor  # their part in its complement
    within: Tensor  # the part of `inside` in the range of the target's basis
    without: Tensor  # the part of `outside` in the complement of the target's basis

    @classmethod
    def of(cls, x: Tensor, source: Tensor, target: Tensor) -> Side:
        """Splits rows x [..., r, m] by U_s [..., m, k] and U_t.

        U_t is [..., m, k']. Rows of several updates of a weight, [..., l, r, m], are split as one.
        """
        several = x.ndim > source.ndim
        rows = x.flatten(-3, -2) if several else x
        split, moved = _SplitRows.apply(source, target, rows)  # type: ignore[no-untyped-call]
        parts = (*split.chunk(2, -2), *moved.chunk(2, -2))
        if several:
            parts = tuple(part.unflatten(-2, x.shape[-3:-1]) for part in parts)
        return cls(x, *parts)

    @classmethod
    def by_projectors(cls, x: Tensor, source: Projector, target: Projector) -> Side:
        """Splits rows x [b, r, m], or of several updates of each weight [b, l, r, m]."""
        rows = x.flatten(-3, -2) if x.ndim == 4 else x
        inside, outside = source.split(rows)
        both = target.split(torch.cat([inside, outside], 1))
        r = rows.shape[1]
        parts: Parts = inside, outside, both[0][:, :r], both[1][:, r:]
        if x.ndim == 4:
            parts = tuple(part.unflatten(-2, x.shape[-3:-1]) for part in parts)
        return cls(x, *parts)


@dataclass(frozen=True)
class Method:
    """One way to move an update to another weight.

    Attributes:
        name: as `project` and `transfer` take it.
        needs_bases: it looks at the leading singular subspaces of both weights, drops the mixed
            blocks (from the source's range to the complement and back), and gives a rank of 2r at
            most. Otherwise it looks at the update ΔW_s of rank r alone, and keeps r.
        summary: what it does, for tables and help, without a full stop.
        origin: where it comes from.
        outcome: a report's words for a module that was moved by it.
        split: the parts of one side's rows that make ΔW_t = Σ_i L_iᵀ R_i. The parts of a side are
            mutually orthogonal (range and complement of one target basis).
        rule: computes the update in place of `split`; a method without bases has one, or it would
            copy.
    """

    name: str
    needs_bases: bool
    summary: str
    origin: str
    outcome: str
    split: Callable[[Side], Parts]
    rule: Rule | None = None

    def __post_init__(self) -> None:
        """Refuses a method whose `split` would not be asked."""
        if not (self.needs_bases or self.rule or self.name == "copy"):
            raise ValueError(
                f"method {self.name!r} looks at no bases and has no `rule`: it would copy; give it "
                "a rule"
            )


MethodLike = MethodChoice | Method | Rule

_ROWS = (
    Method(
        name="prolora",
        needs_bases=True,
        summary="maps range to range and complement to complement",
        origin="the paper, arXiv 2506.04244",
        outcome="projected (prolora)",
        split=lambda side: (side.within, side.without),
    ),
    Method(
        name="copy",
        needs_bases=False,
        summary="leaves the update as it is",
        origin="the baseline",
        outcome="copied",
        split=lambda side: (side.x,),
    ),
)

METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _ROWS})
"""Name -> method: "prolora", the projection of the paper, and "copy"."""


_OF_FILES = {"best": "transfer", "fit": "fit"}
"""What people ask for here that takes two models, and the function that does it."""


def find_method(method: str | Method | Rule) -> Method:
    """Returns the method of that name, or makes one of a rule.

    Raises:
        ValueError: it is unknown, and the message lists the names; or the name is another's.
    """
    if not isinstance(method, str) and (isinstance(method, Method) or callable(method)):
        if not isinstance(method, Method):
            name = getattr(method, "__name__", type(method).__name__)
            text = f"moved by {name}"
            method = Method(name, False, text, "", text, lambda side: (side.x,), method)
        if METHODS.get(method.name, method) is not method or method.name in ("auto", *_OF_FILES):
            raise ValueError(f"{method.name!r} is a method of prolora: give yours another name")
        return method
    if method in METHODS:
        return METHODS[method]
    names = ", ".join(get_args(MethodChoice))
    door = _OF_FILES.get(method)
    other = f"; {method!r} moves whole LoRAs: `{door}()` does that" if door else ""
    raise ValueError(f"unknown method {method!r}: choose from {names}{other}")
