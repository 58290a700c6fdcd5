"""Trained biases and normalisation layers, against LyCORIS, PEFT and diffusers."""

import pytest
import torch
from lora_files import (
    CONV,
    LINEAR,
    adapter_of,
    attached,
    same_updates,
    through_diffusers,
    tiny_unet,
)
from safetensors.torch import load_file
from torch import nn

from prolora import adapters
from prolora.adapters.vectors import vector_suffixes
from prolora.architectures.identify import Model
from prolora.core.lowrank import LowRank
from prolora.errors import NonFiniteWeights, OutputError, ShapeMismatch, UnsupportedFormat

STEM = "lora_unet_mid_block_attentions_0"
NORM = "mid_block.attentions.0.norm"
PROJ = "mid_block.attentions.0.proj_in"
FLUX = "lora_unet_double_blocks_0_img_attn_qkv"
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_is_what_lycoris_adds_to_its_weight_and_bias(dtype):
    from lycoris.modules.norms import NormModule

    norm = nn.LayerNorm(6)
    module = NormModule("lora", norm, 1.0)
    with torch.no_grad():
        module.w_norm.copy_(random(6).to(dtype))
        module.b_norm.copy_(random(6, seed=1).to(dtype))
    parts = module.custom_state_dict() or module.state_dict()
    tensors = {f"{STEM}_norm.{key}": value.detach().to(dtype) for key, value in parts.items()}
    found = adapters.read_adapter(tensors).vectors
    weight, bias = module.get_merged_weight()
    assert torch.allclose(norm.weight + found[f"{NORM}.weight"], weight, atol=1e-7)
    assert torch.allclose(norm.bias + found[f"{NORM}.bias"], bias, atol=1e-7)


def test_the_bias_of_a_full_difference_is_what_lycoris_adds():
    from lycoris.modules.full import FullModule

    base = nn.Linear(5, 6)
    module = FullModule("lora", base, 1.0)
    with torch.no_grad():
        module.weight.copy_(random(6, 5))
        module.bias.copy_(random(6))
    diff = {"diff": module.weight, "diff_b": module.bias}
    tensors = {f"{STEM}_proj_in.{key}": value.detach() for key, value in diff.items()}
    adapter = adapters.read_adapter(tensors)
    merged, bias = module.get_merged_weight()
    update = adapter.updates[PROJ].dense()
    assert torch.allclose(base.weight + update, merged, atol=1e-6)
    assert torch.allclose(base.bias + adapter.vectors[f"{PROJ}.bias"], bias, atol=1e-6)


def test_the_bias_of_a_lora_has_the_scale_of_the_lora(tmp_path):
    """PEFT's lora_bias: what merging adds to the layer's own bias."""
    from peft import LoraConfig, get_peft_model

    name = "down_blocks.1.resnets.0.conv1"
    unet = tiny_unet()
    before = unet.get_submodule(name).bias.detach().clone()
    config = LoraConfig(
        r=4, lora_alpha=2, target_modules=[name], init_lora_weights=False, lora_bias=True
    )
    model = get_peft_model(unet, config)
    with torch.no_grad():
        model.base_model.model.get_submodule(name).lora_B["default"].bias.copy_(random(16))
    model.save_pretrained(tmp_path)
    adapter = adapters.read_adapter(tmp_path)
    added = model.merge_and_unload().get_submodule(name).bias.detach() - before
    assert torch.allclose(adapter.vectors[f"{name}.bias"], added, atol=1e-6)
    assert torch.allclose(added, random(16) / 2, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["kohya", "comfy"])
def test_formats_that_have_keys_for_them_give_them_back(tmp_path, format, dtype):
    adapter = adapter_of(LINEAR, spelling="sgm")
    adapter.vectors.update(
        {
            f"{NORM}.weight": random(6),
            f"{NORM}.bias": random(6, seed=1),
            f"{PROJ}.bias": random(32, seed=2),
            "conv_norm_out.weight": random(8),
            "text_encoder.text_model.final_layer_norm.bias": random(8),
            "down_blocks.0.resnets.1.norm2.weight": random(8),
        }
    )
    adapters.write_adapter(adapter, tmp_path / "out", format=format, dtype=dtype)
    back = adapters.read_adapter(tmp_path / "out").vectors
    assert back.keys() == adapter.vectors.keys()
    for name, vector in back.items():
        assert torch.equal(vector, adapter.vectors[name].to(dtype).float()), name


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_diffusers_and_peft_attach_the_biases_of_updated_modules(tmp_path, format):
    adapter = adapter_of({**LINEAR, **CONV})
    biased = list(adapter.updates)[::2]
    adapter.vectors.update(
        {f"{name}.bias": random(adapter.updates[name].shape[0]) for name in biased}
    )
    out = tmp_path / ("out.safetensors" if format == "diffusers" else "out")
    adapters.write_adapter(adapter, out, format=format)
    unet = tiny_unet()
    if format == "diffusers":
        found = through_diffusers(out, unet)
    else:
        from peft import PeftModel

        unet = PeftModel.from_pretrained(unet, out).base_model.model
        found = attached(unet)
    same_updates(adapter, found)
    for name in biased:
        (layer,) = unet.get_submodule(name).lora_B.values()
        assert torch.equal(layer.bias.detach(), adapter.vectors[f"{name}.bias"])
    assert adapters.read_adapter(out).vectors.keys() == adapter.vectors.keys()


