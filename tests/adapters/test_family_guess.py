"""Of which family a LoRA is: by the number of its blocks, a product's shape, whose names fit."""

import pytest
import torch
from safetensors.torch import save_file

from prolora import Adapter, LowRank, check
from prolora.adapters import encode_state_dict, read_adapter
from prolora.architectures.identify import Model, identify
from prolora.architectures.layouts import load_layout


def write_lora(path, layout, family, format, keep):
    """A LoRA of rank 1 on the linear layers that `keep` takes."""
    updates = {
        name: LowRank(torch.zeros(shape[0], 1), torch.zeros(1, shape[1]))
        for name, shape in load_layout(layout).shapes.items()
        if len(shape) == 2 and keep(name)
    }
    save_file(encode_state_dict(Adapter(updates, origin=Model.of(family)), format=format), path)
    return check(path)


def in_block(name):
    return "transformer_blocks." in name


def test_a_lora_without_modulation_is_for_flux_or_chroma_and_not_for_hunyuan_video(tmp_path):
    adapted = set(load_layout("flux1-dev").adapted)
    lora = tmp_path / "lora.safetensors"
    told = write_lora(lora, "flux1-dev", "flux", "kohya", adapted.__contains__)
    assert told.families == ("flux", "chroma")
    assert "Forge" in told.readers.whole  # which has both
    assert "InvokeAI" not in told.readers.part + told.readers.none  # which reads FLUX.1 whole


