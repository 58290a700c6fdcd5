"""Importing the library is cheap and needs nothing optional."""

from fresh import run_fresh


def test_importing_and_opening_pull_in_nothing_optional_and_ask_for_no_gpu():
    """One process for all; the command line comes last, which needs typer."""
    code = """
import sys, torch
torch.cuda.is_available = torch.cuda.device_count = lambda: 1 / 0
import prolora, prolora.adapters, prolora.checking.check
from prolora.core.ops import small_svd
prolora.open_base({'a': torch.ones(2, 2)})
optional = 'diffusers peft transformers cupy PIL matplotlib huggingface_hub gguf typer rich'
print([m for m in optional.split() if m in sys.modules])
import prolora.cli.app
"""
    assert run_fresh(code).strip() == "[]"


def test_every_public_name_exists():
    import prolora

    assert all(hasattr(prolora, name) for name in prolora.__all__)
