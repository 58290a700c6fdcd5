"""The ComfyUI nodes, on a stand-in of ComfyUI's modules or on a real checkout (PROLORA_COMFYUI)."""

import asyncio
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import comfyui_stand_in
import pytest
import tiny_pipelines
import torch
from mini import lora_tensors, source_weights, target_weights
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import prolora
from prolora.cli.app import app
from prolora.comparison.expectation import CLASSES
from prolora.fitting.best_way import WeightsElseFit
from prolora.fitting.pipelines.pipeline_opening import open_pipeline

ROOT = Path(__file__).parents[2]
PACK = ROOT / "integrations" / "comfyui"
BASES = {"trained_on": "source.safetensors", "use_on": "target.safetensors"}
WIDGETS = {"method": "copy", "rank": "exact", "format": "ComfyUI"}
CORE = ("sampler_name", "scheduler")
"""Lists that core's own node has."""
LORA = {"lora": "one.safetensors"}


def write_base(models, name, weights, metadata=None):
    file = models / "checkpoints" / f"{name}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"{module}.weight": weight for module, weight in weights.items()}, file, metadata)
    return file


def write_lora(models, name, metadata=None, **known):
    file = models / "loras" / f"{name}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(lora_tensors(**known), file, metadata)
    return file


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.setenv("PROLORA_CACHE", str(tmp_path / "cache"))
    models = tmp_path / "models"
    stranger = {name: torch.randn_like(weight) for name, weight in source_weights().items()}
    bases = {"source": source_weights(), "target": target_weights(), "stranger": stranger}
    for name, weights in bases.items():
        write_base(models, name, weights)
    for name in ("one", "styles/two"):
        write_lora(models, name)
    return models


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


def run(pack, name, **values):
    """(outputs, what the node shows), with / in names on Windows too."""
    with torch.inference_mode():  # as ComfyUI runs every node
        out = pack.NODE_CLASS_MAPPINGS[name]().run(**values)
    assert out["ui"]["text"] == (out["result"][-1],)
    shown = {key: with_slashes(values) for key, values in out["ui"].items()}
    return with_slashes(out["result"]), shown


def with_slashes(values):
    return tuple(x.replace(os.sep, "/") if isinstance(x, str) else x for x in values)


