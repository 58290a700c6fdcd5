"""A copy holds the bytes that the LoRA's file holds, under the names of the target."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from diagonal import keep_some
from lora_files import read_header, same_bits
from mini import lora_tensors, shapes, source_weights, write_folder
from safetensors.torch import load_file, save_file
from small_models import small_weights

import prolora
from prolora import Adapter, LowRank, check
from prolora.adapters import read_adapter, write_adapter
from prolora.architectures.families import known_families
from prolora.architectures.identify import Model

ICONS = Path(__file__).parents[2] / "examples" / "icon_family" / "weights"
FAMILIES = {id_: family for id_, family in known_families().items() if not family.unet}
KINDS = {
    "lora": {"lora_up.weight": (24, 2), "lora_down.weight": (2, None)},
    "dora": {"lora_up.weight": (24, 2), "lora_down.weight": (2, None), "dora_scale": (24, 1)},
    "loha": {
        **{f"hada_w{i}_a": (24, 2) for i in (1, 2)},
        **{f"hada_w{i}_b": (2, None) for i in (1, 2)},
    },
    "lokr": {"lokr_w1": (2, 4), "lokr_w2_a": (12, 2), "lokr_w2_b": (2, -4)},
    "full": {"diff": (24, None)},
}


def make_kind(kind, dtype=torch.float16):
    """An adapter on every module of the source, with an alpha that is not its rank."""
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, (_, inputs) in shapes(3).items():
        key = "lora_unet_" + name.replace(".", "_")
        for part, shape in KINDS[kind].items():
            size = [inputs if n is None else inputs // 4 if n == -4 else n for n in shape]
            tensors[f"{key}.{part}"] = torch.rand(size, generator=generator).to(dtype)
        tensors[f"{key}.alpha"] = torch.tensor(0.5, dtype=dtype)
        tensors[f"{key}.diff_b"] = torch.rand(24, generator=generator).to(dtype)
    return tensors


def check_bytes(found, wanted):
    assert same_bits(found, wanted)
    assert {key: x.dtype for key, x in found.items()} == {key: x.dtype for key, x in wanted.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_stays_what_it_is(case, tmp_path, kind):
    lora, source, target = case
    tensors, out = make_kind(kind), tmp_path / "out.safetensors"
    save_file(tensors, lora, {"ss_network_alpha": "0.5", "ss_network_args": "{}"})
    report = prolora.transfer(lora, source, target, out=out).report
    there = {key: x for key, x in tensors.items() if "transformer_blocks_2" not in key}
    check_bytes(load_file(out), there)
    assert report.as_stored and not report.kept_energy and report.vectors == 8
    assert (report.base_dependent == 8) is (kind == "dora")
    assert ("relative to the weights of source" in str(report)) is (kind == "dora")
    assert read_header(out)["ss_network_alpha"] == "0.5"
    check_bytes(prolora.transfer(lora, source, target).state_dict(), there)


def test_what_was_asked_for_is_no_copy_of_bytes(case, tmp_path):
    lora, source, target = case
    save_file(make_kind("lora"), lora)
    block = "down_blocks.1.attentions.0.transformer_blocks.0"
    for i, asked in enumerate(
        (
            *({"strength": 0.5}, {"blocks": {block: 0.5}}, {"out_rank": 1}, {"dtype": "float32"}),
            *({"format": "kohya"}, {"method": "prolora", "threshold": 0}),
        )
    ):
        out = tmp_path / f"{i}.safetensors"
        report = prolora.transfer(lora, source, target, out=out, **asked).report
        assert not report.as_stored, asked
        alphas = {float(x) for key, x in load_file(out).items() if key.endswith("alpha")}
        assert 0.5 not in alphas, asked


def test_renumbered_blocks_take_the_bytes_along(case, tmp_path):
    """The target kept the second and third block, under the numbers of the first and second."""
    lora, source, _ = case
    weights = source_weights()
    moved = {
        re.sub(r"(?<=transformer_blocks\.)\d", lambda n: str(int(n[0]) - 1), name): weight
        for name, weight in weights.items()
        if "transformer_blocks.0" not in name
    }
    target, out = write_folder(tmp_path / "cut", moved), tmp_path / "out.safetensors"
    report = prolora.transfer(lora, source, target, out=out, match="similarity").report
    assert report.as_stored
    found, tensors = load_file(out), lora_tensors()
    for key, tensor in found.items():
        head, number, tail = re.fullmatch(r"(.*transformer_blocks_)(\d)(.*)", key).groups()
        assert torch.equal(tensor, tensors[f"{head}{int(number) + 1}{tail}"])
    assert len(found) == 24


def test_a_shipped_lora_is_copied_to_the_byte(tmp_path):
    path, out = ICONS / "loras" / "neon.safetensors", tmp_path / "out.safetensors"
    prolora.transfer(path, ICONS / "source", ICONS / "far", out=out)
    check_bytes(load_file(out), load_file(path))


@pytest.mark.parametrize("dora", [False, True])
def test_a_folder_of_peft_keeps_its_scale_in_its_configuration(case, tmp_path, dora):
    _, source, target = case
    folder, out = tmp_path / "peft", tmp_path / "out"
    folder.mkdir()
    tensors = {}
    for i, (name, (m, n)) in enumerate(shapes(3).items()):
        key, rank = f"base_model.model.{name}", 2 + i % 2
        tensors[f"{key}.lora_A.weight"] = torch.rand(rank, n)
        tensors[f"{key}.lora_B.weight"] = torch.rand(m, rank)
        if dora:
            tensors[f"{key}.lora_magnitude_vector"] = torch.rand(m)
    save_file(tensors, folder / "adapter_model.safetensors")
    ranks = {name: 3 for i, name in enumerate(shapes(3)) if i % 2}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 5, "rank_pattern": ranks}
    config |= {"use_rslora": True, "use_dora": dora}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    report = prolora.transfer(folder, source, target, out=out, format=None).report
    assert report.as_stored
    there = {key: x for key, x in tensors.items() if "transformer_blocks.2" not in key}
    check_bytes(load_file(out / "adapter_model.safetensors"), there)
    written = json.loads((out / "adapter_config.json").read_text())
    assert written.get("use_dora", False) is dora
    wanted, weights = 5 / math.sqrt(2), source_weights()
    name = next(iter(shapes(1)))
    found = read_adapter(out, read_weight=weights.__getitem__).updates[name]
    before = read_adapter(folder, read_weight=weights.__getitem__).updates[name]
    assert torch.allclose(found.dense(), before.dense(), rtol=1e-5, atol=1e-6)
    if not dora:
        key = f"base_model.model.{name}"
        product = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        assert torch.allclose(found.dense(), wanted * product, rtol=1e-5)


@pytest.mark.parametrize("family", keep_some(FAMILIES, "flux", "wan"))
def test_a_file_of_every_family_and_spelling_is_copied_to_the_byte(tmp_path, family):
    layout = FAMILIES[family].layouts[0]
    old, new = small_weights(layout), small_weights(layout, drift=0.1)
    generator, updates = torch.Generator().manual_seed(5), {}
    for name, weight in old.items():
        up, down = (
            torch.rand(s, generator=generator) for s in ((len(weight), 2), (2, weight.shape[1]))
        )
        updates[name] = LowRank(up, down)
    bases = [{f"{name}.weight": x for name, x in some.items()} for some in (old, new)]
    for format in FAMILIES[family].spellings:
        if format == "peft":
            continue
        lora, out = tmp_path / f"{format}.safetensors", tmp_path / f"{format}-out.safetensors"
        adapter = Adapter(updates, origin=Model.of(family))
        write_adapter(adapter, lora, format=format, dtype=torch.float16)
        tensors = load_file(lora)
        # An alpha that is not the rank, where the format has alphas.
        halved = {k: x / 2 if k.endswith(".alpha") else x for k, x in tensors.items()}
        save_file(halved, lora, {"ss_base_model_version": ""})
        report = prolora.transfer(lora, *bases, out=out).report
        assert report.as_stored, format
        check_bytes(load_file(out), halved)
        # A program that reads all of the file gets it as it is, too.
        if "ComfyUI" in check(lora).readers.whole:
            asked = {"format": "comfyui", "overwrite": True}
            assert prolora.transfer(lora, *bases, out=out, **asked).report.as_stored
            check_bytes(load_file(out), halved)
