"""The changes wanted of the target, and remembered answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core.lowrank import LowRank
from ..checkpoint import Checkpoints, hash_tensors, hash_texts
from ..updates import run_beside
from .trajectories import Call, encode_calls, predict_call
from .translation import PAIR, Question, Translation

OF_LORA = ("adapted", PAIR)
"""Origins of questions that another LoRA does not ask: they are about its own images."""


class KnownAnswers:
    """A translation that remembers answers in a folder of kept results."""

    def __init__(self, translation: Translation, checkpoints: Checkpoints, key: str) -> None:
        """Takes `key`, hash of how models are sampled and asked."""
        self.translation, self.checkpoints, self.key = translation, checkpoints, key
        kept = checkpoints.recall("answers", key)
        self.answers: dict[str, Tensor] = {} if kept is None else kept[0]
        self._fresh = False

    def of_source(self, model: nn.Module, question: Question) -> Tensor:
        """Remembers `Translation.of_source` without the LoRA."""
        asked = question.source, question.target  # its meaning to the target depends on both
        return self._ask(asked, lambda: self.translation.of_source(model, question))

    def of_target(self, model: nn.Module, question: Question) -> Tensor:
        """Remembers `Translation.of_target`."""
        return self._ask((question.target,), lambda: self.translation.of_target(model, question))

    def _ask(self, asked: tuple[Call, ...], predict: Callable[[], Tensor]) -> Tensor:
        """Returns the answer to a question, the known one for the very same."""
        if self.checkpoints.folder is None or asked[0].origin in OF_LORA:
            return predict()
        encoded = [encode_calls([call]) for call in asked]
        name = "-".join(
            hash_texts(text, hash_tensors({str(i): t for i, t in enumerate(tensors)}))[:32]
            for tensors, text in encoded
        )
        if name in self.answers:
            device = next(t.device for t in encoded[-1][0] if t.is_floating_point())
            return self.answers[name].to(device)
        answer = predict()
        self.answers[name] = answer.detach().cpu()
        self._fresh = True
        return answer

    def store(self) -> None:
        """Keeps what was learnt since."""
        if self._fresh:
            self.checkpoints.store("answers", self.key, self.answers)
            self._fresh = False


@dataclass(frozen=True)
class WantedChange:
    """What the target should predict at one call."""

    call: Call  # inputs of the target
    plain: Tensor  # the target's prediction without updates
    # Source with LoRA minus source, in the target's terms; for a PAIR, what the target misses of
    # the image with the LoRA beyond what it misses of the other.
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
    answers: KnownAnswers | None = None,
) -> Iterator[WantedChange]:
    """Yields what the target should do at each question.

    `updates` are the LoRA's, by module of the source; `answers` remember what does not depend on
    them.
    """
    plainly = answers or translation
    for question in questions:
        if question.origin == PAIR:
            yield _change_of_pair(target, question, translation)
            continue
        before = plainly.of_source(source, question)
        with run_beside(source, updates):
            after = translation.of_source(source, question, adapted=True)
        plain = plainly.of_target(target, question)
        yield WantedChange(question.target, plain, after - before, plain - before)


def _change_of_pair(
    target: nn.Module, question: Question, translation: Translation
) -> WantedChange:
    """Returns what the target misses of an image with the LoRA alone.

    With r = wanted − predicted for either image, at one noise, the change is r' − s·r, where s is
    the slope of r' on r, sample by sample and within 0 … 1. So neither the style of the source nor
    noise that both images share is learnt.
    """
    plain = translation.of_target(target, question)
    before = predict_call(target, question.source, translation.read)
    missing = translation.of_clean(question.target) - plain
    missing_before = translation.of_clean(question.source) - before
    rows = [part.flatten(1) for part in (missing, missing_before)]
    slope = (rows[0] * rows[1]).sum(1) / rows[1].square().sum(1).clamp_min(1e-30)
    slope = slope.clamp(0, 1).reshape(-1, *[1] * (missing.dim() - 1))
    return WantedChange(question.target, plain, missing - slope * missing_before, -missing_before)
