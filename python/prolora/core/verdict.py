"""The relation of two bases by their weights, before any image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .affinity import Affinity

STRANGE_COSINE = 0.3
"""Below this cosine a pair of weights has nothing in common; relatives have 0.8 and more."""

DEFAULT_THRESHOLD = 0.8
"""The Φ that both sides of a pair must reach (the paper's threshold; both sides is our choice)."""

AUTO = "auto"
"""The method that copies an update, or refuses where two models have nothing in common."""

MIN_COSINE = 0.7
"""Below this cosine the bases share no coordinates, and no update keeps its meaning."""


@dataclass(frozen=True)
class PairVerdict:
    """What to expect of a LoRA of the source on the target.

    Attributes:
        drift: ‖W_t − W_s‖/‖W_s‖ over the modules that matter.
        cosine: ⟨W_s, W_t⟩/(‖W_s‖‖W_t‖) over them.
        size: ‖ΔW_s‖/‖W_s‖ of the LoRA over the modules that were compared; None where no LoRA is
            asked about.
    """

    drift: float
    cosine: float
    size: float | None = None

    @property
    def related(self) -> bool:
        """Whether one base comes from the other, or both from a third."""
        return self.cosine >= MIN_COSINE

    def sentence(self) -> str:
        """Describes in plain words how far the two models are apart."""
        facts = f"cosine of their weights {self.cosine:.2f}"
        if not self.related:
            return (
                f"The two models have nothing in common ({facts}; relatives have {MIN_COSINE:g} "
                "and more): they were trained apart."
            )
        return f"The two models are relatives ({facts}) and differ by {self.drift:.1%}."


def judge_pairs(affinities: Iterable[Affinity]) -> PairVerdict:
    """Judges a pair of bases by the affinities of all pairs of weights.

    Strangers among them say nothing of the others, and `auto` leaves them out: they do not count,
    unless they hold more than half of the source's energy. Where they are more than half of all
    pairs they alone count: one heavy weight that training left alone does not make relatives.
    """
    affinities = list(affinities)
    total = Affinity.total(affinities)
    telling = [x for x in affinities if x.source > 0 or x.target > 0]
    strangers = [x for x in telling if x.cosine < STRANGE_COSINE]
    if 2 * len(strangers) > len(telling):
        rest = total = Affinity.total(strangers)
    else:
        rest = Affinity.total(x for x in affinities if x.cosine >= STRANGE_COSINE)
    judged = rest if 2 * rest.source >= total.source > 0 else total
    return PairVerdict(judged.drift, judged.cosine)


STRANGER = f"its weight and its partner's have nothing in common (cosine below {STRANGE_COSINE})"
"""Why `auto` leaves a module out."""


def describe_strangers(pairs: Sequence[tuple[str, str]]) -> str:
    """Warns of pairs (source, target) whose weights have nothing in common."""
    source, target = pairs[0]
    return (
        f"Careful: the bases are related, but {len(pairs)} pairs have nothing in common (cosine "
        f"below {STRANGE_COSINE}), the first {source} → {target}. Equal names need not "
        f"be equal modules: method '{AUTO}' leaves such pairs out, and match 'similarity' finds "
        "renumbered blocks."
    )
