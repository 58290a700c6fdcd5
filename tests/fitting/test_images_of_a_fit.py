"""The page of a fit shows what the LoRA does to the source, and what its moves do to the target."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import crossing_pipelines as make
import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from diffusers import StableDiffusionPipeline
from lora_files import same_bits
from PIL import Image
from reports import make_report, make_row
from typer.testing import CliRunner

import prolora
from prolora.cli.app import app
from prolora.fitting import showing
from prolora.fitting.pipelines.pipeline import Pipeline
from prolora.reports.page.picture_file import write_png
from prolora.reports.report import PictureGrid

FEW = prolora.FitOptions(("cat", "dog", "a bird"), images=1, steps=2, fit_steps=2, force=True)
ALL = ("source", "source + LoRA", "target", "target + copy", "target + fit")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shown")
    tiny.save_ends(folder, ("sd15", "tuned"))
    make.save_flux(folder / "flux")
    return folder


def fit(room: Path, target: str = "tuned", **more: object) -> prolora.Transfer:
    return prolora.fit(room / "lora.safetensors", room / "sd15", room / target, FEW, **more)


def read(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def draw_by_diffusers(folder: Path, lora: Path | None, prompt: str, seed: int) -> np.ndarray:
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(lora)
    drawn = pipe(
        prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(seed)
    ).images[0]
    return np.asarray(drawn).astype(int)


@pytest.mark.slow
def test_every_column_is_what_diffusers_draws_of_the_same_files(room, tmp_path):
    done = fit(room, shown_prompts=2)
    grid = done.report.grid
    assert tuple(grid.columns) == ALL and tuple(grid.rows) == ("cat", "dog")
    done.save(tmp_path / "fitted.safetensors", format="diffusers")
    lora = room / "lora.safetensors"
    files = {
        "source": (room / "sd15", None),
        "source + LoRA": (room / "sd15", lora),
        "target": (room / "tuned", None),
        "target + copy": (room / "tuned", lora),
        "target + fit": (room / "tuned", tmp_path / "fitted.safetensors"),
    }
    seen = {}
    for name, images in zip(grid.columns, grid.images, strict=True):
        for row, prompt in enumerate(grid.rows):
            theirs = draw_by_diffusers(*files[name], prompt, row)
            assert np.abs(read(images[row]) - theirs).max() <= 1, (name, prompt)
            seen[name, row] = images[row]
    assert len(set(seen.values())) > len(ALL)  # neither all alike nor blank
    assert grid.caption == (
        "Each row is one prompt, drawn from one seed: sd15 without the LoRA and with it, then "
        "tuned without it, with the LoRA as weights alone move it and with the fitted LoRA."
    )
    assert 0 < done.report.seconds["show"] < sum(done.report.seconds.values())


@pytest.mark.slow
def test_images_change_no_result_and_are_the_same_when_a_fit_goes_on(room, tmp_path):
    plain, shown = fit(room), fit(room, shown_prompts=2, resume=tmp_path / "kept")
    again = fit(room, shown_prompts=2, resume=tmp_path / "kept")
    assert again.report.probe.resumed and plain.report.grid is None
    assert again.report.grid == shown.report.grid
    assert same_bits(plain.adapter.updates, shown.adapter.updates)
    json.dumps(shown.report.to_dict())
    assert "grid" not in shown.report.to_dict()


@pytest.mark.slow
def test_where_nothing_can_be_copied_the_column_is_left_out(room, tmp_path):
    grid = fit(room, "flux", shown_prompts=1).report.grid
    assert tuple(grid.columns) == tuple(name for name in ALL if name != "target + copy")
    assert "weights alone" not in grid.caption
    sizes = [read(images[0]).shape for images in grid.images]
    assert all(size[2] == 3 for size in sizes)


@pytest.mark.slow
def test_a_page_asks_for_images_and_nothing_else_does(room, tmp_path, monkeypatch):
    line = ["fit", room / "lora.safetensors", "--source", room / "sd15", "--target"]
    line += [room / "tuned", "-o", tmp_path / "out.safetensors", "--prompt", "cat", "--images", "1"]
    line += ["--steps", "2", "--fit-steps", "1", "--force", "--overwrite", "--report"]

    def run(report: str) -> str:
        words = [*map(str, line), str(tmp_path / report)]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (result.output, result.exception)
        return (tmp_path / report).read_text("utf-8")

    page = run("page.html")
    section = page[page.index("In images") : page.index("</figure>", page.index("In images"))]
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)" alt="([^"]+)"', section)
    assert [alt for _, alt in pictures] == [f"{name}: cat" for name in ALL]
    assert all(read(base64.b64decode(data)).shape == (16, 16, 3) for data, _ in pictures)
    monkeypatch.setattr(showing, "write_png", lambda *_: pytest.fail("it was drawn"))
    assert json.loads(run("report.json"))["probe"]["not_drawn"] == ""


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["source", "target"])
def test_a_drawing_that_fails_is_a_sentence_and_no_end(room, broken, monkeypatch, caplog):
    plain = fit(room)
    draw = Pipeline.sample_latents

    def fail(self, prompt, settings, seed, output="latent"):
        if output == "pt" and self.name == {"source": "sd15", "target": "tuned"}[broken]:
            raise RuntimeError("out of colours")
        return draw(self, prompt, settings, seed, output)

    monkeypatch.setattr(Pipeline, "sample_latents", fail)
    done = fit(room, shown_prompts=2)
    assert done.report.grid is None
    told = f"No images could be drawn for the page; {broken}: out of colours."
    assert told in done.report.sentences() and "out of colours" in caplog.text
    assert same_bits(plain.adapter.updates, done.adapter.updates)


@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 7, 24), (3, 256, 256), (3, 300, 600)])
def test_a_png_holds_the_pixels_that_were_given(shape):
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1
    held = read(write_png(pixels))
    if max(shape) > 256:
        assert held.shape == (128, 256, 3)
        return
    wanted = (pixels.clamp(0, 1) * 255).round().permute(1, 2, 0).numpy().astype(int)
    assert (held == wanted).all()


def test_a_prompt_is_text_on_the_page():
    png = write_png(torch.zeros(3, 4, 4))
    prompts = ("<script>alert(1)</script>", "")
    grid = PictureGrid(ALL, prompts, [[png] * 2 for _ in ALL], "Seen.")
    page = replace(make_report([make_row("down_blocks.0.to_q")]), grid=grid).to_html()
    section = page[page.index("In images") : page.index("</figure>", page.index("In images"))]
    assert "<script>" not in section and "&lt;script&gt;" in section
    assert section.count("<img") == 10 and 'alt="target + fit: without a prompt"' in section
