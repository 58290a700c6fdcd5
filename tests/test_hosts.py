"""The examples of hosts run: a real host where there is one, else a stand-in."""

from __future__ import annotations

import importlib.util
import runpy
import sys
import types
from collections.abc import Mapping
from pathlib import Path

import mini
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import prolora

HOSTS = Path(__file__).parents[1] / "examples/hosts"
NAME = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def open_example(monkeypatch):
    """Returns an example's module; `hosts` are the modules that it imports."""

    def open_one(name: str, hosts: Mapping[str, object] | None = None):
        for host, module in (hosts or {}).items():
            monkeypatch.setitem(sys.modules, host, module)
        spec = importlib.util.spec_from_file_location(name, HOSTS / f"{name}.py")
        example = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(example)
        return example

    return open_one


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    source, noise = torch.randn(2, 64, 48, generator=generator)
    up, down = torch.ones(64, 2), torch.randn(2, 48, generator=generator)
    return source, source + 0.05 * noise, up, down


def test_every_host_is_served_in_twenty_lines():
    lines = {file.stem: len(file.read_text("utf-8").splitlines()) for file in HOSTS.glob("*.py")}
    assert len(lines) == 5 and max(lines.values()) <= 20, lines


def test_sd_mecha_adds_the_projection_of_what_training_added(open_example, weights):
    kinds = dict.fromkeys(("Parameter", "Return"), lambda kind: kind)
    sd_mecha = types.SimpleNamespace(merge_method=lambda function: function, **kinds)
    add_moved = open_example("sd_mecha_method", {"sd_mecha": sd_mecha}).add_moved
    source, target, up, down = weights
    wanted = target + prolora.project(up @ down, source, target)
    torch.testing.assert_close(add_moved(target, source, source + up @ down), wanted)
    bias = torch.ones(3)
    assert add_moved(bias, bias, bias + 1) is bias


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_recipe_of_state_dicts_adds_the_moved_lora(open_example, weights, kind):
    def convert(tensors):
        return {k: x.numpy() if kind == "numpy" else x for k, x in tensors.items()}

    source, target, up, down = weights
    lora = {f"unet.{NAME}.lora_A.weight": down, f"unet.{NAME}.lora_B.weight": up}
    bases = {f"{NAME}.weight": source}, {f"{NAME}.weight": target}
    bake_moved = open_example("state_dicts").bake_moved
    (made,) = bake_moved(*map(convert, (lora, *bases)), strength=0.5).values()
    assert type(made) is (np.ndarray if kind == "numpy" else torch.Tensor)
    torch.testing.assert_close(torch.as_tensor(made), target + 0.5 * up @ down)


def test_a_script_like_kohyas_writes_fp16_from_bases_that_stay_closed(tmp_path, monkeypatch):
    lora, source, target = mini.write_case(tmp_path)
    files = [next(folder.rglob("*.safetensors")) for folder in (source, target)]
    out = tmp_path / "out.safetensors"
    monkeypatch.setattr(sys, "argv", ["kohya_script", *map(str, (*files, lora, out))])
    runpy.run_path(str(HOSTS / "kohya_script.py"), run_name="__main__")
    made = load_file(out)
    assert {x.dtype for key, x in made.items() if "lora_" in key.split(".")[1]} == {torch.float16}
    wanted = prolora.transfer(lora, *files, format="kohya", dtype="float16").state_dict()
    assert made.keys() == wanted.keys() and all(torch.equal(made[k], wanted[k]) for k in made)


def test_a_pipeline_of_diffusers_has_the_moved_lora(open_example, tmp_path):
    import tiny_pipelines as tiny
    from diffusers import StableDiffusionPipeline

    tiny.save(tmp_path / "sd15")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "sd15", safety_checker=None)
    name = next(n for n, _ in pipe.unet.named_modules() if n.endswith("attn1.to_v"))
    shape = pipe.unet.get_submodule(name).weight.shape
    lora = {f"unet.{name}.lora_A.weight": torch.ones(2, shape[1]),
            f"unet.{name}.lora_B.weight": torch.ones(shape[0], 2)}  # fmt: skip
    source = {k: x.clone() for k, x in pipe.unet.state_dict().items()}
    report = open_example("diffusers_pipeline").load(pipe, lora, source)
    layer = pipe.unet.get_submodule(name)
    update = layer.get_delta_weight(layer.active_adapters[0])
    torch.testing.assert_close(update, torch.full(shape, 2.0))
    assert "1 of 1 modules moved" in report


def test_a_node_of_comfyui_patches_the_second_model(open_example, weights, tmp_path):
    source, target, up, down = weights
    path = tmp_path / "lora.safetensors"
    save_file({f"unet.{NAME}.lora_A.weight": down, f"unet.{NAME}.lora_B.weight": up}, path)
    comfy = types.SimpleNamespace(
        load_lora_for_models=lambda model, clip, tensors, *strengths: (tensors, clip)
    )
    folders = types.SimpleNamespace(
        get_filename_list=lambda kind: [path.name], get_full_path=lambda kind, name: str(path)
    )
    hosts = {"comfy": types.SimpleNamespace(sd=comfy), "comfy.sd": comfy, "folder_paths": folders}
    node = open_example("comfyui_node", hosts).LoadMovedLora

    def patch(weight):
        network = {f"{NAME}.weight": weight}
        return types.SimpleNamespace(model=types.SimpleNamespace(diffusion_model=network))

    assert node.INPUT_TYPES()["required"]["lora"] == ([path.name],)
    (tensors,) = node().load(patch(source), patch(target), path.name)
    (moved,) = prolora.convert(tensors).adapter.updates.values()
    torch.testing.assert_close(moved.dense(), up @ down)
