"""`Adapter` -> a file or folder that was read back and compared before it got its name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Set
from pathlib import Path

import torch
from torch import Tensor

from ..core.lowrank import LowRank
from ..errors import OutputError, ProLoRAError, UnsupportedFormat
from ..files.writing import (
    check_writable,
    fill_safetensors,
    replace_output,
    safetensors_size,
)
from . import vectors
from .adapter import Adapter
from .formats import encoding, groups
from .formats import metadata as headers
from .formats.peft_config import METADATA_KEY
from .reading import read_pieces
from .unread import PEFT_CONFIG, PEFT_WEIGHTS, StrPath

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def write_adapter(
    adapter: Adapter,
    path: StrPath,
    *,
    format: str = "auto",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a LoRA whose scale is 1 for every loader: alpha = rank, or no alpha at all.

    The output is built beside `path`, read back as any user would, compared with `adapter` module
    by module, and only then renamed.

    Args:
        adapter: what to write.
        path: a .safetensors file; for "peft" a folder, made if it does not exist.
        format: "auto" (as the adapter came in), "kohya" (in `adapter.spelling`), "diffusers",
            "peft" or "comfy".
        dtype: of the factors, None for the adapter's own; float8 is read but written as float16.
        metadata: replaces the adapter's own. What describes the file itself (ranks, hashes) is
            always recomputed.

    Raises:
        UnsupportedFormat: the format has no name for a module, or is unknown itself.
        ShapeMismatch: an update that fits no linear layer or convolution.
        NonFiniteWeights: a factor that is not finite, or overflows in `dtype`.
        OutputError: the path cannot be written, or what was written reads back differently.
    """
    chosen, stored = check_format(adapter, format), _storage_dtype(adapter, dtype)
    if not adapter.updates and not adapter.vectors:
        raise OutputError(f"{path}: not written, because no module is left in the adapter")
    _check_destination(Path(path), chosen)
    adapter = _move_to_cpu(adapter)
    tensors = encoding.encode_adapter(adapter, chosen, stored)
    header = _file_metadata(adapter, chosen, metadata)
    if chosen == "kohya":
        header.update(headers.kohya_hashes(tensors, header))
    with replace_output(path, folder=chosen == "peft") as output:
        if chosen == "peft":
            fill_safetensors(output / PEFT_WEIGHTS, tensors, header, path)
            (output / PEFT_CONFIG).write_bytes(_config_text(adapter).encode())
        else:
            fill_safetensors(output, tensors, header, path)
        _verify_output(output, adapter, chosen, stored, path)


