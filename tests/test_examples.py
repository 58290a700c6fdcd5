"""The examples run, and what they say is what the libraries that they use say."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_judges as judges
import tiny_pipelines as tiny
import torch
import transformers
from diffusers import StableDiffusionPipeline
from PIL import Image
from prolora_icon_family import IconPipeline
from safetensors.torch import load_file

import prolora
from prolora import ProLoRAError
from prolora.fitting.pipelines.pipeline_opening import open_pipeline

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore")


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("transfer", "34 of 44 modules copied"),
        ("check", "44 of 44 modules have their place"),
        ("convert", "441664 bytes became"),
        ("embed", "1 of 1 modules copied"),
        pytest.param("fit", "44 modules fitted", marks=pytest.mark.slow),
    ],
)
def test_a_short_example_runs(name, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = EXAMPLES / f"{name}.py"
    runpy.run_path(str(file), run_name="__main__")
    assert said in capsys.readouterr().out
    assert len(file.read_text("utf-8").splitlines()) <= (41 if name == "embed" else 20)


def test_a_converter_by_hand_writes_what_transfer_projects(tmp_path):
    """Modules that `transfer` leaves out, because nothing of them is left, are zero here."""
    weights = EXAMPLES / "icon_family/weights"
    lora = weights / "loras/neon.safetensors"
    models = [weights / name for name in ("source", "far")]
    files = [next((folder / "transformer").glob("*.safetensors")) for folder in models]
    load_example("by_hand").main(lora, *files, tmp_path / "by_hand.safetensors")
    found = load_file(tmp_path / "by_hand.safetensors")
    done = prolora.transfer(lora, *models, method="prolora", threshold=0)
    moved = done.adapter.updates
    assert len(found) == 2 * 44
    for key in [key for key in found if key.endswith(".lora_A.weight")]:
        name = key.removesuffix(".lora_A.weight")
        update = found[f"{name}.lora_B.weight"].double() @ found[key].double()
        expected = moved.get(name.removeprefix("transformer."))
        if expected is None:
            assert update.norm() == 0
        else:
            wanted = expected.up.double() @ expected.down.double()
            assert (update - wanted).norm() < 1e-5 * wanted.norm()


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    tiny.save(folder / "sd15")
    unet = open_pipeline(folder / "sd15").denoiser
    tiny.write_lora(folder / "lora.safetensors", tiny.updates(unet, ("attn1.to_v",), 0.5))
    torch.manual_seed(5)
    for weight in unet.parameters():
        weight.data += 1e-4 * weight.std().nan_to_num() * torch.randn(weight.shape)
    tiny.save(folder / "tuned", unet=unet)
    judges.save_clip(folder / "clip")
    return folder


@pytest.fixture
def paper_table(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return load_example("paper_table")


def ask(room: Path, out: Path, **changed) -> list[str]:
    options = {"prompt": "cat", "seed": "0 1", "steps": "2", "strengths": "0.5 1"} | changed
    asked = [word for name, given in options.items() for word in (f"--{name}", *given.split())]
    models = str(room / "sd15"), str(room / "tuned"), str(room / "lora.safetensors")
    return [*models, "-o", str(out), *asked, "--metric", f"clip={room / 'clip'}"]


def test_the_table_draws_what_diffusers_draws_and_judges_as_transformers(
    room, tmp_path, paper_table
):
    table = paper_table.main(ask(room, tmp_path))
    assert list(table) == ["none", "copy × 0.5", "copy × 1", "auto", "prolora"]
    assert json.loads((tmp_path / "table.json").read_text("utf-8")) == table
    # The target is the source but for rounding, so a copy draws what the source does.
    assert table["copy × 1"]["pixels"][1] == pytest.approx(0, abs=2e-3)
    assert table["none"]["pixels"][1] < table["copy × 0.5"]["pixels"][1] < -2e-3
    pipe = StableDiffusionPipeline.from_pretrained(room / "tuned")
    pipe.load_lora_weights(room / "lora.safetensors")
    noise = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    expected = [pipe("cat", num_inference_steps=2, generator=n).images[0] for n in noise]
    grid = Image.open(tmp_path / "grid-lora.png").crop((0, 3 * 32 + 16, 16, 4 * 32))
    assert np.abs(np.asarray(grid).astype(int) - np.asarray(expected[0])).max() <= 1
    model = transformers.CLIPModel.from_pretrained(room / "clip")
    processor = transformers.CLIPProcessor.from_pretrained(room / "clip")
    with torch.no_grad():
        logits = model(**processor(text=["cat"], images=expected, return_tensors="pt"))
    wanted = float((logits.logits_per_image / model.logit_scale.exp()).mean())
    assert table["copy × 1"]["CLIP-T"][:2] == [1, pytest.approx(wanted, abs=2e-3)]


@pytest.mark.slow
def test_a_table_that_was_cut_off_goes_on_and_draws_what_changed_again(
    room, tmp_path, paper_table, monkeypatch
):
    first = paper_table.main(ask(room, tmp_path))
    monkeypatch.setattr(paper_table.Painter, "open", lambda *_: pytest.fail("drawn again"))
    assert paper_table.main(ask(room, tmp_path)) == first
    with pytest.raises(pytest.fail.Exception, match="drawn again"):
        paper_table.main(ask(room, tmp_path, steps="3"))


def test_the_table_runs_no_code_of_a_folder(room, tmp_path, paper_table):
    shutil.copytree(room / "sd15", tmp_path / "sd15")
    index = json.loads((room / "sd15/model_index.json").read_text())
    for change in ({"unet": ["my_unet", "Mine"]}, {"_class_name": ["pipeline", "Mine"]}):
        (tmp_path / "sd15/model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(ProLoRAError):
            paper_table.Painter(argparse.Namespace(out=tmp_path)).open(tmp_path / "sd15")


@pytest.mark.slow
def test_the_table_of_the_shipped_family_orders_none_copy_and_fit(tmp_path, paper_table, capsys):
    family = EXAMPLES / "icon_family/weights"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join((family / "prompts.txt").read_text().splitlines()[:8]))
    table = paper_table.main(
        [*(str(family / name) for name in ("source", "apart", "loras/neon.safetensors")), "-o",
         str(tmp_path / "out"), "--prompt", "face noto many on-blue", "--seed", "0", "1",
         "--steps", "8", "--fit-prompts", str(prompts)]
    )  # fmt: skip
    assert "neon: auto: " in capsys.readouterr().out
    assert table["none"]["pixels"][1] < table["fit"]["pixels"][1]


def test_the_pipeline_of_the_icons_names_its_parts_by_classes():
    """Up to its version 0.35, diffusers loads no pipeline whose signature has texts or `Any`."""
    parts = inspect.signature(IconPipeline.__init__).parameters.values()
    classes = {part.name: part.annotation for part in parts if part.name != "self"}
    names = {name: getattr(class_, "__name__", class_) for name, class_ in classes.items()}
    assert names == {"scheduler": "SchedulerMixin", "transformer": "FluxTransformer2DModel"}
