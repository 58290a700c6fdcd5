"""LoRA files, folders and state dicts -> `Adapter`, scales folded in."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from ..architectures.identify import UNKNOWN, Model
from ..architectures.modules import TEXT_ENCODERS, find_component
from ..core.controls import replace_controls
from ..core.lowrank import LowRank
from ..core.precision import in_full_precision, is_finite
from ..errors import NonFiniteWeights, ShapeMismatch, UnsupportedFormat
from ..files.dtypes import find_torch_dtype
from . import fused_updates
from .adapter import Adapter, StoredUpdate
from .algorithms import dora_oft_glora, forms
from .algorithms import lora_products as products
from .algorithms.truncation import MAX_RANK
from .contents import parse_contents, read_scale
from .file_model import BaseNames
from .key_groups import Contents, Slot
from .keys.tensor_keys import split_key
from .lora import Lora, LoraSource, read_finite

log = logging.getLogger(__name__)

T = TypeVar("T")

Shape = tuple[int, ...]
ReadWeight = Callable[[str], Tensor]
"""Canonical module name -> weight of the base model; KeyError where it has none."""


@in_full_precision
def read_adapter(
    source: LoraSource | Lora,
    *,
    read_weight: ReadWeight | None = None,
    base: BaseNames | None = None,
    keep_stored: bool = False,
    rank: int = MAX_RANK,
) -> Adapter:
    """Reads an adapter of any known kind and spelling.

    Kinds: LoRA, LoCon (Tucker core or not), LoHa, LoKr, full differences; with the base weights at
    hand also DoRA of any of these, GLoRA and diag-OFT, whose update is merged − W. Spellings:
    kohya's, diffusers', PEFT's and ComfyUI's, each with the names of diffusers or of the model's
    authors (for FLUX also XLabs' and OneTrainer's); fused matrices come out as their parts. A
    module of an unknown family keeps its name in the file.

    The scale is exact and folded into `up`: α/r of an `.alpha` tensor, a `.scale` tensor in its
    stead, or α/r (rsLoRA: α/√r) of PEFT's configuration with its patterns, in adapter_config.json
    or in the header of a diffusers file; 1 where the file says nothing. Updates of high rank are
    cut by the rule in `truncation`, and `Adapter.kept_energy` says what that kept. Differences of
    biases and normalisation layers are in `Adapter.vectors`. Packed embeddings and the like are
    named in `Adapter.left_out`, and so are updates beside an unknown tensor.

    Args:
        source: a .safetensors file, a PEFT folder, an id on the hub, a state dict, or (state dict,
            peft.LoraConfig).
        read_weight: reads the base model the adapter was trained on; needed where the update
            depends on it.
        base: what is known of that base model; it decides where names alone leave several
            families, and gives names with underscores their dots back where no family is known.
        keep_stored: whether what is written is to hold the stored tensors of unchanged updates.
        rank: the most columns of updates that are no product of two factors in the file.

    Returns:
        Updates in file order: up [out, r], down [r, in·kh·kw], float32 on the CPU.

    Raises:
        UnsupportedFormat: a kind of adapter that is not read; a key that is not understood; a
            damaged file; an update that depends on missing base weights (for a text encoder that
            the base does not hold, it is left out and named instead).
        ShapeMismatch: tensors that do not go together or do not fit the base weight, or a rank
            other than the configuration's.
        NonFiniteWeights: NaN or Inf in a tensor or an update.
    """
    opened = Lora.open(source)
    contents = parse_contents(opened, base)
    adapter = _start_adapter(contents, opened)
    # The header was checked before; scales come before the large tensors.
    scales = {slot.module.name: read_scale(slot, opened) for slot in contents.slots}
    for slot in contents.slots:
        stored = _add_update(adapter, slot, scales[slot.module.name], opened, read_weight, rank)
        # Few programs read a `.scale`: with it folded into the factors all of them do.
        if keep_stored and stored and "scale" not in slot.keys:
            adapter.stored.append(stored)
    for vector in contents.vectors:
        scale = scales.get(vector.module.name, 1.0)
        parts = fused_updates.read_vector(vector, scale, opened)
        adapter.vectors.update(parts)
        if keep_stored and vector.module.matrix is None:
            adapter.stored.append(StoredUpdate(parts, _cut_paths([vector.key]), opened.read))
    if adapter.left_out:
        name, reason = next(iter(adapter.left_out.items()))
        count = f"{len(adapter.left_out)} tensors left out"
        log.warning("%s", replace_controls(f"{opened.where}: {count}: {name}: {reason}"))
    if not adapter.updates and not adapter.vectors:
        name, reason = next(iter(adapter.left_out.items()))
        raise UnsupportedFormat(f"{opened.where}: nothing of it can be read; {name}: {reason}")
    return adapter


def outline_adapter(
    source: LoraSource | Lora,
    shapes: Mapping[str, Shape],
    model: Model = UNKNOWN,
    *,
    headers_only: bool = False,
) -> Adapter:
    """Reads an adapter for a plan: without base weights, and nothing is factored.

    LoRAs and LoCons are read in full. An update of any other kind is a stand-in of its shape, of
    the rank the file states (1 without one), and of the norm of ΔW: NaN where that takes the base's
    weights.

    Args:
        source: as for `read_adapter`.
        shapes: canonical module name -> shape of the base model's weight.
        model: what the base is.
        headers_only: reads no tensor: all updates are zeros, and vectors are left out.

    Raises:
        UnsupportedFormat, ShapeMismatch, NonFiniteWeights: as `read_adapter` does, as far as it
            gets.
    """
    opened = Lora.open(source)
    contents = parse_contents(opened, BaseNames(model, shapes))
    adapter = _start_adapter(contents, opened)
    read = [] if headers_only else contents.slots
    scales = {slot.module.name: read_scale(slot, opened) for slot in read}
    for slot in contents.slots:
        roles, scale = slot.keys.keys(), scales.get(slot.module.name, 0.0)
        if headers_only:
            norms = torch.zeros(1)
        elif forms.needs_base(roles):
            norms = torch.tensor([math.nan])
        elif forms.kind_of_roles(roles) == "lora":
            _add_update(adapter, slot, scale, opened, None)
            continue
        else:
            tensors = {role: read_finite(opened, key) for role, key in slot.keys.items()}
            norms = scale * products.measure_rows(slot.form.algorithm, tensors)
        _add_stand_in(adapter, slot, shapes, opened, norms)
    for vector in [] if headers_only else contents.vectors:
        scale = scales.get(vector.module.name, 1.0)
        adapter.vectors.update(fused_updates.read_vector(vector, scale, opened))
    return adapter


def _start_adapter(contents: Contents, source: Lora) -> Adapter:
    """Makes an adapter with format, spelling and dtype, and no updates yet."""
    modules = [slot.module for slot in contents.slots]
    modules += [vector.module for vector in contents.vectors]
    # The text encoders of a file may be spelled in another format than the rest.
    first = next((m for m in modules if find_component(m.name) not in TEXT_ENCODERS), modules[0])
    dtypes = {
        source.tensors[key].dtype
        for slot in contents.slots
        for role, key in slot.keys.items()
        if role not in forms.NUMBERS | forms.MAGNITUDES
    } or {source.tensors[slot.key].dtype for slot in contents.vectors}
    (dtype,) = dtypes if len(dtypes) == 1 else {"F32"}
    return Adapter(
        {},
        format=first.format if source.config is None else "peft",
        spelling="sgm" if any(module.sgm for module in modules) else "diffusers",
        origin=contents.model,
        dtype=find_torch_dtype(dtype),
        metadata=source.metadata,
        left_out=dict(contents.left_out),
        unread=dict(contents.unread),
        refused=set(contents.refused),
        foreign=source.foreign,
    )


def _add_update(
    adapter: Adapter,
    slot: Slot,
    scale: float,
    source: Lora,
    read_weight: ReadWeight | None,
    rank: int = MAX_RANK,
) -> StoredUpdate | None:
    """Adds a slot's modules to the adapter; returns their tensors, None if left out."""
    where = f"{source.where}: {slot.module.name}"
    tensors = {role: read_finite(source, key) for role, key in slot.keys.items()}
    kernel = slot.kernel
    if forms.needs_base(slot.keys.keys()):
        if read_weight is None:
            raise UnsupportedFormat(
                f"{source.where}: the update of {slot.module.name} is "
                f"{forms.needs_base_reason(slot.keys.keys())}; give the base model it was trained "
                "on (read_weight=open_base(…).read)"
            )
        weight = _base_weight(slot, read_weight, where)
        if weight is None:
            _leave_out(adapter, slot)
            return None
        kernel = tuple(weight.shape[2:]) or None
        algorithm = slot.form.algorithm
        truncated = dora_oft_glora.merged_update(algorithm, weight, tensors, scale, where, rank)
    else:
        stored = find_torch_dtype(source.tensors[next(iter(slot.keys.values()))].dtype)
        truncated = products.factor_update(slot.form.algorithm, tensors, rank, stored)
        if scale != 1.0 and not is_finite(truncated.update.up.mul_(scale)):
            key = slot.keys.get("up", next(iter(slot.keys.values())))
            raise NonFiniteWeights(f"{source.where}: {key} times {scale:.6g} overflows")
    update = LowRank(truncated.update.up.float(), truncated.update.down.float())
    if not (is_finite(update.up) and is_finite(update.down)):
        raise NonFiniteWeights(f"{where}: the update is not finite, or the weight it belongs to")
    parts = _store_parts(adapter, slot, update, kernel, truncated.kept, where)
    if truncated.shares is not None:
        adapter.shares.update(dict.fromkeys(parts, truncated.shares))
    return StoredUpdate(
        parts,
        _cut_paths(slot.keys.values()),
        source.read,
        slot.kind,
        slot.form.rank,
        scale,
        configured=slot.peft is not None,
        matrix=slot.module.matrix,
    )


