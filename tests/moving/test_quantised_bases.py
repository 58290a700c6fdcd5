"""Bases are used as their values: quantised, or with layers in several dtypes; it is told."""

import json

import pytest
import torch
from mini import lora_tensors, source_weights, target_weights, write_case
from safetensors.torch import save_file

import prolora


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
    told = {"the source": "int8 (12 of 12 weights)", "the target": "int8 (8 of 8 weights)"}
    assert done.report.quantised == told
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
    save_file(mixed, tmp_path / "x.safetensors")
    assert prolora.check(tmp_path / "x.safetensors").quantised == "int8 (12 of 13 weights)"


FLOAT8 = torch.float8_e4m3fn
MIXTURES = [(FLOAT8, torch.float16), (FLOAT8, torch.float8_e5m2), (torch.bfloat16, torch.float16)]


def mix_dtypes(weights, dtypes):
    """Weights by turns in both dtypes, and the same values in float32."""
    mixed = {f"{name}.weight": weight.to(dtypes[i % 2]) for i, (name, weight) in enumerate(weights)}
    return mixed, {key: weight.float() for key, weight in mixed.items()}


@pytest.mark.parametrize(
    ("dtypes", "method", "kept"),
    [(MIXTURES[0], "prolora", True), (MIXTURES[1], "prolora", False), (MIXTURES[2], "auto", False)],
)
def test_layers_of_several_dtypes_are_moved_as_their_values(tmp_path, dtypes, method, kept, aged):
    lora, _, _ = write_case(tmp_path)
    source, target = source_weights().items(), target_weights().items()
    mixed, plain = zip(mix_dtypes(source, dtypes), mix_dtypes(target, dtypes[::-1]), strict=True)
    moved = []
    for name, bases in (("mixed", mixed), ("plain", plain)):
        files = [tmp_path / f"{name}-{i}.safetensors" for i in range(2)]
        for file, tensors in zip(files, bases, strict=True):
            save_file(tensors, file)
        options = {"method": method, "threshold": 0, "cache": tmp_path / name if kept else None}
        moved.append(prolora.transfer(lora, *files, **options).adapter.updates)
    found, wanted = moved
    bases = list(tmp_path.glob("*/bases/*.safetensors"))
    assert bool(bases) == (kept and method == "prolora")
    assert found.keys() == wanted.keys()
    for name, update in wanted.items():
        torch.testing.assert_close(found[name].dense(), update.dense(), rtol=1e-3, atol=1e-5)
