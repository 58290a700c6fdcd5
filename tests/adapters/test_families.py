"""Which family a LoRA is for, by blocks, shapes, names and header: never the wrong one."""

import pytest
import torch
from lora_files import adapter_for

import prolora
from prolora import LowRank, check
from prolora.architectures.layouts import load_layout
from prolora.architectures.modules import matrix_shape


def dotted(prefix):
    return lambda name: f"{prefix}{name}.lora_{{}}.weight", "BA"


def underscored(prefix):
    return lambda name: f"{prefix}{name.replace('.', '_')}.lora_{{}}.weight", ("up", "down")


TRANSFORMER = dotted("transformer.")


def spell_lora(shapes, spelling=TRANSFORMER):
    """A LoRA of rank 1 on modules of these sizes."""
    name_key, (up, down) = spelling
    tensors = {}
    for name, (out, inputs) in shapes.items():
        tensors[name_key(name).format(up)] = torch.zeros(1).expand(out, 1)
        tensors[name_key(name).format(down)] = torch.zeros(1).expand(1, inputs)
    return tensors


def ask(shapes, claim=None, spelling=TRANSFORMER):
    """What `check` says of such a LoRA with a claim in its header."""
    header = {"ss_base_model_version": claim} if claim else {}
    return check(prolora.Lora.open(spell_lora(shapes, spelling), header))


def list_shapes(layout, keep=lambda name: True):
    """Module -> (out, in) of the linear layers of a published size."""
    shapes = load_layout(layout).shapes.items()
    return {name: shape for name, shape in shapes if len(shape) == 2 and keep(name)}


def write_lora(layout, family, format, keep):
    """A LoRA of rank 1 as prolora writes it."""
    updates = {
        name: LowRank(torch.zeros(out, 1), torch.zeros(1, inputs))
        for name, (out, inputs) in list_shapes(layout, keep).items()
    }
    return prolora.convert(adapter_for(family, updates), format=format).state_dict()


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
    answer = ask(dict.fromkeys(names, (width, width))).families
    assert set(families.split()) <= set(answer) and (families or not answer)


def test_a_module_beside_the_blocks_of_other_channels_hides_no_family():
    shapes = load_layout("wan-t2v-14b").shapes.items()
    known = {n: matrix_shape(s) for n, s in shapes if n.startswith("blocks.")}
    answer = ask(known | {"patch_embedding": (5120, 37)})
    assert answer.families == ("wan",) and "wan-t2v-14b" in answer.sizes


def test_metadata_decide_between_families_of_equal_sizes_and_add_no_other():
    shapes = {"single_transformer_blocks.37.attn.to_q": (3072, 3072)}
    fitting = ask(shapes)
    assert "flux" in fitting.families and len(fitting.families) > 1
    assert ask(shapes, "flux1").families == ("flux",)
    other = ask(shapes, "qwen_image")
    assert (other.families, other.family_claimed) == (fitting.families, "qwen-image")
    wider = {"single_transformer_blocks.37.attn.to_q": (100, 100)}  # of no published size
    assert ask(wider, "flux1").named == ("flux",)
    assert ask(wider, "wan").named == ask(wider).named != ("wan",)


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
    assert ask({name: shape}).named == (family,)


ANIMA = {
    "kohya": ("lora_unet_blocks_0_self_attn_q_proj", "lora_te_"),
    "comfy": (
        "diffusion_model.blocks.0.self_attn.q_proj",
        "text_encoders.qwen3_06b.transformer.model.",
    ),
    "diffusers": ("transformer.transformer_blocks.0.attn1.to_q", "text_encoder."),
}


@pytest.mark.parametrize("format", ANIMA)
def test_the_text_encoder_of_anima_is_read_and_written_by_every_name(format):
    """sd-scripts trains Qwen3; there may be more of it than of the transformer."""
    leaves = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
    inside = [f"layers.{i}.{leaf}" for i in range(3) for leaf in (*leaves, "mlp.down_proj")]
    main, start = ANIMA[format]
    shapes = {main: (2048, 2048)}
    shapes |= {
        start + (name.replace(".", "_") if format == "kohya" else name): (1024, 1024)
        for name in inside
    }
    tensors = spell_lora(shapes, underscored("") if format == "kohya" else dotted(""))
    tensors = {key: torch.ones(x.shape) for key, x in tensors.items()}
    converted = prolora.convert(prolora.Lora.open(tensors, {"ss_base_model_version": "anima"}))
    names = ["transformer_blocks.0.attn1.to_q", *(f"text_encoder.{name}" for name in inside)]
    assert list(converted.adapter.updates) == names and not converted.report.left_out
    assert converted.adapter.model.family == "cosmos"
    assert {key for key in converted.state_dict() if not key.endswith("alpha")} == tensors.keys()
    others = {name: converted.state_dict(name) for name in ANIMA}
    for name, other in others.items():
        assert any(key.startswith(ANIMA[name][1]) for key in other)
    scripts = {
        k.replace("text_encoder.", "text_encoder.qwen3."): t for k, t in others["diffusers"].items()
    }
    assert prolora.convert(scripts).adapter.updates.keys() == converted.adapter.updates.keys()


