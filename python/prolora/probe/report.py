"""The choices of a probing and its account."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..files.jsontext import replace_nonfinite
from . import gate


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
        return replace_nonfinite(asdict(self) | {"summary": self.sentences()})  # type: ignore[no-any-return]
