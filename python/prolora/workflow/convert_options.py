"""The choices of a conversion, all shared with a transfer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..bases.base import Progress
from ..core.option_fields import take_option
from .block_weights import Blocks
from .options import OUTPUT, DtypeLike, FormatLike, MadeChanges, TransferOptions, VectorsMode
from .out_rank import OutRank


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """How a LoRA is converted; `convert` takes each of these by its name."""

    format: FormatLike | None = take_option(TransferOptions, "format")
    dtype: DtypeLike | None = take_option(TransferOptions, "dtype", basic=True)
    out_rank: OutRank = take_option(
        TransferOptions,
        "out_rank",
        help="Rank of the output: a number, a share of an update's energy (0.99), a share of the "
        "LoRA's own rank (50%), what fits a file of a size (100MB, spent where it keeps the most "
        'energy), or "exact".',
        basic=True,
    )
    blocks: Blocks | None = take_option(TransferOptions, "blocks", panel=OUTPUT)
    vectors: VectorsMode = take_option(TransferOptions, "vectors", panel=OUTPUT)
    overwrite: bool = take_option(TransferOptions, "overwrite")
    progress: Progress | None = take_option(TransferOptions, "progress")

    def __post_init__(self) -> None:
        """Refuses values that no conversion can use, before anything is read.

        Raises:
            InvalidOption: names the option and what it takes.
        """
        known = self.as_transfer()
        for name in ("out_rank", "dtype"):
            object.__setattr__(self, name, getattr(known, name))

    def as_transfer(self) -> TransferOptions:
        """Returns the options of a transfer that writes the same."""
        return TransferOptions(
            format=self.format,
            dtype=self.dtype,
            out_rank=self.out_rank,
            blocks=self.blocks,
            vectors=self.vectors,
        )

    def for_file(self) -> ConvertOptions:
        """Returns the options for a file: by default the LoRA's own format."""
        return self if self.format is not None else replace(self, format="auto")


class ConvertChanges(MadeChanges, total=False):
    """The fields of `ConvertOptions` as keywords, for type checkers; a test compares the two."""

    blocks: Blocks | None
    progress: Progress | None


DEFAULT_CONVERSION = ConvertOptions()