def test_a_lora_without_modulation_is_for_flux_or_chroma_and_not_for_hunyuan_video():
    adapted = set(load_layout("flux1-dev").adapted)
    checked = check(write_lora("flux1-dev", "flux", "kohya", adapted.__contains__))
    assert checked.families == ("flux", "chroma")
    assert "Forge" in checked.readers.whole  # which has both
    assert "InvokeAI" not in checked.readers.part + checked.readers.none  # which reads FLUX.1 whole


def test_a_lokr_has_the_shape_of_its_product():
    """18432 × 6144 is FLUX.2 dev's fused q, k and v and nobody else's."""
    shapes = {"w1": (16, 16), "w2_a": (1152, 4), "w2_b": (4, 384)}
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = {f"{name}.lokr_{role}": torch.zeros(shape) for role, shape in shapes.items()}
    assert check(tensors | {f"{name}.alpha": torch.tensor(4.0)}).families == ("flux2",)


@pytest.mark.parametrize(
    ("layout", "part"), [("ltx2", ".audio_attn1"), ("ideogram4", ".feed_forward")]
)
def test_modules_that_everybody_calls_the_same_leave_the_file_in_comfyuis_format(layout, part):
    checked = check(write_lora(layout, layout, "comfy", lambda name: part in name))
    assert checked.family == layout and "ComfyUI" in checked.readers.whole
    assert "diffusers" in checked.readers.whole + checked.readers.part


def test_the_prefix_of_diffsynths_pipelines_is_cut_off():
    shapes = {f"blocks.{i}.self_attn.q": (5120, 5120) for i in range(4)}
    name_key, sides = dotted("pipe.dit.")
    spelling = lambda name: name_key(name).replace(".weight", ".default.weight"), sides
    answer = ask(shapes, spelling=spelling)
    assert answer.family == "wan" and not answer.reason
    moved = prolora.convert(spell_lora(shapes, spelling), format="comfy").state_dict()
    assert "diffusion_model.blocks.3.self_attn.q.lora_A.weight" in moved


def test_what_one_program_reads_makes_no_family_certain():
    """A first block's attention as OneTrainer spells it; Qwen-Image has the same shapes."""
    leaves = ("to_q", "to_k", "to_v", "add_q_proj")
    shapes = {f"transformer_blocks.0.attn.{leaf}": (3072, 3072) for leaf in leaves}
    answer = ask(shapes, spelling=underscored("lora_transformer_"))
    assert answer.family is None and {"flux", "qwen-image"} <= set(answer.families)
    claimed = ask(shapes, "qwen-image", underscored("lora_transformer_"))
    assert claimed.families == ("qwen-image",)


def test_nobody_is_said_to_read_a_kind_that_was_not_tried():
    key = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    checked = check({f"{key}.lokr_w1": torch.ones(4, 4), f"{key}.lokr_w2": torch.ones(160, 512)})
    assert checked.family == "sdxl" and checked.readers == (("ComfyUI",), (), ("diffusers",), ())


@pytest.mark.parametrize(
    ("layout", "spelling"),
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
def test_trainers_spellings_of_hidream_o1_and_omnigen2_are_recognised(layout, spelling):
    adapted = set(load_layout(layout).adapted)
    answer = ask(list_shapes(layout, adapted.__contains__), spelling=spelling)
    assert answer.families == (layout,)
    assert not answer.reason and set(answer.modules) == {"transformer"}


def test_musubis_hidream_o1_keeps_its_spelling_and_comfyuis_gets_no_prefix():
    adapted = set(load_layout("hidream-o1").adapted)
    shapes = list_shapes("hidream-o1", adapted.__contains__)
    lora = spell_lora(shapes, underscored("lora_unet_model_"))
    assert {"musubi-tuner", "ComfyUI"} <= {*check(lora).readers.none}  # musubi wants alphas
    converted = prolora.convert(lora)
    assert "musubi-tuner" in check(converted.state_dict()).readers.whole
    assert all(key.startswith("lora_unet_model_") for key in converted.state_dict())
    key = "diffusion_model.language_model.layers.0.mlp.up_proj.lora_A.weight"
    assert key in converted.state_dict("comfyui")


def test_blocks_of_chroma_are_also_those_of_its_radiance():
    blocks = write_lora("chroma-radiance", "chroma", "comfy", lambda n: "transformer_blocks." in n)
    checked = check(blocks)
    assert "chroma" in checked.families and "ComfyUI" in checked.readers.whole
    checked = check(write_lora("chroma-radiance", "chroma", "comfy", lambda name: "nerf" in name))
    assert checked.families == ("chroma",) and "Forge" in checked.readers.none


@pytest.mark.parametrize("layout", ["cogvideox-2b", "cogvideox1.5-5b"])
def test_a_transformer_with_a_module_that_unets_have_too_is_recognised(layout):
    shapes = list_shapes(layout)
    assert "time_embedding.linear_1" in shapes and ask(shapes).families == ("cogvideox",)
    assert ask(list_shapes(layout, lambda n: n.startswith("time_embedding"))).families == ()
