"""What a module's name and shape say about it."""

from __future__ import annotations

import re

# The layers LoRAs are commonly trained on, in UNets and transformers: attention, feed-forward and
# the projections around them.
_ADAPTABLE = re.compile(r"(^|\.)(attn\d?|ff|ff_context)\.|\.proj_(in|out|mlp)$")


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
