"""The choices of an extraction; those that a transfer has too are taken from there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..bases.base import Progress
from ..core.option_fields import take_option
from ..core.validation import DeviceLike
from ..errors import InvalidOption
from ..files.sizes import parse_limit
from .options import (
    OUTPUT,
    DtypeLike,
    FormatLike,
    MadeChanges,
    ResourceChanges,
    TransferOptions,
    VectorsMode,
    read_dtype,
)
from .out_rank import OutRank, parse_size_limit

DEFAULT_EXTRACTED_RANK = 64
RESOURCES = "Resources"


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """How a LoRA is extracted; `extract` takes each of these by its name."""

    out_rank: OutRank = take_option(
        TransferOptions,
        "out_rank",
        DEFAULT_EXTRACTED_RANK,
        help="Rank of the LoRA: a number, a share of the difference's energy in every module "
        "(0.9), or what fits a file of a size (100MB, spent where it keeps the most energy).",
        basic=True,
    )
    vectors: VectorsMode = take_option(
        TransferOptions,
        "vectors",
        help='Differences of biases and normalisation layers: "copy" them where the format holds '
        'them, or "skip" them.',
        panel=OUTPUT,
    )
    format: FormatLike | None = take_option(
        TransferOptions,
        "format",
        help="Format of the output, or the program that will read it. Default: kohya for UNets, "
        "ComfyUI's for transformers.",
    )
    dtype: DtypeLike | None = take_option(
        TransferOptions, "dtype", help="Type of the factors in the file. Default: float16."
    )
    overwrite: bool = take_option(TransferOptions, "overwrite")
    device: DeviceLike = take_option(TransferOptions, "device", panel=RESOURCES)
    max_memory: int | str | None = take_option(TransferOptions, "max_memory", panel=RESOURCES)
    progress: Progress | None = take_option(TransferOptions, "progress")

    def __post_init__(self) -> None:
        """Refuses values that no extraction can use, before anything is read.

        Raises:
            InvalidOption: names the option and what it takes.
            UnsupportedDevice: there is no such device, or it cannot be used.
        """
        known = TransferOptions(
            out_rank=self.out_rank,
            vectors=self.vectors,
            format=self.format,
            dtype=self.dtype,
            device=self.device,
            max_memory=self.max_memory,
        )
        if isinstance(known.out_rank, str) and self.size_limit is None:
            raise InvalidOption(
                "`out_rank` of an extraction is a number, a share of energy between 0 and 1, or "
                f'the size of a file such as "100MB", not {self.out_rank!r}'
            )
        for name in ("out_rank", "dtype", "device"):
            object.__setattr__(self, name, getattr(known, name))

    @property
    def size_limit(self) -> int | None:
        """Bytes that the file may take; None where the rank is asked for otherwise."""
        return parse_size_limit(self.out_rank)

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of the factors in the file."""
        return read_dtype(self.dtype) or torch.float16

    @property
    def memory_limit(self) -> int | None:
        """`max_memory` in bytes."""
        return parse_limit(self.max_memory)


class ExtractChanges(MadeChanges, ResourceChanges, total=False):
    """The fields of `ExtractOptions` as keywords, for type checkers; a test compares the two."""


DEFAULT_EXTRACTION = ExtractOptions()
