"""Float8 with scales is read in each notation; what nothing tells the numbers of is refused."""

import json
import re

import pytest
import torch
from diagonal import pair_up
from mini import shapes as mini_shapes

from prolora import open_base
from prolora.bases import check_finite
from prolora.errors import UnsupportedFormat
from prolora.files.safetensors_writing import write_safetensors

Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


def weights():
    generator = torch.Generator().manual_seed(0)
    return {n: 0.02 * torch.randn(*s, generator=generator) for n, s in mini_shapes(2).items()}


def quantised(tensor, dtype, rows=False):
    """(q, scale) with the largest value at the end of the range."""
    top = tensor.abs().amax(dim=1, keepdim=True) if rows else tensor.abs().max()
    scale = top / torch.finfo(dtype).max
    return (tensor / scale).to(dtype), scale


def checkpoint(dtype, notation, rows=False, prefix=""):
    """(tensors, metadata, the weights that they stand for)."""
    stored, metadata, meant, layers = {}, {}, {}, {}
    for name, tensor in weights().items():
        q, scale = quantised(tensor, dtype, rows)
        meant[name] = q.float() * scale
        stored[f"{prefix}{name}.weight"] = q
        suffix = "scale_weight" if notation == "marker" else "weight_scale"
        stored[f"{prefix}{name}.{suffix}"] = scale
        layers[prefix + name] = {"format": str(dtype).removeprefix("torch.")}
        stored[f"{prefix}{name}.{'scale_input' if notation == 'marker' else 'input_scale'}"] = (
            torch.ones(())
        )
        if notation == "notes":
            text = json.dumps(layers[prefix + name]).encode()
            stored[f"{prefix}{name}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    if notation == "marker":
        stored["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    if notation == "metadata":
        listed = {name.removeprefix(prefix): note for name, note in layers.items()}
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": listed})
    return stored, metadata, meant


@pytest.mark.parametrize(
    ("notation", "dtype"), pair_up(["marker", "metadata", "notes"], list(FORMATS.values()))
)
@pytest.mark.parametrize(("rows", "prefix"), pair_up([False, True], ["", "model.diffusion_model."]))
def test_scaled_float8_is_the_product_in_every_notation(dtype, notation, rows, prefix, tmp_path):
    """One scale, or one for each row; and close to what was quantised, which q alone is not."""
    stored, metadata, meant = checkpoint(dtype, notation, rows, prefix)
    write_safetensors(tmp_path / "x.safetensors", stored, metadata, overwrite=True)
    base = open_base(tmp_path / "x.safetensors")
    assert set(base.shapes) == set(meant) and set(base.dtypes.values()) == {torch.float32}
    for name, tensor in weights().items():
        assert torch.equal(base.read(name), meant[name])
        assert (base.read(name) - tensor).norm() < 0.1 * tensor.norm()
    check_finite(base, base.shapes)


def test_rows_of_a_fused_scaled_matrix_take_their_own_scales(tmp_path):
    generator = torch.Generator().manual_seed(1)
    for rows in (False, True):
        whole = torch.randn(24, 8, generator=generator)
        q, scale = quantised(whole, torch.float8_e4m3fn, rows)
        key = "double_blocks.0.img_attn.qkv"
        stored = {f"{key}.weight": q, f"{key}.scale_weight": scale}
        write_safetensors(tmp_path / "x.safetensors", stored, {}, overwrite=True)
        base = open_base(tmp_path / "x.safetensors")
        meant = (q.float() * scale).chunk(3)
        for leaf, part in zip("qkv", meant, strict=True):
            assert torch.equal(base.read(f"transformer_blocks.0.attn.to_{leaf}"), part)


def plain(**more):
    return {f"{Q}.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), **more}


@pytest.mark.parametrize(
    ("content", "metadata", "message"),
    [
        ({**plain(), "scaled_fp8": torch.zeros(0)}, {}, rf"{Q}.weight has no scale"),
        (plain(), {"layers": {Q: {"format": "float8_e4m3fn"}}}, rf"{Q}.weight has no scale"),
        (
            plain(),
            {"layers": {Q: {"format": "nvfp4"}}},
            "float8_e4m3fn .*not torch.uint8 of a matrix",
        ),
        (plain(), {"layers": {Q: {"format": "int8_blockwise", "group_size": 128}}}, "blockwise"),
        (plain(), {"layers": {Q: None}}, "quantised as None"),
        (plain(), {"layers": {"gone": {"format": "float8_e4m3fn"}}}, "how gone is quantised"),
        (
            {f"{Q}.weight": torch.ones(4, 4).char(), f"{Q}.weight_scale": torch.ones(1, 4)},
            {"layers": {Q: {"format": "int8_tensorwise"}}},
            r"float32 \[1, 4\], not",
        ),
        (plain(), {"layers": [Q]}, "lists no layers"),
        (plain(), "{", "is damaged"),
        (plain(), "[" * 100_000, "is damaged"),
        (plain(), "[]", "holds no JSON object"),
        ({**plain(), f"{Q}.comfy_quant": torch.zeros(3, dtype=torch.uint8)}, {}, "is damaged"),
        ({**plain(), f"{Q}.comfy_quant": torch.zeros(3)}, {}, "is not a note"),
        ({**plain(), f"{Q}.weight_scale": torch.ones(2, 2)}, {}, r"\[2, 2\]; only one scale"),
        ({**plain(), f"{Q}.weight_scale": torch.ones(1).int()}, {}, "int32.*only one scale"),
        ({**plain(), f"{Q}.weight_scale_2": torch.ones(1)}, {}, "quantised checkpoint"),
        ({**plain(), f"{Q}.pre_quant_scale": torch.ones(4)}, {}, "quantised checkpoint"),
        ({**plain(), "x.scale_weight": torch.ones(1)}, {}, "scales x.weight, which is not there"),
        ({f"{Q}.weight": torch.ones(4, 4), f"{Q}.weight_scale": torch.ones(1)}, {}, "only float8"),
        ({f"{Q}.qweight": torch.ones(4, 4).int(), f"{Q}.scales": torch.ones(4)}, {}, "qweight"),
        ({f"{Q}.weight._data._data": torch.ones(8).byte()}, {}, r"weight\._data\._data"),
    ],
)
def test_what_is_quantised_otherwise_is_refused_by_name(content, metadata, message, tmp_path):
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    header = {"_quantization_metadata": text} if metadata else {}
    write_safetensors(tmp_path / "x.safetensors", content, header)
    with pytest.raises(UnsupportedFormat, match=message) as refused:
        open_base(tmp_path / "x.safetensors")
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_a_scale_that_makes_no_sense_is_refused_when_the_weight_is_read(scale):
    base = open_base(plain(**{f"{Q}.scale_weight": torch.tensor(scale)}))
    with pytest.raises(UnsupportedFormat, match=re.escape(f"{Q}.scale_weight: the scale of")):
        base.read(Q)
