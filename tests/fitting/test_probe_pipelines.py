"""`prolora fit` from pipeline folders to a LoRA file, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_pipelines as tiny
import torch
from lora_files import read_header, read_lora
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import prolora
from prolora import LowRank, ProLoRAError, fit
from prolora.architectures.modules import is_in_text_encoder
from prolora.bases import leaves as digests
from prolora.bases import pipeline_identity, vae
from prolora.cli.app import app
from prolora.errors import OutputError, ShapeMismatch, UnrelatedBases, UnsupportedFormat
from prolora.fitting import Fitted, Gate, ProbeReport
from prolora.fitting.finishing import finish_baseline, finish_fit, move_by_weights
from prolora.fitting.fit_plan import prepare_fit
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
    report, out = tmp_path / "report.json", tmp_path / "out.safetensors"
    result = run(room, "twin", out, *FEW, "--again", "--report", str(report))
    assert result.exit_code == 0, result.output
    written = json.loads(report.read_text())
    # The UNet is the same one: copying is perfect, and probing says so.
    assert (written["asked"], written["method"]) == ("fit", "copy")
    assert written["probe"]["gate"]["decision"] == "copy"
    before, after = map(read_lora, (room / "lora.safetensors", out))
    name = next(iter(before.updates))
    torch.testing.assert_close(before.updates[name].dense(), after.updates[name].dense())


def test_what_is_written_has_the_strength_that_held_out_samples_chose(room, tmp_path):
    """A copy at 0.75, a fit from nothing at 1.25, and parts of text encoders as they are."""
    pipe = open_pipeline(room / "source").pipe
    file = tmp_path / "lora.safetensors"
    tiny.write_lora_with_text(file, pipe)
    bases = (prolora.open_base(room / name) for name in ("source", "twin"))
    job = prepare_fit(file, *bases, prolora.FitOptions(again=True))
    baseline = move_by_weights(job)
    shares = dict.fromkeys(("adapted", "target", "all"), 0.9)
    gate = Gate("copy", 1.25, shares, shares, "it does as well", shares, copy_strength=0.75)
    probe = ProbeReport(rank=2, gate=gate, samples=(16, 8), trust=1.0)
    own = job.adapter.updates
    fitted = {n: LowRank(2 * u.up, u.down) for n, u in own.items() if not is_in_text_encoder(n)}
    assert 0 < len(fitted) < len(own)
    copied, copy_report = finish_baseline(job, baseline, probe)
    moved, report = finish_fit(job, job.adapter, Fitted(fitted, probe))
    for adapter, told, factor, strength in (
        (copied, copy_report, 0.75, 0.75),
        (moved, report, 2.5, 1.25),
    ):
        assert adapter.updates.keys() == own.keys() and told.strength == strength
        for name, update in adapter.updates.items():
            scale = 1.0 if is_in_text_encoder(name) else factor
            torch.testing.assert_close(update.dense(), scale * own[name].dense())
        rows = {row.source: row for row in told.modules}
        assert {rows[name].strength for name in fitted} == {strength}
        assert {rows[name].strength for name in own.keys() - fitted.keys()} == {1.0}
        assert told.to_dict()["probe"]["samples"] == [16, 8]
        header = adapter.metadata
        assert header["prolora.strength"] == f"{strength:g}" == told.provenance["strength"]
        assert header["prolora.probe_share"] == "0.900" and header["prolora.probe_samples"] == "16"
        assert header["prolora.probe_decision"] == "copy"
    name = next(iter(fitted))
    rows = [{row.source: row for row in told.modules}[name] for told in (copy_report, report)]
    assert (rows[0].norm_ratio, rows[1].norm_ratio) == pytest.approx((0.75, 2.5))
    assert (copy_report.asked, copied.metadata["prolora.method"]) == ("fit", "copy")
    assert (moved.metadata["prolora.method"], rows[1].reason) == (
        "fit",
        "fitted to the running models",
    )
    assert "prolora.threshold" in copied.metadata and "prolora.threshold" not in moved.metadata
    kept = replace(probe, trust=0.0)
    untouched = finish_fit(job, job.adapter, Fitted(fitted, kept))[1].modules
    assert any(row.reason == "copied; nothing was fitted" for row in untouched)


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
    assert written["totals"]["mapped"] == len(read_lora(out).updates) == 8
    assert {row["rank_out"] for row in written["modules"]} == {3}
    header = read_header(out)
    assert header["prolora.method"] == "fit"
    assert header["prolora.probe_decision"] == "refuse"
    assert header["prolora.target"] == "other"


@pytest.mark.slow
def test_a_convolution_outside_the_blocks_is_fitted_as_a_convolution(room, tmp_path):
    tensors = {k: v for k, v in load_file(room / "lora.safetensors").items() if "mid" in k}
    key = "lora_unet_mid_block_resnets_0_conv1"
    tensors[f"{key}.lora_down.weight"] = torch.zeros(1, 16, 3, 3)
    tensors[f"{key}.lora_up.weight"] = torch.randn(16, 1, 1, 1)
    save_file(tensors, tmp_path / "with.safetensors")
    ends = tmp_path / "with.safetensors", room / "source", room / "other"
    few = {"images": 1, "steps": 1, "fit_steps": 1, "force": True, "again": True}
    result = fit(*ends, **few, rank=0.9, max_memory=100 << 30)
    assert not result.report.rows("skipped")
    (conv,) = (row for row in result.report.modules if row.source.startswith("mid_block.resnets"))
    assert conv.reason.startswith("fitted") and conv.rank_out
    result.save(tmp_path / "out.safetensors", format="diffusers")
    written = read_lora(tmp_path / "out.safetensors")
    assert written.kernels == {"mid_block.resnets.0.conv1": (3, 3)}


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("file", "pipeline folder"),
        ("pickle", "save_pretrained"),
        ("code", "code of its own"),
        ("kind", "trigflow"),
    ],
)
def test_what_cannot_be_probed_is_refused_with_the_way_out(room, tmp_path, broken, words):
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
    with pytest.raises(UnsupportedFormat, match=words):
        fit(room / "lora.safetensors", room / "source", target, SETTINGS, again=True)


def test_options_without_a_use_are_refused(room, tmp_path):
    out = tmp_path / "out.safetensors"
    assert "takes an integer or a share" in run(room, "other", out, "--rank", "50%").output
    inside = run(room, "twin", room / "twin" / "unet" / "diffusion_pytorch_model.safetensors")
    assert isinstance(inside.exception, OutputError)


def test_weights_that_must_refuse_name_probing_only_where_it_could_work(room, tmp_path):
    lora = tiny.updates(open_pipeline(room / "source").denoiser, ("attn2.to_k",))
    wide = tiny.write_lora(tmp_path / "k.safetensors", lora)
    unrelated = tiny.save(tmp_path / "apart", seed=5, text=12, scaling=0.13025)
    for target in (room / "other", unrelated):
        with pytest.raises(ShapeMismatch, match=r"`fit\(\)` runs the models"):
            prolora.transfer(wide, room / "source", target, method="copy")
    # No image can cross to a pipeline without a VAE.
    shutil.rmtree(unrelated / "vae")
    assert not vae.can_fit(room / "source", unrelated)
    with pytest.raises(ProLoRAError) as refused:
        prolora.transfer(wide, room / "source", unrelated, method="copy")
    assert "`fit()`" not in str(refused.value)
