"""Writes tests/bases/quantised_layers.safetensors: a layer as each library stores it, and reads it.

`python tests/support/make_quantised.py` needs bitsandbytes, comfy-kitchen, optimum-quanto, torchao
and a checkout of nunchaku on PYTHONPATH, which no test needs. The file holds the parts of each
layer as the library saves them, and under `meant` the weight as the same library dequantises it, in
float32. nunchaku runs on cards alone: its packer makes the parts, and comfy-kitchen, which computes
the same layer on a CPU, the weight.
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


def quanto_layers() -> dict[str, Layer]:
    from optimum import quanto

    layers = {}
    for kind in ("qint8", "qint4", "qint2", "qfloat8_e4m3fn", "qfloat8_e5m2"):
        linear = torch.nn.Linear(COLUMNS, ROWS)
        linear.weight.data = make_weight(zeros=False)  # which quanto's float8 makes NaN
        model = torch.nn.Sequential(linear)
        quanto.quantize(model, weights=getattr(quanto, kind))
        quanto.freeze(model)
        parts = {f"{Q}.{k.removeprefix('0.')}": v for k, v in model.state_dict().items()}
        layers[f"quanto {kind}"] = parts, model[0].weight.dequantize().detach(), {}
    return layers


def torchao_layers() -> dict[str, Layer]:
    from torchao import quantization
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    configs = {
        "int8": quantization.Int8WeightOnlyConfig(),
        "int8 in groups": quantization.Int8WeightOnlyConfig(granularity=quantization.PerGroup(32)),
        "float8": quantization.Float8WeightOnlyConfig(),
        "int4 in bytes": quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=quantization.PerGroup(32)
        ),
    }
    made = {}
    for kind, config in configs.items():
        model = torch.nn.Sequential(torch.nn.Linear(COLUMNS, ROWS, bias=False))
        model[0].weight.data = make_weight(zeros=False)  # as with quanto
        quantization.quantize_(model, config)
        made[kind] = model[0].weight.data
    largest = make_weight().abs().max() / (448 * 6)
    for ordered in (False, True):
        end = ", ordered" if ordered else ""
        for kind, dtype in (("mxfp8", torch.float8_e4m3fn), ("mxfp4", torch.float4_e2m1fn_x2)):
            made[kind + end] = MXTensor.to_mx(
                make_weight(), dtype, block_size=32, is_swizzled_scales=ordered
            )
        made["nvfp4" + end] = NVFP4Tensor.to_nvfp4(
            make_weight(), per_tensor_scale=largest, is_swizzled_scales=ordered
        )
    layers = {}
    for kind, tensor in made.items():
        parts, metadata = flatten_tensor_state_dict({f"{Q}.weight": tensor})
        layers[f"torchao {kind}"] = parts, tensor.dequantize(), metadata
    return layers


def nunchaku_layers() -> dict[str, Layer]:
    from comfy_kitchen.tensor import get_layout_class
    from nunchaku.lora.flux.packer import NunchakuWeightPacker

    generator = torch.Generator().manual_seed(7)
    rows, columns, rank = 256, 128, 16
    codes = torch.randint(-7, 8, (rows, columns), generator=generator).to(torch.int32)
    scale = torch.rand(rows, columns // 64, generator=generator).bfloat16() / 100
    smooth = (torch.rand(columns, generator=generator) + 0.5).bfloat16()
    down = 0.1 * torch.randn(rank, columns, generator=generator).bfloat16()
    up = 0.1 * torch.randn(rows, rank, generator=generator).bfloat16()
    packer = NunchakuWeightPacker(bits=4)
    parts = {
        f"{Q}.qweight": packer.pack_weight(codes.clone()),
        f"{Q}.wscales": packer.pack_scale(scale.view(rows, 1, -1, 1), group_size=64),
        f"{Q}.smooth_factor": packer.pack_scale(smooth.view(-1, 1), group_size=-1),
        f"{Q}.proj_down": packer.pack_lowrank_weight(down, down=True).view(columns, rank),
        f"{Q}.proj_up": packer.pack_lowrank_weight(up, down=False),
        f"{Q}.bias": torch.zeros(rows, dtype=torch.bfloat16),
    }
    layout = get_layout_class("TensorCoreSVDQuantW4A4Layout")
    low, high = codes[:, ::2] & 15, codes[:, 1::2] & 15
    params = layout.Params(
        scale=scale.mT.contiguous().float(),
        orig_dtype=torch.float32,
        orig_shape=(rows, columns),
        proj_down=down.mT.contiguous().float(),
        proj_up=up.float(),
        smooth_factor=smooth.float(),
    )
    meant = layout.dequantize((low | high << 4).to(torch.int8), params)
    return {"nunchaku SVDQuant int4": (parts, meant, {})}


def write_note(note: dict[str, object]) -> Tensor:
    """A note as ComfyUI keeps it beside a layer."""
    return torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)


def main() -> None:
    layers = bitsandbytes_layers() | comfy_layers() | quanto_layers() | torchao_layers()
    layers |= nunchaku_layers()
    packages = ("bitsandbytes", "comfy-kitchen", "optimum-quanto", "torchao", "torch")
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
