"""LoRAs baked into their base, and what survives the rounding."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bases import Base, BaseLike, open_base
from ..bases.quantised.codes import read_floats
from ..bases.quantised.comfy import QUANTISATION_KEY
from ..bases.quantised.weight import ScaledWeight, find_kind, look_inside
from ..bases.weights import ConvertedWeight, RowsWeight, StoredWeight, Weight
from ..core.lowrank import LowRank
from ..core.precision import in_full_precision, is_finite
from ..errors import InvalidOption, NonFiniteWeights, OutputError, UnsupportedFormat
from ..files.safetensors_file import SafetensorsFile
from ..files.safetensors_writing import replace_tensor, stream_safetensors
from ..files.store import check_free, put
from ..moving.base_check import check_moved_before
from ..moving.block_weights import Blocks, BlockWeights, find_factors
from ..moving.option_keywords import settle_options, takes_options
from ..moving.options import LoraLike, read_dtype
from .bake_report import BakedModule, BakeReport
from .convert import read_plain
from .merge_inputs import name_loras
from .merge_options import DEFAULT_MERGE, MergeOptions

TAKEN = ("strengths", "blocks", "dtype", "overwrite", "progress")  # of a merge's options
_MOST_NUMBERS = 1 << 16  # in float64 at a time: they stay in a core's cache
_WEIGHT_FILES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf")


@in_full_precision
@takes_options
def bake(
    loras: Sequence[LoraLike],
    base: BaseLike,
    out: str | PathLike[str],
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
            or ComfyUI's scaled float8.
        out: the file, or folder, to write.
        options: `strengths`, `blocks`, `dtype`, `overwrite` and `progress` of a merge.
        stochastic: seed of rounding at random: the mean is right where updates are smaller than the
            steps of float8, and weights are noisier. None rounds to the nearest.
        **changes: single options by name; they win over `options`.

    Returns:
        What was written, and for each module the share ⟨Q(W + ΔW) − W, ΔW⟩ / ‖ΔW‖² that is left.

    Raises:
        InvalidOption: no LoRA, an option of `merge` that has no use here, or not one for each.
        UnsupportedFormat: a base that cannot be written: in memory, GGUF, or quantised otherwise.
        WrongBase: a LoRA of another model.
        NonFiniteWeights: a result is too large for its type.
        OutputError: `out` cannot be written, or is an input.
    """
    options = settle_options(options, changes)
    usual, asked = vars(DEFAULT_MERGE), vars(options)
    if ignored := [name for name in usual if name not in TAKEN and asked[name] != usual[name]]:
        names = ", ".join(f"`{name}`" for name in ignored)
        raise InvalidOption(f"baking makes a model as its base is, and takes no {names}")
    model, count, dtype = open_base(base), len(loras), read_dtype(options.dtype)
    strengths, blocks = options.strengths or [1.0] * count, options.blocks or [None] * count
    options.check_count(count)
    if not count:
        raise InvalidOption("give one LoRA or more")
    if (path := model.path) is None:
        raise UnsupportedFormat(f"{model.name}: is in memory; give the model as a file or a folder")
    folder, overwrite = path.is_dir(), options.overwrite
    if folder and dtype is not None:
        raise InvalidOption(f"`dtype` is for a base in one file, and {model.name} is a folder")
    if folder and overwrite:  # files of two models would stand in it
        raise InvalidOption("`overwrite` is for a model in one file: a folder is never replaced")
    check_free(out, [*model.files, path], overwrite=overwrite, folder=folder)
    if folder == (Path(out).suffix == ".safetensors"):
        kind = "name a folder" if folder else "a checkpoint's name ends in .safetensors"
        raise OutputError(f"{out}: {model.name} is a {'folder' if folder else 'file'}; {kind}")
    updates = _sum_updates(loras, model, strengths, blocks)
    groups, left_out = _place_updates(updates, model)
    random = None if stochastic is None else torch.Generator().manual_seed(stochastic)
    baking = _Baking(random, dtype)

    def write(new: Path) -> None:
        if folder:
            shutil.copytree(path, new, ignore=_list_unused(model), dirs_exist_ok=True)
        elif dtype is None:
            shutil.copyfile(path, new)
        else:
            _convert(model, new, dtype)
        for i, (stored, parts) in enumerate(groups.items()):
            options.tell(i, len(groups), stored.key)
            at = new / stored.file.path.relative_to(path) if folder else new
            baking.write_weight(at, stored, parts)

    put(out, write, overwrite=overwrite, folder=folder)
    return BakeReport(
        path=str(out),
        base=model.name,
        loras=tuple(name_loras(loras)),
        strengths=tuple(strengths),
        blocks=tuple("" if each is None else str(BlockWeights.read(each)) for each in blocks),
        stochastic=stochastic,
        dtypes=dict(Counter(str(dtype or one.dtype).split(".")[1] for one in groups).most_common()),
        modules=tuple(baking.rows),
        left_out=left_out,
    )


