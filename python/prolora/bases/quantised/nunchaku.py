"""nunchaku's SVDQuant: int4 in the order of matrix units, smoothed inputs, and a low-rank part.

Its program computes (x / s)·Qᵀ + x·D·Uᵀ, so the weight is Q / s + U·Dᵀ. All parts are stored as the
lanes of a warp read them, in tiles of 128 rows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ..weights import JoinedColumns, RowsWeight, Weight
from .codes import read_signed
from .parts import CheckpointParts
from .weight import QuantisedWeight, UnreadableWeight

_CODES = ".qweight"
_TILE, _GROUP, _PACK = 128, 64, 16
_HALVES = (torch.float16, torch.bfloat16)
# What older files call the parts.
_OLDER = {"proj_down": "lora_down", "proj_up": "lora_up", "smooth_factor": "smooth"}
_UNUSED = ("smooth_factor_orig", "smooth_orig")
_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "add_qkv_proj": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
# FLUX.1 as nunchaku's first programs name its modules -> diffusers' names.
_RENAMED = [
    (re.compile(rf"^((?:single_)?transformer_blocks\.\d+)\.{old}$"), rf"\1.{new}")
    for old, new in (
        ("qkv_proj", "attn.to_qkv"),
        ("qkv_proj_context", "attn.add_qkv_proj"),
        ("out_proj_context", "attn.to_add_out"),
        ("mlp_context_fc1", "ff_context.net.0.proj"),
        ("mlp_context_fc2", "ff_context.net.2"),
    )
] + [
    (re.compile(rf"^(transformer_blocks\.\d+)\.{old}$"), rf"\1.{new}")
    for old, new in (
        ("out_proj", "attn.to_out.0"),
        ("mlp_fc1", "ff.net.0.proj"),
        ("mlp_fc2", "ff.net.2"),
    )
]
_SINGLE = re.compile(
    r"^(single_transformer_blocks\.\d+)\.(?:(out_proj|attn\.to_out)|mlp_fc([12]))$"
)


@dataclass(frozen=True)
class SvdQuantWeight(QuantisedWeight):
    """int4 with a scale for each row and 64 columns, over the smoothing, plus the low-rank part."""

    def load_scales(self) -> tuple[Tensor, ...]:
        """Scales [m, n/64], smoothing [n], and the low-rank factors [m, r] and [r, n]."""
        scale, smooth, *factors = (self.read_scale(part) for part in self.scales)
        rows, columns = self.shape
        smooth = _unpack_scales(smooth, 1).flatten()
        if not bool((smooth != 0).all()):
            raise self.refuse_scale(self.scales[1], "zero")
        up = down = torch.empty(0)
        if factors:
            down = _unpack_factor(factors[0], columns).permute(1, 2, 0, 3).reshape(-1, columns)
            up = _unpack_factor(factors[1], rows).permute(0, 2, 1, 3).reshape(rows, -1)
        return _unpack_scales(scale, columns // _GROUP), smooth, up, down

    def decode(self, start: int, stop: int, scales: tuple[Tensor, ...]) -> Tensor:
        """The tiles that hold the rows, and these cut out of them."""
        scale, smooth, up, down = scales
        columns = self.shape[1]
        first, last = start // _TILE, -(-stop // _TILE)
        codes = read_signed(self.stored.read_rows(first * _TILE, last * _TILE))
        tiles = codes.view(last - first, columns // _GROUP, 8, 8, 4, 2, 2, 8)
        numbers: Tensor = tiles.permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(-1, columns)
        numbers = numbers[start - first * _TILE : stop - first * _TILE]
        numbers = numbers.unflatten(1, (-1, _GROUP)) * scale[start:stop, :, None]
        numbers = numbers.flatten(1).div_(smooth)
        return numbers.addmm_(up[start:stop], down) if len(up) else numbers


def _unpack_scales(packed: Tensor, groups: int) -> Tensor:
    """Scales in the order of a warp's lanes -> [m, groups]."""
    tiles = packed.reshape(-1, groups, 8, 4, 2, 2)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(-1, groups)


