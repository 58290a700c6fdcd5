"""Tensors and configuration of an `Adapter` in each format; no disk access."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ...architectures.modules import find_component, local_name
from ...core.lowrank import LowRank
from ...core.precision import is_finite
from ...errors import NonFiniteWeights, OutputError, ShapeMismatch
from ..adapter import Adapter, StoredUpdate
from ..keys.codec import ADAPTER
from ..vectors import find_vector_module, vector_suffixes
from .groups import FileLayout, has_lora_bias, lay_out
from .peft_patterns import PatternTable

# Past this relative error of a factor the storage dtype has lost more than its own rounding.
_ROUNDING = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-20}


def encode_adapter(adapter: Adapter, format: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the tensors of an adapter file, by key.

    `format` is a key of `SPELLINGS`; `dtype` has 16 bits or more.

    Raises:
        UnsupportedFormat: the format has no name for a module.
        ShapeMismatch: an update does not have the shape of a linear layer or its convolution.
        NonFiniteWeights: a factor is not finite, or overflows in `dtype`.
        OutputError: a factor is too small for `dtype` to hold.
    """
    tensors: dict[str, Tensor] = {}
    layout = lay_out(adapter, format)
    alpha = common_rank(layout) if format == "kohya" else None
    for group in layout.groups:
        name, update = next(iter(group.parts)), group.update()
        if alpha is not None and update.rank != alpha:
            update = LowRank(update.up.double() * (update.rank / alpha), update.down)
        factors = _cast_factors(name, update, dtype)
        up, down = _shape_factors(name, factors, adapter.kernels.get(name))
        one, other = ("lora_B", "lora_A") if alpha is None else ("lora_up", "lora_down")
        tensors[f"{group.path}.{one}.weight"] = up
        tensors[f"{group.path}.{other}.weight"] = down
        if alpha is not None:
            exact, rounded = torch.tensor(float(alpha)), torch.tensor(float(alpha), dtype=dtype)
            tensors[f"{group.path}.alpha"] = rounded if rounded.item() == alpha else exact
    suffixes = vector_suffixes(layout.vectors)
    if format in ("diffusers", "peft"):
        suffixes = dict.fromkeys(layout.vectors, "lora_B.bias")
    for name, suffix in suffixes.items():
        path = layout.vector_paths[find_vector_module(name)]
        tensors[f"{path}.{suffix}"] = _cast_vector(name, layout.vectors[name], dtype)
    return tensors


def common_rank(layout: FileLayout) -> int:
    """Returns the rank most modules have: the one alpha of a file with alphas.

    Alpha is the rank wherever all ranks are equal. Where they differ, one alpha for all modules is
    the only choice that every loader scales correctly: diffusers loses the alphas of attention
    modules in kohya's spelling and takes the most common one for them, so alpha = rank per module
    would be read at the wrong scale.
    """
    counts = Counter(group.rank for group in layout.groups) or Counter([1])
    return max(counts, key=lambda rank: (counts[rank], rank))


def _cast_factors(name: str, update: LowRank, dtype: torch.dtype) -> LowRank:
    """Casts factors to `dtype`, balanced by a power of two if it overflows."""
    if len(update.shape) != 2:
        raise ShapeMismatch(f"{name}: an update {list(update.shape)} is not one matrix")
    cast = update.to(dtype)
    if not (is_finite(update.up) and is_finite(update.down)):
        raise NonFiniteWeights(f"{name}: the update holds NaN or Inf, so nothing is written")
    if _survives_cast(cast, update, dtype):
        return cast
    # A power of two moves size from one factor to the other without rounding.
    ratio = update.down.abs().max().item() / max(update.up.abs().max().item(), 1e-300)
    exponent = round(math.log2(ratio) / 2) if ratio > 0 else 0
    balanced = LowRank(
        torch.ldexp(update.up.double(), torch.tensor(exponent)),
        torch.ldexp(update.down.double(), torch.tensor(-exponent)),
    )
    cast = balanced.to(dtype)
    if not (is_finite(cast.up) and is_finite(cast.down)):
        raise NonFiniteWeights(
            f"{name}: the update overflows in {dtype}; write it with `dtype='float32'`"
        )
    if not _survives_cast(cast, balanced, dtype):
        raise OutputError(
            f"{name}: the update is too small for {dtype}; write it with `dtype='float32'`"
        )
    return cast


def _survives_cast(cast: LowRank, exact: LowRank, dtype: torch.dtype) -> bool:
    """Returns whether both factors survive the cast to within the dtype's rounding."""
    return _is_close(cast.up, exact.up, dtype) and _is_close(cast.down, exact.down, dtype)


