"""Probing, read from top to bottom: ask, solve, judge, finish."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from os import PathLike

import torch
from torch import Tensor, nn

from .. import adapters
from ..adapters.adapter import Adapter
from ..bases.pipeline_identity import describe_live_module
from ..core.lowrank import LowRank
from ..core.precision import in_full_precision
from ..errors import InvalidOption, UnrelatedBases
from ..version import __version__
from .checkpoint import Checkpoints, hash_texts
from .fit_numbers import ProbeReport
from .fitted_modules import choose_modules
from .gate import REFUSE, fitting_updates, judge_updates
from .models import check_models, frozen, in_float32, in_precision
from .pipelines.crossing_recorder import CrossingRecorder
from .probe_run import ProbeRun
from .recording.at_rest import LazySequence, lay_aside, lay_questions_aside
from .recording.recorder import ORIGINS, Recorder, hash_origins
from .recording.sample_batches import FindPrompts, count_samples, mix_samples
from .recording.trajectories import Sample, predict_call
from .recording.translation import PAIR, Question, Translation
from .recording.wanted import WantedChange
from .settings import FitSettings
from .solver.joint import check_start, fit_all_modules
from .updates import weight_of
from .workload import Workload, WorkMeter

DEFAULT_SETTINGS = FitSettings()
SAME_QUESTIONS = Translation()
"""Both models take the same inputs and predict the same quantity."""


@dataclass(frozen=True)
class ProbeTransfer:
    """The result of a probing."""

    adapter: Adapter  # the LoRA of the target, its strength applied
    report: ProbeReport  # what was done, and how well

    def save(
        self, path: str | PathLike[str], *, format: str = "auto", dtype: torch.dtype | None = None
    ) -> None:
        """Writes the LoRA completely or not at all; arguments as in `prolora.Transfer.save`."""
        adapters.write_adapter(self.adapter, path, format=format, dtype=dtype)


@dataclass(frozen=True)
class Samplers:
    """How models are sampled, each by a function of a seed."""

    source: Sample  # runs the source's sampler from noise
    target: Sample  # the same for the target
    # Runs the source while the LoRA runs in it, where the LoRA is sampled in another way than the
    # source (few steps, no guidance, a trigger word); None: as `source`.
    adapted: Sample | None = None
    # What the samplers do, as a text; needed where results are kept for another run, because two
    # functions cannot be compared.
    described: str = ""


@in_full_precision
def fit_to_models(
    source: nn.Module,
    target: nn.Module,
    lora: str | PathLike[str] | Adapter | Mapping[str, LowRank],
    samplers: Samplers,
    settings: FitSettings = DEFAULT_SETTINGS,
    *,
    translation: Translation = SAME_QUESTIONS,
    rival: Mapping[str, LowRank] | None = None,
) -> ProbeTransfer:
    """Fits the LoRA that makes `target` change as the LoRA makes `source` change.

    Both models run on trajectories that they sample themselves from noise, so no data is needed. At
    every probe the target should predict v_t + (v_s with LoRA − v_s) + look·(v_s − v_t). Linear
    layers and convolutions of images that it calls are fitted to that at once, in a few
    Gauss–Newton steps on the factors of the LoRA. `prolora.fit` does it between two folders.

    Args:
        source: the module that LoRA names start from (a pipeline's unet or transformer), stored
            in float32, float16 or bfloat16; computed in the precision of the settings.
        target: the same of the target; widths and depths may differ. Both must take the same
            inputs and predict the same quantity, unless the translation says otherwise.
        lora: a file, an adapter, or updates by the source's module names.
        samplers: of both models.
        settings: of the fit; what they say of prompts, images and steps of the samplers is for
            pipelines.
        translation: asks both models the same question, where they take different inputs or
            predict different quantities; and the guidance that the source is asked with.
        rival: updates of the target that the fit is compared with on the held-out probes, and may
            start from; None: the LoRA's own updates of modules that the target has.

    Raises:
        InvalidOption: results are to be kept, and nothing says what the samplers do; or an option
            that no fit of models at hand heeds.
        ShapeMismatch: the fit is to start from a copy that does not fit the target.
        UnrelatedBases: the gate refuses, and the fit is not forced.
        ProLoRAError: a module, block or dtype is of a kind that no fit can handle; the message
            names it.

    Returns:
        The target's adapter and the report. The models' weights are afterwards as before.
    """
    if type(settings) is not FitSettings:
        raise InvalidOption("settings must be FitSettings: models at hand heed no others")
    if settings.resume is not None and not samplers.described:
        raise InvalidOption("resume needs samplers whose `described` says what they do")
    if isinstance(lora, str | PathLike):
        adapter = adapters.read_adapter(lora)
    else:
        adapter = lora if isinstance(lora, Adapter) else Adapter(dict(lora), format="diffusers")
    check_models(source, target, adapter)
    if rival is None:
        rival = fitting_updates(target, adapter.updates)
    recorder = Recorder(
        source,
        target,
        adapter,
        (samplers.source, samplers.adapted or samplers.source, samplers.target),
        translation,
        Checkpoints(
            settings.resume,
            lambda: {
                "the source": describe_live_module(source),
                "the target": describe_live_module(target),
            },
        ),
        hash_origins(
            adapter.updates,
            f"{samplers.described} {settings.precision}" if settings.resume is not None else "",
        ),
    )
    return fit_from_recorder(recorder, rival, settings)


@in_full_precision
def fit_from_recorder(
    recorder: Recorder | CrossingRecorder,
    rival: Mapping[str, LowRank],
    settings: FitSettings,
    release: Callable[[], None] = lambda: None,
    meter: WorkMeter | None = None,
    samples: int | None = None,
) -> ProbeTransfer:
    """Asks, solves, judges and finishes, with both models frozen in the settings' precision.

    `release` is called once everything was sampled and asked; from then on the target alone runs.
    The sampler tells `meter` every image. `samples` is the number in a batch of the fit; None: as
    in the samplers' calls.
    """
    check_start(settings.start, recorder.target, rival)
    meter = meter or WorkMeter(Workload(settings, settings.target_steps or settings.steps))
    if settings.rank is None:
        own = max(update.rank for update in recorder.adapter.updates.values())
        settings = replace(settings, rank=own)
    assert settings.rank is not None
    look = settings.look_of_source
    report = ProbeReport(probes=0, held_out=0, rank=settings.rank, look=look)
    with ExitStack() as stack:
        for model in (recorder.source, recorder.target):
            stack.enter_context(frozen(model))
            stack.enter_context(in_precision(model, settings.precision))
        stack.enter_context(meter.watch(recorder.source, recorder.target))
        run, questions, judged = _ask(recorder, rival, settings, report, meter, release, samples)
        names = choose_modules(run, questions[0])
        report.modules = len(names)
        meter.begin("ask")
        held_out = _ask_held_out(run, judged)
        updates = fit_all_modules(run, questions, names)
        for name in updates:
            report.left_out.pop(name, None)
        meter.begin("judge")
        verdict = report.gate = judge_updates(
            recorder.target,
            updates,
            held_out,
            recorder.translation,
            rival,
            report.start,
            bool(recorder.crossed),
            look,
        )
        meter.finish()
    report.seconds, report.predictions = meter.seconds, meter.predictions
    if verdict.decision == REFUSE and not settings.force:
        raise UnrelatedBases(f"the fit is refused: {verdict.reason}")
    return _finish(run, updates, verdict.strength)


def _ask(
    recorder: Recorder | CrossingRecorder,
    rival: Mapping[str, LowRank],
    settings: FitSettings,
    report: ProbeReport,
    meter: WorkMeter,
    release: Callable[[], None],
    samples: int | None,
) -> tuple[ProbeRun, Sequence[Question], Sequence[Question]]:
    """Records the questions, and draws samples of them for the fit and for the verdict."""
    guidance = recorder.translation.guidance
    report.crossed, report.shared = recorder.crossed, recorder.translation.same_noise
    report.guidance = guidance.scale if guidance else 1.0
    meter.begin("sample")
    questions = lay_questions_aside(recorder.record_questions(settings.seed))
    judged = recorder.record_questions(settings.seed + len(ORIGINS), held_out=True)
    held_out = lay_questions_aside(judged)
    report.probes, report.held_out = len(questions), len(held_out)
    settings = settings.sized(_count_samples(questions) + _count_samples(held_out))
    # The recorder's key says what the samplers do, not how the source is asked.
    asked = f"guidance {guidance.scale:.4g}" if guidance else ""
    key = hash_texts(recorder.key, asked) if asked else recorder.key
    run = ProbeRun(recorder, rival, settings, key, report, meter, release, samples)
    meter.begin("draw")
    questions, held_out = _draw_samples(run, questions, held_out)
    report.samples = _count_samples(questions), _count_samples(held_out)
    return run, questions, held_out


def _ask_held_out(run: ProbeRun, questions: Sequence[Question]) -> Sequence[WantedChange]:
    """Asks held-out questions before the fit, which needs no source any more."""
    found = [
        lay_aside((wanted.plain, wanted.change, wanted.base_difference))
        for wanted in run.wanted_changes(questions)
    ]
    return LazySequence(len(found), lambda i: WantedChange(questions[i].target, *found[i]()))


def _finish(run: ProbeRun, updates: Mapping[str, LowRank], strength: float) -> ProbeTransfer:
    """Returns the target's adapter with the updates at their strength, and the report."""
    scaled = {n: LowRank(u.up * strength, u.down) for n, u in updates.items()}
    metadata = {"prolora.version": __version__, "prolora.method": "fit"}
    shapes = {n: weight_of(run.recorder.target, n, any_kind=True).shape for n in scaled}
    kernels = {name: tuple(shape[2:]) for name, shape in shapes.items() if len(shape) > 2}
    adapter = run.recorder.adapter.with_updates(scaled)
    adapter = replace(adapter, kernels=kernels, vectors={}, metadata=metadata, left_out={})
    return ProbeTransfer(adapter, run.report)


def _draw_samples(
    run: ProbeRun, questions: Sequence[Question], held_out: Sequence[Question]
) -> tuple[Sequence[Question], Sequence[Question]]:
    """Draws samples for the fit and for the verdict, in batches that mix many moments."""
    settings = run.settings
    source, target = run.recorder.source, run.recorder.target
    translation = run.recorder.translation
    generator = torch.Generator().manual_seed(settings.seed)
    assert settings.probes and settings.held_out and settings.batch

    def predict_both(question: Question) -> tuple[Tensor, Tensor]:
        with in_float32(source), in_float32(target):
            theirs = translation.of_target(target, question)
            if question.origin == PAIR:
                return predict_call(target, question.source, translation.read), theirs
            return translation.of_source(source, question), theirs

    judged = []
    for origin in ORIGINS:  # not mixed with each other: the gate compares them
        of_origin = [question for question in held_out if question.origin == origin]
        count = max(settings.held_out // len(ORIGINS), 1)
        judged += mix_samples(of_origin, count, count, predict_both, generator)
    origins = [question.origin for question in questions]
    batch = settings.batch

    def draw_some(
        paired: bool, count: int, prompts: FindPrompts | None, step: int
    ) -> list[Question]:
        rows = [i for i, origin in enumerate(origins) if (origin == PAIR) == paired]
        some = LazySequence(len(rows), lambda i: questions[rows[i]])
        if not rows:
            return []
        return mix_samples(some, count, batch, predict_both, generator, prompts, step, run.samples)

    shares = 2 if PAIR in origins else 1
    count, step = max(settings.probes // shares, 1), max(batch // shares, 1)
    # Every step has samples of all origins: steps on the LoRA's own images alone cost 0.02 of the
    # score.
    drawn = draw_some(False, count, translation.find_prompts, step)
    if PAIR in origins:
        drawn = _alternate(drawn, draw_some(True, count, None, 0))
    return lay_questions_aside(drawn), lay_questions_aside(judged)


def _alternate(first: list[Question], second: list[Question]) -> list[Question]:
    """Alternates the questions of both; the rest of the longer one comes last."""
    both = itertools.zip_longest(first, second)
    return [question for pair in both for question in pair if question is not None]


def _count_samples(questions: Sequence[Question]) -> int:
    return sum(count_samples(question.source) for question in questions)
