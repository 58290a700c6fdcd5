"""The demo: the shipped family is whole, and what it writes is what it shows."""

import base64
import functools
import json
from pathlib import Path

import pytest
import torch

from prolora import ProLoRAError, adapters, open_base
from prolora.cli import demo
from prolora.errors import InvalidOption, UnrelatedBases

FAMILY = Path(__file__).parents[2] / "examples" / "icon_family"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "target", "mapped"), [("neon", "pruned", 34), ("concept", "few-step", 44)]
)
def test_the_demo_writes_the_lora_the_reports_and_a_picture(
    tmp_path, monkeypatch, lora, target, mapped
):
    from PIL import Image

    monkeypatch.setattr(demo, "STEPS", 2)
    steps, prompts = [], ("star noto many on-blue", "butterfly silhouette ink-red on-white")
    report, paths = demo.run_demo(
        tmp_path / "out",
        lora=lora,
        target=target,
        prompts=prompts,
        progress=lambda *step: steps.append(step),
    )
    moved, account, picture, page = paths
    assert json.loads(account.read_text())["totals"]["mapped"] == report.totals["mapped"] == mapped
    assert len(adapters.read_adapter(moved).updates) == mapped
    with Image.open(picture) as image:
        cell = demo.SIZE * demo.SCALE + 4
        rows = 20 + 5 * cell
        # A coloured ground is a coloured pixel, in the middle of the source's row at the left.
        red, _, blue = image.getpixel((image.size[0] - 2 * cell + 2, 20 + cell // 2))
        assert image.mode == "RGB" and blue != red
        below = image.crop((0, rows, *image.size)).convert("L")
        assert below.size[1] >= 22 and below.getextrema()[0] < 128 < 255 == below.getextrema()[1]
    text = page.read_text("utf-8")
    assert base64.b64encode(picture.read_bytes()).decode() in text and prompts[1] in text
    assert steps[-1][0] == steps[-1][1] == 5


@pytest.mark.slow
def test_a_lora_is_fitted_to_the_member_that_was_trained_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "STEPS", 3)
    monkeypatch.setattr(demo, "FITTED_IMAGES", 3)
    few = functools.partial(demo.FitSettings, probes=24, held_out=8, fit_steps=2, force=True)
    monkeypatch.setattr(demo, "FitSettings", few)
    prompts = ("star noto many on-blue", "car noto many on-red")
    report, (moved, *_) = demo.run_demo(tmp_path / "new" / "out", prompts=prompts)
    assert report.was_fitted and "fitted a new LoRA of apart" in str(report.in_words())
    fitted = adapters.read_adapter(moved)
    assert set(fitted.updates) <= set(open_base(demo.find_models() / "apart").shapes)
    assert fitted.metadata["prolora.method"] == "fit"
    assert fitted.metadata["ss_sd_model_name"] == "apart"
    below = demo.say_below(report, "apart")
    assert "trained apart" in below and f"{min(report.probe.gate.share.values()):.0%}" in below


def test_a_method_by_weights_has_a_target_that_it_moves_to(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "STEPS", 2)
    report, _ = demo.run_demo(tmp_path, method="prolora", prompts=("star noto many on-blue",))
    assert report.target == "pruned"
    monkeypatch.setattr(demo, "load_transformer", None)  # nothing is loaded before
    with pytest.raises(InvalidOption, match="'prolora' moves nothing to it"):
        demo.run_demo(tmp_path / "none", method="prolora", target="apart")


def test_weights_alone_move_nothing_to_the_member_that_was_trained_apart():
    family = demo.find_models()
    source, goal, file = demo.find_demo_files(family, "neon", "apart")
    with pytest.raises(UnrelatedBases):
        demo.transfer(file, source, goal)


def test_a_sentence_below_the_picture_is_broken_between_words():
    lines = demo.wrap_text("one two three extraordinarily", lambda text: len(text) <= 8)
    assert lines == ["one two", "three", "extraordinarily"]


@pytest.mark.parametrize("target", ["apart", "pruned", "far", "few-step"])
def test_the_shipped_family_is_what_its_page_says(target):
    family = demo.find_models()
    source, other = open_base(family / "source"), open_base(family / target)
    assert all(source.shapes[name] == shape for name, shape in other.shapes.items())
    assert (other.shapes == source.shapes) == (target != "pruned")
    for lora, rank in (("neon", 16), ("duotone", 4), ("concept", 16)):
        adapter = adapters.read_adapter(family / "loras" / f"{lora}.safetensors")
        assert len(adapter.updates) == 44 and set(adapter.updates) <= set(source.shapes)
        assert {update.rank for update in adapter.updates.values()} == {rank}
        assert adapter.format == "diffusers" and lora in adapter.metadata["modelspec.title"]


def test_what_is_shipped_is_small_and_names_the_licences_of_its_icons():
    family = demo.find_models()
    assert sum(path.stat().st_size for path in family.rglob("*") if path.is_file()) < 15e6
    for text in (family / "LICENCES.md", FAMILY / "README.md"):
        for package in ("noto", "noto-v1", "twemoji", "fluent-emoji-flat", "emojione"):
            assert f"@iconify-json/{package}`" in text.read_text("utf-8")
    assert "Permission is hereby granted" in (family / "LICENCES.md").read_text("utf-8")


def test_prompts_are_read_by_the_words_before_each_word():
    family = demo.find_models()
    tokens = demo.encode_prompts(
        family, ["car noto many on-blue", "car noto many on-red", "pet noto many on-red"]
    )
    assert tokens.shape == (4, 4, 64) and tokens.isfinite().all()
    same = (tokens[1] == tokens[2]).all(-1)
    assert same.tolist() == [True, True, True, False]
    assert not (tokens[2] == tokens[3]).all(-1).any()
    every = demo.encode_prompts(family, demo.PROMPTS + demo.BUTTERFLIES)
    assert len(every) == 1 + len(demo.PROMPTS) + len(demo.BUTTERFLIES)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("train noto many on-blue", "first: face, heart, pet"),
        ("car noto", "after 'car noto': many"),
        ("car noto ink-red on-blue", "after 'car noto': many"),
        ("car noto many on-blue today", "after 'car noto many': on-white"),
        ("", "first: face"),
    ],
)
def test_a_prompt_that_was_not_learnt_is_refused_with_the_words_to_take(tmp_path, prompt, words):
    with pytest.raises(ProLoRAError, match=words):
        demo.run_demo(tmp_path / "out", prompts=[prompt])
    assert not (tmp_path / "out").exists()


def test_merging_adds_the_update_and_leaves_the_original_alone():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    before = model[0].weight.clone()
    update = demo.Adapter({"0": adapters.adapter.LowRank(torch.ones(3, 1), torch.ones(1, 4))})
    changed = demo.merge_adapter(model, update)
    torch.testing.assert_close(changed[0].weight, before + 1)
    assert torch.equal(model[0].weight, before)


def test_the_demo_offers_the_methods_that_it_can_show(prolora, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, _, text = prolora("demo", "--method", "fit", "-o", tmp_path / "out")
    assert code == 2 and "--method" in text and "'auto', 'prolora'" in text
    assert not (tmp_path / "out").exists()


def test_an_unknown_lora_or_target_is_refused_with_the_choices(tmp_path):
    with pytest.raises(ProLoRAError, match=r"unknown demo LoRA 'none'.*concept, duotone, neon"):
        demo.run_demo(tmp_path, lora="none")
    with pytest.raises(
        ProLoRAError, match=r"unknown demo target 'none'.*choose from apart, far, few-step, pruned$"
    ):
        demo.run_demo(tmp_path, target="none")
