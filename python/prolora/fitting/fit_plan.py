"""The modules that a fit changes, carries over or skips.

Names and shapes decide, and refuse.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..adapters.adapter import Adapter
from ..architectures.modules import is_in_text_encoder, may_be_fitted
from ..bases import Base, vae
from ..bases.pipeline_files import (
    PIPELINE_INDEX,
    draws_in_few_steps,
    is_pipeline,
    read_pipeline_index,
)
from ..core.lowrank import LowRank
from ..errors import InvalidOption, ProLoRAError, UnrelatedBases, UnsupportedFormat
from ..files.jsontext import read_json_object
from ..moving.base_check import Depth, check_bases, read_lora
from ..moving.plan import ModulePlan, check_fits_source, place_text_encoders
from ..reports.lora_report import LoraReport
from ..verbs.options import LoraLike
from .fitted_modules import NO_KIND, choose_fitted
from .pipelines.memory_bounds import CardPlan, is_card, plan_card
from .settings import FitOptions, PassedOn
from .workload import Workload

RULE = "running models"
"""How modules are paired, for the report."""

SERVES = (
    "Moving by weights serves here: all of the LoRA has a place on {target}, and `transfer` takes "
    "seconds. On test models fits were at times worse there; this one is written only if held-out "
    "samples say that it is better."
)

_COMPENSATED = "; what it changes is fitted into the target's modules"


@dataclass(frozen=True)
class LoraParts:
    """A LoRA as the models run it, by module of the source."""

    denoiser: dict[str, LowRank]  # in the UNet or transformer
    # In text encoders that the target does not have: the source alone runs them, so that what they
    # change is wanted of the target's blocks.
    text: dict[str, LowRank] = field(default_factory=dict)
    # In text encoders that both have: both run them from the beginning, since the result holds
    # them unchanged.
    carried: dict[str, LowRank] = field(default_factory=dict)


@dataclass(frozen=True)
class FitJob:
    """A LoRA on its way from one pipeline to another."""

    adapter: Adapter  # the LoRA of the source
    plan: ModulePlan  # which of its modules are carried over or skipped; all others are fitted
    source: Base  # the base it was trained on
    target: Base  # the base it goes to
    options: FitOptions  # as they were asked for
    card: CardPlan | None = None  # how the pipelines run on a card whose memory is bounded

    @property
    def folders(self) -> tuple[Path, Path]:
        """The folders of source and target, which `check_fittable` has seen."""
        assert self.source.path is not None and self.target.path is not None
        return self.source.path, self.target.path

    @property
    def lora(self) -> LoraParts:
        """The LoRA; without text encoders where these are left out."""
        parts = LoraParts({}, {}, {})
        for name, update in self.adapter.updates.items():
            if not is_in_text_encoder(name):
                parts.denoiser[name] = update
            elif name in self.source.shapes and self.options.text_encoder != "skip":
                (parts.carried if name in self.plan.passed else parts.text)[name] = update
        return parts

    @property
    def shares_latents(self) -> bool:
        """Whether both denoise the same latents."""
        return vae.explain_different_latents(*self.folders) is None


def plan_memory_of_card(job: FitJob) -> CardPlan | None:
    """Plans how the pipelines run within `max_vram`; None without such a bound."""
    options = job.options
    if options.card_limit is None:
        return None
    if not is_card(options.device):
        raise InvalidOption(
            "`max_vram` bounds the memory of a card, and this fit runs on the CPU; `max_memory` "
            "bounds the machine's"
        )
    own = max((update.rank for update in job.adapter.updates.values()), default=1)
    rank = int(options.rank) if options.rank and options.rank >= 1 else own
    decodes = not job.shares_latents
    return plan_card(options.card_limit, job.folders, options, max(rank, own), decodes)


def check_fittable(source: Base, target: Base) -> None:
    """Refuses bases that cannot be fitted, before any model is loaded."""
    for side, base in (("source", source), ("target", target)):
        if not is_pipeline(base.path):
            raise UnsupportedFormat(
                f"the {side} {base.path or base.name} is not a pipeline folder: a fit runs "
                "the models, so both bases must be folders of whole diffusers pipelines "
                f"({PIPELINE_INDEX}, scheduler, text encoders, and unet or "
                "transformer). A single "
                "file becomes one by StableDiffusionPipeline.from_single_file(FILE)"
                ".save_pretrained(FOLDER) and the like; a model on the hub by downloading all of it"
            )
    assert source.path is not None and target.path is not None
    if vae.explain_different_latents(source.path, target.path) is not None:
        vae.check_images_cross(source.path, target.path)


def plan_modules(
    adapter: Adapter, source: Base, target: Base, text_encoder: PassedOn
) -> ModulePlan:
    """Plans which modules are carried over or skipped; all others are fitted."""
    plan = ModulePlan(rule=RULE)
    names = place_text_encoders(adapter, source, target, text_encoder, plan)
    ours, theirs = source.shapes, target.shapes
    for name in [n for n in plan.passed if n in ours and ours[n] != theirs.get(n)]:
        plan.passed.remove(name)
        plan.skipped[name] = "the target has another text encoder"
    check_fits_source(adapter, names, source)
    if text_encoder != "skip":
        for name in plan.skipped.keys() & source.shapes.keys():
            plan.skipped[name] += _COMPENSATED
    inside = fitted_modules(names, source)
    plan.skipped |= {name: NO_KIND for name in names if name not in inside}
    return plan


def fitted_modules(names: Iterable[str], source: Base) -> set[str]:
    """Returns the LoRA's modules with changes that can be fitted, by kind."""
    return {name for name in names if may_be_fitted(source.shapes.get(name, ()))}


