import json

import pytest
import torch
from lora_files import LINEAR, adapter_of, keymaps, kohya_file, save

import prolora
from prolora import check

STEM = "lora_unet_mid_block_attentions_0_proj_in"


def lora_of(model, keep=lambda name: "attn" in name):
    """A LoRA of rank 1 on the attention of a whole model, in kohya's spelling."""
    tensors = {}
    for module, (kohya, _, _, (out, inputs, *_)) in keymaps()["unets"][model].items():
        if keep(module):
            tensors[f"{kohya}.lora_up.weight"] = torch.ones(out, 1)
            tensors[f"{kohya}.lora_down.weight"] = torch.ones(1, inputs)
    return tensors


def test_sd2_is_told_from_sd1_by_the_metadata_where_names_cannot():
    """Their self-attention has equal names and sizes."""
    tensors = lora_of("sd21", keep=lambda name: "attn1" in name)
    for claim, families in ("sd_v2", ("sd21",)), ("sdxl", ("sd15", "sd21")):
        lora = prolora.Lora.open(tensors, {"ss_base_model_version": claim})
        assert check(lora).families == families


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_flux_checkpoint_of_its_authors_is_a_single_file_base(tmp_path, prefix):
    shapes = {"double_blocks.0.img_attn.qkv": (12, 4), "single_blocks.0.linear1": (28, 4)}
    weights = {f"{prefix}{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    found = check(save(tmp_path / "base.safetensors", weights))
    assert (found.kind, found.format, (not found.reason)) == ("base", "single-file", True)
    assert found.modules == {"transformer": 7}


LYCORIS = {
    "tucker": {
        "lora_up.weight": (6, 2, 1, 1),
        "lora_mid.weight": (2, 2, 3, 3),
        "lora_down.weight": (2, 5, 1, 1),
    },
    "loha": {"hada_w1_a": (6, 2), "hada_w1_b": (2, 5), "hada_w2_a": (6, 2), "hada_w2_b": (2, 5)},
    "lokr": {"lokr_w1": (2, 5), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 1)},
    "full": {"diff": (6, 5)},
    "lora+dora": {"lora_up.weight": (6, 2), "lora_down.weight": (2, 5), "dora_scale": (6, 1)},
    "glora": {"a1.weight": (5, 2), "a2.weight": (2, 5), "b1.weight": (6, 2), "b2.weight": (2, 5)},
    "oft": {"oft_blocks": (3, 2, 2)},
}


@pytest.mark.parametrize("algorithm", LYCORIS)
def test_every_kind_of_update_is_told_with_its_rank_and_what_it_needs(algorithm):
    tensors = {f"{STEM}.{role}": torch.ones(shape) for role, shape in LYCORIS[algorithm].items()}
    checked = check(tensors | {f"{STEM}.alpha": torch.tensor(1.0)})
    assert checked.kind == "lora" and not checked.reason and checked.algorithms == {algorithm: 1}
    assert checked.needs_base == (algorithm in ("lora+dora", "glora", "oft"))
    (place,) = checked.parts.values()
    assert place.ranks == ({} if algorithm in ("full", "oft") else {2: 1})
    assert place.scales == {"1" if algorithm in ("full", "oft") else "0.5": 1}
    assert place.algorithms == {algorithm: 1}


def test_strengths_are_counted_by_place_and_what_is_left_out_by_reason():
    fc1 = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    tensors = prolora.convert(adapter_of({**LINEAR, fc1: (6, 5)})).state_dict()
    tensors["lora_te_text_model_encoder_layers_0_mlp_fc1.alpha"] = torch.tensor(1.0)
    for role in ("w_norm", "b_norm"):
        tensors[f"lora_unet_mid_block_attentions_0_norm.{role}"] = torch.ones(3)
    tensors["bundle_emb.trigger.clip_l"] = torch.ones(3)
    checked = check(prolora.Lora.open(tensors, {"ss_new_sd_model_hash": "abc"}))
    scales = {place: row.scales for place, row in checked.parts.items()}
    assert scales == {"unet": {"1": len(LINEAR)}, "text_encoder": {"0.25": 1}}
    assert checked.parts["text_encoder"].alphas == {"1": 1}
    assert checked.vectors == {"bias": 1, "norm": 1} and sum(checked.left_out.values()) == 1
    assert checked.base_hash == "abc"


def test_the_base_is_told_and_a_contradiction_is_shown():
    told = {"ss_base_model_version": "sdxl_base_v1-0", "ss_sd_model_name": "xl.safetensors"}
    checked = check(prolora.Lora.open(lora_of("sd15"), told))
    assert (checked.family, checked.family_claimed) == ("sd15", "sdxl")
    assert checked.base_model == "xl.safetensors"
    assert checked.headline == "a LoRA for Stable Diffusion 1.5"
    assert "Stable Diffusion XL" in dict(checked.facts())["its metadata says"]


def test_a_file_of_normalisation_layers_alone_is_an_adapter(tmp_path):
    key = "lora_unet_mid_block_attentions_0_norm.w_norm"
    found = check(save(tmp_path / "lora", {key: torch.ones(3)}))
    assert found.kind == "lora" and not found.reason and found.algorithms == {"norm": 1}
    assert found.vectors == {"norm": 1} and not found.parts


def test_trigger_words_come_by_frequency(tmp_path):
    tags = {"10_a": {"cat": 5, " 1girl": 9}, "2_b": {"cat": 6, "hat": 1}}
    metadata = {
        "ss_tag_frequency": json.dumps(tags),
        "modelspec.trigger_phrase": "my cat",
        "ss_sd_model_name": "/models/base.safetensors",
    }
    found = check(kohya_file(tmp_path / "lora", metadata=metadata))
    assert found.trigger_words == ("my cat", "cat", "1girl", "hat")
    assert found.base_model == "base.safetensors"


def test_something_else_altogether_is_unknown(tmp_path):
    found = check(save(tmp_path / "x", {"wte": torch.ones(2)}))
    assert (found.kind, (not found.reason)) == ("unknown", False)
    assert "wte" in found.reason
    assert "no tensors" in check(save(tmp_path / "x", {})).reason


def test_alphas_of_a_peft_folder_are_those_of_its_configuration(tmp_path):
    prolora.convert(adapter_of(LINEAR, [4, 2]), out=tmp_path / "out", format="peft")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    config |= {"lora_alpha": 1, "alpha_pattern": {"to_q": 3}}
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(config))
    assert check(tmp_path / "out").parts["unet"].alphas == {"1": 5, "3": 1}
