"""What a fit asks of both models: foreseen, counted while it is done, and the time that is left."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from .recording.recorder import ORIGINS
from .recording.sample_batches import count_samples
from .recording.trajectories import Call
from .settings import FitSettings
from .updates import keep_hooks

STAGES = {"sample": 1.0, "draw": 1.0, "ask": 1.0, "fit": 1.8, "judge": 1.0}
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
    predictions: Mapping[str, Sequence[int]], sizes: tuple[int, int] = (1, 1)
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
        images: images that were sampled; those that were kept are none.
    """

    def __init__(self, workload: Workload) -> None:
        """Takes what is foreseen; its settings have the caller's function."""
        self.workload = workload
        self.seconds: dict[str, float] = {}
        self.predictions: dict[str, list[int]] = {}
        self.images = 0
        self._total = sum(map(sum, workload.predictions.values()))
        self._sizes = 1, 1
        self._stage = ""
        self._began = self._since = time.perf_counter()

    @contextlib.contextmanager
    def watch(self, source: nn.Module, target: nn.Module) -> Iterator[None]:
        """Counts what the models predict in the block."""
        models = source, target
        ours, theirs = (max(sum(p.numel() for p in model.parameters()), 1) for model in models)
        self._sizes = ours, theirs

        def watch_one(i: int, model: nn.Module) -> Any:
            def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
                if self._stage:  # what is observed before is no part of it
                    self.predictions[self._stage][i] += count_samples(Call(args, kwargs))
                if self._stage == "judge":
                    self.tell("judging")

            return model.register_forward_hook(count, with_kwargs=True)

        with keep_hooks(watch_one(i, model) for i, model in enumerate(models)):
            yield

    def begin(self, stage: str) -> None:
        """Ends the stage at work; begins another, or none with ""."""
        now = time.perf_counter()
        if self._stage:
            self.seconds[self._stage] = now - self._since
        if stage:
            self.predictions[stage] = [0, 0]
        self._stage, self._since = stage, now

    def finish(self) -> None:
        """Ends the last stage."""
        self.begin("")
        self.tell("judged")

    def count_image(self, origin: str) -> None:
        """Notes a sampled image of one of ORIGINS."""
        self.images += 1
        self.tell(_IMAGES[origin])

    def tell(self, name: str) -> None:
        """Calls the caller's function, where there is one, with what is done and left."""
        foreseen = self.workload.predictions
        done = every = price_predictions(foreseen, self._sizes)
        if self._stage:
            stages = [*STAGES]
            before = stages[: stages.index(self._stage)]
            done = price_predictions({s: foreseen[s] for s in before if s in foreseen}, self._sizes)
            made = {self._stage: self.predictions[self._stage]}
            most = {self._stage: foreseen.get(self._stage, (0, 0))}
            done += min(price_predictions(both, self._sizes) for both in (made, most))
            if timed := price_predictions(self.predictions, self._sizes):
                left = (time.perf_counter() - self._began) * (every - done) / timed
                name = f"{name}, {write_time(left)} left"
        if self.workload.settings.progress:
            self.workload.settings.progress(int(done / every * self._total), self._total, name)


def write_time(seconds: float) -> str:
    """Writes a duration for people."""
    minutes = seconds / 60
    if minutes < 1.5:
        return f"{max(round(seconds), 1)} s"
    if minutes < 90:
        return f"{minutes:.0f} min"
    return f"{minutes // 60:.0f} h {minutes % 60:.0f} min"
