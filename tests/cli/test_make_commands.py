"""`prolora extract`, `prolora convert` and `prolora merge` on the command line."""

import json

import pytest
import torch
from safetensors.torch import load_file

from prolora import Adapter, LowRank
from prolora.adapters import write_adapter
from prolora.architectures.identify import Model


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out" / "lora.safetensors"


def test_extract_between_a_base_and_its_like(prolora, case, out, tmp_path):
    from mini import source_weights, write_folder

    _, base, _ = case
    tuned = write_folder(tmp_path / "tuned", {n: w + 0.01 for n, w in source_weights().items()})
    out.parent.mkdir()
    report = tmp_path / "report.html"
    words = ("extract", base, tuned, "--out-rank", "1", "--for", "diffusers")
    code, text, err = prolora(*words, "--dry-run")
    assert code == 0 and "dry run" in text and not out.exists(), err
    code, text, err = prolora(*words, "-o", out, "--report", report)
    assert code == 0 and "It holds 100.00% of the energy of the difference" in text, err
    assert all(key.startswith("unet.") for key in load_file(out))
    assert "<html" in report.read_text("utf-8")[:200].lower()
    code, text, _ = prolora(*words, "-o", out, "--json", "--overwrite")
    record = json.loads(text)
    assert code == 0 and record["totals"]["mapped"] == len(source_weights())
    code, text, _ = prolora("check", out, base)
    assert code == 0


def test_convert_cuts_and_respells(prolora, case, out):
    lora, _, _ = case
    out.parent.mkdir()
    words = ("convert", lora, "--out-rank", "1", "--for", "diffusers", "--dtype", "float16")
    code, text, err = prolora(*words, "-o", out)
    assert code == 0 and "differs from it by" in text and str(out) in "".join(text.split("\n")), err
    assert all(key.startswith("unet.") for key in load_file(out))
    code, _, err = prolora("convert", lora)
    assert code == 2 and "-o OUT is missing" in err
    out.write_bytes(b"mine")
    code, _, err = prolora(*words, "-o", out)
    assert code == 2 and out.read_bytes() == b"mine"
    code, _, err = prolora(*words, "-o", out, "--overwrite")
    assert code == 0, err


def test_merge_tells_what_of_each_is_kept(prolora, case, out, tmp_path):
    from mini import shapes, write_case

    lora, base, _ = case
    (tmp_path / "more").mkdir()
    other = write_case(tmp_path / "more")[0].rename(tmp_path / "more" / "other.safetensors")
    out.parent.mkdir()
    words = ("merge", lora, other, "--strengths", "1,0.25")
    code, text, err = prolora(*words, "-o", out)
    said = " ".join(text.split())
    assert code == 0 and "lora at strength 1: all of it is in the result, and another" in said, err
    assert "lora and other do the same in" not in said  # a quarter is not twice
    given = "--report", "-", "--method", "balanced", "--overwrite"
    code, text, err = prolora(*words, "-o", out, *given)
    assert code == 0 and "cosine" in text, err
    report = tmp_path / "report.html"
    given = "-o", out, "--report", report, "--overwrite"
    code, _, err = prolora(*words, "--target", base, *given)
    assert code == 0 and "<html" in report.read_text("utf-8")[:200].lower(), err
    code, text, _ = prolora(*words, "--target", base, "-o", out, "--json", "--overwrite")
    record = json.loads(text)
    assert code == 0 and record["totals"]["mapped"] == len(shapes(3))
    # Behind the LoRAs it means the same.
    again = json.loads(prolora(*words, base, "-o", out, "--json", "--overwrite")[1])
    assert again["parts"] == record["parts"]
    assert [part["strength"] for part in record["parts"]] == [1.0, 0.25]
    code, text, _ = prolora("check", out, base)
    assert code == 0
    code, text, _ = prolora("check", out)
    assert code == 3 and "source" in text  # no known family
    code, _, err = prolora(*words, "-o", other)
    assert code == 2 and "other.safetensors" in err
    for words, said in (
        ((lora, "-o", out), "two LoRAs or more"),
        ((lora, other, "--strengths", "1,x", "-o", out), "--strengths takes numbers like 1,0.6"),
        ((lora, other, "--strengths", "1", "-o", out), "--strengths has 1, and there are 2 LoRAs"),
        ((lora, other), "-o OUT is missing"),
    ):
        code, _, err = prolora("merge", *words)
        assert code == 2 and said in err


def test_merge_into_a_base_bakes_and_says_what_survived(prolora, case, tmp_path):
    lora, source, target = case
    words = ("merge", lora, "--into", source)
    page = tmp_path / "report.html"
    given = "--strengths", "0.5", "--report", page
    code, text, err = prolora(*words, "-o", tmp_path / "baked", *given)
    assert code == 0 and "100% of the LoRA is in the weights" in text, err
    assert "What is left of each update" in page.read_text("utf-8")
    given = "--json", "--stochastic", "1", "--strengths", "0.5"
    code, text, _ = prolora(*words, "-o", tmp_path / "json", *given)
    told = json.loads(text)
    assert code == 0 and told["survived"] == pytest.approx(1) and told["strengths"] == [0.5]
    for flag, value in (("--target", target), ("--format", "kohya"), ("--out-rank", "4")):
        code, _, err = prolora(*words, "-o", tmp_path / "none", flag, value)
        assert code == 2 and flag in err and not (tmp_path / "none").exists()


def test_after_writing_a_line_says_who_reads_the_file_and_who_does_not(prolora, tmp_path):
    one = LowRank(torch.ones(3072, 1), torch.ones(1, 3072))
    lora, out = tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    updates = {f"transformer_blocks.{i}.attn.to_q": one for i in range(60)}
    write_adapter(Adapter(updates, origin=Model.of("qwen-image")), lora, format="comfy")
    code, text, err = prolora("convert", lora, "-o", out, "--for", "musubi")
    assert code == 0, err
    told = " ".join(text.split())
    assert "Read by ComfyUI, diffusers, InvokeAI, mflux, musubi-tuner" in told
    assert "not by DiffSynth-Studio, LightX2V" in told
    code, text, _ = prolora("convert", lora, "-o", tmp_path / "d.safetensors", "--for", "diffsynth")
    assert code == 0 and "DiffSynth-Studio, diffusers, LightX2V" in " ".join(text.split())
    code, _, err = prolora("convert", lora, "-o", tmp_path / "a.safetensors", "--for", "a1111")
    assert code == 2 and "A1111 was not tried with LoRAs for Qwen-Image" in " ".join(err.split())
