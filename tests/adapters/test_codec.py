"""Names of modules, read and written from one table a family."""

import itertools

import pytest
import torch
from diagonal import list_sizes
from hypothesis import given
from hypothesis import strategies as st
from lora_files import adapter_for, keymaps

import prolora
from prolora import LowRank
from prolora.adapters.formats.groups import find_codec
from prolora.adapters.keys.codec import ENCODER_PREFIXES, Codec
from prolora.architectures.families import known_families
from prolora.architectures.family import SPELLINGS, UNET_KOHYA
from prolora.architectures.identify import Model
from prolora.architectures.layouts import load_layout
from prolora.architectures.shared_names import find_unet_names
from prolora.errors import UnsupportedFormat

FAMILIES = known_families()
UNETS = ["sd15", "sd21", "sdxl", "ssd-1b", "segmind-vega"]
ANY = Codec()
TO_Q = "transformer_blocks.0.attn.to_q"
NOTHING = LowRank(torch.zeros(1, 1), torch.zeros(1, 1))


@pytest.mark.parametrize("size", list_sizes([x for f in FAMILIES.values() for x in f.layouts]))
def test_every_name_of_every_size_is_written_as_it_was_read_in_every_spelling(size):
    family = next(one for one in FAMILIES.values() if size in one.layouts)
    names = load_layout(size).shapes
    reader = Codec.of(Model.of(family.id), None if family.unet else family)
    writers = [
        find_codec(adapter_for(family.id, dict.fromkeys(names, NOTHING)), format)
        for format in family.spellings
    ]
    if not family.unet:
        further = {*SPELLINGS.values()} - {*family.spellings.values()}
        writers += [Codec(family, spelling=spelling) for spelling in further]
    for writer in writers:
        for name in names:
            if path := writer.write(name):
                module = reader.read(path)
                assert module is not None and name in module.modules, path
                assert writer.write(module.name) == path


@pytest.mark.parametrize("model", UNETS)
def test_every_published_name_of_a_unet_is_read_and_written(model):
    modules = keymaps()["unets"][model]
    names = find_unet_names(modules)
    for part in ("norm", *(f"transformer_blocks.0.norm{i}" for i in (1, 2, 3))):
        place = "down_blocks.1.attentions.0." + part
        path = names.find_weight_holding(place).name
        assert ANY.read(path).name == place and path.endswith(f".1.{part}")
    # What LDM has no name for is in no file of its names, and never written under diffusers'.
    assert Codec(names, spelling=SPELLINGS["kohya"]).write("up_blocks.0.invented") is None
    for module, (kohya, sgm, ldm, _) in modules.items():
        assert ANY.read(kohya)[:5] == (module, "kohya", "unet.", module, False)
        assert ANY.read(sgm)[:5] == (module, "kohya", "unet.", module, True)
        for path in (ldm, f"diffusion_model.{ldm}", module, f"unet.{module}"):
            assert ANY.read(path).name == module
        assert Codec(names, spelling=UNET_KOHYA).write(module) == kohya
        assert Codec(names, spelling=SPELLINGS["kohya"]).write(module) == sgm
        assert Codec(names, spelling=SPELLINGS["comfy"]).write(module) == f"diffusion_model.{ldm}"


@pytest.mark.parametrize("row", [row for row in ENCODER_PREFIXES if row.written is not None])
def test_every_name_of_a_text_encoder_is_written_as_it_was_read(row):
    component = row.component or "text_encoder_3"
    writer, names = Codec(format=row.format, encoders=frozenset({row.written})), row.names[0]
    for pattern in names.list_patterns(dotted=True) & names.authors.keys():
        name = f"{component}.{pattern.replace('N', '7')}"
        path = writer.write(name)
        assert path is not None and path.startswith(row.prefix)
        assert ANY.read(path).name == name


@pytest.mark.parametrize(
    "path",
    [
        "lora_te1_encoder_block_0_layer_0_SelfAttention_q",
        "lora_te3_text_model_encoder_layers_0",
        "lora_unet_down_blocks_0_frobnicate",
        "lora_unet_",
        "lora_te_encoder_layers_0_mlp_fc9",
        "lora_te3_encoder_block_0",
        "lora_unet_to_q",
        "unet.frobnicate",
        "unet",
        "frobnicate.conv_in",
        "transformer",
        "text_encoder",
        "",
        "diffusion_model.input_blocks.3.1.conv",
        "diffusion_model.output_blocks.٣.0.op",
        "text_encoders.t5.transformer.x",
    ],
)
def test_an_unknown_path_is_not_guessed_at(path):
    assert ANY.read(path) is None


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
def test_a_module_that_no_family_knows_keeps_the_name_it_has_in_the_file(path, name):
    for family in (None, *FAMILIES.values()):
        module = Codec(family).read(path)
        assert module.described and module.name == name
        if not (family and family.unet):
            assert Codec(family, spelling=module.spelling).write(name) == path


@given(st.text())
def test_any_text_is_parsed_or_refused_without_an_exception(text):
    for prefix in ("", "lora_unet_", "lora_te_", "diffusion_model.", "unet.", "base_model.model."):
        ANY.read(prefix + text)


def test_prefixes_are_cut_off_until_none_is_left():
    prefixes = ("base_model.model.", "diffusion_model.", "transformer.")
    for outside, inside in itertools.product(prefixes, prefixes):
        path = f"{outside}{inside}{TO_Q}"
        assert Codec(FAMILIES["flux"]).read(path).name == TO_Q, path
    path = "lora_unet_unet_down_blocks_1_attentions_0_proj_in"
    assert ANY.read(path).name == "down_blocks.1.attentions.0.proj_in"


@pytest.mark.parametrize("size", ["koala-1b", "koala-700m", "bk-sdm-small"])
def test_a_unet_of_one_layer_a_block_is_written_in_names_that_comfyui_has_for_it(size):
    """Under the numbers of two layers ComfyUI and diffusers load a part and report nothing."""
    shapes = {name: load_layout(size).shapes[name] for name in load_layout(size).attention}
    updates = {n: LowRank(torch.ones(m, 1), torch.ones(1, k)) for n, (m, k) in shapes.items()}
    adapter = adapter_for(size.rpartition("-")[0], updates)
    starts = ("lora_unet_down_", "lora_unet_up_", "lora_unet_mid")
    written = prolora.convert(adapter, format="kohya").state_dict()
    assert all(key.startswith(starts) for key in written)
    with pytest.raises(UnsupportedFormat, match="no program reads a LoRA for"):
        prolora.convert(adapter, format="comfy").state_dict()
