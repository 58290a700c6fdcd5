"""The choices of an advice: what is looked at, and with what."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike

from ..bases.base import Progress
from ..comparison.module_map import Match
from ..core.option_fields import option, take_option
from ..core.rank_rule import Rank
from ..core.validation import DeviceLike
from ..probe.recording.trajectories import Sample
from ..probe.settings import FitSettings
from .options import BaseChanges, TransferOptions


@dataclass(frozen=True, kw_only=True)
class AdviceOptions:
    """What is looked at, and with what; `advise` takes each of these by its name."""

    match: Match = take_option(TransferOptions, "match")
    overlap: Rank | None = option(
        None,
        "Also compare the leading subspaces of the weights: so many columns of them (320), or the "
        "share of energy that they hold (0.99).",
        metavar="RANK",
    )
    measure: bool | FitSettings = option(
        False,
        "Run both models on a few trajectories of their own and measure what the moved LoRA "
        "reaches there: True, or the settings of what is sampled.",
    )
    samplers: tuple[Sample, Sample] | None = option(
        None,
        "Of source and target, where these are modules at hand: each runs a sampler from noise "
        "with a given seed.",
    )
    cache: str | PathLike[str] | None = take_option(TransferOptions, "cache")
    device: DeviceLike = take_option(TransferOptions, "device")
    max_memory: int | str | None = take_option(TransferOptions, "max_memory")
    progress: Progress | None = take_option(TransferOptions, "progress")

    def __post_init__(self) -> None:
        """Refuses values that no advice can use, before anything is read.

        Raises:
            InvalidOption: names the option and what it takes.
            UnsupportedDevice: there is no such device, or it cannot be used.
        """
        object.__setattr__(self, "device", self.as_moved().device)

    def as_moved(self) -> TransferOptions:
        """The options of the transfer that is asked about."""
        names = ("match", "cache", "device", "max_memory", "progress")
        return TransferOptions(**{name: getattr(self, name) for name in names})


class AdviceChanges(BaseChanges, total=False):
    """The fields of `AdviceOptions` as keywords, for type checkers; a test compares the two."""

    match: Match
    overlap: Rank | None
    measure: bool | FitSettings
    samplers: tuple[Sample, Sample] | None


DEFAULT_ADVICE = AdviceOptions()
