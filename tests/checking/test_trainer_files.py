"""LoRAs with the names that other trainers write: the verdicts of `check`, and conversions.

The names come from the trainers' own code (bench/trainer_files). What programs read of such files
was counted with the programs' own code (bench/trainer_verdicts.py).
"""

import json

import pytest
import torch
import trainer_files
import trainer_verdicts
from lora_files import attention_lora
from property_examples import AT_NIGHT

import prolora
from prolora import check
from prolora.adapters.lora import Lora
from prolora.errors import UnsupportedFormat

CELLS = {
    (file.stem, cell.model): cell
    for file in trainer_files.RESULTS.glob("*.json")
    for cell in trainer_files.read_cells(file.stem)[1]
}
STORED = json.loads(trainer_verdicts.RESULTS.read_text("utf-8"))
ROWS = [(program, row) for program, facts in STORED.items() for row in facts["files"]]
FALSE_ALARMS = {
    # The pipeline for text-to-video stops at the modules that only image-to-video models have.
    ("diffusers", "Wan 2.1 i2v-14B"),
    ("diffusers", "Wan 2.1 flf2v-14B"),
    ("diffusers", "musubi-tuner: Wan 2.1 i2v-14B"),
    ("diffusers", "musubi-tuner: Wan 2.1 flf2v-14B"),
    # diffusers stops at aliases outside the blocks, which this file does not contain.
    ("diffusers", "HunyuanVideo, converted by convert_lora.py"),
}
MISCOUNTED = {
    # OneTrainer numbers FLUX's T5 as the second encoder, and sd-scripts as the third.
    ("sd-scripts", "FLUX_DEV_1, KOHYA_LORA with text encoders"),
    ("sd-scripts", "FLUX_DEV_1, LEGACY_LORA with text encoders"),
    # Its UNet has `lora_unet_…_lora.down`: sd-scripts reads neither that nor the text encoder.
    ("sd-scripts", "train_dreambooth_lora_sd15_advanced sd15, with text encoders, for ComfyUI"),
}
HUNYUAN_VIDEO = ", converted by convert_lora.py"
HUNYUAN_15 = ", converted by convert_hunyuan_video_1_5_lora_to_comfy.py"
HUNYUAN_IMAGE = ", converted by convert_hunyuan_image_lora_to_comfy.py"
TRAINER_NAMES = [
    ("musubi", "musubi_tuner", "HunyuanVideo", HUNYUAN_VIDEO),
    ("musubi", "musubi_tuner", "HunyuanVideo 1.5 t2v", HUNYUAN_15),
    ("sd-scripts", "sd_scripts", "HunyuanImage 2.1", HUNYUAN_IMAGE),
]


def open_file(trainer, model):
    """The file of a trainer, with tensors of rank 1."""
    cell = CELLS[trainer, model]
    return Lora.open(cell.make_tensors(rank=1), dict(cell.metadata))


def name_case(case):
    program, row = case
    return f"{program}-{row['model']}"


def test_no_verdict_is_a_false_success():
    whole = [row for _, row in ROWS if row["verdict"] == "whole"]
    assert len(whole) > 500
    for row in whole:
        assert row["read"] == row["modules"], row


def test_false_alarms_are_the_known_ones():
    wrong = {(p, row["model"]) for p, row in ROWS if row["verdict"] == "none" and row["read"]}
    assert wrong == FALSE_ALARMS


def test_skipped_count_matches_the_program():
    parts = [(p, row) for p, row in ROWS if row["verdict"] == "part" and row["skips"] is not None]
    assert len(parts) > 80
    wrong = {(p, r["model"]) for p, r in parts if r["modules"] - r["skips"] != r["read"]}
    assert wrong == MISCOUNTED


@pytest.mark.parametrize("case", ROWS if AT_NIGHT else ROWS[::16], ids=name_case)
def test_stored_verdicts_are_those_of_check(case):
    program, row = case
    result = check(open_file(row["trainer"], row["model"]), program=program)
    assert trainer_verdicts.classify(result) == row["verdict"]
    assert trainer_verdicts.count_skips(result) == row["skips"]
    assert sum(result.modules.values()) == row["modules"]


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("HunyuanVideo", "ComfyUI applies 360 of 440 updates"),
        ("HunyuanVideo 1.5 t2v", "ComfyUI applies 108 of 756 updates"),
        ("FLUX.1 Kontext, converted by convert_lora.py", "ComfyUI applies 266 of 418 updates"),
    ],
)
def test_unknown_aliases_are_counted_as_skipped(model, sentence):
    result = check(open_file("musubi_tuner", model), program="comfyui")
    assert (result.mark, result.headline.startswith(sentence)) == ("⚠", True), str(result)
    written = prolora.convert(open_file("musubi_tuner", model), format="comfyui").state_dict()
    assert check(written, program="comfyui").headline == "ComfyUI applies all of it"