def _is_close(stored: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    limit = _ROUNDING.get(dtype, 2.0**-20)
    difference = (stored.to(wanted.dtype) - wanted).norm()
    return is_finite(stored) and bool(difference <= limit * wanted.norm())


def _cast_vector(name: str, vector: Tensor, dtype: torch.dtype) -> Tensor:
    if not is_finite(vector):
        raise NonFiniteWeights(f"{name}: holds NaN or Inf, so nothing is written")
    stored = vector.to(dtype)
    if not is_finite(stored):
        raise NonFiniteWeights(f"{name}: overflows in {dtype}; write it with `dtype='float32'`")
    if not _is_close(stored, vector, dtype):
        raise OutputError(f"{name}: is too small for {dtype}; write it with `dtype='float32'`")
    return stored


def _shape_factors(
    name: str, update: LowRank, kernel: tuple[int, ...] | None
) -> tuple[Tensor, Tensor]:
    """Reshapes factors for a file: up [out, r], down [r, in].

    For a convolution: [out, r, 1, 1] and [r, in, kh, kw].
    """
    up, down = update.up.contiguous(), update.down.contiguous()
    if kernel is None:
        return up, down
    if down.shape[1] % math.prod(kernel):
        raise ShapeMismatch(f"{name}: down {list(down.shape)} does not fit a kernel {kernel}")
    return up.reshape(*up.shape, *(1 for _ in kernel)), down.reshape(update.rank, -1, *kernel)


def peft_config(
    adapter: Adapter,
    *,
    component: str | None = None,
    owners: Mapping[str, StoredUpdate] = MappingProxyType({}),
) -> dict[str, Any]:
    """Builds the LoraConfig under which PEFT scales every module as it should.

    Args:
        adapter: factors with the scale folded in.
        component: only modules of this part of the pipeline ("unet", "text_encoder", …).
        owners: module -> the tensors that are written in place of its factors, with their scale.
    """
    ranks = {
        name: owners[name].rank if name in owners else update.rank
        for name, update in adapter.updates.items()
        if component in (None, _find_model(name))
    }
    scales = {name: owners[name].scale for name in ranks if name in owners}
    inside = ADAPTER if component == "text_conditioner" else ""
    local = {_config_name(n).removeprefix(inside): rank for n, rank in ranks.items()}
    alphas = {
        _config_name(n).removeprefix(inside): _whole(scales.get(n, 1.0) * rank)
        for n, rank in ranks.items()
    }
    common, alpha = (Counter(x.values()).most_common(1)[0][0] for x in (local, alphas))
    dora = any(owners[name].kind.endswith("+dora") for name in scales)
    return ({"use_dora": True} if dora else {}) | {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": alpha,
        "rank_pattern": _write_patterns(local, common),
        "alpha_pattern": _write_patterns(alphas, alpha),
        "target_modules": sorted(local),
        "use_rslora": False,
        "bias": "none",
        "lora_bias": any(has_lora_bias(adapter, name) for name in adapter.vectors),
    }


def _find_model(name: str) -> str:
    """Returns the model that holds a module in diffusers."""
    return "text_conditioner" if name.startswith(ADAPTER) else find_component(name)


def _config_name(name: str) -> str:
    """Returns PEFT's name of a module, for every version of transformers.

    CLIP lost its outer `text_model.` in transformers 5; PEFT matches the end of a name, so the
    shorter name fits both.
    """
    return re.sub(r"^text_model\.(?=encoder\.)", "", local_name(name))


def _whole(number: float) -> float:
    """Returns a number as a whole one where it is so but for rounding."""
    return round(number) if math.isclose(number, round(number), rel_tol=1e-9) else number


def _write_patterns(numbers: Mapping[str, float], common: float) -> dict[str, float]:
    """Returns the patterns of modules whose number is not the common one.

    `proj_out` also fits `single_transformer_blocks.0.proj_out`, since PEFT reads the keys as
    regular expressions for the end of a name: where that matters they are anchored, as `^…`.
    """
    pattern = {name: number for name, number in numbers.items() if number != common}
    plain = PatternTable(pattern, "pattern")
    if all(plain.get(name, common) == number for name, number in numbers.items()):
        return pattern
    return {"^" + re.escape(name): number for name, number in pattern.items()}


def diffusers_metadata(
    adapter: Adapter, owners: Mapping[str, StoredUpdate] = MappingProxyType({})
) -> dict[str, Any] | None:
    """Returns what a diffusers file must say about ranks and scales; None for nothing.

    Older versions of diffusers take one alpha for modules of different ranks and so scale most of
    them wrongly, unless the header has a configuration; then every component needs one. Stored
    tensors keep the scales of their own file: in its header, or else in tensors.
    """
    configured = any(one.configured for one in owners.values())
    if not configured and (owners or len({x.rank for x in adapter.updates.values()}) <= 1):
        return None
    table: dict[str, Any] = {}
    for component in dict.fromkeys(map(_find_model, adapter.updates)):
        config = peft_config(adapter, component=component, owners=owners)
        table |= {f"{component}.{option}": value for option, value in config.items()}
    return table
