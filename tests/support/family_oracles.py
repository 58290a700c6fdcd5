"""diffusers' own readers of the authors' names, for every family that has one.

Nothing here knows a name of a module: the shapes are those of diffusers' classes, and what the
authors would have stored is made from them by a family's table. The converters then say whether the
table is right. They cut rows only, so that two columns of every matrix are enough.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from prolora.architectures.family import AuthorsWeight, Family

COMFYUI_NAMES = Path(__file__).parent / "comfy_names.json.gz"
State = dict[str, torch.Tensor]
COLUMNS = 2


@dataclass(frozen=True)
class Oracle:
    """How diffusers reads a family's files."""

    changes: Mapping[str, object]  # fewer blocks than the published sizes have
    checkpoint: str = ""  # function of `single_file_utils` that reads the authors' checkpoints
    lora: str = ""  # function of `lora_conversion_utils` that reads LoRAs in the authors' names
    # authors' names that it does not read, or reads otherwise
    not_in_lora: tuple[str, ...] = field(default=())
    # function of `lora_conversion_utils` that reads LoRAs in kohya's spelling. All read the
    # blocks; what lies outside them some give no prefix, and some leave out
    kohya: str = ""


ORACLES = {
    "flux": Oracle(
        {"num_layers": 2, "num_single_layers": 2},
        "convert_flux_transformer_checkpoint_to_diffusers",
        kohya="_convert_kohya_flux_lora_to_diffusers",
    ),
    "qwen-image": Oracle(
        {"num_layers": 2},
        lora="_convert_non_diffusers_qwen_lora_to_diffusers",
        kohya="_convert_non_diffusers_qwen_lora_to_diffusers",
    ),
    "z-image": Oracle(
        {"n_layers": 2},
        "convert_z_image_transformer_checkpoint_to_diffusers",
        kohya="_convert_non_diffusers_z_image_lora_to_diffusers",
    ),
    "flux2": Oracle(
        {"num_layers": 2, "num_single_layers": 2},
        "convert_flux2_transformer_checkpoint_to_diffusers",
        "_convert_non_diffusers_flux2_lora_to_diffusers",
        # It is renamed without swapping its halves, which the reader of checkpoints swaps.
        not_in_lora=("final_layer.adaLN_modulation.1",),
        kohya="_convert_kohya_flux2_lora_to_diffusers",
    ),
    "chroma": Oracle(
        {"num_layers": 2, "num_single_layers": 2},
        "convert_chroma_transformer_checkpoint_to_diffusers",
    ),
    "sd3": Oracle({"num_layers": 3}, "convert_sd3_transformer_checkpoint_to_diffusers"),
    "auraflow": Oracle(
        {"num_mmdit_layers": 2, "num_single_dit_layers": 2},
        "convert_auraflow_transformer_checkpoint_to_diffusers",
    ),
    "lumina2": Oracle(
        {"num_layers": 2},
        "convert_lumina2_to_diffusers",
        "_convert_non_diffusers_lumina2_lora_to_diffusers",
        # It reads the blocks only.
        not_in_lora=(
            "x_embedder",
            "t_embedder.mlp.0",
            "t_embedder.mlp.2",
            "cap_embedder.1",
            "final_layer.adaLN_modulation.1",
            "final_layer.linear",
        ),
    ),
    "hidream": Oracle(
        {"num_layers": 2, "num_single_layers": 2},
        "convert_hidream_transformer_to_diffusers",
        "_convert_non_diffusers_hidream_lora_to_diffusers",
    ),
    "krea2": Oracle(
        {"num_layers": 2},
        "convert_krea2_transformer_checkpoint_to_diffusers",
        "_convert_non_diffusers_krea2_lora_to_diffusers",
    ),
    "qwen-image-2.1": Oracle(
        {"num_layers": 2}, "convert_qwen_image21_transformer_checkpoint_to_diffusers"
    ),
}


@cache
def read_comfyui_names() -> dict[str, dict[str, dict[str, list[int]]]]:
    """What ComfyUI of February 2026 says of its models, in the published sizes.

    Layout -> "matrices" (its name -> shape) and "parts" (diffusers' name -> its name, first row and
    rows), from the models it builds and from the key maps it reads LoRAs by.
    """
    names: dict[str, dict[str, dict[str, list[int]]]] = json.loads(
        gzip.decompress(COMFYUI_NAMES.read_bytes())
    )
    return names


class Checkpoint(dict[str, torch.Tensor]):
    """A checkpoint that has what it is asked for: converters take norms by their names."""

    def pop(self, key: str, *default: object) -> torch.Tensor:  # type: ignore[override]
        return super().pop(key, torch.zeros(COLUMNS))


def list_weights(model: torch.nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Canonical module -> (its parameter's name behind the module's, its shape)."""
    return {
        name.removesuffix(".weight"): (
            ".weight" if name.endswith(".weight") else "",
            tuple(parameter.shape),
        )
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1
    }


def list_held(family: Family, modules: Mapping[str, object]) -> dict[str, AuthorsWeight]:
    """The authors' name -> their matrix, for all that hold one of the modules."""
    held = {}
    for module in modules:
        weight = family.find_weight_holding(module)
        assert weight is not None, module
        held[weight.name] = weight
    return held


def make_rows(shapes: Mapping[str, tuple[int, ...]]) -> State:
    """Random matrices that have the rows of the modules, and few columns."""
    generator = torch.Generator().manual_seed(len(shapes))
    return {
        name: torch.randn(rows, COLUMNS, generator=generator) for name, (rows, *_) in shapes.items()
    }


def store_as_authors(
    weight: AuthorsWeight, rows: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> torch.Tensor:
    """The matrix as the authors store it: parts one below the other, halves in their order."""
    matrix = torch.cat([rows[part] for part in weight.parts])
    first = shapes[weight.parts[0]]
    if weight.is_swapped((len(matrix), *first[1:])):
        matrix = torch.cat(matrix.chunk(2)[::-1])
    return matrix
