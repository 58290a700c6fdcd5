"""What a module's name and shape say: component, block, kind of layer.

Names are canonical: diffusers', with `text_encoder.`, `text_encoder_2.` and so on in
front for text encoders and nothing for the UNet or transformer itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
TEXT_ENCODER_PREFIXES = tuple(f"{encoder}." for encoder in TEXT_ENCODERS)

UNET_ROOTS = frozenset(
    {
        "down_blocks",
        "up_blocks",
        "mid_block",
        "conv_in",
        "conv_out",
        "conv_norm_out",
        "time_embedding",
        "add_embedding",
    }
)
"""What the names of a UNet's modules start with."""
UNET_BLOCKS = (
    *("down_blocks", "up_blocks", "mid_block"),
    *("input_blocks", "output_blocks", "middle_block"),
)
"""What the blocks of UNets are in, as diffusers and the original checkpoints name it."""
_WITHOUT_OTHER_BLOCKS = UNET_ROOTS | set(TEXT_ENCODERS)
# Networks of the ADM kind (guided diffusion, consistency models): LDM's numbers, attention of their
# own and any number of ResBlocks a level. Their names are canonical as they stand.
_ADM = re.compile(
    r"(?:input_blocks|output_blocks|middle_block)\.\d|(?:time_embed|label_emb|out)\.\d+(?:\.\d+)?$"
    r"|label_emb$"
)
_ADM_ATTENTION = re.compile(r"\.(?:qkv|encoder_kv|proj_out)$")

# `attn1.to_q`, `self_attn.q_proj`, `audio_to_video_attn.to_k`, `attention.qkv`, `img_attn_qkv`.
_ATTENTION = re.compile(r"(?:^|\.)(?:\w+_)?(?:attn|attention)(?:\d|_qkv|_proj)?(?:\.|$)")
# Layers of UNets that LoRAs are commonly trained on: attention, feed-forward and the
# projections around them.
_ADAPTABLE = re.compile(r"(^|\.)(attn\d?|ff|ff_context)\.|\.proj_(in|out|mlp)$")
# Layers of transformer blocks that LoRAs do not train by default: what normalises, and what
# makes its scales and shifts from the time step (`norm1.linear`, `img_mod.1`, `modCX.1`,
# `adaLN_modulation.1`, `adaln_proj`, `scale_shift_table`).
_CONDITIONING = re.compile(
    r"(?:^|[._])(?:(?:layer|rms|group)?norms?\d*|ada_?(?:ln|norm)\w*|mod\d?|mod[CX]+|modulation\w*"
    r"|\w*table\w*)(?:[._]|$)",
    re.IGNORECASE,
)
# Parameters and tables of a transformer with two axes or more that are no linear layers.
BARE = re.compile(
    r"(?:_table|tokens?|[._]embed|(?:pos|index|fps)_embedding|_indicator|_frequencies|_cond_mask"
    r"|motion_synthesis_weight|motion_network\.\d+|ff_i\.gate)$"
)
_TRANSFORMER_BLOCK = re.compile(r"((?:.+\.)?(?:single_)?transformer_blocks)\.(\d+)\.(.+)")


class BlockPosition(NamedTuple):
    """Where a module lies in a stack of transformer blocks."""

    # `transformer_blocks`, `down_blocks.1.attentions.0.transformer_blocks`, `blocks`,
    # `llm_adapter.blocks`, `context_refiner`, …
    stack: str
    number: str  # of the block in its stack, as it is written
    local: str  # the module's name within its block


@lru_cache(1 << 15)
def find_component(module: str) -> str:
    """Returns the part of the pipeline, e.g. "unet", "transformer", "text_encoder"."""
    root = module.split(".", 1)[0]
    if root in TEXT_ENCODERS:
        return root
    return "unet" if root in UNET_ROOTS or is_in_adm(module) else "transformer"


def is_in_adm(module: str) -> bool:
    """Recognises a module of an ADM network by its name."""
    return _ADM.match(module) is not None


