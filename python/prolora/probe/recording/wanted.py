"""The changes that the target should make: source with its LoRA minus source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core.lowrank import LowRank
from ..updates import apply_updates
from .trajectories import Call
from .translation import Question, Translation

CALLS_AT_ONCE = 16
"""Calls replayed between two changes of the source's weights."""


@dataclass(frozen=True)
class WantedChange:
    """What the target should predict at one call.

    Attributes:
        call: inputs of the target.
        plain: the target's prediction without updates.
        change: source with LoRA minus source, in the target's terms.
        base_difference: target minus source, both without updates.
    """

    call: Call
    plain: Tensor
    change: Tensor
    base_difference: Tensor


@torch.no_grad()
def wanted_changes(
    source: nn.Module,
    target: nn.Module,
    updates: Mapping[str, LowRank],
    questions: Sequence[Question],
    translation: Translation,
) -> Iterator[WantedChange]:
    """What the target should do at each question.

    Args:
        source: the source without its LoRA.
        target: the target.
        updates: of the LoRA, by module of the source.
        questions: where the models are compared.
        translation: turns the source's predictions into the target's terms.
    """
    for start in range(0, len(questions), CALLS_AT_ONCE):
        some = questions[start : start + CALLS_AT_ONCE]
        before = [translation.of_source(source, question) for question in some]
        with apply_updates(source, updates):
            after = [translation.of_source(source, question) for question in some]
        for question, v, w in zip(some, before, after, strict=True):
            plain = translation.of_target(target, question)
            yield WantedChange(question.target, plain, w - v, plain - v)
