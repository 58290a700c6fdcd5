"""Reading a basis from the cache, checked: `pytest bench/test_cache_read.py`."""

from __future__ import annotations

import pytest
import torch

from prolora.bases.cache import basis_file
from prolora.core.basis import truncated_svd

SIDE, COLUMNS = 1280, 128  # SDXL's attention at the rank of docs/performance.md


@pytest.fixture
def path(tmp_path):
    weight = torch.randn(SIDE, COLUMNS) @ torch.randn(COLUMNS, SIDE)
    file = tmp_path / "basis.safetensors"
    basis_file.write_basis(file, truncated_svd(weight[None], COLUMNS)[0], "0" * 64)
    return file


def test_read_basis(benchmark, path):
    basis, _ = benchmark(basis_file.read_basis, path)
    assert basis.shape == (SIDE, SIDE)
    if benchmark.stats:
        rate = path.stat().st_size / benchmark.stats["min"] / 1e9
        benchmark.extra_info["GB/s"] = round(rate, 2)
