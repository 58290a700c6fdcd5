"""The verdict for people: what to expect, what was done and why, and what to do next.

Terminal, page, card, notebook and the ComfyUI nodes show these sentences first. They need no word
of the mathematics; the numbers behind them are the report's sentences and tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..comparison.expectation import ALIKE, Expectation, classify, expect_shares
from ..core.verdict import AUTO, FARTHEST, MIN_DAMPING, Verdict

Mark = Literal["✔", "⚠", "✖"]

AMOUNTS = (
    (0.995, "All"),
    (0.7, "Most"),
    (0.58, "About two thirds"),
    (0.42, "About half"),
    (0.25, "About a third"),
    (0.1, "A small part"),
    (0.0, "Very little"),
)
"""From which share on a part is called how."""

MOST, HALF, FEW = "most", "about half", "little"
EXPECTED = ((0.7, MOST), (0.3, HALF), (-math.inf, FEW))
"""From which share on what is expected is called how."""

FIT_NO_BETTER = (
    "A fit to the running models was no better on samples that it did not see, so this is the LoRA "
    "moved by the weights alone."
)

ZERO = "This LoRA changes nothing: it is zero."

READ_ZERO = "All that could be read of this LoRA's updates is zero."

A_VECTOR = "a trained bias or normalisation layer"
"""How reasons begin for which such a tensor stays behind."""

NOT_COMPARED = "The weights of the two models were not compared: whether it will work is not known."

NEXT_APART = (
    "Next: train the LoRA on {target}, or give both models as whole pipelines, so that a fit can "
    "run them."
)

NEXT_DISTANT = (
    "Next: where both models can run, try `fit()`, which brought far more of a LoRA on test models "
    "that differ so much; where they cannot, try the copy at strength 1 and above."
)

FIT_OF_FEW_STEPS = (
    " Where it is too weak, try `fit()`, which runs both models and brought more of a LoRA on some "
    "test models that draw in few steps, as {target} seems to do."
)

EXTRACT, CONVERT, MERGE = "extract", "convert", "merge"
"""What reports and headers call the making of a LoRA that was not moved."""

LITTLE = 0.4
"""Of a LoRA of which less than this has a place, little is to be expected."""


@dataclass(frozen=True)
class InWords:
    """A verdict in words.

    Attributes:
        mark: ✔ it should work, ⚠ do not expect much, ✖ it does not work.
        headline: the verdict in a sentence.
        lines: what to expect, what was done and why, and what to do next.
        cautions: what was lost, or needs a look.
    """

    mark: Mark
    headline: str
    lines: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()

    def __str__(self) -> str:
        """All of it, a sentence a line."""
        return "\n".join([f"{self.mark} {self.headline}", *self.lines, *self.cautions])


def judge(
    verdict: Verdict | None, placed: float | None, target: str, method: str = AUTO
) -> tuple[Mark, str]:
    """A mark, and what to expect, in a sentence.

    Args:
        verdict: on the two models; None where nobody looked at their weights.
        placed: the share of the LoRA that has a place on the target; None without a LoRA.
        target: its name.
        method: how the LoRA is moved.
    """
    if verdict is not None and not verdict.related:
        return "✖", "Do not expect this to work: the two models have nothing in common."
    expected = None if verdict is None else find_expected(verdict, placed, method)
    if verdict is not None and not verdict.go:
        told = f" ({_show_range(expected)} on small test models)" if expected else ""
        return "⚠", f"Expect little{told}: {target} has learnt something else."
    if placed is not None and placed < LITTLE:
        return "⚠", f"Expect little: most of this LoRA belongs to parts that {target} lacks."
    if verdict is None:
        return "✔", "Done as asked; the two models were not compared."
    if verdict.drift == 0:
        return "✔", "Both models are the same where it counts: the LoRA works as it is."
    if expected is None and verdict.drift > FARTHEST:
        return "⚠", "It may work or not: nobody measured this on models that differ so much."
    if expected is None:
        return "✔", f"This should work: the two models' weights differ by {verdict.drift:.0%}."
    word = next(word for least, word in EXPECTED if expected.share >= least)
    told = (
        f"xpect {word} ({expected.share:.0%}) of the effect of a LoRA that was trained on "
        f"{target}; on small test models it was {_show_range(expected)}."
    )
    if word == MOST:
        return "✔", f"This should work: e{told}"
    return "⚠", f"This may work in part: e{told}" if word == HALF else f"E{told}"


def _show_range(expected: Expectation) -> str:
    """The interval of a share; harm counts as nothing, and more than all as all."""
    low, high = (min(1.0, max(0.0, x)) for x in (expected.low, expected.high))
    return f"{low:.0%} to {high:.0%}"


def find_expected(verdict: Verdict, placed: float | None, method: str) -> Expectation | None:
    """What a method is expected to give in the target's look; None for one nobody measured."""
    name = AUTO if method == "damped" else method
    cut = placed is not None and placed < AMOUNTS[0][0]
    shares = expect_shares(verdict, cut)
    return next((x for x in shares if x.method == name and x.want == "look"), None)


def name_amount(share: float) -> str:
    """A share as people say it: most, about half, a small part."""
    return next((word for least, word in AMOUNTS if share >= least), AMOUNTS[-1][1])


def tell_place(placed: float, kept: float | None, target: str) -> str:
    """How much of a LoRA has a place on the target, and how much of that was kept."""
    text = f"{name_amount(placed)} of the LoRA ({placed:.0%}) has a place on {target}"
    if kept is None:
        return f"{text}."
    rest = "all" if kept >= AMOUNTS[0][0] else f"{kept:.0%}"
    return f"{text}, and {rest} of that was kept."


