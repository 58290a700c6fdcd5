"""An open LoRA: headers and a reader of a file, folder or state dict."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from ..architectures.identify import Model
from ..errors import NonFiniteWeights, UnsupportedFormat, input_error
from ..files.dtypes import name_dtype
from ..files.hub import spell_path
from ..files.jsontext import parse_json_object, read_json_object
from ..files.safetensors_file import SafetensorsFile
from .adapter_folder import (
    ADAPTER_FILES,
    DIFFUSERS_WEIGHTS,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    PICKLES,
    choose_files,
)
from .file_model import identify_file
from .hub_adapters import locate_adapter
from .keys.tensor_keys import StoredTensor

if TYPE_CHECKING:  # what a file is can be said without torch, which takes seconds to import
    from torch import Tensor

    from ..core.arrays import MatrixLike


StrPath = str | os.PathLike[str]


class PeftConfigLike(Protocol):
    """A configuration of PEFT, as `peft.LoraConfig` is one."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration's fields."""


LoraSource: TypeAlias = (
    "StrPath | Mapping[str, MatrixLike] | tuple[Mapping[str, MatrixLike], PeftConfigLike]"
)
"""A .safetensors file, a PEFT folder, an id on the Hugging Face Hub, a state dict, or (state dict,
`peft.LoraConfig`)."""

# Bytes; a pattern for every module of the largest models takes a tenth.
_CONFIG_LIMIT = 4 << 20


@dataclass(frozen=True, eq=False)
class Lora:
    """An open LoRA: header and metadata at once, tensors one by one.

    As a context manager it closes its file at the end; an open file cannot be replaced on Windows.
    """

    where: str  # its name in messages
    tensors: dict[str, StoredTensor]  # by key, in file order
    read: Callable[[str], Tensor]  # key -> tensor
    metadata: dict[str, str]  # header metadata of the file
    config: dict[str, Any] | None = None  # adapter_config.json of a PEFT folder
    file: SafetensorsFile | None = None  # of the weights, if they are in one
    location: Path | None = None  # that file, or the folder that was given
    # What was found in its keys, by what was known of the base
    parsed: dict[Any, Any] = field(default_factory=dict)
    foreign: Any = None  # an array of it that is not torch's

    @classmethod
    def open(cls, source: LoraSource | Lora, metadata: Mapping[str, str] | None = None) -> Lora:
        """Opens a LoRA without reading a tensor.

        Args:
            source: a .safetensors file, a state dict, a PEFT folder (or the weights in it) or a
                folder that diffusers saved a LoRA in; (state dict, `peft.LoraConfig`), as PEFT has
                the two in memory; `org/name` or `hf://org/name[@revision][/path]` on the Hugging
                Face Hub, if no local file has that name; an open LoRA is returned.
            metadata: replaces the metadata of the file; a state dict has none of its own.

        Raises:
            UnsupportedFormat: not a readable LoRA, or the hub does not give it.
        """
        if isinstance(source, Lora):
            return source
        if isinstance(source, Mapping):
            return _open_mapping(source, dict(metadata or {}))
        if isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], Mapping):
            return _open_mapping(source[0], dict(metadata or {}), _read_config(source[1]))
        if not isinstance(source, str | os.PathLike):
            raise UnsupportedFormat(
                "a LoRA is a file, a folder, a state dict or (state dict, peft.LoraConfig), not "
                f"{type(source).__name__}"
            )
        path = Path(source)
        try:
            path = locate_adapter(source)
            if path.is_dir():
                opened = _open_folder(path, metadata)
            elif path.name == PEFT_WEIGHTS and (path.parent / PEFT_CONFIG).is_file():
                # One adapter, whose scale the configuration has.
                opened = replace(_open_folder(path.parent, metadata), location=path)
            else:
                opened = _open_file(path, metadata)
        except OSError as error:  # a folder without permission, a name that is too long, …
            raise input_error(path, error) from error
        return opened if path == Path(source) else replace(opened, where=spell_path(source))

    @property
    def path(self) -> Path | None:
        """The file of the weights, if they are in one."""
        return self.file.path if self.file else None

    @property
    def given(self) -> Path | None:
        """The path or id under which it was opened; None in memory."""
        if self.file is None or self.location is None:
            return None
        in_folder = self.where == str(self.file.path) != str(self.location)
        return self.location if in_folder else Path(self.where)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file and of PEFT's configuration beside it; "" of a state dict."""
        if self.file is None:
            return ""
        digest = hashlib.sha256()
        if self.config is not None:
            digest.update(json.dumps(self.config, sort_keys=True).encode())
        for block in self.file.read_blocks():
            digest.update(block)
        return digest.hexdigest()

    @cached_property
    def model(self) -> Model:
        """What it is for, by its header alone."""
        return identify_file(self.tensors.values(), self.metadata)

    def read_number(self, key: str) -> float:
        """Reads a tensor of one number; of a file without torch."""
        if self.file is not None:
            return self.file.read_number(key)
        return float(self.read(key).double())

    def is_zero(self, key: str) -> bool:
        """Returns whether a tensor holds nothing but zeros; reads a file without torch."""
        if self.file is not None:
            return self.file.is_zero(key)
        return not self.read(key).double().any()

    def close(self) -> None:
        """Closes the file; reading a tensor opens it again."""
        if self.file:
            self.file.close()

    def __enter__(self) -> Lora:
        """Returns itself."""
        return self

    def __exit__(self, *ended: object) -> None:
        """Closes the file."""
        self.close()


