"""A preview draws what a fit aims at: the source's change added to the target, step by step."""

from __future__ import annotations

import io
import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import crossing_pipelines as make
import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from test_swapping import Card
from torch import Tensor
from typer.testing import CliRunner

import prolora
from prolora.cli import app
from prolora.files.ownership import is_own
from prolora.probe import pipelines, swapping
from prolora.probe.pipelines import vram
from prolora.probe.pipelines.delta_sampling import change_prediction
from prolora.probe.pipelines.pipeline import Pipeline
from prolora.workflow.by_fitting import running
from prolora.workflow.by_fitting.pipeline import prepare_fit
from prolora.workflow.by_fitting.showing import CHANGED

FEW = prolora.FitOptions(("cat", "dog cat"), images=1, steps=2, size=16, guidance=4.0)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipelines of one VAE, one with another, and a LoRA with a part in the text encoder."""
    folder = tmp_path_factory.mktemp("preview")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny.save(folder / "source", seed=1)
        shutil.copytree(folder / "source", folder / "twin")
        tiny.save(folder / "target", seed=5, text=12)
        tiny.save(folder / "velocity", seed=6, text=12, kind="v_prediction")
        make.save_sdxl(folder / "other")
        source = pipelines.open_pipeline(folder / "source")
    tiny.write_lora_with_text(folder / "lora.safetensors", source.pipe, 0.5)
    return folder


def preview(room: Path, target: str, **more: object) -> dict[str, list[np.ndarray]]:
    """Column -> images."""
    ends = room / "lora.safetensors", room / "source", room / target
    grid = prolora.preview_fit(*ends, FEW, **more).grid
    assert grid is not None and tuple(grid.rows) == FEW.prompts
    return {
        name: [np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int) for png in column]
        for name, column in zip(grid.columns, grid.images, strict=True)
    }


def test_where_target_and_source_are_one_model_it_is_the_source_with_its_lora(room):
    """Guided, with the part in the text encoder that both run; the target's own sampler."""
    columns = preview(room, "twin")
    assert tuple(columns) == ("source", "source + LoRA", "target", "target + copy", CHANGED)
    for row in range(2):
        assert np.abs(columns[CHANGED][row] - columns["source + LoRA"][row]).max() <= 1
        assert np.abs(columns[CHANGED][row] - columns["target"][row]).max() > 20


class ByHand:
    """Delta Sampling written with diffusers alone."""

    def __init__(self, room: Path, target: str) -> None:
        names = ("source", "source", target)
        pipes = [StableDiffusionPipeline.from_pretrained(room / name) for name in names]
        self.source, self.adapted, self.target = pipes
        self.adapted.load_lora_weights(room / "lora.safetensors")

    def predict(self, pipe: StableDiffusionPipeline, x: Tensor, t: Tensor, prompt: str) -> Tensor:
        """[2, ...]: with the prompt, and with none."""
        texts = torch.cat(pipe.encode_prompt(prompt, "cpu", 1, True))
        return pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=texts).sample

    @torch.no_grad()
    def draw(self, prompt: str, seed: int, guidance: float, asked: float) -> np.ndarray:
        """`asked` is the guidance that the source is asked with; 1 where the target has its own."""
        scheduler = self.target.scheduler
        scheduler.set_timesteps(2)
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        for t in scheduler.timesteps:
            pipes = self.source, self.adapted, self.target
            before, after, plain = (self.predict(pipe, x, t, prompt) for pipe in pipes)
            change = after - before
            if asked != 1:
                change = change[1:] + asked * (change[:1] - change[1:])
            if scheduler.config.prediction_type == "v_prediction":
                change = change / scheduler.alphas_cumprod[t] ** 0.5  # at one x: Δv = Δε/a
            both = plain + change
            x = scheduler.step(both[1:] + guidance * (both[:1] - both[1:]), t, x).prev_sample
        image = self.target.vae.decode(x / self.target.vae.config.scaling_factor).sample[0]
        pixels = ((image / 2 + 0.5).clamp(0, 1) * 255).round()
        return pixels.movedim(0, 2).numpy().astype(int)


@pytest.mark.parametrize(
    ("target", "guidance", "asked"), [("target", 4.0, 1), ("velocity", 4.0, 1), ("target", 1, 4.0)]
)
def test_it_is_delta_sampling_as_one_writes_it_with_diffusers(room, target, guidance, asked):
    """Other weights, another text encoder or prediction, and a target that is run unguided."""
    columns = preview(room, target, target_guidance=guidance)
    hand = ByHand(room, target)
    for row, prompt in enumerate(FEW.prompts):
        wanted = hand.draw(prompt, row, guidance, asked)
        assert np.abs(columns[CHANGED][row] - wanted).max() <= 1
        assert np.abs(columns["target"][row] - wanted).max() > 10