def tell_parts(placed: int, parts: int, target: str) -> str:
    """How many parts of a LoRA have a place on the target, where nobody knows what each does."""
    share = placed / parts if parts else 0.0
    return (
        f"{placed} of the LoRA's {parts} parts ({share:.0%}) have a place on {target}; how much "
        "those do cannot be known beforehand."
    )


def tell_vectors(over: int, left_out: Mapping[str, str]) -> str:
    """How much goes over of a LoRA that updates no matrix; "" where it has no such tensor.

    Args:
        over: number of its biases and tensors of normalisation layers on the target.
        left_out: tensor that stays behind -> why.
    """
    behind = sum(reason.startswith(A_VECTOR) for reason in left_out.values())
    what = "This LoRA is trained biases and normalisation layers alone"
    return f"{what}; {over} of {over + behind} go over." if over + behind else ""


def tell_method(
    method: str, source: str, target: str, verdict: Verdict | None, strength: float = 1.0
) -> str:
    """What was done, and why, in a sentence."""
    if method == "copy" and strength != 1:
        return f"prolora copied the LoRA at strength {strength:.3g}."
    if method == "damped":
        return (
            f"prolora weakened the LoRA where the two models differ and it would do something else "
            f"than on {source}, so that images keep the look of {target}."
        )
    if method != "copy":
        return f"prolora moved the LoRA by the method {method}, as asked."
    if verdict is not None and verdict.go and verdict.kappa < MIN_DAMPING and verdict.drift > 0:
        if classify(verdict, cut=False) != ALIKE:
            return (
                "prolora copied the LoRA unchanged: the two models' weights give no clear reason "
                "to weaken it."
            )
        return (
            f"prolora copied the LoRA unchanged: {target} looks like a continued training, a merge "
            f"or a few-step version of {source}, which it already fits."
        )
    return "prolora copied the LoRA unchanged."


def tell_plan(method: str) -> str:
    """What a transfer would do."""
    if method == "copy":
        return "A transfer would copy the LoRA unchanged."
    return "A transfer would weaken the LoRA where the two models differ."


def tell_next(
    method: str, verdict: Verdict | None, placed: float, target: str, few_steps: bool = False
) -> str:
    """What to do next.

    Args:
        method: how the LoRA was moved.
        verdict: on the two models; None where nobody looked at their weights.
        placed: the share of the LoRA that has a place on the target.
        target: its name.
        few_steps: whether it seems to draw in few steps, and a fit could run both models.
    """
    if verdict is not None and not verdict.related:
        return NEXT_APART.format(target=target)
    if verdict is not None and not verdict.go:
        return f"Next: compare images with and without it; a LoRA trained on {target} does more."
    if placed < AMOUNTS[0][0]:
        return (
            "Next: try it at strength 1. Where both models can run, `method='best'` fits what has "
            "no place."
        )
    if verdict is not None and verdict.drift > FARTHEST:
        return NEXT_DISTANT
    fit = FIT_OF_FEW_STEPS.format(target=target) if few_steps else ""
    if method == "damped":
        return (
            "Next: try it at strength 1. `look='lora'` keeps the look that the LoRA was made for "
            f"instead.{fit}"
        )
    return f"Next: try it at strength 1, and less where it is too strong.{fit}"


def tell_made(
    method: str,
    source: str,
    target: str,
    kept: float | None,
    cautions: tuple[str, ...],
    parts: Sequence[str] = (),
) -> InWords:
    """The verdict on a LoRA that was extracted, converted or merged.

    Args:
        method: `EXTRACT`, `CONVERT` or `MERGE`.
        source: name of the base that it is for, or of what was converted or merged.
        target: name of the tuned model; of use for an extracted one alone.
        kept: the share of the difference, or of the LoRA's energy, that it holds; None where
            nothing was written.
        cautions: what was lost, or needs a look.
        parts: of a merge, a sentence on each LoRA.
    """
    if kept is None:
        return InWords("✔", "A dry run: nothing was written.", (), cautions)
    original = f"the difference between {source} and {target}" if method == EXTRACT else source
    residual = 100 * max(0.0, 1 - kept) ** 0.5
    lost = f"{residual:.3g}%" if residual >= 1e-3 else "less than 0.001%"
    headline = f"It holds {kept:.2%} of the energy of {original}, and differs from it by {lost}."
    mark: Mark = "✔" if kept >= LITTLE else "⚠"
    lines = (f"Next: load it with {source}, at strength 1.",) if method == EXTRACT else (*parts,)
    return InWords(mark, headline, lines, cautions)


def tell_fit(
    source: str,
    target: str,
    share: float | None,
    is_refused: bool,
    why: str,
    cautions: tuple[str, ...],
) -> InWords:
    """The verdict on a LoRA that was fitted to a running model.

    Args:
        source: name of the model that the LoRA was trained on.
        target: name of the model that it was fitted to.
        share: of the LoRA's effect that it reaches on samples that the fit did not see.
        is_refused: those samples speak against it, and it was written all the same.
        why: why the models were run, where that was not what was asked for; or "".
        cautions: what was lost, or needs a look.
    """
    lines = [f"prolora ran both models and fitted a new LoRA of {target}."]
    if share is not None:
        amount = name_amount(max(0.0, share)).lower()
        lines.insert(
            0,
            f"On samples that the fit did not see it does {amount} ({max(0.0, share):.0%}) of what "
            f"the LoRA does to {source}.",
        )
    lines += [why] if why else []
    if is_refused:
        lines.append("Next: draw some images with it and without it before you use it.")
        return InWords("⚠", "Do not expect much: the fit did not succeed.", (*lines,), cautions)
    lines.append("Next: try it at strength 1, and less where it is too strong.")
    return InWords("✔", f"This should work on {target}.", (*lines,), cautions)
