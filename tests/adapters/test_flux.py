"""FLUX in every spelling, against diffusers' own converters, at the widths of FLUX."""

import gzip
import json
from functools import cache

import pytest
import torch
from family_loras import measure_difference
from lora_files import DATA, adapter_for, factors, pair, save

import prolora
from prolora import LowRank
from prolora.adapters import fused_updates
from prolora.adapters.keys.codec import Codec
from prolora.architectures.families import known_families
from prolora.architectures.family import COMFY, KOHYA, Spelling
from prolora.architectures.identify import Model
from prolora.errors import ShapeMismatch, UnsupportedFormat

FLUX = known_families()["flux"]
ONETRAINER = Spelling("lora_transformer_", "diffusers", dotted=False)

WIDTH = 3072
FUSED = ("double_blocks.0.img_attn.qkv", "double_blocks.3.txt_attn.qkv", "single_blocks.7.linear1")
PLAIN = (
    "double_blocks.0.img_attn.proj",
    "double_blocks.0.txt_mod.lin",
    "double_blocks.3.txt_mlp.2",
    "single_blocks.7.linear2",
    "single_blocks.37.modulation.lin",
    "time_in.in_layer",
    "img_in",
    "final_layer.linear",
    "final_layer.adaLN_modulation.1",
)


@cache
def keymap():
    """{module: [original name, rows, kohya, OneTrainer, shape]} of the whole model."""
    return json.loads(gzip.decompress((DATA.parent / "flux_names.json.gz").read_bytes()))


def original_shape(name):
    """[out, in] of a weight of the original checkpoint."""
    parts = [entry for entry in keymap().values() if entry[0] == name]
    return sum(entry[4][0] for entry in parts), parts[0][4][1]


def through_diffusers(tensors):
    """Module -> update as diffusers converts a FLUX file; factors in float32, values as stored."""
    from diffusers import FluxPipeline

    given = {key: tensor.float() for key, tensor in tensors.items()}
    state, alphas = FluxPipeline.lora_state_dict(given, return_alphas=True)
    assert not alphas
    found = {}
    for key, down in state.items():
        if ".lora_A." in key:
            name = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
            found[name] = LowRank(state[key.replace("lora_A", "lora_B")], down)
    return found


def same(adapter, expected, tolerance=1e-6):
    assert set(adapter.updates) == set(expected)
    for name, update in adapter.updates.items():
        assert measure_difference(update, expected[name]) < tolerance, name


def kohya_flux(alpha=None, dtype=torch.float32):
    """A LoRA in sd-scripts' spelling; alpha is None or a function of rank and number."""
    tensors = {}
    for seed, name in enumerate((*FUSED, *PLAIN)):
        stem, rank = "lora_unet_" + name.replace(".", "_"), 4 + seed % 3
        tensors |= pair(stem, original_shape(name), rank, seed, dtype)
        # diffusers drops the alphas of the last layer, so they are 1 here.
        if alpha is not None and not name.startswith("final_layer"):
            tensors[f"{stem}.alpha"] = torch.tensor(float(alpha(rank, seed)), dtype=dtype)
    return tensors


ALPHAS = {
    "absent": None,
    "rank": lambda rank, _: rank,
    "half the rank": lambda rank, _: rank / 2,
    "mixed": lambda rank, seed: 1 + seed % 4,
}


@pytest.mark.parametrize(("alpha", "dtype"), [("absent", torch.float16), ("mixed", torch.bfloat16)])
def test_a_kohya_file_has_the_updates_that_diffusers_reads(tmp_path, alpha, dtype):
    tensors = kohya_flux(alpha=ALPHAS[alpha], dtype=dtype)
    adapter = prolora.convert(save(tmp_path / "lora", tensors)).adapter
    assert (adapter.format, adapter.spelling, adapter.dtype) == ("kohya", "sgm", dtype)
    same(adapter, through_diffusers(tensors))


