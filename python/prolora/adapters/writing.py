"""Writing of LoRAs, read back and compared before they get names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..architectures.family import SPELLINGS
from ..architectures.loaders import known_loaders
from ..core.precision import in_full_precision
from ..errors import OutputError, UnsupportedFormat
from ..files.safetensors_writing import fill_safetensors
from ..files.store import put
from .adapter import Adapter
from .adapter_folder import PEFT_CONFIG, PEFT_WEIGHTS
from .formats import encoding, groups
from .formats import metadata as headers
from .formats.peft_config import METADATA_KEY
from .formats.stored import KeptTensors, find_stored, verify_stored
from .lora import StrPath
from .verification import verify_output

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@in_full_precision
def write_adapter(
    adapter: Adapter,
    path: StrPath,
    *,
    format: str = "auto",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a LoRA with scale 1 for every loader: alpha = rank, or no alpha.

    An adapter that was read with `keep_stored` and not changed is written as its file holds it,
    where neither format nor dtype is asked for and the format has a place for all of it.

    The output is built beside `path`, read back as any user would, compared with `adapter` module
    by module, and only then renamed.

    Args:
        adapter: what to write.
        path: a .safetensors file; for "peft" a folder, made if it does not exist.
        format: "auto" (as the adapter came in, if a program reads that), "kohya", "diffusers",
            "peft" or "comfy"; or the program that shall read it, one of `known_loaders()`.
        dtype: of the factors, None for the adapter's own; float8 is read but written as float16.
        overwrite: replace what has that name.

    Raises:
        UnsupportedFormat: the format has no name for a module, or is unknown itself.
        ShapeMismatch: an update that fits no linear layer or convolution.
        NonFiniteWeights: a factor that is not finite, or overflows in `dtype`.
        OutputExists: something has that name.
        OutputError: the path cannot be written, or what was written reads back differently.
    """
    kept = find_kept(adapter, format, dtype)
    adapter, chosen, stored = _settle_storage(adapter, format, dtype)
    if not adapter.updates and not adapter.vectors:
        raise OutputError(f"{path}: not written, because no module is left in the adapter")
    adapter = _move_to_cpu(adapter)
    tensors = kept.read() if kept else encoding.encode_adapter(adapter, chosen, stored)
    header = _file_metadata(adapter, chosen, kept)

    def write(output: Path) -> None:
        if chosen == "peft":
            fill_safetensors(output / PEFT_WEIGHTS, tensors, header, path)
            (output / PEFT_CONFIG).write_bytes(_config_text(adapter, kept).encode())
        else:
            fill_safetensors(output, tensors, header, path)
        if kept:
            verify_stored(output, kept, adapter, path)
        else:
            verify_output(output, adapter, chosen, stored, path)

    put(path, write, overwrite=overwrite, folder=chosen == "peft")


@in_full_precision
def encode_state_dict(
    adapter: Adapter, *, format: str = "auto", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Returns the tensors of `write_adapter`'s file, by key, without a file.

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
    kept = find_kept(adapter, format, dtype)
    kept = None if kept and kept.need_config else kept
    adapter, chosen, stored = _settle_storage(adapter, format, dtype)
    where = "the state dict"
    if not adapter.updates and not adapter.vectors:
        raise OutputError(f"{where}: not made, because no module is left in the adapter")
    adapter = _move_to_cpu(adapter)
    encoded = kept.read() if kept else encoding.encode_adapter(adapter, chosen, stored)
    tensors = {key: tensor.detach().clone() for key, tensor in encoded.items()}
    if kept:
        verify_stored(tensors, kept, adapter, where)
    else:
        verify_output(tensors, adapter, chosen, stored, where)
    return tensors


def find_kept(
    adapter: Adapter, format: str = "auto", dtype: torch.dtype | None = None
) -> KeptTensors | None:
    """Returns the stored tensors that are written as they are; None where factors are.

    Args:
        adapter: what is written.
        format: as `write_adapter` takes it.
        dtype: likewise.
    """
    # One format and one program are called diffusers; what is asked for is the format.
    asked = format in SPELLINGS or format not in ("auto", *known_loaders())
    kinds = {one.kind for one in adapter.stored}
    if asked or dtype is not None or not kinds:
        return None
    if format != "auto" and kinds - {"lora", "locon", "vector"}:
        return None  # programs were tried with these alone
    resolved, _ = groups.resolve_format(adapter, format)
    return find_stored(adapter, check_format(adapter, format)) if resolved is adapter else None


def _settle_storage(
    adapter: Adapter, format: str, dtype: torch.dtype | None
) -> tuple[Adapter, str, torch.dtype]:
    """Returns the adapter in the spelling to write, format and dtype."""
    adapter, format = groups.resolve_format(adapter, format)
    return adapter, check_format(adapter, format), _storage_dtype(adapter, dtype)


def _move_to_cpu(adapter: Adapter) -> Adapter:
    return adapter.with_updates({n: update.to("cpu") for n, update in adapter.updates.items()})


def _storage_dtype(adapter: Adapter, dtype: torch.dtype | None) -> torch.dtype:
    """Returns the dtype of the factors in the file."""
    stored = dtype or (adapter.dtype if adapter.dtype in _DTYPES else torch.float16)
    if stored not in _DTYPES:
        raise UnsupportedFormat(f"LoRA factors are not written as {stored}; use float16 or wider")
    return stored


def _file_metadata(
    adapter: Adapter, format: str, kept: KeptTensors | None = None
) -> dict[str, str]:
    """Returns the file's metadata without kohya's hashes."""
    header = headers.clean_metadata(
        adapter.metadata, format, None if kept else encoding.file_ranks(adapter, format)
    )
    owners = kept.owners if kept else {}
    table = encoding.diffusers_metadata(adapter, owners) if format == "diffusers" else None
    if table is not None:
        header[METADATA_KEY] = json.dumps(table)
    return header


def describe_peft_config(adapter: Adapter) -> dict[str, Any]:
    """Returns the keywords of the `peft.LoraConfig` that scales every module by 1.

    Raises:
        UnsupportedFormat: PEFT has no name for a module, or the adapter has several models.
    """
    check_format(adapter, "peft")
    return encoding.peft_config(adapter)


def _config_text(adapter: Adapter, kept: KeptTensors | None = None) -> str:
    """Writes PEFT's adapter_config.json as text."""
    config = encoding.peft_config(adapter, owners=kept.owners if kept else {})
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def check_format(adapter: Adapter, format: str) -> str:
    """Resolves "auto" and refuses a format that cannot hold the adapter.

    Raises:
        UnsupportedFormat: it is unknown, or has no name for a module or vector.
    """
    if format not in encoding.FORMATS:
        adapter, format = groups.resolve_format(adapter, format)
    chosen = adapter.format if format == "auto" else format
    if chosen not in encoding.FORMATS:
        raise UnsupportedFormat(
            f"unknown format {format!r}; use auto, {', '.join(encoding.FORMATS)}"
        )
    groups.file_paths(adapter, chosen)
    encoding.vector_paths(adapter, chosen)
    return chosen
