"""What all stages of one probing share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from ..adapters.adapter import Adapter
from ..core.lowrank import LowRank
from .checkpoint import Checkpoints
from .fit_numbers import ProbeReport
from .recording.translation import Translation
from .settings import FitSettings
from .workload import WorkMeter


@dataclass(frozen=True)
class ProbeRun:
    """One probing."""

    source: nn.Module  # the source model, without its LoRA
    target: nn.Module  # the target model, without updates
    adapter: Adapter  # the LoRA of the source
    translation: Translation  # turns the source's calls and predictions into the target's
    # Updates of the target that the fit is compared with, and may start from
    rival: Mapping[str, LowRank]
    settings: FitSettings  # of the fit, with all numbers set
    checkpoints: Checkpoints  # where fitted updates are kept
    key: str  # hash of the models, the LoRA and the samplers; part of the keys of what is kept
    report: ProbeReport  # filled in by the stages
    meter: WorkMeter  # is told how far they are
    # Called once everything was asked; from then on the target alone runs
    release: Callable[[], None] | None = None
    samples: int | None = None  # in a batch of the fit; None: as in the samplers' calls