def read_finite(source: Lora, key: str) -> Tensor:
    """Reads a tensor as float32, in memory of its own.

    Raises:
        NonFiniteWeights: it holds NaN or Inf.
    """
    import torch

    from ..core.precision import is_finite

    tensor = source.read(key).to(torch.float32, copy=True)
    if not is_finite(tensor):
        raise NonFiniteWeights(
            f"{source.where}: {key} holds NaN or Inf; the training diverged or the file is damaged"
        )
    return tensor


def _read_config(config: PeftConfigLike) -> dict[str, Any]:
    """Reads a configuration of PEFT as the JSON object that PEFT saves; refuses others."""
    kind = type(config).__name__
    if not hasattr(config, "to_dict"):
        raise UnsupportedFormat(f"a peft.LoraConfig stands beside a state dict, not {kind}")
    try:
        # Sets become lists, and what is neither JSON nor a set is of no LoRA that is read.
        text = json.dumps(
            config.to_dict(), default=lambda x: [*x] if isinstance(x, set) else str(x)
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise UnsupportedFormat(
            f"a peft.LoraConfig stands beside a state dict; this {kind} has no fields as it has "
            f"them ({error})"
        ) from error
    return parse_json_object(text, "the configuration")


def _open_mapping(
    tensors: Mapping[str, MatrixLike],
    metadata: dict[str, str],
    config: dict[str, Any] | None = None,
) -> Lora:
    from ..core.arrays import find_other_array, to_tensor

    where = "the state dict"
    stored = {}
    for key, array in tensors.items():
        if not isinstance(key, str) or not hasattr(array, "__dlpack__"):
            raise UnsupportedFormat(
                f"{where}: {key!r:.100} is {type(array).__name__}; names and arrays only"
            )
        tensor = to_tensor(array, f"{where}: {key}")
        if reason := _explain_unreadable(tensor):
            raise UnsupportedFormat(f"{where}: {key} {reason}")
        stored[key] = StoredTensor.of(key, name_dtype(tensor.dtype), tuple(tensor.shape))

    def read(key: str) -> Tensor:
        return to_tensor(tensors[key]).detach().cpu()

    foreign = find_other_array(tensors.values())
    return Lora(where, stored, read, metadata, config, foreign=foreign)


def _explain_unreadable(tensor: Tensor) -> str:
    """Explains why the numbers of a tensor cannot be read, "" if they can."""
    if tensor.is_meta:
        return "is on the meta device and holds no numbers; load the model's weights first"
    odd = tensor.is_complex() or tensor.is_quantized or tensor.is_nested
    plain = not odd and str(tensor.layout) == "torch.strided"
    return "" if plain else "is complex, quantised, nested or sparse; give it as plain numbers"


def _open_file(
    path: Path, metadata: Mapping[str, str] | None, config: dict[str, Any] | None = None
) -> Lora:
    file = SafetensorsFile(path, keep_open=True)
    tensors = {
        key: StoredTensor.of(key, info.stored, info.shape) for key, info in file.tensors.items()
    }
    entries = file.metadata if metadata is None else dict(metadata)
    return Lora(str(path), tensors, file.read, entries, config, file, path)


def _open_folder(folder: Path, metadata: Mapping[str, str] | None) -> Lora:
    there = [name for name in ADAPTER_FILES if (folder / name).is_file()]
    if own := choose_files(there):
        config = read_json_object(folder / own[0], _CONFIG_LIMIT) if own[1:] else None
        return replace(_open_file(folder / own[-1], metadata, config), location=folder)
    for name in PICKLES:
        if name in there:
            SafetensorsFile(folder / name)  # raises, with the command that converts it
    if any((folder / name).is_file() for name in ("model_index.json", "config.json")):
        raise UnsupportedFormat(f"{folder}: the folder of a model, not a LoRA; give the LoRA")
    count = sum(1 for _ in folder.glob("*.safetensors"))
    if count > 1:
        raise UnsupportedFormat(
            f"{folder}: a folder of {count} LoRAs; give its files ({folder / '*.safetensors'}) and "
            "a folder for the results, or move the collection: `migrate()`"
        )
    raise UnsupportedFormat(
        f"{folder}: holds neither {PEFT_CONFIG} with {PEFT_WEIGHTS} nor {DIFFUSERS_WEIGHTS}; "
        "name a .safetensors file"
    )
