"""The verdict for people: what to expect, what was done and why, and what to do next.

Terminal, page, card, notebook and the ComfyUI nodes show these sentences first. They need no word
of the mathematics; the numbers behind them are the report's sentences and tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from ..comparison.expectation import CLASSES, classify
from ..comparison.expectation import Mark as Mark

if TYPE_CHECKING:  # `check` tells what a file is without torch
    from ..core.verdict import Verdict

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

FIT_NO_BETTER = (
    "A fit to the running models was no better on samples that it did not see, so this is the LoRA "
    "moved by the weights alone."
)

ZERO = "This LoRA changes nothing: it is zero."

READ_ZERO = "All that could be read of this LoRA's updates is zero."

A_VECTOR = "a trained bias or normalisation layer"
"""How reasons begin for which such a tensor stays behind."""

NOT_COMPARED = "The weights of the two models were not compared: whether it will work is not known."

EXTRACT, CONVERT, MERGE = "extract", "convert", "merge"
"""What reports and headers call the making of a LoRA that was not moved."""

VERDICT = "prolora.verdict"
"""The entry of a header that tells again what was told when the file was written."""

LITTLE = 0.4
"""A LoRA that keeps less than this share on the target promises little."""


@dataclass(frozen=True)
class InWords:
    """A verdict in words."""

    mark: Mark  # ✔ it should work, ⚠ do not expect much, ✖ it does not work
    headline: str  # the verdict in a sentence
    lines: tuple[str, ...] = ()  # what to expect, what was done and why, and what to do next
    cautions: tuple[str, ...] = ()  # what was lost, or needs a look

    def __str__(self) -> str:
        """All of it, a sentence a line."""
        return "\n".join([f"{self.mark} {self.headline}", *self.lines, *self.cautions])


def read_again(lines: Sequence[str]) -> InWords:
    """Returns the verdict of an earlier run from its lines; see `InWords.__str__`."""
    first, *others = lines
    mark: Mark = next((known for known in get_args(Mark) if first.startswith(known)), "⚠")
    return InWords(mark, f"{first.removeprefix(mark).strip()} (moved before)", (*others,))


def say_first(doubts: Sequence[str], told: InWords) -> InWords:
    """Returns a verdict with doubts of the bases before it."""
    mark: Mark = "⚠" if told.mark == "✔" else told.mark
    return InWords(mark, doubts[0], (told.headline, *doubts[1:], *told.lines), told.cautions)


def judge(
    verdict: Verdict | None,
    placed: float | None,
    bases: tuple[str, str],
    few_steps: bool | None = None,
    promised: bool = True,
) -> InWords:
    """Says what to expect of a LoRA between two models, and which strengths.

    Args:
        verdict: on the two models; None if their weights were not compared.
        placed: the share of the LoRA with a counterpart on the target; None without a LoRA.
        bases: the names of source and target.
        few_steps: whether the target draws in few steps; None where its files do not tell.
        promised: whether the LoRA is copied at strength 1, the measured case.
    """
    source, target = bases
    if verdict is None:
        return InWords("⚠", "Done as asked; the two models were not compared.")
    cut = placed is not None and placed < AMOUNTS[0][0]
    found = CLASSES[classify(verdict, cut, bool(few_steps))]
    mark, headline = found.mark, found.headline.format(source=source, target=target)
    if placed is not None and placed < LITTLE and verdict.related:
        headline = f"Expect little: most of this LoRA belongs to parts that {target} lacks."
    if not promised:
        return InWords(mark, headline)
    advice = found.advice.format(target=target)
    if few_steps is None and found.name in ("alike", "changed"):
        advice += " If it draws in few steps, which a single file does not tell, up to 1.25."
    seen = f"{max(0.0, found.low):.0%} to {found.high:.0%}"
    harm = ", and some images got worse than without it" if found.low < 0 else ""
    told = f"On small test models a copy brought {seen} of what training on the target gives{harm}."
    return InWords(mark, headline, (advice, *([told] if found.low < 1 else [])))


def name_amount(share: float) -> str:
    """Writes a share in words: most, about half, a small part."""
    return next((word for least, word in AMOUNTS if share >= least), AMOUNTS[-1][1])


def tell_place(placed: float, kept: float | None, target: str) -> str:
    """Tells how much of a LoRA fits the target, and how much was kept."""
    text = f"{name_amount(placed)} of the LoRA ({placed:.0%}) has a place on {target}"
    if kept is None:
        return f"{text}."
    rest = "all" if kept >= AMOUNTS[0][0] else f"{kept:.0%}"
    return f"{text}, and {rest} of that was kept."


def tell_parts(placed: int, parts: int, target: str) -> str:
    """Tells how many parts of a LoRA fit the target.

    For LoRAs with parts of unknown size.
    """
    share = placed / parts if parts else 0.0
    return (
        f"{placed} of the LoRA's {parts} parts ({share:.0%}) have a place on {target}; how much "
        "those do cannot be known beforehand."
    )


def tell_vectors(over: int, left_out: Mapping[str, str]) -> str:
    """Tells how much of a LoRA without matrices goes over; "" without vectors.

    `over` is the number of its biases and tensors of normalisation layers on the target; `left_out`
    is tensor that stays behind -> why.
    """
    behind = sum(reason.startswith(A_VECTOR) for reason in left_out.values())
    what = "This LoRA is trained biases and normalisation layers alone"
    return f"{what}; {over} of {over + behind} go over." if over + behind else ""


def tell_method(method: str, strength: float = 1.0) -> str:
    """Says what was done in a sentence; "" of a plain copy."""
    if method == "copy":
        return "" if strength == 1 else f"prolora copied the LoRA at strength {strength:.3g}."
    return (
        f"prolora moved the LoRA by the method {method}, as asked; on nearly all test models a "
        "copy did better."
    )


def tell_made(
    method: str,
    source: str,
    target: str,
    kept: float | None,
    cautions: tuple[str, ...],
    parts: Sequence[str] = (),
) -> InWords:
    """Returns the verdict on a LoRA that was extracted, converted or merged.

    Args:
        method: `EXTRACT`, `CONVERT` or `MERGE`.
        source: name of the base that it is for, or of what was converted or merged.
        target: name of the tuned model, for an extracted LoRA alone.
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
    """Returns the verdict on a LoRA that was fitted to a running model.

    Args:
        source: name of the model that the LoRA was trained on.
        target: name of the model that it was fitted to.
        share: of the LoRA's effect that it reaches on samples that the fit did not see.
        is_refused: these samples speak against it, and it was written all the same.
        why: why the models were run, where that was not asked for; or "".
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