def test_a_block_diagonal_update_comes_apart_into_the_ranks_it_was_trained_with():
    expected = {}
    for name, rank in (("double_blocks.0.img_attn.qkv", 2), ("single_blocks.1.linear1", 3)):
        matrix = FLUX.find_weight(name)
        for seed, (part, share) in enumerate(zip(matrix.parts, matrix.shares, strict=True)):
            expected[part] = LowRank(*factors((share * WIDTH, WIDTH), rank, seed))
    tensors = prolora.convert(adapter_for("flux", expected), format="kohya").state_dict()
    ranks = [len(x) for key, x in tensors.items() if "lora_down" in key]
    assert ranks == [2 * 3, 3 * 4]
    adapter = prolora.convert(tensors).adapter
    assert {name: u.rank for name, u in adapter.updates.items()} == {
        name: u.rank for name, u in expected.items()
    }
    same(adapter, expected)
    same(adapter, through_diffusers(tensors))


def test_an_xlabs_file_has_the_updates_that_diffusers_reads():
    tensors = {}
    for stem, shape in {
        "double_blocks.0.processor.qkv_lora1": (3 * WIDTH, WIDTH),
        "double_blocks.0.processor.qkv_lora2": (3 * WIDTH, WIDTH),
        "double_blocks.11.processor.proj_lora1": (WIDTH, WIDTH),
        "double_blocks.11.processor.proj_lora2": (WIDTH, WIDTH),
        "single_blocks.37.processor.qkv_lora": (3 * WIDTH, WIDTH),
        "single_blocks.37.processor.proj_lora": (WIDTH, 5 * WIDTH),
    }.items():
        tensors |= pair(stem, shape, 4, len(tensors), torch.bfloat16, ends=("up", "down"))
    adapter = prolora.convert(tensors).adapter
    assert adapter.format == "diffusers"
    same(adapter, through_diffusers(tensors))


def test_a_control_lora_of_the_authors_is_read_with_its_bias_and_its_norms_named():
    originals = dict.fromkeys(entry[0] for entry in keymap().values())
    tensors = {}
    for seed, name in enumerate(originals):
        tensors |= pair(name, original_shape(name), 2, seed, ends=("lora_B", "lora_A"))
    parts = [f"double_blocks.{i}.{stream}_attn" for i in range(19) for stream in ("img", "txt")]
    parts += [f"single_blocks.{i}" for i in range(38)]
    norms = [f"{part}.norm.{norm}.scale" for part in parts for norm in ("query_norm", "key_norm")]
    bias = "double_blocks.4.img_mlp.0.lora_B.bias"
    extra = {key: torch.ones(128) for key in norms} | {bias: torch.ones(4 * WIDTH)}
    made = prolora.convert(tensors | extra)
    adapter = made.adapter
    expected = through_diffusers(tensors | extra)
    assert len(adapter.updates) == 504
    # diffusers swaps the halves of `down` of the last layer too, which are no rows of the weight.
    del expected["norm_out.linear"]
    last = adapter.updates.pop("norm_out.linear")
    same(adapter, expected)
    shift, scale = tensors["final_layer.adaLN_modulation.1.lora_B.weight"].chunk(2)
    down = tensors["final_layer.adaLN_modulation.1.lora_A.weight"]
    assert measure_difference(last, LowRank(torch.cat([scale, shift]), down)) < 1e-6
    assert set(made.report.left_out) == set(norms)
    assert list(adapter.vectors) == ["transformer_blocks.4.ff.net.0.proj.bias"]


def test_the_original_names_of_one_trainer_are_read_part_by_part():
    """Its "OMI" format: BFL's names, q, k and v counted from 0, and names of its own outside."""
    clip, t5 = "text_encoder.text_model", "text_encoder_2.encoder.block.0"
    modules = {
        "transformer.double_blocks.0.img_attn.qkv.1": "transformer_blocks.0.attn.to_k",
        "transformer.double_blocks.3.txt_attn.qkv.2": "transformer_blocks.3.attn.add_v_proj",
        "transformer.double_blocks.3.img_mlp.0": "transformer_blocks.3.ff.net.0.proj",
        "transformer.single_blocks.7.linear1.0": "single_transformer_blocks.7.attn.to_q",
        "transformer.single_blocks.7.linear1.3": "single_transformer_blocks.7.proj_mlp",
        "transformer.img_in.proj": "x_embedder",
        "transformer.final_layer.adaLN_modulation.1": "norm_out.linear",
        "clip_l.text_model.encoder.layers.0.mlp.fc1": f"{clip}.encoder.layers.0.mlp.fc1",
        "t5.encoder.block.0.layer.0.SelfAttention.q": f"{t5}.layer.0.SelfAttention.q",
    }
    tensors, expected = {}, {}
    for seed, (stem, module) in enumerate(modules.items()):
        up, down = factors((16, 6), 2, seed)
        tensors |= pair(stem, (16, 6), 2, seed) | {f"{stem}.alpha": torch.tensor(1.0)}
        if module == "norm_out.linear":
            up = torch.cat(up.chunk(2)[::-1])
        expected[module] = LowRank(up / 2, down)
    same(prolora.convert(tensors).adapter, expected)


