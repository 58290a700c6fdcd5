"""Checkpoints of real names and shapes without their room on the disk, in every spelling.

The authors' names are built here from diffusers' by rules of their own, the other way round than
the reader, so that neither proves itself.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path

Shapes = Mapping[str, tuple[int, ...]]
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1}
GGUF_F16 = 1


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


FLUX = [
    (r"transformer_blocks\.(\d+)\.norm1\.linear", r"double_blocks.\1.img_mod.lin"),
    (r"transformer_blocks\.(\d+)\.norm1_context\.linear", r"double_blocks.\1.txt_mod.lin"),
    (r"transformer_blocks\.(\d+)\.attn\.to_[qkv]", r"double_blocks.\1.img_attn.qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj", r"double_blocks.\1.txt_attn.qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.(?:0\.proj|(2))", r"double_blocks.\1.img_mlp.{}"),
    (
        r"transformer_blocks\.(\d+)\.ff_context\.net\.(?:0\.proj|(2))",
        r"double_blocks.\1.txt_mlp.{}",
    ),
    (r"single_transformer_blocks\.(\d+)\.norm\.linear", r"single_blocks.\1.modulation.lin"),
    (r"single_transformer_blocks\.(\d+)\.(?:attn\.to_[qkv]|proj_mlp)", r"single_blocks.\1.linear1"),
    (r"single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.linear2"),
    (r"x_embedder", "img_in"),
    (r"context_embedder", "txt_in"),
    (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"proj_out", "final_layer.linear"),
]
SD3 = [
    (r"transformer_blocks\.(\d+)\.norm1\.linear", r"joint_blocks.\1.x_block.adaLN_modulation.1"),
    (
        r"transformer_blocks\.(\d+)\.norm1_context\.linear",
        r"joint_blocks.\1.context_block.adaLN_modulation.1",
    ),
    (r"transformer_blocks\.(\d+)\.attn\.to_[qkv]", r"joint_blocks.\1.x_block.attn.qkv"),
    (r"transformer_blocks\.(\d+)\.attn2\.to_[qkv]", r"joint_blocks.\1.x_block.attn2.qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj", r"joint_blocks.\1.context_block.attn.qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"joint_blocks.\1.x_block.attn.proj"),
    (r"transformer_blocks\.(\d+)\.attn2\.to_out\.0", r"joint_blocks.\1.x_block.attn2.proj"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"joint_blocks.\1.context_block.attn.proj"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"joint_blocks.\1.x_block.mlp.fc1"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"joint_blocks.\1.x_block.mlp.fc2"),
    (
        r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj",
        r"joint_blocks.\1.context_block.mlp.fc1",
    ),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", r"joint_blocks.\1.context_block.mlp.fc2"),
    (r"pos_embed\.proj", "x_embedder.proj"),
    (r"context_embedder", "context_embedder"),
    (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"proj_out", "final_layer.linear"),
]
PIXART = [
    (r"transformer_blocks\.(\d+)\.attn1\.to_[qkv]", r"blocks.\1.attn.qkv"),
    (r"transformer_blocks\.(\d+)\.attn1\.to_out\.0", r"blocks.\1.attn.proj"),
    (r"transformer_blocks\.(\d+)\.attn2\.to_q", r"blocks.\1.cross_attn.q_linear"),
    (r"transformer_blocks\.(\d+)\.attn2\.to_[kv]", r"blocks.\1.cross_attn.kv_linear"),
    (r"transformer_blocks\.(\d+)\.attn2\.to_out\.0", r"blocks.\1.cross_attn.proj"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"blocks.\1.mlp.fc1"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"blocks.\1.mlp.fc2"),
    (r"transformer_blocks\.(\d+)\.scale_shift_table", r"blocks.\1.scale_shift_table"),
    (r"scale_shift_table", "final_layer.scale_shift_table"),
    (r"pos_embed\.proj", "x_embedder.proj"),
    (r"proj_out", "final_layer.linear"),
    (r"adaln_single\.linear", "t_block.1"),
    (r"caption_projection\.linear_(\d)", r"y_embedder.y_proj.fc\1"),
]
_EMBEDDERS = {
    "FLUX": {
        "timestep_embedder": "time_in",
        "guidance_embedder": "guidance_in",
        "text_embedder": "vector_in",
    },
    "SD3": {"timestep_embedder": "t_embedder", "text_embedder": "y_embedder"},
    "PixArt": {
        "timestep_embedder": "t_embedder",
        "resolution_embedder": "csize_embedder",
        "aspect_ratio_embedder": "ar_embedder",
    },
}
_RULES = {"FLUX": FLUX, "SD3": SD3, "PixArt": PIXART}


def authors_name(module: str, family: str) -> str:
    """What the authors of "FLUX", "SD3" or "PixArt" call the matrix that a module is part of."""
    match = re.fullmatch(r"(?:time_text_embed|adaln_single\.emb)\.(\w+)\.linear_(\d)", module)
    if match:
        layers = ("in_layer", "out_layer") if family == "FLUX" else ("mlp.0", "mlp.2")
        return f"{_EMBEDDERS[family][match[1]]}.{layers[int(match[2]) - 1]}"
    for pattern, name in _RULES[family]:
        if match := re.fullmatch(pattern, module):
            return re.sub(pattern, name, module).format("2" if "net.2" in module else "0")
    raise KeyError(module)


def fused_shapes(shapes: Shapes, family: str) -> dict[str, tuple[int, ...]]:
    """The authors' matrices: rows of the modules they hold added up."""
    fused: dict[str, tuple[int, ...]] = {}
    for module, shape in shapes.items():
        name = authors_name(module, family)
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
