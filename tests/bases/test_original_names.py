"""FLUX, SD3 and PixArt in their authors' spelling give the weights of diffusers' spelling."""

import re

import pytest
import torch
from checkpoints import clip, open_clip
from lora_files import random, save
from mini import shapes as unet_shapes

from prolora import open_base
from prolora.errors import ShapeMismatch, UnsupportedFormat
from prolora.files.safetensors_file import SafetensorsFile

# Small matrices of FLUX in its authors' names.
FLUX = {"double_blocks.0.img_attn.qkv": (24, 8), "vector_in.in_layer": (8, 8)}
FLUX |= {f"single_blocks.{i}.linear1": (56, 8) for i in range(2)}
FLUX = {f"{name}.weight": random(*shape, seed=i) for i, (name, shape) in enumerate(FLUX.items())}


def test_only_the_rows_of_a_module_are_read(tmp_path, monkeypatch):
    """Of a fused matrix; the name says which rows, for messages."""
    base = open_base(save(tmp_path / "x.safetensors", FLUX))
    read, original = [], SafetensorsFile._read

    def note(self, name, dtype, shape, *rest):
        read.append((name, shape))
        return original(self, name, dtype, shape, *rest)

    monkeypatch.setattr(SafetensorsFile, "_read", note)
    rows = base.read("single_transformer_blocks.0.attn.to_k")
    assert torch.equal(rows, FLUX["single_blocks.0.linear1.weight"][8:16])
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
    outside = "distilled_guidance_layer.in_proj"
    assert outside not in open_base({**FLUX, f"{outside}.weight": torch.ones(2, 2)}).shapes
    inside = "double_blocks.0.img_attn.gate.weight"
    with pytest.raises(UnsupportedFormat, match=f"{inside} belongs to no known module"):
        open_base({**FLUX, inside: torch.ones(2, 2)})
