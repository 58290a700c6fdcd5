"""Outputs, read back as any user would and compared with the adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..core.lowrank import LowRank
from ..core.merging import subtract_updates
from ..errors import OutputError, ProLoRAError
from .adapter import Adapter
from .formats.groups import lay_out
from .lora import StrPath
from .naming import BaseNames
from .reading import read_pieces
from .vectors import vectors_match


def verify_output(
    output: Path | Mapping[str, Tensor],
    adapter: Adapter,
    format: str,
    dtype: torch.dtype,
    where: StrPath,
) -> None:
    """Opens an output and compares every update and vector.

    Args:
        output: a file, a PEFT folder or a state dict.
        adapter: what it was made of.
        format: its format.
        dtype: of its factors.
        where: its name in messages.

    Raises:
        OutputError: an update or vector is missing, or is off by more than the rounding of `dtype`.
    """
    shared = _shared_sizes(adapter, format)
    back, foreign = Adapter({}), set()
    try:
        for piece in read_pieces(output, BaseNames(adapter.family, adapter.updates)):
            for name, update in piece.updates.items():
                wanted = adapter.updates.get(name)
                if wanted is None:  # rows of zeros in a fused weight are no update
                    foreign |= {name} if update.norm() > 0 else set()
                elif not _updates_match(update, wanted, dtype, shared.get(name, 0.0)):
                    raise OutputError(f"{where}: {name} {_DIFFERS}")
            # Drops the factors, which may be large: only their names count from here on.
            back.updates.update(dict.fromkeys(piece.updates, _NOTHING))
            back.kernels.update(piece.kernels)
            back.vectors.update(piece.vectors)
    except OutputError:
        raise
    except ProLoRAError as error:
        raise OutputError(f"{where}: was written but cannot be read back: {error}") from error
    missing = {
        name
        for name in adapter.updates.keys() - back.updates.keys()
        if adapter.updates[name].norm() > _product_tolerance(dtype) * shared.get(name, 0.0)
    }
    if missing or foreign or back.kernels != adapter.kernels:
        changed = sorted(missing | foreign) or ["a convolution's kernel"]
        raise OutputError(f"{where}: reads back with other modules than written: {changed[0]}")
    for name in back.vectors.keys() | adapter.vectors.keys():
        one, other = back.vectors.get(name), adapter.vectors.get(name)
        if one is None or other is None:
            same = not any(x is not None and x.any() for x in (one, other))  # part of a fused bias
        else:
            same = vectors_match(one, other, dtype)
        if not same:
            raise OutputError(f"{where}: {name} {_DIFFERS}")


_DIFFERS = "reads back differently from what was written"
_NOTHING = LowRank(*[torch.zeros(1, 1, device="cpu")] * 2)


def _shared_sizes(adapter: Adapter, format: str) -> dict[str, float]:
    """Returns module -> ‖up‖·‖down‖ of factors that it shares in the file."""
    sizes: dict[str, float] = {}
    for group in lay_out(adapter, format).groups:
        if len(group.parts) > 1:
            updates = group.parts.values()
            up = math.hypot(*(update.up.norm().item() for update in updates))
            down = math.hypot(*(update.down.norm().item() for update in updates))
            sizes |= dict.fromkeys(group.parts, up * down)
    return sizes


def _product_tolerance(dtype: torch.dtype) -> float:
    """Returns what rounding both factors can cost, as a share of ‖up‖·‖down‖."""
    # The norm of a difference comes from Gram matrices, which are good to √eps of float64.
    return max(4 * torch.finfo(dtype).eps, 1e-6)


def _updates_match(back: LowRank, wanted: LowRank, dtype: torch.dtype, shared: float) -> bool:
    """Compares ‖ΔW_back − ΔW‖_F with what rounding to `dtype` can cost.

    `shared` is ‖up‖·‖down‖ of the factors in the file, where they hold more than this update: a
    small part of a fused weight is rounded as the whole is.
    """
    if back.shape != wanted.shape:
        return False
    pairs = ((back.up, wanted.up), (back.down, wanted.down))
    rounding = 2 * torch.finfo(dtype).eps
    if back.rank == wanted.rank and all(_factors_match(*pair, rounding) for pair in pairs):
        return True
    # The same product may have other factors, if they were balanced for the dtype or fused.
    difference = subtract_updates(back.to(torch.float64), wanted.to(torch.float64))
    size = max(shared, (wanted.up.double().norm() * wanted.down.double().norm()).item())
    return bool(difference.norm() <= _product_tolerance(dtype) * size)


def _factors_match(back: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """Compares ‖back − wanted‖_F with ‖wanted‖_F; False if either overflows float32."""
    size = wanted.norm()
    return bool(size.isfinite() and (back - wanted).norm() <= tolerance * size)
