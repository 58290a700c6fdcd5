"""The classes of a pair of models: limits, advice, and what copies gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # these sentences are read without torch, too
    from ..core.verdict import PairVerdict

Mark = Literal["✔", "⚠", "✖"]

FARTHEST = 0.5
"""Related models whose weights differ by more are distant."""

ALIKE_RATIO = 0.4
"""Models that differ by less than this part of the LoRA's own size are alike.

The effective rank of the difference was tried as well and decided nothing: long training of another
look raises it, too."""


@dataclass(frozen=True)
class PairClass:
    """A class of model pairs, with advice and measured results."""

    name: str
    mark: Mark  # ✔ most of a LoRA arrives, ⚠ part of it, ✖ nothing
    headline: str  # the verdict; it may name `{source}` and `{target}`
    advice: str  # which strengths to try; it may name both models
    outcome: str = ""  # what copies gave on the study's models; it may name `{low}` and `{high}`
    # Shares of what training on the target gives, without the lowest and the highest tenth; only
    # where a range made without a world held there, and is narrow enough to say something.
    range: tuple[float, float] | None = None


_FIT = "A new one, fitted with `method='best'` where both models can run, brings more."
_SEEN = "On small test models a copy brought"
_MEASURE = "of what training on the target gives"

CLASSES = {
    row.name: row
    for row in (
        PairClass(
            "same",
            "✔",
            "Both models are the same where it counts: the LoRA works as it is.",
            "Load it at strength 1.",
        ),
        PairClass(
            "alike",
            "✔",
            "This should work: {target} differs from {source} by little beside the LoRA.",
            "Load it at strength 1.",
            f"{_SEEN} {{low:.0%}} to {{high:.0%}} {_MEASURE}.",
            (0.82, 0.99),
        ),
        PairClass(
            "changed",
            "⚠",
            "This may work or not: {source} and {target} have learnt different things.",
            "Load it at strength 1, and try 0.5 and 0.8 beside it: lower keeps the look of "
            "{target}, 1 shows the LoRA's. Where both models can run, `method='best'` with "
            "`look='source'` makes one that draws as on {source}.",
            f"{_SEEN} anything from nearly all {_MEASURE} to nothing, and some images got worse "
            "than without it.",
        ),
        PairClass(
            "cut",
            "⚠",
            "This should work in part: {target} lacks parts that the LoRA changes.",
            f"Load it at strength 1. {_FIT}",
            f"{_SEEN} a part {_MEASURE}, mostly the larger part.",
        ),
        PairClass(
            "few-step",
            "⚠",
            "This should work in part: {target} draws in few steps.",
            f"Load it at strength 1 to 1.25. {_FIT}",
            f"{_SEEN} a part {_MEASURE}: less the longer the target was trained to few steps.",
        ),
        PairClass(
            "distant",
            "⚠",
            "This may work or not: {source} and {target} are far apart.",
            "Load it at strength 1. A new one, made with `fit()` where both models can run, brings "
            "far more.",
            f"{_SEEN} a part {_MEASURE} at best; few such models were tried.",
        ),
        PairClass(
            "apart",
            "✖",
            "Do not expect this to work: the two models have nothing in common.",
            "Fit one with `method='best'` where both models can run, or train it on {target}.",
            f"{_SEEN} little or nothing, and some images got worse than without it.",
        ),
    )
}


def classify(verdict: PairVerdict, cut: bool, few_steps: bool) -> str:
    """Returns the class of a pair of models.

    `cut` says that modules of the LoRA have no counterpart on the target, `few_steps` that the
    target draws in few steps, and the source does not.
    """
    if not verdict.related:
        return "apart"
    if few_steps and verdict.drift > 0:
        return "few-step"
    if verdict.drift > FARTHEST:
        return "distant"
    if cut:
        return "cut"
    if verdict.drift == 0:
        return "same"
    small = verdict.size is not None and verdict.drift < ALIKE_RATIO * verdict.size
    return "alike" if small else "changed"
