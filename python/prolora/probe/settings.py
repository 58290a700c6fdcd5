"""The settings of a probing: what is sampled, and how the updates are fitted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Literal, get_args

from ..bases.base import Progress
from ..core.arrays import make_fields_plain
from ..errors import InvalidOption, UnsupportedFormat
from ..files.outside import read_text

Start = Literal["auto", "zero", "copy"]
"""Where a fit starts: chosen, from no updates, or from the LoRA moved without probing."""

STARTS: tuple[Start, ...] = get_args(Start)
Optimiser = Literal["gauss-newton", "adamw"]
"""What a fit takes its steps by."""

ADAMW: Optimiser = "adamw"
FEW_STEPS = 4
"""Steps of targets whose scheduler is one of few-step models, unless another number is asked."""
MAX_SAMPLES = (1152, 192, 48)
"""Largest default number of samples for the fit, for the verdict, and of one step."""


@dataclass(frozen=True)
class Probing:
    """What method "probe" samples, and how it fits (docs/probe.md).

    Attributes:
        prompts: used in turn; none means unconditional (the empty prompt). Class numbers for
            models that take classes.
        images: number sampled by each of source, source with LoRA and target for the fit, and again
            for the verdict.
        steps: sampling steps.
        size: height and width in pixels; None means the smaller of the two pipelines' defaults, and
            that of each pipeline where their latents are different spaces.
        guidance: guidance scale; None means each pipeline's default.
        target_steps: steps of the target, where it is a few-step model; None: `steps`, or
            FEW_STEPS for the schedulers of few-step models.
        target_guidance: guidance scale of the target, where it is run with another; None:
            `guidance`. A source with guidance and a target without, as few-step students are run,
            are asked accordingly (docs/probe.md).
        lora_steps: steps of the source with the LoRA, where it is a few-step LoRA; None: `steps`.
        lora_guidance: guidance scale of the source with the LoRA; None: `guidance`. Most few-step
            LoRAs are run without.
        start: where the fit starts: "zero" from no updates, "copy" from what moving by weights
            gives; "auto" chooses (docs/probe.md).
        fit_steps: Gauss–Newton steps; the time of the fit is proportional to them.
        force: writes the LoRA even where the verdict of the held-out probes is to refuse it.
        resume: folder for recorded calls and fitted updates, so that an interrupted run goes on.
    """

    prompts: tuple[str, ...] = ()
    images: int = 24
    steps: int = 25
    size: int | None = None
    guidance: float | None = None
    target_steps: int | None = None
    target_guidance: float | None = None
    lora_steps: int | None = None
    lora_guidance: float | None = None
    start: Start = "auto"
    fit_steps: int = 32
    force: bool = False
    resume: str | PathLike[str] | None = field(default=None, repr=False)  # changes no result

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InvalidOption: names the option and the values that it takes.
        """
        make_fields_plain(self)
        several = isinstance(self.prompts, tuple | list)
        if not several or not all(isinstance(prompt, str) for prompt in self.prompts):
            raise InvalidOption(f"prompts must be a tuple of texts, not {self.prompts!r}")
        for name in ("images", "steps", "fit_steps"):
            _check_count(name, getattr(self, name))
        _check_start(self.start)
        for name in ("guidance", "target_guidance", "lora_guidance"):
            value = getattr(self, name)
            if value is not None and not _is_number(value):
                raise InvalidOption(f"{name} must be a number, not {value!r}")
        for name in ("target_steps", "lora_steps"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        if self.size is not None:
            _check_count("size", self.size)
            if self.size % 8:
                raise InvalidOption(f"size must be a multiple of 8 pixels, not {self.size}")

    @property
    def has_few_step_lora(self) -> bool:
        """Whether the source is sampled in another way with the LoRA in its weights."""
        return self.lora_steps is not None or self.lora_guidance is not None

    def with_lora(self) -> Probing:
        """The settings of the sampling of the source with the LoRA."""
        steps, guidance = self.lora_steps, self.lora_guidance
        return replace(
            self,
            steps=self.steps if steps is None else steps,
            guidance=self.guidance if guidance is None else guidance,
        )


def read_prompts(file: str | PathLike[str]) -> tuple[str, ...]:
    """The lines of a text file, without empty ones.

    Raises:
        InvalidOption: the file cannot be read, or has no prompts.
    """
    try:
        lines = read_text(file).splitlines()
    except UnsupportedFormat as error:
        raise InvalidOption(f"{file}: cannot be read as text: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise InvalidOption(f"{file}: has no prompts (one per line is expected)")
    return prompts


@dataclass(frozen=True)
class FitSettings:
    """The settings of `fit_lora`.

    Attributes:
        rank: of every update that is fitted and written; None means the LoRA's own, which is its
            largest. A number below 1 is the share of an update of the LoRA's own rank, as the
            probes see it, that must be kept, module by module.
        start: "zero" starts from no updates, "copy" from the rival (the LoRA as it is, or
            as it was moved without probing), "auto" from the rival where it reaches some of the
            wanted change. From a rival the fit goes only part of the way where the bases disagree.
        probes: samples for the fit, drawn from the samplers' calls; None: see `sized`.
        held_out: samples for the verdict; None: see `sized`.
        steps: Gauss–Newton steps.
        batch: least number of samples of a step; None: see `sized`.
        damping: damping of the curvature, relative to its mean diagonal.
        seed: of the first of three trajectories; they use three seeds, the held-out ones the next
            three.
        force: writes the LoRA even where the gate refuses it.
        resume: folder for recorded calls and fitted updates, so that an interrupted probing goes
            on; files that are damaged or belong to other inputs are computed again.
        samplers: a text that says what the samplers do (prompts, steps); required with `resume`,
            because two functions cannot be compared.
        max_memory: bound in bytes on recorded calls in memory; the rest goes to
            temporary files. Models and the activations of one call are not counted. None: no bound.
        progress: called as progress(done, total, name).
        optimiser: "gauss-newton"; or "adamw" with two steps for each of `steps`, as trainers do it,
            for comparison.
    """

    rank: float | None = None
    start: Start = "auto"
    probes: int | None = None
    held_out: int | None = None
    steps: int = 32
    batch: int | None = None
    damping: float = 1.0
    seed: int = 0
    force: bool = False
    resume: str | PathLike[str] | None = None
    samplers: str = ""
    max_memory: int | None = None
    progress: Progress | None = None
    optimiser: Optimiser = "gauss-newton"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InvalidOption: names the option and the values that it takes.
        """
        make_fields_plain(self)
        _check_start(self.start)
        if self.optimiser not in get_args(Optimiser):
            raise InvalidOption(
                f"optimiser must be one of {', '.join(get_args(Optimiser))}, not {self.optimiser!r}"
            )
        if self.rank is not None:
            _check_rank(self.rank)
        _check_count("steps", self.steps)
        for name in ("probes", "held_out", "batch", "max_memory"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        if not _is_number(self.damping) or self.damping <= 0:
            raise InvalidOption(f"damping must be a positive number, not {self.damping!r}")
        if self.resume is not None and not self.samplers:
            raise InvalidOption("resume needs samplers=TEXT that says what the samplers do")

    def sized(self, recorded: int) -> FitSettings:
        """The settings with numbers instead of None, so that fit and verdict take a bounded time.

        One sample costs one forward pass when it is recorded, three as a probe (source, source with
        LoRA, target), five in a step (a backward pass costs about two) and about seven in the
        verdict. Together fit and verdict then take about three times the sampling. More than
        MAX_SAMPLES of each gain little (docs/probe.md).

        Args:
            recorded: number of samples in all calls, held-out ones included.
        """
        probes, held_out, batch = (
            max(1, min(most, int(share * recorded)))
            for most, share in zip(MAX_SAMPLES, (0.23, 0.05, 0.39 / self.steps), strict=True)
        )
        return replace(
            self,
            probes=self.probes or probes,
            held_out=self.held_out or max(held_out, 24),
            batch=self.batch or max(batch, 4),
        )

    def describe_fit(self) -> str:
        """The settings that fitted updates depend on, as a text."""
        unrelated = ("force", "resume", "samplers", "max_memory", "progress")
        return repr({k: v for k, v in vars(self).items() if k not in unrelated})

    def share_memory(self, parts: int) -> int | None:
        """One of so many equal parts of `max_memory`; None without a bound."""
        return None if self.max_memory is None else self.max_memory // parts


def _is_number(value: object) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, float | int) and math.isfinite(value)


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidOption(f"{name} must be an integer of 1 or more, not {value!r}")


def _check_rank(rank: float) -> None:
    if not _is_number(rank) or rank <= 0 or (rank > 1 and rank != int(rank)):
        raise InvalidOption(
            f"rank must be an integer of 1 or more, or a share between 0 and 1, not {rank!r}"
        )


def _check_start(start: object) -> None:
    if start not in STARTS:
        raise InvalidOption(f"start must be one of {', '.join(STARTS)}, not {start!r}")
