"""The choices of a transfer: every one the paper leaves open has a name here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from os import PathLike

from ..bases.base import Progress
from ..comparison.module_map import Match
from ..comparison.verdict import AUTO, DEFAULT_THRESHOLD, Verdict
from ..core.methods import METHODS
from ..core.projection import DEFAULT_RANK
from ..core.rank_rule import Rank, check_rank
from ..probe.settings import Probing
from .out_rank import OUT_RANK_FORMS, OutRank, is_out_rank, parse_percentage, parse_size_limit

Strength = float | str
TEXT_ENCODER = ("copy", "project", "skip")
DROPPED = ("skip", "sum")
VECTORS = ("copy", "skip")
PROBE = "probe"
METHOD_NAMES = (AUTO, *METHODS)
"""What `transfer` takes."""


@dataclass(frozen=True)
class Options:
    """How to transfer; each choice the paper leaves open is named here and reported.

    Attributes:
        method: a name of `METHODS`; "auto" takes what the study
            in docs/evidence.md found best for bases as far apart as these; "probe" runs the models
            and needs pipeline folders.
        rank: columns of the subspaces, or the share of energy they hold.
        match: "name"; "similarity" (see `matching`); a JSON file or a mapping {target module:
            source module}.
        dropped: "skip" leaves out the updates of blocks that the target has dropped, "sum" adds
            them to those of the nearest block that is still there.
        threshold: the Φ that left and right must both reach; a pair below it gets no update.
            `copy` looks at no weights and gates nothing.
        damping: κ of "damped"; None means chosen from the drift between the bases.
        strength: factor on every update; "auto" is chosen from the drift between the bases. None
            means "auto" for method "auto" and 1 for a method asked for by name.
        out_rank: "exact" keeps every singular value of the result, an int at most that many, a
            share between 0 and 1 the fewest that hold that much of an update's energy, "50%" half
            as many as the LoRA's own rank, "100MB" those that fit a file of that size, spent where
            they hold most energy. Method "probe" fits updates of that rank or share, "exact" being
            its own default.
        text_encoder: "copy" carries the text-encoder part over unchanged, "project" moves it like
            all else where both bases hold its weights, "skip" leaves it out.
        vectors: "copy" carries trained biases and normalisation layers over to the modules they
            belong to, "skip" leaves them out.
        min_coverage: LowCoverage below this share of the LoRA's modules.
        cache: folder that keeps subspaces between LoRAs; None keeps nothing.
        device: where to compute; None means the CPU.
        max_memory: bytes this process may take in memory; None sets no bound.
        probe: what "probe" samples.
        progress: called as progress(done, total, name).
    """

    method: str = AUTO
    rank: Rank = DEFAULT_RANK
    match: Match = "name"
    dropped: str = "skip"
    threshold: float = DEFAULT_THRESHOLD
    damping: float | None = None
    strength: Strength | None = None
    out_rank: OutRank = "exact"
    text_encoder: str = "copy"
    vectors: str = "copy"
    min_coverage: float = 0.0
    cache: str | PathLike[str] | None = None
    device: str | None = None
    max_memory: int | None = None
    probe: Probing = field(default_factory=Probing)
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Refuses what makes no sense before anything is read."""
        check_rank(self.rank)
        if self.method not in METHOD_NAMES:
            raise ValueError(
                f"unknown method {self.method!r}: choose from {', '.join(METHOD_NAMES)}"
            )
        if self.damping is not None and not (0 <= self.damping < math.inf):
            raise ValueError(f"damping must be 0 or more, not {self.damping!r}")
        if isinstance(self.strength, str):
            if self.strength != AUTO:
                raise ValueError(f'strength must be a number or "auto", not {self.strength!r}')
        elif self.strength is not None and not (0 < self.strength < math.inf):
            raise ValueError(f"strength must be a positive number, not {self.strength!r}")
        if not is_out_rank(self.out_rank):
            raise ValueError(f"out_rank must be {OUT_RANK_FORMS}, not {self.out_rank!r}")
        measured = parse_percentage(self.out_rank) or parse_size_limit(self.out_rank)
        if self.method == PROBE and measured is not None:
            raise ValueError(
                f"out_rank {self.out_rank!r} is for LoRAs that are moved; method {PROBE} fits new "
                "ones: give a rank or a share of the energy"
            )
        for name, value, words in (
            ("text_encoder", self.text_encoder, TEXT_ENCODER),
            ("dropped", self.dropped, DROPPED),
            ("vectors", self.vectors, VECTORS),
        ):
            if value not in words:
                raise ValueError(f"{name} must be one of {', '.join(words)}, not {value!r}")

    def decide(self, verdict: Verdict | None) -> Options:
        """The options with method, strength and damping settled.

        Args:
            verdict: on the pair of bases; None where no weight is moved, so that there is nothing
                to choose a method by.
        """
        if verdict is not None:
            return replace(self, **vars(verdict.decide(self.method, self.strength, self.damping)))
        method = "copy" if self.method in (AUTO, "damped") else self.method
        return replace(self, method=method, strength=self.factor)

    @property
    def kappa(self) -> float:
        """The damping as a number, once it is known; 0 before."""
        return self.damping or 0.0

    @property
    def factor(self) -> float:
        """The strength as a number, once it is known (see `decide`); 1 before."""
        return float(self.strength) if isinstance(self.strength, float | int) else 1.0
