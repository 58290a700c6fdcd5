"""Quantised bases are used and told."""

import json

import torch
from mini import lora_tensors, source_weights, target_weights

import prolora
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
