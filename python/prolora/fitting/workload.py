"""The work of a fit, foreseen and done."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from .settings import FitSettings

STAGES = {"sample": 1.0, "ask": 1.0, "fit": 1.8, "judge": 1.0}
"""Stage -> what a prediction in it costs, compared with one alone: steps of a fit go back, too."""
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
    def _sampled(self) -> tuple[int, int]:
        steps = self.settings.steps, self.target_steps
        ours, theirs = (
            b * n * s for b, n, s in zip(self.branches, self.images, steps, strict=True)
        )
        return ours, theirs

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
    def total(self) -> int:
        """Predictions of both models."""
        return sum(map(sum, self.predictions.values()))

    def price(self, stage: str) -> float:
        """Prices a stage in single predictions."""
        return STAGES[stage] * sum(self.predictions[stage])

    @property
    def as_images(self) -> int:
        """The source's images in the time of it all, at equal speeds."""
        every = sum(map(self.price, STAGES))
        return math.ceil(every / (self.settings.steps * self.branches[0]))

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


class Meter:
    """One bar over all stages, with the time that is left.

    Attributes:
        seconds: wall time by stage.
    """

    def __init__(
        self, workload: Workload, on_advance: Callable[[float], None] = lambda share: None
    ) -> None:
        """Takes what is foreseen; `on_advance` with the share of a stage."""
        self.workload, self._on_advance = workload, on_advance
        self.seconds: dict[str, float] = {}
        self._parts = dict.fromkeys(STAGES, 0.0)
        self._skipped = 0.0
        self._stage = ""
        self._began = self._since = time.perf_counter()

    def begin(self, stage: str) -> None:
        """Ends the stage at work; begins another, or none with ""."""
        now = time.perf_counter()
        if self._stage:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
            self._parts[self._stage] = 1.0
        self._stage, self._since = stage, now
        if not stage:
            self._report("done", left=False)

    def advance(self, share: float, name: str, kept: bool = False) -> None:
        """Notes that a share of the stage at work is done; `kept` says that it took no time."""
        share = min(share, 1 - self._parts[self._stage])
        self._parts[self._stage] += share
        if kept:
            self._skipped += share * self.workload.price(self._stage)
        self._report(name, left=not kept)
        self._on_advance(self._parts[self._stage])

    def _report(self, name: str, left: bool) -> None:
        progress, workload = self.workload.settings.progress, self.workload
        if progress is None:
            return
        every = sum(map(workload.price, STAGES))
        done = sum(self._parts[stage] * workload.price(stage) for stage in STAGES)
        if left and done > self._skipped:
            seconds = time.perf_counter() - self._began
            name += f", {write_time(seconds * (every - done) / (done - self._skipped))} left"
        progress(int(done / every * workload.total), workload.total, name)


def write_time(seconds: float) -> str:
    """Writes a duration for people."""
    minutes = seconds / 60
    if minutes < 1.5:
        return f"{max(round(seconds), 1)} s"
    if minutes < 90:
        return f"{minutes:.0f} min"
    return f"{minutes // 60:.0f} h {minutes % 60:.0f} min"
