"""LoRA files, folders and state dicts -> `Adapter`, scales folded in."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import NonFiniteWeights, UnsupportedFormat
from ..linalg.lowrank import LowRank
from .adapter import Adapter
from .layout import Slot, lay_out
from .source import Source, StrPath, open_source


def read(
    source: StrPath | Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> Adapter:
    """Reads a LoRA or LoCon in kohya's, diffusers', PEFT's or ComfyUI's spelling.

    The scale is exact and folded into `up`: α/r of an `.alpha` tensor, or α/r (rsLoRA: α/√r) of
    PEFT's configuration with its patterns, in adapter_config.json or in the header of a diffusers
    file; 1 where the file says nothing.

    Args:
        source: a .safetensors file, a PEFT folder, or a state dict.
        metadata: replaces the file's header metadata.

    Returns:
        Updates in file order: up [out, r], down [r, in·kh·kw], float32 on the CPU.

    Raises:
        UnsupportedFormat: not a plain LoRA; a key that is not understood; a file that is damaged.
        ShapeMismatch: factors that do not multiply, or a rank other than the configuration's.
        NonFiniteWeights: NaN or Inf in a factor or an alpha.
    """
    opened = open_source(source, metadata)
    slots = lay_out(opened)
    # Everything that can be refused from the header was; scales before the large tensors.
    scales = {name: _scale(slot, opened) for name, slot in slots.items()}
    updates = {name: _update(slot, scales[name], opened) for name, slot in slots.items()}
    modules = [slot.module for slot in slots.values()]
    return Adapter(
        updates,
        kernels={name: slot.kernel for name, slot in slots.items() if slot.kernel},
        format=modules[0].format if opened.config is None else "peft",
        spelling="sgm" if any(m.sgm for m in modules) else "diffusers",
        dtype=_storage_dtype(slots, opened),
        metadata=opened.metadata,
    )


def _scale(slot: Slot, source: Source) -> float:
    """The factor in front of up·down."""
    key = slot.keys.get("alpha")
    scale = None
    if key is not None:
        alpha = float(source.read(key).double())
        if not math.isfinite(alpha):
            raise NonFiniteWeights(f"{source.where}: {key} is {alpha}; the file is damaged")
        scale = alpha / slot.rank
    if slot.peft is None:
        return 1.0 if scale is None else scale
    configured = slot.peft.scale(slot.module.local)
    if scale is not None and not math.isclose(scale, configured, rel_tol=1e-3, abs_tol=1e-12):
        raise UnsupportedFormat(
            f"{source.where}: {key} asks for the scale {scale:.6g}, the PEFT configuration for "
            f"{configured:.6g}; remove the one that is wrong"
        )
    return configured


def _update(slot: Slot, scale: float, source: Source) -> LowRank:
    """Both factors as matrices, the scale in `up`."""
    factors = {}
    for role in ("up", "down"):
        key = slot.keys[role]
        factor = source.read(key).to(torch.float32, copy=True).flatten(1)
        if not factor.isfinite().all():
            raise NonFiniteWeights(
                f"{source.where}: {key} holds NaN or Inf; the training diverged or the file is "
                "damaged"
            )
        factors[role] = factor
    up = factors["up"].mul_(scale) if scale != 1.0 else factors["up"]
    if scale != 1.0 and not up.isfinite().all():
        raise NonFiniteWeights(f"{source.where}: {slot.keys['up']} times {scale:.6g} overflows")
    return LowRank(up, factors["down"])


def _storage_dtype(slots: dict[str, Slot], source: Source) -> torch.dtype:
    """The dtype all factors share; float32 if they differ."""
    dtypes = {
        source.headers[key].dtype
        for slot in slots.values()
        for role, key in slot.keys.items()
        if role != "alpha"
    }
    return dtypes.pop() if len(dtypes) == 1 else torch.float32
