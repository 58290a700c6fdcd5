"""The examples of hosts run: with the host where it is installed, else with a stand-in."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import mini
import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from diffusers import StableDiffusionPipeline
from exchanged import Exchanged
from safetensors.torch import load_file, save_file

import prolora

HOSTS = Path(__file__).parents[1] / "examples/hosts"
NAME = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
pytestmark = pytest.mark.filterwarnings("ignore")


def run_host(name: str, run_name: str = "example") -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(HOSTS / f"{name}.py"), run_name=run_name))


def make_case():
    """A weight, a fine-tune of it, up and down."""
    source, noise = torch.randn(2, 64, 48, generator=torch.Generator().manual_seed(0))
    return source, source + 0.05 * noise, torch.ones(64, 2), torch.ones(2, 48)


def make_lora(up, down, name=NAME):
    return {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}


def test_every_host_is_served_in_twenty_lines():
    lines = [len(file.read_text("utf-8").splitlines()) for file in HOSTS.glob("*.py")]
    assert len(lines) == 6 and max(lines) <= 20


def test_sd_mecha_adds_the_projection_of_what_training_added(monkeypatch):
    kinds = dict.fromkeys(("Parameter", "Return", "merge_method"), lambda given: given)
    monkeypatch.setitem(sys.modules, "sd_mecha", SimpleNamespace(**kinds))
    add_moved = run_host("sd_mecha_method").add_moved
    source, target, up, down = make_case()
    wanted = target + prolora.project(up @ down, source, target)
    torch.testing.assert_close(add_moved(target, source, source + up @ down), wanted)


def test_cupy_gets_its_own_arrays_back_without_a_copy(monkeypatch):
    """With a stand-in on the CPU: cupy itself needs a GPU to make an array."""
    read = []

    class ndarray(Exchanged):
        def __dlpack__(self, **options):
            read.append(self.tensor.data_ptr())
            return super().__dlpack__(**options)

    ndarray.__module__ = "cupy"
    cupy = SimpleNamespace(
        __name__="cupy",
        from_dlpack=lambda tensor: ndarray(torch.from_dlpack(tensor)),
        asarray=lambda array: array,
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    source, target, up, down = make_case()
    found = run_host("cupy_arrays").move_update(*map(ndarray, (up, down, source, target)))
    assert read == [x.data_ptr() for x in (up, down, source, target)]
    assert [type(x) for x in found] == [ndarray, ndarray]
    wanted = prolora.project((up, down), source, target)
    torch.testing.assert_close(found[0].tensor @ found[1].tensor, wanted.dense())


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_recipe_of_state_dicts_adds_the_moved_lora(kind):
    source, target, up, down = make_case()
    given = make_lora(up, down), {f"{NAME}.weight": source}, {f"{NAME}.weight": target}
    if kind == "numpy":
        given = [{key: x.numpy() for key, x in tensors.items()} for tensors in given]
    (made,) = run_host("state_dicts").bake_moved(*given, strength=0.5).values()
    assert type(made) is (np.ndarray if kind == "numpy" else torch.Tensor)
    torch.testing.assert_close(torch.as_tensor(made), target + 0.5 * up @ down)


def test_a_script_like_kohyas_writes_fp16_from_files_that_it_opens_itself(tmp_path, monkeypatch):
    lora, *folders = mini.write_case(tmp_path)
    files = [next(folder.rglob("*.safetensors")) for folder in folders]
    out = tmp_path / "out.safetensors"
    monkeypatch.setattr(sys, "argv", ["script", *map(str, (*files, lora, out))])
    run_host("kohya_script", "__main__")
    made = load_file(out)
    wanted = prolora.transfer(lora, *files, format="kohya", dtype="float16").state_dict()
    assert made.keys() == wanted.keys() and all(torch.equal(made[k], wanted[k]) for k in made)


def test_a_pipeline_of_diffusers_has_the_moved_lora(tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(tiny.save(tmp_path / "sd15"))
    name = next(n for n, _ in pipe.unet.named_modules() if n.endswith("attn1.to_v"))
    out, inputs = pipe.unet.get_submodule(name).weight.shape
    source = {key: x.clone() for key, x in pipe.unet.state_dict().items()}
    lora = make_lora(torch.ones(out, 2), torch.ones(2, inputs), name)
    assert "1 of 1 modules copied" in run_host("diffusers_pipeline").load(pipe, lora, source)
    layer = pipe.unet.get_submodule(name)
    assert bool((layer.get_delta_weight(layer.active_adapters[0]) == 2).all())


def test_a_node_of_comfyui_patches_the_second_model(tmp_path, monkeypatch):
    source, target, up, down = make_case()
    path = tmp_path / "lora.safetensors"
    save_file(make_lora(up, down), path)
    patches = []
    comfy = SimpleNamespace(load_lora_for_models=lambda *given: patches.append(given) or given)
    folders = SimpleNamespace(
        get_filename_list=lambda kind: [path.name], get_full_path=lambda kind, name: str(path)
    )
    hosts = {"comfy": SimpleNamespace(sd=comfy), "comfy.sd": comfy, "folder_paths": folders}
    for host, module in hosts.items():
        monkeypatch.setitem(sys.modules, host, module)
    node = run_host("comfyui_node").LoadMovedLora
    assert node.INPUT_TYPES()["required"]["lora"] == ([path.name],)
    patchers = [
        SimpleNamespace(model=SimpleNamespace(diffusion_model={f"{NAME}.weight": weight}))
        for weight in (source, target)
    ]
    assert node().load(*patchers, path.name) == (patchers[1],)
    (moved,) = prolora.convert(patches[0][2]).adapter.updates.values()
    torch.testing.assert_close(moved.dense(), up @ down)
