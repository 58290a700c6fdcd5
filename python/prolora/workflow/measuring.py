"""Two running models and a LoRA: what moving it reaches, measured on their own trajectories."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..adapters.adapter import Adapter
from ..adapters.training_words import read_training_words
from ..architectures.modules import is_in_text_encoder
from ..bases import Base, open_base, vae
from ..bases.base import Progress
from ..bases.pipeline_files import PIPELINE_INDEX, is_pipeline
from ..core.lowrank import LowRank
from ..core.methods import MethodChoice
from ..core.validation import DeviceLike
from ..errors import InvalidOption, ProLoRAError, UnrelatedBases, UnsupportedFormat
from ..probe.checkpoint import open_checkpoints
from ..probe.default_prompts import derive_prompts
from ..probe.recording.recorder import Recorder
from ..probe.recording.trajectories import Sample
from ..probe.recording.translation import Translation
from ..probe.run import fit_from_recorder
from ..probe.settings import FitSettings
from ..probe.strength import ORIGINS, Measurement, Trajectories, measure_strengths
from ..probe.workload import Workload, price_predictions
from .by_fitting.plan import LoraParts, foresee_work
from .by_weights.base_pair import move_lora
from .fit_options import FitOptions
from .options import TransferOptions

TRIAL_STEPS, TRIAL_SEED = 8, 10_000
"""Of the fit whose first steps are run; its samplings are not those that it is measured on."""

MOMENTS = 6
"""Of each trajectory, at which the models are compared."""


@dataclass(frozen=True)
class MeasuredSide:
    """A base, and what runs it.

    Attributes:
        base: its weights.
        pipe: the diffusers pipeline at hand; None where the base is a file, a folder or a module.
        module: the model at hand, which samplers that the caller gives run; None for pipelines.
    """

    base: Base
    pipe: Any = None
    module: nn.Module | None = None

    @classmethod
    def of(cls, given: Any) -> MeasuredSide:
        """What `advise` was given: a base in any form, or a diffusers pipeline."""
        base, is_module = open_base(given), isinstance(given, nn.Module)
        is_pipe = hasattr(given, "scheduler") and not is_module
        return cls(base, given if is_pipe else None, given if is_module else None)

    @property
    def runs(self) -> bool:
        """Whether a pipeline is there."""
        return self.pipe is not None or is_pipeline(self.base.path)


@dataclass(frozen=True)
class RunningModels:
    """What `measure_strengths` takes of two models, and a fit.

    Attributes:
        source: the module that runs.
        target: likewise.
        samplers: of the source with the LoRA and of the target, an image a call.
        translation: asks both the same.
        fitting: samplers of source, source with the LoRA and target, for the fit.
        lora: what the two are asked about.
    """

    source: nn.Module
    target: nn.Module
    samplers: tuple[Sample, Sample]
    translation: Translation
    fitting: tuple[Sample, Sample, Sample]
    lora: LoraParts


def check_runnable(source: MeasuredSide, target: MeasuredSide, samplers: object) -> None:
    """Refuses what cannot be run, before anything is read.

    Raises:
        UnsupportedFormat: a side that is no pipeline.
        InvalidOption: samplers without modules to run.
        UnrelatedBases: pipeline folders with different latents.
    """
    if samplers is not None:
        if source.module is None or target.module is None:
            raise InvalidOption(
                "samplers run modules at hand: give source and target as nn.Module, or leave "
                "samplers out for pipelines"
            )
        return
    for name, side in (("source", source), ("target", target)):
        if not side.runs:
            raise UnsupportedFormat(
                f"the {name} {side.base.path or side.base.name} is not a pipeline folder: "
                "measuring runs the models, so both bases must be folders of whole diffusers "
                f"pipelines ({PIPELINE_INDEX}, scheduler, text encoders, and unet or "
                "transformer); in Python also pipelines at hand, or modules with samplers"
            )
    if source.base.path is not None and target.base.path is not None:
        vae.check_latents(source.base.path, target.base.path)


@contextmanager
def open_models(
    source: MeasuredSide,
    target: MeasuredSide,
    adapter: Adapter,
    settings: FitSettings,
    samplers: tuple[Sample, Sample] | None,
    device: DeviceLike,
) -> Iterator[RunningModels]:
    """Loads the pipelines, or takes those at hand; text encoders run with the LoRA, as in a fit.

    Args:
        source: the base of the LoRA.
        target: the other base.
        adapter: the LoRA; its header leads to the prompts where none are given.
        settings: what is sampled.
        samplers: of the source and of the target, where these are modules at hand.
        device: where pipelines that are loaded run.
    """
    lora = LoraParts.of(adapter, source.base, target.base)
    if samplers is not None:
        assert source.module is not None and target.module is not None
        fitting, lora = (samplers[0], samplers[0], samplers[1]), replace(lora, text={})
        yield RunningModels(source.module, target.module, samplers, Translation(), fitting, lora)
        return
    from ..probe.pipelines import pair_pipelines, run_text_encoders_beside

    ours, theirs = (_open_pipeline(side, device) for side in (source, target))
    if not settings.prompts and all("prompt" in model.accepted for model in (ours, theirs)):
        words = read_training_words(adapter.metadata)
        settings = replace(settings, prompts=derive_prompts(words))
    with ExitStack() as stack:
        for model in (ours, theirs):
            stack.enter_context(run_text_encoders_beside(model, lora.carried))
        pair = pair_pipelines(ours, theirs, settings, lora.text)
        adapted = _make_sampler(ours, pair.settings.with_lora(), lora.text)
        yield RunningModels(
            ours.denoiser,
            theirs.denoiser,
            (adapted, _make_sampler(theirs, pair.of_target, {})),
            pair.translation,
            pair.samplers(lambda _: None),
            lora,
        )


def begin_fit(
    models: RunningModels,
    rival: Mapping[str, LowRank],
    settings: FitSettings,
    bases: tuple[Base, Base],
) -> tuple[dict[str, LowRank], float]:
    """The first steps of a fit: its updates, and the seconds that a whole one would take here.

    Args:
        models: of both bases.
        rival: what weights give, from which the fit may start.
        settings: what is sampled.
        bases: source and target.
    """
    recorder = Recorder(
        models.source,
        models.target,
        models.lora.denoiser,
        models.fitting,
        models.translation,
        open_checkpoints(None, models.source, models.target, {}),
        "",
        models.lora.text,
    )
    few = replace(settings, fit_steps=TRIAL_STEPS, seed=TRIAL_SEED, force=True, progress=None)
    done = fit_from_recorder(recorder, rival, few)
    whole = FitOptions()
    if all(is_pipeline(base.path) for base in bases):
        foreseen = foresee_work(*bases, whole)
    else:
        foreseen = Workload(whole, whole.steps)
    spent = sum(done.report.seconds.values()) / price_predictions(done.report.predictions)
    assert done.report.gate is not None
    factor = 1 / done.report.gate.strength  # strengths are measured from what was fitted
    updates = {n: LowRank(u.up * factor, u.down) for n, u in done.adapter.updates.items()}
    return updates, spent * price_predictions(foreseen.predictions)


def _open_pipeline(side: MeasuredSide, device: DeviceLike) -> Any:
    from ..probe.pipelines import Pipeline, open_pipeline

    if side.pipe is None:
        assert side.base.path is not None
        return open_pipeline(side.base.path, device)
    return Pipeline(side.pipe, type(side.pipe).__name__)


def _make_sampler(pipeline: Any, settings: FitSettings, text: Mapping[str, LowRank]) -> Sample:
    """Samples one image with updates of text encoders; prompts take turns, in both models alike."""
    from ..probe.pipelines import run_text_encoders_beside

    prompts = settings.prompts or ("",)

    def sample(seed: int) -> None:
        prompt = prompts[(seed // len(ORIGINS)) % len(prompts)]
        with run_text_encoders_beside(pipeline, text):
            pipeline.sample_latents(prompt, settings, seed)

    return sample


def move_candidates(
    adapter: Adapter, source: Base, target: Base, options: TransferOptions
) -> dict[str, dict[str, LowRank]]:
    """The LoRA as `auto` and as a copy, both at strength 1; equal ones once.

    Raises:
        ProLoRAError: it cannot be moved by weights.
    """
    candidates: dict[str, dict[str, LowRank]] = {}
    methods: tuple[MethodChoice, ...] = ("auto", "copy")
    for method in methods:
        asked = replace(options, method=method, strength=1.0, progress=None)
        with suppress(UnrelatedBases):
            moved = move_lora(adapter, source, target, asked, hashed=False)
            found = moved.adapter.updates.items()
            updates = {name: u for name, u in found if not is_in_text_encoder(name)}
            if updates and not any(_are_equal(updates, other) for other in candidates.values()):
                candidates[method] = updates
    if not candidates:
        raise ProLoRAError("the LoRA has no update of the UNet or transformer to measure")
    return candidates


def _are_equal(ours: Mapping[str, LowRank], theirs: Mapping[str, LowRank]) -> bool:
    return ours.keys() == theirs.keys() and all(
        u.up.shape == theirs[name].up.shape
        and bool((u.up == theirs[name].up).all())
        and bool((u.down == theirs[name].down).all())
        for name, u in ours.items()
    )


def measure_lora(
    models: RunningModels,
    candidates: Mapping[str, Mapping[str, LowRank]],
    runs: int,
    progress: Progress | None,
) -> Measurement:
    """What each candidate reaches; see `measure_strengths`."""
    return measure_strengths(
        models.source,
        models.target,
        models.lora.denoiser.updates,
        candidates,
        models.samplers,
        translation=models.translation,
        trajectories=Trajectories(runs=runs, moments=MOMENTS),
        progress=progress,
    )
