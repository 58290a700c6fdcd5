import re

import pytest
import torch
from fresh import run_here
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_files import BLOCK, factors, kohya_file, save
from property_examples import examples

from prolora import adapters
from prolora.errors import NonFiniteWeights, ProLoRAError, ShapeMismatch, UnsupportedFormat

STEM = "lora_unet_mid_block_attentions_0_proj_in"
UP, DOWN = f"{STEM}.lora_up.weight", f"{STEM}.lora_down.weight"


def pair(up_key, down_key, shape=(6, 5)):
    up, down = factors(shape, 4, 0)
    return {up_key: up, down_key: down}


def kohya(**extra):
    return {**pair(UP, DOWN), **{f"{STEM}.{key}": value for key, value in extra.items()}}


@pytest.mark.parametrize(
    ("up", "down", "module"),
    [
        ("unet.{}.to_q.lora_B.weight", "unet.{}.to_q.lora_A.weight", "{}.to_q"),
        ("unet.{}.to_q.lora_B.default.weight", "unet.{}.to_q.lora_A.default.weight", "{}.to_q"),
        ("unet.{}.to_q.lora.up.weight", "unet.{}.to_q.lora.down.weight", "{}.to_q"),
        (
            "unet.{}.processor.to_q_lora.up.weight",
            "unet.{}.processor.to_q_lora.down.weight",
            "{}.to_q",
        ),
        (
            "{}.processor.to_out_lora.up.weight",
            "{}.processor.to_out_lora.down.weight",
            "{}.to_out.0",
        ),
        (
            "unet.{}.to_k.lora_linear_layer.up.weight",
            "unet.{}.to_k.lora_linear_layer.down.weight",
            "{}.to_k",
        ),
        ("{}.to_v.lora_up.weight", "{}.to_v.lora_down.weight", "{}.to_v"),
        (
            "base_model.model.{}.to_q.lora_B.weight",
            "base_model.model.{}.to_q.lora_A.weight",
            "{}.to_q",
        ),
    ],
)
def test_every_diffusers_spelling_of_an_attention_layer_is_read(up, down, module):
    attention = f"{BLOCK}.attn1"
    adapter = adapters.read_adapter(pair(up.format(attention), down.format(attention)))
    assert list(adapter.updates) == [module.format(attention)]


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("text_encoder.text_model.encoder.layers.3.self_attn.to_q_lora", "self_attn.q_proj"),
        ("text_encoder.text_model.encoder.layers.3.self_attn.to_out_lora", "self_attn.out_proj"),
        ("text_encoder.text_model.encoder.layers.3.mlp.fc1.lora_linear_layer", "mlp.fc1"),
        (
            "text_encoder.text_model.encoder.layers.3.self_attn.k_proj.lora_linear_layer",
            "self_attn.k_proj",
        ),
        ("text_encoder.encoder.layers.3.mlp.fc2.lora", "mlp.fc2"),
        ("base_model.model.text_model.encoder.layers.3.mlp.fc2.lora", "mlp.fc2"),
    ],
)
def test_every_spelling_of_a_text_encoder_layer_is_read(path, module):
    adapter = adapters.read_adapter(pair(f"{path}.up.weight", f"{path}.down.weight"))
    assert list(adapter.updates) == [f"text_encoder.text_model.encoder.layers.3.{module}"]


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
)
def test_factors_of_any_storage_dtype_become_float32(tmp_path, dtype):
    tensors = {key: tensor.to(dtype) for key, tensor in kohya().items()}
    adapter = adapters.read_adapter(save(tmp_path / "lora.safetensors", tensors))
    (update,) = adapter.updates.values()
    assert adapter.dtype == dtype
    assert torch.equal(update.up, tensors[UP].float())
    assert torch.equal(update.down, tensors[DOWN].float())


def test_factors_of_different_dtypes_count_as_float32():
    tensors = kohya()
    assert adapters.read_adapter({**tensors, UP: tensors[UP].half()}).dtype == torch.float32


def test_a_state_dict_is_never_changed():
    tensors = kohya(alpha=torch.tensor(2.0))
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    update = adapters.read_adapter(tensors).updates["mid_block.attentions.0.proj_in"]
    update.down.zero_()
    assert all(torch.equal(before[key], tensors[key]) for key in tensors)


