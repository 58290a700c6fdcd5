"""Toy models as sides of a fit, with settings by keyword."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prolora import LowRank
from prolora import fitting as probe
from prolora.fitting.fit_plan import LoraParts
from prolora.fitting.kept_parts import KeptParts
from prolora.fitting.pipelines.conditioning import CallParts
from prolora.fitting.pipelines.pipeline import Pipeline
from prolora.fitting.pipelines.pipeline_side import PipelineSide, ask_pipelines
from prolora.fitting.pipelines.schedules import NoiseSchedule, Times
from prolora.fitting.pipelines.watching import watch_sampling
from prolora.fitting.probes import ORIGINS, Probe
from prolora.fitting.sides import output_of
from prolora.fitting.solver.joint_fit import JointFit, JointProblem, fit_in_factors, fit_jointly
from prolora.fitting.solver.linearisation import ProbeBatch
from prolora.fitting.updates import with_lora
from prolora.fitting.workload import Meter, Workload

STEPS = 3


class FlowSide(probe.FitSide):
    """A model (x, t) -> velocity from images to noise, sampled by Euler's steps."""

    schedule = NoiseSchedule("flow", None, times=Times(1.0, 0.0))

    def __init__(self, model: nn.Module, shape: Sequence[int] = (5, 4)) -> None:
        self.name, self.denoiser, self.shape = type(model).__name__, model, shape

    def sample(self, number: int, prompt: int) -> probe.Image:
        noise = torch.randn(1, *self.shape, generator=torch.Generator().manual_seed(number))
        x, levels = noise, 1 - torch.arange(STEPS).double() / STEPS
        for level in levels:
            v = self.predict(x, level[None], [prompt])
            x = x - self.schedule.sign * v / STEPS
        return probe.Image(x, noise, levels)

    def build_call(
        self, state: Tensor, level: Tensor, prompts: Sequence[int], adapted: bool = False
    ) -> probe.Call:
        return probe.Call((state, self.schedule.time_at(level).float()), {})


class PlainSide(FlowSide):
    """A model of x alone."""

    def build_call(self, state: Tensor, *_: Any) -> probe.Call:
        return probe.Call((state,), {})


def fit_models(
    source: nn.Module | probe.FitSide,
    target: nn.Module | probe.FitSide,
    lora: dict[str, LowRank],
    baseline: dict[str, LowRank] | None = None,
    parts: KeptParts | None = None,
    **options: Any,
) -> probe.Fitted:
    """Fits between two models; `options` are fields of `Asking` and of `FitSettings`."""
    sides = [x if isinstance(x, probe.FitSide) else FlowSide(x) for x in (source, target)]
    asked = {name: options.pop(name) for name in ("guidance", "pairs") if name in options}
    settings = probe.FitSettings(**{"images": 12, "steps": STEPS, "rank": 8} | options)
    asking = probe.Asking(*sides, lora, look=settings.look_of_source, **asked)
    return probe.fit_sides(asking, settings, baseline, parts=parts)


def predict(
    model: nn.Module, *inputs: Tensor | probe.Call, updates: dict[str, LowRank] | None = None
) -> Tensor:
    """What a model predicts of its inputs, or of a call, with updates beside its weights."""
    call = inputs[0] if isinstance(inputs[0], probe.Call) else probe.Call(inputs, {})
    with torch.no_grad(), with_lora(model, updates or {}):
        return output_of(model(*call.args, **call.kwargs))


def teach(
    model: nn.Module, x: Tensor | probe.Call, change: Tensor | Callable[[Tensor], Tensor]
) -> list[ProbeBatch]:
    """One batch, of which a model should predict a change more; perhaps one of its prediction."""
    plain = predict(model, x)
    change = change if isinstance(change, Tensor) else change(plain)
    call = x if isinstance(x, probe.Call) else probe.Call((x,), {})
    return [ProbeBatch(call, plain, plain + change)]


def solve(
    model: nn.Module,
    names: Sequence[str],
    probes: list[ProbeBatch] | Callable[[], list[ProbeBatch]],
    steps: int,
    damping: float = 1.0,
    rank: int = 2,
    start: dict[str, LowRank] | None = None,
    adam: bool = False,
) -> JointFit:
    """Fits modules to the same probes in every step, or to those that a function draws.

    By Gauss–Newton steps alone, or with Adam's in the second half.
    """
    draw = probes if callable(probes) else lambda: probes
    by = fit_in_factors if adam else fit_jointly
    return by(JointProblem(model, names, output_of, draw, steps, damping, rank), start)


def ask_linear(**changes: Any) -> tuple[probe.Asking, LowRank]:
    """A linear target of 6 → 5 with an update, as a fit asks it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False))
    update = LowRank(torch.randn(5, 2), torch.randn(2, 6))
    return probe.Asking(PlainSide(model), PlainSide(model), {"0": update}, **changes), update


def answer_linear(asking: probe.Asking, update: LowRank, apart: float = 0.0) -> list[Probe]:
    """Held-out probes of which the update is right; the bases differ by a share of its change."""
    probes = []
    for i, origin in enumerate(ORIGINS * 2):
        x = torch.randn(20, 6)
        with torch.no_grad():
            plain, change = asking.target.denoiser(x), x @ update.dense().mT
        numbers = tuple(range(20 * i, 20 * i + 20))
        differ = apart * change.std() * torch.randn(20, 5)
        facts = numbers, (0,) * 20, torch.ones(20), x, x, None
        probes.append(Probe(origin, *facts, plain, change, differ))
    return probes


def ask(
    source: Pipeline,
    target: Pipeline,
    settings: probe.FitSettings,
    updates: dict[str, LowRank] | None = None,
    text: dict[str, LowRank] | None = None,
    shared: bool = True,
) -> probe.Asking:
    """Observes two pipelines, and how a LoRA of the first is asked."""
    lora = LoraParts(updates or {}, text or {})
    return ask_pipelines(source, target, settings, lora, shared)[1]


def draw_probes(
    asking: probe.Asking, images: int, count: int, held_out: bool = False, seed: int = 0
) -> list[Probe]:
    """Samples images and asks both models about them, in calls of their own size."""
    meter = Meter(Workload(probe.FitSettings(), 4))
    meter.begin("sample")
    with torch.no_grad():
        drawn = asking.draw_images(seed, images, KeptParts(), meter)
        return list(asking.draw_probes(drawn, count, asking.at_once, seed, held_out))


def watch_calls(side: PipelineSide, prompt: int = 0) -> list[tuple[CallParts, Tensor, Tensor]]:
    """Samples an image: what its model was given and predicted, and what its scheduler was given.

    Of branches that are asked one by one, the last one's call.
    """
    with watch_sampling(side.denoiser, side.pipeline.pipe.scheduler) as seen:
        side.sample(0, prompt)
    last = [(*step.calls[-1], step.given) for step in seen.steps]
    return [
        (replace(parts, time=parts.time.expand(len(parts.latent))), side.read(output), given)
        for parts, output, given in last
    ]
