"""The guidance of a pipeline, seen on the first sampling step.

Pipelines mean different things by a guidance scale: 1 is none in most, 0 in Z-Image, and some have
another argument for it. So the scale is read off what the scheduler is given.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ..settings import FitSettings
from .conditioning import PromptTable, make_reader
from .pipeline import Pipeline

log = logging.getLogger(__name__)

_ALIKE = 1e-4
"""Predictions with and without the prompt that differ by less say nothing about a scale."""
_TOLERANCE = 0.02
"""Of the guided prediction, which must be a sum of both."""


def observe_guidance(pipeline: Pipeline, settings: FitSettings, table: PromptTable) -> float | None:
    """Observes the g of v = u + g·(c − u) in the scheduler's input.

    `table` comes from `Pipeline.tabulate_prompts`. Returns 1 without guidance, and where the prompt
    changes nothing; None where the scheduler's input is no such sum.
    """
    prompt = next((prompt for prompt in settings.prompts if prompt), "")
    steps = pipeline.observe(prompt, settings, "step").steps
    if not steps:
        return None
    read = make_reader(table.like.latent)
    with_prompt, without = list[Tensor](), list[Tensor]()
    for parts, output in steps[0].calls:
        for i, row in enumerate(read(output).double().cpu()):
            branch = with_prompt if table.has_prompt(parts, i) else without
            branch.append(row.flatten())
    return read_guidance_scale(read(steps[0].given).double().cpu(), with_prompt, without)


def read_guidance_scale(
    used: Tensor, with_prompt: Sequence[Tensor], without: Sequence[Tensor]
) -> float | None:
    """Reads the scale of used = ±(u + g·(c − u))."""
    if not with_prompt or not without:
        return 1.0
    prompted, free = with_prompt[0], without[0]
    if float((prompted - free).norm()) < _ALIKE * float(prompted.norm()):
        return 1.0
    given = used.flatten()[: prompted.numel()]
    branches = torch.stack([prompted, free], 1)
    weights = torch.linalg.lstsq(branches, given[:, None], driver="gelsd").solution[:, 0]
    total = float(weights.sum())
    left = float((branches @ weights - given).norm())
    if abs(total) < 0.5 or left > _TOLERANCE * float(given.norm()):
        return None
    return float(weights[0]) / total


def lacks_negative_prompt(pipeline: Pipeline, settings: FitSettings) -> bool:
    """Returns whether a pipeline guides only with a negative prompt.

    Probing gives none. Qwen-Image is such a pipeline: its second scale is above 1 unless it is told
    otherwise, and FLUX's is not. A student of such a model is one whose guidance scale was asked to
    be none.
    """
    second = pipeline.accepted.get("true_cfg_scale")
    usual = second.default if second else None
    if not isinstance(usual, int | float) or usual <= 1:
        return False
    return settings.guidance is None or settings.guidance > 1


def guide_source(
    pipelines: tuple[Pipeline, Pipeline],
    settings: tuple[FitSettings, FitSettings],
    tables: tuple[PromptTable, PromptTable],
) -> float:
    """Returns the scale of the source's guidance where the target runs without any; else 1.

    Few-step students, and students that learnt their guidance, predict what their teacher does with
    guidance: v = u + g·(c − u), with c for the prompt and u for none. So the change that they
    should make is the guided prediction's, and that of c alone is too small by a factor of about g.
    """
    source, target = tables
    if not source.guided or target.guided or lacks_negative_prompt(pipelines[1], settings[1]):
        return 1.0
    scale = observe_guidance(pipelines[0], settings[0], source)
    if scale is None:
        log.warning(
            "%s: what its guidance makes of the predictions with and without the prompt is not a "
            "sum of both, so it is asked without, although %s is run without guidance",
            *(pipeline.name for pipeline in pipelines),
        )
    return scale or 1.0
