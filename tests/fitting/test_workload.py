"""What a fit foresees of its work, and the time that is left while it goes on."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import tiny_pipelines as tiny
import torch
from torch import nn
from typer.testing import CliRunner

import prolora
from prolora.cli.app import app
from prolora.fitting import pipelines, workload
from prolora.fitting.settings import FitSettings
from prolora.fitting.workload import STAGES, Workload, WorkMeter


@dataclass
class Clock:
    """Seconds that pass when a model predicts."""

    now: float = 0.0

    def perf_counter(self) -> float:
        return self.now


class Model(nn.Module):
    """Takes some seconds for each sample."""

    def __init__(self, clock: Clock, seconds: float, width: int) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.now += self.seconds * len(x)
        return x


@dataclass
class Told:
    """What a caller's function was told, and when."""

    clock: Clock
    calls: list[tuple[float, int, int, str]] = field(default_factory=list)

    def __call__(self, done: int, total: int, name: str) -> None:
        self.calls.append((self.clock.now, done, total, name))


def left_of(name: str) -> float:
    """Seconds that a name says are left."""
    found = re.search(r", (?:(\d+) h )?(?:(\d+) min|(\d+) s) left$", name)
    assert found, name
    hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return 3600 * hours + 60 * minutes + seconds


def run_fit(told: Told, source: Model, target: Model, branches: int, kept: tuple[str, ...] = ()):
    """Everything that a fit does, as the meter sees it."""
    settings = FitSettings(images=6, steps=10, fit_steps=8, progress=told)
    foreseen = Workload(settings, 10, (branches, branches))
    meter, sizes = WorkMeter(foreseen), foreseen.sized
    with meter.watch(source, target), torch.no_grad():
        meter.begin("sample")
        for part in (0, 1):
            for origin in ("source", "adapted", "target"):
                for _ in range(6 if f"{origin} {part}" not in kept else 0):
                    for _ in range(10):
                        (target if origin == "target" else source)(torch.zeros(branches, 3))
                    meter.count_image(origin)
        meter.begin("draw")
        meter.begin("ask")
        count = sizes.probes + sizes.held_out
        for _ in range(count):
            for model in (source, source, target):
                model(torch.zeros(1, 3))
            meter.tell("asking")
        meter.begin("fit")
        for step in range(8):
            meter.tell(f"step {step + 1}")
            for _ in range(4 if step % 4 == 0 else 3):
                target(torch.zeros(sizes.batch, 3))
            target.clock.now += 2.75 * target.seconds * sizes.batch  # backward, and what it repeats
        meter.begin("judge")
        for _ in range(4):
            target(torch.zeros(sizes.held_out, 3))
        meter.finish()
    return meter


@pytest.mark.parametrize("branches", [2, 1])
@pytest.mark.parametrize("seconds", [(1.0, 2.0), (4.0, 1.0)])
def test_the_time_left_is_that_of_all_stages(monkeypatch, branches, seconds):
    clock = Clock()
    monkeypatch.setattr(workload, "time", clock)
    source, target = Model(clock, seconds[0], 10), Model(clock, seconds[1], 20)
    sizes_mislead = seconds[0] > seconds[1]
    told = Told(clock)
    meter = run_fit(told, source, target, branches)
    end = told.calls[-1][0]
    shares = [done / total for _, done, total, _ in told.calls]
    assert shares == sorted(shares) and shares[-1] == 1
    assert len({total for _, _, total, _ in told.calls}) == 1
    for at, _, _, name in told.calls[:-1]:
        truth, left = end - at, left_of(name)
        assert sizes_mislead or abs(left - truth) <= 0.25 * truth + 0.04 * end, name
    pairs = zip(shares, told.calls, strict=True)
    halfway = next(share for share, call in pairs if call[0] >= end / 2)
    assert sizes_mislead or 0.3 < halfway < 0.7
    assert sum(meter.seconds.values()) == pytest.approx(end)
    assert tuple(meter.predictions["ask"]) == meter.workload.predictions["ask"]


