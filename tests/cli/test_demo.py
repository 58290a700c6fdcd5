"""The demo: the shipped family is whole, and what it writes is what it shows."""

import functools
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lora_files import read_lora

from prolora import ProLoRAError, open_base
from prolora.cli import demo
from prolora.fitting.models import in_float32
from prolora.fitting.pipelines.pipeline_opening import open_pipeline

FAMILY = Path(__file__).parents[2] / "examples" / "icon_family"
BY_WEIGHTS = [("neon", "pruned", 34), ("concept", "few-step", 44)]


@pytest.mark.slow
@pytest.mark.parametrize(("lora", "target", "mapped"), BY_WEIGHTS)
def test_the_demo_writes_the_lora_and_a_page_with_images(
    tmp_path, monkeypatch, lora, target, mapped
):
    monkeypatch.setattr(demo, "STEPS", 2)
    steps: list[tuple[int, int, str]] = []
    one = demo.Demo.find(lora, target, tmp_path)
    report = one.run(False, lambda *step: steps.append(step))
    assert report.totals["mapped"] == mapped
    assert len(read_lora(one.moved).updates) == mapped
    text = one.page.read_text("utf-8")
    assert text.count("data:image/png;base64") == 4 * demo.SHOWN and one.command in text
    assert steps[-1][0] == steps[-1][1]


def test_the_command_names_its_files_in_a_folder_that_it_makes(prolora, tmp_path, monkeypatch):
    monkeypatch.setattr("prolora.cli.demo.Demo._draw", lambda self, report, *_: report)
    words = ("demo", "--target", "pruned", "-o", tmp_path / "new" / "folder")
    for code, more in ((0, ()), (2, ()), (0, ("--overwrite",))):
        ended, out, err = prolora(*words, *more)
        assert ended == code, err
        made = sorted((tmp_path / "new" / "folder").iterdir())
        told = [f"wrote {path}" in out.replace("\n", "") for path in made]
        assert told == [code == 0] * 2


@pytest.mark.slow
@pytest.mark.parametrize("target", ["pruned", "apart"])
def test_the_command_that_the_demo_prints_makes_the_same_lora(
    prolora, tmp_path, monkeypatch, target
):
    few = functools.partial(demo.fit, probes=24, held_out=8, fit_steps=2, force=True)
    monkeypatch.setattr(demo, "fit", few)
    monkeypatch.setattr("prolora.cli.fit.fit_lora", few)
    monkeypatch.setattr(demo, "STEPS", 3)
    monkeypatch.setattr(demo, "IMAGES", 3)
    one = demo.Demo.find("neon", target, tmp_path)
    report = one.run(False, None)
    assert (report.method == "fit") == (target == "apart")
    made = one.moved.read_bytes()
    one.moved.unlink()
    one.page.unlink()
    code, _, text = prolora(*shlex.split(one.command)[1:])
    assert code == 0, text
    assert one.moved.read_bytes() == made


def test_an_installation_without_the_models_names_the_distribution_that_has_them(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "site-packages/prolora/cli/demo.py"))
    with pytest.raises(ProLoRAError, match=r"pip install \./examples/icon_family"):
        demo.Demo.find("neon", "pruned", tmp_path)
    spec = SimpleNamespace(submodule_search_locations=[str(FAMILY)])
    monkeypatch.setattr(demo, "find_spec", lambda name: spec)
    assert demo.find_models() == FAMILY / "weights"


@pytest.mark.parametrize("target", ["apart", "pruned", "far", "few-step"])
def test_the_shipped_family_is_what_its_page_says(target):
    family = FAMILY / "weights"
    source, other = open_base(family / "source"), open_base(family / target)
    assert all(source.shapes[name] == shape for name, shape in other.shapes.items())
    assert (other.shapes == source.shapes) == (target != "pruned")
    for lora, rank in (("neon", 16), ("duotone", 4), ("concept", 16)):
        adapter = read_lora(family / "loras" / f"{lora}.safetensors")
        assert len(adapter.updates) == 44 and set(adapter.updates) <= set(source.shapes)
        assert {update.rank for update in adapter.updates.values()} == {rank}
        assert adapter.format == "diffusers" and lora in adapter.metadata["modelspec.title"]


def test_what_is_shipped_is_small_and_names_the_licences_of_its_icons():
    family = FAMILY / "weights"
    assert sum(path.stat().st_size for path in family.rglob("*") if path.is_file()) < 15e6
    for text in (family / "LICENCES.md", FAMILY / "README.md"):
        for package in ("noto", "noto-v1", "twemoji", "fluent-emoji-flat", "emojione"):
            assert f"@iconify-json/{package}`" in text.read_text("utf-8")
    assert "Permission is hereby granted" in (family / "LICENCES.md").read_text("utf-8")


@pytest.fixture(scope="module")
def pipeline():
    return open_pipeline(FAMILY / "weights" / "source")


def test_prompts_are_read_by_the_words_before_each_word(pipeline):
    tokens = pipeline.pipe.encode_icons(
        ["", "car noto many on-blue", "car noto many on-red", "pet noto many on-red"]
    )
    assert tokens.shape == (4, 4, 64) and tokens.isfinite().all()
    same = (tokens[1] == tokens[2]).all(-1)
    assert same.tolist() == [True, True, True, False]
    assert not (tokens[2] == tokens[3]).all(-1).any()
    for name in ("prompts.txt", "butterflies.txt"):
        prompts = (FAMILY / "weights" / name).read_text().splitlines()
        assert len(pipeline.pipe.encode_icons(prompts)) == 24


def test_a_prompt_that_was_not_learnt_is_refused_with_the_file_of_those_that_were(pipeline):
    for prompt in (
        "train noto many on-blue",
        "car noto",
        "car noto ink-red on-blue",
        "car noto many on-blue today",
    ):
        with pytest.raises(ValueError, match=f"'{prompt}': .* as prompts.txt shows"):
            pipeline.pipe(prompt)


def test_the_pipeline_draws_the_colours_that_it_is_asked_for(pipeline):
    generator = torch.Generator().manual_seed(0)
    with in_float32(pipeline.denoiser):
        images = pipeline.pipe(["car noto many on-blue"] * 2, generator=generator).images
    assert images.shape == (2, 3, 32, 32)
    red, _, blue = images[:, :, 0, 0].mean(0)  # a corner of the ground
    assert blue > red + 0.3


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("--lora", "unknown demo LoRA 'none': choose from concept, duotone, neon"),
        ("--target", "unknown demo target 'none': choose from apart, far, few-step, pruned"),
    ],
)
def test_an_unknown_lora_or_target_is_refused_with_the_choices(prolora, tmp_path, what, said):
    code, _, error = prolora("demo", what, "none", "-o", tmp_path / "demo")
    assert code == 2 and said in error
