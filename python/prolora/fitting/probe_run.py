"""What all stages of one probing share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..core.lowrank import LowRank
from .fit_numbers import ProbeReport
from .pipelines.crossing_recorder import CrossingRecorder
from .recording.recorder import Recorder
from .recording.translation import Question
from .recording.wanted import WantedChange, wanted_changes
from .settings import FitSettings
from .workload import WorkMeter


@dataclass(frozen=True)
class ProbeRun:
    """One probing."""

    recorder: Recorder | CrossingRecorder  # both models, the LoRA, and how they are asked
    # Updates of the target that the fit is compared with, and may start from
    rival: Mapping[str, LowRank]
    settings: FitSettings  # of the fit, with all numbers set
    key: str  # hash of the models, the LoRA and the samplers; part of the keys of what is kept
    report: ProbeReport  # filled in by the stages
    meter: WorkMeter  # is told how far they are
    release: Callable[[], None]  # called once everything was asked: now the target alone runs
    samples: int | None = None  # in a batch of the fit; None: as in the samplers' calls

    def wanted_changes(self, questions: Sequence[Question]) -> Iterator[WantedChange]:
        """Asks both models, and yields what the target should do at each question."""
        recorder = self.recorder
        updates, translation = recorder.adapter.updates, recorder.translation
        models, look = (recorder.source, recorder.target), self.settings.look_of_source
        return wanted_changes(*models, updates, questions, translation, look)
