"""Defects of a LoRA's file in words, each with what mends it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import isclose
from statistics import median

from ..adapters.algorithms.forms import MAGNITUDES, NUMBERS
from ..adapters.lora import Lora
from ..adapters.slots import Slot
from ..reports.report import Mark

WEAKEST, STRONGEST = 1 / 16, 2.0
"""Trainers write scales alpha / rank between these; others are mostly a lost or a doubled alpha."""

OUTLIER = 1e4
"""An update larger than so many times its file's median is damaged."""

LARGEST_HALF = 65504.0
"""The largest float16."""


@dataclass(frozen=True)
class Defect:
    """Something wrong with a file."""

    mark: Mark  # ⚠ it acts otherwise than it was trained to, ✖ it breaks what it is added to
    text: str
    mend: str = ""  # what to do

    def __str__(self) -> str:
        """Returns the sentence and the mend."""
        return f"{self.text} Mend: {self.mend}." if self.mend else self.text


def find_defects(
    slots: Sequence[Slot], scales: Mapping[str, float], opened: Lora
) -> tuple[Defect, ...]:
    """Finds what header and scales tell: alphas that are lost or unusual."""
    slots = [slot for slot in slots if slot.form.rank and slot.peft is None]
    trained, found = 0.0, []  # alpha in the trainer's header
    with suppress(TypeError, ValueError):
        trained = float(json.loads(opened.metadata.get("ss_network_alpha", "0")))
    lost = [slot for slot in slots if not {"alpha", "scale"} & slot.keys.keys()]
    factor = max((slot.form.rank / trained for slot in lost), default=1.0) if trained else 1.0
    if factor != 1.0:
        every = len(lost) == len(slots)
        what = "alpha is" if every else f"{len(lost)} of {len(slots)} alphas are"
        text = (
            f"It acts {factor:.3g}× as strongly as it was trained: {what} missing, and its header "
        )
        mend = f"load it at strength {1 / factor:.3g}" if every else "download it again"
        mend += f"; or `convert()` it with `alpha={trained:g}`"
        found.append(Defect("⚠", f"{text}says {trained:g}.", mend))
    elif any(slot.module.format == "kohya" and "magnitude" in slot.keys for slot in lost):
        text = "ai-toolkit saves no alpha of a DoRA in kohya's format: it is read at scale 1."
        found.append(Defect("⚠", text, "if its alpha was not its rank, `convert()` with `alpha`"))
    odd = {
        slot.module.name: slot
        for slot in slots
        if "alpha" in slot.keys
        and not WEAKEST <= abs(scales[slot.module.name]) <= STRONGEST
        and not isclose(opened.read_number(slot.keys["alpha"]), trained, rel_tol=1e-2)
    }
    if odd:
        name = min(odd, key=lambda name: min(abs(scales[name]), 1 / (abs(scales[name]) or 1)))
        scale, rank = scales[name], odd[name].form.rank
        text = (
            f"{len(odd)} of {len(slots)} updates have an unusual scale: alpha over rank is "
            f"{scale * rank:.4g}/{rank} = {scale:.3g}, and trainers write {WEAKEST} to {STRONGEST}."
        )
        much = "little" if abs(scale) < 1 else "much"
        mend = f"`convert()` it with `alpha={trained:g}`, as its header has it" if trained else ""
        if scale and not mend:
            mend = f"where images show too {much} of it, load it at strength {1 / scale:.3g}"
        found.append(Defect("⚠", text, mend))
    return tuple(found)


def find_deep_defects(
    slots: Iterable[Slot], scales: Mapping[str, float], opened: Lora
) -> tuple[Defect, ...]:
    """Finds what all numbers tell: NaN, zeros, overflows and outliers; reads every tensor."""
    broken: list[str] = []
    over: list[str] = []
    sizes: dict[str, float] = {}
    for slot in slots:
        name, scale = slot.module.name, abs(scales[slot.module.name])
        parts = {role: opened.read(key).double() for role, key in slot.keys.items()}
        bad = [slot.keys[role] for role, x in parts.items() if not x.isfinite().all()]
        if bad:
            broken += bad
            continue
        factors = [x for role, x in parts.items() if role not in NUMBERS | MAGNITUDES]
        sizes[name] = scale if all(x.any() for x in factors) else 0.0
        if parts.keys() >= {"up", "down"} and "mid" not in parts:
            up, down = parts["up"].flatten(1), parts["down"].flatten(1)
            product = ((up.mT @ up) * (down @ down.mT)).sum()  # ‖up·down‖², of the rank's size
            sizes[name] = scale * float(product.clamp_min(0).sqrt())
            if scale * float(up.norm(dim=1).max() * down.norm(dim=0).max()) > LARGEST_HALF:
                over.append(name)
    found = []
    if broken:
        mend = "download it again; if it stays so, its training diverged"
        text = f"{len(broken)} tensors hold NaN or Inf, {broken[0]} the first."
        found.append(Defect("✖", text, mend))
    if over:
        text = f"{len(over)} updates may overflow float16, {over[0]} the first."
        found.append(Defect("⚠", text, "draw in bfloat16"))
    acting = {name: size for name, size in sizes.items() if size}
    usual = median(acting.values()) if acting else 0.0
    huge = [name for name, size in acting.items() if size > OUTLIER * usual]
    if huge:
        text = f"{len(huge)} updates are {OUTLIER:.0f} times larger than the others: {huge[0]} …"
        found.append(Defect("⚠", text, "download it again"))
    if sizes and not acting:
        found.append(Defect("⚠", "This LoRA changes nothing: it is zero."))
    return tuple(found)