def draw(pack, **changes):
    """(the graph that *Draw before and after* becomes, its pictures, the report)."""
    links = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "latent_image": ["2", 0]}
    sampling = {"seed": 7, "steps": 4, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple"}
    texts = {"prompt": "a cat", "avoid": "blurry", "method": "auto"}
    values = LORA | BASES | links | sampling | texts | changes
    out = pack.NODE_CLASS_MAPPINGS["ProloraBeforeAndAfter"]().run(**values)
    return out.get("expand"), *out["result"]


def tell(pack, **changes):
    """(the name of the result of *Move LoRA*, the report), with other inputs than usual."""
    return run(pack, "ProloraMoveLora", **LORA | BASES | WIDGETS | changes)[0]


def move(pack, **changes):
    """The name of the result alone."""
    return tell(pack, **changes)[0]


def move_folder(pack, folder="(all)", **changes):
    """The lines of the report of *Move folder*."""
    values = BASES | WIDGETS | changes
    return run(pack, "ProloraMoveFolder", folder=folder, **values)[0][0].splitlines()


def refuse(pack, name="ProloraMoveLora", **changes):
    """The sentence of a node that cannot do what it is asked for; its other outputs block."""
    return refusal(pack, name, LORA | BASES | WIDGETS | changes)


def refusal(pack, name, values):
    node = pack.NODE_CLASS_MAPPINGS[name]
    before = node.IS_CHANGED(**values)
    (*absent, report), shown = run(pack, name, **values)
    assert [type(value).__name__ for value in absent] == ["ExecutionBlocker"] * len(absent)
    assert all(value.message is None for value in absent) and shown["page"] == ()
    # ComfyUI keeps what a node returned, and would show it when Run is pressed again.
    assert node.IS_CHANGED(**values) != before
    assert report.startswith("✖ ") and report.endswith((".", "!", "?")) and "\n" not in report
    assert str(PACK.parents[1]) not in report and "/tmp" not in report
    return report.removeprefix("✖ ")


def test_a_lora_is_moved_below_the_folder_of_loras_and_six_lines_tell_of_it(pack, models):
    (name, report), shown = run(pack, "ProloraMoveLora", **LORA, **BASES, **WIDGETS)
    assert re.fullmatch(r"zz-moved/target/one-copy-[0-9a-f]{12}\.safetensors", name)
    lines = report.splitlines()
    assert len(lines) <= 6 and lines[0].startswith("⚠ This should work in part")
    assert lines[1] == f"File: loras/{name}"
    said = "Moved from source to target. Load it at strength 1. A new one, fitted with the method"
    assert lines[2].startswith(f"{said} “best”") and "a copy brought" in lines[3]
    assert "on target" in lines[4]
    assert "press R" in lines[-1]
    assert len(load_file(models / "loras" / name)) == 24
    page = models / "loras" / shown["page"][0]
    text = page.read_text("utf-8")
    assert text.startswith("<!DOCTYPE html>") and "`" not in text.partition("<script>")[0]
    again = tell(pack)
    assert again[0] == name and "(moved before)\nFile: " in again[1]


def test_what_is_chosen_first_is_nothing_and_says_what_to_choose(pack, models):
    for node in pack.NODE_CLASS_MAPPINGS.values():
        for name, (choices, *known) in node.INPUT_TYPES()["required"].items():
            assert (
                name in CORE or not isinstance(choices, list) or known[0]["default"] == choices[0]
            )
    assert "under “LoRA”" in refuse(pack, lora="choose…")
    assert "under “use on”" in refuse(pack, use_on="choose…")
    assert "under “trained on”" in refuse(pack, trained_on="from the LoRA")
    folder = {"folder": "choose…", **BASES, **WIDGETS}
    assert "under “folder”" in refusal(pack, "ProloraMoveFolder", folder)
    for node, other in (("ProloraAdvise", BASES), ("ProloraCheckLora", {"model": "any model"})):
        assert "under “LoRA”" in refusal(pack, node, {"lora": "choose…", **other})
    assert "choose another one" in refuse(pack, use_on="gone.safetensors")
    assert "choose another one" in refuse(pack, lora="gone.safetensors")
    assert not (models / "loras" / "zz-moved").exists()


@pytest.mark.parametrize("told", ["hash", "name", "windows path"])
def test_the_header_tells_which_model_a_lora_was_trained_on(pack, models, told):
    # Trainers hash 64 KiB from the second MiB on.
    weights = source_weights() | {"long": torch.randn(600, 600)}
    file = write_base(models, "sub/renamed", weights)
    short = hashlib.sha256(file.read_bytes()[0x100000:0x110000]).hexdigest()[:8]
    metadata = {
        "hash": {"ss_sd_model_hash": short, "ss_sd_model_name": "model.safetensors"},
        "name": {"ss_sd_model_name": "source.ckpt", "ss_sd_model_hash": "01234567"},
        "windows path": {"ss_sd_model_name": "C:\\models\\SOURCE.safetensors"},
    }[told]
    write_lora(models, "one", metadata)
    source = "sub/renamed" if told == "hash" else "source"
    said = tell(pack, trained_on="from the LoRA")[1]
    assert f"Moved from {source} (as the LoRA tells) to target" in said


def test_every_rank_that_is_offered_works(pack, models):
    ranks = pack.NODE_CLASS_MAPPINGS["ProloraMoveLora"].INPUT_TYPES()["required"]["rank"][0]
    assert "same" in ranks and len(ranks) > 4
    found = {}
    for rank in ranks:
        file = models / "loras" / move(pack, rank=rank, method="prolora")
        found[rank] = max(prolora.check(file).parts["unet"].ranks)
    assert found["same"] == 4 and found["half"] == 2 and found["4"] == 4
    assert found["exact"] == found["128"] >= 4


def test_the_output_fits_every_list_of_names_and_nothing_else(pack):
    (kind, _) = pack.NODE_CLASS_MAPPINGS["ProloraMoveLora"].RETURN_TYPES
    for fitting in (["one.safetensors"], [], "COMBO"):
        assert not kind != fitting
    assert kind != "MODEL" and json.dumps(kind) == '"COMBO"'


@pytest.mark.parametrize("method", ["auto", "best"])
def test_a_pair_that_cannot_work_is_one_sentence_and_leaves_no_folder(pack, models, method):
    sentence = refuse(pack, use_on="stranger.safetensors", method=method)
    assert "have nothing in common" in sentence
    assert method == "best" or "Nothing was written" in sentence
    assert not (models / "loras" / "zz-moved").exists()


def test_no_text_of_a_node_holds_what_only_a_command_line_can_follow(pack, models):
    words = sys.modules["comfyui_prolora.words"]
    options = {field.name for field in dataclasses.fields(prolora.TransferOptions)}
    for option in options - {"method", "format", "out_rank", "look"}:
        for named in (f"`{option}`", f"`{option}=True`", "`transfer_many()`", "--flag"):
            said = words.explain(prolora.ProLoRAError(f"It is broken; take {named} instead."))
            assert said == "It is broken."
    moved = "this LoRA was already moved, but `source` is c; give b as `source`; or `again=True`"
    assert words.explain(prolora.errors.AlreadyMoved(moved)) == (
        "this LoRA was already moved, but “trained on” is c; give b as “trained on”."
    )
    missing = "GGUF files need it: pip install gguf; or use another file"
    assert words.explain(prolora.ProLoRAError(missing)) == (
        "GGUF files need it: install gguf for the Python that runs ComfyUI; or use another file."
    )
    assert words.explain(prolora.ProLoRAError("`match='name'`")).startswith("This LoRA cannot")


def test_every_input_and_output_says_what_it_is_in_words_that_artists_know(pack):
    for name, node in pack.NODE_CLASS_MAPPINGS.items():
        inputs = node.INPUT_TYPES()
        known = {**inputs["required"], **inputs.get("optional", {})}
        drawing = {*CORE, "seed", "steps", "cfg"}  # core's own, with its words
        told = [known[one][1]["tooltip"] for one in known if one not in drawing]
        assert len(node.OUTPUT_TOOLTIPS) == len(node.RETURN_TYPES), name
        for text in (node.DESCRIPTION, *told, *node.OUTPUT_TOOLTIPS):
            assert (text.endswith(".") and text[0] == text[0].upper()) or text.startswith("auto ")
            foreign = (
                r"weights|energy|modul|matri|denoiser|decoder|pipeline(?!s, which are folders)"
            )
            assert not re.search(foreign, text), text


def test_the_stop_button_ends_the_job_and_leaves_nothing(pack, models, monkeypatch):
    import comfy.model_management as management

    stopped = type("Stopped", (Exception,), {})
    stop = Mock(side_effect=stopped)
    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", stop)
    with pytest.raises(stopped):
        move(pack)
    assert not (models / "loras" / "zz-moved").exists()


def test_a_node_says_how_far_it_is_and_how_long_it_takes(pack, monkeypatch):
    told = []
    server = SimpleNamespace(last_node_id="7", client_id="page")
    server.send_sync = lambda *sent: told.append(sent)
    module = SimpleNamespace(PromptServer=SimpleNamespace(instance=server))
    monkeypatch.setitem(sys.modules, "server", module)
    host = sys.modules["comfyui_prolora.host"]
    moments = iter([0.0, 0.5, 2.0, 2.5, 3.5])
    monkeypatch.setattr(host.time, "monotonic", lambda: next(moments))
    progress = host.make_progress()
    for done in range(3):
        progress(done, 4, "sampling the target, 3 min left")
    progress(3, 4, "transformer_blocks.0.attn.to_q")
    said = ["Working: 25% done, about 3 min left.", "Working: 75% done."]
    assert told == [("prolora.progress", {"node": "7", "text": text}, "page") for text in said]


def test_advice_writes_nothing(pack, models):
    before = sorted(models.rglob("*"))
    (report,), _ = run(pack, "ProloraAdvise", **LORA, **BASES)
    assert report.startswith("⚠ ") and "of the LoRA (70%) has a place on target." in report
    assert "at strength 1" in report
    stranger = BASES | {"use_on": "stranger.safetensors"}
    (apart,), _ = run(pack, "ProloraAdvise", **LORA, **stranger)
    assert apart.startswith("✖ ") and "at strength 1" not in apart
    assert sorted(models.rglob("*")) == before


def test_what_a_lora_is_is_said_as_the_command_says_it(pack, models):
    def look(lora, model="any model"):
        (report,), _ = run(pack, "ProloraCheckLora", lora=f"{lora}.safetensors", model=model)
        return report

    told = str(prolora.check(models / "loras/one.safetensors", program="comfyui"))
    assert look("one") == told and "ComfyUI" in told and "`" not in told
    assert look("one", "target.safetensors").startswith("⚠ in part for this base")
    lost = {key: x for key, x in lora_tensors().items() if not key.endswith("alpha")}
    save_file(lost, models / "loras/lost.safetensors", {"ss_network_alpha": "1"})
    assert "load it at strength 0.25" in look("lost").lower() and "`" not in look("lost")
    (models / "loras/bad.safetensors").write_bytes(b"nothing")
    assert look("bad").startswith("✖ bad.safetensors: not a safetensors file")
    assert refusal(pack, "ProloraCheckLora", {"lora": "bad.safetensors", "model": "any model"})


def test_a_folder_is_moved_without_what_was_moved_before(pack, models):
    move(pack)
    (models / "loras" / "bad.safetensors").write_bytes(b"nothing")
    lines = move_folder(pack)
    assert lines[0] == "✖ 3 LoRAs (2 ⚠, 1 ✖), in place below loras/zz-moved."
    assert lines[1].startswith("✖ bad.safetensors: not a safetensors file")
    advice = "load it at strength 1: This should work in part: target lacks parts"
    assert lines[2].startswith(f"⚠ one.safetensors: {advice}") and "(moved before)" in lines[2]
    assert lines[3].startswith(f"⚠ styles/two.safetensors: {advice}")
    assert not any(str(models) in line or "target lacks" not in line for line in lines[2:])
    assert move_folder(pack, "styles")[0] == "⚠ 1 LoRA (1 ⚠), in place below loras/zz-moved."
    choices = pack.NODE_CLASS_MAPPINGS["ProloraMoveFolder"].INPUT_TYPES()["required"]["folder"][0]
    assert choices == ["choose…", "(all)", "styles"]


def test_loras_bases_and_settings_of_one_name_lie_side_by_side(pack, models):
    for folder in ("styles", "other"):
        write_lora(models, f"{folder}/last")
    generic = "{}/diffusion_pytorch_model"
    for folder in ("first", "second"):
        write_base(models, generic.format(folder), target_weights(), {"made by": folder})
    names = [
        move(pack),
        move(pack, lora="styles/last.safetensors"),
        move(pack, lora="other/last.safetensors"),
        move(pack, method="auto"),
        move(pack, rank="4"),
        move(pack, format="diffusers"),
        move(pack, use_on=str(Path(generic.format("first") + ".safetensors"))),
        move(pack, use_on=str(Path(generic.format("second") + ".safetensors"))),
    ]
    assert len({*names}) == len(names)
    assert "/first/" in names[-2] and "/second/" in names[-1] and "/styles/last" in names[1]
    assert "rank_4" in names[4]
    contents = {name: (models / "loras" / name).read_bytes() for name in names}
    assert move(pack) == names[0]
    assert contents == {name: (models / "loras" / name).read_bytes() for name in names}


def test_a_file_that_is_none_of_ours_is_not_replaced(pack, models):
    name = move(pack)
    file = write_lora(models, name.removesuffix(".safetensors"), rank=3)
    before = file.read_bytes()
    assert file.stem in refuse(pack) and file.read_bytes() == before


def test_names_that_no_file_system_takes_become_plain_and_short(pack, models):
    long = "ü" * 90 + " (v2)"
    write_lora(models, f"my styles/{long}")
    name = move(pack, lora=f"my styles/{long}.safetensors")
    assert "/my styles/" in name and len(Path(name).name.encode()) < 150
    assert (models / "loras" / name).is_file()


def test_a_model_is_named_with_its_folder_where_two_have_one_name(pack, models, monkeypatch):
    import folder_paths

    known = folder_paths.folder_names_and_paths
    monkeypatch.setitem(
        known, "diffusion_models", ([str(models / "diffusion_models")], {".safetensors"})
    )
    (models / "diffusion_models").mkdir()
    save_file({}, models / "diffusion_models" / "target.safetensors")
    bases = sys.modules["comfyui_prolora.host"].map_bases()
    assert {"checkpoints/target.safetensors", "diffusion_models/target.safetensors"} < {*bases}
    assert "source.safetensors" in bases and "target.safetensors" not in bases
    assert move(pack, use_on="checkpoints/target.safetensors")


def test_a_moved_lora_is_applied_and_moved_once(pack, models, monkeypatch):
    import comfy.sd

    applied = []

    def load(model, clip, tensors, strength_model, strength_clip):
        applied.append((set(tensors), strength_model, strength_clip))
        return "patched model", "patched clip"

    monkeypatch.setattr(comfy.sd, "load_lora_for_models", load)
    values = {**LORA, **BASES, "method": "auto"}
    strengths = {"strength_model": 0.8, "strength_clip": 0.5}
    for _ in range(2):
        result, _ = run(pack, "ProloraLoadMovedLora", model="m", clip="c", **values, **strengths)
        assert result[:2] == ("patched model", "patched clip")
        assert "It is applied" in result[2] and "output “LoRA”" not in result[2]
    (file,) = (models / "loras" / "zz-moved" / "target").glob("one-*.safetensors")
    assert applied == [(set(load_file(file)), 0.8, 0.5)] * 2


def test_before_and_after_are_pictures_that_differ_in_the_strength_alone(pack, models):
    graph, row, report = draw(pack)
    asked = graph[row[0]]["inputs"]
    assert graph[row[0]]["class_type"] == "ProloraSideBySide"
    drawn = []
    for name in [name for name in asked if name != "labels"]:
        sampler = graph[graph[asked[name][0]]["inputs"]["samples"][0]]["inputs"]
        texts = [graph[sampler[name][0]]["inputs"] for name in ("positive", "negative")]
        assert [text["text"] for text in texts] == ["a cat", "blurry"]
        assert sampler["seed"] == 7 and sampler["latent_image"] == ["2", 0]
        loader = graph.get(sampler["model"][0], {"inputs": None})["inputs"]
        assert all(text["clip"] == [sampler["model"][0], 1] for text in texts)
        drawn.append(loader and (loader["lora_name"], loader["strength_model"]))
    moved = next(iter((models / "loras" / "zz-moved" / "target").glob("*.safetensors")))
    name = str(moved.relative_to(models / "loras"))
    assert drawn == [None, *((name, x) for x in (0.5, 0.8, 1.0)), ("one.safetensors", 1.0)]
    assert asked["labels"].split("\n") == ["without", "0.5", "0.8", "1", "your file, 1"]
    assert len(report.splitlines()) <= 7
    known = pack.NODE_CLASS_MAPPINGS["ProloraBeforeAndAfter"].INPUT_TYPES()["required"]
    for link in ("model", "clip", "vae", "latent_image"):
        # No model is loaded before it is known that the LoRA can be moved.
        assert known[link][1]["rawLink"] and known[link][1]["lazy"]


def test_a_row_of_pictures_has_each_below_its_label(pack):
    picture = torch.full((1, 64, 240, 3), 0.5)
    values = {f"picture_{i}": picture for i in (1, 2)}
    (row,) = pack.NODE_CLASS_MAPPINGS["ProloraSideBySide"]().run(labels="without\n0.8", **values)
    assert row.shape == (1, 64 + 40, 2 * 240 + 8, 3)
    assert torch.equal(row[:, 40:, :240], picture) and torch.equal(row[:, 40:, 248:], picture)
    first, second = row[:, :40, :240], row[:, :40, 248:]
    assert first.min() < 0.2 and first.max() == 1 and not torch.equal(first, second)


@pytest.fixture
def twin(models):
    """A model whose parts have the source's names and shapes, and other weights beside."""
    weights = {name: 1.0001 * weight for name, weight in source_weights().items()}
    write_base(models, "twin", weights)
    return {"use_on": "twin.safetensors", "format": "as it came", "method": "auto"}


def test_a_lora_that_works_as_it_is_is_not_written_again(pack, models, twin):
    name, report = tell(pack, **twin)
    assert name == "one.safetensors" and not (models / "loras/zz-moved").exists()
    assert "The file works on twin as it is" in report and "File: loras/one.safetensors" in report
    graph, _, _ = draw(pack, use_on="twin.safetensors")
    assert "your file" not in str(graph)


def test_a_folder_of_loras_that_work_as_they_are_takes_no_disk(pack, models, twin):
    for _ in range(2):
        assert move_folder(pack, **twin)[0].startswith("✔ 2 LoRAs (2 ✔)")
        results = sorted((models / "loras/zz-moved").rglob("*.safetensors"))
        originals = [
            models / "loras" / name for name in ("one.safetensors", "styles/two.safetensors")
        ]
        assert [one.samefile(other) for one, other in zip(results, originals, strict=True)] == [
            True,
            True,
        ]
    # Windows removes no file that is open, as ComfyUI has one that is loaded.
    before = results[0].stat()
    with results[0].open("rb"):
        assert move_folder(pack, **twin)[0].startswith("✔ 2 LoRAs (2 ✔)")
        assert move(pack, **twin) == "one.safetensors"
    assert sorted((models / "loras/zz-moved").rglob("*.safetensors")) == results
    assert results[0].stat() == before and results[0].samefile(originals[0])


def test_models_that_were_chosen_the_wrong_way_round_are_refused(pack, models):
    write_lora(models, "one", {"ss_sd_model_name": "target"})
    said = refuse(pack)
    assert "trained on target: choose the models the other way round" in said
    assert move_folder(pack)[1].startswith("✖ one.safetensors: This LoRA says")
    assert "the other way round" in refusal(pack, "ProloraAdvise", LORA | BASES)
    assert not list((models / "loras/zz-moved").rglob("one*"))


def test_a_lora_of_another_kind_than_the_model_is_refused_in_whole_sentences(pack):
    explain = sys.modules["comfyui_prolora.words"].explain
    wrong = "This LoRA is for FLUX.1. The source you gave, a.safetensors, is Stable Diffusion 1.5"
    for end in (" (4 blocks). (No)", ". (No)", ". It fits the target and not the source (No)"):
        assert explain(prolora.errors.WrongBase(wrong + end)) == (
            "This LoRA is for FLUX.1. “trained on” is a.safetensors: Stable Diffusion 1.5. Choose "
            "the model that the LoRA was trained on."
        )


def test_a_merge_is_that_of_the_command_line(pack, models, tmp_path, prolora_command):
    values = {"lora_1": "one.safetensors", "lora_2": "styles/two.safetensors", "strength_1": 0.5}
    values |= {"lora_3": "none", "lora_4": "none", "method": "sum"}
    values |= {f"strength_{i}": 1.0 for i in (2, 3, 4)}
    write_lora(models, "styles/two", rank=2)
    (name, report), _ = run(pack, "ProloraMergeLoras", **values)
    assert name.startswith("zz-moved/merged/one+two-") and "Merged 2 LoRAs" in report
    loras = [models / "loras" / values[f"lora_{i}"] for i in (1, 2)]
    out = tmp_path / "merged.safetensors"
    prolora_command("merge", *loras, "-o", out, "--strengths", "0.5,1")
    first, second = load_file(models / "loras" / name), load_file(out)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    before = (models / "loras" / name).stat()
    with (models / "loras" / name).open("rb"):  # loaded: Windows would not replace it
        assert run(pack, "ProloraMergeLoras", **values)[0] == (name, report)
    assert (models / "loras" / name).stat() == before
    twice = values | {"lora_2": "one.safetensors"}
    assert "each LoRA once" in refusal(pack, "ProloraMergeLoras", twice)
    assert "under “LoRA”" in refusal(pack, "ProloraMergeLoras", values | {"lora_1": "choose…"})


@pytest.fixture
def prolora_command():
    """Runs a command, which must end well."""

    def call(*words):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output

    return call


def test_another_model_that_is_loaded_is_noticed(pack, models):
    def ask(loaded):
        graph = {
            "1": {"inputs": {"ckpt_name": loaded}},
            "2": {"inputs": {"model": ["1", 0], "lora_name": "one.safetensors"}},
            "3": {"inputs": {"model": ["2", 0]}},
        }
        return draw(pack, graph=graph, node="3")[-1].splitlines()[0]

    assert ask("target.safetensors").startswith("⚠ This should")
    assert ask("source.safetensors") == (
        "⚠ source is loaded, and “use on” is target: choose the same model in both."
    )
    assert "is loaded" not in ask(["4", 0])  # not seen: a node computes the name
    looped = {"3": {"inputs": {"model": ["3", 0]}}}
    assert "(moved before)" in draw(pack, graph=looped, node="3")[-1].splitlines()[0]


def test_a_changed_file_that_is_not_named_changes_the_fingerprint_too(pack, models):
    move_one, move_all = (
        pack.NODE_CLASS_MAPPINGS[name] for name in ("ProloraMoveLora", "ProloraMoveFolder")
    )
    told = BASES | {"trained_on": "from the LoRA"}
    before = move_one.IS_CHANGED(**LORA, **told)
    write_base(models, "source", source_weights() | {"more": torch.zeros(2, 2)})
    assert move_one.IS_CHANGED(**LORA, **told) != before
    before = move_all.IS_CHANGED(folder="(all)", **BASES)
    write_lora(models, "styles/two", rank=2)
    assert move_all.IS_CHANGED(folder="(all)", **BASES) != before


@pytest.mark.parametrize("name", ["ProloraMoveLora", "ProloraMoveFolder"])
def test_a_result_that_was_deleted_changes_the_fingerprint_until_it_is_made_again(
    pack, models, name
):
    node = pack.NODE_CLASS_MAPPINGS[name]
    values = {"ProloraMoveLora": LORA, "ProloraMoveFolder": {"folder": "styles"}}[name] | BASES
    values |= WIDGETS
    before = node.IS_CHANGED(**values)
    run(pack, name, **values)
    assert node.IS_CHANGED(**values) == before
    for path in (models / "loras/zz-moved").rglob("*.safetensors"):
        path.unlink()
    gone = node.IS_CHANGED(**values)
    assert gone != before and node.IS_CHANGED(**values) == gone
    run(pack, name, **values)
    assert node.IS_CHANGED(**values) == gone
    assert node.IS_CHANGED(**values | {"rank": "4"}) == before


def test_a_folder_of_a_pipeline_is_a_model_too(pack, models):
    folder = models / "diffusers" / "maker" / "look-v1.5"
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    save_file(
        {f"{module}.weight": weight for module, weight in target_weights().items()},
        folder / "transformer" / "diffusion_pytorch_model.safetensors",
    )
    name = str(Path("maker", "look-v1.5"))
    node = pack.NODE_CLASS_MAPPINGS["ProloraMoveLora"]
    assert node.INPUT_TYPES()["required"]["use_on"][0][-1] == name
    moved = move(pack, use_on=name)
    assert moved.startswith("zz-moved/maker-look-v1.5/one-")
    before = node.IS_CHANGED(**LORA | BASES | {"use_on": name})
    next(folder.rglob("*.safetensors")).touch()
    assert node.IS_CHANGED(**LORA | BASES | {"use_on": name}) != before
    told = {"ss_sd_model_name": "maker/look-v1.5"}
    write_lora(models, "two", told)
    assert ask_trained_on("two.safetensors") == (200, {"name": name})


@pytest.fixture
def fit_quickly(models, monkeypatch):
    """Two tiny pipelines that were trained apart, a LoRA of the first, and fits of a second.

    It is called with whether fits are written whatever they reach.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny_pipelines.save(models / "diffusers" / "apart-v2.0", seed=5, text=12)
        first = tiny_pipelines.save(models / "diffusers" / "first-v1.5")
        denoiser = open_pipeline(first).denoiser
    found = tiny_pipelines.updates(denoiser, ("attn1.to_v",))
    tiny_pipelines.write_lora(models / "loras" / "one.safetensors", found)
    make = WeightsElseFit.of.__func__

    def choose(force):
        def of(cls, *given):
            way = make(cls, *given)
            few = {"images": 2, "steps": 2, "fit_steps": 2, "force": force}
            return dataclasses.replace(way, by_fit=dataclasses.replace(way.by_fit, **few))

        monkeypatch.setattr(WeightsElseFit, "of", classmethod(of))

    return choose


APART = {"trained_on": "first-v1.5", "use_on": "apart-v2.0"}


@pytest.mark.slow
def test_the_best_method_runs_models_that_have_nothing_in_common(pack, models, fit_quickly):
    fit_quickly(force=True)
    refused = refuse(pack, **APART, method="auto")
    assert "nothing in common" in refused and "the method “best”" in refused
    style = {"method": "best", "style": "as the LoRA was made", "prompts": "a cat\n\n a dog"}
    name, report = tell(pack, **APART, **style)
    result = r"zz-moved/apart-v2\.0/one-best-as_the_LoRA_was_made-[0-9a-f]{12}\.safetensors"
    assert re.fullmatch(result, name)
    assert len(report.splitlines()) <= 7 and "fitted a new LoRA of apart-v2.0" in report
    assert "the look of first-v1.5 was asked for" in report
    assert report.count("samples that the fit did not see") <= 1  # one figure for one thing
    assert prolora.check(models / "loras" / name).kind == "lora"
    page = (models / "loras" / name).with_suffix(".html").read_text("utf-8")
    assert page.count("data:image/png") >= 2 * 4  # both prompts, without the LoRA and with it
    again = tell(pack, **APART, **style)
    assert again[0] == name and "(moved before)" in again[1]


@pytest.mark.slow
def test_a_fit_that_does_not_succeed_writes_nothing(pack, models, fit_quickly):
    fit_quickly(force=False)
    assert "Running both models did not help" in refuse(pack, **APART, method="best")
    assert not (models / "loras" / "zz-moved").exists()


def test_another_style_needs_whole_pipelines_and_the_best_method(pack, models):
    refused = refuse(pack, method="best", style="as the LoRA was made", prompts="a cat")
    assert refused.startswith("“style” needs a fit, which runs both models: give them as folders")
    assert move(pack, style="as the LoRA was made", prompts="a cat")  # a copy has no style
    advice = sys.modules["comfyui_prolora.words"].say(CLASSES["changed"].advice)
    assert "the method “best” with “style”: as the LoRA was made makes one" in advice


def test_a_pipeline_of_two_experts_is_chosen_by_its_files(pack, models):
    folder = models / "diffusers" / "wan"
    for part in ("transformer", "transformer_2"):
        (folder / part).mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    assert "wan" not in sys.modules["comfyui_prolora.host"].map_bases()


def ask_trained_on(lora):
    """(status, answer) of the node's script asking which model a LoRA was trained on."""
    host = sys.modules["comfyui_prolora.host"]
    found = asyncio.run(host.send_trained_on(SimpleNamespace(query={"lora": lora})))
    return found.status, json.loads(found.text) if found.status == 200 else None


def test_the_script_is_told_which_model_a_lora_was_trained_on(pack, models):
    write_lora(models, "told", {"ss_sd_model_name": "source"})
    write_lora(models, "version", {"ss_sd_model_name": "source.5"})
    assert ask_trained_on("told.safetensors") == (200, {"name": "source.safetensors"})
    assert ask_trained_on("one.safetensors") == (200, {"name": None})
    assert ask_trained_on("version.safetensors") == (200, {"name": None})
    (models / "loras" / "page.safetensors").write_text("<html>")
    assert ask_trained_on("page.safetensors") == (200, {"name": None})
    assert ask_trained_on("gone.safetensors")[0] == 404


def test_only_pages_of_moved_loras_are_sent(pack, models):
    host = sys.modules["comfyui_prolora.host"]
    _, shown = run(pack, "ProloraMoveLora", **LORA, **BASES, **WIDGETS)
    (models / "loras" / "mine.html").write_text("<script>")
    (models / "secret.html").write_text("secret")

    def ask(name):
        return asyncio.run(host.send_page(SimpleNamespace(query={"name": name})))

    state = getattr(sys.modules["comfy"], "state", None)  # of the stand-in
    assert state is None or state.routes["/prolora/report"] is host.send_page
    (page,) = shown["page"]
    found = ask(page)
    assert found.status == 200 and "sandbox" in found.headers["Content-Security-Policy"]
    file = page.removesuffix(".html") + ".safetensors"
    for name in ("", "mine.html", file, "zz-moved/../mine.html", "zz-moved/../../secret.html"):
        assert ask(name).status == 404, name


def test_a_comfyui_without_prolora_is_told_how_to_install_it(models, monkeypatch):
    comfyui_stand_in.install(models, monkeypatch)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="README") as error:
        import_pack(monkeypatch)
    assert sys.executable in str(error.value)


