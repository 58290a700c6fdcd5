"""What an adapter holds, checked from headers alone: modules, shapes, ranks, where scales are."""

from __future__ import annotations

import math
from dataclasses import replace

from ..errors import NonFiniteWeights, ShapeMismatch, UnsupportedFormat
from ..files.dtypes import is_floating, spell_dtype
from . import vectors
from .adapter_folder import PEFT_CONFIG
from .algorithms import forms
from .file_model import BaseNames, choose_codec
from .formats.peft_config import METADATA_KEY, scaling_from_config, scalings_from_metadata
from .key_groups import Contents, Slot, group_keys
from .keys import tensor_keys
from .keys.codec import cut_prefix, most_common_spelling
from .lora import Lora

_UNET_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")


def parse_contents(source: Lora, base: BaseNames | None = None) -> Contents:
    """Lists the updates of an adapter in file order; no tensor is read.

    Raises:
        UnsupportedFormat: a kind of adapter that is not read, or a key that is not understood.
        ShapeMismatch: tensors that do not go together.
    """
    base_key = (base.model, id(base.modules)) if base else None
    if base_key not in source.parsed:
        # The names are kept beside what was found by them, so that their id stays theirs.
        source.parsed[base_key] = base, _parse_contents(source, base)
    contents: Contents = source.parsed[base_key][1]
    return contents


def _parse_contents(source: Lora, base: BaseNames | None) -> Contents:
    scaling = None
    if source.config is not None:  # it may be of no LoRA at all
        scaling = scaling_from_config(source.config, f"{source.where}: {PEFT_CONFIG}")
    base = base or BaseNames()
    model = source.model.of_base(base.model)
    contents = group_keys(source, choose_codec(source.model, source.tensors.values(), base))
    slots = contents.slots
    paths = [slot.module for slot in slots] + [one.module for one in contents.vectors]
    model = model._replace(spelling=most_common_spelling(paths))
    prefixes = {slot.module.prefix for slot in slots}
    scalings = (
        dict.fromkeys(prefixes, scaling)
        if scaling
        else scalings_from_metadata(source.metadata, prefixes, source.where)
    )
    checked: dict[tuple[tuple[str, str, tuple[int, ...]], ...], forms.Form] = {}
    for slot in slots:
        every = [(role, source.tensors[key]) for role, key in slot.keys.items()]
        facts = tuple((role, tensor.dtype, tensor.shape) for role, tensor in every)
        if facts not in checked:  # a file's updates are of few kinds
            _check_complete(slot, source)
            checked[facts] = _check_shapes(slot, source)
        slot.form = checked[facts]
        if slot.module.matrix:
            where = f"{source.where}: {next(iter(slot.keys.values()))}"
            vectors.split_rows(slot.module.matrix, slot.form.out, where)
        slot.peft = scalings.get(slot.module.prefix)
        _check_config(slot, source)
    _check_together(slots, source)
    for vector in contents.vectors:
        vectors.check_vector(vector, source)
    return replace(contents, model=model)


def _check_complete(slot: Slot, source: Lora) -> None:
    present = next(iter(slot.keys.values()))
    role = forms.find_missing_role(slot.keys.keys())
    if role is not None:
        what = f"the {role} factor of {slot.module.name}"
        raise UnsupportedFormat(
            f"{source.where}: {present} has no partner: {what} is missing, so the file is "
            "incomplete; download or save it again"
        )
    role = forms.find_surplus_role(slot.keys.keys())
    if role is not None:
        raise UnsupportedFormat(
            f"{source.where}: {slot.keys[role]} does not go with {present}: one update of "
            f"{slot.module.name} in two kinds; remove one of them"
        )


def _check_shapes(slot: Slot, source: Lora) -> forms.Form:
    """Returns the form of the update, or says which tensors do not fit."""
    headers = {role: source.tensors[key] for role, key in slot.keys.items()}
    if "oft_blocks" in headers and len(headers["oft_blocks"].shape) == 4:
        raise UnsupportedFormat(
            tensor_keys.explain_refusal(source.where, slot.keys["oft_blocks"], tensor_keys.BOFT)
        )
    for role, header in headers.items():
        if role in forms.NUMBERS:
            if header.shape not in ((), (1,), (1, 1)):
                raise ShapeMismatch(
                    f"{source.where}: {slot.keys[role]} {list(header.shape)} is not one number"
                )
        elif not is_floating(header.dtype):
            raise UnsupportedFormat(
                f"{source.where}: {slot.keys[role]} is stored as {spell_dtype(header.dtype)}, not "
                "as floating point"
            )
        elif 0 in header.shape:
            raise ShapeMismatch(
                f"{source.where}: {slot.keys[role]} {list(header.shape)} holds no numbers; remove "
                f"the tensors of {slot.module.name}, which does nothing, or save the file again"
            )
    form = forms.derive_form({role: header.shape for role, header in headers.items()})
    if form is None:
        listed = " and ".join(
            f"{slot.keys[role]} {list(header.shape)}"
            for role, header in sorted(headers.items(), key=lambda item: item[0] != "up")
            if role not in forms.NUMBERS
        )
        raise ShapeMismatch(f"{source.where}: {listed} do not multiply: {_expected_shapes(slot)}")
    return form


