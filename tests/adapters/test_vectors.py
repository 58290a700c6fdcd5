"""Trained biases and normalisation layers, against LyCORIS, PEFT and diffusers."""

import pytest
import torch
from lora_files import (
    CONV,
    LINEAR,
    adapter_for,
    adapter_of,
    attached,
    pair,
    random,
    same_updates,
    through_diffusers,
    tiny_unet,
)
from torch import nn

import prolora
from prolora import Adapter, LowRank
from prolora.errors import NonFiniteWeights, OutputError, ShapeMismatch, UnsupportedFormat

STEM = "lora_unet_mid_block_attentions_0"
NORM = "mid_block.attentions.0.norm"
PROJ = "mid_block.attentions.0.proj_in"
FLUX = "lora_unet_double_blocks_0_img_attn_qkv"


def test_a_norm_is_what_lycoris_adds_to_its_weight_and_bias():
    from lycoris.modules.norms import NormModule

    norm = nn.LayerNorm(6)
    module = NormModule("lora", norm, 1.0)
    with torch.no_grad():
        module.w_norm.copy_(random(6).half())
        module.b_norm.copy_(random(6, seed=1).half())
    parts = module.custom_state_dict() or module.state_dict()
    tensors = {f"{STEM}_norm.{key}": value.detach().half() for key, value in parts.items()}
    found = prolora.convert(tensors).adapter.vectors
    weight, bias = module.get_merged_weight()
    assert torch.allclose(norm.weight + found[f"{NORM}.weight"], weight, atol=1e-7)
    assert torch.allclose(norm.bias + found[f"{NORM}.bias"], bias, atol=1e-7)


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
    adapter = prolora.convert(tmp_path).adapter
    added = model.merge_and_unload().get_submodule(name).bias.detach() - before
    assert torch.allclose(adapter.vectors[f"{name}.bias"], added, atol=1e-6)
    assert torch.allclose(added, random(16) / 2, atol=1e-6)


@pytest.mark.parametrize(("format", "dtype"), [("kohya", torch.float16), ("comfy", torch.bfloat16)])
def test_formats_that_have_keys_for_them_give_them_back(tmp_path, format, dtype):
    sizes = {f"{NORM}.weight": 6, f"{NORM}.bias": 6, f"{PROJ}.bias": 32, "conv_norm_out.weight": 8}
    sizes |= {"text_encoder.text_model.final_layer_norm.bias": 8}
    sizes |= {"down_blocks.0.resnets.1.norm2.weight": 8}
    adapter = adapter_of(LINEAR, spelling="sgm")
    adapter.vectors.update({n: random(size, seed=i) for i, (n, size) in enumerate(sizes.items())})
    out = tmp_path / "out.safetensors"
    prolora.convert(adapter, out=out, format=format, dtype=dtype)
    back = prolora.convert(out).adapter.vectors
    assert back.keys() == adapter.vectors.keys()
    for name, vector in back.items():
        assert torch.equal(vector, adapter.vectors[name].to(dtype).float()), name


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_diffusers_and_peft_attach_the_biases_of_updated_modules(tmp_path, format):
    adapter = adapter_of({**LINEAR, **CONV})
    biased = list(adapter.updates)[::2]
    adapter.vectors.update({f"{n}.bias": random(adapter.updates[n].shape[0]) for n in biased})
    out = tmp_path / ("out.safetensors" if format == "diffusers" else "out")
    prolora.convert(adapter, out=out, format=format, dtype="float32")
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
    assert prolora.convert(out).adapter.vectors.keys() == adapter.vectors.keys()


@pytest.mark.parametrize("format", ["diffusers", "peft"])
@pytest.mark.parametrize("name", [f"{NORM}.weight", "down_blocks.0.resnets.0.conv1.bias"])
def test_a_format_without_keys_for_them_is_refused_with_the_way_out(tmp_path, format, name):
    adapter = adapter_of(LINEAR)
    adapter.vectors[name] = torch.ones(6)
    with pytest.raises(UnsupportedFormat, match=f"{name}.*format='kohya'"):
        prolora.convert(adapter, out=tmp_path / "out", format=format)
    assert not any(tmp_path.iterdir())


