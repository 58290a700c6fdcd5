"""The choices of a conversion."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.option_fields import option, take_option
from ..errors import InvalidOption
from ..moving.block_weights import Blocks, BlockWeights
from ..moving.options import LARGEST_STRENGTH, OUTPUT, Output, TransferOptions


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Output):
    """How a LoRA is converted; `convert` takes each of these by its name."""

    blocks: Blocks | None = take_option(TransferOptions, "blocks", panel=OUTPUT)
    alpha: float | None = option(
        None,
        "Alpha of every update, in place of what the file has: each acts at alpha / rank.",
        panel=OUTPUT,
        metavar="ALPHA",
    )

    def __post_init__(self) -> None:
        """Reads the factors by block, too."""
        super().__post_init__()
        if self.blocks is not None:
            BlockWeights.read(self.blocks)
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if self.alpha is not None and not (number and 0 < self.alpha <= LARGEST_STRENGTH):
            raise InvalidOption(f"`alpha` is a number above 0, not {self.alpha!r}")


DEFAULT_CONVERSION = ConvertOptions()
