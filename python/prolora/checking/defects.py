"""Defects of a LoRA's file in words, each with what mends it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose
from statistics import median
from typing import TYPE_CHECKING

from ..adapters.algorithms import forms
from ..adapters.alphas import Alphas
from ..adapters.contents import parse_contents, read_scale
from ..adapters.file_model import BaseNames
from ..adapters.key_groups import Contents
from ..adapters.lora import Lora
from ..files.dtypes import is_floating
from ..reports.report import Mark

if TYPE_CHECKING:
    from ..bases import Base

WEAKEST, STRONGEST = 1 / 16, 2.0
"""Trainers write scales alpha / rank between these; others are mostly a lost or a doubled alpha."""

DEFAULT_ALPHA = 1.0
"""What kohya's scripts train with where nobody sets an alpha, whatever the rank."""

LARGEST_FACTOR = 4.0
"""A fix by strength changes it by at most this factor."""

ZERO_IS_NOTHING = ("comfyui", "a1111", "diffusers")
"""Programs that multiply by an alpha of 0; trainers read it as the rank."""

SCALE_IS_READ = ("sdcpp", "a1111", "sdnext")
"""Programs that read a number called `.scale` in place of alpha / rank."""

FAINTEST = 1e-5
"""Updates below this share of their weights' norms do not show: it is a four-hundredth of the
spacing of bfloat16, in which most weights are stored."""

NOTHING = "This LoRA changes nothing: it is zero."
TRAIN_AGAIN = "download it again, or take a later save of its training"

OUTLIER = 1e4
"""An update larger than so many times its file's median is damaged."""


@dataclass(frozen=True)
class Defect:
    """Something wrong with a file."""

    mark: Mark  # ⚠ it acts otherwise than it was trained to, ✖ it breaks what it is added to
    text: str
    fix: str = ""  # what to do

    def __str__(self) -> str:
        """Returns the sentence and the fix."""
        return f"{self.text} Fix: {self.fix}." if self.fix else self.text


def find_defects(contents: Contents, opened: Lora, program: str | None = None) -> list[Defect]:
    """Finds what header and alphas show; `program` is a key of `known_loaders()`."""
    alphas = Alphas.of(contents.slots, opened)
    defects = [_find_unread(contents), _find_lost(alphas), _find_zero(alphas, program)]
    defects.append(_find_scales(contents, opened, program))
    defects += [_find_odd(alphas), _find_zeros(contents, opened)]
    return [defect for defect in defects if defect]


def _find_unread(contents: Contents) -> Defect | None:
    """Finds tensors that may be of updates, and are not read."""
    if not contents.unread:
        return None
    name, count = next(iter(contents.unread)), len(contents.unread)
    what = "1 part of this file is" if count == 1 else f"{count} parts of this file are"
    return Defect("⚠", f"{what} not read, {name}: {contents.left_out[name]}.")


def _find_lost(alphas: Alphas) -> Defect | None:
    """Finds updates without the alpha that the header has."""
    lost = [slot for slot in alphas.slots if not {"alpha", "scale"} & slot.keys.keys()]
    ranks: dict[float, int] = {}  # one alpha for all ranks is meant for the largest
    for slot in lost:
        if trained := alphas.find_trained(slot):
            ranks[trained] = max(ranks.get(trained, 0), slot.form.rank)
    factors = {rank / trained for trained, rank in ranks.items()} - {1.0}
    if factors:
        factor, trained_at = max(factors), {alphas.find_trained(slot) for slot in alphas.slots}
        every = len(lost) == len(alphas.slots)
        what = "alpha is" if every else f"{len(lost)} of {len(alphas.slots)} alphas are"
        named = " and ".join(f"{alpha:g}" for alpha in ranks)
        text = f"It acts {factor:.3g}× as strongly as it was trained: {what} missing, and its "
        fix = f"`convert()` it with `alpha={trained_at.pop():g}`" if len(trained_at) == 1 else ""
        if (
            every
            and len(ranks) == len(factors) == 1
            and 1 / LARGEST_FACTOR <= factor <= LARGEST_FACTOR
        ):
            fix += f"{'; or ' if fix else ''}load it at strength {1 / factor:.3g}"
        return Defect("⚠", f"{text}header says {named}.", fix)
    if any(slot.module.format == "kohya" and "magnitude" in slot.keys for slot in lost):
        text = "ai-toolkit saves no alpha of a DoRA in kohya's format: it is read at scale 1."
        return Defect("⚠", text)
    return None


def _find_zero(alphas: Alphas, program: str | None) -> Defect | None:
    """Finds alphas of 0, which programs read in two ways."""
    zero = [slot for slot in alphas.slots if alphas.stored.get(slot.module.name) == 0]
    if not zero:
        return None
    count = "Alpha is" if len(zero) == len(alphas.slots) else f"{len(zero)} alphas are"
    text = (
        f"{count} 0: ComfyUI, A1111 and diffusers make nothing of such updates; sd-scripts, "
        "musubi-tuner and LyCORIS read it as the rank."
    )
    ranks = {slot.form.rank for slot in alphas.slots}
    fix = f"`convert()` it with `alpha={ranks.pop()}`" if len(ranks) == 1 else ""
    return Defect("✖" if program in ZERO_IS_NOTHING else "⚠", text, fix)


