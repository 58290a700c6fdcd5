from itertools import pairwise

import pytest
from diagonal import list_sizes
from hypothesis import given
from hypothesis import strategies as st
from lora_files import keymaps

from prolora.adapters.keys import module_names
from prolora.adapters.keys.kohya_words import restore_dots
from prolora.architectures.families import known_families
from prolora.architectures.family import SPELLINGS
from prolora.architectures.layouts import load_layout
from prolora.architectures.ldm import diffusers_to_ldm, ldm_to_diffusers

FAMILIES = {id_: one for id_, one in known_families().items() if not one.unet}
UNETS = ["sd15", "sd21", "sdxl", "ssd-1b", "segmind-vega"]


@pytest.mark.parametrize("model", UNETS)
def test_every_kohya_name_in_either_spelling_is_read_back_to_its_module(model):
    for module, (diffusers, sgm, _, _) in keymaps()["unets"][model].items():
        assert module_names.parse_module_path(diffusers)[:5] == (
            module,
            "kohya",
            "unet.",
            module,
            False,
        )
        assert module_names.parse_module_path(sgm)[:5] == (module, "kohya", "unet.", module, True)


@pytest.mark.parametrize("model", UNETS)
def test_every_module_is_written_under_its_kohya_name_in_either_spelling(model):
    modules = keymaps()["unets"][model]
    for module, (diffusers, sgm, _, _) in modules.items():
        assert module_names.to_kohya(module) == diffusers
        assert module_names.to_kohya(module, spelling="sgm", siblings=modules) == sgm


@pytest.mark.parametrize("model", UNETS)
def test_every_checkpoint_name_and_module_name_translate_into_each_other(model):
    modules = keymaps()["unets"][model]
    for module, (_, _, ldm, _) in modules.items():
        assert ldm_to_diffusers(ldm) == module
        assert diffusers_to_ldm(module, siblings=modules) == ldm
        assert module_names.parse_module_path(f"diffusion_model.{ldm}").name == module
        assert module_names.to_comfy(module, siblings=modules) == f"diffusion_model.{ldm}"


@pytest.mark.parametrize(
    ("prefix", "encoder", "model", "sdxl"),
    [
        ("lora_te_", "text_encoder", "te_clip-l", False),
        ("lora_te1_", "text_encoder", "te_clip-l", True),
        ("lora_te2_", "text_encoder_2", "te_openclip-bigg", True),
    ],
)
def test_every_module_of_a_text_encoder_translates_both_ways(prefix, encoder, model, sdxl):
    for module in keymaps()["clip"][model]:
        kohya = prefix + module.replace(".", "_")
        assert module_names.parse_module_path(kohya).name == f"{encoder}.{module}"
        assert module_names.to_kohya(f"{encoder}.{module}", sdxl=sdxl) == kohya


@pytest.mark.parametrize(
    ("siblings", "expected"),
    [
        (["up_blocks.0.attentions.0.proj_in"], "output_blocks.2.2.conv"),
        (["down_blocks.3.resnets.0.conv1"], "output_blocks.2.1.conv"),
        ([], "output_blocks.2.2.conv"),
    ],
)
def test_first_upsampler_is_numbered_by_whether_its_block_has_attention(siblings, expected):
    assert diffusers_to_ldm("up_blocks.0.upsamplers.0.conv", siblings=siblings) == expected


@pytest.mark.parametrize(
    "path",
    [
        "lora_te1_encoder_block_0_layer_0_SelfAttention_q",
        "lora_te3_text_model_encoder_layers_0",
        "lora_unet_down_blocks_0_frobnicate",
        "lora_unet_",
        "lora_te_encoder_layers_0_mlp_fc1",
        "lora_te3_encoder_block_0",
        "lora_unet_to_q",
        "unet.frobnicate",
        "unet",
        "frobnicate.conv_in",
        "transformer",
        "text_encoder",
        "",
        "diffusion_model.input_blocks.3.1.conv",
        "text_encoders.t5.transformer.x",
    ],
)
def test_an_unknown_path_is_not_guessed_at(path):
    assert module_names.parse_module_path(path) is None


@pytest.mark.parametrize("family", [None, *known_families().values()])
@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("lora_unet_frob_blocks_0_nicate_qkv", "frob_blocks_0_nicate_qkv"),
        ("lora_unet_double_blocks_0_frobnicate", "double_blocks_0_frobnicate"),
        ("double_blocks.0.processor.qkv_lora3", "double_blocks.0.processor.qkv_lora3"),
        ("diffusion_model.stages.3.frob.nicate", "stages.3.frob.nicate"),
        ("base_model.model.model.layers.0.self_attn.z_proj", "model.layers.0.self_attn.z_proj"),
        ("transformer.frob_in", "frob_in"),
    ],
)
def test_a_module_that_no_family_knows_keeps_the_name_it_has_in_the_file(path, name, family):
    module = module_names.parse_module_path(path, family)
    assert module.described and module.name == name
    assert module_names.spell_module(name, module.spelling, family) == path


@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 3), st.booleans(), st.data())
def test_block_arithmetic_is_its_own_inverse_for_any_number_of_layers(
    layers, block, layer, up, data
):
    layer %= layers + up
    rest = data.draw(st.sampled_from(["attentions.{}.proj_in", "resnets.{}.conv_shortcut"]))
    name = f"{'up' if up else 'down'}_blocks.{block}.{rest.format(layer)}"
    ldm = diffusers_to_ldm(name, layers_per_block=layers)
    assert ldm_to_diffusers(ldm, layers) == name


@given(
    st.lists(
        st.sampled_from(
            ["down_blocks", "conv_in", "to_q", "time_emb_proj", "0", "17", "proj", "ff", "linear_1"]
        ),
        min_size=1,
    )
)
def test_dots_come_back_from_underscores_unless_two_words_make_a_third(words):
    if not any(f"{a}_{b}" in ("conv_in", "linear_1") for a, b in pairwise(words)):
        assert restore_dots("_".join(words)) == ".".join(words)


@pytest.mark.parametrize("model", ["sdxl", "ssd-1b"])
def test_a_bare_original_name_of_a_unet_is_read(model):
    """OneTrainer's "original" format: `input_blocks.4.1.….lora_A.weight`."""
    for module, (_, _, ldm, _) in keymaps()["unets"][model].items():
        path = module_names.parse_module_path(ldm)
        assert (path.name, path.sgm) == (module, True)


@pytest.mark.parametrize("size", list_sizes([x for f in FAMILIES.values() for x in f.layouts]))
def test_every_name_of_every_size_is_written_as_it_was_read_in_every_spelling(size):
    family = next(one for one in FAMILIES.values() if size in one.layouts)
    for spelling in {*family.spellings.values(), *SPELLINGS.values()}:
        for name in load_layout(size).shapes:
            path = module_names.spell_module(name, spelling, family)
            if path is None:
                continue
            module = module_names.parse_module_path(path, family)
            assert module is not None and name in module.modules, path
            again = module_names.spell_module(module.name, module.spelling, family)
            assert again == path, path


@pytest.mark.parametrize("inside", ["base_model.model.", "diffusion_model.", "transformer."])
@pytest.mark.parametrize("outside", ["transformer.", "base_model.model.", "diffusion_model."])
def test_prefixes_are_cut_off_until_none_is_left(outside, inside):
    name = "transformer_blocks.0.attn.to_q"
    module = module_names.parse_module_path(f"{outside}{inside}{name}", known_families()["flux"])
    assert module is not None and module.name == name
