"""Method "best": the LoRA moved by its weights, and a fit only where weights say too little."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import UNet2DConditionModel
from lora_files import same_bits

import prolora
from prolora.errors import InvalidOption, UnrelatedBases
from prolora.fitting import best_way
from prolora.fitting.best_way import WeightsElseFit

LEAVES = ("attn1.to_v", "ff.net.2")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source; targets: tuned, without the second layers, trained apart, and of other latents."""
    folder = tmp_path_factory.mktemp("best")
    deep = tiny.UNET | {"transformer_layers_per_block": 2, "cross_attention_dim": 8}
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**deep)
    pruned = UNet2DConditionModel(**deep | {"transformer_layers_per_block": 1})
    pruned.load_state_dict(unet.state_dict(), strict=False)
    tuned = UNet2DConditionModel(**deep)
    tuned.load_state_dict(
        {name: w + 1e-3 * torch.randn_like(w) for name, w in unet.state_dict().items()}
    )
    apart = UNet2DConditionModel(**deep)
    models = {"source": unet, "tuned": tuned, "pruned": pruned, "apart": apart}
    for name, model in models.items():
        tiny.save(folder / name, unet=model)
    tiny.save(folder / "across", unet=tuned, vae_seed=3)
    updates = tiny.updates(unet, LEAVES)
    tiny.write_lora(folder / "lora.safetensors", updates)
    first = {n: u for n, u in updates.items() if "blocks.0." in n.split("attentions")[1]}
    tiny.write_lora(folder / "first.safetensors", first)
    return folder


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits of a second; the gate is passed, whatever it says of models without knowledge."""
    make = WeightsElseFit.of.__func__

    def of(cls: type[WeightsElseFit], *given: object) -> WeightsElseFit:
        way = make(cls, *given)
        few = {"prompts": ("cat",), "images": 1, "steps": 2, "fit_steps": 2, "force": True}
        return replace(way, by_fit=replace(way.by_fit, **few))

    monkeypatch.setattr(WeightsElseFit, "of", classmethod(of))


def ends(room: Path, target: str, lora: str = "lora") -> tuple[Path, Path, Path]:
    return room / f"{lora}.safetensors", room / "source", room / target


def test_where_all_of_a_lora_has_a_place_the_result_is_that_by_weights(room):
    usual = prolora.transfer(*ends(room, "tuned"))
    done = prolora.transfer(*ends(room, "tuned"), method="best")
    assert same_bits(done.state_dict(), usual.state_dict())
    assert "No fit was made: all of the LoRA has a place on tuned" in str(done.report)


@pytest.mark.slow
def test_after_a_move_to_a_student_of_few_steps_a_fit_is_named_where_it_can_run(room, tmp_path):
    lora, source, tuned = ends(room, "tuned")
    student = shutil.copytree(tuned, tmp_path / "student")
    teacher = shutil.copytree(source, tmp_path / "teacher")
    for folder in (student, teacher):
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", "LCMScheduler"]
        (folder / "model_index.json").write_text(json.dumps(index))
    for told, *bases in (
        (True, source, student),
        (False, teacher, student),  # a student's fine-tune
        (False, source, student / "unet"),  # which no fit can run
        (False, source, tuned),
    ):
        report = prolora.transfer(lora, *bases).report
        assert ("draws in few steps." in report.in_words().headline) is told
    best = prolora.transfer(lora, source, student, method="best").report
    assert best.method == "fit" and "student draws in few steps" in best.why
    best = prolora.transfer(lora, teacher, student, method="best").report
    assert best.method != "fit" and "No fit was made" in best.why


@pytest.mark.slow
@pytest.mark.parametrize(("target", "serves"), [("tuned", True), ("pruned", False)])
def test_a_fit_where_weights_serve_says_so_before_its_first_step(room, target, serves):
    plan = prolora.fit(*ends(room, target), dry_run=True).report
    assert ("`transfer` takes seconds" in str(plan.in_words())) is serves
    few = {"prompts": ("cat",), "images": 1, "steps": 2, "fit_steps": 2, "force": True}
    told: list[str] = []

    def note(done: int, total: int, name: str) -> None:
        told.append(name)

    report = prolora.fit(*ends(room, target), progress=note, **few).report
    assert told[0].startswith("Moving by weights serves here") is serves
    assert ("`transfer` takes seconds" in str(report.in_words())) is serves
    assert "as drawing" in told[0] and "as drawing" not in " ".join(told[1:])


@pytest.mark.slow
@pytest.mark.parametrize(
    "target, need",
    [
        ("pruned", "of the LoRA's modules have no place on pruned"),
        ("apart", "have nothing in common"),
        ("across", "encoders were trained apart"),
    ],
)
def test_where_weights_say_too_little_the_result_is_the_one_of_a_fit(room, tmp_path, target, need):
    best, alone = (tmp_path / f"{name}.safetensors" for name in ("best", "alone"))
    report = prolora.transfer(*ends(room, target), out=best, method="best").report
    assert report.method == "fit" and need in report.why and report.why in str(report.in_words())
    bases = map(prolora.open_base, ends(room, target)[1:])
    way = WeightsElseFit.of(*bases, prolora.TransferOptions(method="best", format="auto"))
    prolora.fit(*ends(room, target), way.by_fit, out=alone)
    assert same_bits(best, alone)


def test_a_lora_of_blocks_that_are_there_is_not_fitted_to_a_target_without_others(room):
    done = prolora.transfer(*ends(room, "pruned", "first"), method="best")
    assert done.report.method != "fit" and "No fit was made" in done.report.why


def test_a_fit_that_is_refused_leaves_what_weights_give(room, monkeypatch):
    def refuse(*_: object) -> None:
        raise UnrelatedBases("the fit is refused: it is no good")

    monkeypatch.setattr(best_way, "fit_lora", refuse)
    usual = prolora.transfer(*ends(room, "pruned")).state_dict()
    done = prolora.transfer(*ends(room, "pruned"), method="best")
    assert same_bits(done.state_dict(), usual)
    assert "A fit was tried because" in str(done.report) and "no good" in done.report.why
    with pytest.raises(UnrelatedBases, match="no good"):
        prolora.transfer(*ends(room, "apart"), method="best")


def test_files_are_moved_by_weights(room):
    lora, source, target = ends(room, "tuned")
    done = prolora.transfer(lora, source / "unet", target / "unet", method="best")
    assert "runs both models" in done.report.why
    with pytest.raises(UnrelatedBases):
        prolora.transfer(lora, source / "unet", room / "apart" / "unet", method="best")


@pytest.mark.parametrize("target, runs", [("tuned", False), ("pruned", True), ("apart", True)])
def test_a_dry_run_says_what_would_be_done_and_for_how_long(room, target, runs, tmp_path, unopened):
    cache = tmp_path / "cache"
    report = prolora.transfer(*ends(room, target), method="best", cache=cache, dry_run=True).report
    assert not cache.exists()
    assert report.dry_run and ("Both models would be run because" in report.why) is runs
    assert report.why in str(report.in_words())
    assert not runs or "as long as drawing" in report.work


@pytest.mark.slow
def test_in_a_folder_only_those_are_fitted_that_call_for_it(room, tmp_path, monkeypatch):
    loras = [room / "lora.safetensors", room / "first.safetensors", tmp_path / "none.safetensors"]
    how = (room / "source", room / "pruned", tmp_path / "out")
    outcomes = prolora.transfer_many(loras, *how, method="best")
    assert [outcome.status for outcome in outcomes] == ["moved", "moved", "failed"]
    fitted, weighed = (outcome.report for outcome in outcomes[:2])
    assert fitted.method == "fit" and "no place on pruned" in fitted.why
    assert weighed.method != "fit" and "No fit was made" in weighed.why
    again = prolora.transfer_many(loras, *how, method="best")
    assert [outcome.status for outcome in again] == ["already there"] * 2 + ["failed"]
    far = prolora.transfer_many(loras[:1], how[0], room / "across", tmp_path / "far", method="best")
    assert far[0].report.method == "fit"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("strength", 0.5), ("blocks", "1"), ("out_rank", 4), ("text_encoder", "project")),
        *(("rank", 64), ("threshold", 0.5)),
    ],
)
def test_what_a_fit_cannot_do_is_refused_by_each_job(room, tmp_path, name, value):
    (lora, *bases), asked = ends(room, "pruned"), {"method": "best", name: value}
    for more in ({}, {"out": tmp_path / "x"}, {"dry_run": True}):
        with pytest.raises(InvalidOption, match=f"`{name}"):
            prolora.transfer(lora, *bases, **more, **asked)
    with pytest.raises(InvalidOption, match=f"`{name}"):
        prolora.transfer_many([lora], *bases, tmp_path / "y", **asked)
    assert not list(tmp_path.iterdir())
