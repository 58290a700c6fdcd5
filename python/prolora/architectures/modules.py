"""What a module's name and shape say about it."""

from __future__ import annotations

import re
from typing import NamedTuple

_BLOCK = re.compile(r"((?:.+\.)?(?:single_)?transformer_blocks)\.(\d+)\.(.+)")
# The layers LoRAs are commonly trained on, in UNets and transformers: attention, feed-forward and
# the projections around them.
_ADAPTABLE = re.compile(r"(^|\.)(attn\d?|ff|ff_context)\.|\.proj_(in|out|mlp)$")


class BlockPosition(NamedTuple):
    """Where a module lies in a stack of transformer blocks.

    Attributes:
        stack: `transformer_blocks`, `down_blocks.1.attentions.0.transformer_blocks`, …
        number: of the block in its stack, as it is written.
        local: the module's name within its block.
    """

    stack: str
    number: str
    local: str


def find_block(module: str) -> BlockPosition | None:
    """The transformer block that a module lies in, None outside of all."""
    match = _BLOCK.fullmatch(module)
    return BlockPosition(match[1], match[2], match[3]) if match else None


def is_adaptable(module: str) -> bool:
    """Whether LoRAs are commonly trained on this module."""
    return _ADAPTABLE.search(module) is not None


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A weight's shape as out × (in·kh·kw): a 1×1 convolution is a linear layer."""
    size = 1
    for length in shape[1:]:
        size *= length
    return shape[0], size


def find_stage(module: str) -> str:
    """The part of the model a module is in: `down_blocks.1`, `mid_block`, `transformer_blocks`."""
    parts = module.split(".")
    if parts[0] in ("transformer_blocks", "single_transformer_blocks"):  # one stack for the model
        return parts[0]
    return ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else parts[0]
