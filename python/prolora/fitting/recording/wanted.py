"""The changes that are wanted of the target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core.lowrank import LowRank
from ..updates import run_beside
from .trajectories import Call, predict_call
from .translation import PAIR, Question, Translation


@dataclass(frozen=True)
class WantedChange:
    """What the target should predict at one call."""

    call: Call  # inputs of the target
    plain: Tensor  # the target's prediction without updates
    # Source with LoRA minus source, in the target's terms, and the share of source minus target
    # that the look asks for; for a PAIR, what the target misses of the image with the LoRA beyond
    # what it misses of the other.
    change: Tensor
    # Target minus source, both without updates; for a PAIR, target minus image
    base_difference: Tensor


@torch.no_grad()
def wanted_changes(
    source: nn.Module,
    target: nn.Module,
    updates: Mapping[str, LowRank],
    questions: Sequence[Question],
    translation: Translation,
    look: float = 0.0,
) -> Iterator[WantedChange]:
    """Yields what the target should do at each question.

    With predictions v, and v' with the LoRA, the change is (v_s' − v_s) + look·(v_s − v_t): at look
    0 the target keeps its own look, at 1 it predicts what the source with the LoRA does. `updates`
    are the LoRA's, by module of the source.
    """
    for question in questions:
        if question.origin == PAIR:
            yield _change_of_pair(target, question, translation, look)
            continue
        before = translation.of_source(source, question)
        with run_beside(source, updates):
            after = translation.of_source(source, question, adapted=True)
        plain = translation.of_target(target, question)
        change = after - before + look * (before - plain)
        yield WantedChange(question.target, plain, change, plain - before)


def _change_of_pair(
    target: nn.Module, question: Question, translation: Translation, look: float
) -> WantedChange:
    """Returns what the target misses of an image with the LoRA alone.

    With r = wanted − predicted for either image, at one noise, the change is r' − s·r, where s is
    the slope of r' on r, sample by sample and within 0 … 1, times 1 − look. So at look 0 neither
    the style of the source nor noise that both images share is learnt.
    """
    plain = translation.of_target(target, question)
    before = predict_call(target, question.source, translation.read)
    missing = translation.of_clean(question.target) - plain
    missing_before = translation.of_clean(question.source) - before
    rows = [part.flatten(1) for part in (missing, missing_before)]
    slope = (rows[0] * rows[1]).sum(1) / rows[1].square().sum(1).clamp_min(1e-30)
    slope = (1 - look) * slope.clamp(0, 1).reshape(-1, *[1] * (missing.dim() - 1))
    return WantedChange(question.target, plain, missing - slope * missing_before, -missing_before)
