"""What a fit asks of both models: foreseen, counted while it is done, and the time that is left."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from .recording.recorder import ORIGINS
from .recording.sample_batches import count_samples
from .recording.trajectories import Call
from .settings import FitSettings
from .updates import keep_hooks

SHOW = "show"
"""The stage in which images are drawn for a page."""
STAGES = {"sample": 1.0, "draw": 1.0, "ask": 1.0, SHOW: 1.0, "fit": 1.8, "judge": 1.0}
"""Stage -> what a prediction in it costs, compared with one alone: steps of a fit go back, too."""
_IMAGES = {
    "source": "sampling the source",
    "adapted": "sampling it with the LoRA",
    "target": "sampling the target",
}
_FORWARD = 3.25
"""Predictions of a sample in a step of the fit: two trials, and every fourth step one more. Two of
Adam's steps make fewer, and take as long."""
_STRENGTHS = 5
"""Predictions of a held-out sample in the verdict: some strengths of the fit and of its rival."""


@dataclass(frozen=True)
class Workload:
    """What settings ask for, before anything is known of earlier runs."""

    settings: FitSettings  # of the fit
    target_steps: int  # of the target's sampler
    # Predictions that the source and the target make in a step of their samplers: two with
    # guidance.
    branches: tuple[int, int] = (2, 2)

    @property
    def images(self) -> tuple[int, int]:
        """Images of the source, with the LoRA and without, and of the target."""
        return 4 * self.settings.images, 2 * self.settings.images

    @cached_property
    def sized(self) -> FitSettings:
        """The settings with the numbers of samples."""
        return self.settings.sized(sum(self._sampled))

    @cached_property
    def steps(self) -> dict[str, int]:
        """Steps of each sampler."""
        steps = self.settings.steps, self.settings.steps, self.target_steps
        return dict(zip(ORIGINS, steps, strict=True))

    @cached_property
    def _sampled(self) -> tuple[int, int]:
        ours, theirs = (count * n for count, n in zip(self.branches, self.images, strict=True))
        source = (self.steps["source"] + self.steps["adapted"]) * ours // 2
        return source, self.steps["target"] * theirs

    @cached_property
    def predictions(self) -> dict[str, tuple[int, int]]:
        """Stage -> samples that the source and the target predict."""
        sized = self.sized
        assert sized.probes and sized.held_out and sized.batch
        asked = sized.probes + sized.held_out
        return {
            "sample": self._sampled,
            "ask": (2 * asked, asked),
            "fit": (0, int(_FORWARD * sized.fit_steps * sized.batch)),
            "judge": (0, _STRENGTHS * sized.held_out),
        }

    @property
    def as_images(self) -> int:
        """The source's images in the time of it all, at equal speeds."""
        cost = price_predictions(self.predictions)
        return math.ceil(cost / (self.steps["source"] * self.branches[0]))

    def sentence(self, source: str, target: str) -> str:
        """Describes what is about to be done; arguments are the models' names."""
        ours, theirs = (sum(part) for part in zip(*self.predictions.values(), strict=True))
        settings = self.sized
        assert settings.probes and settings.held_out
        return (
            f"{sum(self.images)} images are sampled, {self.images[0]} of them by {source}; both "
            f"models are asked about {settings.probes + settings.held_out:,} states, and the fit "
            f"takes {settings.fit_steps} steps: at most about {ours:,} predictions of {source} and "
            f"{theirs:,} of {target}, or as long as drawing {self.as_images:,} images takes."
        )


def price_predictions(
    predictions: Mapping[str, tuple[int, int]], sizes: tuple[int, int] = (1, 1)
) -> float:
    """Prices all stages in predictions of a model of size 1."""
    return sum(
        STAGES[stage] * made * size
        for stage, both in predictions.items()
        for made, size in zip(both, sizes, strict=True)
    )


