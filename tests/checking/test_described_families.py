"""A model that nobody has heard of: its LoRAs move between two of its checkpoints all the same."""

import pytest
import torch
from diagonal import pair_up
from lora_files import read_lora
from safetensors.torch import load_file, save_file

import prolora
from prolora.errors import UnsupportedFormat

MODULES = {
    "frob_in": (12, 8),
    "stages.0.mixer_attn.wq": (12, 12),
    "stages.0.mixer_attn.w_kv": (24, 12),
    "stages.1.mixer_attn.wq": (12, 12),
    "stages.1.mixer_attn.w_kv": (24, 12),
    "tail_stages.0.gated_mlp.w_2": (12, 20),
}


def base(seed, drift=0.0):
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in MODULES.items()}
    noise = torch.Generator().manual_seed(7)
    return {
        f"{name}.weight": weight + drift * torch.randn(weight.shape, generator=noise)
        for name, weight in weights.items()
    }


def lora(spell, suffixes):
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, (out, inputs) in MODULES.items():
        if name == "frob_in":
            continue
        up, down = suffixes
        tensors[f"{spell(name)}.{up}.weight"] = torch.randn(out, 2, generator=generator)
        tensors[f"{spell(name)}.{down}.weight"] = torch.randn(2, inputs, generator=generator)
        if up == "lora_up":
            tensors[f"{spell(name)}.alpha"] = torch.tensor(2.0)
    return tensors


SPELLINGS = {
    "kohya": (lambda n: "lora_unet_" + n.replace(".", "_"), ("lora_up", "lora_down")),
    "comfy": (lambda n: f"diffusion_model.{n}", ("lora_B", "lora_A")),
    "diffusers": (lambda n: f"transformer.{n}", ("lora_B", "lora_A")),
    "bare": (lambda n: n, ("lora_B", "lora_A")),
    "peft": (lambda n: f"base_model.model.{n}", ("lora_B", "lora_A")),
}


@pytest.mark.parametrize(
    ("spelling", "method"), pair_up(["kohya", "comfy", "diffusers", "bare"], ["copy", "prolora"])
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_lora_moves_by_equal_names_and_keeps_the_spelling_it_came_in(
    tmp_path, spelling, method, prefix
):
    spell, suffixes = SPELLINGS[spelling]
    tensors = lora(spell, suffixes)
    save_file(tensors, tmp_path / "lora.safetensors")
    for seed, (name, drift) in enumerate((("old", 0.0), ("new", 0.05))):
        weights = {prefix + key: tensor for key, tensor in base(0, drift).items()}
        save_file(weights, tmp_path / f"{name}.safetensors", {"n": str(seed)})
    case = (tmp_path / f"{name}.safetensors" for name in ("lora", "old", "new"))
    how = {"out": tmp_path / "out.safetensors", "method": method, "rank": 4}
    report = prolora.transfer(*case, **how).report
    assert report.coverage == 1
    moved = load_file(tmp_path / "out.safetensors")
    assert moved.keys() == tensors.keys()
    if method == "copy":
        assert all(torch.allclose(moved[key], tensors[key]) for key in tensors)


def test_a_peft_folders_names_are_kept_and_a_format_whose_names_nobody_knows_is_refused():
    for name, own in (("peft", None), ("diffusers", "peft")):
        adapter = read_lora(lora(*SPELLINGS[name]))
        result = prolora.transfer(adapter, base(0), base(0, 0.05), method="copy")
        assert result.state_dict(own).keys() == lora(*SPELLINGS["peft"]).keys()
    with pytest.raises(UnsupportedFormat, match="of no family that prolora knows"):
        result.state_dict("kohya")
    with pytest.raises(UnsupportedFormat, match="does not know its family"):
        result.state_dict("comfyui")
