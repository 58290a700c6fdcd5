"""Writing of LoRAs, read back and compared before they get names."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..architectures.family import SPELLINGS
from ..architectures.loaders import known_loaders
from ..core.precision import in_full_precision
from ..errors import OutputError, ProLoRAError, UnsupportedFormat
from ..files.hashing import hash_tensors
from ..files.safetensors_writing import fill_safetensors
from ..files.store import put
from .adapter import Adapter, StoredUpdate
from .adapter_folder import PEFT_CONFIG, PEFT_WEIGHTS
from .contents import parse_contents, read_scale
from .file_model import BaseNames
from .formats import encoding, groups
from .formats.metadata import clean_metadata
from .formats.moves import PREFIX
from .formats.peft_config import METADATA_KEY
from .formats.stored import KeptTensors, find_stored
from .lora import Lora, StrPath

TENSORS = f"{PREFIX}tensors"
"""The entry of a header that is the digest of the file's own tensors."""
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

    The output is built beside `path` and read back: bit by bit, and as any user would, module by
    module and scale by scale. Only then it is renamed.

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
    output = _prepare(adapter, format, dtype, path)
    folder = output.format == "peft"
    text = ""
    if folder:
        peft = encoding.peft_config(output.adapter, owners=output.owners)
        text = json.dumps(peft, indent=2, sort_keys=True) + "\n"
    header = output.header
    if any(key.startswith(PREFIX) for key in header):
        tensors, config = output.tensors, json.loads(text) if folder else None
        beside = json.dumps(config, sort_keys=True)
        header = header | {TENSORS: hash_tensors(tensors, tensors.__getitem__, beside)}

    def write(place: Path) -> None:
        weights = place / PEFT_WEIGHTS if folder else place
        fill_safetensors(weights, output.tensors, header, path)
        if folder:
            (place / PEFT_CONFIG).write_bytes(text.encode())
        _verify_output(place, output.adapter, output.scales, path)

    put(path, write, overwrite=overwrite, folder=folder)