def test_uncounted_spelling_is_not_tried():
    result = check(open_file("musubi_tuner", "HunyuanVideo"), program="sdcpp")
    assert result.mark == "⚠"
    assert result.headline.startswith("stable-diffusion.cpp was not tried with such a file")


def test_untried_text_encoder_is_no_success_for_one_of_several_models():
    result = check(open_file("sd_scripts", "Anima with text encoders"), program="sd-scripts")
    assert result.mark == "⚠"
    assert result.headline.startswith("sd-scripts was not tried with such a file")


@pytest.mark.parametrize(
    ("attention", "headline"),
    [
        ("cross_attn", "ComfyUI applies all of it"),
        ("self_attn", "ComfyUI reads nothing of it; `convert()` it with `format=comfyui`"),
    ],
)
def test_wan_fun_is_recognised_by_its_cross_attention(attention, headline):
    """ComfyUI renames `lora_unet__` only if `lora_unet__blocks_0_cross_attn_k` is in the file."""
    tensors = {
        f"lora_unet__blocks_{block}_{attention}_{x}.{end}": tensor
        for block in range(2)
        for x in "qkvo"
        for end, tensor in (
            ("lora_down.weight", torch.ones(1, 5120)),
            ("lora_up.weight", torch.ones(5120, 1)),
            ("alpha", torch.ones(())),
        )
    }
    assert check(tensors, program="comfyui").headline == headline


@pytest.mark.parametrize(("program", "trainer", "model", "converted"), TRAINER_NAMES)
def test_conversion_restores_the_trainers_names(program, trainer, model, converted):
    own = {*open_file(trainer, model).tensors}
    back = prolora.convert(open_file(trainer, model + converted), format=program)
    assert {*back.state_dict()} == own
    again = prolora.convert(open_file(trainer, model), format=program)
    assert {*again.state_dict()} == own


@pytest.mark.parametrize(("program", "trainer", "model", "converted"), TRAINER_NAMES)
def test_conversion_there_and_back_keeps_every_product(program, trainer, model, converted):
    """In the first block, with random factors and a scale of 1/2."""
    del converted
    cell, generator = CELLS[trainer, model], torch.Generator().manual_seed(0)
    paths = [path for path in cell.modules if "_blocks_0_" in path]
    own = {}
    for path in paths:
        out, inputs = cell.modules[path]
        own[f"{path}.lora_down.weight"] = torch.randn(2, inputs, generator=generator)
        own[f"{path}.lora_up.weight"] = torch.randn(out, 2, generator=generator)
        own[f"{path}.alpha"] = torch.tensor(1.0)
    source = Lora.open(own, dict(cell.metadata))
    there = prolora.convert(source, format="comfyui", dtype="float32").state_dict()
    assert own.keys() - there.keys()
    back = prolora.convert(
        Lora.open(there, dict(cell.metadata)), format=program, dtype="float32"
    ).state_dict()
    assert back.keys() == own.keys()
    for path in paths:
        before, after = multiply(own, path), multiply(back, path)
        assert torch.allclose(before, after, atol=1e-4), path


def multiply(tensors, path):
    """The first 64 columns of alpha / rank · up · down."""
    up, down = tensors[f"{path}.lora_up.weight"], tensors[f"{path}.lora_down.weight"]
    return tensors[f"{path}.alpha"] / len(down) * (up @ down[:, :64])


def test_trainers_read_their_own_files_whole():
    """Without the text encoders of which nothing was tried: Gemma and Qwen."""
    own = {"musubi": "musubi_tuner", "sd-scripts": "sd_scripts"}
    rows = [row for program, row in ROWS if row["trainer"] == own.get(program)]
    untried = ("not tried", "ambiguous")
    rows = [r for r in rows if "converted" not in r["model"] and r["verdict"] not in untried]
    assert len(rows) > 40
    for row in rows:
        assert row["verdict"] == "whole"
        assert row["read"] == row["read once converted"] == row["modules"]


def test_chroma_lora_with_t5_can_be_converted():
    """Without a header the result resembles FLUX.1's, whose T5 is the second text encoder."""
    lora = open_file("sd_scripts", "Chroma with text encoders")
    written = prolora.convert(lora, format="sd-scripts").state_dict()
    assert len(written) == len(lora.tensors) == 3 * 396
    assert any(key.startswith("lora_te3_") for key in written)


