"""The tensors of an adapter by module: what is read, what is left out, and what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ..architectures.identify import UNKNOWN, Model, share_rows
from ..errors import UnsupportedFormat
from .algorithms import forms
from .algorithms.forms import Form
from .file_model import Size, measure_update
from .formats.peft_config import PeftScaling
from .keys import tensor_keys
from .keys.codec import Codec, Module
from .lora import Lora
from .vectors import VectorSlot

# Of a textual-inversion embedding: the names that A1111, kohya and SDXL's trainers write.
_EMBEDDING = re.compile(r"(emb_params|string_to_param\..*|clip_[lg]|t5xxl)$")
_CONVOLUTION_NAME = re.compile(r"(^|\.)(conv[12]?|conv_in|conv_out)$")
_UNSHAPED = Form("lora", 0, 0, 0)


@dataclass
class Slot:
    """The tensors of one module, or of one fused weight."""

    module: Module  # what the keys' common path means
    keys: dict[str, str] = field(default_factory=dict)  # role -> key in the file
    # Kind, shape and rank, known once the shapes are checked
    form: Form = _UNSHAPED
    peft: PeftScaling | None = None  # the configuration that gives the scale, if any

    @property
    def kind(self) -> str:
        """The algorithm, with "+dora" if the result is rescaled."""
        dora = forms.MAGNITUDES & self.keys.keys()
        return self.form.algorithm + ("+dora" if dora else "")

    @property
    def kernel(self) -> tuple[int, ...] | None:
        """(kh, kw) of a convolution, by shape or, for flat factors, by name."""
        if self.form.kernel is None and self.form.algorithm in ("loha", "lokr"):
            is_3x3 = _CONVOLUTION_NAME.search(self.module.name) and self.form.inputs % 9 == 0
            return (3, 3) if is_3x3 else None
        return self.form.kernel


@dataclass(frozen=True)
class Contents:
    """An adapter file by its header."""

    slots: list[Slot]  # one for each update
    vectors: list[VectorSlot]  # one for each bias and each tensor of a normalisation layer
    left_out: dict[str, str]  # tensor, or path of an update, that is neither -> the reason
    model: Model = UNKNOWN  # that it is for
    # Those of them that may be an update -> (out, in, rank)
    unread: dict[str, Size] = field(default_factory=dict)
    # Modules that are left out because a tensor beside them is not read
    refused: set[str] = field(default_factory=set)


def measure_modules(slots: Iterable[Slot]) -> dict[str, tuple[int, int]]:
    """Returns module -> out × in·kh·kw of its update; fused ones are taken apart."""
    shapes: dict[str, tuple[int, int]] = {}
    for slot in slots:
        size, matrix = (slot.form.out, slot.form.inputs), slot.module.matrix
        shapes |= share_rows(matrix, size) if matrix else {slot.module.name: size}
    return shapes


def group_keys(source: Lora, codec: Codec) -> Contents:
    """Groups the keys by module; a key that is not understood is a reason to refuse the file."""
    if not source.tensors:
        raise UnsupportedFormat(f"{source.where}: holds no tensors at all; download it again")
    slots: dict[str, Slot] = {}
    vector_slots: dict[str, VectorSlot] = {}
    left_out: dict[str, str] = {}
    unknown = []
    for key, path, role, _, shape in source.tensors.values():
        refused, reason = tensor_keys.find_unread(key)
        if refused:
            raise UnsupportedFormat(tensor_keys.explain_refusal(source.where, key, refused))
        module, axes = codec.read(path) if path else None, len(shape)
        if role == "diff" and axes == 1:
            role = "weight"
        if reason:
            left_out[key] = reason
        elif module is None and role in tensor_keys.VECTORS:
            left_out[key] = tensor_keys.FOREIGN_VECTOR
        elif module is None:
            unknown.append(key)
        elif role in tensor_keys.VECTORS:
            vector = VectorSlot(module, tensor_keys.VECTORS[role], key, role == "scaled_bias")
            other = vector_slots.setdefault(vector.name, vector)
            if other is not vector:
                raise _refuse_double(source, other.key, key, f"both the {vector.name}")
        elif role == "diff" and axes not in (2, 4, 5):
            left_out[key] = "a difference of a table: not moved"
        else:
            slot = slots.setdefault(module.name, Slot(module))
            if role in slot.keys:
                raise _refuse_double(
                    source, slot.keys[role], key, f"the same factor of {module.name}"
                )
            slot.keys[role] = key
    contents = Contents(list(slots.values()), list(vector_slots.values()), left_out)
    return _leave_out(contents, unknown, source)


def _refuse_double(source: Lora, one: str, other: str, what: str) -> UnsupportedFormat:
    return UnsupportedFormat(f"{source.where}: {one} and {other} are {what}; remove one of the two")


def _leave_out(contents: Contents, unknown: list[str], source: Lora) -> Contents:
    """Accounts for all tensors of the file: those that no update takes are named, with the reason.

    A tensor that is not read refuses the update that it stands beside: it may change what that
    does. One that stands alone is left out, if there is not too much of it.
    """
    slots = {slot.module.name: slot for slot in contents.slots}
    told = contents.left_out
    neighbours = _find_neighbours(contents, unknown, slots)
    scales = {slot.keys.get("scale") for slot in slots.values()}
    foreign = [key for key in unknown if key not in neighbours and key not in scales]
    if 2 * len(foreign) > len(source.tensors) or (foreign and not slots):
        _refuse_unknown(foreign, source)
    reasons = {
        name: f"an update with a tensor {suffix!r:.80} that prolora does not read"
        for name, suffix in neighbours.values()
    }
    owners = {key: name for key, (name, _) in neighbours.items()}
    for name in [name for name in reasons if name in slots]:
        if _measure(slots[name].keys, source):  # an incomplete update refuses the file
            owners |= dict.fromkeys(slots.pop(name).keys.values(), name)
    owners |= {v.key: v.module.name for v in contents.vectors if v.module.name in reasons}
    vector_slots = [vector for vector in contents.vectors if vector.key not in owners]
    used = {key for slot in slots.values() for key in slot.keys.values()}
    used |= {vector.key for vector in vector_slots}
    behind: dict[str, list[str]] = {}
    for key in source.tensors:
        if key not in used:
            path = None if key in told else source.tensors[key].path
            behind.setdefault(owners.get(key) or path or key, []).append(key)
    left_out, unread = {}, {}
    for name, keys in behind.items():
        left_out[name] = reasons.get(name) or told.get(name) or tensor_keys.FOREIGN
        if left_out[name] not in tensor_keys.NO_UPDATES:
            unread[name] = measure_unread(keys, source)
    if not slots and not vector_slots:
        key, reason = next(iter(left_out.items()))
        if all(_EMBEDDING.match(name) for name in source.tensors):
            raise _refuse_embedding(source)
        raise UnsupportedFormat(f"{source.where}: holds no update of a weight; {key} is {reason}")
    return Contents(list(slots.values()), vector_slots, left_out, unread=unread, refused={*reasons})


def _find_neighbours(
    contents: Contents, unknown: list[str], slots: Mapping[str, Slot]
) -> dict[str, tuple[str, str]]:
    """Returns key -> (module, suffix) of unread tensors beside an update.

    A `scale` beside factors is understood, and becomes one of their roles.
    """
    own: dict[str, list[str]] = {name: list(slot.keys.values()) for name, slot in slots.items()}
    for vector in contents.vectors:
        own.setdefault(vector.module.name, []).append(vector.key)
    neighbours = find_neighbours([*unknown, *contents.left_out], own)
    for key, (name, suffix) in list(neighbours.items()):
        if suffix == "scale" and name in slots and forms.takes_scale(slots[name].keys.keys()):
            slots[name].keys["scale"] = key
            del neighbours[key]
    # The weight of a layer is a vector or a matrix, and never both.
    vectors = [v for v in contents.vectors if v.tensor == "weight" and v.module.name in slots]
    return neighbours | find_neighbours([vector.key for vector in vectors], own)


def _refuse_unknown(unknown: list[str], source: Lora) -> None:
    first = unknown[0]
    if any(tensor_keys.is_base_weight(key) for key in unknown) and not any(
        tensor.role in ("down", "up") for tensor in source.tensors.values()
    ):
        raise UnsupportedFormat(
            f"{source.where}: {first} is a weight of a base model, not a LoRA; give the LoRA"
        )
    if all(_EMBEDDING.match(key) for key in unknown):
        raise _refuse_embedding(source)
    listed = ", ".join(key[:120] for key in unknown[:5])
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    count, they = "1 key is", "It belongs"
    if len(unknown) > 1:
        count, they = f"{len(unknown)} keys are", "They belong"
    if why := tensor_keys.explain_other_kind(unknown):
        raise UnsupportedFormat(f"{source.where}: {why}; {count} not understood: {listed}{more}")
    raise UnsupportedFormat(
        f"{source.where}: {count} not understood: {listed}{more}. {they} to no module that prolora "
        "knows"
    )


def _refuse_embedding(source: Lora) -> UnsupportedFormat:
    return UnsupportedFormat(
        f"{source.where}: a textual-inversion embedding, not a LoRA; it cannot be moved"
    )


def _measure(keys: Mapping[str, str], source: Lora) -> Size | None:
    """Returns (out, in, rank) of an update (role -> key), None if unclear."""
    return measure_update({role: source.tensors[key].shape for role, key in keys.items()})


def measure_unread(keys: Collection[str], source: Lora) -> Size:
    """Returns (out, in, rank) of an update, else of the largest tensor."""
    roles = {source.tensors[key].role: key for key in keys}
    shapes = [source.tensors[key].shape for key in keys]
    largest = max(shapes, key=math.prod) or (1,)
    return _measure(roles, source) or (largest[0], math.prod(largest[1:]), 1)


def find_neighbours(
    keys: Collection[str], updates: Mapping[str, Iterable[str]]
) -> dict[str, tuple[str, str]]:
    """Returns key -> (module, suffix) of tensors beside an update, not part of it.

    `keys` are the tensors that are not read; `updates` is module -> the keys that are read.
    """
    if not keys:
        return {}
    paths = {tensor_keys.split_key(key)[0]: name for name, own in updates.items() for key in own}
    neighbours = {}
    for key in keys:
        end = len(key)
        # kohya's names join by underscores: `…_to_q_gain` stands beside `…_to_q`.
        while key not in neighbours and (end := max(key.rfind(mark, 0, end) for mark in "._")) > 0:
            # `to_q_lora.down` is a factor of `to_q`.
            name = paths.get(key[:end]) or paths.get(key[:end].removesuffix("_lora"))
            if name is not None:
                neighbours[key] = name, key[end + 1 :]
    return neighbours
