"""A fit between two sides, read from top to bottom: draw, ask, solve, judge."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

from ..core.lowrank import LowRank
from ..core.precision import in_full_precision
from ..errors import UnrelatedBases
from .fitted_modules import choose_modules
from .gate import REFUSE, fitting_updates, judge_fit
from .kept_parts import KeptParts, hash_texts, hash_updates
from .models import check_models, frozen, in_precision
from .pipelines.schedules import level_log_snr
from .probe_report import ProbeReport
from .probes import ORIGINS, Asking, Probe
from .settings import FitSettings
from .solver.joint import solve
from .workload import Meter, Workload


@dataclass(frozen=True)
class Fitted:
    """The result of a fit between two sides."""

    updates: dict[str, LowRank]  # of the target, as fitted
    report: ProbeReport  # what was done, and how well

    @property
    def scaled(self) -> dict[str, LowRank]:
        """The updates at the strength that the gate chose."""
        strength = self.report.gate.strength
        return {n: LowRank(u.up * strength, u.down) for n, u in self.updates.items()}


@in_full_precision
def fit_sides(
    asking: Asking,
    settings: FitSettings,
    baseline: Mapping[str, LowRank] | None = None,
    *,
    meter: Meter | None = None,
    parts: KeptParts | None = None,
    release: Callable[[], None] = lambda: None,
) -> Fitted:
    """Fits the LoRA that makes the target change as the LoRA makes the source change.

    Args:
        asking: both sides, the LoRA, and how they are asked. The models' weights are afterwards as
            before.
        settings: of the fit.
        baseline: updates of the target that the fit is compared with on held-out probes, and may
            start from; None: the LoRA's own of modules that the target has.
        meter: is informed how far the fit is.
        parts: of earlier fits.
        release: called once everything was asked; from then on the target alone runs.

    Raises:
        UnrelatedBases: the gate refuses, and the fit is not forced.
        ProLoRAError: a module or dtype is of a kind that no fit can handle; the message names it.
    """
    ours, theirs = asking.source, asking.target
    check_models(ours.denoiser, theirs.denoiser, asking.updates)
    if baseline is None:
        baseline = fitting_updates(theirs.denoiser, asking.updates)
    parts = parts or KeptParts()
    meter = meter or Meter(Workload(settings, settings.target_steps or settings.steps))
    own = max(update.rank for update in asking.updates.values())
    settings = replace(meter.workload.sized, rank=settings.rank or own)
    assert settings.rank and settings.probes and settings.held_out and settings.batch
    key = ""
    if parts.folder is not None:
        asked = f"guidance {asking.guidance:.4g}, {settings.images} images"
        origins = (asking.keys[origin] for origin in ORIGINS)
        key = hash_texts(*origins, asked, settings.describe_fit(), hash_updates(baseline))
    earlier = parts.recall_updates("fit", key)
    with ExitStack() as stack:
        for side in (ours, theirs):
            stack.enter_context(frozen(side.denoiser))
            stack.enter_context(in_precision(side.denoiser, settings.precision))
        meter.begin("sample")
        seeds = settings.seed, settings.seed + len(ORIGINS)
        drawn, unseen = (asking.draw_images(s, settings.images, parts, meter) for s in seeds)
        meter.begin("ask")
        size = _even_size(settings.batch, asking.at_once)
        count = settings.probes if earlier is None else 1  # one shows which modules are called
        questions = asking.draw_probes(drawn, count, size, settings.seed)
        probes = _ask(questions, settings, meter)
        size = _even_size(settings.held_out // len(ORIGINS), asking.at_once)
        questions = asking.draw_probes(unseen, settings.held_out, size, settings.seed, True)
        held_out = _ask(questions, settings, meter)
        names, left_out = choose_modules(asking, probes[0])
        release()
        meter.begin("fit")
        updates, facts = earlier or solve(asking, probes, names, baseline, settings, meter)
        if earlier is None:
            parts.store_updates("fit", key, updates, facts)
        meter.begin("judge")
        gate = judge_fit(asking, updates, baseline, held_out, facts["start"])
        meter.begin("")
    if gate.decision == REFUSE and not settings.force:
        raise UnrelatedBases(f"the fit is refused: {gate.reason}")
    low, high = asking.levels
    report = ProbeReport(
        rank=settings.rank,
        gate=gate,
        samples=(settings.probes, settings.held_out),
        images=2 * len(ORIGINS) * settings.images,
        modules=len(names),
        left_out={name: reason for name, reason in left_out.items() if name not in updates},
        resumed=int(earlier is not None),
        seconds=meter.seconds,
        log_snr=(level_log_snr(high), level_log_snr(low)),
        shared=asking.shared,
        pairs=asking.pairs,
        guidance=asking.guidance,
        look=asking.look,
        **facts,
    )
    return Fitted(updates, report)


def _ask(questions: Iterator[Probe], settings: FitSettings, meter: Meter) -> list[Probe]:
    assert settings.probes and settings.held_out
    every, probes = settings.probes + settings.held_out, list[Probe]()
    for probe in questions:
        probes.append(probe)
        meter.advance(len(probe) / every, "asking both models")
    return probes


def _even_size(count: int, most: int) -> int:
    """Returns the size of the fewest batches of equal size."""
    return math.ceil(count / math.ceil(max(count, 1) / most))
