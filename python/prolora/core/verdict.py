"""Go or no-go, and how: what the weights of two bases promise before any image is made.

The constants have the digits that two worlds of the study in bench/quality bear, each judged by the
other (bench/quality/left_out.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from .affinity import Affinity
from .methods import Needs, find_method

STRANGE_COSINE = 0.3
"""Below this cosine a pair of weights has nothing in common; relatives have 0.8 and more."""

DEFAULT_THRESHOLD = 0.8
"""The Φ that both sides of a pair must reach (the paper's threshold; both sides is our choice)."""

LookMode = Literal["target", "lora"]
"""What a moved LoRA is for: its idea in the target's look, or the images it was made for."""

AUTO = "auto"
"""The method and the strength that follow from the verdict."""

MIN_COSINE = 0.7
"""Below this cosine the bases share no coordinates, and no update keeps its meaning."""

NOISE_SPREAD = 0.4
"""From this spread on a drift looks like what longer training leaves behind."""

DAMPING = 40.0
"""κ of the method `damped`, per drift, where all of it is along few directions."""

FARTHEST = 0.5
"""Related bases that differ by more are distant: a copy gives about half there, and less."""

MAX_DAMPING = 5.0
"""Bases that ask for a larger κ are so far apart that little is to be expected."""

HALF_DAMPING = 5.0
"""The κ that weakens an update as much as half the strength of a plain copy."""

MIN_DAMPING = 1.0
"""With a smaller κ damping gains nothing, and costs up to 0.1 on students of a distillation."""


@dataclass(frozen=True)
class Decision:
    """How to move a LoRA, settled.

    Attributes:
        method: a name of `project`'s, or "damped".
        strength: factor on every update.
        damping: κ of "damped".
    """

    method: str
    strength: float
    damping: float


@dataclass(frozen=True)
class Verdict:
    """What to expect of a LoRA of the source on the target.

    Attributes:
        drift: ‖W_t − W_s‖/‖W_s‖ over the modules that matter.
        cosine: ⟨W_s, W_t⟩/(‖W_s‖‖W_t‖) over them.
        spread: over how many directions the drift is spread, see `Affinity.spread`.
        size: ‖ΔW_s‖/‖W_s‖ of the LoRA over the modules that were compared; None where no LoRA is
            asked about.
    """

    drift: float
    cosine: float
    spread: float
    size: float | None = None

    @property
    def go(self) -> bool:
        """Whether moving a LoRA between these bases is worth while."""
        return self.related and self.kappa <= MAX_DAMPING

    @property
    def related(self) -> bool:
        """Whether one base comes from the other, or both from a third."""
        return self.cosine >= MIN_COSINE

    @property
    def strength(self) -> float:
        """The factor that suits an unchanged copy best: 1 / (1 + κ/5), and 1 where κ is below 1."""
        return 1 / (1 + self.kappa / HALF_DAMPING) if self.kappa >= MIN_DAMPING else 1.0

    @property
    def kappa(self) -> float:
        """The κ of `damped` that suits these bases; 0 is the copy.

        40 · drift · (1 − spread/0.4), and 0 beyond that spread, or for a source without weights.
        """
        if not math.isfinite(self.drift):
            return 0.0
        return DAMPING * self.drift * max(0.0, 1 - self.spread / NOISE_SPREAD)

    def decide(
        self,
        method: str = AUTO,
        strength: float | str | None = None,
        damping: float | None = None,
        look: LookMode = "target",
    ) -> Decision:
        """Settles what is left to the verdict.

        Args:
            method: AUTO, or the one that was asked for.
            strength: AUTO, a number, or None: AUTO for method AUTO and 1 for any other.
            damping: κ; None lets the drift decide.
            look: what AUTO aims at. For the LoRA's own images it never weakens an update.
        """
        weakened = look == "target"
        if method == AUTO:
            method = "damped" if weakened and self.kappa >= MIN_DAMPING else "copy"
        if strength == AUTO and weakened and find_method(method).needs is not Needs.WEIGHTS:
            strength = self.strength
        elif strength is None or strength == AUTO:
            strength = 1.0
        if damping is None:
            damping = 0.0 if method == "copy" else self.kappa
        return Decision(method, float(strength), damping)

    def explain(self, method: str) -> str:
        """Why AUTO chose a method here."""
        weakens = self.kappa >= MIN_DAMPING
        return LOOK_REASON if method == "copy" and weakens else METHOD_REASONS[method]

    def sentence(self) -> str:
        """The verdict in plain words, with the numbers behind it."""
        facts = f"drift {self.drift:.2g}, cosine {self.cosine:.2f}, spread {self.spread:.2f}"
        if self.size and math.isfinite(self.drift):
            facts += f"; the drift is {self.drift / self.size:.2g} of the size of this LoRA"
        if not self.related:
            return (
                f"No-go: the weights of these bases have nothing in common ({facts}); they were "
                "trained apart, and a LoRA of one does nothing useful on the other."
            )
        if not self.go:
            return (
                f"No-go: the target has learnt something else ({facts}); on bases as far apart "
                "as these, moved LoRAs did little or harm."
            )
        if self.drift > FARTHEST:
            return (
                f"Go, with care: one of these models comes from the other, or both from a third, "
                f"but they are far apart by now ({facts})."
            )
        return f"Go: the two models are closely related ({facts})."


def judge_affinity(affinity: Affinity) -> Verdict:
    """The verdict on a pair of bases, from `Affinity.total` over the modules that matter."""
    return Verdict(affinity.drift, affinity.cosine, affinity.spread)


def judge_pairs(affinities: Iterable[Affinity]) -> Verdict:
    """The verdict on a pair of bases, from the affinities of all pairs of weights.

    Strangers among them say nothing of the others, and `auto` leaves them out: they do not count,
    unless they hold more than half of the source's energy. Where they are more than half of all
    pairs they alone count: one heavy weight that training left alone does not make relatives.
    """
    affinities = list(affinities)
    total = Affinity.total(affinities)
    telling = [x for x in affinities if x.source > 0 or x.target > 0]
    strangers = [x for x in telling if x.cosine < STRANGE_COSINE]
    if 2 * len(strangers) > len(telling):
        return judge_affinity(Affinity.total(strangers))
    rest = Affinity.total(x for x in affinities if x.cosine >= STRANGE_COSINE)
    return judge_affinity(rest if 2 * rest.source >= total.source > 0 else total)


METHOD_REASONS = {
    "copy": "the weights of the two models give no clear reason to weaken the LoRA",
    "damped": (
        "the target was fine-tuned, so the LoRA is weakened where the two models differ, and "
        "images keep the target's look; `look='lora'` copies it, and keeps the look that it was "
        "made for"
    ),
}
"""Why `auto` chose a method."""


LOOK_REASON = (
    "look 'lora' aims at the images that the LoRA was made for, which a copy draws best; look "
    "'target' would weaken it"
)
"""Why `auto` copies where it would otherwise weaken."""


STRANGER = f"its weight and its partner's have nothing in common (cosine below {STRANGE_COSINE})"
"""Why `auto` leaves a module out."""


def describe_strangers(pairs: Sequence[tuple[str, str]]) -> str:
    """The warning about pairs (source, target) whose weights have nothing in common."""
    source, target = pairs[0]
    return (
        f"Careful: the bases are related, but {len(pairs)} pairs have nothing in common (cosine "
        f"below {STRANGE_COSINE}), the first {source} → {target}. Equal names need not "
        f"be equal modules: method '{AUTO}' leaves such pairs out, and match 'similarity' finds "
        "renumbered blocks."
    )