def explain_need(
    found: LoraReport | ProLoRAError, source: Base, target: Base, target_steps: int | None
) -> str:
    """Returns why a fit is called for; "" where moving by weights serves.

    `found` is what became of the LoRA by weights; `target_steps` in which the target is said to
    draw.
    """
    if isinstance(found, UnrelatedBases):
        return "the weights of the two models have nothing in common"
    if isinstance(found, ProLoRAError):
        return "the two models are built differently"
    denoiser = [
        row
        for row in found.modules
        if row.source not in found.unread and not is_in_text_encoder(row.source)
    ]
    lost = fitted_modules((row.source for row in denoiser if row.status != "mapped"), source)
    if lost:
        return f"{len(lost)} of the LoRA's modules have no place on {target.name}"
    moved = fitted_modules((row.source for row in denoiser), source)
    if moved and draws_in_few_steps(target, target_steps) and not draws_in_few_steps(source):
        return f"{target.name} draws in few steps, where a LoRA that was only moved fades"
    return ""


def target_modules(adapter: Adapter, source: Base, target: Base) -> dict[str, tuple[int, ...]]:
    """Returns target module -> shape, of all that may get an update."""
    ours, theirs = (
        {
            name: shape
            for name, shape in base.shapes.items()
            if may_be_fitted(shape) and not is_in_text_encoder(name)
        }
        for base in (source, target)
    )
    return {name: theirs[name] for name in choose_fitted(adapter.updates, ours, theirs)}


def foresee_work(job: FitJob) -> Workload:
    """Foresees what a fit asks of both models at most.

    From settings and configurations alone.
    """
    few, options = bool(draws_in_few_steps(job.target)), job.options
    of_target = options.for_target(few, _embeds_guidance(job.folders[1]))
    sides = zip(job.folders, (options.guidance, of_target.guidance), strict=True)
    # Two predictions a step with guidance, unless the model has learnt it.
    ours, theirs = (
        2 if (guidance is None or guidance > 1) and not _embeds_guidance(folder) else 1
        for folder, guidance in sides
    )
    return Workload(options, of_target.steps, (ours, theirs))


def _embeds_guidance(folder: Path) -> bool:
    part = read_pipeline_index(folder).denoiser
    file = folder / (part or "") / "config.json"
    config = read_json_object(file) if file.is_file() else {}
    return bool(config.get("guidance_embeds") or config.get("time_cond_proj_dim"))


def outline_fit(
    adapter: Adapter, plan: ModulePlan, source: Base, target: Base
) -> dict[str, LowRank]:
    """Updates of the names and shapes that will be written, without values."""
    outline = {
        name: LowRank(torch.zeros(shape[0], 1), torch.zeros(1, shape[1]))
        for name, shape in target_modules(adapter, source, target).items()
    }
    return outline | {name: adapter.updates[name] for name in plan.passed}


def prepare_fit(
    lora: LoraLike,
    source: Base,
    target: Base,
    options: FitOptions,
    depth: Depth = "updates",
) -> FitJob:
    """Reads and plans; refuses all that can be refused without running a model.

    `depth` says how far the LoRA is read.
    """
    check_fittable(source, target)
    # Running models of equal weights may differ in schedule, steps and guidance.
    moving = replace(options.transfer_options("copy"), again=options.again)
    check_bases(lora, source, target, moving, may_be_one=True)
    adapter = read_lora(lora, source, depth, target)
    plan = plan_modules(adapter, source, target, options.text_encoder)
    job = FitJob(adapter, plan, source, target, options)
    return replace(job, card=plan_memory_of_card(job))


def explain_serving(
    source: Base, target: Base, options: FitOptions, found: LoraReport | ProLoRAError
) -> str:
    """Says that weights serve, by what `found` tells of the move; "" where they do not."""
    assert source.path is not None and target.path is not None
    differ = vae.explain_different_latents(source.path, target.path) is not None
    needed = differ or explain_need(found, source, target, options.target_steps)
    return "" if needed else SERVES.format(target=target.name)