@pytest.mark.parametrize(("rank", "shown"), [(None, "2"), (256, "12…16"), (0.9, None)])
def test_what_is_planned_has_the_rank_of_the_fit_as_far_as_it_is_known(room, rank, shown):
    """A share becomes a rank once the updates are fitted."""
    ends = room / "lora.safetensors", room / "source", room / "target"
    (table,) = prolora.plan_fit(*ends, FEW, rank=rank, text_encoder="skip").tables()[:1]
    last = [column.name for column in table.columns].index("rank") if shown else None
    assert [column.name for column in table.columns] == ["part", "n", *(["rank"] if shown else [])]
    assert last is None or table.rows[-1].cells[last] == shown


@pytest.mark.slow
def test_its_images_are_those_of_the_page_of_a_fit(room):
    ends = room / "lora.safetensors", room / "source", room / "target"
    seen = prolora.preview_fit(*ends, FEW, shown_prompts=2).grid
    report = prolora.fit(*ends, FEW, shown_prompts=2, fit_steps=1, force=True).report
    planned, fitted = prolora.plan_fit(*ends, FEW).modules, report.grid
    assert [row.rank_out for row in planned] == [row.rank_out for row in report.modules]
    for name in ("source", "source + LoRA", "target"):
        one, other = (grid.images[list(grid.columns).index(name)] for grid in (seen, fitted))
        assert one == other
    assert "step by step; a fit looks for a file" in seen.caption


def test_a_variance_behind_the_prediction_stays_as_it_is():
    change = torch.ones(2, 3, 4, 4)
    learnt = change_prediction((torch.zeros(2, 6, 4, 4),), change)[0]
    assert torch.equal(learnt, torch.cat([change, 0 * change], 1))
    listed = change_prediction(([torch.zeros(3, 1, 4, 4)] * 2, {}), change[:, :, None])
    assert torch.equal(torch.stack(listed[0]), change[:, :, None]) and listed[1] == {}


LINE = ["--prompt", "cat", "--steps", "2", "--size", "16", "--device", "cpu", "--cache", "none"]


def run(room: Path, *words: object, target: str = "target") -> tuple[int, str]:
    line = ["fit", room / "lora.safetensors", "--source", room / "source"]
    line += ["--target", room / target, "--preview", *LINE, *words]
    result = CliRunner().invoke(app, list(map(str, line)))
    error = result.exception if isinstance(result.exception, prolora.ProLoRAError) else ""
    return result.exit_code, f"{result.output}{error}"


@pytest.fixture
def unopened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "open_pipeline", lambda *_: pytest.fail("it was loaded"))


def test_the_command_writes_a_page_and_no_lora(room, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.safetensors").write_bytes((room / "lora.safetensors").read_bytes())
    before = (tmp_path / "mine.safetensors").read_bytes()
    code, told = run(room, "-o", tmp_path / "fitted.safetensors")
    assert code == 0 and "A preview: no LoRA was written." in told
    assert "wrote lora-preview.html" in told
    page = (tmp_path / "lora-preview.html").read_text("utf-8")
    assert f'alt="{CHANGED}: cat"' in page and "predictions of source" in page
    assert {path.name for path in tmp_path.iterdir()} == {"lora-preview.html", "mine.safetensors"}
    assert (tmp_path / "mine.safetensors").read_bytes() == before
    # Its own page is replaced; a LoRA of someone else at -o is not looked at.
    code, told = run(room, "--report", "lora-preview.html", "--quiet")
    assert code == 0 and is_own(tmp_path / "lora-preview.html", "report")


def test_its_json_names_the_page_and_has_a_status_of_its_own(room, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, told = run(room, "--json")
    assert code == 0
    answer = json.loads(told)
    assert (answer["status"], answer["page"]) == ("previewed", "lora-preview.html")
    assert (answer["dry_run"], answer["preview"]) == (False, True)  # both models ran
    assert answer["out"] is None and (tmp_path / answer["page"]).is_file()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--report", "theirs.html"], "theirs.html"),
        (["--report", "page.json"], "a name that ends in .html"),
        (["--report", "-"], "a name that ends in .html"),
        (["--dry-run"], "--dry-run runs none"),
        (["{lora}"], "one LoRA"),
        (["--max-memory", "1KiB"], "too little"),
        (["--max-vram", "12GB"], "runs on the CPU"),
    ],
)
def test_what_cannot_be_previewed_is_refused_before_a_model_is_loaded(
    room, tmp_path, monkeypatch, unopened, words, told
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.html").write_text("mine")
    code, said = run(room, *(w.format(lora=room / "lora.safetensors") for w in words))
    assert code and told in said
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("theirs.html", "mine")]


