"""Quantised bases: what is read is used and told, and what is not read serves a copy alone."""

import json

import pytest
import torch
from mini import lora_tensors, source_weights, target_weights
from safetensors.torch import load_file

import prolora
from prolora.errors import UnsupportedFormat
from prolora.files.safetensors_writing import write_safetensors


def note(**content):
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def plain(weights):
    return {f"{name}.weight": tensor for name, tensor in weights.items()}


def int8(weights):
    """By rows, as ComfyUI stores it."""
    parts = {}
    for name, tensor in weights.items():
        scale = tensor.abs().amax(1, keepdim=True) / 127
        parts[f"{name}.weight"] = (tensor / scale).round().to(torch.int8)
        parts[f"{name}.weight_scale"] = scale
        parts[f"{name}.comfy_quant"] = note(format="int8_tensorwise")
    return parts


def unreadable(weights):
    """A kind whose shapes are known, and whose numbers are not."""
    parts = {}
    for name, tensor in weights.items():
        rows, columns = tensor.shape
        parts[f"{name}.weight"] = torch.zeros(rows, columns // 2, dtype=torch.int8)
        parts[f"{name}.weight_s_rel"] = torch.ones(rows, columns // 8)
        parts[f"{name}.comfy_quant"] = note(format="asym_w4a8_int8", group_size=8)
    return parts


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_copy_needs_names_and_shapes_only(side, tmp_path):
    """Whichever side is quantised; the file is that of a copy between plain bases."""
    write_safetensors(tmp_path / "lora.safetensors", lora_tensors(), {})
    bases = {"source": plain(source_weights()), "target": plain(target_weights())}
    for name, tensors in bases.items():
        write_safetensors(tmp_path / f"{name}.safetensors", tensors, {})
    hidden = {"source": source_weights, "target": target_weights}[side]()
    write_safetensors(tmp_path / "hidden.safetensors", unreadable(hidden), {})
    names = {"source": "source", "target": "target"} | {side: "hidden"}
    places = [tmp_path / f"{names[one]}.safetensors" for one in ("source", "target")]
    lora, out = tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    report = prolora.transfer(lora, *places, out=out, method="copy").report
    assert report.verdict is None and len(report.rows("mapped")) == 8
    assert "hidden.safetensors is quantised: asym_w4a8_int8 (" in str(report)
    both = [tmp_path / f"{one}.safetensors" for one in ("source", "target")]
    prolora.transfer(lora, *both, out=tmp_path / "plain.safetensors", method="copy")
    ours, theirs = (load_file(tmp_path / f"{x}.safetensors") for x in ("out", "plain"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (
        prolora.transfer(lora, *places, method="copy", dry_run=True).report.coverage
        == report.coverage
    )


@pytest.mark.parametrize("method", ["auto", "prolora"])
def test_what_needs_weights_names_the_kind_before_any_is_read(method, monkeypatch):
    bases = plain(source_weights()), unreadable(target_weights())
    read = []
    monkeypatch.setattr("prolora.core.affinity.Affinity.of", lambda *at: read.append(at))
    with pytest.raises(UnsupportedFormat, match=r"quantised as asym_w4a8_int8.*copy"):
        prolora.transfer(lora_tensors(), *bases, method=method)
    assert not read


def test_a_verdict_and_an_extraction_name_the_kind():
    bases = plain(source_weights()), unreadable(source_weights())
    with pytest.raises(UnsupportedFormat, match="asym_w4a8_int8"):
        prolora.extract(*bases)
    with pytest.raises(UnsupportedFormat, match="asym_w4a8_int8"):
        prolora.check(lora_tensors(), source=bases[0], target=bases[1])


def test_a_quantised_base_is_told_and_nearly_as_good_as_the_plain_one():
    bases = plain(source_weights()), plain(target_weights())
    quantised = int8(source_weights()), int8(target_weights())
    plainly = prolora.transfer(lora_tensors(), *bases, method="auto")
    done = prolora.transfer(lora_tensors(), *quantised, method="auto")
    assert done.report.method == plainly.report.method
    assert set(done.report.quantised.values()) == {"int8 (8 of 8 weights)"}
    assert "is quantised: int8 (8 of 8 weights)" in str(done.report)
    assert not plainly.report.quantised
    for name, update in done.adapter.updates.items():
        other = plainly.adapter.updates[name]
        lost = (update.up @ update.down - other.up @ other.down).norm()
        assert lost < 0.05 * (other.up @ other.down).norm()


def test_a_base_says_how_it_is_quantised(tmp_path):
    mixed = int8(source_weights()) | {"conv_in.weight": torch.zeros(4, 4, 3, 3)}
    assert prolora.open_base(mixed).quantised_as == "int8 (12 of 13 weights)"
    assert prolora.open_base(plain(source_weights())).quantised_as == ""
    write_safetensors(tmp_path / "x.safetensors", mixed, {})
    assert prolora.check(tmp_path / "x.safetensors").quantised == "int8 (12 of 13 weights)"
