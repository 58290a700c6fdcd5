"""The examples run, and what they say is what the libraries that they use say."""

from __future__ import annotations

import importlib.util
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import tiny_judges as judges
import tiny_pipelines as tiny
import torch
import transformers
from diffusers import StableDiffusionPipeline
from PIL import Image

from prolora.fitting import pipelines

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
        ("transfer", "34 of 44 modules moved"),
        ("check", "44 of 44 modules have their place"),
        ("convert", "441664 bytes became"),
        ("embed", "1 of 1 modules moved"),
        pytest.param("fit", "44 modules fitted", marks=pytest.mark.slow),
    ],
)
def test_a_short_example_runs(name, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = EXAMPLES / f"{name}.py"
    runpy.run_path(str(file), run_name="__main__")
    assert said in capsys.readouterr().out
    assert len(file.read_text("utf-8").splitlines()) <= (41 if name == "embed" else 20)


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    tiny.save(folder / "sd15")
    unet = pipelines.open_pipeline(folder / "sd15").denoiser
    tiny.write_lora(folder / "lora.safetensors", tiny.updates(unet, ("attn1.to_v",), 0.5))
    torch.manual_seed(5)
    for weight in unet.parameters():
        weight.data += 1e-4 * weight.std().nan_to_num() * torch.randn(weight.shape)
    tiny.save(folder / "tuned", unet=unet)
    judges.save_clip(folder / "clip")
    return folder


def test_an_evaluation_draws_what_diffusers_draws_and_judges_as_transformers(room, tmp_path):
    example = load_example("evaluate")
    clip = example.load_clip(room / "clip")
    bases = room / "sd15", room / "tuned"
    asked = {"strengths": (1.0, 0.5), "prompts": ("cat", "dog"), "seeds": (0, 1)}
    metrics = {"pixels": example.measure_pixels, **clip}
    found = example.evaluate(
        *bases, room / "lora.safetensors", [], tmp_path / "out",
        metrics=metrics, num_inference_steps=2, **asked,
    )  # fmt: skip
    assert list(found) == ["target", "copy × 1", "copy × 0.5"]
    assert json.loads((tmp_path / "out/scores.json").read_text()) == json.loads(json.dumps(found))
    pipe = StableDiffusionPipeline.from_pretrained(room / "tuned")
    pipe.load_lora_weights(room / "lora.safetensors")
    noise = torch.Generator().manual_seed(1)
    theirs = pipe("cat", num_inference_steps=2, generator=noise).images[0]
    ours = Image.open(tmp_path / "out/3-1.png")
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1
    # The copy on the source itself is what the source draws with the LoRA.
    assert found["copy × 1"]["pixels"]["mean"][0] == pytest.approx(0, abs=2e-3)
    assert found["copy × 0.5"]["pixels"]["minus copy"][2] < 0
    model = transformers.CLIPModel.from_pretrained(room / "clip")
    processor = transformers.CLIPProcessor.from_pretrained(room / "clip")
    with torch.no_grad():
        said = model(**processor(text=["cat"], images=[ours], return_tensors="pt"))
    wanted = float(said.logits_per_image / model.logit_scale.exp())
    assert clip["CLIP-T"]([ours], ["cat"], [])[0] == pytest.approx(wanted, abs=1e-5)


def test_an_evaluation_runs_no_code_of_a_folder(room, tmp_path):
    index = json.loads((room / "sd15/model_index.json").read_text())
    for change in ({"unet": ["my_unet", "Mine"]}, {"_class_name": ["pipeline", "Mine"]}):
        (tmp_path / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(SystemExit, match="code of its own"):
            load_example("evaluate").open_pipeline(tmp_path)
