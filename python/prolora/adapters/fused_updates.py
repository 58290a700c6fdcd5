"""FLUX as its authors name it <-> diffusers: names, and the rows of fused weights.

The original checkpoint keeps q, k and v of a block in one matrix, and in single blocks the first
feed-forward layer too. An update of such a matrix is an update of every part: its rows. Parts are
what prolora moves, so that a result does not depend on how a file or a base was laid out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.lowrank import LowRank
from ..errors import ShapeMismatch

_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
# XLabs' attention processors: `1` is the image stream, `2` the text stream.
_XLABS_DOUBLE = {
    "qkv_lora1": "img_attn.qkv",
    "qkv_lora2": "txt_attn.qkv",
    "proj_lora1": "img_attn.proj",
    "proj_lora2": "txt_attn.proj",
}

ROOTS = frozenset(name.split(".")[0] for name in _OUTSIDE) | {"double_blocks", "single_blocks"}
"""What module names of the original checkpoint start with."""

_BLOCK = re.compile(r"(double|single)_blocks\.(\d{1,3})\.(.+)")
_XLABS = re.compile(r"(double|single)_blocks\.(\d{1,3})\.processor\.((?:qkv|proj)_lora[12]?)")
_BLOCK_BACK = re.compile(r"(single_)?transformer_blocks\.(\d{1,3})\.(.+)")


@dataclass(frozen=True)
class FluxWeight:
    """A weight of the original checkpoint.

    Attributes:
        name: its own name, `double_blocks.0.img_attn.qkv`.
        parts: the canonical modules its rows are, from the top.
        swapped: the file has the halves of its rows in the other order than diffusers.
    """

    name: str
    parts: tuple[str, ...]
    swapped: bool = False

    @property
    def shares(self) -> tuple[int, ...]:
        """Rows of each part, in units: the feed-forward layer is four times as high as q."""
        return tuple(4 if part.endswith(".proj_mlp") else 1 for part in self.parts)


def find_flux_weight(name: str) -> FluxWeight | None:
    """The original weight of that name, None if there is none.

    XLabs' processors are names too, and so are the parts that OneTrainer counts from 0
    (`img_attn.qkv.2`, `linear1.3`).

    Args:
        name: no `diffusion_model.`, no `.weight`.
    """
    if name == "img_in.proj":  # OneTrainer's name of it
        name = "img_in"
    if name in _OUTSIDE:
        return FluxWeight(name, (_OUTSIDE[name],), swapped=_OUTSIDE[name] == "norm_out.linear")
    if match := _XLABS.fullmatch(name):
        return _xlabs_matrix(match[1], match[2], match[3])
    match = _BLOCK.fullmatch(name)
    if not match:
        return None
    table, block = (_DOUBLE, "") if match[1] == "double" else (_SINGLE, "single_")
    whole, _, index = match[3].rpartition(".")
    if match[3] in table:
        parts = table[match[3]]
    elif index in ("0", "1", "2", "3") and len(table.get(whole, ())) > max(1, int(index)):
        parts = (table[whole][int(index)],)
    else:
        return None
    prefix = f"{block}transformer_blocks.{match[2]}."
    return FluxWeight(name, tuple(prefix + part for part in parts))


def _xlabs_matrix(kind: str, block: str, processor: str) -> FluxWeight | None:
    if kind == "double":
        name = _XLABS_DOUBLE.get(processor)
        return find_flux_weight(f"double_blocks.{block}.{name}") if name else None
    if processor == "proj_lora":
        return find_flux_weight(f"single_blocks.{block}.linear2")
    if processor != "qkv_lora":
        return None
    # No feed-forward rows here, unlike in `linear1`.
    linear1 = find_flux_weight(f"single_blocks.{block}.linear1")
    return linear1 and FluxWeight(f"single_blocks.{block}.qkv", linear1.parts[:3])


def find_weight_holding(module: str) -> FluxWeight | None:
    """The original weight that a canonical module is, or is rows of."""
    for name, canonical in _OUTSIDE.items():
        if canonical == module:
            return find_flux_weight(name)
    match = _BLOCK_BACK.fullmatch(module)
    if not match:
        return None
    kind, table = ("single", _SINGLE) if match[1] else ("double", _DOUBLE)
    for original, parts in table.items():
        if match[3] in parts:
            return find_flux_weight(f"{kind}_blocks.{match[2]}.{original}")
    return None


def split_rows(whole: FluxWeight, height: int, where: str) -> list[int]:
    """The height of every part of a weight of `height` rows.

    Raises:
        ShapeMismatch: the parts do not come out even.
    """
    unit, rest = divmod(height, sum(whole.shares) * (2 if whole.swapped else 1))
    if rest or not unit:
        raise ShapeMismatch(
            f"{where}: {height} rows are not those of {' + '.join(whole.parts)}, "
            f"{':'.join(map(str, whole.shares))}"
        )
    return [share * unit * (2 if whole.swapped else 1) for share in whole.shares]


def split_update(whole: FluxWeight, update: LowRank, where: str) -> dict[str, LowRank]:
    """The updates of the parts; exact.

    Columns of `up` that are zero in all rows of a part say nothing about it and are left out: this
    undoes the block-diagonal `up` of kohya's trainer. A part with no column left has no update,
    unless none has any.

    Args:
        whole: what the update is of.
        update: up [m, r] and down [r, n], as the file lays it out.
        where: for messages.

    Raises:
        ShapeMismatch: the rows are not those of the parts.
    """
    heights = split_rows(whole, update.shape[0], where)
    if len(whole.parts) == 1:
        up = swap_halves(update.up) if whole.swapped else update.up
        return {whole.parts[0]: LowRank(up, update.down)}
    found = {}
    for part, up in zip(whole.parts, update.up.split(heights), strict=True):
        used = up.any(0).nonzero().flatten()
        if len(used):
            # Copies: parts must not share memory that a caller may write to.
            found[part] = LowRank(up[:, used], update.down[used])
    if found:
        return found
    parts = zip(whole.parts, update.up.split(heights), strict=True)
    return {part: LowRank(up.clone(), update.down.clone()) for part, up in parts}


def fused_height(whole: FluxWeight, parts: Mapping[str, LowRank]) -> int:
    """The rows of `whole`, from those of some of its parts.

    Raises:
        ShapeMismatch: the parts do not belong to one weight.
    """
    if len(whole.parts) == 1:
        return parts[whole.parts[0]].shape[0]
    shares = dict(zip(whole.parts, whole.shares, strict=True))
    units = {parts[name].shape[0] / shares[name] for name in parts}
    inputs = {parts[name].shape[1] for name in parts}
    if len(units) > 1 or len(inputs) > 1 or not units.copy().pop().is_integer():
        shapes = ", ".join(f"{name} {list(update.shape)}" for name, update in parts.items())
        raise ShapeMismatch(f"{whole.name} cannot be put together from {shapes}")
    return int(units.pop()) * sum(whole.shares)


def fused_rank(whole: FluxWeight, parts: Mapping[str, LowRank]) -> int:
    """The rank that `fuse_updates` comes to."""
    updates = list(parts.values())
    if len(whole.parts) == 1 or _share_down(updates):
        return updates[0].rank
    return sum(update.rank for update in updates)


def _share_down(updates: list[LowRank]) -> bool:
    first = updates[0].down
    return all(update.down is first or torch.equal(update.down, first) for update in updates)


def fuse_updates(whole: FluxWeight, parts: Mapping[str, LowRank]) -> LowRank:
    """The update of the original weight, from those of its parts; a part without one gets zeros.

    Where all parts have one `down`, it is kept and the rank with it. Otherwise `up` is
    block-diagonal and the rank is the sum of theirs.

    Raises:
        ShapeMismatch: the parts do not belong to one weight.
    """
    if len(whole.parts) == 1:
        update = parts[whole.parts[0]]
        return LowRank(swap_halves(update.up), update.down) if whole.swapped else update
    unit = fused_height(whole, parts) // sum(whole.shares)
    present = [name for name in whole.parts if name in parts]
    first = parts[present[0]]
    shared = _share_down(list(parts.values()))
    width = fused_rank(whole, parts)
    up = first.up.new_zeros(unit * sum(whole.shares), width)
    top = left = 0
    for name, share in zip(whole.parts, whole.shares, strict=True):
        height = unit * share
        if name in parts:
            rank = parts[name].rank
            up[top : top + height, left : left + rank] = parts[name].up
            left += 0 if shared else rank
        top += height
    down = first.down if shared else torch.cat([parts[name].down for name in present])
    return LowRank(up, down)


def unfuse_update(whole: FluxWeight, update: LowRank, modules: Iterable[str]) -> dict[str, LowRank]:
    """Some parts of an update of the original weight, as `fuse_updates` puts them together again.

    All keep the whole `down`, so that its rank stays what it is; `split_update` leaves out what a
    part does not use.
    """
    if len(whole.parts) == 1:
        up = swap_halves(update.up) if whole.swapped else update.up
        return {whole.parts[0]: LowRank(up, update.down)}
    tops = update.up.split(split_rows(whole, update.shape[0], whole.name))
    found = dict(zip(whole.parts, tops, strict=True))
    # Copies: parts must not share memory that a caller may write to.
    return {name: LowRank(found[name].clone(), update.down.clone()) for name in modules}


def swap_halves(tensor: Tensor) -> Tensor:
    """The lower half of the rows above the upper half."""
    upper, lower = tensor.chunk(2)
    return torch.cat([lower, upper])
