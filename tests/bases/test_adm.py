"""Networks of the ADM kind (guided diffusion, consistency models), as bases and under LoRAs."""

from __future__ import annotations

import pytest
import torch
from diagonal import pair_up
from lora_files import save

from prolora import check, open_base, transfer
from prolora.architectures.modules import find_component, is_adaptable, is_attention
from prolora.bases.describe import classify_model, describe_base
from prolora.errors import UnsupportedFormat
from prolora.files.safetensors_file import SafetensorsFile


def resblock(place, inputs, outputs):
    """{key: shape} of a ResBlock, its norms too."""
    shapes = {
        f"{place}.in_layers.0": (inputs,),
        f"{place}.in_layers.2": (outputs, inputs, 3, 3),
        f"{place}.emb_layers.1": (2 * outputs, 16),
        f"{place}.out_layers.0": (outputs,),
        f"{place}.out_layers.3": (outputs, outputs, 3, 3),
    }
    if inputs != outputs:
        shapes[f"{place}.skip_connection"] = (outputs, inputs, 1, 1)
    return shapes


def attention(place, width, axes):
    return {
        f"{place}.norm": (width,),
        f"{place}.qkv": (3 * width, width, *axes),
        f"{place}.proj_out": (width, width, *axes),
    }


def lay_out(*, blocks=3, attends=True, resblock_updown=True, axes=(1, 1), label="label_emb.0"):
    """{module: shape} of a UNet of two levels, 8 and 16 wide, after OpenAI's own constructor."""
    shapes = {
        "time_embed.0": (16, 8),
        "time_embed.2": (16, 16),
        label: (16, 1),
        "input_blocks.0.0": (8, 1, 3, 3),
    }
    number, width, kept = 1, 8, [8]
    for level, wide in enumerate((8, 16)):
        for _ in range(blocks):
            shapes |= resblock(f"input_blocks.{number}.0", width, wide)
            width = wide
            if attends and level:
                shapes |= attention(f"input_blocks.{number}.1", wide, axes)
            kept.append(wide)
            number += 1
        if not level:
            place = f"input_blocks.{number}.0"
            smaller = resblock(place, wide, wide)
            shapes |= smaller if resblock_updown else {f"{place}.op": (wide, wide, 3, 3)}
            kept.append(wide)
            number += 1
    shapes |= resblock("middle_block.0", width, width) | resblock("middle_block.2", width, width)
    if attends:
        shapes |= attention("middle_block.1", width, axes)
    number = 0
    for level, wide in ((1, 16), (0, 8)):
        for block in range(blocks + 1):
            shapes |= resblock(f"output_blocks.{number}.0", width + kept.pop(), wide)
            width = wide
            last = 1
            if attends and level:
                shapes |= attention(f"output_blocks.{number}.1", wide, axes)
                last = 2
            if level and block == blocks:
                place = f"output_blocks.{number}.{last}"
                larger = resblock(place, wide, wide)
                shapes |= larger if resblock_updown else {f"{place}.conv": (wide, wide, 3, 3)}
            number += 1
    return shapes | {"out.0": (8,), "out.2": (1, 8, 3, 3)}


NETWORKS = {
    "consistency": {},
    "guided diffusion": {"axes": (1,), "resblock_updown": False, "blocks": 2, "label": "label_emb"},
    "one ResBlock a level": {"blocks": 1},
    "five ResBlocks a level": {"blocks": 5},
    "without attention": {"attends": False},
    "without attention, by convolutions": {"attends": False, "resblock_updown": False},
}


def fill(shapes, prefix="", seed=0):
    torch.manual_seed(seed)
    return {f"{prefix}{name}.weight": torch.randn(shape) for name, shape in shapes.items()}


def matrices(shapes):
    return {name: shape for name, shape in shapes.items() if len(shape) > 1}


