"""What moved LoRAs give is drawn once, judged as the metrics' own libraries judge it, and told."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tiny_judges as judges
import tiny_pipelines as tiny
import torch
import transformers
from diffusers import StableDiffusionPipeline
from PIL import Image

import prolora
from prolora.probe import pipelines
from prolora.workflow.by_weights.base_pair import read_lora
from prolora.workflow.evaluating import drawing, metrics
from prolora.workflow.evaluating.entrants import COPY, Entrant, read_subjects
from prolora.workflow.evaluating.statistics import Estimate

SAMPLING = prolora.FitSettings(("cat", "dog"), images=2, steps=2, shown_prompts=2)


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny.save(folder / "sd15")
        unet = pipelines.open_pipeline(folder / "sd15").denoiser
        torch.manual_seed(5)
        for weight in unet.parameters():
            weight.data += 0.02 * weight.std().nan_to_num() * torch.randn(weight.shape)
        tiny.save(folder / "tuned", unet=unet)
        files = folder / "loras"
        files.mkdir()
        for name, size in (("one", 0.3), ("two", 0.6)):
            updates = tiny.updates(unet, ("attn1.to_v", "attn2.to_q"), size)
            tiny.write_lora(files / f"{name}.safetensors", updates)
        judges.save_clip(folder / "clip")
        judges.save_csd(folder / "csd")
        judges.save_dinov2(folder / "dinov2")
    bases = folder / "sd15", folder / "tuned"
    for name in ("one", "two"):
        lora = files / f"{name}.safetensors"
        prolora.transfer_file(lora, *bases, folder / "moved" / lora.name, method="prolora")
        prolora.transfer_file(
            lora, *bases, folder / "trained" / lora.name, method="copy", strength=1.5
        )
    return folder


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run(room: Path, out: Path, lora: str = "loras/one.safetensors", **more) -> prolora.Evaluation:
    """Most of them share a folder, for its images."""
    moved = [room / lora.replace("loras", "moved")]
    given = {"clip": room / "clip", "dinov2": room / "dinov2", "csd": room / "csd"}
    more = {"sampling": SAMPLING, "metrics": given, "overwrite": True, **more}
    return prolora.evaluate(room / "sd15", room / "tuned", room / lora, moved, out, **more)


@pytest.fixture(scope="module")
def evaluated(room, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "evaluation"
    more = {"methods": ("auto",), "trained": room / "trained" / "one.safetensors"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(room, out, **more), out


def read(out: Path, evaluation: prolora.Evaluation, row: str) -> list[Image.Image]:
    cells = [cell for cell in evaluation.images if cell.row == row]
    return [Image.open(out / "images" / evaluation.images[cell]) for cell in cells]


def test_every_row_is_there_and_told(evaluated):
    done, out = evaluated
    rows = ("source", "source + LoRA", "target", "copy", "auto")
    assert done.rows == (*rows, "one", "trained")
    told = json.loads((out / "evaluation.json").read_text())
    assert list(told["rows"]) == list(done.rows) and len(told["images"]) == 7 * 4
    assert set(told["skipped"]) == {"HPSv2", "PickScore"}
    assert told["rows"]["copy"]["norm"] == pytest.approx(1)
    assert told["rows"]["trained"]["norm"] == pytest.approx(1.5)
    assert told["rows"]["trained"]["minus_copy"]["DINOv2"]["low"] is not None
    page = (out / "evaluation.html").read_text()
    assert page.count("<img") == 2 * 7 and done.in_words().headline in page


def test_every_image_is_what_diffusers_draws_of_the_same_files(evaluated, room):
    done, out = evaluated
    files = {
        "source": ("sd15", None),
        "source + LoRA": ("sd15", "loras"),
        "target": ("tuned", None),
        "copy": ("tuned", "loras"),
        "one": ("tuned", "moved"),
        "trained": ("tuned", "trained"),
    }
    for row, (folder, lora) in files.items():
        pipe = StableDiffusionPipeline.from_pretrained(room / folder)
        pipe.set_progress_bar_config(disable=True)
        if lora:
            pipe.load_lora_weights(room / lora / "one.safetensors")
        for cell in (cell for cell in done.images if cell.row == row):
            noise = torch.Generator().manual_seed(cell.seed)
            theirs = pipe(cell.prompt, num_inference_steps=2, generator=noise).images[0]
            ours = Image.open(out / "images" / done.images[cell])
            apart = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int))
            assert apart.max() <= 1, (row, cell)


def test_clip_scores_are_those_of_transformers(evaluated, room):
    done, out = evaluated
    model = transformers.CLIPModel.from_pretrained(room / "clip")
    processor = transformers.CLIPProcessor.from_pretrained(room / "clip")
    ours, theirs = read(out, done, "one"), read(out, done, "source + LoRA")
    prompts = [cell.prompt for cell in done.images if cell.row == "one"]
    with torch.no_grad():
        said = [
            model(**processor(text=prompts, images=images, return_tensors="pt", padding=True))
            for images in (ours, theirs)
        ]
    wanted = said[0].logits_per_image.diag() / model.logit_scale.exp()
    assert torch.allclose(done.scores["CLIP-T"]["one"].flatten().float(), wanted, atol=1e-5)
    alike = torch.cosine_similarity(said[0].image_embeds, said[1].image_embeds)
    assert torch.allclose(done.scores["CLIP-I"]["one"].flatten().float(), alike, atol=1e-5)


@pytest.mark.parametrize(("name", "score"), [("dinov2", "DINOv2"), ("csd", "CSD")])
def test_likeness_is_that_of_transformers(evaluated, room, name, score):
    done, out = evaluated
    kind = {"dinov2": transformers.Dinov2Model}.get(
        name, transformers.CLIPVisionModelWithProjection
    )
    model = kind.from_pretrained(room / name)
    processor = transformers.AutoImageProcessor.from_pretrained(room / name)

    def embed(row):
        pixels = processor(images=read(out, done, row), return_tensors="pt")
        with torch.no_grad():
            said = model(**pixels)
        return said.pooler_output if name == "dinov2" else said.image_embeds

    wanted = torch.cosine_similarity(embed("one"), embed("source + LoRA"))
    assert torch.allclose(done.scores[score]["one"].flatten().float(), wanted, atol=1e-5)


def test_preference_models_score_as_they_were_published(room):
    """HPSv2's score is a cosine, PickScore's is a logit."""
    image = Image.effect_mandelbrot((24, 24), (-3, -2.5, 2, 2.5), 100).convert("RGB")
    model = transformers.CLIPModel.from_pretrained(room / "clip")
    processor = transformers.CLIPProcessor.from_pretrained(room / "clip")
    with torch.no_grad():
        logit = model(**processor(text=["a cat"], images=[image], return_tensors="pt"))
    scale, logit = float(model.logit_scale.exp()), float(logit.logits_per_image)
    for name, wanted in (("hpsv2", logit / scale), ("pickscore", logit)):
        said = metrics.open_metric(name, room / "clip", None)([image], ["a cat"], [])
        assert list(said.values()) == [[pytest.approx(wanted, abs=1e-5)]]


def measure_mmd(x: torch.Tensor, y: torch.Tensor) -> float:
    """As bench/quality/judge.py has it."""
    width = torch.pdist(y).median()

    def kernel(a, b):
        return (-(torch.cdist(a, b) / width).square() / 2).exp()

    def within(a):
        return (kernel(a, a).sum() - len(a)) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


def test_the_discrepancy_is_split_into_numbers_that_can_be_resampled():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 3, generator=generator).double() for n in (60, 60))
    whole = measure_mmd(x + 1, y)
    split = metrics.split_mmd(x + 1, y)
    assert float(split.mean()) == pytest.approx(whole, abs=1e-12)
    # Its spread over fresh samples is the one that resampling the numbers tells.
    fresh = [
        measure_mmd(torch.randn(60, 3, generator=generator).double() + 1, y) for _ in range(200)
    ]
    assert float(split.std()) / 60**0.5 == pytest.approx(float(np.std(fresh)), rel=0.3)
    # As leaving out one after the other has it.
    left = [measure_mmd(torch.cat([x[:i], x[i + 1 :]]) + 1, y) for i in range(3)]
    assert split[:3].tolist() == pytest.approx([60 * whole - 59 * one for one in left])


def test_intervals_are_those_of_a_bootstrap_over_loras_prompts_and_seeds():
    values = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0)).double()
    values += torch.arange(8)[None, :, None]  # prompts differ more than seeds
    found = Estimate.of(values)
    drawn, random = [], np.random.default_rng(1)
    for _ in range(2000):
        rows = [random.integers(0, n, n) for n in values.shape]
        drawn.append(values.numpy()[np.ix_(*rows)].mean())
    assert found.mean == pytest.approx(float(values.mean()))
    assert found.low == pytest.approx(np.quantile(drawn, 0.025), abs=0.15)
    assert found.high == pytest.approx(np.quantile(drawn, 0.975), abs=0.15)
    assert found.smallest == pytest.approx(2.8 * np.std(drawn), rel=0.1)


def test_differences_of_the_stated_size_show_in_four_of_five_runs():
    generator = torch.Generator().manual_seed(0)
    runs = [Estimate.of(torch.randn(1, 100, 1, generator=generator)) for _ in range(80)]
    shift = np.mean([one.smallest for one in runs])
    shown = [one.low + shift > 0 for one in runs]
    assert 0.7 < np.mean(shown) < 0.9


def test_one_image_has_no_interval_and_shows_nothing():
    found = Estimate.of(torch.ones(1, 1, 1))
    assert found == Estimate(1.0) and found.sign == 0


def test_the_verdict_names_what_is_better_and_what_stays_hidden(evaluated):
    done, _ = evaluated
    better = {**done.scores["DINOv2"], "one": done.scores["DINOv2"][COPY] + 0.1}
    worse = {**done.scores["CLIP-T"], "one": done.scores["CLIP-T"][COPY] - 0.1}

    def tell(scores):
        rows = ("source", "source + LoRA", "target", "copy", "one")
        return replace(done, rows=rows, scores=scores).in_words()

    words = tell({"DINOv2": better})
    assert (words.mark, words.headline) == ("✔", "Better than the copied LoRA: one.")
    assert "one is better than the copy: DINOv2 +0.1 (+0.1 to +0.1)." in words.lines
    assert tell({"CLIP-T": worse}).headline.endswith("none is better.")
    mixed = tell({"DINOv2": better, "CLIP-T": worse})
    assert mixed.mark == "⚠" and "in some scores, worse in others: one." in mixed.headline
    same = tell({"CLIP-T": {**worse, "one": worse[COPY]}})
    assert same.headline.endswith("no difference shows.")
    assert any("row: 4." in line for line in same.cautions)
    assert tell({}).headline == "The images are drawn, and no metric judged them: look at the page."


def test_less_is_better_in_a_discrepancy(evaluated):
    done, _ = evaluated
    assert done.lower == {"CSD-MMD"}
    scores = {"CSD-MMD": {**done.scores["CSD-MMD"], "one": done.scores["CSD-MMD"][COPY] - 1}}
    assert replace(done, scores=scores).compare("one", COPY)[0]


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_json(evaluated, room, tmp_path):
    whole, there = evaluated
    code = f"""
