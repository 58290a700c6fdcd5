"""Importing the library is cheap and needs nothing optional."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)


def test_importing_pulls_in_nothing_optional():
    code = (
        "import sys, prolora; "
        "optional = 'diffusers peft transformers cupy PIL matplotlib typer rich'.split(); "
        "print([m for m in optional if m in sys.modules])"
    )
    assert run("-c", code).stdout.strip() == "[]"


def test_every_public_name_exists():
    import prolora

    assert all(hasattr(prolora, name) for name in prolora.__all__)


def test_the_embedding_example_runs():
    assert "1 of 1 modules moved" in run(str(EXAMPLES / "embed.py")).stdout
