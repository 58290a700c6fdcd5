"""LoRAs baked into their base, and what survives the rounding."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import reduce
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.lora import Lora
from ..bases import Base, BaseLike, check_finite, open_base
from ..bases.pipeline_files import read_pipeline_index
from ..bases.quantised.comfy import QUANTISATION_KEY
from ..bases.quantised.encoding import BakedTensors, can_encode, encode, load_package, round_to
from ..bases.quantised.weight import QuantisedWeight, find_kind, look_inside
from ..bases.weights import (
    ConvertedWeight,
    LoadedWeight,
    RequestedWeight,
    RowsWeight,
    StoredWeight,
    Weight,
)
from ..core.arrays import to_kind_of, to_tensor
from ..core.lowrank import LowRank
from ..core.precision import in_full_precision, is_finite
from ..errors import InvalidOption, NonFiniteWeights, OutputError, UnsupportedFormat
from ..files.safetensors_file import SafetensorsFile
from ..files.safetensors_writing import replace_tensor, stream_safetensors
from ..files.store import check_free, put
from ..moving.base_check import check_moved_before
from ..verbs.block_weights import Blocks, BlockWeights, find_factors
from ..verbs.option_keywords import resolve_options, takes_options
from ..verbs.options import LoraLike, read_dtype, use_lora
from .bake_report import SURVIVES, BakedModule, BakeReport, sum_modules
from .convert import read_plain
from .merge_inputs import name_loras
from .merge_options import DEFAULT_MERGE, MergeOptions

TAKEN = ("strengths", "blocks", "dtype", "overwrite", "progress")  # of a merge's options
_MOST_NUMBERS = 1 << 16  # in float64 at a time: they stay in a core's cache
# Names of files with weights, and of indices of their shards
_WEIGHTS = re.compile(r"\.(?:safetensors|bin|pth|pt|ckpt|gguf)(?:\.index(?:\.\w+)?\.json)?$")


@in_full_precision
@takes_options
def bake(
    loras: Sequence[LoraLike],
    base: BaseLike,
    out: str | PathLike[str] | None = None,
    options: MergeOptions = DEFAULT_MERGE,
    *,
    stochastic: int | None = None,
    **changes: Any,
) -> BakeReport:
    """Bakes LoRAs into a copy of their base, and says what survives the rounding.

    Each weight is W + Σ strength·ΔW, computed in float32 and rounded to the type that the base
    stores it in; keys, order, metadata and every other tensor stay byte for byte. Or `dtype` is the
    type of all numbers of a base in one file, without scales. One weight is in memory.

    Args:
        loras: one or more, as `transfer` takes them.
        base: a .safetensors checkpoint or a diffusers folder in float32, float16, bfloat16, float8
            or ComfyUI's scaled float8, int8, NVFP4 or MXFP8 (these three need comfy-kitchen); a
            GGUF file in Q8_0, Q5_0, Q5_1, Q4_0, Q4_1 or 16 and 32 bits; or an unquantised one
            in memory, or read on request.
        out: the file, or folder, to write; None for a base in memory, whose tensors come back as
            `report.tensors`, the unchanged ones as the caller's own.
        options: `strengths`, `blocks`, `dtype`, `overwrite` and `progress` of a merge.
        stochastic: seed of rounding at random: the mean is right where updates are smaller than the
            steps of float8, and weights are noisier. None rounds to the nearest.
        **changes: single options by name; they win over `options`.

    Returns:
        What was written, and for each module the share ⟨Q(W + ΔW) − W, ΔW⟩ / ‖ΔW‖² that is left.

    Raises:
        InvalidOption: no LoRA, an option of `merge` that has no use here, or not one for each.
        UnsupportedFormat: a base of a kind that is not written; the message says what would survive
            at 8 and 16 bits. Or a base without any module that the LoRA changes.
        WrongBase: a LoRA of another model.
        NonFiniteWeights: NaN or Inf, named; or a result is too large for its type.
        OutputError: `out` cannot be written, or is an input.
    """
    options = resolve_options(options, changes)
    usual, asked = vars(DEFAULT_MERGE), vars(options)
    if ignored := [name for name in usual if name not in TAKEN and asked[name] != usual[name]]:
        names = ", ".join(f"`{name}`" for name in ignored)
        raise InvalidOption(f"baking makes a model as its base is, and takes no {names}")
    model, count, dtype = open_base(base), len(loras), read_dtype(options.dtype)
    strengths, blocks = options.strengths or [1.0] * count, options.blocks or [None] * count
    options.check_count(count)
    if not count:
        raise InvalidOption("give one LoRA or more")
    if not (stochastic is None or (type(stochastic) is int and abs(stochastic) < 1 << 63)):
        raise InvalidOption(f"`stochastic` is a seed, an integer, not {stochastic!r:.80}")
    path, overwrite = model.path, options.overwrite
    folder = path is not None and path.is_dir()
    _check_out(model, out, dtype, overwrite=overwrite)
    with ExitStack() as stack:
        opened = [stack.enter_context(use_lora(lora)) for lora in loras]
        titles = name_loras(opened)
        updates = _sum_updates(opened, model, strengths, blocks)
    groups, left_out = _place_updates(updates, model)
    for parts in groups.values() if dtype is None else ():
        load_package(look_inside(parts[0][1]))
    if left_out and not groups:
        raise UnsupportedFormat(
            f"{model.name}: has no module that the LoRA changes, so nothing can be baked; the "
            f"first is {next(iter(left_out))}: give a base that has it"
        )
    random = None if stochastic is None else torch.Generator().manual_seed(stochastic)
    baking = _Baking(model, random, dtype)

    def write(new: Path) -> None:
        assert path is not None
        if folder:
            for name in _list_copied(model, path):
                (new / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path / name, new / name)
        elif dtype is None:
            shutil.copyfile(path, new)
        else:
            _convert(model, new, dtype)
        for i, (stored, parts) in enumerate(groups.items()):
            assert isinstance(stored, StoredWeight)
            options.report_progress(i, len(groups), stored.key)
            at = new / stored.file.path.relative_to(path) if folder else new
            baking.write_weight(at, parts)

    tensors: dict[str, Any] | None = None
    if out is not None:
        put(out, write, overwrite=overwrite, folder=folder)
    else:
        keys = {id(weight): key for key, weight in model.stored.items()}
        given = base if isinstance(base, Mapping) else {}
        tensors = {key: given.get(key, weight.read()) for key, weight in model.stored.items()}
        for i, (stored, parts) in enumerate(groups.items()):
            options.report_progress(i, len(groups), stored.name)
            key, baked = keys[id(stored)], baking.bake_weight(parts).numbers
            # On the caller's device; the sum was made on the CPU.
            like = to_tensor(tensors[key])
            tensors[key] = to_kind_of(torch.empty_like(like).copy_(baked), tensors[key])
    return BakeReport(
        path=None if out is None else str(out),
        tensors=tensors,
        base=model.name,
        loras=tuple(titles),
        strengths=tuple(strengths),
        blocks=tuple("" if each is None else str(BlockWeights.read(each)) for each in blocks),
        stochastic=stochastic,
        dtypes=dict(Counter(str(dtype or one.dtype).split(".")[1] for one in groups).most_common()),
        modules=tuple(baking.rows),
        left_out=left_out,
    )


def _check_out(
    model: Base, out: str | PathLike[str] | None, dtype: torch.dtype | None, *, overwrite: bool
) -> None:
    """Refuses a name and a type that do not suit the base."""
    path = model.path
    if path is None:
        if out is not None or dtype is not None:
            name = "out" if out is not None else "dtype"
            raise InvalidOption(
                f"`{name}` is for a base in a file, and {model.name} is in memory; its tensors "
                "come back as `report.tensors`"
            )
        return
    folder = path.is_dir()
    if out is None:
        raise InvalidOption(f"`out` is missing: {model.name} is a file, and a model is written")
    if dtype is not None and (folder or path.suffix == ".gguf"):
        kind = "folder" if folder else "GGUF file"
        raise InvalidOption(
            f"`dtype` is for a base in one .safetensors file, and {model.name} is a {kind}"
        )
    if folder and overwrite:  # files of two models would stand in it
        raise InvalidOption("`overwrite` is for a model in one file: a folder is never replaced")
    check_free(out, [*model.files, path], overwrite=overwrite, folder=folder)
    if folder and Path(os.path.realpath(path)) in Path(os.path.realpath(out)).parents:
        raise OutputError(f"{out}: lies in the model that is copied; name a folder elsewhere")
    ending = "" if folder else path.suffix
    if Path(out).suffix != ending and (ending or _WEIGHTS.search(Path(out).name)):
        kind = f"a name that ends in {ending}" if ending else "a folder"
        raise OutputError(f"{out}: {model.name} is a {'file' if ending else 'folder'}; give {kind}")


def _sum_updates(
    loras: Sequence[Lora | Adapter],
    model: Base,
    strengths: Sequence[float],
    blocks: Sequence[Blocks | None],
) -> dict[str, list[LowRank | Tensor]]:
    """Reads every LoRA; returns module, or vector, -> what is added to it."""
    sums: dict[str, list[LowRank | Tensor]] = {}
    for lora, strength, weights in zip(loras, strengths, blocks, strict=True):
        check_moved_before(lora, model)
        adapter = read_plain(lora, model)
        if adapter.unread:
            gone = next(iter(adapter.unread))
            raise UnsupportedFormat(f"{gone}: this update cannot be read, so it cannot be baked")
        factors = find_factors(weights, adapter, model)
        for name, update in adapter.updates.items():
            factor = strength * factors.get(name, 1.0)
            sums.setdefault(name, []).append(LowRank(update.up * factor, update.down))
        for name, vector in adapter.vectors.items():
            factor = strength * factors.get(name.rpartition(".")[0], 1.0)
            sums.setdefault(name, []).append(vector * factor)
    return sums


Parts = list[tuple[str, Weight, list[LowRank | Tensor]]]
Root = StoredWeight | LoadedWeight | RequestedWeight
Groups = dict[Root, Parts]  # a stored tensor -> the modules in it


def _place_updates(
    updates: Mapping[str, list[LowRank | Tensor]], model: Base
) -> tuple[Groups, dict[str, str]]:
    """Finds the stored tensor of every update; also what has no place, with the reason."""
    groups: Groups = {}
    left_out, refused = {}, []
    for name, added in updates.items():
        weight = model.weights.get(name) or model.others[0].get(name)
        if weight is None:
            left_out[name] = f"{model.name} lacks it"
            continue
        root = look_inside(weight)
        stored = root.stored if isinstance(root, QuantisedWeight) else root
        if stored is not root and model.path is None:
            raise UnsupportedFormat(
                f"{weight.name}: a quantised model in memory is not written; give its file as base"
            )
        if not isinstance(stored, Root) or not can_encode(root):
            refused.append((name, weight, added))
        else:
            groups.setdefault(stored, []).append((name, weight, added))
    if refused:
        raise UnsupportedFormat(_explain_kind(model, refused))
    return groups, left_out


def _explain_kind(model: Base, refused: Parts) -> str:
    """Reports what of refused weights would survive at 8 and 16 bits."""
    kinds = Counter(find_kind(weight) or str(weight.dtype) for _, weight, _ in refused)
    rows = []
    for name, weight, added in refused:
        before = weight.read().float()
        delta = _multiply_out(weight, added, before.dtype)
        rows.append({bits: _measure_at(bits, name, before, delta) for bits in _ROUND_TO_BITS})
    share = {bits: sum_modules(row[bits] for row in rows).survived for bits in (8, 16)}
    wide = [row[8].module for row in rows if row[8].survived < SURVIVES]
    kind, count = kinds.most_common(1)[0]
    more = f"; {len(wide)} of these modules need 16 bits: {', '.join(wide)}" if wide else ""
    return (
        f"{model.name}: {refused[0][1].name} and {count - 1} more are stored as {kind}, which is "
        f"not written. {share[8]:.0%} of the LoRA would survive in 8 bits (Q8_0), {share[16]:.0%} "
        f"in 16 (bf16){more}. Bake into that version of this model"
    )


def _round_blocks(numbers: Tensor) -> Tensor:
    """Rounds to 8 bits as GGUF's Q8_0 does: 32 numbers share a scale in float16."""
    flat = numbers.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % 32)).unflatten(0, (-1, 32))
    scale = (blocks.abs().amax(1, keepdim=True) / 127).half().float()
    codes = (blocks / scale.where(scale > 0, 1)).round()
    rounded: Tensor = (codes * scale).flatten()[: len(flat)]
    return rounded.reshape(numbers.shape)


