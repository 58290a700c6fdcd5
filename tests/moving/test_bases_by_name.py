"""Bases given by their names alone: what `check` says of them, and a transfer without weights."""

import json

import pytest
import torch
from lora_files import attention_lora
from safetensors import safe_open
from safetensors.torch import save_file

import prolora
from prolora import check
from prolora.errors import InvalidOption, MissingFile, UnsupportedFormat


def lora_for(layout):
    """A LoRA of rank 1 on the attention of a published size."""
    tensors = attention_lora(layout, "unet." if layout == "sdxl" else "transformer.")
    return {key: x.clone() for key, x in tensors.items()}


@pytest.mark.parametrize(
    ("layout", "name", "sentence"),
    [
        ("sdxl", "pony", "for Pony Diffusion V6 XL (loads SDXL files as they are): "),
        ("sdxl", "Illustrious XL", "for Illustrious XL (loads SDXL files as they are): "),
        ("sdxl", "noobai", "for NoobAI-XL (loads SDXL files as they are): "),
        ("z-image", "z-image-turbo", "for Z-Image-Turbo (loads Z-Image files as they are): "),
        ("krea2", "krea2-turbo", "for Krea 2 Turbo (loads Krea 2 files as they are): "),
        (
            "qwen-image",
            "qwen-image-edit-2511",
            "for Qwen-Image-Edit-2511 (loads Qwen-Image files as they are): ",
        ),
        ("wan2.2-ti2v-5b", "wan2.2", "for Wan 2.2 TI2V 5B: "),
        ("flux1-dev", "FLUX.1-dev", "for FLUX.1 [dev]: "),
    ],
)
def test_names_of_fine_tunes_are_known(layout, name, sentence):
    result = check(lora_for(layout), base=name)
    assert result.base_match.sentence.startswith(sentence)
    assert result.base_match.mark == "✔"


def test_name_of_another_model_is_refused():
    match = check(lora_for("sdxl"), base="z-image-turbo").base_match
    assert (match.mark, match.sentence) == (
        "✖",
        "this LoRA is for Stable Diffusion XL; not for Z-Image",
    )


def test_sentence_names_a_base_once():
    match = check(lora_for("anima"), base="anima-2.9b").base_match
    assert match.mark == "⚠"
    assert match.sentence.startswith("perhaps for Anima 2.9B: ")
    assert match.sentence.count("Anima 2.9B") == 1


@pytest.mark.parametrize(
    ("layout", "headline"),
    [
        ("ltx2.3", "a LoRA for LTX-2.3 or LTX-2.5"),
        ("wan-t2v-14b", "a LoRA for Wan 14B"),
        ("wan-t2v-1.3b", "a LoRA for Wan 1.3B"),
        ("wan2.2-ti2v-5b", "a LoRA for Wan 2.2 TI2V 5B"),
    ],
)
def test_headline_has_the_version_or_size(layout, headline):
    assert check(lora_for(layout)).headline == headline


def test_anima_moves_to_its_larger_size_by_name(tmp_path):
    lora = lora_for("anima")
    done = prolora.transfer(lora, "anima", "anima-2.9b", out=tmp_path / "moved.safetensors")
    with safe_open(tmp_path / "moved.safetensors", framework="pt") as file:
        moved = {key: file.get_tensor(key) for key in file.keys()}
        arguments = json.loads(file.metadata()["ss_network_args"])
    assert len(moved) == len(lora)
    assert all(torch.equal(x, torch.ones_like(x)) for x in moved.values())
    assert not {*moved} <= {*lora}  # some blocks have other numbers
    assert "Nothing was compared: Anima and Anima 2.9B were given by name." in str(done.report)
    assert done.report.in_words().mark == "⚠"
    assert arguments == {"base_num_blocks": 40}


def test_stated_number_of_blocks_decides_the_size(tmp_path):
    """A LoRA on some blocks alone fits Anima of 28, 40 and 52 blocks."""
    few = {key: x for key, x in lora_for("anima").items() if "transformer_blocks.3." in key}
    for blocks, size in ((28, "anima"), (40, "anima-2.9b")):
        path = tmp_path / f"{blocks}.safetensors"
        save_file(few, path, {"ss_network_args": json.dumps({"base_num_blocks": blocks})})
        sizes = check(path).sizes
        assert size in sizes and ("anima-2.9b" in sizes) == (blocks == 40)


def test_method_that_needs_weights_refuses_a_name():
    with pytest.raises(InvalidOption, match="needs the weights of both models, and Anima was"):
        prolora.transfer(lora_for("anima"), "anima", "anima-2.9b", method="prolora")


def test_unknown_and_ambiguous_names_are_explained():
    lora = lora_for("anima")
    with pytest.raises(MissingFile, match="did you mean anima"):
        prolora.transfer(lora, "anmia", "anima-2.9b")
    with pytest.raises(MissingFile, match=r"it can be wan-t2v-14b, wan2\.2-i2v-14b"):
        prolora.transfer(lora, "anima", "wan2.2")


@pytest.mark.parametrize(
    ("source", "target"),
    [("flux1-dev", "flux2-dev"), ("flux2-klein-9b", "flux2-klein-4b"), ("sdxl", "flux1-dev")],
)
def test_refusal_between_widths_names_fit(source, target):
    sentence = r"Only `fit.*moves a LoRA between them; it needs both as diffusers folders"
    with pytest.raises(UnsupportedFormat, match=sentence):
        prolora.transfer(lora_for(source), source, target)
