"""Checkpoints whose layers are not all of one dtype, as those with some layers in float8."""

import pytest
import torch
from diagonal import pair_up
from mini import source_weights, target_weights, write_case
from safetensors.torch import save_file

import prolora

FLOAT8 = torch.float8_e4m3fn
MIXTURES = [(FLOAT8, torch.float16), (FLOAT8, torch.float8_e5m2), (torch.bfloat16, torch.float16)]


def mix_dtypes(weights, dtypes):
    """Weights by turns in both dtypes, and the same values in float32."""
    mixed = {f"{name}.weight": weight.to(dtypes[i % 2]) for i, (name, weight) in enumerate(weights)}
    return mixed, {key: weight.float() for key, weight in mixed.items()}


@pytest.mark.parametrize(("dtypes", "method"), pair_up(MIXTURES, ["prolora", "auto"]))
@pytest.mark.parametrize("kept", [False, True])
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
