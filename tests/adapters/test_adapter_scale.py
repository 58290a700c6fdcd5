"""Scales against what PEFT and diffusers attach to a live model."""

import json
import math

import pytest
import torch
from diagonal import pair_up
from lora_files import (
    BLOCK,
    CONV,
    DEEP,
    LINEAR,
    UP,
    attached,
    factors,
    kohya_file,
    relative_error,
    same_updates,
    save,
    through_diffusers,
    tiny_unet,
)

from prolora import adapters
from prolora.adapters.formats.peft_config import METADATA_KEY, scaling_from_config
from prolora.adapters.keys.codec import Codec
from prolora.architectures.family import KOHYA, UNET_KOHYA
from prolora.architectures.shared_names import unet_names
from prolora.errors import ShapeMismatch, UnsupportedFormat

PATTERNS = dict(
    rank_pattern={"to_k": 2, rf"{BLOCK}.attn1.to_out.0".replace(".", r"\."): 3, ".*conv1": 5},
    alpha_pattern={"attn2.to_.": 7.5, "proj_in": 1},
)
CONFIGS = {
    "alpha equal to rank": dict(lora_alpha=4),
    "half the rank": dict(lora_alpha=2),
    "rank-stabilised": dict(lora_alpha=6, use_rslora=True),
    "mixed": dict(lora_alpha=3, **PATTERNS),
    "mixed and rank-stabilised": dict(lora_alpha=3, use_rslora=True, **PATTERNS),
}


def peft_config(options):
    from peft import LoraConfig

    modules = [*LINEAR, *CONV]
    return LoraConfig(r=4, target_modules=modules, init_lora_weights=False, **options)


DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize(("alpha", "dtype"), pair_up([None, 4.0, 2.0, 8.0, 0.0], DTYPES))
@pytest.mark.parametrize("spelling", ["diffusers", "sgm"])
def test_kohya_scale_is_alpha_over_rank_as_diffusers_applies_it(tmp_path, alpha, spelling, dtype):
    tensors, style = {}, KOHYA if spelling == "sgm" else UNET_KOHYA
    for seed, (name, shape) in enumerate({**LINEAR, **CONV}.items()):
        stem = Codec(unet_names(), spelling=style).write(name)
        up, down = factors(shape, 4, seed, dtype)
        tensors |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=dtype)
    adapter = adapters.read_adapter(save(tmp_path / "lora.safetensors", tensors))
    assert (adapter.format, adapter.spelling) == ("kohya", spelling)
    assert adapter.kernels == {name: shape[2:] for name, shape in CONV.items()}
    found = through_diffusers(tmp_path / "lora.safetensors")
    if alpha == 0:
        assert all(update.norm() == 0 for update in adapter.updates.values())
        assert all(update.norm() == 0 for update in found.values())
    else:
        same_updates(adapter, found)


def test_every_kohya_module_has_a_scale_of_its_own(tmp_path):
    tensors, expected = {}, {}
    for seed, (name, shape) in enumerate(LINEAR.items()):
        up, down = factors(shape, seed + 1, seed)
        stem = Codec(spelling=UNET_KOHYA).write(name)
        tensors |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
        scale = 1.0
        if seed % 3:
            tensors[f"{stem}.alpha"] = torch.tensor(seed / 2, dtype=torch.float16)
            scale = seed / 2 / (seed + 1)
        expected[name] = scale * up @ down
    same_updates(adapters.read_adapter(tensors), expected)