_ROUND_TO_BITS: dict[int, Callable[[Tensor], Tensor]] = {
    8: _round_blocks,
    16: lambda numbers: numbers.bfloat16().float(),
}


def _measure_at(bits: int, name: str, before: Tensor, delta: Tensor) -> BakedModule:
    """Measures what would be left in a base of 8 or 16 bits."""
    base = _ROUND_TO_BITS[bits](before.float())
    after = _ROUND_TO_BITS[bits](base + delta)
    return _measure(name, LoadedWeight(base, name), base, after, delta)


def _find_bits(name: str, weight: Weight, delta: Tensor) -> int:
    """Returns the fewest bits in which enough is left."""
    quantised = find_kind(weight) is not None
    before = weight.read()
    for bits in _ROUND_TO_BITS if quantised else ():
        if _measure_at(bits, name, before, delta).survived >= SURVIVES:
            return bits
    return 32


def _multiply_out(weight: Weight, added: list[LowRank | Tensor], dtype: torch.dtype) -> Tensor:
    """Sums updates, in the shape of the weight."""
    dense = (x.dense() if isinstance(x, LowRank) else x for x in added)
    return reduce(Tensor.add_, (x.to(dtype).reshape(weight.shape) for x in dense))


def _list_copied(model: Base, folder: Path) -> Iterator[Path]:
    """Yields the files of a model's folder that a copy needs, relative to it.

    These are what the index of a pipeline and its parts have, without other forms of the weights
    that are read, and what belongs to the folder: a link that leads out of it is not followed.
    """
    used = {Path(os.path.abspath(file)) for file in model.files}
    used |= {Path(os.path.abspath(one.beside)) for one in model.leaves if one.beside}
    homes, inside = {file.parent for file in used}, [Path(os.path.realpath(folder))]
    if folder.parent.name == "snapshots":  # of the hub, whose files are links into this folder
        inside.append(Path(os.path.realpath(folder.parent.parent / "blobs")))
    parts = {folder, *homes}
    with suppress(UnsupportedFormat):  # no pipeline
        parts |= {folder / name for name in read_pipeline_index(folder).parts}
    for part in sorted(parts):
        for file in sorted(part.iterdir()) if part.is_dir() else ():
            real = Path(os.path.realpath(file))
            is_own = file in used or any(above in real.parents for above in inside)
            is_form = part in homes and _WEIGHTS.search(file.name) is not None
            if real.is_file() and is_own and (file in used or not is_form):
                yield file.relative_to(folder)