def _cut_paths(keys: Iterable[str]) -> dict[str, str]:
    """Returns what stands behind the module path of each key -> the key."""
    return {key.removeprefix(split_key(key)[0]): key for key in keys}


def _store_parts(
    adapter: Adapter,
    slot: Slot,
    update: LowRank,
    kernel: Shape | None,
    kept: float,
    where: str,
) -> dict[str, LowRank]:
    """Puts an update into the adapter part by part, and returns the parts."""
    matrix = slot.module.matrix
    parts = (
        fused_updates.split_update(matrix, update, where) if matrix else {slot.module.name: update}
    )
    for name, part in parts.items():
        adapter.updates[name] = part
        if kernel:
            adapter.kernels[name] = kernel
        if slot.kind != "lora":
            adapter.algorithms[name] = slot.kind
        if kept < 1:
            adapter.kept_energy[name] = kept
    return parts


def _add_stand_in(
    adapter: Adapter,
    slot: Slot,
    shapes: Mapping[str, Shape],
    source: Lora,
    norms: Tensor,
) -> None:
    """Adds stand-ins of the right shape and row norms for a slot's modules.

    `norms` has one norm for each row or one for all; NaN where they are not known.
    """
    where = f"{source.where}: {slot.module.name}"
    inputs, kernel = slot.form.inputs, slot.kernel
    if forms.needs_base(slot.keys.keys()):
        base_shapes = _look_up_base(slot, shapes.__getitem__, where)
        if base_shapes is None:
            _leave_out(adapter, slot)
            return
        _check_fit(slot, base_shapes, where)
        magnitudes = {
            role: torch.empty(source.tensors[key].shape, device="meta")
            for role, key in slot.keys.items()
            if role in forms.MAGNITUDES
        }
        if magnitudes:
            dora_oft_glora.magnitude_axis(magnitudes, (slot.form.out, *base_shapes[0][1:]), where)
        inputs = math.prod(base_shapes[0][1:])
        kernel = base_shapes[0][2:] or None
    rank = max(1, slot.form.rank)
    # Expanded, they take no room, whatever the shape.
    up = (norms.float() / rank)[:, None].expand(slot.form.out, rank)
    down = torch.tensor(inputs**-0.5).expand(rank, inputs)
    _store_parts(adapter, slot, LowRank(up, down), kernel, 1.0, where)


