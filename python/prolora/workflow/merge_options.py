"""The choices of a merge; those that a transfer has too are taken from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Literal, get_args

from ..bases.base import Progress
from ..core.option_fields import option, take_option
from ..core.validation import DeviceLike
from ..errors import InvalidOption
from .block_weights import Blocks, BlockWeights
from .options import (
    LARGEST_STRENGTH,
    METHOD,
    OUTPUT,
    BaseChanges,
    DtypeLike,
    FormatLike,
    MadeChanges,
    TransferOptions,
    VectorsMode,
    check_choice,
)
from .out_rank import OutRank

MergeMethod = Literal["sum", "balanced"]
MERGE_METHODS: tuple[str, ...] = get_args(MergeMethod)


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """How LoRAs are merged; `merge` takes each of these by its name."""

    method: MergeMethod = option(
        "sum",
        'How the updates of a module become one. "sum": what loading all LoRAs does; "balanced": '
        "the same, but what several of them do alike is done once.",
        panel=METHOD,
        basic=True,
        words=MERGE_METHODS,
    )
    strengths: Sequence[float] | None = option(
        None,
        "Factor on each LoRA, in their order, as 1,0.6. Default: 1 for all.",
        panel=METHOD,
        metavar="FACTOR,…",
        basic=True,
    )
    blocks: str | Sequence[Blocks | None] | None = take_option(
        TransferOptions,
        "blocks",
        help="Factors by block on each LoRA, in their order and with ; between the LoRAs: a number "
        'for each block in depth order, or names with numbers ("IN04-IN08=0.5; OUT*=0"). Nothing '
        "before or after a ; leaves that LoRA as it is.",
    )
    out_rank: OutRank = take_option(
        TransferOptions,
        "out_rank",
        help="Rank of the output: a number, a share of an update's energy (0.99), a share of the "
        "LoRAs' ranks together (50%), what fits a file of a size (100MB, spent where it keeps the "
        'most energy), or "exact" (as high as theirs together).',
        basic=True,
    )
    vectors: VectorsMode = take_option(TransferOptions, "vectors", panel=OUTPUT)
    format: FormatLike | None = take_option(
        TransferOptions,
        "format",
        help="Format of the output, or the program that will read it. Default: the first LoRA's.",
    )
    dtype: DtypeLike | None = take_option(
        TransferOptions,
        "dtype",
        help="Type of the factors in the file. Default: the LoRAs', the wider of several.",
    )
    overwrite: bool = take_option(TransferOptions, "overwrite")
    cache: str | PathLike[str] | None = take_option(TransferOptions, "cache")
    device: DeviceLike = take_option(TransferOptions, "device")
    max_memory: int | str | None = take_option(TransferOptions, "max_memory")
    progress: Progress | None = take_option(TransferOptions, "progress")

    def __post_init__(self) -> None:
        """Refuses values that no merge can use, before anything is read.

        Raises:
            InvalidOption: names the option and what it takes.
            UnsupportedDevice: there is no such device, or it cannot be used.
        """
        known = self.as_transfer()
        for name in ("out_rank", "dtype", "device"):
            object.__setattr__(self, name, getattr(known, name))
        check_choice("method", self.method, MERGE_METHODS)
        if self.blocks is not None:
            blocks = self.blocks
            if not isinstance(blocks, str | Sequence):
                raise InvalidOption(f"`blocks` must be block weights for each LoRA, not {blocks!r}")
            texts = blocks.split(";") if isinstance(blocks, str) else list(blocks)
            each = tuple(None if isinstance(x, str) and not x.strip() else x for x in texts)
            for asked in each:
                if asked is not None:
                    BlockWeights.read(asked)
            object.__setattr__(self, "blocks", each)
        if self.strengths is None:
            return
        strengths = self.strengths
        listed = isinstance(strengths, Sequence) and not isinstance(strengths, str)
        if not (listed and all(_is_strength(factor) for factor in strengths)):
            raise InvalidOption(
                "`strengths` must be a number for each LoRA, none of them 0 and "
                f"{LARGEST_STRENGTH:.0e} at most, not {strengths!r}"
            )
        object.__setattr__(self, "strengths", tuple(map(float, strengths)))

    def as_transfer(self) -> TransferOptions:
        """Returns the options of a transfer that writes the same."""
        moving, out_rank = self.for_moving(), self.out_rank
        return replace(moving, format=self.format, dtype=self.dtype, out_rank=out_rank)

    def for_moving(self) -> TransferOptions:
        """Returns the options for moving a LoRA with another base."""
        return TransferOptions(
            vectors=self.vectors,
            cache=self.cache,
            device=self.device,
            max_memory=self.max_memory,
            progress=self.progress,
        )

    def for_file(self) -> MergeOptions:
        """Returns the options for a file: by default the first LoRA's format."""
        return self if self.format is not None else replace(self, format="auto")


def _is_strength(factor: object) -> bool:
    """Recognises a number to multiply a LoRA by; a negative one subtracts."""
    if not isinstance(factor, int | float) or isinstance(factor, bool):
        return False
    return 0 < abs(factor) <= LARGEST_STRENGTH


class MergeChanges(MadeChanges, BaseChanges, total=False):
    """The fields of `MergeOptions` as keywords, for type checkers; a test compares the two."""

    method: MergeMethod
    strengths: Sequence[float] | None
    blocks: str | Sequence[Blocks | None] | None


DEFAULT_MERGE = MergeOptions()
