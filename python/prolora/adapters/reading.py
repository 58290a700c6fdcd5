"""LoRA files, folders and state dicts -> `Adapter`, scales folded in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..errors import NonFiniteWeights, ShapeMismatch, UnsupportedFormat
from ..linalg.lowrank import LowRank
from . import algorithms, flux, lycoris, merging, names, vectors
from .adapter import Adapter
from .layout import Contents, Slot, lay_out, scale_of
from .source import Source, StrPath, open_source, read_finite
from .truncation import Factored

log = logging.getLogger(__name__)

ReadWeight = Callable[[str], Tensor]
"""Canonical module name -> weight of the base model; KeyError where it has none."""


def read(
    source: StrPath | Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    read_weight: ReadWeight | None = None,
) -> Adapter:
    """Reads an adapter of any kind and spelling there is a rule for.

    Kinds: LoRA, LoCon (Tucker core or not), LoHa, LoKr, full differences; with the base weights at
    hand also DoRA of any of these, GLoRA and diag-OFT, whose update is merged − W. Spellings:
    kohya's, diffusers', PEFT's and ComfyUI's, and for FLUX also those of its authors, XLabs and
    OneTrainer; fused matrices come out as their parts.

    The scale is exact and folded into `up`: α/r of an `.alpha` tensor, or α/r (rsLoRA: α/√r) of
    PEFT's configuration with its patterns, in adapter_config.json or in the header of a diffusers
    file; 1 where the file says nothing. Updates of high rank are cut by the rule in `truncation`,
    and `Adapter.kept_energy` says what that kept. Differences of biases and normalisation layers
    are in `Adapter.vectors`; packed embeddings and the like are named in `Adapter.left_out`.

    Args:
        source: a .safetensors file, a PEFT folder, or a state dict.
        metadata: replaces the file's header metadata.
        read_weight: reads the base model the adapter was trained on; needed where the update
            depends on it.

    Returns:
        Updates in file order: up [out, r], down [r, in·kh·kw], float32 on the CPU.

    Raises:
        UnsupportedFormat: a kind of adapter that is not read; a key that is not understood; a file
            that is damaged; an update that depends on base weights that are not there (in a text
            encoder that the base does not hold, it is left out and named instead).
        ShapeMismatch: tensors that do not go together or do not fit the base weight, or a rank
            other than the configuration's.
        NonFiniteWeights: NaN or Inf in a tensor or an update.
    """
    opened = open_source(source, metadata)
    contents = lay_out(opened)
    if read_weight is None:
        _check_independent(contents, opened)
    # Everything that can be refused from the header was; scales before the large tensors.
    scales = {slot.module.name: scale_of(slot, opened) for slot in contents.slots}
    found = _empty(contents, opened)
    for slot in contents.slots:
        _add(found, slot, scales[slot.module.name], opened, read_weight)
    for vector in contents.vectors:
        found.vectors.update(vectors.read(vector, scales.get(vector.module.name, 1.0), opened))
    if found.left_out:
        first = next(iter(found.left_out.items()))
        log.warning("%s: %d tensors left out: %s: %s", opened.where, len(found.left_out), *first)
    if not found.updates and not found.vectors:
        name, reason = next(iter(found.left_out.items()))
        raise UnsupportedFormat(f"{opened.where}: nothing of it can be read; {name}: {reason}")
    return found


def _check_independent(contents: Contents, source: Source) -> None:
    """Refuses, with no base at hand, an update that depends on its weights."""
    for slot in contents.slots:
        if algorithms.needs_base(slot.keys.keys()):
            why = algorithms.needs_base_reason(slot.keys.keys())
            raise UnsupportedFormat(
                f"{source.where}: the update of {slot.module.name} is {why}; give the base model "
                "it was trained on (read_weight=open_base(…).read)"
            )


def _empty(contents: Contents, source: Source) -> Adapter:
    """An adapter that knows its format, spelling and dtype, and has no updates yet."""
    modules = [slot.module for slot in contents.slots]
    modules += [vector.module for vector in contents.vectors]
    # The text encoders of a file may be spelled in another format than the rest.
    first = next((m for m in modules if names.place(m.name) not in names.TEXT_ENCODERS), modules[0])
    dtypes = {
        source.headers[key].dtype
        for slot in contents.slots
        for role, key in slot.keys.items()
        if role not in ("alpha", "scalar", "dora_scale", "magnitude")
    } or {source.headers[slot.key].dtype for slot in contents.vectors}
    return Adapter(
        {},
        format=first.format if source.config is None else "peft",
        spelling="sgm" if any(module.sgm for module in modules) else "diffusers",
        dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
        metadata=source.metadata,
        left_out=dict(contents.left_out),
    )


def _add(
    adapter: Adapter, slot: Slot, scale: float, source: Source, read_weight: ReadWeight | None
) -> None:
    """Works out one slot and puts its module, or all parts of a fused weight, into the adapter."""
    where = f"{source.where}: {slot.module.name}"
    tensors = {role: read_finite(source, key) for role, key in slot.keys.items()}
    kernel = slot.kernel
    if algorithms.needs_base(slot.keys.keys()):
        weight = _base_weight(slot, read_weight, where)
        if weight is None:
            why = algorithms.needs_base_reason(slot.keys.keys())
            adapter.left_out[slot.module.name] = (
                f"its update is {why}, and this base holds no such text encoder"
            )
            return
        kernel = (weight.shape[2], weight.shape[3]) if weight.dim() == 4 else None
        algorithm = slot.form.algorithm
        found = merging.merged_update(algorithm, weight, tensors, scale, where)
    else:
        found = lycoris.factored(slot.form.algorithm, tensors)
        found = Factored(_scaled(found.update, scale, slot, source), found.kept)
    update = LowRank(found.update.up.float(), found.update.down.float())
    if not (update.up.isfinite().all() and update.down.isfinite().all()):
        raise NonFiniteWeights(f"{where}: the update is not finite, or the weight it belongs to")
    matrix = slot.module.matrix
    parts = flux.split(matrix, update, where) if matrix else {slot.module.name: update}
    for name, part in parts.items():
        adapter.updates[name] = part
        if kernel:
            adapter.kernels[name] = kernel
        if slot.kind != "lora":
            adapter.algorithms[name] = slot.kind
        if found.kept < 1:
            adapter.kept_energy[name] = found.kept


def _scaled(update: LowRank, scale: float, slot: Slot, source: Source) -> LowRank:
    """The scale in `up`."""
    if scale == 1.0:
        return update
    up = update.up.mul_(scale)
    if not up.isfinite().all():
        key = slot.keys.get("up", next(iter(slot.keys.values())))
        raise NonFiniteWeights(f"{source.where}: {key} times {scale:.6g} overflows")
    return LowRank(up, update.down)


def _base_weight(slot: Slot, read_weight: ReadWeight | None, where: str) -> Tensor | None:
    """The weight the update is added to, float64, in the row order of the file.

    None for a module of a text encoder that the base does not hold: many bases come without.
    """
    assert read_weight is not None  # _check_independent
    parts = []
    for name in slot.module.modules:
        try:
            weight = read_weight(name)
        except KeyError as error:
            if names.place(name) in names.TEXT_ENCODERS:
                return None
            raise UnsupportedFormat(
                f"{where}: the update depends on the weight of {name}, which the source base does "
                "not have; is this the base it was trained on?"
            ) from error
        parts.append(weight.detach().to("cpu", torch.float32).double())
    same = len({part.shape[1:] for part in parts}) == 1
    whole = torch.cat(parts) if same else parts[0]
    if slot.module.matrix and slot.module.matrix.swapped:
        whole = flux.swapped_halves(whole)
    out, inputs = whole.shape[0], whole.shape[1:].numel()
    if not same or out != slot.form.out or slot.form.inputs not in (0, inputs):
        raise ShapeMismatch(
            f"{where}: the update is {slot.form.out}×{slot.form.inputs or '?'}, but the weight it "
            f"depends on is {list(whole.shape)}"
        )
    return whole