def test_metadata_of_the_file_is_kept_and_can_be_replaced(tmp_path):
    path = kohya_file(tmp_path / "lora.safetensors", metadata={"ss_tag_frequency": "{}"})
    assert adapters.read_adapter(path).metadata == {"ss_tag_frequency": "{}"}
    assert adapters.read_adapter(path, metadata={"a": "b"}).metadata == {"a": "b"}


@pytest.mark.parametrize(
    ("suffix", "what"),
    [
        ("oft_diag", "OFT"),
        ("boft_R", "OFT"),
        ("on_input", "IA3"),
        ("set_weight", "whole weights"),
        ("lora_embedding_A", "embedding"),
        ("modules_to_save.weight", "modules_to_save"),
        ("reshape_weight", "reshaped"),
        ("vera_lambda_b", "PEFT"),
        ("hra_u", "PEFT"),
        ("oft_r", "OFT"),
        ("bias_indices", "sparse bias"),
        ("lambda_layer", "T-LoRA"),
        ("q_layer.weight", "T-LoRA"),
    ],
)
def test_other_adapter_types_are_refused_with_the_key_and_a_way_out(suffix, what):
    with pytest.raises(UnsupportedFormat) as caught:
        adapters.read_adapter(kohya(**{suffix: torch.ones(3)}))
    assert f"{STEM}.{suffix}" in str(caught.value)
    assert what in str(caught.value)
    assert re.search(r"Merge it|without them", str(caught.value))


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("lora_unet_frobnicate.diff_b", "bias"),
        ("lora_unet_frobnicate.w_norm", "normalisation"),
        ("lora_unet_frobnicate.diff", "normalisation"),
        ("double_blocks.0.img_attn.norm.query_norm.scale", "norm"),
        ("transformer.transformer_blocks.0.attn.norm_added_q.weight", "norm"),
        ("bundle_emb.trigger.clip_l", "embedding"),
        ("emb_params", "embedding"),
    ],
)
def test_what_is_no_update_is_left_out_by_name_and_with_the_reason(key, what):
    adapter = adapters.read_adapter({**kohya(), key: torch.ones(3)})
    assert list(adapter.updates) == ["mid_block.attentions.0.proj_in"]
    assert list(adapter.left_out) == [key]
    assert what in adapter.left_out[key]
    assert list(adapter.unread) == [key] * ("frobnicate" in key)  # the rest is no loss


PEFT = "base_model.model.conv_in"
OTHER = "lora_unet_middle_block_1_proj_in"  # the module of STEM
FLUX, UNET = "transformer.transformer_blocks.0.attn.to_q", "unet.mid_block.attentions.0.proj_in"


def dotted(*stems):
    """Factors by PEFT's and diffusers' suffixes."""
    tensors = {}
    for stem in stems:
        tensors |= pair(f"{stem}.lora_B.weight", f"{stem}.lora_A.weight")
    return tensors


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"bundle_emb.trigger.clip_l": torch.ones(3)}, UnsupportedFormat, "holds no update"),
        (
            {**dotted(PEFT), f"{PEFT}.bias": torch.ones(3)},
            UnsupportedFormat,
            rf"{PEFT}\.bias makes this trained biases",
        ),
        ({UP: kohya()[UP]}, UnsupportedFormat, f"{STEM}.* has no partner"),
        ({DOWN: kohya()[DOWN]}, UnsupportedFormat, f"{STEM}.* has no partner"),
        (
            {**kohya(), "lora_unet_conv_in.alpha": torch.tensor(1.0)},
            UnsupportedFormat,
            r"conv_in\.alpha has no partner",
        ),
        (
            {**kohya(), **pair(f"{OTHER}.lora_up.weight", f"{OTHER}.lora_down.weight")},
            UnsupportedFormat,
            "are the same factor",
        ),
        (kohya(alpha=torch.ones(2)), ShapeMismatch, "not one number"),
        ({**kohya(), DOWN: torch.ones(4, 5).to(torch.int8)}, UnsupportedFormat, "stored as int8"),
        (
            {**kohya(alpha=torch.tensor(1e38)), UP: torch.full((6, 4), 1e10)},
            NonFiniteWeights,
            "overflows",
        ),
        (kohya(alpha=2.0), UnsupportedFormat, r"alpha' is float"),
        (
            dotted(FLUX, UNET),
            UnsupportedFormat,
            r"is of a UNet and transformer.* of two models",
        ),
    ],
)
def test_tensors_that_make_no_updates_are_refused_with_the_reason(tensors, error, message):
    with pytest.raises(error, match=message):
        adapters.read_adapter(tensors)


