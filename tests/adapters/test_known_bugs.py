"""What other tools get wrong, as measured in reference/formats.md, and prolora must not."""

import json

import pytest
import torch
from lora_files import factors, relative_error, save
from safetensors.torch import load_file

from prolora import adapters
from prolora.errors import UnsupportedFormat


def pair(stem, shape=(6, 5), rank=4):
    up, down = factors(shape, rank, 0)
    return {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft", "comfy"])
def test_an_export_keeps_the_effect_of_an_alpha_that_is_not_the_rank(tmp_path, format):
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = pair(stem) | {f"{stem}.alpha": torch.tensor(1.0)}
    wanted = tensors[f"{stem}.lora_up.weight"] @ tensors[f"{stem}.lora_down.weight"] / 4
    adapters.write_adapter(adapters.read_adapter(tensors), tmp_path / "out", format=format)
    (update,) = adapters.read_adapter(tmp_path / "out").updates.values()
    assert relative_error(update.dense(), wanted) < 1e-6


def test_a_dora_scale_is_never_dropped():
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = pair(stem) | {f"{stem}.dora_scale": torch.ones(6, 1)}
    with pytest.raises(UnsupportedFormat, match="DoRA"):
        adapters.read_adapter(tensors)
    weight = torch.eye(6, 5)
    read = adapters.read_adapter(tensors, read_weight=lambda _: weight)
    (update,) = read.updates.values()
    merged = weight + update.dense()
    assert torch.allclose(merged.norm(dim=1), torch.ones(6), atol=1e-6)


def test_a_file_with_peft_keys_and_no_metadata_has_the_scale_its_own_configuration_gives(tmp_path):
    """diffusers loads such a file at scale 1; with the configuration beside it that is wrong."""
    stem = "base_model.model.mid_block.attentions.0.proj_in"
    up, down = factors((6, 5), 4, 0)
    tensors = {f"{stem}.lora_B.weight": up, f"{stem}.lora_A.weight": down}
    save(tmp_path / "adapter_model.safetensors", tensors)
    for rslora, scale in ((False, 0.5), (True, 1.0)):
        config = {"r": 4, "lora_alpha": 2, "use_rslora": rslora}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        (update,) = adapters.read_adapter(tmp_path).updates.values()
        assert relative_error(update.dense(), scale * up @ down) < 1e-6


FORMATS = ["kohya", "diffusers", "peft", "comfy"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_lokr_becomes_a_plain_lora_in_every_format_and_says_so(tmp_path, format):
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    w1, w2 = torch.randn(3, 2), torch.randn(4, 5)
    metadata = {
        "ss_network_module": "lycoris.kohya",
        "ss_network_args": '{"algo": "lokr"}',
        "ss_tag_frequency": '{"a": {"cat": 3}}',
    }
    path = save(tmp_path / "in", {f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2}, metadata)
    adapter = adapters.read_adapter(path)
    assert adapter.algorithms == {"mid_block.attentions.0.proj_in": "lokr"}
    adapters.write_adapter(adapter, tmp_path / "out", format=format)
    back = adapters.read_adapter(tmp_path / "out")
    (update,) = back.updates.values()
    assert relative_error(update.dense(), torch.kron(w1, w2)) < 1e-6
    assert back.metadata["ss_network_module"] == "networks.lora"
    assert "ss_network_args" not in back.metadata
    assert back.metadata["ss_tag_frequency"] == metadata["ss_tag_frequency"]
    if format == "kohya":
        assert set(load_file(tmp_path / "out")) == {
            f"{stem}.{suffix}" for suffix in ("lora_up.weight", "lora_down.weight", "alpha")
        }
