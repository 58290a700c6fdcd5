"""Scales against what PEFT and diffusers attach to a live model."""

import json

import pytest
import torch
from lora_files import (
    BLOCK,
    CONV,
    LINEAR,
    attached,
    factors,
    keymaps,
    kohya_file,
    pair,
    relative_error,
    same_updates,
    save,
    through_diffusers,
    tiny_unet,
)

import prolora
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


@pytest.mark.parametrize(
    ("alpha", "dtype"), [(None, torch.float16), (2.0, torch.bfloat16), (0.0, torch.float32)]
)
@pytest.mark.parametrize("spelling", ["diffusers", "sgm"])
def test_kohya_scale_is_alpha_over_rank_as_diffusers_applies_it(tmp_path, alpha, spelling, dtype):
    tensors = {}
    for seed, (name, shape) in enumerate({**LINEAR, **CONV}.items()):
        stem = keymaps()["unets"]["sdxl"][name][spelling == "sgm"]
        tensors |= pair(stem, shape, 4, seed, dtype)
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=dtype)
    adapter = prolora.convert(save(tmp_path / "lora.safetensors", tensors)).adapter
    assert (adapter.format, adapter.spelling) == ("kohya", spelling)
    assert adapter.kernels == {name: shape[2:] for name, shape in CONV.items()}
    found = through_diffusers(tmp_path / "lora.safetensors")
    if alpha == 0:
        assert all(update.norm() == 0 for update in (*adapter.updates.values(), *found.values()))
    else:
        same_updates(adapter, found)


def rounded(model, dtype):
    """The model, its LoRA's factors rounded to a storage dtype, and that dtype's file of it."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype).float()
    return model


@pytest.mark.parametrize(("name", "dtype"), list(zip(CONFIGS, DTYPES * 2, strict=False)))
def test_peft_folder_has_the_scale_that_peft_applies(tmp_path, name, dtype):
    from peft import get_peft_model
    from safetensors.torch import load_file

    model = rounded(get_peft_model(tiny_unet(), peft_config(CONFIGS[name])), dtype)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save(weights, {key: tensor.to(dtype) for key, tensor in load_file(weights).items()})
    adapter = prolora.convert(tmp_path).adapter
    assert (adapter.format, adapter.dtype) == ("peft", dtype)
    same_updates(adapter, attached(model.base_model.model))


@pytest.mark.parametrize(("name", "dtype"), list(zip(CONFIGS, DTYPES * 2, strict=False))[2:])
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
    adapter = prolora.convert(tmp_path / "pytorch_lora_weights.safetensors").adapter
    assert adapter.format == "diffusers"
    same_updates(adapter, attached(unet))
    assert prolora.convert(tmp_path).adapter.updates.keys() == adapter.updates.keys()


def test_diffusers_folder_of_one_model_has_its_configuration_without_a_prefix(tmp_path):
    unet = tiny_unet()
    unet.add_adapter(peft_config(CONFIGS["mixed and rank-stabilised"]))
    unet.save_lora_adapter(tmp_path)
    same_updates(prolora.convert(tmp_path).adapter, attached(unet))


PROJ = "unet.mid_block.attentions.0.proj_in"


def configured(tensors, **fields):
    """A LoRA in memory, with a configuration in its header."""
    table = {name.replace("__", "."): value for name, value in fields.items()}
    return prolora.Lora.open(tensors, {"lora_adapter_metadata": json.dumps(table)})


def dotted(*modules):
    pairs = (pair(module, (6, 5), ends=("lora_B", "lora_A")) for module in modules)
    return {key: tensor for one in pairs for key, tensor in one.items()}


def test_each_component_has_the_scale_under_its_own_prefix():
    up, down = factors((6, 5), 4, 0)
    modules = {
        PROJ: 2.0,
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": 0.5,
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1": 1.0,
    }
    alphas = dict(unet__r=4, unet__lora_alpha=8, text_encoder__r=4, text_encoder__lora_alpha=2)
    adapter = prolora.convert(configured(dotted(*modules), **alphas)).adapter
    for (path, scale), update in zip(modules.items(), adapter.updates.values(), strict=True):
        assert relative_error(update.dense(), scale * up @ down) < 1e-6, path


def test_an_alpha_beside_diffusers_keys_counts_and_may_not_contradict_the_configuration():
    halved = dotted(PROJ) | {f"{PROJ}.alpha": torch.tensor([2.0])}
    plain, half = (prolora.convert(lora).adapter.updates for lora in (dotted(PROJ), halved))
    assert torch.equal(plain[PROJ[5:]].up / 2, half[PROJ[5:]].up)


def test_an_alpha_against_the_configuration_is_refused():
    tensors = dotted(PROJ) | {f"{PROJ}.alpha": torch.tensor(2.0)}
    prolora.convert(configured(tensors, unet__r=4, unet__lora_alpha=2))
    with pytest.raises(UnsupportedFormat, match=rf"{PROJ}\.alpha asks for the scale 0\.5"):
        prolora.convert(configured(tensors, unet__r=4, unet__lora_alpha=4))


def test_a_configuration_for_another_rank_or_component_is_refused():
    with pytest.raises(ShapeMismatch, match="has rank 4, but lora_adapter_metadata says 16"):
        prolora.convert(configured(dotted(PROJ), unet__r=16, unet__lora_alpha=16))
    with pytest.raises(UnsupportedFormat, match="the scale is not known"):
        prolora.convert(configured(dotted("conv_in"), unet__r=4, unet__lora_alpha=2))


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"unet.r": "4"}', "[" * 100_000])
def test_a_damaged_configuration_in_the_header_is_refused(tmp_path, text):
    path = kohya_file(tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": text})
    with pytest.raises(UnsupportedFormat, match="lora_adapter_metadata"):
        prolora.convert(path)
