"""The classes of a pair of models: by which numbers, what to do, and what copies gave there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # these sentences are read without torch, too
    from ..core.verdict import Verdict

Mark = Literal["✔", "⚠", "✖"]

FARTHEST = 0.5
"""Related models whose weights differ by more are distant."""

ALIKE_RATIO = 0.4
"""Models that differ by less than this part of the LoRA's own size are alike."""

ALIKE_DIFFERENCE = 0.06
"""The same without a LoRA: 0.4 times the usual size of measured ones."""

ALIKE_SPREAD = 0.45
"""From this spread on, too, as longer training leaves it; other looks were seen up to 0.43."""


@dataclass(frozen=True)
class PairClass:
    """A class of model pairs, with advice and measured results."""

    name: str
    mark: Mark  # ✔ most of a LoRA arrives, ⚠ part of it, ✖ nothing
    headline: str  # the verdict; it may name `{source}` and `{target}`
    advice: str  # which strengths to try
    low: float  # a tenth of the measured LoRAs gave less of what training on the target gives
    share: float  # the mean of them, a kind of target counting the same however many LoRAs it had
    high: float  # a tenth of them gave more


_FIT = "A new one, fitted with `method='best'` where both models can run, brings more."

CLASSES = {
    row.name: row
    for row in (
        PairClass(
            "same",
            "✔",
            "Both models are the same where it counts: the LoRA works as it is.",
            "Load it at strength 1.",
            1.0,
            1.0,
            1.0,
        ),
        PairClass(
            "alike",
            "✔",
            "This should work: {target} is {source} with a little training or merging.",
            "Load it at strength 1.",
            0.83,
            0.93,
            0.99,
        ),
        PairClass(
            "changed",
            "⚠",
            "This may work in part: {source} and {target} have learnt different things.",
            "Load it at strength 1, and try 0.5 and 0.8 beside it: lower keeps the look of "
            "{target}, 1 shows the LoRA's.",
            -0.18,
            0.44,
            0.99,
        ),
        PairClass(
            "cut",
            "⚠",
            "This should work in part: {target} lacks parts that the LoRA changes.",
            f"Load it at strength 1. {_FIT}",
            0.54,
            0.76,
            0.93,
        ),
        PairClass(
            "few-step",
            "⚠",
            "This may work in part: {target} draws in few steps.",
            f"Load it at strength 1 to 1.25. {_FIT}",
            0.48,
            0.7,
            0.92,
        ),
        PairClass(
            "distant",
            "⚠",
            "Expect half of it at best: {source} and {target} are far apart.",
            "Load it at strength 1. A new one, made with `fit()` where both models can run, brings "
            "far more.",
            0.23,
            0.46,
            0.7,
        ),
        PairClass(
            "apart",
            "✖",
            "Do not expect this to work: the two models have nothing in common.",
            "Fit one with `method='best'` where both models can run, or train it on {target}.",
            -0.15,
            0.0,
            0.32,
        ),
    )
}


def classify(verdict: Verdict, cut: bool, few_steps: bool) -> str:
    """Returns the class of a pair of models.

    `cut` says that modules of the LoRA have no counterpart on the target, `few_steps` that the
    target draws in few steps, and the source does not.
    """
    if not verdict.related:
        return "apart"
    if verdict.drift > FARTHEST:
        return "distant"
    if cut:
        return "cut"
    if verdict.drift == 0:
        return "same"
    if few_steps:
        return "few-step"
    limit = ALIKE_RATIO * verdict.size if verdict.size else ALIKE_DIFFERENCE
    alike = verdict.drift < limit or verdict.spread >= ALIKE_SPREAD
    return "alike" if alike else "changed"