def _sum_updates(
    loras: Sequence[LoraLike],
    model: Base,
    strengths: Sequence[float],
    blocks: Sequence[Blocks | None],
) -> dict[str, list[LowRank | Tensor]]:
    """Reads every LoRA; returns module, or vector, -> what is added to it."""
    found: dict[str, list[LowRank | Tensor]] = {}
    for lora, strength, weights in zip(loras, strengths, blocks, strict=True):
        check_moved_before(lora, model)
        adapter = read_plain(lora, model)
        if adapter.unread:
            gone = next(iter(adapter.unread))
            raise UnsupportedFormat(f"{gone}: this update cannot be read, so it cannot be baked")
        factors = find_factors(weights, adapter, model)
        for name, update in adapter.updates.items():
            factor = strength * factors.get(name, 1.0)
            found.setdefault(name, []).append(LowRank(update.up * factor, update.down))
        for name, vector in adapter.vectors.items():
            factor = strength * factors.get(name.rpartition(".")[0], 1.0)
            found.setdefault(name, []).append(vector * factor)
    return found


Parts = list[tuple[str, Weight, list[LowRank | Tensor]]]


def _place_updates(
    updates: Mapping[str, list[LowRank | Tensor]], model: Base
) -> tuple[dict[StoredWeight, Parts], dict[str, str]]:
    """Finds the stored tensor of every update; also what has no place, with the reason."""
    groups: dict[StoredWeight, Parts] = {}
    left_out = {}
    for name, added in updates.items():
        weight = model.weights.get(name) or model.others[0].get(name)
        if weight is None:
            left_out[name] = f"{model.name} lacks it"
            continue
        root = look_inside(weight)
        stored = root.stored if isinstance(root, ScaledWeight) else root
        writable = isinstance(stored, StoredWeight) and isinstance(stored.file, SafetensorsFile)
        if isinstance(root, ScaledWeight):
            whole = root.tile[1] == math.prod(root.shape[1:])
            writable &= root.unpack is read_floats and stored.dtype.itemsize == 1 and whole
            writable &= stored.dtype.is_floating_point and type(root) is ScaledWeight
        elif not weight.dtype.is_floating_point:
            writable = False
        if not writable or not isinstance(stored, StoredWeight):
            kind = find_kind(weight) or str(weight.dtype)
            raise UnsupportedFormat(
                f"{weight.name}: is stored as {kind}, which is not written; bake into the fp16 or "
                "bf16 version of this model"
            )
        groups.setdefault(stored, []).append((name, weight, added))
    return groups, left_out


def _list_unused(model: Base) -> Any:
    """Returns the filter that leaves out a folder's weights in other precisions."""
    used = {file.resolve() for file in model.files}
    folders = {file.parent for file in used} | {Path(model.path or "").resolve()}

    def ignore(folder: str, names: list[str]) -> set[str]:
        here = Path(folder).resolve()
        weights = [name for name in names if name.endswith(_WEIGHT_FILES)]
        return {name for name in weights if here in folders and (here / name) not in used}

    return ignore