def local_name(module: str) -> str:
    """Returns the name within its component: without a text encoder's prefix."""
    root, _, rest = module.partition(".")
    return rest if root in TEXT_ENCODERS else module


def is_in_text_encoder(module: str) -> bool:
    """Returns whether a module belongs to a text encoder."""
    return module.startswith(TEXT_ENCODER_PREFIXES)


@lru_cache(1 << 15)  # of a file's modules, each is asked for by every family that may have it
def find_block(module: str) -> BlockPosition | None:
    """Returns the transformer block that a module lies in, None outside all blocks.

    A UNet and its text encoders have blocks only in stacks called `transformer_blocks`. In any
    other model the outermost list that holds more than single layers is a stack of blocks, whatever
    it is called: `blocks.3.self_attn.q_proj` lies in block 3, `img_emb.proj.1` and
    `caption_projection.3.linear` in none.
    """
    match = _TRANSFORMER_BLOCK.fullmatch(module)
    if match is not None:
        return BlockPosition(match[1], match[2], match[3])
    words = module.split(".")
    place = next((i for i, word in enumerate(words) if word.isdecimal()), 0)
    if words[0] in _WITHOUT_OTHER_BLOCKS or not 0 < place < len(words) - 1:
        return None
    if place + 2 == len(words) and not words[place - 1].endswith("blocks"):
        return None
    return BlockPosition(".".join(words[:place]), words[place], ".".join(words[place + 1 :]))


def is_attention(module: str) -> bool:
    """Returns whether a module belongs to an attention layer of a UNet or transformer."""
    if is_in_adm(module):
        return _ADM_ATTENTION.search(module) is not None
    return not is_in_text_encoder(module) and _ATTENTION.search(module) is not None


def is_adaptable(module: str) -> bool:
    """Returns whether LoRAs are commonly trained on this module.

    In a UNet: attention, feed-forward and the projections around them. In any other model: whatever
    lies in a block and neither normalises nor makes scales and shifts from the time step. In an ADM
    network, where no custom exists: every weight.
    """
    if is_in_adm(module):
        return True
    root = module.split(".", 1)[0]
    if root in TEXT_ENCODERS:
        return False
    if root in UNET_ROOTS:
        return _ADAPTABLE.search(module) is not None
    block = find_block(module)
    if block is None:
        return _ADAPTABLE.search(module) is not None
    return not is_conditioning(block.local)


def is_conditioning(local: str) -> bool:
    """Returns whether a module, by its name in a block, normalises or modulates."""
    return _CONDITIONING.search(local) is not None


def is_linear(module: str, shape: tuple[int, ...]) -> bool:
    """Returns whether a weight of a known transformer is a linear layer's."""
    return len(shape) == 2 and not BARE.search(module)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns a weight's shape as out × (in·kh·kw).

    A 1×1 convolution is a linear layer.
    """
    size = 1
    for length in shape[1:]:
        size *= length
    return shape[0], size


def have_equal_shapes(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Compares two weights: out × in, and the kernel of a convolution.

    A 1×1 convolution is a linear layer; a 3×3 convolution of 8 channels is not one of 72.
    """
    kernels = [tuple(shape[2:]) for shape in (one, other)]
    plain = [() if set(kernel) <= {1} else kernel for kernel in kernels]
    return matrix_shape(one) == matrix_shape(other) and plain[0] == plain[1]


def may_be_fitted(shape: tuple[int, ...]) -> bool:
    """Returns whether a fit changes weights of this shape: linear layers, image convolutions.

    A depthwise convolution is excluded; the shape does not tell other groups of a convolution.
    """
    return len(shape) == 2 or (len(shape) == 4 and shape[1] > 1)


def write_shape(shape: Sequence[int]) -> str:
    """Writes a shape as `320×768`; "" for none."""
    return "×".join(map(str, shape))


def find_stage(module: str) -> str:
    """Returns the part of the model: `down_blocks.1`, `mid_block`, `transformer_blocks`."""
    parts = module.split(".")
    if parts[0] in UNET_ROOTS:
        return ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else parts[0]
    block = find_block(module)
    return block.stack if block else parts[0]
