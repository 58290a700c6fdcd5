"""What all stages of one probing share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from ..adapters.adapter import Adapter
from ..core.lowrank import LowRank
from .checkpoint import Checkpoints
from .recording.translation import Translation
from .report import ProbeReport
from .settings import FitSettings
from .workload import WorkMeter


@dataclass(frozen=True)
class ProbeRun:
    """One probing.

    Attributes:
        source: the source model, without its LoRA.
        target: the target model, without updates.
        adapter: the LoRA of the source.
        translation: turns calls and predictions of one model into those of the other.
        rival: updates of the target that the fit is compared with, and may start from.
        settings: of the fit, with all numbers set.
        checkpoints: where fitted updates are kept.
        key: hash of the models, the LoRA and the samplers; part of the keys of what is kept.
        report: filled in by the stages.
        meter: is told how far they are.
        release: called once everything was asked; from then on the target alone runs.
        most: largest number of samples in a batch of the fit; None: as in the samplers' calls.
    """

    source: nn.Module
    target: nn.Module
    adapter: Adapter
    translation: Translation
    rival: Mapping[str, LowRank]
    settings: FitSettings
    checkpoints: Checkpoints
    key: str
    report: ProbeReport
    meter: WorkMeter
    release: Callable[[], None] | None = None
    most: int | None = None
