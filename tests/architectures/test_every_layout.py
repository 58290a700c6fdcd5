"""Every known architecture opens from every form it is published in, with all of its names."""

import pytest
import torch
from checkpoints import (
    clip,
    fused_shapes,
    name_in_ldm,
    open_clip,
    sparse_file,
    sparse_gguf,
    sparse_shards,
)
from diagonal import list_sizes, pair_up

import prolora
from prolora import open_base
from prolora.architectures import layouts
from prolora.architectures.families import known_families

FAMILIES = ("flux1", "sd3", "pixart")
TRANSFORMERS = [id_ for id_ in layouts.known_layouts() if id_.startswith(FAMILIES)]
UNETS = [id_ for id_ in layouts.known_layouts() if "conv_in" in layouts.load_layout(id_).shapes]
# test_family_checkpoints.py has all transformers as single files.
IN_DIFFUSERS = [*list_sizes(UNETS), "flux1-dev", "wan-t2v-14b", "z-image"]
# Parameters that are no layers: their keys have no `.weight`.
BARE = ("_table", "_token", "_tokens", "pos_embed", "emb_pos", "modulation")
FULL = "diffusion_pytorch_model.safetensors"


def shapes_of(id_):
    return dict(layouts.load_layout(id_).shapes)


def keys(shapes):
    """Modules as keys; bare parameters have no `.weight`."""
    return {n if n.endswith(BARE) else f"{n}.weight": shape for n, shape in shapes.items()}


def single_file(id_):
    """The keys of a single-file checkpoint, without prefix."""
    shapes = shapes_of(id_)
    if id_ in TRANSFORMERS:
        return keys(fused_shapes(shapes, id_))
    layers = 1 if id_.startswith(("bk", "koala")) else 2
    named = {name_in_ldm(name, shapes, layers): shape for name, shape in shapes.items()}
    assert len(named) == len(shapes)
    return keys(named)


def assert_complete(base, id_):
    assert base.shapes == shapes_of(id_)
    assert base.layout == id_


@pytest.mark.parametrize("id_", IN_DIFFUSERS)
def test_as_a_diffusers_folder_whole_and_in_shards_and_as_a_file_with_the_prefix_of_its_part(
    id_, tmp_path
):
    part = "unet" if id_ in UNETS else "transformer"
    whole = keys(shapes_of(id_))
    sparse_file(tmp_path / "one" / part / FULL, whole)
    sparse_shards(tmp_path / "two" / part, whole)
    for folder, files in (("one", 1), ("two", 3)):
        base = open_base(tmp_path / folder)
        assert_complete(base, id_)
        assert len(base.files) == files and set(base.dtypes.values()) == {torch.float16}
        last = list(base.shapes)[-1]
        assert tuple(base.read(last).shape) == base.shapes[last]
    stored = {f"{part}.{key}": shape for key, shape in whole.items()}
    assert_complete(open_base(sparse_file(tmp_path / "x.safetensors", stored)), id_)


@pytest.mark.parametrize(
    ("id_", "prefix"), pair_up(UNETS, ["model.diffusion_model.", "diffusion_model.", ""])
)
def test_as_a_single_file_with_and_without_prefix(id_, prefix, tmp_path):
    """Beside another model, as in the files people download."""
    stored = {prefix + key: shape for key, shape in single_file(id_).items()}
    if prefix:
        stored |= {"first_stage_model.decoder.conv_in.weight": (4, 4, 3, 3), "vae.x.weight": (2, 2)}
    base = open_base(sparse_file(tmp_path / "x.safetensors", stored, "BF16"))
    assert_complete(base, id_)
    for name in [next(iter(base.shapes)), *[n for n in base.shapes if "to_v" in n][:1]]:
        weight = base.read(name)
        assert tuple(weight.shape) == base.shapes[name] and weight.dtype == torch.bfloat16


CLIP_L = clip(768, 12, 49408, projection=False)
BIG_G = clip(1280, 32, 49408, projection=True)


def prefixed(prefix, shapes):
    return {prefix + name: shape for name, shape in shapes.items()}


