"""The questions of a probing: recorded while the models sample, or taken back from a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from ..adapters.adapter import Adapter
from . import checkpoint
from .checkpoint import Checkpoints
from .lazy import LazySequence
from .spill import SpilledCalls, SpillStore
from .trajectories import Call, Sample, apply_updates, record_calls
from .translation import Question, Translation


@dataclass(frozen=True)
class Recorder:
    """Runs the samplers of source, source with its LoRA, and target.

    Attributes:
        source: the source model.
        target: the target model.
        adapter: the LoRA of the source.
        samplers: of source, source with LoRA, target.
        between: turns each recorded call into a question to both.
        keep: where recorded calls are kept.
        told: what the samplers do, as a text: part of the keys of what is kept.
    """

    source: nn.Module
    target: nn.Module
    adapter: Adapter
    samplers: tuple[Sample, Sample, Sample]
    between: Translation
    keep: Checkpoints = field(default_factory=lambda: Checkpoints(None))
    told: str = ""

    @cached_property
    def keys(self) -> dict[str, str]:
        """Origin -> what its trajectories depend on, besides the seed."""
        if self.keep.folder is None:
            return dict.fromkeys(("source", "adapted", "target"), "")
        source, target = checkpoint.hash_model(self.source), checkpoint.hash_model(self.target)
        lora = checkpoint.hash_updates(self.adapter.updates)
        print_ = checkpoint.hash_texts
        return {
            "source": print_(source, self.told),
            "adapted": print_(source, self.told, lora),
            "target": print_(target, self.told),
        }

    @property
    def key(self) -> str:
        """What all of them together depend on."""
        return checkpoint.hash_texts(*self.keys.values())

    def questions(self, seed: int) -> list[Question]:
        """All the questions of source, LoRA and target, whose seeds are `seed` and the next two."""
        calls = self._calls("source", self.source, self.samplers[0], seed)
        calls += self._calls("adapted", self.source, self.samplers[1], seed + 1)
        calls += self._calls("target", self.target, self.samplers[2], seed + 2)
        return [self.between.question(call) for call in calls]

    def _calls(self, origin: str, model: nn.Module, sample: Sample, seed: int) -> list[Call]:
        def made() -> list[Call]:
            if origin != "adapted":
                return record_calls(model, sample, seed, origin)
            with apply_updates(model, self.adapter.updates):
                return record_calls(model, sample, seed, origin)

        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        key = checkpoint.hash_texts(self.keys[origin], str(seed))
        return self.keep.calls(f"calls-{origin}-{seed}", key, device, made)


def spill_questions(questions: Sequence[Question], limit: int | None) -> Sequence[Question]:
    """The questions with what is above the limit (bytes) in temporary files; None: no limit."""
    if limit is None:
        return questions
    shelf = SpillStore(limit)
    sides = SpilledCalls(shelf, "source"), SpilledCalls(shelf, "target")
    for question in questions:
        sides[0].append(question.source)
        sides[1].append(question.target)
    return _SpilledQuestions(*sides)


class _SpilledQuestions(LazySequence[Question]):
    """Pairs of calls that lie on a shelf."""

    def __init__(self, source: Sequence[Call], target: Sequence[Call]) -> None:
        self.source, self.target = source, target

    def __len__(self) -> int:
        return len(self.source)

    def item(self, i: int) -> Question:
        return Question(self.source[i], self.target[i])


class TargetCalls(LazySequence[Call]):
    """The calls of the target, out of questions that may lie in files."""

    def __init__(self, questions: Sequence[Question]) -> None:
        """Of some questions."""
        self.questions = questions

    def __len__(self) -> int:
        """How many."""
        return len(self.questions)

    def item(self, i: int) -> Call:
        """Call i."""
        return self.questions[i].target
