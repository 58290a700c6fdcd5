"""The files of a model: a single one, or a diffusers folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UnsupportedFormat, input_error
from ..files.gguf_file import MAGIC, GgufFile
from ..files.jsontext import read_json_object
from ..files.safetensors_file import SafetensorsFile
from ..files.untrusted import open_regular
from .leaves import Leaves, TensorFile
from .weights import StoredWeight

MODELS = ("unet", "transformer")
EXPERT_FOLDERS = (("transformer", "transformer_2"), ("high_noise_model", "low_noise_model"))
"""How diffusers and the authors of Wan call the two experts, the one for high noise first."""

_STEMS = ("diffusion_pytorch_model", "model")
_SHARD = re.compile(r"-\d+-of-\d+")
# The order of variants where a folder has several: the complete weights, else the halved ones,
# since nothing is lost for a projection. The doubles of a training run come last: `ema` and
# `non_ema` are not what a LoRA was trained on (the plain file is).
_PREFERENCE = ("", "fp16", "bf16", "fp32")
_LAST = ("non_ema", "ema")


@dataclass(frozen=True)
class Candidate:
    """One way to read the model in a folder."""

    name: str  # of a file, or of the index of its shards
    variant: str  # "" for the plain one, else as "fp16"
    sharded: bool  # it is an index

    @property
    def order(self) -> tuple[int, str, bool]:
        """The least is taken."""
        if self.variant in _PREFERENCE:
            rank = _PREFERENCE.index(self.variant)
        else:
            rank = len(_PREFERENCE) + (self.variant in _LAST)
        return rank, self.variant, self.sharded


def find_model_folder(path: Path, subfolder: str | None) -> Path:
    """Returns the folder with the weights: `path` or a part of its pipeline.

    Raises:
        UnsupportedFormat: no such part, both a UNet and a transformer, or two experts.
    """
    if subfolder is not None:
        folder = path / subfolder
        if not os.path.isdir(folder):
            raise UnsupportedFormat(f"{path}: has no folder {subfolder}")
        return folder
    if experts := find_expert_folders(path):
        raise UnsupportedFormat(explain_experts(path, [str(folder) for folder in experts]))
    parts = [name for name in MODELS if (path / name).is_dir()]
    if len(parts) > 1:
        raise UnsupportedFormat(f"{path}: has both unet and transformer; name one as subfolder")
    return path / parts[0] if parts else path


def find_expert_folders(path: Path) -> list[Path]:
    """Returns the folders of a model's two experts, high noise first, if any."""
    for names in EXPERT_FOLDERS:
        folders = [path / name for name in names]
        if all(map(os.path.isdir, folders)):
            return folders
    return []


def explain_experts(where: object, experts: list[str]) -> str:
    """Explains why a model of two experts is no single base."""
    return (
        f"{where}: has two experts, {experts[0]} for high noise and {experts[1]} for low noise; "
        "name one of them. `transfer_many()` moves a LoRA to both"
    )


def open_folder_weights(folder: Path) -> dict[str, StoredWeight]:
    """Returns the weights of the model in `folder` by key.

    Raises:
        UnsupportedFormat: no safetensors weights, several that cannot be told apart, or shards that
            do not hold what their index says.
    """
    try:
        files = sorted(entry for entry in folder.iterdir() if entry.is_file())
    except OSError as error:
        raise input_error(folder, error) from error
    best = choose_candidate(file.name for file in files)
    if best is not None and best.sharded:
        return _open_shards(folder / best.name)
    return open_file_weights(folder / best.name if best else _find_only_checkpoint(folder, files))


def choose_candidate(names: Iterable[str]) -> Candidate | None:
    """Returns the file or index to read in a model's folder, None without diffusers' names."""
    names = list(names)
    for stem in _STEMS:
        candidates = [file for name in names if (file := _parse_candidate(name, stem))]
        if candidates:
            return min(candidates, key=lambda candidate: candidate.order)
    return None


def _parse_candidate(name: str, stem: str) -> Candidate | None:
    """Reads "stem[.variant].safetensors" and the three spellings of "….index.json"."""
    words = name.split(".")
    if words[0] != stem or "safetensors" not in words or _SHARD.search(name):
        return None
    sharded = words[-1] == "json"
    if sharded != ("index" in words) or not (sharded or words[-1] == "safetensors"):
        return None
    rest = [word for word in words[1:] if word not in ("safetensors", "index", "json")]
    return Candidate(name, ".".join(rest), sharded)


def _find_only_checkpoint(folder: Path, files: list[Path]) -> Path:
    tensors = [file for file in files if file.suffix in (".safetensors", ".gguf")]
    tensors = tensors or [file for file in files if file.suffix in (".bin", ".ckpt", ".pt", ".pth")]
    if len(tensors) == 1 and not _SHARD.search(tensors[0].name):
        return tensors[0]
    if any(_SHARD.search(file.name) for file in tensors):
        raise UnsupportedFormat(f"{folder}: has shards but not their .safetensors.index.json")
    if tensors:
        names = ", ".join(file.name for file in tensors[:4])
        raise UnsupportedFormat(
            f"{folder}: has several checkpoints ({names}); name one of them, or LoRAs as "
            f"{folder / '*'}"
        )
    raise UnsupportedFormat(f"{folder}: has no .safetensors weights, nor a unet or transformer")


def open_file_weights(path: Path) -> dict[str, StoredWeight]:
    """Returns the keys of a single file; its first bytes tell its format.

    Raises:
        UnsupportedFormat: neither safetensors nor GGUF, or damaged.
    """
    try:
        with open_regular(path) as opened:
            is_gguf = opened.read(len(MAGIC)) == MAGIC
    except (OSError, UnsupportedFormat):
        is_gguf = False  # the reader below says what is wrong
    file: TensorFile = GgufFile(path) if is_gguf else SafetensorsFile(path)
    leaves = Leaves(file)
    return {key: StoredWeight(leaves, key) for key in file.tensors}


def _open_shards(index: Path) -> dict[str, StoredWeight]:
    """Returns the weights the index lists; other tensors of a shard are ignored."""
    shards: dict[str, Leaves] = {}
    weights: dict[str, StoredWeight] = {}
    for key, name in read_weight_map(index).items():
        if name not in shards:
            path = index.parent / name
            if not path.is_file():
                raise UnsupportedFormat(
                    f"{index}: the shard {name} is missing; download it into {index.parent}"
                )
            shards[name] = Leaves(SafetensorsFile(path), index)
        if key not in shards[name].file.tensors:
            raise UnsupportedFormat(f"{index}: says that {key} is in {name}, which lacks it")
        weights[key] = StoredWeight(shards[name], key)
    return weights


def read_weight_map(index: Path) -> dict[str, str]:
    """Returns {key: shard} of an index; all shards must lie beside it.

    Raises:
        UnsupportedFormat: it is not an index, or names a file elsewhere.
    """
    try:
        shards = read_json_object(index).get("weight_map")
    except UnsupportedFormat as error:
        raise UnsupportedFormat(f"{error}; it is not an index of shards") from error
    if not isinstance(shards, dict):
        raise UnsupportedFormat(f"{index}: is not an index of shards: it has no weight_map")
    for key, name in shards.items():
        # A name with a folder in it could point anywhere on this machine, one of more letters than
        # file systems take nowhere.
        plain = isinstance(name, str) and name.endswith(".safetensors") and len(name) < 256
        if not plain or not set(name).isdisjoint("/\\:\0"):
            raise UnsupportedFormat(
                f"{index}: {key[:80]} is in {name!r:.80}, which is not a file beside it"
            )
    return shards