def test_text_encoders_are_found_in_single_files(tmp_path):
    """74 and 195 weights: SD1.5's, SDXL's two with OpenCLIP's names, ComfyUI's names, FLUX's T5."""
    assert (len(CLIP_L), len(BIG_G)) == (74, 195)
    first, second = prefixed("text_encoder.", CLIP_L), prefixed("text_encoder_2.", BIG_G)
    sdxl, sd15 = (prefixed("model.diffusion_model.", single_file(id_)) for id_ in ("sdxl", "sd15"))
    tables = {"position_ids": ("U8", (1, 77))}
    forms = {
        "sd15": (sd15 | prefixed("cond_stage_model.transformer.", keys(CLIP_L)), first),
        "sdxl": (
            sdxl
            | prefixed("conditioner.embedders.0.transformer.", keys(CLIP_L))
            | prefixed("conditioner.embedders.1.model.", open_clip(BIG_G)),
            first | second,
        ),
    }
    comfy = sdxl | prefixed("text_encoders.clip_l.transformer.", keys(CLIP_L))
    comfy |= prefixed("text_encoders.clip_g.transformer.", keys(BIG_G))
    for id_, (stored, encoders) in [*forms.items(), ("sdxl", (comfy, first | second))]:
        base = open_base(sparse_file(tmp_path / "x.safetensors", stored, other=tables))
        assert base.shapes == shapes_of(id_) | encoders
        assert base.layout == id_
    t5 = {"encoder.block.0.layer.0.SelfAttention.q.weight": (64, 64), "shared.weight": (9, 64)}
    flux = single_file("flux1-dev")
    flux |= prefixed("text_encoders.clip_l.transformer.", keys(CLIP_L))
    flux |= prefixed("text_encoders.t5xxl.transformer.", t5)
    base = open_base(sparse_file(tmp_path / "x.safetensors", flux))
    assert base.shapes["text_encoder_2.shared"] == (9, 64)
    assert len(base.shapes) == 504 + 74 + 2 and base.layout == "flux1-dev"


def test_text_encoders_beside_a_folder_are_found_and_pickles_are_left_out(tmp_path):
    sparse_file(tmp_path / "unet" / FULL, keys(shapes_of("sd15")))
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "pytorch_model.bin").write_bytes(b"PK")
    assert open_base(tmp_path).shapes == shapes_of("sd15")
    stored = {name.removeprefix("text_model."): shape for name, shape in keys(CLIP_L).items()}
    encoder = sparse_file(tmp_path / "text_encoder" / "model.safetensors", stored)
    base = open_base(tmp_path)
    assert base.shapes == shapes_of("sd15") | prefixed("text_encoder.", CLIP_L)
    assert encoder in base.files


@pytest.mark.parametrize("id_", ["sdxl", "flux1-dev", "sd3-medium", "pixart-sigma"])
def test_a_check_tells_the_architecture_in_every_form_or_why_it_cannot_be_opened(id_, tmp_path):
    """What it says is what a transfer would open."""
    plain = sparse_file(tmp_path / "plain.safetensors", single_file(id_))
    for path in (plain, sparse_gguf(tmp_path / "x.gguf", single_file(id_))):
        checked = prolora.check(path)
        assert (checked.kind, checked.sizes, checked.reason) == ("base", (id_,), "")
        assert sum(checked.modules.values()) == len(shapes_of(id_))
    assert checked.format == "gguf" and prolora.check(plain).format == "single-file"
    stored = {"double_blocks.0.img_attn.qkv.weight": (25, 8), "img_in.weight": (8, 4)}
    checked = prolora.check(sparse_file(tmp_path / "odd.safetensors", stored))
    assert checked.kind == "base" and "qkv" in checked.reason


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_ace_step_is_found_beside_its_encoders(prefix, tmp_path):
    """As the authors and ComfyUI have it: all of its models in one file."""
    family = known_families()["ace-step-1.5"]
    held = {family.find_weight_holding(n).name: s for n, s in shapes_of("ace-step-1.5").items()}
    stored = {f"{prefix}decoder.{key}": shape for key, shape in keys(held).items()}
    stored[f"{prefix}encoder.lyric_encoder.layers.0.self_attn.q_proj.weight"] = (2048, 2048)
    stored[f"{prefix}null_condition_emb"] = (1, 1, 2048)
    assert_complete(open_base(sparse_file(tmp_path / "x.safetensors", stored)), "ace-step-1.5")