@in_full_precision
def encode_state_dict(
    adapter: Adapter, *, format: str = "auto", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Returns the tensors of `write_adapter`'s file, by key, without a file.

    Like the file, they are read back and compared before they are given out, on the CPU and in
    memory of their own: factors [out, r] and [r, in], on convolutions [out, r, 1, 1] and [r, in,
    kh, kw]; alphas [] where the format has them. No loader needs more than them: the scale is 1 in
    all, whether the ranks differ or not. Arguments and errors are `write_adapter`'s.
    """
    output = _prepare(adapter, format, dtype, "the state dict", configured=False)
    tensors = {key: tensor.detach().clone() for key, tensor in output.tensors.items()}
    _verify_output(tensors, output.adapter, output.scales, "the state dict")
    return tensors


@dataclass(frozen=True)
class _Encoded:
    """An adapter as it is written."""

    adapter: Adapter
    format: str
    tensors: dict[str, Tensor]
    header: dict[str, str]  # the file's metadata, without kohya's hashes
    scales: dict[str, float]  # module -> what stands in front of its tensors
    # Module -> the stored tensors that are written as they are
    owners: Mapping[str, StoredUpdate]


def _prepare(
    adapter: Adapter,
    format: str,
    dtype: torch.dtype | None,
    where: StrPath,
    *,
    configured: bool = True,
) -> _Encoded:
    """Encodes an adapter; `configured` allows stored tensors with scales beside them."""
    kept_tensors = find_kept(adapter, format, dtype)
    if kept_tensors and kept_tensors.need_config and not configured:
        kept_tensors = None
    adapter, format = groups.resolve_format(adapter, format)
    layout = groups.lay_out(adapter, format)
    stored = dtype or (adapter.dtype if adapter.dtype in _DTYPES else torch.float16)
    if stored not in _DTYPES:
        raise UnsupportedFormat(f"LoRA factors are not written as {stored}; use float16 or wider")
    if not adapter.updates and not adapter.vectors:
        raise OutputError(f"{where}: not written, because no module is left in the adapter")
    adapter = adapter.with_updates({n: update.to("cpu") for n, update in adapter.updates.items()})
    if kept_tensors:
        tensors, owners, ranks = kept_tensors.read(), kept_tensors.owners, None
        scales = {name: one.scale for name, one in owners.items()}
    else:
        tensors, owners = encoding.encode_adapter(adapter, format, stored), {}
        ranks = {group.rank for group in layout.groups}
        alpha = encoding.common_rank(layout) if format == "kohya" else None
        scales = {
            name: alpha / group.rank if alpha else 1.0
            for group in layout.groups
            for name in group.parts
        }
    header = clean_metadata(adapter.metadata, format, ranks)
    if format == "diffusers" and (table := encoding.diffusers_metadata(adapter, owners)):
        header[METADATA_KEY] = json.dumps(table)
    return _Encoded(adapter, format, tensors, header, scales, owners)


def _verify_output(
    output: Path | Mapping[str, Tensor],
    adapter: Adapter,
    scales: Mapping[str, float],
    where: StrPath,
) -> None:
    """Opens an output and compares what its keys, shapes and scales mean.

    The bits of a file were compared when it was filled. `scales` is module -> the scale in front of
    its tensors; `where` is what messages call the output.
    """
    updates, biases = set(adapter.updates), set(adapter.vectors)
    try:
        with Lora.open(output) as back:
            contents = parse_contents(back, BaseNames(adapter.model, adapter.updates))
            for slot in contents.slots:
                owned = [name for name in slot.module.modules if name in adapter.updates]
                if not owned:
                    raise OutputError(f"{where}: {slot.module.name} was not written, and is there")
                name, plain = owned[0], slot.kind in ("lora", "locon")
                if not math.isclose(read_scale(slot, back), scales[name], rel_tol=1e-6):
                    raise OutputError(f"{where}: {name} reads back at another scale")
                if plain and slot.kernel != adapter.kernels.get(name):
                    raise OutputError(f"{where}: {name} reads back with another kernel")
                updates -= set(owned)
            if surplus := next(iter(contents.left_out), ""):
                raise OutputError(f"{where}: {surplus} was written, and nothing reads it")
    except OutputError:
        raise
    except ProLoRAError as error:
        raise OutputError(f"{where}: was written but cannot be read back: {error}") from error
    for one in contents.vectors:
        biases -= {f"{name}.{one.tensor}" for name in one.module.modules}
    if updates or biases:
        name = min(updates | biases)
        raise OutputError(f"{where}: reads back with other modules than written: no {name}")


def find_kept(
    adapter: Adapter, format: str = "auto", dtype: torch.dtype | None = None
) -> KeptTensors | None:
    """Returns the stored tensors that `write_adapter` writes as they are; None for factors."""
    # One format and one program are called diffusers; what is asked for is the format.
    asked = format in SPELLINGS or format not in ("auto", *known_loaders())
    kinds = {one.kind for one in adapter.stored}
    if asked or dtype is not None or not kinds:
        return None
    if format != "auto" and kinds - {"lora", "locon", "vector"}:
        return None  # programs were tried with these alone
    resolved, format = groups.resolve_format(adapter, format)
    return find_stored(adapter, format) if resolved is adapter else None


def describe_peft_config(adapter: Adapter) -> dict[str, Any]:
    """Returns the keywords of the `peft.LoraConfig` that scales every module by 1.

    Raises:
        UnsupportedFormat: PEFT has no name for a module, or the adapter has several models.
    """
    check_format(adapter, "peft")
    return encoding.peft_config(adapter)


def check_format(adapter: Adapter, format: str) -> str:
    """Resolves "auto" and refuses a format that cannot hold the adapter.

    Raises:
        UnsupportedFormat: it is unknown, or has no name for a module or vector.
    """
    adapter, format = groups.resolve_format(adapter, format)
    groups.lay_out(adapter, format)
    return format
