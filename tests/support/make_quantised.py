"""Writes tests/bases/quantised_layers.safetensors: a layer as each library stores it, and reads it.

`python tests/support/make_quantised.py` needs bitsandbytes and comfy-kitchen, which no test needs.
The file holds the parts of each layer as the library saves them, and under `meant` the weight as
the same library dequantises it, in float32.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

PLACE = Path(__file__).parents[1] / "bases" / "quantised_layers.safetensors"
Q = "transformer_blocks.0.attn.to_q"
ROWS, COLUMNS = 32, 64
Layer = tuple[dict[str, Tensor], Tensor, dict[str, str]]
"""Tensors as they are saved, the weight that they stand for, and what the header says."""


def make_weight(*, zeros: bool = True) -> Tensor:
    """Normal numbers with a large one, and a row of zeros."""
    generator = torch.Generator().manual_seed(5)
    weight = 0.03 * torch.randn(ROWS, COLUMNS, generator=generator)
    if zeros:
        weight[1] = 0
    weight[2, 3] = 0.7
    return weight


def bitsandbytes_layers() -> dict[str, Layer]:
    import bitsandbytes.functional as functional

    layers = {}
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            q, state = functional.quantize_4bit(
                make_weight(), quant_type=kind, compress_statistics=nested
            )
            parts = {f"{Q}.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
            meant = functional.dequantize_4bit(q, state)
            name = f"bitsandbytes {kind}" + (", nested" if nested else "")
            layers[name] = {f"{Q}.weight": q} | parts, meant, {}
    q, scale, _ = functional.int8_vectorwise_quant(make_weight().half())
    parts = {f"{Q}.weight": q, f"{Q}.SCB": scale}
    parts[f"{Q}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
    layers["bitsandbytes int8"] = parts, functional.int8_vectorwise_dequant(q, scale), {}
    return layers


def comfy_layers() -> dict[str, Layer]:
    from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

    turned = {"convrot_groupsize": 16}
    formats = {
        "nvfp4": ("TensorCoreNVFP4Layout", {"format": "nvfp4"}, {}),
        "mxfp8": ("TensorCoreMXFP8Layout", {"format": "mxfp8"}, {}),
        "int8": ("TensorWiseINT8Layout", {"format": "int8_tensorwise"}, {}),
        "int8 by row": (
            "TensorWiseINT8Layout",
            {"format": "int8_tensorwise"},
            {"per_channel": True},
        ),
        "int8, rotated": (
            "TensorWiseINT8Layout",
            {"format": "int8_tensorwise", "convrot": True, **turned},
            {"per_channel": True, "convrot": True, **turned},
        ),
        "int4, rotated": (
            "TensorCoreConvRotW4A4Layout",
            {"format": "convrot_w4a4", **turned},
            turned,
        ),
    }
    layers = {}
    for kind, (layout, note, options) in formats.items():
        layer = QuantizedTensor.from_float(make_weight(), layout, **options)
        parts = layer.state_dict(f"{Q}.weight") | {f"{Q}.comfy_quant": write_note(note)}
        layers[f"comfy {kind}"] = parts, layer.dequantize(), {}
    generator = torch.Generator().manual_seed(6)
    layout = get_layout_class("TensorCoreAWQW4A16Layout")
    codes = torch.randint(-128, 128, (ROWS, COLUMNS // 2), generator=generator).to(torch.int8)
    scale, zeros = torch.rand(2, COLUMNS // 64, ROWS, generator=generator)
    params = layout.Params(
        scale=scale, zeros=zeros, orig_dtype=torch.float32, orig_shape=(ROWS, COLUMNS)
    )
    parts = {f"{Q}.weight": codes, f"{Q}.weight_scale": scale, f"{Q}.weight_zeros": zeros}
    parts[f"{Q}.comfy_quant"] = write_note({"format": "awq_w4a16", "group_size": 64})
    layers["comfy AWQ int4"] = parts, layout.dequantize(codes, params), {}
    return layers


def write_note(note: dict[str, object]) -> Tensor:
    """A note as ComfyUI keeps it beside a layer."""
    return torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)


def main() -> None:
    layers = bitsandbytes_layers() | comfy_layers()
    packages = ("bitsandbytes", "comfy-kitchen", "torch")
    notes = {"versions": json.dumps({name: version(name) for name in packages})}
    tensors = {}
    for kind, (parts, meant, metadata) in layers.items():
        notes[kind] = json.dumps(metadata)
        named = {**parts, "meant": meant.to(torch.float32)}
        tensors |= {f"{kind}|{key}": x.detach().contiguous() for key, x in named.items()}
    save_file(tensors, PLACE, notes)
    print(f"{len(layers)} layers, {PLACE.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