def read_scale(slot: Slot, source: Lora) -> float:
    """Returns the factor in front of an update; reads only alpha, scale and scalar."""
    # Programs that read `scale` ignore an alpha beside it.
    role = "scale" if "scale" in slot.keys else "alpha"
    stated = _read_number(slot, role, source)
    if role == "alpha" and stated is not None:
        # OFT's alpha is a constraint; differences of weights and full LoKrs have no scale.
        has_scale = slot.form.rank > 0 and slot.form.algorithm != "oft"
        stated = stated / slot.form.rank if has_scale else None
    scale = 1.0 if stated is None else stated
    if slot.peft is not None:
        configured = slot.peft.scale(slot.module.local)
        agree = math.isclose(scale, configured, rel_tol=1e-3, abs_tol=1e-12)
        if stated is not None and not agree:
            raise UnsupportedFormat(
                f"{source.where}: {slot.keys[role]} asks for the scale {scale:.6g}, the PEFT "
                f"configuration for {configured:.6g}; remove the one that is wrong"
            )
        scale = configured
    scalar = _read_number(slot, "scalar", source)
    return scale if scalar is None else scale * scalar


def _read_number(slot: Slot, role: str, source: Lora) -> float | None:
    """Reads a tensor of one number, None if the slot lacks that role."""
    if role not in slot.keys:
        return None
    value = source.read_number(slot.keys[role])
    if not math.isfinite(value):
        raise NonFiniteWeights(f"{source.where}: {slot.keys[role]} is {value}; the file is damaged")
    return value


def _expected_shapes(slot: Slot) -> str:
    family = forms.kind_of_roles(slot.keys.keys())
    if family == "lora" and "mid" not in slot.keys:
        return (
            "they must be [out, rank] and [rank, in], or [out, rank, 1, 1] and [rank, in, kh, kw]"
        )
    kind = forms.ALGORITHM_NAMES[family]
    return f"they are not the shapes of a {kind}, or make a larger weight than any model has"


def _check_config(slot: Slot, source: Lora) -> None:
    """Refuses a configuration for other ranks or another kind: it belongs to another file."""
    if slot.peft is None:
        return
    what = PEFT_CONFIG if source.config is not None else METADATA_KEY
    first = next(iter(slot.keys.values()))
    family = forms.kind_of_roles(slot.keys.keys())
    if family != slot.peft.method:
        raise UnsupportedFormat(
            f"{source.where}: {first} is part of a {forms.ALGORITHM_NAMES[family]}, but "
            f"{what} is that of a {forms.ALGORITHM_NAMES[slot.peft.method]}, so the "
            "scale is not known"
        )
    rank = slot.peft.rank(slot.module.local)
    if rank != slot.form.rank and (family == "lora" or slot.form.rank):
        key = slot.keys.get("down", first)
        raise ShapeMismatch(
            f"{source.where}: {key} has rank {slot.form.rank}, but {what} says "
            f"{rank}. It belongs to another file, so the scale is not known"
        )
    if slot.peft.dora and not forms.MAGNITUDES & slot.keys.keys():
        raise UnsupportedFormat(
            f"{source.where}: {what} says DoRA, but the magnitudes of {slot.module.name} are "
            "missing, so the update is not known; save it again"
        )


def _check_together(slots: list[Slot], source: Lora) -> None:
    """Refuses updates of two models, and two updates of one module."""
    unet = [slot for slot in slots if slot.module.name.startswith(_UNET_BLOCKS)]
    transformer = [slot for slot in slots if slot.module.spelling and ".0." in slot.module.name]
    if unet and transformer:
        first, other = (next(iter(some[0].keys.values())) for some in (unet, transformer))
        if why := tensor_keys.explain_other_kind(source.tensors):
            raise UnsupportedFormat(f"{source.where}: {why}")
        if len({cut and cut.prefix for cut in map(cut_prefix, (first, other))}) == 1:
            raise UnsupportedFormat(
                f"{source.where}: {first} has the name of a UNet's module and {other} that of a "
                "transformer's. No model that prolora knows has both"
            )
        raise UnsupportedFormat(
            f"{source.where}: {first} is of a UNet and {other} of a transformer: the file holds "
            "updates of two models; save those of each model by themselves"
        )
    seen: dict[str, str] = {}  # a module may have an update of its own and one in a fused weight
    for slot in slots:
        key = next(iter(slot.keys.values()))
        for name in slot.module.modules:
            if seen.setdefault(name, key) != key:
                raise UnsupportedFormat(
                    f"{source.where}: {seen[name]} and {key} both update {name}; remove one of "
                    "the two"
                )
