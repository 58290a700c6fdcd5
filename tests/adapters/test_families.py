"""Which family a LoRA is taken for: none rather than the wrong one."""

import pytest
import torch

from prolora.adapters import BaseNames, encode_state_dict, read_adapter
from prolora.architectures.identify import Model, identify
from prolora.architectures.layouts import load_layout
from prolora.architectures.modules import matrix_shape


@pytest.mark.parametrize(
    ("names", "width", "families"),
    [
        (
            ["transformer_blocks.18.attn.to_q", "single_transformer_blocks.37.attn.to_q"],
            3072,
            "flux",
        ),
        (["transformer_blocks.59.attn.to_q"], 3072, "qwen-image"),
        (["transformer_blocks.60.attn.to_q"], 3072, ""),
        (["transformer_blocks.37.attn.to_q"], 2432, "sd3"),
        (["transformer_blocks.41.attn.to_q"], 2432, ""),
    ],
)
def test_a_block_beyond_the_last_one_of_a_family_is_of_another(names, width, families):
    shapes = dict.fromkeys(names, (width, width))
    found = identify(shapes, {}).families
    assert set(families.split()) <= set(found) and (families or not found)


def test_a_module_beside_the_blocks_of_other_channels_hides_no_family():
    shapes = load_layout("wan-t2v-14b").shapes.items()
    known = {n: matrix_shape(s) for n, s in shapes if n.startswith("blocks.")}
    found = identify(known | {"patch_embedding": (5120, 37)}, {})
    assert found.families == ("wan",) and "wan-t2v-14b" in found.sizes


def test_metadata_decide_between_families_of_equal_sizes_and_add_no_other():
    shapes = {"single_transformer_blocks.37.attn.to_q": (3072, 3072)}
    fitting = identify(shapes, {})
    assert "flux" in fitting.families and len(fitting.families) > 1
    assert identify(shapes, {"ss_base_model_version": "flux1"}).families == ("flux",)
    other = identify(shapes, {"ss_base_model_version": "qwen_image"})
    assert (other.families, other.claimed) == (fitting.families, "qwen-image")
    wider = {"single_transformer_blocks.37.attn.to_q": (100, 100)}  # of no published size
    assert identify(wider, {"ss_base_model_version": "flux1"}).names == ("flux",)
    assert identify(wider, {"ss_base_model_version": "wan"}).names == identify(wider, {}).names


@pytest.mark.parametrize(
    ("name", "shape", "family"),
    [
        ("layers.0.feed_forward.linear_1", (4608, 1152), "lumina2"),
        ("layers.0.feed_forward.linear_1", (5120, 1260), "omnigen2"),
        ("transformer_blocks.0.norm1.linear", (5760, 256), "cogvideox"),
    ],
)
def test_proportions_tell_families_apart_where_no_size_is_known(name, shape, family):
    """Half as wide as any published one."""
    assert identify({name: shape}, {}).names == (family,)


@pytest.mark.parametrize("format", ["kohya", "comfy", "diffusers"])
def test_the_text_encoder_of_anima_is_read_and_written_by_every_name(format):
    """sd-scripts trains Qwen3; there may be more of it than of the transformer."""
    leaves = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"]
    inside = [f"layers.{i}.{leaf}" for i in range(3) for leaf in (*leaves, "mlp.down_proj")]
    starts = {
        "kohya": ("lora_unet_blocks_0_self_attn_q_proj", "lora_te_"),
        "comfy": ("diffusion_model.blocks.0.self_attn.q_proj", "text_encoders.qwen3_06b."),
        "diffusers": ("transformer.transformer_blocks.0.attn1.to_q", "text_encoder."),
    }
    starts["comfy"] = starts["comfy"][0], f"{starts['comfy'][1]}transformer.model."
    main, start = starts[format]
    stems = [start + (name.replace(".", "_") if format == "kohya" else name) for name in inside]
    factors = ("lora_up", "lora_down") if format == "kohya" else ("lora_B", "lora_A")
    tensors = {}
    for i, stem in enumerate([main, *stems]):
        width = 2048 if stem == main else 1024
        tensors[f"{stem}.{factors[0]}.weight"] = torch.full((width, 2), i + 1.0)
        tensors[f"{stem}.{factors[1]}.weight"] = torch.ones(2, width)
    adapter = read_adapter(tensors, base=BaseNames(Model.of("cosmos")))
    names = ["transformer_blocks.0.attn1.to_q", *(f"text_encoder.{name}" for name in inside)]
    assert list(adapter.updates) == names and not adapter.left_out
    assert adapter.model.family == "cosmos"
    written = encode_state_dict(adapter, dtype=torch.float32)
    assert {key for key in written if not key.endswith("alpha")} == tensors.keys()
    others = {name: encode_state_dict(adapter, format=name) for name in starts}
    for name, other in others.items():
        assert any(key.startswith(starts[name][1]) for key in other)
    scripts = {
        k.replace("text_encoder.", "text_encoder.qwen3."): t for k, t in others["diffusers"].items()
    }
    assert read_adapter(scripts).updates.keys() == adapter.updates.keys()
