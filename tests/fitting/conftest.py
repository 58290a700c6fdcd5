"""What every test of this room runs in."""

from __future__ import annotations

from pathlib import Path

import crossing_pipelines
import pytest

from prolora.fitting import pictures
from prolora.fitting.pipelines import pipeline_opening


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what diffusers and transformers say of tiny models."""
    for item in items:
        if item.path.parent.name == "fitting":
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture
def unopened(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be loaded."""
    for module in (pipeline_opening, pictures):
        monkeypatch.setattr(module, "open_pipeline", lambda *_: pytest.fail("it was loaded"))


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ "source" and "target" have unlike text encoders, "other" another latent; a LoRA of "source".

    Tests that change something change a copy.
    """
    return crossing_pipelines.save_ends(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="session")
def ends(pipelines: Path) -> tuple[Path, Path, Path]:
    """The LoRA, its source, and the target."""
    return pipelines / "lora.safetensors", pipelines / "source", pipelines / "target"
