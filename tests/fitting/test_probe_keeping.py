"""Probing that is interrupted goes on, and what a card need not hold rests in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fitting import fit_models
from test_probe import Denoiser, lora, permuted, run, sampler, source
from torch import Tensor

from prolora import LowRank, ProLoRAError
from prolora import fitting as probe
from prolora.fitting import checkpoint
from prolora.fitting.recording import at_rest, trajectories
from prolora.fitting.recording.trajectories import Call, record_calls
from prolora.fitting.recording.translation import Question

__all__ = ["lora", "source"]  # fixtures

QUICK = {"fit_steps": 3, "rank": 3, "force": True}


class Interrupted(Exception):
    pass


def assert_equal(one: probe.ProbeTransfer, two: probe.ProbeTransfer) -> None:
    assert one.adapter.updates.keys() == two.adapter.updates.keys()
    for name, update in one.adapter.updates.items():
        assert torch.equal(update.up, two.adapter.updates[name].up)
        assert torch.equal(update.down, two.adapter.updates[name].down)


def test_a_fit_that_is_interrupted_samples_nothing_again(source, lora, tmp_path):
    target = permuted(source)
    complete = run(source, target, lora, **QUICK)
    kept = {"resume": tmp_path, "described": "three steps"}

    def stop(done: int, total: int, name: str) -> None:
        if name.startswith("step 2"):
            raise Interrupted

    with pytest.raises(Interrupted):
        run(source, target, lora, progress=stop, **kept, **QUICK)
    assert len(list(tmp_path.glob("calls-*"))) == 6
    again = run(source, target, lora, **kept, **QUICK)
    assert_equal(complete, again)
    assert again.report.steps == complete.report.steps
    assert "sample" not in again.report.predictions or not sum(again.report.predictions["sample"])
    whole = run(source, target, lora, **kept, **QUICK)
    assert (whole.report.resumed, whole.report.steps) == (1, complete.report.steps)
    assert_equal(complete, whole)


def test_damaged_and_foreign_files_are_made_again(source, lora, tmp_path):
    target = permuted(source)
    kept = {"resume": tmp_path, "described": "three steps"}
    first = run(source, target, lora, **kept, **QUICK)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 6 + 1
    for i, file in enumerate(files):  # cut off, a bit flipped, another file under its name
        damaged = bytearray(file.read_bytes())
        damaged[-1] ^= 1
        file.write_bytes([damaged[:40], damaged, files[0].read_bytes()][i % 3])
    second = run(source, target, lora, **kept, **QUICK)
    assert second.report.resumed == 0
    assert_equal(first, second)
    assert run(source, target, lora, **kept, **QUICK).report.resumed == 1
    # Another LoRA: only the bases' own trajectories are of use.
    weaker = {name: LowRank(0.5 * update.up, update.down) for name, update in lora.items()}
    third = run(source, target, weaker, **kept, **QUICK)
    assert third.report.resumed == 0
    assert len(list(tmp_path.glob("*.safetensors"))) == 7 + 2 + 1
    # Asked with guidance: the trajectories are of use, and what was fitted to other answers is not.
    guidance = probe.Guidance(3.0, lambda call: call)
    fourth = run(source, target, lora, guidance=guidance, **kept, **QUICK)
    assert fourth.report.resumed == 0
    assert len(list(tmp_path.glob("*.safetensors"))) == 7 + 2 + 1 + 1
    with pytest.raises(ValueError, match="samplers"):
        run(source, target, lora, resume=tmp_path, **QUICK)


def test_text_that_stays_the_same_is_recorded_once(source):
    class Told(Denoiser):
        def forward(self, x: Tensor, t: Tensor, text: Tensor | None = None) -> Tensor:
            return super().forward(x, t)

    model = Told()

    def sample(seed: int) -> None:
        for step in (3, 2, 1):
            model(torch.full((2, 5, 4), float(step)), torch.ones(2), text=torch.arange(6.0))

    calls = record_calls(model, sample, 0, "source")
    assert calls[0].kwargs["text"] is calls[2].kwargs["text"]
    assert calls[0].args[0] is not calls[1].args[0]
    assert calls[0].args[1] is calls[1].args[1]


def test_calls_come_back_from_a_file_as_they_were():
    shared = torch.randn(2, 3)
    call = Call((shared, 3), {"a": {"b": [shared, None], "c": (True, "x")}, "d": 0.5}, "target")
    tensors, text = trajectories.encode_calls([call])
    assert len(tensors) == 1
    back = trajectories.decode_calls(tensors, text)[0]
    assert back.origin == "target"
    assert back.args[1] == 3
    assert back.kwargs["a"]["c"] == (True, "x")
    assert back.kwargs["a"]["b"][0] is back.args[0]
    assert back.kwargs["a"]["b"][1] is None


def test_one_value_that_was_expanded_is_kept_like_any_other(tmp_path):
    """The time of a call with one sample is such a tensor, of stride 0."""
    times = {str(x.dtype): x.expand(1).clone() for x in (torch.tensor(7), torch.tensor(0.5))}
    assert all(time.stride() == (0,) for time in times.values())
    kept = checkpoint.Checkpoints(tmp_path)
    kept.store("times", "key", times)
    again, _ = kept.recall("times", "key")
    assert all(torch.equal(again[name], time) for name, time in times.items())


def test_questions_of_a_card_rest_in_memory_and_come_back_to_it(monkeypatch):
    """The text embeddings of an image are the same in each of its steps, and rest there once."""
    embeddings = torch.randn(100, device="meta")
    calls = [Call((torch.zeros(6, device="meta"), embeddings), {"i": i}) for i in range(3)]
    rested: list[Tensor] = []

    def rest(tensor: Tensor) -> Tensor:
        rested.append(tensor)
        return torch.empty_like(tensor, device="cpu")

    monkeypatch.setattr(Tensor, "cpu", rest)
    aside = at_rest.lay_questions_aside([Question(call, call) for call in calls])
    assert len(rested) == 3 + 1 and len(aside) == 3
    back = aside[1].target
    assert back.kwargs == {"i": 1} and all(tensor.is_meta for tensor in back.args)
    here = [Question(Call((torch.zeros(2),), {}), Call((torch.ones(2),), {}))]
    assert at_rest.lay_questions_aside(here) is here


def test_no_folder_is_made_for_what_is_refused(source, tmp_path):
    sample = sampler(source)
    kept = tmp_path / "kept"
    with pytest.raises(ProLoRAError, match="no updates"):
        fit_models(source, source, {}, sample, sample, resume=kept, described="any")
    assert not kept.exists()


def test_nothing_is_kept_unless_asked(source, lora, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(source, permuted(source), lora, **QUICK)
    assert not list(Path.cwd().iterdir())
    assert sampler(source)(0) is None