def test_a_lokr_has_the_shape_of_its_product(tmp_path):
    """18432 × 6144 is FLUX.2 dev's fused q, k and v and nobody else's."""
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = {
        f"{name}.lokr_w1": torch.zeros(16, 16),
        f"{name}.lokr_w2_a": torch.zeros(1152, 4),
        f"{name}.lokr_w2_b": torch.zeros(4, 384),
        f"{name}.alpha": torch.tensor(4.0),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    assert check(tmp_path / "lora.safetensors").families == ("flux2",)


@pytest.mark.parametrize(
    ("layout", "family", "keep"),
    [
        ("ltx2", "ltx2", lambda n: n.startswith("transformer_blocks.") and ".audio_attn1" in n),
        ("ltx2", "ltx2", lambda n: True),
        ("ideogram4", "ideogram4", lambda n: n.startswith("layers.") and ".feed_forward" in n),
    ],
)
def test_modules_that_everybody_calls_the_same_leave_the_file_in_comfyuis_format(
    tmp_path, layout, family, keep
):
    lora = tmp_path / "lora.safetensors"
    told = write_lora(lora, layout, family, "comfy", keep)
    assert told.family == family
    assert {"ComfyUI", "diffusers"} <= {*told.readers.whole, *told.readers.part}
    assert "ComfyUI" in told.readers.whole


def test_the_prefix_of_diffsynths_pipelines_is_cut_off(tmp_path):
    tensors = {
        f"pipe.dit.blocks.{i}.self_attn.q.lora_{end}.default.weight": torch.zeros(shape)
        for i in range(4)
        for end, shape in (("A", (1, 5120)), ("B", (5120, 1)))
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    told = check(tmp_path / "lora.safetensors")
    assert told.family == "wan" and (not told.reason)
    moved = encode_state_dict(read_adapter(tensors), format="comfy")
    assert "diffusion_model.blocks.3.self_attn.q.lora_A.weight" in moved


def test_what_one_program_reads_makes_no_family_certain(tmp_path):
    """A first block's attention as OneTrainer spells it; Qwen-Image has the same shapes."""
    tensors = {
        f"lora_transformer_transformer_blocks_0_attn_{leaf}.lora_{end}.weight": torch.zeros(shape)
        for leaf in ("to_q", "to_k", "to_v", "add_q_proj")
        for end, shape in (("down", (1, 3072)), ("up", (3072, 1)))
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    told = check(tmp_path / "lora.safetensors")
    assert told.family is None and {"flux", "qwen-image"} <= set(told.families)
    claim = {"modelspec.architecture": "qwen-image/lora"}
    save_file(tensors, tmp_path / "lora.safetensors", claim)
    assert check(tmp_path / "lora.safetensors").families == ("qwen-image",)


def test_nobody_is_said_to_read_a_kind_that_was_not_tried(tmp_path):
    key = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    factors = {"w1": torch.ones(4, 4), "w2": torch.ones(160, 512)}
    save_file({f"{key}.lokr_{x}": t for x, t in factors.items()}, tmp_path / "lokr.safetensors")
    told = check(tmp_path / "lokr.safetensors")
    assert told.family == "sdxl" and told.readers == (("ComfyUI",), (), ("diffusers",), ())


def write_spelled(path, layout, spell):
    """A LoRA of rank 1 on the attention and feed-forward layers, as a trainer spells them."""
    linear = load_layout(layout).shapes
    tensors = {}
    for name in load_layout(layout).adapted:
        if len(linear[name]) == 2:
            up, down, stem = spell(name)
            tensors[stem + up] = torch.zeros(linear[name][0], 1)
            tensors[stem + down] = torch.zeros(1, linear[name][1])
    save_file(tensors, path)
    return check(path)


def dotted(prefix):
    return lambda name: (".lora_B.weight", ".lora_A.weight", prefix + name)


def underscored(prefix):
    ends = (".lora_up.weight", ".lora_down.weight")
    return lambda name: (*ends, prefix + name.replace(".", "_"))


@pytest.mark.parametrize(
    ("layout", "spell"),
    [
        ("hidream-o1", dotted("diffusion_model.")),  # ai-toolkit
        ("hidream-o1", dotted("diffusion_model.model.")),  # ai-toolkit's first
        ("hidream-o1", underscored("lora_unet_model_")),  # musubi-tuner
        ("hidream-o1", underscored("lora_unet_")),
        ("omnigen2", dotted("diffusion_model.")),  # ai-toolkit
        ("omnigen2", dotted("transformer.")),  # its authors
        ("omnigen2", dotted("")),
        ("omnigen2", underscored("lora_unet_")),
    ],
)
def test_trainers_spellings_of_hidream_o1_and_omnigen2_are_told(layout, spell, tmp_path):
    told = write_spelled(tmp_path / "lora.safetensors", layout, spell)
    assert told.families == (layout,)
    assert (not told.reason) and set(told.modules) == {"transformer"}


def test_musubis_hidream_o1_keeps_its_spelling_and_comfyuis_gets_no_prefix(tmp_path):
    lora = tmp_path / "lora.safetensors"
    told = write_spelled(lora, "hidream-o1", underscored("lora_unet_model_"))
    assert {"musubi-tuner", "ComfyUI"} <= {*told.readers.none}  # the first stops without alphas
    adapter = read_adapter(lora)
    kept = encode_state_dict(adapter, format="auto")
    assert "musubi-tuner" in check(kept).readers.whole
    assert all(key.startswith("lora_unet_model_") for key in kept)
    for_comfy = encode_state_dict(adapter, format="comfyui")
    assert "diffusion_model.language_model.layers.0.mlp.up_proj.lora_A.weight" in for_comfy


def test_blocks_of_chroma_are_also_those_of_its_radiance(tmp_path):
    lora = tmp_path / "lora.safetensors"
    told = write_lora(lora, "chroma-radiance", "chroma", "comfy", in_block)
    assert "chroma" in told.families and "ComfyUI" in told.readers.whole
    told = write_lora(lora, "chroma-radiance", "chroma", "comfy", lambda name: "nerf" in name)
    assert told.families == ("chroma",) and "Forge" in told.readers.none


@pytest.mark.parametrize("layout", ["cogvideox-2b", "cogvideox1.5-5b"])
def test_a_transformer_with_a_module_that_unets_have_too_is_told(layout):
    shapes = {n: s for n, s in load_layout(layout).shapes.items() if len(s) == 2}
    assert "time_embedding.linear_1" in shapes
    assert identify(shapes, {}).families == ("cogvideox",)
    alone = {n: s for n, s in shapes.items() if n.startswith("time_embedding")}
    assert identify(alone, {}).families == ()