def test_unknown_keys_are_listed_five_at_most():
    extra = {f"lora_unet_unknown{i}.lora_up.weight": torch.ones(2, 2) for i in range(7)}
    with pytest.raises(UnsupportedFormat) as caught:
        adapters.read_adapter({**kohya(), **extra})
    assert "7 keys are not understood" in str(caught.value)
    assert "unknown4" in str(caught.value) and "unknown5" not in str(caught.value)
    assert "and 2 more" in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.input_blocks.0.0.weight",
        "down_blocks.0.resnets.0.conv1.weight",
        "unet.conv_in.weight",
        "double_blocks.0.img_attn.qkv.weight",
        "transformer_blocks.0.attn.to_q.weight",
    ],
)
def test_a_base_model_given_as_lora_is_recognised(key):
    with pytest.raises(UnsupportedFormat, match="is a weight of a base model, not a LoRA"):
        adapters.read_adapter({key: torch.ones(2, 2)})


@pytest.mark.parametrize("name", ["lora.pt", "lora.ckpt"])
def test_an_old_pickle_is_refused_with_the_command_that_converts_it(tmp_path, name):
    path = tmp_path / "it's" / name
    path.parent.mkdir()
    torch.save(kohya(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedFormat, match="pickle") as caught:
        adapters.read_adapter(path)
    converted = run_here(str(caught.value).rsplit("\n", 1)[1])[-1]
    assert list(adapters.read_adapter(converted).updates) == ["mid_block.attentions.0.proj_in"]


def test_a_peft_folder_with_a_pickle_is_refused_with_the_command(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    torch.save(kohya(), tmp_path / "adapter_model.bin")
    with pytest.raises(UnsupportedFormat, match="pickle"):
        adapters.read_adapter(tmp_path)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(UnsupportedFormat, match=r"holds neither adapter_config\.json"):
        adapters.read_adapter(tmp_path)


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff"])
def test_a_damaged_peft_configuration_is_refused(tmp_path, text):
    (tmp_path / "adapter_config.json").write_bytes(text)
    kohya_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(UnsupportedFormat, match=r"adapter_config\.json"):
        adapters.read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("up", "down"),
    [
        ((6, 4), (5, 5)),
        ((6,), (4, 5)),
        ((6, 4, 3, 3), (4, 5, 3, 3)),
        ((6, 4, 3), (4, 5, 3)),
        ((6, 4, 1), (4, 5)),
        ((6, 4, 1, 1), (4, 5, 1)),
        ((6, 4, 1, 1), (4, 5)),
        ((), ()),
    ],
)
def test_factors_that_do_not_multiply_are_refused(up, down):
    with pytest.raises(ShapeMismatch, match=re.escape(f"{UP} {list(up)}")):
        adapters.read_adapter({UP: torch.ones(up), DOWN: torch.ones(down)})


@pytest.mark.parametrize(("up", "down"), [((6, 0), (0, 5)), ((6, 4), (4, 0)), ((0, 4), (4, 5))])
def test_factors_of_rank_0_and_empty_tensors_are_refused_by_name(up, down):
    with pytest.raises(ShapeMismatch, match=r"mid_block_attentions_0.* holds no numbers; remove"):
        adapters.read_adapter({UP: torch.ones(up), DOWN: torch.ones(down)})


@pytest.mark.parametrize("up", [(6, 4), (6, 4, 1)])
def test_a_convolution_along_a_line_is_read_with_its_kernel(up):
    adapter = adapters.read_adapter({UP: torch.ones(up), DOWN: torch.ones(4, 5, 3)})
    assert adapter.kernels == {"mid_block.attentions.0.proj_in": (3,)}
    assert adapter.updates["mid_block.attentions.0.proj_in"].shape == (6, 15)


def test_a_convolution_may_have_a_flat_up_factor():
    adapter = adapters.read_adapter({UP: torch.ones(6, 4), DOWN: torch.ones(4, 5, 3, 3)})
    assert adapter.kernels == {"mid_block.attentions.0.proj_in": (3, 3)}
    assert adapter.updates["mid_block.attentions.0.proj_in"].shape == (6, 45)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", [UP, DOWN, f"{STEM}.alpha"])
def test_a_value_that_is_not_finite_is_refused_by_name(key, value):
    tensors = kohya(alpha=torch.tensor(1.0))
    tensors[key] = tensors[key].clone().fill_(value)
    with pytest.raises(NonFiniteWeights, match=re.escape(key)):
        adapters.read_adapter(tensors)


def test_a_wrong_key_is_found_before_any_tensor_is_read(tmp_path, monkeypatch):
    from prolora.files.safetensors_file import SafetensorsFile

    wrong = {"zzz.lora_down.weight": torch.ones(1, 1), "zzz.lora_up.weight": torch.ones(1, 1)}
    path = save(tmp_path / "lora.safetensors", {**wrong, "yyy": torch.ones(1), DOWN: kohya()[DOWN]})
    monkeypatch.setattr(SafetensorsFile, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(UnsupportedFormat, match="zzz"):
        adapters.read_adapter(path)


def test_a_foreign_tensor_among_many_that_are_known_is_left_out_by_name():
    foreign = {
        "emb.weight": torch.ones(2, 2),
        "zzz.lora_down.weight": torch.ones(3, 5),
        "zzz.lora_up.weight": torch.ones(7, 3),
    }
    known = {
        key.replace(STEM, f"lora_unet_down_blocks_{i}_attentions_0_proj_in"): tensor
        for i in range(3)
        for key, tensor in kohya().items()
    }
    adapter = adapters.read_adapter(known | foreign)
    assert len(adapter.updates) == 3
    assert adapter.left_out.keys() == {"emb.weight", "zzz"}
    # Both may be updates, and count as skipped in the coverage.
    assert adapter.unread == {"emb.weight": (2, 2, 1), "zzz": (7, 5, 3)}


@settings(max_examples=examples(50))
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 5),
    st.sampled_from([(), (1, 1), (3, 3), (1, 3)]),
    st.floats(-64, 64, width=16),
    st.integers(0, 99),
)
def test_the_update_is_alpha_over_rank_times_up_times_down(m, n, rank, kernel, alpha, seed):
    up, down = factors((m, n, *kernel), rank, seed)
    tensors = {UP: up, DOWN: down, f"{STEM}.alpha": torch.tensor(alpha)}
    (update,) = adapters.read_adapter(tensors).updates.values()
    wanted = (alpha / rank) * up.double().flatten(1) @ down.double().flatten(1)
    size = abs(alpha) / rank * up.norm().item() * down.norm().item()
    assert (update.dense() - wanted).norm() <= 1e-6 * size + 1e-30


WORDS = st.sampled_from(
    [
        "unet",
        "base_model",
        "model",
        "text_encoder",
        "lora_unet_conv_in",
        "conv_in",
        "mid_block",
        "to_q",
        "processor",
        "to_q_lora",
        "lora",
        "down",
        "up",
        "lora_A",
        "lora_B",
        "default",
        "weight",
        "alpha",
        "lora_up",
        "lora_down",
        "lora_te_text_model",
        "bias",
        "hada_w1_a",
        "0",
        "",
    ]
)
SHAPES = st.sampled_from([(), (1,), (2, 2), (2, 3), (2, 2, 1, 1), (2, 2, 3, 3), (0, 2)])


@settings(max_examples=examples(300))
@given(st.dictionaries(st.lists(WORDS, max_size=6).map(".".join), SHAPES, max_size=4))
def test_any_state_dict_is_read_or_refused_with_a_reason(shapes):
    tensors = {key: torch.ones(shape) for key, shape in shapes.items()}
    try:
        adapter = adapters.read_adapter(tensors)
    except ProLoRAError as error:
        assert len(str(error)) > 20
    else:
        assert adapter.updates
