"""LoRAs as other trainers write them: what is said of them, and what is made of them.

The names come from the trainers' own code (bench/trainer_files), what programs read of them from
the programs' own code (bench/loader_matrix.py PROGRAM CHECKOUT --trainers).
"""

import json

import loader_matrix as matrix
import pytest
import trainer_files
from property_examples import AT_NIGHT

import prolora
from prolora import check
from prolora.adapters.lora import Lora

JUDGED = json.loads(matrix.TRAINERS.read_text("utf-8"))
CELLS = {
    (file.stem, cell.model): cell
    for file in trainer_files.RESULTS.glob("*.json")
    for cell in trainer_files.read_cells(file.stem)[1]
}
EVERY = [(program, row) for program, facts in JUDGED.items() for row in facts["files"]]
FALSE_ALARMS = {
    # Its pipelines for Wan from text stop at the modules that the models from images have.
    ("diffusers", "Wan 2.1 i2v-14B"),
    ("diffusers", "Wan 2.1 flf2v-14B"),
    # It stops at a file that has aliases outside the blocks, which this one has not.
    ("diffusers", "HunyuanVideo, converted by convert_lora.py"),
}
HUNYUAN_15 = ", converted by convert_hunyuan_video_1_5_lora_to_comfy.py"
HUNYUAN_IMAGE = ", converted by convert_hunyuan_image_lora_to_comfy.py"


def open_file(trainer, model):
    """The file of a trainer, with tensors of rank 1."""
    cell = CELLS[trainer, model]
    return Lora.open(cell.make_tensors(rank=1), dict(cell.metadata))


def name_case(case):
    program, row = case
    return f"{program}-{row['model']}"


def test_no_file_is_said_to_be_read_whole_of_which_a_program_leaves_a_module():
    wrong = [
        (p, row) for p, row in EVERY if row["said"] == "whole" and row["read"] < row["modules"]
    ]
    assert not wrong
    assert sum(row["said"] == "whole" for _, row in EVERY) > 100


def test_no_file_is_said_to_be_unread_of_which_a_program_reads_a_module():
    wrong = {(p, row["model"]) for p, row in EVERY if row["said"] == "none" and row["read"]}
    assert wrong == FALSE_ALARMS


def test_what_is_said_to_be_skipped_is_what_the_program_skips():
    parts = [row for _, row in EVERY if row["said"] == "part"]
    assert parts and all(row["modules"] - row["skips"] == row["read"] for row in parts)


@pytest.mark.parametrize("case", EVERY if AT_NIGHT else EVERY[::7], ids=name_case)
def test_check_says_today_what_was_judged(case):
    program, row = case
    found = check(open_file(row["trainer"], row["model"]), program=program)
    assert matrix.tell_said(found) == row["said"]
    assert sum(found.modules.values()) == row["modules"]


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("HunyuanVideo", "ComfyUI applies 360 of 440 updates"),
        ("HunyuanVideo 1.5 t2v", "ComfyUI applies 108 of 756 updates"),
        ("FLUX.1 Kontext, converted by convert_lora.py", "ComfyUI applies 266 of 418 updates"),
    ],
)
def test_a_name_that_the_program_does_not_know_is_counted_as_skipped(model, sentence):
    found = check(open_file("musubi_tuner", model), program="comfyui")
    assert (found.mark, found.headline.startswith(sentence)) == ("⚠", True), str(found)
    written = prolora.convert(open_file("musubi_tuner", model), format="comfyui").state_dict()
    assert check(written, program="comfyui").headline == "ComfyUI applies all of it"


def test_names_that_a_program_was_not_tried_with_are_no_success():
    found = check(open_file("musubi_tuner", "HunyuanVideo"), program="sdcpp")
    assert found.mark == "⚠"
    assert found.headline.startswith("stable-diffusion.cpp was not tried with such a file")


@pytest.mark.parametrize(
    ("program", "trainer", "model", "converted"),
    [
        ("musubi", "musubi_tuner", "HunyuanVideo", ", converted by convert_lora.py"),
        ("musubi", "musubi_tuner", "HunyuanVideo 1.5 t2v", HUNYUAN_15),
        ("sd-scripts", "sd_scripts", "HunyuanImage 2.1", HUNYUAN_IMAGE),
    ],
)
def test_a_file_for_comfyui_gets_the_trainer_s_own_names_back(program, trainer, model, converted):
    own = {*open_file(trainer, model).tensors}
    back = prolora.convert(open_file(trainer, model + converted), format=program)
    assert {*back.state_dict()} == own
    again = prolora.convert(open_file(trainer, model), format=program)
    assert {*again.state_dict()} == own


def test_a_trainer_s_own_file_is_whole_for_the_trainer():
    """Of text encoders, sd-scripts' Gemma and Qwen were not tried."""
    own = {"musubi": "musubi_tuner", "sd-scripts": "sd_scripts"}
    rows = [row for program, row in EVERY if row["trainer"] == own.get(program)]
    rows = [row for row in rows if "converted" not in row["model"] and row["said"] != "not tried"]
    assert len(rows) > 40
    for row in rows:
        assert row["said"] == "whole"
        assert row["read"] == row["read once converted"] == row["modules"]


def test_a_text_encoder_of_chroma_survives_a_conversion():
    """Without its header the result looks like FLUX.1's, which has T5 in another place."""
    lora = open_file("sd_scripts", "Chroma with text encoders")
    written = prolora.convert(lora, format="sd-scripts").state_dict()
    assert len(written) == len(lora.tensors) == 3 * 396
    assert any(key.startswith("lora_te3_") for key in written)
