"""Delta Sampling (arXiv 2512.03056): the source's change is added to what the target predicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...core.lowrank import LowRank
from ..hooks import keep_hooks
from ..precision import in_float32
from ..recording.trajectories import Call
from ..recording.wanted import ask_source_twice
from .pairing import PipelinePair


@contextmanager
def add_source_change(pair: PipelinePair, updates: Mapping[str, LowRank]) -> Iterator[None]:
    """The target of a pair, while every prediction of it is changed as the LoRA changes the source.

    The target asks the source twice, at the states of its own sampler and in float32.

    Args:
        pair: has the prompts that the target is sampled with.
        updates: of the LoRA, by module of the source's denoiser.
    """
    source, translation = pair.source.denoiser, pair.translation

    def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        question = translation.question(Call(args, kwargs, "target"))
        before, after = ask_source_twice(source, updates, question, translation)
        return change_prediction(result, after - before)

    hook = pair.target.denoiser.register_forward_hook(add, with_kwargs=True)
    with keep_hooks([hook]), in_float32(source):
        yield


def change_prediction(result: Any, change: Tensor) -> Any:
    """The return value of a model with another prediction; a variance behind it stays.

    Args:
        result: in every form that `stack_output` reads.
        change: of the prediction [n, ...].
    """
    if isinstance(result, list) and all(isinstance(sample, Tensor) for sample in result):
        return [sample + part for sample, part in zip(result, change, strict=True)]
    if isinstance(result, list | tuple):
        return type(result)([change_prediction(result[0], change), *result[1:]])
    if isinstance(result, Tensor):
        rest = result[:, change.shape[1] :]
        return torch.cat([result[:, : change.shape[1]] + change, rest], 1)
    result.sample = change_prediction(result.sample, change)
    return result
