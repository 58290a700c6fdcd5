"""Names that many models share, as tables: of UNets and of text encoders.

LDM and SGM are the authors of UNets' single files, and number the blocks in one row:
`input_blocks.0` is conv_in, then every down block is `layers` layers and a downsampler; every up
block is `layers + 1` layers, and the last one carries the upsampler. Inside a numbered block, `.0`
is the resnet and `.1` the attention. Text encoders have the names of transformers 4, behind
`text_encoder.` or the like.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from itertools import product

from .family import SPELLINGS, UNET, UNET_KOHYA, Family

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
# Both sides call the modules of an attention alike.
_ATTENTION = {
    name: name
    for name in (
        *("norm", "proj_in", "proj_out"),
        *(f"transformer_blocks.N.norm{i}" for i in (1, 2, 3)),
        *(f"transformer_blocks.N.attn{i}.{part}" for i, part in product((1, 2), _PROJECTIONS)),
        *(f"transformer_blocks.N.ff.net.{part}" for part in ("0.proj", "2")),
    )
}
_LEVELS = 8
"""Twice as many as any published UNet has."""

_TRANSFORMER = re.compile(r"[._](?:transformer_blocks|proj_in)(?:[._]|$)")

SGM_ROOTS = frozenset(
    {"input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out"}
)


def is_adm(names: Iterable[str]) -> bool:
    """Recognises an ADM network by all its modules in LDM's numbers: no transformers."""
    return not any(_TRANSFORMER.search(name) for name in names)


@cache
def unet_names(layers: int = 2, deep: bool = False) -> Family:
    """Returns the names of a UNet of unknown sizes.

    Args:
        layers: in a block: 2 in every Stable Diffusion but the BK-SDM students.
        deep: it has four blocks, as SD1.x and SD2.x, and the first up block has no attention: its
            upsampler is then `.1` and not `.2`.
    """
    names = dict(_OUTSIDE)
    blocks = {
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
    }
    aliases = {}
    for level in range(_LEVELS):
        down, up, first = f"down_blocks.{level}", f"up_blocks.{level}", level * (layers + 1)
        names[f"input_blocks.{first + layers + 1}.0.op"] = f"{down}.downsamplers.0.conv"
        upsamplers = [f"output_blocks.{first + layers}.{part}.conv" for part in (1, 2)]
        own = upsamplers.pop(0 if deep and level == 0 else 1)
        names[own] = f"{up}.upsamplers.0.conv"
        aliases[upsamplers[0]] = own
        for part, kind in enumerate(("resnets", "attentions")):
            for layer in range(layers + 1):
                blocks[f"output_blocks.{first + layer}.{part}"] = f"{up}.{kind}.{layer}"
            for layer in range(layers):
                blocks[f"input_blocks.{first + 1 + layer}.{part}"] = f"{down}.{kind}.{layer}"
    for block, place in blocks.items():
        parts = _RESNET if ".resnets." in place else _ATTENTION
        names |= {f"{block}.{name}": f"{place}.{part}" for name, part in parts.items()}
    spellings = {**SPELLINGS, "diffusers": UNET} | ({"kohya": UNET_KOHYA} if deep else {})
    return Family("unet", "a UNet", (), names, aliases, spellings, unet=True)


def find_unet_names(modules: Iterable[str], layers: int = 2) -> Family:
    """Returns the names of the UNet that has some modules, by their canonical names.

    Without a sign of four blocks, SDXL is assumed, for which LDM's names are in use.
    """
    names = [*modules]
    attends = any(name.startswith("up_blocks.0.attentions.") for name in names)
    fourth = any(name.startswith(("down_blocks.3.", "up_blocks.3.")) for name in names)
    return unet_names(layers, deep=fourth and not attends)


CLIP_LAYER, _DECODER_LAYER = "text_model.encoder.layers.N", "layers.N"
_HEADS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_CLIP_PARTS = (
    *(f"self_attn.{head}" for head in _HEADS.values()),
    *("mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2"),
)
_CLIP_OUTSIDE = ("embeddings.token_embedding", "embeddings.position_embedding")
_T5_PARTS = (
    *(f"SelfAttention.{head}" for head in "qkvo"),
    *(f"DenseReluDense.{part}" for part in ("wi", "wi_0", "wi_1", "wo")),
)
_DECODER_PARTS = (
    *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    *("input_layernorm", "post_attention_layernorm"),
)

CLIP = Family.of_names(
    "clip",
    *(f"{CLIP_LAYER}.{part}" for part in _CLIP_PARTS),
    *(f"text_model.{name}" for name in (*_CLIP_OUTSIDE, "final_layer_norm")),
    "text_projection",
    # transformers 5 dropped the outer `text_model.` of its own modules; diffusers before 0.18 named
    # the projections like a UNet's.
    aliases={f"encoder.layers.N.{part}": f"{CLIP_LAYER}.{part}" for part in _CLIP_PARTS}
    | {name: f"text_model.{name}" for name in _CLIP_OUTSIDE}
    | {
        f"{start}encoder.layers.N.self_attn.{old}": f"{CLIP_LAYER}.self_attn.{head}"
        for start in ("", "text_model.")
        for old, head in _HEADS.items()
    },
)
T5 = Family.of_names("t5", *(f"encoder.block.N.layer.N.{part}" for part in _T5_PARTS))
LANGUAGE_MODEL = Family.of_names(
    "language-model",
    *(f"{_DECODER_LAYER}.{part}" for part in _DECODER_PARTS),
    # sd-scripts' own, of Anima's Qwen3
    aliases={f"qwen3.{_DECODER_LAYER}.{x}": f"{_DECODER_LAYER}.{x}" for x in _DECODER_PARTS},
)
