"""A folder of LoRAs in one command: each gets what it gets alone, and the models are asked less."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines as tiny
from fresh import forks, start_fork

import prolora
from prolora.fitting.pipelines.pipeline_opening import open_pipeline
from prolora.fitting.pipelines.pipeline_side import PipelineSide

FEW = prolora.FitOptions(("cat", "dog"), images=2, steps=4, fit_steps=2, force=True)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pipelines, a third with another VAE, and the LoRAs a, b, c; b has a text encoder's part.

    What each becomes alone lies in "alone" and "alone-across".
    """
    folder = tmp_path_factory.mktemp("folder")
    tiny.save(folder / "source")
    tiny.save(folder / "target", seed=5, text=12)
    tiny.save(folder / "across", seed=5, vae_seed=3)
    source = open_pipeline(folder / "source")
    for name, leaves in (("a", ("attn1.to_v",)), ("c", ("to_out.0",))):
        tiny.write_lora(folder / f"{name}.safetensors", tiny.updates(source.denoiser, leaves))
    tiny.write_lora_with_text(folder / "b.safetensors", source.pipe, 0.3)
    (folder / "broken.safetensors").write_bytes(b"no LoRA")
    for target in ("target", "across"):
        out = folder / f"alone-{target}"
        out.mkdir()
        for name in "abc" if target == "target" else "ac":
            ends = folder / f"{name}.safetensors", folder / "source", folder / target
            prolora.fit(*ends, FEW, out=out / f"{name}.safetensors")
    return folder


def fit_all(room: Path, out: Path, names: str = "abc", target: str = "target", **more: object):
    loras = [room / f"{'broken' if name == '-' else name}.safetensors" for name in names]
    return prolora.fit_many(loras, room / "source", room / target, out, FEW, **more)


def assert_as_alone(room: Path, out: Path, names: str = "abc", target: str = "target") -> None:
    """Every result has the bytes that it has alone, and nothing else is there."""
    assert {entry.name for entry in out.iterdir()} == {f"{name}.safetensors" for name in names}
    for name in names:
        alone = room / f"alone-{target}" / f"{name}.safetensors"
        assert (out / alone.name).read_bytes() == alone.read_bytes(), name


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the images that are sampled."""
    numbers, sample = [], PipelineSide.sample

    def note(self: PipelineSide, number: int, prompt: int) -> Any:
        numbers.append(number)
        return sample(self, number, prompt)

    monkeypatch.setattr(PipelineSide, "sample", note)
    return numbers


@pytest.mark.parametrize("target", ["target", "across"])
def test_each_lora_of_a_folder_gets_what_it_gets_alone_for_fewer_predictions(
    room, tmp_path, target, sampled
):
    names = "acb" if target == "target" else "ac"
    _, refused, *_ = fit_all(room, tmp_path / "out", f"a-{names[1:]}", target)
    assert isinstance(refused.error, prolora.errors.UnsupportedFormat)
    assert_as_alone(room, tmp_path / "out", names, target)
    assert len(sampled) == 12 + 4 * (len(names) - 1)  # of the next, the source with it alone


@forks
def test_a_run_that_is_killed_in_the_second_lora_goes_on_and_leaves_nothing_behind(room, tmp_path):
    out = tmp_path / "out"
    child = start_fork(lambda: fit_all(room, out))
    while not (out / "a.safetensors").exists():
        time.sleep(0.01)
    while not any(out.glob(".prolora-parts/images-adapted-*")):
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not (out / "b.safetensors").exists()
    first, second, _ = fit_all(room, out)
    assert first.kept and second.status == "moved"
    assert_as_alone(room, out)


def test_what_the_next_lora_cannot_use_goes_and_ctrl_c_leaves_nothing_behind(room, tmp_path):
    kept, out = set[str](), tmp_path / "out"

    def stop(done: int, total: int, name: str) -> None:
        if "LoRA 2" in name:
            files = out.glob(".prolora-parts/*.safetensors")
            kept.update(file.name.rpartition("-")[0] for file in files)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_all(room, out, progress=stop)
    assert kept == {"images-source-0", "images-source-3", "images-target-2", "images-target-5"}
    assert_as_alone(room, out, "a")