def _find_zeros(contents: Contents, opened: Lora) -> Defect | None:
    """Finds a file without any effect; reads as far as the first update that has one."""
    used = {key for slot in contents.slots for key in slot.keys.values()}
    factors = (
        [key for role, key in slot.keys.items() if role not in forms.NUMBERS | forms.MAGNITUDES]
        for slot in contents.slots
    )
    for slot, keys in zip(contents.slots, factors, strict=True):
        some = any if slot.form.algorithm in ("oft", "glora") else all
        if some(not opened.is_zero(key) for key in keys):
            return None
    others = (x for x, info in opened.tensors.items() if x not in used and is_floating(info.dtype))
    return None if not all(map(opened.is_zero, others)) else Defect("⚠", NOTHING, TRAIN_AGAIN)


def _find_scales(contents: Contents, opened: Lora, program: str | None) -> Defect | None:
    """Finds scales in tensors called `.scale`, which most programs ignore."""
    keys = [slot.keys["scale"] for slot in contents.slots if "scale" in slot.keys]
    acting = [key for key in keys if not isclose(opened.read_number(key), 1.0)]
    if not acting or program in SCALE_IS_READ:
        return None
    count = "1 update has its" if len(acting) == 1 else f"{len(acting)} updates have their"
    text = (
        f"{count} scale in a tensor that only stable-diffusion.cpp, A1111 and SD.Next read "
        f"({acting[0]}): elsewhere they act with another strength."
    )
    return Defect("⚠", text, "`convert()` it")


def _find_odd(alphas: Alphas) -> Defect | None:
    """Finds scales that no trainer writes."""
    largest: dict[float, int] = {}  # one alpha for all ranks is meant for the largest
    for slot in alphas.slots:
        if alpha := alphas.stored.get(slot.module.name):
            largest[alpha] = max(largest.get(alpha, 0), slot.form.rank)
    usual = (DEFAULT_ALPHA, alphas.trained, alphas.trained_convolutions)
    odd = {
        alpha: rank
        for alpha, rank in largest.items()
        if not WEAKEST <= abs(alpha) / rank <= STRONGEST
        and not any(isclose(alpha, value, rel_tol=1e-2) for value in usual)
    }
    if not odd:
        return None
    count = sum(alphas.stored.get(slot.module.name) in odd for slot in alphas.slots)
    alpha = max(odd, key=lambda alpha: abs(math.log(abs(alpha) / odd[alpha])))
    rank, scale = odd[alpha], alpha / odd[alpha]
    text = (
        f"{count} of {len(alphas.slots)} updates have an unusual scale: alpha over rank is "
        f"{alpha:.4g}/{rank} = {scale:.3g}, and trainers write {WEAKEST} to {STRONGEST}."
    )
    if count < len(alphas.slots) or len(largest) > 1:
        return Defect("⚠", text)
    much = "little" if abs(scale) < 1 else "much"
    fix = f"where images show too {much} of it, `convert()` it with `alpha={rank}`"
    if 1 / LARGEST_FACTOR <= scale <= LARGEST_FACTOR:
        fix += f", or load it at strength {1 / scale:.3g}"
    return Defect("⚠", text, fix)


def find_deep_defects(
    contents: Contents, scales: Mapping[str, float], opened: Lora
) -> list[Defect]:
    """Finds what all numbers show: NaN, zeros, overflows and outliers; reads every tensor."""
    from ..adapters.measuring import measure_numbers

    numbers, defects = measure_numbers(contents, scales, opened), []
    if broken := numbers.broken:
        fix = "download it again; if it stays so, its training diverged"
        what = "1 tensor holds" if len(broken) == 1 else f"{len(broken)} tensors hold"
        defects.append(Defect("✖", f"{what} NaN or Inf, {broken[0]} the first.", fix))
    if over := numbers.over:
        what = "1 update" if len(over) == 1 else f"{len(over)} updates"
        text = f"{what} may overflow float16, {over[0]} the first."
        defects.append(Defect("⚠", text, "draw in bfloat16"))
    acting = {name: size for name, size in numbers.sizes.items() if size}
    usual = median(acting.values()) if acting else 0.0
    if huge := [name for name, size in acting.items() if size > OUTLIER * usual]:
        what = "1 update is" if len(huge) == 1 else f"{len(huge)} updates are"
        text = f"{what} more than {OUTLIER:.0f} times larger than the others: {huge[0]}."
        defects.append(Defect("⚠", text, "download it again"))
    if numbers.sizes and not (acting or numbers.vectors_act or broken):
        defects.append(Defect("⚠", NOTHING, TRAIN_AGAIN))
    return defects


def find_faint(opened: Lora, base: Base) -> Defect | None:
    """Finds a LoRA that is too small to show; reads as far as the first update that is not."""
    from ..adapters.measuring import measure_change

    largest = 0.0
    for slot in parse_contents(opened, BaseNames(base.model, base.shapes)).slots:
        weights = [base.read(name) for name in slot.module.modules if name in base.shapes]
        if forms.needs_base(slot.keys.keys()) or len(weights) < len(slot.module.modules):
            return None
        norm = math.hypot(*(float(weight.double().norm()) for weight in weights))
        share = measure_change(slot, read_scale(slot, opened), opened) / max(norm, 1e-30)
        if not share < FAINTEST:
            return None
        largest = max(largest, share)
    if not largest:
        return None
    text = f"This LoRA does not show: its largest update is {largest:.1g} of the weight it changes."
    return Defect("⚠", text, TRAIN_AGAIN)