@pytest.mark.parametrize(
    ("trainer", "model", "program", "mark", "headline"),
    [
        (
            "onetrainer",
            "STABLE_DIFFUSION_15, DIFFUSERS_LORA",
            "comfyui",
            "⚠",
            "ComfyUI applies 154 of 282 updates, and skips 128",
        ),
        (
            "diffusers_scripts",
            "train_text_to_image_lora sd15",
            "comfyui",
            "✖",
            "ComfyUI reads nothing of it; `convert()` it",
        ),
        (
            "diffusers_scripts",
            "train_dreambooth_lora_sdxl sdxl, for ComfyUI",
            "sd-scripts",
            "✖",
            "sd-scripts reads nothing of it; `convert()` it",
        ),
        (
            "onetrainer",
            "FLUX_2 klein 4B, LEGACY_LORA",
            "diffusers",
            "✖",
            "diffusers reads nothing of it; `convert()` it",
        ),
        (
            "simpletuner",
            "anima anima, diffusers",
            "comfyui",
            "✖",
            "ComfyUI reads nothing of it; `convert()` it",
        ),
    ],
)
def test_spelling_of_each_trainer_is_judged_by_itself(trainer, model, program, mark, headline):
    lora = open_file(trainer, model)
    result = check(lora, program=program)
    assert (result.mark, result.headline.startswith(headline)) == (mark, True), result.headline
    written = prolora.convert(lora, format=program, dtype="float32")
    assert check(written.state_dict(), program=program).mark == "✔"


@pytest.mark.parametrize("end", ["", " with text encoders"])
@pytest.mark.parametrize("form", ["KOHYA_LORA", "DIFFUSERS_LORA", "LEGACY_LORA"])
def test_stable_cascade_is_of_no_known_family(form, end):
    result = check(open_file("onetrainer", f"STABLE_CASCADE_1 3.6B, {form}{end}"))
    assert result.mark == "✖"
    assert result.headline.startswith(
        "it is a LoRA for Stable Cascade, of no family that prolora knows; "
    )


@pytest.mark.parametrize("model", ["NucleusImageModel", "PRXPixelT2IModel"])
def test_unknown_families_say_so(model):
    result = check(open_file("ai_toolkit", model), program="comfyui")
    assert result.headline.startswith("ComfyUI was not tried with a model of no known family")


def test_lora_of_an_unknown_size_is_not_a_language_models():
    """ERNIE-Image with the 24 layers of 3072 that diffusers' class has by default."""
    names = [
        f"transformer.layers.{i}.{name}"
        for i in range(24)
        for name in ("self_attention.to_q", "mlp.gate_proj")
    ]
    result = check(
        {
            f"{name}.lora_{factor}.weight": torch.ones(shape)
            for name in names
            for factor, shape in (("A", (1, 3072)), ("B", (3072, 1)))
        }
    )
    assert result.mark == "⚠" and result.named == ("ernie-image",)
    assert "language model" not in result.headline


def test_hidream_o1_is_known_with_the_prefix_of_its_model():
    names = [f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(36)]
    result = check(
        {
            f"{name}.lora_{factor}.weight": torch.ones(shape)
            for name in names
            for factor, shape in (("A", (1, 4096)), ("B", (4096, 1)))
        }
    )
    assert result.families == ("hidream-o1",)


def test_attention_processors_of_old_diffusers_are_read_by_comfyui():
    """`attn1.processor.to_k_lora.down.weight`, of which ComfyUI reads all 128 updates."""
    plain = open_file("diffusers_scripts", "train_text_to_image_lora sd15")
    tensors = {}
    for key in plain.tensors:
        path, _, end = key.partition(".lora.")
        attention, _, name = path.removesuffix(".0").rpartition(".")
        tensors[f"{attention}.processor.{name}_lora.{end}"] = plain.read(key)
    assert len(tensors) == 256
    result = check(tensors, program="comfyui")
    assert result.headline == "ComfyUI applies all of it"


def test_advice_names_the_base_where_two_models_fit():
    """LTX-Video's self-attention has the names and sizes of Anima's, which ComfyUI calls others."""
    lora = {
        key: tensor.clone() for key, tensor in attention_lora("ltxv-2b").items() if ".attn1." in key
    }
    result = check(lora, program="comfyui")
    assert result.headline == (
        "ComfyUI reads nothing of it; `convert()` it with `format=comfyui` and its base model"
    )
    with pytest.raises(UnsupportedFormat, match="give the LoRA's base model, too"):
        prolora.convert(lora, format="comfyui")
    written = prolora.convert(lora, "ltxv-2b", format="comfyui").state_dict()
    assert len(written) == len(lora) == 224
    assert all(key.startswith("diffusion_model.") for key in written)
