"""Recorded calls cut into samples, and batches of many moments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .trajectories import Call, samples_of
from .translation import Question

PredictBoth = Callable[[Question], tuple[Tensor, Tensor]]
"""The predictions of source and target at a question."""

FindPrompts = Callable[[Call], list[bool]]
"""Which samples of a call have a prompt."""

WITHOUT_PROMPT = 0.1
"""Share of the samples that have none. Guided samplers ask as often without as with one, and what a
LoRA changes lies where there is one (docs/results.md)."""
_TOLERANCE = 1e-3  # share of the prediction's norm; sums in larger batches have another order


class _CannotShareBatch(Exception):
    """The samples of these calls cannot share a batch."""


def mix_samples(
    questions: Sequence[Question],  # recorded on one or more trajectories
    limit: int,  # number of samples; all are taken where there are fewer
    most: int,  # largest number of samples in a batch
    predict: PredictBoth,  # both models' predictions at a question
    generator: torch.Generator,  # of the draw
    find_prompts: FindPrompts | None = None,
    step: int = 0,
    size: int | None = None,
) -> list[Question]:
    """Draws at most `limit` samples of the questions, in batches.

    A sampler's call holds one moment of a few images, which is too little variety for one step of a
    fit. So samples are cut out of their calls, and each batch is joined from several calls. A trial
    decides whether a model's inputs can be cut and joined: both models must predict for a joined
    batch what they predict for the calls. Where they do not (one time for all samples of a call),
    complete calls are drawn instead.

    Of the samples without a prompt at most WITHOUT_PROMPT are drawn. In each `step` of the fit the
    samples about the LoRA's own images have batches to themselves, so that what is asked about the
    others serves the next LoRA; 0 joins all alike. What is joined from several origins has the
    origin "mixed".
    """
    facts = [(count_samples(question.source), question.origin) for question in questions]
    sizes = [size for size, _ in facts]
    own = {i for i, (_, origin) in enumerate(facts) if step and origin == "adapted"}
    size = min(size or max(sizes), most)
    rows = [(i, row) for i, n in enumerate(sizes) for row in range(n)]
    rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
    if find_prompts is not None:
        prompted = [find_prompts(question.source) for question in questions]
        free = [(i, row) for i, row in rows if not prompted[i][row]]
        late = set(free[int(WITHOUT_PROMPT * limit) :])
        rows = [row for row in rows if row not in late] + [row for row in rows if row in late]
    chosen = rows[:limit]
    try:
        if size > 1 or len(questions) > 1:
            _check_joined_batch(questions, chosen[: min(size, 4)], predict)
        return [
            _join_samples(questions, batch, sizes)
            for batch in _form_batches(chosen, size, step, own)
        ]
    except _CannotShareBatch:
        return _draw_calls(questions, limit, generator)


_Rows = list[tuple[int, int]]
"""Numbers of questions, and rows in them."""


def _form_batches(chosen: _Rows, size: int, step: int, own: set[int]) -> Iterator[_Rows]:
    """Yields the rows of every batch of `size`.

    `own` are the numbers of the questions that have batches to themselves; `step` as in
    `mix_samples`.
    """
    for run in _cut_evenly(chosen, step or max(len(chosen), 1)):
        kinds = [[row for row in run if (row[0] in own) == mine] for mine in (False, True)]
        parts = [_cut_evenly(rows, size) for rows in kinds]
        # Batches of both kinds follow each other evenly.
        placed = [((i + 0.5) / len(part), batch) for part in parts for i, batch in enumerate(part)]
        yield from (batch for _, batch in sorted(placed, key=lambda item: item[0]))


def _cut_evenly(rows: _Rows, size: int) -> list[_Rows]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _draw_calls(
    questions: Sequence[Question], limit: int, generator: torch.Generator
) -> list[Question]:
    """Draws complete calls until they hold at least `limit` samples."""
    drawn, count = [], 0
    for i in torch.randperm(len(questions), generator=generator).tolist():
        if count < limit:
            drawn.append(questions[i])
            count += count_samples(questions[i].source)
    return drawn


def count_samples(call: Call) -> int:
    """Counts the samples in a call."""
    return len(samples_of(call))


def _check_joined_batch(questions: Sequence[Question], chosen: _Rows, predict: PredictBoth) -> None:
    """Raises _CannotShareBatch unless a joined batch and its calls have the same predictions."""
    sizes = [count_samples(question.source) for question in questions]
    try:
        joined = predict(_join_samples(questions, chosen, sizes))
    except (RuntimeError, ValueError, IndexError) as error:
        # A tensor that all samples share may happen to have as many rows as there are samples.
        raise _CannotShareBatch from error
    for position, (i, row) in enumerate(chosen):
        for new, old in zip(joined, predict(questions[i]), strict=True):
            if len(old) != sizes[i] or len(new) != len(chosen):
                raise _CannotShareBatch
            if not (new[position] - old[row]).norm() <= _TOLERANCE * old[row].norm():
                raise _CannotShareBatch  # also where one of them is not finite


def _join_samples(questions: Sequence[Question], chosen: _Rows, sizes: Sequence[int]) -> Question:
    """Joins samples of several questions of these sizes to one."""
    picked = [questions[i] for i, _ in chosen]
    rows = [(row, sizes[i]) for i, row in chosen]
    origins = {question.origin for question in picked}
    origin = origins.pop() if len(origins) == 1 else "mixed"

    def one(calls: list[Call]) -> Call:
        both = list(zip(calls, rows, strict=True))
        args = _join_values([call.args for call in calls], rows)
        kwargs = _join_values([call.kwargs for call in calls], rows)
        numbers = tuple(n for call, (row, _) in both for n in call.trajectories[row : row + 1])
        parts = [call.clean[row : row + 1] for call, (row, _) in both if call.clean is not None]
        return Call(args, kwargs, origin, numbers, torch.cat(parts) if parts else None)

    return Question(one([q.source for q in picked]), one([q.target for q in picked]))


def _join_values(values: list[Any], rows: list[tuple[int, int]]) -> Any:
    """Joins a row of whatever has one for each sample; anything else must be the same in all.

    `rows` are pairs of a row and the number of samples, for each value.
    """
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise _CannotShareBatch
    cut = {_has_rows(value, size) for value, (_, size) in zip(values, rows, strict=True)}
    if len(cut) > 1:
        raise _CannotShareBatch
    if cut == {True}:
        if isinstance(first, list):
            return [value[row] for value, (row, _) in zip(values, rows, strict=True)]
        parts = [value[row : row + 1] for value, (row, _) in zip(values, rows, strict=True)]
        if len({part.shape for part in parts}) > 1:
            raise _CannotShareBatch
        return torch.cat(parts)
    if isinstance(first, dict):
        if any(value.keys() != first.keys() for value in values):
            raise _CannotShareBatch
        return {key: _join_values([value[key] for value in values], rows) for key in first}
    if isinstance(first, list | tuple):
        if any(len(value) != len(first) for value in values):
            raise _CannotShareBatch
        items = zip(*values, strict=True)
        return type(first)(_join_values(list(several), rows) for several in items)
    if isinstance(first, Tensor):
        if any(value.shape != first.shape or not torch.equal(value, first) for value in values):
            raise _CannotShareBatch
    elif any(value is not first and value != first for value in values):
        raise _CannotShareBatch
    return first


def _has_rows(value: Any, size: int) -> bool:
    """Returns True for a tensor or list of tensors with a row for each sample."""
    if isinstance(value, list):
        return len(value) == size and all(isinstance(item, Tensor) for item in value)
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size
