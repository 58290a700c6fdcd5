"""All numbers of a LoRA's file, read once: what is broken, too large, or acts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..files.dtypes import is_floating
from .algorithms import forms
from .algorithms.lora_products import lora_product, measure_rows
from .key_groups import Contents, Slot
from .lora import Lora

LARGEST_HALF = 65504.0
"""The largest float16."""


@dataclass
class FileNumbers:
    """What the tensors of a file hold."""

    broken: list[str] = field(default_factory=list)  # keys with NaN or Inf
    over: list[str] = field(default_factory=list)  # modules or keys that float16 may not hold
    # Module -> ‖ΔW‖; 1 or 0 where only the base's weight tells it
    sizes: dict[str, float] = field(default_factory=dict)
    vectors_act: bool = False  # a tensor outside the updates is not zero


def measure_numbers(contents: Contents, scales: Mapping[str, float], opened: Lora) -> FileNumbers:
    """Reads every tensor of a file once; `scales` is module -> factor."""
    numbers = FileNumbers()
    for slot in contents.slots:
        _measure_update(slot, abs(scales[slot.module.name]), opened, numbers)
    used = {key for slot in contents.slots for key in slot.keys.values()}
    for key, header in opened.tensors.items():
        if key in used or not is_floating(header.dtype):
            continue
        tensor = opened.read(key).double()
        if not tensor.isfinite().all():
            numbers.broken.append(key)
        elif tensor.any():
            numbers.vectors_act = True
            numbers.over += [key] if float(tensor.abs().max()) > LARGEST_HALF else []
    return numbers


def measure_change(slot: Slot, scale: float, opened: Lora) -> float:
    """Returns ‖ΔW‖ of an update that does not depend on the base, NaN if a number is."""
    parts = {role: opened.read(key).double() for role, key in slot.keys.items()}
    return float(_measure_rows(slot.form.algorithm, parts).norm()) * abs(scale)


def _measure_update(slot: Slot, scale: float, opened: Lora, numbers: FileNumbers) -> None:
    name, parts = slot.module.name, {r: opened.read(k).double() for r, k in slot.keys.items()}
    if bad := [slot.keys[role] for role, x in parts.items() if not x.isfinite().all()]:
        numbers.broken += bad
        return
    factors = [x for role, x in parts.items() if role not in forms.NUMBERS | forms.MAGNITUDES]
    if forms.kind_of_roles(parts.keys()) in ("oft", "glora"):
        numbers.sizes[name] = float(scale != 0 and any(x.any() for x in factors))
        return
    rows = scale * _measure_rows(slot.form.algorithm, parts)
    numbers.sizes[name] = float(rows.norm())
    if max(float(rows.max()), *(float(x.abs().max()) for x in factors)) > LARGEST_HALF:
        numbers.over.append(name)


def _measure_rows(algorithm: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Measures the norms of an update's rows; two factors are not multiplied out."""
    if algorithm in ("loha", "lokr", "full"):
        return measure_rows(algorithm, tensors)
    product = lora_product(tensors)
    up, down = product.up.double(), product.down.double()
    return ((up @ (down @ down.mT)) * up).sum(1).clamp_min(0).sqrt()
