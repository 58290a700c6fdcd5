"""The ComfyUI nodes, on a stand-in of ComfyUI's modules or on a real checkout (PROLORA_COMFYUI)."""

import asyncio
import importlib.util
import json
import re
import sys
from pathlib import Path

import comfyui_stand_in
import pytest
import torch
from mini import lora_tensors, source_weights, target_weights
from safetensors.torch import load_file, save_file

import prolora

PACK = Path(__file__).parents[2] / "integrations" / "comfyui"
BASES = {"source": "checkpoints/source.safetensors", "target": "checkpoints/target.safetensors"}
WIDGETS = {"method": "copy", "strength": 0.0, "format": "comfyui", "rank": "exact"}


def write_models(models):
    (models / "checkpoints").mkdir(parents=True)
    (models / "loras" / "styles").mkdir(parents=True)
    stranger = {name: torch.randn_like(weight) for name, weight in source_weights().items()}
    bases = {"source": source_weights(), "target": target_weights(), "stranger": stranger}
    for name, weights in bases.items():
        stored = {f"{module}.weight": weight for module, weight in weights.items()}
        save_file(stored, models / "checkpoints" / f"{name}.safetensors")
    for name in ("one", "styles/two"):
        save_file(lora_tensors(), models / "loras" / f"{name}.safetensors")


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.setenv("PROLORA_CACHE", str(tmp_path / "cache"))
    write_models(tmp_path / "models")
    return tmp_path / "models"


@pytest.fixture
def pack(models, monkeypatch):
    """The pack as ComfyUI imports it: from its folder, under a name of its own."""
    comfyui_stand_in.install(models, monkeypatch)
    return import_pack(monkeypatch)


def import_pack(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("comfyui_prolora")]:
        monkeypatch.delitem(sys.modules, name)
    spec = importlib.util.spec_from_file_location("comfyui_prolora", PACK / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "comfyui_prolora", module)
    spec.loader.exec_module(module)
    return module


def list_nodes(pack):
    extension = asyncio.run(pack.comfy_entrypoint())
    return {node.define_schema().node_id: node for node in asyncio.run(extension.get_node_list())}


def run(pack, name, **values):
    out = list_nodes(pack)[name].execute(**values)
    shown = out.ui.as_dict()["text"][0] if out.ui else None
    return out.result, shown


def test_a_lora_is_moved_below_the_folder_of_loras_and_the_report_is_shown(pack, models):
    (name, report), shown = run(pack, "ProloraMoveLora", lora="one.safetensors", **BASES, **WIDGETS)
    assert re.fullmatch(r"zz-moved/target/one-copy-[0-9a-f]{12}\.safetensors", name)
    assert shown == report
    assert "8 of 12 modules moved from source.safetensors to target.safetensors" in report
    assert "4 modules skipped: the target has no such module" in report
    header = load_file(models / "loras" / name)
    assert len(header) == 24
    again, _ = run(pack, "ProloraMoveLora", lora="one.safetensors", **BASES, **WIDGETS)
    assert (
        again[0] == name
        and "was there already" in again[1]
        and f"{Path(name).stem}.html" in again[1]
    )
    page = (models / "loras" / name).with_suffix(".html").read_text("utf-8")
    assert page.startswith("<!DOCTYPE html>") and "8 of 12 modules" in page


def test_a_pair_that_cannot_work_is_one_sentence_and_leaves_no_folder(pack, models):
    bases = BASES | {"target": "checkpoints/stranger.safetensors"}
    with pytest.raises(ValueError, match="have nothing in common") as error:
        run(
            pack, "ProloraMoveLora", lora="one.safetensors", **bases, **WIDGETS | {"method": "auto"}
        )
    assert error.value.__suppress_context__ and not (models / "loras" / "zz-moved").exists()


