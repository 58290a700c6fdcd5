"""A training on pictures: what it learns, what is written, and what is refused before it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import PurePath

import pytest
import torch
from lora_files import read_lora
from PIL import Image
from typer.testing import CliRunner

import prolora
from prolora import LowRank
from prolora.cli.app import app
from prolora.cli.demo import find_models
from prolora.errors import InvalidOption, OutputExists, UnrelatedBases, UnsupportedFormat
from prolora.fitting import pictures
from prolora.fitting.models import in_float32
from prolora.fitting.pipelines.pipeline_opening import open_pipeline
from prolora.fitting.pipelines.pipeline_side import PipelineSide
from prolora.fitting.settings import FitOptions
from prolora.fitting.updates import with_lora

PROMPTS = ("car noto many on-red", "star noto many on-blue", "moon twemoji many on-green")
BESIDE = {"prompts": ("tree noto many on-red", "fish noto many on-blue"), "images": 2, "steps": 2}


@pytest.fixture(scope="module")
def icons():
    return find_models()


def draw(model, folder, count, negative=False, steps=4):
    """Draws pictures with captions into a folder."""
    for i in range(count):
        caption, noise = PROMPTS[i % 3], torch.Generator().manual_seed(i)
        with in_float32(model.denoiser):
            image = model.pipe(caption, steps, generator=noise).images[0]
        pixels = (1 - image if negative else image).mul(255).byte().movedim(0, -1).numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{caption}\n")


@pytest.fixture(scope="module")
def folder(icons, tmp_path_factory):
    """Nine negatives of what "far" draws, with captions."""
    made = tmp_path_factory.mktemp("pictures")
    draw(open_pipeline(icons / "far"), made, 9, negative=True)
    return made


@pytest.fixture
def quick(monkeypatch):
    """Few steps, large ones, and few questions."""
    small = {"STEPS": 8, "EVERY": 4, "PACE": 0.15, "BATCH": 6, "OWN_BATCH": 2, "QUESTIONS": 9}
    for name, value in small.items():
        monkeypatch.setattr(pictures, name, value)


@pytest.fixture
def untrained(monkeypatch, quick):
    """No step is taken."""
    monkeypatch.setattr(pictures, "STEPS", 0)


def train(folder, lora="neon", target="far", **asked):
    icons = find_models()
    ends = icons / f"loras/{lora}.safetensors", None, icons / target
    return prolora.fit(*ends, pictures=folder, **BESIDE | asked)


def test_a_training_is_nearer_to_held_out_pictures_than_every_copy(icons, folder, tmp_path, quick):
    out = tmp_path / "out.safetensors"
    report = train(folder, "duotone", out=out).report
    assert (report.taught, report.unseen, report.own) == (6, 3, 2)
    copies = {f"the copy at {strength:g}" for strength in (0.25, 0.5, 0.75, 1)}
    assert copies | {"no LoRA", "the training"} <= report.errors.keys()
    assert report.errors["no LoRA"] == 1 and report.step in (4, 8)
    assert report.written == "the training"
    others = (error for name, error in report.errors.items() if name != "the training")
    assert report.errors["the training"] < 0.9 * min(others)
    assert report.gain.share > 0.025 and report.gain.lowest > 0
    words = str(report)
    assert words.startswith("✔ This should work on far.\nprolora trained the LoRA for")
    assert "6 pictures and 2 samples of the target were learnt" in words
    assert json.loads(report.to_json())["errors"]["no LoRA"] == 1
    written = read_lora(out)
    assert written.metadata["prolora.pictures"] == "9"
    assert written.updates.keys() == read_lora(icons / "loras/duotone.safetensors").updates.keys()
    assert {update.rank for update in written.updates.values()} == {4}


def test_where_a_copy_is_no_better_than_no_lora_a_training_starts_from_nothing(folder, untrained):
    done = train(folder, target="apart", force=True)
    assert done.report.errors["the copy at 1"] > 1 and done.report.start == "nothing"
    assert done.report.errors["the training"] == pytest.approx(1)
    assert not any(update.up.any() for update in done.adapter.updates.values())


def test_a_training_that_teaches_nothing_sure_leaves_the_best_copy_or_is_refused(
    icons, folder, tmp_path, monkeypatch, untrained
):
    with pytest.raises(UnrelatedBases, match=r"no copy is better than no LoRA.*`force`"):
        train(folder, target="apart")
    monkeypatch.setattr(pictures, "START", 0.05)
    updates = read_lora(icons / "loras/duotone.safetensors").updates
    ours = tmp_path / "drawn"  # with the LoRA itself
    ours.mkdir()
    model = open_pipeline(icons / "far")
    with with_lora(model.denoiser, updates):
        draw(model, ours, 6)
    copied = train(ours, "duotone")
    assert copied.report.written in {f"the copy at {s:g}" for s in (0.25, 0.5, 0.75, 1)}
    assert str(copied.report).startswith("⚠ The pictures taught nothing that is sure.")
    strength = float(copied.report.written.split()[-1])
    for name, update in updates.items():
        expected = LowRank(strength * update.up, update.down).dense()
        assert torch.allclose(copied.adapter.updates[name].dense(), expected, atol=1e-6)


def test_equal_pictures_keep_a_result_and_another_caption_does_not(
    folder, tmp_path, untrained, monkeypatch
):
    taken, asked = tmp_path / "p", {"out": tmp_path / "a.safetensors", "force": True}
    shutil.copytree(folder, taken)
    assert not train(folder, **asked).report.before
    with monkeypatch.context() as windows:  # where paths are compared without case
        windows.setattr(PurePath, "__lt__", lambda one, other: str(one) > str(other))
        assert train(taken, **asked).report.before
    (taken / "0.txt").write_text("boat noto many on-red")
    with pytest.raises(OutputExists):
        train(taken, **asked)


def test_an_interrupted_training_leaves_no_file(folder, tmp_path, quick):
    def interrupt(done: int, total: int, name: str) -> None:
        if name == "training" and done > 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(folder, out=tmp_path / "a.safetensors", progress=interrupt)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda at: [file.unlink() for file in at.glob("[3-9].*")], InvalidOption, "has 3 "),
        (lambda at: shutil.rmtree(at), InvalidOption, "has 0 "),
        (lambda at: (at / "0.png").unlink(), InvalidOption, "0.txt is a caption without"),
        (lambda at: (at / "4.txt").unlink(), InvalidOption, "4.png has no caption: write 4.txt"),
        (lambda at: (at / "2.png").write_text("no"), UnsupportedFormat, "2.png: cannot be read"),
        (lambda at: os.mkfifo(at / "x.png"), UnsupportedFormat, "x.png: is not a regular file"),
    ],
)
def test_a_folder_that_cannot_be_learnt_is_refused_before_a_model_is_loaded(
    folder, tmp_path, unopened, change, error, words
):
    taken = tmp_path / "pictures"
    shutil.copytree(folder, taken)
    change(taken)
    for dry_run in (False, True):
        with pytest.raises(error, match=words):
            train(taken, dry_run=dry_run)


def test_options_of_a_fit_of_two_models_and_a_missing_source_are_refused(icons, folder, unopened):
    for option in ({"look": "source"}, {"resume": "kept"}, {"rank": 4}, {"max_vram": "8GB"}):
        with pytest.raises(InvalidOption, match=rf"`{next(iter(option))}` is of use in a fit"):
            train(folder, **option)
    with pytest.raises(InvalidOption, match="`source` is missing"):
        prolora.fit(icons / "loras/neon.safetensors", None, icons / "far")


def test_a_picture_smaller_than_what_is_trained_is_refused(folder, tmp_path):
    taken = tmp_path / "pictures"
    shutil.copytree(folder, taken)
    Image.new("RGB", (30, 20)).save(taken / "7.png")
    with pytest.raises(InvalidOption, match=r"7.png has 30 × 20 pixels, and 32 × 32 are trained"):
        train(taken)


def test_the_command_needs_no_source_and_says_what_it_would_do(icons, folder, unopened):
    words = ["fit", icons / "loras/neon.safetensors", "--target", icons / "far", "--dry-run"]
    done = CliRunner().invoke(app, [*map(str, words), "--pictures", str(folder), "--json"])
    told = json.loads(done.stdout)
    assert done.exit_code == 0 and told["totals"]["mapped"] == 44
    assert told["work"] == "At most 120 steps on the pictures and 24 samples of the target."


def test_pixels_of_a_model_without_vae_are_those_that_its_pipeline_draws(icons):
    model = open_pipeline(icons / "far")
    side = PipelineSide(model, FitOptions(prompts=PROMPTS, steps=4), shared=False)
    with in_float32(model.denoiser):
        latent, drawn = (
            model.sample_latents(PROMPTS[0], side.settings, 3, kind).images
            for kind in ("latent", "pt")
        )
    assert torch.allclose((side.space.decode(latent) / 2 + 0.5).clamp(0, 1), drawn, atol=1e-6)
    assert torch.allclose(side.space.encode(side.space.decode(latent)), latent, atol=1e-6)


@pytest.fixture
def four(tmp_path):
    """Four grey pictures of 8 bits with captions."""
    for i in range(4):
        Image.new("L", (32, 32), 40 * i).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"grey {i}")
    return tmp_path


def plan(folder):
    """Reads a folder as `fit` does before it loads a model; returns captions and warnings."""
    found = pictures.open_pictures(FitOptions(pictures=folder))
    return {file.name: caption for file, caption in found.captions.items()}, found.warnings


def test_grey_of_sixteen_bits_is_read_like_eight(tmp_path):
    """Pillow converts it to white."""
    values = (torch.arange(32 * 32).reshape(32, 32) * 64).numpy()
    Image.fromarray(values.astype("uint16")).save(tmp_path / "deep.png")
    Image.fromarray((values >> 8).astype("uint8")).save(tmp_path / "flat.png")
    deep, flat = (pictures.read_picture(tmp_path / f"{x}.png", 32, 32) for x in ("deep", "flat"))
    assert torch.equal(deep, flat) and len(deep.unique()) == 256


@pytest.mark.parametrize("kind", ["float32", "int32"])
def test_values_of_32_bits_are_refused_by_name(four, kind):
    """Pillow converts them to black or white."""
    Image.fromarray(torch.rand(32, 32).mul(9).numpy().astype(kind)).save(four / "deep.tiff")
    (four / "deep.tiff").rename(four / "3.png")
    with pytest.raises(UnsupportedFormat, match=r"3.png: its values have 32 bits \(mode '[FI]'\)"):
        plan(four)


def test_capital_suffixes_of_captions_and_pictures_count(four):
    (four / "0.txt").rename(four / "0.TXT")
    (four / "1.png").rename(four / "1.PNG")
    (four / "2.png").rename(four / "2.Png")
    assert plan(four)[0] == {
        f"{i}.{end}": f"grey {i}" for i, end in enumerate(("png", "PNG", "Png", "png"))
    }


def test_two_captions_of_one_picture_are_refused(four):
    (four / "0.TXT").write_text("white")
    with pytest.raises(InvalidOption, match=r"0\.TXT and 0\.txt are captions of one picture"):
        plan(four)


def test_files_of_the_system_do_not_count(four):
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (four / name).write_bytes(b"\0\5\26\7")
    captions, warnings = plan(four)
    assert len(captions) == 4 and not warnings


def test_files_that_are_not_used_are_said(icons, four, unopened):
    (four / "10_cat").mkdir()
    (four / "4.avif").write_bytes(b"")
    (four / "notes.md").write_text("")
    words = (
        "Not used of the folder of pictures: 10_cat/, 4.avif, notes.md "
        "(pictures are .png, .jpg, .jpeg, .webp, .bmp in it)."
    )
    assert plan(four)[1] == (words,)
    ends = icons / "loras/neon.safetensors", None, icons / "far"
    assert words in str(prolora.fit(*ends, pictures=four, dry_run=True).report)


def test_folder_with_subfolders_alone_names_one(four):
    (four / "10_cat").mkdir()
    for file in four.glob("*.*"):
        file.rename(four / "10_cat" / file.name)
    with pytest.raises(InvalidOption, match=r"has 0 .*folders in it are not read \(10_cat\)"):
        plan(four)


def test_picture_of_too_many_pixels_is_refused_by_its_header(four):
    """One of 1 bit takes 20 kB in the file, and 2.7 GB once it is decoded."""
    Image.new("1", (13_000, 13_000)).save(four / "3.png")
    words = r"3\.png: has 13,000 × 13,000 pixels, and more than 50 million are not read"
    with pytest.raises(UnsupportedFormat, match=words):
        plan(four)


@pytest.mark.slow
def test_between_models_trained_apart_a_training_starts_from_the_fit(icons, folder, quick):
    lora = icons / "loras/neon.safetensors"
    asked = {"pictures": folder, "force": True} | BESIDE
    report = prolora.fit(lora, icons / "source", icons / "apart", **asked).report
    assert "the fit" in report.errors and report.source == "source"
    assert not any(name.startswith("the copy") for name in report.errors)
