"""What every test of this room runs in."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Without the warnings of diffusers and transformers about tiny models."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
