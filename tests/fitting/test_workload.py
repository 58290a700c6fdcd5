"""What a fit foresees of its work, and the time that is left while it goes on."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

import prolora
from prolora.fitting import workload
from prolora.fitting.settings import FitSettings
from prolora.fitting.workload import STAGES, Meter, Workload


@dataclass
class Clock:
    """Seconds that pass when a test says so."""

    now: float = 0.0

    def perf_counter(self) -> float:
        return self.now


def left_of(name: str) -> float:
    """Seconds that a name says are left."""
    found = re.search(r", (?:(\d+) h )?(?:(\d+) min|(\d+) s) left$", name)
    assert found, name
    hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return 3600 * hours + 60 * minutes + seconds


def test_one_bar_goes_through_all_stages_and_says_what_is_left(monkeypatch):
    """Every stage takes as long as was foreseen, and images that were kept take no time."""
    clock, seen, kept = Clock(), [], 4
    monkeypatch.setattr(workload, "time", clock)
    told = FitSettings(images=6, progress=lambda *step: seen.append((clock.now, *step)))
    meter = Meter(Workload(told, 25))
    for stage, parts in (("sample", 6), ("ask", 4), ("fit", 8), ("judge", 1)):
        meter.begin(stage)
        for i in range(parts):
            was_kept = stage == "sample" and i < kept
            clock.now += 0 if was_kept else meter.workload.price(stage) / parts
            meter.advance(1 / parts, stage, was_kept)
    meter.begin("")
    end, shares = seen[-1][0], [done / total for _, done, total, _ in seen]
    assert shares == sorted(shares) and shares[-1] == 1 and seen[-1][3] == "done"
    assert len({total for _, _, total, _ in seen}) == 1
    for at, _, _, name in seen[kept:-1]:
        assert left_of(name) == pytest.approx(max(end - at, 1), rel=0.05, abs=61), name
    assert all(name == "sample" for *_, name in seen[:kept])
    assert sum(meter.seconds.values()) == pytest.approx(end)


def test_what_is_foreseen_grows_with_what_is_asked_for():
    few, many = (Workload(FitSettings(images=n), 25).predictions for n in (6, 12))
    assert many["sample"] == tuple(2 * made for made in few["sample"])
    assert set(few) <= set(STAGES)
    student = Workload(FitSettings(), 4, (2, 1)).predictions["sample"]
    assert student == (9600 // 2, 48 * 4)


def test_a_dry_run_says_what_would_be_asked_without_loading_a_model(ends, unopened):
    fitted = prolora.fit(*ends, dry_run=True).report.work
    assert "144 images are sampled, 96 of them by source" in fitted
    assert "at most about 7,488 predictions of source" in fitted
    fewer = prolora.fit(*ends, images=2, guidance=1.0, dry_run=True).report
    assert "12 images are sampled, 8 of them by source" in fewer.work
    assert fewer.to_dict()["work"] == fewer.work
