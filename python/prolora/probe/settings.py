"""The choices of a probing: what is sampled, and how the updates are fitted."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path

from ..bases.base import Progress

STRATEGIES = ("joint", "blocks")
MAX_SAMPLES = (1152, 192, 48)
"""Samples to fit on, to judge on, and of a step, however much was sampled."""


@dataclass(frozen=True)
class Probing:
    """What method "probe" samples, and within which bounds (docs/probe.md).

    Attributes:
        prompts: taken in turn; none means unconditional (the empty prompt). Class numbers for
            models that take classes.
        images: sampled for each of source, source with LoRA and target, and as many held out.
        steps: of the samplers.
        size: height and width in pixels; None means the smaller of the two pipelines' own.
        guidance: scale; None means each pipeline's own.
        strategy: "joint" fits all updates at once on the prediction; "blocks" one block after the
            other, which holds one block's updates and activations at a time.
        fit_steps: Gauss–Newton steps of "joint"; time is proportional to them.
        force: write the LoRA even where the held-out probes speak against it.
        resume: folder that keeps what was recorded and fitted, so that an interrupted run goes on.
    """

    prompts: tuple[str, ...] = ()
    images: int = 24
    steps: int = 25
    size: int | None = None
    guidance: float | None = None
    strategy: str = "joint"
    fit_steps: int = 32
    force: bool = False
    resume: str | PathLike[str] | None = field(default=None, repr=False)  # changes no result

    def __post_init__(self) -> None:
        """Refuses what makes no sense."""
        if min(self.images, self.steps, self.fit_steps) < 1:
            raise ValueError("images and steps of a probing must be 1 or more")
        if self.strategy not in STRATEGIES:
            raise ValueError(
                f"a probing's strategy is one of {', '.join(STRATEGIES)}, not {self.strategy!r}"
            )
        if self.size is not None and (self.size < 8 or self.size % 8):
            raise ValueError(f"the size of probes must be a multiple of 8 pixels, not {self.size}")


def read_prompts(file: str | PathLike[str]) -> tuple[str, ...]:
    """The lines of a text file, empty ones left out.

    Raises:
        ValueError: it cannot be read, or holds none.
    """
    try:
        lines = Path(file).read_text("utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{file}: cannot be read as text: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ValueError(f"{file}: has no prompts (one a line)")
    return prompts


@dataclass(frozen=True)
class FitSettings:
    """The choices of a probing.

    Attributes:
        rank: of every update written; a number below 1 is the share of what the probes see of an
            update that must be kept, module by module.
        strategy: "joint", all updates at once on the prediction; or "blocks", one block after the
            other on its residual stream, which holds one block's updates and activations at a time.
        probes: "joint": samples to fit on, drawn from all that the samplers' calls hold; None:
            see `sized`.
        held_out: "joint": samples to judge on, likewise.
        steps: "joint": Gauss–Newton steps.
        batch: "joint": samples of a step, at least, likewise.
        damping: "joint": of the curvature, relative to its mean diagonal.
        map_ridge: "blocks": λ of the maps between residual streams, relative to the mean variance.
        fit_ridge: "blocks": λ of the updates, relative to the mean diagonal of the curvature.
        iterations: "blocks": conjugate-gradient steps of every linearised problem.
        rounds: "blocks": how often every block is linearised anew.
        seed: of the trajectories; the held-out ones use the next three.
        force: write the LoRA even where the gate refuses it.
        resume: folder that keeps recorded calls and fitted blocks, so that an interrupted probing
            goes on; what is damaged or was made of anything else is made again.
        samplers: says what the samplers do (prompts, steps); asked for with `resume`, which cannot
            look into functions.
        max_memory: bytes that calls and streams which wait for their use may take; what is above
            goes to temporary files. Models and one call's activations come on top. None: no bound.
        progress: called as progress(done, total, name).
    """

    rank: float = 32
    strategy: str = "joint"
    probes: int | None = None
    held_out: int | None = None
    steps: int = 32
    batch: int | None = None
    damping: float = 1.0
    map_ridge: float = 0.01
    fit_ridge: float = 0.03
    iterations: int = 6
    rounds: int = 2
    seed: int = 0
    force: bool = False
    resume: str | PathLike[str] | None = None
    samplers: str = ""
    max_memory: int | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Refuses what makes no sense."""
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}")
        if self.rank <= 0 or (self.rank > 1 and self.rank != int(self.rank)):
            raise ValueError("rank must be a whole number, or a share between 0 and 1")
        counts = ("probes", "held_out", "steps", "batch", "iterations", "rounds")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more")
        for name in ("damping", "map_ridge", "fit_ridge"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive")
        if self.resume is not None and not self.samplers:
            raise ValueError("resume needs samplers=TEXT that says what the samplers do")

    def sized(self, recorded: int) -> FitSettings:
        """The options with numbers for None: fit and verdict take about three times the sampling.

        One sample costs a forward pass while it is recorded, three as a probe (source, source with
        LoRA, target), five in a step (one backward pass is about two) and some seven when it is
        judged. More than MOST of each bring little (docs/probe.md).

        Args:
            recorded: samples of all calls, held-out ones included.
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

    def told(self) -> str:
        """The choices that a fitted block depends on."""
        idle = ("force", "resume", "samplers", "max_memory", "progress")
        return repr({k: v for k, v in vars(self).items() if k not in idle})
