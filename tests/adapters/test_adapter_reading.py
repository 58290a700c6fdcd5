"""What is read of a LoRA file and what is refused, by `convert`, which reads all that it writes."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_files import BLOCK, factors, kohya_file, pair, save
from property_examples import examples

import prolora
from prolora.errors import NonFiniteWeights, ShapeMismatch, UnsupportedFormat

STEM = "lora_unet_mid_block_attentions_0_proj_in"
NAME = "mid_block.attentions.0.proj_in"
UP, DOWN = f"{STEM}.lora_up.weight", f"{STEM}.lora_down.weight"


def kohya(**extra):
    return pair(STEM, (6, 5)) | {f"{STEM}.{key}": value for key, value in extra.items()}


DOTS = ("up", "down")
LAYER = "text_model.encoder.layers.3"


@pytest.mark.parametrize(
    ("path", "ends", "module"),
    [
        (f"unet.{BLOCK}.attn1.to_q", ("lora_B", "lora_A"), f"{BLOCK}.attn1.to_q"),
        (
            f"unet.{BLOCK}.attn1.to_q",
            ("lora_B.default", "lora_A.default"),
            f"{BLOCK}.attn1.to_q",
        ),
        (f"unet.{BLOCK}.attn1.to_q.lora", DOTS, f"{BLOCK}.attn1.to_q"),
        (f"{BLOCK}.attn1.processor.to_out_lora", DOTS, f"{BLOCK}.attn1.to_out.0"),
        (f"unet.{BLOCK}.attn1.to_k.lora_linear_layer", DOTS, f"{BLOCK}.attn1.to_k"),
        (f"{BLOCK}.attn1.to_v", ("lora_up", "lora_down"), f"{BLOCK}.attn1.to_v"),
        (f"base_model.model.{BLOCK}.attn1.to_q", ("lora_B", "lora_A"), f"{BLOCK}.attn1.to_q"),
        (f"text_encoder.{LAYER}.self_attn.to_q_lora", DOTS, f"{LAYER}.self_attn.q_proj"),
        (f"text_encoder.{LAYER}.self_attn.to_out_lora", DOTS, f"{LAYER}.self_attn.out_proj"),
        (f"text_encoder.{LAYER}.mlp.fc1.lora_linear_layer", DOTS, f"{LAYER}.mlp.fc1"),
        ("text_encoder.encoder.layers.3.mlp.fc2.lora", DOTS, f"{LAYER}.mlp.fc2"),
        (f"base_model.model.{LAYER}.mlp.fc2.lora", DOTS, f"{LAYER}.mlp.fc2"),
    ],
)
def test_every_spelling_of_a_layer_is_read(path, ends, module):
    updates = prolora.convert(pair(path, (6, 5), ends=ends)).adapter.updates
    assert list(updates) == [f"text_encoder.{module}" if module.startswith("text") else module]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float8_e5m2])
def test_factors_of_any_storage_dtype_become_float32(tmp_path, dtype):
    tensors = {key: tensor.to(dtype) for key, tensor in kohya().items()}
    adapter = prolora.convert(save(tmp_path / "lora.safetensors", tensors)).adapter
    update = adapter.updates[NAME]
    assert adapter.dtype == dtype
    assert torch.equal(update.up, tensors[UP].float())
    assert torch.equal(update.down, tensors[DOWN].float())
    mixed = {**tensors, UP: tensors[UP].float()}
    assert prolora.convert(mixed).adapter.dtype == torch.float32


def test_a_state_dict_is_never_changed():
    tensors = kohya(alpha=torch.tensor(2.0))
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    prolora.convert(tensors).adapter.updates[NAME].down.zero_()
    assert all(torch.equal(before[key], tensors[key]) for key in tensors)


def test_metadata_of_the_file_is_kept_and_can_be_replaced(tmp_path):
    path = kohya_file(tmp_path / "lora.safetensors", metadata={"ss_tag_frequency": "{}"})
    assert prolora.convert(path).adapter.metadata == {"ss_tag_frequency": "{}"}
    assert prolora.Lora.open(path, {"a": "b"}).metadata == {"a": "b"}


@pytest.mark.parametrize(
    ("suffix", "what"),
    [
        *(("oft_diag", "OFT"), ("boft_R", "OFT"), ("oft_r", "OFT"), ("on_input", "IA3")),
        *(("set_weight", "whole weights"), ("lora_embedding_A", "embedding")),
        *(("modules_to_save.weight", "modules_to_save"), ("reshape_weight", "reshaped")),
        *(("vera_lambda_b", "PEFT"), ("hra_u", "PEFT"), ("bias_indices", "sparse bias")),
        *(("lambda_layer", "T-LoRA"), ("q_layer.weight", "T-LoRA")),
    ],
)
def test_other_adapter_types_are_refused_with_the_key_and_a_way_out(suffix, what):
    with pytest.raises(UnsupportedFormat) as caught:
        prolora.convert(kohya(**{suffix: torch.ones(3)}))
    assert f"{STEM}.{suffix}" in str(caught.value)
    assert what in str(caught.value)
    assert re.search(r"Merge it|without them", str(caught.value))


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("lora_unet_frobnicate.diff_b", "bias"),
        ("lora_unet_frobnicate.w_norm", "normalisation"),
        ("double_blocks.0.img_attn.norm.query_norm.scale", "norm"),
        ("transformer.transformer_blocks.0.attn.norm_added_q.weight", "norm"),
        ("bundle_emb.trigger.clip_l", "embedding"),
        ("emb_params", "embedding"),
    ],
)
def test_what_is_no_update_is_left_out_by_name_and_with_the_reason(key, what):
    made = prolora.convert({**kohya(), key: torch.ones(3)})
    assert list(made.adapter.updates) == [NAME]
    unread = {row.source: row.reason for row in made.report.modules if not row.target}
    assert list(unread) == [key] * ("frobnicate" in key)  # the rest is no loss
    assert list(reasons := made.report.left_out | unread) == [key] and what in reasons[key]


PEFT_STEM = "base_model.model.conv_in"
OTHER = "lora_unet_middle_block_1_proj_in"  # the module of STEM
FLUX, UNET = "transformer.transformer_blocks.0.attn.to_q", "unet.mid_block.attentions.0.proj_in"


HUGE = {**kohya(alpha=torch.tensor(1e38)), UP: torch.full((6, 4), 1e10)}
PEFT = pair(PEFT_STEM, (6, 5), ends=("lora_B", "lora_A"))
TWO = pair(FLUX, (6, 5), ends=("lora_B", "lora_A")) | pair(UNET, (6, 5), ends=("lora_B", "lora_A"))


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"bundle_emb.trigger.clip_l": torch.ones(3)}, UnsupportedFormat, "holds no update"),
        (PEFT | {f"{PEFT_STEM}.bias": torch.ones(3)}, UnsupportedFormat, "trained biases"),
        ({UP: kohya()[UP]}, UnsupportedFormat, f"{STEM}.* has no partner"),
        ({DOWN: kohya()[DOWN]}, UnsupportedFormat, f"{STEM}.* has no partner"),
        ({**kohya(), "lora_unet_conv_in.alpha": torch.ones(())}, UnsupportedFormat, "no partner"),
        (kohya() | pair(OTHER, (6, 5)), UnsupportedFormat, "are the same factor"),
        (kohya(alpha=torch.ones(2)), ShapeMismatch, "not one number"),
        ({**kohya(), DOWN: torch.ones(4, 5).to(torch.int8)}, UnsupportedFormat, "stored as int8"),
        (HUGE, NonFiniteWeights, "overflows"),
        (kohya(alpha=2.0), UnsupportedFormat, r"alpha' is float"),
        (TWO, UnsupportedFormat, r"is of a UNet and transformer.* of two models"),
    ],
)
def test_tensors_that_make_no_updates_are_refused_with_the_reason(tensors, error, message):
    with pytest.raises(error, match=message):
        prolora.convert(tensors)


def test_unknown_keys_are_listed_five_at_most():
    extra = {f"lora_unet_unknown{i}.lora_up.weight": torch.ones(2, 2) for i in range(7)}
    with pytest.raises(UnsupportedFormat) as caught:
        prolora.convert({**kohya(), **extra})
    assert "7 keys are not understood" in str(caught.value)
    assert "unknown4" in str(caught.value) and "unknown5" not in str(caught.value)
    assert "and 2 more" in str(caught.value)


@pytest.mark.parametrize("key", ["unet.conv_in.weight", "double_blocks.0.img_attn.qkv.weight"])
def test_a_base_model_given_as_lora_is_recognised(key):
    with pytest.raises(UnsupportedFormat, match="is a weight of a base model, not a LoRA"):
        prolora.convert({key: torch.ones(2, 2)})


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff"])
def test_a_folder_without_an_adapter_with_a_pickle_or_a_damaged_configuration_is_refused(
    tmp_path, text
):
    with pytest.raises(UnsupportedFormat, match=r"holds neither adapter_config\.json"):
        prolora.convert(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    torch.save(kohya(), tmp_path / "adapter_model.bin")
    with pytest.raises(UnsupportedFormat, match="pickle"):
        prolora.convert(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(text)
    kohya_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(UnsupportedFormat, match=r"adapter_config\.json"):
        prolora.convert(tmp_path)


NO_PRODUCTS = [
    *(((6, 4), (5, 5)), ((6,), (4, 5)), ((6, 4, 3, 3), (4, 5, 3, 3)), ((6, 4, 3), (4, 5, 3))),
    *(((6, 4, 1), (4, 5)), ((6, 4, 1, 1), (4, 5, 1)), ((6, 4, 1, 1), (4, 5)), ((), ())),
]


@pytest.mark.parametrize(("up", "down"), NO_PRODUCTS)
def test_factors_that_do_not_multiply_are_refused(up, down):
    with pytest.raises(ShapeMismatch, match=re.escape(f"{UP} {list(up)}")):
        prolora.convert({UP: torch.ones(up), DOWN: torch.ones(down)})


@pytest.mark.parametrize(("up", "down"), [((6, 0), (0, 5)), ((6, 4), (4, 0)), ((0, 4), (4, 5))])
def test_factors_of_rank_0_and_empty_tensors_are_refused_by_name(up, down):
    with pytest.raises(ShapeMismatch, match=r"mid_block_attentions_0.* holds no numbers; remove"):
        prolora.convert({UP: torch.ones(up), DOWN: torch.ones(down)})


@pytest.mark.parametrize(
    ("up", "down"), [((6, 4), (4, 5, 3)), ((6, 4, 1), (4, 5, 3)), ((6, 4), (4, 5, 3, 3))]
)
def test_a_convolution_is_read_with_its_kernel_also_with_a_flat_up_factor(up, down):
    adapter = prolora.convert({UP: torch.ones(up), DOWN: torch.ones(down)}).adapter
    assert adapter.kernels == {NAME: down[2:]}
    assert adapter.updates[NAME].shape == (6, 5 * torch.Size(down[2:]).numel())


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("key", [UP, DOWN, f"{STEM}.alpha"])
def test_a_value_that_is_not_finite_is_refused_by_name(key, value):
    tensors = kohya(alpha=torch.tensor(1.0))
    tensors[key] = tensors[key].clone().fill_(value)
    with pytest.raises(NonFiniteWeights, match=re.escape(key)):
        prolora.convert(tensors)


def test_a_foreign_tensor_among_many_that_are_known_is_left_out_by_name():
    tensors = pair("zzz", (7, 5), rank=3) | {"emb.weight": torch.ones(2, 2)}
    for i in range(3):
        tensors |= pair(f"lora_unet_down_blocks_{i}_attentions_0_proj_in", (6, 5))
    converted = prolora.convert(tensors)
    assert len(converted.adapter.updates) == 3
    assert {*converted.report.unread} == {"emb.weight", "zzz"}
    # Both may be updates, and count as skipped in the coverage.
    rows = {
        row.source: (*row.shape, row.rank_in) for row in converted.report.modules if not row.target
    }
    assert rows == {"emb.weight": (2, 2, 1), "zzz": (7, 5, 3)}


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
    (update,) = prolora.convert(tensors).adapter.updates.values()
    wanted = (alpha / rank) * up.double().flatten(1) @ down.double().flatten(1)
    size = abs(alpha) / rank * up.norm().item() * down.norm().item()
    assert (update.dense() - wanted).norm() <= 1e-6 * size + 1e-30
