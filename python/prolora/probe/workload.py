"""What a fit asks of both models, counted while it is done."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from torch import nn

from .hooks import keep_hooks
from .recording.batches import count_samples
from .recording.trajectories import Call
from .report import ProbeReport


class WorkMeter:
    """Counts the samples that source and target predict, and takes the time, stage by stage."""

    def __init__(self, report: ProbeReport) -> None:
        """Takes the report that gets the numbers."""
        self.report = report
        self._stage = ""
        self._since = time.perf_counter()
        self._made = [0, 0]

    @contextlib.contextmanager
    def watch(self, source: nn.Module, target: nn.Module) -> Iterator[None]:
        """Counts what the models predict in the block."""

        def watch_one(i: int, model: nn.Module) -> Any:
            def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
                self._made[i] += count_samples(Call(args, kwargs))

            return model.register_forward_hook(count, with_kwargs=True)

        with keep_hooks(watch_one(i, model) for i, model in enumerate((source, target))):
            yield

    def begin(self, stage: str) -> None:
        """Ends the stage at work, whose time and predictions the report gets; begins another."""
        now, report = time.perf_counter(), self.report
        if self._stage:
            ours, theirs = report.predictions.get(self._stage, (0, 0))
            made = ours + self._made[0], theirs + self._made[1]
            report.predictions[self._stage] = made
            before = report.seconds.get(self._stage, 0.0)
            report.seconds[self._stage] = before + now - self._since
        self._stage, self._since, self._made = stage, now, [0, 0]
