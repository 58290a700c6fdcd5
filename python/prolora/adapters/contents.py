"""What an adapter holds, checked from headers alone: modules, shapes, ranks, where scales are."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field

from ..architectures.family import Family
from ..architectures.modules import find_component
from ..architectures.recognition import find_parts
from ..errors import NonFiniteWeights, ShapeMismatch, UnsupportedFormat
from . import fused_updates, vectors
from .algorithms import forms
from .algorithms.forms import Form
from .family import choose_reading, guess_family
from .formats.peft_config import (
    METADATA_KEY,
    PeftScaling,
    scaling_from_config,
    scalings_from_metadata,
)
from .keys import module_names, tensor_keys
from .keys.module_names import ModulePath
from .left_out import find_volumes, leave_out_foreign, leave_out_volume
from .naming import BaseNames, list_matrices, most_common_spelling
from .unread import PEFT_CONFIG, UnreadAdapter
from .vectors import VectorSlot

# Of a textual-inversion embedding: the names that A1111, kohya and SDXL's trainers write.
_EMBEDDING = re.compile(r"(emb_params|string_to_param\..*|clip_[lg]|t5xxl)$")
_UNET_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
_CONVOLUTION_NAME = re.compile(r"(^|\.)(conv[12]?|conv_in|conv_out)$")


@dataclass
class Slot:
    """The tensors of one module, or of one weight that several modules are rows of.

    Attributes:
        module: what the keys' common path means.
        keys: role -> key in the file.
        form: kind, shape and rank, known once the shapes are checked.
        peft: the configuration that gives the scale, if there is one.
    """

    module: ModulePath
    keys: dict[str, str] = field(default_factory=dict)
    form: Form = field(default_factory=lambda: Form("lora", 0, 0, 0))
    peft: PeftScaling | None = None

    @property
    def kind(self) -> str:
        """The algorithm, with "+dora" if the result is rescaled."""
        dora = {"dora_scale", "magnitude"} & self.keys.keys()
        return self.form.algorithm + ("+dora" if dora else "")

    @property
    def kernel(self) -> tuple[int, int] | None:
        """(kh, kw) of a convolution, by its shape or, where factors are flat, by its name."""
        if self.form.kernel is None and self.form.algorithm in ("loha", "lokr"):
            is_3x3 = _CONVOLUTION_NAME.search(self.module.name) and self.form.inputs % 9 == 0
            return (3, 3) if is_3x3 else None
        return self.form.kernel


@dataclass(frozen=True)
class Contents:
    """An adapter file by its header.

    Attributes:
        slots: one for each update.
        vectors: one for each bias and each tensor of a normalisation layer.
        left_out: tensors that are neither -> the reason.
        family: id of the family whose names the modules have, None where several have them.
        unread: path of an update that is left out -> its (out, in, rank).
    """

    slots: list[Slot]
    vectors: list[VectorSlot]
    left_out: dict[str, str]
    family: str | None = None
    unread: dict[str, tuple[int, int, int]] = field(default_factory=dict)


def parse_contents(source: UnreadAdapter, base: BaseNames | None = None) -> Contents:
    """The updates of an adapter in file order; no tensor is read.

    Args:
        source: the adapter.
        base: what is known of the base model it belongs to.

    Raises:
        UnsupportedFormat: a kind of adapter that is not read, or a key that is not understood.
        ShapeMismatch: tensors that do not go together.
    """
    if source.config is not None:
        scaling_from_config(
            source.config, f"{source.where}: {PEFT_CONFIG}"
        )  # may be of no LoRA at all
    matrices = list_matrices(source)
    reading = choose_reading(matrices, source.metadata, base.family if base else None)
    contents = _group_keys(source, reading)
    if base and base.modules:
        _restore_dots(contents, base.modules)
    shapes = {
        name: shape
        for matrix in matrices
        for name, shape in (find_parts(reading, matrix) if reading else {}).items()
    }
    family = base.family if base else None
    if family is None and matrices:
        style = most_common_spelling(slot.module for slot in contents.slots)
        family = guess_family(shapes, source.metadata, style, matrices)
    if family is None and reading and any(slot.module.matrix for slot in contents.slots):
        family = reading.id  # the authors' names are those of this family, whatever its sizes
    slots = _settle_t5(contents.slots, family)
    scalings = _peft_scalings(source, {slot.module.prefix for slot in slots})
    for slot in slots:
        _check_complete(slot, source)
        _check_shapes(slot, source)
        slot.peft = scalings.get(slot.module.prefix)
        _check_config(slot, source)
    _check_parts(slots, source)
    _check_one_model(slots, source)
    for vector in contents.vectors:
        vectors.check_vector(vector, source)
    return Contents(slots, contents.vectors, contents.left_out, family, contents.unread)


def _restore_dots(contents: Contents, modules: Collection[str]) -> None:
    """Gives modules that no family knows, spelled with underscores, the names the base has."""
    by_underscored: dict[str, str | None] = {}
    for name in modules:
        underscored = name.replace(".", "_")
        by_underscored[underscored] = None if underscored in by_underscored else name

    def restore(module: ModulePath) -> ModulePath:
        is_underscored = module.described and module.spelling and not module.spelling.dotted
        base_name = by_underscored.get(module.name) if is_underscored else None
        return module._replace(name=base_name, local=base_name) if base_name else module

    for slot in contents.slots:
        slot.module = restore(slot.module)
    for vector in contents.vectors:
        vector.module = restore(vector.module)


def _group_keys(source: UnreadAdapter, family: Family | None) -> Contents:
    """Groups the keys by module; a key that is not understood is a reason to refuse the file."""
    if not source.headers:
        raise UnsupportedFormat(f"{source.where}: holds no tensors at all; download it again")
    slots: dict[str, Slot] = {}
    vector_slots: dict[str, VectorSlot] = {}
    left_out: dict[str, str] = {}
    unknown = []
    for key, header in source.headers.items():
        parsed = tensor_keys.parse_key(key, header.shape, family)
        if isinstance(parsed, tensor_keys.RefusedKey):
            raise UnsupportedFormat(explain_refusal(source, key, parsed.algorithm))
        if isinstance(parsed, tensor_keys.LeftOutKey):
            left_out[key] = parsed.reason
        elif parsed is None:
            unknown.append(key)
        elif isinstance(parsed, tensor_keys.VectorKey):
            vector = VectorSlot(parsed.module, parsed.tensor, key, parsed.scaled)
            other = vector_slots.setdefault(vector.name, vector)
            if other is not vector:
                raise UnsupportedFormat(
                    f"{source.where}: {other.key} and {key} are both the {vector.name}; remove one "
                    "of the two"
                )
        elif parsed.role == "diff" and len(header.shape) not in (2, 4):
            left_out[key] = "a difference of a table or of a convolution over time: not moved"
        else:
            slot = slots.setdefault(parsed.module.name, Slot(parsed.module))
            if parsed.role in slot.keys:
                raise UnsupportedFormat(
                    f"{source.where}: {slot.keys[parsed.role]} and {key} are the same factor of "
                    f"{parsed.module.name}; remove one of the two"
                )
            slot.keys[parsed.role] = key
    if 2 * len(unknown) > len(source.headers) or (unknown and not slots):
        _refuse_unknown(unknown, source)
    unread = leave_out_foreign(unknown, left_out, source)
    for name in find_volumes({name: slot.keys for name, slot in slots.items()}, source):
        unread |= leave_out_volume(name, slots.pop(name).keys, left_out, source)
    if not slots and not vector_slots:
        key, reason = next(iter(left_out.items()))
        if all(_EMBEDDING.match(name) for name in source.headers):
            raise _refuse_embedding(source)
        raise UnsupportedFormat(f"{source.where}: holds no update of a weight; {key} is {reason}")
    vector_list = list(vector_slots.values())
    return Contents(list(slots.values()), vector_list, left_out, unread=unread)


def explain_refusal(source: UnreadAdapter, key: str, algorithm: str) -> str:
    """What to tell the user about an adapter type that is not read."""
    return (
        f"{source.where}: {key} makes this {tensor_keys.REASONS[algorithm]}, which prolora does "
        f"not read. {tensor_keys.REMEDIES[algorithm]}"
    )


def _refuse_unknown(unknown: list[str], source: UnreadAdapter) -> None:
    """Says what the first keys that are not understood look like."""
    first = unknown[0]
    if any(tensor_keys.is_base_weight(key) for key in unknown) and not any(
        tensor_keys.split_factor(key) for key in source.headers
    ):
        raise UnsupportedFormat(
            f"{source.where}: {first} is a weight of a base model, not a LoRA; give it as --source "
            "or --target"
        )
    if all(_EMBEDDING.match(key) for key in unknown):
        raise _refuse_embedding(source)
    listed = ", ".join(key[:120] for key in unknown[:5])
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    count = "1 key is" if len(unknown) == 1 else f"{len(unknown)} keys are"
    hint = tensor_keys.explain_other_kind(unknown) or "They belong to no module that prolora knows"
    raise UnsupportedFormat(f"{source.where}: {count} not understood: {listed}{more}. {hint}")


def _refuse_embedding(source: UnreadAdapter) -> UnsupportedFormat:
    return UnsupportedFormat(
        f"{source.where}: a textual-inversion embedding, not a LoRA; it cannot be moved"
    )


def _settle_t5(slots: list[Slot], family: str | None) -> list[Slot]:
    """Renames T5, which kohya and ComfyUI count as the third encoder, to its number in diffusers.

    FLUX has two text encoders and T5 is the second; SD3 has three.
    """
    modules = [name for slot in slots for name in slot.module.modules]
    second = [name for name in modules if find_component(name) == "text_encoder_2"]
    has_second_clip = not all(map(module_names.is_t5, second))
    if has_second_clip or family == "sd3":
        return slots
    for slot in slots:
        module = slot.module
        if module.format != "diffusers" and module.name.startswith("text_encoder_3."):
            name = f"text_encoder_2.{module.local}"
            slot.module = module._replace(name=name, prefix="text_encoder_2.")
    return slots


def _peft_scalings(source: UnreadAdapter, prefixes: set[str]) -> dict[str, PeftScaling]:
    """Component prefix -> the configuration its modules are scaled by."""
    if source.config is not None:
        scaling = scaling_from_config(source.config, f"{source.where}: {PEFT_CONFIG}")
        return dict.fromkeys(prefixes, scaling)
    return scalings_from_metadata(source.metadata, prefixes, source.where)


def _check_complete(slot: Slot, source: UnreadAdapter) -> None:
    """Refuses an update that lacks a tensor or has one of another kind."""
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


def _check_shapes(slot: Slot, source: UnreadAdapter) -> None:
    """Finds the form of the update, or says which tensors do not fit."""
    headers = {role: source.headers[key] for role, key in slot.keys.items()}
    for role, header in headers.items():
        if role not in ("alpha", "scalar") and not header.dtype.is_floating_point:
            raise UnsupportedFormat(
                f"{source.where}: {slot.keys[role]} is stored as {header.dtype}, not as floating "
                "point"
            )
    if "oft_blocks" in headers and len(headers["oft_blocks"].shape) == 4:
        raise UnsupportedFormat(explain_refusal(source, slot.keys["oft_blocks"], "boft"))
    for role in ("alpha", "scalar"):
        if role in headers and headers[role].shape not in ((), (1,), (1, 1)):
            raise ShapeMismatch(
                f"{source.where}: {slot.keys[role]} {list(headers[role].shape)} is not one number"
            )
    for role, header in headers.items():
        if 0 in header.shape:
            raise ShapeMismatch(
                f"{source.where}: {slot.keys[role]} {list(header.shape)} holds no numbers; remove "
                f"the tensors of {slot.module.name}, which does nothing, or save the file again"
            )
    form = forms.derive_form({role: header.shape for role, header in headers.items()})
    if form is None:
        listed = " and ".join(
            f"{slot.keys[role]} {list(header.shape)}"
            for role, header in sorted(headers.items(), key=lambda item: item[0] != "up")
            if role not in ("alpha", "scalar")
        )
        raise ShapeMismatch(f"{source.where}: {listed} do not multiply: {_expected_shapes(slot)}")
    slot.form = form
    if slot.module.matrix:
        where = f"{source.where}: {next(iter(slot.keys.values()))}"
        fused_updates.split_rows(slot.module.matrix, form.out, where)


def read_scale(slot: Slot, source: UnreadAdapter) -> float:
    """The factor in front of an update; reads no more than its alpha and scalar.

    Raises:
        NonFiniteWeights: one of the two is not finite.
        UnsupportedFormat: alpha and the PEFT configuration contradict each other.
    """
    alpha = _read_number(slot, "alpha", source)
    # OFT's alpha is a constraint; differences of weights and full LoKrs have no scale.
    has_scale = slot.form.rank > 0 and slot.form.algorithm != "oft"
    scale = 1.0
    if alpha is not None and has_scale:
        scale = alpha / slot.form.rank
    if slot.peft is not None:
        configured = slot.peft.scale(slot.module.local)
        agree = math.isclose(scale, configured, rel_tol=1e-3, abs_tol=1e-12)
        if alpha is not None and has_scale and not agree:
            raise UnsupportedFormat(
                f"{source.where}: {slot.keys['alpha']} asks for the scale {scale:.6g}, the PEFT "
                f"configuration for {configured:.6g}; remove the one that is wrong"
            )
        scale = configured
    scalar = _read_number(slot, "scalar", source)
    return scale if scalar is None else scale * scalar


def _read_number(slot: Slot, role: str, source: UnreadAdapter) -> float | None:
    """The value of a tensor of one number, None if the slot has none of that role."""
    if role not in slot.keys:
        return None
    value = float(source.read(slot.keys[role]).double())
    if not math.isfinite(value):
        raise NonFiniteWeights(f"{source.where}: {slot.keys[role]} is {value}; the file is damaged")
    return value


def _expected_shapes(slot: Slot) -> str:
    """The shapes there should be."""
    family = forms.kind_of_roles(slot.keys.keys())
    if family == "lora" and "mid" not in slot.keys:
        return (
            "they must be [out, rank] and [rank, in], or [out, rank, 1, 1] and [rank, in, kh, kw]"
        )
    return f"they are not the shapes of a {forms.ALGORITHM_NAMES[family]}"


def _check_config(slot: Slot, source: UnreadAdapter) -> None:
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
    if slot.peft.dora and not {"magnitude", "dora_scale"} & slot.keys.keys():
        raise UnsupportedFormat(
            f"{source.where}: {what} says DoRA, but the magnitudes of {slot.module.name} are "
            "missing, so the update is not known; save it again"
        )


def _check_one_model(slots: list[Slot], source: UnreadAdapter) -> None:
    """Refuses updates of a UNet's blocks beside those of a transformer's."""
    unet = [slot for slot in slots if slot.module.name.startswith(_UNET_BLOCKS)]
    transformer = [slot for slot in slots if slot.module.spelling and ".0." in slot.module.name]
    if unet and transformer:
        first, other = (next(iter(some[0].keys.values())) for some in (unet, transformer))
        raise UnsupportedFormat(
            f"{source.where}: {first} is of a UNet and {other} of a transformer: the file holds "
            "updates of two models; save those of each model by themselves"
        )


def _check_parts(slots: list[Slot], source: UnreadAdapter) -> None:
    """Refuses a module with an update of its own and one in a fused weight."""
    seen: dict[str, str] = {}
    for slot in slots:
        key = next(iter(slot.keys.values()))
        for name in slot.module.modules:
            if name in seen:
                raise UnsupportedFormat(
                    f"{source.where}: {seen[name]} and {key} both update {name}; remove one of "
                    "the two"
                )
            seen[name] = key