def test_the_stop_button_ends_the_job_and_leaves_nothing(pack, models, monkeypatch):
    import comfy.model_management as management

    class Stopped(Exception):
        pass

    def stop():
        raise Stopped

    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", stop)
    with pytest.raises(Stopped):
        run(pack, "ProloraMoveLora", lora="one.safetensors", **BASES, **WIDGETS)
    assert not (models / "loras" / "zz-moved").exists()


def test_advice_writes_nothing(pack, models):
    before = sorted(models.rglob("*"))
    (report,), shown = run(pack, "ProloraAdvise", lora="one.safetensors", **BASES)
    assert report == shown and report.startswith("Go") and "8 of 12 modules would move" in report
    (bases_alone,), _ = run(pack, "ProloraAdvise", lora="(none)", **BASES)
    assert "would move" not in bases_alone and sorted(models.rglob("*")) == before


def test_a_folder_is_moved_without_what_was_moved_before(pack, models):
    run(pack, "ProloraMoveLora", lora="one.safetensors", **BASES, **WIDGETS)
    (models / "loras" / "bad.safetensors").write_bytes(b"nothing")
    (report,), _ = run(pack, "ProloraMoveFolder", folder="(all)", **BASES, **WIDGETS)
    lines = report.splitlines()
    assert lines[0].startswith("bad.safetensors — failed:") and "already there" in lines[1]
    assert "two.safetensors — moved:" in lines[2] and lines[3] == "2 of 3 LoRAs are in place."
    (only,), _ = run(pack, "ProloraMoveFolder", folder="styles", **BASES, **WIDGETS)
    assert only.splitlines()[-1] == "1 of 1 LoRAs are in place."


def test_a_moved_lora_is_applied_and_moved_once(pack, models, monkeypatch):
    import comfy.sd

    applied = []

    def load(model, clip, tensors, strength_model, strength_clip):
        applied.append((set(tensors), strength_model, strength_clip))
        return "patched model", "patched clip"

    monkeypatch.setattr(comfy.sd, "load_lora_for_models", load)
    values = {"lora": "one.safetensors", **BASES, "method": "auto"}
    strengths = {"strength_model": 0.8, "strength_clip": 0.5}
    for _ in range(2):
        result, _ = run(pack, "ProloraLoadMovedLora", model="m", clip="c", **values, **strengths)
        assert result[:2] == ("patched model", "patched clip")
    (file,) = (models / "loras" / "zz-moved" / "target").glob("one-*.safetensors")
    written = load_file(file)
    assert applied == [(set(written), 0.8, 0.5)] * 2


def test_a_changed_file_changes_the_fingerprint(pack, models):
    node = list_nodes(pack)["ProloraMoveLora"]
    before = node.fingerprint_inputs(lora="one.safetensors", **BASES, **WIDGETS)
    assert before == node.fingerprint_inputs(lora="one.safetensors", **BASES, **WIDGETS)
    save_file(lora_tensors(rank=2), models / "loras" / "one.safetensors")
    assert before != node.fingerprint_inputs(lora="one.safetensors", **BASES, **WIDGETS)


def test_an_older_comfyui_gets_the_same_nodes(models, monkeypatch):
    comfyui_stand_in.install(models, monkeypatch)
    new = list_nodes(import_pack(monkeypatch))
    monkeypatch.setitem(sys.modules, "comfy_api.latest", None)
    monkeypatch.delitem(sys.modules, "comfyui_prolora.v3")
    pack = import_pack(monkeypatch)
    assert not hasattr(pack, "comfy_entrypoint")
    assert set(pack.NODE_CLASS_MAPPINGS) == set(pack.NODE_DISPLAY_NAME_MAPPINGS) == set(new)
    for name, node in pack.NODE_CLASS_MAPPINGS.items():
        inputs = node.INPUT_TYPES()["required"]
        assert list(inputs) == [field.id for field in new[name].define_schema().inputs]
    node = pack.NODE_CLASS_MAPPINGS["ProloraMoveLora"]
    assert node.INPUT_TYPES()["required"]["lora"][0] == [
        "one.safetensors",
        "styles/two.safetensors",
    ]
    out = node().execute(lora="one.safetensors", **BASES, **WIDGETS)
    assert out["ui"]["text"][0] == out["result"][1]


