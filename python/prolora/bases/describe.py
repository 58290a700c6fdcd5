"""What kind of model a base is, by its names and shapes; also for one that is not known."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ..architectures.families import known_families
from ..architectures.identify import Model
from ..architectures.modules import (
    BARE,
    UNET_BLOCKS,
    find_block,
    find_stage,
    is_adaptable,
    is_attention,
    is_in_adm,
    matrix_shape,
    write_shape,
)

if TYPE_CHECKING:
    from .base import Base
    from .weights import Weight

_QUERY = re.compile(r"(?:^|[._])(?:attn1?|attention)\.(?:to_q|q|q_proj|wq|(?:to_)?qkv)$")
_CONTEXT = re.compile(
    r"\.attn2\.to_k$|\.cross_attn\.(?:k|k_proj)$|^context_embedder$|^caption_projection\.linear_1$"
)
_EMBEDDING = re.compile(
    r"(?:^|[._])(?:embed_tokens|shared|wte|label_emb|(?:token|position(?:al)?)_embeddings?"
    r"|embedding_table|relative_attention_bias)$"
)
# The layers that take in the (noisy) image.
_IMAGE_INPUTS = frozenset(
    {
        "conv_in",
        "img_in",
        "patch_embedding",
        "pos_embed.proj",
        "proj_in",
        "x_embedder",
        "x_embedder.proj",
    }
)
# Ends of keys of layers' weights. `in_proj_weight` is a parameter of torch's MultiheadAttention, of
# which CLIP's alone is cut into the layers q, k and v that programs know.
_LAYERS, _CUT = (".weight", "text_projection"), ".in_proj_weight"


@dataclass(frozen=True)
class BaseShapes:
    """The names and shapes of a base model without its weights."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]  # module -> shape of its weight
    keys: Mapping[str, str]  # module -> where its weight is, for messages
    model: Model  # what it is
    quantised_as: str = ""

    @property
    def layout(self) -> str | None:
        """The id of the published size, if any."""
        return next(iter(self.model.sizes), None)

    @property
    def family(self) -> str | None:
        """The id of the family, None if none or several are possible."""
        return self.model.family

    def tensor_name(self, module: str) -> str:
        """Returns where a module's weight is, "file.safetensors:key"."""
        return self.keys[module]


NamedShapes: TypeAlias = "Base | BaseShapes"
"""A base of which only names and shapes are needed."""


def classify_model(base: NamedShapes) -> str:
    """Returns `"UNet"`, `"transformer"`, or `"model"` without either's blocks."""
    roots = {module.split(".", 1)[0] for module in base.shapes}
    if not roots.isdisjoint(UNET_BLOCKS):
        return "UNet"
    attends = any(find_block(module) and is_attention(module) for module in base.shapes)
    return "transformer" if attends else "model"


def describe_base(base: NamedShapes) -> str:
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


def _describe_adm(base: NamedShapes) -> str:
    """Describes an ADM network in one line: ResBlocks and attention, if any."""
    blocks = sum(name.endswith(".in_layers.2") for name in base.shapes)
    attention = [shape[1] for name, shape in base.shapes.items() if name.endswith(".qkv")]
    widths = f" of width {_join_numbers(set(attention))}" if attention else ""
    return (
        f"a UNet of the ADM kind with {blocks} ResBlocks and {len(attention) or 'no'} attention "
        f"layers{widths} ({len(base.shapes)} weights)"
    )


def explain_no_layer(base: Base, module: str) -> str:
    """Describes what a weight is that no program adds a LoRA's update to; "" for a layer's."""
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


def explain_other_shape(
    name: str, shape: tuple[int, ...], base: NamedShapes, asked: str = ""
) -> str | None:
    """Explains why an update does not fit the base's module; None if it does.

    `shape` is out × in of the update; `asked` stands at the end where no more is known of such a
    LoRA.
    """
    of_base = matrix_shape(base.shapes[name])
    if shape == of_base:
        return None
    return (
        f"the LoRA's update of {name} is {write_shape(shape)}, but that module of {base.name} is "
        f"{write_shape(of_base)} ({base.tensor_name(name)})"
        f"{_explain_wider_input(name, shape, of_base) or asked}"
    )


def _explain_wider_input(name: str, shape: tuple[int, ...], of_base: tuple[int, ...]) -> str:
    """Explains a LoRA with more image channels than the base."""
    if name not in _IMAGE_INPUTS or shape[0] != of_base[0] or shape[1] <= of_base[1]:
        return ""
    return (
        ". It is a LoRA for control, editing or inpainting: its model takes a second image in "
        "further channels of this layer; give such a model as the source, and as the target"
    )
