"""`prolora fit` from pipeline folders to a LoRA file, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_pipelines as tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import prolora
from prolora import ProLoRAError, adapters, fit
from prolora import transfer as prolora_transfer
from prolora.bases import leaves as digests
from prolora.bases import pipeline_identity, vae
from prolora.cli.app import app
from prolora.errors import OutputError, ShapeMismatch, UnrelatedBases, UnsupportedFormat
from prolora.fitting.models import in_float32
from prolora.fitting.pipelines import pipeline_opening
from prolora.fitting.pipelines.pipeline_opening import open_pipeline

LEAVES = ("attn1.to_v", "ff.net.2")
SETTINGS = prolora.FitOptions(("cat", "dog"), images=2, steps=3)
FEW = ["--prompt", "cat", "--prompt", "dog", "--images", "1", "--steps", "1"]
FEW += ["--fit-steps", "2"]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """source; twin: the same UNet behind another scheduler; other: own text encoder, predicts v."""
    folder = tmp_path_factory.mktemp("pipelines")
    tiny.save(folder / "source")
    unet = open_pipeline(folder / "source").denoiser
    tiny.save(folder / "twin", unet=unet, scheduler="euler")
    tiny.save(folder / "other", seed=5, text=12, kind="v_prediction")
    tiny.write_lora(folder / "lora.safetensors", tiny.updates(unet, LEAVES))
    return folder


def run(room: Path, target: str, out: Path, *more: str):
    source = ["--source", str(room / "source"), "--target", str(room / target)]
    line = ["fit", str(room / "lora.safetensors"), *source, "-o", str(out), *more]
    return CliRunner().invoke(app, line)


def test_a_lora_goes_over_to_a_file_with_its_account(room, tmp_path):
    report = tmp_path / "report.json"
    result = run(
        room, "twin", tmp_path / "out.safetensors", *FEW, "--again", "--report", str(report)
    )
    assert result.exit_code == 0, result.output
    written = json.loads(report.read_text())
    # The UNet is the same one: copying is perfect, and probing says so.
    assert written["asked"] == "fit"
    assert written["method"] == "copy"
    assert written["probe"]["gate"]["decision"] == "copy"
    before, after = (
        adapters.read_adapter(file)
        for file in (room / "lora.safetensors", tmp_path / "out.safetensors")
    )
    name = next(iter(before.updates))
    torch.testing.assert_close(before.updates[name].dense(), after.updates[name].dense())


@pytest.mark.slow
def test_for_unrelated_bases_nothing_is_hashed_and_nothing_written(room, tmp_path, monkeypatch):
    """Neither for what moving by weights gives meanwhile."""
    for module in (digests, pipeline_identity):
        monkeypatch.setattr(module, "hash_file", lambda *_: pytest.fail("a base was hashed"))
    result = run(room, "other", tmp_path / "out.safetensors", *FEW)
    assert result.exit_code != 0
    assert isinstance(result.exception, UnrelatedBases), result.exception
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_the_gate_refuses_is_written_when_forced(room, tmp_path):
    out = tmp_path / "out.safetensors"
    few = [*FEW, "--rank", "3", "--json", "--resume", str(tmp_path / "kept")]
    assert isinstance(run(room, "other", out, *few).exception, UnrelatedBases)
    result = run(room, "other", out, *few, "--force")  # nothing is sampled or fitted again
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["probe"]["resumed"] == 1
    written = json.loads(result.stdout)
    assert written["probe"]["gate"]["decision"] == "refuse"
    assert written["totals"]["mapped"] == len(adapters.read_adapter(out).updates) == 8
    assert {row["rank_out"] for row in written["modules"]} == {3}
    with safe_open(out, "pt") as file:
        header = file.metadata()
    assert header["prolora.method"] == "fit"
    assert header["prolora.probe_decision"] == "refuse"
    assert header["prolora.target"] == "other"


def test_a_pipeline_in_half_precision_stays_so_and_samples(room, tmp_path):
    shutil.copytree(room / "source", tmp_path / "half")
    unet = open_pipeline(room / "source").denoiser
    unet.half().save_pretrained(tmp_path / "half" / "unet", variant="fp16")
    (tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    half = open_pipeline(tmp_path / "half")
    assert half.denoiser.dtype == torch.float16
    with in_float32(half.denoiser):
        latent = half.sample_final("cat", SETTINGS, 0).latents[-1]
    assert latent.dtype == torch.float32 and latent.isfinite().all()


def test_a_dry_run_reads_names_alone(room, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline_opening, "open_pipeline", None)
    result = run(room, "other", tmp_path / "out.safetensors", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["totals"]["mapped"] == 8


@pytest.mark.slow
def test_a_convolution_outside_the_blocks_is_fitted_as_a_convolution(room, tmp_path):
    tensors = {k: v for k, v in load_file(room / "lora.safetensors").items() if "mid" in k}
    key = "lora_unet_mid_block_resnets_0_conv1"
    tensors[f"{key}.lora_down.weight"] = torch.zeros(1, 16, 3, 3)
    tensors[f"{key}.lora_up.weight"] = torch.randn(16, 1, 1, 1)
    save_file(tensors, tmp_path / "with.safetensors")
    result = fit(
        tmp_path / "with.safetensors",
        room / "source",
        room / "other",
        again=True,
        images=1,
        steps=1,
        fit_steps=1,
        force=True,
        rank=0.9,
        max_memory=100 << 30,
    )
    assert not result.report.rows("skipped")
    (conv,) = (row for row in result.report.modules if row.source.startswith("mid_block.resnets"))
    assert conv.reason.startswith("fitted") and conv.rank_out
    result.save(tmp_path / "out.safetensors", format="diffusers")
    written = adapters.read_adapter(tmp_path / "out.safetensors")
    assert written.kernels == {"mid_block.resnets.0.conv1": (3, 3)}
    with pytest.raises(ProLoRAError, match="pipelines alone"):
        fit(
            tmp_path / "with.safetensors",
            room / "source",
            room / "other",
            SETTINGS,
            again=True,
            max_memory=1 << 20,
        )


@pytest.mark.parametrize(
    ("broken", "error", "words"),
    [
        ("file", UnsupportedFormat, "pipeline folder"),
        ("pickle", UnsupportedFormat, "save_pretrained"),
        ("code", UnsupportedFormat, "code of its own"),
        ("kind", UnsupportedFormat, "trigflow"),
    ],
)
def test_what_cannot_be_probed_is_refused_with_the_way_out(room, tmp_path, broken, error, words):
    target = tmp_path / "target"
    shutil.copytree(room / "twin", target)
    index = json.loads((target / "model_index.json").read_text())
    if broken == "file":
        target = target / "unet" / "diffusion_pytorch_model.safetensors"
    elif broken == "pickle":
        weights = target / "text_encoder" / "model.safetensors"
        torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
        weights.unlink()
    elif broken == "code":
        index["unet"] = ["my_unet", "Mine"]
        (target / "model_index.json").write_text(json.dumps(index))
    elif broken == "kind":
        config = target / "scheduler" / "scheduler_config.json"
        changed = json.loads(config.read_text()) | {"prediction_type": "trigflow"}
        config.write_text(json.dumps(changed))
    with pytest.raises(error, match=words):
        fit(room / "lora.safetensors", room / "source", target, SETTINGS, again=True)


def test_options_without_a_use_are_refused(room, tmp_path):
    out = tmp_path / "out.safetensors"
    assert "rank must be" in str(run(room, "other", out, "--rank", "0").exception)
    assert "takes an integer or a share" in run(room, "other", out, "--rank", "50%").output
    inside = run(room, "twin", room / "twin" / "unet" / "diffusion_pytorch_model.safetensors")
    assert isinstance(inside.exception, OutputError)


def test_weights_that_must_refuse_name_probing_only_where_it_could_work(room, tmp_path):
    lora = tiny.updates(open_pipeline(room / "source").denoiser, ("attn2.to_k",))
    wide = tiny.write_lora(tmp_path / "k.safetensors", lora)
    with pytest.raises(ShapeMismatch, match=r"`fit\(\)` runs the models"):
        prolora_transfer(wide, room / "source", room / "other", method="copy")
    with pytest.raises(UnrelatedBases, match=r"`fit\(\)` runs the models"):
        prolora_transfer(room / "lora.safetensors", room / "source", room / "other")
    unrelated = tiny.save(tmp_path / "apart", seed=5, text=12, scaling=0.13025)
    with pytest.raises(ShapeMismatch, match=r"`fit\(\)` runs the models"):
        prolora_transfer(wide, room / "source", unrelated, method="copy")
    # No image can cross to a pipeline without a VAE.
    shutil.rmtree(unrelated / "vae")
    assert not vae.can_fit(room / "source", unrelated)
    with pytest.raises(ProLoRAError) as refused:
        prolora_transfer(wide, room / "source", unrelated, method="copy")
    assert "`fit()`" not in str(refused.value)
