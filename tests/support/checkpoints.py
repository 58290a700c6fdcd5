"""Checkpoints of real names and shapes without their room on the disk, in every spelling.

The authors' names are those of ComfyUI's models.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

from family_oracles import read_comfyui_names

from prolora.architectures.shared_names import find_unet_names

Shapes = Mapping[str, tuple[int, ...]]
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1}
GGUF_F16 = 1


def name_in_ldm(module: str, modules: Iterable[str] = (), layers: int = 2) -> str | None:
    """What LDM's files call a module of the UNet that has some modules."""
    weight = find_unet_names(modules, layers).find_weight_holding(module)
    return weight and weight.name


def sparse_file(
    path: Path,
    shapes: Shapes,
    dtype: str = "F16",
    *,
    metadata: Mapping[str, str] | None = None,
    other: Mapping[str, tuple[str, tuple[int, ...]]] | None = None,
) -> Path:
    """A safetensors file of zeros that takes no room: a header and a hole of the right size."""
    entries = {name: (dtype, shape) for name, shape in shapes.items()} | dict(other or {})
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (kind, shape) in entries.items():
        start, end = end, end + SIZES[kind] * product(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return path


def sparse_shards(folder: Path, shapes: Shapes, shards: int = 3) -> Path:
    """The same in several files with an index, as diffusers saves large models."""
    stem = "diffusion_pytorch_model"
    names = list(shapes)
    table = {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: shapes[name] for name in names[i::shards]}
        sparse_file(folder / file, part)
        table |= dict.fromkeys(part, file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return folder


def gguf_string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf_header(
    tensors: list[tuple[str, tuple[int, ...], int, int]], entries: bytes = b"", count: int = 0
) -> bytes:
    """The header of a GGUF file: (name, shape rows first, type, offset) of every tensor."""
    raw = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), count) + entries
    for name, shape, kind, offset in tensors:
        raw += gguf_string(name) + struct.pack("<I", len(shape))
        raw += struct.pack(f"<{len(shape)}Q", *shape[::-1]) + struct.pack("<IQ", kind, offset)
    return raw + b"\0" * (-len(raw) % 32)


def sparse_gguf(path: Path, shapes: Shapes) -> Path:
    """A GGUF file of float16 zeros that takes no room."""
    tensors, end = [], 0
    for name, shape in shapes.items():
        tensors.append((name, shape, GGUF_F16, end))
        end += -(-2 * product(shape) // 32) * 32
    header = gguf_header(tensors)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + end)
    return path


def product(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def authors_name(module: str, layout: str) -> str:
    """What the authors of a published size call the matrix that a module is part of."""
    if module.endswith("scale_shift_table"):  # a parameter, which no LoRA of ComfyUI's updates
        place = "" if "blocks" in module else "final_layer."
        return place + module.removeprefix("transformer_")
    names = read_comfyui_names()["flux1-dev" if layout == "flux1-fill" else layout]
    return str(names["parts"][module][0])


def fused_shapes(shapes: Shapes, layout: str) -> dict[str, tuple[int, ...]]:
    """The authors' matrices: rows of the modules they hold added up."""
    fused: dict[str, tuple[int, ...]] = {}
    for module, shape in shapes.items():
        name = authors_name(module, layout)
        rows = fused.get(name, (0,))[0] + shape[0]
        fused[name] = (rows, *shape[1:])
    return fused


def clip(width: int, layers: int, vocabulary: int, projection: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a CLIP text encoder in transformers' spelling."""
    shapes = {
        "text_model.embeddings.token_embedding": (vocabulary, width),
        "text_model.embeddings.position_embedding": (77, width),
    }
    for i in range(layers):
        layer = f"text_model.encoder.layers.{i}."
        shapes |= {f"{layer}self_attn.{p}_proj": (width, width) for p in ("q", "k", "v", "out")}
        shapes |= {f"{layer}mlp.fc1": (4 * width, width), f"{layer}mlp.fc2": (width, 4 * width)}
    return shapes | ({"text_projection": (width, width)} if projection else {})


def open_clip(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The same as OpenCLIP stores it: full keys."""
    stored: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        match = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)", name)
        if match is None:
            key = {
                "token_embedding": "token_embedding.weight",
                "position_embedding": "positional_embedding",
                "text_projection": "text_projection",
            }[name.rpartition(".")[2]]
            stored[key] = shape
            continue
        layer = f"transformer.resblocks.{match[1]}."
        if match[2][-6:] in ("q_proj", "k_proj", "v_proj"):
            stored[f"{layer}attn.in_proj_weight"] = (3 * shape[0], shape[1])
        else:
            part = {
                "self_attn.out_proj": "attn.out_proj",
                "mlp.fc1": "mlp.c_fc",
                "mlp.fc2": "mlp.c_proj",
            }[match[2]]
            stored[f"{layer}{part}.weight"] = shape
    return stored