def _convert(model: Base, new: Path, dtype: torch.dtype) -> None:
    """Writes a checkpoint whose numbers are all of one type, a tensor at a time."""
    stored = model.stored
    kinds = {key: dtype if w.dtype.is_floating_point else w.dtype for key, w in stored.items()}
    shapes = ((key, torch.empty(w.shape, device="meta")) for key, w in stored.items())
    entries = SafetensorsFile(model.files[0]).metadata.items()
    metadata = {key: text for key, text in entries if key != QUANTISATION_KEY}

    def read(key: str) -> Tensor:
        tensor = stored[key].read().to(kinds[key]).contiguous()
        if not is_finite(tensor):
            raise NonFiniteWeights(f"{stored[key].name}: overflows {dtype}")
        return tensor

    stream_safetensors(new, {key: x.to(kinds[key]) for key, x in shapes}, metadata, read)


@dataclass
class _Baking:
    """The work on single weights, and what became of them."""

    model: Base
    random: torch.Generator | None  # rounds to the nearest without one
    dtype: torch.dtype | None  # of all numbers; None keeps each one's
    rows: list[BakedModule] = field(default_factory=list)
    space: Tensor = field(default_factory=lambda: torch.empty(0))
    converted: SafetensorsFile | None = None  # the copy, where `dtype` moved its tensors

    def write_weight(self, file: Path, parts: Parts) -> None:
        """Adds updates to one stored tensor of a copied file, in place."""
        if self.dtype is not None and self.converted is None:
            self.converted = SafetensorsFile(file)
        for part, tensor in self.bake_weight(parts).tensors.items():
            start = (self.converted or part.file).locate(part.key)
            replace_tensor(file, start, part.key, tensor)

    def bake_weight(self, parts: Parts) -> BakedTensors:
        """Adds updates to one stored tensor, and measures what is left of each."""
        root = look_inside(parts[0][1])
        wide = torch.float64 if root.dtype == torch.float64 else torch.float32
        before = root.read().cpu()
        numbers, deltas = self._borrow(before.shape, wide).copy_(before), []
        for name, weight, added in parts:
            delta = _multiply_out(weight, added, wide)
            for view, rows in _cut_rows(weight, numbers, delta):
                view += rows
            deltas.append((name, weight, delta))
        encoded = self._encode(root, numbers)
        for name, weight, delta in deltas:
            row = _measure(name, weight, before, encoded.numbers, delta)
            if not math.isfinite(row.wrong):
                check_finite(self.model, [name])  # says where in the base
                kind = find_kind(root) or str(self.dtype or root.dtype)
                raise NonFiniteWeights(f"{root.name}: the result overflows {kind}")
            if row.survived < SURVIVES:
                row = replace(row, bits=_find_bits(name, weight, delta))
            self.rows.append(row)
        return encoded

    def _borrow(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Returns memory of the last weight, which needs no new pages."""
        if self.space.numel() < shape.numel() or self.space.dtype != dtype:
            self.space = torch.empty(shape.numel(), dtype=dtype)
        return self.space[: shape.numel()].view(shape)

    def _encode(self, root: Weight, numbers: Tensor) -> BakedTensors:
        """Encodes as the base stores it, or in the one type that was asked for."""
        if self.dtype is None:
            return encode(root, numbers, self.random)
        stored = root.stored if isinstance(root, QuantisedWeight) else root
        written = round_to(numbers, self.dtype, self.random)
        assert isinstance(stored, StoredWeight)
        return BakedTensors({stored: written}, written)


def _cut_rows(weight: Weight, numbers: Tensor, delta: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs views of a stored tensor's numbers with the rows that belong there."""
    if isinstance(weight, RowsWeight):
        yield from _cut_rows(weight.matrix, numbers[weight.start : weight.stop], delta)
    elif isinstance(weight, ConvertedWeight) and weight.transposed:
        yield from _cut_rows(weight.stored, numbers.mT, delta)
    elif isinstance(weight, ConvertedWeight):
        half = len(delta) // 2
        yield numbers[half:], delta[:half]
        yield numbers[:half], delta[half:]
    else:
        yield numbers, delta.reshape(numbers.shape)


def _measure(
    name: str, weight: Weight, before: Tensor, after: Tensor, delta: Tensor
) -> BakedModule:
    """Compares what changed with what should have."""
    sums = torch.zeros(3, dtype=torch.float64)
    pairs = zip(_cut_rows(weight, before, delta), _cut_rows(weight, after, delta), strict=True)
    for (old, wanted), (new, _) in pairs:
        few = max(1, _MOST_NUMBERS * len(old) // old.numel())
        for w, q, d in zip(*(x.split(few) for x in (old, new, wanted)), strict=True):
            d = d.double().flatten()
            got = q.double().flatten() - w.double().flatten()
            wrong = got - d
            sums += torch.stack([d.dot(d), got.dot(d), wrong.dot(wrong)])
    return BakedModule(name, *sums.tolist())