import os, signal, sys, warnings
sys.path[:0] = {[str(Path(judges.__file__).parent)]!r}
import prolora
def stop(done, total, name):
    if done == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
warnings.simplefilter("ignore")
room = {str(room)!r}
prolora.evaluate(
    f"{{room}}/sd15", f"{{room}}/tuned", f"{{room}}/loras/one.safetensors",
    [f"{{room}}/moved/one.safetensors"], {str(tmp_path / "out")!r},
    sampling=prolora.FitSettings(("cat", "dog"), images=2, steps=2, shown_prompts=2),
    metrics={{name: f"{{room}}/{{name}}" for name in ("clip", "dinov2", "csd")}},
    methods=("auto",), trained=f"{{room}}/trained/one.safetensors",
    progress=stop,
)
"""
    for count in (3, 17):
        ended = subprocess.run([sys.executable, "-c", code, str(count)], capture_output=True)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert len(list((tmp_path / "out/images").glob("*.png"))) == count
    drawn = []
    run(
        room,
        tmp_path / "out",
        methods=("auto",),
        trained=room / "trained" / "one.safetensors",
        progress=lambda done, total, name: drawn.append(done),
    )
    assert min(drawn) == 17
    names = ("evaluation.json", "evaluation.html")
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (there / name).read_bytes()
    # All is there: nothing is opened, and a damaged image is drawn again.
    victim = next((tmp_path / "out/images").glob("*.png"))
    kept = victim.read_bytes()
    victim.write_bytes(kept[:-40] + bytes(40))
    again = run(room, tmp_path / "out", trained=room / "trained/one.safetensors", methods=("auto",))
    assert victim.read_bytes() == kept and len(again.images) == len(whole.images)


def test_finished_images_need_no_pipeline(evaluated, room, monkeypatch):
    done, out = evaluated
    monkeypatch.setattr(pipelines, "open_pipeline", lambda *_: pytest.fail("it was opened"))
    less = run(room, out)
    assert set(less.images.values()) < set(done.images.values())
    monkeypatch.undo()
    other = prolora.FitSettings(("cat", "dog"), images=2, steps=3)
    monkeypatch.setattr(pipelines, "open_pipeline", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(room, out, sampling=other)
    assert os.path.exists(out / "evaluation.json")


def test_an_evaluation_of_other_settings_is_not_replaced_without_being_asked(room, tmp_path):
    out, loras = tmp_path / "out", [room / f"loras/{name}.safetensors" for name in ("one", "two")]
    bases, few = (room / "sd15", room / "tuned"), replace(SAMPLING, prompts=("cat",), images=1)

    def draw(lora: Path, **more) -> prolora.Evaluation:
        return prolora.evaluate(*bases, lora, [], out, **{"sampling": few, **more})

    draw(loras[0])
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    for more in ({"sampling": replace(few, seed=4)}, {"metrics": {"clip": room / "clip"}}):
        with pytest.raises(prolora.OutputError, match="an evaluation of other files or settings"):
            draw(loras[0], **more)
    with pytest.raises(prolora.OutputError, match="`overwrite=True`"):
        draw(loras[1])
    assert len(list((out / "images").iterdir())) == 4  # nothing was drawn for what was refused
    draw(loras[0])  # the same once more
    assert before == {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    draw(loras[1], overwrite=True)
    assert (out / "evaluation.json").read_bytes() != before["evaluation.json"]
    (out / "evaluation.json").unlink()
    with pytest.raises(prolora.OutputError, match="has a page without its evaluation"):
        draw(loras[0])  # nobody knows of what the page is


def test_scores_of_the_same_files_and_settings_are_replaced(room, tmp_path):
    lora, few = room / "loras/one.safetensors", replace(SAMPLING, prompts=("cat",), images=1)
    count = itertools.count(1)

    def judge(images, *_) -> dict[str, list[float]]:  # as no metric on a GPU repeats its bits
        return {"score": [1 + 1e-6 * next(count)] * len(images)}

    def draw(**metrics) -> prolora.Evaluation:
        given = (room / "sd15", room / "tuned", lora, [], tmp_path / "out")
        return prolora.evaluate(*given, sampling=few, metrics=metrics)

    def read_mean() -> float:
        told = json.loads((tmp_path / "out/evaluation.json").read_text())
        return told["rows"]["copy"]["scores"]["score"]["mean"]

    draw(m=judge)
    before = read_mean()
    draw(m=judge)
    assert read_mean() > before
    with pytest.raises(prolora.OutputError, match="other files or settings"):
        draw(m=lambda images, *_: {"score": [1.0] * len(images)})  # which is another function


def test_other_weights_of_a_metric_are_told_before_anything_is_drawn(room, tmp_path, monkeypatch):
    few = replace(SAMPLING, prompts=("cat",), images=1)
    clip = tmp_path / "clip"
    shutil.copytree(room / "clip", clip)
    (tmp_path / "like").mkdir()

    def draw() -> prolora.Evaluation:
        return run(
            room,
            tmp_path / "out",
            sampling=few,
            metrics={"clip": clip},
            overwrite=False,
            reference=tmp_path / "like",
        )

    def like(colour: str) -> None:
        Image.new("RGB", (8, 8), colour).save(tmp_path / "like" / "a.png")

    like("black")
    draw()
    draw()
    monkeypatch.setattr(drawing.ImageFolder, "draw_missing", lambda *_: pytest.fail("it was drawn"))
    like("red")
    with pytest.raises(prolora.OutputError, match="other files or settings"):
        draw()
    like("black")
    tensors = safetensors.torch.load_file(clip / "model.safetensors")
    tensors["visual_projection.weight"] += 1
    safetensors.torch.save_file(tensors, clip / "model.safetensors", {"format": "pt"})
    with pytest.raises(prolora.OutputError, match="other files or settings"):
        draw()


def test_another_device_is_told_as_such(room, tmp_path, monkeypatch):
    lora, few = room / "loras/one.safetensors", replace(SAMPLING, prompts=("cat",), images=1)
    given = (room / "sd15", room / "tuned", lora, [], tmp_path / "out")
    module = importlib.import_module("prolora.workflow.evaluate")
    make = module._list_made_of
    with monkeypatch.context() as there:
        there.setattr(module, "_list_made_of", lambda *more: make(*more) | {"device": "cuda"})
        prolora.evaluate(*given, sampling=few)
    with pytest.raises(prolora.OutputError, match="was drawn on cuda, and this run draws on cpu"):
        prolora.evaluate(*given, sampling=few)


def test_a_folder_that_holds_something_else_is_no_output(room, tmp_path, undrawn):
    lora, bases = room / "loras/one.safetensors", (room / "sd15", room / "tuned")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("draw it")
    for folder in (room / "tuned", tmp_path / "notes"):
        before = sorted(folder.iterdir())
        with pytest.raises(prolora.OutputError, match="name another folder"):
            prolora.evaluate(*bases, lora, [], folder, sampling=SAMPLING, overwrite=True)
        assert sorted(folder.iterdir()) == before


def test_a_lora_that_overflows_is_a_row_with_its_reason(room, tmp_path):
    unet = pipelines.open_pipeline(room / "tuned").denoiser
    updates = tiny.updates(unet, ("attn1.to_v", "attn2.to_q", "ff.net.2"), 1e25)
    tiny.write_lora(tmp_path / "huge.safetensors", updates)
    shutil.copy(room / "loras/one.safetensors", tmp_path / "one.safetensors")
    few = {"sampling": replace(SAMPLING, prompts=("cat",)), "metrics": {"clip": room / "clip"}}
    bases, one = (room / "sd15", room / "tuned"), tmp_path / "one.safetensors"
    done = prolora.evaluate(*bases, one, [tmp_path / "huge.safetensors"], tmp_path / "a", **few)
    assert done.rows == ("source", "source + LoRA", "target", "copy")
    assert "NaN" in done.skipped["huge"] and "Left out: huge" in str(done.in_words())
    # Where it is the LoRA itself, nothing is left to be like.
    huge = tmp_path / "huge.safetensors"  # moved it is as its copy, and has the same images
    told: list[tuple[int, int]] = []
    watched = few | {"progress": lambda done, total, _: told.append((done, total))}
    done = prolora.evaluate(*bases, huge, [huge], tmp_path / "b", **watched)
    assert told[-1][0] == told[-1][1]  # what cannot be drawn is done as well
    assert "Likeness" not in (tmp_path / "b/evaluation.html").read_text()
    assert done.reference == "" and "likeness to" in str(done.skipped)
    assert done.rows == ("source", "target") and list(done.scores) == ["CLIP-T"]
    json.loads((tmp_path / "b/evaluation.json").read_text(), parse_constant=pytest.fail)
    # Of several LoRAs, the others are evaluated.
    loras = [one, tmp_path / "huge.safetensors"]
    done = prolora.evaluate(*bases, loras, [], tmp_path / "c", **few)
    assert [subject.name for subject in done.subjects] == ["one.safetensors"]
    assert done.rows == ("source", "source + LoRA", "target", "copy")
    assert all(f"{row}: " in done.skipped["huge.safetensors"] for row in ("source + LoRA", "copy"))


def test_several_loras_share_what_does_not_depend_on_them(room, tmp_path):
    done = run(room, tmp_path / "out", "loras", trained=room / "trained")
    assert [subject.name for subject in done.subjects] == ["one.safetensors", "two.safetensors"]
    assert done.rows[-2:] == ("moved", "trained") and done.scores["DINOv2"]["moved"].shape == (
        2,
        2,
        2,
    )
    # Both bare models, and four rows of each LoRA.
    assert len(list((tmp_path / "out/images").glob("*.png"))) == 4 * (2 + 2 * 4)
    (tmp_path / "moved").mkdir()
    with pytest.raises(prolora.MissingFile, match="a folder needs a file of the same name"):
        prolora.evaluate(
            room / "sd15", room / "tuned", room / "loras", [tmp_path / "moved"], tmp_path / "out"
        )


def test_a_folder_of_images_is_a_reference_for_all(evaluated, room, tmp_path):
    done, out = evaluated
    (tmp_path / "idea").mkdir()
    images = read(out, done, "trained")[:3]
    for i, image in enumerate(images):
        image.save(tmp_path / "idea" / f"{i}.png")
    found = run(room, out, reference=tmp_path / "idea", metrics={"dinov2": room / "dinov2"})
    metric = metrics.open_metric("dinov2", room / "dinov2", None)
    (first, *_), _ = read(out, found, "one"), None
    alone = [metric([first.convert("RGB")], [""], [[x.convert("RGB")]])["DINOv2"] for x in images]
    assert float(found.scores["DINOv2"]["one"].flatten()[0]) == pytest.approx(np.mean(alone))
    assert "source + LoRA" in found.scores["DINOv2"]
    trained = run(
        room, out, reference="trained", trained=room / "trained/one.safetensors",
        metrics={"dinov2": room / "dinov2"},
    )  # fmt: skip
    assert "trained" not in trained.scores["DINOv2"] and "copy" in trained.scores["DINOv2"]


def test_a_function_is_a_metric(room, evaluated, tmp_path):
    _, out = evaluated

    def count_red(images, prompts, references):
        return {"red": [float(np.asarray(image)[..., 0].mean()) for image in images]}

    done = run(room, out, metrics={"red": count_red})
    assert set(done.scores) == {"red"} and done.scores["red"]["one"].shape == (1, 2, 2)
    for wrong in ([1.0], [1.0, 2.0, 3.0, float("nan")], "abcd"):
        with pytest.raises(prolora.ProLoRAError, match="the metric wrong"):
            run(room, tmp_path / "out", metrics={"wrong": lambda *_, said=wrong: {"x": said}})
    assert not (tmp_path / "out").exists()  # asked before anything was drawn


def test_prompts_that_are_given_twice_are_drawn_once(room, evaluated):
    _, out = evaluated
    twice = prolora.FitSettings(("cat", "dog", "cat"), images=2, steps=2)
    done = run(room, out, sampling=twice, metrics={"dinov2": room / "dinov2"})
    assert done.count == 4 and done.scores["DINOv2"]["one"].shape == (1, 2, 2)


def test_settings_that_no_drawing_uses_are_refused():
    for settings in ({"rank": 4}, {"max_memory": "2GiB"}, {"precision": "bfloat16"}):
        with pytest.raises(prolora.InvalidOption, match=next(iter(settings))):
            prolora.EvaluationOptions(sampling=prolora.FitSettings(**settings))
    for method in ("best", "magic"):  # the former may run the models for hours
        with pytest.raises(prolora.InvalidOption, match="methods"):
            prolora.EvaluationOptions(methods=(method,))


def test_a_text_encoder_that_the_target_lacks_is_told(room, tmp_path):
    """The source's is wider, so its part of the LoRA cannot run beside the target's."""
    tiny.save(tmp_path / "wide", text=16)
    update = prolora.LowRank(torch.ones(16, 1), torch.ones(1, 16))
    tensors = {
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": update.up,
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": update.down,
    }
    safetensors.torch.save_file(tensors, tmp_path / "text.safetensors")
    base = prolora.open_base(tmp_path / "wide")
    adapter = read_lora(tmp_path / "text.safetensors", base)
    there = Entrant.of(0, adapter, base)
    away = Entrant.of(1, adapter, prolora.open_base(room / "tuned"))
    assert (len(there.text), there.unheard) == (1, 0) and (len(away.text), away.unheard) == (0, 1)


def test_a_score_that_some_loras_do_not_have_is_left_out_of_all(room, tmp_path):
    seen = []

    def judge(images, prompts, references):
        seen.append(len(seen))
        # The first call judges grey images; the second has those of the first LoRA.
        some = {} if len(seen) == 2 else {"some": [1.0] * len(images)}
        return {"all": [1.0] * len(images)} | some

    loras = [room / f"loras/{name}.safetensors" for name in ("one", "two")]
    given = {"metrics": {"m": judge}, "sampling": SAMPLING}
    done = prolora.evaluate(room / "sd15", room / "tuned", loras, [], tmp_path / "out", **given)
    assert len(done.subjects) == 2
    assert "all" in done.scores and "some" not in done.scores and "some" in done.skipped


def test_a_folder_with_one_lora_takes_folders(room, tmp_path):
    for name in ("loras", "moved"):
        (tmp_path / name).mkdir()
        file = room / name / "one.safetensors"
        (tmp_path / name / file.name).write_bytes(file.read_bytes())
    bases = prolora.open_base(room / "sd15"), prolora.open_base(room / "tuned")
    options = prolora.EvaluationOptions()
    (subject,) = read_subjects(tmp_path / "loras", [tmp_path / "moved"], bases, options)
    assert "moved" in subject.entrants


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(pipelines, "open_pipeline", lambda *_: pytest.fail("a model was loaded"))


@pytest.mark.parametrize("damage", ["missing", "cut", "other", "nan", "pickle"])
def test_a_broken_metric_is_refused_before_a_model_is_loaded(room, tmp_path, undrawn, damage):
    folder = tmp_path / "judge"
    error = prolora.UnsupportedFormat
    if damage != "missing":
        judges.save_clip(folder)
    if damage == "other":
        judges.save_dinov2(folder)
    file = folder / "model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    if damage == "nan":
        model = transformers.CLIPModel.from_pretrained(folder)
        model.visual_projection.weight.data[0, 0] = float("nan")
        model.save_pretrained(folder)
        error = prolora.NonFiniteWeights
    if damage == "pickle":
        torch.save(transformers.CLIPModel.from_pretrained(folder).state_dict(),
                   folder / "pytorch_model.bin")  # fmt: skip
        file.unlink()
    with pytest.raises(error, match="judge"):
        run(room, tmp_path / "out", metrics={"clip": folder})
    assert not (tmp_path / "out").exists()


def test_what_does_not_belong_is_refused_before_a_model_is_loaded(room, tmp_path, undrawn):
    lora, out = room / "loras/one.safetensors", tmp_path / "out"
    bases = room / "sd15", room / "tuned"
    unet = room / "sd15/unet/diffusion_pytorch_model.safetensors"
    with pytest.raises(prolora.UnsupportedFormat, match="whole diffusers pipeline"):
        prolora.evaluate(unet, bases[1], lora, [], out)
    with pytest.raises(prolora.InvalidOption, match="no 'clap'"):
        run(room, out, metrics={"clap": room / "clip"})
    with pytest.raises(prolora.InvalidOption, match="trained"):
        run(room, out, reference="trained")
    with pytest.raises(prolora.UnsupportedFormat, match="no images"):
        run(room, out, reference=room / "loras")
    with pytest.raises(prolora.InvalidOption, match="lies in the output"):
        run(room, out, reference=out / "images")
    with pytest.raises(prolora.InvalidOption, match="two of `metrics` give the score 'one'"):
        run(room, out, metrics=dict.fromkeys("ab", lambda i, p, r: {"one": [1.0] * len(i)}))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(lora.read_bytes()[:-50])
    for files in ((broken, []), (lora, [broken])):
        with pytest.raises(prolora.UnsupportedFormat, match="broken"):
            prolora.evaluate(*bases, files[0], files[1], out)
    tiny.write_lora(tmp_path / "wide.safetensors", {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q":
            prolora.LowRank(torch.ones(20, 2), torch.ones(2, 20))})  # fmt: skip
    for files in ((tmp_path / "wide.safetensors", []), (lora, [tmp_path / "wide.safetensors"])):
        with pytest.raises(prolora.WrongBase, match="wide"):
            prolora.evaluate(*bases, files[0], files[1], out)
    copied = tmp_path / "copy.safetensors"
    copied.write_bytes((room / "moved/one.safetensors").read_bytes())
    with pytest.raises(prolora.InvalidOption, match="two rows or LoRAs are called 'copy'"):
        prolora.evaluate(*bases, lora, [copied], out)
    assert not out.exists()
    (out / "images").mkdir(parents=True)
    with pytest.raises(prolora.OutputError, match="did not write"):
        run(room, out)
    assert drawing.MARKER.is_in(out) is False