class WorkMeter:
    """A counter of predicted samples, and what is left of all stages.

    Progress is told in the predictions that were foreseen, each stage weighted by what one costs in
    it, with the time that is left at the speed so far.

    Attributes:
        seconds: wall time by stage.
        predictions: stage -> samples that the source and the target predicted.
    """

    def __init__(self, workload: Workload) -> None:
        """Takes what is foreseen; its settings have the caller's function."""
        self.workload = workload
        self.seconds: dict[str, float] = {}
        self.predictions: dict[str, tuple[int, int]] = {}
        self._total = sum(map(sum, workload.predictions.values()))
        self._sizes = 1, 1
        self._stage, self._made = "", [0, 0]
        self._drawn = dict.fromkeys(ORIGINS, 0)
        self._done = self._skipped = 0.0  # shares of all; what was kept takes no time
        self._began = self._since = time.perf_counter()

    @contextlib.contextmanager
    def watch(self, source: nn.Module, target: nn.Module) -> Iterator[None]:
        """Counts what the models predict in the block."""
        models = source, target
        ours, theirs = (max(sum(p.numel() for p in model.parameters()), 1) for model in models)
        self._sizes = ours, theirs

        def watch_one(i: int, model: nn.Module) -> Any:
            def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
                self._made[i] += count_samples(Call(args, kwargs))
                if self._stage == "judge":
                    foreseen = max(self.workload.predictions["judge"][1], 1)
                    self.reach(min(self._made[1] / foreseen, 0.95), "judging")

            return model.register_forward_hook(count, with_kwargs=True)

        with keep_hooks(watch_one(i, model) for i, model in enumerate(models)):
            yield

    def settle(self, settings: FitSettings) -> None:
        """Takes the numbers of samples, once they are known."""
        self.workload = replace(self.workload, settings=settings)

    def begin(self, stage: str) -> None:
        """Ends the stage at work; begins another, or none with ""."""
        now = time.perf_counter()
        if self._stage:
            ours, theirs = self.predictions.get(self._stage, (0, 0))
            self.predictions[self._stage] = ours + self._made[0], theirs + self._made[1]
            before = self.seconds.get(self._stage, 0.0)
            self.seconds[self._stage] = before + now - self._since
        self._stage, self._since, self._made = stage, now, [0, 0]
        if stage in self.workload.predictions:
            share = self._share_done(0)
            self._skipped += max(share - self._done, 0)
            self._done = max(share, self._done)

    def finish(self) -> None:
        """Ends the last stage."""
        self.begin("")
        self._tell(1.0, "judged")

    def count_image(self, origin: str) -> None:
        """Notes a sampled image of one of ORIGINS; those that were kept are none."""
        self._drawn[origin] += 1
        costs = {
            one: steps * self._sizes[one == "target"] for one, steps in self.workload.steps.items()
        }
        drawn = sum(cost * self._drawn[one] for one, cost in costs.items())
        share = drawn / (2 * self.workload.settings.images * sum(costs.values()))
        self.reach(share, _IMAGES[origin])

    def reach(self, share: float, name: str) -> None:
        """Notes how much of the stage is done."""
        self._tell(self._share_done(share), name)

    def _share_done(self, share: float) -> float:
        """Returns the share of all stages, where this one has reached a share."""
        foreseen, stages = self.workload.predictions, [*STAGES]
        before = stages[: stages.index(self._stage)]
        done = price_predictions({s: foreseen[s] for s in before if s in foreseen}, self._sizes)
        now = {s: foreseen[s] for s in (self._stage,) if s in foreseen}
        done += share * price_predictions(now, self._sizes)
        return done / price_predictions(foreseen, self._sizes)

    def _tell(self, done: float, name: str) -> None:
        """Calls the caller's function, where there is one."""
        self._done = max(done, self._done)
        timed = self._done - self._skipped
        if self._stage and timed > 0:
            left = (time.perf_counter() - self._began) * (1 - self._done) / timed
            name = f"{name}, {write_time(left)} left"
        if self.workload.settings.progress:
            self.workload.settings.progress(int(self._done * self._total), self._total, name)


def write_time(seconds: float) -> str:
    """Writes a duration for people."""
    minutes = seconds / 60
    if minutes < 1.5:
        return f"{max(round(seconds), 1)} s"
    if minutes < 90:
        return f"{minutes:.0f} min"
    return f"{minutes // 60:.0f} h {minutes % 60:.0f} min"
