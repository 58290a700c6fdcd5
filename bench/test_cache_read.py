"""Reading a basis from the cache, checked: `pytest bench/test_cache_read.py`."""

from __future__ import annotations

import pytest
import torch

from prolora.bases.cache import basis_file
from prolora.core.basis import FACTS

SIDE, COLUMNS = 1280, 128  # SDXL's attention at the rank of docs/performance.md


@pytest.fixture
def path(tmp_path):
    tensors = {"U": torch.randn(SIDE, COLUMNS), "S": torch.ones(COLUMNS)}
    tensors["V"] = torch.randn(SIDE, COLUMNS)
    facts = dict.fromkeys(FACTS, 0.0) | {"rung": "krylov", "name": "0" * 64}
    file = tmp_path / "basis.safetensors"
    basis_file.write_basis(file, basis_file.StoredBasis(tensors, facts))
    return file


def test_read_basis(benchmark, path):
    stored = benchmark(basis_file.read_basis, path)
    assert stored.shape == (SIDE, SIDE)
    if benchmark.stats:
        rate = path.stat().st_size / benchmark.stats["min"] / 1e9
        benchmark.extra_info["GB/s"] = round(rate, 2)