def _convert(model: Base, new: Path, dtype: torch.dtype) -> None:
    """Writes a checkpoint whose numbers are all of one type, a tensor at a time."""
    stored = model.stored
    kinds = {key: dtype if w.dtype.is_floating_point else w.dtype for key, w in stored.items()}
    shapes = ((key, torch.empty(w.shape, device="meta")) for key, w in stored.items())
    told = SafetensorsFile(model.files[0]).metadata.items()
    metadata = {key: text for key, text in told if key != QUANTISATION_KEY}

    def read(key: str) -> Tensor:
        tensor = stored[key].read().to(kinds[key]).contiguous()
        if not is_finite(tensor):
            raise NonFiniteWeights(f"{stored[key].name}: overflows {dtype}")
        return tensor

    stream_safetensors(new, {key: x.to(kinds[key]) for key, x in shapes}, metadata, read)


@dataclass
class _Baking:
    """The work on single weights, and what became of them."""

    random: torch.Generator | None  # rounds to the nearest without one
    dtype: torch.dtype | None  # of all numbers; None keeps each one's
    rows: list[BakedModule] = field(default_factory=list)

    def write_weight(self, file: Path, stored: StoredWeight, parts: Parts) -> None:
        """Adds updates to one stored tensor of a copied file, in place."""
        root = look_inside(parts[0][1])
        wide = torch.float64 if stored.dtype == torch.float64 else torch.float32
        before = root.read()
        numbers, deltas = before.to(wide, copy=True), []
        for name, weight, added in parts:
            dense = (x.dense() if isinstance(x, LowRank) else x for x in added)
            delta = reduce(Tensor.add_, (x.to(wide).reshape(weight.shape) for x in dense))
            for view, rows in _cut_rows(weight, numbers, delta):
                view += rows
            deltas.append((name, weight, delta))
        written, after = self._round(root, stored, numbers)
        for name, weight, delta in deltas:
            self.rows.append(_measure(name, weight, before, after, delta))
            if not math.isfinite(self.rows[-1].wrong):
                raise NonFiniteWeights(f"{stored.name}: the result overflows {written.dtype}")
        assert isinstance(stored.file, SafetensorsFile)  # all others are refused before
        like = stored.file if self.dtype is None else SafetensorsFile(file)
        replace_tensor(file, like, stored.key, written)

    def _round(self, root: Weight, stored: StoredWeight, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the stored tensor, and the numbers that it stands for."""
        scale, codes, dtype = None, numbers, self.dtype or stored.dtype
        if isinstance(root, ScaledWeight) and self.dtype is None:
            tiles = root.load_scales()[0][:, 0]
            scale = tiles.repeat_interleave(root.tile[0])[: len(numbers)]
            scale = scale.reshape(-1, *[1] * (numbers.ndim - 1))
            codes = numbers / scale
        if self.random is not None and dtype != numbers.dtype:
            codes = _round_at_random(codes, dtype, self.random)
        if dtype.itemsize == 1:  # torch makes NaN of what is too large
            largest = torch.finfo(dtype).max
            codes = codes.clamp(-largest, largest)
        written = codes.to(dtype).contiguous()
        return written, written if scale is None else written.to(numbers.dtype) * scale


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


def _round_at_random(codes: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rounds up or down to a float type's numbers, so that the mean is right."""
    info = torch.finfo(dtype)
    exponent = codes.abs().clamp_min(info.smallest_normal).log2().floor()
    steps = codes / torch.exp2(exponent) / info.eps
    low = steps.floor()
    up = torch.rand(codes.shape, generator=generator, dtype=codes.dtype) < steps - low
    return (low + up) * info.eps * torch.exp2(exponent)
