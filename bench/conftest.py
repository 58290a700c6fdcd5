"""Fixtures of the benches."""

import pytest

from prolora.core.ops import native


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Where a bench runs; cuda is skipped with the reason."""
    if request.param == "cuda":
        count, why = native.cuda_status()
        if count == 0:
            pytest.skip(f"cuda: {why}")
    return request.param
