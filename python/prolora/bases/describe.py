"""What kind of model a base is, by its names and shapes; also for one that is not known."""

from __future__ import annotations

import re
from collections import Counter

from ..architectures.families import known_families
from ..architectures.modules import (
    BARE,
    find_block,
    find_stage,
    is_adaptable,
    is_attention,
    is_in_adm,
    matrix_shape,
)
from .base import Base
from .weights import Weight

_QUERY = re.compile(r"(?:^|[._])(?:attn1?|attention)\.(?:to_q|q|q_proj|wq|(?:to_)?qkv)$")
_UNET_BLOCKS = {
    *("down_blocks", "up_blocks", "mid_block"),
    *("input_blocks", "output_blocks", "middle_block"),
}
_CONTEXT = re.compile(
    r"\.attn2\.to_k$|\.cross_attn\.(?:k|k_proj)$|^context_embedder$|^caption_projection\.linear_1$"
)
_EMBEDDING = re.compile(
    r"(?:^|[._])(?:embed_tokens|shared|wte|label_emb|(?:token|position(?:al)?)_embeddings?"
    r"|embedding_table|relative_attention_bias)$"
)
# Ends of keys of layers' weights. `in_proj_weight` is a parameter of torch's MultiheadAttention, of
# which CLIP's alone is cut into the layers q, k and v that programs know.
_LAYERS, _CUT = (".weight", "text_projection"), ".in_proj_weight"


def classify_model(base: Base) -> str:
    """Returns `"UNet"`, `"transformer"`, or `"model"` without either's blocks."""
    roots = {module.split(".", 1)[0] for module in base.shapes}
    if roots & _UNET_BLOCKS:
        return "UNet"
    attends = any(find_block(module) and is_attention(module) for module in base.shapes)
    return "transformer" if attends else "model"


def describe_base(base: Base) -> str:
    """Describes a base in one line: family, kind, blocks, widths, text features."""
    kind = classify_model(base)
    if any(is_in_adm(name) and find_block(name) for name in base.shapes):
        return _describe_adm(base)
    blocks = {
        (block.stack, block.number)
        for module in base.shapes
        if (block := find_block(module)) and is_adaptable(module)
    }
    if not blocks or kind == "model":
        return f"a {kind} without transformer blocks ({len(base.shapes)} weights)"
    places = Counter(find_stage(stack) if kind == "UNet" else stack for stack, _ in blocks)
    counts = ", ".join(f"{count} in {where}" for where, count in sorted(places.items()))
    widths = {base.shapes[module][-1] for module in base.shapes if _QUERY.search(module)}
    context = {base.shapes[module][1] for module in base.shapes if _CONTEXT.search(module)}
    family = known_families().get(base.family or "")
    title = f"{family.title}, " if family is not None else ""
    line = f"{title}a {kind} with {len(blocks)} transformer blocks ({counts})"
    if widths:
        line += f" of width {_join_numbers(widths)}"
    line += f", reading text features of {_join_numbers(context)}" if context else ""
    return line + (f"; quantised: {base.quantised_as}" if base.quantised_as else "")


def _describe_adm(base: Base) -> str:
    """Describes an ADM network in one line: ResBlocks and attention, if any."""
    blocks = sum(name.endswith(".in_layers.2") for name in base.shapes)
    attention = [shape[1] for name, shape in base.shapes.items() if name.endswith(".qkv")]
    widths = f" of width {_join_numbers(set(attention))}" if attention else ""
    return (
        f"a UNet of the ADM kind with {blocks} ResBlocks and {len(attention) or 'no'} attention "
        f"layers{widths} ({len(base.shapes)} weights)"
    )


def explain_no_layer(base: Base, module: str) -> str:
    """Says what a weight is that no program adds a LoRA's update to; "" for a layer's."""
    family, weight = known_families().get(base.family or ""), base.weights[module]
    if not _is_layer(weight) and any(map(_is_layer, base.weights.values())):
        return "a parameter"  # in memory, layers may go by their modules' names
    is_known = family is not None and not family.unet
    if len(weight.shape) > 4 or (is_known and len(weight.shape) > 2):
        return "a convolution"
    is_table = _EMBEDDING.search(module) or (is_known and BARE.search(module))
    return "an embedding" if is_table else ""


def _is_layer(weight: Weight) -> bool:
    key, cut, _ = weight.name.partition("[")
    return key.endswith((*_LAYERS, _CUT) if cut else _LAYERS)


def list_adaptable_shapes(base: Base) -> set[tuple[int, int]]:
    """Returns the out × in shapes of modules that LoRAs are commonly trained on."""
    return {matrix_shape(shape) for module, shape in base.shapes.items() if is_adaptable(module)}


def _join_numbers(numbers: set[int]) -> str:
    return "/".join(str(number) for number in sorted(numbers))
