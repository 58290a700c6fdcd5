"""FLUX, SD3 and PixArt in their authors' spelling give the weights of diffusers' spelling."""

import re
import zlib

import pytest
import torch
from checkpoints import authors_name, clip, open_clip
from mini import shapes as unet_shapes

import prolora
from prolora import open_base
from prolora.architectures import layouts
from prolora.errors import ShapeMismatch, UnsupportedFormat
from prolora.files.safetensors_writing import write_safetensors


def tiny(id_, width=8, blocks=2):
    """Weights of the first blocks of a layout, and of what is around them, at a small width."""
    full = layouts.load_layout(id_).shapes
    unit = full["transformer_blocks.0.ff.net.2"][0]
    last = max(
        int(match[1]) for name in full if (match := re.match(r"transformer_blocks\.(\d+)", name))
    )
    generator = torch.Generator().manual_seed(zlib.crc32(id_.encode()))
    weights = {}
    for name, shape in full.items():
        match = re.match(r"((?:single_)?transformer_blocks)\.(\d+)\.", name)
        if match and blocks <= int(match[2]) != last:
            continue
        if match and int(match[2]) == last and not match[1].startswith("single"):
            name = name.replace(f".{last}.", f".{blocks}.", 1)
        small = [size * width // unit if size % unit == 0 else min(size, 6) for size in shape]
        weights[name] = torch.randn(*small, generator=generator)
    return weights


def fused(weights, id_):
    """The authors' matrices, under full keys; the halves of (scale, shift) exchanged."""
    stored = {}
    rows = ("to_q", "add_q_proj", "to_k", "add_k_proj", "to_v", "add_v_proj", "proj_mlp")
    below = sorted(
        weights, key=lambda name: (*rows, name.split(".")[-1]).index(name.split(".")[-1])
    )
    for module in below:
        weight, key = weights[module], authors_name(module, id_)
        pair = module.endswith(("norm_out.linear", "norm1_context.linear"))
        if pair and weight.shape[0] == 2 * weight.shape[1]:
            scale, shift = weight.chunk(2)
            weight = torch.cat([shift, scale])
        key = key if key.endswith("_table") else f"{key}.weight"
        stored[key] = torch.cat([stored[key], weight]) if key in stored else weight
    return stored


def same_bits(one, other):
    assert one.shapes == other.shapes and one.dtypes == other.dtypes
    for name in one.shapes:
        assert torch.equal(one.read(name), other.read(name)), name


SIZES = ["flux1-dev", "flux1-schnell", "sd3-medium", "sd3.5-medium", "pixart-alpha", "pixart-sigma"]


@pytest.mark.parametrize("id_", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_fused_and_split_files_are_the_same_base_bit_by_bit(id_, dtype, tmp_path):
    """In memory too, and with a prefix."""
    weights = tiny(id_)
    tables = {n for n in weights if n.endswith("_table")}
    split = {n if n in tables else f"{n}.weight": w.to(dtype) for n, w in weights.items()}
    joined = {key: w.to(dtype) for key, w in fused(weights, id_).items()}
    assert len(joined) < len(split)
    write_safetensors(tmp_path / "split.safetensors", split, {})
    write_safetensors(tmp_path / "fused.safetensors", joined, {})
    wanted = open_base(tmp_path / "split.safetensors")
    assert set(wanted.shapes) == set(weights)
    same_bits(open_base(tmp_path / "fused.safetensors"), wanted)
    same_bits(open_base(joined), wanted)
    same_bits(open_base({f"model.diffusion_model.{k}": w for k, w in joined.items()}), wanted)


def test_only_the_rows_of_a_module_are_read(tmp_path, monkeypatch):
    """Of a fused matrix; the name says which rows, for messages."""
    write_safetensors(tmp_path / "x.safetensors", fused(tiny("flux1-dev"), "flux1-dev"), {})
    base = open_base(tmp_path / "x.safetensors")
    read = []
    original = prolora.files.safetensors_file.SafetensorsFile._read
    monkeypatch.setattr(
        prolora.files.safetensors_file.SafetensorsFile,
        "_read",
        lambda self, name, dtype, shape, *rest: (
            read.append((name, shape)) or original(self, name, dtype, shape, *rest)
        ),
    )
    base.read("single_transformer_blocks.0.attn.to_k")
    assert read == [("single_blocks.0.linear1.weight", (8, 8))]
    name = base.tensor_name("single_transformer_blocks.1.proj_mlp")
    assert name == "x.safetensors:single_blocks.1.linear1.weight[24:56]"


def test_openclip_text_encoders_read_as_diffusers_converts_them():
    """Fused q, k, v, and a projection that is stored transposed."""
    from types import SimpleNamespace

    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    generator = torch.Generator().manual_seed(0)
    prefix = "conditioner.embedders.1.model."
    stored = {
        prefix + key: torch.randn(*shape, generator=generator)
        for key, shape in open_clip(clip(8, 2, 20, projection=True)).items()
    }
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=8))
    converted = convert_open_clip_checkpoint(model, dict(stored), prefix=prefix)
    unet = {f"{name}.weight": torch.zeros(shape) for name, shape in unet_shapes(1).items()}
    base = open_base({**stored, **unet})
    names = {name for name in base.shapes if name.startswith("text_encoder_2.")}
    assert len(names) == 2 + 2 * 6 + 1
    for name in names:
        tensor = converted[name.removeprefix("text_encoder_2.") + ".weight"]
        assert torch.equal(base.read(name), tensor), name


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("double_blocks.0.img_attn.qkv", (25, 8)),
        ("double_blocks.0.txt_attn.qkv", (16, 8)),
        ("single_blocks.0.linear1", (24, 8)),
        ("single_blocks.0.linear1", (20, 8)),
        ("joint_blocks.0.x_block.attn.qkv", (24, 9)),
        ("blocks.0.cross_attn.kv_linear", (24, 8)),
        ("double_blocks.0.img_attn.qkv", (24, 8, 1)),
    ],
)
def test_a_fused_matrix_that_cannot_be_cut_is_refused(key, shape):
    with pytest.raises(ShapeMismatch, match=re.escape(key)):
        open_base({f"{key}.weight": torch.ones(shape)})


def test_an_unknown_module_inside_a_block_is_refused_and_outside_left_out():
    weights = fused(tiny("flux1-dev"), "flux1-dev")
    assert (
        "distilled_guidance_layer.in_proj"
        not in open_base(
            {**weights, "distilled_guidance_layer.in_proj.weight": torch.ones(2, 2)}
        ).shapes
    )
    with pytest.raises(
        UnsupportedFormat, match=r"img_attn\.gate\.weight belongs to no known module"
    ):
        open_base({**weights, "double_blocks.0.img_attn.gate.weight": torch.ones(2, 2)})
