"""What a command over several LoRAs prints last, and what its help promises."""

import os
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import prolora as library

ICONS = Path(__file__).parents[2] / "examples" / "icon_family" / "weights"
LAST = r"⚠ 2 LoRAs in {}: load them at strength 1"


@pytest.fixture
def loras(case, tmp_path):
    """(two LoRAs, the options that name both bases)."""
    lora, source, target = case
    other = shutil.copy(lora, tmp_path / "other.safetensors")
    return (lora, other), ("--source", source, "--target", target)


def test_several_transfers_end_with_mark_folder_and_strengths(prolora, loras, tmp_path):
    files, bases = loras
    for _ in range(2):  # the second time they are kept
        code, text, _ = prolora("transfer", *files, *bases, "-o", tmp_path / "moved")
        assert code == 0 and text.splitlines()[-1] == LAST.format(f"{tmp_path / 'moved'}{os.sep}")


def test_another_look_is_advised_by_flags_that_a_transfer_takes(prolora, tmp_path):
    bases = ("--source", ICONS / "source", "--target", ICONS / "far")
    line = ("transfer", ICONS / "loras/neon.safetensors", *bases, "-o", tmp_path / "x.safetensors")
    _, text, _ = prolora(*line, "--cache", "none")
    assert "--method best with --look source makes one" in " ".join(text.split())
    (tmp_path / "x.safetensors").unlink()
    code, text, _ = prolora(*line, "--method", "best", "--look", "source", "--dry-run")
    assert code == 0 and "because the look of source was asked for" in " ".join(text.split())
    code, _, errors = prolora(*line, "--look", "source")
    said = " ".join(errors.split())
    assert code == 2 and "--look is for a fit: take --method best, or `prolora fit`" in said


def test_a_migration_ends_with_mark_folder_and_strengths(prolora, loras, tmp_path):
    files, bases = loras
    for _ in range(2):
        code, text, _ = prolora("migrate", *files, *bases, "-o", tmp_path / "moved")
        folder = next((tmp_path / "moved").iterdir())
        assert code == 0 and text.splitlines()[-1] == LAST.format(f"{folder}{os.sep}")


def test_an_extraction_has_the_type_that_its_help_names(prolora, tmp_path, case):
    _, source, _ = case
    tuned = tmp_path / "tuned"
    shutil.copytree(source, tuned)
    file = next(tuned.glob("*.safetensors"))
    save_file({name: 1.1 * tensor for name, tensor in load_file(file).items()}, file)
    out = tmp_path / "out.safetensors"
    assert prolora("extract", source, tuned, "-o", out)[0] == 0
    text = " ".join(re.sub("[│]", " ", prolora("extract", "-h")[1]).split())
    assert "Default: float16." in text and "the same transfer or fit" not in text
    assert library.check(out).dtypes.keys() == {"float16"}
