"""Tensors that are needed later, in the machine's memory until then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from .trajectories import decode_calls, encode_calls
from .translation import Question

T = TypeVar("T")


class LazySequence(Sequence[T]):
    """A sequence whose items are made on access."""

    def __init__(self, count: int, item: Callable[[int], T]) -> None:
        """Takes the length, and a function of 0 ≤ i < count."""
        self._count, self._item = count, item

    def __len__(self) -> int:
        """Returns the number of items."""
        return self._count

    def __getitem__(self, i: Any) -> Any:
        """Makes item i; a negative one counts from the end."""
        return self._item(range(self._count)[i])


def lay_aside(
    row: Sequence[Tensor], copies: dict[int, Tensor] | None = None
) -> Callable[[], tuple[Tensor, ...]]:
    """Moves tensors of one device to the machine's memory; what is returned brings them back.

    `copies` holds the tensors of earlier rows by the identity of the originals, which must live on.
    """
    copies = {} if copies is None else copies
    for tensor in row:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().cpu()
    device, resting = row[0].device, [copies[id(tensor)] for tensor in row]
    return lambda: tuple(tensor.to(device) for tensor in resting)


def lay_questions_aside(questions: Sequence[Question]) -> Sequence[Question]:
    """Moves a card's questions to the machine's memory; others are there already."""
    first = encode_calls([questions[0].source])[0] if questions else []
    if all(tensor.device.type == "cpu" for tensor in first):
        return questions
    copies: dict[int, Tensor] = {}  # text embeddings are the same in all steps of an image
    encoded = [encode_calls([question.source, question.target]) for question in questions]
    resting = [(lay_aside(tensors, copies), text) for tensors, text in encoded]
    return LazySequence(
        len(resting), lambda i: Question(*decode_calls(resting[i][0](), resting[i][1]))
    )
