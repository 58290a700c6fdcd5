"""The choices of an extraction."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.rank_rule import Rank
from ..errors import InvalidOption
from ..verbs.option_fields import take_option
from ..verbs.options import DtypeLike, FormatLike, Output, OutRank, Resources, read_dtype


@dataclass(frozen=True, kw_only=True)
class ExtractOptions(Output, Resources):
    """How a LoRA is extracted; `extract` takes each of these by its name."""

    out_rank: OutRank = take_option(
        Output,
        "out_rank",
        64,
        help="Rank of the LoRA: a number, or a share of the difference's energy in every module "
        "(0.9).",
    )
    format: FormatLike | None = take_option(
        Output,
        "format",
        help="Format of the output, or the program that will read it. Default: kohya for UNets, "
        "ComfyUI's for transformers.",
    )
    dtype: DtypeLike | None = take_option(
        Output, "dtype", help="Type of the factors in the file. Default: float16."
    )

    def __post_init__(self) -> None:
        """Refuses a share of a rank that there is not, too."""
        super().__post_init__()
        if isinstance(self.out_rank, str):
            raise InvalidOption(
                "`out_rank` of an extraction is a number or a share of energy between 0 and 1, not "
                f"{self.out_rank!r}"
            )

    @property
    def rank(self) -> Rank:
        """`out_rank`, which is a number."""
        assert self.out_rank is not None and not isinstance(self.out_rank, str)
        return self.out_rank

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of the factors in the file."""
        return read_dtype(self.dtype) or torch.float16


DEFAULT_EXTRACTION = ExtractOptions()