@pytest.mark.parametrize(
    ("network", "prefix"),
    pair_up(NETWORKS, ["", "model.", "network.", "module.", "model.diffusion_model."]),
)
def test_every_matrix_of_an_adm_network_is_read_under_its_own_name(network, prefix, tmp_path):
    shapes = lay_out(**NETWORKS[network])
    path = save(tmp_path / "base.safetensors", fill(shapes, prefix))
    base = open_base(path)
    assert base.shapes == matrices(shapes)
    assert classify_model(base) == "UNet" and base.family is None
    attends = sum(name.endswith(".qkv") for name in shapes)
    assert f"{attends or 'no'} attention layers" in describe_base(base)
    assert f"{sum(n.endswith('in_layers.2') for n in shapes)} ResBlocks" in describe_base(base)
    assert all(map(is_adaptable, base.shapes))
    assert {n for n in base.shapes if is_attention(n)} == {
        n for n in base.shapes if n.endswith((".qkv", ".proj_out"))
    }
    assert set(map(find_component, base.shapes)) == {"unet"}


def write_lora(path, shapes, spelling, rank=2):
    """A LoRA on these modules, in PEFT's spelling or as kohya spells modules."""
    tensors = {}
    for name, shape in shapes.items():
        down = torch.randn(rank, *shape[1:])
        up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]))
        if spelling == "kohya":
            start = "lora_unet_" + name.replace(".", "_")
            tensors[f"{start}.lora_down.weight"] = down
            tensors[f"{start}.lora_up.weight"] = up
            tensors[f"{start}.alpha"] = torch.tensor(float(rank))
        else:
            start = f"base_model.model.{'model.' * (spelling == 'wrapped')}{name}"
            tensors[f"{start}.lora_A.weight"], tensors[f"{start}.lora_B.weight"] = down, up
    return save(path, tensors)


@pytest.mark.parametrize(("network", "spelling"), pair_up(NETWORKS, ["peft", "wrapped", "kohya"]))
def test_a_lora_moves_with_every_module_and_keeps_its_spelling(network, spelling, tmp_path):
    shapes = lay_out(**NETWORKS[network])
    wanted = matrices(shapes)
    lora = write_lora(tmp_path / "lora.safetensors", wanted, spelling)
    source = fill(shapes, "model.")
    target = {key: value + 0.01 * torch.randn(value.shape) for key, value in source.items()}
    out = tmp_path / ("moved.safetensors" if spelling == "kohya" else "moved")
    report = transfer(lora, source, target, out=out, method="copy").report
    assert report.totals["mapped"] == len(wanted) and not report.left_out and not report.unread
    described = check(out)
    assert not described.reason
    if any(name.endswith(".qkv") for name in wanted):  # without a base, attention alone tells
        assert described.modules == {"unet": len(wanted)}
    written = SafetensorsFile(out / "adapter_model.safetensors" if out.is_dir() else out).tensors
    came = SafetensorsFile(lora).tensors
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in came.items()}


def test_a_module_that_the_network_lacks_is_refused_by_name(tmp_path):
    shapes = lay_out()
    lora = write_lora(
        tmp_path / "lora.safetensors", {"input_blocks.90.1.qkv": (48, 16, 1, 1)}, "peft"
    )
    with pytest.raises(UnsupportedFormat, match=r"input_blocks\.90\.1\.qkv"):
        transfer(lora, fill(shapes), fill(shapes, seed=1), method="copy")


def test_the_numbers_of_sd_are_still_turned_into_diffusers_names():
    """A UNet with transformers is no ADM network, whatever else it has."""
    base = open_base(
        {
            "input_blocks.1.0.in_layers.2.weight": torch.zeros(4, 4, 3, 3),
            "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": torch.zeros(4, 4),
        }
    )
    assert set(base.shapes) == {
        "down_blocks.0.resnets.0.conv1",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    }


@pytest.mark.parametrize(
    "keys",
    [
        ("temb.dense.0", "down.0.block.0.conv1", "mid.block_1.conv1", "conv_out"),
        ("time_mlp.1", "downs.0.0.block1.proj", "mid_block1.block1.proj", "final_conv"),
        (
            "model.map_noise",
            "model.map_layer0",
            "model.enc.64x64_conv",
            "model.dec.64x64_block0.conv0",
        ),
    ],
)
def test_a_network_of_convolutions_that_takes_in_time_is_described(keys, tmp_path):
    """Ho's DDPM, lucidrains' and EDM's, without attention."""
    tensors = {f"{key}.weight": torch.randn(4, 4, 3, 3) for key in keys}
    base = open_base(save(tmp_path / "ddpm.safetensors", tensors))
    assert len(base.shapes) == len(keys)
    assert "without transformer blocks" in describe_base(base)
