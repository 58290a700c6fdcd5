"""What a moved LoRA reaches on the target at each strength: measured, with forward passes only.

The models sample a few trajectories: the source with its LoRA, and the target. At some moments of
them the change that the moved LoRA makes to the target is compared with the change that the LoRA
makes to the source, as the gate of a probing does (see `gate`), at more strengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..bases.base import Progress
from ..core.lowrank import LowRank
from ..core.precision import in_full_precision
from ..errors import InvalidOption
from .gate import MIN_SHARE
from .models import check_models, frozen
from .precision import in_float32
from .recording.trajectories import Call, Sample, predict_call, record_calls
from .recording.translation import Question, Translation
from .recording.wanted import WantedChange, wanted_changes
from .settings import check_count
from .updates import run_beside

ORIGINS = ("adapted", "target")
"""Whose trajectories are looked at: where the LoRA is used, and where the target is."""

STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5)
"""The factors that are tried; 0 needs no run."""

RESAMPLES = 1000
LEVELS = (0.1, 0.9)
"""Ends of the intervals: 80 % over trajectories."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class MeasuredStrength:
    """What one moved LoRA reaches, by strength."""

    # The factor with the largest share: the vertex of the parabola through the best of STRENGTHS
    # and its neighbours.
    strength: float
    # The share of the wanted change there, 1 − Σ‖achieved − wanted‖²/Σ‖wanted‖² of the changes of
    # the prediction: 1 is perfect, 0 as good as no LoRA.
    share: float
    strength_interval: Interval  # 80 % interval of `strength` over trajectories
    share_interval: Interval  # 80 % interval of `share` over trajectories
    shares: Mapping[float, float]  # the share at each of STRENGTHS
    # "adapted" (trajectories of the source with its LoRA) and "target" -> the best strength and its
    # share on these alone
    by_origin: Mapping[str, tuple[float, float]]

    @property
    def go(self) -> bool:
        """Whether it reaches enough of the change to be worth having."""
        return self.share >= MIN_SHARE and self.share_interval[0] > 0


@dataclass(frozen=True)
class Measurement:
    """What was measured of a LoRA between two running models."""

    candidates: Mapping[str, MeasuredStrength]  # name of a way to move the LoRA -> what it reaches
    # Σ‖v_target − v_source‖²/Σ‖wanted‖²: how much more the bases differ from each other than the
    # LoRA changes the source
    disagreement: float
    trajectories: int  # how many were sampled, of both origins together
    calls: int  # at how many moments the models were compared

    @property
    def best(self) -> str:
        """The candidate with the largest share; the first of equal ones."""
        return max(self.candidates, key=lambda name: self.candidates[name].share)


@dataclass(frozen=True)
class Trajectories:
    """What is sampled."""

    runs: int = 6  # of the samplers, for each of ORIGINS; the intervals are over them
    moments: int = 6  # of each run at which the models are compared, evenly spread
    seed: int = 0  # of the first run

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InvalidOption: names the option.
        """
        for name in ("runs", "moments"):
            check_count(name, getattr(self, name))


@dataclass
class _Steps:
    """Counts what is done for the caller's progress function."""

    total: int
    progress: Progress | None
    done: int = 0

    def count(self, name: str, steps: int = 1) -> None:
        self.done += steps
        if self.progress:
            self.progress(self.done, self.total, name)


@dataclass
class _Errors:
    """Sums over the calls of each trajectory."""

    origins: list[str]  # of every trajectory
    wanted: Tensor  # [t] Σ‖wanted‖²
    difference: Tensor  # [t] Σ‖v_target − v_source‖²
    # Candidate -> [t, 1 + strengths] Σ‖achieved − wanted‖², at strength 0 first
    missing: dict[str, Tensor] = field(default_factory=dict)


