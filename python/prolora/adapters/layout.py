"""What an adapter holds, checked from headers alone: modules, shapes, ranks, where scales are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..errors import ShapeMismatch, UnsupportedFormat
from . import keys
from .names import Named
from .scaling import METADATA_KEY, PeftScaling, from_config, from_metadata
from .source import Source


@dataclass
class Slot:
    """The tensors of one module.

    Attributes:
        module: what the keys' common path means.
        keys: role -> key in the file.
        rank: the inner dimension, known once the shapes are checked.
        kernel: (kh, kw) if the module is a convolution.
        peft: the configuration that gives the scale, if there is one.
    """

    module: Named
    keys: dict[keys.Role, str] = field(default_factory=dict)
    rank: int = 0
    kernel: tuple[int, int] | None = None
    peft: PeftScaling | None = None


def lay_out(source: Source) -> dict[str, Slot]:
    """The modules of a plain LoRA, by canonical name, in file order; no factor is read.

    Raises:
        UnsupportedFormat: not a plain LoRA, or a key that is not understood.
        ShapeMismatch: factors that do not multiply.
    """
    slots = _group(source)
    scalings = _scalings(source, {slot.module.prefix for slot in slots.values()})
    for name, slot in slots.items():
        for role in ("up", "down"):
            if role not in slot.keys:
                present = next(iter(slot.keys.values()))
                raise UnsupportedFormat(
                    f"{source.where}: {present} has no partner: the {role} factor of {name} is "
                    "missing, so the file is incomplete; download or save it again"
                )
        _check_shapes(slot, source)
        slot.peft = scalings.get(slot.module.prefix)
        _check_config(slot, source)
    return slots


def _group(source: Source) -> dict[str, Slot]:
    """The understood keys by module; every other key is a reason to refuse the whole file."""
    if not source.headers:
        raise UnsupportedFormat(f"{source.where}: holds no tensors at all; download it again")
    slots: dict[str, Slot] = {}
    unknown = []
    for key in source.headers:
        parsed = keys.parse(key)
        if isinstance(parsed, keys.Refusal):
            raise UnsupportedFormat(
                f"{source.where}: {key} makes this {keys.REASONS[parsed.algorithm]}; only plain "
                f"LoRA and LoCon are read. {keys.REMEDIES[parsed.algorithm]}"
            )
        if parsed is None:
            unknown.append(key)
            continue
        slot = slots.setdefault(parsed.module.name, Slot(parsed.module))
        if parsed.role in slot.keys:
            raise UnsupportedFormat(
                f"{source.where}: {slot.keys[parsed.role]} and {key} are the same factor of "
                f"{parsed.module.name}; remove one of the two"
            )
        slot.keys[parsed.role] = key
    if unknown:
        _refuse_unknown(unknown, source)
    return slots


def _refuse_unknown(unknown: list[str], source: Source) -> None:
    """Says what the first keys that are not understood look like."""
    first = unknown[0]
    if any(keys.is_base_weight(key) for key in unknown) and not any(
        keys.split_factor(key) for key in source.headers
    ):
        raise UnsupportedFormat(
            f"{source.where}: {first} is a weight of a base model, not a LoRA; give it as --source "
            "or --target"
        )
    listed = ", ".join(key[:120] for key in unknown[:5])
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    hint = "They belong to no module that prolora knows"
    if any(word in first for word in ("double_blocks", "single_blocks", "joint_blocks")):
        hint = (
            "LoRAs on fused FLUX or SD3 weights are not read yet: convert it to diffusers' keys "
            "(transformer.….lora_A.weight), with diffusers or kohya's convert_flux_lora.py"
        )
    elif first.startswith("lora_transformer_"):
        hint = "Save it from OneTrainer in its diffusers format"
    raise UnsupportedFormat(
        f"{source.where}: {len(unknown)} keys are not understood: {listed}{more}. {hint}"
    )


def _scalings(source: Source, prefixes: set[str]) -> dict[str, PeftScaling]:
    """Component prefix -> the configuration its modules are scaled by."""
    if source.config is not None:
        scaling = from_config(source.config, f"{source.where}: adapter_config.json")
        return dict.fromkeys(prefixes, scaling)
    return from_metadata(source.metadata, prefixes, source.where)


def _check_shapes(slot: Slot, source: Source) -> None:
    """Sets rank and kernel, or says which factors do not fit."""
    down_key, up_key = slot.keys["down"], slot.keys["up"]
    down, up = source.headers[down_key], source.headers[up_key]
    for key, header in ((down_key, down), (up_key, up)):
        if not header.dtype.is_floating_point:
            raise UnsupportedFormat(
                f"{source.where}: {key} is stored as {header.dtype}, not as floating point"
            )
    fits = (
        len(down.shape) in (2, 4) and len(up.shape) in (2, 4) and len(up.shape) <= len(down.shape)
    )
    fits = fits and up.shape[1] == down.shape[0] and math.prod(up.shape[2:]) == 1
    if not fits or 0 in (*down.shape, *up.shape):
        raise ShapeMismatch(
            f"{source.where}: {up_key} {list(up.shape)} and {down_key} {list(down.shape)} do not "
            "multiply: they must be [out, rank] and [rank, in], or [out, rank, 1, 1] and "
            "[rank, in, kh, kw]"
        )
    slot.rank = down.shape[0]
    slot.kernel = (down.shape[2], down.shape[3]) if len(down.shape) == 4 else None
    alpha = slot.keys.get("alpha")
    if alpha and math.prod(source.headers[alpha].shape) != 1:
        raise ShapeMismatch(
            f"{source.where}: {alpha} {list(source.headers[alpha].shape)} is not one number"
        )


def _check_config(slot: Slot, source: Source) -> None:
    """A configuration for other ranks describes another file."""
    if slot.peft is None:
        return
    rank = slot.peft.rank(slot.module.local)
    if rank != slot.rank:
        what = "adapter_config.json" if source.config is not None else METADATA_KEY
        raise ShapeMismatch(
            f"{source.where}: {slot.keys['down']} has rank {slot.rank}, but {what} says {rank}. "
            "It belongs to another file, so the scale is not known"
        )
