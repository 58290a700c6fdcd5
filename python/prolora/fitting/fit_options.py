"""The choices of a fit: what is sampled and fitted (`FitSettings`), and what is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ..comparison.module_map import Match
from ..core.methods import MethodChoice
from ..core.option_fields import option, take_option
from ..files.sizes import parse_limit
from ..moving.options import BaseResources, FileOutput, TransferOptions
from .settings import FITTING, FitSettings

PassedOn = Literal["copy", "skip"]
"""What may become of a LoRA's text-encoder part where the models are run."""


@dataclass(frozen=True, kw_only=True)
class FitOptions(FileOutput, BaseResources, FitSettings):
    """How a LoRA is fitted to a running target; `fit` takes each of these by its name."""

    text_encoder: PassedOn = take_option(
        TransferOptions,
        "text_encoder",
        help='The LoRA\'s text-encoder part: "copy" it where the target has the same encoder, or '
        '"skip" it. It is not fitted.',
        panel="",
        words=get_args(PassedOn),
    )
    match: Match = take_option(
        TransferOptions,
        "match",
        help="How modules are paired for the LoRA moved by weights alone, which the fit is "
        "compared with and may start from; as in a transfer.",
        panel="",
    )
    again: bool = take_option(TransferOptions, "again", panel=FITTING)
    max_memory: int | str | None = take_option(FitSettings, "max_memory")
    max_vram: int | str | None = option(
        None,
        'Memory of the card that may be taken, as "12GB". Where it is too little, the fit computes '
        "in 16 bits, decodes in tiles, takes smaller batches, and at last brings blocks from the "
        "machine's memory one by one. Refused where that does not do. For pipelines in folders; "
        "models at hand refuse it.",
        panel=FITTING,
        metavar="SIZE",
    )

    def __post_init__(self) -> None:
        """Refuses values that no fit can use, before anything is read.

        Raises:
            InvalidOption: names the option and what it takes.
            UnsupportedDevice: there is no such device, or it cannot be used.
        """
        FitSettings.__post_init__(self)
        super().__post_init__()
        self.card_limit  # noqa: B018 (raises where it is no size)
        self.as_moved("auto")

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
            format=self.format,
            dtype=self.dtype,
            cache=self.cache,
            device=self.device,
            max_memory=self.max_memory,
        )


DEFAULT_FIT = FitOptions()
