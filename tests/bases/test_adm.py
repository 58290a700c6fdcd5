"""Networks of the ADM kind (guided diffusion, consistency models), as bases and under LoRAs."""

from __future__ import annotations

import pytest
import torch
from diagonal import pair_up
from lora_files import pair, save

from prolora import Lora, check, open_base, transfer
from prolora.architectures.modules import find_component, is_adaptable, is_attention
from prolora.bases.describe import describe_base
from prolora.errors import UnsupportedFormat


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
    base = open_base(save(tmp_path / "base.safetensors", fill(shapes, prefix)))
    assert base.shapes == matrices(shapes) and base.family is None
    attends = sum(name.endswith(".qkv") for name in shapes)
    words = describe_base(base)
    assert words.startswith("a UNet") and f"{attends or 'no'} attention layers" in words
    assert f"{sum(n.endswith('in_layers.2') for n in shapes)} ResBlocks" in words
    assert all(map(is_adaptable, base.shapes))
    attention = {n for n in base.shapes if n.endswith((".qkv", ".proj_out"))}
    assert {n for n in base.shapes if is_attention(n)} == attention
    assert set(map(find_component, base.shapes)) == {"unet"}


def write_lora(path, shapes, spelling, rank=2):
    """A LoRA on these modules, in PEFT's spelling or as kohya spells modules."""
    tensors = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        if spelling == "kohya":
            start = "lora_unet_" + name.replace(".", "_")
            tensors |= pair(start, shape, rank, seed) | {f"{start}.alpha": torch.tensor(2.0)}
        else:
            start = f"base_model.model.{'model.' * (spelling == 'wrapped')}{name}"
            tensors |= pair(start, shape, rank, seed, ends=("lora_B", "lora_A"))
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
    written, came = ({k: x.shape for k, x in Lora.open(x).tensors.items()} for x in (out, lora))
    assert written == came


def test_a_module_that_the_network_lacks_is_refused_by_name(tmp_path):
    shapes = lay_out()
    gone = {"input_blocks.90.1.qkv": (48, 16, 1, 1)}
    lora = write_lora(tmp_path / "lora.safetensors", gone, "peft")
    with pytest.raises(UnsupportedFormat, match=r"input_blocks\.90\.1\.qkv"):
        transfer(lora, fill(shapes), fill(shapes, seed=1), method="copy")


def test_the_numbers_of_sd_are_still_turned_into_diffusers_names():
    """A UNet with transformers is no ADM network, whatever else it has."""
    query = "transformer_blocks.0.attn1.to_q"
    weights = {"input_blocks.1.0.in_layers.2.weight": torch.zeros(4, 4, 3, 3)}
    weights |= {f"input_blocks.1.1.{query}.weight": torch.zeros(4, 4)}
    names = {"down_blocks.0.resnets.0.conv1", f"down_blocks.0.attentions.0.{query}"}
    assert set(open_base(weights).shapes) == names


@pytest.mark.parametrize(
    "keys",
    [
        "temb.dense.0 down.0.block.0.conv1 mid.block_1.conv1 conv_out",  # Ho's DDPM
        "time_mlp.1 downs.0.0.block1.proj mid_block1.block1.proj final_conv",  # lucidrains'
        "model.map_noise model.map_layer0 model.enc.64x64_conv model.dec.64x64_block0.conv0",  # EDM
    ],
)
def test_a_network_of_convolutions_that_takes_in_time_is_described(keys):
    base = open_base({f"{key}.weight": torch.randn(4, 4, 3, 3) for key in keys.split()})
    assert len(base.shapes) == len(keys.split())
    assert "without transformer blocks" in describe_base(base)
