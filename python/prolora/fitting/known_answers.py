"""Both models' answers without a LoRA, kept for the next LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields

from torch import Tensor, nn

from .checkpoint import Checkpoints, hash_tensors, hash_texts
from .recording.call_codec import encode_calls
from .recording.trajectories import Call
from .recording.translation import PAIR, Question, Translation

OF_LORA = ("adapted", PAIR)
"""Origins of questions that another LoRA does not ask: they are about its own images."""


class KnownAnswers:
    """Predictions of both models by question, in a folder of kept results."""

    def __init__(self, checkpoints: Checkpoints, key: str, limit: int | None) -> None:
        """Takes the folder.

        Args:
            checkpoints: where answers are kept; without a folder nothing is.
            key: hash of how the models are sampled and asked.
            limit: bytes that may be kept; None is no bound.
        """
        self.checkpoints, self.key, self.limit = checkpoints, key, limit
        kept = checkpoints.recall("answers", key)
        self.answers: dict[str, Tensor] = {} if kept is None else kept[0]
        self._size = sum(tensor.nbytes for tensor in self.answers.values())
        self._fresh = False

    def ask(self, asked: tuple[Call, ...], predict: Callable[[], Tensor]) -> Tensor:
        """Returns the answer to a question, the known one for the very same."""
        name = "-".join(_hash_call(call) for call in asked)
        if name in self.answers:
            device = next(t.device for t in encode_calls(asked[-1:])[0] if t.is_floating_point())
            return self.answers[name].to(device)
        answer = predict()
        if self.limit is None or self._size + answer.nbytes <= self.limit:
            self.answers[name] = answer.detach().cpu()
            self._size += answer.nbytes
            self._fresh = True
        return answer

    def store(self) -> None:
        """Keeps what was learnt since."""
        if self._fresh:
            self.checkpoints.store("answers", self.key, self.answers)
            self._fresh = False


def _hash_call(call: Call) -> str:
    tensors, text = encode_calls([call])
    named = {str(i): tensor for i, tensor in enumerate(tensors)}
    return hash_texts(text, hash_tensors(named))[:32]


@dataclass(frozen=True)
class RememberingTranslation(Translation):
    """A translation that asks models without a LoRA only new questions."""

    inner: Translation = field(kw_only=True)
    answers: KnownAnswers = field(kw_only=True)

    @classmethod
    def of(cls, inner: Translation, answers: KnownAnswers) -> Translation:
        """Adds a memory to a translation, unless nothing is kept."""
        if answers.checkpoints.folder is None:
            return inner
        known = {part.name: getattr(inner, part.name) for part in fields(Translation)}
        return cls(**known, inner=inner, answers=answers)

    def of_source(self, model: nn.Module, question: Question, adapted: bool = False) -> Tensor:
        """Remembers `Translation.of_source`."""
        if adapted or question.origin in OF_LORA:
            return self.inner.of_source(model, question, adapted)
        asked = question.source, question.target  # its meaning to the target depends on both
        return self.answers.ask(asked, lambda: self.inner.of_source(model, question))

    def of_target(self, model: nn.Module, question: Question) -> Tensor:
        """Remembers `Translation.of_target`."""
        if question.origin in OF_LORA:
            return self.inner.of_target(model, question)
        return self.answers.ask((question.target,), lambda: self.inner.of_target(model, question))

    @property
    def same_noise(self) -> bool:
        """See `Translation.same_noise`."""
        return self.inner.same_noise

    def of_clean(self, call: Call) -> Tensor:
        """Passes on to the inner `Translation.of_clean`."""
        return self.inner.of_clean(call)
