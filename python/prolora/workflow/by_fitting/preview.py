"""What a fit aims at, in images: the source's change added to the target, step by step."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from ...bases import Base, vae
from ...core.lowrank import LowRank
from ...errors import UnsupportedFormat
from ..fit_options import FitOptions
from ..options import LoraLike
from ..page.document import PictureGrid
from ..report import Report
from .common_parts import CommonParts
from .pipeline import move_rival, prepare_fit
from .plan import FitJob, foresee_work
from .rows import outline_report
from .running import OPENING, OpenedModels, open_for_fit
from .showing import CHANGED

SHOWN = 4
"""Prompts of which a page shows images, where no other number is asked for."""


def draw_preview(lora: LoraLike, source: Base, target: Base, options: FitOptions) -> Report:
    """What would be fitted, and images of what the fit would aim at; nothing is fitted.

    Raises:
        UnsupportedFormat: the pipelines have different latents.
        ProLoRAError: what a fit refuses before a model runs, or a pipeline that cannot draw.
    """
    started = time.perf_counter()
    options = replace(options, shown_prompts=options.shown_prompts or SHOWN, resume=None)
    job = prepare_fit(lora, source, target, options, fits=False)
    _check_latents(source, target)
    report = outline_report(job.adapter, job.plan, source, target, options)
    rival = move_rival(job)
    grid = _draw_columns(job, rival.done.adapter.updates if rival else {})
    return replace(report, grid=grid, seconds={"show": time.perf_counter() - started})


def _check_latents(source: Base, target: Base) -> None:
    """Refuses pipelines between which predictions cannot be added.

    Raises:
        UnsupportedFormat: their latents differ.
    """
    assert source.path is not None and target.path is not None
    reason = vae.explain_different_latents(source.path, target.path)
    if reason is not None:
        raise UnsupportedFormat(
            f"a preview adds what the LoRA changes of {source.name} to the predictions of "
            f"{target.name}, which their latents do not allow: {reason}. Fit the LoRA instead, at "
            "first with few images and steps, and look at the images on the page of its report"
        )


def _draw_columns(job: FitJob, copied: Mapping[str, LowRank]) -> PictureGrid | None:
    """The images, and the progress on the way: predictions that are made, of all."""
    from ...probe import pipelines

    tell = job.options.progress or (lambda done, total, name: None)
    tell(0, 1, OPENING)
    with open_for_fit(job, copied, CommonParts(None)) as opened:
        grid = opened.grid
        shown = replace(opened.sampled, prompts=grid.prompts)
        pair = pipelines.pair_pipelines(*opened.models, shown, opened.asked.text)
        costs = _price_columns(job, opened, 1 if pair.translation.guidance is None else 2)
        total, done = sum(costs.values()) * len(grid.prompts), 0

        def count(column: str) -> None:
            nonlocal done
            done += costs[column]
            tell(done, total, column)

        tell(0, total, "drawing")
        grid.on_image = count
        opened.show_source()
        opened.show_target(None)
        grid.draw_changed(pipelines.add_source_change(pair, opened.asked.denoiser.updates))
        tell(total, total, "drawn")
    return grid.to_page(job.source.name, job.target.name)


def _price_columns(job: FitJob, opened: OpenedModels, asked: int) -> dict[str, int]:
    """Column -> predictions for one of its images.

    Args:
        job: the LoRA.
        opened: both models.
        asked: predictions of the source for one of its answers.
    """
    work = foresee_work(job.source, job.target, job.options)
    ours, theirs = work.branches
    target = work.steps["target"] * theirs
    return {
        "source": work.steps["source"] * ours,
        "source + LoRA": work.steps["adapted"] * ours,
        "target": target,
        "target + copy": target if opened.asked.rival else 0,
        CHANGED: target * (1 + 2 * asked),
    }
