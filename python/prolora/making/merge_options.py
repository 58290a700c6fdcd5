"""The choices of a merge; those that a transfer has too are taken from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import InvalidOption
from ..verbs.block_weights import Blocks, BlockWeights
from ..verbs.option_fields import option, take_option
from ..verbs.options import LARGEST_STRENGTH, METHOD, Output, TransferOptions

MergeMethod = Literal["sum", "balanced"]
MERGE_METHODS: tuple[str, ...] = get_args(MergeMethod)


@dataclass(frozen=True, kw_only=True)
class MergeOptions(Output):
    """How LoRAs are merged; `merge` takes each of these by its name."""

    method: MergeMethod = option(
        "sum",
        'How the updates of a module become one. "sum": what loading all LoRAs does; "balanced": '
        "the same, but what several of them do alike is done once.",
        panel=METHOD,
        words=MERGE_METHODS,
    )
    strengths: Sequence[float] | None = option(
        None,
        "Factor on each LoRA, in their order, as 1,0.6. Default: 1 for all.",
        panel=METHOD,
        metavar="FACTOR,…",
    )
    blocks: str | Sequence[Blocks | None] | None = take_option(
        TransferOptions,
        "blocks",
        help="Factors by block on each LoRA, in their order and with ; between the LoRAs: a number "
        'for each block in depth order, or names with numbers ("IN04-IN08=0.5; OUT*=0"). Nothing '
        "before or after a ; leaves that LoRA as it is.",
    )

    def __post_init__(self) -> None:
        """Reads factors by block and strengths of each LoRA, too."""
        super().__post_init__()
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

    def check_count(self, count: int) -> None:
        """Refuses strengths or block weights of another number of LoRAs."""
        hints = {"strengths": "give one for each", "blocks": "separate those of each LoRA by ;"}
        for name, hint in hints.items():
            given = getattr(self, name)
            if given is not None and len(given) != count:
                message = f"`{name}` has {len(given)}, and there are {count} LoRAs"
                raise InvalidOption(f"{message}; {hint}")


def _is_strength(factor: Any) -> bool:
    """Recognises a number to multiply a LoRA by; a negative one subtracts."""
    number = isinstance(factor, int | float) and not isinstance(factor, bool)
    return number and 0 < abs(factor) <= LARGEST_STRENGTH


DEFAULT_MERGE = MergeOptions()
