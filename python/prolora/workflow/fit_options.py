"""The choices of a fit: what is sampled and fitted (`FitSettings`), and what is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from os import PathLike
from typing import Literal, get_args

from ..comparison.module_map import Match
from ..core.methods import MethodChoice
from ..core.option_fields import option, take_option
from ..core.validation import DeviceLike
from ..files.sizes import parse_limit
from ..probe.settings import FITTING, FitSettings, Precision, Start
from .options import BaseChanges, DtypeLike, FileChanges, FormatLike, TransferOptions, check_choice

PassedOn = Literal["copy", "skip"]
"""What may become of a LoRA's text-encoder part where the models are run."""


@dataclass(frozen=True, kw_only=True)
class FitOptions(FitSettings):
    """How a LoRA is fitted to a running target; `fit` takes each of these by its name."""

    text_encoder: PassedOn = take_option(
        TransferOptions,
        "text_encoder",
        help='The LoRA\'s text-encoder part: "copy" it where the target has the same encoder, or '
        '"skip" it. It is not fitted.',
        panel=FITTING,
        words=get_args(PassedOn),
    )
    match: Match = take_option(
        TransferOptions,
        "match",
        help="How modules are paired for the LoRA moved by weights alone, which the fit is "
        "compared with and may start from; as in a transfer.",
        panel=FITTING,
    )
    again: bool = take_option(TransferOptions, "again", panel=FITTING)
    min_coverage: float = take_option(TransferOptions, "min_coverage", panel=FITTING)
    format: FormatLike | None = take_option(TransferOptions, "format", basic=False)
    dtype: DtypeLike | None = take_option(TransferOptions, "dtype")
    overwrite: bool = take_option(TransferOptions, "overwrite")
    cache: str | PathLike[str] | None = take_option(TransferOptions, "cache")
    device: DeviceLike = take_option(TransferOptions, "device")
    max_vram: int | str | None = option(
        None,
        'Memory of the card that may be taken, as "12GB". Where it is too little, the fit computes '
        "in 16 bits, decodes in tiles, takes smaller batches, and at last brings blocks from the "
        "machine's memory one by one. Refused where that does not do. For pipelines in folders; "
        "models at hand refuse it.",
        panel=FITTING,
        metavar="SIZE",
        basic=True,
    )

    def __post_init__(self) -> None:
        """Refuses values that no fit can use, before anything is read.

        Raises:
            InvalidOption: names the option and what it takes.
            UnsupportedDevice: there is no such device, or it cannot be used.
        """
        super().__post_init__()
        self.card_limit  # noqa: B018 (raises where it is no size)
        check_choice("text_encoder", self.text_encoder, get_args(PassedOn))
        moving = self.as_moved("auto")
        object.__setattr__(self, "dtype", moving.dtype)
        object.__setattr__(self, "device", moving.device)

    @property
    def card_limit(self) -> int | None:
        """`max_vram` in bytes."""
        return parse_limit(self.max_vram, "max_vram")

    def as_moved(self, method: MethodChoice) -> TransferOptions:
        """Returns the options for moving by weights alone, for comparison."""
        return TransferOptions(
            method=method,
            text_encoder=self.text_encoder,
            match=self.match,
            again=True,  # the bases were looked at before
            min_coverage=self.min_coverage,
            format=self.format,
            dtype=self.dtype,
            cache=self.cache,
            device=self.device,
            max_memory=self.max_memory,
        )

    def for_file(self) -> FitOptions:
        """Returns the options for a file: by default the LoRA's own format."""
        return self if self.format is not None else replace(self, format="auto")


class FitChanges(FileChanges, BaseChanges, total=False):
    """The fields of `FitOptions` as keywords, for type checkers; a test compares the two."""

    prompts: tuple[str, ...]
    images: int
    steps: int
    size: int | None
    guidance: float | None
    target_steps: int | None
    target_guidance: float | None
    lora_steps: int | None
    lora_guidance: float | None
    rank: float | None
    start: Start
    fit_steps: int
    probes: int | None
    held_out: int | None
    batch: int | None
    curvature_damping: float
    seed: int
    precision: Precision
    force: bool
    resume: str | PathLike[str] | None
    shown_prompts: int
    text_encoder: PassedOn
    match: Match
    again: bool
    min_coverage: float
    max_vram: int | str | None


DEFAULT_FIT = FitOptions()