def encode_state_dict(
    adapter: Adapter, *, format: str = "auto", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The tensors of the file that `write_adapter` makes, by key, without a file.

    Like the file, they are read back and compared before they are given out. No loader needs more
    than them: the scale is 1 in all, whether the ranks differ or not. `format="diffusers"` is what
    `pipe.load_lora_weights(...)` takes.

    Args:
        adapter: what to encode.
        format: as `write_adapter` takes it.
        dtype: as `write_adapter` takes it.

    Returns:
        Tensors on the CPU in memory of their own: factors [out, r] and [r, in], on convolutions
        [out, r, 1, 1] and [r, in, kh, kw]; alphas [] where the format has them.

    Raises:
        UnsupportedFormat, ShapeMismatch, NonFiniteWeights: as `write_adapter` does.
        OutputError: no module is left in the adapter, or it reads back differently.
    """
    chosen, stored = check_format(adapter, format), _storage_dtype(adapter, dtype)
    where = "the state dict"
    if not adapter.updates and not adapter.vectors:
        raise OutputError(f"{where}: not made, because no module is left in the adapter")
    adapter = _move_to_cpu(adapter)
    encoded = encoding.encode_adapter(adapter, chosen, stored)
    tensors = {key: tensor.detach().clone() for key, tensor in encoded.items()}
    _verify_output(tensors, adapter, chosen, stored, where)
    return tensors


def adapter_file_size(
    adapter: Adapter, *, format: str = "auto", dtype: torch.dtype | None = None
) -> int:
    """Bytes of the file that `write_adapter` makes; of the two in a PEFT folder, together.

    Only shapes of updates count, not their numbers. Arguments and errors are those of
    `write_adapter`.
    """
    chosen, stored = check_format(adapter, format), _storage_dtype(adapter, dtype)
    header = _file_metadata(adapter, chosen)
    if chosen == "kohya":
        header.update(headers.BLANK_HASHES)
    size = safetensors_size(encoding.outline_tensors(adapter, chosen, stored), header)
    return size + (len(_config_text(adapter).encode()) if chosen == "peft" else 0)


def _move_to_cpu(adapter: Adapter) -> Adapter:
    return adapter.with_updates({n: update.to("cpu") for n, update in adapter.updates.items()})


def _storage_dtype(adapter: Adapter, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the factors in the file."""
    stored = dtype or (adapter.dtype if adapter.dtype in _DTYPES else torch.float16)
    if stored not in _DTYPES:
        raise UnsupportedFormat(f"LoRA factors are not written as {stored}; use float16 or wider")
    return stored


def _file_metadata(
    adapter: Adapter, format: str, metadata: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The file's metadata, all but kohya's hashes."""
    header = headers.clean_metadata(
        adapter.metadata if metadata is None else metadata,
        format,
        encoding.file_ranks(adapter, format),
    )
    table = encoding.diffusers_metadata(adapter) if format == "diffusers" else None
    if table is not None:
        header[METADATA_KEY] = json.dumps(table)
    return header


def _config_text(adapter: Adapter) -> str:
    """PEFT's adapter_config.json."""
    return json.dumps(encoding.peft_config(adapter), indent=2, sort_keys=True) + "\n"


def check_format(adapter: Adapter, format: str) -> str:
    """The format that "auto" stands for, or the one asked for, if it can hold the adapter.

    Raises:
        UnsupportedFormat: it is unknown, or has no name for a module or vector.
    """
    chosen = adapter.format if format == "auto" else format
    if chosen not in encoding.FORMATS:
        raise UnsupportedFormat(
            f"unknown format {format!r}; use auto, {', '.join(encoding.FORMATS)}"
        )
    groups.file_paths(adapter, chosen)
    encoding.vector_paths(adapter, chosen)
    return chosen


def _check_destination(path: Path, format: str) -> None:
    """Refuses a path that cannot become the output."""
    if format != "peft":
        check_writable(path)
    elif path.is_dir():
        check_writable(path / PEFT_CONFIG)
        check_writable(path / PEFT_WEIGHTS)
    else:
        check_writable(path)
        if path.exists():
            raise OutputError(f"{path}: is a file; a PEFT adapter is a folder")


def _verify_output(
    output: Path | Mapping[str, Tensor],
    adapter: Adapter,
    format: str,
    dtype: torch.dtype,
    path: StrPath,
) -> None:
    """Opens the output as any user would and compares every update.

    Raises:
        OutputError: an update is missing or is off by more than the rounding of `dtype`.
    """
    shared = _shared_sizes(adapter, format)
    seen: set[str] = set()
    foreign: set[str] = set()
    kernels: dict[str, tuple[int, int]] = {}
    found: dict[str, Tensor] = {}
    try:
        for piece in read_pieces(output):
            for name, update in piece.updates.items():
                wanted = adapter.updates.get(name)
                if wanted is None:
                    foreign |= _nonzero_updates(piece, {name})
                elif not _updates_match(update, wanted, dtype, shared.get(name, 0.0)):
                    raise OutputError(
                        f"{path}: {name} reads back differently from what was written"
                    )
            seen |= piece.updates.keys()
            kernels |= piece.kernels
            found |= piece.vectors
    except OutputError:
        raise
    except ProLoRAError as error:
        raise OutputError(f"{path}: was written but cannot be read back: {error}") from error
    missing = {
        name
        for name in adapter.updates.keys() - seen
        if adapter.updates[name].norm() > _product_tolerance(dtype) * shared.get(name, 0.0)
    }
    if missing or foreign or kernels != adapter.kernels:
        changed = sorted(missing | foreign) or ["a convolution's kernel"]
        raise OutputError(f"{path}: reads back with other modules than written: {changed[0]}")
    for name in _nonzero_vectors(adapter.vectors) | _nonzero_vectors(found):
        back, vector = found.get(name), adapter.vectors.get(name)
        if back is None or vector is None or not vectors.vectors_match(back, vector, dtype):
            raise OutputError(f"{path}: {name} reads back differently from what was written")


def _nonzero_vectors(found: Mapping[str, Tensor]) -> set[str]:
    """Those vectors that are more than zeros: a part of a fused bias may be no more."""
    return {name for name, vector in found.items() if vector.any()}


def _nonzero_updates(adapter: Adapter, modules: Set[str]) -> set[str]:
    """Those modules whose update is more than zeros: rows of zeros in a fused weight are none."""
    return {name for name in modules if adapter.updates[name].norm() > 0}


def _shared_sizes(adapter: Adapter, format: str) -> dict[str, float]:
    """Module -> ‖up‖·‖down‖ of the factors that it shares with others in the file."""
    sizes: dict[str, float] = {}
    for group in groups.group_modules(adapter, format):
        if len(group.parts) > 1:
            updates = group.parts.values()
            up = math.hypot(*(update.up.norm().item() for update in updates))
            down = math.hypot(*(update.down.norm().item() for update in updates))
            sizes |= dict.fromkeys(group.parts, up * down)
    return sizes


def _product_tolerance(dtype: torch.dtype) -> float:
    """What rounding both factors can cost, of ‖up‖·‖down‖."""
    # The norm of a difference comes from Gram matrices, which are good to √eps of float64.
    return max(4 * torch.finfo(dtype).eps, 1e-6)


def _updates_match(found: LowRank, wanted: LowRank, dtype: torch.dtype, shared: float) -> bool:
    """‖ΔW_found − ΔW‖_F within what rounding both factors to `dtype` can cost.

    Args:
        found: as it reads back.
        wanted: as it was meant.
        dtype: of the factors in the file.
        shared: ‖up‖·‖down‖ of the factors there, where they are more than this update's: a small
            part of a fused weight is rounded as the whole is.
    """
    if found.shape != wanted.shape:
        return False
    pairs = ((found.up, wanted.up), (found.down, wanted.down))
    rounding = 2 * torch.finfo(dtype).eps
    if found.rank == wanted.rank and all(_factors_match(*pair, rounding) for pair in pairs):
        return True
    # The same product may have other factors, if they were balanced for the dtype or fused.
    difference = LowRank(
        torch.cat([found.up.double(), -wanted.up.double()], 1),
        torch.cat([found.down.double(), wanted.down.double()], 0),
    )
    size = max(shared, (wanted.up.double().norm() * wanted.down.double().norm()).item())
    return bool(difference.norm() <= _product_tolerance(dtype) * size)


def _factors_match(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """‖found − wanted‖_F against ‖wanted‖_F; false where either overflows float32."""
    size = wanted.norm()
    return bool(size.isfinite() and (found - wanted).norm() <= tolerance * size)