PROJ, FC1 = "down_blocks.1.attentions.0.proj_in", "text_model.encoder.layers.0.mlp.fc1"
T5_Q, TO_Q = "encoder.block.0.layer.0.SelfAttention.q", "transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("path", "module"),
    [
        *((f"{start}{PROJ}", PROJ) for start in ("lora_unet.", "diffusion_model.")),
        *((f"{x}input_blocks.4.1.proj_in", PROJ) for x in ("unet.", "model.diffusion_model.")),
        *((f"lora_te1.{FC1}", f"text_encoder.{FC1}"), (f"clip_g.{FC1}", f"text_encoder_2.{FC1}")),
        (f"lora_te2.{T5_Q}", f"text_encoder_2.{T5_Q}"),
        *((f"lora_transformer.{TO_Q}", TO_Q), ("lora_unet_transformer_blocks_0_attn_to_q", TO_Q)),
    ],
)
def test_dots_of_one_trainer_and_other_prefixes_are_read(path, module):
    lora = prolora.Lora.open(pair(path, (6, 5), 2), {"ss_base_model_version": "flux1"})
    assert list(prolora.convert(lora).adapter.updates) == [module]


def test_every_module_has_its_name_and_rows_in_every_spelling():
    for module, (original, rows, kohya, onetrainer, shape) in keymap().items():
        matrix = FLUX.find_weight_holding(module)
        assert matrix.name == original and FLUX.find_weight(original) == matrix
        heights = fused_updates.split_rows(matrix, original_shape(original)[0], "here")
        top = sum(heights[: matrix.parts.index(module)])
        assert [top, top + shape[0]] == (rows or [0, shape[0]])
        for path in (
            kohya,
            onetrainer,
            f"diffusion_model.{original}",
            f"transformer.{module}",
            f"base_model.model.{module}",
            original,
            f"base_model.model.{original}",
            onetrainer.replace("lora_transformer_", "lycoris_"),
        ):
            assert module in Codec.of(Model.of("flux"), FLUX).read(path).modules, path
        assert Codec(FLUX, spelling=KOHYA).write(module) == kohya
        assert Codec(FLUX, spelling=ONETRAINER).write(module) == onetrainer
        assert Codec(FLUX, spelling=COMFY).write(module) == f"diffusion_model.{original}"


@pytest.mark.parametrize(
    ("format", "dtype"), [("kohya", torch.float16), ("diffusers", torch.float32)]
)
def test_diffusers_reads_what_is_written(format, dtype):
    tensors = kohya_flux(alpha=ALPHAS["half the rank"])
    converted = prolora.convert(tensors, format=format, dtype=dtype)
    tolerance = max(8 * torch.finfo(dtype).eps, 1e-6)
    same(prolora.convert(converted.state_dict()).adapter, converted.adapter.updates, tolerance)
    if format == "kohya":  # the ranks of fused weights are kept
        further = {f"lora_unet_final_layer_{x}.alpha" for x in ("linear", "adaLN_modulation_1")}
        assert converted.state_dict().keys() - tensors.keys() == further
        assert all(converted.state_dict()[key].shape == tensors[key].shape for key in tensors)
    # A transfer changes q, k and v apart from each other, and may leave one of them out.
    updates = {
        name: LowRank(update.up, update.down + 0.1 * i)
        for i, (name, update) in enumerate(converted.adapter.updates.items())
        if name not in ("transformer_blocks.3.attn.add_k_proj", "norm_out.linear")
    }
    moved = prolora.convert(converted.adapter.with_updates(updates), format=format, dtype=dtype)
    read = through_diffusers(moved.state_dict())
    left_over = read.pop("transformer_blocks.3.attn.add_k_proj", None)
    assert left_over is None or left_over.norm() == 0
    same(moved.adapter.with_updates(read), updates, tolerance)


