"""What of LoRAs survived when they were baked into a model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..reports.report import Mark, Report, Sentence
from ..reports.table import Column, Row, Table, make_table

SURVIVES = 0.9
"""Where less of a LoRA survives than this, people see it."""


@dataclass(frozen=True)
class BakedModule:
    """One module's update ΔW, and W + ΔW rounded to Q."""

    module: str
    energy: float = 0.0  # ‖ΔW‖²
    product: float = 0.0  # ⟨Q − W, ΔW⟩
    wrong: float = 0.0  # ‖Q − W − ΔW‖²
    bits: int = 0  # a number needs to keep enough; 0 where it does

    @property
    def survived(self) -> float:
        """The share of the update that is left."""
        return self.product / self.energy if self.energy else 1.0

    @property
    def error(self) -> float:
        """The rounding error beside the size of the update."""
        return math.sqrt(self.wrong / self.energy) if self.energy else 0.0


def sum_modules(rows: Iterable[BakedModule]) -> BakedModule:
    """Returns all updates as one."""
    parts = [(row.energy, row.product, row.wrong) for row in rows]
    return BakedModule("all", *map(sum, zip(*parts, strict=True))) if parts else BakedModule("all")


@dataclass(frozen=True, kw_only=True)
class BakeReport(Report):
    """What is left of LoRAs in a baked model."""

    path: str | None  # None if the tensors came back
    base: str
    loras: tuple[str, ...]
    strengths: tuple[float, ...]  # the factor on each
    blocks: tuple[str, ...]  # the factors by block on each; "" without
    stochastic: int | None  # the seed of the rounding; None if it was to the nearest
    dtypes: dict[str, int]  # how the changed weights are stored -> how many
    modules: tuple[BakedModule, ...]
    left_out: dict[str, str] = field(default_factory=dict)  # what has no place in the base -> why
    # Of a base in memory: its own keys -> tensors, the unchanged ones the caller's own
    tensors: dict[str, Any] | None = field(default=None, repr=False, compare=False)

    eyebrow: ClassVar[str] = "Baked model"

    @property
    def title(self) -> str:
        """What was baked into what."""
        return f"{', '.join(self.loras)} in {self.base}"

    @property
    def whole(self) -> BakedModule:
        """All updates as one."""
        return sum_modules(self.modules)

    def in_words(self) -> Sentence:
        """Returns what is left, and how to keep more."""
        share = self.whole.survived
        mark: Mark = "✔" if share >= SURVIVES and not self.left_out else "⚠"
        left_out = tuple(f"{name} is left out: {why}." for name, why in self.left_out.items())
        left_out += ("To keep these, `transfer()` or `fit()` the LoRA first.",) * bool(left_out)
        wrote = (f"wrote {self.path}",) if self.path else ()
        if share >= SURVIVES:
            headline = f"{share:.0%} of the LoRA is in the weights of {self.base}."
            if count := len(self.left_out):
                headline = f"{self.base}'s weights have the LoRA but for {count} of its modules."
            return Sentence(mark, headline, wrote, left_out)
        also = ", or round at random (`stochastic`)" if self.stochastic is None else ""
        way = f"To keep all: `dtype='bfloat16'`, or keep the LoRA as a file{also}."
        headline = f"Rounding took a part of the LoRA: {share:.0%} of it is left."
        return Sentence(mark, headline, (way, *wrote), left_out)

    def sentences(self) -> list[str]:
        """Reports what was changed, and how exactly."""
        stored = ", ".join(f"{count} in {kind}" for kind, count in self.dtypes.items())
        sentences = [f"{stored} took the LoRA in; no other weight of {self.base} did."]
        sentences.append(f"The rounding error is {self.whole.error:.2g} times the LoRA.")
        for bits in (8, 16, 32):
            if modules := [row.module for row in self.modules if row.bits == bits]:
                listed = ", ".join(modules)
                sentences.append(
                    f"To keep {SURVIVES:.0%}, these need {bits} bits a number: {listed}."
                )
        return sentences

    def tables(self) -> list[Table]:
        """Tabulates the modules, those with the least left first."""
        columns = (
            Column("module"),
            Column("left", ".0%", has_bar=True),
            Column("error", ".2g"),
            Column("bits to keep enough"),
        )
        rows = sorted(self.modules, key=lambda row: row.survived)
        cells = (Row((row.module, row.survived, row.error, row.bits or "")) for row in rows)
        return [make_table("What is left of each update", columns, cells, "modules")]

    def numbers(self) -> dict[str, Any]:
        """Returns what the report holds, by name."""
        names = ("path", "base", "loras", "strengths", "blocks", "stochastic", "dtypes", "left_out")
        values = {name: getattr(self, name) for name in names}
        values |= {"survived": self.whole.survived, "error": self.whole.error}
        values["bits"] = {row.module: row.bits for row in self.modules if row.bits}
        return values | {"modules": {row.module: row.survived for row in self.modules}}
