"""The second LoRA between the same two models asks them only what depends on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from torch import nn

import prolora
from prolora.fitting import pipelines
from prolora.fitting.recording.sample_batches import count_samples
from prolora.fitting.recording.trajectories import Call

FEW = prolora.FitOptions(("cat", "dog"), images=4, steps=4, fit_steps=1, force=True)


class Counter:
    """Counts the samples that models predict."""

    def __init__(self, *models: nn.Module) -> None:
        self.all = 0
        self.hooks = [m.register_forward_hook(self.count, with_kwargs=True) for m in models]

    def count(self, model: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
        self.all += count_samples(Call(args, kwargs))


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("second")
    tiny.save(folder / "source")
    tiny.save(folder / "target", seed=5)
    tiny.save(folder / "across", seed=5, vae_seed=3)
    unet = pipelines.open_pipeline(folder / "source").denoiser
    for name, leaves in (("a", ("attn1.to_v",)), ("b", ("ff.net.2",))):
        tiny.write_lora(folder / f"{name}.safetensors", tiny.updates(unet, leaves))
    return folder


def fit_counted(
    room: Path, name: str, target: str, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[prolora.Transfer, int, int]:
    """The result; samples that were predicted until the fit began, and in all."""
    load, release = pipelines.open_pipeline, pipelines.Pipeline.release
    counters: list[Counter] = []
    until: list[int] = []

    def count(*args: Any) -> pipelines.Pipeline:
        pipeline = load(*args)
        counters.append(Counter(pipeline.denoiser))
        return pipeline

    def note(*args: Any, **kwargs: Any) -> None:
        until.append(sum(counter.all for counter in counters))
        release(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pipelines, "open_pipeline", count)
        patch.setattr(pipelines.Pipeline, "release", note)
        done = prolora.fit(
            room / f"{name}.safetensors", room / "source", room / target, FEW, resume=kept
        )
    return done, until[0], sum(counter.all for counter in counters)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["target", "across"])
def test_the_second_lora_asks_the_models_less_and_gets_what_it_gets_alone(
    room, tmp_path, target, monkeypatch
):
    _, first, _ = fit_counted(room, "a", target, tmp_path / "kept", monkeypatch)
    second, asked, less = fit_counted(room, "b", target, tmp_path / "kept", monkeypatch)
    alone, whole, more = fit_counted(room, "b", target, tmp_path / "other", monkeypatch)
    assert whole == first
    print(f"{target}: {asked} of {first} until the fit, {asked / first:.2f}; {less} of {more}")
    assert asked <= 0.6 * first
    for name, update in second.adapter.updates.items():
        assert torch.equal(update.up, alone.adapter.updates[name].up)
        assert torch.equal(update.down, alone.adapter.updates[name].down)
    assert second.report.probe.gate == alone.report.probe.gate