@pytest.mark.parametrize("smallest", [1e-3, 1e-6, 1e-9])
def test_a_small_part_of_a_fused_weight_is_rounded_as_the_whole_is(smallest):
    """Float16 has few digits left for it, or none, and so it would in any file of this format."""
    down = 0.1 * factors((8, 12), 4, 0)[1]
    updates = {
        f"transformer_blocks.0.attn.to_{part}": LowRank(
            0.05 * size * factors((12, 8), 4, i)[0], down
        )
        for i, (part, size) in enumerate({"q": 1.0, "k": 0.1, "v": smallest}.items())
    }
    adapter = adapter_for("flux", updates, spelling="sgm")
    written = prolora.convert(adapter, dtype="float16").state_dict()
    back = prolora.convert(written).adapter.updates
    whole = sum(update.norm() for update in updates.values())
    for name, update in updates.items():
        read = back[name].dense() if name in back else 0
        assert (read - update.dense()).norm() < 2e-3 * whole


def test_attention_that_several_families_have_gets_no_names_of_one_of_them():
    """Unless the base tells: FLUX, SD3, Qwen-Image and others share diffusers' names."""
    updates = {TO_Q: LowRank(*factors((8, 8), 1, 0))}
    with pytest.raises(UnsupportedFormat, match=r"can be of .*FLUX.*different names"):
        prolora.convert(prolora.Adapter(updates, format="diffusers"), format="kohya")
    for family, path in (
        ("flux", "lora_unet_double_blocks_0_img_attn_qkv"),
        ("qwen-image", "lora_unet_transformer_blocks_0_attn_to_q"),
    ):
        keys = prolora.convert(adapter_for(family, updates), format="kohya").state_dict()
        assert {key.partition(".")[0] for key in keys} == {path}


@pytest.mark.parametrize(
    ("name", "height"),
    [
        ("double_blocks_0_img_attn_qkv", 10),
        ("single_blocks_0_linear1", 12),
        ("final_layer_adaLN_modulation_1", 5),
    ],
)
def test_rows_that_do_not_come_out_even_are_refused(name, height):
    with pytest.raises(ShapeMismatch, match=f"lora_unet_{name}"):
        prolora.convert(pair(f"lora_unet_{name}", (height, 4), 2))


def test_a_module_in_a_fused_weight_and_on_its_own_is_refused():
    tensors = pair("lora_unet_double_blocks_0_img_attn_qkv", (9, 4), 2)
    tensors |= pair("lora_transformer_transformer_blocks_0_attn_to_k", (3, 4), 2)
    with pytest.raises(UnsupportedFormat, match=r"both update transformer_blocks\.0\.attn\.to_k"):
        prolora.convert(tensors)


def test_t5_is_the_second_text_encoder_of_flux_and_the_third_beside_a_second_clip():
    """Whatever it is called."""
    flux, clip = "lora_unet_single_blocks_0_linear2", "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    for key, beside, number in (
        (f"lora_te3_{T5_Q.replace('.', '_')}", flux, 2),
        (f"lora_te2_{T5_Q.replace('.', '_')}", flux, 2),
        (f"text_encoders.t5xxl.transformer.{T5_Q}", flux, 2),
        (f"text_encoder_3.{T5_Q}", flux, 3),
        (f"lora_te3_{T5_Q.replace('.', '_')}", clip, 3),
    ):
        adapter = prolora.convert(pair(key, (4, 4), 2) | pair(beside, (4, 4), 2)).adapter
        assert next(iter(adapter.updates)) == f"text_encoder_{number}.{T5_Q}"


@pytest.mark.parametrize("prefix", ["lora_transformer_", "lycoris_"])
def test_kohya_asked_for_by_name_has_kohyas_own_names(prefix):
    """kohya's scripts find no module under diffusers' names, which OneTrainer and others write."""
    stems = [f"{prefix}transformer_blocks_0_attn_to_{part}" for part in "qkv"]
    tensors = {}
    for seed, stem in enumerate(stems):
        tensors |= pair(stem, (WIDTH, WIDTH), 1, seed)
    converted = prolora.convert(prolora.Lora.open(tensors, {"ss_base_model_version": "flux1"}))
    fused = ["lora_unet_double_blocks_0_img_attn_qkv"]
    for format, paths in (("auto", stems), ("kohya", fused)):
        written = prolora.convert(converted.adapter, format=format).state_dict()
        assert {key.partition(".")[0] for key in written} == {*paths}
        same(prolora.convert(written).adapter, converted.adapter.updates)
