"""Relation of two base models, estimated from their weights alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .affinity import Affinity

STRANGE_COSINE = 0.3
"""Weights below this cosine are treated as mismatched; related weights have 0.8 or more."""

DEFAULT_THRESHOLD = 0.8
"""Minimal Φ of a pair of weights (the paper's value; that both sides must reach it is ours)."""

AUTO = "auto"
"""The method that copies an update, or raises UnrelatedBases if the two models are not related."""

MIN_COSINE = 0.7
"""Models below this cosine are not related: a copied update has no effect there."""


@dataclass(frozen=True)
class PairVerdict:
    """Distance of two models, and the size of a LoRA relative to it.

    Attributes:
        drift: ‖W_t − W_s‖/‖W_s‖ over the modules that `judge_pairs` selects.
        cosine: ⟨W_s, W_t⟩/(‖W_s‖‖W_t‖) over the same modules.
        size: ‖ΔW_s‖/‖W_s‖ of the LoRA over the compared modules; None without a LoRA.
    """

    drift: float
    cosine: float
    size: float | None = None

    @property
    def related(self) -> bool:
        """Whether one model was trained from the other, or both from a third."""
        return self.cosine >= MIN_COSINE

    def sentence(self) -> str:
        """Describes the relation of the two models in one sentence."""
        if not self.related:
            return (
                "The two models have nothing in common: their weights have a cosine of "
                f"{self.cosine:.2f}, and related models have {MIN_COSINE:g} or more."
            )
        share = f"{self.drift:.1%}" if self.drift >= 0.001 else "less than 0.1%"
        return f"The two models are related: their weights differ by {share}."


def judge_pairs(affinities: Iterable[Affinity]) -> PairVerdict:
    """Computes the verdict on two models from the affinities of all pairs of weights.

    Pairs with a cosine below STRANGE_COSINE are treated as mismatched and excluded, unless the
    other pairs contain less than half of the source's energy. If more than half of all pairs are
    mismatched, only those are used: one large unchanged weight (for example an embedding) must not
    make two models look related.
    """
    affinities = list(affinities)
    total = Affinity.total(affinities)
    nonzero = [x for x in affinities if x.source > 0 or x.target > 0]
    mismatched = [x for x in nonzero if x.cosine < STRANGE_COSINE]
    if 2 * len(mismatched) > len(nonzero):
        rest = total = Affinity.total(mismatched)
    else:
        rest = Affinity.total(x for x in affinities if x.cosine >= STRANGE_COSINE)
    judged = rest if 2 * rest.source >= total.source > 0 else total
    return PairVerdict(judged.drift, judged.cosine)


STRANGER = f"its weight and its partner's have nothing in common (cosine below {STRANGE_COSINE})"
"""The reason in reports for a module that `auto` skips."""


def describe_strangers(pairs: Sequence[tuple[str, str]]) -> str:
    """Returns a warning about pairs (source, target) whose weights are not related."""
    source, target = pairs[0]
    return (
        f"Careful: the bases are related, but {len(pairs)} pairs have nothing in common (cosine "
        f"below {STRANGE_COSINE}), the first {source} → {target}. Equal names need not "
        f"be equal modules: method '{AUTO}' leaves such pairs out, and match 'similarity' finds "
        "renumbered blocks."
    )
