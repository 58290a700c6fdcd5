"""The choices of a conversion."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.option_fields import take_option
from ..moving.block_weights import Blocks, BlockWeights
from ..moving.options import OUTPUT, Output, TransferOptions


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Output):
    """How a LoRA is converted; `convert` takes each of these by its name."""

    blocks: Blocks | None = take_option(TransferOptions, "blocks", panel=OUTPUT)

    def __post_init__(self) -> None:
        """Reads the factors by block, too."""
        super().__post_init__()
        if self.blocks is not None:
            BlockWeights.read(self.blocks)


DEFAULT_CONVERSION = ConvertOptions()