def test_samplings_that_were_kept_are_not_waited_for(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(workload, "time", clock)
    source, target = Model(clock, 1.0, 10), Model(clock, 2.0, 20)
    told = Told(clock)
    kept = ("source 0", "target 0", "source 1", "target 1")
    run_fit(told, source, target, 2, kept)
    end = told.calls[-1][0]
    second = next(call for call in told.calls if call[3].startswith("asking"))
    assert left_of(second[3]) == pytest.approx(end - second[0], rel=0.3)


def test_nothing_is_said_of_time_before_anything_was_timed(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(workload, "time", clock)
    told = Told(clock)
    meter = WorkMeter(Workload(FitSettings(progress=told), 25))
    meter.begin("fit")
    meter.tell("step 1")
    assert 0 < told.calls[0][1] < told.calls[0][2]  # earlier stages were kept
    assert told.calls[0][3] == "step 1"


def test_what_is_foreseen_grows_with_what_is_asked_for():
    few, many = (Workload(FitSettings(images=n), 25).predictions for n in (6, 12))
    assert many["sample"] == tuple(2 * made for made in few["sample"])
    assert set(few) <= set(STAGES)
    student = Workload(FitSettings(), 4, (2, 1)).predictions["sample"]
    assert student == (9600 // 2, 48 * 4)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    tiny.save_ends(folder, ("sd15", "tuned"))
    return folder


def test_a_dry_run_says_what_would_be_asked_without_loading_a_model(room, monkeypatch):
    monkeypatch.setattr(pipelines, "open_pipeline", lambda *_: pytest.fail("it was loaded"))
    line = ["fit", room / "lora.safetensors", "--source", room / "sd15", "--target"]
    result = CliRunner().invoke(app, [*map(str, line), str(room / "tuned"), "--dry-run"])
    told = " ".join(result.output.split())
    assert "144 images are sampled, 96 of them by sd15" in told
    assert "at most about 7,488 predictions of sd15" in told
    fewer = prolora.fit(
        room / "lora.safetensors",
        room / "sd15",
        room / "tuned",
        images=2,
        guidance=1.0,
        dry_run=True,
    ).report
    assert "12 images are sampled, 8 of them by sd15" in fewer.work
    assert fewer.to_dict()["work"] == fewer.work


def test_a_planned_fit_says_that_its_lora_was_moved_before(room, tmp_path):
    moved, ends = tmp_path / "moved.safetensors", (room / "sd15", room / "tuned")
    prolora.transfer(room / "lora.safetensors", *ends, out=moved, method="copy")
    assert "moved before" not in str(
        prolora.fit(room / "lora.safetensors", *ends, dry_run=True).report
    )
    assert "moved before, from sd15 to tuned" in str(
        prolora.fit(moved, *reversed(ends), dry_run=True).report
    )


@pytest.mark.slow
def test_a_fit_of_pipelines_makes_the_predictions_that_it_announced(room):
    told = Told(Clock())
    ends = room / "lora.safetensors", room / "sd15", room / "tuned"
    options = prolora.FitOptions(("cat",), images=4, steps=6, fit_steps=4, force=True)
    done = prolora.fit(*ends, replace(options, progress=told))
    foreseen = Workload(options, 6).predictions
    made = done.report.probe.predictions
    for i in (0, 1):
        assert sum(part[i] for part in made.values()) == pytest.approx(
            sum(part[i] for part in foreseen.values()), rel=0.2
        )
    names = [name for *_, name in told.calls]
    assert names[0].startswith("24 images are sampled, 16 of them by sd15")
    assert names[1] == "opening both pipelines"
    assert all(name.endswith("left") for name in names[2:-1]) and names[-1] == "judged"
    shares = [done / total for _, done, total, _ in told.calls]
    assert shares == sorted(shares) and shares[-1] == 1