def test_the_example_workflows_open_on_widgets_that_exist_and_name_no_file(pack):
    found = 0
    for path in sorted((PACK / "example_workflows").glob("*.json")):
        nodes = json.loads(path.read_text("utf-8"))["nodes"]
        assert nodes[0]["type"] == "MarkdownNote" and "*use on*" in nodes[0]["widgets_values"][0]
        assert ".safetensors" not in path.read_text("utf-8")
        for node in nodes:
            if not node["type"].startswith("Prolora"):
                continue
            cls = pack.NODE_CLASS_MAPPINGS[node["type"]]
            values = iter(node["widgets_values"])
            for name, (choices, *_) in cls.INPUT_TYPES()["required"].items():
                if choices in ("MODEL", "VAE", "LATENT", "CLIP"):
                    assert name in [entry["name"] for entry in node["inputs"]]
                    continue
                value = next(values)
                if isinstance(choices, list) and name not in CORE:
                    assert value == choices[0]
                if name == "seed":
                    assert next(values) == "fixed"  # the widget that comes with every seed
            assert not list(values)
            assert [out["type"] for out in node["outputs"]] == list(cls.RETURN_TYPES)
            found += 1
    assert found == 5


def test_the_pack_asks_an_index_for_nothing_that_is_not_there():
    tomllib = pytest.importorskip("tomllib")
    own = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    lines = (PACK / "requirements.txt").read_text("utf-8").splitlines()
    asked = [line for line in lines if line and not line.startswith("#")]
    assert {*asked} <= {*own} and asked
    assert not any(line.startswith(("torch", "prolora")) for line in asked)
    packed = tomllib.loads((PACK / "pyproject.toml").read_text("utf-8"))
    assert packed["project"]["dependencies"] == asked
    assert (PACK / packed["project"]["license"]["file"]).read_bytes() == (
        ROOT / "LICENSE"
    ).read_bytes()
    assert packed["tool"]["comfy"]["requires-comfyui"]
