"""The generator of benchmark models gives what it promises."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from prolora.bases import open_base
from prolora.files.safetensors_file import SafetensorsFile

Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def sdxl() -> ModuleType:
    """bench/sdxl.py, which is a script and not part of the package."""
    path = Path(__file__).parents[2] / "bench" / "sdxl.py"
    spec = importlib.util.spec_from_file_location("bench_sdxl", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_sdxl"] = module
    spec.loader.exec_module(module)
    return module


def test_small_models_have_the_names_spectra_and_relation_of_large_ones(
    sdxl: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several shards."""
    monkeypatch.setattr(sdxl, "SHARD_BYTES", 5_000_000)
    made = sdxl.write_all(tmp_path / "one", scale=16)
    source, target = open_base(made.source), open_base(made.target)
    assert (len(source.shapes), len(target.shapes)) == (560, 272)
    assert len(source.files) > 1 and all(f.stat().st_size < 5_100_000 for f in source.files)
    ours, theirs = source.read(Q).float(), target.read(Q).float()
    assert ours.shape == (40, 40)
    torch.testing.assert_close(
        (theirs - ours).norm() / ours.norm(), torch.tensor(0.15), atol=1e-3, rtol=0
    )
    sigma = torch.linalg.svdvals(ours)
    expected = torch.arange(1, 41).float().rsqrt() * sigma[0]
    torch.testing.assert_close(sigma, expected, rtol=0.01, atol=1e-3)
    lora = SafetensorsFile(made.lora)
    key = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    assert len(lora.tensors) == 3 * 560
    assert lora.tensors[f"{key}.lora_down.weight"].shape == (32, 40)
    assert lora.read(f"{key}.alpha") == 16
    again = sdxl.write_all(tmp_path / "two", scale=16)
    for one in sorted((tmp_path / "one").rglob("*")):
        two = tmp_path / "two" / one.relative_to(tmp_path / "one")
        assert one.is_dir() or one.read_bytes() == two.read_bytes()
    other = sdxl.write_all(tmp_path / "three", scale=16, seed=1)
    assert not torch.equal(open_base(other.source).read(Q), open_base(again.source).read(Q))


def test_full_size_names_and_shapes_are_those_of_the_layouts(sdxl: ModuleType) -> None:
    """So that the full-size files are recognised, with and without feed-forward."""
    from prolora.bases import identify_layout

    for id_ in ("sdxl", "ssd-1b"):
        for feed_forward in (False, True):
            assert identify_layout(sdxl.shapes(id_, 1, feed_forward)) == id_