def test_the_example_workflows_use_nodes_and_widgets_that_exist(pack):
    nodes = list_nodes(pack)
    found = 0
    for path in sorted((PACK / "example_workflows").glob("*.json")):
        for node in json.loads(path.read_text())["nodes"]:
            if node["type"].startswith("Prolora"):
                schema = nodes[node["type"]].define_schema()
                sockets = {entry["name"] for entry in node.get("inputs", [])}
                widgets = [field.id for field in schema.inputs if field.id not in sockets]
                assert len(node["widgets_values"]) == len(widgets)
                found += 1
    assert found >= 3


def move(pack, **changes):
    """The name of the result of *Move LoRA*, with other inputs than usual."""
    values = {"lora": "one.safetensors", **BASES, **WIDGETS} | changes
    return run(pack, "ProloraMoveLora", **values)[0][0]


def test_loras_bases_and_settings_of_one_name_lie_side_by_side(pack, models):
    for folder in ("styles", "other"):
        (models / "loras" / folder).mkdir(exist_ok=True)
        save_file(lora_tensors(), models / "loras" / folder / "last.safetensors")
    for folder in ("first", "second"):
        weights = {f"{name}.weight": w for name, w in target_weights(0.1).items()}
        (models / "checkpoints" / folder).mkdir()
        save_file(
            weights,
            models / "checkpoints" / folder / "diffusion_pytorch_model.safetensors",
            {"made by": folder},
        )
    second = "checkpoints/{}/diffusion_pytorch_model.safetensors"
    names = [
        move(pack),
        move(pack, lora="styles/last.safetensors"),
        move(pack, lora="other/last.safetensors"),
        move(pack, method="auto"),
        move(pack, rank="2"),
        move(pack, strength=0.5),
        move(pack, format="diffusers"),
        move(pack, target=second.format("first")),
        move(pack, target=second.format("second")),
    ]
    assert len({*names}) == len(names)
    assert all((models / "loras" / name).is_file() for name in names)
    assert "first" in names[-2] and "second" in names[-1] and "styles" in names[1]
    contents = {name: (models / "loras" / name).read_bytes() for name in names}
    assert move(pack) == names[0]
    assert contents == {name: (models / "loras" / name).read_bytes() for name in names}


def test_a_lora_that_was_trained_on_does_not_replace_what_was_moved_before(pack, models):
    first = move(pack)
    before = (models / "loras" / first).read_bytes()
    save_file(lora_tensors(rank=2), models / "loras" / "one.safetensors")
    assert move(pack) != first and (models / "loras" / first).read_bytes() == before


def test_all_moves_folders_that_hold_one_name_twice(pack, models):
    (models / "loras" / "other").mkdir()
    save_file(lora_tensors(), models / "loras" / "other" / "two.safetensors")
    (report,), _ = run(pack, "ProloraMoveFolder", folder="(all)", **BASES, **WIDGETS)
    assert report.splitlines()[-1] == "3 of 3 LoRAs are in place."
    moved = [path for path in models.rglob("two*.safetensors") if "moved" in str(path)]
    assert {path.parent.name for path in moved} == {"styles", "other"}
    assert "styles/two.safetensors" in report and "other/two.safetensors" in report


@pytest.mark.skipif(
    not hasattr(prolora.errors, "ForeignFile"), reason="prolora replaces such files"
)
def test_a_file_that_is_none_of_ours_is_not_replaced(pack, models):
    file = models / "loras" / move(pack)
    foreign = lora_tensors(rank=3)
    save_file(foreign, file)
    before = file.read_bytes()
    with pytest.raises(Exception, match=file.stem):
        move(pack)
    assert file.read_bytes() == before