@pytest.mark.parametrize("format", ["diffusers", "peft"])
@pytest.mark.parametrize("name", [f"{NORM}.weight", "down_blocks.0.resnets.0.conv1.bias"])
def test_a_format_without_keys_for_them_is_refused_with_the_way_out(tmp_path, format, name):
    adapter = adapter_of(LINEAR)
    adapter.vectors[name] = torch.ones(6)
    with pytest.raises(UnsupportedFormat, match=f"{name}.*format='kohya'"):
        adapters.write_adapter(adapter, tmp_path / "out", format=format)
    assert not any(tmp_path.iterdir())


def test_a_fused_bias_of_flux_comes_apart_and_is_put_together_again(tmp_path):
    last = "lora_unet_final_layer_adaLN_modulation_1"
    tensors = {
        f"{FLUX}.lora_up.weight": random(24, 2),
        f"{FLUX}.lora_down.weight": random(2, 8),
        f"{FLUX}.diff_b": random(24),
        f"{last}.diff_b": random(16),
        "lora_unet_single_blocks_3_linear1.diff_b": random(14),
    }
    adapter = adapters.read_adapter(tensors)
    names = [f"transformer_blocks.0.attn.to_{part}.bias" for part in "qkv"]
    assert torch.equal(torch.cat([adapter.vectors[n] for n in names]), tensors[f"{FLUX}.diff_b"])
    # The two halves are the other way round in diffusers.
    shift, scale = tensors[f"{last}.diff_b"].chunk(2)
    assert torch.equal(adapter.vectors["norm_out.linear.bias"], torch.cat([scale, shift]))
    adapters.write_adapter(adapter, tmp_path / "out")
    written = load_file(tmp_path / "out")
    for key in tensors:
        if key.endswith("diff_b"):
            assert torch.equal(written[key], tensors[key]), key


@pytest.mark.parametrize(
    ("key", "tensor", "error", "message"),
    [
        (f"{STEM}_norm.w_norm", torch.ones(2, 2), ShapeMismatch, "is not a weight vector"),
        (f"{STEM}_norm.b_norm", torch.ones(0), ShapeMismatch, "is not a bias vector"),
        (
            f"{STEM}_norm.w_norm",
            torch.ones(2, dtype=torch.int8),
            UnsupportedFormat,
            "floating point",
        ),
        (
            f"{STEM}_norm.w_norm",
            torch.tensor([1.0, torch.nan]),
            NonFiniteWeights,
            "w_norm holds NaN",
        ),
        (f"{FLUX}.diff_b", torch.ones(10), ShapeMismatch, "10 rows are not those"),
    ],
)
def test_what_is_no_vector_is_refused_by_name(key, tensor, error, message):
    with pytest.raises(error, match=message):
        adapters.read_adapter({key: tensor})


def test_one_bias_in_two_spellings_is_refused():
    tensors = {f"{STEM}_norm.b_norm": torch.ones(2), f"{STEM}_norm.diff_b": torch.ones(2)}
    with pytest.raises(UnsupportedFormat, match=r"are both the mid_block.attentions.0.norm.bias"):
        adapters.read_adapter(tensors)


def test_a_dtype_that_cannot_hold_a_vector_is_refused(tmp_path):
    for value, error in (
        (1e6, NonFiniteWeights),
        (1e-9, OutputError),
        (torch.nan, NonFiniteWeights),
    ):
        adapter = adapters.Adapter({}, vectors={f"{NORM}.weight": torch.full((4,), value)})
        with pytest.raises(error, match=f"{NORM}.weight"):
            adapters.write_adapter(adapter, tmp_path / "out", dtype=torch.float16)


def test_parts_of_a_flux_bias_that_do_not_fit_each_other_are_not_put_together(tmp_path):
    vectors = {
        f"transformer_blocks.0.attn.to_{part}.bias": torch.ones(n)
        for part, n in (("q", 4), ("k", 6))
    }
    update = LowRank(torch.ones(4, 1), torch.ones(1, 4))
    adapter = adapters.Adapter(
        {"transformer_blocks.0.attn.to_q": update}, vectors=vectors, origin=Model.of("flux")
    )
    with pytest.raises(ShapeMismatch, match="cannot be put together from"):
        adapters.write_adapter(adapter, tmp_path / "out", format="kohya")


def test_biases_stand_in_the_order_of_their_modules_in_every_process():
    names = [f"blocks.{i}.attn.to_q.bias" for i in range(30)]
    assert list(vector_suffixes(names)) == names
