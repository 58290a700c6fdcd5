"""Both models' answers without a LoRA, kept for the next LoRA."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .checkpoint import Checkpoints, hash_tensors, hash_texts
from .recording.trajectories import Call, encode_calls
from .recording.translation import PAIR, Question, Translation

OF_LORA = ("adapted", PAIR)
"""Origins of questions that another LoRA does not ask: they are about its own images."""


class KnownAnswers:
    """A translation that remembers answers in a folder of kept results."""

    def __init__(
        self, translation: Translation, checkpoints: Checkpoints, key: str, limit: int | None
    ) -> None:
        """Takes `key`, hash of how models are sampled and asked, and `limit` in bytes."""
        self.translation, self.checkpoints = translation, checkpoints
        self.key, self.limit = key, limit
        kept = checkpoints.recall("answers", key)
        self.answers: dict[str, Tensor] = {} if kept is None else kept[0]
        self._size = sum(tensor.nbytes for tensor in self.answers.values())
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