@in_full_precision
def measure_strengths(
    source: nn.Module,
    target: nn.Module,
    lora: Mapping[str, LowRank],
    candidates: Mapping[str, Mapping[str, LowRank]],
    samplers: tuple[Sample, Sample],
    *,
    translation: Translation | None = None,
    trajectories: Trajectories | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Measures the share of the wanted change that moved LoRAs reach at each strength.

    Nothing is trained, and no data is needed: both models run on trajectories that they sample
    from noise. At every moment the target should change as the LoRA changes the source.

    Args:
        source: the module that LoRA names start from (a pipeline's unet or transformer), stored in
            float32, float16 or bfloat16.
        target: the same of the target.
        lora: updates by the source's module names.
        candidates: name of a way to move the LoRA -> updates by the target's module names, at
            strength 1.
        samplers: the first runs the source's sampler from noise with the given seed, while the LoRA
            is in the source's weights; the second the target's own, with its few steps if it is a
            few-step target.
        translation: how the two models are asked the same question; None: they take the same calls.
        trajectories: how many, and how many moments of each.
        progress: called as progress(done, total, name).

    Raises:
        ProLoRAError: an update fits no module, or a model has a dtype that is not handled.
        InvalidOption: there is no candidate.

    Returns:
        The shares, with 80 % intervals. The models' weights are afterwards as before.
    """
    if not candidates:
        raise InvalidOption("candidates is empty: give at least one moved LoRA")
    translation, settings = translation or Translation(), trajectories or Trajectories()
    check_models(source, target, Adapter(dict(lora), format="diffusers"))
    runs = len(ORIGINS) * settings.runs
    passes = len(candidates) * len(STRENGTHS)
    steps = _Steps(runs + passes, progress)
    with frozen(source), frozen(target), in_float32(source), in_float32(target):
        nothing: Mapping[str, LowRank] = {}
        sides = ((source, lora, samplers[0]), (target, nothing, samplers[1]))
        questions: list[list[Question]] = []
        for run in range(settings.runs):
            for i, (model, updates, sample) in enumerate(sides):
                seed = settings.seed + run * len(ORIGINS) + i
                with run_beside(model, updates):
                    calls = record_calls(model, sample, seed, ORIGINS[i])
                if ORIGINS[i] == "adapted":  # text encoders may run with the LoRA, too
                    calls = [translation.unadapt(call) for call in calls]
                chosen = choose_moments(translation.keep_prompted(calls), settings.moments)
                questions.append([translation.question(call) for call in chosen])
                steps.count("sampling")
        every = [question for several in questions for question in several]
        wanted = list(wanted_changes(source, target, lora, every, translation))
        errors = _sum_wanted(wanted, [len(several) for several in questions])
        for name, updates in candidates.items():
            columns = [errors.wanted]
            for strength in STRENGTHS:
                columns.append(
                    _sum_missing(target, updates, strength, wanted, questions, translation)
                )
                steps.count(f"{name} at {strength:g}")
            errors.missing[name] = torch.stack(columns, 1)
    return _summarise(errors, len(wanted))


def choose_moments(calls: Sequence[Call], count: int) -> list[Call]:
    """Chooses at most `count` calls of a trajectory, evenly spread.

    They lie in the middle of equal parts of it.
    """
    count = min(count, len(calls))
    return [calls[int((i + 0.5) * len(calls) / count)] for i in range(count)]


def _sum_by_run(values: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """Sums squared norms over the calls of each trajectory [t]."""
    squares = torch.stack([value.double().square().sum().cpu() for value in values])
    return torch.stack([part.sum() for part in squares.split(list(lengths))])


def _sum_wanted(wanted: Sequence[WantedChange], lengths: Sequence[int]) -> _Errors:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return _Errors(
        [wanted[start].call.origin for start in starts],
        _sum_by_run([w.change for w in wanted], lengths),
        _sum_by_run([w.base_difference for w in wanted], lengths),
    )


def _sum_missing(
    target: nn.Module,
    updates: Mapping[str, LowRank],
    strength: float,
    wanted: Sequence[WantedChange],
    questions: Sequence[Sequence[Question]],
    translation: Translation,
) -> Tensor:
    """Sums ‖achieved − wanted‖² [t] of updates at a strength."""
    with run_beside(target, updates, strength):
        missing = [
            predict_call(target, w.call, translation.read) - w.plain - w.change for w in wanted
        ]
    return _sum_by_run(missing, [len(several) for several in questions])


def _summarise(errors: _Errors, calls: int) -> Measurement:
    """Summarises best strengths and shares of all candidates."""
    measured = {name: _find_best(errors, missing) for name, missing in errors.missing.items()}
    disagreement = errors.difference.sum() / errors.wanted.sum().clamp_min(1e-30)
    return Measurement(measured, float(disagreement), len(errors.origins), calls)


def _find_best(errors: _Errors, missing: Tensor) -> MeasuredStrength:
    """Finds the best strength of a candidate; `missing` is [t, 1 + strengths]."""

    def best(rows: Tensor) -> tuple[float, float]:
        return fit_vertex(missing[rows].sum(0), float(errors.wanted[rows].sum()))

    everything = torch.arange(len(errors.origins))
    strength, share = best(everything)
    resampled = [best(rows) for rows in _resample(errors.origins)]
    intervals = []
    for values in zip(*resampled, strict=True):
        ends = torch.tensor(values).quantile(torch.tensor(LEVELS))
        intervals.append((float(ends[0]), float(ends[1])))
    total = errors.wanted.sum().clamp_min(1e-30)
    shares = (1 - missing.sum(0) / total).tolist()[1:]
    by_origin = {
        origin: best(torch.tensor([i for i, o in enumerate(errors.origins) if o == origin]))
        for origin in ORIGINS
    }
    return MeasuredStrength(
        strength,
        share,
        intervals[0],
        intervals[1],
        dict(zip(STRENGTHS, shares, strict=True)),
        by_origin,
    )


def _resample(origins: Sequence[str]) -> Iterator[Tensor]:
    """Trajectories drawn with replacement, as many of each origin as there are."""
    generator = torch.Generator().manual_seed(0)
    places = [torch.tensor([i for i, o in enumerate(origins) if o == name]) for name in ORIGINS]
    for _ in range(RESAMPLES):
        drawn = [p[torch.randint(len(p), (len(p),), generator=generator)] for p in places]
        yield torch.cat(drawn)


def fit_vertex(missing: Tensor, wanted: float) -> tuple[float, float]:
    """Returns the strength with the least error, and the share there.

    The error is nearly a parabola of the strength: the vertex of the one through the best strength
    and its two neighbours is taken, or the best strength itself where that has no vertex between
    the neighbours.

    Args:
        missing: [1 + strengths] the error at 0 and at each of STRENGTHS.
        wanted: the error at which the share is 0.
    """
    grid, errors = (0.0, *STRENGTHS), missing.tolist()
    least = min(range(len(grid)), key=errors.__getitem__)
    middle = min(max(least, 1), len(grid) - 2)
    (a, b, c), (fa, fb, fc) = grid[middle - 1 : middle + 2], errors[middle - 1 : middle + 2]
    # Newton's form: f(x) = fa + slope (x − a) + bend (x − a)(x − b).
    slope = (fb - fa) / (b - a)
    bend = ((fc - fb) / (c - b) - slope) / (c - a)
    strength, error = grid[least], errors[least]
    if bend > 0:
        vertex = (a + b) / 2 - slope / (2 * bend)
        if a <= vertex <= c:
            strength = vertex
            error = fa + slope * (vertex - a) + bend * (vertex - a) * (vertex - b)
    return strength, 1 - error / max(wanted, 1e-30)
