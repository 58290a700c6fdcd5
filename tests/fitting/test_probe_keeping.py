"""A fit that is interrupted goes on, and what was kept serves what it was made of alone."""

from __future__ import annotations

import pytest
from fitting import FlowSide, fit_models
from lora_files import same_bits
from safetensors import safe_open
from safetensors.torch import save_file
from test_probe import lora, permuted, source

from prolora import ProLoRAError
from prolora.fitting.kept_parts import KeptParts

__all__ = ["lora", "source"]  # fixtures

QUICK = {"fit_steps": 3, "rank": 3, "force": True}


@pytest.fixture
def kept(tmp_path):
    """A fit keeps its parts in the test's folder."""
    return {"parts": KeptParts(tmp_path)}


class Interrupted(Exception):
    pass


def test_a_fit_that_is_interrupted_samples_nothing_again(source, lora, tmp_path, monkeypatch, kept):
    target = permuted(source)
    complete = fit_models(source, target, lora, **QUICK)

    def stop(done: int, total: int, name: str) -> None:
        if name.startswith("step 2"):
            raise Interrupted

    with pytest.raises(Interrupted):
        fit_models(source, target, lora, progress=stop, **kept, **QUICK)
    assert len(list(tmp_path.glob("images-*"))) == 6
    monkeypatch.setattr(FlowSide, "sample", lambda *_: pytest.fail("sampled again"))
    again = fit_models(source, target, lora, **kept, **QUICK)
    assert same_bits(complete.updates, again.updates)
    assert again.report.steps == complete.report.steps
    whole = fit_models(source, target, lora, **kept, **QUICK)
    assert (whole.report.resumed, whole.report.steps) == (1, complete.report.steps)
    assert same_bits(complete.updates, whole.updates)


def test_damaged_and_foreign_files_are_made_again(source, lora, tmp_path, monkeypatch, kept):
    target = permuted(source)
    first = fit_models(source, target, lora, **kept, **QUICK)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 6 + 1
    contents = [file.read_bytes() for file in files]
    for i, file in enumerate(files):  # other numbers, cut off, another file under its name
        if i % 3:
            file.write_bytes([contents[i][:40], contents[i - 1]][i % 3 - 1])
            continue
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) + 1 for name in opened.keys()}
            marks = opened.metadata()
        save_file(tensors, file, marks)
    second = fit_models(source, target, lora, **kept, **QUICK)
    assert second.report.resumed == 0
    assert same_bits(first.updates, second.updates)
    # Asked with guidance: the images are of use, and what was fitted to other answers is not.
    monkeypatch.setattr(FlowSide, "sample", lambda *_: pytest.fail("sampled again"))
    guided = fit_models(source, target, lora, guidance=3.0, **kept, **QUICK)
    assert guided.report.resumed == 0
    assert len(list(tmp_path.glob("*.safetensors"))) == 7 + 1


def test_nothing_is_kept_unless_asked_nor_of_what_is_refused(
    source, lora, tmp_path, monkeypatch, kept
):
    monkeypatch.chdir(tmp_path)
    fit_models(source, permuted(source), lora, **QUICK)
    with pytest.raises(ProLoRAError, match="no updates"):
        fit_models(source, source, {}, **kept)
    assert not list(tmp_path.iterdir())
