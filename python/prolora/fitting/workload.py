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

from .hooks import keep_hooks
from .recording.recorder import ORIGINS
from .recording.sample_batches import count_samples
from .recording.trajectories import Call
from .settings import FitSettings

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


def price_predictions(predictions: Mapping[str, tuple[int, int]]) -> float:
    """Prices all stages in predictions."""
    return sum(STAGES[stage] * sum(predicted) for stage, predicted in predictions.items())


class WorkMeter:
    """A counter of predicted samples that reports progress and time left.

    Progress is told as predictions done of all that were foreseen, weighted by the time that they
    are measured to take, over all stages. The name says what is done, and the time that is left as
    soon as a few predictions were timed.

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
        self._told = 0.0
        self._sizes = 1, 1
        self._stage, self._reached = "", 0.0
        self._began = self._since = self._tick = time.perf_counter()
        self._made = [0, 0]
        self._costs: list[tuple[float, int]] = [(0.0, 0), (0.0, 0)]
        self._rates: tuple[float, float] | None = None
        self._slot = self._drawn = 0

    @contextlib.contextmanager
    def watch(self, source: nn.Module, target: nn.Module) -> Iterator[None]:
        """Counts what the models predict in the block."""
        sizes = [sum(p.numel() for p in model.parameters()) for model in (source, target)]
        self._sizes = max(sizes[0], 1), max(sizes[1], 1)

        def watch_one(i: int, model: nn.Module) -> Any:
            def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
                self._made[i] += count_samples(Call(args, kwargs))
                if self._stage == "judge":
                    done = self._made[1] / max(self.workload.predictions["judge"][1], 1)
                    self.reach(min(done, 0.95), "judging")

            return model.register_forward_hook(count, with_kwargs=True)

        with keep_hooks(watch_one(i, model) for i, model in enumerate((source, target))):
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
        self._stage, self._since, self._tick, self._made, self._reached = stage, now, now, [0, 0], 0

    def finish(self) -> None:
        """Ends the last stage."""
        self.begin("")
        self._tell(1.0, "judged")

    def count_image(self, origin: str) -> None:
        """Notes a sampled image of one of ORIGINS; those before it that were kept are none."""
        i = int(origin == "target")
        now, made = time.perf_counter(), sum(self._made) - sum(n for _, n in self._costs)
        seconds, known = self._costs[i]
        if not known:
            branches = list(self.workload.branches)
            branches[i] = max(round(made / self.workload.steps[origin]), 1)
            self.workload = replace(self.workload, branches=(branches[0], branches[1]))
        self._costs[i], self._tick = (seconds + now - self._tick, known + made), now
        images = self.workload.settings.images
        if self._drawn == images or ORIGINS[self._slot % 3] != origin:
            self._drawn = 0
            self._slot += 1
            while ORIGINS[self._slot % 3] != origin:
                self._slot += 1
        self._drawn += 1
        self._tell(None, _IMAGES[origin])

    def reach(self, share: float, name: str) -> None:
        """Notes how much of the stage is done."""
        self._reached = share
        self._tell(None, name)

    def _tell(self, done: float | None, name: str) -> None:
        """Calls the caller's function, where there is one."""
        progress = self.workload.settings.progress
        if progress is None:
            return
        left = self._estimate_left()
        if done is None and left is not None:
            elapsed = time.perf_counter() - self._began
            done = elapsed / max(elapsed + left, 1e-9)
        self._told = max(self._told, done or 0.0)
        if left is not None and self._stage:
            name = f"{name}, {write_time(left)} left"
        progress(int(self._told * self._total), self._total, name)

    def _estimate_left(self) -> float | None:
        """Seconds until the end; None as long as nothing was timed."""
        rates = self._rates = self._estimate_rates() or self._rates
        if rates is None:
            return None
        stages, foreseen = list(STAGES), self.workload.predictions
        later = stages[stages.index(self._stage) + 1 :] if self._stage else []
        left = sum(
            self._price(foreseen[stage], stage, rates) for stage in later if stage in foreseen
        )
        if self._stage == "sample":
            return left + self._price(self._count_left(), "sample", rates)
        if not self._stage or self._stage not in foreseen:
            return left
        if self._reached > 0:
            spent = time.perf_counter() - self._since
            return left + spent * (1 - self._reached) / self._reached
        return left + self._price(foreseen[self._stage], self._stage, rates)

    def _price(self, made: tuple[float, float], stage: str, rates: tuple[float, float]) -> float:
        return STAGES[stage] * (made[0] * rates[0] + made[1] * rates[1])

    def _count_left(self) -> tuple[float, float]:
        """Predictions of both models in the samplings that are left."""
        images, foreseen = self.workload.settings.images, self.workload.predictions["sample"]
        left = [0, 0]
        for slot in range(self._slot, 2 * len(ORIGINS)):
            count = images - (self._drawn if slot == self._slot else 0)
            left[int(ORIGINS[slot % 3] == "target")] += count
        ours, theirs = (n / m for n, m in zip(foreseen, self.workload.images, strict=True))
        return left[0] * ours, left[1] * theirs

    def _estimate_rates(self) -> tuple[float, float] | None:
        """Seconds of a prediction of the source and of the target.

        One that was not timed yet counts by its size. Where all samplings were kept, both are of
        what is asked.
        """
        rates = [seconds / made if made else None for seconds, made in self._costs]
        if rates == [None, None] and self._stage == "ask" and self._reached > 0:
            ours, theirs = self.workload.predictions["ask"]
            spent = (time.perf_counter() - self._since) / self._reached
            parts = ours * self._sizes[0] + theirs * self._sizes[1]
            return spent * self._sizes[0] / parts, spent * self._sizes[1] / parts
        scale = self._sizes[1] / self._sizes[0]
        if rates[0] is None:
            return None if rates[1] is None else (rates[1] / scale, rates[1])
        return rates[0], rates[0] * scale if rates[1] is None else rates[1]


def write_time(seconds: float) -> str:
    """Writes a duration for people."""
    minutes = seconds / 60
    if minutes < 1.5:
        return f"{max(round(seconds), 1)} s"
    if minutes < 90:
        return f"{minutes:.0f} min"
    return f"{minutes // 60:.0f} h {minutes % 60:.0f} min"