def _unpack_factor(packed: Tensor, outer: int) -> Tensor:
    """A low-rank factor [c, r] in the order of lanes -> [c/16, r/16, 16, 16]."""
    tiles = packed.reshape(outer // _PACK, -1, 8, 4, 2, 2, 2)
    return tiles.permute(0, 1, 4, 2, 5, 3, 6).reshape(outer // _PACK, -1, _PACK, _PACK)


def join_nunchaku(parts: CheckpointParts) -> None:
    """Makes one weight of each that nunchaku quantised, and cuts q, k and v out of theirs.

    The numbers of NVFP4 and of its modulation layers (AWQ) are not read.

    Raises:
        UnsupportedFormat: parts that are missing or do not fit together.
    """
    outputs: dict[str, dict[str, tuple[str, Weight]]] = {}
    for key in [key for key in parts if key.endswith(_CODES)]:
        module = key.removesuffix(_CODES)
        if parts.get(f"{module}.wscales") is None:
            continue  # GPTQ and others call their codes alike
        weight, keys = _join_layer(parts, module)
        for pattern, name in _RENAMED:
            module = pattern.sub(name, module)
        if (single := _SINGLE.match(module)) and not module.endswith("mlp_fc1"):
            half = "attention" if single[2] else "feed-forward"
            outputs.setdefault(single[1], {})[half] = key, weight
            parts.join(keys, key, weight)
            continue
        if single:
            module = f"{single[1]}.proj_mlp"
        path, _, leaf = module.rpartition(".")
        names = [f"{path}.{name}" for name in _FUSED.get(leaf, (leaf,))]
        if weight.shape[0] % len(names):
            raise parts.refuse(f"{key} has {weight.shape[0]} rows for {len(names)} layers")
        rows = weight.shape[0] // len(names)
        views = {
            f"{name}.weight": RowsWeight(weight, rows * i, rows * (i + 1)) if names[1:] else weight
            for i, name in enumerate(names)
        }
        parts.join_several(keys, views)
    for block, halves in outputs.items():
        if set(halves) != {"attention", "feed-forward"}:
            raise parts.refuse(f"{block} has only one half of its last layer; download it again")
        columns = tuple(halves[half][1] for half in ("attention", "feed-forward"))
        if columns[0].shape[0] != columns[1].shape[0]:
            raise parts.refuse(f"the halves of the last layer of {block} differ in their rows")
        keys = [key for key, _ in halves.values()]
        parts.join(keys, f"{block}.proj_out.weight", JoinedColumns(columns))


def _join_layer(parts: CheckpointParts, module: str) -> tuple[Weight, list[str]]:
    """One layer, and the keys of its parts."""
    key, scale_key, zeros = (f"{module}.{part}" for part in ("qweight", "wscales", "wzeros"))
    stored, scale = parts.check_codes(key, axes=2), parts.need(scale_key, key)
    unused = [f"{module}.{part}" for part in _UNUSED]
    names = {part: _find_part(parts, module, part) for part in _OLDER}
    extra = [f"{module}.{part}" for part in ("wcscales", "wtscale")]
    keys = [key, scale_key, zeros, *names.values(), *extra, *unused]
    if parts.get(zeros) is not None:
        shape = 4 * stored.shape[0], 2 * stored.shape[1]
        return UnreadableWeight("AWQ int4 of nunchaku", stored, shape), keys
    rows, columns = stored.shape[0], 2 * stored.shape[1]
    if scale.dtype == torch.float8_e4m3fn:
        return UnreadableWeight("SVDQuant NVFP4", stored, (rows, columns)), keys
    if stored.dtype not in (torch.int8, torch.uint8) or rows % _TILE or columns % _TILE:
        raise parts.refuse(f"{key} is {stored.dtype} {list(stored.shape)}, not in tiles of 128")
    scales = [
        parts.check(scale_key, _HALVES, (columns // _GROUP, rows)),
        parts.check(names["smooth_factor"], _HALVES, (columns,)),
    ]
    down = parts.get(names["proj_down"])
    if down is not None or parts.get(names["proj_up"]) is not None:
        rank = parts.check_codes(names["proj_down"], _HALVES, 2).shape[1]
        if rank % _PACK:
            raise parts.refuse(f"{names['proj_down']} has rank {rank}, not a multiple of 16")
        scales.append(parts.check(names["proj_down"], _HALVES, (columns, rank)))
        scales.append(parts.check(names["proj_up"], _HALVES, (rows, rank)))
    return SvdQuantWeight("SVDQuant int4", stored, tuple(scales), (rows, columns)), keys


def _find_part(parts: CheckpointParts, module: str, part: str) -> str:
    """The key of a part, by its newer name or its older."""
    newer = f"{module}.{part}"
    return newer if newer in parts.weights else f"{module}.{_OLDER[part]}"