def test_a_fused_bias_of_flux_comes_apart_and_is_put_together_again():
    last = "lora_unet_final_layer_adaLN_modulation_1"
    tensors = pair(FLUX, (24, 8), 2) | {f"{FLUX}.diff_b": random(24), f"{last}.diff_b": random(16)}
    tensors |= {"lora_unet_single_blocks_3_linear1.diff_b": random(14)}
    made = prolora.convert(tensors)
    names = [f"transformer_blocks.0.attn.to_{part}.bias" for part in "qkv"]
    found = made.adapter.vectors
    assert torch.equal(torch.cat([found[n] for n in names]), tensors[f"{FLUX}.diff_b"])
    # The two halves are the other way round in diffusers.
    shift, scale = tensors[f"{last}.diff_b"].chunk(2)
    assert torch.equal(found["norm_out.linear.bias"], torch.cat([scale, shift]))
    written = made.state_dict()
    assert all(torch.equal(written[k], x) for k, x in tensors.items() if k.endswith("diff_b"))


@pytest.mark.parametrize(
    ("key", "tensor", "error", "message"),
    [
        (f"{STEM}_norm.w_norm", torch.ones(2, 2), ShapeMismatch, "is not a weight vector"),
        (f"{STEM}_norm.b_norm", torch.ones(0), ShapeMismatch, "is not a bias vector"),
        (f"{STEM}_norm.w_norm", torch.ones(2).to(torch.int8), UnsupportedFormat, "floating point"),
        (f"{STEM}_norm.w_norm", torch.full((2,), torch.nan), NonFiniteWeights, "w_norm holds NaN"),
        (f"{FLUX}.diff_b", torch.ones(10), ShapeMismatch, "10 rows are not those"),
        (f"{STEM}_norm.diff_b", torch.ones(2), UnsupportedFormat, f"are both the {NORM}.bias"),
    ],
)
def test_what_is_no_vector_or_one_in_two_spellings_is_refused_by_name(key, tensor, error, message):
    other = {f"{STEM}_norm.b_norm": torch.ones(2)} if "both" in message else {}
    with pytest.raises(error, match=message):
        prolora.convert(other | {key: tensor})


def test_what_the_output_cannot_hold_or_put_together_is_refused():
    for value, error in ((1e6, NonFiniteWeights), (1e-9, OutputError)):
        adapter = Adapter({}, vectors={f"{NORM}.weight": torch.full((4,), value)})
        with pytest.raises(error, match=f"{NORM}.weight"):
            prolora.convert(adapter, dtype="float16").state_dict()
    query = "transformer_blocks.0.attn.to_q"
    one, two = (LowRank(torch.ones(m, 1), torch.ones(1, 4)) for m in (4, 6))
    vectors = {f"{query}.bias": torch.ones(4), f"{query[:-1]}k.bias": torch.ones(6)}
    for updates, more in (({query: one}, vectors), ({query: one, f"{query[:-1]}k": two}, {})):
        with pytest.raises(ShapeMismatch, match="cannot be put together"):
            adapter = adapter_for("flux", updates, vectors=more)
            prolora.convert(adapter, format="kohya").state_dict()


def test_biases_are_in_the_order_of_their_modules_in_every_process():
    names = [f"lora_unet_double_blocks_{i}_img_mlp_2.diff_b" for i in range(19)]
    vectors = {f"transformer_blocks.{i}.ff.net.2.bias": torch.ones(2) for i in range(19)}
    adapter = adapter_for("flux", {}, vectors=vectors)
    assert list(prolora.convert(adapter, format="kohya").state_dict()) == names