def test_latents_that_differ_are_refused_with_what_to_do_instead(room, unopened):
    ends = room / "lora.safetensors", room / "source", room / "other"
    with pytest.raises(prolora.UnsupportedFormat, match=r"latents do not allow: .* Fit the LoRA"):
        prolora.preview_fit(*ends, FEW)


def test_a_preview_that_is_cancelled_leaves_the_earlier_page_and_nothing_beside_it(
    room, tmp_path, monkeypatch
):
    class Cancelled(Exception):
        pass

    seen = []

    def cancel(done: int, total: int, name: str) -> None:
        seen.append((done, total, name))
        if name == "target":
            raise Cancelled

    monkeypatch.chdir(tmp_path)
    ends = room / "lora.safetensors", room / "source", room / "target"
    with pytest.raises(Cancelled):
        prolora.preview_fit(*ends, FEW, progress=cancel)
    assert [name for _, _, name in seen].count("source + LoRA") == 2
    assert all(0 <= done < total for done, total, _ in seen)
    (tmp_path / "page.html").write_text("before")
    draw = Pipeline.sample_latents

    def stop(self, prompt, settings, seed, output="latent"):
        if output == "pt" and self.name == "target":
            raise KeyboardInterrupt
        return draw(self, prompt, settings, seed, output)

    monkeypatch.setattr(Pipeline, "sample_latents", stop)
    code, _ = run(room, "--report", "page.html", "--overwrite")
    assert code and (tmp_path / "page.html").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_images_that_cannot_be_drawn_end_it_with_the_reason(room, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "prolora.workflow.by_fitting.showing.read_pixels",
        lambda _: (_ for _ in ()).throw(prolora.NonFiniteWeights("an image of NaN")),
    )
    code, told = run(room)
    assert code and "an image of NaN" in told and not list(tmp_path.iterdir())


def test_its_need_of_the_card_is_its_own_and_not_that_of_a_fit(room, monkeypatch):
    """A fit of a high rank needs more: the target's factors, and their moments."""
    monkeypatch.setattr(vram, "CONTEXT", 0)
    monkeypatch.setattr(running, "_is_card", lambda _: True)
    ends = room / "lora.safetensors", room / "source", room / "target"
    asked = replace(FEW, rank=256, device="cpu")
    job = prepare_fit(ends[0], *map(prolora.open_base, ends[1:]), asked)
    needs = {}
    for fits in (True, False):
        with pytest.raises(prolora.TooLittleMemory) as refused:
            bounded = replace(job, options=replace(asked, max_vram="1"))
            running.plan_memory_of_card(bounded, fits)
        told = re.search(r"needs ([\d.]+) MiB", str(refused.value))
        needs[fits] = float(told[1])
    assert needs[True] > 1.1 * needs[False]
    asked = replace(asked, max_vram=f"{1.05 * needs[False]:.2f}MiB")
    with pytest.raises(prolora.TooLittleMemory):
        prolora.plan_fit(*ends, asked)
    drawn = prolora.preview_fit(*ends, asked).grid
    assert drawn is not None and CHANGED in drawn.columns


@pytest.mark.slow
def test_on_a_card_that_swaps_blocks_the_images_are_the_same(room, monkeypatch):
    """The CPU plays the card; both models are there, and images are decoded."""
    monkeypatch.setattr(vram, "CONTEXT", 0)
    monkeypatch.setattr(running, "_is_card", lambda _: True)
    card = Card()
    monkeypatch.setattr(swapping, "bring_weight", card.bring)
    asked, drawn, rooms = [], [], [0, 10**9]
    plan = pipelines.plan_card

    def note(limit, ends, settings, rank, crosses, fits=True):
        asked.append((settings.precision, crosses, fits))
        made = plan(limit, ends, settings, rank, crosses, fits)
        return made if fits else replace(made, rooms=(rooms.pop(),) * 2)

    monkeypatch.setattr(pipelines, "plan_card", note)
    while rooms:
        assert not card.visits
        drawn.append(preview(room, "target", max_vram="1GB", device="cpu"))
    assert card.visits and not card.held and asked == [("float32", True, False)] * 2
    for name, images in drawn[0].items():
        assert all(np.array_equal(a, b) for a, b in zip(images, drawn[1][name], strict=True))