def rounded(model, dtype):
    """The model, its LoRA's factors rounded to a storage dtype, and that dtype's file of it."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype).float()
    return model


@pytest.mark.parametrize(("name", "dtype"), pair_up(list(CONFIGS), DTYPES))
def test_peft_folder_has_the_scale_that_peft_applies(tmp_path, name, dtype):
    from peft import get_peft_model
    from safetensors.torch import load_file

    model = rounded(get_peft_model(tiny_unet(), peft_config(CONFIGS[name])), dtype)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save(weights, {key: tensor.to(dtype) for key, tensor in load_file(weights).items()})
    adapter = adapters.read_adapter(tmp_path)
    assert (adapter.format, adapter.dtype) == ("peft", dtype)
    same_updates(adapter, attached(model.base_model.model))


@pytest.mark.parametrize(("name", "dtype"), pair_up(list(CONFIGS), DTYPES))
def test_diffusers_file_has_the_scale_of_the_configuration_in_its_header(tmp_path, name, dtype):
    from diffusers import StableDiffusionXLPipeline
    from peft.utils import get_peft_model_state_dict

    unet = tiny_unet()
    unet.add_adapter(peft_config(CONFIGS[name]))
    rounded(unet, dtype)
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers={k: t.to(dtype) for k, t in get_peft_model_state_dict(unet).items()},
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    adapter = adapters.read_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert adapter.format == "diffusers"
    same_updates(adapter, attached(unet))
    assert adapters.read_adapter(tmp_path).updates.keys() == adapter.updates.keys()


def test_diffusers_folder_of_one_model_has_its_configuration_without_a_prefix(tmp_path):
    unet = tiny_unet()
    unet.add_adapter(peft_config(CONFIGS["mixed and rank-stabilised"]))
    unet.save_lora_adapter(tmp_path)
    same_updates(adapters.read_adapter(tmp_path), attached(unet))


def test_each_component_has_the_scale_under_its_own_prefix():
    up, down = factors((6, 5), 4, 0)
    modules = {
        "unet.mid_block.attentions.0.proj_in": 2.0,
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": 0.5,
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1": 1.0,
    }
    tensors = {f"{m}.lora_A.weight": down for m in modules}
    tensors |= {f"{m}.lora_B.weight": up for m in modules}
    table = {"unet.r": 4, "unet.lora_alpha": 8, "text_encoder.r": 4, "text_encoder.lora_alpha": 2}
    adapter = adapters.read_adapter(tensors, metadata={METADATA_KEY: json.dumps(table)})
    for (path, scale), update in zip(modules.items(), adapter.updates.values(), strict=True):
        assert relative_error(update.dense(), scale * up @ down) < 1e-6, path


def test_an_alpha_beside_diffusers_keys_counts():
    up, down = factors((6, 5), 4, 0)
    stem = "unet.mid_block.attentions.0.proj_in"
    tensors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    plain = adapters.read_adapter(tensors).updates["mid_block.attentions.0.proj_in"]
    half = adapters.read_adapter({**tensors, f"{stem}.alpha": torch.tensor([2.0])})
    assert torch.equal(plain.up / 2, half.updates["mid_block.attentions.0.proj_in"].up)


def test_an_alpha_against_the_configuration_is_refused():
    up, down = factors((6, 5), 4, 0)
    stem = "unet.mid_block.attentions.0.proj_in"
    tensors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    table = json.dumps({"unet.r": 4, "unet.lora_alpha": 2})
    adapters.read_adapter(tensors, metadata={METADATA_KEY: table})
    table = json.dumps({"unet.r": 4, "unet.lora_alpha": 4})
    with pytest.raises(UnsupportedFormat, match=rf"{stem}\.alpha asks for the scale 0\.5"):
        adapters.read_adapter(tensors, metadata={METADATA_KEY: table})


def test_a_configuration_for_another_rank_is_refused():
    up, down = factors((6, 5), 4, 0)
    stem = "unet.mid_block.attentions.0.proj_in"
    tensors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    table = json.dumps({"unet.r": 16, "unet.lora_alpha": 16})
    with pytest.raises(ShapeMismatch, match="has rank 4, but lora_adapter_metadata says 16"):
        adapters.read_adapter(tensors, metadata={METADATA_KEY: table})


def test_a_configuration_of_a_component_that_is_not_there_is_refused():
    up, down = factors((6, 5), 4, 0)
    tensors = {"conv_in.lora_A.weight": down, "conv_in.lora_B.weight": up}
    table = json.dumps({"unet.r": 4, "unet.lora_alpha": 2})
    with pytest.raises(UnsupportedFormat, match="the scale is not known"):
        adapters.read_adapter(tensors, metadata={METADATA_KEY: table})


@pytest.mark.parametrize(
    "patterns",
    [
        {"proj_out": 3},
        {"^proj_out": 3},
        {r"blocks\.\d+\.proj_out": 3},
        {"b.ff": 3, "ff": 5},
        {"(a|b)": 3},
        {"a.*": 3},
        {".": 3},
        {"": 3},
        {"proj": 3},
        {r"proj_\w": 3},
        {"out$": 3},
        {f"{UP}.attn2.to_v": 3, "to_v": 5},
        {f"{DEEP}.ff": 3},
    ],
)
def test_patterns_pick_the_same_modules_as_in_peft(patterns):
    from peft.utils.other import get_pattern_key

    scaling = scaling_from_config({"r": 8, "rank_pattern": patterns}, "here")
    modules = ["proj_out", "blocks.0.proj_out", "a", "x.a", "a.b", "b.ff", "c.b.ff", *LINEAR, DEEP]
    for name in modules:
        assert scaling.rank(name) == patterns.get(get_pattern_key(patterns, name), 8), name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"modules_to_save": ["conv_in"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "biases"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"peft_type": "BOFT"}, "'BOFT'"),
        ({"peft_type": ["LORA"]}, "PEFT method"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"rank_pattern": {"(": 4}}, "no foreign regular expression"),
        ({"rank_pattern": {"a": 0}}, "whole number"),
        ({"rank_pattern": [1]}, "rank_pattern is not a JSON object"),
        ({"r": 0}, "whole number"),
        ({"r": True}, "not a number"),
        ({"lora_alpha": math.inf}, "not a number"),
        ({"lora_alpha": "8"}, "not a number"),
    ],
)
def test_a_configuration_that_asks_for_more_than_up_times_down_is_refused(config, message):
    with pytest.raises(UnsupportedFormat, match=message):
        scaling_from_config(config, "here")


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"unet.r": "4"}', "[" * 100_000])
def test_a_damaged_configuration_in_the_header_is_refused(tmp_path, text):
    path = kohya_file(tmp_path / "lora.safetensors")
    with pytest.raises(UnsupportedFormat, match=METADATA_KEY):
        adapters.read_adapter(path, metadata={METADATA_KEY: text})


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 3)])
def test_a_locon_is_the_update_that_lycoris_rebuilds(kernel):
    modules = pytest.importorskip("lycoris.modules", reason="lycoris_lora is not installed")
    up, down = factors((6, 5, *kernel), 4, 0)
    tensors = {
        "lora_unet_conv_in.lora_up.weight": up,
        "lora_unet_conv_in.lora_down.weight": down,
        "lora_unet_conv_in.alpha": torch.tensor(3.0),
    }
    kind, weights = modules.get_module(tensors, "lora_unet_conv_in")
    layer = torch.nn.Conv2d(5, 6, kernel, bias=False)
    theirs = modules.make_module(kind, weights, "lora_unet_conv_in", layer)
    wanted = theirs.get_diff_weight(1.0, (6, 5, *kernel))[0].detach().reshape(6, -1)
    ours = adapters.read_adapter(tensors).updates["conv_in"]
    assert relative_error(ours.dense(), wanted) < 1e-6