def _leave_out(adapter: Adapter, slot: Slot) -> None:
    """Records an update that depends on a missing text encoder of the base."""
    adapter.left_out[slot.module.name] = forms.explain_no_encoder(slot.keys.keys())
    adapter.unread[slot.module.name] = (slot.form.out, slot.form.inputs, max(1, slot.form.rank))


def _look_up_base(slot: Slot, get: Callable[[str], T], where: str) -> list[T] | None:
    """Gets what the base has for every module of a slot.

    None for a module of a text encoder that the base does not hold: many bases come without.
    """
    entries = []
    for name in slot.module.modules:
        try:
            entries.append(get(name))
        except KeyError as error:
            if find_component(name) in TEXT_ENCODERS:
                return None
            raise UnsupportedFormat(
                f"{where}: the update depends on the weight of {name}, which the base does not "
                "have; is this the base it was trained on?"
            ) from error
    return entries


def _check_fit(slot: Slot, shapes: list[Shape], where: str) -> None:
    """Refuses an update that does not fit the weight, or unequal parts."""
    if any(len(shape) < 2 for shape in shapes):
        raise ShapeMismatch(f"{where}: the weight it depends on is {list(shapes[0])}, no matrix")
    out, inputs = sum(shape[0] for shape in shapes), math.prod(shapes[0][1:])
    same = len({shape[1:] for shape in shapes}) == 1
    if not same or out != slot.form.out or slot.form.inputs not in (0, inputs):
        raise ShapeMismatch(
            f"{where}: the update is {slot.form.out}×{slot.form.inputs or '?'}, but the weight it "
            f"depends on is {[out, *shapes[0][1:]]}"
        )


def _base_weight(slot: Slot, read_weight: ReadWeight, where: str) -> Tensor | None:
    """Returns the weight the update is added to, float64, in file row order, or None."""
    parts = _look_up_base(slot, read_weight, where)
    if parts is None:
        return None
    _check_fit(slot, [tuple(part.shape) for part in parts], where)
    whole = torch.cat([part.detach().to("cpu", torch.float32).double() for part in parts])
    matrix = slot.module.matrix
    swapped = matrix is not None and matrix.is_swapped(tuple(whole.shape))
    return fused_updates.swap_halves(whole) if swapped else whole
