"""What every test of this room runs in."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what diffusers and transformers say of tiny models."""
    for item in items:
        if item.path.parent.name == "fitting":
            item.add_marker(pytest.mark.filterwarnings("ignore"))
