"""The choices of a probing and its account."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from typing import Any

from ..options import STRATEGIES
from ..report import finite
from . import gate

Progress = Callable[[int, int, str], None]
MOST = (1152, 192, 48)
"""Samples to fit on, to judge on, and of a step, however much was sampled."""


@dataclass(frozen=True)
class Options:
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

    def sized(self, recorded: int) -> Options:
        """The options with numbers for None: fit and verdict take about three times the sampling.

        One sample costs a forward pass while it is recorded, three as a probe (source, source with
        LoRA, target), five in a step (one backward pass is about two) and some seven when it is
        judged. More than MOST of each bring little (docs/probe.md).

        Args:
            recorded: samples of all calls, held-out ones included.
        """
        probes, held_out, batch = (
            max(1, min(most, int(share * recorded)))
            for most, share in zip(MOST, (0.23, 0.05, 0.39 / self.steps), strict=True)
        )
        return replace(
            self, probes=self.probes or probes, held_out=self.held_out or max(held_out, 24),
            batch=self.batch or max(batch, 4),
        )  # fmt: skip

    def told(self) -> str:
        """The choices that a fitted block depends on."""
        idle = ("force", "resume", "samplers", "max_memory", "progress")
        return repr({k: v for k, v in vars(self).items() if k not in idle})


@dataclass(frozen=True)
class BlockReport:
    """One block of the target.

    Attributes:
        name: the block.
        explained: share of the variance of its streams that the source's streams predict; empty
            for the last block, which is fitted to the prediction itself.
        reached: share of the wanted change of its output that the fit reaches on the probes it was
            fitted on, after the cut to rank.
        modules: how many modules got an update.
    """

    name: str
    explained: tuple[float, ...]
    reached: float
    modules: int


@dataclass
class ProbeReport:
    """The account of one probing.

    Attributes:
        probes: calls of the models that were recorded to fit on.
        held_out: calls recorded to judge on.
        rank: of the updates, as asked for.
        samples: fitted on, and judged on.
        modules: of the target that got an update.
        start: "joint": "copy" where the fit starts from the copied updates (those outside the
            blocks stay copied), else "zero".
        steps: "joint": share of the wanted change that was reached before every step, on the
            probes of that step.
        blocks: "blocks": one row for every block of the target, in the order of the fit.
        left_out: module of the LoRA that lies in no block -> why it was not moved.
        gate: the verdict of the held-out probes.
        resumed: blocks, or the joint fit as one, that were taken from the folder of an earlier
            probing.
        seconds: wall time by stage.
    """

    probes: int
    held_out: int
    rank: float
    samples: tuple[int, int] = (0, 0)
    modules: int = 0
    start: str = "zero"
    steps: list[float] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    gate: gate.Gate | None = None
    resumed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def sentences(self) -> list[str]:
        """The result in plain words."""
        where = f"{len(self.blocks)} blocks, " if self.blocks else ""
        how = f" in {len(self.steps)} steps" if self.steps else ""
        drawn = f"{self.samples[0]} samples of {self.probes} calls of the models"
        origin = ", starting from the copied updates" if self.start == "copy" else ""
        said = [f"{where}{self.modules} modules fitted{how} on {drawn}{origin}."]
        if self.left_out:
            name, reason = next(iter(self.left_out.items()))
            said.append(f"{len(self.left_out)} modules were not moved; {name}: {reason}.")
        if self.gate:
            said.append(
                f"{self.gate.decision}, at strength {self.gate.strength:g}: {self.gate.reason}."
            )
        return said

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return finite(asdict(self) | {"summary": self.sentences()})  # type: ignore[no-any-return]
